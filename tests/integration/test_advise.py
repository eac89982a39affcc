"""``statecache advise``: each piece of advice where its reason is there, and not where it is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

from statecache import Move
from statecache.engine import advise
from tests.support import servers, worlds
from tests.support.worlds import World


def _settings(report: advise.Report) -> dict[str, advise.Advice]:
    return {one.setting: one for one in report.advice}


def test_an_empty_store(redis_url: str, database_url: str, namespace: str) -> None:
    with World(redis_url, database_url, namespace, log_keep_seconds=60.0) as world:
        report = advise.advise(world.cache)
        assert (report.measured.instances, report.measured.sampled, report.measured.instance_bytes) == (0, 0, None)
        assert list(_settings(report)) == ["flushers"]
        assert "nobody flushes" in report.advice[0].why


def test_memory_is_measured(
    start_redis: Callable[..., servers.ValkeyServer], database_url: str, namespace: str
) -> None:
    """The bytes of an instance times all of them; instances kept as tables; finals that stay."""
    server = start_redis(**{"hash-max-listpack-value": "64"})
    with World(server.url, database_url, namespace) as world:
        world.orders.start_many([(f"o{number}", {"note": "x" * 30}) for number in range(300)])
        world.orders.transition_many([Move(f"o{number}", "cancel") for number in range(100)])
        world.flush()
        report = advise.advise(world.cache)
        found, told = report.measured, _settings(report)
        assert (found.instances, found.final_instances, found.sampled) == (300, 100, 128)
        assert found.instance_bytes is not None
        assert 100 < found.instance_bytes < 600
        assert found.tables == 0
        assert told["maxmemory (Redis)"].now == "no limit"
        assert "all 300 instances take about" in told["maxmemory (Redis)"].why
        assert not [name for name in told if name.startswith(("hash-max", "hot_"))]
        with mock.patch.object(advise, "_MANY_FINAL", 100):
            assert (
                "100 instances are in a final state"
                in _settings(advise.advise(world.cache))["hot_ttl_final_seconds"].why
            )

        world.orders.transition_many([Move(f"o{number}", "note", {"note": "x" * 300}) for number in range(100, 300)])
        world.flush()
        report = advise.advise(world.cache)
        assert report.measured.tables > 0.3
        [tables] = [one for one in report.advice if one.setting.startswith("hash-max")]
        assert tables.now.startswith("value 64, entries")

        with server.client() as client:
            client.config_set("maxmemory", "40mb")
        unbounded = world.more(hot_memory_share=0.0)
        assert _settings(advise.advise(unbounded))["hot_memory_share"].advised == "0.8"
        assert "maxmemory (Redis)" not in _settings(advise.advise(unbounded))


def test_flushers_are_counted(redis_url: str, database_url: str, namespace: str) -> None:
    with World(redis_url, database_url, namespace) as world:
        world.start("1")
        told = _settings(advise.advise(world.cache))
        assert "1 transitions are in Redis alone" in told["flushers"].why
        assert told["log_keep_seconds"].now == "0"
        one = world.more()
        one.leases.turn()
        assert _settings(advise.advise(world.cache))["flushers"].advised == "2, on two machines"
        other = world.more()
        other.leases.turn()
        assert "flushers" not in _settings(advise.advise(world.cache))
        for each in (one, other):
            each.leases.leave()


def test_a_server_that_does_not_let_us_look(
    start_redis: Callable[..., servers.ValkeyServer], database_url: str, namespace: str
) -> None:
    """A user without MEMORY and OBJECT: nothing is sampled, and the rest is told."""
    server = start_redis()
    with server.client() as client:
        client.execute_command(
            "ACL", "SETUSER", "app", "on", ">word", "~*", "&*", "+@all", "-memory", "-object", "-config"
        )
    url = server.url.replace("redis://", "redis://app:word@")
    with World(url, database_url, namespace) as world:
        world.start("1")
        world.flush()
        report = advise.advise(world.cache)
        assert (report.measured.instances, report.measured.sampled) == (1, 0)
        assert "maxmemory (Redis)" not in _settings(report)
        assert "flushers" in _settings(report)


def test_the_report_is_plain(redis_url: str, sqlite_url: str, namespace: str) -> None:
    import msgspec

    with worlds.World(redis_url, sqlite_url, namespace) as world:
        document: dict[str, Any] = msgspec.to_builtins(advise.advise(world.cache))
    assert set(document) == {"measured", "advice"}
