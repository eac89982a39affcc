"""How a store is doing: epoch, watermarks, what is not flushed yet, machines, the last recoveries. Reads only."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import msgspec

from statecache.core import entry, errors
from statecache.durable import leases as durable_leases
from statecache.durable import recoveries
from statecache.durable.rows import PartitionRow, RecoveryRow
from statecache.engine import leases
from statecache.hot.answers import parse_any
from statecache.hot.store import READ_BYTES_MAX

if TYPE_CHECKING:
    from statecache.engine.cache import StateCache

READY, NOT_READY, AWAY = "ready", "needs recovery", "away"
_COUNTED_MAX = 100_000
_PAGE = 5000


class PartitionStatus(msgspec.Struct, frozen=True):
    """One partition. ``lag_seconds`` is the age of the oldest unflushed transition (0 without one): what a crash of Redis
    could cost right now; ``oldest_ms`` is when that was made. All but the watermark are None while Redis is not ready."""

    partition: int
    watermark: str
    tail: str | None
    backlog: int | None
    lag_seconds: float | None
    oldest_ms: int | None = None


class MachineStatus(msgspec.Struct, frozen=True):
    """A machine's latest version, and its instances by state as of the watermark."""

    name: str
    version: int
    instances: int
    counts: dict[str, int]


class RecoveryStatus(msgspec.Struct, frozen=True):
    """One recovery. ``report`` is that of ``statecache recover``, None while it is under way (or died)."""

    epoch: int
    started_ms: int
    finished_ms: int | None
    classes: str
    lost_at_least: int
    loss_possible: bool
    report: dict[str, Any] | None


class FlusherStatus(msgspec.Struct, frozen=True):
    """A flusher, and the partitions that it holds. ``silent_seconds`` is how long ago its last heartbeat was, by the database's
    clock; ``alive`` is False when that is longer than its lease, or its process is known to be gone. ``redis`` is the endpoint
    where it works, None if it has noted none."""

    name: str
    host: str
    pid: int
    alive: bool
    started_ms: int
    silent_seconds: float
    partitions: tuple[int, ...]
    redis: str | None = None


class Status(msgspec.Struct, frozen=True):
    """All of it. ``redis`` is ``ready``, ``needs recovery`` or ``away``."""

    redis: str
    redis_problem: str
    epoch: int
    deployment: str
    partition_count: int
    backlog: int | None
    lag_seconds: float | None
    partitions: tuple[PartitionStatus, ...]
    machines: tuple[MachineStatus, ...]
    recoveries: tuple[RecoveryStatus, ...]
    flushers: tuple[FlusherStatus, ...] = ()


def status(cache: StateCache, recoveries_max: int = 5) -> Status:
    """Look at everything once. Cost: a script call per partition, a few queries.

    Redis being away or untrue is part of the answer. Raises ``UnavailableError`` when SQL is away.
    """
    row = cache.durable.identity()
    rows = cache.durable.partitions()
    problem, state = "", READY
    parts: list[PartitionStatus] = []
    try:
        cache.admission.ensure("EPOCH", time.monotonic())
        now_ms = cache.hot.time_ms()  # the clock that noted when the entries came: this host's may be another time
        parts = [_partition(cache, one, now_ms) for one in rows]
    except errors.RecoveringError as error:
        problem, state = str(error), NOT_READY
    except errors.UnavailableError as error:
        problem, state = str(error), AWAY
    if state != READY:
        parts = [PartitionStatus(one.partition, str(one.watermark), None, None, None) for one in rows]
    return Status(
        state, problem, row.epoch, row.deployment, row.partition_count,
        sum(one.backlog or 0 for one in parts) if state == READY else None,
        max((one.lag_seconds or 0.0 for one in parts), default=0.0) if state == READY else None,
        tuple(parts), _machines(cache), tuple(_recovery(one) for one in recoveries.recoveries(cache.durable, recoveries_max)),
        flushers(cache),
    )  # fmt: skip


def flushers(cache: StateCache) -> tuple[FlusherStatus, ...]:
    """The flushers that are known (dead ones for an hour), by name. One query; raises ``UnavailableError``."""
    return tuple(
        FlusherStatus(
            row.name, row.host, row.pid, row.alive and not leases.has_ended(row), row.started_ms,
            round(row.silent_ms / 1000, 3), row.partitions, row.redis,
        )
        for row in durable_leases.look(cache.durable)
    )  # fmt: skip


def _partition(cache: StateCache, row: PartitionRow, now_ms: float) -> PartitionStatus:
    """What of a partition is behind its watermark: its oldest entry tells the lag."""
    reply = cache.hot.read([(row.partition, row.watermark)], entries=2, bytes_max=READ_BYTES_MAX)[0]
    if reply.code != "OK":
        raise errors.RecoveringError(f"partition {row.partition} answers {reply.code}")
    records = [parse_any(row.partition, line) for line in reply.lines]
    oldest = next((record for record in records if not record.is_mark and record.machine != entry.FOREIGN), None)
    lag = 0.0 if oldest is None else max(0.0, (now_ms - oldest.at_ms) / 1000)
    backlog = _backlog(cache, row, reply.last) if oldest is not None else 0
    oldest_ms = None if oldest is None else oldest.at_ms
    return PartitionStatus(row.partition, str(row.watermark), str(reply.last), backlog, round(lag, 3), oldest_ms)


def _backlog(cache: StateCache, row: PartitionRow, tail: entry.EntryId) -> int:
    """Unflushed transitions: by their numbers within an epoch; counted (up to a bound) across the mark of a recovery."""
    if tail.epoch == row.watermark.epoch:
        return tail.seq - row.watermark.seq
    cursor, count = row.watermark, 0
    while count < _COUNTED_MAX:
        reply = cache.hot.read([(row.partition, cursor)], entries=_PAGE, bytes_max=READ_BYTES_MAX)[0]
        records = [parse_any(row.partition, line) for line in reply.lines]
        count += sum(not record.is_mark for record in records)
        if not records or records[-1].entry_id >= reply.last:
            break
        cursor = records[-1].entry_id
    return count


def _machines(cache: StateCache) -> tuple[MachineStatus, ...]:
    latest = {row.name: row.version for row in cache.durable.machines()}
    found = []
    for name, version in latest.items():
        counts = cache.durable.counts(name)
        found.append(MachineStatus(name, version, sum(counts.values()), counts))
    return tuple(found)


def _recovery(row: RecoveryRow) -> RecoveryStatus:
    report: dict[str, Any] | None = msgspec.json.decode(row.report) if row.report else None
    parts = report["partitions"] if report else []
    return RecoveryStatus(
        row.epoch, row.started_ms, row.finished_ms, row.classes,
        sum(part["lost_at_least"] for part in parts), any(part["loss_possible"] for part in parts), report,
    )  # fmt: skip
