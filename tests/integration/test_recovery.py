"""Recovery: every class of damage on real servers, its report, its dry run, and what disturbs it half-way."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import msgspec
import pytest
import sqlalchemy as sa

from statecache.core import errors, model
from statecache.durable import recoveries, schema
from statecache.durable.faults import CommitUnknown
from statecache.durable.store import DurableStore
from statecache.engine import admission, letters, lines, processes, recovery, verify
from tests.acceptance import command
from tests.support import refusing
from tests.support.worlds import Order, World, after_call, before_call, forged, together

IDS = [f"r{number}" for number in range(8)]


@pytest.fixture
def world(redis_url: str, database_url: str, namespace: str) -> Iterator[World]:
    with World(redis_url, database_url, namespace) as found:
        yield found


@pytest.fixture
def lite(redis_url: str, sqlite_url: str, namespace: str) -> Iterator[World]:
    with World(redis_url, sqlite_url, namespace) as found:
        yield found


class Damage(NamedTuple):
    """What a fault did: the classes that recovery must find, the transitions known to be lost, and the version that each
    instance must have afterwards. ``parked`` instances accept nothing."""

    kinds: dict[str, int]
    versions: dict[str, int]
    lost: int = 0
    parked: tuple[str, ...] = ()


def _base(world: World) -> None:
    """Eight orders, four in each partition or so, all paid and flushed."""
    world.orders.start_many([(id, {"n": 0, "id": id}) for id in IDS])
    for id in IDS:
        world.orders.transition(id, "pay", increment={"n": 1})
    world.flush()


def _intact(world: World) -> Damage:
    """The server restarted with everything, some of it not flushed."""
    _base(world)
    world.orders.transition("r0", "ship")
    world.orders.start("fresh")
    world.client.script_flush("SYNC")
    world.disown()
    return Damage({"intact": 2}, {**dict.fromkeys(IDS, 2), "r0": 3, "fresh": 1})


def _wiped(world: World) -> Damage:
    """Everything is gone from Redis: what was flushed, and a tail of which the flusher had seen a part."""
    _base(world)
    for id in IDS:
        world.orders.transition(id, "note")
    flusher = world.flusher(batch_entries=2)
    flusher.step()
    rows = world.durable.partitions()
    lost = sum(row.tail.seq - row.watermark.seq for row in rows if row.tail > row.watermark)
    assert lost
    versions = {id: world.durable.checkpoint("order", id).version for id in IDS}  # type: ignore[union-attr]
    world.orders.transition("r0", "ship")
    world.wipe()
    return Damage({"wiped": 2}, versions, lost)


def _tail_lost(world: World) -> Damage:
    """Redis came back from older data: transitions and starts that were flushed since are in SQL only."""
    _base(world)
    saved = world.redis_copy()
    for id in IDS[:4]:
        world.orders.transition(id, "ship", data={"truck": 1})
    for partition in (0, 1):
        world.orders.start(world.id(partition, "new"))
    world.flush()
    world.redis_back(saved)
    fresh = {world.id(partition, "new"): 1 for partition in (0, 1)}
    return Damage({"tail lost": 2}, {**dict.fromkeys(IDS, 2), **dict.fromkeys(IDS[:4], 3), **fresh})


def _sql_behind(world: World) -> Damage:
    """SQL came back from an older copy; the log was trimmed since. Redis has the newer instances."""
    _base(world)
    saved = world.sql_copy()
    for id in IDS:
        world.orders.transition(id, "note", data={"a": id}, increment={"n": 1})
        world.orders.transition(id, "note", unset=["id"], data={"b": 1})
    for partition in (0, 1):
        world.orders.start(world.id(partition, "new"))
    world.flush()
    world.orders.transition("r0", "ship", data={"b": 2})
    fresh = {world.id(partition, "new"): 1 for partition in (0, 1)}
    world.sql_back(saved)
    return Damage({"SQL behind": 2}, {**dict.fromkeys(IDS, 4), "r0": 5, **fresh})


def _diverged(world: World) -> Damage:
    """A Redis without its tail was written to: SQL and the log have different transitions under the same id."""
    _base(world)
    saved = world.redis_copy()
    id = next(one for one in IDS if world.partition_of(one) == 0)
    world.orders.transition(id, "note", data={"line": "SQL"})
    world.flush()
    world.redis_back(saved, detour=True)
    for partition in (0, 1):  # within the identity interval nobody has noticed yet
        world.client.hset(world.keyspace.meta(partition), "identity", json.loads(json.dumps(_identity(world))))
    world.orders.transition(id, "note", data={"line": "log"})
    return Damage({"diverged": 1, "intact": 1}, {**dict.fromkeys(IDS, 2), id: 3}, parked=(id,))


def _identity(world: World) -> str:
    return world.hot.admit(world.hot.stamp, load=False).identity


DAMAGES: dict[str, Callable[[World], Damage]] = {
    "intact": _intact, "wiped": _wiped, "tail lost": _tail_lost, "SQL behind": _sql_behind, "diverged": _diverged,
}  # fmt: skip


def _check_afterwards(world: World, damage: Damage) -> None:
    """Every instance has its version, goes on from it, cannot be started again; hot, log and SQL agree."""
    for id, version in damage.versions.items():
        with pytest.raises((errors.AlreadyExistsError, errors.ParkedError)):
            world.orders.start(id)
        if id in damage.parked:
            with pytest.raises(errors.ParkedError):
                world.orders.transition(id, "note")
            assert letters.discard(world.cache, "order", id) == 1
        receipt = world.orders.transition(id, "note", data={"after": 1})
        assert receipt.version == version + 1, id
        rows = world.orders.history(id)
        assert rows[-1].version == version + 1
    world.flush()
    world.verify()
    for id in damage.versions:
        assert world.orders.at(id, version=damage.versions[id] + 1) == world.orders.get(id)


# --- the classes ----------------------------------------------------------------------------------------------------------


def test_new_store_is_opened_without_a_loss(world: World) -> None:
    """``cold`` is 0: nothing of the store is cold, so a start needs no look at SQL."""
    (row,) = recoveries.recoveries(world.durable)
    report = msgspec.json.decode(row.report, type=recovery.Report)
    assert report.kinds == {"new": 2}
    assert not report.loss_possible
    assert report.lost_at_least == report.dropped == 0
    assert [world.meta(partition)["cold"] for partition in (0, 1)] == ["0", "0"]
    world.durable.lookup = lambda addresses: pytest.fail("SQL was asked")  # type: ignore[method-assign]
    assert world.orders.start("1").version == 1


@pytest.mark.parametrize("name", DAMAGES)
def test_report_is_that_of_the_dry_run_and_of_the_damage(world: World, name: str) -> None:
    """The dry run changes nothing in either store, and says what the real run then says, field by field. The report is in
    SQL and a copy of each partition's part in its ``meta``; the tails last seen are reset with it (H18)."""
    damage = DAMAGES[name](world)
    before = world.hot_dump(), world.sql_dump()
    planned = world.cache.recover(dry_run=True)
    assert (world.hot_dump(), world.sql_dump()) == before
    report = world.cache.recover()
    assert report.partitions == planned.partitions
    assert (report.epoch, planned.dry_run, report.dry_run) == (planned.epoch, True, False)
    assert report.kinds == damage.kinds
    assert report.lost_at_least == damage.lost
    assert report.loss_possible
    row = recoveries.recoveries(world.durable)[0]
    assert (row.epoch, row.owner, row.finished_ms is not None) == (report.epoch, report.owner, True)
    assert msgspec.json.decode(row.report, type=recovery.Report).partitions == report.partitions
    for part in report.partitions:
        kept = msgspec.json.decode(world.meta(part.partition)["report"], type=recovery.PartitionReport)
        assert kept == part
    assert [str(found.tail) for found in world.durable.partitions()] == [part.last for part in report.partitions]
    _check_afterwards(world, damage)


@pytest.mark.parametrize("calls", [1, 3])
def test_dry_run_beside_a_flusher(lite: World, calls: int) -> None:
    """Nothing holds the flushers back: between a dry run's look at SQL and that at the log all is flushed, and trimmed. That is
    no hole in the log, and nothing is lost; also where it happens at each of some looks."""
    _base(lite)
    flusher = lite.flusher()
    probe = lite.hot.probe
    probed = 0

    def after_a_flush(*arguments: Any) -> Any:
        nonlocal probed
        probed += 1
        if probed <= calls:
            for id in IDS:
                lite.orders.transition(id, "note")
            while flusher.step().more:
                pass
        return probe(*arguments)

    with mock.patch.object(lite.hot, "probe", after_a_flush):
        report = lite.cache.recover(dry_run=True)
    assert probed > calls
    assert report.kinds == {"intact": 2}
    assert (report.lost_at_least, report.loss_possible) == (0, False)
    assert [part.findings for part in report.partitions] == [(), ()]


@pytest.mark.parametrize("name", DAMAGES)
def test_second_recovery_finds_nothing_more(lite: World, name: str) -> None:
    """Right after a recovery, with nothing flushed, another one: intact, no further loss, no loss possible; the same
    instances afterwards."""
    damage = DAMAGES[name](lite)
    lite.cache.recover()
    again = lite.cache.recover()
    assert (again.lost_at_least, again.loss_possible) == (0, False)
    assert again.kinds == {"intact": 2}
    _check_afterwards(lite, damage)


@pytest.mark.parametrize("name", ["intact", "wiped", "tail lost"])
def test_recovered_twice_with_writes_between_and_no_flush(lite: World, name: str) -> None:
    """After the first recovery instances that came back from SQL are moved on, above SQL's watermark, which still stands
    before the epoch's mark; then another restart. What was written is no second line of history: it builds on SQL's."""
    damage = DAMAGES[name](lite)
    lite.cache.recover()
    for id in damage.versions:
        lite.orders.transition(id, "note", data={"between": 1})
    lite.client.script_flush("SYNC")
    lite.disown()
    report = lite.cache.recover()
    assert report.kinds == {"intact": 2}
    assert sum(part.parked for part in report.partitions) == 0
    _check_afterwards(lite, damage._replace(versions={id: version + 1 for id, version in damage.versions.items()}))


@pytest.mark.parametrize("name", DAMAGES)
def test_the_index_of_entries_is_completed_when_it_is_wanted(
    world: World, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL takes seconds for it where much was flushed a moment ago, and a wiped Redis is to serve at once: only what
    asks for instances above an entry waits for it, once. Signs of life are given meanwhile, or others would take over."""
    damage = DAMAGES[name](world)
    beats: list[float] = []
    beat = recoveries.heartbeat
    monkeypatch.setattr(recoveries, "heartbeat", lambda *told: (beats.append(time.monotonic()), beat(*told)))
    done: list[float] = []

    def slow(store: DurableStore) -> None:
        time.sleep(2.5)
        complete(store)
        done.append(time.monotonic())

    complete = recoveries.complete_index
    monkeypatch.setattr(recoveries, "complete_index", slow)
    world.cache.recover(dry_run=True)
    assert done == []
    world.cache.recover()
    assert len(done) == (1 if name == "tail lost" else 0)
    assert not done or min(beats) < done[0]
    _check_afterwards(world, damage)


def _vanish(world: World, *ids: str) -> None:
    for id in ids:
        world.client.delete(world.keyspace.instance(world.partition_of(id), "order", id))


def test_what_vanished_by_itself_is_there_again_after_a_recovery_that_was_asked_for(world: World) -> None:
    """Hashes are deleted while nothing is cold: no call finds the instances, and verify says so. One has an entry that SQL has
    not yet: it must not come back at the version before that."""
    world.start("1", ["pay"])
    world.start("2", ["pay"])
    world.start("3")
    world.flush()
    late = world.orders.transition("2", "note", {"late": True})
    _vanish(world, "1", "2")
    with pytest.raises(errors.NotFoundError):
        world.orders.get("1")
    found = verify.verify(world.cache).findings
    assert sorted((one.kind, one.address) for one in found) == [("hot", "order:1"), ("hot", "order:2")]
    assert world.cache.recover().kinds == {"intact": 2}
    with pytest.raises(errors.IntegrityError, match="SQL is older"):
        world.orders.transition("2", "note", timeout=0.3)
    world.flush()
    assert (world.orders.get("1").version, world.orders.get("2").version) == (2, late.version)
    assert world.orders.transition("2", "note").version == late.version + 1
    with pytest.raises(errors.AlreadyExistsError):
        world.orders.start("1")
    world.flush()
    world.verify()


def test_a_recovery_that_nobody_asked_for_leaves_the_partitions_as_they_are(lite: World) -> None:
    """A restart costs no start its look at SQL."""
    lite.start("1")
    lite.flush()
    lite.disown()
    lite.client.script_flush("SYNC")
    assert lite.orders.transition("1", "pay").version == 2
    assert {lite.meta(partition)["cold"] for partition in range(2)} == {"0"}


def test_false_alarm_costs_nothing_but_an_epoch(world: World) -> None:
    """The server is the one that was found true: intact, no loss possible, nothing dropped, hashes stay."""
    _base(world)
    report = world.cache.recover()
    assert report.kinds == {"intact": 2}
    assert not report.loss_possible
    assert (report.lost_at_least, report.dropped, report.epoch) == (0, 0, 2)
    assert all(world.is_hot(id) for id in IDS)


def test_durable_acknowledgements_survive_every_class(lite: World) -> None:
    """P7, one after the other: each fault takes what it can, and never what was acknowledged as durable."""
    receipt = lite.orders.start("keep", durability="durable")
    for _ in range(3):
        saved = lite.redis_copy()
        receipt = lite.orders.transition("keep", "note", durability="durable")
        lite.orders.transition("keep", "note")
        lite.redis_back(saved)
        receipt = lite.orders.transition("keep", "note", durability="durable")
        lite.orders.transition("keep", "note")
        lite.wipe()
        lite.cache.recover()
    assert [row.transition_id for row in lite.orders.history("keep")][-1] == receipt.transition_id
    lite.flush()
    lite.verify()


def test_start_in_the_lost_tail_is_not_started_again(world: World) -> None:
    """H3: the start itself was flushed and then lost in Redis, and no hash had to be dropped: the partition is cold all the
    same, so the next start asks SQL."""
    _base(world)
    saved = world.redis_copy()
    id = world.id(0, "late")
    world.orders.start(id)
    world.flush()
    world.redis_back(saved)
    with pytest.raises(errors.AlreadyExistsError):
        world.orders.start(id)
    assert world.meta(0)["cold"] == "1"
    assert world.versions(id) == [1]


def test_reconciled_row_stands_for_the_range_it_names(world: World) -> None:
    """P3 after SQL went back: history is versions 1..n with one ``@reconciled`` row for what only Redis had; its data is
    that of the hash before the log's entries, so that fold(history) is the hash."""
    _sql_behind(world)
    hot = world.orders.get("r0")
    world.cache.recover()
    world.flush()
    rows = world.orders.history("r0")
    assert [(row.covers_from or row.version, row.version, row.event) for row in rows] == [
        (1, 1, "@start"), (2, 2, "pay"), (3, 4, "@reconciled"), (5, 5, "ship"),
    ]  # fmt: skip
    assert rows[2].complete
    assert world.orders.get("r0") == hot
    assert world.orders.at("r0", version=5).data == hot.data
    assert world.orders.counts() == {"paid": 7, "shipped": 1, "placed": 2}


def test_cold_instance_behind_the_hole_is_parked_not_guessed(world: World) -> None:
    """H6d: evicted, moved on in the log after the trim, SQL restored from before: no hash tells its data. The row waits as a
    letter; retried, it becomes an incomplete row, and the instance goes on."""
    _base(world)
    saved = world.sql_copy()
    world.orders.transition("r0", "note", data={"gone": 1})
    world.orders.transition("r0", "note", data={"gone": 2})
    world.flush()
    receipt = world.orders.transition("r0", "ship")
    partition = world.partition_of("r0")
    world.client.delete(world.keyspace.instance(partition, "order", "r0"))
    world.client.hset(world.keyspace.meta(partition), mapping={"cold": "1", "evicted_to": receipt.entry_id})
    world.sql_back(saved)
    report = world.cache.recover()
    assert report.kinds.get("SQL behind") == 1
    assert sum(part.parked for part in report.partitions) == 1
    world.flush()
    with pytest.raises(errors.ParkedError):
        world.orders.transition("r0", "note")
    assert letters.retry(world.cache, "order", "r0") == 3
    rows = world.orders.history("r0")
    assert [(row.version, row.event, row.complete) for row in rows][-3:] == [
        (3, "@reconciled", False), (4, "note", True), (5, "ship", True),
    ]  # fmt: skip
    assert world.orders.transition("r0", "deliver").version == 6
    world.flush()
    world.verify()


@pytest.mark.parametrize("is_kept", [True, False])
def test_history_of_an_instance_parked_behind_the_hole(world: World, is_kept: bool) -> None:
    """H6d, before an operator has decided: the row that waits as a letter stands in history for what nobody knows, as it will
    when it is retried. Without it the entries behind the hole follow nothing (``IntegrityError``, where verify finds all in
    order), or, of an instance that SQL has never seen, there is none (``NotFoundError``)."""
    _base(world)
    id = "r0" if is_kept else "later"
    saved = world.sql_copy()
    if not is_kept:
        world.start(id)
    world.orders.transition(id, "note", data={"gone": 1})
    world.orders.transition(id, "note", data={"gone": 2})
    world.flush()
    receipt = world.orders.transition(id, "note", data={"v": 1})
    partition = world.partition_of(id)
    world.client.delete(world.keyspace.instance(partition, "order", id))
    world.client.hset(world.keyspace.meta(partition), mapping={"cold": "1", "evicted_to": receipt.entry_id})
    world.sql_back(saved)
    world.cache.recover()
    world.flush()
    rows = world.orders.history(id)
    kept = [(row.covers_from or row.version, row.version, row.event, row.complete) for row in rows]
    last = receipt.version
    assert kept[-3:] == [
        (3 if is_kept else 1, last - 2, "@reconciled", False), (last - 1, last - 1, "note", True), (last, last, "note", True),
    ]  # fmt: skip
    with pytest.raises(errors.ParkedError):
        world.orders.transition(id, "note")
    letters.retry(world.cache, "order", id)
    after = [(row.covers_from or row.version, row.version, row.event, row.complete) for row in world.orders.history(id)]
    assert after == kept
    world.verify()


def test_sql_behind_with_the_log_still_reaching_is_flushed_again(world: World) -> None:
    """SQL went back, and the log was kept (``log_keep_seconds``): the flusher simply flushes from SQL's watermark again;
    every row comes back as it was."""
    _base(world)
    saved = world.sql_copy()
    for id in IDS:
        world.orders.transition(id, "note", data={"x": id})
    flusher = world.flusher(log_keep_seconds=3600.0)
    while flusher.step().entries:
        pass
    whole = {id: world.durable.history("order", id) for id in IDS}
    world.sql_back(saved)
    assert world.cache.recover().kinds == {"intact": 2}
    world.flush()
    assert {id: world.durable.history("order", id) for id in IDS} == whole
    world.verify()


@pytest.mark.parametrize("auto", [True, False])
def test_hole_that_a_stranger_made_in_the_log_is_mended(
    redis_url: str, database_url: str, namespace: str, auto: bool
) -> None:
    """Fault 36: an operator deletes an unflushed entry. The flusher moves what is before the hole, stops the partition there
    and asks for a recovery (or, with ``auto_recover`` off, says so until an operator recovers), which lets one row stand for
    the deleted one, from the hash; the log behind it is flushed."""
    with World(redis_url, database_url, namespace, auto_recover=auto) as world:
        _base(world)
        id = next(one for one in IDS if world.partition_of(one) == 0)
        world.orders.transition(id, "note", data={"v": 3})
        gone = world.orders.transition(id, "note", data={"w": 4})
        world.orders.transition(id, "ship", data={"v": 5})
        world.client.xdel(world.keyspace.log(0), gone.entry_id)
        flusher = world.flusher()
        if auto:
            while (step := flusher.step()).more or step.entries:
                pass
            assert not step.stopped
        else:
            while flusher.step().entries:
                pass
            assert "does not follow" in flusher.step().stopped[0]
            with pytest.raises(errors.IntegrityError, match="does not follow"):
                world.flush()
            assert world.cache.recover().kinds == {"SQL behind": 1, "intact": 1}
        world.flush()
        rows = world.orders.history(id)
        assert [(row.version, row.event) for row in rows][2:] == [(3, "note"), (4, "@reconciled"), (5, "ship")]
        assert world.orders.get(id).data == world.orders.at(id, version=5).data
        world.verify()


def test_a_row_that_nobody_can_read_ends_no_recovery(world: World) -> None:
    """P10. The entry at the watermark is in SQL with a number that no decoder takes: it is known by its ids."""
    good, bad = world.id(0), world.id(0, "bad")
    world.start(good)
    world.forge(forged(bad, patch='{"a":1e999,"blob":"' + "x" * 200 + '"}'))
    world.flush()
    with pytest.raises(errors.IntegrityError, match="cannot be read"):
        world.versions(bad)
    world.disown()
    assert world.cache.recover().kinds == {recovery.INTACT: 2}
    world.orders.transition(good, "pay")
    world.flush()
    assert world.versions(good) == [1, 2]


def test_last_entries_that_a_stranger_deleted_are_mended(world: World) -> None:
    """The log's end is deleted, or trimmed away, while it is not flushed: the stream's last id tells. The hashes have what
    the log has not: one row stands for it, and nothing stops."""
    _base(world)
    id = next(one for one in IDS if world.partition_of(one) == 0)
    world.orders.transition(id, "note", data={"v": 3})
    world.client.xtrim(world.keyspace.log(0), maxlen=0)
    world.disown()
    world.cache.recover()
    assert world.orders.transition(id, "ship").version == 4
    world.flush()
    assert [row.version for row in world.orders.history(id)] == [1, 2, 3, 4]
    world.verify()


def test_repetitions_are_known_after_every_class(lite: World) -> None:
    """P4 over recoveries: the id of a flushed transition is answered DUP by the ring that came back."""
    _base(lite)
    first = lite.orders.transition("r0", "note", transition_id="t")
    lite.flush()
    lite.wipe()
    again = lite.orders.transition("r0", "note", transition_id="t")
    assert (again.version, again.entry_id, again.duplicate) == (first.version, first.entry_id, True)


def test_parked_instance_stays_parked_over_a_wipe(world: World) -> None:
    """H12c: hydrating an instance with open letters gives a parked hash: else it would fork behind its dead letter."""
    _diverged(world)
    world.cache.recover()
    id = next(one for one in IDS if world.partition_of(one) == 0)
    world.wipe()
    with pytest.raises(errors.ParkedError):
        world.orders.transition(id, "note")
    assert world.orders.get(id).parked


# --- disturbed half-way ---------------------------------------------------------------------------------------------------

STEPS = ["take", "fence", "probe", "drop", "reconcile", "finish", "ready"]
REACHED = {
    "intact": {"take", "fence", "probe", "finish", "ready"},
    "wiped": {"take", "fence", "probe", "drop", "finish", "ready"},
    "tail lost": {"take", "fence", "probe", "drop", "finish", "ready"},
    "SQL behind": {"take", "fence", "probe", "reconcile", "finish", "ready"},
    "diverged": {"take", "fence", "probe", "drop", "reconcile", "finish", "ready"},
}
EVERY_STEP = [
    (name, step, call)
    for name, steps in REACHED.items()
    for step in STEPS
    if step in steps
    for call in ((1, 2) if step in ("fence", "ready") else (1,))
]


def _step_of(world: World, step: str) -> tuple[Any, str]:
    """Where a recovery does a step."""
    if step in ("take", "finish", "reconcile"):
        return recovery.recoveries, step
    return world.hot, step


class Died(BaseException):
    """The recovering process is gone."""


def _die() -> None:
    raise Died


@pytest.mark.parametrize(("name", "step", "call"), EVERY_STEP)
@pytest.mark.parametrize("when", ["before", "after"])
def test_recoverer_dies_at_a_step(lite: World, name: str, step: str, call: int, when: str) -> None:
    """The process dies right before or after the step; another one recovers. Nothing is lost that was not lost before, every
    loss is reported once, and the result is that of an undisturbed recovery."""
    damage = DAMAGES[name](lite)
    target, method = _step_of(lite, step)
    wrap = before_call if when == "before" else after_call
    with pytest.raises(Died), wrap(target, method, _die, call=call):
        lite.cache.recover()
    lite.cache.recover()
    reports = [
        msgspec.json.decode(row.report, type=recovery.Report)
        for row in recoveries.recoveries(lite.durable)
        if row.report
    ]
    assert sum(report.lost_at_least for report in reports) == damage.lost
    assert any(report.loss_possible for report in reports)
    _check_afterwards(lite, damage)


@pytest.mark.parametrize(("name", "step", "call"), EVERY_STEP)
def test_recoverer_is_superseded_at_a_step(lite: World, name: str, step: str, call: int) -> None:
    """A recoverer stalls right before the step; another one takes over and finishes. The first one's step is refused, on
    whichever side it is, and it gives up (H4): the newer epoch stands."""
    other = lite.more()
    damage = DAMAGES[name](lite)
    target, method = _step_of(lite, step)

    def take_over() -> None:
        with pytest.MonkeyPatch.context() as patch:
            if target is not lite.hot:
                patch.setattr(target, method, original)
            other.recover()

    original = getattr(target, method)
    with (
        pytest.raises(errors.RecoveringError, match="another recovery took over"),
        before_call(target, method, take_over, call=call),
    ):
        lite.cache.recover()
    row = lite.durable.identity()
    assert {lite.meta(partition)["owner"] for partition in (0, 1)} == {row.owner}
    assert {lite.meta(partition)["status"] for partition in (0, 1)} == {"ready"}
    _check_afterwards(lite, damage)


@pytest.mark.parametrize(("name", "step", "call"), EVERY_STEP)
def test_call_in_the_middle_of_a_recovery(lite: World, name: str, step: str, call: int) -> None:
    """A client calls between two steps. It is told that a recovery is under way; or its transition was accepted before its
    partition was fenced, and then it is in the log that the recovery finds (P6, P8). Later it succeeds."""
    client = lite.more().machine(Order)
    damage = DAMAGES[name](lite)
    id = next(id for id in damage.versions if lite.partition_of(id) == 1)  # no stranger's line of history is there
    accepted: list[model.Receipt] = []

    def call_it() -> None:
        with contextlib.suppress(errors.RecoveringError):
            accepted.append(client.transition(id, "note", timeout=0.02))

    target, method = _step_of(lite, step)
    with before_call(target, method, call_it, call=call), contextlib.suppress(errors.RecoveringError):
        lite.cache.recover()  # nobody is at it before the take: then the client recovers by itself
    version = damage.versions[id] + len(accepted)
    assert client.transition(id, "note").version == version + 1
    _check_afterwards(lite, damage._replace(versions={**damage.versions, id: version + 1}))


@pytest.mark.parametrize("name", DAMAGES)
def test_two_recoverers_at_once(world: World, name: str) -> None:
    """Both begin at a barrier: one of them finishes, the other one finishes too or gives up; the result is one true Redis."""
    first, second = world.more(), world.more()
    damage = DAMAGES[name](world)
    results = together(first.recover, second.recover)
    done = [one for one in results if isinstance(one, recovery.Report)]
    assert done
    assert all(
        isinstance(one, (recovery.Report, errors.RecoveringError, errors.UnavailableError)) for one in results
    ), results
    _check_afterwards(world, damage)


@pytest.mark.parametrize("name", ["wiped", "tail lost", "intact"])
def test_first_callers_recover_by_themselves(world: World, name: str) -> None:
    """Eight clients meet the untrue Redis at once: all are served within their deadline, after one recovery or a few."""
    clients = [world.more().machine(Order) for _ in range(8)]
    damage = DAMAGES[name](world)
    ids = list(damage.versions)[:8]
    works = [
        lambda client=client, id=id: client.transition(id, "note", timeout=20.0)
        for client, id in zip(clients, ids, strict=True)
    ]
    results = together(*works)
    assert [getattr(one, "version", one) for one in results] == [damage.versions[id] + 1 for id in ids]
    _check_afterwards(
        world, damage._replace(versions={**damage.versions, **{id: damage.versions[id] + 1 for id in ids}})
    )


@pytest.mark.parametrize("committed", [True, False])
def test_answer_to_the_take_is_lost(lite: World, committed: bool) -> None:
    """The connection is lost during the COMMIT of step 1: epoch AND owner are read back; taken means go on."""
    damage = _wiped(lite)
    original = recoveries.take

    def take(*arguments: Any) -> None:
        if committed:
            original(*arguments)
        raise CommitUnknown("lost")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recovery.recoveries, "take", take)
        if committed:
            assert lite.cache.recover().kinds == {"wiped": 2}
        else:
            with pytest.raises(errors.UnavailableError):
                lite.cache.recover()
    if not committed:
        lite.cache.recover()
    _check_afterwards(lite, damage)


@pytest.mark.parametrize("step", ["fence", "probe", "drop", "ready"])
def test_redis_that_is_wiped_during_its_recovery_is_recovered_again(lite: World, step: str) -> None:
    """Fault 20: wiped before a step; the recovery starts over at step 1 with a new epoch, and ends."""
    damage = _tail_lost(lite)
    with before_call(lite.hot, step, lambda: lite.wipe(scripts_stay=True), call=2):
        lite.cache.recover()
    _check_afterwards(lite, damage)


def test_epoch_in_redis_above_that_of_sql_is_passed(lite: World) -> None:
    """H14: SQL was restored to before a recovery. The next epoch is above Redis' too."""
    _base(lite)
    saved = lite.sql_copy()
    lite.cache.recover()
    lite.cache.recover()
    lite.sql_back(saved)
    report = lite.cache.recover()
    assert report.epoch == 4
    assert report.loss_possible
    _check_afterwards(lite, Damage({}, dict.fromkeys(IDS, 2)))


def test_a_recoverer_that_was_killed_is_not_waited_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its heartbeat is fresh, for hours by the rule of this test; but its process is known to be gone: the next call
    takes over at once. One of another machine would be waited for."""
    monkeypatch.setattr(admission, "HEARTBEAT_STALE_MS", 86_400_000)
    id = world.id()  # in the partition that is fenced first
    world.start(id)
    world.flush()
    where = ["--redis-url", world.redis_url, "--database-url", world.database_url, "--namespace", world.namespace]
    killed = command.run("recover", *where, env={"STATECACHE_FAILPOINT": "recovery.fenced=die"})
    assert killed.code == -signal.SIGKILL
    assert world.orders.transition(id, "pay").version == 2
    mine, theirs = recoveries.recoveries(world.durable, limit=2)
    assert (theirs.finished_ms, theirs.process != mine.process, mine.process) == (None, True, processes.own())

    killed = command.run("recover", *where, env={"STATECACHE_FAILPOINT": "recovery.fenced=die"})
    assert killed.code == -signal.SIGKILL
    elsewhere = sa.update(schema.recoveries).values(process="17 another boot pid:[4026531836]")
    world.durable.database.alone(lambda connection: connection.execute(elsewhere))
    with pytest.raises(errors.RecoveringError, match="under way"):
        world.orders.transition(id, "ship", timeout=0.2)
    monkeypatch.setattr(admission, "HEARTBEAT_STALE_MS", -1)
    assert world.orders.transition(id, "ship").version == 3
    world.flush()
    world.verify()


def test_a_dead_letter_at_the_watermark_is_no_alarm(lite: World) -> None:
    """The newest entry that was flushed is one that SQL refused: a restart, and a lost tail behind it, are as they always
    are."""
    lite.start("1", ["pay"])
    lite.flush()
    refusing.refuse(lite.durable)
    lite.orders.transition("1", "note", reason=refusing.REASON)
    lite.flush()
    refusing.accept(lite.durable)
    saved = lite.redis_copy()
    lite.disown()
    assert lite.cache.recover().kinds == {"intact": 2}
    lite.start("2", ["pay"])
    lite.flush()
    lite.redis_back(saved)
    report = lite.cache.recover()
    assert set(report.kinds) <= {"intact", "tail lost"}
    assert sum(part.parked for part in report.partitions) == 0
    assert lite.orders.get("2").version == 2
    with pytest.raises(errors.ParkedError):
        lite.orders.transition("1", "note")
    lite.verify()


@pytest.mark.parametrize("count", [0, 3, 8])
def test_the_end_in_history_is_found_behind_many_letters(
    lite: World, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Letters stand at the log's end, fewer or more than are looked at in one page, over two epochs or in one."""
    monkeypatch.setattr(lines, "PAGE", 3)
    ids = [lite.id(0, f"h{number}-") for number in range(10)]
    for id in ids[:2]:
        lite.start(id)
    lite.flush()
    lite.disown()
    lite.cache.recover()
    refusing.refuse(lite.durable)
    lite.start(ids[2])
    for _ in range(count):
        lite.orders.transition(ids[0], "note", reason=refusing.REASON)
    saved = lite.redis_copy()
    lite.flush()
    refusing.accept(lite.durable)
    lite.redis_back(saved)
    assert set(lite.cache.recover().kinds) == {"intact"}
    assert lite.orders.get(ids[1]).version == 1
    lite.start(ids[3])
    lite.flush()
    lite.redis_back(saved)
    assert "tail lost" in lite.cache.recover().kinds
    assert lite.orders.get(ids[3]).version == 1
    lite.verify()
