"""``retention`` and ``export``: history that leaves the database, or is copied out of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from statecache.cli import arguments, exits, options, output
from statecache.core import errors

if TYPE_CHECKING:
    from statecache.engine import retention as engine_retention

Machine = Annotated[str | None, typer.Option("--machine", metavar="NAME", help="Only this machine's.")]


def register(app: typer.Typer) -> None:
    options.command(app, "retention")(retention)
    options.command(app, "export")(export)


def retention(
    store: options.Store,
    older_than: Annotated[
        str, typer.Option("--older-than", metavar="TIME", help="How long ago an instance must have ended: 90d, 52w.")
    ],
    archive: Annotated[Path | None, typer.Option("--archive", metavar="DIR", help="Folder for the archives.")] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Keep no archive: the history is gone for good.")] = False,
    machine: Machine = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would leave the database.")] = False,
) -> int:
    """Take the history of instances that ended long ago out of the database; their last transition and state stay.

    An archive is written, flushed to the disk and read back before anything of it is deleted. It may be killed and run
    again at any time.
    """
    from statecache.engine import retention as engine_retention

    if (archive is None) != delete:
        raise errors.InvalidDataError(
            "retention wants one of --archive DIR (what is deleted is kept there) and --delete (it is gone for good)"
        )
    if archive is not None and archive.exists() and not archive.is_dir():  # a dry run, too, tells it
        raise errors.InvalidDataError(f"--archive {archive} is refused: it is no folder")
    age = arguments.duration("--older-than", older_than, unit_wanted=True)
    steps: list[engine_retention.Step] = []
    with store.look() if dry_run else store.open() as cache, output.progress("retention") as update:
        for step in engine_retention.run(cache, age, archive, machine=machine, dry_run=dry_run):
            steps.append(step)
            update(sum(one.instances for one in steps))
    _print_retention(store, steps, dry_run)
    return exits.FOUND if any(step.damaged for step in steps) else exits.DONE


def _print_retention(store: options.Store, steps: list[engine_retention.Step], dry_run: bool) -> None:
    told: dict[str, Any] = {
        "instances": sum(step.instances for step in steps),
        "transitions": sum(step.transitions for step in steps),
        "files": [step.file for step in steps if step.file],
        "damaged": [address for step in steps for address in step.damaged],
        "dry_run": dry_run,
    }
    if store.as_json:
        output.emit(told)
        return
    verb = "would leave" if dry_run else "left"
    output.say(
        f"{output.counted(told['transitions'], 'transition')} of {output.counted(told['instances'], 'instance')} {verb} "
        "the database"
    )
    for file in told["files"]:
        output.say(f"  {file}")
    for address in told["damaged"]:
        output.say(f"  left out, its history is damaged (run 'statecache verify'): {address}")


def export(
    store: options.Store,
    machine: Annotated[str, typer.Argument(metavar="MACHINE", help="The machine's name.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to: FILE.jsonl or FILE.csv, also with .gz.")],
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> int:
    """Write a machine's whole history in SQL to a file: a line per transition, by instance and version.

    In CSV, a text in id, transition_id, actor or reason that begins with = + - @ (a formula for a spreadsheet), a tab, a
    carriage return or an apostrophe has one apostrophe more before it: take the first one off to have the text. JSON lines
    hold every value as it is.
    """
    from statecache.engine import exporting

    if file.exists() and not force:
        raise errors.InvalidDataError(f"{file} is there already: choose another file, or say --force")
    if not file.parent.is_dir():
        raise errors.InvalidDataError(f"{file} is refused: there is no folder {file.parent}")
    with store.look() as cache, output.progress("export") as update, _told_by_its_name(file):
        step = exporting.Step(0, 0, None)
        for step in exporting.run(cache, machine, file):
            update(step.transitions)
    if store.as_json:
        output.emit({"file": str(file), "transitions": step.transitions})
    else:
        output.say(f"{output.counted(step.transitions, 'transition')} in {file}")
    return exits.DONE


@contextlib.contextmanager
def _told_by_its_name(file: Path) -> Iterator[None]:
    """What the system says of the unfinished file is told of the one that was asked for."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from error
