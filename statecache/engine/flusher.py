"""The flusher: moves the log into SQL, each entry exactly once (P5).

One step: read epoch, owner and watermark of the partitions from SQL; read the entries behind the watermarks through a script
that answers only under that epoch and owner, ready, on the true server (H2); check that each entry follows the one before it;
fold; ONE SQL transaction: first the compare-and-set on every partition's own row (H1), then history, checkpoints, counts;
after the commit one stamped script raises ``meta.watermark`` and trims (H7).

The cursor lives in SQL with the data, so there is no moment at which one is ahead of the other. Deaths:

- before COMMIT: nothing happened; the next step reads the same entries again;
- during COMMIT: unknown; the watermark is read back by the next step, which simply begins with SQL (fact 9 of the fault list);
- after COMMIT, before the trim: the next step's trim does both; so too where Redis refuses to write (its disk is full, replicas
  are missing), while what it holds is still read and saved.

Two flushers of one partition: one compare-and-set wins, the other's changes no row; it drops everything and starts from SQL.
That this is rare is what leases are for (``leases.py``). What a flusher remembers of a partition stays right when another went
ahead: a folded checkpoint is used only where the next entry's version follows it, watermarks are told only upwards.

While SQL works on one batch a thread reads and parses the next one, if there is more, or will be under a steady load: under the
same epoch and owner, behind the watermark that this commit will set. What it found is used only if SQL then says exactly that,
and is read again otherwise; that it found nothing is no answer to a later step.

A batch is what is there, up to ``batch_entries``; less where SQL takes longer for it than the wanted lag, or than it may, so
that the watermark moves under a slow database too, and heartbeats and signals are not kept waiting; less too where its
instances' data, all of which is written anew for each small patch, would take more memory than ``DATA_BYTES_MAX`` (the
transaction is rolled back when that shows, and tried again with what fits). No pause while there is more.
A hole in the log stops its partition: it is never skipped; a recovery is asked for.

Rejected: consumer groups (their cursor rolls back with Redis, and every read is a write); ``DO NOTHING`` in history (it hides
forks); parallel transactions per partition (one fsync for all is faster on the two cores that this was measured on).
"""

from __future__ import annotations

import collections
import contextlib
import functools
import logging
import math
import random
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import msgspec

from statecache import metrics as metering
from statecache.core import entry, errors, failpoints, fold
from statecache.durable.engine import TRANSACTION_SECONDS_MAX
from statecache.durable.faults import CommitUnknown, KeyHit, Overtaken, Refused, Transient
from statecache.durable.rows import PartitionRow
from statecache.durable.store import DurableStore
from statecache.engine import batching, folds, threads
from statecache.engine.leases import Leases
from statecache.hot import scripts, watching
from statecache.hot.answers import PartitionReply
from statecache.hot.store import READ_BYTES_MAX, HotStore

_log = logging.getLogger(__name__)
BATCH_ENTRIES_MIN = 100
LOOK_SECONDS_MAX = 5.0
"""How old a look may be that was taken ahead: the next step may come at any time."""
STEADY_ENTRIES = 1000
"""A step that moved as many expects more at once: what was written while SQL worked. No pause comes behind it, and the thread
looks ahead beside it. With the pause and without the look ahead one flusher moved a sixth less beside its writers."""
READ_ENTRIES_MAX = 1000
"""How many entries one script call reads: Redis does nothing else meanwhile (about 5 us an entry). With 5,000 a ``get`` that
came at that moment took up to 40 ms instead of 12; with 500 the flusher itself took 5 % more."""
FLUSH_SECONDS_MAX = 30
"""PostgreSQL ends a longer transaction: its process was perhaps stopped, and others wait for its partitions. A batch that takes
nearly as long is tried again in smaller ones; the smallest may take as long as any transaction."""
DATA_BYTES_MAX = 64 * 2**20
"""Data of the instances of one batch, if it has more than ``BATCH_ENTRIES_MIN`` entries. With the new data, and what the driver
makes of it, a step takes up to four times as much memory."""
_FITTING_SHARE = 0.8
_KEPT_MARKS = 200
"""Into about how many parts the kept tail is divided; a part is trimmed when all of it is old enough."""
_REFUSALS = (Refused, KeyHit)
_NOT_WELL = (errors.UnavailableError, errors.RecoveringError, errors.ConfigurationError)
"""Redis or SQL does not serve this flusher. A heartbeat says that they do (``elsewhere.py`` rests on it)."""


class Step(msgspec.Struct, frozen=True):
    """What one step did: entries moved, whether more wait or are to be expected, and the partitions that need a recovery."""

    entries: int
    more: bool
    stopped: dict[int, str]


class _Look(msgspec.Struct, frozen=True):
    """What the logs held behind the watermarks of ``rows``: batches, holes by partition, or why the script refused."""

    rows: list[PartitionRow]
    size: int
    refused: str | None
    batches: list[batching.Batch]
    holes: dict[int, str]


class _Ahead(threading.Thread):
    """A look at the logs while something else goes on. ``look`` is None when it failed."""

    def __init__(self, look: Callable[[], _Look], pair: scripts.Stamp) -> None:
        super().__init__(name="statecache-flusher-ahead", daemon=True)
        self._ask = look
        self.pair = pair
        self.began = time.monotonic()
        self.look: _Look | None = None

    def run(self) -> None:
        with contextlib.suppress(
            errors.StateCacheError
        ):  # the step that wants it asks again, and meets the error itself
            self.look = self._ask()


class Flusher:
    """Moves the logs of some partitions into SQL. One thread at a time; any number of processes."""

    def __init__(
        self,
        hot: HotStore,
        durable: DurableStore,
        finals: fold.Finals,
        admit: Callable[[str, float], None],
        *,
        partitions: Sequence[int],
        batch_entries: int = 5000,
        batch_bytes: int = 8 * 2**20,
        interval_seconds: float = 0.05,
        lag_target_seconds: float = 1.0,
        backlog_limit: int = 1_000_000,
        log_keep_seconds: float = 0.0,
        revive: Callable[[], None] = lambda: None,
        on_hole: Callable[[str], bool] = lambda hole: False,
        on_commit: Callable[[], None] = lambda: None,
        metrics: metering.Metrics | None = None,
    ) -> None:
        self.hot = hot
        self.durable = durable
        self.finals = finals
        self._admit = admit
        self._revive = revive
        self._on_hole = on_hole
        self._on_commit = on_commit
        self._metrics = metering.of(metrics)
        self._holes: dict[int, entry.EntryId] = {}
        self.partitions = list(partitions)
        self.batch_entries = batch_entries
        self.batch_bytes = batch_bytes
        self.interval_seconds = interval_seconds
        self.lag_target_seconds = lag_target_seconds
        self.backlog_limit = backlog_limit
        self.log_keep_seconds = log_keep_seconds
        self.wake = threads.Bell()
        self._lock = threading.Lock()
        self._cache = folds.Folds()
        self._stamp = scripts.NEVER
        self._kept: dict[int, collections.deque[tuple[float, entry.EntryId]]] = {}
        self._told: dict[int, tuple[entry.EntryId, entry.EntryId]] = {}
        self._ahead: _Ahead | None = None
        self._first = 0
        self._unsure: list[tuple[int, entry.EntryId, int]] = []
        self._untold = ""
        self._rate = 0.0
        self._size = batch_entries
        self._data_bytes_each = 0.0
        self._at_work = len(self.partitions)
        """Among how many partitions the rate is shared: those of the lease, whatever a single step is asked to do."""

    # --- one step ----------------------------------------------------------------------------------------------------

    def step(self, deadline: float | None = None, partitions: Sequence[int] | None = None) -> Step:
        """Move one batch, of some partitions or of all; one thread at a time. A deadline bounds each of its looks at Redis too.

        Raises ``UnavailableError`` when a server cannot be reached (nothing is lost: step again) and
        ``IntegrityError`` when what is in the log contradicts SQL."""
        numbers = self.partitions if partitions is None else partitions
        if not numbers:
            return Step(0, False, {})
        with self._lock:
            result = "failed"
            try:
                step = self._step(deadline, numbers)
                result = "stopped" if step.stopped else "moved" if step.entries else "idle"
            finally:
                self._metrics.add("statecache_flush_steps_total", 1, result)
            return step

    def _step(self, until: float | None, numbers: Sequence[int]) -> Step:
        deadline = time.monotonic() + 5.0 if until is None else until
        size = min(self._size, self.batch_entries)
        rows = self.durable.partitions(numbers)
        if self._unsure:
            self._count_unsure(rows)
        pair = scripts.Stamp(rows[0].epoch, rows[0].owner)
        if any((row.epoch, row.owner) != (pair.epoch, pair.owner) for row in rows):
            return Step(0, True, {})  # a recovery is writing them at this very moment
        if pair != self.hot.stamp or not pair.epoch:
            self._admit("EPOCH", deadline)
            if self.hot.stamp != pair:
                return Step(0, True, {})
        if pair != self._stamp:
            self._forget(pair)
        self._first = (self._first + 1) % len(rows)
        look = self._foreseen(rows, pair) or self._look(self._in_turn(rows), size, pair, until)
        failpoints.hit("flusher.read")
        if look.refused:
            self._admit(look.refused, deadline)
            return Step(0, True, {})
        rows, size, stopped = look.rows, look.size, look.holes
        batches = [batch for batch in look.batches if batch.last != batch.row.watermark]
        if stopped:
            stopped = self._confirmed(rows, stopped)
            if self._is_mended(rows, stopped):
                return Step(0, True, {})
        count = sum(len(batch.records) for batch in batches)
        more = any(batch.last < batch.tail for batch in batches) or count >= min(size, STEADY_ENTRIES)
        if more and not look.holes:
            self._look_ahead(rows, batches, min(self._size, self.batch_entries), pair, until)
        parked: set[fold.Instance] = set()
        if batches:
            started = time.monotonic()
            try:
                parked = self._commit(batches)
            except Overtaken:
                self._forget(pair)
                return Step(0, True, stopped)
            except batching.TooMuchDataError as error:
                self._note_data(error.bytes_each)
                self._size = min(self._smaller(size), self._fitting())
                return Step(0, True, stopped)
            except errors.UnavailableError as error:
                if time.monotonic() - started > 0.8 * FLUSH_SECONDS_MAX:
                    self._size = self._smaller(size)
                if isinstance(error, CommitUnknown):
                    self._forget(pair)
                raise
            seconds = time.monotonic() - started
            self._on_commit()
            self._measure(count, size, seconds)
            self._metrics.observe("statecache_flush_batch_size", count)
            self._metrics.observe("statecache_flush_commit_seconds", seconds)
        self._tell(rows, batches, parked, pair)
        return Step(count, more, stopped)

    def _look(self, rows: list[PartitionRow], size: int, pair: scripts.Stamp, until: float | None) -> _Look:
        """Read and parse what stands behind the rows' watermarks."""
        seen_ms = int(time.time() * 1000)
        cursors = [(row.partition, row.watermark) for row in rows]
        replies = self._read(cursors, size, pair, until)
        refused = next((reply.code for reply in replies if reply.code != "OK"), None)
        if refused:
            return _Look(rows, size, refused, [], {})
        parsed = [
            batching.checked(row, reply.lines, reply.last, seen_ms) for row, reply in zip(rows, replies, strict=True)
        ]
        holes = {batch.row.partition: hole for batch, hole in parsed if hole}
        return _Look(rows, size, None, [batch for batch, _ in parsed], holes)

    def _read(
        self, cursors: Sequence[tuple[int, entry.EntryId]], size: int, pair: scripts.Stamp, until: float | None
    ) -> list[PartitionReply]:
        """What stands behind the cursors, a part at a time. Each part's script checks that it may be told; if one may not,
        nothing of the others counts."""
        found: dict[int, list[str]] = {partition: [] for partition, _ in cursors}
        bytes_left = self.batch_bytes
        while True:
            asked, bytes_asked = min(size, READ_ENTRIES_MAX), min(bytes_left, READ_BYTES_MAX)
            replies = self.hot.read(cursors, entries=asked, bytes_max=bytes_asked, under=pair, deadline=until)
            if any(reply.code != "OK" for reply in replies):
                return replies
            for (partition, _), reply in zip(cursors, replies, strict=True):
                found[partition] += reply.lines
            count = sum(len(reply.lines) for reply in replies)
            size -= count
            bytes_left -= sum(len(line) for reply in replies for line in reply.lines)
            cursors = [
                (partition, _id_of(reply.lines[-1]) if reply.lines else cursor)
                for (partition, cursor), reply in zip(cursors, replies, strict=True)
            ]
            at_end = all(cursor >= reply.last for (_, cursor), reply in zip(cursors, replies, strict=True))
            if at_end or not count or size <= 0 or bytes_left <= 0:
                break
        return [
            PartitionReply(reply.code, reply.last, found[partition])
            for (partition, _), reply in zip(cursors, replies, strict=True)
        ]

    def _look_ahead(
        self,
        rows: Sequence[PartitionRow],
        batches: Sequence[batching.Batch],
        size: int,
        pair: scripts.Stamp,
        until: float | None,
    ) -> None:
        """Begin to look at what stands behind these batches."""
        last = {batch.row.partition: batch.last for batch in batches}
        behind = [msgspec.structs.replace(row, watermark=last.get(row.partition, row.watermark)) for row in rows]
        self._ahead = _Ahead(functools.partial(self._look, self._in_turn(behind, 1), size, pair, until), pair)

    def _start_ahead(self) -> None:
        """Let the look begin that was put off until SQL has something to do."""
        ahead = self._ahead  # another thread that ends may take it away
        if ahead is not None and not ahead.ident:
            # No thread to be had (limits, the interpreter's end): the next step looks.
            with contextlib.suppress(RuntimeError):
                ahead.start()

    def _foreseen(self, rows: Sequence[PartitionRow], pair: scripts.Stamp) -> _Look | None:
        """What was found ahead, if SQL stands where it was looked for and nothing stood in the way."""
        ahead = self.rest()
        if ahead is None or ahead.look is None or ahead.pair != pair or ahead.look.refused or ahead.look.holes:
            return None
        if time.monotonic() - ahead.began > LOOK_SECONDS_MAX:
            return None
        wanted = {row.partition: row for row in rows}
        look = ahead.look
        found = {row.partition: row.watermark for row in look.rows}
        if any(found.get(row.partition) != row.watermark for row in rows):
            return None
        batches = [batch for batch in look.batches if batch.row.partition in wanted]
        if not any(batch.records for batch in batches):
            return None
        return _Look(
            [wanted[row.partition] for row in look.rows if row.partition in wanted], look.size, None, batches, {}
        )

    def rest(self) -> _Ahead | None:
        """Wait for the look that is under way, if one is."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            threads.join(ahead)
        return ahead

    def _confirmed(self, rows: Sequence[PartitionRow], holes: Mapping[int, str]) -> dict[int, str]:
        """The holes that are real: another flusher may have moved SQL's watermark, and trimmed, between our look at SQL and
        our look at the log."""
        before = {row.partition: row.watermark for row in rows}
        now = self.durable.partitions(list(holes))
        return {row.partition: holes[row.partition] for row in now if row.watermark == before[row.partition]}

    def _is_mended(self, rows: Sequence[PartitionRow], holes: Mapping[int, str]) -> bool:
        """Ask for a recovery; once for each watermark at which a log stops, because it may not help. One that failed is asked
        for again."""
        fresh = {row.partition: row.watermark for row in rows if row.partition in holes}
        if all(self._holes.get(partition) == watermark for partition, watermark in fresh.items()):
            return False
        is_mended = self._on_hole(next(iter(holes.values())))
        self._holes.update(fresh)
        return is_mended

    def _in_turn(self, rows: Sequence[PartitionRow], ahead: int = 0) -> list[PartitionRow]:
        """Begin with another partition each step: the batch's size is shared, and the first ones take what they need."""
        first = (self._first + ahead) % len(rows)
        return [*rows[first:], *rows[:first]]

    def _forget(self, pair: scripts.Stamp) -> None:
        self._cache.clear()
        self._told.clear()  # not the marks of the kept tail: with each one forgotten it would grow for as long again
        self._stamp = pair

    # --- the SQL transaction -----------------------------------------------------------------------------------------

    def _commit(self, batches: Sequence[batching.Batch]) -> set[fold.Instance]:
        """Move all batches in one transaction; returns the instances that are parked.

        When SQL refuses it for its data, each partition goes alone, cut in halves until the entry is found that SQL
        refuses: that one becomes a dead letter, and only its instance stops (P10).
        """
        try:
            return self._transaction(batches, {})
        except _REFUSALS as error:
            if len(batches) == 1 and len(batches[0].records) <= 1:
                if not batches[0].records:
                    raise
                return self._put_aside(batches[0], error)
        _log.error("SQL refuses a batch for its data: looking for the entry", extra={"partitions": len(batches)})
        parked: set[fold.Instance] = set()
        for batch in batches:
            for part in batch.halves() if len(batches) == 1 else (batch,):
                parked |= self._commit([part])
        return parked

    def _put_aside(self, batch: batching.Batch, error: errors.StateCacheError) -> set[fold.Instance]:
        """Make the one entry of a batch a dead letter; but an entry that SQL holds already is passed over, and said so."""
        record = batch.records[0]
        instance = (record.machine, record.id)
        place = {**batch.place(), "instance": ":".join(instance), "entry": str(record.entry_id)}
        if isinstance(error, KeyHit):
            known = self.durable.transition_ids(*instance, record.version)
            if (record.version, record.transition_id) in known:
                _log.error("entry %s is in SQL already: not written twice", record.entry_id, extra=place)
                return self._transaction([batch], {}, replayed=instance)
        _log.error("dead letter: %s:%s, entry %s: %s", *instance, record.entry_id, error, extra=place)
        try:
            return self._transaction([batch], {instance: str(error)})
        except _REFUSALS:  # another letter has its version, or SQL refuses the letter too: keep it under its entry id
            return self._transaction([batch.estranged()], {})

    def _transaction(
        self,
        batches: Sequence[batching.Batch],
        refused: Mapping[fold.Instance, str],
        replayed: fold.Instance | None = None,
    ) -> set[fold.Instance]:
        """The one SQL transaction of a flush. ``refused`` instances' first entries become dead letters."""
        batches = sorted(batches, key=lambda batch: batch.row.partition)
        now_ms = int(time.time() * 1000)
        limit_seconds = FLUSH_SECONDS_MAX if self._size > BATCH_ENTRIES_MIN else TRANSACTION_SECONDS_MAX
        with self._counted(batches), self.durable.flush_transaction(limit_seconds) as transaction:
            transaction.advance([batch.advance() for batch in batches])
            failpoints.hit("flusher.advanced")
            plan = batching.Plan(batches)
            if replayed:
                plan.pass_over(replayed)
            plan.put_aside(transaction.parked(plan.instances), "waits behind a dead letter", waiting=True)
            for instance, why in refused.items():
                plan.put_aside([instance], why)
            count = sum(len(batch.records) for batch in batches)
            plan.place(
                self._cache.take, transaction.checkpoints, DATA_BYTES_MAX if count > BATCH_ENTRIES_MIN else math.inf
            )
            transaction.insert_history(plan.lines(), plan.rows, meanwhile=lambda: plan.fold(self.finals))
            self._start_ahead()
            transaction.upsert_checkpoints(plan.changed, new=plan.begun)
            transaction.adjust_counts(plan.deltas)
            for letter in plan.letters:
                transaction.insert_letters([letter.row], letter.error, letter.waiting, now_ms)
            failpoints.hit("flusher.written")
        failpoints.hit("flusher.committed")
        self._cache.remember(plan.folds)
        if count >= BATCH_ENTRIES_MIN:  # fewer say little of what comes
            self._note_data(plan.data_bytes / count)
        return plan.parked

    @contextlib.contextmanager
    def _counted(self, batches: Sequence[batching.Batch]) -> Iterator[None]:
        """Count what a transaction moves; where it is unknown whether it has, the next step's look at SQL tells."""
        moved = [(batch.row.partition, batch.last, len(batch.records)) for batch in batches]
        try:
            yield
        except CommitUnknown:
            self._unsure = moved
            raise
        self._metrics.add("statecache_flushed_transitions_total", sum(count for _, _, count in moved))

    def _count_unsure(self, rows: Sequence[PartitionRow]) -> None:
        watermarks = {row.partition: row.watermark for row in rows}
        count = sum(count for partition, last, count in self._unsure if watermarks.get(partition) == last)
        self._metrics.add("statecache_flushed_transitions_total", count)
        self._unsure = []

    # --- after the commit --------------------------------------------------------------------------------------------

    def _tell(
        self,
        rows: Sequence[PartitionRow],
        batches: Sequence[batching.Batch],
        parked: Collection[fold.Instance],
        pair: scripts.Stamp,
    ) -> None:
        """Tell Redis what SQL has now. One that takes no writes (its disk is full, replicas are missing) can still be read:
        so this step has succeeded, the next one tells again, and the partitions need not go to others, who would fare alike."""
        untold = ""
        try:
            self._after(rows, batches)
            if parked:
                keyspace = self.hot.keyspace
                self.hot.park([(keyspace.partition_of(*one), ":".join(one)) for one in sorted(parked)], pair)
        except errors.UnavailableError as error:
            untold = str(error)
        if untold and not self._untold:
            _log.warning("what is flushed goes to SQL all the same, but Redis cannot be told: %s", untold)
        elif self._untold and not untold:
            _log.info("Redis can be told again what is flushed")
        self._untold = untold

    def _after(self, rows: Sequence[PartitionRow], batches: Sequence[batching.Batch]) -> None:
        """Tell Redis the new watermarks and the brake, and trim; also what an earlier step did not get to tell."""
        committed = {batch.row.partition: batch.last for batch in batches}
        told = []
        for row in rows:
            watermark = committed.get(row.partition, row.watermark)
            trim_to = self._trim_to(row.partition, watermark)
            if self._told.get(row.partition) != (watermark, trim_to):
                told.append((row.partition, watermark, trim_to, self.limit()))
        if not told:
            return
        codes = self.hot.flushed(told, self._stamp)
        failpoints.hit("flusher.told")
        for (partition, watermark, trim_to, _), code in zip(told, codes, strict=True):
            if code == "OK":
                self._told[partition] = (watermark, trim_to)

    def _trim_to(self, partition: int, watermark: entry.EntryId) -> entry.EntryId:
        """The newest watermark that is older than the tail to be kept; everything below it may go."""
        if self.log_keep_seconds <= 0:
            return watermark
        now = time.monotonic()
        marks = self._kept.get(partition)
        if marks is None:
            # What this process does not remember the log itself tells, or each restart would keep it for as long again.
            older_ms = self.hot.time_ms() - int(self.log_keep_seconds * 1000)
            oldest = watching.newest_older(self.hot, partition, watermark, older_ms)
            marks = self._kept[partition] = collections.deque([(now, oldest)])
        if marks[-1][1] < watermark and now - marks[-1][0] >= self.log_keep_seconds / _KEPT_MARKS:
            marks.append((now, watermark))
        while len(marks) > 1 and marks[1][0] <= now - self.log_keep_seconds:
            marks.popleft()
        return marks[0][1]

    def _measure(self, count: int, size: int, seconds: float) -> None:
        """Follow the rate at which SQL takes entries: what the brake and the size of a batch are set from."""
        if seconds > self.lag_target_seconds:
            self._size = self._smaller(size)
        elif count >= size and seconds < self.lag_target_seconds / 4:
            self._size = min(self.batch_entries, size * 2, self._fitting())
        rate = count / max(seconds, 1e-6)
        self._rate = rate if not self._rate else 0.8 * self._rate + 0.2 * rate

    def _smaller(self, size: int) -> int:
        return max(min(BATCH_ENTRIES_MIN, self.batch_entries), size // 2)

    def _note_data(self, bytes_each: float) -> None:
        """Remember what an entry's instance takes: at once if it is more than before, slowly if it is less."""
        self._data_bytes_each = max(bytes_each, 0.8 * self._data_bytes_each + 0.2 * bytes_each)

    def _fitting(self) -> int:
        """How many entries' instances fit into ``DATA_BYTES_MAX``, if they are like those before."""
        fitting = int(_FITTING_SHARE * DATA_BYTES_MAX / max(self._data_bytes_each, 1.0))
        return max(min(BATCH_ENTRIES_MIN, self.batch_entries), fitting)

    def limit(self) -> int:
        """The backlog a partition may have: what SQL takes within half the wanted lag, never less than a batch's share. The
        other half is for the batch that an entry is in, which counts when its last entry does, and for SQL's slower moments."""
        if not self._rate:
            return self.backlog_limit
        share = self._rate * self.lag_target_seconds / 2 / self._at_work
        return min(self.backlog_limit, max(int(share), self._size // self._at_work, 100))

    # --- the loop ----------------------------------------------------------------------------------------------------

    def run(
        self,
        stop: threading.Event,
        on_step: Callable[[Step], None] = lambda step: None,
        leases: Leases | None = None,
        on_turn: Callable[[], None] = lambda: None,
    ) -> None:
        """Step until told to stop, with ``leases`` only the partitions that they give. ``on_turn`` is called every time around.

        Errors are logged and waited out, never fatal. The leases are left to the caller.
        """
        failures, well = 0, True
        mine: Sequence[int] = self.partitions
        while not stop.is_set():
            on_turn()
            try:
                if leases is not None:
                    mine = self._remembering(mine, leases.turn(well=well))
                    self._at_work = max(1, len(mine))
                step = self.step(partitions=mine)
                failures, well = 0, True
            except Exception as error:  # also a mistake of ours: what is still well must not stop with it
                failures += 1
                # Others may have the right that this one lacks. Not so a contradiction in a log: it goes with its partition.
                well = not isinstance(error, _NOT_WELL)
                if isinstance(error, errors.UnavailableError):
                    self._revive()
                # A database that gave way to another writer is no news, unless it goes on so.
                level = logging.INFO if isinstance(error, Transient) and failures < 5 else logging.WARNING
                unknown = None if isinstance(error, errors.StateCacheError) else error
                _log.log(level, "flush failed, trying again: %s", error, extra={"failures": failures}, exc_info=unknown)
                stop.wait(min(2.0, 0.05 * 2 ** min(failures, 6)) * random.uniform(0.5, 1.0))
                continue
            on_step(step)
            if not step.more:
                self.wake.wait(self.interval_seconds)
                self.wake.clear()
        self.rest()

    def _remembering(self, before: Sequence[int], now: Sequence[int]) -> Sequence[int]:
        """The partitions of now; the folds of those that have gone to others only take memory."""
        if not set(before) <= set(now):
            with self._lock:
                self._cache.clear()
        return now


def _id_of(line: str) -> entry.EntryId:
    return entry.EntryId.parse(line.partition(entry.SEPARATOR)[0])
