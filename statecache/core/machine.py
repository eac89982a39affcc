"""Machines declared as classes.

    class Order(StateMachine):
        placed = State(initial=True)
        paid = State()
        cancelled = State(final=True)

        pay = placed.to(paid)
        cancel = placed.to(cancelled) | paid.to(cancelled)

        class Data(pydantic.BaseModel):
            amount: float | None = None

A class only collects what its body says into a :class:`~statecache.core.spec.MachineSpec`, which knows the rules; the
spec and everything made of it stand in attributes of the class. There is no registry: a machine is known to whom it is
given.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, ClassVar, NamedTuple, TypeVar

import pydantic

from statecache.core import definition, document, errors, patch
from statecache.core.definition import Definition, Guard
from statecache.core.spec import EventSpec, MachineSpec, StateSpec, TransitionSpec, build
from statecache.core.wording import shown

Declared = TypeVar("Declared", "State", "Transitions")

_WORD_START = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


class State:
    """One state of a machine, declared in its class body. ``title`` is for people; the name is the attribute's.

    ``timeout`` is how long an instance may stay there, counted from the transition that brought it there (one from the
    state to itself counts anew). After it the event ``on_timeout`` is fired, once, by whoever runs a flusher; without
    ``on_timeout`` the instance is reported as stuck (``find(stuck=True)``, ``statecache ls --stuck``).
    """

    __slots__ = ("final", "initial", "machine", "name", "on_timeout", "timeout", "title")

    def __init__(
        self,
        *,
        initial: bool = False,
        final: bool = False,
        title: str | None = None,
        timeout: timedelta | None = None,
        on_timeout: str | None = None,
    ) -> None:
        self.initial = initial
        self.final = final
        self.title = title
        self.timeout = timeout
        self.on_timeout = on_timeout
        self.name = ""
        self.machine = ""

    def to(self, target: State, *, guard: Guard | None = None) -> Transitions:
        """Declare a move from this state to ``target``, which may be the same state.

        ``guard`` is a named function that is given the instance's Snapshot and tells whether the move may be made.
        """
        if not isinstance(target, State):
            raise errors.DefinitionError(f"the target {shown(target)} of a transition is refused: it must be a State")
        return Transitions((_Arc(self, target, guard),))

    def __repr__(self) -> str:
        return f"<State {self.machine}.{self.name}>" if self.name else "<State without a name>"


class _Arc(NamedTuple):
    source: State
    target: State
    guard: Guard | None


class Transitions:
    """The moves of one event: ``cancel = placed.to(cancelled) | paid.to(cancelled)``."""

    __slots__ = ("arcs",)

    def __init__(self, arcs: tuple[_Arc, ...]) -> None:
        self.arcs = arcs

    def __or__(self, other: Transitions) -> Transitions:
        if not isinstance(other, Transitions):
            return NotImplemented
        return Transitions(self.arcs + other.arcs)


class _Body(dict[str, Any]):
    """A class body that notices when a state or an event is overwritten, which Python would let pass in silence."""

    def __init__(self, class_name: str) -> None:
        super().__init__()
        self.class_name = class_name

    def __setitem__(self, name: str, value: Any) -> None:
        known = self.get(name)
        if isinstance(known, (State, Transitions)) and not _extends(known, value):
            kinds = " and then ".join(_kind(thing) for thing in (known, value))
            raise errors.DefinitionError(
                f"class {self.class_name}: {name!r} is declared twice, as {kinds}: a name stands for one state or one "
                "event (the moves of one event are joined with '|')"
            )
        super().__setitem__(name, value)


def _extends(known: State | Transitions, value: object) -> bool:
    """Tell whether this is ``cancel |= paid.to(cancelled)``."""
    if not isinstance(known, Transitions) or not isinstance(value, Transitions):
        return False
    return value.arcs[: len(known.arcs)] == known.arcs


def _kind(value: object) -> str:
    return "a state" if isinstance(value, State) else "an event" if isinstance(value, Transitions) else shown(value)


class _Declaration(type):
    @classmethod
    def __prepare__(cls, name: str, bases: tuple[type, ...], /, **options: Any) -> _Body:
        return _Body(name)


class StateMachine(metaclass=_Declaration):
    """The base of all machines. A subclass is checked when it is made; a broken rule raises ``DefinitionError``.

    Options, as class attributes: ``name`` (default: the class's name in snake_case), ``version`` (raise it with every
    change of meaning), ``title``, ``durability`` (of transitions that ask for none), ``hot_ttl`` (idle time after which
    a flushed instance may be evicted) and a pydantic model ``Data``, which validates patches.

    ``Data`` converts as pydantic does: ``"12.5"`` and ``True`` become 12.5 and 1.0 in a float field, a datetime becomes text. A
    machine that is opened by name, or loaded from YAML (as the web and the command line do), has the JSON Schema of ``Data``
    only: it converts nothing, and refuses all three. With ``pydantic.Field(strict=True)`` a class refuses the former two.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    title: ClassVar[str | None] = None
    durability: ClassVar[str | None] = None
    hot_ttl: ClassVar[timedelta | None] = None

    spec: ClassVar[MachineSpec]
    """The machine as data. Two machines are the same if their specs are equal."""
    definition: ClassVar[Definition]
    """The machine as tables."""
    guards: ClassVar[Mapping[str, Guard]]
    """The functions bound to the guards' names of the spec; of a loaded machine perhaps not all."""
    fingerprint: ClassVar[str]
    """See ``MachineSpec.fingerprint``."""

    def __init_subclass__(cls, *, spec: MachineSpec | None = None, guards: Mapping[str, Guard] | None = None) -> None:
        super().__init_subclass__()
        if spec is None:
            _refuse_inheritance(cls)
            cls.name = getattr(cls, "name", _snake_case(cls.__name__))
            cls.guards = _declared_guards(cls)
            cls.spec = _declared_spec(cls)
            data = getattr(cls, "Data", None)
            cls.definition = definition.of(cls.spec, None if data is None else patch.by_model(cls.name, data))
        else:
            cls.name, cls.version, cls.title, cls.durability = spec.name, spec.version, spec.title, spec.durability
            cls.hot_ttl = None if spec.hot_ttl_seconds is None else timedelta(seconds=spec.hot_ttl_seconds)
            cls.guards = _bound_guards(spec, guards or {})
            cls.spec = spec
            cls.definition = definition.of(spec)
        cls.fingerprint = cls.spec.fingerprint

    def __new__(cls) -> StateMachine:
        raise TypeError(f"{cls.__name__} is a declaration and has no objects: give the class to StateCache.machine()")

    @staticmethod
    def from_spec(spec: MachineSpec, guards: Mapping[str, Guard] | None = None) -> type[StateMachine]:
        """Make a machine of a spec. ``guards`` binds functions to the guards' names; a move whose guard is not bound
        can be looked at, but not made. Raises ``DefinitionError`` for a guard that the spec does not name."""
        class_name = "".join(word.capitalize() for word in spec.name.split("_"))
        body = {"__module__": __name__, "__doc__": spec.title}
        return _Declaration(class_name, (StateMachine,), body, spec=spec, guards=guards)  # type: ignore[return-value]

    @staticmethod
    def load(path: str | os.PathLike[str], guards: Mapping[str, Guard] | None = None) -> type[StateMachine]:
        """Make a machine of a YAML file (see ``document`` for its form), as :meth:`from_spec` does.

        Raises ``DefinitionError`` naming the file, the line and the field."""
        return StateMachine.from_spec(document.load(path), guards)

    @classmethod
    def dump(cls, path: str | os.PathLike[str]) -> None:
        """Write the machine to a YAML file. :meth:`load` makes one with an equal spec of it."""
        document.dump(cls.spec, path)

    @classmethod
    def to_yaml(cls) -> str:
        """Return what :meth:`dump` writes."""
        return document.to_text(cls.spec)


_RESERVED = frozenset(vars(StateMachine)) | frozenset(StateMachine.__annotations__) | {"Data"}


def _snake_case(class_name: str) -> str:
    return _WORD_START.sub("_", class_name).lower().strip("_")


def _refuse_inheritance(cls: type[StateMachine]) -> None:
    """A machine that inherits would mix two state diagrams, and its parent's states are bound to the parent."""
    for base in cls.__mro__[1:]:
        if issubclass(base, StateMachine) and base is not StateMachine:
            raise errors.DefinitionError(
                f"class {cls.__name__} inherits from the machine {base.__name__}: a machine cannot be extended, "
                "declare its states and events anew (options and Data may come from an ordinary class beside "
                "StateMachine)"
            )
        for name, value in vars(base).items():
            if isinstance(value, (State, Transitions)):
                raise errors.DefinitionError(
                    f"class {cls.__name__}: {_kind(value)} {name!r} stands in the base {base.__name__}: states and "
                    "events are declared in the machine itself"
                )


def _declared_spec(cls: type[StateMachine]) -> MachineSpec:
    subject = f"class {cls.__name__}"
    _bind_states(cls)
    states = [
        build(
            StateSpec,
            f"{subject}: state {name!r}",
            name=name,
            title=state.title,
            initial=state.initial,
            final=state.final,
            timeout_seconds=_seconds(f"{subject}: state {name!r}: timeout", state.timeout),
            on_timeout=state.on_timeout,
        )
        for name, state in _declared(cls, State)
    ]
    return build(
        MachineSpec,
        subject,
        name=cls.name,
        version=cls.version,
        title=cls.title,
        states=tuple(states),
        events=tuple(_event_spec(cls, name, event) for name, event in _declared(cls, Transitions)),
        durability=cls.durability,
        hot_ttl_seconds=_seconds(f"{subject}: hot_ttl", cls.hot_ttl),
        data_schema=_data_schema(subject, getattr(cls, "Data", None)),
    )


def _declared(cls: type[StateMachine], kind: type[Declared]) -> list[tuple[str, Declared]]:
    return [(name, value) for name, value in vars(cls).items() if isinstance(value, kind)]


def _bind_states(cls: type[StateMachine]) -> None:
    for name, value in vars(cls).items():
        if value is State:
            raise errors.DefinitionError(f"class {cls.__name__}: {name!r} is the class State itself: write State()")
        if isinstance(value, (State, Transitions)) and name in _RESERVED:
            raise errors.DefinitionError(
                f"class {cls.__name__}: {name!r} cannot be {_kind(value)}: StateMachine uses that name itself"
            )
        if isinstance(value, State):
            if value.name:
                raise errors.DefinitionError(
                    f"class {cls.__name__}: {name!r} is the state {value.name!r} of machine {value.machine!r}: "
                    "every state is declared once, by a State() of its own"
                )
            value.name, value.machine = name, cls.name


def _event_spec(cls: type[StateMachine], name: str, event: Transitions) -> EventSpec:
    own = {id(state) for _, state in _declared(cls, State)}
    for arc in event.arcs:
        for state in (arc.source, arc.target):
            if id(state) not in own:
                whose = f"{state.name!r} of machine {state.machine!r}" if state.name else "without a name"
                raise errors.DefinitionError(
                    f"class {cls.__name__}: event {name!r} refers to a state {whose}: transitions join the states that "
                    "are declared in the same class"
                )
    moves = (
        TransitionSpec(source=arc.source.name, target=arc.target.name, guard=arc.guard and arc.guard.__name__)
        for arc in event.arcs
    )
    return EventSpec(name=name, transitions=tuple(moves))


def _declared_guards(cls: type[StateMachine]) -> dict[str, Guard]:
    guards: dict[str, Guard] = {}
    for event_name, event in _declared(cls, Transitions):
        for arc in event.arcs:
            guard: Any = arc.guard
            if guard is None:
                continue
            name = getattr(guard, "__name__", "")
            where = f"class {cls.__name__}: event {event_name!r}: the guard {shown(guard)} is refused:"
            if not callable(guard) or not name.isidentifier():
                raise errors.DefinitionError(f"{where} it must be a function with a name (def), for the spec to hold")
            if guards.setdefault(name, guard) is not guard:
                raise errors.DefinitionError(f"{where} another function named {name!r} is a guard of this machine")
    return guards


def _bound_guards(machine: MachineSpec, guards: Mapping[str, Guard]) -> dict[str, Guard]:
    named = {move.guard for event in machine.events for move in event.transitions if move.guard}
    for name, guard in guards.items():
        if name not in named:
            raise errors.DefinitionError(
                f"machine {machine.name!r}: the guard {name!r} is refused: no transition names it (named: "
                f"{', '.join(sorted(named)) or 'none'})"
            )
        if not callable(guard):
            raise errors.DefinitionError(
                f"machine {machine.name!r}: the guard {name!r} is refused: {shown(guard)} is no function"
            )
    return dict(guards)


def _seconds(subject: str, span: object) -> float | None:
    if span is None or isinstance(span, timedelta):
        return None if span is None else span.total_seconds()
    raise errors.DefinitionError(f"{subject}: {shown(span)} is refused: it must be a timedelta or None")


def _data_schema(subject: str, data: object) -> dict[str, Any] | None:
    if data is None:
        return None
    if not (isinstance(data, type) and issubclass(data, pydantic.BaseModel)):
        raise errors.DefinitionError(f"{subject}: Data is refused: {shown(data)} is no subclass of pydantic.BaseModel")
    return patch.schema_of(subject, data)
