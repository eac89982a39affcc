"""The only place where tests sleep."""

from __future__ import annotations

import time
from collections.abc import Callable
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
