"""What chaos, failover and power loss found: each finding forced again, with the interleaving in its docstring."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import msgspec
import pytest
import sqlalchemy as sa

from statecache.core import entry, errors, failpoints, flows, items, model
from statecache.durable import recoveries, schema
from statecache.engine import letters, recovery
from statecache.engine.recovery import PartitionReport
from tests.support import waiting, worlds


@pytest.fixture
def world(redis_url: str, sqlite_url: str, namespace: str) -> Iterator[worlds.World]:
    with worlds.World(redis_url, sqlite_url, namespace, partition_count=1) as made:
        yield made


def move(world: worlds.World, id: str, event: str) -> items.Item:
    return world.orders.calls.door.transition(model.Move(id, event)).item


def newest_report(world: worlds.World) -> PartitionReport:
    row = recoveries.recoveries(world.durable, 1)[0]
    return msgspec.json.decode(row.report, type=recovery.Report).partitions[0]


# --- two flushers ------------------------------------------------------------------------------------------------------


def test_a_hole_that_another_flusher_made_is_none(world: worlds.World) -> None:
    """Flusher A reads the watermark from SQL; B flushes, commits and trims; A reads the log behind the old watermark: its
    first entry does not follow. That is no hole: A must look at SQL again, not stop, not recover, not raise."""
    world.start("a")
    world.flush()
    other = world.flusher(world.more())
    slow = world.flusher()

    def overtake() -> None:
        for _ in range(3):
            world.orders.transition("a", "note")
            other.step()

    with worlds.before_call(world.cache.hot, "read", overtake):
        step = slow.step()
    assert step.stopped == {}
    assert world.cache.hot.stamp.epoch == 1
    world.orders.transition("a", "note", durability="durable")


# --- SQL restored, nobody told -----------------------------------------------------------------------------------------


def test_a_hole_is_recovered_by_whoever_meets_it(world: worlds.World) -> None:
    """SQL is restored from an older copy behind everybody's back; epoch and owner in it are the current ones, so nothing is
    refused, and the log has been trimmed. The next flush meets the hole, and recovers by itself."""
    world.start("a")
    world.flush()
    saved = world.sql_copy()
    world.orders.transition("a", "note", durability="durable")
    world.orders.transition("a", "note", durability="durable")
    world.sql_back(saved)
    receipt = world.orders.transition("a", "pay", durability="durable")
    assert receipt.version == 4
    events = [row.event for row in world.durable.history("order", "a")]
    assert events == ["@start", "@reconciled", "note", "pay"]
    assert newest_report(world).kind == recovery.SQL_BEHIND
    world.verify()


def test_without_auto_recover_a_hole_waits_for_the_operator(redis_url: str, sqlite_url: str, namespace: str) -> None:
    """As above, with ``auto_recover`` off: a durable call says that the transition stands and is not known to be durable
    (it said "entries are missing", which a caller must take for "not applied"), until the operator recovers."""
    with worlds.World(redis_url, sqlite_url, namespace, partition_count=1) as first:
        first.start("a")
        first.flush()
        saved = first.sql_copy()
        first.orders.transition("a", "note", durability="durable")
        first.orders.transition("a", "note", durability="durable")
        first.sql_back(saved)
        cache = first.more(auto_recover=False)
        orders = cache.machine(worlds.Order)
        with pytest.raises(errors.DurabilityTimeout, match="entries are missing") as caught:
            orders.transition("a", "pay", durability="durable", timeout=0.3)
        assert caught.value.receipt is not None
        cache.recover()
        cache.wait_durable(caught.value.receipt)
        first.verify()


def test_a_deleted_log_is_noticed(world: worlds.World) -> None:
    """Somebody deletes a log, and nothing else: the next entries get numbers below SQL's watermark, where no flusher looks.
    They must not pile up there until they pass it. What was in the log and not in SQL is reported as possibly lost; what came
    after it continues nothing, and waits as a letter."""
    world.start("a")
    world.start("b")
    world.flush()
    for _ in range(3):
        world.orders.transition("a", "note", durability="durable")
    lost = world.orders.transition("b", "pay")
    world.client.delete(world.keyspace.log(0))
    stranded = world.orders.transition("b", "note")
    world.cache.flusher.step()
    report = newest_report(world)
    assert (report.loss_possible, report.parked) == (True, 1)
    assert report.tail_seen_ms <= lost.at_ms
    assert world.orders.transition("a", "pay", durability="durable").version == 5
    with pytest.raises(errors.IntegrityError, match="is lost"):
        world.cache.wait_durable(lost)
    with pytest.raises(errors.ParkedError):
        world.cache.wait_durable(stranded)
    world.verify()


# --- SQL away while a durable call waits -------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [errors.UnavailableError, errors.RecoveringError, errors.BackpressureError])
def test_a_durable_call_that_cannot_ask_keeps_its_receipt(
    world: worlds.World, error: type[errors.StateCacheError]
) -> None:
    """The transition was applied; then the flusher's step that the call runs for itself fails, for whatever reason. The
    caller gets the receipt in a ``DurabilityTimeout``, not an error that says "not applied"."""
    world.start("a")
    with (
        mock.patch.object(world.cache.flusher, "step", side_effect=error("in the way")),
        pytest.raises(errors.DurabilityTimeout, match="in the way") as caught,
    ):
        world.orders.transition("a", "pay", durability="durable", timeout=2.0)
    assert isinstance(caught.value.__cause__, error)
    assert caught.value.receipt is not None
    world.cache.wait_durable(caught.value.receipt)


def test_a_durable_call_that_cannot_ask_sql_keeps_its_receipt(world: worlds.World) -> None:
    """As above, where the look at SQL itself fails."""
    world.start("a")
    with (
        mock.patch.object(world.durable, "standing", side_effect=errors.UnavailableError("SQL is away")),
        pytest.raises(errors.DurabilityTimeout, match="SQL is away") as caught,
    ):
        world.orders.transition("a", "pay", durability="durable", timeout=0.3)
    assert caught.value.receipt is not None
    assert world.orders.get("a").version == 2


# --- the identity check, by several at once ----------------------------------------------------------------------------


def test_a_failed_check_counts_as_none(world: worlds.World) -> None:
    """Thread 1's call compares the identity and is refused; before it has recovered, thread 2 sends a call, less than
    500 ms after that check was sent. It must be refused too, or it is accepted by an untrue Redis (P8)."""
    world.start("a")
    world.start("b")
    world.disown()
    world.hot.wires.checked_at = 0.0
    assert [one.code for one in world.hot.apply([move(world, "a", "pay")])] == ["IDENTITY"]
    assert [one.code for one in world.hot.apply([move(world, "b", "pay")])] == ["IDENTITY"]


def test_a_check_under_way_vouches_for_nobody(world: worlds.World) -> None:
    """Two script calls in flight: the second is sent before the first, which compares the identity, was answered."""
    world.start("a")
    world.start("b")
    world.disown()
    world.hot.wires.checked_at = 0.0
    chunks = [[move(world, "a", "pay")], [move(world, "b", "pay")]]
    codes = [one.code for _, outcomes in world.hot.apply_stream(chunks) for one in outcomes]
    assert codes == ["IDENTITY", "IDENTITY"]


def test_a_check_that_succeeded_vouches_for_the_interval(world: worlds.World) -> None:
    """And no longer costs anything: one comparison, then none until the interval is over."""
    world.start("a")
    world.hot.wires.checked_at = 0.0
    world.orders.transition("a", "note")
    asked = world.hot.wires.checked_at
    assert asked > 0.0
    world.orders.transition("a", "note")
    assert world.hot.wires.checked_at == asked


# --- recovery ----------------------------------------------------------------------------------------------------------


def test_a_lost_tail_that_comes_back(world: worlds.World) -> None:
    """Version 2 is acknowledged, not flushed, and lost with Redis; a recovery reports it, and SQL goes on in a new epoch.
    Then an older snapshot of Redis, which holds version 2, is swapped in. Its log ends below SQL's watermark, so that looked
    like a lost tail; but the hash is ahead of SQL, and version 3 was accepted behind a gap that nobody can fill. What the
    log has and SQL has not must wait as letters, and the rest go on."""
    world.start("a")
    world.start("b")
    world.flush()
    world.orders.transition("a", "pay")
    saved = world.redis_copy()
    world.wipe()
    world.cache.recover()
    world.orders.transition("b", "pay")
    world.flush()
    world.redis_back(saved)
    foretold = world.cache.recover(dry_run=True)
    report = world.cache.recover()
    assert report.partitions == foretold.partitions
    assert (report.partitions[0].kind, report.partitions[0].parked) == (recovery.DIVERGED, 1)
    assert [letter.entry.version for letter in world.durable.letters("order", "a")] == [2]
    with pytest.raises(errors.ParkedError):
        world.orders.transition("a", "ship")
    assert world.orders.transition("b", "ship", durability="durable").version == 3
    world.verify()


def test_an_older_snapshot_that_holds_nothing_new_is_a_lost_tail(world: worlds.World) -> None:
    """As above, but all that the snapshot holds is in SQL: a lost tail, nobody is parked."""
    world.start("a")
    world.orders.transition("a", "pay")
    saved = world.redis_copy()
    world.flush()
    world.wipe()
    world.cache.recover()
    world.orders.transition("a", "ship", durability="durable")
    world.redis_back(saved)
    report = world.cache.recover()
    assert (report.partitions[0].kind, report.partitions[0].parked) == (recovery.TAIL_LOST, 0)
    assert world.orders.transition("a", "deliver", durability="durable").version == 4
    world.verify()


def foreign_letters(world: worlds.World) -> list[entry.EntryId]:
    """Where the records stood that statecache did not write, of those kept as letters."""
    table = schema.dead_letters.c
    asked = sa.select(table.epoch, table.seq).where(table.machine == entry.FOREIGN).order_by(table.epoch, table.seq)
    with world.durable.database.engine.connect() as connection:
        return [entry.EntryId(*row) for row in connection.execute(asked)]


@pytest.mark.parametrize("step", ["probe", "ready"])
@pytest.mark.parametrize("flushed", [True, False], ids=["flushed", "unflushed"])
def test_garbage_written_during_a_recovery(world: worlds.World, flushed: bool, step: str) -> None:
    """A recovery has fenced; a stranger writes to the log under its epoch, before its mark: the record gets number 0, which
    is the mark's, and the server refuses the mark ("equal or smaller than the target stream top item"). The recovery begins
    again under the next epoch, and nobody is told of it; the record is kept as a letter, and the partition goes on (P10)."""
    world.start("a")
    world.start("b", ["pay"])
    if flushed:
        world.flush()
    world.disown()

    def garbage() -> None:
        world.client.xadd(world.keyspace.log(0), {"e": "garbage"}, id="2-*")

    with worlds.before_call(world.cache.hot, step, garbage):
        report = world.cache.recover()
    assert report.epoch == 3
    world.flush_through()
    assert foreign_letters(world) == [entry.EntryId(2, 0)]
    assert world.orders.transition("a", "pay", durability="durable").version == 2
    assert world.orders.transition("b", "ship", durability="durable").version == 3
    assert report.lost_at_least == 0
    world.verify()


def test_garbage_in_one_partition_of_a_recovery(redis_url: str, sqlite_url: str, namespace: str) -> None:
    """As above, in the last of three partitions, when the others serve already: all begin again, and none loses anything."""
    with worlds.World(redis_url, sqlite_url, namespace, partition_count=3) as world:
        ids = [world.id(partition) for partition in range(3)]
        for id in ids:
            world.start(id)
        world.disown()

        def garbage() -> None:
            world.client.xadd(world.keyspace.log(2), {"e": "garbage"}, id="2-*")

        with worlds.before_call(world.cache.hot, "ready", garbage, call=3):
            report = world.cache.recover()
        assert report.epoch == 3
        for id in ids:
            assert world.orders.transition(id, "pay", durability="durable").version == 2
        world.verify()


@pytest.mark.parametrize("point", ["recovery.taken", "recovery.fenced", "recovery.mended", "recovery.reported"])
def test_a_recovery_that_garbage_made_begin_again_dies(world: worlds.World, point: str) -> None:
    """As above, and the recovery fails once more on its second way, at any step: whoever comes next mends it."""
    world.start("a")
    world.disown()

    def garbage() -> None:
        world.client.xadd(world.keyspace.log(0), {"e": "garbage"}, id="2-*")
        failpoints.arm(f"{point}=error")

    try:
        with (
            worlds.before_call(world.cache.hot, "ready", garbage),
            pytest.raises(errors.UnavailableError, match="failpoint"),
        ):
            world.cache.recover()
    finally:
        failpoints.arm(None)
    assert world.orders.transition("a", "pay", durability="durable").version == 2
    world.verify()


@pytest.mark.parametrize("step", ["probe", "ready"])
def test_garbage_hides_no_lost_tail(world: worlds.World, step: str) -> None:
    """Redis comes back without its tail, and a stranger writes under the epoch of the recovery: the log has something behind
    SQL's watermark again, and what stands there follows nothing. Taken for an SQL that is behind, the old hash would stay, and
    version 3 would be given twice (P3)."""
    world.start("a")
    world.start("b")
    saved = world.redis_copy()
    world.orders.transition("a", "note")
    world.orders.transition("a", "pay")
    world.flush()
    world.redis_back(saved)

    def garbage() -> None:
        world.client.xadd(world.keyspace.log(0), {"e": "garbage"}, id="2-*")

    with worlds.before_call(world.cache.hot, step, garbage):
        world.cache.recover()
    assert world.orders.transition("a", "ship").version == 4
    world.flush_through()
    assert world.versions("a") == [1, 2, 3, 4]
    assert world.orders.transition("a", "deliver", durability="durable").version == 5
    assert foreign_letters(world) == [entry.EntryId(2, 0)]
    world.verify()


def test_garbage_at_the_watermark_hides_no_lost_tail(world: worlds.World) -> None:
    """As above, but the stranger comes before anybody has noticed: its record gets the very id that is SQL's watermark."""
    world.start("a")
    world.start("b")
    saved = world.redis_copy()
    world.orders.transition("a", "pay", durability="durable")
    world.redis_back(saved)
    world.client.xadd(world.keyspace.log(0), {"e": "garbage"}, id="1-*")
    assert world.orders.transition("a", "ship").version == 3
    world.flush_through()
    assert world.versions("a") == [1, 2, 3]
    world.verify()


@pytest.mark.parametrize("discarded", [False, True], ids=["kept", "discarded"])
def test_garbage_at_the_watermark_is_no_alarm(world: worlds.World, discarded: bool) -> None:
    """A stranger's record is the newest that was flushed; a letter keeps it, or did until it was discarded. A restart finds
    all as it must be, and what was not flushed yet is no stranger's."""
    world.start("a")
    world.client.xadd(world.keyspace.log(0), {"e": "garbage"}, id="1-*")
    world.flush()
    if discarded:
        letters.discard(world.cache, *world.durable.parked_instances()[0])
    world.orders.transition("a", "pay")
    world.disown()
    report = world.cache.recover().partitions[0]
    assert (report.kind, report.parked) == (recovery.INTACT, 0)
    assert world.orders.transition("a", "ship", durability="durable").version == 3
    world.verify()


def test_a_log_that_is_never_left_alone(world: worlds.World) -> None:
    """A stranger writes before every single mark: the recovery gives up, and its error says who is in its way."""
    world.start("a")
    world.disown()
    ready = world.cache.hot.ready

    def garbage(*arguments: Any, **named: Any) -> str:
        world.client.xadd(world.keyspace.log(0), {"e": "garbage"}, id=f"{world.meta()['epoch']}-*")
        return ready(*arguments, **named)

    with (
        mock.patch.object(world.cache.hot, "ready", garbage),
        pytest.raises(errors.UnavailableError, match="somebody else writes to this stream"),
    ):
        world.cache.recover()
    assert world.orders.transition("a", "pay", timeout=5.0, durability="durable").version == 2
    world.verify()


def test_garbage_under_an_id_of_its_own(world: worlds.World) -> None:
    """A stranger uses XADD as everybody does, with ``*``: the record's id is a time, far above every epoch, so that the server
    refuses every entry and every mark from then on. Recovery takes an epoch above it; a call that met it is repeated."""
    world.start("a")
    world.start("b", ["pay"])
    world.flush()
    world.orders.transition("a", "note")
    strangers = [f"{1_700_000_000_000 + number}-0" for number in range(3)]
    for id in strangers:
        world.client.xadd(world.keyspace.log(0), {"e": "garbage"}, id=id)
    with worlds.before_call(world.cache.driver, "_pause", world.cache.flusher.step):
        assert world.orders.transition("a", "pay").version == 3
    assert world.orders.transition("b", "ship", durability="durable").version == 3
    assert foreign_letters(world) == [entry.EntryId.parse(id) for id in strangers]
    assert len(recoveries.recoveries(world.durable)) <= 4
    assert newest_report(world).lost_at_least == 0
    world.verify()


def test_garbage_under_the_highest_id(world: worlds.World) -> None:
    """A record above which no epoch can be: no recovery mends that, and the error says what does."""
    world.start("a")
    world.flush()
    world.client.xadd(world.keyspace.log(0), {"e": "garbage"}, id=f"{2**64 - 1}-1")
    with pytest.raises(errors.IntegrityError, match="delete that stream"):
        world.cache.recover()
    world.client.delete(world.keyspace.log(0))
    world.cache.recover()
    assert world.orders.transition("a", "pay", durability="durable").version == 2
    world.verify()


@pytest.mark.parametrize("point", ["recovery.fenced", "recovery.mended", "recovery.reported", "recovery.ready"])
def test_a_recovery_that_failed_is_not_waited_for(world: worlds.World, point: str) -> None:
    """A recoverer lives, but its recovery fails half-way (the server goes away once more). Its row in SQL says "under way"
    with a fresh sign of life, so everybody, itself too, waited ten seconds for a recovery at which nobody worked."""
    world.start("a")
    world.wipe()
    failpoints.arm(f"{point}=error")
    try:
        with pytest.raises(errors.UnavailableError, match="failpoint"):
            world.cache.recover()
    finally:
        failpoints.arm(None)
    assert world.orders.start("b", timeout=5.0).version == 1


def test_the_tail_is_seen_when_it_is_read(world: worlds.World) -> None:
    """A flusher reads the log and is stopped (SIGSTOP, a long pause); meanwhile more is acknowledged; then it commits. The
    tail that it notes is the one that it read, so the time must be that of the reading: with the time of the commit, what
    was acknowledged in between and then lost is neither counted nor inside the time in which a loss is possible (P9)."""
    world.start("a")
    saved = world.redis_copy()
    between: list[model.Receipt] = []

    def meanwhile() -> None:
        between.append(world.orders.transition("a", "note"))
        waiting.wait_until(lambda: time.time() * 1000 > between[0].at_ms + 5, "the clock moves on")

    with worlds.after_call(world.cache.hot, "read", meanwhile):
        world.cache.flusher.step()
    world.redis_back(saved)
    report = world.cache.recover().partitions[0]
    assert report.lost_at_least == 0
    assert report.loss_possible
    assert report.tail_seen_ms <= between[0].at_ms


# --- what a caller is told ---------------------------------------------------------------------------------------------


def answered(flow: flows.Flow, *answers: object) -> BaseException:
    """Run a flow with these answers (an exception is thrown into it); returns the error that it ends with."""
    try:
        next(flow)
        for answer in answers:
            if isinstance(answer, Exception):
                flow.throw(answer)
            else:
                flow.send(answer)
    except errors.StateCacheError as error:
        return error
    raise AssertionError("the flow has not ended")


LOST = items.Outcome("LOST", [], 0, errors.UnavailableError("no answer"))


@pytest.mark.parametrize(
    "answers",
    [
        (LOST, True, items.Outcome("EPOCH", [], 0), errors.RecoveringError("a recovery is under way")),
        (LOST, True, items.Outcome("NOSCRIPT", [], 0), errors.ConfigurationError("a foreign Redis")),
        (LOST, True, items.Outcome("OOM", [], 0, errors.BackpressureError("no memory")), False),
        (LOST, True, items.Outcome("MISS", ["1", "5-5"], 0), errors.RecoveringError("SQL is being restored")),
    ],
    ids=["recovering", "foreign", "no memory", "look-up"],
)
def test_what_may_have_been_applied_is_unknown(world: worlds.World, answers: tuple[object, ...]) -> None:
    """The reply of the first attempt was lost; the next one cannot even be judged. "Not applied" would be a guess: the
    contract is that only ``UnavailableError`` leaves it open."""
    request = world.orders.calls.door.transition(model.Move("a", "pay"))
    error = answered(flows.transition(request), *answers)
    assert isinstance(error, errors.UnavailableError)


def test_what_was_judged_is_known(world: worlds.World) -> None:
    """The reply of the first attempt was lost; the second was judged by the script: it is not there, and refused."""
    request = world.orders.calls.door.transition(model.Move("a", "pay"))
    error = answered(flows.transition(request), LOST, True, items.Outcome("STATE", ["shipped", "3"], 0))
    assert isinstance(error, errors.InvalidTransitionError)
