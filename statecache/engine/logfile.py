"""An event log's file, read in passes: what is in it, then its rows in order of time within each case.

Rows of a case keep the file's order unless they are not ordered by time; then they are sorted by it (stable: rows of one
moment keep their order). Which cases those are takes a first pass; the second streams everything else as it comes, and holds
back only the rows of cases out of order, each until its last row was read. So memory is one small entry a case, plus the
rows of the disordered cases that are under way.
"""

from __future__ import annotations

import codecs
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from operator import attrgetter
from pathlib import Path
from typing import TextIO

from statecache.core import errors, eventlog
from statecache.core.eventlog import Columns, Refused, Row

CSV_SUFFIXES = {".csv": ",", ".tsv": "\t", ".txt": ","}
JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")
_PROGRESS_ROWS = 500

Progress = Callable[[int], None]
"""Told from time to time how many rows have been read."""


@dataclass(frozen=True)
class Survey:
    """What a first pass found. ``disordered`` counts the rows of each case that is not in order of time."""

    rows: int
    unusable: int
    cases: int
    disordered: dict[str, int]


class LogFile:
    """One event log. ``form`` is ``csv`` or ``jsonl``; without it the file's name tells.

    Raises ``InvalidDataError``, from every pass, for a file that is missing, of no known kind, or without a column.
    """

    def __init__(
        self,
        path: Path,
        columns: Columns,
        *,
        form: str | None = None,
        delimiter: str | None = None,
        encoding: str = "utf-8",
    ) -> None:
        self.path = path
        self.columns = columns
        suffix = path.suffix.lower()
        self.form = form or ("csv" if suffix in CSV_SUFFIXES else "jsonl" if suffix in JSONL_SUFFIXES else "")
        if self.form not in ("csv", "jsonl"):
            kind = f"the format {form!r} is none" if form else "the kind of the file is not known"
            raise errors.InvalidDataError(
                f"{path}: {kind}: its name should end with .csv or .jsonl, or tell it (--format csv, --format jsonl)"
            )
        self.delimiter = delimiter or CSV_SUFFIXES.get(suffix, ",")
        if len(self.delimiter) != 1 or self.delimiter in '"\r\n':
            raise errors.InvalidDataError(
                f"delimiter {self.delimiter!r} is refused: it is one character, such as ',' or ';'"
            )
        self.encoding = _encoding(encoding)

    @contextmanager
    def _open(self) -> Iterator[TextIO]:
        try:
            with self.path.open(encoding=self.encoding, errors="surrogateescape", newline="") as file:
                if file.read(1) in ("\udcff", "\udcfe"):
                    raise errors.InvalidDataError(
                        f"{self.path} is refused: it looks like UTF-16; say so (--encoding utf-16)"
                    )
                file.seek(0)
                yield file
        except (OSError, UnicodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise errors.InvalidDataError(f"{self.path} cannot be read: {reason}") from None

    def __iter__(self) -> Iterator[Row | Refused]:
        with self._open() as file:
            if self.form == "csv":
                yield from eventlog.from_csv(file, self.columns, self.delimiter)
            else:
                yield from eventlog.from_jsonl(file, self.columns)

    def survey(self, progress: Progress = lambda rows: None) -> Survey:
        """Read the file once to its end."""
        rows = unusable = 0
        last: dict[str, datetime] = {}
        counts: dict[str, int] = {}
        disordered: dict[str, int] = {}
        for row in self:
            rows += 1
            if rows % _PROGRESS_ROWS == 0:
                progress(rows)
            if isinstance(row, Refused):
                unusable += 1
                continue
            counts[row.id] = counts.get(row.id, 0) + 1
            known = last.get(row.id)
            if known is None or known <= row.at:
                last[row.id] = row.at
            else:
                disordered[row.id] = 0
        progress(rows)
        return Survey(rows, unusable, len(counts), {id: counts[id] for id in disordered})

    def ordered(self, survey: Survey) -> Iterator[Row | Refused]:
        """The rows, those of each case in order of time; ``survey`` is that of this file."""
        left = dict(survey.disordered)
        held: dict[str, list[Row]] = {}
        for row in self:
            if isinstance(row, Refused) or row.id not in left:
                yield row
                continue
            held.setdefault(row.id, []).append(row)
            left[row.id] -= 1
            if left[row.id] == 0:
                yield from _by_time(held.pop(row.id))
        for rows in held.values():  # the file has changed meanwhile
            yield from _by_time(rows)


def _by_time(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=attrgetter("at"))


def _encoding(name: str) -> str:
    try:
        found = codecs.lookup(name).name
        io.TextIOWrapper(io.BytesIO(), found)  # refuses what is no encoding of text, such as hex
    except (LookupError, UnicodeError):
        raise errors.InvalidDataError(
            f"encoding {name!r} is refused: Python knows no encoding of text of that name"
        ) from None
    return "utf-8-sig" if found == "utf-8" else found
