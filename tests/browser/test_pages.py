"""The pages in a browser: found, read, live, acted upon, and safe."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import quote

import pytest
from playwright.sync_api import Page, expect

from statecache.core import errors
from tests.acceptance.command import run
from tests.browser.conftest import PHONE, log_in
from tests.support import webs, worlds
from tests.support.waiting import wait_until

pytestmark = pytest.mark.needs("chromium")

EVIL = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>/../%2e?#{{7*7}}&amp;"
Open = Callable[..., Page]


def elsewhere(world: worlds.World, *words: str) -> None:
    """Another process acts on the same store."""
    where = ("--redis-url", world.redis_url, "--database-url", world.database_url, "--namespace", world.namespace)
    done = run(*words, *where)
    assert done.code == 0, done.err


def test_search_leads_to_where_it_is(world: worlds.World, open_page: Open) -> None:
    world.orders.start("1001", {"amount": 12.5}, actor="shop")
    world.orders.transition("1001", "pay", {"method": "card"}, actor="billing", reason="webhook 7")
    page = open_page()
    page.goto("/")
    page.get_by_role("main").get_by_role("searchbox").fill("1001")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("1001")
    expect(page.locator("#now .badge")).to_have_text("paid")
    expect(page.locator("#now")).to_contain_text("step 2 of 4")
    expect(page.locator("#now")).to_contain_text("webhook 7")
    expect(page.locator("svg .box.here")).to_contain_text("paid")
    expect(page.locator("svg .box.been")).to_contain_text("placed")
    expect(page.get_by_role("row", name="amount")).to_contain_text("12.5")
    expect(page.locator(".timeline > li")).to_have_count(2)
    page.get_by_role("link", name="As it was at version 1").click()
    expect(page.locator("#now .badge")).to_have_text("placed")
    expect(page.locator("svg .box.here")).to_contain_text("placed")
    expect(page.locator("#data")).not_to_contain_text("method")
    page.get_by_role("link", name="Back to now").click()
    expect(page.locator("#now .badge")).to_have_text("paid")


def test_search_by_a_beginning(world: worlds.World, open_page: Open) -> None:
    for id in ("a-1", "a-2", "b-1"):
        world.start(id)
    world.flush()
    page = open_page()
    page.goto("/?q=a-")
    expect(page.locator(".hits li")).to_have_count(2)
    page.get_by_role("link", name="a-2").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("a-2")


def test_a_transition_of_another_process_appears_without_a_reload(world: worlds.World, open_page: Open) -> None:
    world.start("1")
    page = open_page()
    page.goto("/instance?machine=order&id=1")
    expect(page.locator("#live-state")).to_have_text("This page is live.")
    page.evaluate("window.same = true")
    elsewhere(world, "transition", "order:1", "pay", "--actor", "cli")
    expect(page.locator("#now .badge")).to_have_text("paid")
    expect(page.locator("svg .box.here")).to_contain_text("paid")
    expect(page.locator(".timeline > li").first).to_contain_text("cli")
    expect(page.get_by_role("status")).to_have_text("paid, version 2")
    assert page.evaluate("window.same"), "the page was not loaded again"


def test_health_is_live(world: worlds.World, open_page: Open) -> None:
    page = open_page()
    page.goto("/health")
    backlog = page.locator(".tile", has_text="Backlog").locator("dd")
    expect(backlog).to_have_text("0")
    elsewhere(world, "start", "order:1")
    expect(backlog).to_have_text("1")
    world.flush()
    expect(backlog).to_have_text("0")


def test_an_action_by_keyboard(world: worlds.World, open_page: Open) -> None:
    world.start("1")
    page = open_page()
    log_in(page, "Ann")
    page.goto("/instance?machine=order&id=1")
    page.get_by_label("Why").focus()
    page.keyboard.type("paid in cash")
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="pay", exact=True)).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#now .badge")).to_have_text("paid")
    expect(page.locator(".timeline > li").first).to_contain_text("paid in cash")
    last = world.orders.history("1")[-1]
    assert (last.event, last.actor, last.reason) == ("pay", "web:Ann", "paid in cash")


def test_what_is_being_typed_stays_and_an_overtaken_action_is_refused(world: worlds.World, open_page: Open) -> None:
    """Somebody types a reason; another process moves the instance; the form is sent: it speaks of a version that is gone."""
    world.start("1")
    page = open_page()
    log_in(page)
    page.goto("/instance?machine=order&id=1")
    expect(page.locator("#live-state")).to_have_text("This page is live.")
    page.get_by_label("Why").type("half a sen")
    elsewhere(world, "transition", "order:1", "pay")
    expect(page.locator("#now .badge")).to_have_text("paid")
    expect(page.get_by_label("Why")).to_have_value("half a sen")
    page.get_by_label("Why").press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("Somebody else has moved it")
    assert world.orders.get("1").version == 2
    page.get_by_role("link", name="Back").click()
    expect(page.get_by_role("button", name="ship")).to_be_visible()


def test_after_typing_the_waiting_part_is_shown(world: worlds.World, open_page: Open) -> None:
    world.start("1")
    page = open_page()
    log_in(page)
    page.goto("/instance?machine=order&id=1")
    expect(page.locator("#live-state")).to_have_text("This page is live.")
    page.get_by_label("Why").focus()
    world.orders.transition("1", "pay")
    expect(page.locator("#now .badge")).to_have_text("paid")
    expect(page.get_by_role("button", name="pay", exact=True)).to_be_visible()
    page.evaluate("document.activeElement.blur()")
    expect(page.get_by_role("button", name="ship")).to_be_visible()


def test_hostile_ids_and_data_are_only_text(world: worlds.World, open_page: Open) -> None:
    """Scripts, tags, template and URL syntax in id, data, actor, reason and name: nothing runs, every link works."""
    world.orders.start(EVIL, {"note": EVIL, "deep": [{EVIL: EVIL}]}, actor=EVIL, reason=EVIL)
    world.flush()
    page = open_page()
    log_in(page, EVIL[:60])
    title = page.title()
    page.goto("/?q=" + quote(EVIL[:9], safe=""))
    page.get_by_role("link", name=EVIL).click()
    expect(page.get_by_role("heading", level=1)).to_have_text(EVIL)
    assert EVIL in page.title() != title
    expect(page.locator("#live-state")).to_have_text("This page is live.")
    world.orders.transition(
        EVIL, "pay", {"note": "</td></table><script>alert(2)</script>"}, reason="<img src=x onerror=alert(3)>"
    )
    expect(page.locator("#now .badge")).to_have_text("paid")
    expect(page.locator("#now")).to_contain_text("<img src=x onerror=alert(3)>")
    assert page.locator("main img, main script").count() == 0
    page.get_by_role("button", name="ship").click()
    expect(page.locator("#now .badge")).to_have_text("shipped")
    page.get_by_role("link", name="As it was at version 1").click()
    expect(page.locator("#now .badge")).to_have_text("placed")
    page.goto("/machines/order")
    page.get_by_role("link", name=EVIL).click()
    expect(page.get_by_role("heading", level=1)).to_have_text(EVIL)


def test_dots_are_an_id_too(world: worlds.World, open_page: Open) -> None:
    for id in (".", "..", "../..", "%2e%2e"):
        world.start(id)
        page = open_page()
        page.goto("/?q=" + quote(id, safe=""))
        expect(page.get_by_role("heading", level=1)).to_have_text(id)


def test_without_javascript_everything_but_live_works(world: worlds.World, open_page: Open, web: webs.Served) -> None:
    world.start("1")
    page = open_page(java_script_enabled=False)
    log_in(page)
    page.goto("/")
    page.get_by_role("main").get_by_role("searchbox").fill("1")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="pay", exact=True).click()
    expect(page.locator("#now .badge")).to_have_text("paid")


def test_dead_letters_are_retried_from_the_page(world: worlds.World, open_page: Open) -> None:
    from tests.support import refusing

    world.start("bad", ["pay"])
    world.flush()
    refusing.refuse(world.durable)
    world.orders.transition("bad", "note", reason=refusing.REASON)
    world.flush()
    page = open_page()
    log_in(page)
    page.goto("/health")
    page.get_by_role("link", name="order:bad").click()
    expect(page.locator("#now")).to_contain_text("It is parked")
    refusing.accept(world.durable)
    page.get_by_role("button", name="Retry the dead letters").click()
    expect(page.locator("#now")).not_to_contain_text("It is parked")
    assert world.orders.transition("bad", "ship").state == "shipped"


def test_a_dry_run_is_reported(world: worlds.World, open_page: Open) -> None:
    world.start("1")
    page = open_page()
    log_in(page)
    page.goto("/health")
    page.get_by_role("button", name="Dry run").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Dry run of a recovery")
    assert world.cache.durable.identity().epoch == 1


def test_the_stream_comes_back_after_trouble(world: worlds.World, open_page: Open) -> None:
    """The instance is discarded from under the page (as after a restore of SQL): the page says so, and goes on later."""
    world.start("1")
    page = open_page()
    page.goto("/instance?machine=order&id=1")
    expect(page.locator("#live-state")).to_have_text("This page is live.")
    world.wipe()
    world.cache.recover()
    expect(page.locator("#live-state")).to_contain_text("does not exist")

    def started() -> bool:
        try:
            return bool(world.orders.start("1"))
        except errors.RecoveringError:
            return False

    wait_until(started, "it is started again")
    expect(page.locator("#live-state")).to_have_text("This page is live.")


def test_on_a_phone_the_diagram_shows_where_it_is(world: worlds.World, open_page: Open) -> None:
    world.start("1", ["pay", "ship", "deliver"])
    page = open_page(viewport=PHONE)
    page.goto("/instance?machine=order&id=1")
    expect(page.locator("svg .box.here rect").first).to_be_in_viewport()
