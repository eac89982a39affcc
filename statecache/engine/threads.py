"""Ending threads of which nobody knows whether they have begun."""

import threading


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
