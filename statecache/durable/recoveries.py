"""The SQL side of recovery (DESIGN section 4): who owns the hot data set, and what each recovery found.

Epoch and owner stand in the store's row and in every partition row. ``take`` changes all of them in one transaction: it
waits there for open flush transactions, and none of the old epoch can commit behind it (promise P6, hole H1). Every later
step compares epoch and owner again and raises ``Superseded`` when a newer recovery has come; the caller then gives up.

Rows are locked in one order everywhere: the store's, then the partitions' by number. So these transactions and the
flushers' cannot deadlock.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence

import sqlalchemy as sa

from statecache.core import entry, errors
from statecache.durable import bulk, faults, queries, schema
from statecache.durable.rows import Above, Advance, RecoveryRow, Row
from statecache.durable.store import DurableStore

_store = schema.store.c
_partitions = schema.partitions.c
_recoveries = schema.recoveries.c


ABANDONED = 0
"""The heartbeat of a recovery that failed and said so."""


def take(
    store: DurableStore, old: tuple[int, str], new_epoch: int, new_owner: str, now_ms: int, process: str = ""
) -> None:
    """Make ``(new_epoch, new_owner)`` the owner of everything, if ``old`` still is, and open its row in the report.

    Waits for open flush transactions, and where one of a process that stands still is in the way it is ended. Raises
    ``Superseded`` if ``old`` is not the owner any more, ``CommitUnknown`` if the answer was lost: then ``store.identity()``
    tells whether it happened.
    """
    if new_epoch <= old[0]:
        raise ValueError(f"the new epoch {new_epoch} is not above {old[0]}")
    row = {"epoch": new_epoch, "owner": new_owner, "started_ms": now_ms, "heartbeat_ms": now_ms, "process": process}
    try:
        _take(store, old, row)
    except faults.Transient:  # who held the lock has been ended, if it stood still
        _take(store, old, row)


def _take(store: DurableStore, old: tuple[int, str], row: Mapping[str, object]) -> None:
    own = {"epoch": row["epoch"], "owner": row["owner"]}
    with store.database.transaction() as connection:
        _compare(connection, *old, values=own)
        numbers = connection.execute(sa.select(_partitions.partition).order_by(_partitions.partition)).scalars()
        bulk.execute_counted(
            connection,
            sa.update(schema.partitions)
            .where(_partitions.partition == sa.bindparam("p"))
            .values(epoch=sa.bindparam("e"), owner=sa.bindparam("o")),
            [{"p": number, "e": own["epoch"], "o": own["owner"]} for number in numbers],
        )
        connection.execute(sa.insert(schema.recoveries).values(**row, classes="", report=""))


def _compare(connection: sa.Connection, epoch: int, owner: str, values: Mapping[str, object] | None = None) -> None:
    """Lock the store's row if it has this epoch and owner, and set ``values`` in it."""
    changed = connection.execute(
        sa.update(schema.store)
        .where(_store.id == 1, _store.epoch == epoch, _store.owner == owner)
        .values(values or {"epoch": epoch})
    )
    if not changed.rowcount:
        raise faults.Superseded(f"epoch {epoch} of {owner or 'nobody'} has ended: a newer recovery owns this store")


def heartbeat(store: DurableStore, epoch: int, owner: str, now_ms: int) -> None:
    """Show that this recovery is alive. Raises ``Superseded``."""
    with store.database.transaction() as connection:
        _compare(connection, epoch, owner)
        connection.execute(
            sa.update(schema.recoveries)
            .where(_recoveries.epoch == epoch, _recoveries.owner == owner)
            .values(heartbeat_ms=now_ms)
        )


def finish(
    store: DurableStore,
    epoch: int,
    owner: str,
    report_json: str,
    classes: str,
    tails: Mapping[int, entry.EntryId],
    now_ms: int,
) -> None:
    """Write the report and, in the same transaction, reset the tails last seen, so that no loss is counted twice (H18).

    May be repeated after ``CommitUnknown``. Raises ``Superseded``.
    """
    with store.database.transaction() as connection:
        _compare(connection, epoch, owner)
        connection.execute(
            sa.update(schema.recoveries)
            .where(_recoveries.epoch == epoch, _recoveries.owner == owner)
            .values(heartbeat_ms=now_ms, finished_ms=now_ms, classes=classes, report=report_json)
        )
        bulk.execute_counted(
            connection,
            sa.update(schema.partitions)
            .where(_partitions.partition == sa.bindparam("p"))
            .values(tail_epoch=sa.bindparam("t_epoch"), tail_seq=sa.bindparam("t_seq"), tail_seen_ms=now_ms),
            [{"p": number, "t_epoch": tail.epoch, "t_seq": tail.seq} for number, tail in sorted(tails.items())],
        )


def recovery(store: DurableStore, epoch: int, owner: str) -> RecoveryRow | None:
    """Return one recovery's row."""
    asked = sa.select(schema.recoveries).where(_recoveries.epoch == epoch, _recoveries.owner == owner)
    row = store.database.read(lambda connection: connection.execute(asked).first())
    return None if row is None else RecoveryRow(*row)


def recoveries(store: DurableStore, limit: int = 20) -> list[RecoveryRow]:
    """Return the last recoveries, newest first."""
    asked = sa.select(schema.recoveries).order_by(_recoveries.epoch.desc(), _recoveries.started_ms.desc()).limit(limit)
    return [RecoveryRow(*row) for row in store.database.read(lambda connection: connection.execute(asked).fetchall())]


def complete_index(store: DurableStore) -> None:
    """Bring the entry index of history up to date, so that ``instances_above`` finds what it asks for in a few pages.

    PostgreSQL does so by itself about once a minute; what was flushed since takes 3 s a million entries. To be called while
    nothing is flushed, that is between ``take`` and ``finish``. Only the table's owner may; others go without.
    """
    with contextlib.suppress(errors.ConfigurationError), store.until(math.inf):
        store.database.read(store.forms.index_tail)


def instances_above(
    store: DurableStore, partition: int, entry_id: entry.EntryId, page: int = 1000
) -> Iterator[list[Above]]:
    """Yield, in pages, every instance of the partition whose checkpoint or open letter has an id above ``entry_id``.

    Streams within one snapshot; exhaust or close it. Costs O(what lies above), see ``queries.above``.
    """
    yield from queries.above(store.database, partition, entry_id, page)


def reconcile(
    store: DurableStore,
    move: Advance,
    transitions: Sequence[Row],
    checkpoints: Sequence[str],
    letters: Sequence[Row],
    deltas: Mapping[tuple[int, str, str], int],
    *,
    error: str = "",
    report_json: str = "",
    now_ms: int = 0,
) -> None:
    """Mend one partition in ONE transaction: compare-and-set the watermark, then rows of all kinds (hole H6).

    ``transitions`` have all columns of ``schema.transitions``, ``letters`` those of an entry; ``error`` is the letters'.
    ``report_json`` is what the recovery has to report so far: after a death the next one would find nothing wrong.
    Raises ``Superseded`` if epoch, owner or watermark are not those of ``move``.
    """
    try:
        with store.flush_transaction() as tx:
            tx.advance([move])
            tx.insert_transitions(transitions)
            tx.upsert_checkpoints(checkpoints)
            tx.insert_letters(letters, error, False, now_ms)
            tx.adjust_counts(deltas)
            tx.report(move.epoch, move.owner, report_json)
    except faults.Overtaken as overtaken:
        raise faults.Superseded(str(overtaken)) from overtaken
