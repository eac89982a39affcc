"""The cold tier's pages: what an evictor asks, oldest first, and what a warmer asks, newest first.

Both walk ranges of the find index (machine, state, updated_ms), page by page from where the last one ended, so a page costs
its rows and nothing else, however many instances there are. A page is of one snapshot: the watermark of each row's partition
is of the same moment as the row (protocol holes H8, H9).
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import sqlalchemy as sa

from statecache.core import entry
from statecache.durable import queries, schema
from statecache.durable.rows import Idle, Recents

_checkpoints = schema.checkpoints.c
_partitions = schema.partitions.c

# A left join keeps the order of the index: SQLite would turn an inner one round, and sort.
_LOCATED = schema.checkpoints.outerjoin(schema.partitions, _partitions.partition == _checkpoints.partition)
_WATERMARK = (_partitions.watermark_epoch, _partitions.watermark_seq)
_IN_STATE = (_checkpoints.machine == sa.bindparam("k_machine"), _checkpoints.state == sa.bindparam("k_state"))
_at = _checkpoints.updated_ms
_after_ms = sa.bindparam("after_ms", type_=sa.BigInteger)
_after_id = sa.bindparam("after_id", type_=sa.Text)
_PAGE = sa.bindparam("page", type_=sa.Integer)

_IDLE = (
    sa.select(_checkpoints.id, _checkpoints.partition, _checkpoints.version, _at, *_WATERMARK)
    .select_from(_LOCATED)
    .where(*_IN_STATE, _at <= sa.bindparam("until_ms"))
    # The first bound is the index's, the second cuts what the page before has had of its last millisecond.
    .where(_at >= _after_ms, (_at > _after_ms) | (_checkpoints.id > _after_id))
    .order_by(_at, _checkpoints.id)
    .limit(_PAGE)
)


def _text(*parts: sa.ColumnElement[Any] | str) -> sa.ColumnElement[str]:
    """The parts' texts as one: a page of thousands is made where its columns are, and read by one name."""
    texts = [sa.literal(part) if isinstance(part, str) else sa.cast(part, sa.Text) for part in parts]
    return functools.reduce(operator.add, texts)


_RECENT = (
    sa.select(
        _at, _checkpoints.id, _checkpoints.partition,
        _text(
            _checkpoints.state, " ", _checkpoints.version, " ", _checkpoints.epoch, "-", _checkpoints.seq, " ",
            _checkpoints.created_ms, " ", _checkpoints.machine_version, " ", _at,
        ),
        _checkpoints.recent, _checkpoints.data,
    )
    .where(*_IN_STATE)
    .where(_at <= _after_ms, (_at < _after_ms) | (_checkpoints.id < _after_id))
    .order_by(_at.desc(), _checkpoints.id.desc())
    .limit(_PAGE)
)  # fmt: skip
_RECENT_IN_PARTITION = _RECENT.where(_checkpoints.partition == sa.bindparam("k_partition", type_=sa.Integer))


def recent(
    connection: sa.Connection,
    keyed: queries.Queries,
    machine: str,
    state: str,
    before: tuple[int, str],
    limit: int,
    partition: int | None = None,
) -> Recents:
    """The next checkpoints of a state (in one partition), newest first, as the hashes that they are hydrated to.

    Three statements: the connection is to be one snapshot.
    """
    values = {
        "k_machine": machine, "k_state": state, "after_ms": before[0], "after_id": before[1], "page": limit,
    }  # fmt: skip
    asked = _RECENT
    if partition is not None:
        asked, values["k_partition"] = _RECENT_IN_PARTITION, partition
    rows = connection.execute(asked, values).fetchall()
    parked = keyed.parked(connection, [(machine, row[1]) for row in rows])
    watermarks = {row.partition: str(row.watermark) for row in keyed.partitions(connection, None)}
    return Recents(rows, watermarks, {id for _, id in parked})


def idle(
    connection: sa.Connection, machine: str, state: str, after: tuple[int, str], until_ms: int, limit: int
) -> list[Idle]:
    """The next instances in a state that were last changed up to ``until_ms``, oldest first."""
    values: dict[str, Any] = {
        "k_machine": machine, "k_state": state, "until_ms": until_ms, "after_ms": after[0], "after_id": after[1],
        "page": limit,
    }  # fmt: skip
    return [
        Idle(machine, id, partition, version, at, entry.EntryId(epoch or 0, seq or 0))
        for id, partition, version, at, epoch, seq in connection.execute(_IDLE, values).fetchall()
    ]
