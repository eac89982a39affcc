"""Every page for every reader: phone and laptop, light and dark, keyboard and screen reader."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from statecache import State, StateMachine
from tests.browser.conftest import LAPTOP, PHONE, log_in
from tests.support import refusing, webs, worlds

pytestmark = pytest.mark.needs("chromium")

Open = Callable[..., Page]
PAGES = [
    "/", "/?q=1", "/?q=nothing", "/instance?machine=order&id=1", "/instance?machine=order&id=1&version=1",
    "/instance?machine=order&id=bad", "/instance?machine=pipeline&id=1", "/machines/order", "/machines/pipeline",
    "/machines/order/instances?state=paid", "/health", "/login", "/machines/nobody",
]  # fmt: skip


class Pipeline(StateMachine):
    """More states than are drawn whole, with long titles."""

    s0 = State(initial=True, title="The very first of all the states of this pipeline")
    s1, s2, s3, s4, s5, s6 = (State(title=f"Step {n} with a rather long title, as logs have them") for n in range(1, 7))
    s7, s8, s9, s10, s11, s12, s13 = (State() for _ in range(7))
    go = s0.to(s1) | s1.to(s2) | s2.to(s3) | s3.to(s4) | s4.to(s5) | s5.to(s6) | s6.to(s7) | s7.to(s8) | s8.to(s9)
    on = s9.to(s10) | s10.to(s11) | s11.to(s12) | s12.to(s13)
    back = s3.to(s1) | s5.to(s2) | s1.to(s7)
    skip = s1.to(s9)


@pytest.fixture
def filled(world: worlds.World) -> worlds.World:
    world.orders.start("1", {"amount": 1, "word": "x" * 400, "list": [1] * 60}, actor="a" * 200, reason="because " * 60)
    world.orders.transition("1", "pay", actor="b")
    for number in range(30):
        world.start(f"1-{number}-{'w' * (number * 5)}", ["pay"])
    world.cache.machine(Pipeline).start("1")
    world.cache.machine(Pipeline).transition("1", "go")
    world.start("bad", ["pay"])
    world.flush()
    refusing.refuse(world.durable)
    world.orders.transition("bad", "note", reason=refusing.REASON)
    world.flush()
    return world


AUDIT = (Path(__file__).parent / "audit.js").read_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", ["laptop", "phone"])
def test_every_page_is_in_order(filled: worlds.World, open_page: Open, scheme: str, size: str) -> None:
    """Landmarks, headings, names, labels, contrast; and nothing sticks out of the window, however long a word is."""
    page = open_page(viewport=PHONE if size == "phone" else LAPTOP, color_scheme=scheme)
    log_in(page)
    for path in PAGES:
        page.goto(path)
        assert page.evaluate(AUDIT) == [], path
        wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, f"{path} is {wide} pixels too wide"


def test_the_audit_sees_what_is_wrong(open_page: Open) -> None:
    page = open_page()
    page.goto("/")
    page.evaluate("""() => {
      document.querySelector("main").innerHTML = "<h1>a</h1><h3>b</h3><input><button></button><div id=q></div>" +
        "<p aria-labelledby=none>x</p><table><tr><td>1</table><svg></svg><p id=faint>hard to read</p>";
      document.getElementById("faint").style.setProperty("color", "rgb(200, 200, 200)");
    }""")
    found = " ".join(page.evaluate(AUDIT))
    for problem in (
        "heading skips",
        "no name",
        "no label",
        "points at nothing",
        "without headings",
        "svg without",
        "contrast",
    ):
        assert problem in found


def test_dark_and_light_differ(open_page: Open) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        page = open_page(color_scheme=scheme)
        page.goto("/")
        grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert grounds == ["rgb(250, 249, 246)", "rgb(22, 21, 19)"]


OUTLINE = (
    "(({outlineStyle, outlineWidth}) => `${outlineStyle} ${outlineWidth}`)(getComputedStyle(document.activeElement))"
)


def test_by_keyboard_alone(filled: worlds.World, open_page: Open) -> None:
    """The first key leads past the header; every place that the keyboard reaches shows that it is there."""
    page = open_page()
    page.goto("/instance?machine=order&id=1")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#main")).to_be_focused()
    outlines = []
    page.keyboard.press("Tab")
    while page.evaluate("document.activeElement !== document.body"):
        outlines.append(page.evaluate(OUTLINE))
        page.keyboard.press("Tab")
    assert len(outlines) >= 6
    assert set(outlines) == {"solid 2px"}


def test_what_a_screen_reader_is_told(filled: worlds.World, open_page: Open) -> None:
    page = open_page()
    page.goto("/instance?machine=order&id=1")
    for landmark in ("banner", "main", "contentinfo"):
        assert page.get_by_role(landmark).count() == 1  # type: ignore[arg-type]
    expect(page.get_by_role("navigation", name="Main")).to_be_visible()
    expect(page.get_by_role("img", name="Where 1 is in its machine")).to_be_visible()
    described = page.locator("#diagram-desc").text_content()
    assert described == "paid. Came by placed, paid."
    expect(page.get_by_role("list").filter(has=page.get_by_role("heading", name="Started"))).to_have_count(1)


def test_on_paper_of_another_origin_it_is_not_framed(browser: Browser, web: webs.Served) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.set_content(f'<iframe src="{web.url}/"></iframe>')
    page.wait_for_load_state("networkidle")
    assert "Where is it right now?" not in "".join(frame.content() for frame in page.frames)
    context.close()
