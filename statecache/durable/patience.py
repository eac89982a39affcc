"""How long to wait for SQL where nothing else ends the wait: a server whose processes are frozen while its machine answers.

No driver has a limit of its own for a statement that is under way, and a frozen server keeps none of those that it was given.
So a thread watches the connections at work, and shuts the socket of one that is past its time: its statement fails like one
whose server has died. A read has until the deadline that its thread was given (``until``), and a little more; without one, as
long as a transaction. Watching costs some microseconds, and the thread sleeps until the next time that may matter.

Only connections that tell their socket (``fileno``: psycopg, psycopg2) are watched. SQLite has no server.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import math
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa

GRACE_SECONDS = 0.5
"""A statement has so long, however near the deadline is; what is asked anew each time would never be answered else."""

_ENDED_MIN = 1000


class Watch:
    """A connection at work, by a descriptor of its own to its socket. ``is_cut`` when it ran out of its time."""

    __slots__ = ("descriptor", "is_cut")

    def __init__(self, descriptor: int) -> None:
        self.descriptor: int | None = descriptor
        self.is_cut = False


class Patience:
    """The watched connections of one ``Database``. Thread-safe; in a forked child, make another one."""

    def __init__(self) -> None:
        self._of_thread = threading.local()
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        """Never entered itself: that is a function in Python, in which a signal's handler may raise with the lock taken."""
        self._watched: list[tuple[float, int, Watch]] = []
        self._numbers = itertools.count()
        self._ended = 0
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def until(self, deadline: float | None) -> Iterator[None]:
        """What this thread reads meanwhile ends soon after ``deadline``, a ``time.monotonic`` time (None: as usual)."""
        before = getattr(self._of_thread, "deadline", None)
        self._of_thread.deadline = deadline
        try:
            yield
        finally:
            self._of_thread.deadline = before

    def left(self, otherwise: float = math.inf) -> float:
        """The seconds that a read of this thread has from now on."""
        deadline = getattr(self._of_thread, "deadline", None)
        return otherwise if deadline is None else max(0.0, deadline - time.monotonic()) + GRACE_SECONDS

    def begin(self, connection: sa.Connection, seconds: float) -> Watch | None:
        """Watch a connection until ``end``; None if there is nothing to watch."""
        driver: Any = connection.connection.driver_connection
        if seconds == math.inf or not hasattr(driver, "fileno"):
            return None
        try:
            watch = Watch(os.dup(driver.fileno()))  # its number would be another one's when the driver has closed it
        except Exception:  # closed: its statement will tell
            return None
        with self._lock:
            heapq.heappush(self._watched, (time.monotonic() + seconds, next(self._numbers), watch))
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="statecache-sql-patience", daemon=True)
                with contextlib.suppress(RuntimeError):  # none to be had: the next one tries again
                    thread.start()
                    self._thread = thread
            elif self._watched[0][2] is watch:
                self._changed.notify()
        return watch

    def end(self, watch: Watch | None) -> bool:
        """The connection is not at work any more; True if it was cut off."""
        if watch is None:
            return False
        with self._lock:
            descriptor, watch.descriptor = watch.descriptor, None
            self._ended += 1
            if self._ended > max(_ENDED_MIN, len(self._watched) // 2):  # under long deadlines they would pile up
                self._watched = [one for one in self._watched if one[2].descriptor is not None]
                heapq.heapify(self._watched)
                self._ended = 0
        if descriptor is not None:
            os.close(descriptor)
        return watch.is_cut

    def close(self) -> None:
        """End the thread; what is at work is not watched any more."""
        with self._lock:
            self._watched.clear()
            thread, self._thread = self._thread, None
            self._changed.notify()
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        """Until nothing is left to watch: a client that nobody closed leaves no thread behind."""
        with self._lock:
            while self._thread is threading.current_thread():
                now = time.monotonic()
                while self._watched and self._watched[0][0] <= now:
                    _cut(heapq.heappop(self._watched)[2])
                if not self._watched:
                    self._thread = None
                    return
                self._changed.wait(self._watched[0][0] - now)


def _cut(watch: Watch) -> None:
    descriptor, watch.descriptor = watch.descriptor, None
    if descriptor is None:  # it has ended
        return
    watch.is_cut = True
    with contextlib.suppress(OSError), socket.socket(fileno=descriptor) as one:
        one.shutdown(socket.SHUT_RDWR)
