"""A raw connection to a server on a Unix socket: proof of which process it is, and the means to end just that one.

While the connection is open the process at its other end has not died, so its id, as the kernel tells it, has not been
given to another. Process ids from files or from memory have no such proof.

Three commands need so little of the Redis protocol that no client is used (only ``statecache.hot`` imports redis).
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import struct
import sys
import time
from pathlib import Path

logger = logging.getLogger(__name__)

ANSWER_TIMEOUT_SECONDS = 5.0
SHUTDOWN_TIMEOUT_SECONDS = 10.0
KILL_TIMEOUT_SECONDS = 5.0


def connect(path: Path) -> Lifeline | None:
    """Connect to the server that listens at ``path``; None if nobody does."""
    try:
        return Lifeline(path)
    except (FileNotFoundError, ConnectionError):
        return None


class Lifeline:
    """One connection. Its methods raise ``OSError`` (``TimeoutError`` among them) and nothing else."""

    def __init__(self, path: Path) -> None:
        self._buffer = b""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(ANSWER_TIMEOUT_SECONDS)
            self._socket.connect(str(path))
            self.pid = self._peer_pid()
        except BaseException:
            self._socket.close()
            raise

    def call(self, *words: str) -> bytes:
        """Send a command; return its reply, which must be a line (``+PONG``, ``-LOADING ...``) or a bulk string."""
        self._send(*words)
        while b"\r\n" not in self._buffer:
            self._receive()
        line, _, self._buffer = self._buffer.partition(b"\r\n")
        if not line.startswith(b"$"):
            return line
        length = int(line[1:])
        while len(self._buffer) < length + 2:
            self._receive()
        bulk, self._buffer = self._buffer[:length], self._buffer[length + 2 :]
        return bulk

    def stop(self) -> None:
        """End the process at the other end, by SHUTDOWN (its append-only file is written out), else by signals."""
        with contextlib.suppress(OSError):
            self._send("SHUTDOWN", "NOSAVE", "NOW", "FORCE")
        if self._closes_within(SHUTDOWN_TIMEOUT_SECONDS):
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self.pid <= 0:  # it lives in another container; and kill(0) would end our own process group
                break
            os.kill(self.pid, number)
            if self._closes_within(KILL_TIMEOUT_SECONDS):
                return
        logger.error("the server with process id %s could not be stopped", self.pid)

    def close(self) -> None:
        """Close the connection; the process goes on."""
        self._socket.close()

    def _peer_pid(self) -> int:
        if sys.platform == "linux":  # the id as seen from here, also when the server runs in another pid namespace
            credentials = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            return int(struct.unpack("3i", credentials)[0])
        report = self.call("INFO", "server")
        return int(report.partition(b"process_id:")[2].split(maxsplit=1)[0])

    def _send(self, *words: str) -> None:
        parts = [f"*{len(words)}\r\n", *(f"${len(word)}\r\n{word}\r\n" for word in words)]
        self._socket.sendall("".join(parts).encode("ascii"))

    def _receive(self) -> None:
        data = self._socket.recv(65536)
        if not data:
            raise ConnectionResetError("the server closed the connection")
        self._buffer += data

    def _closes_within(self, timeout_seconds: float) -> bool:
        deadline = time.monotonic() + timeout_seconds
        try:
            while (remaining := deadline - time.monotonic()) > 0:
                self._socket.settimeout(remaining)
                self._receive()
        except TimeoutError:
            return False
        except OSError:
            return True
        return False
