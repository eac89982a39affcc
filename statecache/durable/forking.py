"""SQLite and forks: a process forks only while none of its threads is inside of SQLite.

SQLite has locks that are the whole process', its allocator's among them. A child inherits them as they are, and one that
another thread of the parent held at that moment is held in the child for ever: its first statement never ends, whatever
timeout it has, and nothing lets a child begin with SQLite anew. A flusher's thread is in SQLite some twenty times a second. So
the calls that let other threads run meanwhile are noted, and a fork waits until there are none, and lets none begin.

It waits for a second at most: one that takes longer waits for another process' lock on the file, most likely, and sleeps
without a lock of the whole process.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterable
from typing import Any, Self

_WAIT_SECONDS = 1.0
_PAUSE_SECONDS = 0.0005


class Gate:
    """Who is inside, and that nobody comes in while it is shut. ``with gate:`` for one call; these are not nested."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a signal's handler may fork where its thread holds it
        self._inside: dict[int, None] = {}
        self._shut = False

    def __enter__(self) -> None:
        with self._lock:
            self._inside[threading.get_ident()] = None

    def __exit__(self, *exception: object) -> None:
        self._inside.pop(threading.get_ident(), None)

    def shut(self) -> None:
        """Wait until no other thread is inside, or for as long as there is any sense in it; keep them out from then on."""
        deadline = time.monotonic() + _WAIT_SECONDS
        self._shut = self._lock.acquire(timeout=_WAIT_SECONDS)
        while self._inside.keys() - {threading.get_ident()} and time.monotonic() < deadline:
            time.sleep(_PAUSE_SECONDS)

    def open(self) -> None:
        """Let them in again."""
        if self._shut:
            self._shut = False
            self._lock.release()


_gate = Gate()


def _begin_anew() -> None:
    global _gate  # a child's: nobody is inside, and its lock is nobody's
    _gate = Gate()


os.register_at_fork(before=lambda: _gate.shut(), after_in_parent=lambda: _gate.open(), after_in_child=_begin_anew)


class Cursor(sqlite3.Cursor):
    """A cursor whose calls are noted."""

    def execute(self, *arguments: Any) -> Self:
        with _gate:
            super().execute(*arguments)
        return self

    def executemany(self, sql: str, parameters: Iterable[Any], /) -> Self:
        with _gate:
            super().executemany(sql, parameters)
        return self

    def fetchone(self) -> Any:
        with _gate:
            return super().fetchone()

    def fetchmany(self, size: int | None = 1) -> list[Any]:
        with _gate:
            return super().fetchmany(size)

    def fetchall(self) -> list[Any]:
        with _gate:
            return super().fetchall()

    def close(self) -> None:
        with _gate:
            super().close()


class Connection(sqlite3.Connection):
    """A connection whose calls are noted, and those of its cursors: ``sqlite3.connect(..., factory=Connection)``."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        with _gate:
            super().__init__(*arguments, **named)

    def cursor(self, factory: Any = Cursor) -> Any:
        return super().cursor(factory)

    def commit(self) -> None:
        with _gate:
            super().commit()

    def rollback(self) -> None:
        with _gate:
            super().rollback()

    def close(self) -> None:
        with _gate:
            super().close()
