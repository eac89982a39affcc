"""An instance's history as a person reads it: moves, times, and how long it stayed in each state."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from statecache.core import entry, model
from statecache.core.machine import StateMachine
from statecache.web import wording


@dataclass(frozen=True)
class Chapter:
    """One move, and how long the instance stayed where it led. ``changes`` are (field, new value as text)."""

    row: model.Transition
    title: str
    state: str
    moment_ms: int
    stayed_seconds: float | None
    ongoing: bool
    changes: Sequence[tuple[str, str]]

    @property
    def imported(self) -> bool:
        """Whether it happened at another time than it was recorded."""
        return self.row.occurred_ms is not None


@dataclass(frozen=True)
class Stay:
    """All the time spent in one state; ``share`` of the whole, 0 to 1."""

    state: str
    seconds: float
    share: float


@dataclass(frozen=True)
class Step:
    """Where on its machine's line it is: ``number`` of ``count``; ``names`` are the line's titles."""

    number: int
    count: int


def chapters(machine: type[StateMachine], rows: Sequence[model.Transition]) -> list[Chapter]:
    """Oldest first. Times are those at which things happened, as far as the callers told them."""
    definition = machine.definition
    now_ms = int(time.time() * 1000)
    moments = [row.occurred_ms if row.occurred_ms is not None else row.at_ms for row in rows]
    told = []
    known: dict[str, Any] = {}
    for index, row in enumerate(rows):
        last = index == len(rows) - 1
        over = last and row.to_state in definition.finals
        until = now_ms if last else moments[index + 1]
        stayed = None if over else max(0, until - moments[index]) / 1000
        told.append(
            Chapter(
                row, event_title(machine, row.event), state_title(machine, row.to_state), moments[index], stayed,
                last and not over, _changes(row, known),
            )
        )  # fmt: skip
    return told


def stays(told: Sequence[Chapter]) -> list[Stay]:
    """The time spent in each state, in the order of first arrival."""
    seconds: dict[str, float] = {}
    for chapter in told:
        seconds[chapter.state] = seconds.get(chapter.state, 0.0) + (chapter.stayed_seconds or 0.0)
    whole = sum(seconds.values())
    return [Stay(state, spent, spent / whole if whole else 0.0) for state, spent in seconds.items() if spent > 0]


def step(line: Sequence[str] | None, state: str) -> Step | None:
    """``None`` when the machine is no line, or the state is beside it."""
    return None if line is None or state not in line else Step(line.index(state) + 1, len(line))


def event_title(machine: type[StateMachine], event: str) -> str:
    if event == entry.EVENT_START:
        return "Started"
    if event.startswith("@"):
        return event[1:].replace("_", " ").capitalize()
    return machine.definition.event_titles.get(event, event).replace("_", " ")


def state_title(machine: type[StateMachine], state: str) -> str:
    title = machine.definition.titles.get(state, state)
    return title.replace("_", " ") if title == state else title


def _changes(row: model.Transition, known: dict[str, Any]) -> list[tuple[str, str]]:
    """What it made different; many programs send all they know with every move. ``known`` is kept up to date."""
    new = {**row.patch, **row.increments}
    changes = [(name, wording.value(one)) for name, one in new.items() if name not in known or known[name] != one]
    changes += [(name, "removed") for name in row.unset if name in known]
    known.update(new)
    for name in row.unset:
        known.pop(name, None)
    return changes


def data_of(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, wording.value(one)) for name, one in data.items()]
