"""``machine learn|show|check|register|list``: definitions."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from statecache.cli import imports, options, output
from statecache.core import errors

if TYPE_CHECKING:
    from statecache.core.eventlog import Row
    from statecache.core.spec import MachineSpec
    from statecache.engine.logfile import LogFile, Survey

MachineFile = Annotated[Path, typer.Argument(metavar="FILE", help="The machine's YAML file.")]


class View(StrEnum):
    """How ``machine show`` draws a machine."""

    TABLE = "table"
    YAML = "yaml"
    MERMAID = "mermaid"
    DOT = "dot"


def register(app: typer.Typer) -> None:
    machine = typer.Typer(
        help="Machines: learn one from an event log, show, check, register, list.", rich_markup_mode=None
    )
    app.add_typer(machine, name="machine")
    options.command(machine, "learn")(learn)
    options.command(machine, "show")(show)
    options.command(machine, "check")(check)
    options.command(machine, "register")(register_)
    options.command(machine, "list")(list_)


def learn(
    store: options.Store,
    file: imports.File,
    id: imports.Id,
    event: imports.Event,
    at: imports.At,
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="The machine's name.")],
    out: Annotated[str, typer.Option("--output", "-o", metavar="FILE", help="Where the YAML goes; - prints it.")] = "-",
    title: Annotated[str | None, typer.Option("--title", help="The machine's title, for people.")] = None,
    version: Annotated[
        int, typer.Option("--version", metavar="N", help="The machine's version.", min=1, max=options.COUNT_MAX)
    ] = 1,
    form: imports.Format = None,
    delimiter: imports.Delimiter = None,
    encoding: imports.Encoding = "utf-8",
) -> None:
    """Learn a machine from an event log: a state and an event per activity, moves as the log shows them.

    Rows that cannot be used (no case, no activity, no time) are passed over and counted; an import refuses the same ones.
    """
    from statecache.core import document
    from statecache.core.learn import learn as learn_machine

    if out != "-" and Path(out).exists() and Path(out).samefile(file):
        raise errors.InvalidDataError(f"--output {out} is refused: it is the log itself, which would be lost")
    log = imports.open_log(file, id, event, at, None, None, form, delimiter, encoding)
    survey = imports.survey_of(log)
    learned = learn_machine(((row.id, row.event) for row in _usable(log, survey)), name, title=title, version=version)
    text = document.to_text(learned.spec)
    if out == "-" and not store.as_json:
        sys.stdout.write(text)
    elif out != "-":
        Path(out).write_text(text, encoding="utf-8")
    summary = {
        "machine": learned.spec.name, "version": learned.spec.version, "states": len(learned.spec.states),
        "events": len(learned.spec.events), "moves": sum(len(one.transitions) for one in learned.spec.events),
        "rows": survey.rows, "rows_passed_over": survey.unusable, "cases": survey.cases,
        "cases_sorted_by_time": len(survey.disordered), "output": out, "fingerprint": learned.spec.fingerprint,
    }  # fmt: skip
    _tell_learned(store, summary, text)


def _usable(log: LogFile, survey: Survey) -> Iterator[Row]:
    from statecache.core.eventlog import Row

    return (row for row in log.ordered(survey) if isinstance(row, Row))


def _tell_learned(store: options.Store, summary: dict[str, Any], text: str) -> None:
    if store.as_json:
        output.emit(summary | ({"yaml": text} if summary["output"] == "-" else {}))
        return
    if summary["output"] != "-":
        output.say(
            f"{summary['output']}: machine {summary['machine']} with {output.counted(summary['states'], 'state')}, "
            f"{output.counted(summary['events'], 'event')} and {output.counted(summary['moves'], 'move')}, learned from "
            f"{output.counted(summary['rows'], 'row')} of {output.counted(summary['cases'], 'case')}"
        )
        for number, what in (
            (summary["rows_passed_over"], "row passed over: no usable case, activity or time"),
            (summary["cases_sorted_by_time"], "case not in order of time: sorted by it"),
        ):
            if number:
                output.say(f"{output.count(number)} x {what}")


def show(
    store: options.Store,
    machine: Annotated[str, typer.Argument(metavar="MACHINE", help="A YAML file, or a registered name.")],
    view: Annotated[View, typer.Option("--format", help="How to draw it.", case_sensitive=False)] = View.TABLE,
    highlight: Annotated[
        str | None, typer.Option("--highlight", metavar="STATE", help="A state to fill (mermaid).")
    ] = None,
) -> None:
    """Show a machine: a table, its YAML, a Mermaid or a Graphviz diagram. With --json its parts."""
    from statecache.core import diagram, document

    if highlight is not None and (view is not View.MERMAID or store.as_json):
        raise errors.InvalidDataError(f"--highlight {highlight!r} is refused: only --format mermaid fills a state")
    spec = _spec(store, machine)
    if store.as_json:
        output.emit(spec.model_dump(mode="json", exclude_none=True) | {"fingerprint": spec.fingerprint})
    elif view is View.YAML:
        sys.stdout.write(document.to_text(spec))
    elif view is View.MERMAID:
        sys.stdout.write(diagram.mermaid(spec, highlight))
    elif view is View.DOT:
        sys.stdout.write(diagram.dot(spec))
    else:
        _print(spec)


def _spec(store: options.Store, machine: str) -> MachineSpec:
    if imports.is_file(machine):
        return imports.load(machine).spec
    with store.look() as cache:
        return cache.machine(machine).machine.spec


def _print(spec: MachineSpec) -> None:
    from statecache.core import diagram
    from statecache.core import spec as specs

    head = [("machine", f"{spec.name}, version {spec.version}"), ("title", spec.title), ("durability", spec.durability)]
    line = specs.steps(spec)
    out = output.console()
    out.print(output.facts([*head, ("main line", " -> ".join(line) if line else None)]))
    states = [
        (
            state.name, state.title, "initial" if state.initial else "final" if state.final else "",
            None if state.timeout_seconds is None else f"{diagram.span(state.timeout_seconds)}: {state.on_timeout or 'stuck'}",
        )
        for state in spec.states
    ]  # fmt: skip
    out.print(output.table(["state", "title", "", "after"], states))
    moves = []
    for event in spec.events:
        targets: dict[tuple[str, str | None], list[str]] = {}
        for move in event.transitions:
            targets.setdefault((move.target, move.guard), []).append(move.source)
        moves += [(event.name, event.title, ", ".join(froms), to, guard) for (to, guard), froms in targets.items()]
    out.print(output.table(["event", "title", "from", "to", "guard"], moves))


def check(store: options.Store, file: MachineFile) -> None:
    """Check a machine's YAML file; what is wrong is told by file, line and field, with exit code 2."""
    spec = imports.load(str(file)).spec
    if store.as_json:
        output.emit({"ok": True, "machine": spec.name, "version": spec.version, "fingerprint": spec.fingerprint})
    else:
        states, events = output.counted(len(spec.states), "state"), output.counted(len(spec.events), "event")
        output.say(f"{file}: machine {spec.name}, version {spec.version}: {states}, {events}; nothing wrong")


def register_(store: options.Store, file: MachineFile) -> None:
    """Register a machine in the store, so that it can be named. Repeating it changes nothing."""
    machine = imports.load(str(file))
    with store.open(create=True) as cache:
        known = cache.durable.machine(machine.spec.name, machine.spec.version) is not None
        cache.machine(machine)
    if store.as_json:
        output.emit(
            {
                "machine": machine.spec.name,
                "version": machine.spec.version,
                "fingerprint": machine.fingerprint,
                "new": not known,
            }
        )
    else:
        done = "was registered already" if known else "registered"
        output.say(f"machine {machine.spec.name}, version {machine.spec.version}: {done}")


def list_(store: options.Store) -> None:
    """List the registered machines. With --json one list of objects."""
    with store.look() as cache:
        rows = cache.durable.machines()
        counts = {name: sum(cache.durable.counts(name).values()) for name in {row.name for row in rows}}
    if store.as_json:
        output.emit(
            [
                {
                    "machine": row.name, "version": row.version, "fingerprint": row.fingerprint,
                    "registered_at": output.iso(row.registered_ms), "instances": counts[row.name],
                }
                for row in rows
            ]
        )  # fmt: skip
        return
    if not rows:
        output.say("no machine is registered yet: 'statecache machine register FILE'")
        return
    shown = [
        (row.name, row.version, output.count(counts[row.name]), output.moment(row.registered_ms), row.fingerprint[:12])
        for row in rows
    ]
    columns = ["machine", "version", "instances", "registered", "fingerprint"]
    output.console().print(output.table(columns, shown, right=["version", "instances"]))
