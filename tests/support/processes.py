"""Server processes of the tests: each ended by the one who started it, by its pid, whatever happens to the tests."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.support import waiting


class Process:
    """One child process, its output appended to ``log``.

    ``last_resort`` is the signal that ends it and its children when the test process itself has died.
    """

    def __init__(
        self, command: Sequence[str], log: Path, *, last_resort: signal.Signals = signal.SIGKILL, **options: Any
    ) -> None:
        with log.open("ab") as output:
            self._popen = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True, **options
            )
        self.pid = self._popen.pid
        _guardian.add(self.pid, last_resort)

    @property
    def alive(self) -> bool:
        ended = self._popen.poll() is not None
        if ended:
            _guardian.remove(self.pid)
        return not ended

    def send(self, number: signal.Signals) -> None:
        """Send it a signal. Without effect once it has ended: ``Popen`` knows, so a reused pid is not hit."""
        self._popen.send_signal(number)

    def end(self, *signals: signal.Signals, timeout_seconds: float = 20.0) -> None:
        """Send each signal in turn until one has ended it; a stopped process is continued after each."""
        for number in signals:
            self.send(number)
            self.send(signal.SIGCONT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(timeout_seconds)
                break
        else:
            raise AssertionError(f"process {self.pid} survived {[number.name for number in signals]}")
        _guardian.remove(self.pid)

    def send_to_children(self, number: signal.Signals) -> list[psutil.Process]:
        """Send a signal to all processes that it has started; return them."""
        try:
            children = psutil.Process(self.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(number)
        return children


def is_running(pid: int) -> bool:
    """Whether there is such a process, a zombie not counting as one."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until_ended(pids: Iterable[int], description: str) -> None:
    left = list(pids)
    waiting.wait_until(lambda: not any(is_running(pid) for pid in left), description)


def mentioning(text: str) -> list[psutil.Process]:
    """The processes whose command line holds ``text``: a folder that only one test uses finds all that it left."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and any(text in word for word in process.cmdline()):
                found.append(process)
    return found


def free_port() -> int:
    """A port of the loopback interface that was free a moment ago: another process may take it first, so retry."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class _Guardian:
    """Our end of the pipe to ``guardian.py``, one per test process, started with its first server."""

    def __init__(self) -> None:
        self._popen: subprocess.Popen[str] | None = None
        self._owner = 0

    def add(self, pid: int, number: signal.Signals) -> None:
        if self._popen is None or self._owner != os.getpid():
            script = Path(__file__).with_name("guardian.py")
            self._popen = subprocess.Popen(
                [sys.executable, "-E", "-S", str(script)], stdin=subprocess.PIPE, text=True, start_new_session=True
            )
            self._owner = os.getpid()
            atexit.register(self._close, self._popen, self._owner)
        self._write(f"+{pid} {int(number)}")

    def remove(self, pid: int) -> None:
        if self._owner == os.getpid():
            self._write(f"-{pid}")

    def _write(self, line: str) -> None:
        assert self._popen is not None
        assert self._popen.stdin is not None
        self._popen.stdin.write(line + "\n")
        self._popen.stdin.flush()

    @staticmethod
    def _close(popen: subprocess.Popen[str], owner: int) -> None:
        if os.getpid() == owner and popen.stdin is not None:
            popen.stdin.close()
            popen.wait()


_guardian = _Guardian()
