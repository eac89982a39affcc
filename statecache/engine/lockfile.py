"""A file locked by ``flock``: among processes, dropped by the kernel when its holder dies.

A lock on a file that was deleted or replaced meanwhile keeps nobody out, so each acquisition ends by looking whether
the path still leads to the locked file, and begins anew if not.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import time
from collections.abc import Iterator
from pathlib import Path

from statecache.core import errors

_POLL_SECONDS = 0.01  # flock has no timeout of its own


class LockFile:
    """One holder's handle of a lock file. Not thread-safe. Made when first acquired; never deleted."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: io.FileIO | None = None

    @contextlib.contextmanager
    def held(self, deadline: float) -> Iterator[None]:
        """Hold it exclusively. ``UnavailableError`` if others hold it beyond ``deadline`` (by ``time.monotonic``)."""
        self._acquire(fcntl.LOCK_EX, deadline)
        try:
            yield
        finally:
            if self._file is not None:  # unlocked, not only closed: a child forked meanwhile may hold a copy
                fcntl.flock(self._file, fcntl.LOCK_UN)

    def share(self, deadline: float) -> None:
        """Hold it together with others, until ``close``."""
        self._acquire(fcntl.LOCK_SH, deadline)

    def try_exclusive(self) -> bool:
        """Turn a share into the exclusive lock if nobody else has a share. If somebody has, ours may be lost."""
        try:
            self._acquire(fcntl.LOCK_EX, deadline=0.0)
        except errors.UnavailableError:
            return False
        return True

    def close(self) -> None:
        """Let go of it. In a forked child that closes a copy only: the parent's lock stays."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def release(self) -> None:
        """Unlock and close: a copy in a child (forked a moment ago, not at its exec yet) holds it no longer."""
        if self._file is not None:
            fcntl.flock(self._file, fcntl.LOCK_UN)
            self.close()

    def _acquire(self, kind: int, deadline: float) -> None:
        while True:
            file = self._current()
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    message = f"{self._path} has been locked by another process for too long"
                    raise errors.UnavailableError(message) from None
                time.sleep(_POLL_SECONDS)
                continue
            if self._leads_to(file):
                return

    def _current(self) -> io.FileIO:
        if self._file is None or not self._leads_to(self._file):
            self.close()
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._file = io.FileIO(descriptor, "r+")
        return self._file

    def _leads_to(self, file: io.FileIO) -> bool:
        try:
            return os.path.samestat(os.fstat(file.fileno()), self._path.stat())
        except FileNotFoundError:
            return False
