"""What an onlooker asks SQL, for the gauges of metrics. Bounded: nothing here reads history or checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa

from statecache.core import entry
from statecache.durable import schema
from statecache.durable.rows import RecoveryRow
from statecache.durable.store import DurableStore

LETTERS_COUNTED_MAX = 100_000
_PAGE = 200

_letters = schema.dead_letters.c
_counts = schema.state_counts.c
_recoveries = schema.recoveries.c
_SOME_LETTERS = sa.select(_letters.machine, _letters.id).limit(LETTERS_COUNTED_MAX).subquery()
_LETTERS = sa.select(sa.func.count()).select_from(_SOME_LETTERS)
_PARKED = sa.select(sa.func.count()).select_from(sa.select(_SOME_LETTERS).distinct().subquery())
_DISCARDED = sa.select(sa.func.count()).where(schema.discards.c.machine != entry.FOREIGN)
_INSTANCES = sa.select(_counts.machine, _counts.state, sa.func.sum(_counts.count)).group_by(
    _counts.machine, _counts.state
)


def letters(store: DurableStore) -> tuple[int, int]:
    """Open dead letters, and the instances that they park; both counted among the first ``LETTERS_COUNTED_MAX``."""

    def ask(connection: sa.Connection) -> tuple[int, int]:
        return connection.execute(_LETTERS).scalar_one(), connection.execute(_PARKED).scalar_one()

    return store.database.read(ask)


def discarded(store: DurableStore) -> int:
    """Transitions that operators have discarded; a stranger's record was none."""
    return store.database.read(lambda connection: connection.execute(_DISCARDED).scalar_one())


def instances(store: DurableStore) -> list[tuple[str, str, int]]:
    """Instances of every machine and state, as of the watermark."""
    return store.database.read(
        lambda connection: [(machine, state, int(count)) for machine, state, count in connection.execute(_INSTANCES)]
    )


def recoveries_from(store: DurableStore, epoch: int) -> Iterator[RecoveryRow]:
    """Yield recoveries of ``epoch`` and later ones, oldest first."""
    key = sa.tuple_(_recoveries.epoch, _recoveries.owner)
    asked = sa.select(schema.recoveries).order_by(_recoveries.epoch, _recoveries.owner).limit(_PAGE)
    page = asked.where(_recoveries.epoch >= epoch)
    while rows := _rows(store, page):
        yield from rows
        page = asked.where(key > sa.tuple_(rows[-1].epoch, rows[-1].owner))


def _rows(store: DurableStore, statement: sa.Select[Any]) -> list[RecoveryRow]:
    return store.database.read(lambda connection: [RecoveryRow(*row) for row in connection.execute(statement)])
