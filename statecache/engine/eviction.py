"""Eviction: flushed instances that are idle leave Redis; they come back from SQL when a call wants them.

Who leaves. By age: instances idle for longer than their machine's ``hot_ttl``, or the settings' ``hot_ttl_seconds`` (final
ones: ``hot_ttl_final_seconds``). By room: while Redis is above ``hot_instances_max`` keys, or above ``hot_memory_share`` of
its ``maxmemory``, those that are idle for longest, whatever their age. Idle means: not moved; a read does not count.

Candidates come from SQL, oldest first, by the find index (machine, state, updated_ms): never from a scan of Redis. Most of
the oldest are cold already, so an evictor remembers for each state up to where it has looked, and walks over them once. What
it passed and is hot again without having moved (a call brought it back and was then refused, a warming) is met when the
evictor begins anew, which it does rarely enough to cost a twentieth of its time. Nothing of this memory matters for safety:

- evict.lua drops a hash only if its version is the checkpoint's, its entry at or below the watermark of the same snapshot of
  SQL, and it is not parked (H8); so what moved on meanwhile is kept, and two evictors do no harm to each other;
- it goes under the stamp of before the look at SQL: a recovery in between refuses it, and the evictor begins anew;
- it sets ``cold`` and ``evicted_to`` in the same step: no older SQL can bring back less than what was dropped (H9).

Dead at any point: a prefix of a batch is cold, the rest is hot, both are right. Rejected: a clock of use in each hash (a write
for every read), Redis' own eviction (drops what is not in SQL), one sorted set of instances by age per partition (a third
write for every transition, and memory for what memory is short of).
"""

from __future__ import annotations

import heapq
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from statecache.core import errors, items
from statecache.core.spec import MachineSpec, readable
from statecache.durable.rows import Idle
from statecache.hot import scripts

if TYPE_CHECKING:
    from statecache.engine.cache import StateCache

_log = logging.getLogger(__name__)
BATCH = 250
"""Instances of one script call: it holds the server for a millisecond."""
_PAGE_FIRST, _PAGE_MAX = 250, 2000
_FRESH_MS = 10_000
"""What changed later than this is looked at again next time: flushes may still bring in older changes."""
_FOREVER_MS = 2**62
_IDLE_SECONDS_MAX = 1e12
_RANGES_SECONDS = 30.0
_ANEW_SECONDS_MIN, _ANEW_FACTOR = 600.0, 20.0
_TURN_SECONDS = 1.0
_LOOK_SECONDS_MAX = 60.0
_WARN_SECONDS = 60.0
Progress = Callable[["Report"], None]


class Report(msgspec.Struct):
    """What an eviction did, or (``dry_run``) would do.

    ``kept`` counts by reason: ``moved`` (it is not what SQL has: its next move is not flushed yet), ``unflushed``,
    ``parked``, ``claimed``, ``foreign`` (a key that is no instance). ``gone`` were cold already. ``above`` is by how many
    instances Redis is still beyond its bounds at the end, ``more`` tells that time ran out before everything was looked at.
    """

    dry_run: bool
    looked_at: int = 0
    evicted: int = 0
    gone: int = 0
    kept: dict[str, int] = {}
    above: int = 0
    more: bool = False
    seconds: float = 0.0


class Range(NamedTuple):
    """The instances of one state, and after which idle time they leave (0: not by age)."""

    machine: str
    state: str
    final: bool
    ttl_seconds: float


class _TimeUpError(Exception):
    """Time is up: what is left waits for the next run."""


class _RefusedError(Exception):
    """Redis is of another epoch than the look at SQL was, or not true. Carries the code."""


class Evictor:
    """Evicts from one store; remembers where it looked. For one thread at a time."""

    def __init__(self, cache: StateCache) -> None:
        self._cache = cache
        self._cursors: dict[tuple[str, str], tuple[int, str]] = {}
        self._anew_at = 0.0
        self._spent_seconds = 0.0
        self._ranges: list[Range] = []
        self._ranges_until = 0.0
        self._look_at: dict[tuple[str, str], float] = {}
        self._warned_at = -math.inf

    def run(
        self,
        *,
        idle_seconds: float | None = None,
        machine: str | None = None,
        dry_run: bool = False,
        seconds_max: float = math.inf,
        stopping: Callable[[], bool] = lambda: False,
        progress: Progress = lambda report: None,
    ) -> Report:
        """Evict what may leave: by age, then by room. ``idle_seconds`` takes the place of every age, and of the bounds.

        Safe at any time, beside any other evictor. Raises ``UnavailableError``, ``RecoveringError``.
        """
        report = Report(dry_run)
        started = time.monotonic()

        def check() -> None:
            if stopping() or time.monotonic() - started > seconds_max:
                raise _TimeUpError
            progress(report)

        self._begin_anew()
        try:
            while not self._has_run(idle_seconds, machine, report, check):
                pass
        except _TimeUpError:
            report.more = True
            self._look_at.clear()
        report.seconds = time.monotonic() - started
        self._spent_seconds += report.seconds
        progress(report)
        return report

    def _has_run(
        self, idle_seconds: float | None, machine: str | None, report: Report, check: Callable[[], None]
    ) -> bool:
        """Look at everything once; False if a recovery came between: then under its epoch again."""
        stamp = self._admitted()
        now_ms = self._cache.hot.time_ms()
        ranges = [one for one in self._current_ranges() if machine in (None, one.machine)]
        try:
            self._by_age(ranges, idle_seconds, now_ms, stamp, report, check)
            if idle_seconds is None:
                self._by_room(ranges, now_ms, stamp, report, check)
        except _RefusedError as refused:
            self._cursors.clear()
            self._look_at.clear()
            check()
            self._cache.admission.ensure(str(refused), self._cache.deadline(None))
            return False
        return True

    def turn(self, stopping: Callable[[], bool]) -> None:
        """A duty's turn: at most a second of work. What is left above the bounds is said, once a minute."""
        report = self.run(seconds_max=_TURN_SECONDS, stopping=stopping)
        if report.evicted:
            _log.debug("evicted %d instances", report.evicted, extra={"looked_at": report.looked_at})
        now = time.monotonic()
        if report.above and not report.more and now - self._warned_at > _WARN_SECONDS:
            self._warned_at = now
            _log.warning(
                "Redis is %d instances beyond hot_instances_max or hot_memory_share, and nothing more may leave: what is left "
                "is not flushed, is parked, or is not ours", report.above, extra={"kept": report.kept},
            )  # fmt: skip

    # --- who leaves --------------------------------------------------------------------------------------------------

    def _by_age(
        self,
        ranges: Sequence[Range],
        idle_seconds: float | None,
        now_ms: int,
        stamp: scripts.Stamp,
        report: Report,
        check: Callable[[], None],
    ) -> None:
        if idle_seconds is not None:
            due = [(one, now_ms - int(idle_seconds * 1000)) for one in ranges]
        else:
            due = [(one, now_ms - int(one.ttl_seconds * 1000)) for one in ranges if self._is_due(one)]
        candidates = self._oldest_first(due)
        while batch := list(islice(candidates, BATCH)):
            self._evict(batch, now_ms, stamp, report)
            check()

    def _is_due(self, one: Range) -> bool:
        """Whether it is time to look at a range again: a twentieth of its age is precise enough."""
        key, now = (one.machine, one.state), time.monotonic()
        if not one.ttl_seconds or now < self._look_at.get(key, 0.0):
            return False
        self._look_at[key] = now + min(one.ttl_seconds / 20, _LOOK_SECONDS_MAX)
        return True

    def _by_room(
        self, ranges: Sequence[Range], now_ms: int, stamp: scripts.Stamp, report: Report, check: Callable[[], None]
    ) -> None:
        """Evict the longest idle until Redis is within its bounds. Looked at again before each batch: calls bring
        instances back meanwhile, and other evictors may be at work."""
        candidates: Iterator[tuple[str, Idle]] | None = None
        evicted_before = report.evicted
        while True:
            report.above = above(self._cache)
            if report.dry_run:
                report.above = max(0, report.above - report.evicted)
            if not report.above:
                return
            # Whatever the clock says: after it was set back nobody would be old enough for as long.
            candidates = candidates or self._oldest_first([(one, _FOREVER_MS) for one in ranges])
            batch = list(islice(candidates, min(BATCH, report.above)))
            if not batch:
                break
            self._evict(batch, now_ms, stamp, report)
            check()
        if report.evicted == evicted_before and not report.dry_run:
            self._anew_at = 0.0  # what may leave stands behind where we looked: begin anew next time

    def _oldest_first(self, ranges: Sequence[tuple[Range, int]]) -> Iterator[tuple[str, Idle]]:
        """(state, candidate) of some ranges, each up to a time, the longest idle of all first."""
        walks = [self._walk(one, until_ms) for one, until_ms in ranges]
        return heapq.merge(*walks, key=lambda found: found[1].updated_ms)

    def _walk(self, one: Range, until_ms: int) -> Iterator[tuple[str, Idle]]:
        cursor = self._cursors.get((one.machine, one.state), (0, ""))
        size = _PAGE_FIRST
        while True:
            page = self._cache.durable.idle(one.machine, one.state, cursor, until_ms, size)
            for row in page:
                yield one.state, row
            if len(page) < size:
                return
            cursor, size = (page[-1].updated_ms, page[-1].id), min(2 * size, _PAGE_MAX)

    def _current_ranges(self) -> list[Range]:
        if time.monotonic() >= self._ranges_until:
            self._ranges = ranges(self._cache)
            self._ranges_until = time.monotonic() + _RANGES_SECONDS
        return self._ranges

    # --- dropping ----------------------------------------------------------------------------------------------------

    def _admitted(self) -> scripts.Stamp:
        """The stamp of the epoch that SQL and Redis agree on."""
        if self._cache.hot.stamp == scripts.NEVER:
            self._cache.admission.ensure("EPOCH", self._cache.deadline(None))
        return self._cache.hot.stamp

    def _begin_anew(self) -> None:
        now = time.monotonic()
        if now >= self._anew_at:
            self._cursors.clear()
            self._anew_at = now + max(_ANEW_SECONDS_MIN, _ANEW_FACTOR * self._spent_seconds)
            self._spent_seconds = 0.0

    def _evict(self, batch: Sequence[tuple[str, Idle]], now_ms: int, stamp: scripts.Stamp, report: Report) -> None:
        rows = [(row.partition, f"{row.machine}:{row.id}", row.version, str(row.watermark), 0) for _, row in batch]
        lines = self._cache.hot.evict(rows, stamp, dry_run=report.dry_run)
        if not report.dry_run:
            self._cache.metrics.add("statecache_evictions_total", lines.count("OK"))
        for (state, row), line in zip(batch, lines, strict=True):
            code, _, why = line.partition(" ")
            if code in items.ADMISSION_CODES:
                raise _RefusedError(code)
            report.looked_at += 1
            if code == "OK":
                report.evicted += 1
            elif code == "GONE":
                report.gone += 1
            else:
                reason = why or "foreign"
                report.kept[reason] = report.kept.get(reason, 0) + 1
            if row.updated_ms < now_ms - _FRESH_MS and not report.dry_run:
                self._cursors[row.machine, state] = (row.updated_ms, row.id)


def evict(
    cache: StateCache,
    *,
    idle_seconds: float | None = None,
    machine: str | None = None,
    dry_run: bool = False,
    seconds_max: float = math.inf,
    stopping: Callable[[], bool] = lambda: False,
    progress: Progress = lambda report: None,
) -> Report:
    """Evict once, from the beginning: see ``Evictor.run``. It may be stopped or die at any point, and be run again."""
    if idle_seconds is not None and not 0 <= idle_seconds <= _IDLE_SECONDS_MAX:
        raise errors.InvalidDataError(
            f"idle_seconds {idle_seconds} is refused: it must be 0 or more, and 10^12 at most"
        )
    return Evictor(cache).run(
        idle_seconds=idle_seconds,
        machine=machine,
        dry_run=dry_run,
        seconds_max=seconds_max,
        stopping=stopping,
        progress=progress,
    )


def room(cache: StateCache) -> float:
    """How many more instances Redis takes within its bounds; below 0: by how many it is beyond them. An estimate where memory
    is the bound."""
    settings = cache.settings
    rooms = [math.inf]
    if settings.hot_instances_max or settings.hot_memory_share:
        fill = cache.hot.fill()
        if settings.hot_instances_max:
            rooms.append(settings.hot_instances_max - (fill.keys - 2 * settings.partition_count))
        if fill.max_bytes and settings.hot_memory_share:
            left = fill.max_bytes * settings.hot_memory_share - fill.used_bytes
            rooms.append(math.floor(left * max(fill.keys, 1) / fill.used_bytes))
    return min(rooms)


def above(cache: StateCache) -> int:
    """By how many instances Redis is beyond its bounds (0: it is within them)."""
    return int(max(0.0, -room(cache)))


def ranges(cache: StateCache) -> list[Range]:
    """Every state of every registered machine, with the idle time after which its instances leave."""
    settings = cache.settings
    latest: dict[str, MachineSpec] = {}
    states: dict[str, dict[str, bool]] = {}
    for row in cache.durable.machines():  # by version: a later one's word on a state counts
        spec = readable(row.spec)
        if spec is None:
            continue
        latest[row.name] = spec
        states.setdefault(row.name, {}).update((state.name, state.final) for state in spec.states)
    found = []
    for name, spec in latest.items():
        ttl = spec.hot_ttl_seconds or settings.hot_ttl_seconds
        for state, final in states[name].items():
            ttls = [seconds for seconds in (ttl, settings.hot_ttl_final_seconds if final else 0.0) if seconds]
            found.append(Range(name, state, final, min(ttls, default=0.0)))
    return found
