"""The web application of a world, served by uvicorn on a real socket, in a thread of the test's process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import uvicorn

from statecache.web import create_app, server
from statecache.web.policy import Policy
from tests.support import worlds
from tests.support.waiting import wait_until

TOKEN = "a token for tests only"
ACTING = Policy(TOKEN, actions=True)


class Served(httpx.Client):
    """A client of a served application. ``url`` is where it is; ``bearer`` the header that lets one act."""

    bearer = {"Authorization": f"Bearer {TOKEN}"}  # noqa: RUF012

    def __init__(self, url: str) -> None:
        super().__init__(base_url=url, timeout=30.0)
        self.url = url


@contextmanager
def serving(world: worlds.World, policy: Policy | None = None) -> Iterator[Served]:
    """Serve a world's store until the block ends."""
    app = create_app(world.cache, policy or Policy(), machines=(worlds.Order,))
    bound = server.bind("127.0.0.1", 0)
    running = uvicorn.Server(server.configuration(app))
    thread = threading.Thread(target=running.run, args=([bound],))
    thread.start()
    try:
        wait_until(lambda: running.started, "the web server answers")
        with Served(f"http://127.0.0.1:{bound.getsockname()[1]}") as client:
            yield client
    finally:
        app.state.site.closing = True
        running.should_exit = True
        thread.join(30)
        bound.close()
