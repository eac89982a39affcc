"""Natural batching for threads: calls that arrive while two script calls are in flight leave together in the next one.

Leaders and followers, without a thread of its own, a timer or a knob. A caller leads while fewer than two do: it sends what is
queued (at first only its own item), up to half of the calls that are under way, so that the two have about as many each and
the server has one half while Python has the other. Who arrives meanwhile queues and sleeps. When the reply is there the leader
hands leadership to the first in the queue BEFORE it wakes its followers, so that the server is never idle while Python
distributes answers. A lone caller pays for two uncontended locks.

An interruption (a signal's handler raises in the main thread) ends only the caller that it meets, wherever it meets it: what
ends a lead - leadership to the next, an answer to every follower - can be done twice, and is done again by who was interrupted
in the midst of it. Followers of an interrupted leader are told that their call is lost, which they repeat with the same id.

A handler may also call itself, and come while its own thread holds the lock, with the queue half changed: it would wait for
ever, and must not touch the queue. It is told by the lock's owner, and its item leaves alone.

A follower waits no longer than its own timeout, whatever the leader's is: in the queue it goes without having been sent, in
flight its call is lost to it, and the leader answers nobody.

Order: the queue is first in, first out, and a caller waits for its answer, so the order of one caller's calls is kept.
Rejected: one leader (two threads then take turns at half the speed of two connections; sixteen are as fast with one, two or
four); a sender thread (in a prototype it cost a lone caller half its speed, and was slower for sixteen too).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from statecache.core import errors, items
from statecache.engine import threads
from statecache.hot.store import BATCH_BYTES_MAX, BATCH_ITEMS_MAX
from statecache.hot.wire import EXCHANGE_SECONDS_MIN

LEADERS_MAX = 2


class _Waiter:
    __slots__ = ("error", "item", "outcome", "woken")

    def __init__(self, item: items.Item) -> None:
        self.item = item
        self.outcome: items.Outcome | None = None
        self.error: errors.ConfigurationError | None = None
        self.woken = threading.Lock()
        self.woken.acquire()

    def wake(self) -> None:
        """Let it go on; no harm if it does already."""
        try:  # noqa: SIM105 - suppress() costs each follower a microsecond
            self.woken.release()
        except RuntimeError:
            pass


class Batcher:
    """Sends items of many threads in shared script calls."""

    def __init__(
        self,
        apply: Callable[[Sequence[items.Item], float | None], list[items.Outcome]],
        items_max: int = BATCH_ITEMS_MAX,
        leaders_max: int = LEADERS_MAX,
    ) -> None:
        self._apply = apply
        self._items_max = min(items_max, BATCH_ITEMS_MAX)
        self._lock = threading.RLock()
        """Never taken twice: an ``RLock`` because that can tell whose it is."""
        self._queue: deque[_Waiter] = deque()
        self._leaders: dict[int, _Waiter | items.Item] = {}
        """Who leads, by ``id``: waiters that were made leaders, and items of callers that found a place free."""
        self._leaders_max = leaders_max
        self._companies: dict[int, Sequence[_Waiter]] = {}
        """Who travels with a leader, by its ``id``; nothing for one that is alone, or has not gathered yet."""

    def apply(self, item: items.Item, timeout_seconds: float | None = None) -> items.Outcome:
        """Apply one item, in company if there is any. The leader's timeout is that of the exchange; whose answer it cuts
        off gets ``LOST`` and asks again. Raises ``ConfigurationError`` when the store was closed."""
        if threads.is_held_here(self._lock):
            return self._apply([item], timeout_seconds)[0]
        mine: _Waiter | None = None
        try:
            with self._lock:
                if len(self._leaders) < self._leaders_max:
                    self._leaders[id(item)] = item
                else:
                    mine = _Waiter(item)
                    self._queue.append(mine)
            if mine is None:
                return self._lead(item, item, [], timeout_seconds)
            return self._follow(mine, timeout_seconds)
        except BaseException:
            self._abandon(item if mine is None else mine)
            raise

    def _follow(self, mine: _Waiter, timeout_seconds: float | None) -> items.Outcome:
        """Wait for the answer, or to be made the leader."""
        began = time.monotonic()
        wait_seconds = -1.0 if timeout_seconds is None else min(timeout_seconds, threading.TIMEOUT_MAX)
        if not mine.woken.acquire(timeout=wait_seconds):
            with self._lock:
                self._give_up(mine)
        if mine.error is not None:
            raise mine.error
        if mine.outcome is not None:
            return mine.outcome
        if timeout_seconds is not None:
            timeout_seconds = max(EXCHANGE_SECONDS_MIN, timeout_seconds - (time.monotonic() - began))
        return self._lead(mine, mine.item, [], timeout_seconds)

    def _give_up(self, mine: _Waiter) -> None:
        """End a wait that took too long, unless it was answered, or made a leader, in the last moment."""
        if id(mine) in self._leaders or mine.outcome is not None or mine.error is not None:
            return
        is_sent = mine not in self._queue
        if is_sent:
            text = "Redis did not answer within the call's timeout: it may have been applied"
        else:
            self._queue.remove(mine)
            text = "Redis did not answer the calls before this one within its timeout: this attempt was not sent"
        cause = errors.UnavailableError(text)
        cause.__cause__ = TimeoutError(text)
        mine.outcome = items.Outcome("LOST" if is_sent else "UNSENT", [], 0, cause)

    def _lead(
        self, me: _Waiter | items.Item, item: items.Item, company: list[_Waiter], timeout_seconds: float | None
    ) -> items.Outcome:
        outcomes: list[items.Outcome] | None = None
        try:
            batch = [item]
            if me is not item:
                self._gather(me, company)
                batch += [waiter.item for waiter in company]
            outcomes = self._apply(batch, timeout_seconds)
            self._end(me, company, outcomes)
        except BaseException as error:
            # Perhaps in the midst of ending: what was done is done again, or already there.
            self._end(me, company, outcomes, error)
            raise
        return outcomes[0]

    def _gather(self, leader: Any, company: list[_Waiter]) -> None:
        """Take those of the queue that travel with its first, the leader: as many as fit, not more than half of all, none that
        wants another confirmation. Who is taken is in ``company`` before it leaves the queue: an interruption loses nobody."""
        with self._lock:
            queue, first = self._queue, leader.item
            size = len(first.tail)
            under_way = len(queue) + len(self._leaders) + sum(map(len, self._companies.values()))
            share = min(self._items_max, -(-under_way // self._leaders_max))
            self._companies[id(leader)] = company
            while queue:
                waiter = queue[0]
                if id(waiter) in self._leaders:  # it leads, and who made it the leader was interrupted
                    queue.popleft()
                    continue
                size += len(waiter.item.tail)
                if len(company) + 1 >= share or size > BATCH_BYTES_MAX or waiter.item.confirm != first.confirm:
                    break
                company.append(waiter)
                queue.popleft()

    def _end(
        self,
        me: _Waiter | items.Item,
        company: Sequence[_Waiter],
        outcomes: Sequence[items.Outcome] | None,
        error: BaseException | None = None,
    ) -> None:
        """Hand leadership on, then answer the followers. May be called again after it was interrupted."""
        if error is not None:
            with self._lock:
                for waiter in company:
                    if waiter in self._queue:
                        self._queue.remove(waiter)
        self._hand_over(me, again=error is not None)
        if not company:
            return
        if outcomes is not None and error is None:
            for waiter, outcome in zip(company, outcomes[1:], strict=True):
                waiter.outcome = outcome
                waiter.wake()
            return
        for place, waiter in enumerate(company, 1):
            if outcomes is not None and place < len(outcomes):
                waiter.outcome = outcomes[place]
            elif isinstance(error, errors.ConfigurationError):
                waiter.error = errors.ConfigurationError(str(error))
            else:
                waiter.outcome = _lost(error)
            waiter.wake()

    def _hand_over(self, me: _Waiter | items.Item, *, again: bool = False) -> None:
        """Let the next of the queue lead in the place of ``me``, if that leads, and wake it. ``again``: perhaps it was made a
        leader, and not woken."""
        with self._lock:
            leaders, queue = self._leaders, self._queue
            leaders.pop(id(me), None)
            self._companies.pop(id(me), None)
            if not queue and not again:
                return
            heirs: list[_Waiter | items.Item] = []
            while queue and len(leaders) < self._leaders_max:
                heir = queue[0]
                leaders[id(heir)] = heir
                heirs.append(heir)
                queue.popleft()
            if again:
                heirs = list(leaders.values())
        for one in heirs:
            if type(one) is _Waiter:
                one.wake()

    def _abandon(self, me: _Waiter | items.Item) -> None:
        """Leave the queue, and hand on the leadership that nobody would take up."""
        with self._lock:
            if isinstance(me, _Waiter) and me in self._queue:
                self._queue.remove(me)
        self._hand_over(me, again=True)


def _lost(error: BaseException | None) -> items.Outcome:
    cause = errors.UnavailableError(f"the call that this one travelled with was interrupted: {type(error).__name__}")
    return items.Outcome("LOST", [], 0, cause)
