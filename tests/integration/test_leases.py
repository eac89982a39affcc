"""Leases: partitions are shared fairly, handed over, taken over; and whatever goes wrong with them, SQL stays right (P5)."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from statecache import Move
from statecache.core import errors
from statecache.durable import leases as durable_leases
from statecache.durable import schema
from statecache.durable.flush import FlushTransaction
from statecache.durable.store import DurableStore
from statecache.engine import leases as engine_leases
from statecache.engine import processes, status
from statecache.engine.leases import Leases
from tests.support import servers
from tests.support.waiting import wait_until
from tests.support.worlds import World, before_call, together
from workers import flusher as worker

PARTITIONS = 16


@pytest.fixture
def world(redis_url: str, database_url: str, namespace: str) -> Iterator[World]:
    with World(redis_url, database_url, namespace, partition_count=PARTITIONS) as found:
        yield found


def _leases(world: World, lease_seconds: float = 60.0) -> Leases:
    return Leases(world.durable, PARTITIONS, lease_seconds=lease_seconds)


def _rounds(*sharers: Leases, count: int = 4) -> list[tuple[int, ...]]:
    """Let everybody's heartbeat come, a few times around; what they hold then."""
    for _ in range(count):
        for one in sharers:
            one._due = 0.0
            one.turn()
    return [one.held for one in sharers]


def _write(durable: DurableStore, statement: sa.Executable) -> None:
    durable.database.alone(lambda connection: connection.execute(statement))


def _silent(world: World, one: Leases, by_ms: int) -> None:
    """Move a flusher's last heartbeat away from the database's present."""
    column = schema.flushers.c
    _write(
        world.durable,
        sa.update(schema.flushers).where(column.name == one.name).values(beat_ms=column.beat_ms - by_ms),
    )


def _are_shared(held: list[tuple[int, ...]]) -> bool:
    sizes = [len(one) for one in held]
    return sorted(sum(held, ())) == list(range(PARTITIONS)) and max(sizes) - min(sizes) <= 1


# --- sharing ---------------------------------------------------------------------------------------------------------


def test_alone_it_holds_everything_at_its_first_turn(world: World) -> None:
    one = _leases(world)
    assert one.turn() == tuple(range(PARTITIONS))
    assert all(one.holds(partition) for partition in range(PARTITIONS))
    assert not one.holds(PARTITIONS)


def test_shares_follow_who_comes_and_goes(world: World) -> None:
    first, second, third = _leases(world), _leases(world), _leases(world)
    first.turn()
    assert _are_shared(_rounds(first, second))
    before = _rounds(first, second, third)
    assert _are_shared(before)
    assert _rounds(first, second, third) == before  # nothing moves without need
    second.leave()
    assert _are_shared(_rounds(first, third, count=2))
    assert [row.name for row in durable_leases.look(world.durable)] == sorted([first.name, third.name])


def test_more_flushers_than_partitions(world: World) -> None:
    """The seventeenth stands by, and steps in when one leaves."""
    many = [_leases(world) for _ in range(PARTITIONS + 1)]
    held = _rounds(*many, count=6)
    assert sorted(len(one) for one in held) == [0] + [1] * PARTITIONS
    spare = many[[len(one) for one in held].index(0)]
    next(one for one in many if one is not spare).leave()
    assert len(_rounds(spare)[0]) == 1


def test_all_join_at_the_same_moment(world: World) -> None:
    """Four look, see everything free, and take at once: SQL gives each row to one."""
    four = [_leases(world) for _ in range(4)]
    together(*(one.turn for one in four))
    rows = durable_leases.look(world.durable)
    taken = [partition for row in rows for partition in row.partitions]
    assert len(taken) == len(set(taken))
    assert _are_shared(_rounds(*four))


def test_between_heartbeats_nothing_is_asked(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    one = _leases(world)
    one.turn()
    monkeypatch.setattr(one, "_durable", None)
    assert len(one.turn()) == PARTITIONS


# --- dying, and only seeming to -------------------------------------------------------------------------------------------


def test_the_dead_lose_their_leases_when_they_end(world: World) -> None:
    dead, living = _leases(world), _leases(world)
    assert _are_shared(_rounds(dead, living))
    _silent(world, dead, 59_000)
    assert len(_rounds(living)[0]) == PARTITIONS // 2
    _silent(world, dead, 2_000)
    assert len(_rounds(living)[0]) == PARTITIONS


def test_a_process_that_is_gone_is_not_waited_for(world: World) -> None:
    """Killed on the machine where we run: its lease has a minute left, its process id is gone."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    durable_leases.join(world.durable, "dead", "here", child.pid, processes.place(), 60_000)
    durable_leases.take(world.durable, "dead", list(range(PARTITIONS)), [])
    assert not engine_leases.someone_flushes(world.durable)
    assert [row.alive for row in status.flushers(world.cache)] == [False]
    assert len(_leases(world).turn()) == PARTITIONS


def test_a_host_with_a_wrong_clock_neither_gains_nor_loses(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its clock is a day ahead, then a day behind: only the database's is looked at."""
    right, wrong = _leases(world), _leases(world)
    held = _rounds(right, wrong)
    now = time.time
    for off_seconds in (86_400, -86_400):
        with monkeypatch.context() as patch:
            patch.setattr("time.time", lambda off_seconds=off_seconds: now() + off_seconds)
            assert _rounds(wrong) == held[1:]
            assert abs(durable_leases.look(world.durable)[0].silent_ms) < 30_000
        assert _rounds(right, wrong) == held


def test_the_databases_clock_is_set_back(world: World) -> None:
    """A heartbeat an hour in the future is none: else a dead flusher's partitions would wait that hour."""
    dead, living = _leases(world), _leases(world)
    _rounds(dead, living)
    _silent(world, dead, -3_600_000)
    assert len(_rounds(living)[0]) == PARTITIONS


def test_one_that_cannot_flush_keeps_nothing(world: World) -> None:
    """Its steps fail (it has lost Redis; SQL is there): it does not beat, others take over; it gets its share back when a step
    succeeds."""
    lame, sound = _leases(world), _leases(world)
    held = _rounds(lame, sound)
    lame._due = 0.0
    assert lame.turn(well=False) == held[0]  # it goes on trying with what it had
    _silent(world, lame, 61_000)
    assert len(_rounds(sound)[0]) == PARTITIONS
    assert _are_shared(_rounds(lame, sound))


def test_forgotten_flushers_join_again(world: World) -> None:
    """SQL is restored from a copy that does not know them, with leases of one that is long dead."""
    gone = _leases(world)
    gone.turn()
    _silent(world, gone, 3_700_000)
    saved = world.sql_copy()
    first, second = _leases(world), _leases(world)
    _rounds(first, second)
    world.sql_back(saved)
    assert _are_shared(_rounds(first, second))
    assert gone.name not in [row.name for row in durable_leases.look(world.durable)]


def test_sql_is_away_and_comes_back(private_postgres: servers.PostgresServer, redis_url: str, namespace: str) -> None:
    """Two loops, SQL is killed under them: nobody holds anything for longer than a lease; then both have their halves again."""
    url = private_postgres.url(private_postgres.create_database())
    with World(redis_url, url, namespace, partition_count=PARTITIONS, lease_seconds=1.0) as world, _two(world) as two:
        wait_until(lambda: _are_shared([one.leases.held for one in two]), "both have their halves", 30)
        world.orders.start_many([(f"a{number}", None) for number in range(100)])
        private_postgres.kill()
        world.orders.transition_many([Move(f"a{number}", "pay") for number in range(100)])
        wait_until(lambda: not any(one.leases.holds(p) for one in two for p in range(PARTITIONS)), "the leases end")
        private_postgres.start()
        wait_until(lambda: world.orders.counts() == {"paid": 100}, "everything is in SQL", 60)
        wait_until(lambda: _are_shared([one.leases.held for one in two]), "both have their halves", 30)
        world.verify()


# --- leases never decide what is written ---------------------------------------------------------------------------------


def test_a_holder_that_was_stopped_looks_before_it_flushes(world: World) -> None:
    """It holds everything - SIGSTOP for longer than a lease - another takes - SIGCONT: its next turn gives what is its now."""
    stopped, other = _leases(world), _leases(world)
    stopped.turn()
    _silent(world, stopped, 61_000)
    stopped._due = stopped._ends = 0.0  # as its own clock will say when it wakes
    assert len(_rounds(other)[0]) == PARTITIONS
    assert not stopped.holds(0)
    assert stopped.turn() == ()
    assert _are_shared(_rounds(stopped, other))


@pytest.mark.parametrize("place", ["flush_transaction", "partitions"])
def test_a_holder_that_is_stopped_within_a_step(world: World, place: str) -> None:
    """The holder has its partitions - it stops right before it reads SQL's watermarks, or with the entries in its hands right
    before its transaction - another takes the leases and flushes - more moves come - the holder goes on: nothing of what it
    read is written again, nothing is missing."""
    ids = [f"s{number}" for number in range(40)]
    world.orders.start_many([(id, {"n": 1}) for id in ids])
    stopped, other = _leases(world), _leases(world)
    holder, successor = world.flusher(), world.flusher(world.more())
    mine = stopped.turn()

    def taken_over() -> None:
        _silent(world, stopped, 61_000)
        assert successor.step(partitions=_rounds(other)[0]).entries == 40
        world.orders.transition_many([Move(id, "pay") for id in ids])

    with before_call(world.durable, place, taken_over):
        step = holder.step(partitions=mine)
    assert step.entries == (0 if place == "flush_transaction" else 40)
    while holder.step().more:
        pass
    assert [world.versions(id) for id in ids] == [[1, 2]] * 40
    world.verify()


def test_what_it_remembers_of_a_partition_is_not_believed_when_it_comes_back(world: World) -> None:
    """One flusher has folded version 1 - the partition is another's, which flushes versions 2 and 3 -
    it comes back: version 4 is folded onto SQL's checkpoint, not onto the remembered one."""
    id = world.id()
    world.start(id, amount=1, kept="x")
    mine, other = world.flusher(), world.flusher(world.more())
    mine.step()
    world.orders.transition(id, "pay", data={"amount": 2})
    world.orders.transition(id, "note", data={"more": 3})
    other.step()
    world.orders.transition(id, "ship", unset=["kept"])
    assert mine.step().entries == 1
    found = world.durable.checkpoint("order", id)
    assert found is not None
    assert (found.version, found.data) == (4, '{"amount":2,"more":3}')
    world.verify()


def test_folds_of_partitions_that_are_gone_take_no_memory(world: World) -> None:
    world.orders.start_many([(f"m{number}", None) for number in range(50)])
    flusher = world.flusher()
    flusher.step()
    assert len(flusher._cache) == 50
    assert flusher._remembering(range(4), range(8)) == range(8)
    assert len(flusher._cache) == 50
    flusher._remembering(range(8), range(4))
    assert not flusher._cache


@pytest.mark.parametrize("first_looks_early", [True, False])
def test_two_are_stopped_at_the_same_time(world: World, first_looks_early: bool) -> None:
    """Both hold half of a backlog, both are told to stop. Either one looks while the other is still alive, and leaves it to
    that one; or both have left before either looks, and both flush. Never does each rely on the other."""
    first, second = world.more(), world.more()
    _rounds(first.leases, second.leases)
    world.orders.start_many([(f"t{number}", None) for number in range(100)])
    if first_looks_early:
        worker._hand_over(first)
        assert world.orders.counts() == {}
        worker._hand_over(second)
    else:
        with before_call(first.leases, "others", lambda: worker._hand_over(second)):
            worker._hand_over(first)
    assert world.orders.counts() == {"placed": 100}
    assert durable_leases.look(world.durable) == []
    world.verify()


def test_a_newcomer_that_was_not_seen_yet_is_not_robbed(world: World) -> None:
    """One sees everything free - another joins and takes its part - the first one takes: only what is still free."""
    one, newcomer = _leases(world), _leases(world)
    with before_call(durable_leases, "take", newcomer.turn):
        one.turn()
    assert len(newcomer.held) == PARTITIONS // 2
    assert not set(one.held) & set(newcomer.held)
    assert _are_shared(_rounds(one, newcomer))


# --- loops ---------------------------------------------------------------------------------------------------------------


class Loop:
    """A flusher's loop in a thread, on connections of its own."""

    def __init__(self, world: World) -> None:
        self.cache = world.more()
        self.leases = self.cache.leases
        self.entries = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self.cache.flusher.run(self._stop, self._count, self.leases)

    def _count(self, step: Any) -> None:
        self.entries += step.entries

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(20)
        assert not self._thread.is_alive()
        engine_leases.leave_quietly(self.leases)


@contextlib.contextmanager
def _two(world: World) -> Iterator[list[Loop]]:
    loops = [Loop(world) for _ in range(2)]
    try:
        yield loops
    finally:
        for one in loops:
            one.stop()


def test_two_loops_do_the_work_once(world: World) -> None:
    """The known waste of two that flush everything: now each entry is read and committed by one of them."""
    with _two(world) as two:
        wait_until(lambda: _are_shared([one.leases.held for one in two]), "both have their halves", 30)
        for round_ in range(5):
            world.orders.start_many([(f"r{round_}-{number}", None) for number in range(100)])
        wait_until(lambda: world.orders.counts() == {"placed": 500}, "everything is in SQL", 30)
        wait_until(lambda: sum(one.entries for one in two) == 500, "both have counted")
        assert all(one.entries for one in two)
    assert durable_leases.look(world.durable) == []
    world.verify()


def test_flush_leaves_the_work_to_the_flushers(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with _two(world) as two:
        wait_until(lambda: _are_shared([one.leases.held for one in two]), "both have their halves", 30)
        monkeypatch.setattr("statecache.engine.cache._HELP_AFTER_SECONDS", 60.0)
        monkeypatch.setattr(world.cache.flusher, "step", None)  # doing it itself would be an error
        world.orders.start_many([(f"w{number}", None) for number in range(100)])
        world.cache.flush()
        assert world.orders.counts() == {"placed": 100}


def test_flush_helps_itself_where_the_flusher_is_stuck(world: World) -> None:
    """A flusher is alive by its heartbeat and moves nothing: after a moment the caller does the work."""
    stuck = _leases(world)
    stuck.turn()
    assert engine_leases.someone_flushes(world.durable)
    world.orders.start_many([(f"h{number}", None) for number in range(100)])
    world.cache.flush()
    assert world.orders.counts() == {"placed": 100}


def test_flush_of_a_stuck_flusher_does_not_outlast_its_deadline(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("statecache.engine.cache._HELP_AFTER_SECONDS", 60.0)
    _leases(world).turn()
    world.orders.start("1")
    with pytest.raises(errors.DurabilityTimeout, match="partitions were not flushed in time"):
        world.cache.flush(timeout=0.05)


def test_batches_shrink_where_sql_is_slow_and_grow_where_it_is_not(world: World) -> None:
    flusher = world.flusher(lag_target_seconds=1e-9, batch_entries=5000)
    world.orders.start_many([(f"b{number}", None) for number in range(800)])
    assert flusher.step().entries == 800
    assert flusher._size == 2500
    for wanted in (1250, 625, 312, 156, 100, 100):
        world.orders.start(f"slow{wanted}{flusher._size}")
        flusher.step()
        assert flusher._size == wanted
    flusher.lag_target_seconds = 3600.0
    world.orders.start_many([(f"c{number}", None) for number in range(700)])
    taken = []
    while (step := flusher.step()).more or step.entries:
        taken.append(step.entries)
    assert taken == [100, 100, 200, 200, 100]  # what is looked at ahead has the size of before
    world.verify()


def test_two_embedded_processes_share_the_work(data_folder: Any) -> None:
    """The known issue: each of them flushed everything. The second joins; the first one's part is handed over, and back."""
    from statecache import StateCache

    with StateCache.embedded(data_folder, lease_seconds=1.0) as first:
        wait_until(lambda: len(first.leases.held) == PARTITIONS, "the first holds everything")
        with StateCache.embedded(data_folder, lease_seconds=1.0) as second:
            both = [first.leases, second.leases]
            wait_until(lambda: _are_shared([one.held for one in both]), "both have their halves", 30)
        assert [row.name for row in durable_leases.look(first.durable)] == [first.leases.name]
        wait_until(lambda: len(first.leases.held) == PARTITIONS, "the first holds everything again")


def test_batches_shrink_where_sql_ends_them_for_their_time(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that takes longer than PostgreSQL is told to allow would fail for ever. What fails at once says nothing of sizes."""
    flusher = world.flusher(batch_entries=5000)
    world.orders.start_many([(f"b{number}", None) for number in range(800)])
    asked = flusher.durable.flush_transaction
    limits: list[int] = []

    @contextlib.contextmanager
    def failing(limit_seconds: int) -> Iterator[FlushTransaction]:
        limits.append(limit_seconds)
        with asked(limit_seconds) as transaction:
            yield transaction
            raise errors.UnavailableError("terminating connection due to transaction timeout")

    monkeypatch.setattr(flusher.durable, "flush_transaction", failing)

    def fails() -> int:
        with pytest.raises(errors.UnavailableError, match="transaction timeout"):
            flusher.step()
        return flusher._size

    assert fails() >= 5000
    monkeypatch.setattr("statecache.engine.flusher.FLUSH_SECONDS_MAX", 0)
    assert [fails() for _ in range(6)] == [2500, 1250, 625, 312, 156, 100]
    assert fails() == 100
    assert limits == [30, 0, 0, 0, 0, 0, 0, 120]
    monkeypatch.undo()
    assert 0 < flusher.step().entries <= 100
    while flusher.step().more:
        pass
    world.verify()
