"""A machine as the hot path wants it: everything looked up in a dictionary that was filled once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from statecache.core import errors, patch, schema
from statecache.core.spec import MachineSpec

if TYPE_CHECKING:
    from statecache.core.model import Snapshot

Guard = Callable[["Snapshot"], bool]


class Timeout(NamedTuple):
    """How long an instance may stay in a state, and the event that is fired then; None: it is reported as stuck."""

    ms: int
    event: str | None


@dataclass(frozen=True, slots=True, eq=False)
class Definition:
    """The tables of one machine. Made by :func:`of`; not to be changed.

    ``targets[event][source]`` is the state that an event leads to; ``guards[event, source]`` the name of the guard of
    that move, if it has one; ``timeouts[state]`` is there for states that have one. ``titles`` and
    ``event_titles`` fall back on names. ``validate_patch`` checks the data of a transition and returns it as plain JSON
    values, or raises ``InvalidDataError``. ``types_of`` tells the JSON types that a data field may have (see ``schema``).
    """

    name: str
    version: int
    fingerprint: str
    initial: str
    finals: frozenset[str]
    states: tuple[str, ...]
    events: tuple[str, ...]
    targets: Mapping[str, Mapping[str, str]]
    events_from: Mapping[str, tuple[str, ...]]
    guards: Mapping[tuple[str, str], str]
    timeouts: Mapping[str, Timeout]
    titles: Mapping[str, str]
    event_titles: Mapping[str, str]
    durability: str | None
    hot_ttl_seconds: float | None
    validate_patch: patch.PatchValidator
    types_of: Callable[[str], frozenset[str]]

    def is_final(self, state: str) -> bool:
        return state in self.finals

    def available_events(self, state: str) -> tuple[str, ...]:
        """The events that lead out of ``state``, as declared; none for a state of another version of the machine."""
        return self.events_from.get(state, ())

    @property
    def deadlines_ms(self) -> Mapping[str, int]:
        """The time that an instance may stay in a state before an event is fired, by state."""
        return {state: timeout.ms for state, timeout in self.timeouts.items() if timeout.event is not None}

    def guard_for(self, event: str, source: str, callables: Mapping[str, Guard]) -> Guard | None:
        """Return the guard of a move, None if it has none. Raises ``DefinitionError`` for a guard that is not bound."""
        name = self.guards.get((event, source))
        if name is None:
            return None
        try:
            return callables[name]
        except KeyError:
            raise errors.DefinitionError(
                f"machine {self.name!r}: event {event!r} from state {source!r} has the guard {name!r}, to which no "
                f"function is bound here: only a program that has it, and loads the machine with guards="
                f"{{{name!r}: function}}, can fire this event"
            ) from None


def of(machine: MachineSpec, validate_patch: patch.PatchValidator | None = None) -> Definition:
    """Fill the tables of a machine. Without ``validate_patch`` the machine's data schema, if any, checks patches."""
    if validate_patch is None:
        data_schema = machine.data_schema
        validate_patch = patch.unchecked if data_schema is None else patch.by_schema(machine.name, data_schema)
    targets = {event.name: {move.source: move.target for move in event.transitions} for event in machine.events}
    states = tuple(state.name for state in machine.states)
    return Definition(
        name=machine.name,
        version=machine.version,
        fingerprint=machine.fingerprint,
        initial=next(state.name for state in machine.states if state.initial),
        finals=frozenset(state.name for state in machine.states if state.final),
        states=states,
        events=tuple(targets),
        targets=targets,
        events_from={state: tuple(event for event in targets if state in targets[event]) for state in states},
        guards={
            (event.name, move.source): move.guard
            for event in machine.events
            for move in event.transitions
            if move.guard is not None
        },
        timeouts={
            state.name: Timeout(max(1, round(state.timeout_seconds * 1000)), state.on_timeout)
            for state in machine.states
            if state.timeout_seconds is not None
        },
        titles={state.name: state.title or state.name for state in machine.states},
        event_titles={event.name: event.title or event.name for event in machine.events},
        durability=machine.durability,
        hot_ttl_seconds=machine.hot_ttl_seconds,
        validate_patch=validate_patch,
        types_of=schema.types_of_fields(machine.data_schema or {}),
    )
