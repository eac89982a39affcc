"""``import`` and ``machine learn``: event logs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from statecache.cli import arguments, exits, options, output

if TYPE_CHECKING:
    from statecache.core.machine import StateMachine
    from statecache.engine.cache import StateCache
    from statecache.engine.logfile import LogFile, Survey
    from statecache.engine.replay import Counts

File = Annotated[Path, typer.Argument(metavar="FILE", help="The event log: .csv or .jsonl.")]
Id = Annotated[str, typer.Option("--id", metavar="COL", help="Column of the case: the instance's id.")]
Event = Annotated[str, typer.Option("--event", metavar="COL", help="Column of the activity: the event.")]
At = Annotated[str, typer.Option("--at", metavar="COL", help="Column of the time.")]
Format = Annotated[
    str | None, typer.Option("--format", metavar="KIND", help="csv or jsonl, if the name does not tell.")
]
Delimiter = Annotated[str | None, typer.Option("--delimiter", metavar="CHAR", help="Between CSV fields (a comma).")]
Encoding = Annotated[str, typer.Option("--encoding", metavar="NAME", help="Of the file.")]


def register(app: typer.Typer) -> None:
    options.command(app, "import")(import_)


def open_log(
    file: Path, id: str, event: str, at: str, actor: str | None, data: str | None, form: str | None,
    delimiter: str | None, encoding: str,
) -> LogFile:  # fmt: skip
    """The event log that the options of a command describe."""
    from statecache.core import eventlog
    from statecache.engine.logfile import LogFile

    columns = eventlog.Columns(id, event, at, actor, eventlog.fields_of(arguments.columns(data)))
    delimiter = "\t" if delimiter in ("\\t", "tab") else delimiter
    return LogFile(file, columns, form=form, delimiter=delimiter, encoding=encoding)


def survey_of(log: LogFile) -> Survey:
    """Read the log once; says so if cases are out of order."""
    with output.progress(f"reading {log.path.name}") as update:
        return log.survey(update)


def import_(
    store: options.Store,
    file: File,
    machine: Annotated[str, typer.Option("--machine", metavar="MACHINE", help="A YAML file, or a registered name.")],
    id: Id,
    event: Event,
    at: At,
    actor: Annotated[str | None, typer.Option("--actor", metavar="COL", help="Column of who did it.")] = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="COL,COL", help="Columns that become data fields of the transition.")
    ] = None,
    refused: Annotated[
        Path | None, typer.Option("--refused", metavar="PATH", help="Where refused rows go (FILE.refused.jsonl).")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check every row against the machine; write nothing.")
    ] = False,
    flush: Annotated[bool, typer.Option("--flush/--no-flush", help="End only when everything is in SQL.")] = True,
    patience: Annotated[
        float, typer.Option("--patience", metavar="SECONDS", help="Give up when nothing has moved for so long.", min=0)
    ] = 60.0,
    form: Format = None,
    delimiter: Delimiter = None,
    encoding: Encoding = "utf-8",
) -> int:
    """Replay an event log: one start per case, one transition per row, at the times of the file.

    Rows of a case are taken in the file's order, or by time where they are not ordered by time. A row that the machine
    does not allow is refused and noted in a side file with its line and the reason; exit code 1. The import may be run
    again at any time, also after it was killed: rows that are there already are recognised, none is applied twice.
    """
    log = open_log(file, id, event, at, actor, data, form, delimiter, encoding)
    survey = survey_of(log)
    if dry_run:
        counts = _check(store, log, survey, machine, refused)
    else:
        refused = refused or file.with_name(file.name + ".refused.jsonl")
        counts = _import(store, log, survey, machine, refused, flush, patience)
    side_file = str(refused) if refused is not None and counts.refused else None
    _tell(store, counts, survey, side_file, dry_run)
    return exits.FOUND if counts.refused else exits.DONE


def _check(store: options.Store, log: LogFile, survey: Survey, machine: str, refused: Path | None) -> Counts:
    from statecache.engine import replay

    settings = store.settings()
    if is_file(machine):
        definition = load(machine)
    else:
        with store.look() as cache:
            definition = cache.machine(machine).machine
    side_file = replay.RefusedFile(refused, dry_run=True)
    steps = replay.Replay(log, survey, definition, side_file, settings.limits)
    with output.progress(f"checking {log.path.name}", survey.rows) as update:
        return replay.check(steps, update)


def _import(
    store: options.Store, log: LogFile, survey: Survey, machine: str, refused: Path, flush: bool, patience: float
) -> Counts:
    from statecache.engine import importer, replay

    loaded = load(machine) if is_file(machine) else None
    side_file = replay.RefusedFile(refused)
    with store.open(create=loaded is not None, flusher=flush) as cache:
        definition = loaded or cache.machine(machine).machine
        _announce(store, cache, log, survey)
        steps = replay.Replay(log, survey, definition, side_file, cache.settings.limits)
        try:
            with output.progress(f"importing {log.path.name}", survey.rows) as update:
                return importer.Import(cache, steps, patience_seconds=patience).run(update, flush=flush)
        except KeyboardInterrupt:
            output.note("interrupted: what was applied stays applied; run the same command again to go on")
            raise


def _announce(store: options.Store, cache: StateCache, log: LogFile, survey: Survey) -> None:
    if not store.as_json:
        from statecache.settings import redact

        output.say(
            f"{log.path.name}: {output.counted(survey.rows, 'row')}, {output.counted(survey.cases, 'case')} "
            f"-> {redact(cache.redis_url)} and {redact(cache.database_url)}"
        )


def is_file(machine: str) -> bool:
    """Whether a machine is given as a file and not by its registered name."""
    return machine.endswith((".yaml", ".yml")) or "/" in machine or Path(machine).is_file()


def load(path: str) -> type[StateMachine]:
    """The machine of a YAML file."""
    from statecache.core.machine import StateMachine

    return StateMachine.load(path)


def _tell(store: options.Store, counts: Counts, survey: Survey, side_file: str | None, dry_run: bool) -> None:
    document: dict[str, Any] = dataclasses.asdict(counts)
    document |= {"cases": survey.cases, "cases_sorted_by_time": len(survey.disordered)}
    document |= {"refused_file": side_file, "dry_run": dry_run}
    if store.as_json:
        output.emit(document)
        return
    if survey.disordered:
        output.say(f"{output.counted(len(survey.disordered), 'case')} not in order of time: sorted by it")
    if counts.started_over:
        output.say(
            f"Redis lost data meanwhile and was recovered: compared anew {output.counted(counts.started_over, 'time')}"
        )
    rows: list[tuple[str, object]] = [
        ("rows", output.count(counts.rows)),
        ("starts", output.count(counts.starts)),
        ("transitions", output.count(counts.transitions)),
        (
            "there already",
            f"{output.counted(counts.duplicates, 'row')}, {output.counted(counts.starts_found, 'start')}",
        ),
        ("refused", output.count(counts.refused)),
    ]
    output.console().print(output.facts(rows))
    if counts.reasons:
        reasons = sorted(counts.reasons.items(), key=lambda item: -item[1])[:10]
        output.console().print(
            output.table(["rows", "why refused"], [(n, reason) for reason, n in reasons], right=["rows"])
        )
    if side_file:
        output.say(f"refused rows: {side_file}")
    if dry_run:
        output.say("nothing was written (--dry-run)")
