"""Natural batching for threads: calls that arrive while two script calls are in flight leave together in the next one.

Leaders and followers, without a thread of its own, a timer or a knob. A caller leads while fewer than two do: it sends what is
queued (at first only its own item). Who arrives meanwhile queues and sleeps. When the reply is there the leader hands
leadership to the first in the queue BEFORE it wakes its followers, so that the server is never idle while Python distributes
answers. A lone caller pays for two uncontended locks.

An interruption (a signal's handler raises in the main thread) ends only the caller that it meets. Followers of an interrupted
leader are told that their call is lost, which they repeat with the same id; an interrupted heir hands leadership on.

Order: the queue is first in, first out, and a caller waits for its answer, so the order of one caller's calls is kept.
Rejected: one leader (two threads then take turns at half the speed of two connections; sixteen are as fast with one, two or
four); a sender thread (in a prototype it cost a lone caller half its speed, and was slower for sixteen too).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence

from statecache.core import errors, items
from statecache.hot.store import BATCH_BYTES_MAX, BATCH_ITEMS_MAX

LEADERS_MAX = 2


class _Waiter:
    __slots__ = ("item", "leads", "outcome", "woken")

    def __init__(self, item: items.Item) -> None:
        self.item = item
        self.outcome: items.Outcome | None = None
        self.leads = False
        self.woken = threading.Lock()
        self.woken.acquire()


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
        self._lock = threading.Lock()
        self._queue: deque[_Waiter] = deque()
        self._leaders = 0
        self._leaders_max = leaders_max

    def apply(self, item: items.Item, timeout_seconds: float | None = None) -> items.Outcome:
        """Apply one item, in company if there is any. The leader's timeout is that of the exchange; whose answer it cuts
        off gets ``LOST`` and asks again."""
        with self._lock:
            if self._leaders < self._leaders_max:
                self._leaders += 1
                mine = None
            else:
                mine = _Waiter(item)
                self._queue.append(mine)
        if mine is None:
            return self._lead(item, (), timeout_seconds)
        try:
            mine.woken.acquire()  # until answered, or made the leader
            if mine.outcome is not None:
                return mine.outcome
            with self._lock:
                company = self._taken(mine)
        except BaseException:
            self._abandon(mine)
            raise
        return self._lead(mine.item, company, timeout_seconds)

    def _abandon(self, waiter: _Waiter) -> None:
        """Leave the queue, or hand on the leadership that nobody will take up."""
        with self._lock:
            if waiter in self._queue:
                self._queue.remove(waiter)
        if waiter.leads:
            self._hand_over()

    def _taken(self, leader: _Waiter) -> list[_Waiter]:
        """Those of the queue that travel with its first: as many as fit, none that wants another confirmation."""
        size = len(leader.item.tail)
        taken: list[_Waiter] = []
        while self._queue and len(taken) + 1 < self._items_max:
            waiter = self._queue[0]
            size += len(waiter.item.tail)
            if size > BATCH_BYTES_MAX or waiter.item.confirm != leader.item.confirm:
                break
            taken.append(self._queue.popleft())
        return taken

    def _lead(self, item: items.Item, company: Sequence[_Waiter], timeout_seconds: float | None) -> items.Outcome:
        try:
            outcomes = self._apply([item, *[waiter.item for waiter in company]], timeout_seconds)
        except BaseException as error:
            self._hand_over()
            cause = errors.UnavailableError(
                f"the call that this one travelled with was interrupted: {type(error).__name__}"
            )
            for waiter in company:
                waiter.outcome = items.Outcome("LOST", [], 0, cause)
                waiter.woken.release()
            raise
        self._hand_over()
        for waiter, outcome in zip(company, outcomes[1:], strict=True):
            waiter.outcome = outcome
            waiter.woken.release()
        return outcomes[0]

    def _hand_over(self) -> None:
        with self._lock:
            heir = self._queue.popleft() if self._queue else None
            if heir is None:
                self._leaders -= 1
            else:
                heir.leads = True
        if heir is not None:
            heir.woken.release()
