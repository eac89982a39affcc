"""What commands print: tables and sentences for people, JSON for programs.

With ``--json`` standard output holds one JSON document (``status --watch``, ``flusher`` and ``up``: one a line), and nothing
else; an error is ``{"error": {"type": ..., "message": ...}}`` as the last line of standard error. Without it an error is a
sentence on standard error. Log lines and progress bars go to standard error, bars only if it is a terminal.

Ids, data and titles come from anywhere: for people every character that could steer a terminal is shown as an escape, and
nothing is read as rich's markup.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from statecache import logs
from statecache.core import errors, model
from statecache.core.claims import Held

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_PIPE_WIDTH = 500
"""Columns of a table that is not for a terminal: nobody's ``grep`` should meet a line broken in two."""


def safe(text: object) -> str:
    """The text with every control character as an escape, fit for a terminal."""
    return logs.escaped(str(text))


def emit(document: Any) -> None:
    """Print a JSON document on a line of its own."""
    sys.stdout.write(json.dumps(document, default=str) + "\n")
    sys.stdout.flush()


def say(text: str = "") -> None:
    """Print a sentence, or several lines of them."""
    sys.stdout.write("\n".join(safe(line) for line in text.split("\n")) + "\n")
    sys.stdout.flush()


def note(text: str) -> None:
    """Print a sentence beside the output."""
    sys.stderr.write(safe(text) + "\n")
    sys.stderr.flush()


def error(problem: BaseException, *, as_json: bool, kind: str = "") -> None:
    """Print what ended the command; ``kind`` takes the place of the error's type. Where the log is JSON, it is a log line."""
    if logs.speaks_json():
        told = {"error": kind or type(problem).__name__}
        logging.getLogger("statecache.cli").critical("%s", message_of(problem), extra=told)
    elif as_json:
        document: dict[str, Any] = {"type": kind or type(problem).__name__, "message": message_of(problem)}
        if isinstance(problem, (errors.DurabilityTimeout, errors.ParkedError)) and problem.receipt is not None:
            document["receipt"] = receipt_document(problem.receipt)
        sys.stderr.write(json.dumps({"error": document}) + "\n")
    else:
        lines = message_of(problem).split("\n")
        sys.stderr.write("error: " + "\n".join(safe(line) for line in lines) + "\n")
    sys.stderr.flush()


def message_of(problem: BaseException) -> str:
    """What is wrong, without secrets: drivers quote what they were given."""
    if isinstance(problem, errors.StateCacheError):
        return logs.scrubbed(str(problem))
    if isinstance(problem, OSError) and problem.strerror:
        where = f"{problem.filename}: " if problem.filename else ""
        return f"{where}{problem.strerror}"
    told = logs.scrubbed(f"{type(problem).__name__}: {problem}")
    return f"unexpected {told} (a bug in statecache; python -X dev shows where)"


# --- for people --------------------------------------------------------------------------------------------------------


def console(file: TextIO | None = None) -> Console:
    """A rich console that reads no markup and, in a pipe, neither colours nor breaks lines at 80 columns."""
    from rich.console import Console

    out = file or sys.stdout
    return Console(
        file=out, markup=False, emoji=False, highlight=False, width=None if out.isatty() else _PIPE_WIDTH, soft_wrap=False
    )  # fmt: skip


def table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str = "", right: Sequence[str] = ()
) -> RenderableType:
    """A table; ``right`` names the columns of numbers. Cells of None stay empty."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(title=Text(safe(title), style="bold") if title else None, box=box.SIMPLE_HEAD, title_justify="left")
    for name in columns:
        made.add_column(Text(name), justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text("" if cell is None else safe(cell)) for cell in row))
    return made


def facts(rows: Iterable[tuple[str, object]]) -> RenderableType:
    """Names and values, one pair a line; pairs with None are left out."""
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, show_header=False, pad_edge=False)
    made.add_column(style="bold")
    made.add_column(overflow="fold")
    for name, value in rows:
        if value is not None:
            made.add_row(Text(name), Text(safe(value)))
    return made


@contextmanager
def progress(title: str, total: int | None = None) -> Iterator[Any]:
    """A progress bar on standard error, gone when it is done; yields ``update(done)``. Nothing if that is no terminal."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console(sys.stderr), transient=True) as bars:
        task = bars.add_task(safe(title), total=total)
        yield lambda done: bars.update(task, completed=done)


def count(number: int) -> str:
    """1234567 -> 1,234,567"""
    return f"{number:,}"


def counted(number: int, noun: str) -> str:
    """``1 row``, ``2,000 rows``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def seconds(value: float | None) -> str:
    """A duration for people."""
    if value is None:
        return "-"
    if value < 1:
        return f"{value * 1000:.0f} ms"
    if value < 120:
        return f"{value:.1f} s"
    return (
        f"{value / 60:.0f} min"
        if value < 7200
        else f"{value / 3600:.1f} h"
        if value < 172_800
        else f"{value / 86400:.0f} d"
    )


def ranges(numbers: Sequence[int]) -> str:
    """Rising numbers for people: ``0-3, 7``."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1] = runs[-1][0], number
        else:
            runs.append((number, number))
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def moment(ms: int | None) -> str | None:
    """A time for people: UTC, milliseconds."""
    return None if ms is None else model.datetime_of(ms).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3] + "Z"


def shortened(text: str, length_max: int = 100) -> str:
    return text if len(text) <= length_max else text[: length_max - 3] + "..."


def data_text(data: Mapping[str, Any]) -> str:
    """Data fields for people."""
    return ", ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in data.items())


# --- for programs ------------------------------------------------------------------------------------------------------


def iso(ms: int | None) -> str | None:
    """A time for programs: ISO 8601 in UTC."""
    return None if ms is None else model.datetime_of(ms).isoformat(timespec="milliseconds")


def receipt_document(receipt: model.Receipt) -> dict[str, Any]:
    """A receipt as JSON."""
    return {
        "address": f"{receipt.machine}:{receipt.id}", "machine": receipt.machine, "id": receipt.id, "event": receipt.event,
        "from_state": receipt.from_state, "state": receipt.state, "version": receipt.version,
        "entry_id": receipt.entry_id, "at": iso(receipt.at_ms), "transition_id": receipt.transition_id,
        "duplicate": receipt.duplicate,
    }  # fmt: skip


def snapshot_document(snapshot: model.Snapshot) -> dict[str, Any]:
    """A snapshot as JSON."""
    return {
        "address": f"{snapshot.machine}:{snapshot.id}", "machine": snapshot.machine, "id": snapshot.id,
        "state": snapshot.state, "version": snapshot.version, "data": snapshot.data, "final": snapshot.final,
        "available_events": list(snapshot.available_events), "created_at": iso(snapshot.created_ms),
        "updated_at": iso(snapshot.updated_ms), "entry_id": snapshot.entry_id,
        "machine_version": snapshot.machine_version, "source": snapshot.source, "parked": snapshot.parked,
    }  # fmt: skip


def claim_document(held: Held) -> dict[str, Any]:
    """A claim as JSON."""
    return {
        "machine": held.machine, "id": held.id, "worker": held.worker, "token": held.token,
        "expires_at": iso(held.expires_ms),
    }  # fmt: skip


def transition_document(row: model.Transition) -> dict[str, Any]:
    """A row of history as JSON."""
    return {
        "version": row.version, "event": row.event, "from_state": row.from_state, "state": row.to_state,
        "at": iso(row.at_ms), "occurred_at": iso(row.occurred_ms), "transition_id": row.transition_id,
        "actor": row.actor, "reason": row.reason, "patch": row.patch, "unset": list(row.unset),
        "increments": row.increments, "machine_version": row.machine_version, "entry_id": row.entry_id,
        "durable": row.durable, "covers_from": row.covers_from, "complete": row.complete,
    }  # fmt: skip
