"""SQL is away, or Redis is full: the backlog is bounded, writers are told, nothing is lost, and all catches up (P11)."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from statecache import Move, StateCache, StateCacheError
from statecache.core import errors, model
from tests.support import proxy, servers, waiting, worlds

BACKLOG = 300


@pytest.fixture
def link(postgres_server: servers.PostgresServer) -> Iterator[proxy.Proxy]:
    """The way to PostgreSQL."""
    with proxy.Proxy(postgres_server.port) as made:
        yield made


@pytest.fixture
def world(link: proxy.Proxy, redis_url: str, postgres_url: str, namespace: str, client: str) -> Iterator[worlds.World]:
    """One partition, with a brake of 100 entries while SQL is healthy, and a hard bound of 300."""
    with worlds.World(
        redis_url,
        link.url(postgres_url),
        namespace,
        client=client,
        partition_count=1,
        backlog_limit_entries=BACKLOG,
        flush_batch_entries=50,
        lag_target_seconds=0.0001,
    ) as made:
        yield made
        link.pass_through()
        waiting.wait_until(lambda: _flushes(made), "SQL to come back")
        made.verify()


def _flushes(world: worlds.World) -> bool:
    try:
        world.flush()
    except errors.UnavailableError:
        return False
    return True


def fill(orders: Any, id: str = "1") -> int:
    """Write until it is refused; how many were taken."""
    for number in range(10 * BACKLOG):
        try:
            orders.transition(id, "note", timeout=1.0)
        except errors.BackpressureError:
            return number
    raise AssertionError("never refused")


def test_sql_is_gone_for_long(world: worlds.World, link: proxy.Proxy) -> None:
    """The brake of the healthy days lets go, a waiting writer goes on, and the backlog grows to its hard bound; then writers
    are refused, readers are not; SQL comes back, and everything taken is in it, once."""
    world.start("1")
    world.flush()
    assert int(world.meta()["limit"]) < BACKLOG
    world.cache.start_flusher()
    link.refuse()
    taken = fill(world.orders)
    assert taken < BACKLOG
    assert world.orders.transition("1", "note", timeout=20.0).version == taken + 2
    assert taken + 1 + fill(world.orders) == BACKLOG
    with pytest.raises(errors.BackpressureError, match="not applied"):
        world.orders.transition("1", "note", timeout=1.0)
    results = world.orders.transition_many([Move("1", "note"), Move("1", "note")], timeout=1.0)
    assert [type(one) for one in results] == [errors.BackpressureError] * 2
    assert world.orders.get("1").version == 1 + BACKLOG
    link.pass_through()
    assert world.orders.transition("1", "note", timeout=20.0).version == 2 + BACKLOG
    world.cache.flush()
    assert world.versions("1") == list(range(1, BACKLOG + 3))


def test_no_connection_of_the_hot_path_needs_sql(world: worlds.World, link: proxy.Proxy) -> None:
    """PostgreSQL answers nothing at all: what is hot is read and moved all the same."""
    world.start("1")
    link.hold()
    assert [world.orders.transition("1", "note").version for _ in range(5)] == [2, 3, 4, 5, 6]
    assert world.orders.get("1").version == 6


def test_a_blocked_writer_goes_on_when_there_is_room(world: worlds.World) -> None:
    """FULL; the call waits; a flusher makes room; the call succeeds, applied once."""
    world.start("1")
    fill(world.orders)
    version = world.orders.get("1").version
    results: list[Any] = []
    blocked = threading.Thread(target=lambda: results.append(world.orders.transition("1", "note", timeout=20.0)))
    looked = threading.Event()
    with worlds.after_call(world.hot, "packed_apply", looked.set, call=2):
        blocked.start()
        assert looked.wait(10)
        world.flush()
        blocked.join()
    assert results[0].version == version + 1


def test_the_bound_holds_for_many_writers(world: worlds.World) -> None:
    """Eight threads write bulks against the bound: never is one entry more in the log than it allows."""
    ids = [f"o{number}" for number in range(8)]
    world.orders.start_many(ids)
    moves = {id: [Move(id, "note") for _ in range(BACKLOG)] for id in ids}
    results = worlds.together(*[lambda id=id: world.orders.transition_many(moves[id], timeout=2.0) for id in ids])
    taken = sum(isinstance(one, model.Receipt) for result in results for one in result)
    assert len(world.log()) == BACKLOG
    assert taken == BACKLOG - len(ids) - 1  # the starts, and the mark of the epoch
    for id, result in zip(ids, results, strict=True):  # no hole in what was taken of an instance
        kinds = [isinstance(one, model.Receipt) for one in result]
        assert kinds == sorted(kinds, reverse=True), id


def test_the_bound_holds_for_starts(world: worlds.World) -> None:
    results = world.orders.start_many([f"s{number}" for number in range(BACKLOG + 50)], timeout=1.0)
    assert sum(isinstance(one, model.Receipt) for one in results) == BACKLOG - 1  # and the mark of the epoch
    assert len(world.log()) == BACKLOG


# --- Redis has no memory left ------------------------------------------------------------------------------------------


def test_redis_is_full(start_redis: Callable[..., servers.ValkeyServer], sqlite_url: str, namespace: str) -> None:
    """Writers are refused, nothing is half-written, reads go on; a flush relieves it (trimming works in full memory)."""
    server = start_redis(maxmemory="6mb")
    with worlds.World(server.url, sqlite_url, namespace, partition_count=1) as world:
        world.orders.start("1")
        version = 1

        def fill_memory() -> None:
            nonlocal version
            for number in range(1000):
                version = world.orders.transition("1", "note", {"x": str(number) * 8000}, timeout=1.0).version

        with pytest.raises(errors.BackpressureError, match="memory"):
            fill_memory()
        assert world.orders.get("1").version == version
        assert [row.version for row in world.orders.history("1")] == list(range(1, version + 1))
        with pytest.raises(errors.BackpressureError):
            world.orders.start("2", {"x": "y" * 60_000}, timeout=1.0)
        world.flush()
        assert world.orders.transition("1", "note").version == version + 1
        assert world.orders.start("2").version == 1
        world.flush()
        world.verify()
        assert world.versions("1") == list(range(1, version + 2))


def test_redis_is_full_in_the_middle_of_a_bulk_call(
    start_redis: Callable[..., servers.ValkeyServer], sqlite_url: str, namespace: str
) -> None:
    """Each item was taken wholly or not at all, and the caller knows which."""
    server = start_redis(maxmemory="6mb")
    with worlds.World(server.url, sqlite_url, namespace) as world:
        starts = [(f"b{number}", {"x": "y" * 8000}) for number in range(1000)]
        results = world.orders.start_many(starts, timeout=0.5)
        refused = [one for one in results if isinstance(one, StateCacheError)]
        assert refused
        assert {type(one) for one in refused} == {errors.BackpressureError}
        taken = {one.id for one in results if isinstance(one, model.Receipt)}
        assert {id for id, _ in starts if world.is_hot(id)} == taken
        world.flush()
        assert {row.id for row in world.durable.iterate_checkpoints()} == taken


def test_a_policy_that_evicts_is_warned_about(
    start_redis: Callable[..., servers.ValkeyServer],
    sqlite_url: str,
    namespace: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = start_redis(maxmemory_policy="allkeys-lru")
    with (
        caplog.at_level(logging.WARNING),
        StateCache.connect(redis_url=server.url, database_url=sqlite_url, namespace=namespace),
    ):
        assert "maxmemory-policy is allkeys-lru" in caplog.text


def test_a_policy_that_evicts_is_refused_where_memory_has_a_limit(
    start_redis: Callable[..., servers.ValkeyServer], sqlite_url: str, namespace: str
) -> None:
    server = start_redis(maxmemory="64mb", maxmemory_policy="allkeys-lru")
    with pytest.raises(errors.ConfigurationError, match="maxmemory-policy is allkeys-lru"):
        StateCache.connect(redis_url=server.url, database_url=sqlite_url, namespace=namespace)
    with server.client() as client:
        assert client.dbsize() == 0
        client.config_set("maxmemory-policy", "volatile-lru")  # evicts what expires: nothing of ours does
    StateCache.connect(redis_url=server.url, database_url=sqlite_url, namespace=namespace).close()


def test_what_the_server_evicted_is_looked_up_in_sql_after_the_next_connect(
    start_redis: Callable[..., servers.ValkeyServer], sqlite_url: str, namespace: str
) -> None:
    """Under another policy the server has deleted keys, hashes of ours among them, and somebody has set it back. Whoever
    connects then sees that keys were evicted, and has every partition marked cold: once."""
    server = start_redis(appendonly="no")
    with worlds.World(server.url, sqlite_url, namespace) as world:
        ids = ["a", "b", "c"]
        world.orders.start_many(ids)
        world.flush()
        for number in range(100):
            world.client.set(f"another{number}", "x" * 10_000, ex=1000)
        world.client.config_set("maxmemory-policy", "volatile-lru")  # so that it takes none that the recovery finds
        world.client.config_set("maxmemory", world.client.info("memory")["used_memory"] - 100_000)
        world.client.get("another0")
        waiting.wait_until(lambda: world.client.info("stats")["evicted_keys"] > 0, "keys are evicted")
        world.client.config_set("maxmemory", 0)
        world.client.config_set("maxmemory-policy", "noeviction")
        world.client.delete(*(world.keyspace.instance(world.partition_of(id), "order", id) for id in ids))
        other = world.more().machine(worlds.Order)
        assert all(isinstance(one, model.Snapshot) for one in other.get_many(ids))
        epoch = world.durable.identity().epoch
        world.more()
        assert world.durable.identity().epoch == epoch
        world.verify()
