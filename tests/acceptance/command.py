"""The command line as a person has it: a process of its own, its exit code, what it printed."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from statecache import cli
from tests.support import processes

_LOGGERS = ("statecache", "workers", "statecache.engine.admission", "statecache.engine.cache")
TIMEOUT_SECONDS = 90.0
REPOSITORY = Path(__file__).parents[2]


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The one JSON document on standard output."""
        return json.loads(self.out)

    @property
    def error(self) -> dict[str, str]:
        """The error on the last line of standard error."""
        told: dict[str, str] = json.loads(self.err.splitlines()[-1])["error"]
        return told


def environment(**more: str) -> dict[str, str]:
    """This process' environment without our own variables."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("STATECACHE_")}
    return {**kept, **more}


def words(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "statecache", *map(str, arguments)]


def run(*arguments: object, env: Mapping[str, str] | None = None) -> Result:
    """Run a command to its end."""
    done = subprocess.run(
        words(*arguments),
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=environment(**(env or {})),
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return Result(done.returncode, done.stdout, done.stderr)


def run_here(*arguments: object) -> Result:
    """Run a command to its end in this process: the same code, without the second that a process takes to begin."""
    out, err = io.StringIO(), io.StringIO()
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [(one.level, list(one.handlers), one.propagate) for one in loggers]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main([str(argument) for argument in arguments])
    finally:
        for logger, (level, handlers, propagate) in zip(loggers, before, strict=True):
            logger.setLevel(level)
            logger.handlers[:] = handlers
            logger.propagate = propagate
    return Result(code, out.getvalue(), err.getvalue())


class Running(processes.Process):
    """A command that goes on; its output is in ``log``."""

    def __init__(self, folder: Path, *arguments: object) -> None:
        self.log = folder / f"{arguments[0]}.log"
        super().__init__(words(*arguments), self.log, cwd=REPOSITORY, env=environment(PYTHONUNBUFFERED="1"))

    @property
    def printed(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def documents(self) -> list[Any]:
        """The whole lines of JSON printed so far."""
        return [json.loads(line) for line in self.printed.splitlines() if line.startswith("{") and line.endswith("}")]

    def wait(self, timeout_seconds: float = 60.0) -> int:
        """Wait for its end; returns the exit code (negative: the signal)."""
        return self._popen.wait(timeout_seconds)
