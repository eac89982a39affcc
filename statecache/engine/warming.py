"""Warming: instances come back from SQL before they are asked for, after Redis was wiped or lost much.

Nothing needs it: after a recovery every call brings back what it wants. Warming spares the first call of each instance its
look-up. Those that were moved last come first, non-final ones only unless asked, until all are hot, a limit is reached or
Redis is at its bounds (``hot_instances_max``, ``hot_memory_share``, ``maxmemory``).

Each page is one statement: checkpoints with their rings, their partitions' watermarks and whether they have open letters, of
one snapshot. hydrate.lua writes what is still absent, if that watermark is at or above what Redis has dropped (H9), under the
stamp of before the look (H10). Instances with letters are left cold: a call brings them back parked (H12). So warming may run
beside writers, evictors and other warmers, and may die anywhere. A report's ``position`` tells where to go on.

Pages are read and packed in a thread while the server takes the last ones.

One partition alone can be warmed, as the background jobs do (one job each, so that workers share the work): see ``shares``.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from statecache.core import errors, flows, items
from statecache.durable.rows import Recent
from statecache.engine import eviction
from statecache.hot import scripts

if TYPE_CHECKING:
    from statecache.engine.cache import StateCache

BATCH = 250
"""Instances of one script call: it holds the server for a millisecond and a half."""
_CHUNK = 1000
_PAGE_FIRST, _PAGE_MAX = 250, 4000
_NEWEST = (2**62, "")
Position = Mapping[str, tuple[int, str]]
"""By ``machine:state`` the (updated_ms, id) of the last instance that was looked at. Plain JSON."""
Progress = Callable[["Report"], None]


class Report(msgspec.Struct):
    """What a warming did.

    ``candidates`` are the instances that SQL counts in the states that are warmed; with ``dry_run`` nothing else is told.
    ``hot_already`` were there, ``stale`` wait for a flush or a recovery, ``parked`` have letters. ``full`` tells that Redis
    is at its bounds, ``more`` that time ran out; ``position`` is where to go on.
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


class _Row(NamedTuple):
    """An instance of a page, packed for hydrate.lua (None: it is not hydrated)."""

    key: str
    updated_ms: int
    id: str
    packed: tuple[int, str, str, str, str, list[str]] | None


class _RefusedError(Exception):
    """Redis is of another epoch than the look at SQL was, or not true. Carries the code."""


class _EnoughError(Exception):
    """The limit is reached, Redis is full or time is up."""


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

        def check() -> None:
            report.seconds = time.monotonic() - started
            progress(report)
            if stopping() or report.seconds > seconds_max:
                report.more = True
                raise _EnoughError
            if report.warmed + report.hot_already >= self._limit:
                raise _EnoughError
            if eviction.above(self._cache):
                report.full = True
                raise _EnoughError

        try:
            while not report.dry_run and not self._has_run(check):
                pass
        except _EnoughError:
            pass
        report.seconds = time.monotonic() - started
        progress(report)
        return report

    def _has_run(self, check: Callable[[], None]) -> bool:
        """Warm from the position on; False if a recovery came between: then under its epoch again."""
        if self._cache.hot.stamp == scripts.NEVER:
            self._cache.admission.ensure("EPOCH", self._cache.deadline(None))
        stamp = self._cache.hot.stamp
        rows = self._newest_first()
        try:
            with ThreadPoolExecutor(1, "statecache-warming") as pool:
                check()
                chunk = pool.submit(lambda: list(islice(rows, _CHUNK)))
                while found := chunk.result():
                    chunk = pool.submit(lambda: list(islice(rows, _CHUNK)))
                    for first in range(0, len(found), BATCH):
                        self._hydrate(found[first : first + BATCH], stamp)
                    check()
        except _RefusedError as refused:
            check()
            self._cache.admission.ensure(str(refused), self._cache.deadline(None))
            return False
        return True

    # --- pages -------------------------------------------------------------------------------------------------------

    def _newest_first(self) -> Iterator[_Row]:
        """The rows of all ranges, those moved last first; of final states behind all others."""
        for group in self._ranges:
            walks = [self._walk(one) for one in group]
            yield from heapq.merge(*walks, key=lambda row: row.updated_ms, reverse=True)

    def _walk(self, one: eviction.Range) -> Iterator[_Row]:
        key = f"{one.machine}:{one.state}"
        at, id = self.report.position.get(key, _NEWEST)
        size = _PAGE_FIRST
        while True:
            page = self._cache.durable.recent(one.machine, one.state, (at, id), size, self._partition)
            for row in page:
                yield _Row(key, row.updated_ms, row.id, None if row.parked else _packed(one.machine, row))
            if len(page) < size:
                return
            at, id, size = page[-1].updated_ms, page[-1].id, min(2 * size, _PAGE_MAX)

    def _hydrate(self, rows: Sequence[_Row], stamp: scripts.Stamp) -> None:
        report = self.report
        rows = rows[: int(min(len(rows), self._limit - report.warmed - report.hot_already))]
        packed = [row.packed for row in rows if row.packed is not None]
        codes = self._cache.hot.hydrate(packed, stamp) if packed else []
        refused = next((code for code in codes if code in items.ADMISSION_CODES), None)
        if refused:
            raise _RefusedError(refused)
        warmed = codes.count("OK")
        self._cache.metrics.add("statecache_hydrations_total", warmed)
        report.warmed += warmed
        report.hot_already += codes.count("EXISTS")
        report.stale += sum(code.startswith("STALE") for code in codes)
        if "OOM" in codes:
            report.full = True
            raise _EnoughError
        report.parked += len(rows) - len(packed)
        report.position.update((row.key, (row.updated_ms, row.id)) for row in rows)


def _packed(machine: str, row: Recent) -> tuple[int, str, str, str, str, list[str]]:
    return row.partition, f"{machine}:{row.id}", row.own, row.ring, row.watermark, flows.pairs_of(row.data)
