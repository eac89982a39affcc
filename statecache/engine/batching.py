"""A flush's batches: parsing and checking what was read, and sorting it into history, checkpoints and dead letters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec

from statecache.core import entry, errors, fold, model
from statecache.durable.faults import Refused
from statecache.durable.rows import Advance, PartitionRow
from statecache.hot.answers import parse_any

LOAD_FIRST = 250
"""Of so many instances the checkpoints are asked for first, then of twice as many each time, as far as their bytes allow."""


class TooMuchDataError(errors.StateCacheError):
    """The data of a batch's instances takes more memory than it may: at least so many bytes an entry."""

    def __init__(self, bytes_each: float) -> None:
        super().__init__(f"{bytes_each:.0f} bytes of data an entry")
        self.bytes_each = bytes_each


class Batch(msgspec.Struct, frozen=True):
    """Entries of one partition that follow its watermark one by one, up to ``last``; ``tail`` is the log's last id.

    ``lines`` are the packed texts as SQL takes them (partition, epoch and number before the entry's parts), one for each of
    ``records``; marks are in neither. ``foreign`` are records that statecache did not write. ``seen_ms`` is when the log was
    asked: what came after may be behind ``tail``, however long the commit takes.
    """

    row: PartitionRow
    last: entry.EntryId
    tail: entry.EntryId
    seen_ms: int
    lines: list[str]
    records: list[entry.Entry]
    foreign: list[entry.Entry]

    def advance(self) -> Advance:
        row = self.row
        return Advance(row.partition, row.epoch, row.owner, row.watermark, self.last, self.tail, self.seen_ms)

    def place(self) -> dict[str, object]:
        """For log records."""
        return {"partition": self.row.partition, "epoch": self.row.epoch}

    def estranged(self) -> Batch:
        """The same with all records kept apart: each under its own entry id."""
        foreign = [entry.apart(self.row.partition, record) for record in self.records]
        return msgspec.structs.replace(self, lines=[], records=[], foreign=[*self.foreign, *foreign])

    def halves(self) -> tuple[Batch, Batch]:
        """Two batches, the second beginning where the first ends."""
        middle = len(self.records) // 2
        cut = self.records[middle - 1].entry_id
        row = self.row
        behind = PartitionRow(row.partition, row.epoch, row.owner, cut, row.tail, row.tail_seen_ms)
        early = [one for one in self.foreign if one.entry_id <= cut]
        late = [one for one in self.foreign if one.entry_id > cut]
        return (
            Batch(row, cut, self.tail, self.seen_ms, self.lines[:middle], self.records[:middle], early),
            Batch(behind, self.last, self.tail, self.seen_ms, self.lines[middle:], self.records[middle:], late),
        )


def checked(row: PartitionRow, lines: Sequence[str], tail: entry.EntryId, seen_ms: int) -> tuple[Batch, str]:
    """Parse a partition's entries up to the first that does not follow; returns them and what is wrong with that one."""
    cursor = row.watermark
    kept: list[str] = []
    records: list[entry.Entry] = []
    foreign: list[entry.Entry] = []
    prefix = f"{row.partition}{entry.SEPARATOR}"
    hole = ""
    if tail < cursor:
        hole = (
            f"partition {row.partition}: the log ends at {tail}, before {cursor}, which is in SQL: entries were deleted"
        )
    for line in lines:
        record = parse_any(row.partition, line)
        entry_id = record.entry_id
        is_mark = record.event == entry.EVENT_EPOCH
        if not entry.follows(entry_id, cursor, record.prev if is_mark else None):
            hole = f"partition {row.partition}: {entry_id} does not follow {cursor}: entries are missing"
            break
        cursor = entry_id
        if record.machine == entry.FOREIGN:
            foreign.append(record)
        elif not is_mark:
            kept.append(prefix + line.replace("-", entry.SEPARATOR, 1))
            records.append(record)
    return Batch(row, cursor, tail, seen_ms, kept, records, foreign), hole


class Letter(msgspec.Struct, frozen=True):
    """A row of dead letters to be written."""

    row: tuple[Any, ...]
    error: str
    waiting: bool


class Plan:
    """What of some batches goes where. Built inside the transaction, after the compare-and-set."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self._batches = batches
        self._groups = {batch.row.partition: fold.by_instance(batch.records) for batch in batches}
        self._aside: set[fold.Instance] = set()
        self._remembered: dict[int, dict[fold.Instance, str]] = {}
        self._loaded: dict[fold.Instance, str] = {}
        self.parked: set[fold.Instance] = set()
        self.data_bytes = 0
        self.folds: dict[fold.Instance, str] = {}
        self.changed: list[str] = []
        self.begun: list[str] = []
        self.deltas: dict[tuple[int, str, str], int] = {}
        self.letters = [
            Letter(
                fold.entry_row(batch.row.partition, one),
                "this record of the log is none that statecache writes there",
                False,
            )
            for batch in batches
            for one in batch.foreign
        ]

    @property
    def instances(self) -> list[fold.Instance]:
        return [instance for groups in self._groups.values() for instance in groups]

    def pass_over(self, instance: fold.Instance) -> None:
        """Write nothing for an instance: SQL holds its entries already."""
        self._aside.add(instance)

    def put_aside(self, instances: Iterable[fold.Instance], error: str, *, waiting: bool = False) -> None:
        """Make the entries of some instances dead letters: the first for this reason, the others wait behind it."""
        for instance in instances:
            if instance in self._aside:
                continue
            self._aside.add(instance)
            self.parked.add(instance)
            for partition, groups in self._groups.items():
                for place, record in enumerate(groups.get(instance, ())):
                    behind = waiting or place > 0
                    why = "waits behind a dead letter" if behind else error
                    self.letters.append(Letter(fold.entry_row(partition, record), why, behind))

    def place(
        self,
        take: Callable[[Iterable[fold.Instance]], dict[fold.Instance, str]],
        load: Callable[[Sequence[fold.Instance]], Mapping[fold.Instance, model.Checkpoint]],
        bytes_max: float = math.inf,
    ) -> None:
        """Find what is before every instance (``fold.Before``, packed): in the last folds, or in SQL where those do not lead up
        to it.

        An instance whose versions do not go on is put aside: what is in the log contradicts SQL. Raises ``TooMuchDataError``
        where what is before them all takes more than ``bytes_max``: each of them is written anew, however small its patch.
        """
        wanted: dict[fold.Instance, int] = {}
        unsure: list[tuple[int, fold.Instance]] = []
        size = entries = 0
        for partition, groups in self._groups.items():
            remembered = self._remembered[partition] = take(groups)
            for instance, records in groups.items():
                version = records[0].version
                text = remembered.get(instance)
                if text is not None and not text.startswith(f"{version - 1}\x1f"):
                    text = None
                    del remembered[instance]
                if text is None and version != 1:
                    wanted[instance] = len(records)
                    unsure.append((partition, instance))
                else:
                    entries += len(records)
                    if len(records) > 1:
                        unsure.append((partition, instance))
            size += sum(map(len, remembered.values()))
        if size > bytes_max:
            raise TooMuchDataError(size / entries)
        self.data_bytes = size + self._load(wanted, load, bytes_max, size, entries)
        for partition, instance in unsure:
            before = self._before(partition, instance)
            try:
                fold.require_next(before.version if before else 0, self._groups[partition][instance])
            except errors.IntegrityError as error:
                self.put_aside([instance], str(error))

    def _before(self, partition: int, instance: fold.Instance) -> fold.Before | None:
        text = self._remembered[partition].get(instance) or self._loaded.get(instance)
        return fold.Before.unpacked(text) if text else None

    def _load(
        self,
        wanted: Mapping[fold.Instance, int],
        load: Callable[[Sequence[fold.Instance]], Mapping[fold.Instance, model.Checkpoint]],
        bytes_max: float,
        size: int,
        entries: int,
    ) -> int:
        """Ask SQL for what is before instances with so many entries each; ``size`` and ``entries`` are those of the others.
        Returns the bytes of their data."""
        names, begin, many, loaded = list(wanted), 0, LOAD_FIRST, 0
        while begin < len(names):
            part = names[begin : begin + many]
            for instance, row in load(part).items():
                self._loaded[instance] = fold.Before.of_checkpoint(row).packed()
                loaded += len(row.data or "")
            begin += len(part)
            if size + loaded > bytes_max:
                raise TooMuchDataError((size + loaded) / (entries + sum(wanted[name] for name in names[:begin])))
            fitting = (bytes_max - size - loaded) * begin / max(loaded, 1)
            many = int(min(2 * many, max(LOAD_FIRST / 4, fitting)))
        return loaded

    def fold(self, finals: fold.Finals) -> None:
        """Fold every instance that was not put aside onto what is before it: into lines of checkpoints, those that change and
        those that begin, and what becomes of the counts. Raises ``Refused`` for data that nobody could read."""
        moved: list[fold.Moved] = []
        for partition, groups in self._groups.items():
            for instance, records in groups.items():
                if instance in self._aside:
                    continue
                old = self._before(partition, instance)
                try:
                    now = fold.after(old, records, partition)
                except errors.IntegrityError as error:
                    raise Refused(str(error)) from error
                moved.append((partition, now.machine, old.state if old else None, now.state))
                self.folds[instance] = now.packed()
                (self.changed if old else self.begun).append(now.line(finals))
        self.deltas = fold.count_deltas(moved)

    def lines(self) -> list[str]:
        """The history lines of everything that was not put aside."""
        if not self._aside:
            return [line for batch in self._batches for line in batch.lines]
        return [
            line
            for batch in self._batches
            for line, record in zip(batch.lines, batch.records, strict=True)
            if (record.machine, record.id) not in self._aside
        ]

    def rows(self) -> list[tuple[Any, ...]]:
        """The same as rows, for a database that cannot take the lines; an empty part is an empty text."""
        return [
            fold.entry_parts(batch.row.partition, record)
            for batch in self._batches
            for record in batch.records
            if (record.machine, record.id) not in self._aside
        ]
