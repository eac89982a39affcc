"""Ctrl-C that hits a place from which no exception comes out ends the command all the same."""

from __future__ import annotations

import signal
import subprocess
import sys

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
