"""Connections to the server: a small stack of them, opened by redis-py and then used without it.

Half of what a redis-py call costs is its wrapping, and its connection alone is a third of a ``get``: so redis-py connects
(URL, TLS, login, database), and from then on bytes go to the socket and replies come from hiredis.
redis-py >= 6 repeats calls by itself, which would apply a transition twice: our connections never do (``NoBackoff``, 0
retries), and a wire that failed, timed out or was cancelled is closed and never used again. So a wire has one socket for its
whole life, and its first calls can be told from the others: those ask the script to compare the server's identity.
A wire that served before and is found broken tells of the others: after a restart of the server, or a load balancer's limit for
idle connections, they are dead too. They are dropped with it, else each of them would cost a call one of its attempts.

A wire looks for its reply for a moment before it goes to sleep: to be woken up costs more than to look, on a virtual machine
with an idle core 60 us a call, which is more than the server's work. Where replies take longer (a list of items, a server
elsewhere, a machine with no core to spare) it looks in vain, and then rests: the more often in vain, the longer, so that a
call in some hundred still looks, and less than two looks in three are in vain.

An exchange may have a deadline. Where that comes before the connection's own timeout would, the wire is lent ``until`` then:
whatever it waits for ends there (to connect, each step of it). It waits by ``poll``, which Python calls again with the time
that is left when a signal has interrupted it. (A ``recv`` of a socket whose timeout the system keeps, ``SO_RCVTIMEO``, begins
anew each time: a process that gets signals, of a timer or of its children, would wait for a frozen server for ever.)
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections import deque
from contextlib import suppress
from typing import Any, Protocol

import hiredis
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from statecache.core import errors
from statecache.hot import failures

_READ_BYTES = 65536
_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
LOOK_SECONDS = 0.0002
EXCHANGE_SECONDS_MIN = 0.1
"""What an exchange may take however near the deadline is: an item that is cut off would be neither applied nor refused."""
_NEAR = 0.9
"""A deadline further away than this part of the connection's own timeout is not looked at: that timeout will do."""
_WAIT_SECONDS_MIN = 0.001
REST_MAX = 255
"""How many pieces of replies are slept for, at most, after one that was looked for in vain."""


class Checked(Protocol):
    """A connection of either flavour, as far as identity checks go: ``fresh`` until a check on it was answered well, ``checks``
    for each script call in flight, oldest first, when its check was sent, 0.0 where it makes none."""

    fresh: bool
    checks: deque[float]


class Wire:
    """One connection, used by one thread at a time."""

    __slots__ = (
        "_arrivals", "_connection", "_is_plain", "_limit_seconds", "_reader", "_rest", "_resting", "_socket",
        "_timeout_seconds", "checks", "fresh", "pid", "reused", "until",
    )  # fmt: skip

    def __init__(self, connection: Any, timeout_seconds: float | None) -> None:
        """``connection`` is one of redis-py's, connected; the timeout is what a piece of a reply may take from now on."""
        self._connection = connection
        # A look behind redis-py's public surface: there is no other way to the socket that it has opened.
        sock: Any = getattr(connection, "_sock", None)
        self._socket = sock
        self._reader = hiredis.Reader(protocolError=redis.ConnectionError, replyError=failures.error_of_reply)
        # One that TLS does not wrap is asked without a poll before each call, and waited for only where that gives nothing.
        self._is_plain = type(sock) is socket.socket and hasattr(socket, "MSG_DONTWAIT") and hasattr(select, "poll")
        self._rest = self._resting = 0
        self._timeout_seconds = timeout_seconds
        self._limit_seconds: float | None = -1.0  # unknown: redis-py has connected in what was left of a call's time
        if self._is_plain:
            sock.settimeout(None)
            self._arrivals = select.poll()
            self._arrivals.register(sock, select.POLLIN)
        self.until = 0.0
        """Until when the wire may be waited for (``time.monotonic``); 0.0: as long as the connection's timeout allows."""
        self.reused = False
        """Whether it was idle before this exchange."""
        self.fresh = True
        self.checks: deque[float] = deque()
        self.pid = os.getpid()

    def _seconds_left(self) -> float | None:
        """How long a piece of a request or of a reply may take that is waited for from now on; None: for ever."""
        return max(_WAIT_SECONDS_MIN, self.until - time.monotonic()) if self.until else self._timeout_seconds

    def _limit(self) -> None:
        """Have a socket that is not plain keep the time itself."""
        seconds = self._seconds_left()
        if seconds != self._limit_seconds:
            self._socket.settimeout(seconds)
            self._limit_seconds = seconds

    def send(self, packed: bytes) -> None:
        if not self._is_plain:
            self._limit()
            self._socket.sendall(packed)
            return
        try:
            count = self._socket.send(packed, socket.MSG_DONTWAIT)
        except BlockingIOError:
            count = 0
        if count < len(packed):
            self._send_rest(memoryview(packed)[count:])

    def _send_rest(self, left: memoryview) -> None:
        """What the system did not take at once."""
        room = select.poll()
        room.register(self._socket, select.POLLOUT)
        while left:
            if not room.poll(_milliseconds(self._seconds_left())):
                raise redis.TimeoutError("the server takes nothing within the socket timeout")
            with suppress(BlockingIOError):
                left = left[self._socket.send(left, socket.MSG_DONTWAIT) :]

    def read(self) -> Any:
        """One reply, bytes undecoded. Error replies are raised."""
        reply = self._reply()
        if isinstance(reply, Exception):
            raise reply
        return reply

    def read_many(self, count: int) -> list[Any]:
        """So many replies. An error reply stands in its place: those behind it must be read before the wire is used again."""
        gets, waited_for = self._reader.gets, self._reply
        replies = [waited_for() if (reply := gets()) is False else reply for _ in range(count)]
        for reply in replies:
            if isinstance(reply, Exception) and not isinstance(reply, redis.ResponseError):
                raise reply
        return replies

    def _reply(self) -> Any:
        """One reply; an error reply is returned. The timeout is one of each piece that arrives, as redis-py's is."""
        gets = self._reader.gets
        while (reply := gets()) is False:  # RESP2 has no reply that is False
            piece = (self._is_plain and self._looked_for()) or self._waited_for()
            if not piece:
                raise redis.ConnectionError("the server closed the connection")
            self._reader.feed(piece)
        return reply

    def _looked_for(self) -> bytes:
        """A piece that comes while one looks; empty if none came, or it was not tried."""
        if self._resting:
            self._resting -= 1
            return b""
        recv, clock = self._socket.recv, time.perf_counter
        until = clock() + LOOK_SECONDS
        while clock() < until:
            try:
                piece: bytes = recv(_READ_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                continue
            self._rest //= 2
            self._resting = self._rest
            return piece
        self._rest = self._resting = min(4 * self._rest + 3, REST_MAX)
        return b""

    def _waited_for(self) -> bytes:
        flags = 0
        if self._is_plain:
            self._arrivals.poll(_milliseconds(self._seconds_left()))
            flags = socket.MSG_DONTWAIT
        else:
            self._limit()
        try:
            piece: bytes = self._socket.recv(_READ_BYTES, flags)
        except (BlockingIOError, TimeoutError):
            whose = "call's" if self.until else "socket"
            raise redis.TimeoutError(f"no reply within the {whose} timeout") from None
        return piece

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
            self._connection.disconnect()


def _milliseconds(seconds: float | None) -> float | None:
    """What ``poll`` wants; None is for ever."""
    return None if seconds is None else seconds * 1000


def _close_all(idle: list[Wire]) -> None:
    """Each is taken out first: another thread may be about to take one of this list, and has either it or nothing."""
    with suppress(IndexError):
        while True:
            idle.pop().close()


def is_break(error: BaseException) -> bool:
    """Whether an error says that a connection is gone; not that its server is slow."""
    gone = isinstance(error, (redis.ConnectionError, OSError))
    return gone and not isinstance(error, (redis.TimeoutError, TimeoutError))


class EmulatedWire(Wire):
    """A connection to an emulated server, which has no socket."""

    __slots__ = ()

    def send(self, packed: bytes) -> None:
        self._connection.send_packed_command((packed,))

    def _reply(self) -> Any:
        try:
            return self._connection.read_response(disable_decoding=True)
        except redis.ResponseError as error:
            return error


def pool_of(
    url: str, socket_timeout_seconds: float, pool_class: Any = redis.ConnectionPool, retry_class: Any = Retry
) -> Any:
    """redis-py's pool for a URL, with its own retries off: what knows how to make a connection.

    Raises ``ConfigurationError`` for a URL with which none can be made, also where a file that it names cannot be read.
    """
    try:
        pool = pool_class.from_url(
            url, socket_timeout=socket_timeout_seconds, socket_connect_timeout=min(socket_timeout_seconds, 2.0)
        )
        # Behind it: what the URL asks for would go before what it is called with.
        pool.connection_kwargs.update(
            retry=retry_class(NoBackoff(), 0),
            retry_on_error=[],
            health_check_interval=0,
            protocol=2,
            decode_responses=False,
        )
        pool.connection_class(**pool.connection_kwargs)  # not connected: an unknown option of the URL shows up here
    except TypeError as error:
        raise errors.ConfigurationError(f"the Redis URL is refused, it has an option that is none: {error}") from None
    except redis.RedisError as error:  # of the connection's making, which no longer holds the URL
        raise errors.ConfigurationError(f"the Redis URL is refused: {error}") from None
    except ValueError:
        # The parser's message may hold a piece of the password: an unquoted "#" or "/" makes it look like a port.
        raise errors.ConfigurationError(
            "the Redis URL is refused: it should look like redis://user:password@host:6379/0 (special characters in the "
            "password %-encoded), with options that have valid values"
        ) from None
    for option in _FILES:
        if path := pool.connection_kwargs.get(option):
            _check_file(option, path)
    return pool


def _check_file(option: str, path: str) -> None:
    """Else every attempt to connect would fail, as if the server could not be reached."""
    try:
        with open(path, "rb") as file:
            file.read(1)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise errors.ConfigurationError(
            f"the Redis URL is refused: the file {path!r} of its option {option} cannot be read: {why}"
        ) from None


class Exchange:
    """A wire for one exchange. It is closed when anything goes wrong, except an error reply that was read whole.

    The driver's errors are translated if it is told what for (``what``). With a deadline (``time.monotonic``) it ends then, but
    not before ``EXCHANGE_SECONDS_MIN``. A class and no generator: every ``get`` makes one.
    """

    __slots__ = ("_deadline", "_what", "_wire", "_wires")

    def __init__(self, wires: Wires, what: str = "", deadline: float | None = None) -> None:
        self._wires = wires
        self._what = what
        self._deadline = deadline

    def __enter__(self) -> Wire:
        try:
            self._wire = self._wires.take(self._deadline)
        except (redis.RedisError, OSError) as error:
            self._translate(error)
            raise
        return self._wire

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, redis.ResponseError):
            self._wires.give_back(self._wire)
        else:
            self._wires.lose(self._wire, error)
        if isinstance(error, (redis.RedisError, OSError)):
            self._translate(error)

    def _translate(self, error: redis.RedisError | OSError) -> None:
        if self._what:
            raise failures.translated(error, self._what) from error


class Wires:
    """The stack of connections to one server. Thread-safe; a forked child starts with an empty stack."""

    def __init__(self, pool: Any, wire_class: type[Wire] = Wire) -> None:
        self.pool = pool
        self.wire_class = wire_class
        options = pool.connection_kwargs
        self._timeout_seconds: float | None = options.get("socket_timeout")
        self.near_seconds = float("inf") if self._timeout_seconds is None else _NEAR * self._timeout_seconds
        """How near a deadline must be for a wire to be lent with it."""
        if issubclass(wire_class, EmulatedWire):
            self.near_seconds = float("-inf")  # it answers at once
        self._idle: list[Wire] = []
        self._lock = threading.Lock()
        self._closed = False
        self.checked_at = 0.0
        """When the last identity check was sent, by ``time.monotonic``."""

    def until(self, deadline: float | None) -> float:
        """When an exchange that begins now ends at the latest, for ``Wire.until``: 0.0 where the connection's own timeout comes
        before its deadline, or soon after it."""
        if deadline is None:
            return 0.0
        now = time.monotonic()
        return 0.0 if deadline - now >= self.near_seconds else max(deadline, now + EXCHANGE_SECONDS_MIN)

    def take(self, deadline: float | None = None) -> Wire:
        """Take an idle wire, or open one, for an exchange with this deadline. Raises redis-py's errors."""
        until = self.until(deadline)
        pid = os.getpid()
        while True:
            try:
                wire = self._idle.pop()
            except IndexError:
                break
            if wire.pid == pid:
                wire.until = until
                wire.reused = True
                return wire
        if self._closed:
            raise errors.ConfigurationError("this StateCache is closed")
        wire = self.wire_class(self._connected(until), self._timeout_seconds)
        wire.until = until
        return wire

    def _connected(self, until: float) -> Any:
        """A new connection of redis-py's. Not ``pool.get_connection``: the pool counts what it lends, and our wires are closed,
        never given back to it."""
        options = self.pool.connection_kwargs
        if until:
            left = max(_WAIT_SECONDS_MIN, until - time.monotonic())
            shorter = options.get("socket_connect_timeout")
            options = {
                **options,
                "socket_timeout": left,
                "socket_connect_timeout": left if shorter is None else min(left, shorter),
            }
        connection = self.pool.connection_class(**options)
        connection.connect()
        return connection

    def give_back(self, wire: Wire) -> None:
        if self._closed:
            wire.close()
        else:
            self._idle.append(wire)

    def lose(self, wire: Wire, error: BaseException) -> None:
        """Close a wire after an error; and if it broke that had served before, the idle ones with it."""
        wire.close()
        if is_break(error) and wire.reused:
            self.discard_idle()

    def distrust(self, wire: Checked) -> None:
        """The oldest call in flight on this wire has not compared the identity: its script did not run."""
        wire.checks.popleft()
        self.checked(wire, 0.0)

    def wire(self, deadline: float | None = None) -> Exchange:
        """A wire for one exchange (a context manager), which raises redis-py's errors."""
        return Exchange(self, deadline=deadline)

    def discard_idle(self) -> None:
        """Close the idle wires: after a restart of the server they are dead, and only a call would find that out."""
        with self._lock:
            idle, self._idle = self._idle, []
        _close_all(idle)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        _close_all(idle)

    def identity_due(self, wire: Checked, interval_seconds: float) -> float:
        """When the next call on this wire compares the server's identity, for ``wire.checks``: now, or 0.0 if it need not.

        All calls on a connection must until one has been answered well, and every call later than the interval after the last
        check was *sent*: a reply says nothing about what the server became after it (protocol hole H13).
        """
        now = time.monotonic()
        return now if wire.fresh or now - self.checked_at > interval_seconds else 0.0

    def checked(self, wire: Checked, sent_at: float) -> None:
        """The check that was sent then was answered well; 0.0: the server refused, or cannot have looked. Until a check is
        answered other calls must check too: what it will say is not known, and a server that was found untrue stays so
        until it is recovered, whatever those say that are connected to another."""
        self.checked_at = sent_at
        wire.fresh = not sent_at
