"""Waiting for SQL together: N waiters cost one look a round, each outcome reaches its own caller, whoever leads (P7).

In most tests a flusher is alive by its lease and does nothing, so that nobody helps, and pauses are so long that only a
commit's signal, a deadline or a close ends them: a test decides when SQL is looked at.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from statecache import StateCache
from statecache.aio import AsyncStateCache
from statecache.core import errors, model
from statecache.engine import commits, letters
from statecache.engine.leases import Leases, leave_quietly
from tests.support import plans, refusing, waiting, worlds
from tests.support.interruptions import JobTimeoutError, interrupted_at
from tests.support.waiting import wait_until

LONG = 30.0


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PAUSE_MIN_SECONDS", "PAUSE_MAX_SECONDS", "HELP_AFTER_SECONDS"):
        monkeypatch.setattr(commits, name, 60.0)


@pytest.fixture
def world(patient: None, redis_url: str, database_url: str, namespace: str) -> Iterator[worlds.World]:
    """Two partitions, and a flusher that is alive and idle."""
    with worlds.World(redis_url, database_url, namespace) as made:
        idle = Leases(made.durable, 2, lease_seconds=600.0, redis=made.hot.endpoint)
        idle.turn()
        yield made
        leave_quietly(idle)
        made.flush()
        made.verify()


class Call:
    """A wait in a thread of its own; ``result()`` is what it raised, or None."""

    def __init__(self, cache: StateCache, receipt: model.Receipt | list[model.Receipt], timeout: float = LONG) -> None:
        self._raised: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(cache, receipt, timeout))
        self._thread.start()

    def _run(self, cache: StateCache, receipt: Any, timeout: float) -> None:
        try:
            cache.wait_durable(receipt, timeout)
        except Exception as error:
            self._raised = error

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> Exception | None:
        self._thread.join(2 * LONG)
        assert self.is_over
        return self._raised


def gathered(cache: StateCache, count: int, looked: int = 1) -> None:
    """Wait until so many wait, and so many of them have been asked for at least once."""
    group = cache.commits._waiting

    def are_there() -> bool:
        return len(group) == count and sum(one.looked for one in list(group)) >= looked

    waiting.wait_until(are_there, f"{count} waiters", LONG)


@contextmanager
def standings(cache: StateCache) -> Iterator[list[str]]:
    """The statements that ask where receipts stand, meanwhile."""
    seen: list[str] = []

    def note(_connection: Any, statement: str, _values: Any) -> None:
        if "statecache_transitions" in statement and "statecache_dead_letters" in statement:
            seen.append(statement)

    with plans.told(cache.durable.database.engine, note):
        yield seen


def started(world: worlds.World, count: int, prefix: str = "n") -> list[model.Receipt]:
    return [world.orders.start(f"{prefix}{number}") for number in range(count)]


# --- the cost of waiting ---------------------------------------------------------------------------------------------


def test_threads_share_their_looks(world: worlds.World) -> None:
    """The first of 32 looks, and pauses; the others come; one commit ends the pause; the second look answers all."""
    receipts = started(world, 32)
    with standings(world.cache) as seen:
        calls = [Call(world.cache, receipt) for receipt in receipts]
        gathered(world.cache, 32)
        assert len(seen) == 1
        assert world.flusher().step().entries == 32
        assert [call.result() for call in calls] == [None] * 32
        assert len(seen) == 2


def test_tasks_share_their_looks(world: worlds.World, redis_url: str, database_url: str, namespace: str) -> None:
    """As above, for 200 tasks of an event loop: one thread serves them all."""

    async def main() -> tuple[list[Any], int]:
        async with AsyncStateCache.connect(redis_url, database_url, namespace) as cache:
            orders = await cache.machine(worlds.Order)
            with standings(cache.sync) as seen:
                tasks = [
                    asyncio.create_task(orders.start(f"t{number}", durability="durable", timeout=LONG))
                    for number in range(200)
                ]
                group = cache.sync.commits._waiting
                while len(group) < 201 or not any(one.looked for one in list(group)):  # and the thread that serves them
                    await asyncio.sleep(0.01)
                before = len(seen)
                assert before <= 2
                flusher = world.flusher(cache.sync)
                assert (await asyncio.to_thread(flusher.step)).entries == 200
                results = await asyncio.gather(*tasks)
                assert not group
                return results, len(seen) - before

    results, looks = asyncio.run(main())
    assert {one.id for one in results} == {f"t{number}" for number in range(200)}
    assert looks == 1


def test_one_of_all_helps_at_a_time(
    redis_url: str, database_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No flusher is alive: 32 threads with five transitions each have them flushed by fewer steps than there are
    transitions, never by two threads at once."""
    with worlds.World(redis_url, database_url, namespace) as world:
        inside = most = steps = 0
        original = world.cache.flusher.step

        def counted(*arguments: Any, **named: Any) -> Any:
            nonlocal inside, most, steps
            steps, inside = steps + 1, inside + 1
            most = max(most, inside)
            try:
                return original(*arguments, **named)
            finally:
                inside -= 1

        monkeypatch.setattr(world.cache.flusher, "step", counted)

        def writes(thread: int) -> None:
            for number in range(5):
                world.orders.start(f"t{thread}-{number}", durability="durable", timeout=LONG)

        assert worlds.together(*[lambda thread=thread: writes(thread) for thread in range(32)]) == [None] * 32
        assert most == 1
        assert steps < 160
        assert world.orders.counts() == {"placed": 160}


def test_flushes_help_one_at_a_time(
    redis_url: str, sqlite_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``flush`` in eight threads: what one of them commits ends the others' waits."""
    with worlds.World(redis_url, sqlite_url, namespace) as world:
        started(world, 50)
        steps = 0
        original = world.cache.flusher.step

        def counted(*arguments: Any, **named: Any) -> Any:
            nonlocal steps
            steps += 1
            return original(*arguments, **named)

        monkeypatch.setattr(world.cache.flusher, "step", counted)
        assert worlds.together(*[world.cache.flush] * 8) == [None] * 8
        assert steps < 8
        assert world.orders.counts() == {"placed": 50}


# --- who flushes -----------------------------------------------------------------------------------------------------


def test_a_living_flusher_is_not_helped(world: worlds.World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world.cache.flusher, "step", None)  # doing it itself would be an error
    call = Call(world.cache, started(world, 1))
    gathered(world.cache, 1)
    world.flusher().step()
    assert call.result() is None
    monkeypatch.undo()


def test_only_a_partition_that_stands_still_is_helped(world: worlds.World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The flusher that is alive moves nothing: after a moment the waiter does, for the partition that it waits for."""
    monkeypatch.setattr(commits, "HELP_AFTER_SECONDS", 0.05)
    for name in ("PAUSE_MIN_SECONDS", "PAUSE_MAX_SECONDS"):
        monkeypatch.setattr(commits, name, 0.01)
    cache = world.more()
    mine, other = (world.orders.start(world.id(partition)) for partition in (0, 1))
    cache.wait_durable(mine, LONG)
    assert world.versions(mine.id) == [1]
    assert world.versions(other.id) == []


def test_who_helps_one_partition_does_not_release_its_brake(world: worlds.World) -> None:
    """The rate is shared among all partitions, however few a step is asked for."""
    world.start(world.id(0))
    flusher = world.flusher(lag_target_seconds=1e4, backlog_limit=10**9)
    flusher.step(partitions=[0])
    assert int(world.meta(0)["limit"]) == int(flusher._rate * 1e4 / 2 / 2)


# --- outcomes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leader", range(5))
def test_each_gets_its_own_outcome(world: worlds.World, leader: int) -> None:
    """Five wait at once, another one leads each time: one is lost by a wipe and found so by the recovery that happens while
    all wait; one becomes durable; one is refused by SQL and one waits behind it; one is in a partition that nobody flushes."""
    ids = world.ids(0)
    world.start(bad := next(ids))
    world.flusher().step()
    lost = world.orders.start(next(ids))
    early = Call(world.cache, lost) if leader == 0 else None
    if early:
        gathered(world.cache, 1)
    world.wipe()
    durable = [world.orders.start(next(ids)) for _ in range(3)]  # the first one asks for the recovery
    refusing.refuse(world.durable)
    refused = world.orders.transition(bad, "note", reason=refusing.REASON)
    behind = world.orders.transition(bad, "note")
    late = world.orders.start(world.id(1))
    waits: list[tuple[Any, float]] = [(lost, LONG), (durable, LONG), (refused, LONG), (behind, LONG), (late, 1.0)]
    calls: dict[int, Call] = {0: early} if early else {}
    for place in [leader, *range(5)]:
        if place not in calls:
            calls[place] = Call(world.cache, *waits[place])
            waiting.wait_until(lambda: any(one.looked for one in list(world.cache.commits._waiting)), "a leader")
    world.flusher().step(partitions=[0])
    results = [calls[place].result() for place in range(5)]
    refusing.accept(world.durable)
    assert [type(one) for one in results] == [
        errors.IntegrityError, type(None), errors.ParkedError, errors.ParkedError, errors.DurabilityTimeout,
    ]  # fmt: skip
    assert isinstance(results[4], errors.DurabilityTimeout)
    assert results[4].receipt == late
    assert world.versions(durable[0].id) == [1]
    letters.retry(world.cache, "order", bad)


def test_one_that_sql_cannot_be_asked_about_disturbs_nobody(world: worlds.World) -> None:
    """A receipt that is none of ours makes the shared question fail: each is asked alone, and only its caller hears of it."""
    good = started(world, 3)
    forged = msgspec.structs.replace(good[0], version=2**80)
    calls = [Call(world.cache, receipt) for receipt in good]
    gathered(world.cache, 3)
    bad = Call(world.cache, forged)
    gathered(world.cache, 4)
    world.flusher().step()
    assert [call.result() for call in calls] == [None] * 3
    assert isinstance(bad.result(), errors.StateCacheError)


# --- leaders that go -------------------------------------------------------------------------------------------------


def test_an_interrupted_leader_hands_over(world: worlds.World) -> None:
    """The leader is interrupted in its pause, as by a signal's handler, while three others wait: only its own call ends; the
    next one leads, and the commit that follows answers the others."""

    def interrupt() -> None:
        gathered(world.cache, 4)
        raise InterruptedError

    receipts = started(world, 4)
    with worlds.before_call(world.cache.commits.signal, "wait", interrupt):
        leader = Call(world.cache, receipts[0])
        gathered(world.cache, 1)
        others = [Call(world.cache, receipt) for receipt in receipts[1:]]
        assert isinstance(leader.result(), InterruptedError)
    gathered(world.cache, 3)
    world.flusher().step()
    assert [call.result() for call in others] == [None] * 3


def test_a_follower_does_not_hang_with_its_leader(world: worlds.World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The leader's question hangs in SQL; a follower's deadline comes: it is told that its transition stands. Then SQL answers,
    and the leader is told what is true."""
    monkeypatch.setattr(commits, "_GRACE_SECONDS", 0.05)
    first, second = started(world, 2)
    world.flusher().step()
    asked, answer = threading.Event(), threading.Event()

    def hang() -> None:
        asked.set()
        assert answer.wait(LONG)

    with worlds.before_call(world.cache.durable, "standing", hang):
        leader = Call(world.cache, first)
        assert asked.wait(LONG)
        late = Call(world.cache, second, 0.05).result()
        assert isinstance(late, errors.DurabilityTimeout)
        assert late.receipt == second
        answer.set()
        assert leader.result() is None


def test_close_ends_the_waits(world: worlds.World) -> None:
    """Two wait: one is durable by then, which the last look finds; the other's durability is unknown, and it is said why."""
    cache = world.more()
    there, away = (world.orders.start(world.id(partition)) for partition in (0, 1))
    calls = [Call(cache, receipt) for receipt in (away, there)]
    gathered(cache, 2)
    world.flusher().step(partitions=[0])
    cache.close()
    unknown, durable = (call.result() for call in calls)
    assert durable is None
    assert isinstance(unknown, errors.DurabilityTimeout)
    assert "was closed" in str(unknown)
    with pytest.raises(errors.DurabilityTimeout, match="was closed"):
        cache.wait_durable(away)


def test_a_child_waits_for_itself(world: worlds.World) -> None:
    """A process forks while a thread of it leads: in the child there is no such thread, and its own wait is answered."""
    first, second = started(world, 2)
    leader = Call(world.cache, first)
    gathered(world.cache, 1)
    child = os.fork()
    if not child:
        code = 1
        try:
            world.flusher().step()
            world.cache.wait_durable(second, LONG)
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert not leader.is_over
    world.cache.commits.signal.give()
    assert leader.result() is None


# --- guests ----------------------------------------------------------------------------------------------------------


def test_a_cancelled_task_leaves_the_others(
    world: worlds.World, redis_url: str, database_url: str, namespace: str
) -> None:
    """Two tasks wait, one is cancelled: it is forgotten, the other is answered; then no thread is kept."""

    async def main() -> None:
        async with AsyncStateCache.connect(redis_url, database_url, namespace) as cache:
            orders = await cache.machine(worlds.Order)
            receipts = [await orders.start(f"c{number}") for number in range(2)]
            tasks = [asyncio.create_task(cache.wait_durable(receipt, LONG)) for receipt in receipts]
            group = cache.sync.commits
            await _until(lambda: len(group._waiting) == 3)
            tasks[0].cancel()
            await asyncio.wait(tasks[:1])
            assert tasks[0].cancelled()
            assert len(group._waiting) == 2
            await asyncio.to_thread(world.flusher(cache.sync).step)
            await tasks[1]
            await _until(lambda: group._server is None and group._leader is None)

    asyncio.run(main())


def test_one_that_leaves_while_sql_is_asked_shifts_nobodys_answer(
    world: worlds.World, redis_url: str, database_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three tasks wait, and all is flushed. SQL has answered, and the answers are not handed out yet, when the first task is
    cancelled: the others were judged by the rows of those before them, and told that they are lost."""

    async def main() -> None:
        async with AsyncStateCache.connect(redis_url, database_url, namespace) as cache:
            orders = await cache.machine(worlds.Order)
            receipts = [await orders.start(f"c{number}") for number in range(3)]
            tasks = [asyncio.create_task(cache.wait_durable(receipt, LONG)) for receipt in receipts]
            group, loop, standing = cache.sync.commits, asyncio.get_running_loop(), cache.sync.durable.standing
            await _until(lambda: len(group._waiting) == 4 and sum(one.looked for one in list(group._waiting)) >= 3)

            def ask(addresses: Any) -> Any:
                found = standing(addresses)
                if len(addresses) == 3:
                    loop.call_soon_threadsafe(tasks[0].cancel)
                    waiting.wait_until(lambda: len(group._waiting) == 3, "the first to be forgotten", LONG)
                return found

            monkeypatch.setattr(cache.sync.durable, "standing", ask)
            await asyncio.to_thread(world.flusher(cache.sync).step)
            assert await asyncio.gather(*tasks[1:]) == [None, None]
            assert tasks[0].cancelled()

    asyncio.run(main())


async def _until(condition: Callable[[], bool]) -> None:
    await asyncio.to_thread(waiting.wait_until, condition, "the group to change", LONG)


def test_threads_and_tasks_lead_for_each_other(
    world: worlds.World, redis_url: str, database_url: str, namespace: str
) -> None:
    """A thread leads, a task waits; the thread's call ends first: the thread that serves the tasks leads on."""

    async def main() -> None:
        async with AsyncStateCache.connect(redis_url, database_url, namespace) as cache:
            orders = await cache.machine(worlds.Order)
            mine, other = [await orders.start(world.id(partition)) for partition in (0, 1)]
            leader = Call(cache.sync, mine)
            group = cache.sync.commits
            await _until(lambda: len(group._waiting) == 1)
            task = asyncio.create_task(cache.wait_durable(other, LONG))
            await _until(lambda: len(group._waiting) == 3)
            flusher = world.flusher(cache.sync)
            await asyncio.to_thread(flusher.step, None, [0])
            assert await asyncio.to_thread(leader.result) is None
            assert not task.done()
            await asyncio.to_thread(flusher.step, None, [1])
            await task

    asyncio.run(main())


def test_a_task_times_out_by_itself(world: worlds.World, redis_url: str, database_url: str, namespace: str) -> None:
    """Two tasks wait, with different deadlines, for what nobody flushes: each gets its own receipt at its own time."""

    async def main() -> None:
        async with AsyncStateCache.connect(redis_url, database_url, namespace) as cache:
            orders = await cache.machine(worlds.Order)
            began = time.monotonic()
            soon, later = await asyncio.gather(
                *[orders.start(f"d{timeout}", durability="durable", timeout=timeout) for timeout in (0.2, 0.4)],
                return_exceptions=True,
            )
            assert time.monotonic() - began >= 0.4
            for one, id in ((soon, "d0.2"), (later, "d0.4")):
                assert isinstance(one, errors.DurabilityTimeout)
                assert one.receipt is not None
                assert one.receipt.id == id

    asyncio.run(main())


# --- interruptions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["wait", "flush"])
def test_interrupted_at_every_place(what: str, tmp_path: Path) -> None:
    """A wait, or a flush that helps, is interrupted between any two steps, also in the midst of handing over and of cleaning
    up. The next caller's wait and flush go as if nothing had been."""
    with worlds.EmulatedWorld(f"sqlite:///{tmp_path}/store.db") as lite:
        lite.start("done")
        lite.flush()
        for nth in itertools.count(1):
            lite.cache._make_parts()
            group = lite.cache.commits
            (*_, receipt) = lite.start(f"{nth}")

            def work(group: Any = group, receipt: Any = receipt) -> None:
                if what == "wait":
                    group.wait([receipt], time.monotonic() + LONG)
                else:
                    lite.cache.flush(LONG)

            met = interrupted_at(nth, commits.__file__, work)
            assert group._leader is None, nth
            assert not group._waiting, nth
            assert group._helper is None, nth
            lite.cache.wait_durable(receipt, LONG)
            if not met:
                assert nth > 5
                return


@pytest.mark.parametrize("what", ["wait", "flush"])
def test_handlers_wait_at_every_place_of_its_threads(what: str, tmp_path: Path) -> None:
    """A signal's handler waits, or flushes, in the midst of its own thread's wait: that one's lock is held, or it leads, or it
    flushes just now. The handler waited for its thread for ever, or as long as it could; it asks and flushes by itself, and
    gives up only where its thread is at just that. The call that it met goes on as if nothing had been."""
    with worlds.EmulatedWorld(f"sqlite:///{tmp_path}/store.db") as lite:
        lite.start("done")
        lite.flush()
        given_up = 0
        for nth in itertools.count(1):
            lite.cache._make_parts()
            group = lite.cache.commits
            (*_, mine), (*_, handlers) = lite.start(f"{nth}"), lite.start(f"h{nth}")
            raised: list[Exception] = []

            def work(mine: Any = mine) -> None:
                lite.cache.wait_durable(mine, LONG)

            def handler(handlers: Any = handlers, raised: Any = raised) -> None:
                try:
                    lite.cache.flush(0.2) if what == "flush" else lite.cache.wait_durable(handlers, 0.2)
                except errors.DurabilityTimeout as error:
                    raised.append(error)

            met = interrupted_at(nth, commits.__file__, work, handler)
            given_up += len(raised)
            assert group._leader is None, nth
            assert not group._waiting, nth
            assert group._helper is None, nth
            lite.cache.wait_durable([mine, handlers], LONG)
            if not met:
                assert nth > 20
                assert given_up < nth / 5
                return


def test_leader_interrupted_at_every_place_of_its_end_hands_over_once(world: worlds.World) -> None:
    """One leads and its receipt is answered while two wait behind it; it is interrupted at any place on its way out: before it
    has named its heir, in between, before it has woken it. One of the others leads, and only one."""
    group = world.cache.commits
    receipts = started(world, 2)
    for nth in itertools.count(1):
        (done,) = world.start(f"done{nth}")
        first = commits.Waiter([done], 2, float("inf"))
        first.leads = True
        others = [commits.Waiter([receipt], 2, float("inf")) for receipt in receipts]
        group._waiting = dict.fromkeys((first, *others))
        group._leader = threading.get_ident()
        first.ended = True  # it has its answer: all that is left is to go
        met = interrupted_at(nth, commits.__file__, functools.partial(group._take_part, first))
        leading = [one for one in others if one.leads]
        if first in group._waiting:
            continue
        assert [one.woken.is_set() for one in leading] == [True], nth
        assert not first.leads
        assert group._leader is not None
        group._waiting, group._leader = {}, None
        if not met:
            assert nth > 10
            return


@pytest.mark.parametrize("others", [0, 1])
def test_timeout_of_a_job_reaches_its_own_call(world: worlds.World, others: int) -> None:
    """A signal's handler raises an ``Exception`` in the leader while SQL answers. It is no receipt's fault: the leader's caller
    gets it, at once, and who waits beside it gets nothing of it."""
    mine, theirs = world.start("1")[-1], world.start("2")[-1]
    calls: list[Call] = []
    standing, due = world.durable.standing, [True]

    def slow(addresses: Any) -> Any:
        if threading.current_thread() is threading.main_thread() and due:
            while len(calls) < others:
                calls.append(Call(world.cache, theirs))
                wait_until(lambda: len(world.cache.commits._waiting) == 1 + len(calls), "the other to wait")
            if len(addresses) == 1 + others:
                due.clear()
                raise JobTimeoutError
        return standing(addresses)

    world.durable.standing = slow  # type: ignore[method-assign]
    if others:
        asked = world.cache.commits._look
        count = [0]

        def twice() -> None:
            """The other comes during the first look, and is in the second."""
            asked()
            count[0] += 1
            if count[0] == 1:
                world.cache.commits.signal.give()

        world.cache.commits._look = twice  # type: ignore[method-assign]
    with pytest.raises(JobTimeoutError):
        world.cache.wait_durable(mine, LONG)
    world.flusher().step()
    world.cache.commits.signal.give()
    assert [call.result() for call in calls] == [None] * others
