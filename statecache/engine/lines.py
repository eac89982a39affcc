"""Which line of history a partition's log is on: what it has that SQL knows, and what that makes of it.

A recovery's step 3 asks this, under its fence. Entry ids are no proof of anything: a lost tail's ids are given again, and an
old primary goes on under its own. So what counts is the entry itself, by id, version and transition id: in history, as a
letter, or discarded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

from statecache.core import entry, fold
from statecache.durable import recoveries
from statecache.durable.faults import Superseded
from statecache.durable.rows import Above, Discard, PartitionRow
from statecache.durable.store import DurableStore
from statecache.hot import scripts
from statecache.hot.answers import Probed, parse_any
from statecache.hot.store import READ_BYTES_MAX, HotStore

NEW, INTACT, WIPED, TAIL_LOST, SQL_BEHIND, DIVERGED = "new", "intact", "wiped", "tail lost", "SQL behind", "diverged"
PAGE = 1000


class Lines:
    """What one recovery asks about logs. ``stamp`` is set when it has taken its epoch; ``beat`` is its sign of life."""

    def __init__(self, hot: HotStore, durable: DurableStore, beat: Callable[[], None], *, indexed: bool) -> None:
        self.hot = hot
        self.durable = durable
        self.stamp = scripts.NEVER
        self._beat = beat
        self._indexed = indexed
        self._discarded: dict[int, dict[fold.Instance, list[Discard]]] | None = None

    def classify(self, row: PartitionRow, probed: Probed, new: bool, identity: str) -> tuple[str, entry.EntryId]:
        """The class of a partition, and the log's last entry that belongs to SQL's line of history."""
        kind, last = self._class_by_ends(row, probed, new, identity)
        return self._on_one_line(row, probed, kind, last, identity) if kind in (INTACT, TAIL_LOST) else (kind, last)

    def _class_by_ends(self, row: PartitionRow, probed: Probed, new: bool, identity: str) -> tuple[str, entry.EntryId]:
        """The class by where the log begins, goes on behind SQL's watermark, and ends."""
        watermark, behind = row.watermark, probed.behind
        if new and probed.last == entry.ZERO and watermark == entry.ZERO:
            return NEW, entry.ZERO
        if probed.at_watermark is not None and not self._same(row.partition, probed.at_watermark):
            return DIVERGED, probed.last
        if probed.last == entry.ZERO:
            return WIPED, entry.ZERO
        if behind is None:
            if probed.last >= watermark:  # above it: what stood at the log's end was deleted by a stranger
                return (INTACT if probed.last == watermark else SQL_BEHIND), probed.last
            return self._lost_behind(row, probed, probed.last, identity)
        if behind.is_mark and behind.prev < watermark:
            if self._same(row.partition, behind):  # a recovery found the tail lost, and has dealt with it
                return INTACT, probed.last
            if self._written_since(row, behind, identity) or not self._is_known(
                row.partition, probed, behind.prev, identity
            ):
                return DIVERGED, probed.last
            return (WIPED if behind.prev == entry.ZERO else TAIL_LOST), behind.prev
        if entry.follows(behind.entry_id, watermark, behind.prev if behind.is_mark else None):
            return INTACT, probed.last
        hidden = self._end_behind_strangers(row, probed, identity)
        if hidden is not None:
            return self._lost_behind(row, probed, hidden, identity)
        return SQL_BEHIND, probed.last

    def _lost_behind(
        self, row: PartitionRow, probed: Probed, last: entry.EntryId, identity: str
    ) -> tuple[str, entry.EntryId]:
        """The class of a log that ends below SQL's watermark."""
        return (TAIL_LOST if self._is_known(row.partition, probed, last, identity) else DIVERGED), last

    def _on_one_line(
        self, row: PartitionRow, probed: Probed, kind: str, last: entry.EntryId, identity: str
    ) -> tuple[str, entry.EntryId]:
        """The class where the log's newest entry of SQL's is a dead letter. It may be one of many that *diverged* made of this
        very log, brought back once more: then the ids above the newest entry that is in history are those of another line, and
        what SQL has there the log has not."""
        newest, behind = probed.at_watermark, probed.behind
        if kind == TAIL_LOST:
            newest = self._entry_at(row.partition, last, identity) if last > entry.ZERO else None
        elif behind is not None and behind.is_mark and self._same(row.partition, behind):
            return kind, last  # a recovery has dealt with what is before its mark
        if newest is None or newest.is_mark or newest.machine == entry.FOREIGN or self._in_history([newest]):
            return kind, last
        end = self._end_in_history(row.partition, probed, newest.entry_id, identity)
        if kind == TAIL_LOST:
            return kind, end
        return (TAIL_LOST, end) if self._is_history_above(row.partition, end) else (kind, last)

    def _is_history_above(self, partition: int, end: entry.EntryId) -> bool:
        for page in self.instances_above(partition, end):
            kept = self.durable.checkpoints([(one.machine, one.id) for one in page])
            if any(one.entry_id > end for one in kept.values()):
                return True
        return False

    def _entry_at(self, partition: int, place: entry.EntryId, identity: str) -> entry.Entry | None:
        """The log's entry with this id, if it is still there."""
        found = self._read(partition, _before(place, 1), identity, entries=1, bytes_max=1)
        return found[0] if found and found[0].entry_id == place else None

    def _end_in_history(self, partition: int, probed: Probed, last: entry.EntryId, identity: str) -> entry.EntryId:
        """The newest entry of the log up to ``last`` that a flush brought into history, or a mark of a recovery that SQL knows;
        what was trimmed before the first one is in SQL. Looked for from the end, a page at a time: a kept tail may be long."""
        first, place = probed.first or entry.ZERO, last
        while place >= first and place > entry.ZERO:
            low = _before(place, PAGE)
            page = self.entries(partition, low, identity, place)
            found = self._in_history([one for one in page if not one.is_mark and one.machine != entry.FOREIGN])
            for one in reversed(page):
                if one.entry_id in found or (one.is_mark and self._same(partition, one)):
                    return one.entry_id
            self._beat()
            if low.epoch == place.epoch:
                place = low
                continue
            ends = [one.prev for one in page if one.is_mark and one.prev < one.entry_id]
            place = ends[0] if ends else entry.ZERO
        return _before(first, 1) if first.seq else entry.ZERO

    def _in_history(self, records: Sequence[entry.Entry]) -> set[entry.EntryId]:
        """Those of the entries that history has, id and all."""
        asked = [(one.machine, one.id, one.version, self.partition_of((one.machine, one.id))) for one in records]
        found = self.durable.standing(asked)
        return {
            one.entry_id
            for one, stands in zip(records, found, strict=True)
            if (stands.entry_id, stands.transition_id) == (one.entry_id, one.transition_id)
        }

    def _end_behind_strangers(self, row: PartitionRow, probed: Probed, identity: str) -> entry.EntryId | None:
        """Where the log ended, below SQL's watermark, if all that it has above are strangers' records; else None.

        A log that reaches back below the watermark, and has lost what stood there, has lost its tail. An entry of ours above it
        says otherwise: a mark's recovery has dealt with that.
        """
        is_foreign = probed.behind is not None and probed.behind.machine == entry.FOREIGN
        if not is_foreign or probed.at_watermark is not None or probed.first is None or probed.first > row.watermark:
            return None
        ours = [
            one.entry_id for one in self.entries(row.partition, entry.ZERO, identity) if one.machine != entry.FOREIGN
        ]
        last = ours[-1] if ours else entry.ZERO
        return last if last < row.watermark else None

    def _same(self, partition: int, record: entry.Entry) -> bool:
        """Does SQL hold this very entry? Ids alone are no proof: a lost tail's ids are given again (H13). What *diverged* takes
        for held is so here too: else what is written behind it would become letters if another recovery came before a flush."""
        if record.is_mark:
            return recoveries.recovery(self.durable, record.entry_id.epoch, record.transition_id) is not None
        return record.entry_id in self.held(partition, {(record.machine, record.id): [record]})

    def _is_known(self, partition: int, probed: Probed, last: entry.EntryId, identity: str) -> bool:
        """Does SQL hold the newest transition of the log up to ``last``, and so all of them?

        If not, this log brings back a tail that SQL went on without: it is an older snapshot, or the old primary of a split
        brain, with entries that an earlier recovery found lost. Their hashes are ahead of SQL, though below its watermark.
        The same where such an entry was kept apart: its hash is not what SQL says, and no id tells so. A newest entry in whose
        place one row stands for many says nothing; SQL is ahead of its instance, and what is before it is asked.
        """
        if any((probed.first or entry.ZERO) <= place <= last for place in self._apart(partition)):
            return False
        top = last
        while last > entry.ZERO:
            self._beat()
            record = self._entry_at(partition, last, identity)
            if record is None:
                return True  # trimmed, so it is in SQL
            if record.is_mark:
                last = record.prev
            elif record.machine == entry.FOREIGN or self._is_covered(record, top):
                if not last.seq:
                    return True
                last = entry.EntryId(last.epoch, last.seq - 1)
            else:
                return self._is_of_sql(record)
        return True

    def _is_of_sql(self, record: entry.Entry) -> bool:
        """Did a flush bring this very entry, id and all, into SQL? A repeated call has its transition id in two entries: that
        SQL has the one says nothing of what stands before the other."""
        instance = (record.machine, record.id)
        very = (record.entry_id, record.version, record.transition_id)
        if self._in_history([record]):
            return True
        kept = [letter.entry for letter in self.durable.letters(*instance)]
        gone = self.discards(self.partition_of(instance)).get(instance, ())
        return very in {(one.entry_id, one.version, one.transition_id) for one in [*kept, *gone]}

    def _is_covered(self, record: entry.Entry, last: entry.EntryId) -> bool:
        """Does one row stand for this version and others, so that nothing tells which entry it was? Only where the instance's
        checkpoint is above ``last``: then its hash is dropped in any case."""
        row = self.durable.covering(record.machine, record.id, record.version)
        if row is None or row[1:] == (record.version, entry.EVENT_ARCHIVED):  # that one has its entry's id
            return False
        kept = self.durable.checkpoint(record.machine, record.id)
        return kept is not None and kept.entry_id > last

    def _apart(self, partition: int) -> set[entry.EntryId]:
        """Where the entries of a partition stood that were kept apart, be it until an operator discarded them."""
        prefix = f"{partition}:"
        page = [(entry.FOREIGN, prefix)]
        names: list[str] = []
        while page and page[-1][0] == entry.FOREIGN and page[-1][1].startswith(prefix):
            page = self.durable.parked_instances(PAGE, page[-1])
            names += [id for machine, id in page if machine == entry.FOREIGN and id.startswith(prefix)]
        # Only now: what was no letter any more is discarded.
        names += [id for machine, id in self.discards(partition, fresh=True) if machine == entry.FOREIGN]
        return {place for place in map(entry.place_apart, names) if place is not None}

    def held(self, partition: int, groups: Mapping[fold.Instance, Sequence[entry.Entry]]) -> set[entry.EntryId]:
        """The entries that SQL knows: in history or as letters under their transition ids, gone with an ended instance's
        history, discarded (that very entry: the same call may have come again since), or kept under their entry ids."""
        held: set[entry.EntryId] = set()
        unsure: list[entry.Entry] = []
        for instance, records in groups.items():
            if instance[0] == entry.FOREIGN:
                unsure += records
                continue
            known = {*self.durable.transition_ids(*instance), *self.letters(instance)}
            gone = self.discards(self.partition_of(instance)).get(instance, ())
            very = {(one.entry_id, one.version, one.transition_id) for one in gone}
            left = [
                one for one in records
                if (one.version, one.transition_id) not in known
                and (one.entry_id, one.version, one.transition_id) not in very
            ]  # fmt: skip
            archived = self._archived(instance) if left else 0
            left = [one for one in left if one.version >= archived]
            held |= {one.entry_id for one in records} - {one.entry_id for one in left}
            unsure += left
            self._beat()
        return held | self._kept_apart(partition, unsure)

    def _archived(self, instance: fold.Instance) -> int:
        """Below which version an instance, which has ended, has no history any more: no letter could ever go back there."""
        row = self.durable.covering(*instance, 1)
        return row[1] if row is not None and row[2] == entry.EVENT_ARCHIVED else 0

    def _kept_apart(self, partition: int, records: Sequence[entry.Entry]) -> set[entry.EntryId]:
        """Those that are letters under their entry ids, strangers' and our own, or were until an operator discarded them."""
        names = {
            (one if one.machine == entry.FOREIGN else entry.apart(partition, one)).id: one.entry_id for one in records
        }
        wanted = list(names)
        kept = set()
        for start in range(0, len(wanted), PAGE):
            page = wanted[start : start + PAGE]
            found = self.durable.lookup([(entry.FOREIGN, id, 0) for id in page])
            kept |= {names[id] for id, one in zip(page, found, strict=True) if one.letters}
            self._beat()
        # Only now: what was no letter any more is discarded.
        gone = self.discards(partition, fresh=True) if wanted else {}
        return kept | {names[id] for machine, id in gone if machine == entry.FOREIGN and id in names}

    def letters(self, instance: fold.Instance) -> tuple[tuple[int, str], ...]:
        found = self.durable.letters(*instance)
        return tuple((letter.entry.version, letter.entry.transition_id) for letter in found)

    def _written_since(self, row: PartitionRow, mark: entry.Entry, identity: str) -> bool:
        """Has an instance that SQL knows beyond the mark's ``prev`` been moved behind the mark too? Then two lines of
        history exist (H17)."""
        entries = self.entries(row.partition, mark.entry_id, identity)
        later = {(one.machine, one.id) for one in entries if not one.is_mark}
        if not later:
            return False
        pages = self.instances_above(row.partition, mark.prev)
        return any((one.machine, one.id) in later for page in pages for one in page)

    def instances_above(self, partition: int, last: entry.EntryId) -> Iterator[list[Above]]:
        if not self._indexed:  # not before it is wanted: a wipe is served again without, however much was just flushed
            with ThreadPoolExecutor(1, "statecache-index") as thread:
                completed = thread.submit(recoveries.complete_index, self.durable)
                while wait([completed], timeout=1.0).not_done:
                    self._beat()
                completed.result()
            self._indexed = True
        return recoveries.instances_above(self.durable, partition, last)

    def partition_of(self, instance: fold.Instance) -> int:
        machine, id = instance
        return int(id.partition(":")[0]) if machine == entry.FOREIGN else self.hot.keyspace.partition_of(machine, id)

    def discards(self, partition: int, *, fresh: bool = False) -> dict[fold.Instance, list[Discard]]:
        """What operators ever discarded of a partition, by instance. All is read at once: during a recovery nobody discards
        anything but strangers' records."""
        if self._discarded is None or fresh:
            self._discarded = {}
            for one in self.durable.discards():
                instance = (one.machine, one.id)
                of_partition = self._discarded.setdefault(self.partition_of(instance), {})
                of_partition.setdefault(instance, []).append(one)
        return self._discarded.get(partition, {})

    def entries(
        self, partition: int, cursor: entry.EntryId, identity: str, last: entry.EntryId | None = None
    ) -> list[entry.Entry]:
        """All entries behind a cursor, up to ``last`` if it is given, read under the fence."""
        found: list[entry.Entry] = []
        while True:
            records = self._read(partition, cursor, identity, entries=5000, bytes_max=READ_BYTES_MAX)
            if not records:
                return found
            found += records
            cursor = found[-1].entry_id
            if last is not None and cursor >= last:
                return [one for one in found if one.entry_id <= last]
            self._beat()

    def _read(
        self, partition: int, cursor: entry.EntryId, identity: str, *, entries: int, bytes_max: int
    ) -> list[entry.Entry]:
        """Some entries behind a cursor, by one script call. Raises ``Superseded`` where the fence does not hold."""
        reply = self.hot.read(
            [(partition, cursor)], entries=entries, bytes_max=bytes_max, fenced_identity=identity, stamp=self.stamp
        )[0]
        if reply.code != "OK":
            raise Superseded(f"partition {partition}: {reply.code} while its log was read")
        return [fitting(partition, parse_any(partition, line)) for line in reply.lines]


def _before(place: entry.EntryId, count: int) -> entry.EntryId:
    """A cursor so many entries before a place, or before the first one of its epoch."""
    if place.seq >= count:
        return entry.EntryId(place.epoch, place.seq - count)
    return entry.EntryId(place.epoch - 1, 2**53)


def fitting(partition: int, record: entry.Entry) -> entry.Entry:
    """What no column takes is a stranger's."""
    return record if entry.fits(record) else entry.apart(partition, record)
