"""A machine as data: what a class declares and a YAML file says, and the rules that both must keep.

The rules stand here once (:func:`problems`). A class builds a :class:`MachineSpec` of itself, ``document`` reads one
from YAML, ``learn`` draws one from an event log; whoever makes one that breaks a rule gets a ``DefinitionError``.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import pydantic

from statecache.core import errors, schema
from statecache.core.wording import shown, uncapitalized

NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
NAME_RULE = f"names match {NAME.pattern}"
GUARD_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
TITLE_LENGTH_MAX = 500
VERSION_MAX = 2**31 - 1
HOT_TTL_SECONDS_MAX = 1e9
TIMEOUT_SECONDS_MIN, TIMEOUT_SECONDS_MAX = 0.001, 1e9
TimeoutSeconds = Annotated[pydantic.StrictFloat, pydantic.Field(ge=TIMEOUT_SECONDS_MIN, le=TIMEOUT_SECONDS_MAX)]

# Titles may hold what real event logs hold, line breaks included, but nothing that steers a terminal.
_TITLE_REFUSED = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


class _Part(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")


Part = TypeVar("Part", bound=_Part)


class StateSpec(_Part):
    """One state. ``on_timeout`` names the event that is fired after ``timeout_seconds`` in it; without one an instance
    that stays longer is reported as stuck."""

    name: str
    title: str | None = None
    initial: pydantic.StrictBool = False
    final: pydantic.StrictBool = False
    timeout_seconds: TimeoutSeconds | None = None
    on_timeout: str | None = None


class TransitionSpec(_Part):
    """One move of an event. ``guard`` names a predicate on the snapshot, which the machine class holds."""

    source: str
    target: str
    guard: str | None = None


class EventSpec(_Part):
    """One event and its moves, at most one from each state."""

    name: str
    title: str | None = None
    transitions: tuple[TransitionSpec, ...]


class MachineSpec(_Part):
    """The definition of a machine. Raises ``DefinitionError`` when it breaks one of the rules of :func:`problems`.

    ``data_schema`` is a JSON Schema (Draft 2020-12) of the data fields. ``hot_ttl_seconds`` is the idle time after
    which a flushed instance may be evicted.
    """

    name: str
    version: Annotated[pydantic.StrictInt, pydantic.Field(ge=1, le=VERSION_MAX)] = 1
    title: str | None = None
    states: tuple[StateSpec, ...]
    events: tuple[EventSpec, ...] = ()
    durability: Literal["hot", "fsync", "replica", "durable"] | None = None
    hot_ttl_seconds: Annotated[pydantic.StrictFloat, pydantic.Field(gt=0, le=HOT_TTL_SECONDS_MAX)] | None = None
    data_schema: dict[str, Any] | None = None

    @pydantic.model_validator(mode="after")
    def _keep_the_rules(self) -> MachineSpec:
        found = problems(self)
        if found:
            raise errors.DefinitionError(f"machine {self.name!r}: " + "; ".join(problem.text for problem in found))
        return self

    @functools.cached_property
    def fingerprint(self) -> str:
        """The SHA-256 (hex) of what the machine means.

        Two declarations of one name and version must agree in it. Counted: name, version, states, which are initial and
        final, moves, guards' names, the data schema's rules, timeouts (they move instances; what has none has the
        fingerprint that it had before there were any). Not counted, so that they may change without a new
        version: titles and other annotations, the order of declaration, durability and hot_ttl_seconds (how it is run,
        not what it is).
        """
        canonical = json.dumps(self._meaning(), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def means_the_same(self, other: MachineSpec) -> bool:
        """Whether two declarations differ in nothing but what different versions of pydantic write for one class: then each has
        a fingerprint of its own, though nobody has changed anything."""
        one, two = self._meaning(), other._meaning()
        return schema.alike(one.pop("data"), two.pop("data")) and one == two

    def _meaning(self) -> dict[str, Any]:
        meaning: dict[str, Any] = {
            "name": self.name,
            "version": self.version,
            "states": sorted((state.name, state.initial, state.final) for state in self.states),
            "moves": sorted(
                (event.name, move.source, move.target, move.guard or "")
                for event in self.events
                for move in event.transitions
            ),
            "data": None if self.data_schema is None else schema.meaning(self.data_schema),
        }
        timeouts = sorted(
            (state.name, state.timeout_seconds, state.on_timeout or "")
            for state in self.states
            if state.timeout_seconds is not None
        )
        if timeouts:
            meaning["timeouts"] = timeouts
        return meaning


class Problem(NamedTuple):
    """A broken rule: where it stands in the YAML form, and a text that names the state or event, and the rule."""

    where: tuple[str | int, ...]
    text: str


def problems(machine: MachineSpec) -> list[Problem]:
    """Return the rules that ``machine`` breaks; those that make others meaningless first and alone."""
    for check in (_wrong_names, _wrong_references, _wrong_shape, _wrong_timeouts):
        found = list(check(machine))
        if found:
            return found
    return []


def title_problem(title: str) -> str | None:
    """Return the rule that a title breaks, if any."""
    if not 0 < len(title) <= TITLE_LENGTH_MAX:
        return f"it has {len(title)} characters, 1 to {TITLE_LENGTH_MAX} are allowed"
    found = _TITLE_REFUSED.search(title)
    return f"it holds the control character {found.group()!r} at position {found.start()}" if found else None


def _wrong_names(machine: MachineSpec) -> Iterator[Problem]:
    if not NAME.fullmatch(machine.name):
        yield Problem(("name",), f"the machine's name {shown(machine.name)} is refused: {NAME_RULE}")
    yield from _wrong_title(machine.title, ("title",), "the machine")
    for kind, parts in (("state", machine.states), ("event", machine.events)):
        for part in parts:
            where = (f"{kind}s", part.name)
            if not NAME.fullmatch(part.name):
                yield Problem(where, f"{kind} {shown(part.name)} is refused: {NAME_RULE}")
            yield from _wrong_title(part.title, (*where, "title"), f"{kind} {part.name!r}")
        for name, count in Counter(part.name for part in parts).items():
            if count > 1:
                yield Problem((f"{kind}s", name), f"{kind} {name!r} is declared {count} times")
    for event, move in _moves(machine):
        if move.guard is not None and not GUARD_NAME.fullmatch(move.guard):
            yield Problem(
                ("events", event.name),
                f"event {event.name!r}: the guard {shown(move.guard)} is refused: names of guards match "
                f"{GUARD_NAME.pattern}",
            )
    if machine.data_schema is not None:
        for path, rule in schema.problems(machine.data_schema):
            yield Problem(("data", *path), f"the data schema is refused: {rule}")


def _wrong_title(title: str | None, where: tuple[str, ...], whose: str) -> Iterator[Problem]:
    rule = None if title is None else title_problem(title)
    if rule:
        yield Problem(where, f"the title {shown(title)} of {whose} is refused: {rule}")


def _wrong_references(machine: MachineSpec) -> Iterator[Problem]:
    known = {state.name for state in machine.states}
    for event in machine.events:
        where = ("events", event.name)
        if not event.transitions:
            yield Problem(where, f"event {event.name!r} has no transition: it needs at least one")
        targets: dict[str, str] = {}
        for move in event.transitions:
            for state in (move.source, move.target):
                if state not in known:
                    text = f"event {event.name!r} refers to the state {shown(state)}, which is not declared"
                    yield Problem(where, text)
            if move.source in targets:
                yield Problem(
                    where,
                    f"event {event.name!r} has two transitions from state {move.source!r} (to {targets[move.source]!r} "
                    f"and to {move.target!r}): one event has one target from one state",
                )
            targets[move.source] = move.target


def _wrong_shape(machine: MachineSpec) -> Iterator[Problem]:
    initial = [state.name for state in machine.states if state.initial]
    if not machine.states:
        yield Problem(("states",), "it has no state: a machine needs at least one")
        return
    if len(initial) != 1:
        found = "none is" if not initial else f"{len(initial)} are ({', '.join(initial)})"
        yield Problem(("states",), f"exactly one state must be initial, {found}")
    final = {state.name for state in machine.states if state.final}
    for event, move in _moves(machine):
        if move.source in final:
            yield Problem(
                ("events", event.name),
                f"event {event.name!r} leads out of state {move.source!r}, which is final: nothing leads out of a "
                "final state",
            )
    if len(initial) == 1:
        reached = _reachable(machine, initial[0])
        for state in machine.states:
            if state.name not in reached:
                text = f"state {state.name!r} cannot be reached from the initial state {initial[0]!r}"
                yield Problem(("states", state.name), text)


def _wrong_timeouts(machine: MachineSpec) -> Iterator[Problem]:
    events = {event.name: event for event in machine.events}
    for state in machine.states:
        where = ("states", state.name)
        if state.timeout_seconds is None:
            if state.on_timeout is not None:
                text = f"state {state.name!r} has on_timeout, but no timeout: say after how long"
                yield Problem((*where, "on_timeout"), text)
            continue
        if state.final:
            text = f"state {state.name!r} has a timeout, but is final: what has ended may stay for ever"
            yield Problem((*where, "timeout_seconds"), text)
        elif state.on_timeout is not None:
            rule = _on_timeout_rule(state, events.get(state.on_timeout))
            if rule:
                yield Problem(
                    (*where, "on_timeout"), f"state {state.name!r}: on_timeout {shown(state.on_timeout)} {rule}"
                )


def _on_timeout_rule(state: StateSpec, event: EventSpec | None) -> str | None:
    """The rule that the event of a timeout breaks, if any."""
    if event is None:
        return "is no event of this machine"
    move = next((move for move in event.transitions if move.source == state.name), None)
    if move is None:
        return f"does not lead out of this state (it leads out of {', '.join(one.source for one in event.transitions)})"
    if move.guard is not None:  # whoever fires it has the machine from SQL, where there are no functions
        return f"has the guard {move.guard!r} there: the event of a timeout must need none"
    return None


def _moves(machine: MachineSpec) -> Iterator[tuple[EventSpec, TransitionSpec]]:
    return ((event, move) for event in machine.events for move in event.transitions)


def _reachable(machine: MachineSpec, start: str) -> set[str]:
    successors = _successors(machine)
    reached = {start}
    waiting = [start]
    while waiting:
        for target in successors[waiting.pop()]:
            if target not in reached:
                reached.add(target)
                waiting.append(target)
    return reached


def _successors(machine: MachineSpec) -> dict[str, list[str]]:
    successors: dict[str, list[str]] = {state.name: [] for state in machine.states}
    for _, move in _moves(machine):
        if move.target not in successors[move.source]:
            successors[move.source].append(move.target)
    return successors


def steps(machine: MachineSpec) -> tuple[str, ...] | None:
    """Return the main line from the initial state to a final one, or None if the machine has no such line.

    A line is a chain of all states that are not final, each leading only to the next one (self-transitions and exits to
    final states aside), and then the one final state that nothing but the chain's end leads to.
    """
    final = {state.name for state in machine.states if state.final}
    successors = _successors(machine)
    here = next(state.name for state in machine.states if state.initial)
    line = [here]
    exits: set[str] = set()
    while True:
        onward = [state for state in successors[here] if state not in final and state != here]
        ends = [state for state in successors[here] if state in final and state not in exits]
        if not onward:
            whole = len(line) == len(successors) - len(final)
            return (*line, *ends) if whole and len(ends) == 1 else None
        if len(onward) > 1 or onward[0] in line:
            return None
        exits.update(ends)
        here = onward[0]
        line.append(here)


def build(part: type[Part], subject: str, **fields: Any) -> Part:
    """Make a part of a spec; a field of the wrong type, too, is a ``DefinitionError``, which names ``subject``."""
    try:
        return part(**fields)
    except pydantic.ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, where))}: {text}" for where, text in explain(error))
        raise errors.DefinitionError(f"{subject}: {found}") from error


def explain(error: pydantic.ValidationError) -> list[Problem]:
    """Return what pydantic found in our words: where, and the value with the rule that it breaks."""
    return [
        Problem(found["loc"], _refusal(found["type"], found["input"], found["msg"]))
        for found in error.errors(include_url=False, include_context=False)
    ]


def _refusal(kind: str, value: object, message: str) -> str:
    if kind == "missing":
        return "it is missing"
    if kind == "extra_forbidden":
        return "there is no such key"
    return f"{shown(value)} is refused: {uncapitalized(message)}"


def readable(text: str) -> MachineSpec | None:
    """A stored definition; None for one that this version of statecache cannot read: a newer one has registered it."""
    try:
        return MachineSpec.model_validate_json(text)
    except (ValueError, RecursionError, errors.DefinitionError):
        return None
