"""Group commit: all who wait for SQL in this process wait together, and N of them cost one look at SQL.

Leader and followers as in ``batcher.py``, without a thread of its own. The first waiter leads: a round is one statement about
the receipts of ALL waiters, then either a step of the flusher for all of them (when no flusher is alive) or a pause until one
has committed. Who comes meanwhile is in the next round. A leader whose receipts are answered hands over, also when it is
interrupted: a signal's handler ends only the call that it meets. Tasks of an event loop wait as guests: they have no thread to
lead with, so one thread of their client ``serve``s as long as there are any.

What is answered is decided by ``durability.outcome`` alone, from rows of SQL (H11). A commit of this process' flusher ends the
pause (``Signal``), it answers nobody.

Who flushes. While a flusher is alive anywhere (this process' thread, or by the leases in SQL) waiters leave the work to it: two
that flush one partition throw away every other batch. A partition of theirs that does not move at all for a while is helped,
it alone: its flusher hangs, or died and its lease has not ended yet. Of all threads one helps at a time.

What can fail: SQL or Redis away: noted as the cause of the waiters' ``DurabilityTimeout``, and tried again. A receipt that the
database cannot even be asked about (none of ours): each waiter's question is asked alone, and only its caller hears of it. A
leader that hangs in SQL beyond a follower's deadline: the follower leaves by itself.

A signal's handler that waits while its own thread leads, or holds the lock, would wait for itself: it has a group of its own,
which asks SQL, and helps unless its thread is at just that (then it looks on: ``DurabilityTimeout`` if nobody else flushes).

Rejected: to answer from what the flusher has just committed (a second source of truth beside SQL's rows); to skip looks while
no watermark has moved (a retried dead letter moves none); a thread of its own (a lone caller would pay for two more switches).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence

from statecache.core import entry, errors, keys, model
from statecache.durable.store import DurableStore
from statecache.engine import durability, threads

HELP_AFTER_SECONDS = 1.0
"""Where a flusher is alive, this long without a move of a partition is left to it."""
_HELPS_SECONDS = 5.0
"""Once help was needed, it is given at once for so long."""
PAUSE_MIN_SECONDS = 0.002
PAUSE_MAX_SECONDS = 0.02
_TROUBLE_SECONDS = 0.05
_GRACE_SECONDS = 0.5
"""So long after its deadline a follower leaves by itself, if its leader has not told it."""
_CLOSE_SECONDS = 2.0
_CLOSE_PAUSE_SECONDS = 0.01
_NOBODY_YET = 0
"""Leads while the thread that leadership was handed to has not woken: no thread has this id."""
_CLOSED = "this StateCache was closed before it was seen in SQL."

Push = Callable[[float, Sequence[int] | None], bool]
"""A step of the flusher (deadline; partitions, None for all); True if it moved entries."""


class Signal:
    """Counts commits, and wakes who waits for the next. Interrupted anywhere it is as before."""

    def __init__(self) -> None:
        self.count = 0
        self._bells = threads.Bells()

    def give(self) -> None:
        """Something may have been committed."""
        with self._bells.lock:
            self.count += 1
            self._bells.ring()

    def wait(self, seen: int, timeout_seconds: float) -> None:
        """Return when the count is not ``seen`` (any more), or after the timeout."""
        self._bells.wait(lambda: self.count != seen, max(0.0, timeout_seconds))


class Waiter:
    """One call's receipts. ``ended`` (under the group's lock) is the end: nothing is asked for it any more."""

    def __init__(
        self,
        receipts: Sequence[model.Receipt],
        partition_count: int,
        deadline: float,
        tell: Callable[[], None] | None = None,
    ) -> None:
        self.receipts = receipts
        self.addresses = [
            (one.machine, one.id, one.version, keys.partition_of(one.machine, one.id, partition_count))
            for one in receipts
        ]
        for one in receipts:
            entry.EntryId.parse(one.entry_id)  # what is no receipt fails here, in its own call
        self.left = list(range(len(receipts)))
        self.results: list[errors.StateCacheError | None] = [None] * len(receipts)
        self.deadline = deadline
        self.trouble: errors.StateCacheError | None = None
        self.error: Exception | None = None
        self.looked = self.leads = self.ended = False
        self.tell = tell
        self.woken = threads.Bell()

    def judge(self, asked: Sequence[int], standing: Sequence[durability.Standing]) -> None:
        """Take the answers about what was left when SQL was asked. Whoever has left meanwhile has its answers."""
        if self.ended:
            return
        left = []
        for index, found in zip(asked, standing, strict=True):
            verdict = durability.outcome(self.receipts[index], found)
            if verdict is False:
                left.append(index)
            elif verdict is not True:
                self.results[index] = verdict
        self.left = left

    def expire(self, why: str = "") -> None:
        """What is left is unknown."""
        for index in self.left:
            one = self.receipts[index]
            why = why or f"was not in SQL in time: {self.trouble or 'is a flusher running?'}"
            late = errors.DurabilityTimeout(
                f"{one.machine}:{one.id} version {one.version} stands, but {why} See 'statecache status'", one
            )
            late.__cause__ = self.trouble
            self.results[index] = late
        self.left = []

    def wake(self) -> None:
        """Tell whoever waits that this has ended, or leads. Harmless to repeat."""
        if self.tell is not None:
            self.tell()
        self.woken.set()

    def answers(self) -> list[errors.StateCacheError | None]:
        """None or the error of each receipt; raises what went wrong with all of them."""
        if self.error is not None:
            raise self.error
        return list(self.results)


class GroupCommit:
    """The waiters of one ``StateCache``; made anew in a forked child."""

    def __init__(
        self,
        durable: DurableStore,
        partition_count: int,
        push: Push,
        someone_flushes: Callable[[], bool],
        flushes_here: Callable[[int], bool] = lambda partition: False,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self.signal = Signal()
        self._durable = durable
        self._partition_count = partition_count
        self._push = push
        self._someone_flushes = someone_flushes
        self._flushes_here = flushes_here
        self._wake = wake
        # Over what follows, until the blank line. Never taken twice: an RLock because that can tell whose it is.
        self._lock = threading.RLock()
        self._helper: object | None = None
        self._waiting: dict[Waiter, None] = {}
        self._server: Waiter | None = None
        self._leader: int | None = None
        self._closed = False

        # Only the leader's:
        self._untold: list[Waiter] = []
        self._seen = 0
        self._pause_seconds = PAUSE_MIN_SECONDS
        self._troubled = False
        self._moved: dict[int, tuple[entry.EntryId, float]] = {}
        self._helps_until = 0.0

    # --- waiting -----------------------------------------------------------------------------------------------------

    def wait(self, receipts: Sequence[model.Receipt], deadline: float) -> list[errors.StateCacheError | None]:
        """Wait until each receipt is in SQL; None, or the error, for each.

        ``DurabilityTimeout`` at the deadline, its cause what was in the way. Nothing else that goes wrong meanwhile is raised:
        the transitions stand, and an error that does not say so would be taken for "not applied".
        """
        mine = Waiter(receipts, self._partition_count, deadline)
        if self._closed:
            mine.expire(_CLOSED)
        elif self._leader == threading.get_ident() or self._is_within():
            self._within()._take_part(mine)
        else:
            self._wake()
            self._take_part(mine)
        return mine.answers()

    def _is_within(self) -> bool:
        """Whether this is a signal's handler that came while its thread holds the lock."""
        return threads.is_held_here(self._lock)

    def _within(self) -> GroupCommit:
        """A group for a signal's handler whose thread is at work for this one."""
        made = GroupCommit(
            self._durable, self._partition_count, self.help, self._someone_flushes, self._flushes_here, self._wake
        )
        made.signal = self.signal
        return made

    def enter(
        self, receipts: Sequence[model.Receipt], deadline: float, tell: Callable[[], None]
    ) -> tuple[Waiter, bool]:
        """Wait without a thread: ``tell`` is called, in another thread, when the answers are there.

        The second answer is True if the caller has to see to it that a thread runs ``serve``. Who does not want to know any
        more must ``withdraw``."""
        guest = Waiter(receipts, self._partition_count, deadline, tell)
        with self._lock:
            self._waiting[guest] = None
            alone = self._server is None
            if alone:
                self._server = Waiter((), self._partition_count, float("inf"))
        self._wake()
        return guest, alone

    def withdraw(self, guest: Waiter) -> None:
        """Forget a guest, if it is not answered yet; what it is left with is a ``DurabilityTimeout``."""
        with self._lock:
            self._waiting.pop(guest, None)
            late, guest.ended = not guest.ended, True
        if late:
            guest.expire()

    def serve(self) -> None:
        """Lend the guests a thread until there are none."""
        mine = self._server
        if mine is None:
            return
        try:
            self._take_part(mine)
        except Exception as error:  # the guests cannot lead: what ended their thread is their answer
            self.abandon_guests(error)

    def abandon_guests(self, error: Exception) -> None:
        """Answer all guests with an error: no thread serves them."""
        with self._lock:
            self._server = None
            guests = [one for one in self._waiting if one.tell is not None]
            for guest in guests:
                guest.error, guest.ended = error, True
                del self._waiting[guest]
        for guest in guests:
            guest.wake()

    def close(self) -> None:
        """End all waits, after a last look at SQL. Who waits any longer gets ``DurabilityTimeout``: it may be durable."""
        self._closed = True
        deadline = time.monotonic() + _CLOSE_SECONDS
        while self._leader not in (None, threading.get_ident()) and time.monotonic() < deadline:
            seen = self.signal.count
            self.signal.give()
            self.signal.wait(seen + 1, _CLOSE_PAUSE_SECONDS)

    # --- leader and followers ----------------------------------------------------------------------------------------

    def _take_part(self, mine: Waiter) -> None:
        me = threading.get_ident()
        try:
            with self._lock:
                self._waiting[mine] = None
                if self._leader is None:
                    mine.leads, self._leader = True, me
            if not mine.leads:
                self._follow(mine)
            if mine.leads:
                self._lead(mine)
            self._part(mine)
        except BaseException:
            self._part(mine, again=True)  # perhaps interrupted in the midst of it
            raise

    def _part(self, mine: Waiter, *, again: bool = False) -> None:
        if mine.leads:
            self._tell()  # of an interrupted round
        self._leave(mine, again=again)

    def _follow(self, mine: Waiter) -> None:
        """Until answered, or made the leader; or until the leader should have told."""
        timeout = max(0.0, mine.deadline - time.monotonic()) + _GRACE_SECONDS
        if mine.woken.wait(min(timeout, threading.TIMEOUT_MAX)):
            if mine.leads:
                self._leader = threading.get_ident()
            return
        with self._lock:
            if mine.leads or mine.ended:
                return
            self._waiting.pop(mine, None)
            mine.ended = True
        mine.expire()

    def _leave(self, mine: Waiter, *, again: bool = False) -> None:
        """Be gone; a leader hands over to the first that has a thread. ``again``: perhaps it did, and has not woken it."""
        with self._lock:
            self._waiting.pop(mine, None)
            mine.ended = True
            if mine is self._server and not any(one.tell for one in self._waiting):
                self._server = None
            heir = next((one for one in self._waiting if one.leads), None) if again else None
            if mine.leads:
                heir = next((one for one in self._waiting if one.tell is None), None)
                # Nothing is called from here on, so no signal's handler can come in between: then two would lead, or none.
                mine.leads = False
                if heir is None:
                    self._leader = None
                else:
                    heir.leads, self._leader = True, _NOBODY_YET
        if heir is not None:
            heir.wake()

    def _lead(self, mine: Waiter) -> None:
        while not mine.ended:
            with self._lock:
                latest = max((one.deadline for one in self._waiting if one.receipts), default=0.0)
            with self._durable.until(min(mine.deadline, latest)):
                if mine.looked:
                    self._move()
                self._look()

    # --- one round ---------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Ask SQL about all, and answer those that can be answered."""
        with self._lock:
            waiting = list(self._waiting)
        self._seen, self._troubled = self.signal.count, False
        closed, began = self._closed, time.monotonic()
        left = sum(len(one.left) for one in waiting)
        self._ask(waiting)
        now = time.monotonic()
        progress = sum(len(one.left) for one in waiting) < left
        faster = PAUSE_MIN_SECONDS if progress else min(PAUSE_MAX_SECONDS, self._pause_seconds * 1.5)
        self._pause_seconds = max(faster, now - began)  # never more than half of the time is spent asking
        for one in waiting:
            one.looked = True
            if closed:
                one.expire(_CLOSED)
            elif now >= one.deadline:
                one.expire()
        self._end(waiting)

    def _end(self, waiting: Sequence[Waiter]) -> None:
        """Tell those that have all their answers."""
        with self._lock:
            ended = [one for one in waiting if one in self._waiting and _is_answered(one) and one is not self._server]
            for one in ended:
                one.ended = True
                del self._waiting[one]
            server = self._server
            if server is not None and server in self._waiting and not any(one.tell for one in self._waiting):
                server.ended, self._server = True, None
                del self._waiting[server]
                ended.append(server)
            self._untold += ended
        self._tell()

    def _tell(self) -> None:
        while self._untold:
            self._untold[-1].wake()
            self._untold.pop()

    def _ask(self, waiting: Sequence[Waiter], *, again: bool = False) -> None:
        """One statement for all. What goes wrong with one's receipts goes wrong each time, and is raised in its call; what does
        not come again was raised by a signal's handler (a job's timeout), and ends the call of this thread."""
        asked = [(one, one.left) for one in waiting]  # who leaves while SQL is asked has nothing left
        addresses = [one.addresses[index] for one, left in asked for index in left]
        if not addresses:
            return
        try:
            found = self._durable.standing(addresses)
        except (errors.UnavailableError, errors.ConfigurationError, errors.IntegrityError) as error:
            self._note(error, waiting)  # of SQL, which says nothing of the receipts
            return
        except Exception as error:
            if again:
                waiting[0].error = error
                return
            for one in waiting:
                self._ask([one], again=True)
            if not isinstance(error, errors.StateCacheError) and not any(one.error for one in waiting):
                raise
            return
        start = 0
        for one, left in asked:
            rows = found[start : start + len(left)]
            one.judge(left, [(row.watermark, row.transition_id, row.letter_id) for row in rows])
            start += len(left)
        self._watch({address[3]: row.watermark for address, row in zip(addresses, found, strict=True)})

    def _watch(self, watermarks: dict[int, entry.EntryId]) -> None:
        """Remember since when each partition that is waited for has stood where it stands."""
        now = time.monotonic()
        before = self._moved
        self._moved = {
            partition: before[partition] if before.get(partition, (None,))[0] == watermark else (watermark, now)
            for partition, watermark in watermarks.items()
        }

    def _note(self, error: errors.StateCacheError, waiting: Sequence[Waiter]) -> None:
        self._troubled = True
        for one in waiting:
            one.trouble = error

    def _move(self) -> None:
        """Flush for all who wait, or pause until somebody may have."""
        with self._lock:
            waiting = list(self._waiting)
        deadline = min((one.deadline for one in waiting if one.receipts), default=time.monotonic())
        wanted = {one.addresses[index][3] for one in waiting for index in one.left}
        try:
            if self._is_helped(deadline, wanted):
                return
        except errors.StateCacheError as error:
            self._note(error, waiting)
        pause = _TROUBLE_SECONDS if self._troubled else self._pause_seconds
        if all(map(self._flushes_here, wanted)):
            pause = max(pause, PAUSE_MAX_SECONDS)  # its commits end the pause
        self.signal.wait(self._seen, max(0.0, min(pause, deadline - time.monotonic())))

    def _is_helped(self, deadline: float, wanted: Collection[int]) -> bool:
        """Do what a flusher should, if there is none or it does not; True if entries were moved."""
        if not self._someone_flushes():
            return self.help(deadline, None)
        now = time.monotonic()
        patience = 0.0 if now < self._helps_until else HELP_AFTER_SECONDS
        stuck = [
            partition
            for partition, (_, since) in sorted(self._moved.items())
            if partition in wanted and now - since >= patience
        ]
        if not stuck or not self.help(deadline, stuck):
            return False
        self._helps_until = now + _HELPS_SECONDS if patience else self._helps_until
        return True

    def help(self, deadline: float, partitions: Sequence[int] | None) -> bool:
        """Run a step of the flusher, unless another thread does; True if it moved entries."""
        if self._is_within():
            return False
        mine = object()
        try:
            with self._lock:
                if self._helper is not None:
                    return False  # what that one commits gives the signal
                self._helper = mine
            moved = self._push(deadline, partitions)
            self._end_help(mine)
            return moved
        except BaseException:
            self._end_help(mine)  # not in a ``finally``, which may be interrupted at its first step
            raise

    def _end_help(self, mine: object) -> None:
        if self._helper is mine:
            self._helper = None


def _is_answered(one: Waiter) -> bool:
    return not one.left or one.error is not None
