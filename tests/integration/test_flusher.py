"""The flusher, step by step: exactly once (P5), whatever dies, races or is missing; bounded (P11); one bad record (P10)."""

from __future__ import annotations

import contextlib
import datetime
import json
import threading
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import sqlalchemy as sa

from statecache import Move, State, StateMachine
from statecache.core import entry, errors
from statecache.durable import faults, schema
from statecache.durable.flush import FlushTransaction
from statecache.durable.store import DurableStore
from statecache.engine import batching, eviction, letters, retention
from statecache.engine import finals as finals_module
from statecache.engine import flusher as flusher_module
from statecache.hot import watching
from tests.support import servers
from tests.support.proxy import Proxy
from tests.support.waiting import wait_until
from tests.support.worlds import Order, World, after_call, before_call, forged, together
from workers import flusher as worker


@pytest.fixture
def world(redis_url: str, database_url: str, namespace: str) -> Iterator[World]:
    with World(redis_url, database_url, namespace) as found:
        yield found


@pytest.fixture
def lite(redis_url: str, sqlite_url: str, namespace: str) -> Iterator[World]:
    with World(redis_url, sqlite_url, namespace) as found:
        yield found


class Died(BaseException):
    """The flusher's process is gone."""


def die() -> None:
    raise Died


def _orders(world: World, count: int = 20, prefix: str = "f") -> list[str]:
    ids = [f"{prefix}{number}" for number in range(count)]
    world.orders.start_many([(id, {"n": 1}) for id in ids])
    world.orders.transition_many([Move(id, "pay", increment={"n": 1}) for id in ids])
    return ids


# --- step by step -----------------------------------------------------------------------------------------------------------


def test_step_moves_history_checkpoints_counts_and_watermark_together(world: World) -> None:
    world.start("1", ["pay"], amount=1)
    world.start("2")
    step = world.flusher().step()
    assert (step.entries, step.stopped) == (3, {})
    checkpoint = world.durable.checkpoint("order", "1")
    assert checkpoint is not None
    hot = world.orders.get("1")
    assert (checkpoint.state, checkpoint.version, str(checkpoint.entry_id)) == (hot.state, hot.version, hot.entry_id)
    assert (checkpoint.created_ms, checkpoint.updated_ms, checkpoint.data) == (
        hot.created_ms,
        hot.updated_ms,
        '{"amount":1}',
    )
    assert checkpoint.recent == world.hot.hashes([(world.partition_of("1"), "order", "1")])[0][b"@r"].decode()
    assert world.orders.counts() == {"paid": 1, "placed": 1}
    for partition in (0, 1):
        assert str(world.watermark(partition)) == world.meta(partition)["watermark"] == world.log(partition)[-1]
    world.verify()


def test_trimming_leaves_the_witness(world: World) -> None:
    """The entry at the watermark stays: recovery compares its content with SQL (H13)."""
    _orders(world)
    flusher = world.flusher()
    while flusher.step().entries:
        pass
    for partition in (0, 1):
        assert world.log(partition) == [str(world.watermark(partition))]
        assert world.meta(partition)["kept"] == "1"


def test_small_batches_move_everything_in_order(world: World) -> None:
    """Three entries a step, shared by both partitions in turn: neither starves, history is whole after every step."""
    ids = _orders(world, 6)
    flusher = world.flusher(batch_entries=3)
    seen = {0: entry.ZERO, 1: entry.ZERO}
    total = 0
    while (step := flusher.step()).more:
        total += step.entries
        assert step.entries <= 3
        for partition in (0, 1):
            assert world.watermark(partition) >= seen[partition]
            seen[partition] = world.watermark(partition)
        for id in ids:
            versions = world.versions(id)
            assert versions == list(range(1, len(versions) + 1))
    assert total + step.entries == 12
    world.verify()


def test_byte_cap_moves_large_entries_one_by_one(lite: World) -> None:
    for number in range(5):
        lite.orders.start(f"big{number}", data={"blob": "x" * 20_000})
    flusher = lite.flusher(batch_bytes=10_000)
    steps = []
    while (step := flusher.step()).more or step.entries:
        steps.append(step.entries)
    assert sum(steps) == 5
    assert max(steps) == 1
    lite.verify()


def test_idle_step_writes_nothing(world: World) -> None:
    _orders(world)
    world.flush()
    flusher = world.flusher()
    flusher.step()
    before = world.hot_dump(), world.sql_dump()
    for _ in range(3):
        step = flusher.step()
        assert (step.entries, step.more) == (0, False)
    assert (world.hot_dump(), world.sql_dump()) == before


def test_counts_equal_checkpoints_whatever_moves(world: World) -> None:
    """Moves inside one batch, over batches, to the same state, and starts: the counts are those of the checkpoints."""
    flusher = world.flusher()
    for round_ in range(3):
        ids = _orders(world, 5, f"r{round_}-")
        flusher.step()
        world.orders.transition_many(
            [Move(ids[0], "ship"), Move(ids[0], "deliver"), Move(ids[1], "note"), Move(ids[2], "cancel")]
        )
        world.flusher().step()  # another one, without the first one's memory
        world.orders.transition(ids[1], "ship")
    world.flush()
    world.verify()
    assert sum(world.orders.counts().values()) == 15


def test_nothing_of_the_backlog_is_lost_by_a_flusher_that_remembers(lite: World) -> None:
    """The fold's memory is used only where it leads up to the batch: another flusher moved two versions in between."""
    lite.start("1", n=0)
    mine, other = lite.flusher(), lite.flusher(lite.more())
    mine.step()
    lite.orders.transition("1", "note", data={"other": 1})
    other.step()
    lite.orders.transition("1", "note", increment={"n": 5})
    mine.step()
    assert lite.durable.checkpoint("order", "1").data == '{"n":5,"other":1}'  # type: ignore[union-attr]
    lite.verify()


# --- deaths -----------------------------------------------------------------------------------------------------------------

PLACES = [
    ("before the read", "hot", "read", before_call),
    ("after the read", "hot", "read", after_call),
    ("after the compare-and-set", FlushTransaction, "advance", after_call),
    ("before history", FlushTransaction, "insert_history", before_call),
    ("after history", FlushTransaction, "insert_history", after_call),
    ("after the checkpoints", FlushTransaction, "upsert_checkpoints", after_call),
    ("before the commit", FlushTransaction, "_check", after_call),
    ("before the trim", "hot", "flushed", before_call),
    ("after the trim", "hot", "flushed", after_call),
]


@pytest.mark.parametrize(
    ("target", "name", "wrap"), [place[1:] for place in PLACES], ids=[place[0] for place in PLACES]
)
def test_flusher_dies(world: World, target: Any, name: str, wrap: Any) -> None:
    """P5. It dies at the place; another one goes on. Everything is in SQL exactly once."""
    ids = _orders(world, 8)
    target = world.hot if target == "hot" else target
    with pytest.raises(Died), wrap(target, name, die):
        world.flusher().step()
    world.orders.transition(ids[0], "ship")
    other = world.flusher(world.more())
    while other.step().entries:
        pass
    assert [world.versions(id) for id in ids] == [[1, 2, 3]] + [[1, 2]] * 7
    world.verify()


@pytest.mark.parametrize("committed", [True, False])
def test_outcome_of_the_commit_is_unknown(world: World, committed: bool) -> None:
    """Fact 9: the connection is lost during COMMIT. The step raises; the next one reads the watermark back, and neither skips
    nor repeats, whether it had committed or not."""
    ids = _orders(world, 8)
    original = DurableStore.flush_transaction

    @contextlib.contextmanager
    def unknown(self: DurableStore, limit_seconds: int) -> Iterator[FlushTransaction]:
        with original(self, limit_seconds) as transaction:
            yield transaction
            if not committed:
                raise faults.CommitUnknown("lost")
        raise faults.CommitUnknown("lost")

    flusher = world.flusher()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DurableStore, "flush_transaction", unknown)
        with pytest.raises(errors.UnavailableError):
            flusher.step()
    while flusher.step().entries:
        pass
    assert [world.versions(id) for id in ids] == [[1, 2]] * 8
    world.verify()


@pytest.mark.postgres
@pytest.mark.parametrize("forwarded", [True, False])
def test_commit_is_cut_on_the_wire(
    postgres_server: servers.PostgresServer, redis_url: str, postgres_url: str, namespace: str, forwarded: bool
) -> None:
    """Fault 40 on PostgreSQL itself: a proxy resets the connection at COMMIT, before or after the server has it."""
    with Proxy(postgres_server.port) as proxy, World(redis_url, proxy.url(postgres_url), namespace) as world:
        ids = _orders(world, 8)
        flusher = world.flusher()
        if forwarded:
            proxy.drop_replies_after_forwarding(matching=b"COMMIT\0")
        else:
            proxy.cut_before_forwarding(matching=b"COMMIT\0")
        with pytest.raises(errors.UnavailableError):
            flusher.step()
        proxy.pass_through()
        while flusher.step().entries:
            pass
        assert [world.versions(id) for id in ids] == [[1, 2]] * 8
        world.verify()


def test_trim_that_was_not_told_is_made_up_for(lite: World) -> None:
    """Redis is away after the commit: nothing is lost; the next step, with nothing to move, tells it."""
    _orders(lite)
    flusher = lite.flusher()
    with before_call(lite.hot, "flushed", lambda: _raise(errors.UnavailableError("away"))):
        assert flusher.step().entries == 40
    assert len(lite.log(0)) > 1
    flusher.step()
    assert lite.log(0) == [str(lite.watermark(0))]


def _raise(error: Exception) -> None:
    raise error


# --- races ------------------------------------------------------------------------------------------------------------------


def test_overtaken_flusher_drops_what_it_read(world: World) -> None:
    """Both have read the same entries; the other one commits first: the first one's compare-and-set changes no row, and it
    starts from SQL again."""
    ids = _orders(world, 8)
    flusher, other = world.flusher(), world.flusher(world.more())
    with before_call(flusher, "_commit", other.step):
        step = flusher.step()
    assert (step.entries, step.more) == (0, True)
    world.orders.transition(ids[0], "ship")
    assert flusher.step().entries == 1
    assert world.versions(ids[0]) == [1, 2, 3]
    world.verify()


def test_a_batch_larger_than_one_read(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read in parts, which go on where the ones before ended in each partition; one commit."""
    monkeypatch.setattr(flusher_module, "READ_ENTRIES_MAX", 7)
    world.flush()  # the marks
    ids = _orders(world, 20)
    flusher = world.flusher(batch_entries=25)
    with mock.patch.object(world.hot, "read", wraps=world.hot.read) as read:
        assert flusher.step().entries == 25
        assert [call.kwargs["entries"] for call in read.call_args_list[:4]] == [7, 7, 7, 4]
        assert [flusher.step().entries for _ in range(2)] == [15, 0]
    assert all(world.versions(id) == [1, 2] for id in ids)
    world.verify()


def test_a_read_in_parts_ends_at_the_bytes_allowed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flusher_module, "READ_ENTRIES_MAX", 4)
    world.flush()  # the marks
    _orders(world, 20)
    flusher = world.flusher(batch_entries=100, batch_bytes=1000)
    steps = [flusher.step().entries for _ in range(20)]
    assert sum(steps) == 40
    assert 4 < steps[0] < 20
    world.verify()


def test_a_read_in_parts_of_so_many_bytes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """No part keeps Redis for long, and yet a batch is what is there: one commit."""
    monkeypatch.setattr(flusher_module, "READ_BYTES_MAX", 700)
    world.flush()  # the marks
    ids = _orders(world, 20)
    flusher = world.flusher(batch_entries=100)
    with mock.patch.object(world.hot, "read", wraps=world.hot.read) as read:
        assert flusher.step().entries == 40
    assert len(read.call_args_list) > 3
    assert {call.kwargs["bytes_max"] for call in read.call_args_list} == {700}
    assert all(world.versions(id) == [1, 2] for id in ids)
    world.verify()


def test_a_recovery_between_two_parts_of_a_read(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second part is refused, so nothing of the first is used either; the next step reads all again."""
    monkeypatch.setattr(flusher_module, "READ_ENTRIES_MAX", 7)
    world.flush()  # the marks
    ids = _orders(world, 10)
    flusher = world.flusher(batch_entries=100)
    read, calls = world.hot.read, []

    def recovered_behind_the_first(*arguments: Any, **named: Any) -> Any:
        calls.append(read(*arguments, **named))
        if len(calls) == 1:
            world.more().recover()
        return calls[-1]

    monkeypatch.setattr(world.hot, "read", recovered_behind_the_first)
    assert flusher.step().entries == 0
    assert [reply.code for reply in calls[1]] == ["EPOCH"] * len(calls[1])
    assert sum(flusher.step().entries for _ in range(3)) == 20
    assert all(world.versions(id) == [1, 2] for id in ids)
    world.verify()


def _large(world: World, monkeypatch: pytest.MonkeyPatch, count: int) -> list[str]:
    """Instances of 2 KB, each with one small entry that is not flushed, where 40 KB may be rewritten at once."""
    ids = [f"l{number}" for number in range(count)]
    world.orders.start_many([(id, {"blob": "x" * 2000}) for id in ids])
    world.flush()
    world.orders.transition_many([Move(id, "note", {"k": 1}) for id in ids])
    monkeypatch.setattr(flusher_module, "BATCH_ENTRIES_MIN", 5)
    monkeypatch.setattr(flusher_module, "DATA_BYTES_MAX", 40_000)
    monkeypatch.setattr(batching, "LOAD_FIRST", 8)
    return ids


@pytest.mark.parametrize("known", [False, True], ids=["asked for", "remembered"])
def test_a_batch_is_what_fits_into_memory(world: World, monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    """One transaction is rolled back when it shows how large the instances are; from then on batches are as many as fit, and
    do not grow beyond it each time again."""
    ids = _large(world, monkeypatch, 100)
    flusher = world.flusher()
    if known:
        with monkeypatch.context() as unbounded:
            unbounded.setattr(flusher_module, "DATA_BYTES_MAX", 10**9)
            assert flusher.step().entries == 100
        flusher._data_bytes_each = 0.0
        world.orders.transition_many([Move(id, "note", {"k": 2}) for id in ids])
    loaded: list[int] = []
    checkpoints = FlushTransaction.checkpoints

    def told(transaction: FlushTransaction, instances: Sequence[tuple[str, str]]) -> Any:
        found = checkpoints(transaction, instances)
        loaded.append(sum(len(row.data) for row in found.values()))
        return found

    monkeypatch.setattr(FlushTransaction, "checkpoints", told)
    steps = []
    while (step := flusher.step()).more or step.entries:
        steps.append(step.entries)
    assert steps[0] == 0
    assert all(10 <= entries <= 20 for entries in steps[1:-1]), steps
    assert sum(steps) == 100
    assert max(loaded, default=0) <= 50_000
    assert all(world.versions(id) == [1, 2, 3][: 2 + known] for id in ids)
    world.verify()


def test_the_smallest_batch_goes_through_whatever_its_data_takes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = _large(world, monkeypatch, 12)
    monkeypatch.setattr(flusher_module, "DATA_BYTES_MAX", 1)
    flusher = world.flusher()
    assert [flusher.step().entries for _ in range(5)] == [0, 5, 5, 2, 0]
    assert all(world.versions(id) == [1, 2] for id in ids)


def test_batches_grow_again_when_the_large_instances_have_passed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    _large(world, monkeypatch, 60)
    flusher = world.flusher()
    while flusher.step().more:
        pass
    small = flusher._size
    for _ in range(12):
        _orders(world, flusher._size, f"s{flusher._size}-{world.client.dbsize()}-")
        while flusher.step().more:
            pass
    assert flusher._size > 5 * small


def test_what_history_holds_in_sqlite(lite: World) -> None:
    """Empty parts are NULL, numbers are numbers: SQLite would take anything."""
    lite.orders.start("a", {"n": 1})
    lite.orders.transition("a", "pay", actor="me", occurred_at=datetime.datetime.fromtimestamp(5, datetime.UTC))
    lite.flush()
    names = ("from_state", "actor", "reason", "occurred_ms", "unset", "increments", "version", "seq", "at_ms")
    asked = ", ".join(f"typeof({name})" for name in names)
    with lite.durable.database.engine.connect() as connection:
        history = f"SELECT {asked} FROM statecache_transitions WHERE event <> '@epoch' ORDER BY version"
        first, second = connection.exec_driver_sql(history).fetchall()
        assert connection.exec_driver_sql("SELECT typeof(final), final FROM statecache_checkpoints").fetchall() == [
            ("integer", 0)
        ]
    assert first == (*["null"] * 6, *["integer"] * 3)
    assert second == ("text", "text", "null", "integer", "null", "null", *["integer"] * 3)


def test_size_of_a_batch_by_database(world: World) -> None:
    """SQLite's is larger; what the settings say counts for every database."""
    is_sqlite = world.durable.database.dialect.name == "sqlite"
    assert world.cache.make_flusher([0]).batch_entries == (10_000 if is_sqlite else 5_000)
    settings = world.cache.settings
    world.cache.settings = settings.model_copy(update={"flush_batch_entries": 77})
    assert world.cache.make_flusher([0]).batch_entries == 77
    world.cache.settings = settings


def test_next_batch_is_read_while_this_one_is_committed(world: World) -> None:
    """Each entry is read from Redis once, whoever waits for it; and the steps say the same as without."""
    world.flush()  # the marks
    _orders(world, 20)
    flusher = world.flusher(batch_entries=10)
    with mock.patch.object(world.hot, "read", wraps=world.hot.read) as read:
        steps = [flusher.step().entries for _ in range(5)]
    assert steps == [10, 10, 10, 10, 0]
    assert sum(call.kwargs["entries"] for call in read.call_args_list) <= 60  # the last look ahead, and the idle step's
    assert len({str(call.args[0]) for call in read.call_args_list[:4]}) == 4
    world.verify()


def test_a_steady_load_is_read_ahead_and_waits_for_no_pause(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes all that there is, and enough that more is to be expected. What comes while SQL works on it is found ahead:
    the next step reads nothing itself. A look that found nothing is no answer: what came after it is moved by the next step."""
    monkeypatch.setattr(flusher_module, "STEADY_ENTRIES", 10)
    world.flush()  # the marks
    flusher = world.flusher()
    _orders(world, 5)
    with before_call(flusher, "_start_ahead", lambda: _orders(world, 3, "meanwhile")):
        step = flusher.step()
    assert (step.entries, step.more) == (10, True)
    ahead = flusher._ahead
    assert ahead is not None
    ahead.join()
    with mock.patch.object(world.hot, "read", wraps=world.hot.read) as read:
        step = flusher.step()
    assert (step.entries, step.more) == (6, False)
    assert not read.called
    _orders(world, 5, "again")
    assert flusher.step().more
    assert flusher._ahead is not None
    flusher._ahead.join()
    assert flusher._ahead.look is not None
    assert not any(batch.records for batch in flusher._ahead.look.batches)
    world.orders.start("late")
    step = flusher.step()
    assert (step.entries, step.more) == (1, False)
    world.verify()


def test_what_was_read_ahead_is_not_used_behind_another_flusher(world: World) -> None:
    """It has looked ahead of its own commit; another one moves SQL's watermark past that: the next step reads again."""
    world.flush()  # the marks
    ids = _orders(world, 20)
    flusher, other = world.flusher(batch_entries=10), world.flusher(world.more(), batch_entries=10)
    assert flusher.step().entries == 10
    assert other.step().entries == 10
    assert [flusher.step().entries for _ in range(3)] == [10, 10, 0]
    assert all(world.versions(id) == [1, 2] for id in ids)
    world.verify()


def test_what_was_read_ahead_of_a_recovery_is_not_used(world: World) -> None:
    """Redis is wiped and recovered after the look ahead: what it had seen is lost, and comes into no row of history."""
    world.flush()  # the marks
    ids = _orders(world, 20)
    flusher = world.flusher(batch_entries=10)
    assert flusher.step().entries == 10
    world.wipe()
    world.cache.recover()
    kept = {id: world.versions(id) for id in ids}
    assert flusher.step().entries == 0
    assert {id: world.versions(id) for id in ids} == kept
    assert sum(map(len, kept.values())) == 10
    world.verify()


def test_look_ahead_that_failed_or_is_old_is_taken_again(lite: World, monkeypatch: pytest.MonkeyPatch) -> None:
    lite.flush()  # the marks
    _orders(lite, 20)
    flusher = lite.flusher(batch_entries=10)
    calls = iter(range(100))

    def away_at_the_second(*arguments: Any, **named: Any) -> Any:
        if next(calls) == 1:
            raise errors.UnavailableError("away")
        return read(*arguments, **named)

    read = lite.hot.read
    with mock.patch.object(lite.hot, "read", away_at_the_second):
        assert [flusher.step().entries, flusher.step().entries] == [10, 10]
        flusher.rest()
    assert next(calls) == 4  # a look, the one that failed, the same again, the next ahead
    with mock.patch.object(flusher_module._Ahead, "start", side_effect=RuntimeError("can't start new thread")):
        lite.orders.start_many([f"more{number}" for number in range(20)])
        assert [flusher.step().entries for _ in range(2)] == [10, 10]
    monkeypatch.setattr(flusher_module, "LOOK_SECONDS_MAX", -1.0)
    assert [flusher.step().entries for _ in range(3)] == [10, 10, 0]
    assert flusher.rest() is None
    lite.verify()


def test_other_flusher_trims_between_the_two_reads(world: World) -> None:
    """SQL's watermark is read; another flusher commits and trims; then the log is read: its first entry does not follow the
    watermark that was read. That is no hole, and asks for no recovery."""
    _orders(world, 8)
    world.flush()
    ids = _orders(world, 8, "g")
    flusher, other = world.flusher(), world.flusher(world.more())
    epoch = world.durable.identity().epoch

    def pass_by() -> None:
        other.step()
        world.orders.transition(ids[0], "note")

    with before_call(world.hot, "read", pass_by):
        assert flusher.step().stopped == {}
    assert world.durable.identity().epoch == epoch
    world.flush()
    world.verify()


def test_four_flushers_race_on_the_same_partitions(world: World) -> None:
    """P5. Four of them, small batches, writers at work: each entry is in SQL once, and nobody raises."""
    ids = _orders(world, 30)
    flushers = [world.flusher(world.more(), batch_entries=7) for _ in range(4)]
    writing = threading.Event()

    def flush(flusher: Any) -> int:
        moved = 0
        while not writing.is_set() or any(world.watermark(p) < _last(world, p) for p in (0, 1)):
            moved += flusher.step().entries
        return moved

    def write() -> int:
        try:
            for event in ("note", "note", "ship", "deliver"):
                for id in ids:
                    world.orders.transition(id, event)
        finally:
            writing.set()
        return 0

    results = together(write, *[lambda flusher=flusher: flush(flusher) for flusher in flushers])
    assert all(isinstance(one, int) for one in results), results
    assert sum(results) == 30 * 6
    assert [world.versions(id) for id in ids] == [[1, 2, 3, 4, 5, 6]] * 30
    world.verify()


def _last(world: World, partition: int) -> entry.EntryId:
    return entry.EntryId.parse(world.client.xinfo_stream(world.keyspace.log(partition))["last-generated-id"].decode())


@pytest.mark.postgres
def test_deadlock_is_retried(redis_url: str, postgres_url: str, namespace: str) -> None:
    """Fault 44: PostgreSQL gives way to another transaction (a deadlock, reported as such): the batch is run again."""
    with World(redis_url, postgres_url, namespace) as world:
        _orders(world, 4)
        flusher = world.flusher()
        with before_call(FlushTransaction, "insert_history", lambda: _raise(faults.Transient("deadlock"))):
            try:
                flusher.step()
            except errors.UnavailableError:
                flusher.step()
        world.flush()
        world.verify()


# --- holes, and logs that go back ------------------------------------------------------------------------------------------


def test_hole_stops_its_partition_and_the_others_go_on(redis_url: str, sqlite_url: str, namespace: str) -> None:
    """Fault 36, P10: an unflushed entry is deleted by a stranger. Its partition is moved up to the hole and stops, and says
    so; the other partition flows on; nothing is skipped."""
    with World(redis_url, sqlite_url, namespace, auto_recover=False) as world:
        bad, good = world.id(0), world.id(1)
        world.start(bad)
        world.start(good)
        gone = world.orders.transition(bad, "note")
        world.orders.transition(bad, "note")
        world.client.xdel(world.keyspace.log(0), gone.entry_id)
        flusher = world.flusher()
        while flusher.step().entries:
            pass
        world.orders.transition(good, "pay")
        step = flusher.step()
        assert (step.entries, list(step.stopped)) == (1, [0])
        assert f"does not follow {world.watermark(0)}" in step.stopped[0]
        assert world.versions(bad) == [1]
        assert world.versions(good) == [1, 2]
        with pytest.raises(errors.IntegrityError, match="statecache recover"):
            world.flush()


def test_hole_is_logged_when_it_is_found_and_every_minute_while_it_stays(
    redis_url: str, sqlite_url: str, namespace: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with World(redis_url, sqlite_url, namespace, auto_recover=False) as world:
        flusher = world.flusher()
        now = 1000.0
        progress = worker.Progress(lambda *_: None)

        def told(steps: int) -> int:
            """In how many lines a process says what so many steps found."""
            caplog.clear()
            for _ in range(steps):
                step = flusher.step()
                with monkeypatch.context() as patched:
                    patched.setattr("workers.flusher.time.monotonic", lambda: now)
                    progress.step(step)
            return sum("statecache recover" in record.getMessage() for record in caplog.records)

        for partition in (0, 1):
            id = world.id(partition)
            world.start(id)
            gone = world.orders.transition(id, "note")
            world.orders.transition(id, "note")
            world.client.xdel(world.keyspace.log(partition), gone.entry_id)
            assert told(10) == 1
        assert told(10) == 0
        now += 60.0
        assert told(10) == 2


def test_strangers_record_stops_nobody(lite: World) -> None:
    """P10. A record that statecache did not write stands in the log: it is kept aside, under its own address, and everything
    behind it is flushed."""
    lite.start(lite.id(0), ["pay"])
    lite.client.xadd(lite.keyspace.log(0), {"e": "not ours"}, id="1-*")
    lite.client.xadd(lite.keyspace.log(0), {"who": "knows"}, id="1-*")
    lite.orders.transition(lite.id(0), "ship")
    lite.flush()
    assert lite.versions(lite.id(0)) == [1, 2, 3]
    parked = lite.durable.parked_instances()
    assert len(parked) == 2
    for machine, id in parked:
        assert letters.discard(lite.cache, machine, id) == 1
    lite.verify()


@pytest.mark.parametrize("version", [b"2", b"9", b"4"])
def test_versions_that_do_not_go_on_are_put_aside(world: World, version: bytes) -> None:
    """P10. An entry's version is not the one that is due behind SQL's (it was written twice, or one is lost): none of the
    instance's entries gets into history, the reason says which, and the others are flushed. Of two with one version the second
    is kept as a stranger's: letters are told apart by their versions."""
    here, other = world.id(0), world.id(0, 1)
    world.start(here, ["pay"])
    world.start(other)
    world.flush()
    for id in (here, other, here):
        world.orders.transition(id, "note")
    log = world.keyspace.log(0)
    records: Any = world.client.xrange(log)
    world.client.delete(log)
    for name, fields in records:
        parts = fields[b"e"].split(b"\x1f")
        if parts[1:3] == [here.encode(), b"3"]:
            parts[2] = version
        world.client.xadd(log, {"e": b"\x1f".join(parts)}, id=name)
    world.flush()
    assert world.versions(here) == [1, 2]
    assert world.versions(other) == [1, 2]
    kept = world.durable.letters("order", here)
    assert [letter.entry.version for letter in kept] == sorted({int(version), 4})
    assert any(f"goes on with version {int(version)} where 3 is due" in letter.error for letter in kept)
    foreign = _kept_apart(world, f"0:{records[-1][0].decode()}")
    assert len(kept) + len(foreign) == 2
    assert all("note" in letter.entry.patch.split("\x1f") for letter in foreign)


@pytest.mark.parametrize("text", [b"\xff\xfe", b"\xed\xa0\x80", b"a\x00b", b"order\x1f1\x1f\x00\x1f", b"x\ry", b"\x1e"])
def test_strangers_bytes_stop_nobody(world: World, text: bytes) -> None:
    """The same of a record that is no UTF-8, or has what SQL or COPY would not take: for the flusher and for a recovery."""
    world.start("1", ["pay"])
    for begun_by in (world.flush, world.disown):
        last = _last(world, world.partition_of("1"))
        place = f"{last.epoch}-{last.seq + 1}"
        world.client.xadd(world.keyspace.log(world.partition_of("1")), {"e": text}, id=place)
        begun_by()
        world.orders.transition("1", "note")
        world.flush()
        assert len(world.durable.letters("@foreign", f"{world.partition_of('1')}:{place}")) == 1
    assert world.versions("1") == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ("version", str(10**30)), ("version", "-1"), ("at_ms", str(10**30)), ("machine_version", str(2**31)),
        ("at_ms", "253402300800000"), ("occurred_ms", "abc"), ("occurred_ms", str(10**30)), ("occurred_ms", "-62135596800001"),
        ("event", "@epoch"),
    ],
)  # fmt: skip
def test_records_that_look_like_ours_stop_nobody(world: World, part: str, text: str) -> None:
    """P10. A stranger's record has as many parts as ours, but what no column takes or no mark says: it is kept as a stranger's,
    and what is behind it is flushed, by a flusher and by a recovery."""
    id = world.id(0)
    world.start(id)
    parts = dict.fromkeys(entry.PARTS, "") | {
        "machine": "order", "id": "x", "version": "1", "event": "@start", "to_state": "placed", "at_ms": "1700000000000",
        "transition_id": "theirs", "machine_version": "1", part: text,
    }  # fmt: skip
    for begun_by in (world.flush, world.disown):
        last = _last(world, 0)
        place = f"{last.epoch}-{last.seq + 1}"
        world.client.xadd(world.keyspace.log(0), {"e": entry.SEPARATOR.join(parts.values())}, id=place)
        begun_by()
        world.orders.transition(id, "note")
        world.flush()
        assert len(world.durable.letters("@foreign", f"0:{place}")) == 1
    assert world.versions(id) == [1, 2, 3]


def test_two_open_quotes_swallow_nothing_between_them(world: World) -> None:
    """P5, P10. COPY's quote in two strangers' records: all lines between would be one row, and lost without a word."""
    ids = [world.id(0, prefix) for prefix in "abc"]
    world.start(world.id(0))
    places = [world.forge(forged("x", actor="one\x1equote"))]
    receipts = [world.orders.start(id) for id in ids]
    places.append(world.forge(forged("y", actor="one\x1equote")))
    world.flush()
    assert [world.versions(id) for id in ids] == [[1]] * 3
    world.cache.wait_durable(receipts)
    assert world.durable.parked_instances() == sorted(("@foreign", f"0:{place}") for place in places)
    world.verify()


@pytest.mark.parametrize("patch", ['{"a":1e999}', '{"a":-2.5E+400}'])
def test_number_that_no_reader_takes_is_a_letter(world: World, patch: str) -> None:
    """P10. JSON knows numbers that nobody can decode."""
    bad, good = world.id(0, "bad"), world.id(0)
    world.forge(forged(bad, patch=patch))
    world.start(good, ["pay"])
    world.flush()
    assert world.versions(good) == [1, 2]
    (letter,) = world.durable.letters("order", bad)
    assert "none that can be read" in letter.error
    with pytest.raises(errors.IntegrityError, match="can be read"):
        letters.retry(world.cache, "order", bad)
    assert letters.discard(world.cache, "order", bad) == 1
    world.verify()


@pytest.mark.parametrize("levels", [990, 5000])
@pytest.mark.parametrize("part", ["patch", "increments"])
def test_data_nested_too_deep_is_a_letter(world: World, part: str, levels: int) -> None:
    """P10. What the decoder gives up at is no mistake of the program: a flush, a recovery and a reader go on without it."""
    bad, good = world.id(0, "bad"), world.id(0)
    world.forge(forged(bad, **{part: '{"a":' + "[" * levels + "]" * levels + "}"}))
    world.start(good)
    world.flush()
    assert world.versions(good) == [1]
    (letter,) = world.durable.letters("order", bad)
    assert "none that can be read" in letter.error
    before = world.sql_copy()
    world.orders.transition(good, "pay")
    world.forge(forged(bad, **{part: '{"a":' + "[" * levels + "]" * levels + "}", "version": "2"}))
    world.flush()
    world.sql_back(before)  # SQL is behind: what the log holds is taken apart by the recovery too
    world.cache.recover()
    assert world.orders.get(good).version == 2
    with pytest.raises(errors.IntegrityError, match="cannot be read"):
        world.orders.history(bad)


def test_history_that_nobody_can_read_stops_no_flush(world: World) -> None:
    """P10. SQL holds such a number, and the log another record of that key: told apart without a look at their data."""
    bad = world.id(0, "bad")
    good = [world.id(0, prefix) for prefix in "ab"]
    long = '{"a":1e999,"blob":"' + "x" * 200 + '"}'
    world.forge(forged(bad, patch=long))
    world.start(good[0])
    world.flush()
    with pytest.raises(errors.IntegrityError, match="version 1 in SQL holds data that cannot be read"):
        world.versions(bad)
    world.forge(forged(bad, patch='{"a":1}', transition_id="another"))
    world.start(good[1])
    world.flush()
    assert [world.versions(id) for id in good] == [[1]] * 2
    assert [letter.entry.transition_id for letter in world.durable.letters("order", bad)] == ["another"]


def _kept_apart(world: World, place: str) -> list[Any]:
    """The letters of entries that were kept under their entry ids, which tell their texts too."""
    found = [one for one in world.durable.parked_instances() if one[0] == "@foreign" and one[1].startswith(f"{place}:")]
    return [letter for instance in found for letter in world.durable.letters(*instance)]


def test_letter_that_sql_refuses_is_kept_under_its_entry_id(lite: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """P10. SQL refuses an entry, and the letter of it too: it is kept as a stranger's, whose parts are one text."""
    id = lite.id(0)
    lite.start(id)
    original = FlushTransaction.insert_letters

    def refusing(self: Any, rows: Any, *arguments: Any) -> None:
        if any(row[3] == "order" for row in rows):
            raise faults.Refused("not this letter")
        original(self, rows, *arguments)

    def no_history(self: Any, lines: Any, *arguments: Any, **named: Any) -> None:
        if any("note" in line for line in lines):
            raise faults.Refused("not this entry")
        history(self, lines, *arguments, **named)

    history = FlushTransaction.insert_history
    monkeypatch.setattr(FlushTransaction, "insert_letters", refusing)
    monkeypatch.setattr(FlushTransaction, "insert_history", no_history)
    lite.orders.transition(id, "note")
    lite.flush()
    (letter,) = _kept_apart(lite, f"0:{_last(lite, 0)}")
    assert "note" in letter.entry.patch.split(entry.SEPARATOR)
    assert lite.versions(id) == [1]


def test_flusher_thread_outlives_a_mistake(lite: World) -> None:
    """An error that nobody expects ends one step, not the thread that flushes all partitions."""
    lite.start(lite.id(0))
    flusher = lite.flusher()
    stop, steps = threading.Event(), []

    def broken() -> None:
        raise ZeroDivisionError

    with before_call(flusher, "_commit", broken):
        thread = threading.Thread(target=flusher.run, args=(stop, steps.append))
        thread.start()
        wait_until(lambda: any(step.entries for step in steps), "the step behind the mistake")
    stop.set()
    thread.join()
    assert lite.versions(lite.id(0)) == [1]


@pytest.mark.parametrize("overtaken", [False, True])
def test_kept_tail_is_as_long_as_it_should_be(lite: World, monkeypatch: pytest.MonkeyPatch, overtaken: bool) -> None:
    """P11. 100 s of the log are kept, 10 entries every 10 s, a commit every second. Also a flusher that another process goes
    ahead of now and then trims what is older, and remembers no mark of every commit."""
    id, now = lite.id(0), [1000.0]
    lite.start(id)
    flusher, other = lite.flusher(log_keep_seconds=100.0), lite.more(log_keep_seconds=100.0)
    monkeypatch.setattr("statecache.engine.flusher.time.monotonic", lambda: now[0])
    for turn in range(40):
        now[0] += 10
        for _ in range(10):
            lite.orders.transition(id, "note")
        if overtaken and turn % 5 == 4:
            with before_call(flusher, "_commit", lambda: lite.flusher(other).step(now[0] + 5)):
                flusher.step(now[0] + 5)
        else:
            flusher.step(now[0] + 5)
    assert 100 <= len(lite.log(0)) <= 125
    for number in range(100_000):
        now[0] += 0.01
        flusher._trim_to(0, entry.EntryId(1, 1000 + number))
    assert len(flusher._kept[0]) < 210


def test_sql_that_went_back_is_flushed_again_from_the_kept_tail(world: World) -> None:
    """The log is kept for the age of the oldest backup. SQL is restored; nobody recovers, nobody is told: the flusher begins at
    SQL's watermark, which is all it trusts, and brings everything back, letter for letter."""
    ids = _orders(world, 8)
    flusher = world.flusher(log_keep_seconds=3600.0)
    flusher.step()
    saved = world.sql_copy()
    world.orders.transition_many([Move(id, "ship", data={"x": id}) for id in ids])
    flusher.step()
    whole = {id: world.durable.history("order", id) for id in ids}
    world.sql_back(saved)
    while flusher.step().entries:
        pass
    assert {id: world.durable.history("order", id) for id in ids} == whole
    world.verify()


def test_flusher_that_was_restarted_trims_what_is_old(lite: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """P11. Marks of the kept tail are in the flusher's memory. A new one finds in the log what is older, or each restart would
    keep everything for as long again."""
    ids = _orders(lite, 4)
    lite.flusher(log_keep_seconds=100.0).step()
    assert lite.log(0)[0] == "1-0"
    later_ms = lite.hot.time_ms() + 200_000
    lite.orders.transition_many([Move(id, "ship") for id in ids])
    with lite.more(log_keep_seconds=100.0) as restarted:
        monkeypatch.setattr(restarted.hot, "time_ms", lambda: later_ms)
        lite.flusher(restarted, log_keep_seconds=100.0).step()
    assert lite.log(0) == [str(lite.watermark(0))]


def test_newest_entry_that_is_older(lite: World) -> None:
    """Found by halving the numbers: whatever was trimmed before it, and wherever it lies. A stranger's record, whose time is
    not known, is not passed."""
    log = lite.keyspace.log(0)
    lite.client.delete(log)
    for seq in range(1, 101):
        parts = dict.fromkeys(entry.PARTS, "") | {"machine": "order", "id": "x", "version": str(seq), "event": "note"}
        parts |= {"to_state": "placed", "at_ms": str(seq * 1000), "transition_id": f"t{seq}", "machine_version": "1"}
        text = "a stranger's" if seq == 70 else entry.SEPARATOR.join(parts.values())
        lite.client.xadd(log, {"e": text}, id=f"1-{seq}")

    def older(than_ms: int, watermark: int = 100) -> int:
        return watching.newest_older(lite.hot, 0, entry.EntryId(1, watermark), than_ms).seq

    for first in (1, 17):
        lite.client.xtrim(log, minid=f"1-{first}", approximate=False)
        assert [older(ms) for ms in (0, first * 1000, 20_001, 40_000, 41_500)] == [0, 0, 20, 39, 41]
        assert older(10**9, watermark=69) == 69
        assert older(10**9) in (69, 100)
    lite.client.delete(log)
    assert older(10**9) == 0


def test_kept_tail_is_trimmed_by_age(lite: World) -> None:
    """``log_keep_seconds``: what was flushed longer ago goes, what is younger stays, and never the witness."""
    ids = _orders(lite, 4)
    flusher = lite.flusher(log_keep_seconds=3600.0)
    now = 1000.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("statecache.engine.flusher.time.monotonic", lambda: now)
        flusher.step(now + 5)
        first = lite.watermark(0)
        assert lite.log(0)[0] == "1-0"
        now += 3000
        lite.orders.transition_many([Move(id, "ship") for id in ids])
        flusher.step(now + 5)
        assert lite.log(0)[0] == "1-0"
        now += 1000
        flusher.step(now + 5)
        assert lite.log(0)[0] == str(first)
        now += 10_000
        flusher.step(now + 5)
        assert lite.log(0) == [str(lite.watermark(0))]


def test_sql_that_went_back_under_a_kept_tail_loses_nothing_to_the_trim(lite: World) -> None:
    """P11. The flusher remembers trim marks of the time before SQL went back. They age while it flushes again in small steps:
    it may trim only what SQL has now."""
    id = lite.id(0)
    lite.start(id)
    flusher = lite.flusher(log_keep_seconds=100.0)
    now = 1000.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("statecache.engine.flusher.time.monotonic", lambda: now)
        flusher.step(now + 5)
        saved = lite.sql_copy()
        for _ in range(9):
            lite.orders.transition(id, "note")
        flusher.step(now + 5)
        lite.sql_back(saved)
        now += 1000
        flusher.batch_entries = 2
        for _ in range(20):
            flusher.step(now + 5)
    assert lite.versions(id) == list(range(1, 11))
    lite.verify()


# --- limits -----------------------------------------------------------------------------------------------------------------


def test_backlog_limit_refuses_until_something_is_flushed(redis_url: str, sqlite_url: str, namespace: str) -> None:
    """P11. SQL is away, the backlog reaches its bound: a clear ``BackpressureError`` at the call's deadline, nothing written;
    reads go on; after a flush writes are accepted again."""
    with World(redis_url, sqlite_url, namespace, backlog_limit_entries=20) as world:
        id = world.id(0)
        world.start(id)
        for _ in range(18):
            world.orders.transition(id, "note")
        before = world.hot_dump()
        with pytest.raises(errors.BackpressureError, match="backlog has reached its limit"):
            world.orders.transition(id, "note", timeout=1.0)
        assert world.hot_dump() == before
        assert world.orders.get(id).version == 19
        world.start(world.id(1))  # the other partition has room
        world.flusher().step()
        assert world.orders.transition(id, "note").version == 20


def test_writer_waits_for_room_within_its_deadline(redis_url: str, sqlite_url: str, namespace: str) -> None:
    with World(redis_url, sqlite_url, namespace, backlog_limit_entries=5) as world:
        id = world.id(0)
        world.start(id)
        for _ in range(3):
            world.orders.transition(id, "note")
        with before_call(world.cache.driver, "_pause", lambda: world.flusher().step()):
            assert world.orders.transition(id, "note", timeout=20.0).version == 5


def test_loop_stops_when_told_and_survives_errors(lite: World) -> None:
    """The loop logs and waits out what fails; told to stop, it ends after its batch."""
    _orders(lite, 4)
    flusher = lite.flusher()
    stop = threading.Event()
    failures = 0
    original = flusher._step

    def failing(deadline: float, numbers: Sequence[int]) -> Any:
        nonlocal failures
        failures += 1
        if failures <= 2:
            raise errors.UnavailableError("away")
        return original(deadline, numbers)

    flusher._step = failing  # type: ignore[method-assign]
    thread = threading.Thread(target=flusher.run, args=(stop,))
    thread.start()
    wait_until(lambda: lite.versions("f0") == [1, 2], "the loop to flush")
    stop.set()
    flusher.wake.set()
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.postgres
def test_sql_is_away_and_comes_back(private_postgres: servers.PostgresServer, redis_url: str, namespace: str) -> None:
    """Fault 41: writers go on while SQL is away; the flusher fails, and catches up when it is back."""
    name = private_postgres.create_database()
    with World(redis_url, private_postgres.url(name), namespace) as world:
        ids = _orders(world, 4)
        private_postgres.kill()
        flusher = world.flusher()
        with pytest.raises(errors.UnavailableError):
            flusher.step()
        for id in ids:
            assert world.orders.transition(id, "ship").version == 3
        private_postgres.start()
        while flusher.step().more:
            pass
        assert [world.versions(id) for id in ids] == [[1, 2, 3]] * 4
        world.verify()


class Parcel(StateMachine):
    """A machine that a newer statecache registered."""

    sent = State(initial=True)
    gone = State(final=True)
    lose = sent.to(gone)


def test_definition_that_cannot_be_read_stops_nobody(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """A field of a registered definition is not known here: its entries and all others are flushed, and the log tells once."""
    parcels = world.cache.machine(Parcel)
    columns = schema.machines.c
    with world.durable.database.transaction() as connection:
        spec = connection.execute(sa.select(columns.spec).where(columns.name == "parcel")).scalar_one()
        newer = json.dumps({**json.loads(spec), "of_tomorrow": 1})
        connection.execute(sa.update(schema.machines).where(columns.name == "parcel").values(spec=newer))
    parcels.start("1")
    parcels.start("2")
    world.start("1", ["pay", "ship", "deliver"])
    other = world.more()
    with mock.patch.object(finals_module, "_UNKNOWN_SECONDS", -1.0):  # asked for each time
        other.flush_alone()
    assert world.durable.checkpoint("parcel", "2").state == "sent"  # type: ignore[union-attr]
    assert world.durable.checkpoint("order", "1").final  # type: ignore[union-attr]
    assert [record.getMessage().split(":")[0] for record in caplog.records if record.levelname == "ERROR"] == [
        "the definition of machine parcel, version 1, cannot be read (was it registered by a newer statecache?)"
    ]
    # Nor the duties of who flushes, nor the gauges.
    assert {one.machine for one in eviction.ranges(other)} == {"order"}
    assert [step.instances for step in retention.run(other, datetime.timedelta(0), None, dry_run=True)] == [1]
    assert set(other.timeouts.stuck_counts()) == set()
    with pytest.raises(errors.DefinitionError, match="cannot be read by this version of statecache"):
        other.machine("parcel")


def test_machine_that_is_registered_later_has_finals(lite: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flusher meets a machine that nobody has registered (SQL was restored); it asks once in a while, not for each entry."""
    with lite.durable.database.transaction() as connection:
        connection.execute(sa.delete(schema.machines))
    other = lite.more()
    asked = mock.Mock(side_effect=other.durable.machine)
    monkeypatch.setattr(other.durable, "machine", asked)
    for id in ("1", "2", "3"):
        lite.start(id, ["pay", "ship", "deliver"])
    other.flush_alone()
    assert asked.call_count == 1
    lite.more().machine(Order)
    monkeypatch.setattr(finals_module, "_UNKNOWN_SECONDS", -1.0)
    other.finals._unknown.clear()  # the seconds are over
    lite.start("4", ["pay", "ship", "deliver"])
    other.flush_alone()
    finals = {kept.id: kept.final for kept in lite.durable.iterate_checkpoints()}
    assert finals == {"1": False, "2": False, "3": False, "4": True}


def test_machine_of_another_version_keeps_its_finals(lite: World) -> None:
    """Final states are those of the machine's version that made the transition, also for a flusher that knows no class."""
    lite.start("1", ["pay", "ship", "deliver"])
    flusher = lite.flusher(lite.more())
    flusher.step()
    assert lite.durable.checkpoint("order", "1").final  # type: ignore[union-attr]
    assert Order.definition.finals == {"delivered", "cancelled"}
