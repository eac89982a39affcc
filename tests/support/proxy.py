"""A TCP proxy between a client and a real server that misbehaves on demand, at places that a test names exactly.

Faults that need no luck: *the server has done it but the client never hears* (``drop_replies_after_forwarding``), *the
server never got it* (``cut_before_forwarding``). Both take a pattern of bytes that the request must hold
(``b"EVALSHA"``, ``b"COMMIT"``), so that the greeting of a new connection does not set them off. The others - ``cut``,
``refuse``, ``delay``, ``hold`` - hit every connection at once.

Each connection has two threads that copy bytes. A request is matched in the stream, also when it arrives in pieces.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

_CHUNK_BYTES = 65536
_POLL_SECONDS = 0.01
_SEND_TIMEOUT = struct.pack("ll", 10, 0)  # a receiver that reads nothing must not block a thread for ever
_LINGER_NOT = struct.pack("ii", 1, 0)  # makes close() send a reset


@dataclass
class _Trap:
    pattern: bytes
    left: int
    forward: bool


class Proxy:
    """Listens on a port of its own, which it keeps, and forwards to ``target_port`` on the loopback interface."""

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self.port = 0
        self.connections_made = 0
        self.faults_done = 0
        self._lock = threading.Lock()
        self._links: set[_Link] = set()
        self._trap: _Trap | None = None
        self._delay_seconds = 0.0
        self._held = False
        self._listener: socket.socket | None = None
        self._listen()

    def url(self, real_url: str) -> str:
        """``real_url`` with the proxy's port in the place of the server's."""
        return real_url.replace(f":{self.target_port}/", f":{self.port}/")

    # ---------------------------------------------------------------------------------------------------------- faults

    def pass_through(self) -> None:
        """Behave: end every fault that is on, and let go what is held or delayed."""
        with self._lock:
            self._trap = None
        self._held = False
        self._delay_seconds = 0.0
        if self._listener is None:
            self._listen()

    def drop_replies_after_forwarding(self, n: int = 1, matching: bytes = b"") -> None:
        """For the next ``n`` requests that hold ``matching``: forward them, swallow the reply, reset the connection.

        When the client sees the reset, the server has done all that it was sent. What the client sent after that
        request is not forwarded.
        """
        with self._lock:
            self._trap = _Trap(matching, n, forward=True)

    def cut_before_forwarding(self, n: int = 1, matching: bytes = b"") -> None:
        """For the next ``n`` requests that hold ``matching``: reset the connection, the server gets nothing of them."""
        with self._lock:
            self._trap = _Trap(matching, n, forward=False)

    def cut(self) -> None:
        """Reset all connections that there are; when it returns they are gone. New ones are served."""
        with self._lock:
            links = list(self._links)
            self.faults_done += len(links)
        for link in links:
            link.reset()
        for link in links:
            link.join()

    def refuse(self) -> None:
        """Stop listening, so that new connections are refused, and cut those that there are."""
        self._stop_listening()
        self.cut()

    def delay(self, seconds: float) -> None:
        """Hold back each piece of data, of both directions, for so long."""
        self._delay_seconds = seconds

    def hold(self) -> None:
        """Forward nothing, of both directions, and close nothing: a network that swallows packets."""
        self._held = True

    def go_on(self) -> None:
        """Let go what is held or delayed; a trap that is set stays."""
        self._held = False
        self._delay_seconds = 0.0

    # ------------------------------------------------------------------------------------------------------- machinery

    def close(self) -> None:
        self.pass_through()
        self._stop_listening()
        self.cut()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _listen(self) -> None:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen()
        self.port = listener.getsockname()[1]
        self._listener = listener
        self._acceptor = threading.Thread(target=self._accept, args=(listener,), name="proxy", daemon=True)
        self._acceptor.start()

    def _stop_listening(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes the thread in accept, which closing does not
            self._acceptor.join()
            listener.close()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self.target_port))
            except OSError:
                _reset(client)
                continue
            link = _Link(self, client, server)
            with self._lock:
                self.connections_made += 1
                self._links.add(link)
            link.start()

    def _wait_for_turn(self, is_cut: threading.Event) -> None:
        came = time.monotonic()
        while self._held or time.monotonic() < came + self._delay_seconds:
            if is_cut.wait(_POLL_SECONDS):
                return

    def _pattern_bytes(self) -> int:
        with self._lock:
            return len(self._trap.pattern) if self._trap else 0

    def _sprung(self, request: bytes) -> _Trap | None:
        with self._lock:
            trap = self._trap
            if trap is None or trap.left == 0 or trap.pattern not in request:
                return None
            trap.left -= 1
            self.faults_done += 1
            return trap

    def _forget(self, link: _Link) -> None:
        with self._lock:
            self._links.discard(link)


class _Link:
    """One forwarded connection: a thread for each direction; the second to end closes both sockets."""

    def __init__(self, proxy: Proxy, client: socket.socket, server: socket.socket) -> None:
        self._proxy = proxy
        self._client = client
        self._server = server
        self._is_cut = threading.Event()
        self._swallow_replies = False
        self._lock = threading.Lock()
        self._threads_left = 2
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _SEND_TIMEOUT)
        self._threads = [self._thread(self._copy_requests), self._thread(self._copy_replies)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join()

    def reset(self) -> None:
        """Let both connections end with a reset, as soon as both threads are out of them."""
        self._is_cut.set()
        for end in (self._client, self._server):
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
                end.shutdown(socket.SHUT_RD)  # wakes the thread that reads it

    def _copy_requests(self) -> None:
        seen = b""
        while data := self._read(self._client):
            seen += data
            trap = self._proxy._sprung(seen)
            if trap is not None and not trap.forward:
                self.reset()
                return
            if trap is not None:
                self._swallow_replies = True
                self._server.sendall(data)
                break
            self._server.sendall(data)
            keep = self._proxy._pattern_bytes() - 1
            seen = seen[-keep:] if keep > 0 else b""
        # The server does all that it has received before it notices this, and only then closes its side.
        self._server.shutdown(socket.SHUT_WR)

    def _copy_replies(self) -> None:
        while data := self._read(self._server):
            if not self._swallow_replies:
                self._client.sendall(data)
        if self._swallow_replies:
            self.reset()
        else:
            self._client.shutdown(socket.SHUT_WR)

    def _read(self, end: socket.socket) -> bytes:
        data = end.recv(_CHUNK_BYTES)
        if data:
            self._proxy._wait_for_turn(self._is_cut)
        return b"" if self._is_cut.is_set() else data

    def _thread(self, copy: Callable[[], None]) -> threading.Thread:
        def run() -> None:
            try:
                copy()
            except OSError:  # one side is gone: so is the other
                self.reset()
            with self._lock:
                self._threads_left -= 1
                if self._threads_left:
                    return
            self._client.close()
            self._server.close()
            self._proxy._forget(self)

        return threading.Thread(target=run, name="proxy-link", daemon=True)


def _reset(end: socket.socket) -> None:
    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
    end.close()
