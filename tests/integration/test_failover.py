"""Failover with two real servers: a replica promoted without its tail, the way back, and two primaries at once.

The replica hangs on a proxy. Closing that link and discarding what is in it is what loses a tail; stopping the replica does
not (its socket keeps what was sent). Clients come through a second proxy, whose target is what a failover switches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import msgspec
import pytest
import redis

from statecache import StateCache
from statecache.core import errors, items, model
from statecache.core.entry import EntryId
from statecache.durable import recoveries
from statecache.engine import recovery, verify
from statecache.engine.handle import MachineHandle
from statecache.hot import deadlines, scripts
from tests.support import proxy, servers, waiting, worlds

StartRedis = Callable[..., servers.ValkeyServer]


class Pair:
    """Two servers: ``primary``, and ``replica`` that follows it through ``link``; clients come through ``front``."""

    def __init__(self, start: StartRedis) -> None:
        self.primary, self.replica = start(), start()
        self.link = proxy.Proxy(self.primary.port)
        self.front = proxy.Proxy(self.primary.port)
        self.front_url = self.front.url(self.primary.url)
        follow(self.replica, self.link.port)

    def close(self) -> None:
        self.front.close()
        self.link.close()

    def replicated(self) -> None:
        """Wait until the replica has all that the primary has."""
        with self.primary.client() as client:
            client.set("barrier", time.monotonic_ns())
            offset = client.info("replication")["master_repl_offset"]
        with self.replica.client() as client:
            waiting.wait_until(
                lambda: client.info("replication")["slave_repl_offset"] >= offset, "the replica has it all"
            )

    def break_link(self) -> None:
        """From here on the replica gets nothing; what is on its way is thrown away."""
        self.link.refuse()

    def promote(self) -> None:
        """The replica becomes a primary of its own. Clients still go to the old one."""
        with self.replica.client() as client:
            client.execute_command("REPLICAOF", "NO", "ONE")

    def switch_clients(self) -> None:
        self.front.target_port = self.replica.port
        self.front.cut()


def follow(server: servers.ValkeyServer, port: int) -> None:
    """Make a server the replica of another, and wait until it has its data."""
    with server.client() as client:
        client.execute_command("REPLICAOF", "127.0.0.1", port)
        waiting.wait_until(
            lambda: client.info("replication")["master_link_status"] == "up", "the replica is in step", 30
        )


@pytest.fixture
def pair(start_redis: StartRedis) -> Iterator[Pair]:
    made = Pair(start_redis)
    yield made
    made.close()


@pytest.fixture
def connect(sqlite_url: str) -> Iterator[Callable[..., tuple[StateCache, MachineHandle]]]:
    """Makes clients of one store: ``connect(redis_url, setting=...)`` gives a cache and its orders."""
    made: list[StateCache] = []

    def connect(redis_url: str, **settings: object) -> tuple[StateCache, MachineHandle]:
        given = {"namespace": "failover", "partition_count": 1, "call_timeout_seconds": 10.0, **settings}
        made.append(StateCache.connect(redis_url=redis_url, database_url=sqlite_url, **given))  # type: ignore[arg-type]
        return made[-1], made[-1].machine(worlds.Order)

    yield connect
    for cache in made:
        cache.close()


Connect = Callable[..., tuple[StateCache, MachineHandle]]


def last_report(cache: StateCache) -> recovery.PartitionReport:
    """What the newest recovery said of the partition."""
    row = recoveries.recoveries(cache.durable, 1)[0]
    return msgspec.json.decode(row.report, type=recovery.Report).partitions[0]


def is_well(cache: StateCache) -> None:
    assert verify.verify(cache).findings == ()


def test_promoted_without_its_tail(pair: Pair, connect: Connect) -> None:
    """Of three orders' moves the replica lacks: one that is in SQL, two that the flusher has seen in the log and not moved
    yet, one that nobody has seen. Promoted, it takes over: the first is there, the two are counted, the last is reported as
    possible, and every instance goes on from what SQL has, without a fork."""
    cache, orders = connect(pair.front_url)
    for id in ("flushed", "seen", "unseen", "whole"):
        orders.start(id)
    cache.flush()
    pair.replicated()
    pair.break_link()
    orders.transition("flushed", "pay")
    seen = [orders.transition("seen", event) for event in ("pay", "ship")]
    cache.flusher.batch_entries = 1
    cache.flusher.step()  # moves the first, and notes how far the log goes
    seen_ms = time.time() * 1000
    waiting.wait_until(lambda: time.time() * 1000 > seen_ms + 1, "the clock moves on")
    unseen = orders.transition("unseen", "pay")

    pair.promote()
    pair.switch_clients()
    whole = orders.transition("whole", "pay")

    report = last_report(cache)
    assert (report.kind, report.lost_at_least, report.loss_possible) == (recovery.TAIL_LOST, len(seen), True)
    assert report.tail_seen_ms <= unseen.at_ms
    assert (EntryId.parse(whole.entry_id).epoch, whole.version) == (2, 2)
    assert [orders.get(id).version for id in ("flushed", "seen", "unseen", "whole")] == [2, 1, 1, 2]
    again = [
        orders.transition("flushed", "ship"),
        orders.transition("seen", "cancel"),
        orders.transition("unseen", "pay"),
    ]
    assert [one.version for one in again] == [3, 2, 2]
    cache.flusher.batch_entries = 5000
    cache.flush()
    for receipt in (*seen, unseen):
        with pytest.raises(errors.IntegrityError, match="is lost"):
            cache.wait_durable(receipt)
    is_well(cache)


def test_promoted_with_its_tail(pair: Pair, connect: Connect) -> None:
    """The replica has everything: the recovery finds nothing lost, and says that something may be (nobody can know)."""
    cache, orders = connect(pair.front_url)
    orders.start("a")
    cache.flush()
    orders.transition("a", "pay")
    pair.replicated()
    pair.break_link()
    pair.promote()
    pair.switch_clients()
    assert orders.transition("a", "ship").version == 3
    report = last_report(cache)
    assert (report.kind, report.lost_at_least, report.loss_possible) == (recovery.INTACT, 0, True)
    cache.flush()
    is_well(cache)


@pytest.mark.parametrize("check", ["always", "interval"])
def test_detour(pair: Pair, connect: Connect, check: str) -> None:
    """The primary is demoted, synced from a replica that lacks its tail, and promoted again: the same run_id, the same open
    connection, the scripts still known. The next checked call is refused with IDENTITY; it is recovered, and goes on."""
    cache, orders = connect(pair.primary.url, identity_check=check)
    orders.start("a")
    orders.start("b")
    cache.flush()
    pair.replicated()
    pair.break_link()
    lost = orders.transition("a", "pay")
    with pair.primary.client() as client:
        run_id = client.info("server")["run_id"]
        scripts = client.info("memory")["number_of_cached_scripts"]
    wire = cache.hot.wires.take()
    cache.hot.wires.give_back(wire)

    pair.promote()
    follow(pair.primary, pair.replica.port)
    with pair.primary.client() as client:
        client.execute_command("REPLICAOF", "NO", "ONE")
        assert client.info("server")["run_id"] == run_id
        assert client.info("memory")["number_of_cached_scripts"] == scripts

    if check == "interval":
        seconds = cache.hot.identity_interval_seconds
        waiting.wait_until(lambda: time.monotonic() - cache.hot.wires.checked_at > seconds, "the next call must check")
    assert [one.code for one in _applied(cache, orders, "b")] == ["IDENTITY"]
    idle = cache.hot.wires.take()
    assert idle is wire  # the very connection that was open before the detour
    cache.hot.wires.give_back(idle)

    assert orders.transition("b", "pay").version == 2
    assert last_report(cache).loss_possible
    assert orders.get("a").version == 1
    assert orders.transition("a", "cancel").version == 2
    cache.flush()
    with pytest.raises(errors.IntegrityError, match="is lost"):
        cache.wait_durable(lost)
    is_well(cache)


def _applied(cache: StateCache, orders: MachineHandle, id: str) -> list[items.Outcome]:
    """What one script call says, with nobody to admit or repeat."""
    request = orders.calls.door.transition(model.Move(id, "pay"))
    return cache.hot.apply([request.item])


def test_split_brain(pair: Pair, connect: Connect) -> None:
    """Both servers are primaries. New clients recover the promoted one (epoch 2); an old client has not heard of it, and the
    old primary still takes its writes: they are acknowledged ``hot``, and nothing of them reaches SQL by epoch 1, which is
    fenced there. When the old client must ask SQL, its server is found behind, and what it alone had taken is not lost
    silently: it waits as dead letters, where it cannot be told from history."""
    old_cache, old_orders = connect(pair.front_url)
    for id in ("a", "b", "c"):
        old_orders.start(id)
    old_cache.flush()
    pair.replicated()
    pair.break_link()
    pair.promote()
    new_cache, new_orders = connect(pair.replica.url)
    assert new_orders.transition("a", "pay").version == 2
    new_cache.flush()

    only_old = [old_orders.transition("a", "cancel"), old_orders.transition("b", "pay")]
    assert [EntryId.parse(one.entry_id).epoch for one in only_old] == [1, 1]
    rows = new_cache.durable.history("order", "b")
    assert [row.version for row in rows] == [1]

    old_cache.recover()
    report = last_report(old_cache)
    assert report.loss_possible
    assert {finding.split(":")[1] for finding in report.findings} >= {"a", "b"}
    assert [row.event for row in old_cache.durable.history("order", "a")] == ["@start", "pay"]
    assert [letter.entry.event for letter in old_cache.durable.letters("order", "b")] == ["pay"]
    for receipt in only_old:
        with pytest.raises((errors.ParkedError, errors.IntegrityError)):
            old_cache.wait_durable(receipt)
    assert old_orders.transition("c", "pay").version == 2
    old_cache.flush()
    is_well(old_cache)

    with pytest.raises(errors.StateCacheError):
        new_cache.wait_durable(only_old[1])
    assert new_cache.durable.identity().epoch == 3


def test_writes_through_the_demoted_primary_wait_for_the_new_one(pair: Pair, connect: Connect) -> None:
    """The old primary is a replica already when a client calls: READONLY is no answer, the call goes on until the clients'
    address leads to the new primary."""
    cache, orders = connect(pair.front_url)
    orders.start("a")
    cache.flush()
    pair.replicated()
    pair.promote()
    follow(pair.primary, pair.replica.port)
    with pytest.raises(redis.ReadOnlyError), redis.Redis.from_url(pair.front_url) as client:
        client.set("key", "value")

    with pytest.raises(errors.UnavailableError):
        orders.transition("a", "pay", timeout=0.3, transition_id="t")
    receipt, _ = worlds.together(lambda: orders.transition("a", "pay", transition_id="t"), pair.switch_clients)
    assert receipt.version == 2
    cache.flush()
    is_well(cache)


def test_a_demoted_primary_is_not_what_it_was(pair: Pair, connect: Connect) -> None:
    """The primary is demoted and synced as a whole: its identity reads as before, and so does its meta, but what it holds is
    the new primary's, which lacks a tail. It would run what only reads: each such script refuses, as those that write do, and
    nothing is recovered there. When the clients' address leads to the new primary that is recovered, and all goes on."""
    cache, orders = connect(pair.front_url, auto_recover=True)
    orders.start("a")
    cache.flush()
    pair.replicated()
    before = _identity(pair.primary)
    pair.break_link()
    orders.transition("a", "pay")
    pair.promote()
    with pair.replica.client() as client:
        client.config_set("repl-backlog-size", 16 * 2**10)
        client.set("more", "x" * 2**20)  # than the backlog holds, so that no partial resync can do
    follow(pair.primary, pair.replica.port)
    assert _identity(pair.primary) == before
    with pair.primary.client() as client:
        meta = client.hgetall(cache.hot.keyspace.meta(0))
    assert (meta["epoch"], meta["status"], meta["identity"]) == ("1", "ready", before)

    hot, stamp = cache.hot, cache.hot.stamp
    calls: dict[str, Callable[[], object]] = {
        "admit": lambda: hot.admit(stamp),
        "read": lambda: hot.read([(0, EntryId(0, 0))], entries=9, bytes_max=999),
        "read by a dry run": lambda: hot.read(
            [(0, EntryId(0, 0))], entries=9, bytes_max=999, fenced_identity="*", stamp=stamp
        ),
        "find": lambda: hot.find(0, "order", "a"),
        "due": lambda: deadlines.due(hot, [0], 9),
        "probe": lambda: hot.probe(0, stamp, meta["identity"], EntryId(0, 0)),
        "probe by a dry run": lambda: hot.probe(0, stamp, "*", EntryId(0, 0)),
        "fence by a dry run": lambda: hot.fence(0, scripts.Stamp(9, "me"), meta["deployment"], 1, dry_run=True),
        "flush": lambda: cache.flush(timeout=0.5),
        "write": lambda: orders.transition("a", "cancel", timeout=0.5),
        "recover": cache.recover,
    }
    dump = worlds.sql_copy(cache.durable)
    for name, call in calls.items():
        with pytest.raises(errors.UnavailableError) as caught:
            call()
        assert "ReadOnlyError" in str(caught.value), name
        assert worlds.sql_copy(cache.durable) == dump, name

    pair.switch_clients()
    assert orders.transition("a", "cancel").version == 2
    assert last_report(cache).loss_possible
    cache.flush()
    is_well(cache)


def _identity(server: servers.ValkeyServer) -> str:
    """As a primary's scripts would tell it."""
    with server.client() as client:
        found = client.info()
    second = str(found["master_replid2"]).rjust(40, "0")  # redis-py takes forty zeros for a number
    return f"{found['run_id']} {second} {found['second_repl_offset']}"
