"""What a signal's handler may do to a call: raise anywhere (KeyboardInterrupt, SystemExit, a job's timeout)."""

from __future__ import annotations

import dis
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from tests.support.waiting import wait_until


class Interrupt(BaseException):
    """What no ``except Exception`` sees."""


class JobTimeoutError(Exception):
    """What RQ's handler of SIGALRM raises is an ``Exception``."""


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


class Interruption:
    """A tracer that interrupts its thread at the ``nth`` place in a file's code where Python looks for signals: behind a call,
    at the beginning of a function, at the end of a loop's turn."""

    PLACES = frozenset({"RESUME", "CALL", "CALL_FUNCTION_EX", "JUMP_BACKWARD"})

    def __init__(self, nth: int, file: str, handler: Callable[[], object] | None = None) -> None:
        self.left = nth
        self.file = file
        self.handler = handler
        self.before: dict[Any, str] = {}

    def __call__(self, frame: Any, event: str, argument: object) -> Any:
        if frame.f_code.co_filename != self.file:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            before = self.before.get(frame)
            self.before[frame] = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            if before in self.PLACES:
                self.left -= 1
                if self.left == 0:
                    if self.handler is None:
                        raise Interrupt
                    self.handler()
        return self


def interrupted_at(
    nth: int, file: str, work: Callable[[], object], handler: Callable[[], object] | None = None
) -> bool:
    """Do something in a thread of its own that is interrupted at the ``nth`` place of a file's code; whether there was one.
    The interruption raises, or calls the ``handler`` and goes on."""
    interruption = Interruption(nth, file, handler)

    def body() -> None:
        sys.settrace(interruption)
        with suppress(Interrupt):
            work()
        sys.settrace(None)  # the thread's own end is no place of the work's

    thread = threading.Thread(target=body)
    thread.start()
    thread.join(30)
    assert not thread.is_alive(), f"hangs, interrupted at place {nth}"
    return interruption.left <= 0
