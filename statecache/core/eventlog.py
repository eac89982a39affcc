"""Event logs as rows: what a line of a CSV or JSONL file says, or why it says nothing that can be used.

Pure: whoever opens the file hands its lines in. A line that cannot be used is a ``Refused`` with its reason and its place,
never an error, so that one bad line does not stop the rest; only what makes the whole file unreadable (a missing column,
an open quote) raises ``InvalidDataError``.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple, NoReturn

from statecache.core import errors, spreadsheet
from statecache.core.wording import shown

FIELD_BYTES_MAX = 16 * 1024 * 1024
_COLUMNS_TOLD_MAX = 40
_RAW_LENGTH_MAX = 10_000


class Columns(NamedTuple):
    """Which columns hold what. ``data`` maps a column to the data field that it becomes."""

    id: str
    event: str
    at: str
    actor: str | None = None
    data: Mapping[str, str] = {}

    def named(self) -> list[str]:
        """The columns that the file must have."""
        return [self.id, self.event, self.at, *([self.actor] if self.actor else []), *self.data]


class Row(NamedTuple):
    """One event of one case. ``raw`` is the line as it was, for whoever refuses it."""

    line: int
    id: str
    event: str
    at: datetime
    actor: str | None
    data: dict[str, Any]
    raw: Mapping[str, Any]


class Refused(NamedTuple):
    """A line that is no event, and why."""

    line: int
    reason: str
    raw: Mapping[str, Any]


# --- files -------------------------------------------------------------------------------------------------------------


def from_csv(lines: Iterable[str], columns: Columns, delimiter: str = ",") -> Iterator[Row | Refused]:
    """Read the rows of a CSV file, whose first line names the columns. An empty field is a missing one.

    A file with the columns of our own export is one: apostrophes that keep formulas from a spreadsheet are taken off.
    Raises ``InvalidDataError`` for a missing column and for a file that is no CSV from some line on.
    """
    csv.field_size_limit(FIELD_BYTES_MAX)
    reader = csv.reader(lines, delimiter=delimiter)
    header = _checked(reader, None)
    if header is None:
        raise errors.InvalidDataError("the event log is refused: it is empty, not even a line of column names")
    _check_columns(columns, header, delimiter)
    named = columns.named()
    guarded = spreadsheet.GUARDED if tuple(header) == spreadsheet.COLUMNS else frozenset()
    while True:
        line = reader.line_num + 1
        fields = _checked(reader, line)
        if fields is None:
            return
        if not fields:
            continue
        if len(fields) != len(header):
            raw = dict(zip(header, fields, strict=False)) | {"": fields[len(header) :]} if fields else {}
            yield Refused(line, f"it has {len(fields)} fields, the first line names {len(header)} columns", raw)
            continue
        texts = dict(zip(header, fields, strict=True))
        given = {name: texts[name] for name in named if texts[name] != ""}
        given |= {name: spreadsheet.plain(given[name]) for name in guarded & given.keys()}
        yield _row(line, given, columns, texts)


def _checked(reader: Any, line: int | None) -> list[str] | None:
    try:
        fields: list[str] | None = next(reader, None)
    except csv.Error as error:
        raise errors.InvalidDataError(
            f"the event log is refused from line {line or 1} on: it is no CSV: {error}; is a quote left open?"
        ) from None
    return fields


def _check_columns(columns: Columns, header: Sequence[str], delimiter: str) -> None:
    for name in columns.named():
        if header.count(name) > 1:
            raise errors.InvalidDataError(f"column {name!r} is refused: the file has {header.count(name)} of that name")
        if name not in header:
            other = next((mark for mark in ";\t,|" if mark != delimiter and mark in header[0]), None)
            hint = (
                f"; do its fields end with {other!r}? Then give it as the delimiter"
                if len(header) == 1 and other
                else ""
            )
            raise missing_column(name, header, hint)


def missing_column(name: str, known: Iterable[str], hint: str = "") -> errors.InvalidDataError:
    """The error for a column that the file does not have."""
    names = list(known)
    told = ", ".join(repr(one) for one in names[:_COLUMNS_TOLD_MAX])
    more = f" and {len(names) - _COLUMNS_TOLD_MAX} more" if len(names) > _COLUMNS_TOLD_MAX else ""
    return errors.InvalidDataError(f"the file has no column {name!r}; it has {told or 'none'}{more}{hint}")


def from_jsonl(lines: Iterable[str], columns: Columns) -> Iterator[Row | Refused]:
    """Read the rows of a file with one JSON object a line; null is a missing value.

    Raises ``InvalidDataError`` when a column stands in no line at all.
    """
    missing = dict.fromkeys(columns.named())
    known: dict[str, None] = {}
    any_object = False
    for line, text in enumerate(lines, 1):
        if text.isspace():
            continue
        try:
            raw = json.loads(text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            yield Refused(line, f"it is no JSON: {error}", {"": text.rstrip("\n")[:_RAW_LENGTH_MAX]})
            continue
        if not isinstance(raw, dict):
            yield Refused(line, f"it is no JSON object: {shown(raw)}", {"": text.rstrip("\n")[:_RAW_LENGTH_MAX]})
            continue
        any_object = True
        if missing:
            known.update(dict.fromkeys(list(raw)[:_COLUMNS_TOLD_MAX]) if len(known) < _COLUMNS_TOLD_MAX else {})
            for name in [name for name in missing if name in raw]:
                del missing[name]
        yield _row(line, {name: value for name, value in raw.items() if value is not None}, columns, raw)
    if missing and any_object:
        raise missing_column(next(iter(missing)), known)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"JSON knows no {name}")


# --- one row -----------------------------------------------------------------------------------------------------------


def _row(line: int, given: Mapping[str, Any], columns: Columns, raw: Mapping[str, Any]) -> Row | Refused:
    try:
        id = _name(given, columns.id)
        event = _name(given, columns.event)
        actor = _name(given, columns.actor) if columns.actor in given else None
        if columns.at not in given:
            raise ValueError(f"column {columns.at!r} is empty")
        at = moment(given[columns.at])
        data = {field: given[column] for column, field in columns.data.items() if column in given}
        for text in data.values():
            if isinstance(text, str):
                _check_characters(text)
    except ValueError as error:
        return Refused(line, str(error), raw)
    return Row(line, id, event, at, actor, data, raw)


def _name(given: Mapping[str, Any], column: str | None) -> str:
    assert column is not None
    value = given.get(column)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(
            f"column {column!r} is empty" if value is None else f"column {column!r}: {shown(value)} is no text"
        )
    if not value or value.isspace():
        raise ValueError(f"column {column!r} is empty")
    return _check_characters(value)


def _check_characters(text: str) -> str:
    """Refuse what was no UTF-8 (it is read as half surrogates, so that the rest of the file can be)."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{shown(text)} is no UTF-8 text; is the file in another encoding?") from None
    return text


_NUMBER = re.compile(r"[+-]?(\d{9,}(\.\d*)?|\d{1,8}\.\d+|0)")
_SPACE_BEFORE_OFFSET = re.compile(r"\s+(?=(?:[+-]\d\d(?::?\d\d)?|Z|UTC|GMT)$)", re.IGNORECASE)
_SLASHED = re.compile(r"(\d{4})/(\d\d?)/(\d\d?)(.*)", re.DOTALL)
_SCALES = ((1e11, 1), (1e14, 1e3), (1e17, 1e6), (1e20, 1e9))


def moment(value: object) -> datetime:
    """Read a timestamp: ISO 8601 in its variants, or seconds (milli, micro, nanoseconds, told by size) since 1970.

    Without an offset it is UTC. Eight digits are a date (20240531), also where the file holds them as a number. Raises
    ``ValueError`` with the rule. Dates whose order of day and month would have to be guessed (``03/04/2024``) are refused.
    """
    try:
        if isinstance(value, int) and 10_000_000 <= value <= 99_999_999:
            return _iso(str(value))
        if isinstance(value, str):
            text = value.strip()
            if not _NUMBER.fullmatch(text):
                return _iso(text)
            value = float(text) if "." in text else int(text)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            scale = next(scale for limit, scale in _SCALES if abs(value) < limit)
            return datetime.fromtimestamp(value / scale, UTC)
    except (ValueError, OverflowError, OSError, StopIteration):
        pass
    raise ValueError(
        f"timestamp {shown(value)} is refused: ISO 8601 (2024-05-31T14:05:00+02:00) or seconds or milliseconds since 1970"
    )


def _iso(text: str) -> datetime:
    text = _SPACE_BEFORE_OFFSET.sub("", text)
    if text[-3:].upper() in ("UTC", "GMT"):
        text = text[:-3] + "+00:00"
    slashed = _SLASHED.fullmatch(text)
    if slashed:
        year, month, day, rest = slashed.groups()
        text = f"{year}-{int(month):02d}-{int(day):02d}{rest}"
    when = datetime.fromisoformat(text)
    # astimezone fails at the calendar's ends, which is a ValueError or an OverflowError like any other bad time
    return when.replace(tzinfo=UTC) if when.tzinfo is None else when.astimezone(UTC)


# --- columns as data fields --------------------------------------------------------------------------------------------


def field_of(column: str) -> str:
    """The data field that a column becomes: what a field's name may not hold becomes ``_``."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", column)
    return (name if name[:1].isalpha() or name[:1] == "_" else f"_{name}")[:64]


def fields_of(columns: Sequence[str]) -> dict[str, str]:
    """Column -> data field. Raises ``InvalidDataError`` when two columns would become one field."""
    fields: dict[str, str] = {}
    for column in columns:
        field = field_of(column)
        if field in fields.values():
            raise errors.InvalidDataError(
                f"column {column!r} is refused as data: another one becomes the field {field!r} too"
            )
        fields[column] = field
    return fields


def typed(field_schema: Mapping[str, Any] | None, text: str) -> Any:
    """A CSV field as the data schema wants it: a number or truth value where it allows no text; else the text."""
    types = _types_of(field_schema or {})
    if not types or "string" in types or not types & {"number", "integer", "boolean"}:
        return text
    try:
        value = json.loads(text.lower())
    except ValueError:
        return text
    return value if isinstance(value, (bool, int, float)) else text


def _types_of(field_schema: Mapping[str, Any]) -> set[str]:
    """The JSON types that a schema names; none if it does not say so plainly."""
    if "type" in field_schema:
        named = field_schema["type"]
        return {named} if isinstance(named, str) else set(named)
    branches = field_schema.get("anyOf") or field_schema.get("oneOf") or []
    types = [_types_of(branch) for branch in branches if isinstance(branch, Mapping)]
    return set().union(*types) if types and all(types) else set()
