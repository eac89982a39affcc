"""Verification beside writers and flushers: what is only under way is no finding, what is wrong is one all the same."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import sqlalchemy as sa

from statecache import Move
from statecache.core import entry, errors
from statecache.durable import queries, schema
from statecache.engine import letters, verify
from tests.support import refusing
from tests.support.worlds import World, before_call, forged


@pytest.fixture
def world(redis_url: str, database_url: str, namespace: str) -> Iterator[World]:
    with World(redis_url, database_url, namespace) as made:
        yield made


@contextlib.contextmanager
def before_each(target: object, names: tuple[str, ...], action: Callable[[], object]) -> Iterator[list[str]]:
    """Do something before every call of some methods; the list tells which ones came."""
    came: list[str] = []

    def between(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            came.append(name)
            action()
            return original(*arguments, **named)

        return wrapped

    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(target, name, between(name, getattr(target, name))))
        yield came


def begin_one_by_one(*actions: Callable[[], None]) -> Callable[[], None]:
    """An action that is another one each time, and none in the end or within itself."""
    left = list(actions)

    def action() -> None:
        if left:
            left.pop(0)()

    return action


_HOT = ("read", "hashes", "find_many")
_SQL = ("partitions", "lookup", "checkpoints", "history", "letters")


def _moves(world: World, id: str, *, flush: bool) -> Callable[[], None]:
    flusher = world.flusher()

    def move() -> None:
        world.orders.transition(id, "note", {"amount": world.orders.get(id).version})
        if flush:
            flusher.step()

    return move


@pytest.mark.parametrize("flush", [True, False], ids=["moved and flushed", "moved"])
def test_an_instance_that_never_stands_still(world: World, flush: bool) -> None:
    """It moves, and is flushed and trimmed, before every single look at Redis and at SQL."""
    id = world.id()
    world.start(id, ["note", "note"], amount=1)
    move = _moves(world, id, flush=flush)
    busy = False

    def once() -> None:  # not again from within the move itself
        nonlocal busy
        if not busy:
            busy = True
            move()
            busy = False

    with before_each(world.cache.hot, _HOT, once) as hot, before_each(world.durable, _SQL, once) as sql:
        found = verify.verify(world.cache)
    assert found.findings == ()
    assert set(hot) == set(_HOT)
    assert {"partitions", "lookup"} <= set(sql)
    assert found.hot == 1


def test_a_log_flushed_between_its_pages(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the next page would begin with is trimmed when it is read."""
    monkeypatch.setattr(verify, "_PAGE", 2)
    id = world.id()
    world.start(id, ["note"] * 4)
    flusher = world.flusher()
    calls = 0

    def second() -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            flusher.step()
            world.start(world.id(prefix="later"), ["note"] * 4)

    with before_each(world.cache.hot, ("read",), second):
        assert list(verify._log_findings(world.cache, 0)) == []
    assert calls > 2


def test_history_and_checkpoint_of_one_moment(world: World) -> None:
    """A flush commits between the two statements."""
    id = world.id()
    world.start(id, ["note"])
    world.flush()
    other = threading.Thread(target=_moves(world, id, flush=True))

    def flush_once() -> None:
        if threading.current_thread() is threading.main_thread():
            other.start()
            other.join()

    with before_each(queries, ("history",), flush_once):
        assert verify._sql_problem_of(world.cache, "order", id) is None
    assert len(world.durable.history("order", id)) == 3


@pytest.mark.parametrize("flushed", [True, False])
def test_a_hash_that_stands_behind_is_found(world: World, flushed: bool) -> None:
    """Its version is older than what the log, or SQL, has, and it does not move."""
    id = world.id()
    key = world.keyspace.instance(0, "order", id)
    world.start(id)
    old: Any = world.client.dump(key)
    world.orders.transition(id, "note")
    if flushed:
        world.flush()
    world.client.restore(key, 0, old, replace=True)
    (finding,) = verify.verify(world.cache).findings
    assert (finding.kind, finding.address) == ("hot", f"order:{id}")
    assert "at 1, SQL and log have 'placed' at 2" in finding.detail


def test_a_history_that_nobody_can_read_is_one_finding(world: World) -> None:
    """The instances before and behind it are looked at all the same."""
    for id in ("a", "z"):
        world.start(id, ["pay"])
    world.forge(forged("m", patch='{"a":1e999,"blob":"' + "x" * 200 + '"}'), world.partition_of("m"))
    world.flush()
    found = verify.verify(world.cache)
    assert [(one.kind, one.address) for one in found.findings] == [("history", "order:m")]
    assert "version 1 in SQL holds data that cannot be read" in found.findings[0].detail
    assert (found.instances, found.transitions) == (3, 4)


@pytest.mark.parametrize("cold", [False, True], ids=["hot", "cold"])
def test_a_history_that_is_gone_is_found(world: World, cold: bool) -> None:
    """All rows of some instances are deleted, the first, the last and one between; their checkpoints are there."""
    ids = ["a", "b", "c", "d", "e"]
    for id in ids:
        world.start(id, ["pay"])
    world.flush()
    columns = schema.transitions.c
    with world.durable.database.transaction() as connection:
        connection.execute(sa.delete(schema.transitions).where(columns.id.in_(["a", "c", "e"])))
    for id in ids if cold else ():
        world.evict(id)
    found = verify.verify(world.cache)
    assert [(one.kind, one.address) for one in found.findings] == [("history", f"order:{id}") for id in ("a", "c", "e")]
    assert "version 2, but there is no history" in found.findings[0].detail
    assert (found.instances, found.transitions) == (5, 4)
    slices = list(verify.slices(world.cache, cursor=["histories", "order", "b"]))
    assert [one.address for part in slices for one in part.findings] == ["order:c", "order:e"]


def test_an_instance_that_begins_between_the_two_pages(world: World) -> None:
    """Its checkpoint is seen, its history was not there yet; and the other way round. Neither is a finding."""
    world.start("b")
    world.flush()

    def begin(id: str) -> Callable[[], None]:
        def action() -> None:
            world.start(id, ["pay"])
            world.flush()

        return action

    with before_each(queries, ("_fetch",), begin_one_by_one(begin("a"), begin("c"), begin("d"))) as came:
        assert not verify.verify(world.cache).findings
    assert len(came) >= 3


def test_letters_without_a_history_are_no_finding(world: World) -> None:
    world.forge(forged("m", patch='{"a":'), world.partition_of("m"))
    world.start("n")
    world.flush()
    assert world.durable.letters("order", "m")
    assert not verify.verify(world.cache).findings


def test_a_hole_in_the_log_is_found(world: World) -> None:
    id = world.id()
    world.start(id, ["note", "note"])
    world.client.xdel(world.keyspace.log(0), world.log()[1])
    assert {each.kind for each in verify.verify(world.cache).findings} == {"log"}


def test_an_entry_below_the_watermark_that_sql_has_not_is_found(world: World) -> None:
    """A flusher has passed it over: it will never be flushed, however well it fits behind the checkpoint. What is under way (an
    entry that is flushed between the look at the log and that at SQL) is no finding, nor is SQL that went back."""
    id = world.id()
    world.start(id)
    world.flush()
    saved = world.sql_copy()
    world.orders.transition(id, "note")
    with before_call(world.durable, "lookup", world.flush):
        assert not verify.verify(world.cache).findings
    lost = world.orders.transition(id, "note")
    passed = world.sql_copy()
    with world.durable.database.writer.begin() as connection:
        row = schema.partitions.c
        seq = int(lost.entry_id.split("-")[1])
        connection.execute(sa.update(schema.partitions).where(row.partition == 0).values(watermark_seq=seq))
    (found,) = verify.verify(world.cache).findings
    assert (found.kind, found.address) == ("log", f"order:{id}")
    assert lost.entry_id in found.detail
    world.sql_back(passed)
    assert not verify.verify(world.cache).findings
    world.sql_back(saved)
    assert lost.entry_id not in str(verify.verify(world.cache).findings)


def test_an_instance_evicted_between_the_looks_at_its_hash_is_no_finding(world: World) -> None:
    """Nothing is cold yet; then its hash is evicted, behind the look at what is cold."""
    world.start("a")
    world.flush()
    with before_call(world.hot, "hashes", lambda: world.evict("a")):
        assert not verify.verify(world.cache).findings
    assert not world.is_hot("a")


def test_a_letter_that_stands_for_a_range_is_no_finding(redis_url: str, sqlite_url: str, namespace: str) -> None:
    """SQL went back below an instance that was parked and hot: what it lost is a letter, whose data are not known."""
    with World(redis_url, sqlite_url, namespace, partition_count=1) as world:
        world.start("a")
        world.flush()
        saved = world.sql_copy()
        world.orders.transition("a", "note", {"amount": 1})
        world.flush()
        refusing.refuse(world.durable)
        world.orders.transition("a", "pay", reason=refusing.REASON)
        world.start("b")
        world.flush()
        refusing.accept(world.durable)
        world.sql_back(saved)
        world.cache.recover()
        world.flush_through()
        (letter,) = world.durable.letters("order", "a")
        assert (letter.entry.event, letter.entry.version) == (entry.EVENT_RECONCILED, 3)
        assert world.is_hot("a")
        assert not verify.verify(world.cache).findings
        world.client.hset(world.keyspace.instance(0, "order", "a"), "@", "shipped 3 1-4 1 1 1 p")
        assert [one.kind for one in verify.verify(world.cache).findings] == ["hot"]


def test_an_entry_kept_apart_is_no_finding(redis_url: str, sqlite_url: str, namespace: str) -> None:
    """The log still has an entry in whose place another has its version; it is a letter under its entry id, or was one."""
    with World(redis_url, sqlite_url, namespace, partition_count=1, log_keep_seconds=3600.0) as world:
        world.start("a")
        world.flush()
        replica = world.redis_copy()
        world.orders.transition("a", "note", transition_id="M")
        primary = world.redis_copy()
        world.redis_back(replica)
        world.cache.recover()
        refusing.refuse(world.durable)
        world.orders.transition("a", "pay", transition_id="L", reason=refusing.REASON)
        world.flush()
        refusing.accept(world.durable)
        world.redis_back(primary)
        world.cache.recover()
        with pytest.raises(errors.ParkedError):  # it is hot again
            world.orders.transition("a", "note")
        for machine, id in world.durable.parked_instances():
            world.client.hset(world.keyspace.instance(0, "order", "a"), "x", "1")  # so that it is looked at
            assert "is not in SQL" not in str(verify.verify(world.cache).findings)
            letters.discard(world.cache, machine, id)
        assert world.orders.transition("a", "note").version == 2
        assert not verify.verify(world.cache).findings


def test_a_hole_behind_large_entries_is_found(start_redis: Any, sqlite_url: str, namespace: str) -> None:
    """A part of the log that was cut at its bytes is not the log's end."""
    with World(start_redis().url, sqlite_url, namespace, partition_count=1, patch_bytes_max=2**21) as world:
        world.start("a")
        for _ in range(18):
            world.orders.transition("a", "note", data={"blob": "x" * 10**6})
        world.start("b", ["note", "note"])
        world.client.xdel(world.keyspace.log(0), world.log()[-2])
        assert [each.kind for each in verify._log_findings(world.cache, 0)] == ["log"]


def _log_readings(world: World) -> tuple[list[bool], int]:
    """Verify: for each reading of a log whether it was that of the whole log, and the number of script calls of them all."""
    hot = world.hot
    with (
        mock.patch.object(hot, "find_many", wraps=hot.find_many) as readings,
        mock.patch.object(hot, "_call", wraps=hot._call) as calls,
        mock.patch.object(hot, "find", side_effect=AssertionError("one instance's log")),
    ):
        assert not verify.verify(world.cache).findings
    scripts = sum(call.args[0] == "find" for call in calls.call_args_list)
    return [call.kwargs["whole"] for call in readings.call_args_list], scripts


def test_a_backlog_is_read_once_for_many_instances(redis_url: str, database_url: str, namespace: str) -> None:
    """Four times as many unflushed instances are no more readings of the log; what is kept below the watermark is not read."""
    with World(redis_url, database_url, namespace, log_keep_seconds=3600.0) as world:
        world.orders.start_many([f"kept{number}" for number in range(50)])
        world.flush()
        world.orders.transition_many([Move(f"kept{number}", "pay") for number in range(50)])
        few = _log_readings(world)
        assert few == ([False, False], 2)
        world.orders.start_many([f"more{number}" for number in range(150)])
        assert _log_readings(world) == few
        refusing.refuse(world.durable)
        world.orders.transition_many([Move(f"more{number}", "pay", reason=refusing.REASON) for number in range(150)])
        world.flush()
        refusing.accept(world.durable)
        assert len(world.durable.parked_instances()) == 150
        world.orders.transition_many([Move(f"kept{number}", "note") for number in range(50)])
        assert _log_readings(world) == few


def test_the_readings_of_a_backlog_are_bounded(
    redis_url: str, sqlite_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind so many entries a slice ends, whose cursor is that of the next; nothing is passed over in between."""
    monkeypatch.setattr(verify, "_TOGETHER", 1500)
    with World(redis_url, sqlite_url, namespace, partition_count=1) as world:
        ids = [f"o{number}" for number in range(3500)]
        world.orders.start_many(ids)
        readings, _ = _log_readings(world)
        assert readings == [False] * 2
        for id in ids[::500]:
            world.client.hset(world.keyspace.instance(0, "order", id), "x", "1")
        slices = [one for one in verify.slices(world.cache, cursor=["hot", "0"]) if one.hot]
        assert sum(one.hot for one in slices) == len(ids)
        assert len(slices) == 2
        found = [one.address for part in slices for one in part.findings]
        assert sorted(found) == sorted(f"order:{id}" for id in ids[::500])
        rest = list(verify.slices(world.cache, cursor=slices[0].cursor))
        assert [one.address for part in rest for one in part.findings] == [one.address for one in slices[1].findings]


def test_a_record_that_nobody_can_read_is_of_no_instance(redis_url: str, sqlite_url: str, namespace: str) -> None:
    """It begins as an instance's own entries do; that is told of its log, and the instance itself is looked at all the same."""
    with World(redis_url, sqlite_url, namespace, partition_count=1) as world:
        world.start("a", ["note"])
        world.forge(entry.SEPARATOR.join(("order", "a", "what", "is", "this")))
        assert [(one.kind, one.address) for one in verify.verify(world.cache).findings] == [("log", "partition 0")]
