"""Which settings fit the load that is there: what was measured, and what follows from it by a line of arithmetic.

``doctor`` tells whether the promises hold; this tells what would make them cheaper, or hold for longer. Nothing is changed.
What is measured is what the last moved instances of each state take in Redis, and what stands behind the watermarks now: asked
at a quiet hour it knows nothing of the busy one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import msgspec

from statecache.engine import eviction, status
from statecache.hot import watching

if TYPE_CHECKING:
    from statecache.engine.cache import StateCache

_SAMPLE_OF_STATE = 64
_NEWEST = (2**62, "")
_HEADROOM = 1.5
"""Redis beside its instances: logs, buffers, the allocator's waste, and what comes."""
_FULL_SHARE = 0.8
_TABLES_SHARE = 0.05
_MANY_FINAL = 10_000


class Advice(msgspec.Struct, frozen=True):
    """One setting, of ours or of a server, as it is and as it should be."""

    setting: str
    now: str
    advised: str
    why: str


class Measured(msgspec.Struct, frozen=True):
    """What the advice rests on. ``instance_bytes`` is the mean of ``sampled`` hot instances (None: none was hot, or the server
    does not let us look); ``tables`` is the share of them that are kept as tables, not as listpacks."""

    instances: int
    final_instances: int
    hot_keys: int
    used_bytes: int
    max_bytes: int
    sampled: int
    instance_bytes: float | None
    tables: float
    unflushed: int
    lag_seconds: float | None
    flushers: int


class Report(msgspec.Struct, frozen=True):
    """The advice, none if all fits, and what it was measured from."""

    measured: Measured
    advice: tuple[Advice, ...]


def advise(cache: StateCache) -> Report:
    """Measure and judge. A few queries and round trips, whatever the store holds. Raises ``UnavailableError``."""
    ranges = eviction.ranges(cache)
    measured = _measure(cache, ranges)
    return Report(measured, (*_memory(cache, measured, ranges), *_tables(cache, measured), *_flushing(cache, measured)))


def _measure(cache: StateCache, ranges: Sequence[eviction.Range]) -> Measured:
    instances = finals = 0
    addresses: list[tuple[str, str]] = []
    counts = {name: cache.durable.counts(name) for name in {one.machine for one in ranges}}
    for one in ranges:
        count = counts[one.machine].get(one.state, 0)
        instances += count
        finals += count if one.final else 0
        if count:
            rows = cache.durable.recent(one.machine, one.state, _NEWEST, _SAMPLE_OF_STATE, None).rows
            addresses += [(one.machine, row[1]) for row in rows]
    sizes = watching.sizes(cache.hot, addresses)
    fill, seen = cache.hot.fill(), status.status(cache)
    return Measured(
        instances,
        finals,
        fill.keys,
        fill.used_bytes,
        fill.max_bytes,
        len(sizes),
        sum(size for size, _ in sizes) / len(sizes) if sizes else None,
        sum(encoding not in ("listpack", "ziplist") for _, encoding in sizes) / max(len(sizes), 1),
        seen.backlog or 0,
        seen.lag_seconds,
        sum(one.alive for one in seen.flushers),
    )


def _memory(cache: StateCache, found: Measured, ranges: Sequence[eviction.Range]) -> Iterator[Advice]:
    settings, each = cache.settings, found.instance_bytes
    if each is not None:
        wanted = int(found.instances * each * _HEADROOM) + 64 * 2**20
        takes = f"all {found.instances:,} instances take about {_megabytes(found.instances * each)} ({each:,.0f} bytes each)"
        if not found.max_bytes:
            why = f"{takes}; without a limit a full machine kills the server, with one it answers with an error"
            yield Advice("maxmemory (Redis)", "no limit", _megabytes(wanted), why)
        elif found.used_bytes > _FULL_SHARE * found.max_bytes and wanted > found.max_bytes:
            why = f"{_megabytes(found.used_bytes)} are used; {takes}. Or let more leave: hot_ttl_seconds"
            yield Advice("maxmemory (Redis)", _megabytes(found.max_bytes), _megabytes(wanted), why)
    if found.max_bytes and not settings.hot_memory_share and not settings.hot_instances_max:
        why = "nothing leaves for want of room: when memory is full writers are refused"
        yield Advice("hot_memory_share", "0", "0.8", why)
    lasting = [one for one in ranges if one.final and not one.ttl_seconds]
    if lasting and found.final_instances >= _MANY_FINAL:
        held = "" if each is None else f", up to {_megabytes(found.final_instances * each)} of Redis"
        why = f"{found.final_instances:,} instances are in a final state{held}: they come back from SQL when they are asked for"
        yield Advice("hot_ttl_final_seconds", f"{settings.hot_ttl_final_seconds:g}", "86400", why)


def _tables(cache: StateCache, found: Measured) -> Iterator[Advice]:
    if found.tables <= _TABLES_SHARE:
        return
    names = ("hash-max-listpack-value", "hash-max-listpack-entries")
    known = cache.hot.configuration(*names) or {}
    now = ", ".join(f"{name.rsplit('-', 1)[1]} {known.get(name, '?')}" for name in names)
    why = (
        f"{found.tables:.0%} of {found.sampled} sampled instances are kept as tables, which take twice to thrice the memory: "
        "a value is longer, or there are more fields"
    )
    yield Advice("hash-max-listpack-value, -entries (Redis)", now, "above the longest value and the most fields", why)


def _flushing(cache: StateCache, found: Measured) -> Iterator[Advice]:
    settings = cache.settings
    if not found.flushers:
        why = (
            f"nobody flushes: {found.unflushed:,} transitions are in Redis alone"
            if found.unflushed
            else "nobody flushes"
        )
        yield Advice("flushers", "0", "2 processes of 'statecache flusher'", why)
    elif found.lag_seconds is not None and found.lag_seconds > 2 * settings.lag_target_seconds:
        most = min(settings.partition_count, os.cpu_count() or 1)
        why = f"the oldest of {found.unflushed:,} unflushed transitions waits for {found.lag_seconds:.1f} s"
        if found.flushers < most:
            yield Advice("flushers", str(found.flushers), str(found.flushers + 1), why)
        else:
            yield Advice("lag_target_seconds", f"{settings.lag_target_seconds:g}", "more, or a faster database", why)
    elif found.flushers == 1:
        why = "when its process or machine is gone nothing is flushed until another one is started"
        yield Advice("flushers", "1", "2, on two machines", why)
    if not settings.log_keep_seconds:
        why = "a backup of SQL that is put back loses what was flushed since it was made, unless the logs reach back to it"
        yield Advice("log_keep_seconds", "0", "the age of the oldest backup that may be put back", why)


def _megabytes(count: float) -> str:
    return f"{count / 2**20:,.0f} MB"
