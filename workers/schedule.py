"""The scheduler: jobs whose time has come, and the periodic ones.

RQ's scheduler runs beside a worker as a process of its own and holds a lock per queue, so one is active however many run; when
it dies its lock expires within a minute, and another worker's takes over. RQ's CronScheduler is not used: it enqueues with
pickle, it has no lock, and it remembers when a job ran last in memory only, so each start of it runs everything. Here a period
is a number, time divided by the interval; a periodic job is enqueued for a period in ONE Redis transaction with the note that
it was (WATCH on the note). So whatever is killed and however many run, each period enqueues its job at most once, and a period
that is missed while nobody ran is made up for by one job, not by many. A job that is still waiting or running is not enqueued
again: the next look, a second later, finds out.

Each look reads jobs with ``queues.SafeJob``: RQ's scheduler would end at a malformed one, at each start again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from redis.exceptions import ResponseError, WatchError
from rq.defaults import RQ_KEY_PREFIX
from rq.job import JobStatus, Retry
from rq.queue import Queue
from rq.registry import ScheduledJobRegistry
from rq.scheduler import RQScheduler
from rq.serializers import JSONSerializer
from rq.utils import current_timestamp

from statecache.core import errors
from statecache.settings import Settings
from workers import queues

_log = logging.getLogger(__name__)

RESULT_KEPT_SECONDS = 24 * 3600
FAILURE_KEPT_SECONDS = 7 * 24 * 3600
RETRY_SECONDS = (5, 30, 120)
LOOK_SECONDS = 2.0
"""How often the scheduler looks for a recovery that wants a warming."""
Look = Callable[[queues.SafeQueue], object]
"""Looks at the store, and enqueues what it asks for."""
_UNDER_WAY = {
    one.value.encode() for one in (JobStatus.QUEUED, JobStatus.STARTED, JobStatus.SCHEDULED, JobStatus.DEFERRED)
}
_CLOCKS_DIFFER_SECONDS = 2 * 3600
"""A note from further ahead was made by a clock that has been set right since: it would stop the job for as long again."""


@dataclass(frozen=True)
class Periodic:
    """A job that is enqueued once in every period of ``interval_seconds``."""

    job: str
    interval_seconds: float
    arguments: dict[str, Any] = field(default_factory=dict)
    timeout_seconds: int = 600


def of_settings(settings: Settings) -> list[Periodic]:
    """The periodic jobs that the settings want."""
    wanted = (
        ("verify", settings.verify_interval_seconds),
        ("retry-letters", settings.letters_interval_seconds),
        ("evict", settings.evict_interval_seconds),
        ("retention", settings.retention_interval_seconds),
    )
    return [Periodic(f"statecache.{name}", seconds) for name, seconds in wanted if seconds]


def options(timeout_seconds: int = 600, retry_seconds: Sequence[int] = RETRY_SECONDS) -> dict[str, Any]:
    """How our jobs are enqueued: what RQ keeps of them, and when it tries again."""
    return {
        "job_timeout": timeout_seconds,
        "result_ttl": RESULT_KEPT_SECONDS,
        "failure_ttl": FAILURE_KEPT_SECONDS,
        "retry": Retry(max=len(retry_seconds), interval=list(retry_seconds)) if retry_seconds else None,
    }


def note_key(queue_name: str, job: str) -> str:
    """Where stands which period a periodic job was enqueued for last."""
    return f"{RQ_KEY_PREFIX}:statecache-periodic:{queue_name}:{job}"


def enqueue_due(queue: queues.SafeQueue, periodic: Periodic, now_seconds: float) -> str | None:
    """Enqueue a periodic job if its period has begun and it is not under way; returns the job's id if it did."""
    period = int(now_seconds // periodic.interval_seconds)
    key = note_key(queue.name, periodic.job)
    short, place = periodic.job.removeprefix("statecache."), f"{zlib.crc32(queue.name.encode()):08x}"
    job_id = f"{short}-{place}-{int(periodic.interval_seconds * 1000)}-{period}"
    with queue.connection.pipeline() as pipeline:
        pipeline.watch(key)
        note: Any = pipeline.get(key)
        last = _note(note)
        ahead = -1 if last is None or last["interval"] != periodic.interval_seconds else last["period"] - period
        if ahead == 0 or (ahead > 0 and last is not None and last["at"] - now_seconds <= _CLOCKS_DIFFER_SECONDS):
            return None
        if last is not None and pipeline.hget(queues.SafeJob.key_for(str(last["id"])), "status") in _UNDER_WAY:
            return None
        try:
            pipeline.multi()
            text = {"interval": periodic.interval_seconds, "period": period, "id": job_id, "at": now_seconds}
            pipeline.set(key, json.dumps(text), ex=max(7 * 24 * 3600, int(periodic.interval_seconds * 3)))
            queue.enqueue(
                periodic.job, kwargs=periodic.arguments, job_id=job_id, pipeline=pipeline,
                meta={"job": periodic.job, "periodic": True}, **options(periodic.timeout_seconds),
            )  # fmt: skip
            pipeline.execute()
        except WatchError:
            return None
    _log.info("periodic job %s is enqueued as %s", periodic.job, job_id)
    return job_id


def enqueue_once(
    queue: queues.SafeQueue,
    job: str,
    job_id: str,
    arguments: Mapping[str, Any],
    *,
    timeout_seconds: int = 600,
    retry_seconds: Sequence[int] = RETRY_SECONDS,
) -> bool:
    """Enqueue a job unless one of this id is there, waiting, running or over; returns whether this call did.

    Whoever else does the same at the same moment, or died half-way through several such calls and does them all again:
    WATCH lets one of them write the job and its place in the queue, in one transaction.
    """
    with queue.connection.pipeline() as pipeline:
        key = queues.SafeJob.key_for(job_id)
        pipeline.watch(key)
        if pipeline.exists(key):
            return False
        try:
            pipeline.multi()
            queue.enqueue(
                job, kwargs=dict(arguments), job_id=job_id, pipeline=pipeline, meta={"job": job},
                **options(timeout_seconds, retry_seconds),
            )  # fmt: skip
            pipeline.execute()
        except WatchError:
            return False
    return True


def _note(text: bytes | None) -> dict[str, Any] | None:
    """The note, or None if there is none that we wrote."""
    try:
        note = json.loads(text or b"null")
        return {
            "interval": float(note["interval"]), "period": int(note["period"]), "id": str(note["id"]), "at": float(note["at"]),
        }  # fmt: skip
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None


class SafeScheduler(RQScheduler):
    """RQ's scheduler, reading with care, and enqueueing the periodic jobs into the first queue whose lock it holds."""

    def __init__(
        self,
        watched: Sequence[Queue],
        connection: Any,
        allowed: queues.Allowed,
        periodic: Sequence[Periodic] = (),
        look: Look | None = None,
    ) -> None:
        super().__init__(watched, connection, logging_level=logging.WARNING, serializer=JSONSerializer)
        self._job_class = queues.SafeJob.of(allowed)
        self._periodic = tuple(periodic)
        self._look, self._look_at, self._look_failed = look, 0.0, False
        self._home = watched[0].name
        self._worker_pid = os.getpid()

    def enqueue_scheduled_jobs(self) -> None:
        """One look: enqueue what is due. Errors of one queue are logged; they end nothing."""
        if os.getpid() != self._worker_pid and os.getppid() != self._worker_pid:
            _log.warning("the scheduler's worker is gone: so goes the scheduler")
            self.request_stop()
            return
        for name in sorted(self._acquired_locks):
            queue = queues.SafeQueue(name, connection=self.connection, job_class=self._job_class)
            try:
                self._enqueue_scheduled(queue)
                if name == self._home:
                    for periodic in self._periodic:
                        enqueue_due(queue, periodic, time.time())
                    self._look_around(queue)
            except (ResponseError, ValueError, TypeError):
                _log.exception("the schedule of queue %s cannot be read", name)

    def _look_around(self, queue: queues.SafeQueue) -> None:
        """Enqueue what the state of the store asks for; that cannot be asked for a while, when SQL is away."""
        if self._look is None or time.monotonic() < self._look_at:
            return
        self._look_at = time.monotonic() + LOOK_SECONDS
        try:
            self._look(queue)
            self._look_failed = False
        except errors.StateCacheError as error:
            if not self._look_failed:
                _log.warning("whether jobs are wanted after a recovery is not known: %s", error)
            self._look_failed = True

    def _enqueue_scheduled(self, queue: queues.SafeQueue) -> None:
        """Move the jobs whose time has come into the queue; each in one transaction."""
        registry = ScheduledJobRegistry(queue=queue, job_class=self._job_class)
        due: Any = queue.connection.zrangebyscore(registry.key, 0, current_timestamp(), start=0, num=1000)
        for raw_id in due:
            job = queue.fetch_job(raw_id.decode()) if queues.is_id(raw_id) else None
            if job is None:
                queue.connection.zrem(registry.key, raw_id)
                continue
            with queue.connection.pipeline() as pipeline, contextlib.suppress(WatchError):  # another look has it
                pipeline.watch(job.key)
                waits = pipeline.hget(job.key, "status") == JobStatus.SCHEDULED.value.encode()
                pipeline.multi()
                pipeline.zrem(registry.key, raw_id)
                if waits:
                    queue._enqueue_job(job, pipeline=pipeline, at_front=job.should_enqueue_at_front())
                pipeline.execute()
