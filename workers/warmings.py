"""Warming, fanned out: one job a partition, so that workers share it; and enqueued by itself after a recovery.

The parent only enqueues, and is over then: a job that waited for others would hold its worker. What is shown of it is the
sum of its parts (``desk.show``). Its parts' ids follow from its own, and it notes whom it asks for what before it asks; so
a parent that is killed anywhere and run again makes no second set: an id that is there is left alone, whatever its state.

SQL has no index that begins with the partition: each part reads the find index of its states and passes over what is another
partition's. For 400,000 instances on PostgreSQL in 16 partitions a part took 2 s for that, on SQLite 1.2 s; all 16 take ten
(five) times what one job's look would. With the partition as the find index' last column they take no more than that one
(0.9 and 1.5 times), but the index grows by a quarter, which every flush pays for: so the rare recovery does.
"""

from __future__ import annotations

import logging
import re
import time
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from statecache.core import errors, failpoints
from statecache.durable import recoveries
from statecache.engine import recovery, warming
from workers import queues, schedule

if TYPE_CHECKING:
    from statecache.durable.rows import RecoveryRow
    from statecache.engine.cache import StateCache
    from workers.jobs import Run

_log = logging.getLogger(__name__)
JOB = "statecache.warm"
RECENT_SECONDS = 12 * 3600
"""A recovery longer ago than this asks for nothing any more. Far below the time for which the parent of its warming is kept
when it is over (``schedule.RESULT_KEPT_SECONDS``): that it is there tells that it was enqueued."""
_RECOVERIES = 20
SUMS = ("done", "of", "warmed", "hot_already", "left_cold")
"""What the parts note, and what is summed up."""


def part_id(parent_id: str, partition: int) -> str:
    return f"{parent_id}-p{partition:02d}"


def fan_out(run: Run, machine: str, limit: int, partitions: str) -> dict[str, Any]:
    """Enqueue a job for each partition that has something to warm; ``limit`` 0: no limit."""
    notes = run.notes
    if "shares" not in notes:
        run.note(shares=_shares(run.cache, machine, limit, partitions), bounded=_is_bounded(run.cache, limit))
    queue = queues.SafeQueue(run.job.origin, connection=run.job.connection, job_class=type(run.job))
    for number, share in notes["shares"].items():
        arguments = {"machine": machine, "partition": int(number), "limit": share if notes["bounded"] else 0}
        schedule.enqueue_once(
            queue, JOB, part_id(str(run.job.id), int(number)), arguments,
            timeout_seconds=int(run.job.timeout or 600),
            retry_seconds=run.job.retry_intervals or schedule.RETRY_SECONDS,
        )  # fmt: skip
        failpoints.hit("jobs.enqueued")
    return {"partitions": len(notes["shares"])}


def _shares(cache: StateCache, machine: str, limit: int, partitions: str) -> dict[str, int]:
    if limit < 0:
        raise errors.InvalidDataError(f"limit {limit} is refused: it must be 1 or more, or 0 for no limit")
    wanted = numbers(partitions, cache.settings.partition_count)
    found = warming.shares(cache, limit=limit or None, machine=machine or None)
    return {str(number): share for number, share in found.items() if wanted is None or number in wanted}


def _is_bounded(cache: StateCache, limit: int) -> bool:
    return bool(limit or cache.settings.hot_instances_max)


def numbers(partitions: str, count: int | None = None) -> set[int] | None:
    """The partitions that a job names, None for all. Raises ``InvalidDataError``, also where there are fewer (``count``)."""
    if not partitions:
        return None
    if not re.fullmatch(r"[0-9]{1,6}(,[0-9]{1,6})*", partitions):
        raise errors.InvalidDataError(
            f"partitions {partitions[:80]!r} is refused: numbers with commas between, as 0,3,7"
        )
    found = {int(number) for number in partitions.split(",")}
    if count is not None and max(found) >= count:
        raise errors.InvalidDataError(f"partition {max(found)} is refused: they are 0 to {count - 1}")
    return found


def result(notes: Mapping[str, Any]) -> dict[str, Any]:
    """What a warming returns, of its notes."""
    return {name: notes.get(name, 0) for name in ("warmed", "hot_already")} | {"full": bool(notes.get("full"))}


# --- after a recovery ------------------------------------------------------------------------------------------------------


def after_recovery(cache: StateCache, queue: queues.SafeQueue) -> str | None:
    """Enqueue the warming that the last recovery with wiped partitions asks for; returns its id if this call did.

    Exactly one for each recovery, however many schedulers look, and whichever dies: the job's id is made of the recovery's
    epoch and owner, and what is there is left alone. Raises ``UnavailableError``.
    """
    for row in recoveries.recoveries(cache.durable, _RECOVERIES):
        wiped = _wiped(row)
        if wiped:
            break
    else:
        return None
    if time.time() - (row.finished_ms or 0) / 1000 > RECENT_SECONDS:
        return None
    job_id = f"warm-{zlib.crc32(queue.name.encode()):08x}-{row.epoch}-{zlib.crc32(row.owner.encode()):08x}"
    some = "" if len(wiped) == cache.settings.partition_count else ",".join(map(str, wiped))
    failpoints.hit("jobs.looked")
    if not schedule.enqueue_once(queue, JOB, job_id, {"partitions": some}):
        return None
    failpoints.hit("jobs.wanted")
    _log.info("recovery %d found %d partitions wiped: their warming is enqueued as %s", row.epoch, len(wiped), job_id)
    return job_id


def _wiped(row: RecoveryRow) -> list[int]:
    """The partitions that a finished recovery found wiped."""
    if row.finished_ms is None or recovery.WIPED not in row.classes:
        return []
    report = msgspec.json.decode(row.report, type=recovery.Report)
    return [part.partition for part in report.partitions if part.kind == recovery.WIPED]
