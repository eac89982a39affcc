"""Metrics of real stores: what a process counts, and the gauges that are read from both stores at each scrape."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping

import pytest
from prometheus_client import CollectorRegistry

from statecache import Move, StateCache, metrics
from statecache.aio import AsyncStateCache
from statecache.core import errors
from statecache.durable import recoveries
from statecache.engine import letters, status, watching
from tests.support import refusing, servers
from tests.support.waiting import wait_until
from tests.support.worlds import Order, Waiting, World

Gauges = Mapping[tuple[str, tuple[str, ...]], float]


@pytest.fixture
def world(redis_url: str, database_url: str, namespace: str) -> Iterator[World]:
    with World(redis_url, database_url, namespace, metrics=CollectorRegistry()) as made:
        yield made


def looking(cache: StateCache, timeout_seconds: float = 5.0) -> Callable[[], Gauges]:
    """Looks at the store afresh at each call."""
    watch = watching.StoreWatch(cache, timeout_seconds, shared_seconds=0.0)
    return lambda: {
        (name.removeprefix("statecache_"), labels): value
        for name, labels, value in watch()
        if not isinstance(value, metrics.Spread)
    }


def sample(cache: StateCache, name: str, **labels: str) -> float | None:
    return cache.metrics.registry.get_sample_value(f"statecache_{name}", labels)


def ended(cache: StateCache, event: str, outcome: str) -> float | None:
    return sample(cache, "transitions_total", machine="order", event=event, outcome=outcome)


# --- what a process counts ----------------------------------------


def test_calls_are_counted_by_how_they_ended(world: World) -> None:
    orders, cache = world.orders, world.cache
    first = orders.start("1", transition_id="t1")
    assert orders.start("1", transition_id="t1") == first.__class__(
        first.machine, first.id, first.event, first.from_state, first.state, first.version, first.entry_id, first.at_ms,
        first.transition_id, True,
    )  # fmt: skip
    orders.transition("1", "pay", durability="durable")
    for event, kind in (("pay", errors.InvalidTransitionError), ("explode\n", errors.InvalidTransitionError)):
        with pytest.raises(kind):
            orders.transition("1", event)
    with pytest.raises(errors.InvalidDataError):
        orders.transition("1", "ship", {"no good name": 1})
    results = orders.transition_many([Move("1", "ship"), Move("none", "pay"), Move("1", "explode")])
    assert [type(result).__name__ for result in results] == ["Receipt", "NotFoundError", "InvalidTransitionError"]
    assert (ended(cache, "@start", "ok"), ended(cache, "@start", "duplicate")) == (1, 1)
    assert (ended(cache, "pay", "ok"), ended(cache, "pay", "invalid_transition")) == (1, 1)
    assert (ended(cache, "pay", "not_found"), ended(cache, "ship", "invalid_data")) == (1, 1)
    assert (ended(cache, "ship", "ok"), ended(cache, "@undeclared", "invalid_transition")) == (1, 2)
    assert sample(cache, "transition_seconds_count", call="one", durability="hot") == 2
    assert sample(cache, "transition_seconds_count", call="one", durability="durable") == 1
    assert sample(cache, "transition_seconds_count", call="many", durability="hot") == 1


def test_reads_and_hydrations_are_counted(world: World) -> None:
    world.start("1")
    world.start("2")
    world.flush()
    world.orders.get("1")
    assert world.evict("1") == "OK"
    assert [getattr(found, "source", None) for found in world.orders.get_many(["1", "2", "none"])] == [
        "durable", "hot", None,
    ]  # fmt: skip
    with pytest.raises(errors.NotFoundError):
        world.orders.get("none")
    reads = [
        sample(world.cache, "reads_total", machine="order", source=source) for source in ("hot", "durable", "missing")
    ]
    assert reads == [2, 1, 2]
    assert sample(world.cache, "hydrations_total") == 0
    world.orders.transition("1", "pay")
    assert sample(world.cache, "hydrations_total") == 1


def test_async_calls_are_counted_alike(world: World) -> None:
    registry = CollectorRegistry()

    async def work() -> None:
        opening = AsyncStateCache.connect(world.redis_url, world.database_url, world.namespace, metrics=registry)
        async with opening as cache:
            orders = await cache.machine(Order)
            await orders.start("1")
            await orders.transition("1", "pay")
            with contextlib.suppress(errors.InvalidTransitionError):
                await orders.transition("1", "explode")
            await orders.get("1")
            with contextlib.suppress(errors.NotFoundError):
                await orders.get("none")

    asyncio.run(work())
    found = metrics.of(registry).registry.get_sample_value
    labels = {"machine": "order", "event": "pay", "outcome": "ok"}
    assert found("statecache_transitions_total", labels) == 1
    undeclared = {"machine": "order", "event": "@undeclared", "outcome": "invalid_transition"}
    assert found("statecache_transitions_total", undeclared) == 1
    assert found("statecache_transition_seconds_count", {"call": "one", "durability": "hot"}) == 2
    assert found("statecache_reads_total", {"machine": "order", "source": "hot"}) == 1
    assert found("statecache_reads_total", {"machine": "order", "source": "missing"}) == 1


def test_flushes_are_counted(world: World) -> None:
    world.start("1", ["pay"])
    world.flush()
    world.flusher().step()
    assert sample(world.cache, "flushed_transitions_total") == 2
    assert sample(world.cache, "flush_batch_size_sum") == 2
    assert sample(world.cache, "flush_commit_seconds_count") == sample(world.cache, "flush_batch_size_count")
    assert (sample(world.cache, "flush_steps_total", result="idle") or 0) >= 1


# --- lag and backlog ----------------------------------------


def of(gauges: Gauges, name: str) -> dict[tuple[str, ...], float]:
    return {labels: value for (known, labels), value in gauges.items() if known == name}


def test_lag_is_the_age_of_the_oldest_transition_that_is_not_in_sql(world: World) -> None:
    """No flusher lives. What counts is Redis' clock on both sides, and the first entry, not the last."""
    look = looking(world.cache)
    assert set(of(look(), "flush_lag_seconds").values()) == {0.0}
    partition = world.partition_of("1")
    first = world.start("1", ["pay"])[0]
    before = world.hot.time_ms()
    found = look()
    lag = of(found, "flush_lag_seconds")[(str(partition),)]
    assert (before - first.at_ms) / 1000 <= lag <= (world.hot.time_ms() - first.at_ms) / 1000
    assert of(found, "flush_lag_seconds")[(str(1 - partition),)] == 0
    assert of(found, "backlog_entries") == {(str(partition),): 2, (str(1 - partition),): 0}
    assert look()["flush_lag_seconds", (str(partition),)] >= lag
    world.flush()
    found = look()
    assert set(of(found, "flush_lag_seconds").values()) == set(of(found, "backlog_entries").values()) == {0.0}
    assert found["instances", ("order", "paid")] == 1
    assert found["flushed_timestamp_seconds", (str(partition),)] == pytest.approx(world.hot.time_ms() / 1000, abs=60)


@pytest.mark.parametrize("hours", [-2, 2])
def test_lag_is_by_the_clock_that_noted_the_times(world: World, monkeypatch: pytest.MonkeyPatch, hours: int) -> None:
    """That of Redis. By that of a host which is ahead ``/readyz`` refused as soon as anything waited; by that of one which is
    behind there was never any lag."""
    world.start("1")
    wait_until(lambda: max(of(looking(world.cache)(), "flush_lag_seconds").values()) > 0.01, "some lag")
    there = time.time
    with monkeypatch.context() as patched:
        patched.setattr(time, "time", lambda: there() + hours * 3600)
        gauge = max(of(looking(world.cache)(), "flush_lag_seconds").values())
        lags = gauge, status.status(world.cache).lag_seconds or 0.0
    assert all(0.01 < lag < 3600 for lag in lags)


def test_a_recovery_counts_as_a_flush_that_moved(world: World) -> None:
    """It notes the log's end too, where the watermark stands still; what the gauge says of itself names both."""
    look = looking(world.cache)
    world.start("1", ["pay"])
    world.flush()
    before, watermarks = of(look(), "flushed_timestamp_seconds"), [row.watermark for row in world.durable.partitions()]
    report = world.cache.recover()
    assert [row.watermark for row in world.durable.partitions()] == watermarks
    after = of(look(), "flushed_timestamp_seconds")
    assert all(after[partition] >= report.started_ms / 1000 >= at for partition, at in before.items())
    assert "or a recovery" in metrics.FAMILIES["statecache_flushed_timestamp_seconds"].help


def test_lag_and_backlog_across_recoveries(world: World) -> None:
    """Intact recoveries put their marks between unflushed entries: marks are no transitions, entries before them count."""
    look = looking(world.cache)
    first = world.orders.start("1")
    for event in ("pay", "note"):
        world.disown()
        world.cache.recover()
        world.cache.recover()
        world.orders.transition("1", event)
    partition = str(world.partition_of("1"))
    found = look()
    assert found["backlog_entries", (partition,)] == 3
    assert found["flush_lag_seconds", (partition,)] >= 0
    assert found["flush_lag_seconds", (partition,)] <= (world.hot.time_ms() - first.at_ms) / 1000
    world.flush_through()
    assert look()["backlog_entries", (partition,)] == 0
    world.cache.recover()
    world.cache.recover()
    found = look()
    assert (found["backlog_entries", (partition,)], found["flush_lag_seconds", (partition,)]) == (0, 0)
    assert found["recoveries_total", ("intact",)] == 6


def test_a_look_recovers_nothing_and_changes_nothing(world: World) -> None:
    """Redis is another server than the one that was found true: a scrape says so and leaves it to those who write."""
    look = looking(world.cache)
    world.start("1")
    world.disown()
    before = world.hot_dump(), world.sql_dump()
    found = look()
    assert found["ready", ()] == 0
    assert not of(found, "flush_lag_seconds")
    assert (world.hot_dump(), world.sql_dump()) == before


def test_after_a_wipe(world: World) -> None:
    """Unflushed transitions are gone with Redis: there is no lag to tell until it is recovered; then the loss is told."""
    look = looking(world.cache)
    world.start("1")
    world.flush()
    world.start("1b", ["pay"])
    noted = world.flusher()
    noted.batch_entries = 1
    noted.step()  # SQL has seen that the log goes on
    world.wipe()
    found = look()
    assert found["ready", ()] == 0
    assert found["store_reachable", ("redis",)] == found["store_reachable", ("sql",)] == 1
    assert not of(found, "flush_lag_seconds")
    assert not of(found, "backlog_entries")
    assert found["lost_transitions_total", ("recovery",)] == 0
    report = world.cache.recover()
    found = look()
    assert found["ready", ()] == 1
    assert set(of(found, "flush_lag_seconds").values()) == {0.0}
    assert found["lost_transitions_total", ("recovery",)] == report.lost_at_least == 1
    assert found["possible_losses_total", ()] == 1
    assert found["recoveries_total", ("wiped",)] == 1
    assert found["epoch", ()] == report.epoch
    world.start("2")
    assert sum(of(look(), "backlog_entries").values()) == 1


def test_all_processes_show_the_same(world: World) -> None:
    world.start("1", ["pay"])
    world.flush()
    world.start("2")
    looks = [looking(world.cache)(), looking(world.more(metrics=CollectorRegistry()))()]
    moving = ("flush_lag_seconds",)
    shown = [{key: value for key, value in found.items() if key[0] not in moving} for found in looks]
    assert shown[0] == shown[1]


# --- what stands open ----------------------------------------


def test_dead_letters_and_discards(world: World) -> None:
    look = looking(world.cache)
    world.start("bad", ["pay"])
    world.flush()
    refusing.refuse(world.durable)
    world.orders.transition("bad", "note", reason=refusing.REASON)
    world.orders.transition("bad", "note")
    world.flush()
    found = look()
    assert (found["dead_letters", ()], found["parked_instances", ()]) == (2, 1)
    letters.discard(world.cache, "order", "bad")
    found = look()
    assert (found["dead_letters", ()], found["parked_instances", ()]) == (0, 0)
    assert found["lost_transitions_total", ("discarded",)] == 2


def test_a_strangers_record_that_is_discarded_is_no_loss(world: World) -> None:
    world.start("1", ["pay"])
    world.flush()
    world.client.xadd(world.keyspace.log(0), {"e": "not ours"}, id=f"{world.durable.identity().epoch}-*")
    world.flush()
    look = looking(world.cache)
    assert look()["dead_letters", ()] == 1
    for address in world.durable.parked_instances():
        assert letters.discard(world.cache, *address) == 1
    found = look()
    assert (found["dead_letters", ()], found["lost_transitions_total", ("discarded",)]) == (0, 0)


def test_a_recovery_that_runs_and_one_that_died(world: World) -> None:
    """A recoverer takes the epoch in SQL and dies there; it never says that it failed. A later one supersedes it."""
    look = looking(world.cache)
    store = world.durable.identity()
    started = world.hot.time_ms() - 90_000
    recoveries.take(world.durable, (store.epoch, store.owner), store.epoch + 1, "dead", started)
    found = look()
    assert found["ready", ()] == 0
    assert 90 <= found["recovery_running_seconds", ()] < 900
    assert 90 <= found["recovery_heartbeat_age_seconds", ()] < 900
    recoveries.heartbeat(world.durable, store.epoch + 1, "dead", recoveries.ABANDONED)
    assert look()["recovery_heartbeat_age_seconds", ()] == float("inf")
    world.cache.recover()
    found = look()
    assert (found["recovery_running_seconds", ()], found["recovery_heartbeat_age_seconds", ()]) == (0, 0)
    assert found["recoveries_total", ("abandoned",)] == 1
    assert found["ready", ()] == 1


@pytest.mark.parametrize("skew_ms", [-3_600_000, 3_600_000])
def test_a_recovery_on_a_host_with_another_clock(world: World, skew_ms: int) -> None:
    """While its signs come it is neither silent nor has it run for an hour; when they end that is told."""
    look = looking(world.cache)
    store = world.durable.identity()
    epoch, began = store.epoch + 1, int(time.time() * 1000) + skew_ms
    recoveries.take(world.durable, (store.epoch, store.owner), epoch, "other", began)
    look()
    recoveries.heartbeat(world.durable, epoch, "other", began + 1_000)
    found = look()
    assert found["recovery_heartbeat_age_seconds", ()] < 60
    assert 1 <= found["recovery_running_seconds", ()] < 60
    silent = lambda: look()["recovery_heartbeat_age_seconds", ()] > found["recovery_heartbeat_age_seconds", ()]  # noqa: E731
    wait_until(silent, "its silence grows")


def test_recoveries_are_added_up_once_and_afresh_when_sql_went_back(world: World) -> None:
    look = looking(world.cache)
    saved = world.sql_copy()
    for _ in range(3):
        world.cache.recover()
        count = sum(of(look(), "recoveries_total").values())
    assert count == 4
    world.sql_back(saved)
    assert sum(of(look(), "recoveries_total").values()) == 1


# --- servers that are away ----------------------------------------


def test_lag_is_told_while_sql_is_away(
    private_postgres: servers.PostgresServer, redis_url: str, namespace: str
) -> None:
    """SQL dies, nobody flushes, the backlog grows: the gauge that matters most then is read from Redis alone."""
    url = private_postgres.url(private_postgres.create_database())
    with World(redis_url, url, namespace, metrics=CollectorRegistry()) as world:
        world.start("1")
        world.flush()
        look = looking(world.cache)
        private_postgres.kill()
        world.orders.transition("1", "pay")
        found = look()
        assert found["store_reachable", ("sql",)] == 0
        assert found["store_reachable", ("redis",)] == found["ready", ()] == 1
        assert found["backlog_entries", (str(world.partition_of("1")),)] == 1
        assert not of(found, "epoch")
        assert not of(found, "dead_letters")
        private_postgres.start()
        assert wait_until(lambda: look().get(("epoch", ())), "SQL is read again") == 1


def test_lag_is_told_while_sql_is_away_by_who_only_looks(
    private_postgres: servers.PostgresServer, redis_url: str, namespace: str
) -> None:
    """A process that has called nothing since a recovery knows its epoch from its looks at SQL: without it Redis would be said
    not to be ready, and the lag be missing, as soon as SQL is away."""
    url = private_postgres.url(private_postgres.create_database())
    with World(redis_url, url, namespace) as world:
        world.start("1")
        world.flush()
        watcher = world.more(metrics=CollectorRegistry())
        look = looking(watcher)
        world.disown()
        world.start("2")  # recovers it
        world.flush()
        assert look()["ready", ()] == 1
        private_postgres.kill()
        world.orders.transition("1", "pay")
        found = look()
        assert found["store_reachable", ("sql",)] == 0
        assert found["ready", ()] == 1
        assert found["backlog_entries", (str(world.partition_of("1")),)] == 1


@pytest.mark.parametrize("fault", ["kill", "pause"])
def test_nothing_stale_while_redis_is_away(
    start_redis: Callable[..., servers.ValkeyServer], sqlite_url: str, namespace: str, fault: str
) -> None:
    """Dead, or stopped so that a look hangs: it is abandoned, and said to be unreachable, in bounded time."""
    server = start_redis()
    with World(server.url, sqlite_url, namespace, metrics=CollectorRegistry()) as world:
        world.start("1")
        look = looking(world.cache, timeout_seconds=0.3)
        assert sum(of(look(), "backlog_entries").values()) == 1
        getattr(server, fault)()
        for _ in range(3):
            found = look()
            assert found["store_reachable", ("redis",)] == 0
            assert not {name for name, _ in found} & {"ready", "flush_lag_seconds", "backlog_entries"}
            assert found["store_reachable", ("sql",)] == 1
        if fault == "pause":
            server.resume()
            back = lambda: look()["store_reachable", ("redis",)]  # noqa: E731
            wait_until(back, "Redis is read again")


def test_settings_of_the_server(
    start_redis: Callable[..., servers.ValkeyServer], sqlite_url: str, namespace: str
) -> None:
    server = start_redis(maxmemory_policy="allkeys-lru", appendonly="no")
    with World(server.url, sqlite_url, namespace, metrics=CollectorRegistry()) as world:
        look = looking(world.cache)
        found = of(look(), "server_setting_ok")
        assert found == {("maxmemory_policy",): 0, ("appendonly",): 0, ("aof_writes",): 1}
        world.client.config_set("maxmemory-policy", "noeviction")
        world.client.config_set("appendonly", "yes")
        assert set(of(look(), "server_setting_ok").values()) == {1}


# --- the registry ----------------------------------------


def test_every_declared_gauge_is_there(world: World) -> None:
    world.start("1")
    world.cache.machine(Waiting)  # has what may be stuck
    world.flush()
    made = watching.watch(world.cache)
    there = {family.name for family in made.registry.collect() if family.samples}
    missing = {name for name in metrics.STORE if name.removesuffix("_total") not in there and name not in there}
    assert missing == set()


def test_a_forked_child_lets_go_of_the_endpoint(world: World) -> None:
    """The child has the parent's listening socket, but not the thread that serves it: closing must not wait for that."""
    port = world.cache.serve_metrics(0)
    child = os.fork()
    if child == 0:
        world.orders.start("of the child")
        counted = ended(world.cache, "@start", "ok")
        world.cache.close()
        os._exit(0 if counted == 1 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        assert b"statecache_ready 1.0" in answer.read()
    assert ended(world.cache, "@start", "ok") == 0


def test_two_stores_do_not_share_a_registry(redis_url: str, sqlite_url: str, namespace: str) -> None:
    registry = CollectorRegistry()
    with World(redis_url, sqlite_url, namespace, metrics=registry) as one:
        watching.watch(one.cache)
        watching.watch(one.more())
        with World(redis_url, sqlite_url + "2", namespace + "b", metrics=registry) as other:
            with pytest.raises(errors.ConfigurationError, match="give each store its own"):
                watching.watch(other.cache)
            one.close()
            watching.watch(other.cache)
            assert registry.get_sample_value("statecache_ready") == 1
