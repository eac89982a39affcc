"""Dead letters: what an operator does with an instance that waits behind an entry which SQL refused.

Both acts take the whole queue of an instance, and only when nothing of it is under way: its hash is flagged as parked first (so
no transition is accepted), and its last entry must be at or below the watermark (so every entry of it is in history or in the
queue). Then ONE SQL transaction, which holds the partition's row against flushers and recoveries, moves or deletes the letters;
afterwards the hash is dropped, and comes back from SQL when it is asked for. Dead in between: whoever meets a parked hash
without open letters drops it the same way (``core/flows.py``). What was discarded is remembered (``statecache_discards``): an
older copy of Redis may bring those entries back, and their hash with them, which recovery then drops.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from statecache.core import entry, errors, failpoints, fold, keys
from statecache.durable import faults
from statecache.durable.flush import FlushTransaction
from statecache.durable.rows import PartitionRow
from statecache.hot import scripts

if TYPE_CHECKING:
    from statecache.engine.cache import StateCache


def retry(cache: StateCache, machine: str, id: str) -> int:
    """Move all letters of an instance into history and its checkpoint; returns how many.

    Raises ``NotFoundError`` without letters, ``IntegrityError`` when they do not continue SQL's history (then they can only be
    discarded), ``RecoveringError`` when a recovery came between, and the error of SQL when it still refuses them: nothing was
    changed.
    """
    row = _quiet(cache, machine, id)
    with _held(cache, row, f"{machine}:{id}") as transaction:
        records = [fold.entry_of_row(found) for found in transaction.take_letters(machine, id)]
        _require(records, machine, id)
        kept = transaction.checkpoints([(machine, id)]).get((machine, id))
        before = None if kept is None else fold.Before.of_checkpoint(kept)
        version = kept.version if kept else 0
        jump = records[0].event == entry.EVENT_RECONCILED
        if records[0].machine == entry.FOREIGN or (records[0].version != version + 1 and not jump):
            raise errors.IntegrityError(
                f"{machine}:{id}: its letters begin at version {records[0].version}, SQL's history ends at {version}: they "
                "cannot be joined; look at both and discard the letters"
            )
        now = fold.after_letters(before, records, row.partition)
        transaction.insert_transitions(
            [
                (*fold.entry_row(row.partition, record), version + 1 if one_covers else None, not one_covers)
                for record in records
                for one_covers in (record.event == entry.EVENT_RECONCILED,)
            ]
        )
        lines = [now.line(cache.finals)]
        transaction.upsert_checkpoints(lines if before else [], new=[] if before else lines)
        transaction.adjust_counts(
            fold.count_deltas([(row.partition, machine, before.state if before else None, now.state)])
        )
    failpoints.hit("letters.moved")
    _drop_hash(cache, machine, id, row.partition)
    return len(records)


def discard(cache: StateCache, machine: str, id: str) -> int:
    """Delete all letters of an instance: these transitions are lost, and the instance goes on from its checkpoint.

    Returns how many. Raises ``NotFoundError`` without letters, and ``RecoveringError`` when a recovery came between.
    """
    if machine == entry.FOREIGN:
        with cache.durable.flush_transaction() as transaction:
            found = transaction.take_letters(machine, id)
            _require(found, machine, id)
            transaction.note_discards(found, int(time.time() * 1000))
        return len(found)
    row = _quiet(cache, machine, id)
    with _held(cache, row, f"{machine}:{id}") as transaction:
        found = transaction.take_letters(machine, id)
        _require(found, machine, id)
        transaction.note_discards(found, int(time.time() * 1000))
    failpoints.hit("letters.moved")
    _drop_hash(cache, machine, id, row.partition)
    return len(found)


@contextlib.contextmanager
def _held(cache: StateCache, row: PartitionRow, address: str) -> Iterator[FlushTransaction]:
    """The transaction, which no flush and no recovery comes between. Raises ``RecoveringError`` where one came before it."""
    try:
        with cache.durable.flush_transaction() as transaction:
            transaction.hold(row.partition, row.epoch, row.owner)
            yield transaction
    except faults.Overtaken as error:
        raise errors.RecoveringError(
            f"the dead letters of {address}: a recovery went ahead, nothing was changed; do the same again"
        ) from error


def _require(found: list[tuple[object, ...]] | list[entry.Entry], machine: str, id: str) -> None:
    if not found:
        raise errors.NotFoundError(f"{machine}:{id} has no dead letters")


def _quiet(cache: StateCache, machine: str, id: str) -> PartitionRow:
    """Flag the hash as parked and see that nothing of the instance is unflushed; returns its partition's row."""
    partition = keys.partition_of(machine, id, cache.settings.partition_count)
    if not cache.durable.letters(machine, id):
        _drop_hash(cache, machine, id, partition)  # what an act that died before its end has left
        raise errors.NotFoundError(f"{machine}:{id} has no dead letters")
    deadline = cache.deadline(None)
    while True:
        stamp = cache.hot.stamp
        code, _, last = cache.hot.park([(partition, f"{machine}:{id}")])[0].partition(" ")
        if code == "TYPE":
            raise errors.IntegrityError(
                f"{machine}:{id}: its key in Redis holds something that statecache did not write; run 'statecache verify'"
            )
        if code not in ("OK", "GONE"):
            cache.admission.ensure(code, deadline)
            continue
        row = cache.durable.partitions([partition])[0]
        if scripts.Stamp(row.epoch, row.owner) != stamp:  # a recovery has begun: it counts on what SQL has now
            cache.admission.ensure("EPOCH", deadline)
        elif code == "GONE" or entry.EntryId.parse(last) <= row.watermark:
            return row
        else:
            cache.flush()


def _drop_hash(cache: StateCache, machine: str, id: str, partition: int) -> None:
    """Drop a parked hash (no other: it has not version 0). Raises what admission does: do the same again."""
    deadline = cache.deadline(None)
    while True:
        row = cache.durable.partitions([partition])[0]
        stamp = scripts.Stamp(row.epoch, row.owner)
        code = cache.hot.evict([(partition, f"{machine}:{id}", 0, str(row.watermark), 1)], stamp)[0]
        if code.partition(" ")[0] in ("OK", "GONE", "KEPT", "TYPE"):
            return
        cache.admission.ensure(code, deadline)
