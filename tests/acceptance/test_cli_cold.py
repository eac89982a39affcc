"""``statecache evict`` and ``statecache warm``: what they tell, what they do, their exit codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import redis

from statecache import StateCache
from tests.acceptance.command import REPOSITORY, Result, run, run_here
from tests.support import servers
from tests.support.waiting import wait_until

ORDER = REPOSITORY / "config" / "machines" / "order.yaml"
COUNT = 5


@pytest.fixture
def where(redis_url: str, sqlite_url: str, namespace: str) -> list[str]:
    """The options that name a store with five flushed orders, one of them moved since, and not flushed."""
    where = ["--redis-url", redis_url, "--database-url", sqlite_url, "--namespace", namespace]
    assert run_here("machine", "register", ORDER, *where).code == 0
    with StateCache.connect(redis_url, sqlite_url, namespace) as cache:
        orders = cache.machine("order")
        for number in range(COUNT):
            at_ms = orders.start(str(number), {"amount": number}).at_ms
            wait_until(lambda at_ms=at_ms: cache.hot.time_ms() > at_ms, "the next millisecond")  # type: ignore[misc]
        cache.flush()
        orders.transition("0", "pay")
    return where


@pytest.fixture
def on(where: list[str]) -> Callable[..., Result]:
    return lambda *arguments: run_here(*arguments, *where)


def hot(where: list[str]) -> set[str]:
    with redis.Redis.from_url(where[1]) as client:
        return {key.decode().rpartition(":")[2] for key in client.scan_iter(match="*:i:order:*")}


def test_dry_run_tells_who_would_go_and_nobody_goes(on: Callable[..., Result], where: list[str]) -> None:
    told = on("evict", "--older-than", "1ms", "--dry-run", "--json")
    assert (told.code, told.document["dry_run"], told.document["evicted"]) == (1, True, COUNT - 1)
    assert told.document["kept"] == {"moved": 1}
    assert "would be evicted" in on("evict", "--older-than", "1ms", "--dry-run").out
    assert hot(where) == set("01234")
    assert on("evict", "--older-than", "1h", "--dry-run").code == 0, "nobody is idle for so long"
    assert on("evict", "--dry-run").code == 0, "no age is set, and no bound"


def test_evict_and_warm(on: Callable[..., Result], where: list[str]) -> None:
    done = on("evict", "--older-than", "1ms", "--json")
    assert (done.code, done.document["evicted"], done.document["kept"], done.document["more"]) == (
        0,
        4,
        {"moved": 1},
        False,
    )
    assert hot(where) == {"0"}
    seen = on("where", "order:3", "--json").document
    assert (seen["state"], seen["version"], seen["data"], seen["source"]) == ("placed", 1, {"amount": 3}, "durable")
    again = on("evict", "--older-than", "1ms", "--machine", "order")
    assert again.code == 0
    assert "4" in next(line for line in again.out.splitlines() if "cold already" in line)
    told = on("warm", "--dry-run", "--json")
    assert (told.code, told.document["dry_run"], told.document["candidates"], hot(where)) == (1, True, COUNT, {"0"})
    assert "2 instances at most" in on("warm", "--limit", "2", "--dry-run").out
    some = on("warm", "--limit", "2", "--json")
    assert (some.code, some.document["warmed"]) == (0, 2)
    assert hot(where) == {"0", "3", "4"}, "those that moved last"
    every = on("warm")
    assert every.code == 0
    assert "brought back" in every.out
    assert hot(where) == set("01234")
    assert on("transition", "order:1", "pay", "--json").document["version"] == 2
    assert on("flusher", "--once").code == 0
    assert on("verify").code == 0


def test_settings_say_who_goes(on: Callable[..., Result], where: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ``--older-than`` the settings decide: a bound of two instances, the longest idle first."""
    monkeypatch.setenv("STATECACHE_HOT_INSTANCES_MAX", "2")
    told = on("evict", "--dry-run", "--json")
    assert (told.code, told.document["evicted"]) == (1, 3)
    done = on("evict", "--json")
    assert (done.code, done.document["evicted"], done.document["above"]) == (0, 3, 0)
    assert hot(where) == {"0", "4"}


def test_a_process_evicts(where: list[str]) -> None:
    done = run("evict", "--older-than", "1ms", *where, "--json")
    assert (done.code, done.document["evicted"]) == (0, 4)
    assert run("warm", *where, "--json").document["warmed"] == 4


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("evict", "--older-than", "soon"), 2, "soon"),
        (("evict", "--older-than", "-1h"), 2, "-1h"),
        (("warm", "--limit", "0"), 2, "--limit"),
        (("warm", "--limit", "many"), 2, "--limit"),
        (("evict", "--machine", "invoice"), 1, "invoice"),
        (("warm", "--machine", "invoice"), 1, "invoice"),
    ],
)
def test_what_cannot_be_done_changes_nothing(
    on: Callable[..., Result], where: list[str], arguments: tuple[str, ...], code: int, said: str
) -> None:
    result = on(*arguments)
    assert (result.code, result.out) == (code, "")
    assert said in result.err
    assert hot(where) == set("01234")


def test_a_store_that_is_away_is_code_3(private_redis: servers.ValkeyServer, sqlite_url: str) -> None:
    where: list[Any] = ["--redis-url", private_redis.url, "--database-url", sqlite_url]
    assert run_here("machine", "register", ORDER, *where).code == 0
    private_redis.kill()
    for command in ("evict", "warm"):
        away = run_here(command, *where, "--json")
        assert (away.code, away.error["type"]) == (3, "UnavailableError")
