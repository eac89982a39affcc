"""The cold tier's pages: what an evictor asks, oldest first, and what a warmer asks, newest first.

Both walk ranges of the find index (machine, state, updated_ms), page by page from where the last one ended, so a page costs
its rows and nothing else, however many instances there are. A page is one statement, hence one snapshot: the watermark of
each row's partition is of the same moment as the row (protocol holes H8, H9).
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from statecache.core import entry
from statecache.durable import schema
from statecache.durable.rows import Idle, Recent

_checkpoints = schema.checkpoints.c
_partitions = schema.partitions.c
_letters = schema.dead_letters.c

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

# No EXISTS: for that PostgreSQL may read all letters first, into a hash table.
_A_LETTER = (
    sa.select(sa.literal_column("1"))
    .where(_letters.machine == _checkpoints.machine, _letters.id == _checkpoints.id)
    .limit(sa.literal_column("1"))
    .scalar_subquery()
)
_RECENT = (
    sa.select(
        _checkpoints.id, _checkpoints.partition, _checkpoints.state, _checkpoints.version, _checkpoints.epoch,
        _checkpoints.seq, _checkpoints.created_ms, _at, _checkpoints.machine_version, _checkpoints.recent,
        _checkpoints.data, *_WATERMARK,
        _A_LETTER,
    )
    .select_from(_LOCATED)
    .where(*_IN_STATE)
    .where(_at <= _after_ms, (_at < _after_ms) | (_checkpoints.id < _after_id))
    .order_by(_at.desc(), _checkpoints.id.desc())
    .limit(_PAGE)
)  # fmt: skip
_RECENT_IN_PARTITION = _RECENT.where(_checkpoints.partition == sa.bindparam("k_partition", type_=sa.Integer))


def recent(
    connection: sa.Connection,
    machine: str,
    state: str,
    before: tuple[int, str],
    limit: int,
    partition: int | None = None,
) -> list[Recent]:
    """The next checkpoints of a state (in one partition), newest first, as the hashes that they are hydrated to."""
    values = {
        "k_machine": machine, "k_state": state, "after_ms": before[0], "after_id": before[1], "page": limit,
    }  # fmt: skip
    asked = _RECENT
    if partition is not None:
        asked, values["k_partition"] = _RECENT_IN_PARTITION, partition
    return [
        Recent(
            id, partition, at, f"{state_} {version} {epoch}-{seq} {created} {machine_version} {at}", ring, data,
            f"{watermark_epoch or 0}-{watermark_seq or 0}", bool(parked),
        )
        for id, partition, state_, version, epoch, seq, created, at, machine_version, ring, data, watermark_epoch,
            watermark_seq, parked in connection.execute(asked, values).fetchall()
    ]  # fmt: skip


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
