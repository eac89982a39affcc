"""``engine/doctor.py`` and the commands of ``cli/care.py`` on real servers."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from statecache.cli import app
from statecache.core import errors
from statecache.engine import doctor
from statecache.engine.cache import StateCache
from statecache.hot.store import HotStore
from tests.support import refusing
from tests.support.servers import ValkeyServer
from tests.support.worlds import World


def _verdicts(cache: StateCache) -> dict[str, str]:
    return {check.name: check.verdict for check in doctor.examine(cache)}


def test_a_server_that_evicts_fails(start_redis: Callable[..., ValkeyServer], sqlite_url: str) -> None:
    server = start_redis(maxmemory_policy="allkeys-lru", appendonly="no")
    with StateCache.connect(server.url, sqlite_url) as cache:
        verdicts = _verdicts(cache)
        assert verdicts["maxmemory-policy"] == doctor.FAIL
        assert verdicts["append-only file"] == doctor.WARN
        assert verdicts["database durability"] == doctor.OK
        assert verdicts["server version"] == doctor.OK
    assert app.run(["doctor", "--redis-url", server.url, "--database-url", sqlite_url, "--json"]) == 1


def test_connecting_to_an_old_server_is_refused(
    redis_url: str, sqlite_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HotStore, "server_facts", lambda self: {"redis_version": "6.0.16"})
    with pytest.raises(errors.ConfigurationError, match=r"Redis 6\.0\.16: Redis 7\.0 or newer is needed"):
        StateCache.connect(redis_url, sqlite_url, namespace)


def test_dead_letters_are_listed_retried_and_discarded(
    redis_url: str, sqlite_url: str, namespace: str, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--redis-url", redis_url, "--database-url", sqlite_url, "--namespace", namespace, "--json"]
    with World(redis_url, sqlite_url, namespace) as world:
        world.start("1")
        world.start("2")
        refusing.refuse(world.durable)
        for id in ("1", "2"):
            world.orders.transition(id, "pay", {"amount": 1, "by": ["card"]}, reason=refusing.REASON)
        world.orders.transition("1", "note")
        world.flush()
        assert app.run(["dead-letters", "retry", "order:1", *where]) == 1
        told = json.loads(capsys.readouterr().err.splitlines()[-1])["error"]["message"]
        assert told.startswith("order:1: SQL refuses this data")
        assert "its letters (version 2 on) and retry, or discard them" in told
        refusing.accept(world.durable)

        def run(*words: str) -> tuple[int, dict[str, object]]:
            code = app.run([*words, *where])
            return code, json.loads(capsys.readouterr().out or "{}")

        code, listed = run("dead-letters", "list")
        assert code == 1
        letters: Any = listed["letters"]
        assert [letter["id"] for letter in letters] == ["1", "1", "2"]
        patch = {"amount": 1, "by": ["card"]}
        assert [letter["patch"] for letter in letters] == [patch, {}, patch], "as history has it"
        with world.durable.database.writer.begin() as connection:
            connection.exec_driver_sql("UPDATE statecache_dead_letters SET patch = 'no JSON' WHERE id = '2'")
        assert run("dead-letters", "list", "order:2")[1]["letters"][0]["patch"] == "no JSON"  # type: ignore[index]
        assert _verdicts(world.cache)["dead letters"] == doctor.WARN
        assert run("dead-letters", "retry", "order:1", "--dry-run")[0] == 1
        assert run("dead-letters", "retry", "order:1") == (
            0,
            {"address": "order:1", "action": "retry", "letters": 2, "dry_run": False},
        )
        assert run("dead-letters", "discard", "order:2")[0] == 2, "it loses transitions: --yes is wanted"
        assert run("dead-letters", "discard", "order:2", "--yes")[0] == 0
        assert run("dead-letters", "list")[0] == 0
        assert app.run(["dead-letters", "list", *where[:-1]]) == 0
        assert capsys.readouterr().out == "no dead letters\n"
        assert (world.orders.get("1").version, world.orders.get("2").version) == (3, 1)
        world.verify()
