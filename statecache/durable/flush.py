"""The flush transaction: what moves a batch of log entries into SQL, exactly once (promises P3, P5, P6, P10).

``advance`` comes first. It compares epoch, owner and watermark ON THE PARTITION'S OWN ROW and takes that row's lock, so

- of two flushers with the same entries one commits and the other changes zero rows (``Overtaken``), and
- a recovery, which writes its epoch into every partition row, waits for an open flush transaction, and no older flush
  can begin after it (protocol hole H1: comparing the epoch in the store's row does neither).

Everything else may then trust that nobody else writes for these partitions. History is inserted plainly: an entry that is
there already is a replay or a fork, and ``DO NOTHING`` would hide both. Whether an instance is parked is read here, behind
the compare-and-set, from SQL (hole H12).

An error inside leaves nothing behind: after one the transaction can only be rolled back, even if the caller swallowed it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import sqlalchemy as sa

from statecache.core import entry, errors, model
from statecache.durable import bulk, engine, faults, letters, queries, schema
from statecache.durable.rows import Advance, Instance, Row

_partitions = schema.partitions.c

_ADVANCE = (
    sa.update(schema.partitions)
    .where(
        _partitions.partition == sa.bindparam("p"),
        _partitions.epoch == sa.bindparam("e"),
        _partitions.owner == sa.bindparam("o"),
        _partitions.watermark_epoch == sa.bindparam("old_epoch"),
        _partitions.watermark_seq == sa.bindparam("old_seq"),
    )
    .values(
        watermark_epoch=sa.bindparam("new_epoch"),
        watermark_seq=sa.bindparam("new_seq"),
        tail_epoch=sa.bindparam("t_epoch"),
        tail_seq=sa.bindparam("t_seq"),
        tail_seen_ms=sa.bindparam("t_seen"),
    )
)
_HOLD = (
    sa.update(schema.partitions)
    .where(
        _partitions.partition == sa.bindparam("p"),
        _partitions.epoch == sa.bindparam("e"),
        _partitions.owner == sa.bindparam("o"),
    )
    .values(epoch=_partitions.epoch)
)


_REPORT = (
    sa.update(schema.recoveries)
    .where(schema.recoveries.c.epoch == sa.bindparam("e"), schema.recoveries.c.owner == sa.bindparam("o"))
    .values(report=sa.bindparam("text"))
)


def history_row(line: str) -> Row:
    """Split a line of ``insert_history`` into a row, NULL where a part is empty. Numbers stay text: SQLite converts."""
    return tuple([part or None for part in line.split(entry.SEPARATOR)])


class FlushTransaction:
    """An open write transaction; made by ``DurableStore.flush_transaction``. For one thread."""

    def __init__(self, connection: sa.Connection, forms: bulk.Forms, asked: queries.Queries) -> None:
        self._connection = connection
        self._forms = forms
        self._queries = asked
        self._failed = False

    def advance(self, moves: Sequence[Advance]) -> None:
        """Move the partitions' watermarks by compare-and-set. Call it first.

        Raises ``Overtaken`` if any of the rows is not what the caller read: drop everything and start from SQL again.
        """
        values = [
            {
                "p": move.partition, "e": move.epoch, "o": move.owner,
                "old_epoch": move.old.epoch, "old_seq": move.old.seq,
                "new_epoch": move.new.epoch, "new_seq": move.new.seq,
                "t_epoch": move.tail.epoch, "t_seq": move.tail.seq, "t_seen": move.seen_ms,
            }
            for move in sorted(moves, key=lambda move: move.partition)
        ]  # fmt: skip
        with self._guarded():
            changed = bulk.execute_counted(self._connection, _ADVANCE, values)
            if changed != len(values):
                raise faults.Overtaken(
                    f"{len(values) - changed} of {len(values)} partitions have another epoch, owner or watermark in SQL: "
                    "another flusher or a recovery went ahead"
                )

    def hold(self, partition: int, epoch: int, owner: str) -> None:
        """Lock the partition's row without moving it, for a write that must not meet a flush. Raises ``Overtaken``."""
        with self._guarded():
            if not self._connection.execute(_HOLD, {"p": partition, "e": epoch, "o": owner}).rowcount:
                raise faults.Overtaken(f"partition {partition} belongs to another epoch: a recovery went ahead")

    def parked(self, instances: Sequence[Instance]) -> set[Instance]:
        """Return those of the instances that have open letters. One cheap statement while there are few letters."""
        with self._guarded():
            return self._queries.parked(self._connection, instances)

    def checkpoints(self, instances: Sequence[Instance]) -> dict[Instance, model.Checkpoint]:
        """Return the checkpoints of those instances that have one, in one statement."""
        with self._guarded():
            return self._queries.checkpoints(self._connection, instances)

    def insert_history(
        self,
        lines: Sequence[str],
        rows: Callable[[], Sequence[Row]] | None = None,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        """Insert new transitions. Raises ``KeyHit`` if one of the versions is there already.

        ``lines`` are the log's packed texts with ``partition\\x1fepoch\\x1fseq\\x1f`` before them, best in the log's
        order (the entry index of PostgreSQL feeds on it). ``rows`` makes the same as tuples in ``schema.ENTRY_COLUMNS``
        order, an empty text or None for an empty part; it is called where the database cannot take the lines, and may be
        left out. ``meanwhile`` is called once, where the database works by itself while it does; the transaction is not
        to be used in it.
        """
        if not lines:
            meanwhile()
            return
        with self._guarded():
            make = rows or (lambda: [history_row(line) for line in lines])
            self._forms.insert_history(self._connection, lines, make, meanwhile)

    def insert_transitions(self, rows: Sequence[Row]) -> None:
        """Insert history rows with all columns of ``schema.transitions``, as recovery's ``@reconciled`` rows are."""
        if not rows:
            return
        with self._guarded():
            names = schema.transitions.columns.keys()
            values = [dict(zip(names, row, strict=True)) for row in rows]
            self._connection.execute(sa.insert(schema.transitions), values)

    def upsert_checkpoints(self, lines: Sequence[str], new: Sequence[str] = ()) -> int:
        """Write checkpoints, each an instance's last of this batch: its columns in ``schema.CHECKPOINT_COLUMNS`` order, joined
        by ``\\x1f``, ``final`` as 1 or 0.

        ``lines`` replace checkpoints of a lower version, or are inserted where there is none. ``new`` are known to have
        none, because their first transition is in this batch: they are inserted plainly (``KeyHit`` if that is wrong).
        Returns how many rows were written; fewer than given means that SQL held that version or a higher one.
        """
        with self._guarded():
            # By machine and id, with which they begin: so two transactions take their locks in one order.
            written = self._forms.upsert_checkpoints(self._connection, sorted(lines)) if lines else 0
            if new:
                self._forms.insert_checkpoints(self._connection, sorted(new))
            return written + len(new)

    def adjust_counts(self, deltas: Mapping[tuple[int, str, str], int]) -> None:
        """Add to the counts by ``(partition, machine, state)``."""
        changes = {key: deltas[key] for key in sorted(deltas) if deltas[key]}
        if not changes:
            return
        with self._guarded():
            self._forms.adjust_counts(self._connection, changes)

    def insert_letters(self, rows: Sequence[Row], error: str, waiting: bool, noted_ms: int) -> None:
        """Put entries aside as dead letters, in ``schema.ENTRY_COLUMNS`` order."""
        if not rows:
            return
        with self._guarded():
            letters.insert(self._connection, rows, error, waiting, noted_ms)

    def take_letters(self, machine: str, id: str) -> list[Row]:
        """Delete all open letters of an instance and return them, in ``schema.ENTRY_COLUMNS`` order, oldest first."""
        with self._guarded():
            return letters.take(self._connection, machine, id)

    def note_discards(self, rows: Sequence[Row], discarded_ms: int) -> None:
        """Remember letters, in ``schema.ENTRY_COLUMNS`` order, as discarded: recovery must know them again."""
        with self._guarded():
            letters.note_discards(self._connection, rows, discarded_ms)

    def report(self, epoch: int, owner: str, report_json: str) -> None:
        """Note in a recovery's row what it has to report so far."""
        with self._guarded():
            self._connection.execute(_REPORT, {"e": epoch, "o": owner, "text": report_json})

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        if self._failed:
            raise errors.StateCacheError("this transaction has failed: roll it back and begin another")
        self._failed = True
        with faults.translated(self._connection.dialect):
            yield
        self._failed = False

    def _check(self) -> None:
        """PostgreSQL answers COMMIT after an error with a silent ROLLBACK: never let that pass for a commit."""
        if self._failed:
            raise errors.StateCacheError("this transaction has failed and was rolled back: its error was swallowed")


@contextlib.contextmanager
def transaction(
    database: engine.Database, forms: bulk.Forms, asked: queries.Queries, limit_seconds: int
) -> Iterator[FlushTransaction]:
    """Open a flush transaction; it commits at the end of the block."""
    with database.transaction(limit_seconds=limit_seconds) as connection:
        tx = FlushTransaction(connection, forms, asked)
        yield tx
        tx._check()
