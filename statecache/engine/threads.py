"""Threads: ending those of which nobody knows whether they have begun, and waking others from wherever one is.

``threading.Event`` has a plain lock around its own, so a signal's handler that sets or asks one which its own thread is just
setting, or waiting for, waits for ever. Those that a handler's call may come to are made here.
"""

import contextlib
import threading
from collections.abc import Callable
from typing import Any


class Bell:
    """Wakes one thread, once for each time that it was rung (or more often): nothing but a lock, so that no ring is lost."""

    def __init__(self) -> None:
        self._silent = threading.Lock()
        self._silent.acquire()

    def set(self) -> None:
        """Ring; no harm if it rings already."""
        with contextlib.suppress(RuntimeError):
            self._silent.release()

    def wait(self, timeout_seconds: float = -1.0) -> bool:
        """Wait for a ring, and take it; False if none came in time."""
        return self._silent.acquire(timeout=timeout_seconds)

    def is_set(self) -> bool:
        """Whether it rings."""
        return not self._silent.locked()

    def clear(self) -> None:
        """Take a ring that nobody waited for."""
        self._silent.acquire(blocking=False)


class Bells:
    """Who waits for a change, in the place of a ``threading.Condition``: its lock is taken and left by functions in Python, and
    who is interrupted in them would hold it for ever. The change, and the ``ring`` behind it, are made under ``lock``."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._bells: dict[Bell, None] = {}

    def ring(self) -> None:
        """Wake all who wait."""
        for bell in list(self._bells):
            bell.set()

    def wait(self, is_over: Callable[[], bool], timeout_seconds: float) -> bool:
        """Wait for a ring, unless there is nothing to wait for; False if none came in time."""
        bell = Bell()
        try:
            with self.lock:
                if is_over():
                    return True
                self._bells[bell] = None
            return bell.wait(timeout_seconds)
        finally:
            self._bells.pop(bell, None)


class Event(threading.Event):
    """An event to which its own thread may come a second time, and that a handler which raises leaves usable.

    A waiter that a handler interrupts with ``set`` in the midst of lying down, or a ``set`` that is interrupted itself, leaves
    some asleep to their timeout: for waits that are short.
    """

    def __init__(self) -> None:
        super().__init__()
        self._bells = Bells()

    def set(self) -> None:
        with self._bells.lock:
            self._flag = True
            self._bells.ring()

    def clear(self) -> None:
        self._flag = False

    def wait(self, timeout: float | None = None) -> bool:
        return self._bells.wait(self.is_set, -1.0 if timeout is None else max(0.0, timeout)) or self._flag


def is_held_here(lock: Any) -> bool:
    """Whether this thread holds an ``RLock``: as ``threading.Condition`` asks, for nothing public tells."""
    return bool(lock._is_owned())


def join(thread: threading.Thread, timeout_seconds: float | None = None) -> None:
    """``thread.join``, also for a thread whose ``start`` was cut off.

    Ctrl-C while ``Thread.start`` waits for the new thread's first step leaves a thread that ``join`` refuses as not begun, and
    that may begin a moment later. Call this only after what the thread looks at first says that it has to stop.
    """
    try:
        thread.join(timeout_seconds)
    except RuntimeError:
        if thread is threading.current_thread():
            raise
