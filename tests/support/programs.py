"""Programs that are no wheels, with which some tests try what statecache says of itself or survives."""

from __future__ import annotations

import os
import shutil

PACKAGES = {"chromium": "chromium", "prometheus": "prometheus", "promtool": "prometheus", "strace": "strace"}
"""Each program and its package in Debian."""
ARE_REQUIRED = os.environ.get("STATECACHE_TEST_PROGRAMS") == "required"
"""As in CI: what needs a program that is not here fails. Otherwise it is skipped, so that ``make test`` works with Python and
make alone, and says what it left out."""


def missing(names: tuple[str, ...]) -> str:
    """What to install for these programs; empty where they are all here."""
    absent = [name for name in names if shutil.which(name) is None]
    packages = " ".join(sorted({PACKAGES[name] for name in absent}))
    return f"{', '.join(absent)} not installed (apt-get install --no-install-recommends {packages})" if absent else ""


def path(name: str) -> str:
    found = shutil.which(name)
    assert found, missing((name,))
    return found
