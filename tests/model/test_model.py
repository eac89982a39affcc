"""The model in its small scopes: each hole comes back without its rule, and none is there with all rules on."""

from __future__ import annotations

import dataclasses
import re

import pytest

from tests.model import configurations, holes
from tests.model.explore import Result, explore, play
from tests.model.holes import Hole
from tests.model.state import State
from tests.model.world import Rules, World

HOLES = holes.holes()
SMALL = configurations.small()
STATES_MAX = 60_000
"""Far above what any of these needs: a world that grows past it has outgrown this suite."""


def _assert_complete(result: Result) -> None:
    assert result.violation is None, "\n" + result.story()
    assert result.complete, f"{result.states} states were not enough"
    assert not result.unreached, f"no step was {result.unreached}: the exploration shows nothing"


@pytest.mark.parametrize("hole", HOLES, ids=[one.name for one in HOLES])
def test_hole_comes_back_without_its_rule(hole: Hole) -> None:
    result = explore(hole.world, states_max=STATES_MAX)
    assert result.violation is not None, f"no violation in {result.states} states"
    assert result.violation.promise == hole.promise, "\n" + result.story()


@pytest.mark.parametrize("hole", HOLES, ids=[one.name for one in HOLES])
def test_hole_is_closed_with_all_rules_on(hole: Hole) -> None:
    _assert_complete(explore(holes.mended(hole), states_max=STATES_MAX))


@pytest.mark.parametrize("world", SMALL, ids=[one.name for one in SMALL])
def test_promises_hold_with_all_rules_on(world: World) -> None:
    _assert_complete(explore(world, states_max=STATES_MAX))


def test_every_hole_of_the_protocol_is_here() -> None:
    numbers = {int(found.group(1)) for one in HOLES if (found := re.match(r"H(\d+)", one.name))}
    assert numbers == set(range(1, 19))


def test_every_rule_is_tried_off() -> None:
    """A switch that no hole turns is either dead or untested."""
    tried = {
        field.name
        for one in HOLES
        for field in dataclasses.fields(Rules)
        if getattr(one.world.rules, field.name) != field.default
    }
    not_a_hole = {
        "identity_always",  # the other way to close H13a, used by the worlds "always checked"
        "probe_fenced",  # H4c: see holes.py
    }
    assert {field.name for field in dataclasses.fields(Rules)} - tried == not_a_hole


def test_trace_can_be_taken_step_by_step() -> None:
    """A trace is what an exploration says it is: steps that follow each other, to a state that breaks a promise."""
    hole = next(one for one in HOLES if one.name.startswith("H1 "))
    for compact in (False, True):
        result = explore(hole.world, compact=compact)
        again = dataclasses.replace(hole.world, played=tuple(result.trace))
        state, texts = play(again)
        assert isinstance(state, State)
        assert texts == result.trace


def test_bound_is_not_taken_for_completeness() -> None:
    result = explore(SMALL[0], states_max=100)
    assert result.violation is None
    assert not result.complete
