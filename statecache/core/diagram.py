"""Pictures of a machine as text: Mermaid (rendered by GitHub and many editors) and DOT (Graphviz)."""

from __future__ import annotations

import re
from collections.abc import Iterator

from statecache.core import errors
from statecache.core.spec import EventSpec, MachineSpec, StateSpec, TransitionSpec

# Words that Mermaid's state diagrams read as something else than a state when they stand where one is named.
_MERMAID_WORDS = frozenset(
    {"as", "class", "classdef", "click", "default", "direction", "end", "hide", "note", "scale", "state", "style"}
)
_MERMAID_UNSAFE = re.compile(r"[^\w .,()/_'-]")


def mermaid(machine: MachineSpec, highlight: str | None = None) -> str:
    """Return a Mermaid ``stateDiagram-v2``; the state ``highlight`` is drawn filled. Titles stand for names."""
    if highlight is not None and highlight not in {state.name for state in machine.states}:
        raise errors.DefinitionError(f"machine {machine.name!r} has no state {highlight!r} to highlight")
    lines = ["stateDiagram-v2"]
    for state in machine.states:
        if state.title is not None or _mermaid_id(state.name) != state.name:
            lines.append(f'    state "{_mermaid_text(state.title or state.name)}" as {_mermaid_id(state.name)}')
    lines += [f"    [*] --> {_mermaid_id(state.name)}" for state in machine.states if state.initial]
    for event, move in _moves(machine):
        label = _mermaid_text(_label(machine, event, move))
        lines.append(f"    {_mermaid_id(move.source)} --> {_mermaid_id(move.target)} : {label}")
    lines += [f"    {_mermaid_id(state.name)} --> [*]" for state in machine.states if state.final]
    if highlight is not None:
        lines += ["    classDef here fill:#ffd54f,stroke:#333,color:#000", f"    class {_mermaid_id(highlight)} here"]
    return "\n".join(lines) + "\n"


def _mermaid_id(name: str) -> str:
    return f"S_{name}" if name in _MERMAID_WORDS else name  # no name has a capital letter, so this one is free


def _mermaid_text(text: str) -> str:
    """Mermaid has no quoting; character codes (``#59;``) stand for what its grammar would read."""
    return _MERMAID_UNSAFE.sub(lambda found: f"#{ord(found.group())};", _one_line(text))


def dot(machine: MachineSpec) -> str:
    """Return a Graphviz digraph. Titles stand for names; final states have a double border."""
    lines = [f"digraph {_quoted(machine.name)} {{", "    rankdir=LR;", "    node [shape=box, style=rounded];"]
    lines.append('    "" [shape=point];')
    for state in machine.states:
        border = ", peripheries=2" if state.final else ""
        lines.append(f"    {_quoted(state.name)} [label={_quoted(_title(state))}{border}];")
    lines += [f'    "" -> {_quoted(state.name)};' for state in machine.states if state.initial]
    for event, move in _moves(machine):
        lines.append(
            f"    {_quoted(move.source)} -> {_quoted(move.target)} [label={_quoted(_label(machine, event, move))}];"
        )
    return "\n".join([*lines, "}"]) + "\n"


def _quoted(text: str) -> str:
    escaped = _one_line(text).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _title(part: StateSpec | EventSpec) -> str:
    return part.title or part.name


def _label(machine: MachineSpec, event: EventSpec, move: TransitionSpec) -> str:
    label = _title(event) if move.guard is None else f"{_title(event)} [{move.guard}]"
    source = next(state for state in machine.states if state.name == move.source)
    if source.timeout_seconds is None or source.on_timeout != event.name:
        return label
    return f"{label} (after {span(source.timeout_seconds)})"


def span(seconds: float) -> str:
    """A time in the largest unit that it is a whole number of."""
    for unit, unit_seconds in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds % unit_seconds == 0:
            return f"{seconds / unit_seconds:.0f} {unit}"
    return f"{seconds:g} s"


def _moves(machine: MachineSpec) -> Iterator[tuple[EventSpec, TransitionSpec]]:
    return ((event, move) for event in machine.events for move in event.transitions)
