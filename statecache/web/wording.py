"""Numbers, times and values as the pages write them; addresses as links."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote, urlencode

from statecache.core import model

_VALUE_LENGTH_MAX = 500


def link(path: str, **parameters: object) -> str:
    """A local URL; parameters that are None are left out."""
    given = {name: str(value) for name, value in parameters.items() if value is not None}
    return f"{path}?{urlencode(given, quote_via=quote, safe='')}" if given else path


def instance_link(machine: str, id: str, version: int | None = None) -> str:
    return link("/instance", machine=machine, id=id, version=version)


def value(one: Any) -> str:
    """A data value: text as it is, everything else as JSON; a long one shortened."""
    text = one if isinstance(one, str) else json.dumps(one, ensure_ascii=False)
    return text if len(text) <= _VALUE_LENGTH_MAX else text[: _VALUE_LENGTH_MAX - 1] + "…"


def count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def duration(seconds: float | None) -> str:
    """Two units at most: ``3 d 4 h``."""
    if seconds is None:
        return "-"
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    units = (("y", 31_536_000), ("d", 86_400), ("h", 3600), ("min", 60), ("s", 1))
    left = int(seconds)
    parts: list[str] = []
    for name, size in units:
        if left >= size or parts:
            parts.append(f"{left // size} {name}" if left // size else "")
            left %= size
        if len(parts) == 2:
            break
    return " ".join(part for part in parts if part)


def moment(ms: int | None) -> str:
    """UTC, to the second."""
    return "-" if ms is None else model.datetime_of(ms).strftime("%Y-%m-%d %H:%M:%S")


def machine_time(ms: int) -> str:
    """What ``<time datetime=...>`` wants."""
    return model.datetime_of(ms).isoformat(timespec="milliseconds")


def ranges(numbers: Sequence[int]) -> str:
    """``0-3, 7``"""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][-1] == number - 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)
