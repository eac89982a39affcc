"""Prometheus' own programs, as judges: ``promtool`` and a real server (the Debian package ``prometheus``)."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

TIMEOUT_SECONDS = 60.0


def program(name: str) -> str:
    """The path of ``promtool`` or ``prometheus``."""
    found = shutil.which(name)
    assert found, f"{name} is not installed: apt-get install --no-install-recommends prometheus"
    return found


def promtool(*arguments: object, stdin: bytes | None = None, cwd: Path | None = None) -> None:
    """Run promtool; fail with what it says unless it is content."""
    done = subprocess.run(
        [program("promtool"), *map(str, arguments)],
        input=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=cwd,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout.decode()
