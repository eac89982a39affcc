"""A server that refuses writes and goes on reading: its disk is full (MISCONF), or too few replicas follow it (NOREPLICAS).

What was acknowledged before must get to SQL while that lasts: nobody knows whether the server lives to see its end.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import pytest
import redis

from statecache.core import errors
from statecache.engine import doctor, watching
from statecache.engine.leases import Leases
from tests.support import refusing, servers
from tests.support.waiting import wait_until
from tests.support.worlds import World

DISK, REPLICAS = "MISCONF", "NOREPLICAS"


class Refusing:
    """A world whose server can be made to refuse writes, for one of the reasons."""

    def __init__(self, world: World, server: servers.ValkeyServer, why: str) -> None:
        self.world, self.server, self.why = world, server, why
        self.acknowledged = 0

    def start(self, count: int) -> None:
        for number in range(count):
            self.world.start(f"o{number}")
        self.acknowledged += count

    def refuse(self) -> None:
        """Return when writes are refused. What is acknowledged until then is in the server's memory only."""
        if self.why == DISK:
            self.server.fill_disk()
        else:
            self.world.client.config_set("min-replicas-to-write", 1)
        with contextlib.suppress(errors.UnavailableError):
            while True:
                self.world.orders.transition("o0", "note", timeout=0.2)
                self.acknowledged += 1
        with pytest.raises(redis.ResponseError, match=self.why):
            self.world.client.set("key", "value")

    def relent(self) -> None:
        if self.why == DISK:
            self.server.make_room()
        else:
            self.world.client.config_set("min-replicas-to-write", 0)

    def in_sql(self) -> int:
        return sum(
            len(self.world.versions(kept.id)) for kept in self.world.durable.iterate_checkpoints(machine="order")
        )


@pytest.fixture(params=[DISK, REPLICAS])
def refused(
    request: pytest.FixtureRequest, private_redis: servers.ValkeyServer, sqlite_url: str, namespace: str
) -> Iterator[Refusing]:
    with World(private_redis.url, sqlite_url, namespace) as world:
        yield Refusing(world, private_redis, request.param)


def test_what_was_acknowledged_gets_to_sql(refused: Refusing, caplog: pytest.LogCaptureFixture) -> None:
    """Batch after batch, though Redis cannot be told of any; when it takes writes again it is told, and trims."""
    world = refused.world
    refused.start(30)
    refused.refuse()
    flusher = world.flusher(batch_entries=7)
    steps = []
    while (step := flusher.step()).more or step.entries:
        steps.append(step.entries)
    assert len(steps) > 4
    assert sum(steps) == refused.in_sql() == refused.acknowledged
    assert flusher.step().entries == 0
    assert sum(len(world.log(partition)) for partition in (0, 1)) >= refused.acknowledged  # nothing is trimmed
    assert sum("cannot be told" in record.getMessage() for record in caplog.records) == 1

    refused.relent()
    receipt = world.orders.transition("o0", "pay")
    wait_until(lambda: (flusher.step(), [len(world.log(p)) for p in (0, 1)])[1] == [1, 1], "both logs are trimmed")
    assert world.versions("o0")[-1] == receipt.version
    world.verify()


def test_reading_goes_on(refused: Refusing) -> None:
    """Calls that only read, and what people on call look with: nothing of it needs a write."""
    world = refused.world
    refused.start(5)
    refused.refuse()
    fresh = world.more()  # one that must be admitted first
    for cache in (world.cache, fresh):
        orders = cache.machine("order")
        assert orders.get("o1").version == 1
        assert [row.version for row in orders.history("o1")] == [1]
    checks = {check.name: check.verdict for check in doctor.examine(world.cache)}
    assert checks["recovery"] == doctor.OK
    if refused.why == DISK:
        assert checks["append-only file writes"] == doctor.FAIL
    assert world.cache.recover(dry_run=True).kinds == {"intact": 2}
    world.cache.flush()
    assert refused.in_sql() == refused.acknowledged
    world.verify()
    with pytest.raises(errors.UnavailableError, match=refused.why):
        world.orders.transition("o1", "pay", timeout=0.2)


def test_a_flushers_loop_keeps_its_partitions(refused: Refusing) -> None:
    """It goes on as ever, heartbeats and all: other flushers could do no more. An entry that SQL refuses is put aside too."""
    world = refused.world
    refused.start(10)
    refusing.refuse(world.durable)
    world.orders.transition("o1", "note", reason=refusing.REASON)
    refused.refuse()
    stop, mine = threading.Event(), Leases(world.durable, 2, lease_seconds=2.0)
    thread = threading.Thread(target=world.flusher().run, args=(stop,), kwargs={"leases": mine})
    thread.start()
    try:
        wait_until(lambda: refused.in_sql() == refused.acknowledged, "all but the letter is in SQL")
        wait_until(lambda: len(world.durable.letters("order", "o1")) == 1, "the letter")
        for beats in range(3):
            before = mine._ends
            wait_until(lambda before=before: mine._ends > before, f"a heartbeat after {beats}")  # type: ignore[misc]
        assert mine.holds(0)
        assert mine.holds(1)
        refused.relent()
        world.orders.transition("o2", "pay", durability="durable")
    finally:
        stop.set()
        thread.join()


def test_an_untrue_redis_is_recovered_when_it_takes_writes(refused: Refusing, caplog: pytest.LogCaptureFixture) -> None:
    """It has become another one meanwhile (a promotion): whoever meets it waits, and takes no epoch in SQL for nothing."""
    world = refused.world
    refused.start(3)
    refused.refuse()
    world.client.replicaof("127.0.0.1", 1)  # nobody is there
    world.client.replicaof("no", "one")
    before = world.sql_dump()
    for call in (lambda: world.cache.flush(timeout=0.5), world.cache.recover):
        with pytest.raises(errors.UnavailableError, match=refused.why):
            call()
        assert world.sql_dump() == before
    assert world.cache.recover(dry_run=True).kinds == {"intact": 2}
    assert world.sql_dump() == before
    assert sum("not what SQL knows" in record.getMessage() for record in caplog.records) == 1  # of many attempts
    refused.relent()
    world.orders.transition("o1", "pay")
    assert world.durable.identity().epoch == 2
    world.flush()
    world.verify()


def test_the_gauges_tell_it(refused: Refusing) -> None:
    world = refused.world
    refused.start(5)
    look = _looking(world)
    assert look()["server_setting_ok", ("aof_writes",)] == 1
    refused.refuse()
    found = look()
    assert found["store_reachable", ("redis",)] == found["ready", ()] == 1
    assert found["server_setting_ok", ("aof_writes",)] == (refused.why != DISK)
    assert sum(value for (name, _), value in found.items() if name == "backlog_entries") == refused.acknowledged
    world.cache.flush()
    assert sum(value for (name, _), value in look().items() if name == "backlog_entries") == 0


def test_gauges_of_a_server_that_refuses_to_be_judged(
    start_redis: Callable[..., servers.ValkeyServer], sqlite_url: str, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A primary that was demoted: it is not ready, and what it tells of itself is shown. The reason is logged once."""
    server, other = start_redis(), start_redis()
    with World(server.url, sqlite_url, namespace) as world:
        look = _looking(world)
        world.start("1")
        assert look()["ready", ()] == 1
        world.client.replicaof("127.0.0.1", other.port)
        found, again = look(), look()
        assert found["store_reachable", ("redis",)] == 1
        assert found["ready", ()] == again["ready", ()] == 0
        assert found["server_setting_ok", ("aof_writes",)] == 1
        assert not [name for name, _ in found if name in ("backlog_entries", "flush_lag_seconds")]
    assert sum("redis is not ready" in record.getMessage() for record in caplog.records) == 1


def _looking(world: World) -> Callable[[], dict[tuple[str, tuple[str, ...]], object]]:
    watch = watching.StoreWatch(world.cache, 5.0, shared_seconds=0.0)
    return lambda: {(name.removeprefix("statecache_"), labels): value for name, labels, value in watch()}
