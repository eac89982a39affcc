"""One connection for asyncio: requests leave in the order in which they are sent, replies are handed on as they come.

redis-py makes the connection (address, TLS, authentication, database) and then leaves its transport to this protocol. Its
own way to send and read is a stack of coroutines per reply; here a reply goes from the socket to who waits for it in one step
of the loop, no task is needed, and so nothing that a caller does (be cancelled, time out) can leave half a reply behind.

A pipe is used for its whole life or not at all: what goes wrong on it ends it, with everything that is in flight told.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

import hiredis
import redis
import redis.asyncio
from redis.asyncio.retry import Retry

from statecache.hot import failures, wire


def pool_of(url: str, socket_timeout_seconds: float) -> Any:
    """``wire.pool_of`` for asyncio."""
    return wire.pool_of(url, socket_timeout_seconds, redis.asyncio.ConnectionPool, Retry)


class Pipe(asyncio.Protocol):
    """``fresh`` until a call has compared the server's identity (``hot.wire.Checked``)."""

    def __init__(
        self, connection: Any, on_reply: Callable[[Any], None], on_lost: Callable[[Pipe, Exception], None]
    ) -> None:
        self.fresh = True
        self.checks: deque[float] = deque()
        self._connection = connection
        self._on_reply = on_reply
        self._on_lost = on_lost
        self._reader = hiredis.Reader(protocolError=redis.ConnectionError, replyError=failures.error_of_reply)
        self._closed = asyncio.get_running_loop().create_future()
        self._alive = True
        # The one look behind redis-py's public surface: there is no other way to the transport that it has made.
        self._transport: asyncio.Transport = connection._writer.transport
        if self._transport.is_closing():
            raise redis.ConnectionError("the server closed the connection")
        self._transport.set_protocol(self)

    @classmethod
    async def open(
        cls,
        pool: Any,
        timeout_seconds: float,
        on_reply: Callable[[Any], None],
        on_lost: Callable[[Pipe, Exception], None],
    ) -> Pipe:
        """Connect. Raises redis-py's errors, ``OSError`` and ``TimeoutError``."""
        connection = pool.connection_class(**pool.connection_kwargs)
        try:
            async with asyncio.timeout(timeout_seconds):
                await connection.connect()
            return cls(connection, on_reply, on_lost)
        except BaseException:
            connection._close()
            raise

    def send(self, packed: bytes) -> None:
        self._transport.write(packed)

    def abort(self, error: Exception) -> None:
        """End the connection at once; everything in flight is told this error."""
        if self._alive:
            self._alive = False
            self._transport.abort()
            self._on_lost(self, error)

    async def close(self) -> None:
        """Close the connection; returns when it is."""
        self._alive = False
        self._transport.abort()  # nothing is in flight; a graceful end of TLS could wait for the server
        await self._closed

    # --- what the event loop calls -------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        try:
            while self._alive and (reply := self._reader.gets()) is not False:
                self._on_reply(reply)
        except redis.ConnectionError as error:  # not the Redis protocol: what follows cannot be told apart
            self.abort(error)

    def connection_lost(self, exc: Exception | None) -> None:
        self._connection._close()
        if not self._closed.done():
            self._closed.set_result(None)
        if self._alive:
            self._alive = False
            self._on_lost(self, exc or redis.ConnectionError("the server closed the connection"))
