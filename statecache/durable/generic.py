"""The forms for any other database: SQLAlchemy Core alone, one key or row at a time where nothing better is portable."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import sqlalchemy as sa

from statecache.durable import bulk, schema
from statecache.durable.rows import Row

_checkpoints = schema.checkpoints.c
_counts = schema.state_counts.c

_UPDATE_CHECKPOINT = (
    sa.update(schema.checkpoints)
    .where(
        _checkpoints.machine == sa.bindparam("k_machine"),
        _checkpoints.id == sa.bindparam("k_id"),
        _checkpoints.version < sa.bindparam("k_version"),
    )
    .values({name: sa.bindparam(name) for name in schema.CHECKPOINT_CHANGES})
)
_CHECKPOINT_EXISTS = sa.select(sa.literal(1)).where(
    _checkpoints.machine == sa.bindparam("k_machine"), _checkpoints.id == sa.bindparam("k_id")
)
_UPDATE_COUNT = (
    sa.update(schema.state_counts)
    .where(
        _counts.partition == sa.bindparam("k_partition"),
        _counts.machine == sa.bindparam("k_machine"),
        _counts.state == sa.bindparam("k_state"),
    )
    .values(count=_counts.count + sa.bindparam("change"))
)


class Generic:
    """See ``bulk.Forms``."""

    keys_max = 1
    batch_entries = 5_000
    lateral = False

    def keys(self, *, named: bool = False) -> sa.FromClause:
        last = [sa.bindparam("k_transition_id", type_=sa.Text).label("transition_id")] if named else []
        return sa.select(
            sa.literal(0).label("n"),
            sa.bindparam("k_machine", type_=sa.Text).label("machine"),
            sa.bindparam("k_id", type_=sa.Text).label("id"),
            sa.bindparam("k_version", type_=sa.BigInteger).label("version"),
            sa.bindparam("k_partition", type_=sa.Integer).label("partition"),
            *last,
        ).subquery("k")

    def bind_keys(self, keys: Sequence[bulk.Key | bulk.NamedKey]) -> dict[str, object]:
        names = ("k_machine", "k_id", "k_version", "k_partition", "k_transition_id")
        return dict(zip(names, keys[0], strict=False))

    def insert_history(
        self,
        connection: sa.Connection,
        lines: Sequence[str],
        rows: Callable[[], Sequence[Row]],
        meanwhile: Callable[[], None],
    ) -> None:
        names = schema.ENTRY_COLUMNS
        numbers = [names.index(name) for name in names if isinstance(schema.transitions.c[name].type, sa.Integer)]
        values = []
        for row in rows():
            parts = list(row)
            for index in numbers:
                parts[index] = None if parts[index] in (None, "") else int(parts[index])  # type: ignore[call-overload]
            values.append(dict(zip(names, [None if part == "" else part for part in parts], strict=True)))
        connection.execute(sa.insert(schema.transitions), values)
        meanwhile()

    def insert_checkpoints(self, connection: sa.Connection, lines: Sequence[str]) -> None:
        connection.execute(sa.insert(schema.checkpoints), _checkpoint_values(lines))

    def upsert_checkpoints(self, connection: sa.Connection, lines: Sequence[str]) -> int:
        written = 0
        missing: list[str] = []
        for line, values in zip(lines, _checkpoint_values(lines), strict=True):
            key = {"k_machine": values["machine"], "k_id": values["id"]}
            changes = {name: values[name] for name in schema.CHECKPOINT_CHANGES}
            changed = connection.execute(
                _UPDATE_CHECKPOINT, {**changes, **key, "k_version": values["version"]}
            ).rowcount
            written += changed
            if not changed and connection.execute(_CHECKPOINT_EXISTS, key).first() is None:
                missing.append(line)
        if missing:
            self.insert_checkpoints(connection, missing)
        return written + len(missing)

    def adjust_counts(self, connection: sa.Connection, deltas: Mapping[tuple[int, str, str], int]) -> None:
        for (partition, machine, state), change in deltas.items():
            key = {"k_partition": partition, "k_machine": machine, "k_state": state}
            if not connection.execute(_UPDATE_COUNT, {**key, "change": change}).rowcount:
                row = {"partition": partition, "machine": machine, "state": state, "count": change}
                connection.execute(sa.insert(schema.state_counts), row)

    def index_tail(self, connection: sa.Connection) -> None:
        """A B-tree is always up to date."""


def _checkpoint_values(lines: Sequence[str]) -> list[dict[str, object]]:
    of = {column.name: int if isinstance(column.type, sa.Integer | sa.Boolean) else str for column in _checkpoints}
    return [
        {name: kind(part) for (name, kind), part in zip(of.items(), parts, strict=True)}
        for parts in bulk.checkpoint_parts(lines)
    ]
