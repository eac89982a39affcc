"""Connections to the server: a small stack of them, taken once from redis-py's pool and used without its wrapping.

Half of what a redis-py call costs is its wrapping; ``send_packed_command`` and ``read_response`` are its public primitives.
redis-py >= 6 repeats calls by itself, which would apply a transition twice: our connections never do (``NoBackoff``, 0
retries), and a wire that failed, timed out or was cancelled is closed and never used again. So a wire has one socket for its
whole life, and its first call can be told from the others: that one asks the script to compare the server's identity.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from statecache.core import errors


class Checked(Protocol):
    """A connection of either flavour, as far as identity checks go."""

    fresh: bool
    check_sent_at: float


class Wire:
    """One connection, used by one thread at a time."""

    __slots__ = ("check_sent_at", "connection", "fresh", "pid")

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self.fresh = True
        self.check_sent_at = 0.0
        self.pid = os.getpid()

    def send(self, packed: bytes) -> None:
        self.connection.send_packed_command((packed,))

    def read(self, timeout_seconds: float | None = None) -> Any:
        """One reply, bytes undecoded. Error replies are raised. Without a timeout the connection's counts."""
        if timeout_seconds is None:
            return self.connection.read_response(disable_decoding=True)
        return self.connection.read_response(disable_decoding=True, timeout=timeout_seconds)

    def read_many(self, count: int) -> list[Any]:
        """So many replies. An error reply stands in its place: those behind it must be read before the wire is used again."""
        read = self.connection.read_response
        replies: list[Any] = []
        while len(replies) < count:
            try:
                while len(replies) < count:
                    replies.append(read(disable_decoding=True))
            except redis.ResponseError as error:
                replies.append(error)
        return replies

    def read_all(self, count: int) -> list[Any]:
        """So many replies; an error reply is raised when all have been read."""
        replies = self.read_many(count)
        for reply in replies:
            if isinstance(reply, redis.ResponseError):
                raise reply
        return replies

    def call(self, packed: bytes) -> Any:
        self.send(packed)
        return self.read()

    def close(self) -> None:
        # After a fork the socket is the parent's too: redis-py then only drops our descriptor, as does this.
        with suppress(redis.RedisError, OSError):
            self.connection.disconnect()


def pool_of(url: str, socket_timeout_seconds: float) -> Any:
    """redis-py's pool for a URL, with its own retries off."""
    try:
        pool = redis.ConnectionPool.from_url(
            url,
            retry=Retry(NoBackoff(), 0),
            retry_on_error=[],
            socket_timeout=socket_timeout_seconds,
            socket_connect_timeout=min(socket_timeout_seconds, 2.0),
            health_check_interval=0,
            protocol=2,
            decode_responses=False,
        )
        pool.connection_class(**pool.connection_kwargs)  # not connected: an unknown option of the URL shows up here
        return pool
    except TypeError as error:
        raise errors.ConfigurationError(f"the Redis URL is refused, it has an option that is none: {error}") from None
    except ValueError:
        # The parser's message may hold a piece of the password: an unquoted "#" or "/" makes it look like a port.
        raise errors.ConfigurationError(
            "the Redis URL is refused: it should look like redis://user:password@host:6379/0 (special characters in the "
            "password %-encoded), with options that have valid values"
        ) from None


class Wires:
    """The stack of connections to one server. Thread-safe; a forked child starts with an empty stack."""

    def __init__(self, pool: Any) -> None:
        self.pool = pool
        self._idle: list[Wire] = []
        self._lock = threading.Lock()
        self._closed = False
        self.checked_at = 0.0
        """When the last identity check was sent, by ``time.monotonic``."""

    def take(self) -> Wire:
        """Take an idle wire, or open one. Raises redis-py's errors."""
        pid = os.getpid()
        while True:
            try:
                wire = self._idle.pop()
            except IndexError:
                break
            if wire.pid == pid:
                return wire
        if self._closed:
            raise errors.ConfigurationError("this StateCache is closed")
        # Not ``pool.get_connection``: the pool counts what it lends, and our wires are closed, never given back to it.
        connection = self.pool.connection_class(**self.pool.connection_kwargs)
        connection.connect()
        return Wire(connection)

    def give_back(self, wire: Wire) -> None:
        if self._closed:
            wire.close()
        else:
            self._idle.append(wire)

    def distrust(self, wire: Checked) -> None:
        """Forget that this wire's call compared the identity: its script did not run."""
        wire.fresh = True
        self.checked_at = 0.0

    @contextmanager
    def wire(self) -> Iterator[Wire]:
        """A wire for one exchange. It is closed when anything goes wrong, except an error reply that was read whole."""
        wire = self.take()
        try:
            yield wire
        except redis.ResponseError:
            self.give_back(wire)
            raise
        except BaseException:
            wire.close()
            raise
        self.give_back(wire)

    def discard_idle(self) -> None:
        """Close the idle wires: after a restart of the server they are dead, and only a call would find that out."""
        with self._lock:
            idle, self._idle = self._idle, []
        for wire in idle:
            wire.close()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for wire in idle:
            wire.close()

    def identity_due(self, wire: Checked, interval_seconds: float) -> bool:
        """Tell whether this call must compare the server's identity, and note that it does (``checked`` tells the end).

        The first call on a connection must, and every call later than the interval after the last check was *sent*: a
        reply says nothing about what the server became after it (protocol hole H13).
        """
        now = time.monotonic()
        if wire.fresh or now - self.checked_at > interval_seconds:
            wire.fresh = False
            wire.check_sent_at = wire.check_sent_at or now
            return True
        return False

    def checked(self, wire: Checked, *, admitted: bool) -> None:
        """The reply to a check has come. Until then, and after a refusal, other calls must check too: what a check that is
        under way will say is not known, and a server that was found untrue stays so until it is recovered."""
        self.checked_at = wire.check_sent_at if admitted else 0.0
        wire.check_sent_at = 0.0
