"""``docs/testing.md`` names only what is there, and leaves nothing out."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "testing.md").read_text()


def test_page_is_true() -> None:
    """Every test that it names exists, every file, and every target of make."""
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    defined = set(re.findall(r"^def (test_\w+)\(", sources, re.MULTILINE))
    assert set(re.findall(r"`(test_\w+)`", PAGE)) - defined == set()
    assert [
        path for path in re.findall(r"(?:tests|statecache)/[\w/]+(?:\.py)?", PAGE) if not (ROOT / path).exists()
    ] == []
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([\w-]+)", PAGE)) - targets == set()


def test_page_is_complete() -> None:
    assert [int(n) for n in re.findall(r"^\| P(\d+) ", PAGE, re.MULTILINE)] == list(range(1, 13))
    assert [int(n) for n in re.findall(r"^\| H(\d+) ", PAGE, re.MULTILINE)] == list(range(1, 19))
    assert [int(n) for n in re.findall(r"^\| (\d+) \w", PAGE.partition("## Fault to tests")[2], re.MULTILINE)] == list(
        range(1, 58)
    )
