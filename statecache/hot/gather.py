"""Natural batching for asyncio: calls that arrive while exchanges are in flight leave together in the next one.

No task, no timer and no knob: a call that finds nothing in flight is written to the socket before its caller even waits; the
reply of an exchange sends the next one and then wakes its callers, so that the server works while Python distributes answers.
Under light load a call leaves at once, under heavy load it leaves in company, bounded by items and bytes. All exchanges go
through ONE connection, up to two of them at a time, so the server sees them in the order in which they left.

*The second exchange* leaves when half of those that were under way lately wait for it. So the server has one half while Python
has the other. If it left only when full, fifty callers would travel as one and forty-nine, and server and client take turns:
half as many calls a second. ("Lately": at the last two replies, because two may come at once, before those whom the first one
answered have called again.) None leaves behind one that waits for a replica or a disk: the server would begin with it only when
that wait has ended, and its own time would run meanwhile. So such calls have a gatherer, and a connection, of their own; both
share the turns of the instances, so that the order of calls holds over the two.

*Order.* The writes of one instance leave in the order in which they were called (``Turn``), and a call does not leave while an
earlier one of its instance wants something else (looks SQL up, waits, asks for admission): it would overtake it. Two of them
may stand in one script call if the first can only be refused there together with the second.

*Cancellation and deadlines.* Both end the waiting of one caller and nothing else. A call that has not left does not leave; one
that has left is applied once or not at all, and the next write of its instance waits for the reply that tells which. The
exchange, its connection and its other calls go on.

*Loss.* A connection that breaks, or gives no reply within the socket timeout, is dropped; its calls are told ``LOST``, and
their flows repeat them with the same id. What a server does with bytes of a dropped connection after that is the one thing that
no order here can bind; the ring of ids does, and ``expect_version``.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import redis

from statecache.core import errors
from statecache.hot.pipe import Pipe

Sent = TypeVar("Sent")
Received = TypeVar("Received")

EXCHANGES_IN_FLIGHT = 2
_NEVER = float("inf")


class Speech(Protocol[Sent, Received]):
    """What is said on a pipe: how a batch is packed, and what its replies mean."""

    def size(self, wish: Sent) -> int: ...

    def together(self, first: Sent, other: Sent) -> bool: ...

    def holds_up(self, first: Sent) -> bool:
        """Whether the server takes nothing more from the connection until the exchange that begins so is answered."""

    def rides(self, ahead: Sent) -> bool:
        """Whether another call of the same instance may stand behind this one in the same exchange."""

    def pack(self, batch: list[Sent], pipe: Pipe) -> tuple[bytes, int]:
        """The bytes of an exchange, and the number of its replies."""

    def read(self, batch: list[Sent], replies: list[Any], pipe: Pipe) -> list[Received]:
        """The answers, in order. May raise an error for all of them."""

    def lost(self, error: Exception, *, sent: bool) -> Received:
        """The answer of a call whose exchange failed, or that ran out of time."""


class Turn:
    """A write's place among those of its instance: from the call's beginning to its end, through all its attempts."""

    __slots__ = ("address", "ahead", "behind", "call", "first", "leaving")

    def __init__(self, address: str, ahead: Turn | None) -> None:
        self.address = address
        self.ahead = ahead
        self.behind: Turn | None = None
        self.call: _Call | None = None  # while it waits for an answer
        self.first: asyncio.Future[None] | None = None  # who waits until nothing is ahead
        self.leaving = False


class _Call:
    """One attempt. ``exchange`` is set while it is in flight, ``held`` while its turn has not come."""

    __slots__ = ("answer", "deadline", "exchange", "gatherer", "held", "turn", "wish")

    def __init__(
        self, gatherer: Gatherer[Any, Any], wish: Any, deadline: float, turn: Turn | None, answer: asyncio.Future[Any]
    ) -> None:
        self.gatherer = gatherer
        self.wish = wish
        self.deadline = deadline
        self.turn = turn
        self.answer = answer
        self.held = False
        self.exchange: _Exchange | None = None


class _Exchange:
    __slots__ = ("calls", "expires_at", "holds_up", "replies", "wanted")

    def __init__(self, expires_at: float) -> None:
        self.calls: list[_Call] = []
        self.holds_up = False
        self.replies: list[Any] = []
        self.wanted = 0
        self.expires_at = expires_at


class Gatherer(Generic[Sent, Received]):
    """Gathers calls and exchanges them over one connection. For one event loop."""

    def __init__(
        self,
        pool: Any,
        speech: Speech[Sent, Received],
        *,
        items_max: int,
        bytes_max: int,
        timeout_seconds: float,
        on_lost: Callable[[Exception], None] = lambda error: None,
        turns_of: Gatherer[Sent, Received] | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._pool = pool
        self._speech = speech
        self._items_max = items_max
        self._bytes_max = bytes_max
        self._timeout_seconds = timeout_seconds
        self._on_lost = on_lost
        self._waiting: deque[_Call] = deque()
        self._in_flight: deque[_Exchange] = deque()
        self._held: set[_Call] = set()
        self._last: dict[str, Turn] = {} if turns_of is None else turns_of._last
        """The last turn of each instance. Two may share them: then the order holds over the calls of both."""
        self._pipe: Pipe | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_at = _NEVER
        self._is_closed = False
        self._second_at = items_max
        """How many must wait for a second exchange to leave."""
        self._under_way = 0
        """How many calls waited or were in flight when the last reply came."""

    # --- callers -------------------------------------------------------------------------------------------------------

    def enter(self, address: str) -> Turn:
        """Take a place behind the writes of an instance that are under way. To be given back by ``leave``."""
        last = self._last.get(address)
        turn = self._last[address] = Turn(address, last)
        if last is not None:
            last.behind = turn
        return turn

    def leave(self, turn: Turn) -> None:
        """End a turn. If its call is in flight (its caller has gone), when the reply has come."""
        call = turn.call
        if call is not None:
            if call.exchange is not None:
                turn.leaving = True
                return
            call.gatherer._held.discard(call)
        ahead, behind = turn.ahead, turn.behind
        if ahead is not None:
            ahead.behind = behind
        if behind is not None:
            behind.ahead = ahead
            if ahead is None and behind.first is not None and not behind.first.done():
                behind.first.set_result(None)
            self._release(behind)
            self._send()
        elif ahead is not None:
            self._last[turn.address] = ahead
        else:
            del self._last[turn.address]

    async def come_first(self, turn: Turn, deadline: float) -> bool:
        """Wait until no earlier write of the instance is under way; False if the deadline came before that."""
        if turn.ahead is None:
            return True
        turn.first = self._loop.create_future()
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                await turn.first
        except TimeoutError:
            return False
        return True

    def ask(self, wish: Sent, deadline: float, turn: Turn | None = None) -> asyncio.Future[Received]:
        """Send a wish when it may leave; the answer. ``deadline`` is a ``time.monotonic`` time. A lone call has left when
        this returns."""
        answer: asyncio.Future[Received] = self._loop.create_future()
        call = _Call(self, wish, deadline, turn, answer)
        if deadline < self._alarm_at:
            self._set_alarm(deadline)
        if turn is not None:
            turn.call = call
            if turn.ahead is not None and not self._may_follow(turn.ahead):
                self._hold(call)
                return answer
        self._waiting.append(call)
        if turn is not None and turn.behind is not None:
            self._release(turn.behind)
        self._send()
        return answer

    async def close(self) -> None:
        """Close the connection. Nothing may be under way."""
        self._is_closed = True
        if self._alarm is not None:
            self._alarm.cancel()
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait([self._connecting])
        if self._pipe is not None:
            await self._pipe.close()

    # --- turns ---------------------------------------------------------------------------------------------------------

    def _may_follow(self, ahead: Turn) -> bool:
        """Whether a call may be queued behind its predecessor: only if that one is queued too, and lets others ride."""
        call = ahead.call
        return (
            call is not None
            and call.gatherer is self
            and not call.held
            and call.exchange is None
            and not call.answer.done()
            and self._speech.rides(call.wish)
        )

    def _release(self, turn: Turn | None) -> None:
        """Queue the call that was held, and those held behind it, as far as they may leave now."""
        while turn is not None:
            call = turn.call
            if call is None or not call.held:
                return
            owner = call.gatherer
            if turn.ahead is not None and not owner._may_follow(turn.ahead):
                return
            call.held = False
            owner._held.discard(call)
            owner._waiting.append(call)
            if owner is not self:
                owner._send()
            turn = turn.behind

    def _hold(self, call: _Call) -> None:
        call.held = True
        self._held.add(call)

    # --- exchanges -----------------------------------------------------------------------------------------------------

    def _may_leave(self) -> bool:
        in_flight = self._in_flight
        return not in_flight or (
            len(self._waiting) >= self._second_at
            and len(in_flight) < EXCHANGES_IN_FLIGHT
            and not in_flight[-1].holds_up
        )

    def _send(self) -> None:
        """Let go what may leave now."""
        while self._waiting and self._may_leave():
            pipe = self._pipe
            if pipe is None:
                if self._connecting is None:
                    self._connecting = self._loop.create_task(self._connect())
                return
            exchange = self._taken()
            if not exchange.calls:
                return
            try:
                packed, exchange.wanted = self._speech.pack([call.wish for call in exchange.calls], pipe)
            except Exception as error:
                self._tell_all(exchange, error, sent=False)
                continue
            exchange.holds_up = self._speech.holds_up(exchange.calls[0].wish)
            self._in_flight.append(exchange)
            if exchange.expires_at < self._alarm_at:
                self._set_alarm(exchange.expires_at)
            pipe.send(packed)

    def _taken(self) -> _Exchange:
        """What leaves next: the first in the queue, and those behind it that fit and may travel with it."""
        exchange = _Exchange(time.monotonic() + self._timeout_seconds)
        calls, waiting, size = exchange.calls, self._waiting, 0
        while waiting and len(calls) < self._items_max:
            call = waiting[0]
            turn = call.turn
            if call.answer.done():  # its caller has gone
                waiting.popleft()
                continue
            if turn is not None and turn.ahead is not None:
                before = turn.ahead.call
                if before is None or before.exchange is not exchange:  # it left without this one, or came back
                    waiting.popleft()
                    self._hold(call)
                    continue
            size += self._speech.size(call.wish)
            if calls and (size > self._bytes_max or not self._speech.together(calls[0].wish, call.wish)):
                break
            waiting.popleft()
            call.exchange = exchange
            calls.append(call)
        return exchange

    async def _connect(self) -> None:
        try:
            self._pipe = await Pipe.open(self._pool, self._timeout_seconds, self._received, self._broken)
        except BaseException as error:
            cause = error if isinstance(error, Exception) else _torn_down()
            calls, self._waiting = self._waiting, deque()
            for call in calls:
                self._tell(call, self._speech.lost(cause, sent=False))
            if not isinstance(error, (redis.RedisError, OSError)):
                raise
        finally:
            self._connecting = None
        self._send()

    def _received(self, reply: Any) -> None:
        if not self._in_flight:
            assert self._pipe is not None
            self._pipe.abort(redis.ConnectionError("a reply that nobody asked for"))
            return
        exchange = self._in_flight[0]
        exchange.replies.append(reply)
        if len(exchange.replies) < exchange.wanted:
            return
        under_way = len(self._waiting) + sum([len(one.calls) for one in self._in_flight])
        self._second_at = min(self._items_max, (max(under_way, self._under_way) + 1) // 2)
        self._under_way = under_way
        self._in_flight.popleft()
        calls = exchange.calls
        assert self._pipe is not None
        try:
            answers = self._speech.read([call.wish for call in calls], exchange.replies, self._pipe)
            for call, answer in zip(calls, answers, strict=True):
                self._tell(call, answer)
        except Exception as error:  # not what our script answers: nothing can be said of what it did
            self._tell_all(exchange, error, sent=True)
        self._send()

    def _broken(self, pipe: Pipe, error: Exception) -> None:
        """The connection is gone: tell those in flight, go on with the others on another one."""
        if pipe is not self._pipe:
            return
        self._pipe = None
        self._on_lost(error)
        lost, self._in_flight = self._in_flight, deque()
        for exchange in lost:
            self._tell_all(exchange, error, sent=True)
        if not self._is_closed:
            self._send()

    def _tell_all(self, exchange: _Exchange, error: Exception, *, sent: bool) -> None:
        for call in exchange.calls:
            self._tell(call, self._speech.lost(error, sent=sent))

    def _tell(self, call: _Call, answer: Any) -> None:
        call.exchange = None
        turn = call.turn
        if turn is not None:
            if turn.call is call:
                turn.call = None
            if turn.leaving:
                turn.leaving = False
                self.leave(turn)
        if not call.answer.done():
            call.answer.set_result(answer)

    # --- time ----------------------------------------------------------------------------------------------------------

    def _set_alarm(self, at: float) -> None:
        """One timer for all deadlines: calls cost none, it rings when the earliest that was seen has come."""
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm_at = at
        self._alarm = self._loop.call_later(max(0.0, at - time.monotonic()) + 0.001, self._ring)

    def _ring(self) -> None:
        self._alarm, self._alarm_at = None, _NEVER
        now = time.monotonic()
        if self._in_flight and self._in_flight[0].expires_at <= now and self._pipe is not None:
            self._pipe.abort(redis.TimeoutError("no reply within the socket timeout"))
        soonest = min((exchange.expires_at for exchange in self._in_flight), default=_NEVER)
        flying = [call for exchange in self._in_flight for call in exchange.calls]
        for call in [*self._waiting, *self._held, *flying]:
            if call.answer.done():
                continue
            if call.deadline > now:
                soonest = min(soonest, call.deadline)
                continue
            # Where it stands (in flight, in the queue, held) it is passed over from now on.
            late = redis.TimeoutError("no answer within the call's timeout")
            call.answer.set_result(self._speech.lost(late, sent=call.exchange is not None))
        if soonest < self._alarm_at:
            self._set_alarm(soonest)


def _torn_down() -> Exception:
    """The event loop ends while a connection is being made: not the callers' own cancellation."""
    return errors.UnavailableError("the event loop ended while this call waited for a connection")
