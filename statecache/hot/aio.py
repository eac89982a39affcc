"""The hot store for asyncio: transitions and reads of hashes, batched by themselves over two connections.

Only what is frequent is here; admission, hydration, look-ups and all else go through the sync store in a worker thread. While
an exchange is in flight, calls that arrive gather and leave together in the next one (``_Pump``). There is no timer and no
knob: under light load a call leaves at once, under heavy load it leaves in company.

Cancellation: a call that is cancelled while it gathers is not sent; one that is in flight is applied once, its answer dropped.
The connection is read to the end either way: replies are never left for somebody else.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

import redis
import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from statecache.core import errors, items
from statecache.hot import failures, resp, store

Sent = TypeVar("Sent")
Received = TypeVar("Received")

EXCHANGES_IN_FLIGHT = 2


class AsyncWire:
    """One connection. ``fresh`` until its first call, which compares the server's identity."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self.fresh = True
        self.check_sent_at = 0.0

    async def send(self, packed: bytes) -> None:
        await self.connection.send_packed_command((packed,), check_health=False)

    async def read(self) -> Any:
        return await self.connection.read_response(disable_decoding=True)

    async def close(self) -> None:
        await self.connection.disconnect(nowait=True)


async def _reply_or_error(line: AsyncWire) -> Any:
    try:
        return await line.read()
    except redis.ResponseError as error:
        return error


class _Call(Generic[Sent, Received]):
    __slots__ = ("answer", "wish")

    def __init__(self, wish: Sent, answer: asyncio.Future[Received]) -> None:
        self.wish = wish
        self.answer = answer


class _Pump(Generic[Sent, Received]):
    """Gathers calls and sends them in batches, a few in flight, each on a connection of its own."""

    def __init__(
        self,
        exchange: Callable[[list[Sent]], Awaitable[list[Received]]],
        size: Callable[[Sent], int],
        together: Callable[[Sent, Sent], bool] = lambda left, right: True,
        items_max: int = store.BATCH_ITEMS_MAX,
    ) -> None:
        self._items_max = items_max
        self._exchange = exchange
        self._size = size
        self._together = together
        self._waiting: deque[_Call[Sent, Received]] = deque()
        self._running: set[asyncio.Task[None]] = set()
        self._active = 0  # counted down at once when a run finds nothing more, before any caller can go on

    async def call(self, wish: Sent) -> Received:
        if not self._active and not self._waiting:
            return await self._alone(wish)
        answer: asyncio.Future[Received] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Call(wish, answer))
        if self._active < EXCHANGES_IN_FLIGHT and len(self._waiting) >= self._items_max:
            self._start()
        return await answer

    async def _alone(self, wish: Sent) -> Received:
        """Nobody else is about: exchange in the caller's own task. What gathers meanwhile leaves as soon as it is done."""
        self._active += 1
        try:
            return (await self._exchange([wish]))[0]
        finally:
            self._active -= 1
            if self._waiting and not self._active:
                self._start()

    def _start(self) -> None:
        self._active += 1
        task = asyncio.get_running_loop().create_task(self._run())
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _run(self) -> None:
        try:
            while batch := self._taken():
                await self._serve(batch)
        finally:
            self._active -= 1

    async def _serve(self, batch: list[_Call[Sent, Received]]) -> None:
        try:
            answers = await self._exchange([call.wish for call in batch])
        except BaseException as error:
            for call in batch:
                if not call.answer.done():
                    call.answer.set_exception(_for_callers(error))
            if not isinstance(error, errors.StateCacheError):
                raise
            return
        for call, answer in zip(batch, answers, strict=True):
            if not call.answer.done():
                call.answer.set_result(answer)

    def _taken(self) -> list[_Call[Sent, Received]]:
        batch: list[_Call[Sent, Received]] = []
        size = 0
        while self._waiting and len(batch) < self._items_max:
            call = self._waiting[0]
            if call.answer.cancelled():
                self._waiting.popleft()
                continue
            size += self._size(call.wish)
            if batch and (size > store.BATCH_BYTES_MAX or not self._together(batch[0].wish, call.wish)):
                break
            batch.append(self._waiting.popleft())
        return batch

    async def drained(self) -> None:
        """Return when nothing is waiting or in flight."""
        while self._active:
            if self._running:
                await asyncio.wait(self._running)
            await asyncio.sleep(0.001)  # a lone caller's exchange is no task of ours; and finished runs leave the set


def _for_callers(error: BaseException) -> BaseException:
    """A pump that is torn down (its loop ends) must not look like the caller's own cancellation."""
    if isinstance(error, asyncio.CancelledError):
        return errors.UnavailableError("the client was closed while this call was in flight")
    return error


class AsyncHotStore:
    """The frequent exchanges of a ``HotStore``, with ``await``. For one event loop."""

    def __init__(
        self,
        hot: store.HotStore,
        url: str,
        socket_timeout_seconds: float,
        batch_items_max: int = store.BATCH_ITEMS_MAX,
    ) -> None:
        self.hot = hot
        self._pool = redis.asyncio.ConnectionPool.from_url(
            url,
            retry=Retry(NoBackoff(), 0),
            retry_on_error=[],
            socket_timeout=None,  # one timeout for a whole exchange, below, costs a third of theirs for each step
            socket_connect_timeout=min(socket_timeout_seconds, 2.0),
            health_check_interval=0,
            protocol=2,
            decode_responses=False,
        )
        self._timeout_seconds = socket_timeout_seconds
        self._idle: list[AsyncWire] = []
        self._closed = False
        self._items: _Pump[items.Item, items.Outcome] = _Pump(
            self._apply,
            lambda item: len(item.tail),
            lambda left, right: left.confirm == right.confirm,
            min(batch_items_max, store.BATCH_ITEMS_MAX),
        )
        self._hashes: _Pump[tuple[int, str, str], dict[bytes, bytes]] = _Pump(self._read_hashes, lambda address: 64)

    async def apply(self, item: items.Item) -> items.Outcome:
        """Apply one item, in company if there is any."""
        return await self._items.call(item)

    async def hash(self, address: tuple[int, str, str]) -> dict[bytes, bytes]:
        """The fields of one hash, read in company if there is any."""
        return await self._hashes.call(address)

    async def close(self) -> None:
        """Wait for what is in flight, then close the connections."""
        await self._items.drained()
        await self._hashes.drained()
        self._closed = True
        idle, self._idle = self._idle, []
        for line in idle:
            await line.close()

    async def _take(self) -> AsyncWire:
        if self._closed:
            raise errors.ConfigurationError("this AsyncStateCache is closed")
        if self._idle:
            return self._idle.pop()
        connection = self._pool.connection_class(**self._pool.connection_kwargs)
        await connection.connect()  # type: ignore[no-untyped-call] # redis-py does not say
        return AsyncWire(connection)

    async def _apply(self, batch: list[items.Item]) -> list[items.Outcome]:
        line: AsyncWire | None = None
        try:
            async with asyncio.timeout(self._timeout_seconds):
                line = await self._take()
                await line.send(self.hot.packed_apply(batch, line))
                outcomes = await self._outcomes(batch, line)
        except (redis.RedisError, OSError) as error:
            if line is not None:
                await line.close()
            return [failures.outcome_of(error, sent=line is not None)] * len(batch)
        except BaseException:
            if line is not None:
                await line.close()
            raise
        self._idle.append(line)
        return outcomes

    async def _outcomes(self, batch: list[items.Item], line: AsyncWire) -> list[items.Outcome]:
        confirm = store.strictest(batch)
        try:
            outcomes = store.outcomes_of(await line.read())
            self.hot.note_check(line, outcomes)
        except redis.ResponseError as error:
            self.hot.wires.distrust(line)
            outcomes = [failures.outcome_of(error, sent=True)] * len(batch)
        if confirm is None:
            return outcomes
        try:
            confirmed = store.is_confirmed(await line.read(), confirm)
        except redis.ResponseError:
            confirmed = False
        return outcomes if confirmed else store.unconfirmed(outcomes)

    async def _read_hashes(self, batch: list[tuple[int, str, str]]) -> list[dict[bytes, bytes]]:
        line: AsyncWire | None = None
        try:
            async with asyncio.timeout(self._timeout_seconds):
                line = await self._take()
                keys = [self.hot.keyspace.instance(*address) for address in batch]
                await line.send(b"".join([resp.command("HGETALL", key) for key in keys]))
                found = [store.hash_of(await _reply_or_error(line)) for _ in batch]
        except BaseException as error:
            if line is not None:
                await line.close()
            if isinstance(error, (redis.RedisError, OSError)):
                raise failures.translated(error, "HGETALL") from error
            raise
        self._idle.append(line)
        return found
