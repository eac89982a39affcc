"""Warming: instances come back from SQL before they are asked for, after Redis was wiped or lost much.

Nothing needs it: after a recovery every call brings back what it wants. Warming spares the first call of each instance its
look-up. Those that were moved last come first, non-final ones only unless asked, until all are hot, a limit is reached or
Redis is at its bounds (``hot_instances_max``, ``hot_memory_share``, ``maxmemory``).

Each page is of one snapshot: checkpoints with their rings, their partitions' watermarks, and which have open letters.
hydrate.lua writes what is still absent, if that watermark is at or above what Redis has dropped (H9), under the
stamp of before the look (H10). Instances with letters are left cold: a call brings them back parked (H12). So warming may run
beside writers, evictors and other warmers, and may die anywhere. A report's ``position`` tells where to go on.

While Redis takes the last batches, a thread reads the next page.

One partition alone can be warmed, as the background jobs do (one job each, so that workers share the work): see ``shares``.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from statecache.core import codec, entry, errors, flows, fold, items
from statecache.durable.rows import Recents
from statecache.engine import eviction
from statecache.hot import scripts
from statecache.hot.packing import Cold

if TYPE_CHECKING:
    from statecache.engine.cache import StateCache

BATCH = 250
"""Instances of one script call: it holds the server for two or three milliseconds."""
_PAGE_FIRST, _PAGE_MAX = 32, 4000
_PAGE_BYTES_MAX = 8 * 2**20
"""About so much data a page holds, going by the one before it. Of each state two may be at hand."""
_TAKEN_MAX = 1000
"""So many of a page are packed at once: Redis is not to wait for it."""
_LOOK_EVERY = 20_000
"""After so many instances Redis is asked how full it is; sooner where its bounds are near."""
_NEWEST = (2**62, "")
_BEGINNING = str(entry.EntryId(0, 0))
_Row = tuple[int, str, str, Cold | None]
"""(updated_ms, ``machine:state``, id, what to bring back: None if it is to stay cold)."""
Position = Mapping[str, tuple[int, str]]
"""By ``machine:state`` the (updated_ms, id) of the last instance that was looked at. Plain JSON."""
Progress = Callable[["Report"], None]


class Report(msgspec.Struct):
    """What a warming did.

    ``candidates`` are the instances that SQL counts in the states that are warmed; with ``dry_run`` nothing else is told.
    ``hot_already`` were there, ``stale`` wait for a flush or a recovery, ``parked`` have letters. ``full`` tells that Redis
    is at its bounds, ``more`` that time ran out; ``position`` is where to go on. A checkpoint that cannot be read is left cold,
    and counted with the parked ones.
    """

    dry_run: bool
    candidates: int = 0
    warmed: int = 0
    hot_already: int = 0
    stale: int = 0
    parked: int = 0
    full: bool = False
    more: bool = False
    seconds: float = 0.0
    position: dict[str, tuple[int, str]] = {}


class _Batch(NamedTuple):
    """What is on its way to Redis: how many, how many of these are parked, and where it ends."""

    size: int
    parked: int
    position: Position


def warm(
    cache: StateCache,
    *,
    limit: int | None = None,
    machine: str | None = None,
    partition: int | None = None,
    finals: bool = False,
    position: Position | None = None,
    dry_run: bool = False,
    seconds_max: float = math.inf,
    stopping: Callable[[], bool] = lambda: False,
    progress: Progress = lambda report: None,
) -> Report:
    """Bring back up to ``limit`` instances (those that are hot already count), the last moved first.

    Safe at any time, and to be stopped or killed; run again with the report's ``position`` it goes on from there, without it
    it passes over what is hot. Raises ``InvalidDataError``, ``UnavailableError``, ``RecoveringError``.
    """
    if limit is not None and limit < 1:
        raise errors.InvalidDataError(f"limit {limit} is refused: it must be 1 or more")
    if partition is not None and not 0 <= partition < cache.settings.partition_count:
        raise errors.InvalidDataError(
            f"partition {partition} is refused: they are 0 to {cache.settings.partition_count - 1}"
        )
    warmer = _Warmer(cache, limit, machine, partition, finals, position or {}, dry_run)
    return warmer.run(seconds_max, stopping, progress)


def shares(cache: StateCache, *, limit: int | None = None, machine: str | None = None) -> dict[int, int]:
    """How many instances a warming has to look at in each partition that has any.

    With a ``limit``, or the settings' ``hot_instances_max`` below it, a partition's share is in proportion to what it
    holds, and the shares add up to the bound: so those that moved last in each come back, not all of a few partitions.
    """
    wanted = {
        (one.machine, one.state) for one in eviction.ranges(cache) if not one.final and machine in (None, one.machine)
    }
    held: dict[int, int] = {}
    for name in {name for name, _ in wanted}:
        for (partition, state), count in cache.durable.counts_by_partition(name).items():
            if (name, state) in wanted:
                held[partition] = held.get(partition, 0) + count
    bounds = [bound for bound in (limit, cache.settings.hot_instances_max) if bound]
    return proportional(held, min(bounds)) if bounds else dict(sorted(held.items()))


def proportional(held: Mapping[int, int], bound: int) -> dict[int, int]:
    """Shares of ``held`` that add up to ``bound``, or all of it; those of nothing are left out."""
    total = sum(held.values())
    if total <= bound:
        return dict(sorted(held.items()))
    found = {partition: bound * count // total for partition, count in held.items()}
    left = bound - sum(found.values())
    for partition in sorted(held, key=lambda one: (-(bound * held[one] % total), one))[:left]:
        found[partition] += 1
    return {partition: share for partition, share in sorted(found.items()) if share}


class _Warmer:
    def __init__(
        self,
        cache: StateCache,
        limit: int | None,
        machine: str | None,
        partition: int | None,
        finals: bool,
        position: Position,
        dry_run: bool,
    ) -> None:
        self._cache = cache
        self._partition = partition
        self._limit = math.inf if limit is None else limit
        every = [one for one in eviction.ranges(cache) if machine in (None, one.machine)]
        self._ranges = [[one for one in every if not one.final]]
        if finals:
            self._ranges.append([one for one in every if one.final])
        self.report = Report(dry_run, position=dict(position))
        self._in_flight: deque[_Batch] = deque()
        self._under_way = 0
        self._ended = False
        counts = {name: self._counts(name) for name in {one.machine for one in every}}
        wanted = [one for group in self._ranges for one in group]
        self.report.candidates = sum(counts[one.machine].get(one.state, 0) for one in wanted)

    def _counts(self, machine: str) -> dict[str, int]:
        if self._partition is None:
            return self._cache.durable.counts(machine)
        found = self._cache.durable.counts_by_partition(machine)
        return {state: count for (partition, state), count in found.items() if partition == self._partition}

    def run(self, seconds_max: float, stopping: Callable[[], bool], progress: Progress) -> Report:
        report, started = self.report, time.monotonic()

        def goes_on() -> bool:
            report.seconds = time.monotonic() - started
            progress(report)
            report.more = stopping() or report.seconds > seconds_max
            return not (report.more or report.full) and self._counted() < self._limit

        while not report.dry_run and not self._ended and goes_on():
            self._pass(goes_on)
        report.seconds = time.monotonic() - started
        progress(report)
        return report

    def _counted(self) -> int:
        return self.report.warmed + self.report.hot_already

    def _pass(self, goes_on: Callable[[], bool]) -> None:
        """Warm from the position on, until all is hot, until the limit could be reached, or a recovery comes between."""
        if self._cache.hot.stamp == scripts.NEVER:
            self._cache.admission.ensure("EPOCH", self._cache.deadline(None))
        stamp = self._cache.hot.stamp
        self._in_flight.clear()
        self._under_way = 0
        with ThreadPoolExecutor(1, "statecache-warming") as pool:
            for codes in self._cache.hot.hydrate_stream(self._batches(goes_on, pool), stamp):
                if refused := self._count(self._in_flight.popleft(), codes):
                    self._cache.admission.ensure(refused, self._cache.deadline(None))
                    self._ended = False
                    return

    def _count(self, batch: _Batch, codes: Sequence[str]) -> str | None:
        """Report what became of a batch; the code if it was refused."""
        report = self.report
        self._under_way -= batch.size
        refused = next((code for code in codes if code in items.ADMISSION_CODES), None)
        if refused:
            return refused
        warmed = codes.count("OK")
        self._cache.metrics.add("statecache_hydrations_total", warmed)
        report.warmed += warmed
        report.hot_already += codes.count("EXISTS")
        report.stale += sum(code.startswith("STALE") for code in codes)
        if "OOM" in codes:
            report.full = True
        elif not report.full:
            report.parked += batch.parked
            report.position.update(batch.position)
        return None

    # --- pages -------------------------------------------------------------------------------------------------------

    def _batches(self, goes_on: Callable[[], bool], pool: ThreadPoolExecutor) -> Iterator[list[Cold]]:
        """What goes to Redis, a script call each. Ends early where the limit could be reached by what is under way."""
        room = 0
        for group in self._ranges:
            walks = [_Walk(self._cache, one, self._partition, self.report.position, pool) for one in group]
            for page in _newest_first(walks):
                if not goes_on():
                    return
                while page:
                    room = room or self._room()
                    size = int(min(BATCH, len(page), room, self._limit - self._counted() - self._under_way))
                    if size <= 0:
                        return
                    rows, page = page[:size], page[size:]
                    packed = [cold for _, _, _, cold in rows if cold]
                    last = {row[1]: row for row in rows}
                    position = {key: (updated_ms, id) for key, (updated_ms, _, id, _) in last.items()}
                    self._in_flight.append(_Batch(size, size - len(packed), position))
                    self._under_way += size
                    room -= size
                    yield packed
        self._ended = True

    def _room(self) -> int:
        """So many may be sent before Redis is asked again how full it is; 0 where what is under way may fill it, and is to be
        answered first."""
        room = eviction.room(self._cache)
        self.report.full = room <= 0
        return 0 if self.report.full else int(min(max(room - self._under_way, 0), _LOOK_EVERY))


class _Walk:
    """A range's checkpoints, newest first; while a page of them is taken, the next one is read."""

    def __init__(
        self,
        cache: StateCache,
        one: eviction.Range,
        partition: int | None,
        position: Position,
        pool: ThreadPoolExecutor,
    ) -> None:
        self._cache = cache
        self._range = one
        self._key = f"{one.machine}:{one.state}"
        self._partition = partition
        self._pool = pool
        self._size = _PAGE_FIRST
        self._page = Recents((), {}, set())
        self._first = 0
        self._next: Future[Recents] | None = self._ask(position.get(self._key, _NEWEST))

    def _ask(self, before: tuple[int, str]) -> Future[Recents]:
        one, recent = self._range, self._cache.durable.recent
        return self._pool.submit(recent, one.machine, one.state, before, self._size, self._partition)

    def horizon(self) -> int:
        """Since when all are at hand that moved since; reads on if none are at hand."""
        if self._next and self._first == len(self._page.rows):
            self._page, self._first = self._next.result(), 0
            if len(self._page.rows) < self._size:
                self._next = None
            else:
                data_bytes = sum(len(data or "") for *_, data in self._page.rows)
                fitting = _PAGE_BYTES_MAX * len(self._page.rows) // max(data_bytes, 1)
                self._size = max(1, min(2 * self._size, _PAGE_MAX, fitting))
                self._next = self._ask(self._page.rows[-1][:2])
        rows = self._page.rows
        end = min(self._first + _TAKEN_MAX, len(rows))
        return rows[end - 1][0] if self._next or end < len(rows) else 0

    def take(self, since_ms: int) -> list[_Row]:
        """Those that moved since then."""
        (every, watermarks, parked), first = self._page, self._first
        self._first = bisect_right(every, -since_ms, first, key=lambda row: -row[0])
        key, machine = self._key, self._range.machine
        return [
            (updated_ms, key, id, None)
            if id in parked
            else (updated_ms, key, id, _cold(partition, f"{machine}:{id}", own, ring, watermarks, data))
            for updated_ms, id, partition, own, ring, data in every[first : self._first]
        ]  # fmt: skip


def _cold(partition: int, address: str, own: str, ring: str, watermarks: Mapping[int, str], data: str) -> Cold | None:
    """None for a checkpoint that is no JSON: the call that wants it is told, all others come back."""
    try:
        texts = fold.texts_of(data)
    except codec.UNREADABLE:
        return None
    return partition, address, flows.flagged(own, len(texts)), ring, watermarks.get(partition, _BEGINNING), texts


def _newest_first(walks: Sequence[_Walk]) -> Iterator[list[_Row]]:
    """The rows of all walks in pages, those moved last first."""
    while True:
        since_ms = max((walk.horizon() for walk in walks), default=0)
        page = [row for walk in walks for row in walk.take(since_ms)]
        if not page:
            return
        yield sorted(page, key=itemgetter(0), reverse=True)
