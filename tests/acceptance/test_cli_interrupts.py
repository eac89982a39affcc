"""Ctrl-C ends a command without a traceback, wherever it hits, also a place from which no exception comes out."""

from __future__ import annotations

import importlib.abc
import signal
import subprocess
import sys

import pytest

from statecache import cli

PROGRAM = """
import os, signal, time
from statecache.cli import app

class Raises:
    def __del__(self):
        {raised}

def command(words, **options):
    one = Raises()
    del one
    for _ in range(1000):
        time.sleep(0.001)

app.typer.main.get_command = lambda _: command
raise SystemExit(app.run([]))
"""


def ended(raised: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.format(raised=raised)], capture_output=True, text=True, timeout=60, check=False
    )


def test_ctrl_c_in_a_finalizer_ends_the_command() -> None:
    result = ended(f"os.kill(os.getpid(), {int(signal.SIGINT)}); time.sleep(1)")
    assert (result.returncode, result.stderr) == (130, "")


def test_other_errors_in_a_finalizer_are_still_told() -> None:
    result = ended("raise ValueError('told')")
    assert result.returncode == 0
    assert "ValueError: told" in result.stderr


def test_ctrl_c_while_the_commands_are_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They take half a second; a person who has mistyped is quicker."""

    class Interrupts(importlib.abc.MetaPathFinder):
        def find_spec(self, name: str, *_: object) -> None:
            if name == "statecache.cli.app":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "statecache.cli.app", raising=False)
    monkeypatch.delattr("statecache.cli.app", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupts(), *sys.meta_path])
    assert cli.main(["--help"]) == 130
    assert capsys.readouterr() == ("", "")
