"""History that may go: that of instances which ended long ago.

Of such an instance two rows stay: the last one as it was (recovery's witness, and what a repeated call is answered
from), and in the place of the one before it a row ``@archived`` that stands for all versions up to there, as a
``@reconciled`` row does: it holds the data of that version, so that history still folds to the checkpoint.
Checkpoint, counts and hot copy are not touched: an address is never free for a second life, and everything that can
be asked of the instance's present is answered as before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import sqlalchemy as sa

from statecache.core import entry, model
from statecache.durable import bulk, faults, flush, schema
from statecache.durable.store import DurableStore


class Ended(NamedTuple):
    """An instance whose history may go."""

    machine: str
    id: str
    version: int
    partition: int
    updated_ms: int


class Collapse(NamedTuple):
    """What is to stand for an instance's history: ``data`` (JSON) and ``transition_id`` are those of ``version`` - 1."""

    machine: str
    id: str
    version: int
    rows: int
    """How many rows below version - 1 there are, to be deleted."""
    transition_id: str
    data: str
    complete: bool
    reason: str


_checkpoints = schema.checkpoints.c
_transitions = schema.transitions.c
_letters = schema.dead_letters.c

_DELETE = sa.delete(schema.transitions).where(
    _transitions.machine == sa.bindparam("m"),
    _transitions.id == sa.bindparam("i"),
    _transitions.version < sa.bindparam("v"),
)
_ARCHIVE = (
    sa.update(schema.transitions)
    .where(
        _transitions.machine == sa.bindparam("m"),
        _transitions.id == sa.bindparam("i"),
        _transitions.version == sa.bindparam("v"),
        _transitions.transition_id == sa.bindparam("t"),
        _transitions.event != entry.EVENT_ARCHIVED,
    )
    .values(
        event=entry.EVENT_ARCHIVED, from_state=None, actor=None, reason=sa.bindparam("why"), occurred_ms=None,
        patch=sa.bindparam("data"), unset=None, increments=None, covers_from=1, complete=sa.bindparam("whole"),
    )
)  # fmt: skip


def ended(
    store: DurableStore,
    machine: str,
    state: str,
    versions: Sequence[int],
    until_ms: int,
    after: tuple[int, str],
    limit: int,
) -> list[Ended]:
    """Return instances that are in ``state`` since ``until_ms`` or longer and have history to spare, oldest first. ``versions``
    are those of the machine in which it is final. (Not by the flag of a checkpoint, which is false where its flusher did not
    know the definition.)

    ``after`` is the ``(updated_ms, id)`` of the last one of the page before. Served by the index of checkpoints on state and
    age, and one step into history for each: those that were collapsed already cost that step again.
    """
    asked = (
        sa.select(_checkpoints.id, _checkpoints.version, _checkpoints.partition, _checkpoints.updated_ms)
        .join(
            schema.transitions,
            sa.and_(
                _transitions.machine == _checkpoints.machine,
                _transitions.id == _checkpoints.id,
                _transitions.version == _checkpoints.version - 1,
            ),
        )
        .where(
            _checkpoints.machine == machine,
            _checkpoints.state == state,
            _checkpoints.machine_version.in_(versions),
            _checkpoints.updated_ms <= until_ms,
            sa.tuple_(_checkpoints.updated_ms, _checkpoints.id) > sa.tuple_(*after),
            _checkpoints.version >= 3,
            _transitions.event != entry.EVENT_ARCHIVED,
            ~sa.exists().where(_letters.machine == _checkpoints.machine, _letters.id == _checkpoints.id),
        )
        .order_by(_checkpoints.updated_ms, _checkpoints.id)
        .limit(limit)
    )
    rows = store.database.pages(lambda connection: connection.execute(asked).fetchall())
    return [Ended(machine, *row) for row in rows]


def collapse(store: DurableStore, partitions: Sequence[tuple[int, int, str]], these: Sequence[Collapse]) -> None:
    """Put the ``@archived`` row in the place of each instance's older history, in ONE transaction for all.

    ``partitions`` are ``(number, epoch, owner)`` of all that the instances lie in: their rows are held, so that no flush and no
    recovery is under way there. Raises ``Overtaken``, having changed nothing, if anything is not as the caller read it.
    """
    with store.database.transaction() as connection:
        holder = flush.FlushTransaction(connection, store.forms, store.queries)
        for number, epoch, owner in sorted(partitions):
            holder.hold(number, epoch, owner)
        found = store.queries.checkpoints(connection, [(one.machine, one.id) for one in these])
        moved = [one for one in these if _version(found.get((one.machine, one.id))) != one.version]
        replaced = bulk.execute_counted(
            connection,
            _ARCHIVE,
            [
                {
                    "m": one.machine, "i": one.id, "v": one.version - 1, "t": one.transition_id, "why": one.reason,
                    "data": one.data, "whole": one.complete,
                }
                for one in these
            ],
        )  # fmt: skip
        deleted = bulk.execute_counted(
            connection, _DELETE, [{"m": one.machine, "i": one.id, "v": one.version - 1} for one in these]
        )
        if moved or replaced != len(these) or deleted != sum(one.rows for one in these):
            raise faults.Overtaken(
                f"{len(these)} instances have not the history any more that was archived: {len(moved)} moved, "
                f"{replaced} last rows, {deleted} of {sum(one.rows for one in these)} rows"
            )


def _version(kept: model.Checkpoint | None) -> int | None:
    return None if kept is None else kept.version
