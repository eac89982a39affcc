"""Dead letters: entries that SQL refused, and the later ones of the same instance, which wait behind them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from statecache.core import entry
from statecache.durable import schema
from statecache.durable.rows import Discard, Instance, Letter, Row

_letters = schema.dead_letters.c
PARKED = (
    sa.select(_letters.machine, _letters.id)
    .distinct()
    .order_by(_letters.machine, _letters.id)
    .limit(sa.bindparam("k_limit", type_=sa.Integer))
)
_OF_INSTANCE = (
    sa.select(schema.dead_letters)
    .where(
        _letters.machine == sa.bindparam("k_machine", type_=sa.Text), _letters.id == sa.bindparam("k_id", type_=sa.Text)
    )
    .order_by(_letters.version)
)
_ENTRY = [schema.dead_letters.c[name] for name in schema.ENTRY_COLUMNS]
_NAMES_MAX = 1000


def _storable(value: object) -> object:
    """What a database refused in a text (NUL, half a surrogate pair) must not make it refuse the letter too."""
    if not isinstance(value, str):
        return value
    return value.replace("\0", "\ufffd").encode("utf-8", "replace").decode()


def insert(connection: sa.Connection, rows: Sequence[Row], error: str, waiting: bool, noted_ms: int) -> None:
    """Insert entries as letters. What is kept under its entry id (``entry.FOREIGN``) may be there already, and is not written
    twice: the same log was read again."""
    values = [
        dict(zip(schema.ENTRY_COLUMNS, map(_storable, row), strict=True))
        | {"error": _storable(error), "waiting": waiting, "noted_ms": noted_ms}
        for row in rows
    ]
    names = [value["id"] for value in values if value["machine"] == entry.FOREIGN]
    there: set[object] = set()
    for start in range(0, len(names), _NAMES_MAX):
        wanted = _letters.id.in_(names[start : start + _NAMES_MAX])
        there.update(
            connection.execute(sa.select(_letters.id).where(_letters.machine == entry.FOREIGN, wanted)).scalars()
        )
    values = [value for value in values if value["machine"] != entry.FOREIGN or value["id"] not in there]
    if values:
        connection.execute(sa.insert(schema.dead_letters), values)


def take(connection: sa.Connection, machine: str, id: str) -> list[Row]:
    """Delete the open letters of an instance and return their entries, oldest first."""
    mine = (_letters.machine == machine, _letters.id == id)
    rows = connection.execute(sa.select(*_ENTRY).where(*mine).order_by(_letters.version)).fetchall()
    connection.execute(sa.delete(schema.dead_letters).where(*mine))
    return [tuple(row) for row in rows]


def note_discards(connection: sa.Connection, rows: Sequence[Row], discarded_ms: int) -> None:
    """Remember entries as discarded. Where another one of an instance had the same entry id (an old primary's log) the last one
    is remembered: of the other recovery would make a letter again."""
    values: dict[tuple[object, ...], dict[str, object]] = {}
    for row in rows:
        found = dict(zip(schema.ENTRY_COLUMNS, row, strict=True))
        names = ("machine", "id", "epoch", "seq", "partition", "version", "transition_id")
        values[tuple(found[name] for name in names[:4])] = {name: found[name] for name in names} | {
            "discarded_ms": discarded_ms
        }
    c = schema.discards.c
    connection.execute(
        sa.delete(schema.discards).where(
            c.machine == sa.bindparam("m"),
            c.id == sa.bindparam("i"),
            c.epoch == sa.bindparam("e"),
            c.seq == sa.bindparam("s"),
        ),
        [dict(zip("mies", key, strict=True)) for key in values],
    )
    connection.execute(sa.insert(schema.discards), list(values.values()))


def discards(connection: sa.Connection) -> list[Discard]:
    """Return everything that was ever discarded."""
    c = schema.discards.c
    asked = sa.select(c.machine, c.id, c.epoch, c.seq, c.version, c.transition_id)
    return [
        Discard(row.machine, row.id, entry.EntryId(row.epoch, row.seq), row.version, row.transition_id)
        for row in connection.execute(asked)
    ]


def of_instance(connection: sa.Connection, machine: str, id: str) -> list[Letter]:
    """Return the open letters of an instance, oldest first."""
    return [_letter(row) for row in connection.execute(_OF_INSTANCE, {"k_machine": machine, "k_id": id})]


def parked(connection: sa.Connection, limit: int, after: Instance | None = None) -> list[Instance]:
    """Return up to ``limit`` instances that have open letters, by machine and id, behind ``after``."""
    asked = PARKED if after is None else PARKED.where(sa.tuple_(_letters.machine, _letters.id) > sa.tuple_(*after))
    return [(row.machine, row.id) for row in connection.execute(asked, {"k_limit": limit})]


def _letter(row: sa.Row[Any]) -> Letter:
    found = row._mapping
    parts: dict[str, Any] = {name: "" if found[name] is None else found[name] for name in entry.PARTS}
    parts["occurred_ms"] = str(parts["occurred_ms"])
    return Letter(
        entry.Entry(entry_id=entry.EntryId(found["epoch"], found["seq"]), **parts),
        found["partition"],
        found["error"],
        bool(found["waiting"]),
        found["noted_ms"],
    )
