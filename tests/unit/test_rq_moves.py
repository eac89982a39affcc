"""What ``statecache.contrib.rq`` makes of two looks at a job: from any state to whatever RQ says, by declared moves only."""

from __future__ import annotations

import itertools

import pytest

from statecache.contrib import rq

STATES = tuple(rq.RqJob.definition.states)
STATUSES = ("", *rq._STATES)
EARLY, LATE = "2026-01-01T00:00:00.000001Z", "2026-01-01T00:00:09.000002Z"


def _end(state: str, found: list[rq.Move]) -> str:
    """Where the moves lead; each must be one that the machine declares."""
    for move in found:
        target = _target(state, move.event)
        assert target is not None, f"{move.event} does not leave {state}: {found}"
        state = target
    return state


def _target(state: str, event: str) -> str | None:
    for one in rq.RqJob.spec.events:
        if one.name == event:
            for arc in one.transitions:
                if arc.source == state:
                    return arc.target
    return None


@pytest.mark.parametrize("state", [one for one in STATES if one not in ("finished", "forgotten")])
def test_from_any_state_to_whatever_rq_says(state: str) -> None:
    for status, started, left, returned, repeats in itertools.product(
        STATUSES, ("", EARLY, LATE), (None, 3, 1), (0, 2), (None, 4, 3)
    ):
        seen = {"run": EARLY, "retries_left": 3, "repeats_left": 4}
        facts = rq.Facts(status, "q", "f", "w", started or EARLY, started, LATE, left, returned, repeats)
        end = _end(state, list(rq.moves(state, seen, facts)))
        if status != "created":  # nothing leads back there
            assert end == rq._STATES.get(status, "forgotten"), (status, started, left, returned, repeats)


@pytest.mark.parametrize("state", ["finished", "forgotten"])
def test_nothing_leaves_the_end(state: str) -> None:
    """Not even a job of the same id, which RQ takes at any time."""
    for status in STATUSES:
        facts = rq.Facts(status, "q", "f", "w", LATE, LATE, LATE, 1, 2, 3)
        assert list(rq.moves(state, {"run": EARLY, "retries_left": 3, "repeats_left": 4}, facts)) == []


@pytest.mark.parametrize("status", [one for one in rq._STATES if one != "created"])
def test_a_second_look_finds_nothing_new(status: str) -> None:
    """What was recorded of the first look explains the second."""
    facts = rq.Facts(status, "q", "f", "w", EARLY, LATE, LATE, 1, 2, 3)
    data: dict[str, object] = {"retries_left": 3, "repeats_left": 4}
    found = list(rq.moves("created", data, facts))
    for move in found:
        data.update(move.data)
    assert list(rq.moves(_end("created", found), data, facts)) == []
    events = [move.event for move in found]
    assert events.count("retry") >= 4
    assert events.count("repeat") == 1
