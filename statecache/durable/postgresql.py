"""PostgreSQL's bulk forms: COPY of the log's own text, and checkpoints by way of a temporary table.

Rejected because slower (SPEED.md 2.2): insertmanyvalues (a third of the rate), unnest of arrays, JSON, ON CONFLICT
from the temporary table (an UPDATE ... FROM with an INSERT of what is missing does 1.1 times as much).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from statecache.durable import bulk, faults, schema
from statecache.durable.rows import Row

# Separator and quote can occur in no part of an entry, so nothing ever needs quoting. An empty part is NULL.
_FORMAT = "FORMAT csv, DELIMITER E'\\x1f', QUOTE E'\\x1e', ENCODING 'UTF8'"
_CHECKPOINT_COLUMNS = ", ".join(schema.CHECKPOINT_COLUMNS)
_CHECKPOINT_FORMAT = f"{_FORMAT}, FORCE_NOT_NULL (recent, data)"

_LINES = 500

_COPY_HISTORY = f"COPY statecache_transitions ({', '.join(schema.ENTRY_COLUMNS)}) FROM STDIN ({_FORMAT})"
_COPY_CHECKPOINTS = f"COPY statecache_checkpoints ({_CHECKPOINT_COLUMNS}) FROM STDIN ({_CHECKPOINT_FORMAT})"
_COPY_STAGE = f"COPY statecache_stage ({_CHECKPOINT_COLUMNS}) FROM STDIN ({_CHECKPOINT_FORMAT})"

# Made in each transaction that needs it, if it is not there: behind a transaction pooler the next one may run elsewhere.
# The planner has no statistics of it: without the two settings it may read all checkpoints to find a few thousand.
_MAKE_STAGE = (
    "CREATE TEMPORARY TABLE IF NOT EXISTS statecache_stage (LIKE statecache_checkpoints) ON COMMIT DELETE ROWS; "
    "SET LOCAL enable_hashjoin = off; SET LOCAL enable_mergejoin = off"
)
_UPDATE = (
    "UPDATE statecache_checkpoints AS c SET "
    + ", ".join(f"{name} = s.{name}" for name in schema.CHECKPOINT_CHANGES)
    + " FROM statecache_stage AS s WHERE c.machine = s.machine AND c.id = s.id AND c.version < s.version"
)
_INSERT_MISSING = (
    f"INSERT INTO statecache_checkpoints ({_CHECKPOINT_COLUMNS}) SELECT {_CHECKPOINT_COLUMNS} FROM statecache_stage AS s "
    "WHERE NOT EXISTS (SELECT FROM statecache_checkpoints AS c WHERE c.machine = s.machine AND c.id = s.id)"
)
_ADJUST = (
    "INSERT INTO statecache_state_counts AS c (partition, machine, state, count) "
    "SELECT * FROM unnest(%(partitions)s::int[], %(machines)s::text[], %(states)s::text[], %(counts)s::bigint[]) "
    "ON CONFLICT (machine, state, partition) DO UPDATE SET count = c.count + excluded.count"
)


class Postgresql:
    """See ``bulk.Forms``."""

    keys_max = 10_000
    batch_entries = 5_000
    lateral = True

    def keys(self, *, named: bool = False) -> sa.FromClause:
        def array(name: str, type_: sa.types.TypeEngine[Any]) -> sa.BindParameter[Any]:
            return sa.bindparam(name, type_=postgresql.ARRAY(type_))

        return (
            sa.func.unnest(
                array("machines", sa.Text()),
                array("ids", sa.Text()),
                array("versions", sa.BigInteger()),
                array("numbers", sa.Integer()),
                *([array("transition_ids", sa.Text())] if named else []),
            )
            .table_valued(
                sa.column("machine", sa.Text),
                sa.column("id", sa.Text),
                sa.column("version", sa.BigInteger),
                sa.column("partition", sa.Integer),
                *([sa.column("transition_id", sa.Text)] if named else []),
                with_ordinality="n",
                name="k",
            )
            .render_derived()
        )

    def bind_keys(self, keys: Sequence[bulk.Key | bulk.NamedKey]) -> dict[str, object]:
        names = ("machines", "ids", "versions", "numbers", "transition_ids")
        return dict(zip(names, map(list, zip(*keys, strict=True)), strict=False))

    def insert_history(
        self,
        connection: sa.Connection,
        lines: Sequence[str],
        rows: Callable[[], Sequence[Row]],
        meanwhile: Callable[[], None],
    ) -> None:
        _copy(connection, _COPY_HISTORY, lines, meanwhile)

    def insert_checkpoints(self, connection: sa.Connection, lines: Sequence[str]) -> None:
        _copy(connection, _COPY_CHECKPOINTS, lines)

    def upsert_checkpoints(self, connection: sa.Connection, lines: Sequence[str]) -> int:
        connection.exec_driver_sql(_MAKE_STAGE)
        _copy(connection, _COPY_STAGE, lines)
        written = connection.exec_driver_sql(_UPDATE).rowcount
        if written < len(lines):
            written += connection.exec_driver_sql(_INSERT_MISSING).rowcount
        return written

    def adjust_counts(self, connection: sa.Connection, deltas: Mapping[tuple[int, str, str], int]) -> None:
        partitions, machines, states = map(list, zip(*deltas, strict=True))
        counts = list(deltas.values())
        values = {"partitions": partitions, "machines": machines, "states": states, "counts": counts}
        connection.exec_driver_sql(_ADJUST, values)

    def index_tail(self, connection: sa.Connection) -> None:
        connection.execute(sa.select(sa.func.brin_summarize_new_values("statecache_transitions_entry")))


def _copy(
    connection: sa.Connection, statement: str, lines: Sequence[str], meanwhile: Callable[[], None] = lambda: None
) -> None:
    """Raises ``Refused`` if the server has not made as many rows as there are lines: a quote that is open, or a line's end in a
    part, would make one row of several, and nobody would miss the others."""
    raw: Any = connection.connection.dbapi_connection
    try:
        with raw.cursor() as cursor:
            with cursor.copy(statement) as copy:
                for start in range(0, len(lines), _LINES):  # the server works on these while the next are sent
                    copy.write("\n".join([*lines[start : start + _LINES], ""]).encode())
                meanwhile()
            if cursor.rowcount != len(lines):
                raise faults.Refused(f"SQL made {cursor.rowcount} rows of {len(lines)} lines")
    finally:
        if raw.closed:  # SQLAlchemy did not see this statement: tell it that the connection is gone
            connection.invalidate()
