"""Timeouts on real servers: the event is fired once, whatever is lost and whoever looks (P1, P3, P4); and what is stuck.

Time is not waited for: a test makes an instance older in Redis and SQL, as if it had entered its state long ago.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from statecache import State, StateMachine, metrics
from statecache.core import errors, spec
from statecache.durable import schema
from statecache.engine import timeouts, watching
from statecache.engine.handle import MachineHandle
from statecache.hot import deadlines
from tests.support import waiting, webs, worlds

HOUR = timedelta(hours=1)


class Parcel(StateMachine):
    """``stored`` fires an event, ``lost`` does not; ``look`` leads from ``stored`` to itself."""

    new = State(initial=True)
    stored = State(timeout=HOUR, on_timeout="give_back")
    lost = State(timeout=2 * HOUR)
    back = State(final=True)

    store = new.to(stored)
    look = stored.to(stored)
    lose = stored.to(lost)
    take = stored.to(new)
    give_back = stored.to(back)
    find = lost.to(stored)


def _is_allowed(ticket: object) -> bool:
    return True


class Ticket(StateMachine):
    """The event of its timeout leads from another state too, where it has a guard."""

    open = State(initial=True, timeout=HOUR, on_timeout="close")
    checked = State()
    closed = State(final=True)

    check = open.to(checked)
    close = open.to(closed) | checked.to(closed, guard=_is_allowed)


@pytest.fixture
def world(redis_url: str, database_url: str, namespace: str) -> Iterator[worlds.World]:
    with worlds.World(redis_url, database_url, namespace) as made:
        yield made


@pytest.fixture
def parcels(world: worlds.World) -> MachineHandle:
    return world.cache.machine(Parcel)


def stored(parcels: MachineHandle, *ids: str) -> None:
    for id in ids:
        parcels.start(id)
        parcels.transition(id, "store")


def due(world: worlds.World, id: str, machine: str = "parcel") -> int | None:
    """The deadline that Redis has of an instance (ms)."""
    partition = world.keyspace.partition_of(machine, id)
    score: Any = world.client.zscore(world.keyspace.due(partition), f"{machine}:{id}")
    return None if score is None else int(score)


def let_pass(world: worlds.World, id: str, span: timedelta = HOUR, machine: str = "parcel") -> None:
    """Let time pass for one instance: its last transition was so much earlier, in Redis and in SQL."""
    ms = int(span.total_seconds() * 1000) + 1
    partition = world.keyspace.partition_of(machine, id)
    key = world.keyspace.instance(partition, machine, id)
    own: Any = world.client.hget(key, "@")
    if own is not None:
        words = own.decode().split(" ")
        words[5] = str(int(words[5]) - ms)
        world.client.hset(key, "@", " ".join(words))
    if (deadline := due(world, id, machine)) is not None:
        world.client.zadd(world.keyspace.due(partition), {f"{machine}:{id}": deadline - ms})
    checkpoints = schema.checkpoints
    with world.durable.database.writer.begin() as connection:
        connection.execute(
            sa.update(checkpoints)
            .where(checkpoints.c.machine == machine, checkpoints.c.id == id)
            .values(updated_ms=checkpoints.c.updated_ms - ms)
        )


def fire(world: worlds.World) -> int:
    return timeouts.Timeouts(world.cache).run()


def events(parcels: MachineHandle, id: str) -> list[str]:
    return [row.event for row in parcels.history(id)]


# --- deadlines ------------------------------------------------------------------------------------------------------------


def test_entering_sets_and_leaving_clears(world: worlds.World, parcels: MachineHandle) -> None:
    """In the step that moves it: the deadline is the time of the transition and the state's timeout."""
    parcels.start("1")
    assert due(world, "1") is None
    entered = parcels.transition("1", "store")
    assert due(world, "1") == entered.at_ms + 3_600_000
    again = parcels.transition("1", "look")
    assert due(world, "1") == again.at_ms + 3_600_000, "a transition to the same state begins it anew"
    parcels.transition("1", "take")
    assert due(world, "1") is None
    parcels.transition("1", "store")
    parcels.transition("1", "lose")
    assert due(world, "1") is None, "without an event nothing is noted: SQL tells what is stuck"


def test_machines_without_timeouts_have_no_set(world: worlds.World) -> None:
    world.start("1", ["pay", "ship"])
    assert not any(b":due" in key for key in world.hot_dump())


def test_a_refused_move_changes_no_deadline(world: worlds.World, parcels: MachineHandle) -> None:
    stored(parcels, "1")
    before = due(world, "1")
    with pytest.raises(errors.StaleVersionError):
        parcels.transition("1", "take", expect_version=1)
    with pytest.raises(errors.InvalidTransitionError):
        parcels.transition("1", "find")
    assert due(world, "1") == before


def test_a_stranger_at_the_sets_key_stops_the_call_before_any_write(
    world: worlds.World, parcels: MachineHandle
) -> None:
    parcels.start("1")
    world.client.set(world.keyspace.due(world.keyspace.partition_of("parcel", "1")), "a stranger's")
    before = world.hot_dump()
    with pytest.raises(errors.IntegrityError, match=r"WRONGTYPE|holds"):
        parcels.transition("1", "store")
    assert world.hot_dump() == before


# --- firing ---------------------------------------------------------------------------------------------------------------


def test_what_is_due_is_fired_once(world: worlds.World, parcels: MachineHandle) -> None:
    stored(parcels, "1", "2", "with:colons")
    for id in ("1", "with:colons"):
        let_pass(world, id)
    assert fire(world) == 2
    assert fire(world) == 0
    assert [parcels.state(id) for id in ("1", "2", "with:colons")] == ["back", "stored", "back"]
    fired = parcels.history("1")[-1]
    assert (fired.event, fired.actor, fired.transition_id) == ("give_back", "statecache", "timeout:2")
    assert fired.reason == "timeout after 3600 s in stored"
    assert (due(world, "1"), due(world, "2") is not None) == (None, True)


def test_more_than_a_page(world: worlds.World, parcels: MachineHandle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeouts, "PAGE", 3)
    ids = [str(number) for number in range(20)]
    stored(parcels, *ids)
    for id in ids:
        let_pass(world, id)
    assert fire(world) == 20
    assert {parcels.state(id) for id in ids} == {"back"}


def test_two_that_look_at_once_fire_once(world: worlds.World, parcels: MachineHandle) -> None:
    """A reads what is due - B reads it, fires - A fires: A's is a duplicate by its id, or finds another version."""
    stored(parcels, "1", "2")
    for id in ("1", "2"):
        let_pass(world, id)
    counts: list[int] = []
    other = timeouts.Timeouts(world.more())
    with worlds.before_call(MachineHandle, "transition_many", lambda: counts.append(other.run())):
        counts.append(fire(world))
    assert counts == [2, 0]
    assert events(parcels, "1") == ["@start", "store", "give_back"]


def test_moved_on_between_look_and_fire(world: worlds.World, parcels: MachineHandle) -> None:
    """Due is read - the instance is moved to the same state anew - fire: refused by its version, the new deadline stands."""
    stored(parcels, "1")
    let_pass(world, "1")
    with worlds.before_call(MachineHandle, "transition_many", lambda: parcels.transition("1", "look")):
        assert fire(world) == 0
    assert events(parcels, "1") == ["@start", "store", "look"]
    deadline = due(world, "1")
    assert deadline is not None
    assert deadline > world.hot.time_ms()


def test_moved_on_between_judgement_and_reminder(world: worlds.World, parcels: MachineHandle) -> None:
    """A member that means nothing (its instance is not in a timed state) is about to be taken away - the instance enters one:
    the new deadline is another one, and stays."""
    parcels.start("1")
    partition = world.keyspace.partition_of("parcel", "1")
    world.client.zadd(world.keyspace.due(partition), {"parcel:1": 5})
    with worlds.before_call(deadlines, "remind", lambda: parcels.transition("1", "store")):
        assert fire(world) == 0
    assert due(world, "1") == parcels.get("1").updated_ms + 3_600_000
    parcels.transition("1", "take")
    world.client.zadd(world.keyspace.due(partition), {"parcel:1": 5})
    assert fire(world) == 0
    assert due(world, "1") is None


def test_a_member_that_is_too_early_is_put_right(world: worlds.World, parcels: MachineHandle) -> None:
    stored(parcels, "1")
    partition = world.keyspace.partition_of("parcel", "1")
    world.client.zadd(world.keyspace.due(partition), {"parcel:1": 5, "parcel:nobody": 5, "stranger:1": 5})
    assert fire(world) == 0
    assert due(world, "1") == parcels.get("1").updated_ms + 3_600_000
    assert world.client.zcard(world.keyspace.due(partition)) == 1


def test_a_cold_instance_is_brought_back_when_it_is_due(world: worlds.World, parcels: MachineHandle) -> None:
    stored(parcels, "1")
    world.flush()
    partition = world.keyspace.partition_of("parcel", "1")
    found = world.durable.lookup([("parcel", "1", partition)])[0]
    assert world.hot.evict([(partition, "parcel:1", 2, str(found.watermark), 0)]) == ["OK"]
    let_pass(world, "1")
    assert fire(world) == 1
    assert parcels.state("1") == "back"


def test_a_claimed_instance_waits_for_the_end_of_its_claim(world: worlds.World, parcels: MachineHandle) -> None:
    stored(parcels, "1")
    let_pass(world, "1")
    claim = parcels.claim("1", ttl=20)
    assert fire(world) == 0
    assert due(world, "1") == claim.expires_ms, "looked at again when the claim ends, not every second"
    claim.renew(3600)
    let_pass(world, "1")
    assert fire(world) == 0
    again_ms, now_ms = due(world, "1"), world.hot.time_ms()
    assert again_ms is not None
    assert now_ms < again_ms < now_ms + 120_000, "it may be released long before"
    claim.release()
    let_pass(world, "1")
    assert fire(world) == 1


def test_a_parked_instance_is_tried_again_later(world: worlds.World, parcels: MachineHandle) -> None:
    stored(parcels, "1")
    let_pass(world, "1")
    world.hot.park([(world.keyspace.partition_of("parcel", "1"), "parcel:1")])
    assert fire(world) == 0
    deadline = due(world, "1")
    assert deadline is not None
    assert deadline > world.hot.time_ms() + 50_000


def test_what_cannot_be_read_does_not_stand_before_the_others(
    world: worlds.World, parcels: MachineHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stranger's key where an instance should be, due first, in pages of one: it is put off, the other one is fired."""
    monkeypatch.setattr(timeouts, "PAGE", 1)
    id = next(id for id in map(str, range(2, 100)) if world.keyspace.partition_of("parcel", id) == 0)
    stored(parcels, id)
    let_pass(world, id)
    stranger = next(id for id in map(str, range(100, 200)) if world.keyspace.partition_of("parcel", id) == 0)
    world.client.hset(world.keyspace.instance(0, "parcel", stranger), "who", "a stranger")
    world.client.zadd(world.keyspace.due(0), {f"parcel:{stranger}": 5})
    assert fire(world) == 1
    assert parcels.state(id) == "back"
    assert due(world, stranger) not in (None, 5)


def test_a_reply_lost_in_firing(world: worlds.World, parcels: MachineHandle) -> None:
    """The event is applied - its process dies before it hears - the next one finds nothing left to do."""
    stored(parcels, "1")
    let_pass(world, "1")

    class DeadError(Exception):
        pass

    def die() -> None:
        raise DeadError

    with worlds.after_call(MachineHandle, "transition_many", die), pytest.raises(DeadError):
        fire(world)
    assert fire(world) == 0
    assert events(parcels, "1") == ["@start", "store", "give_back"]


# --- what Redis loses -------------------------------------------------------------------------------------------------------


def test_deadlines_come_back_after_a_wipe(world: worlds.World, parcels: MachineHandle) -> None:
    """Redis is gone with its deadlines: those that have passed by SQL are found at once after the recovery, those to come in
    their time; one that had been fired and flushed is not fired again."""
    stored(parcels, "passed", "to-come", "fired")
    let_pass(world, "fired")
    assert fire(world) == 1
    world.flush()
    for id in ("passed", "fired"):
        let_pass(world, id)
    world.wipe()
    assert fire(world) == 1
    assert [parcels.state(id) for id in ("passed", "to-come", "fired")] == ["back", "stored", "back"]
    world.flush_through()
    let_pass(world, "to-come")
    other = timeouts.Timeouts(world.cache)
    assert other.sweep() == 1
    assert other.run() == 1
    assert events(parcels, "to-come") == ["@start", "store", "give_back"]
    world.flush_through()


def test_a_lost_tail_takes_and_gives_back_deadlines(world: worlds.World, parcels: MachineHandle) -> None:
    """A copy of Redis is made - 1 leaves its state, 2 enters it; flushed - the copy comes back, with 1's deadline and without
    2's: by SQL 1 has none and 2 is due."""
    stored(parcels, "1")
    parcels.start("2")
    world.flush()
    saved = world.redis_copy()
    parcels.transition("1", "take")
    parcels.transition("2", "store")
    world.flush()
    for id in ("1", "2"):
        let_pass(world, id)
    world.redis_back(saved)
    partition = world.keyspace.partition_of("parcel", "1")
    world.client.zadd(world.keyspace.due(partition), {"parcel:1": 5})
    assert fire(world) == 1
    assert (parcels.state("1"), parcels.state("2")) == ("new", "back")
    assert due(world, "1") is None
    world.flush_through()


def test_a_recovery_makes_the_next_turn_sweep(world: worlds.World, parcels: MachineHandle) -> None:
    """Not only every half minute: a turn under another epoch than the last one sweeps."""
    working = timeouts.Timeouts(world.cache)
    assert working.run() == 0
    stored(parcels, "1")
    world.flush()
    let_pass(world, "1")
    world.client.delete(world.keyspace.due(world.keyspace.partition_of("parcel", "1")))
    assert working.run() == 0, "lost without a recovery: found by the sweep that is due in half a minute"
    world.cache.recover()
    assert working.run() == 1


# --- versions of a machine ------------------------------------------------------------------------------------------------


def _second(timeout: timedelta | None) -> type[StateMachine]:
    """Version 2, with another timeout of ``stored``, or none."""
    changed = {"timeout_seconds": timeout and timeout.total_seconds(), "on_timeout": timeout and "give_back"}
    states = tuple(
        state.model_copy(update=changed) if state.name == "stored" else state for state in Parcel.spec.states
    )
    return made_of(Parcel.spec, version=2, states=states)


def made_of(declared: spec.MachineSpec, **changed: Any) -> type[StateMachine]:
    fields = {name: getattr(declared, name) for name in spec.MachineSpec.model_fields}
    return StateMachine.from_spec(spec.MachineSpec(**{**fields, **changed}))


def test_a_newer_version_counts_for_what_it_moves(world: worlds.World, parcels: MachineHandle) -> None:
    """Version 2 allows two hours. What version 1 stored is due after one, fired under version 1; what version 2 has touched
    is due after two."""
    stored(parcels, "old", "touched")
    second = world.cache.machine(_second(2 * HOUR))
    second.transition("touched", "look")
    for id in ("old", "touched"):
        let_pass(world, id)
    assert fire(world) == 1
    assert (parcels.state("old"), parcels.state("touched")) == ("back", "stored")
    assert parcels.history("old")[-1].machine_version == 1
    let_pass(world, "touched")
    assert fire(world) == 1
    assert parcels.history("touched")[-1].machine_version == 2


def test_a_newer_version_without_the_timeout_leaves_a_member_that_does_nothing(
    world: worlds.World, parcels: MachineHandle
) -> None:
    stored(parcels, "1")
    world.cache.machine(_second(None)).transition("1", "look")
    assert due(world, "1") is not None
    let_pass(world, "1")
    assert fire(world) == 0
    assert due(world, "1") is None
    assert parcels.state("1") == "stored"


def _registered_by_a_newer_statecache(world: worlds.World, version: int) -> str:
    """A version's definition gets a word that nobody here knows; returns what it was."""
    (before,) = [row.spec for row in world.durable.machines() if (row.name, row.version) == ("parcel", version)]
    after = json.dumps({**json.loads(before), "unheard_of": True})
    assert spec.readable(after) is None
    _define(world, version, after)
    return before


def _define(world: worlds.World, version: int, text: str) -> None:
    column = schema.machines.c
    with world.durable.database.writer.begin() as connection:
        connection.execute(
            sa.update(schema.machines).where(column.name == "parcel", column.version == version).values(spec=text)
        )


def test_a_newer_version_that_cannot_be_read_stops_no_timeout_of_the_others(
    world: worlds.World, parcels: MachineHandle
) -> None:
    """A rolling upgrade: what version 1 stored is fired; what version 2 has touched stays in the index until it can be."""
    stored(parcels, "old", "touched")
    world.cache.machine(_second(HOUR)).transition("touched", "look")
    before = _registered_by_a_newer_statecache(world, 2)
    for id in ("old", "touched"):
        let_pass(world, id)
    passed = due(world, "touched")
    assert fire(world) == 1
    assert (parcels.state("old"), parcels.state("touched")) == ("back", "stored")
    put_off = due(world, "touched")
    assert put_off is not None
    assert passed is not None
    assert put_off >= passed + timeouts.RETRY_MS
    _define(world, 2, before)
    let_pass(world, "touched")
    assert fire(world) == 1
    assert parcels.history("touched")[-1].machine_version == 2


def test_a_machine_of_which_no_version_can_be_read_keeps_its_deadlines(
    world: worlds.World, parcels: MachineHandle
) -> None:
    stored(parcels, "1")
    before = _registered_by_a_newer_statecache(world, 1)
    let_pass(world, "1")
    assert fire(world) == 0
    assert due(world, "1") is not None
    _define(world, 1, before)
    let_pass(world, "1")
    assert fire(world) == 1


def test_timeouts_are_part_of_what_a_machine_means(world: worlds.World, parcels: MachineHandle) -> None:
    changed = made_of(_second(2 * HOUR).spec, version=1)
    with pytest.raises(errors.DefinitionError, match="another definition"):
        world.cache.machine(changed)


# --- stuck ------------------------------------------------------------------------------------------------------------------


def test_what_is_stuck(world: worlds.World, parcels: MachineHandle) -> None:
    """Past a timeout without an event: at once. With an event: when it is a minute late, as a parked one is."""
    stored(parcels, "parked", "late", "lost-1", "lost-2", "fine")
    for id in ("lost-1", "lost-2"):
        parcels.transition(id, "lose")
    world.flush()
    assert parcels.find(stuck=True) == []
    let_pass(world, "lost-1", 3 * HOUR)
    let_pass(world, "lost-2", 2 * HOUR)
    let_pass(world, "late", HOUR)
    let_pass(world, "parked", HOUR + timedelta(minutes=2))
    assert [one.id for one in parcels.find(stuck=True)] == ["lost-1", "parked", "lost-2"]
    assert [one.id for one in parcels.find("lost", stuck=True)] == ["lost-1", "lost-2"]
    assert [one.id for one in parcels.find(stuck=True, limit=1)] == ["lost-1"]
    assert [one.id for one in parcels.find("lost", stuck=True, older_than=timedelta(minutes=170))] == ["lost-1"]
    assert world.cache.timeouts.stuck_counts() == {("parcel", "stored"): 1, ("parcel", "lost"): 2}
    assert metrics.Reading("statecache_stuck_instances", ("parcel", "lost"), 2) in watching.StoreWatch(world.cache)()
    with webs.serving(world) as web:
        assert "2 stuck" in web.get("/machines/parcel").text
    parcels.transition("lost-1", "find")
    world.flush()
    assert [one.id for one in parcels.find(stuck=True)] == ["parked", "lost-2"]


def test_a_running_flusher_fires(redis_url: str, sqlite_url: str, namespace: str) -> None:
    """The duty beside a flusher: nobody has to ask."""

    class Short(StateMachine):
        waiting = State(initial=True, timeout=timedelta(milliseconds=50), on_timeout="expire")
        expired = State(final=True)

        expire = waiting.to(expired)

    with worlds.World(redis_url, sqlite_url, namespace, timeout_interval_seconds=0.05) as world:
        shorts = world.cache.machine(Short)
        shorts.start("1")
        world.cache.start_flusher()
        waiting.wait_until(lambda: shorts.state("1") == "expired", "the timeout was fired")
        world.flush()
        assert shorts.counts() == {"expired": 1}


def test_a_guard_of_another_state_does_not_stop_a_timeout(world: worlds.World) -> None:
    """Whoever fires timeouts has the machine from SQL, where no function is bound to a guard's name: that is the business of
    the guarded move alone."""
    tickets = world.cache.machine(Ticket)
    for id in ("1", "2", "3"):
        tickets.start(id)
    tickets.transition("3", "check")
    let_pass(world, "1", machine="ticket")
    assert world.cache.timeouts.run() == 1
    assert tickets.get("1").state == "closed"
    by_name = world.more().machine("ticket")
    assert by_name.transition("2", "close").state == "closed"
    with pytest.raises(errors.DefinitionError, match="no function is bound"):
        by_name.transition("3", "close")
    assert tickets.transition("3", "close").state == "closed"
