"""What readings of the code found, each interleaving forced: repetitions behind guards, letters that were discarded, recoveries
that met what they had not expected."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from unittest import mock

import msgspec
import pytest
import sqlalchemy as sa

from statecache import Move, State, StateMachine
from statecache.core import codec, entry, errors, failpoints, mending, model
from statecache.durable import recoveries, schema
from statecache.engine import admission, letters, recovery, retention, timeouts, verify
from tests.integration.test_holes import _spoil
from tests.support import refusing, worlds
from tests.support.interruptions import interrupted_at
from tests.support.worlds import after_call, before_call

ONLY_SYNC = pytest.mark.parametrize("client", ["sync"])


def always(seen: model.Snapshot) -> bool:
    return True


class Tick(StateMachine):
    """An instance that stays where it is, with a guard or without."""

    open = State(initial=True)
    shut = State(final=True)
    note = open.to(open)
    bump = open.to(open, guard=always)
    close = open.to(shut)


class Slow(StateMachine):
    """An instance that is closed when nothing happens."""

    waiting = State(initial=True, timeout=timedelta(milliseconds=50), on_timeout="expire")
    expired = State(final=True)
    note = waiting.to(waiting)
    expire = waiting.to(expired)


@pytest.fixture
def world(redis_url: str, sqlite_url: str, namespace: str, client: str) -> Iterator[worlds.World]:
    with worlds.World(redis_url, sqlite_url, namespace, client=client, log_keep_seconds=3600.0) as made:
        yield made


def refused(world: worlds.World, id: str, transition_id: str | None = None) -> model.Receipt:
    """A transition that SQL refuses: its letter parks the instance. SQL takes everything again afterwards."""
    refusing.refuse(world.durable)
    receipt = world.orders.transition(id, "note", {"x": 1}, reason=refusing.REASON, transition_id=transition_id)
    world.flush()
    refusing.accept(world.durable)
    assert world.durable.letters("order", id)
    return receipt


def _identity(world: worlds.World) -> str:
    return world.hot.admit(world.hot.stamp, load=False).identity


# --- repetitions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", ["note", "bump"])
@pytest.mark.parametrize("bulk", [False, True])
def test_repetition_of_a_guarded_call_is_applied_once(world: worlds.World, event: str, bulk: bool) -> None:
    """P4. A call with an id of its own, repeated after more moves than the ring remembers: history is asked, also where a guard
    has looked at the instance and the item names the version that it saw."""
    ticks = world.cache.machine(Tick)
    ticks.start("a", {"n": 0})
    first = ticks.transition("a", event, increment={"n": 1}, transition_id="evt_42")
    for _ in range(9):
        ticks.transition("a", "note")
    again: object
    if bulk:
        (again,) = ticks.transition_many([Move("a", event, increment={"n": 1}, transition_id="evt_42")])
    else:
        again = ticks.transition("a", event, increment={"n": 1}, transition_id="evt_42")
    assert isinstance(again, model.Receipt)
    assert (again.duplicate, again.version) == (True, first.version)
    assert ticks.get("a").data == {"n": 1}
    assert ticks.transition("a", event, increment={"n": 1}, transition_id="evt_43").version == 12


@ONLY_SYNC
def test_repetition_of_what_was_discarded_is_applied(world: worlds.World) -> None:
    """The log still holds an entry that an operator discarded. Its repetition is no duplicate: it was not applied."""
    world.start("bad", ["pay"])
    for _ in range(9):
        world.orders.transition("bad", "note")
    world.flush()
    lost = refused(world, "bad", "evt_42")
    letters.discard(world.cache, "order", "bad")
    again = world.orders.transition("bad", "note", {"x": 2}, transition_id="evt_42")
    assert (again.duplicate, again.version) == (False, lost.version)
    assert world.orders.get("bad").data["x"] == 2


@ONLY_SYNC
def test_history_after_a_discard_has_no_fork(world: worlds.World) -> None:
    """Two letters are discarded and two moves made anew; a flush comes between the looks of ``history``, which then reads the
    whole log."""
    world.start("bad", ["pay"])
    world.flush()
    refusing.refuse(world.durable)
    for number, reason in ((3, refusing.REASON), (4, None)):
        world.orders.transition("bad", "note", reason=reason, transition_id=f"gone{number}")
    world.flush()
    refusing.accept(world.durable)
    letters.discard(world.cache, "order", "bad")
    world.orders.transition("bad", "note", transition_id="new3")

    def another() -> None:
        world.orders.transition("bad", "note", transition_id="new4")

    with after_call(world.durable, "recorded", world.flush), before_call(world.hot, "own_field", another, call=2):
        rows = world.orders.history("bad")
    assert [(row.version, row.transition_id) for row in rows][2:] == [(3, "new3"), (4, "new4")]


@ONLY_SYNC
def test_repetition_of_what_one_row_stands_for(world: worlds.World) -> None:
    """SQL was restored, and one row stands for versions whose ids Redis still remembers. Whoever repeats one is not told to
    choose another id: it was applied."""
    mine = world.partition_of("a")
    world.start("a")
    world.flush()
    old = world.sql_copy()
    for number in range(5):
        world.orders.transition("a", "note", transition_id=f"t{number}")
    world.flush()
    world.client.xtrim(world.keyspace.log(mine), maxlen=1, approximate=False)
    world.orders.start(world.id(mine, "w"))
    world.flush()
    world.client.xtrim(world.keyspace.log(mine), maxlen=1, approximate=False)
    world.sql_back(old)
    world.disown()
    assert world.cache.recover().partitions[mine].kind == "SQL behind"
    for number in range(5):
        with pytest.raises(errors.IntegrityError, match=r"was applied before"):
            world.orders.transition("a", "note", transition_id=f"t{number}")
    assert world.orders.get("a").version == 6


@ONLY_SYNC
def test_repetition_of_what_was_archived(world: worlds.World) -> None:
    """Of an ended instance's history the last transition is left, and one row with the id of the one before it, which stands
    for all others. Repetitions of these two are duplicates."""
    world.orders.start("a")
    receipts = {
        event: world.orders.transition("a", event, transition_id=f"id-{event}") for event in ("pay", "ship", "deliver")
    }
    world.flush()
    later_ms = int(time.time() * 1000) + 1000
    assert any(list(retention.run(world.cache, timedelta(0), None, now_ms=later_ms)))
    for event in ("ship", "deliver"):
        again = world.orders.transition("a", event, transition_id=f"id-{event}")
        assert again.duplicate
        assert (again.version, again.event, again.state) == (receipts[event].version, event, receipts[event].state)


# --- parked hashes ---------------------------------------------------------------------------------------------------


@ONLY_SYNC
@pytest.mark.parametrize("act", [letters.discard, letters.retry])
def test_claimed_and_parked_instance_is_decided_about(world: worlds.World, act: Callable[..., int]) -> None:
    """A worker holds an instance when an operator decides about its letter. The parked hash goes, and the claim with it: calls
    went round and round until the claim's end, whatever their timeout."""
    world.start("bad", ["pay"])
    world.flush()
    claim = world.orders.claim("bad", ttl=600, worker="w1")
    refusing.refuse(world.durable)
    claim.transition("note", {"seen": "refused"}, reason=refusing.REASON)
    world.flush()
    refusing.accept(world.durable)
    act(world.cache, "order", "bad")
    world.flush()
    seen = world.orders.get("bad")
    assert not seen.parked
    assert ("seen" in seen.data) == (act is letters.retry)
    assert world.orders.transition("bad", "note", timeout=5.0).version == seen.version + 1


@ONLY_SYNC
def test_timeout_of_a_hash_that_a_dead_act_left_parked(world: worlds.World, monkeypatch: pytest.MonkeyPatch) -> None:
    """``discard`` dies between SQL's commit and the drop of the hash. The instance's timeout fires all the same."""
    slow = world.cache.machine(Slow)
    slow.start("a")
    world.flush()
    refusing.refuse(world.durable)
    slow.transition("a", "note", reason=refusing.REASON)
    world.flush()
    refusing.accept(world.durable)

    class DiedError(BaseException):
        pass

    def die() -> None:
        raise DiedError

    with pytest.raises(DiedError), before_call(letters, "_drop_hash", die):
        letters.discard(world.cache, "slow", "a")
    monkeypatch.setattr(timeouts, "RETRY_MS", 50)
    fired = 0
    for _ in range(40):
        time.sleep(0.05)
        fired += world.cache.timeouts.run()
        if fired:
            break
    assert fired == 1
    assert slow.get("a").state == "expired"


# --- recoveries ------------------------------------------------------------------------------------------------------


@ONLY_SYNC
def test_split_brain_that_fails_back_to_a_version_with_a_letter(world: worlds.World) -> None:
    """The primary takes version 3 and dies; a replica without it is promoted, its version 3 becomes a dead letter; then the old
    primary's data are back. Two entries with one version, both are kept, and the store serves again."""
    world.start("bad", ["pay"])
    world.flush()
    replica = world.redis_copy()
    world.orders.transition("bad", "note", {"b": 1}, transition_id="B")
    primary = world.redis_copy()
    world.redis_back(replica)
    world.cache.recover()
    refused(world, "bad", "A")
    world.redis_back(primary)
    report = world.cache.recover()
    assert report.partitions[world.partition_of("bad")].kind == "diverged"
    assert [letter.entry.transition_id for letter in world.durable.letters("order", "bad")] == ["A"]
    (kept,) = [id for machine, id in world.durable.parked_instances() if machine == entry.FOREIGN]
    (letter,) = world.durable.letters(entry.FOREIGN, kept)
    assert "B" in letter.entry.patch.split(entry.SEPARATOR)
    assert world.orders.start(world.id(1 - world.partition_of("bad")), timeout=5.0).version == 1


def kind_of(report: recovery.Report, world: worlds.World, id: str) -> str:
    return report.partitions[world.partition_of(id)].kind


def apart(world: worlds.World) -> list[str]:
    """The texts of what is kept under its entry id."""
    names = [id for machine, id in world.durable.parked_instances() if machine == entry.FOREIGN]
    return [letter.entry.patch for id in names for letter in world.durable.letters(entry.FOREIGN, id)]


def discarded(world: worlds.World, id: str, transition_id: str) -> None:
    """A transition that SQL refused and an operator discarded."""
    refused(world, id, transition_id)
    letters.discard(world.cache, "order", id)


@ONLY_SYNC
def test_repetition_of_what_was_discarded_is_kept_when_the_log_diverges(world: worlds.World) -> None:
    """A call is discarded and comes again under its id: accepted, not yet flushed. Then SQL and the log are found to hold
    different entries at the watermark. The second entry is not the discarded one: it is kept as a letter."""
    mine = world.partition_of("a")
    other = world.id(mine, "w")
    world.start(other)
    world.start("a")
    discarded(world, "a", "evt_42")
    world.orders.transition(other, "pay")
    world.flush()
    with world.durable.database.writer.begin() as connection:
        theirs = (schema.transitions.c.id == other, schema.transitions.c.version == 2)
        connection.execute(sa.update(schema.transitions).where(*theirs).values(transition_id="theirs"))
    again = world.orders.transition("a", "note", transition_id="evt_42")
    assert not again.duplicate
    world.disown()
    assert kind_of(world.cache.recover(), world, "a") == "diverged"
    (letter,) = world.durable.letters("order", "a")
    assert (str(letter.entry.entry_id), letter.entry.transition_id) == (again.entry_id, "evt_42")
    world.flush_through()
    with pytest.raises(errors.ParkedError):
        world.cache.wait_durable(again)


@pytest.mark.parametrize("first", ["discarded", "repeated"])
@ONLY_SYNC
def test_old_primary_whose_newest_entry_looks_known(world: worlds.World, first: str) -> None:
    """An old primary is back. SQL knows its newest entry's version and transition id, but of another entry: one that was
    discarded before, or the same call's repetition at the new primary. What stands before it is in SQL nowhere."""
    mine = world.partition_of("a")
    other = world.id(mine, "w")
    world.start(other)
    world.start("a")
    world.flush()
    if first == "discarded":
        discarded(world, "a", "evt_42")
        world.orders.get("a")
    true = world.redis_copy()
    lost = world.orders.transition(other, "pay")
    world.orders.transition("a", "note", {"x": "old"}, transition_id="evt_42")
    old = world.redis_copy()
    world.redis_back(true)
    world.cache.recover()
    if first == "discarded":
        world.orders.transition("a", "cancel")
    else:
        world.orders.transition("a", "note", {"x": "new"}, transition_id="evt_42")
    world.flush()
    world.redis_back(old)
    assert kind_of(world.cache.recover(), world, "a") == "diverged"
    (letter,) = world.durable.letters("order", other)
    assert letter.entry.transition_id == lost.transition_id
    with pytest.raises(errors.ParkedError):
        world.orders.transition(other, "ship")
    assert world.orders.get(other).version == 1
    assert world.orders.get("a").data.get("x") == (None if first == "discarded" else "new")
    world.verify()


def two_of_one_version(world: worlds.World, *, and_another: bool = False) -> worlds.Dump:
    """Version 2 of "a" is a dead letter; returns the old primary's data, which have another version 2, and behind it one of
    another instance if wanted."""
    other = world.id(world.partition_of("a"), "w")
    world.start("a")
    world.start(other)
    world.flush()
    replica = world.redis_copy()
    world.orders.transition("a", "pay", transition_id="M")
    if and_another:
        world.orders.transition(other, "pay")
    primary = world.redis_copy()
    world.redis_back(replica)
    world.cache.recover()
    refused(world, "a", "L")
    return primary


@pytest.mark.parametrize("step", ["recovery.reconciled", "recovery.mended", "recovery.reported"])
@ONLY_SYNC
def test_recovery_that_kept_an_entry_apart_dies(world: worlds.World, step: str) -> None:
    """Killed behind its SQL transaction: the next one knows the entry again, and does not write it a second time."""
    world.redis_back(two_of_one_version(world))

    class Died(BaseException):
        pass

    def hit(name: str) -> None:
        if name == step:
            raise Died

    with mock.patch.object(failpoints, "hit", hit), pytest.raises(Died):
        world.cache.recover()
    world.cache.recover()
    assert kind_of(world.cache.recover(), world, "a") == "intact"
    assert len(apart(world)) == 1
    assert world.orders.transition(world.id(world.partition_of("a"), "w"), "pay").version == 2
    world.flush_through()
    world.verify()


@pytest.mark.parametrize("decided", [False, True], ids=["open", "discarded"])
@pytest.mark.parametrize("newest", [False, True], ids=["something behind it", "the newest"])
@ONLY_SYNC
def test_log_with_an_entry_kept_apart_comes_back(world: worlds.World, decided: bool, newest: bool) -> None:
    """The same old data come back again and again, also when the letters were discarded: each time the store serves again,
    nothing is kept twice, and no hash of the old primary's stays."""
    other = world.id(world.partition_of("a"), "w")
    primary = two_of_one_version(world, and_another=not newest)
    for count in range(3):
        world.redis_back(primary)
        assert kind_of(world.cache.recover(), world, "a") == "diverged"
        assert len(apart(world)) == (0 if decided and count else 1)
        if decided and not count:
            for machine, id in world.durable.parked_instances():
                letters.discard(world.cache, machine, id)
        for id in ("a", other):
            kept = world.durable.checkpoint("order", id)
            assert kept is not None
            assert world.orders.get(id).version == kept.version
        assert world.orders.start(f"fresh{count}").version == 1
        world.flush_through()
        world.verify()


@ONLY_SYNC
def test_two_entries_with_one_id_are_discarded(world: worlds.World) -> None:
    """An old primary's log has another entry under the id of one that was discarded: it can be discarded too."""
    world.start("a")
    world.flush()
    replica = world.redis_copy()
    lost = world.orders.transition("a", "note", transition_id="M")
    primary = world.redis_copy()
    world.redis_back(replica, detour=True)
    world.client.hset(world.keyspace.meta(world.partition_of("a")), "identity", _identity(world))
    refused(world, "a", "L")
    (letter,) = world.durable.letters("order", "a")
    assert str(letter.entry.entry_id) == lost.entry_id
    letters.discard(world.cache, "order", "a")
    world.redis_back(primary)
    assert kind_of(world.cache.recover(), world, "a") == "diverged"
    assert letters.discard(world.cache, "order", "a") == 1
    world.redis_back(primary)
    assert kind_of(world.cache.recover(), world, "a") == "tail lost"
    assert world.orders.get("a").version == 1
    world.verify()


@ONLY_SYNC
def test_older_redis_that_ends_within_an_archived_history(world: worlds.World) -> None:
    """Redis comes back from a copy whose last entry retention has taken out of SQL: its tail is lost, nothing has diverged. But
    where an entry that SQL has not stands before it, something has."""
    other = world.id(world.partition_of("a"), "w")
    world.start(other)
    world.start("a", ["pay"])
    world.flush()
    saved = world.redis_copy()
    world.orders.transition(other, "pay", transition_id="lost")
    world.orders.transition("a", "note")
    strange = world.redis_copy()
    world.redis_back(saved)
    world.cache.recover()
    for event in ("note", "ship", "deliver"):
        world.orders.transition("a", event)
    world.flush()
    later_ms = int(time.time() * 1000) + 1000
    assert [step.instances for step in retention.run(world.cache, timedelta(0), None, now_ms=later_ms)] == [1]
    world.redis_back(saved)
    assert kind_of(world.cache.recover(), world, "a") == "tail lost"
    assert not world.durable.parked_instances()
    assert (world.orders.get("a").state, world.orders.get("a").version) == ("delivered", 5)
    world.redis_back(strange)
    assert kind_of(world.cache.recover(), world, "a") == "diverged"
    assert world.durable.parked_instances() == [("order", other)]
    world.flush_through()
    world.verify()


@ONLY_SYNC
def test_diverged_log_that_comes_back_before_the_next_flush(world: worlds.World) -> None:
    """*Diverged* leaves SQL's watermark where it is. Else it would lead to an entry of the old log, and Redis, back from the
    same data once more, would pass for *intact*: cold instances would be started again, others moved from an older version."""
    mine = world.partition_of("a")
    cold, moved = world.id(mine, "c"), world.id(mine, "m")
    world.start("a")
    world.start(moved)
    replica = world.redis_copy()
    world.orders.transition("a", "pay", transition_id="M")
    primary = world.redis_copy()
    world.redis_back(replica)
    world.cache.recover()
    world.orders.transition("a", "cancel")
    world.start(cold)
    world.orders.transition(moved, "pay")
    world.flush()
    before = world.watermark(mine)
    world.redis_back(primary)
    assert kind_of(world.cache.recover(), world, "a") == "diverged"
    assert world.watermark(mine) == before
    world.redis_back(primary)
    assert kind_of(world.cache.recover(), world, "a") == "tail lost"
    with pytest.raises(errors.AlreadyExistsError):
        world.orders.start(cold)
    assert world.orders.transition(moved, "ship").version == 3
    world.flush_through()
    world.verify()


@ONLY_SYNC
def test_sql_behind_a_hash_that_it_had_refused(world: worlds.World) -> None:
    """A parked instance's hash holds what SQL refused; SQL is restored to before its letter. The row that stands for what is
    lost has not that data: it waits for an operator, and everybody else goes on."""
    mine = world.partition_of("bad")
    world.start("bad", ["pay"])
    world.flush()
    old = world.sql_copy()
    refused(world, "bad")
    for id, _ in zip(world.ids(mine, "w"), range(3), strict=False):
        world.start(id)
    world.flush()
    world.client.xtrim(world.keyspace.log(mine), maxlen=1, approximate=False)
    world.sql_back(old)
    world.disown()
    with world.durable.database.writer.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TRIGGER stubborn BEFORE INSERT ON statecache_transitions WHEN NEW.patch LIKE '%\"x\":1%' "
            "BEGIN SELECT RAISE(ABORT, 'refused'); END"
        )
    report = world.cache.recover()
    assert report.partitions[mine].kind == "SQL behind"
    (letter,) = world.durable.letters("order", "bad")
    assert letter.entry.event == entry.EVENT_RECONCILED
    assert "x" not in letter.entry.patch
    assert world.orders.start(world.id(1 - mine), timeout=5.0).version == 1


@ONLY_SYNC
def test_recoverer_that_died_with_its_clock_ahead_is_superseded(world: worlds.World) -> None:
    """A sign of life from the future is none."""
    row = world.durable.identity()
    world.wipe()
    ahead_ms = int(time.time() * 1000) + 3_600_000
    recoveries.take(world.durable, (row.epoch, row.owner), row.epoch + 1, "dead", ahead_ms, "otherhost|1|1")
    assert world.orders.start("x", timeout=10.0).version == 1


@ONLY_SYNC
def test_deadline_behind_another_threads_admission(world: worlds.World) -> None:
    """One thread waits for a recovery that is under way, for as long as its own call may take. A call with a shorter timeout
    does not wait for that."""
    row = world.durable.identity()
    world.wipe()
    recoveries.take(
        world.durable, (row.epoch, row.owner), row.epoch + 1, "busy", int(time.time() * 1000), "otherhost|1|1"
    )
    held, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        go_on.wait(30)

    with before_call(world.cache.admission, "_ensure_alone", hold):
        patient = threading.Thread(target=world.cache.admission.ensure, args=("EPOCH", time.monotonic() + 60))
        patient.start()
        assert held.wait(10)
        with pytest.raises(errors.RecoveringError):
            world.orders.start("y", timeout=0.2)
        assert patient.is_alive()
        world.durable.database.alone(
            lambda connection: connection.exec_driver_sql("UPDATE statecache_recoveries SET heartbeat_ms = 0")
        )
        go_on.set()
        patient.join(60)
    assert not patient.is_alive()


def test_interrupted_admission_leaves_nothing_locked(tmp_path: Path) -> None:
    """A signal's handler raises between any two steps of an admission: the next call is admitted."""
    with worlds.EmulatedWorld(f"sqlite:///{tmp_path}/store.db") as lite:
        asked = lite.cache.admission
        for nth in itertools.count(1):
            met = interrupted_at(nth, admission.__file__, lambda: asked.ensure("IDENTITY", time.monotonic() + 30))
            asked.ensure("IDENTITY", time.monotonic() + 1)
            if not met:
                assert nth > 10
                return


def test_ring_before_more_entries_than_it_holds() -> None:
    """Nine entries lie behind the hole: none of the hot ring's eight tokens is of before it."""
    later = [
        entry.Entry(
            entry.EntryId(1, version), "order", "x", version, "note", "placed", "placed", 5, f"t{version}", "", "", "", "", "",
            "", 1,
        )
        for version in range(21, 30)
    ]  # fmt: skip
    ring = "".join(codec.token_of(f"t{version}") for version in range(22, 30))
    hot = mending.Hash("placed", 29, entry.EntryId(1, 29), 1, 1, 5, ring, {})
    instance = ("order", "x")
    mend = mending.sql_behind(
        0, {instance: later}, {instance: hot}, {}, entry.EntryId(1, 20), lambda machine, version: frozenset(), "r"
    )
    (line,) = mend.checkpoints
    *_, recent, _ = line.split("\x1f")
    assert recent == ""


# --- strangers' records, and what must go on beside them -----------------------------------------------------------------


def record(**parts: object) -> str:
    """An entry's packed text as a stranger may write it."""
    values: dict[str, object] = dict.fromkeys(entry.PARTS, "") | {
        "machine": "order", "id": "a", "version": 2, "event": "note", "from_state": "placed", "to_state": "placed",
        "at_ms": 1_700_000_000_000, "transition_id": "t1", "patch": '{"a":1}', "machine_version": 1,
    } | parts  # fmt: skip
    return entry.SEPARATOR.join(str(values[name]) for name in entry.PARTS)


def put(world: worlds.World, partition: int, text: str) -> None:
    """Add a record to a log, right behind its last one."""
    last = entry.EntryId.parse(world.log(partition)[-1])
    world.client.xadd(world.keyspace.log(partition), {"e": text}, id=f"{last.epoch}-{last.seq + 1}")


STRANGE = {
    "no JSON": record(version=4, patch='{"a":'),
    "a list": record(version=4, patch="[1]"),
    "our own name for strangers": record(machine=entry.FOREIGN, id="x"),
    "a long id": record(id="x" * 16_000),
    "a long machine": record(machine="x" * 16_000),
    "a NUL": record(id="a\0b"),
}


@pytest.mark.parametrize("strange", STRANGE.values(), ids=STRANGE)
@pytest.mark.parametrize("kind", ["SQL behind", "diverged"])
def test_recovery_past_a_strangers_record(
    redis_url: str, database_url: str, namespace: str, kind: str, strange: str
) -> None:
    """Each of them made the recovery fail, and that closed the whole store for ever."""
    with worlds.World(redis_url, database_url, namespace, partition_count=1) as world:
        world.start("a")
        world.start("b")
        world.flush()
        sql, hot = world.sql_copy(), world.redis_copy()
        if kind == "SQL behind":
            for _ in range(2):
                world.orders.transition("a", "note")
                world.orders.transition("b", "note")
            world.flush()
            put(world, 0, strange)
            world.sql_back(sql)
        else:  # an old primary comes back, which took another entry in the place of one that SQL has
            world.orders.transition("b", "note")
            world.flush()
            world.redis_back(hot)
            put(world, 0, record(id="b", transition_id="another"))
            put(world, 0, strange)
        assert kind in world.cache.recover().kinds
        world.start("c")
        world.flush_through()
        assert world.orders.get("c").version == 1
        assert world.orders.get("b").state == "placed"


@ONLY_SYNC
def test_history_of_what_is_no_json_says_so(world: worlds.World) -> None:
    """History and ``verify`` name the entry; ``verify`` goes on with the others."""
    id = world.id()
    world.start(id)
    world.flush()
    _spoil(world, id)
    for _ in range(2):
        with pytest.raises(errors.IntegrityError, match="holds data that cannot be read"):
            world.orders.history(id)
        findings = verify.verify(world.cache).findings
        assert [(one.kind, one.address) for one in findings] == [("log", f"order:{id}")]
        world.flush()
    assert letters.discard(world.cache, "order", id) == 1
    world.verify()


@ONLY_SYNC
def test_recovery_that_failed_for_a_moment_is_asked_for_again(world: worlds.World) -> None:
    """A hole in the log, and SQL is away when the flusher asks for a recovery."""
    id = world.id()
    world.start(id)
    world.flush()
    first = world.orders.transition(id, "note")
    world.orders.transition(id, "note")
    world.client.xdel(world.keyspace.log(0), first.entry_id)
    flusher = world.flusher()

    def away(*arguments: object, **named: object) -> None:
        raise errors.UnavailableError("for a moment")

    with mock.patch.object(recoveries, "take", away), pytest.raises(errors.UnavailableError):
        flusher.step()
    assert flusher.step().more
    while flusher.step().more:
        pass
    assert world.durable.identity().epoch == 2
    assert world.versions(id)[-1] == 3


@ONLY_SYNC
def test_clocks_that_differ_do_not_end_a_recovery(world: worlds.World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recovery on a host whose clock is a minute behind, or ahead, is alive as long as its signs come."""
    monkeypatch.setattr(admission, "HEARTBEAT_STALE_MS", 1000)
    for skew_ms in (-60_000, 60_000):
        row = world.durable.identity()
        owner = f"other{skew_ms}"
        recoveries.take(world.durable, (row.epoch, row.owner), row.epoch + 1, owner, 1)
        beats = itertools.count(int(time.time() * 1000) + skew_ms)
        until = time.monotonic() + 2.0
        while time.monotonic() < until:
            recoveries.heartbeat(world.durable, row.epoch + 1, owner, next(beats))
            with pytest.raises(errors.RecoveringError, match="under way"):
                world.cache.admission.ensure("EPOCH", time.monotonic())
            time.sleep(0.02)
        assert world.durable.identity().owner == owner
        while world.durable.identity().owner == owner:  # it stands still now
            with contextlib.suppress(errors.RecoveringError):
                world.cache.admission.ensure("EPOCH", time.monotonic() + 0.1)
        world.orders.start(f"n{skew_ms}")


@pytest.mark.parametrize("act", [letters.discard, letters.retry])
@ONLY_SYNC
def test_parked_hash_goes_though_the_scripts_are_gone(world: worlds.World, act: Callable[..., int]) -> None:
    """The server forgets its scripts between the SQL commit and the drop of the hash."""
    id = world.id()
    world.start(id)
    world.flush()
    refused(world, id)
    with before_call(world.cache.hot, "evict", lambda: world.client.script_flush("SYNC")):
        act(world.cache, "order", id)
    seen = world.orders.get(id)
    assert (seen.source, seen.parked, seen.version) == ("durable", False, 1 if act is letters.discard else 2)
    world.verify()


@ONLY_SYNC
def test_hash_that_a_dead_discard_left_is_a_finding(world: worlds.World) -> None:
    """It holds what was discarded, and so does the kept log; SQL does not."""
    id = world.id()
    world.start(id)
    world.flush()
    refused(world, id)
    with mock.patch.object(letters, "_drop_hash"):
        letters.discard(world.cache, "order", id)
    assert [one.kind for one in verify.verify(world.cache).findings] == ["hot"]
    with pytest.raises(errors.NotFoundError):
        letters.discard(world.cache, "order", id)
    world.verify()


@ONLY_SYNC
def test_report_of_a_recovery_is_bounded(world: worlds.World) -> None:
    world.orders.start_many(itertools.islice(world.ids(), 300))
    world.flush()
    saved = world.sql_copy()
    world.orders.transition_many([Move(id, "note") for id in itertools.islice(world.ids(), 300)])
    world.flush()
    world.orders.transition_many([Move(id, "note") for id in itertools.islice(world.ids(), 300)])
    world.client.xtrim(world.keyspace.log(0), minid=str(world.watermark(0)))
    world.sql_back(saved)
    (part, *_) = [one for one in world.cache.recover().partitions if one.partition == 0]
    assert part.reconciled > 250
    assert len(part.findings) == 201
    assert part.findings[-1] == f"and {part.reconciled - 200} more instances"


@ONLY_SYNC
def test_retention_leaves_a_damaged_history_out(world: worlds.World, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(4):
        world.start(f"r{number}", ["pay", "note", "ship", "deliver"])
    world.flush()
    with world.durable.database.writer.begin() as connection:
        for id, version in (("r0", 2), ("r1", 5)):
            gone = (schema.transitions.c.id == id, schema.transitions.c.version == version)
            connection.execute(sa.delete(schema.transitions).where(*gone))
    later_ms = int(time.time() * 1000) + 1000
    (step,) = retention.run(world.cache, timedelta(0), None, now_ms=later_ms)
    assert (step.instances, set(step.damaged)) == (2, {"order:r0", "order:r1"})
    assert "order:r0" in caplog.text
    assert [world.versions(f"r{number}") for number in range(4)] == [[1, 3, 4, 5], [1, 2, 3, 4], [4, 5], [4, 5]]


@ONLY_SYNC
def test_retention_leaves_a_checkpoint_behind_its_history_out(world: worlds.World) -> None:
    """It is damaged at every look, and not one that moves: the others' history leaves all the same."""
    for number in range(3):
        world.start(f"r{number}", ["pay", "ship", "deliver"])
    world.flush()
    column = schema.transitions.c
    with world.durable.database.writer.begin() as connection:
        asked = sa.select(schema.transitions).where(column.id == "r1", column.version == 4)
        row = dict(connection.execute(asked).mappings().one())
        connection.execute(sa.insert(schema.transitions), [{**row, "version": 5, "transition_id": "too much"}])
    later_ms = int(time.time() * 1000) + 1000
    (step,) = retention.run(world.cache, timedelta(0), None, now_ms=later_ms)
    assert (step.instances, step.damaged) == (2, ("order:r1",))
    assert [world.versions(f"r{number}") for number in range(3)] == [[3, 4], [1, 2, 3, 4, 5], [3, 4]]


@ONLY_SYNC
def test_retention_begins_a_chunk_anew_where_an_instance_moves_between_its_looks(world: worlds.World) -> None:
    """Its checkpoint, then a flush, then its history: it has moved, and is not damaged."""
    world.start("r0", ["pay", "ship", "deliver"])
    world.flush()
    now = world.durable.checkpoints([("order", "r0")])
    before = {address: msgspec.structs.replace(kept, version=3) for address, kept in now.items()}
    later_ms = int(time.time() * 1000) + 1000
    with mock.patch.object(world.durable, "checkpoints", side_effect=[before, now]):
        (step,) = retention.run(world.cache, timedelta(0), None, now_ms=later_ms)
    assert (step.instances, step.damaged) == (1, ())
