"""A machine's YAML form: read with a message for every slip, written so that reading gives the same machine.

    name: order
    version: 1
    states:
      placed: {initial: true}
      paid: {timeout_seconds: 600, on_timeout: cancel}  # after ten minutes there; without on_timeout it is stuck
      cancelled: {final: true, title: Cancelled by the customer}
    events:
      pay: {from: placed, to: paid, guard: is_covered, title: Pay}
      cancel: {from: [placed, paid], to: cancelled}
      move:                                             # several targets: a list, or `moves:` beside a title
        - {from: placed, to: paid}
        - {from: paid, to: cancelled}
    durability: durable
    hot_ttl_seconds: 86400
    data: {type: object, properties: {amount: {type: number}}}      # JSON Schema, Draft 2020-12

Plain scalars mean what they mean in JSON: ``on`` and ``no`` are words (in YAML 1.1 they are booleans, and state
machines are full of ``on`` and ``off``), a date is text.
"""

from __future__ import annotations

import os
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import pydantic

from statecache.core import errors, yamltree
from statecache.core.spec import (
    EventSpec,
    MachineSpec,
    Problem,
    StateSpec,
    TimeoutSeconds,
    TransitionSpec,
    explain,
    problems,
)


def load(path: str | os.PathLike[str]) -> MachineSpec:
    """Read a machine from a YAML file. Raises ``DefinitionError`` naming the file, the line and the field."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise errors.DefinitionError(f"{os.fspath(path)}: the file cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise errors.DefinitionError(
            f"{os.fspath(path)}: the file is no UTF-8 text: {error.reason} at byte {error.start}"
        ) from error
    return from_text(text, os.fspath(path))


def dump(machine: MachineSpec, path: str | os.PathLike[str]) -> None:
    """Write the machine to a YAML file, replacing what was there."""
    Path(path).write_text(to_text(machine), encoding="utf-8")


def from_text(text: str, source: str = "<text>") -> MachineSpec:
    """Read a machine from YAML. ``source`` stands for the file in the messages of ``DefinitionError``."""
    tree = yamltree.read(text, source)
    try:
        draft = _Document.model_validate(tree.value).draft()
        found = problems(draft)
        if not found:
            return MachineSpec(**dict(draft))
    except pydantic.ValidationError as error:
        found = explain(error)
    raise errors.DefinitionError("\n".join(_located(problem, tree, source) for problem in found))


def to_text(machine: MachineSpec) -> str:
    """Return the machine as YAML; :func:`from_text` gives an equal one."""
    document: dict[str, Any] = {"name": machine.name, "version": machine.version}
    if machine.title is not None:
        document["title"] = machine.title
    document["states"] = {state.name: _state_form(state) for state in machine.states}
    document["events"] = {event.name: _event_form(event) for event in machine.events}
    if machine.durability is not None:
        document["durability"] = machine.durability
    if machine.hot_ttl_seconds is not None:
        document["hot_ttl_seconds"] = _number(machine.hot_ttl_seconds)
    if machine.data_schema is not None:
        document["data"] = machine.data_schema
    return yamltree.write(document)


def _state_form(state: StateSpec) -> dict[str, Any]:
    form = state.model_dump(exclude={"name"}, exclude_defaults=True)
    if state.timeout_seconds is not None:
        form["timeout_seconds"] = _number(state.timeout_seconds)
    return form


def _number(seconds: float) -> int | float:
    return int(seconds) if seconds == int(seconds) else seconds


def _event_form(event: EventSpec) -> Any:
    moves: list[dict[str, Any]] = []
    for (target, guard), group in groupby(event.transitions, key=lambda move: (move.target, move.guard)):
        sources = [move.source for move in group]
        move: dict[str, Any] = {"from": sources[0] if len(sources) == 1 else sources, "to": target}
        if guard is not None:
            move["guard"] = guard
        moves.append(move)
    if event.title is None:
        return moves[0] if len(moves) == 1 else moves
    return {"title": event.title, **(moves[0] if len(moves) == 1 else {"moves": moves})}


class _Part(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True)


class _State(_Part):
    title: str | None = None
    initial: bool = False
    final: bool = False
    timeout_seconds: TimeoutSeconds | None = None
    on_timeout: str | None = None


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class _Move(_Part):
    sources: Annotated[list[str], pydantic.BeforeValidator(_listed), pydantic.Field(alias="from", min_length=1)]
    to: str
    guard: str | None = None


def _with_moves(value: Any) -> Any:
    """Bring the three ways of writing an event to one: ``{title, moves: [...]}``."""
    if isinstance(value, list):
        return {"moves": value}
    if isinstance(value, dict) and "moves" not in value:
        move = {key: item for key, item in value.items() if key != "title"}
        return {"title": value.get("title"), "moves": [move]}
    return value


class _Event(_Part):
    title: str | None = None
    moves: Annotated[list[_Move], pydantic.Field(min_length=1)]


def _empty_state(value: Any) -> Any:
    return {} if value is None else value


class _Document(_Part):
    """The shape of the YAML form; ``MachineSpec`` holds the rules."""

    name: str
    version: int = 1
    title: str | None = None
    states: dict[str, Annotated[_State, pydantic.BeforeValidator(_empty_state)]]
    events: dict[str, Annotated[_Event, pydantic.BeforeValidator(_with_moves)]] = {}
    durability: str | None = None
    hot_ttl_seconds: float | None = None
    data: dict[str, Any] | None = None

    def draft(self) -> MachineSpec:
        """The machine with its types checked and its rules not yet, so that each broken rule can be given its line."""
        return MachineSpec.model_construct(
            name=self.name,
            version=self.version,
            title=self.title,
            states=tuple(StateSpec(name=name, **dict(state)) for name, state in self.states.items()),
            events=tuple(
                EventSpec(
                    name=name,
                    title=event.title,
                    transitions=tuple(
                        TransitionSpec(source=source, target=move.to, guard=move.guard)
                        for move in event.moves
                        for source in move.sources
                    ),
                )
                for name, event in self.events.items()
            ),
            durability=self.durability,
            hot_ttl_seconds=self.hot_ttl_seconds,
            data_schema=self.data,
        )


def _located(problem: Problem, tree: yamltree.Tree, source: str) -> str:
    """The problem's text behind ``file:line: field:``."""
    field = _as_written(problem.where, tree)
    name = ".".join(str(part) for part in field)
    return f"{source}:{tree.line_of(field)}: {name + ': ' if name else ''}{problem.text}"


def _as_written(where: yamltree.Path, tree: yamltree.Tree) -> yamltree.Path:
    """Leave out what :func:`_with_moves` put between an event and its moves, so that the path is the author's."""
    path: yamltree.Path = ()
    for part in where:
        if (*path, part) in tree.lines or not (path[:1] == ("events",) and part in ("moves", 0)):
            path = (*path, part)
    return path
