"""What systemd is told (``Type=notify``): ready, what is going on, a sign of life, stopping. Nothing, unless it asked for it.

The protocol is one datagram of ``NAME=value`` lines to a Unix socket (sd_notify(3)). A socket that is not there is no reason to
stop: it is logged once. The sign of life is given by whoever calls ``turn``, and that is the loop of the flusher, and a
recovery within it: one that hangs falls silent, and systemd starts it again. A recovery may come before the loop does, too,
and take longer than a start may: ``starting`` asks for more time.
"""

from __future__ import annotations

import logging
import socket
import time

_log = logging.getLogger(__name__)
_STATUS_SECONDS = 5.0
_START_SILENCE_SECONDS = 180
"""How long nothing may be heard from a recovery at the start: more than its longest transaction."""


class Notifier:
    """Tells systemd how we are. ``address``: its socket (None: nobody wants to know); ``watchdog_seconds``: how long without
    a sign of life it takes for dead (None: it does not look)."""

    def __init__(self, address: str | None, watchdog_seconds: float | None = None) -> None:
        self._address = address
        self._beat_seconds = watchdog_seconds / 4 if watchdog_seconds else None
        self._beat_at = 0.0
        self._status_at = 0.0
        self._ready = False
        self._failed = False

    def starting(self) -> None:
        """Say that a recovery is under way before we can be ready, and may go on."""
        self._send([f"EXTEND_TIMEOUT_USEC={_START_SILENCE_SECONDS * 1_000_000}", "STATUS=recovering"])

    def turn(self, status: str) -> None:
        """Say that the loop turns, as often as is wanted; the first time, that everything is ready."""
        now = time.monotonic()
        lines = []
        if not self._ready:
            lines.append("READY=1")
        if self._beat_seconds is not None and now - self._beat_at >= self._beat_seconds:
            lines.append("WATCHDOG=1")
            self._beat_at = now
        if not self._ready or now - self._status_at >= _STATUS_SECONDS:
            lines.append(f"STATUS={status}")
            self._status_at = now
        self._ready = True
        self._send(lines)

    def stopping(self, status: str) -> None:
        """Say that the end has begun."""
        self._send(["STOPPING=1", f"STATUS={status}"])

    def _send(self, lines: list[str]) -> None:
        if self._address is None or not lines:
            return
        # "@" stands for the NUL that begins the name of an abstract socket.
        place = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.settimeout(1.0)
                sender.sendto("\n".join(lines).encode(), place)
        except OSError as error:
            if not self._failed:
                _log.warning("systemd cannot be told at %s: %s", self._address, error)
            self._failed = True
