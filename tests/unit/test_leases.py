"""Who should hold how many partitions, and which flushers are known to be gone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statecache.cli import output
from statecache.durable.leases import FlusherRow
from statecache.engine import leases, processes


@given(st.dictionaries(st.text("abcdef", min_size=1, max_size=4), st.integers(0, 20), min_size=1), st.integers(1, 64))
def test_shares_are_fair_and_whole(held: dict[str, int], partitions: int) -> None:
    shares = leases.shares(held, partitions)
    assert sum(shares.values()) == partitions
    assert max(shares.values()) - min(shares.values()) <= 1


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8))
def test_fair_holdings_stay_where_they_are(extra: list[int]) -> None:
    """Who has the odd partition keeps it: nothing moves without need."""
    held = {f"f{place}": 2 + (one > 4) for place, one in enumerate(extra)}
    assert leases.shares(held, sum(held.values())) == held


def _row(pid: int, place: str) -> FlusherRow:
    return FlusherRow("one", "host", pid, place, 0, 0, 1000, True)


def test_a_process_is_gone_only_where_its_id_means_something() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    here = processes.place()
    assert here
    assert leases.has_ended(_row(child.pid, here))
    assert not leases.has_ended(_row(os.getpid(), here))
    assert not leases.has_ended(_row(1, here))  # another user's
    for elsewhere in ("", "another boot pid:[4026531836]"):
        assert not leases.has_ended(_row(child.pid, elsewhere))


@pytest.mark.parametrize(("numbers", "text"), [((), ""), ((3,), "3"), ((0, 1, 2, 5), "0-2, 5"), ((1, 3, 4), "1, 3-4")])
def test_ranges(numbers: tuple[int, ...], text: str) -> None:
    assert output.ranges(numbers) == text
