"""An empty Redis is recovered at once if it was wiped, and never while a flusher of the store works at another one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from statecache import StateCache
from statecache.aio import AsyncStateCache
from statecache.core import errors
from statecache.durable import leases as rows
from statecache.durable import schema
from statecache.engine import elsewhere, processes, status, verify
from statecache.engine.elsewhere import Elsewhere
from tests.support import servers
from tests.support.waiting import wait_until
from tests.support.worlds import Order, World, after_call

LEASE_SECONDS = 1.0
PARTITIONS = 4
StartRedis = Callable[..., servers.ValkeyServer]
Connect = Callable[..., StateCache]


@pytest.fixture
def connect(database_url: str) -> Iterator[Connect]:
    """``connect(server)``: a client of the one database, at that server."""
    with contextlib.ExitStack() as stack:

        def make(server: servers.ValkeyServer | str, **settings: Any) -> StateCache:
            url = server if isinstance(server, str) else server.url
            given = {"partition_count": PARTITIONS, "lease_seconds": LEASE_SECONDS, "call_timeout_seconds": 20.0}
            return stack.enter_context(StateCache.connect(url, database_url, "shop", **{**given, **settings}))

        yield make


def _alias(server: servers.ValkeyServer) -> str:
    return server.url.replace("127.0.0.1", "localhost")


def _flushing(cache: StateCache) -> StateCache:
    """The flusher of ``cache`` has noted itself, and holds what there is to hold."""
    wait_until(lambda: len(cache.leases.held) == PARTITIONS, "the flusher holds everything", 30)
    return cache


def _is_untouched(server: servers.ValkeyServer) -> bool:
    with server.client() as client:
        return not client.dbsize()


def _clean(cache: StateCache) -> bool:
    return not verify.verify(cache).findings


# --- refused -------------------------------------------------------------------------------------------------------------


def test_an_empty_redis_beside_a_flusher_at_another_one(start_redis: StartRedis, connect: Connect) -> None:
    """The flusher works at A - a client comes to the empty B by a mistaken URL: it would be taken for A, wiped, and both would
    acknowledge. It is refused instead, B stays as it is, and A does not notice. When the flusher is stopped, B takes over."""
    a, b = start_redis(), start_redis()
    right = _flushing(connect(a, flusher=True))
    orders = right.machine(Order)
    orders.start("1", durability="durable")
    epoch = right.durable.identity().epoch
    told = rf"127.0.0.1:{b.port}/0 has nothing of namespace 'shop'.*process {os.getpid()} .*127.0.0.1:{a.port}/0\) works at"
    with pytest.raises(errors.ConfigurationError, match=told):
        connect(b)
    with pytest.raises(errors.ConfigurationError, match="Check redis_url"):
        connect(b, flusher=True)
    assert _is_untouched(b)
    orders.transition("1", "pay", durability="durable")
    assert right.durable.identity().epoch == epoch
    assert _clean(right)
    right.close()  # as an operator stops a flusher
    there = connect(b)
    assert there.machine(Order).get("1").state == "paid"
    assert there.durable.identity().epoch == epoch + 1
    assert _clean(there)


def test_the_async_client_is_refused_too(start_redis: StartRedis, connect: Connect, database_url: str) -> None:
    a, b = start_redis(), start_redis()
    _flushing(connect(a, flusher=True))

    async def come() -> None:
        async with await AsyncStateCache.connect(b.url, database_url, "shop", call_timeout_seconds=20.0):
            pass

    with pytest.raises(errors.ConfigurationError, match="works at another one"):
        asyncio.run(come())
    assert _is_untouched(b)


def test_a_recovery_that_is_asked_for_is_refused_too(
    start_redis: StartRedis, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    """A dry run only tells of it."""
    a, b = start_redis(), start_redis()
    right = _flushing(connect(a, flusher=True))
    epoch = right.durable.identity().epoch
    looking = connect(b, auto_recover=False, call_timeout_seconds=0.1)
    told: list[str] = []
    assert looking.recover(dry_run=True, progress=told.append).dry_run
    assert "would wait, and be refused if that flusher goes on" in told[0]
    with pytest.raises(errors.ConfigurationError, match="stop that flusher first"):
        looking.recover()
    assert _is_untouched(b)
    assert right.durable.identity().epoch == epoch
    right.close()  # as an operator stops a flusher
    assert set(looking.recover().kinds) == {"wiped"}


def test_a_client_whose_calls_are_short_is_told_to_wait(start_redis: StartRedis, connect: Connect) -> None:
    """Its calls end before two heartbeats came: each tells why, and the watch goes on from one to the next."""
    a, b = start_redis(), start_redis()
    _flushing(connect(a, flusher=True))
    short = connect(b, call_timeout_seconds=0.05)
    seen: list[str] = []

    def refused() -> bool:
        try:
            short.admission.ensure("EPOCH", short.deadline(None))
        except errors.RecoveringError as error:
            seen.append(str(error))
            return False
        except errors.ConfigurationError:
            return True
        raise AssertionError("admitted")

    wait_until(refused, "two heartbeats came", 20)
    assert all("it is watched before Redis is recovered as wiped" in one for one in seen)
    assert _is_untouched(b)


# --- recovered -----------------------------------------------------------------------------------------------------------


def test_a_wiped_redis_is_recovered_at_once(
    start_redis: StartRedis, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the flusher's last heartbeat is fresh: it has noted the same endpoint, and nobody waits for it to fall silent."""
    server = start_redis()
    flushing = _flushing(connect(server, flusher=True, lease_seconds=600.0))
    client = connect(server)
    client.machine(Order).start("1", durability="durable")
    monkeypatch.setattr(Elsewhere, "_seen", None)  # watching anybody would be an error
    with server.client() as connection:
        connection.flushall()
    client.machine(Order).transition("1", "pay")
    assert [one.alive for one in rows.look(client.durable)] == [True]
    assert client.machine(Order).get("1").version == 2
    flushing.flush()
    assert _clean(client)


def test_two_names_of_one_redis(start_redis: StartRedis, connect: Connect) -> None:
    """The flusher came by another name of the server. A wipe makes it fail, and fall silent: it does not recover, and its
    steps do not pass for its well-being. After a lease the client recovers."""
    server = start_redis()
    flushing = _flushing(connect(_alias(server), flusher=True, auto_recover=False))
    client = connect(server)
    client.machine(Order).start("1", durability="durable")
    with server.client() as connection:
        connection.flushall()
    client.machine(Order).transition("1", "pay")
    assert client.machine(Order).get("1").version == 2
    wait_until(lambda: client.machine(Order).counts() == {"paid": 1}, "the flusher goes on", 30)
    assert _clean(client)
    assert flushing.leases.living


def test_two_flushers_by_two_names(start_redis: StartRedis, connect: Connect) -> None:
    """Each sees the other alive somewhere else, both fail: one lease later one of them recovers."""
    server = start_redis()
    one, other = connect(server, flusher=True), connect(_alias(server), flusher=True)
    wait_until(lambda: len(one.leases.held) == len(other.leases.held) == PARTITIONS / 2, "they share", 30)
    one.machine(Order).start("1", durability="durable")
    with server.client() as connection:
        connection.flushall()
    other.machine(Order).transition("1", "pay", durability="durable")
    assert one.machine(Order).get("1").version == 2
    assert _clean(other)


def test_the_redis_of_living_flushers_is_gone(start_redis: StartRedis, connect: Connect) -> None:
    """A failover to an empty server, with another name: the flushers' processes live, and fail."""
    a, b = start_redis(), start_redis()
    flushing = _flushing(connect(a, flusher=True))
    flushing.machine(Order).start("1", durability="durable")
    a.kill()
    there = connect(b)
    assert there.machine(Order).get("1").state == "placed"
    there.machine(Order).transition("1", "pay")
    there.flush()
    assert _clean(there)


# --- one look at a time --------------------------------------------------------------------------------------------------


@pytest.fixture
def world(redis_url: str, database_url: str, namespace: str) -> Iterator[World]:
    with World(redis_url, database_url, namespace, partition_count=PARTITIONS) as found:
        yield found


def _joins(world: World, name: str, redis: str | None, partitions: tuple[int, ...] = (0,), **given: Any) -> None:
    wanted = {"host": "away", "pid": 1, "place": "", "lease_ms": 600_000, **given}
    rows.join(world.durable, name, wanted["host"], wanted["pid"], wanted["place"], wanted["lease_ms"], redis)
    rows.take(world.durable, name, list(partitions), [])


def _sets(world: World, name: str, **values: Any) -> None:
    change = sa.update(schema.flushers).where(schema.flushers.c.name == name).values(**values)
    world.durable.database.alone(lambda connection: connection.execute(change))


def _beats(world: World, name: str) -> None:
    _sets(world, name, beat_ms=schema.flushers.c.beat_ms + 1)


def _ask(world: World, watch: Elsewhere) -> bool:
    """Whether there is a reason to wait."""
    return watch._asked() is not None


@pytest.fixture
def watch(world: World) -> Elsewhere:
    """Of a store that was in use, and whose Redis is empty now."""
    world.wipe()
    return Elsewhere(world.hot, world.durable, "own")


def test_one_heartbeat_proves_nothing_and_two_only_behind_another_look(world: World, watch: Elsewhere) -> None:
    """Its step succeeds - Redis is wiped - we look - its heartbeat for that step comes: it is one of ours, by another name."""
    _joins(world, "it", "redis.example:6379/0")
    assert _ask(world, watch)
    _beats(world, "it")
    assert _ask(world, watch)
    assert _ask(world, watch)
    _beats(world, "it")
    assert _ask(world, watch)  # Redis was asked before that heartbeat came
    with pytest.raises(
        errors.ConfigurationError, match=r"host 'away' \(redis: redis.example:6379/0\) works at another one"
    ):
        _ask(world, watch)


def test_redis_is_made_ready_between_our_question_and_the_second_heartbeat(world: World, watch: Elsewhere) -> None:
    """It is empty - a flusher that has another name for it recovers it, goes on, and its second heartbeat is there when we
    look at SQL: the next look finds that Redis is true, and nobody is refused."""
    _joins(world, "it", "redis.example:6379/0")
    assert _ask(world, watch)
    _beats(world, "it")
    assert _ask(world, watch)

    def it_recovers() -> None:
        _sets(world, "it", beat_ms=0)  # the one that stands for it here has to be let begin
        world.more()
        _sets(world, "it", beat_ms=rows.clock.Now())

    with after_call(world.hot, "admit", it_recovers):
        assert _ask(world, watch)
    assert not _ask(world, watch)


def test_an_old_watch_is_no_proof(world: World, watch: Elsewhere, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looked for a while: Redis may have been true, and was wiped again."""
    _joins(world, "it", "redis.example:6379/0", lease_ms=8_000)
    now = elsewhere.time.monotonic()
    for later in (0.0, 1.9, 3.8, 5.9):
        monkeypatch.setattr(elsewhere.time, "monotonic", lambda later=later: now + later)
        assert _ask(world, watch)
        _beats(world, "it")
    monkeypatch.setattr(elsewhere.time, "monotonic", lambda: now + 6.5)
    assert _ask(world, watch)


def test_who_holds_nothing_is_waited_for_once(world: World, watch: Elsewhere, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does no work, so its heartbeats say nothing. It may take over from a dead one, as long as a lease lasts."""
    _joins(world, "spare", "redis.example:6379/0", (), lease_ms=60_000)
    now = elsewhere.time.monotonic()
    for later in (0, 10, 20, 30, 40, 50, 60):
        monkeypatch.setattr(elsewhere.time, "monotonic", lambda later=later: now + later)
        assert _ask(world, watch)
        _beats(world, "spare")
    monkeypatch.setattr(elsewhere.time, "monotonic", lambda: now + 61)
    assert not _ask(world, watch)


def test_who_need_not_be_waited_for(world: World, watch: Elsewhere) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    here = world.hot.endpoint
    host, place = socket.gethostname(), processes.place()
    _joins(world, "own", "redis.example:6379/0", (0,))
    _joins(world, "same", here, (1,), host=host, place=place)
    _joins(world, "killed", "redis.example:6379/0", (2,), pid=child.pid, place=place)
    _joins(world, "silent", "redis.example:6379/0", (3,), lease_ms=0)
    wait_until(
        lambda: [one.alive for one in rows.look(world.durable) if one.name == "silent"] == [False], "it is silent"
    )
    assert not _ask(world, watch)


@pytest.mark.parametrize(("host", "place"), [("away", ""), (socket.gethostname(), "another boot pid:[4026531836]")])
def test_the_loopback_interface_of_another_machine(world: World, watch: Elsewhere, host: str, place: str) -> None:
    """A developer's localhost is not the one of the server where the flusher runs."""
    _joins(world, "theirs", world.hot.endpoint, host=host, place=place)
    assert _ask(world, watch)


def test_a_flusher_of_an_older_version_has_noted_nothing(world: World, watch: Elsewhere) -> None:
    _joins(world, "old", None)
    for _ in range(3):
        assert _ask(world, watch)
        _beats(world, "old")
    with pytest.raises(errors.ConfigurationError, match="an endpoint that it has not noted"):
        _ask(world, watch)


def test_a_redis_that_has_lost_a_part_is_ours(world: World) -> None:
    """Other partitions tell whose it is: a flusher that does not need the lost one goes on there, by another name for it."""
    watch = Elsewhere(world.hot, world.durable, "own")
    _joins(world, "it", "redis.example:6379/0")
    assert not _ask(world, watch)
    world.client.delete(world.keyspace.meta(0))
    assert not _ask(world, watch)


def test_status_tells_where_a_flusher_works(world: World) -> None:
    world.cache.leases.turn()
    _joins(world, "old", None, ())
    assert {one.redis for one in status.flushers(world.cache)} == {world.hot.endpoint, None}
    assert world.hot.endpoint is not None
    assert world.redis_url.endswith(world.hot.endpoint)


def test_a_flusher_that_waits_for_a_recovery_sends_no_heartbeat(world: World) -> None:
    """What a proof rests on: at a wiped Redis that it does not recover it is not well, though both servers answer."""
    cache = world.more(auto_recover=False, lease_seconds=0.4)
    stop = threading.Event()
    step, beats = cache.flusher.step, []

    def failing(*arguments: Any, **named: Any) -> Any:
        beats.append(rows.look(world.durable)[0].beat_ms)
        with pytest.raises(errors.RecoveringError) as refused:
            step(0.0, *arguments, **named)
        raise refused.value

    cache.flusher.step = failing  # type: ignore[method-assign]
    world.wipe()
    thread = threading.Thread(target=cache.flusher.run, args=(stop,), kwargs={"leases": cache.leases})
    thread.start()
    try:
        wait_until(lambda: len(beats) >= 6, "it has failed for longer than between two heartbeats", 20)
    finally:
        stop.set()
        cache.flusher.wake.set()
        thread.join(20)
    assert len(set(beats)) == 1
