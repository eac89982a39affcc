"""The only place where tests sleep, and the one from which they are interrupted."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


def wait_until(
    condition: Callable[[], T], description: str, timeout_seconds: float = 10.0, interval_seconds: float = 0.01
) -> T:
    """Call ``condition`` until it returns something true, and return that.

    The timeout is there to end a test that hangs, not to measure: generous, and never an assertion about speed. On
    expiry the test fails with ``description``.
    """
    deadline = time.monotonic() + timeout_seconds
    while not (result := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout_seconds} s in vain for: {description}")
        time.sleep(interval_seconds)
    return result


@contextmanager
def interrupted_when(kind: type[BaseException], condition: Callable[[], object]) -> Iterator[None]:
    """Let a signal's handler raise this in the main thread, wherever that is, when the condition holds."""

    def handler(number: int, frame: object) -> None:
        raise kind

    def interrupt() -> None:
        wait_until(condition, "the moment of the interruption")
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)  # type: ignore[arg-type]

    before = signal.signal(signal.SIGUSR1, handler)
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        yield
    finally:
        thread.join()
        signal.signal(signal.SIGUSR1, before)
