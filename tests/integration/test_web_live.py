"""Live parts of pages: streams of server-sent events."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from statecache import StateCache
from statecache.web import live
from statecache.web.policy import Policy
from tests.acceptance.command import Running
from tests.support import servers, webs, worlds
from tests.support.waiting import wait_until


class Listener:
    """Reads a stream in a thread. ``events`` are (name, data)."""

    def __init__(self, url: str, path: str, headers: dict[str, str] | None = None) -> None:
        self.events: list[tuple[str, Any]] = []
        self.status = 0
        self.over = threading.Event()
        self._url, self._headers = f"{url}{path}", headers
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        wait_until(lambda: self.status, "the stream begins")

    def _read(self) -> None:
        try:
            with httpx.stream("GET", self._url, headers=self._headers, timeout=60) as answer:
                self.status = answer.status_code
                name = ""
                for line in answer.iter_lines():
                    if line.startswith("event: "):
                        name = line.removeprefix("event: ")
                    elif line.startswith("data: "):
                        self.events.append((name, json.loads(line.removeprefix("data: "))))
        except httpx.HTTPError:
            pass
        finally:
            self.over.set()

    def wait(self, wanted: Callable[[str, Any], bool], what: str) -> Any:
        return wait_until(lambda: next((data for name, data in self.events if wanted(name, data)), None), what, 20)


@pytest.fixture
def world(redis_url: str, sqlite_url: str, namespace: str) -> Iterator[worlds.World]:
    with worlds.World(redis_url, sqlite_url, namespace) as made:
        yield made


def test_a_transition_of_another_client_appears(world: worlds.World) -> None:
    world.start("1")
    with webs.serving(world) as web:
        key = f"{world.orders.get('1').version}.0.0"
        listener = Listener(web.url, f"/live/instance?machine=order&id=1&key={key}")
        world.more().machine(worlds.Order).transition("1", "pay", reason="<b>why</b>")
        parts = listener.wait(lambda name, data: data.get("announce") == "paid, version 2", "the new state is told")
        assert set(parts) == {"now", "data", "act", "history", "announce"}
        assert "&lt;b&gt;why&lt;/b&gt;" in parts["history"]
        assert "not in SQL yet" in parts["history"]
        world.flush()
        listener.wait(lambda name, data: "not in SQL yet" not in data.get("history", "not in SQL yet"), "it is in SQL")
    assert listener.over.wait(20), "the server's end is the stream's"


def test_health_is_live(world: worlds.World) -> None:
    with webs.serving(world) as web:
        listener = Listener(web.url, "/live/health")
        listener.wait(lambda name, data: "health" in data, "the figures come at once")
        world.start("1")
        listener.wait(lambda name, data: 'class="behind"' in data.get("health", ""), "the backlog is told")


def test_streams_are_bounded(world: worlds.World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two may be open; the third is refused; when one has gone there is room again."""
    monkeypatch.setattr(live, "STREAMS_MAX", 2)
    with webs.serving(world) as web:
        one = httpx.Client()
        with one.stream("GET", f"{web.url}/live/health"):
            Listener(web.url, "/live/health")
            refused = web.get("/live/health")
            assert (refused.status_code, refused.headers["content-type"]) == (503, "application/problem+json")
        one.close()

        def room() -> bool:
            with httpx.stream("GET", f"{web.url}/live/health", timeout=30) as answer:
                return answer.status_code == 200

        wait_until(room, "the one that has gone makes room", 30)


def test_trouble_is_told_and_passes(
    start_redis: Callable[..., servers.ValkeyServer], sqlite_url: str, namespace: str
) -> None:
    server = start_redis()
    short = {"call_timeout_seconds": 0.5, "socket_timeout_seconds": 0.5}
    with worlds.World(server.url, sqlite_url, namespace, **short) as world, webs.serving(world) as web:
        world.start("1")
        listener = Listener(web.url, "/live/instance?machine=order&id=1&key=1.0.0")
        server.kill()
        told = listener.wait(lambda name, data: name == "trouble", "the trouble is told")
        assert told["message"]
        server.start()
        listener.wait(lambda name, data: "announce" in data, "it is live again")


def test_streams_need_what_pages_need(world: worlds.World) -> None:
    with webs.serving(world, Policy(webs.TOKEN, local=False)) as web:
        assert web.get("/live/health").status_code == 401
        assert Listener(web.url, "/live/health", web.bearer).status == 200


def test_a_server_with_open_streams_ends_at_a_signal(data_folder: Path) -> None:
    with StateCache.embedded(data_folder) as cache:
        cache.machine(worlds.Order).start("1")
    process = Running(data_folder.parent, "serve", "--port", 0, "--json", "--data-dir", data_folder)
    try:
        url = wait_until(lambda: process.documents(), "it prints where it serves", 60)[0]["url"]
        listener = Listener(url, "/live/health")
        listener.wait(lambda name, data: "health" in data, "it is live")
        process.send(signal.SIGTERM)
        assert process.wait() == 0, process.printed
        assert listener.over.wait(20)
        assert "Traceback" not in process.printed
        assert "Cancel" not in process.printed
    finally:
        process.end(signal.SIGTERM, signal.SIGKILL)
