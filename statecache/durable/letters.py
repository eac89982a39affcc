"""Dead letters: entries that SQL refused, and the later ones of the same instance, which wait behind them."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa

from statecache.core import entry
from statecache.durable import schema
from statecache.durable.rows import Instance, Letter, Row

_letters = schema.dead_letters.c
_ENTRY = [schema.dead_letters.c[name] for name in schema.ENTRY_COLUMNS]


def _storable(value: object) -> object:
    """What a database refused in a text (NUL, half a surrogate pair) must not make it refuse the letter too."""
    if not isinstance(value, str):
        return value
    return value.replace("\0", "\ufffd").encode("utf-8", "replace").decode()


def insert(connection: sa.Connection, rows: Sequence[Row], error: str, waiting: bool, noted_ms: int) -> None:
    """Insert entries as letters."""
    values = [
        dict(zip(schema.ENTRY_COLUMNS, map(_storable, row), strict=True))
        | {"error": _storable(error), "waiting": waiting, "noted_ms": noted_ms}
        for row in rows
    ]
    connection.execute(sa.insert(schema.dead_letters), values)


def take(connection: sa.Connection, machine: str, id: str) -> list[Row]:
    """Delete the open letters of an instance and return their entries, oldest first."""
    mine = (_letters.machine == machine, _letters.id == id)
    rows = connection.execute(sa.select(*_ENTRY).where(*mine).order_by(_letters.version)).fetchall()
    connection.execute(sa.delete(schema.dead_letters).where(*mine))
    return [tuple(row) for row in rows]


def of_instance(connection: sa.Connection, machine: str, id: str) -> list[Letter]:
    """Return the open letters of an instance, oldest first."""
    asked = sa.select(schema.dead_letters).where(_letters.machine == machine, _letters.id == id)
    return [_letter(row) for row in connection.execute(asked.order_by(_letters.version))]


def parked(connection: sa.Connection, limit: int) -> list[Instance]:
    """Return up to ``limit`` instances that have open letters."""
    asked = sa.select(_letters.machine, _letters.id).distinct().order_by(_letters.machine, _letters.id).limit(limit)
    return [(row.machine, row.id) for row in connection.execute(asked)]


def _letter(row: sa.Row[tuple[object, ...]]) -> Letter:
    found = row._mapping
    texts = {name: found[name] or "" for name in ("from_state", "actor", "reason", "patch", "unset", "increments")}
    occurred = "" if found["occurred_ms"] is None else str(found["occurred_ms"])
    same = ("machine", "id", "version", "event", "to_state", "at_ms", "transition_id", "machine_version")
    return Letter(
        entry.Entry(
            entry_id=entry.EntryId(found["epoch"], found["seq"]),
            occurred_ms=occurred,
            **texts,
            **{name: found[name] for name in same},
        ),
        found["partition"],
        found["error"],
        bool(found["waiting"]),
        found["noted_ms"],
    )
