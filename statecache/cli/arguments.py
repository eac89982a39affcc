"""How words of the command line become values. Raises ``InvalidDataError`` naming the option, the value and the rule."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from statecache.core import errors

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d|w)?")
_UNIT_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


def address(text: str) -> tuple[str, str]:
    """``machine:id`` as (machine, id); the id may hold colons."""
    machine, colon, id = text.partition(":")
    if not (machine and colon and id):
        raise errors.InvalidDataError(f"address {text!r} is refused: it is machine:id, such as order:1001")
    return machine, id


def duration(option: str, text: str, *, unit_wanted: bool = False) -> timedelta:
    """``10m`` as a timedelta; a bare number means seconds, or is refused: where 90 for 90d would do harm."""
    found = _DURATION.fullmatch(text.strip())
    if not found or (unit_wanted and not found.group(2)):
        raise errors.InvalidDataError(
            f"{option} {_shown(text)} is refused: a number and ms, s, m, h, d or w, such as 10m"
        )
    try:
        return timedelta(seconds=float(found.group(1)) * _UNIT_SECONDS[found.group(2) or "s"])
    except OverflowError:
        raise errors.InvalidDataError(
            f"{option} {_shown(text)} is refused: it is longer than any time counted here"
        ) from None


def data(document: str | None, pairs: Sequence[str]) -> dict[str, Any]:
    """The fields of ``--data JSON`` (or ``--data @FILE``) and of each ``--set name=value``, which win."""
    fields: dict[str, Any] = {}
    if document is not None:
        text = _contents(document[1:]) if document.startswith("@") else document
        try:
            given = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise errors.InvalidDataError(f"--data {_shown(document)} is refused: it is no JSON: {error}") from None
        if not isinstance(given, dict):
            raise errors.InvalidDataError(f"--data {_shown(document)} is refused: it must be a JSON object")
        fields = given
    for pair in pairs:
        name, value = _pair("--set", pair)
        fields[name] = _json_or_text("--set", name, value)
    return fields


def increments(pairs: Sequence[str]) -> dict[str, int | float] | None:
    """Each ``--increment name=number``."""
    found: dict[str, int | float] = {}
    for pair in pairs:
        name, text = _pair("--increment", pair)
        value = _json_or_text("--increment", name, text)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise errors.InvalidDataError(f"--increment {pair!r} is refused: {text!r} is no number")
        found[name] = value
    return found or None


def columns(text: str | None) -> list[str]:
    """``A,B`` as a list; a column whose name holds a comma can be quoted as in CSV."""
    if not text:
        return []
    import csv

    try:
        return [name for name in next(csv.reader([text])) if name]
    except csv.Error as error:
        raise errors.InvalidDataError(f"columns {_shown(text)} are refused: {error}") from None


def _pair(option: str, text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise errors.InvalidDataError(f"{option} {text!r} is refused: it is name=value")
    return name, value


def _json_or_text(option: str, name: str, text: str) -> Any:
    """``12`` is a number, ``true`` a truth value, ``"12"`` and ``twelve`` are text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
    except ValueError:  # more digits than Python reads: a number all the same, and no text
        rule = "it has a number of too many digits"
    except RecursionError:
        rule = "it is nested too deeply"
    raise errors.InvalidDataError(f"{option} {name}={_shown(text)} is refused: {rule}; in double quotes it is text")


def _contents(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise errors.InvalidDataError(f"--data @{path} is refused: it is no UTF-8 text: {error.reason}") from None


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
