"""Calls of many threads in shared script calls: interruptions end only the caller that they meet."""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest

from statecache.core import errors, items
from statecache.engine import batcher as batcher_module
from statecache.engine.batcher import Batcher
from tests.support.interruptions import Interrupt, Interruption, interrupted_at, interrupted_when
from tests.support.waiting import wait_until


class Server:
    """Answers batches one at a time, each when it is let go."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.gate = threading.Semaphore(0)
        self.fail: BaseException | None = None

    def apply(self, batch: Sequence[items.Item], timeout_seconds: float | None = None) -> list[items.Outcome]:
        self.batches.append([item.id for item in batch])
        self.gate.acquire()
        if self.fail is not None:
            failure, self.fail = self.fail, None
            raise failure
        return [items.Outcome("OK", [item.id]) for item in batch]


def item(id: str) -> items.Item:
    return items.Item(0, id, items.MoveSpec("order", "pay", {}, 1), 0, "", "", (), [], id)


class Call(threading.Thread):
    """One caller in a thread of its own."""

    def __init__(
        self, batcher: Batcher, id: str, timeout_seconds: float | None = None, tracer: Callable[..., Any] | None = None
    ) -> None:
        super().__init__(daemon=True)
        self.batcher, self.id, self.result = batcher, id, None
        self.timeout_seconds, self.tracer = timeout_seconds, tracer
        self.start()

    result: Any

    def run(self) -> None:
        sys.settrace(self.tracer)
        try:
            self.result = self.batcher.apply(item(self.id), self.timeout_seconds)
        except BaseException as error:
            self.result = error

    def answer(self) -> Any:
        self.join(10)
        assert not self.is_alive(), f"the call {self.id} hangs"
        return self.result


def bounded(work: Callable[[], Any]) -> Any:
    """What it returns, done in a thread of its own: one that hangs is an error, and hangs nothing else."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()), daemon=True)
    thread.start()
    thread.join(30)
    assert results, "it hangs, or raised"
    return results[0]


def test_calls_that_arrive_meanwhile_leave_together() -> None:
    server = Server()
    batcher = Batcher(server.apply, leaders_max=1)
    calls = [Call(batcher, "first")]
    wait_until(lambda: server.batches, "the leader's batch")
    calls += [Call(batcher, f"{number}") for number in range(5)]
    wait_until(lambda: len(batcher._queue) == 5, "five followers")
    server.gate.release(2)
    assert [call.answer().words for call in calls] == [[call.id] for call in calls]
    assert [len(batch) for batch in server.batches] == [1, 5]


def test_two_script_calls_are_in_flight() -> None:
    """The second caller does not wait for the first one's answer. The third leaves with half of all five that are under way
    then, so that the last one travels beside it and not alone when all others are answered."""
    server = Server()
    batcher = Batcher(server.apply)
    calls = []
    for number in range(2):
        calls.append(Call(batcher, f"leader {number}"))
        wait_until(lambda: len(server.batches) == len(calls), "a leader's batch")
    calls += [Call(batcher, f"{number}") for number in range(4)]
    wait_until(lambda: len(batcher._queue) == 4, "four followers")
    server.gate.release()
    wait_until(lambda: len(server.batches) == 3, "half of those who came meanwhile")
    server.gate.release(3)
    assert [call.answer().words for call in calls] == [[call.id] for call in calls]
    assert [len(batch) for batch in server.batches] == [1, 1, 3, 1]
    assert not batcher._companies
    server.gate.release()
    assert Call(batcher, "later").answer().words == ["later"]


def test_interrupted_follower_leaves_the_others_served() -> None:
    """A leader's batch is in flight; the main thread waits in the queue and is interrupted there. Who comes later is served:
    leadership is not handed to a caller that is gone."""
    server = Server()
    batcher = Batcher(server.apply, leaders_max=1)
    leader = Call(batcher, "leader")
    wait_until(lambda: server.batches, "the leader's batch")
    with pytest.raises(Interrupt), interrupted_when(Interrupt, lambda: batcher._queue):
        batcher.apply(item("interrupted"))
    later = Call(batcher, "later")
    wait_until(lambda: batcher._queue, "the later call in the queue")
    server.gate.release(2)
    assert leader.answer().code == "OK"
    assert later.answer().code == "OK"
    assert server.batches == [["leader"], ["later"]]


def test_interrupted_leader_loses_its_followers_calls_and_no_more() -> None:
    """The heir leads a batch with a follower; its script call is interrupted. The follower is told LOST (it may have been
    applied: repeat with the same id), it does not raise another thread's interruption; the next call is served."""
    server = Server()
    batcher = Batcher(server.apply, leaders_max=1)
    first = Call(batcher, "first")
    wait_until(lambda: server.batches, "the leader's batch")
    heir = Call(batcher, "heir")
    wait_until(lambda: len(batcher._queue) == 1, "the heir")
    follower = Call(batcher, "follower")
    wait_until(lambda: len(batcher._queue) == 2, "the follower")
    server.gate.release()
    wait_until(lambda: len(server.batches) == 2, "the heir's batch")
    server.fail = Interrupt()
    server.gate.release()
    assert first.answer().code == "OK"
    assert isinstance(heir.answer(), Interrupt)
    assert follower.answer().code == "LOST"
    assert follower.answer().cause is not None
    server.gate.release()
    assert Call(batcher, "next").answer().code == "OK"


@pytest.mark.parametrize(("leaders_max", "items_max"), [(1, 250), (2, 250), (1, 1)])
@pytest.mark.parametrize("role", ["lone", "leader", "heir", "follower"])
def test_interrupted_at_every_place(role: str, leaders_max: int, items_max: int) -> None:
    """One caller, in each role, is interrupted between any two steps: before and after it has taken its batch, between sending
    and reading, before it hands leadership on, between that and the answers of its followers. Whoever else is there is
    answered: with OK if his batch was answered, with LOST if it went with the interrupted one; nothing is sent twice, and the
    next call is served."""
    for nth in itertools.count(1):
        interruption = Interruption(nth, batcher_module.__file__)
        server = Server()
        batcher = Batcher(server.apply, items_max, leaders_max)
        others: list[Call] = []

        def enter(id: str, tracer: Any = None, server: Any = server, batcher: Any = batcher) -> Call:
            count = len(batcher._queue) + len(server.batches)
            call = Call(batcher, id, tracer=tracer)
            wait_until(
                lambda: len(batcher._queue) + len(server.batches) > count or not call.is_alive(), f"{id} to enter"
            )
            return call

        if role in ("heir", "follower"):
            others += [enter(f"first {number}") for number in range(leaders_max)]
        if role == "follower":
            others.append(enter("heir"))
        hit = enter("hit", interruption)
        others += [enter(id) for id in ("second", "third") if role != "lone"]
        server.gate.release(10)
        codes = {call.id: call.answer().code for call in others}
        interrupted = isinstance(hit.answer(), Interrupt)
        assert enter("next").answer().code == "OK"
        assert not batcher._leaders
        assert not batcher._queue
        sent = [id for batch in server.batches for id in batch]
        assert len(sent) == len(set(sent)), (nth, sent)
        with_it = {id for batch in server.batches if "hit" in batch for id in batch}
        for id, code in codes.items():
            assert code == "OK" or (code == "LOST" and interrupted and (id in with_it or id not in sent)), (
                nth,
                id,
                code,
            )
        if not interrupted:
            assert interruption.left > 0
            assert nth > 5
            return


def test_a_leader_whose_time_is_over_leaves_nobody_behind() -> None:
    """The leader's exchange ends at the leader's own timeout: it and its follower are told LOST. Who gathered meanwhile leads
    on, and is answered."""
    lost = items.Outcome("LOST", [], 0, errors.UnavailableError("timeout"))
    server = Server()
    answered = server.apply

    def apply(batch: Sequence[items.Item], timeout_seconds: float | None = None) -> list[items.Outcome]:
        outcomes = answered(batch, timeout_seconds)
        return outcomes if timeout_seconds is None else [lost] * len(batch)

    batcher = Batcher(apply, leaders_max=1)
    first = Call(batcher, "first")
    wait_until(lambda: server.batches, "the leader's batch")
    hasty = Call(batcher, "hasty", 30.0)
    wait_until(lambda: len(batcher._queue) == 1, "the hasty call")
    with_it = Call(batcher, "with it")
    wait_until(lambda: len(batcher._queue) == 2, "its follower")
    server.gate.release()
    wait_until(lambda: len(server.batches) == 2, "the hasty call's batch")
    late = Call(batcher, "late")
    wait_until(lambda: batcher._queue, "the late call")
    server.gate.release(2)
    assert [call.answer().code for call in (first, hasty, with_it, late)] == ["OK", "LOST", "LOST", "OK"]
    assert server.batches == [["first"], ["hasty", "with it"], ["late"]]


def test_a_followers_time_is_its_own() -> None:
    """Two patient leaders' exchanges hang. A follower of the second, in flight, and one in the queue run out of time: the first
    is told LOST, the other UNSENT, and it is never sent; patient ones are answered."""
    server = Server()
    batcher = Batcher(server.apply, leaders_max=1)
    first = Call(batcher, "first")
    wait_until(lambda: server.batches, "the leader's batch")
    heir = Call(batcher, "heir")
    wait_until(lambda: len(batcher._queue) == 1, "the heir")
    in_flight = Call(batcher, "in flight", 1.0)
    wait_until(lambda: len(batcher._queue) == 2, "the follower")
    server.gate.release()
    wait_until(lambda: len(server.batches) == 2, "the heir's batch")
    queued = Call(batcher, "queued", 0.1)
    assert queued.answer().code == "UNSENT"
    assert isinstance(queued.answer().cause, errors.UnavailableError)
    assert in_flight.answer().code == "LOST"
    patient = Call(batcher, "patient")
    wait_until(lambda: batcher._queue, "the patient call")
    server.gate.release(2)
    assert [call.answer().code for call in (first, heir, patient)] == ["OK"] * 3
    assert server.batches == [["first"], ["heir", "in flight"], ["patient"]]


def test_levels_of_durability_do_not_travel_together() -> None:
    """A WAIT behind the script speaks for its whole batch: calls that want another confirmation go by themselves."""
    server = Server()
    batcher = Batcher(server.apply, leaders_max=1)
    first = Call(batcher, "first")
    wait_until(lambda: server.batches, "the leader's batch")
    confirmed = item("confirmed")
    confirmed.confirm = items.Confirm(False, 0, 1, 100)
    waiting = threading.Thread(target=batcher.apply, args=(confirmed,), daemon=True)
    waiting.start()
    wait_until(lambda: len(batcher._queue) == 1, "the confirmed call")
    plain = Call(batcher, "plain")
    wait_until(lambda: len(batcher._queue) == 2, "the plain call")
    server.gate.release(3)
    assert (first.answer().code, plain.answer().code) == ("OK", "OK")
    waiting.join(10)
    assert server.batches == [["first"], ["confirmed"], ["plain"]]


def test_handlers_call_leaves_alone_while_its_thread_holds_the_lock() -> None:
    """A signal's handler calls in the midst of its own thread's call, which holds the lock: it waited for ever, whatever its
    timeout. It is answered, and the queue that it found half changed is as it was."""
    server = Server()
    server.gate.release(2)
    batcher = Batcher(server.apply, leaders_max=1)
    Call(batcher, "before").answer()

    def within() -> Any:
        with batcher._lock:
            batcher._leaders[0] = item("another")
            answer = batcher.apply(item("handler"), 5.0)
            assert list(batcher._leaders) == [0]
            assert not batcher._queue
            return answer

    assert bounded(within).words == ["handler"]
    assert server.batches == [["before"], ["handler"]]


def test_handlers_call_at_every_place_of_its_threads_call() -> None:
    """Wherever the handler comes, its call and the one that it meets are answered, each once."""
    for nth in itertools.count(1):
        answered: list[str] = []

        def apply(batch: Sequence[items.Item], timeout_seconds: float | None = None, to: Any = answered) -> Any:
            to += [item.id for item in batch]
            return [items.Outcome("OK", [item.id]) for item in batch]

        batcher = Batcher(apply)

        words: list[Sequence[Any]] = []

        def call(id: str, batcher: Any = batcher, words: Any = words) -> None:
            words.append(batcher.apply(item(id), 5.0).words)

        met = interrupted_at(nth, batcher_module.__file__, partial(call, "main"), partial(call, "handler"))
        expected = ["handler", "main"] if met else ["main"]
        assert sorted(answered) == expected, nth
        assert sorted(words) == [[id] for id in expected], nth
        assert not batcher._leaders
        assert not batcher._companies
        assert not batcher._queue
        if not met:
            assert nth > 5
            return
