"""``statecache serve`` as a process: what it refuses, what it prints, how it ends."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from statecache import StateCache
from tests.acceptance.command import Running, run_here
from tests.support import worlds
from tests.support.waiting import wait_until


@contextmanager
def serving(folder: Path, *arguments: object) -> Iterator[tuple[Running, dict[str, Any]]]:
    process = Running(folder, "serve", "--port", 0, "--json", *arguments)
    try:
        yield process, wait_until(lambda: process.documents(), "it prints where it serves", 60)[0]
    finally:
        process.end(signal.SIGTERM, signal.SIGKILL)


def test_it_serves_a_folder_until_a_signal(data_folder: Path) -> None:
    with StateCache.embedded(data_folder) as cache:
        cache.machine(worlds.Order).start("1")
    with serving(data_folder.parent, "--data-dir", data_folder) as (process, told):
        assert told["actions"] is False
        assert httpx.get(f"{told['url']}/readyz").json()["ready"]
        assert httpx.get(f"{told['url']}/api/v1/where?id=1").json()["exact"][0]["state"] == "placed"
        process.send(signal.SIGTERM)
        assert process.wait() == 0, process.printed
        assert "Traceback" not in process.printed
        assert "no longer serving, closing the store; signal again to stop now" in process.printed
        assert "batch" not in process.printed


def test_what_it_writes_into_a_folder_is_flushed(data_folder: Path) -> None:
    """Nobody but its users flushes an embedded store."""
    token = "a token for tests only"
    with StateCache.embedded(data_folder) as cache:
        cache.machine(worlds.Order)
    where = ("--data-dir", data_folder, "--actions", "--token", token)
    with serving(data_folder.parent, *where) as (process, told):
        headers = {"Authorization": f"Bearer {token}"}
        body = {"id": "1", "durability": "durable"}
        assert httpx.post(f"{told['url']}/api/v1/instances/order", json=body, headers=headers).status_code == 201
        assert httpx.get(f"{told['url']}/api/v1/counts/order").json() == {"placed": 1}
        process.send(signal.SIGTERM)
        assert process.wait() == 0, process.printed
        assert token not in process.printed


def test_it_refuses_what_is_not_safe(data_folder: Path) -> None:
    for arguments, rule in (
        (["--host", "0.0.0.0"], "needs a token"),
        (["--actions"], "actions need a token"),
        (["--token", "short"], "web_token"),
        (["--host", "no such host.invalid", "--token", "a token for tests only"], "web_host"),
    ):
        if rule == "web_host":
            StateCache.embedded(data_folder).close()
        refused = run_here("serve", "--data-dir", data_folder, *arguments, "--json")
        assert (refused.code, refused.error["type"]) == (2, "ConfigurationError"), refused
        assert rule in refused.error["message"]
    assert "short" not in run_here("serve", "--data-dir", data_folder, "--token", "short").err.replace("shorter", "")


def test_an_address_in_use(data_folder: Path) -> None:
    StateCache.embedded(data_folder).close()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused = run_here("serve", "--data-dir", data_folder, "--port", port, "--json")
    assert (refused.code, refused.error["type"]) == (3, "UnavailableError")
