"""Learn a machine from an event log: every order of activities that the log shows, and no other.

The initial state ``new`` means that nothing has happened yet. Each activity becomes a state (it was the last thing to
happen) and an event of the same name that leads into it from every state that it was seen to follow. States after which
no case of the log goes on are final.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from statecache.core import errors
from statecache.core.spec import EventSpec, MachineSpec, StateSpec, TransitionSpec, title_problem
from statecache.core.wording import shown

INITIAL = "new"
NAME_LENGTH_MAX = 64
_START = -1


class Learned(NamedTuple):
    """The machine, and the state and event name of each activity."""

    spec: MachineSpec
    slugs: dict[str, str]


def learn(
    rows: Iterable[tuple[str, str]],
    name: str,
    *,
    title: str | None = None,
    version: int = 1,
    activities_max: int = 5000,
) -> Learned:
    """Learn the machine ``name`` from ``(case, activity)`` rows, in order of time within each case (cases may mix).

    Memory: one entry a case, one a pair of activities that follow each other. Raises ``InvalidDataError`` for a log
    without rows, for an activity that is blank or no title, and for more than ``activities_max`` activities (most
    likely the wrong column); ``DefinitionError`` for a bad ``name``.
    """
    numbers: dict[str, int] = {}
    predecessors: list[set[int]] = []
    last: dict[str, int] = {}
    for case, activity in rows:
        number = numbers.get(activity)
        if number is None:
            _check_activity(case, activity, len(numbers), activities_max)
            number = numbers[activity] = len(predecessors)
            predecessors.append(set())
        predecessors[number].add(last.get(case, _START))
        last[case] = number
    if not numbers:
        raise errors.InvalidDataError("the event log is refused: it has no rows, so there is nothing to learn")
    slugs = slugs_of(numbers)
    return Learned(_machine(name, title, version, slugs, predecessors), slugs)


def _check_activity(case: str, activity: object, count: int, activities_max: int) -> None:
    rule = None
    if not isinstance(activity, str):
        rule = f"it must be text, not {type(activity).__name__}"
    elif not activity.strip():
        rule = "it is blank"
    else:
        rule = title_problem(activity)
    if rule:
        raise errors.InvalidDataError(f"activity {shown(activity)} of case {shown(case)} is refused: {rule}")
    if count >= activities_max:
        raise errors.InvalidDataError(
            f"activity {shown(activity)} of case {shown(case)} is refused: the log has more than {activities_max} "
            "different activities; is this the right column?"
        )


def _machine(
    name: str, title: str | None, version: int, slugs: dict[str, str], predecessors: Sequence[set[int]]
) -> MachineSpec:
    names = list(slugs.values())
    left = set().union(*predecessors)
    states = [StateSpec(name=INITIAL, initial=True)]
    events = []
    for number, (activity, slug) in enumerate(slugs.items()):
        states.append(StateSpec(name=slug, title=activity, final=number not in left))
        sources = (INITIAL if before == _START else names[before] for before in sorted(predecessors[number]))
        moves = tuple(TransitionSpec(source=source, target=slug) for source in sources)
        events.append(EventSpec(name=slug, title=activity, transitions=moves))
    return MachineSpec(name=name, version=version, title=title, states=tuple(states), events=tuple(events))


def slugs_of(activities: Iterable[str]) -> dict[str, str]:
    """Return a name for each activity, in the order given. Which name depends on the set of activities alone."""
    given = list(activities)
    taken = {INITIAL}
    numbers: Counter[str] = Counter()
    chosen: dict[str, str] = {}
    for activity in sorted(given):
        base = slug = slug_of(activity)
        while slug in taken:
            numbers[base] += 1
            suffix = f"_{numbers[base] + 1}"
            slug = base[: NAME_LENGTH_MAX - len(suffix)] + suffix
        taken.add(slug)
        chosen[activity] = slug
    return {activity: chosen[activity] for activity in given}


def slug_of(text: str) -> str:
    """Return ``text`` as a name: ASCII letters in lower case and digits, ``_`` for all else; ``e_`` before a digit."""
    letters = unicodedata.normalize("NFKD", text).casefold()
    plain = "".join(letter for letter in letters if not unicodedata.combining(letter))
    slug = re.sub(r"[^a-z0-9]+", "_", plain).strip("_")
    if not slug[:1].isalpha():
        slug = f"e_{slug}".rstrip("_")
    return slug[:NAME_LENGTH_MAX].rstrip("_")


def event_of(machine: MachineSpec) -> dict[str, str]:
    """Return which event a log's activity stands for: by the event's title, and by its name where no title is the same.

    Raises ``DefinitionError`` if two events share a title.
    """
    found: dict[str, str] = {}
    for event in machine.events:
        if event.title is not None and found.setdefault(event.title, event.name) != event.name:
            raise errors.DefinitionError(
                f"machine {machine.name!r}: the events {found[event.title]!r} and {event.name!r} share the title "
                f"{shown(event.title)}: an activity of that name could be either"
            )
    return {event.name: event.name for event in machine.events} | found
