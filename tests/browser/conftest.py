"""A real Chromium, driven by playwright: Debian's, as the wheels bring none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from tests.support import programs, webs, worlds

ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
LAPTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}

# What a page of ours must never do: break its own policy, or run what somebody has written into an id.
_WATCH = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => window.violations.push(event.violatedDirective));
window.alert = () => { window.violations.push("a script ran"); };
"""


# Not for the session: while playwright is there its event loop runs in this thread, and no other test could run one.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=programs.path("chromium"), args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def world(redis_url: str, sqlite_url: str, namespace: str) -> Iterator[worlds.World]:
    with worlds.World(redis_url, sqlite_url, namespace) as made:
        yield made


@pytest.fixture
def web(world: worlds.World) -> Iterator[webs.Served]:
    with webs.serving(world, webs.ACTING) as served:
        yield served


@pytest.fixture
def open_page(browser: Browser, web: webs.Served) -> Iterator[Callable[..., Page]]:
    """Opens pages: ``open_page(viewport=PHONE, color_scheme="dark")``. At the end none may have broken the policy."""
    contexts: list[BrowserContext] = []
    pages: list[Page] = []
    said: list[str] = []

    def open_(**options: Any) -> Page:
        context = browser.new_context(base_url=web.url, **{"viewport": LAPTOP, **options})
        context.set_default_timeout(20_000)
        context.add_init_script(_WATCH)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        pages.append(page)
        return page

    try:
        yield open_
        for page in pages:
            assert page.evaluate("window.violations || []") == []
        assert [text for text in said if "Security Policy" in text or "Error:" in text] == []
    finally:
        for context in contexts:
            context.close()


def log_in(page: Page, name: str = "ann") -> None:
    page.goto("/login")
    page.get_by_label("Your name").fill(name)
    page.get_by_label("Token of this deployment").fill(webs.TOKEN)
    page.get_by_role("main").get_by_role("button", name="Log in").click()
    page.get_by_role("button", name="Log out").wait_for()
