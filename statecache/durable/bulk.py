"""What each database does in a form of its own. ``postgresql``, ``sqlite`` and ``generic`` hold the three sets of forms.

They give the same result; only the speed differs (SPEED.md 2.2, 2.3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import sqlalchemy as sa

from statecache.core import entry
from statecache.durable import faults, schema
from statecache.durable.rows import Row

Key = tuple[str, str, int, int]
"""``(machine, id, version, partition)``; the numbers are 0 where a statement does not ask for them."""

NamedKey = tuple[str, str, int, int, str]
"""The same, and a transition id."""


class Forms(Protocol):
    """The statements of one database."""

    @property
    def keys_max(self) -> int:
        """How many keys one statement may carry."""
        ...

    @property
    def batch_entries(self) -> int:
        """How many entries a flush transaction takes at most, if the settings say nothing."""
        ...

    @property
    def lateral(self) -> bool:
        """Whether each key is looked up by itself: PostgreSQL, given hundreds of keys to join, prefers to read tables of
        many times as many rows whole."""
        ...

    def keys(self, *, named: bool = False) -> sa.FromClause:
        """A relation ``n, machine, id, version, partition`` of the keys that ``bind_keys`` binds, ``n`` rising.

        ``named``: the key of a transition by its id, a fifth part ``transition_id`` behind them.
        """
        ...

    def bind_keys(self, keys: Sequence[Key | NamedKey]) -> dict[str, object]: ...

    def insert_history(
        self,
        connection: sa.Connection,
        lines: Sequence[str],
        rows: Callable[[], Sequence[Row]],
        meanwhile: Callable[[], None],
    ) -> None:
        """``FlushTransaction.insert_history``: an empty part, in lines and in rows, is NULL where the column allows it."""
        ...

    def insert_checkpoints(self, connection: sa.Connection, lines: Sequence[str]) -> None:
        """Lines are those of ``FlushTransaction.upsert_checkpoints``."""
        ...

    def upsert_checkpoints(self, connection: sa.Connection, lines: Sequence[str]) -> int: ...

    def adjust_counts(self, connection: sa.Connection, deltas: Mapping[tuple[int, str, str], int]) -> None: ...

    def index_tail(self, connection: sa.Connection) -> None:
        """Bring the entry index of history up to date, where that is not done by the insert."""
        ...


def checkpoint_parts(lines: Sequence[str]) -> list[tuple[str, ...]]:
    """The columns of checkpoints' lines, as texts. Raises ``Refused`` where there are more or fewer."""
    rows = [tuple(line.split(entry.SEPARATOR)) for line in lines]
    if any(len(row) != len(schema.CHECKPOINT_COLUMNS) for row in rows):
        raise faults.Refused("a checkpoint has a part that holds what no part can hold")
    return rows


def execute_counted(connection: sa.Connection, statement: sa.Executable, values: Sequence[Mapping[str, object]]) -> int:
    """Run ``statement`` for each of ``values``, in their order, and return how many rows changed in all."""
    if not values:
        return 0
    if connection.dialect.supports_sane_multi_rowcount:
        return connection.execute(statement, values).rowcount
    return sum(connection.execute(statement, one).rowcount for one in values)
