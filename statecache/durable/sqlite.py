"""SQLite's bulk forms: tuples straight to the driver, which is twice as fast as dictionaries through Core.

What costs is one step of the B-trees for each row, and what the driver does for each parameter. For None and for a bool it
looks for adapters, ten times as long as binding a text takes: so an empty part goes as an empty text, which SQLite makes NULL.
Numbers go as text too: by its column's affinity each is a number before it is compared or written.
History is inserted by key: of its two indexes that is the one that lies all over the file (the other one is appended to).

Rejected, because measured no faster or slower (50,000 instances, random order): checkpoints or history WITHOUT ROWID,
clustered by the primary key or by the entry id; UPDATE, and INSERT of the missing, in the place of ON CONFLICT; many rows in
one statement; JSON taken apart by SQLite (two thirds as fast); mmap; a larger cache; more or less of the WAL before it is
moved into the file.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from statecache.durable import bulk, schema
from statecache.durable.rows import Row


def _insert(table: str, columns: Sequence[str]) -> str:
    return f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"


_ENTRY_VALUES = ("NULLIF(?, '')" if schema.transitions.c[name].nullable else "?" for name in schema.ENTRY_COLUMNS)
_INSERT_HISTORY = (
    f"INSERT INTO statecache_transitions ({', '.join(schema.ENTRY_COLUMNS)}) VALUES ({', '.join(_ENTRY_VALUES)})"
)
_machine_of = operator.itemgetter(schema.ENTRY_COLUMNS.index("machine"))
_id_of = operator.itemgetter(schema.ENTRY_COLUMNS.index("id"))
_INSERT_CHECKPOINTS = _insert("statecache_checkpoints", schema.CHECKPOINT_COLUMNS)
_UPSERT_CHECKPOINTS = (
    _INSERT_CHECKPOINTS
    + " ON CONFLICT (machine, id) DO UPDATE SET "
    + ", ".join(f"{name} = excluded.{name}" for name in schema.CHECKPOINT_CHANGES)
    + " WHERE statecache_checkpoints.version < excluded.version"
)
_ADJUST = (
    "INSERT INTO statecache_state_counts (partition, machine, state, count) VALUES (?, ?, ?, ?) "
    "ON CONFLICT (machine, state, partition) DO UPDATE SET count = statecache_state_counts.count + excluded.count"
)


class Sqlite:
    """See ``bulk.Forms``."""

    keys_max = 10_000
    batch_entries = 10_000  # a page that two entries change is written once, so a larger batch costs less an entry
    lateral = False

    def keys(self, *, named: bool = False) -> sa.FromClause:
        each = sa.func.json_each(sa.bindparam("keys", type_=sa.Text)).table_valued("key", "value", name="each")

        def part(index: int, name: str, type_: sa.types.TypeEngine[Any]) -> sa.Label[Any]:
            return sa.func.json_extract(each.c.value, f"$[{index}]", type_=type_).label(name)

        return sa.select(
            each.c.key.label("n"),
            part(0, "machine", sa.Text()),
            part(1, "id", sa.Text()),
            part(2, "version", sa.BigInteger()),
            part(3, "partition", sa.Integer()),
            *([part(4, "transition_id", sa.Text())] if named else []),
        ).subquery("k")

    def bind_keys(self, keys: Sequence[bulk.Key | bulk.NamedKey]) -> dict[str, object]:
        return {"keys": json.dumps(keys)}

    def insert_history(
        self,
        connection: sa.Connection,
        lines: Sequence[str],
        rows: Callable[[], Sequence[Row]],
        meanwhile: Callable[[], None],
    ) -> None:
        # Sorting is stable, so an instance's rows stay in the order of their versions.
        by_key = sorted(sorted(rows(), key=_id_of), key=_machine_of)
        connection.exec_driver_sql(_INSERT_HISTORY, by_key)
        meanwhile()

    def insert_checkpoints(self, connection: sa.Connection, lines: Sequence[str]) -> None:
        connection.exec_driver_sql(_INSERT_CHECKPOINTS, bulk.checkpoint_parts(lines))

    def upsert_checkpoints(self, connection: sa.Connection, lines: Sequence[str]) -> int:
        return connection.exec_driver_sql(_UPSERT_CHECKPOINTS, bulk.checkpoint_parts(lines)).rowcount

    def adjust_counts(self, connection: sa.Connection, deltas: Mapping[tuple[int, str, str], int]) -> None:
        connection.exec_driver_sql(_ADJUST, [(*key, change) for key, change in deltas.items()])

    def index_tail(self, connection: sa.Connection) -> None:
        """A B-tree is always up to date."""
