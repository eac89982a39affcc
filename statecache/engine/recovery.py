"""Recovery: make Redis tell the truth again after any crash.

Five steps (DESIGN section 4), and what a death between any two of them leaves:

1. *Take it in SQL.* One transaction raises the epoch, with this recovery's owner token, in the store row and in EVERY
   partition row. It waits there for open flush transactions, and none begun before can commit after it: their
   compare-and-set names the old pair (H1). Dead here: SQL is an epoch ahead of Redis; whoever meets that next recovers again.
2. *Fence each partition.* From here on no script of an older epoch writes (P6). The fence leaves identity, watermark and
   ``evicted_to`` as they are (H15) and returns the identity of this moment: every later step runs only on that server, under
   this epoch and owner, and ``recovering`` (H4). Dead here: ``recovering``; the next recovery takes a higher epoch.
3. *Classify*, with SQL's watermark W read after step 1, and mend. Nothing in Redis changes but drops of hashes that SQL knows
   better; they come back by hydration. Dead here: some are dropped already, and marked cold; the next one drops the rest.
4. *Report*, in one transaction with the reset of the tails last seen (H18): a loss is counted once. What step 3 wrote into SQL
   was reported with it, in its own transaction: a recovery that died there leaves an unfinished report, which counts.
5. *Ready.* One script appends the epoch's mark, stores the fence's identity and opens the partition. Where a stranger has
   written to a log under this epoch, or a higher one, the server would not take the mark (nor any entry behind it): the
   recovery begins again under an epoch above that record, and the partitions that were open already are fenced again. What it
   had mended and reported stands. Dead in between: the next recovery finds the same, at step 3 already. The record itself
   follows nothing: the flusher stops at it like at any hole, and the recovery that it asks for keeps it as a letter.

Two recoverers: the later one has the higher epoch; the earlier one's next step, on either side, is refused, and it gives up.
Whatever is refused ends this attempt with ``Superseded``; the caller looks again.

Rejected: replaying SQL into a shadow data set and renaming it (doubles memory, and a rename is not fenced); repairing the log
through the log (the flusher would stop at the hole before it reached the repair, H6).
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import secrets
import time
from collections.abc import Callable, Sequence

import msgspec

from statecache.core import entry, errors, failpoints, fold, mending
from statecache.durable import recoveries
from statecache.durable.faults import CommitUnknown, Superseded
from statecache.durable.rows import Advance, PartitionRow
from statecache.durable.store import DurableStore
from statecache.engine import admission, processes, servers
from statecache.engine.lines import DIVERGED, INTACT, NEW, PAGE, SQL_BEHIND, TAIL_LOST, WIPED, Lines, fitting
from statecache.hot import scripts
from statecache.hot.answers import Fenced, Probed
from statecache.hot.store import HotStore

__all__ = [
    "DIVERGED", "INTACT", "NEW", "SQL_BEHIND", "TAIL_LOST", "WIPED", "PartitionReport", "Report", "recover",
]  # fmt: skip

_log = logging.getLogger(__name__)
_REWRITTEN = (SQL_BEHIND, DIVERGED)
_FINDINGS_MAX = 200


def _told(findings: Sequence[str]) -> tuple[str, ...]:
    """The first of them, and how many more there are: a report is read by people, and kept in Redis and in SQL."""
    more = len(findings) - _FINDINGS_MAX
    return (*findings[:_FINDINGS_MAX], *([f"and {more} more instances"] if more > 0 else []))


class PartitionReport(msgspec.Struct, frozen=True):
    """What a recovery found in a partition, and what it did.

    ``lost_at_least`` counts acknowledged transitions that are nowhere any more, from the log's tail that the flusher last saw
    (``tail_seen_ms``); what was acknowledged after that moment may be lost too when ``loss_possible``.
    """

    partition: int
    kind: str
    watermark: str
    last: str
    unflushed: int
    dropped: int
    reconciled: int
    parked: int
    lost_at_least: int
    loss_possible: bool
    tail_seen_ms: int
    findings: tuple[str, ...] = ()


class Report(msgspec.Struct, frozen=True):
    """What a recovery found and did; the same for ``dry_run``, which changes nothing."""

    epoch: int
    owner: str
    dry_run: bool
    started_ms: int
    seconds: float
    partitions: tuple[PartitionReport, ...]

    @property
    def kinds(self) -> dict[str, int]:
        """Partitions by class."""
        kinds: dict[str, int] = {}
        for part in self.partitions:
            kinds[part.kind] = kinds.get(part.kind, 0) + 1
        return kinds

    @property
    def lost_at_least(self) -> int:
        return sum(part.lost_at_least for part in self.partitions)

    @property
    def loss_possible(self) -> bool:
        return any(part.loss_possible for part in self.partitions)

    @property
    def dropped(self) -> int:
        return sum(part.dropped for part in self.partitions)


def recover(
    hot: HotStore,
    durable: DurableStore,
    finals: fold.Finals,
    *,
    backlog_limit: int,
    dry_run: bool = False,
    doubt: bool = False,
    progress: Callable[[str], None] = lambda text: None,
    on_beat: Callable[[], None] = lambda: None,
    before: Callable[[], None] = lambda: None,
) -> Report:
    """Reconcile Redis with SQL and open it for a new epoch.

    When it returns, every partition serves; cold instances come back by themselves when they are asked for. With
    ``dry_run`` nothing is changed, and the report tells what the real run would find and do at this moment. ``doubt``: hashes
    may be gone that nobody dropped, so every partition is marked cold; the same where the server evicts by itself.
    ``on_beat`` is called at the beginning and about once a second: a recovery takes as long as it takes, and somebody may take
    it for dead. ``before`` is called first, and may refuse by an error.

    Raises ``ConfigurationError`` when the two stores do not belong together, ``UnavailableError`` when one cannot be
    reached, ``RecoveringError`` when another recovery took over. Cost: O(partitions + instances dropped).
    """
    hot.wires.discard_idle()
    before()
    doubt = doubt or servers.has_evicted(hot.server_facts())
    superseded: Superseded | None = None
    above = 0
    for _ in range(_ATTEMPTS):
        on_beat()
        attempt = _Attempt(hot, durable, finals, backlog_limit, dry_run, doubt, progress, on_beat, above)
        try:
            return attempt.run()
        except Superseded as error:
            superseded = error
            row = durable.identity()
            if (row.epoch, row.owner) != (attempt.stamp.epoch, attempt.stamp.owner) and not dry_run:
                raise errors.RecoveringError(
                    f"another recovery took over (epoch {row.epoch}); wait for it, then look at 'statecache status'"
                ) from error
            if isinstance(error, _Taken):
                above = error.last.epoch
                _log.warning("the recovery begins again: %s", error, extra={"partition": error.partition})
            progress(f"starting over: {error}")
        except BaseException:
            attempt.abandon()
            raise
    attempt.abandon()
    raise errors.UnavailableError(
        f"Redis keeps changing under the recovery ({superseded}): see that it stays up and that nobody else writes to it, "
        "then recover again"
    ) from superseded


class _Taken(Superseded):
    """The mark's place in a partition's log is taken: only an epoch above ``last`` can have one."""

    def __init__(self, partition: int, last: entry.EntryId) -> None:
        super().__init__(
            f"partition {partition}: its log ends with {last}, which is no entry of ours: somebody else writes to this stream; "
            "look at it with XRANGE"
        )
        self.partition = partition
        self.last = last


class _Moved(Superseded):
    """A flusher has moved a partition while a dry run looked at it."""

    def __init__(self, row: PartitionRow) -> None:
        super().__init__(f"partition {row.partition}: it was flushed to {row.watermark} while it was looked at")
        self.row = row


def _log_end(report: Report) -> None:
    kinds = {name.replace(" ", "_"): count for name, count in report.kinds.items()}
    _log.log(
        logging.WARNING if report.lost_at_least else logging.INFO,
        "recovered: epoch %d, %s; at least %d transitions lost",
        report.epoch, ", ".join(report.kinds), report.lost_at_least,
        extra={"epoch": report.epoch, "kinds": kinds, "lost_at_least": report.lost_at_least, "seconds": report.seconds},
    )  # fmt: skip


_ATTEMPTS = 5
_LOOKS = 100
_BEAT_SECONDS = 1.0
_EPOCH_MAX = 2**53 - 1
"""Scripts compare epochs as Lua's numbers."""
_UNFENCED = "*"
"""A dry run has no fence: its reads are not guarded."""


class _Attempt:
    """One run through the five steps."""

    def __init__(
        self,
        hot: HotStore,
        durable: DurableStore,
        finals: fold.Finals,
        backlog_limit: int,
        dry_run: bool,
        doubt: bool,
        progress: Callable[[str], None],
        on_beat: Callable[[], None],
        above: int,
    ) -> None:
        self.hot = hot
        self.durable = durable
        self.finals = finals
        self.backlog_limit = backlog_limit
        self.dry_run = dry_run
        self.doubt = doubt
        self.progress = progress
        self.on_beat = on_beat
        self.above = above
        self.started = time.monotonic()
        self.started_ms = _now_ms()
        self.beat_at = self.started
        self.stamp = scripts.NEVER
        self.rewritten: list[PartitionReport] = []
        self.strays: dict[int, list[str]] | None = None
        self.lines = Lines(hot, durable, self._beat, indexed=dry_run)

    def run(self) -> Report:
        self.row = self.durable.identity()
        # A server that takes no writes would refuse the fence: it refuses here, before an epoch is taken for nothing.
        found = self.hot.admit(self.stamp, load=False, reads=self.dry_run)
        admission.check_belongs(self.row, found, self.hot.keyspace.namespace)
        new = self._take()
        rows = self.durable.partitions()
        fences = [self._fence(row.partition) for row in rows]
        parts = []
        for row, fenced in zip(rows, fences, strict=True):
            parts.append(self._looked_at(row, fenced, new) if self.dry_run else self._mend(row, fenced, new))
            failpoints.hit("recovery.mended")
            self._beat()
        report = self._report(parts)
        if self.dry_run:
            return report
        text = msgspec.json.encode(report).decode()
        tails = {part.partition: entry.EntryId.parse(part.last) for part in parts}
        recoveries.finish(
            self.durable, self.stamp.epoch, self.stamp.owner, text, ",".join(report.kinds), tails, _now_ms()
        )
        failpoints.hit("recovery.reported")
        for part, fenced in zip(parts, fences, strict=True):
            self._ready(part, fenced)
        _log_end(report)
        return report

    # --- step 1 ------------------------------------------------------------------------------------------------------

    def _take(self) -> bool:
        """Take the epoch in SQL; returns True for a store that has never had one."""
        row = self.row
        positions = [self.hot.position(partition) for partition in range(row.partition_count)]
        epoch = 1 + max(row.epoch, self.above, *(position.epoch if position else 0 for position in positions))
        self.stamp = self.lines.stamp = scripts.Stamp(epoch, secrets.token_urlsafe(9))
        if self.dry_run:
            return row.epoch == 0
        self.progress(f"epoch {row.epoch} -> {epoch}: taking it in SQL")
        try:
            recoveries.take(self.durable, (row.epoch, row.owner), epoch, self.stamp.owner, _now_ms(), processes.own())
        except CommitUnknown:
            taken = self.durable.identity()
            if (taken.epoch, taken.owner) != (epoch, self.stamp.owner):
                raise
        failpoints.hit("recovery.taken")
        return row.epoch == 0

    def _beat(self) -> None:
        """A sign of life; it also finds out early that a newer recovery has taken over."""
        if time.monotonic() - self.beat_at > _BEAT_SECONDS:
            self.on_beat()
            if not self.dry_run:
                recoveries.heartbeat(self.durable, self.stamp.epoch, self.stamp.owner, _now_ms())
            self.beat_at = time.monotonic()

    def abandon(self) -> None:
        """Say, if that can still be said, that nobody works at this any more: others need not wait for our sign of life."""
        if self.stamp.epoch and not self.dry_run:
            with contextlib.suppress(errors.StateCacheError):
                recoveries.heartbeat(self.durable, self.stamp.epoch, self.stamp.owner, recoveries.ABANDONED)

    # --- step 2 ------------------------------------------------------------------------------------------------------

    def _fence(self, partition: int) -> Fenced:
        reply, fenced = self.hot.fence(
            partition, self.stamp, self.row.deployment, self.row.protocol, dry_run=self.dry_run
        )
        if fenced is None:
            if reply.startswith("FOREIGN"):
                raise errors.ConfigurationError(
                    f"partition {partition} belongs to another {reply[8:]}: nothing was changed in it"
                )
            raise Superseded(f"partition {partition} was fenced by another recovery ({reply})")
        failpoints.hit("recovery.fenced")
        return fenced

    # --- step 3 ------------------------------------------------------------------------------------------------------

    def _looked_at(self, row: PartitionRow, fenced: Fenced, new: bool) -> PartitionReport:
        """``_mend`` for a dry run, beside flushers that no fence holds: what they moved and trimmed between the look at SQL and
        that at the log is no hole in it. So SQL's watermark is read until it is the same before and after."""
        for _ in range(_LOOKS):
            try:
                return self._mend(row, fenced, new)
            except _Moved as moved:
                row = moved.row
        return self._mend(row, fenced, new)

    def _mend(self, row: PartitionRow, fenced: Fenced, new: bool) -> PartitionReport:
        identity = _UNFENCED if self.dry_run else fenced.identity
        probed = self._probe(row, identity)
        if probed.last >= entry.EntryId(self.stamp.epoch, 0):
            raise self._taken(row.partition, probed.last)
        kind, last = self.lines.classify(row, probed, new and not fenced.existed, identity)
        if self.dry_run and kind != INTACT:
            (now,) = self.durable.partitions([row.partition])
            if (now.epoch, now.owner, now.watermark) != (row.epoch, row.owner, row.watermark):
                raise _Moved(now)
        watermark, mend = row.watermark, mending.Mend([], [], [], [], [], 0, 0, [])
        dropped = 0
        if probed.last == entry.ZERO:
            dropped = self._drop_strays(row, fenced)
        elif kind in (WIPED, TAIL_LOST):
            dropped = self._drop_above(row, fenced, last)
        elif kind in _REWRITTEN:
            watermark, mend = self._planned(row, probed, kind, identity)
            dropped = len(mend.drops)
        dropped += self._drop_discarded(row, fenced)
        gap = _entries_between(row.watermark, watermark) if kind == SQL_BEHIND else 0
        lost = _entries_between(max(last, row.watermark), row.tail) + max(0, gap - mend.covered)
        untrue = not fenced.existed or fenced.recorded_identity != fenced.identity or self._strange(fenced)
        part = PartitionReport(
            row.partition, kind, str(watermark), str(probed.last), _entries_between(watermark, probed.last), dropped,
            len(mend.transitions), mend.parked, lost, (untrue and kind != NEW) or kind in _REWRITTEN, row.tail_seen_ms,
            _told(mend.findings),
        )  # fmt: skip
        if kind in _REWRITTEN and not self.dry_run:
            self._rewrite(row, fenced, probed, mend, part)
        if self.doubt and not self.dry_run:
            self._mark_cold(row, fenced, watermark)
        self.progress(f"partition {row.partition}: {kind}")
        return part

    def _probe(self, row: PartitionRow, identity: str) -> Probed:
        code, probed = self.hot.probe(row.partition, self.stamp, identity, row.watermark)
        if probed is None:
            raise Superseded(f"partition {row.partition}: {code} while it was looked at")
        at_watermark, behind = (one and fitting(row.partition, one) for one in (probed.at_watermark, probed.behind))
        return msgspec.structs.replace(probed, at_watermark=at_watermark, behind=behind)

    def _taken(self, partition: int, last: entry.EntryId) -> errors.StateCacheError:
        if last.epoch < _EPOCH_MAX:
            return _Taken(partition, last)
        key = self.hot.keyspace.log(partition)
        return errors.IntegrityError(
            f"partition {partition}: its log ends with {last}, written by somebody else, and no epoch can be above that: keep "
            f"what is in {key} (XRANGE), delete that stream (DEL), and run 'statecache recover'"
        )

    def _strange(self, fenced: Fenced) -> bool:
        """Was the epoch found in Redis made by a recovery that SQL does not know?"""
        return fenced.existed and recoveries.recovery(self.durable, fenced.epoch, fenced.owner) is None

    def _drop_above(self, row: PartitionRow, fenced: Fenced, last: entry.EntryId) -> int:
        """Drop every hash that SQL knows better, and mark the partition cold even when there is none (H3)."""
        dropped = 0
        self._drop(row.partition, fenced, row.watermark, [])
        for page in self.lines.instances_above(row.partition, last):
            self._drop(row.partition, fenced, row.watermark, [f"{one.machine}:{one.id}" for one in page])
            dropped += len(page)
            self._beat()
        return dropped

    def _drop_strays(self, row: PartitionRow, fenced: Fenced) -> int:
        """Where there is no log there should be no hash either: drop what there is, found in Redis, so that the cost is
        that of Redis' keys (none, after a wipe) and not that of SQL's checkpoints."""
        if self.strays is None:
            self.strays = {}
            for page in self.hot.instances():
                for address in page:
                    partition = self.hot.keyspace.partition_of(*address)
                    self.strays.setdefault(partition, []).append(":".join(address))
                self._beat()
        names = self.strays.get(row.partition, [])
        if row.watermark > entry.ZERO or names:
            self._drop(row.partition, fenced, row.watermark, [])
        for start in range(0, len(names), PAGE):
            self._drop(row.partition, fenced, row.watermark, names[start : start + PAGE])
            self._beat()
        return len(names)

    def _drop_discarded(self, row: PartitionRow, fenced: Fenced) -> int:
        """Drop every hash whose newest entry was discarded: an older copy of Redis has brought it back."""
        gone = self.lines.discards(row.partition)
        instances = list(gone)
        names = []
        for instance, fields in zip(
            instances, self.hot.hashes([(row.partition, *one) for one in instances]), strict=True
        ):
            parsed = mending.Hash.parse(fields)
            if parsed is not None and parsed.entry_id in {one.entry_id for one in gone[instance]}:
                names.append(":".join(instance))
        if names:
            self._drop(row.partition, fenced, row.watermark, names)
        return len(names)

    def _mark_cold(self, row: PartitionRow, fenced: Fenced, watermark: entry.EntryId) -> None:
        """Hashes may be gone that nobody dropped: from now on SQL is asked about what is not hot. One with entries that SQL has
        not yet must not come back before they are there: it is cold up to the last of them."""
        last = {
            (one.machine, one.id): one.entry_id
            for one in self.lines.entries(row.partition, watermark, fenced.identity)
            if not one.is_mark and one.machine != entry.FOREIGN
        }
        instances = list(last)
        for start in range(0, len(instances), PAGE):
            page = instances[start : start + PAGE]
            hashes = self.hot.hashes([(row.partition, *one) for one in page])
            gone = [last[one] for one, fields in zip(page, hashes, strict=True) if not fields]
            watermark = max([watermark, *gone])
            self._beat()
        self._drop(row.partition, fenced, watermark, [])

    def _drop(self, partition: int, fenced: Fenced, evicted_to: entry.EntryId, names: list[str]) -> None:
        if self.dry_run:
            return
        code = self.hot.drop(partition, self.stamp, fenced.identity, evicted_to, names)
        if not code.startswith("OK"):
            raise Superseded(f"partition {partition}: {code} while hashes were dropped")
        failpoints.hit("recovery.dropped")

    # --- step 3, where SQL must be written ---------------------------------------------------------------------------

    def _planned(
        self, row: PartitionRow, probed: Probed, kind: str, identity: str
    ) -> tuple[entry.EntryId, mending.Mend]:
        """What mends *SQL behind* or *diverged*: the new watermark and the rows. Nothing is written yet."""
        behind = kind == SQL_BEHIND
        entries = self.lines.entries(row.partition, row.watermark if behind else entry.ZERO, identity)
        groups = fold.by_instance([record for record in entries if not record.is_mark])
        hashes = self._hashes(row.partition)
        known = self._known([*groups, *hashes])
        if not behind:
            # SQL's watermark never goes back: it would lead to an entry of this log, and the same log, back once more, would
            # pass for *intact*, with all that SQL has above it.
            mend = mending.diverged(row.partition, groups, hashes, known, self.lines.held(row.partition, groups))
            return max(row.watermark, probed.last), mend
        # Strangers' records have any number. They are passed over: the flusher would stop at each that follows nothing.
        foreign = list(itertools.takewhile(lambda one: one.machine == entry.FOREIGN, entries))
        ours = entries[len(foreign) :]
        watermark = probed.last
        if ours:
            # Number 0 is a mark's: another record there is a stranger's that looks like one of ours, and is passed over too.
            id = ours[0].entry_id
            watermark = ours[0].prev if ours[0].is_mark else entry.EntryId(id.epoch, max(0, id.seq - 1))
        mend = mending.sql_behind(
            row.partition, groups, hashes, known, watermark, self.finals, f"reconciled-{self.stamp.epoch}"
        )
        mend.covered += len(foreign)
        mend.letters += [fold.entry_row(row.partition, one) for one in foreign]
        if foreign:
            mend.findings.append(
                f"{len(foreign)} records of the log, from {foreign[0].entry_id} on, were not written by statecache: kept as "
                "dead letters"
            )
        return watermark, mend

    def _rewrite(
        self, row: PartitionRow, fenced: Fenced, probed: Probed, mend: mending.Mend, part: PartitionReport
    ) -> None:
        """Write what mends a partition.

        The hashes were read plainly: while the fence holds nobody writes them, and a last guarded look proves that it held
        all the time. Hashes are dropped before SQL is written: dead in between, the next recovery finds the same class.
        Dead after it, the next one finds nothing wrong any more: so what was lost is reported in that same transaction.
        """
        watermark = entry.EntryId.parse(part.watermark)
        self._probe(row, fenced.identity)
        self._drop(row.partition, fenced, watermark, [])
        for start in range(0, len(mend.drops), PAGE):
            self._drop(row.partition, fenced, watermark, mend.drops[start : start + PAGE])
            self._beat()
        move = Advance(
            row.partition, self.stamp.epoch, self.stamp.owner, row.watermark, watermark, probed.last, _now_ms()
        )
        self.rewritten.append(part)
        recoveries.reconcile(
            self.durable, move, mend.transitions, mend.checkpoints, mend.letters, fold.count_deltas(mend.moved),
            error=f"{part.kind}: found by the recovery of epoch {self.stamp.epoch}",
            report_json=msgspec.json.encode(self._report(self.rewritten)).decode(), now_ms=_now_ms(),
        )  # fmt: skip
        failpoints.hit("recovery.reconciled")

    def _report(self, parts: Sequence[PartitionReport]) -> Report:
        return Report(
            self.stamp.epoch, self.stamp.owner, self.dry_run, self.started_ms,
            round(time.monotonic() - self.started, 4), tuple(parts),
        )  # fmt: skip

    def _hashes(self, partition: int) -> dict[fold.Instance, mending.Hash]:
        found: dict[fold.Instance, mending.Hash] = {}
        keyspace = self.hot.keyspace
        for page in self.hot.instances():
            mine = [address for address in page if keyspace.partition_of(*address) == partition]
            for address, fields in zip(mine, self.hot.hashes([(partition, *one) for one in mine]), strict=True):
                parsed = mending.Hash.parse(fields)
                if parsed is not None:
                    found[address] = parsed
            self._beat()
        return found

    def _known(self, instances: Sequence[fold.Instance]) -> dict[fold.Instance, mending.Known]:
        known: dict[fold.Instance, mending.Known] = {}
        for start in range(0, len(instances), PAGE):
            page = list(dict.fromkeys(instances[start : start + PAGE]))
            kept = self.durable.checkpoints(page)
            parked = {
                address
                for address, found in zip(page, self.durable.lookup([(*one, 0) for one in page]), strict=True)
                if found.letters
            }
            for address in page:
                letters = self.lines.letters(address) if address in parked else ()
                known[address] = mending.Known(kept.get(address), letters)
            self._beat()
        return known

    # --- step 5 ------------------------------------------------------------------------------------------------------

    def _ready(self, part: PartitionReport, fenced: Fenced) -> None:
        code = self.hot.ready(
            part.partition,
            self.stamp,
            identity=fenced.identity,
            watermark=entry.EntryId.parse(part.watermark),
            limit=self.backlog_limit,
            new=part.kind == NEW and not self.doubt,
            report=msgspec.json.encode(part).decode(),
        )
        if code.startswith("TAKEN"):
            raise self._taken(part.partition, entry.EntryId.parse(code[6:]))
        if not code.startswith("OK"):
            raise Superseded(f"partition {part.partition}: {code} while it was opened")
        failpoints.hit("recovery.ready")


def _entries_between(low: entry.EntryId, high: entry.EntryId) -> int:
    """A lower bound of the number of entries above ``low`` up to ``high``: exact within an epoch."""
    if high <= low:
        return 0
    return high.seq - low.seq if high.epoch == low.epoch else high.seq


def _now_ms() -> int:
    return int(time.time() * 1000)
