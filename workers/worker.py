"""The RQ worker: it runs the jobs that it allows, each in a process of its own, and outlives whatever a queue holds.

RQ's own worker does the work; what differs: jobs come from ``queues.SafeQueue``, so they were checked before they got here;
maintenance and messages that hold nonsense are logged and passed over; a work-horse that dies is noticed within seconds; the
scheduler (``schedule.py``) reads its jobs with the same care, and ends with its worker.

kill -9 of the work-horse: the worker marks the job as failed, or puts it back if it has retries left (ours have). Of the
worker: the job comes back when its heartbeat has expired (``HEARTBEAT_SECONDS``) and any worker of the queue does its
maintenance (``MAINTENANCE_SECONDS``); a work-horse that is still running finishes its part, so jobs are safe to run twice.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import rq
from rq.exceptions import InvalidJobOperation, StopRequested
from rq.job import Job, JobStatus
from rq.queue import Queue
from rq.serializers import JSONSerializer
from rq.utils import now
from rq.worker import WorkerStatus

from workers import queues, schedule

_log = logging.getLogger(__name__)

MONITOR_SECONDS = 5
HEARTBEAT_SECONDS = 30
"""A job whose worker has not been heard of for so long is taken for abandoned."""
MAINTENANCE_SECONDS = 15

Told = Callable[[str, str, float], None]
"""Receives a job's function, its outcome (finished, continued, retried, failed, stopped) and its seconds."""


def log_outcome(name: str, outcome: str, seconds: float) -> None:
    (_log.info if outcome in ("finished", "continued") else _log.warning)(
        "job %s %s after %.3f s", name, outcome, seconds
    )


class SafeWorker(rq.Worker):
    """A forking worker over some queues; ``allowed`` is all that it ever calls.

    ``told`` is called in this process (a work-horse's counters die with it) when a job's part has ended.
    """

    job_class: type[queues.SafeJob]

    def __init__(
        self,
        names: Sequence[str],
        connection: Any,
        allowed: queues.Allowed,
        *,
        periodic: Sequence[schedule.Periodic] = (),
        look: schedule.Look | None = None,
        told: Told = log_outcome,
        maintenance_interval: int = MAINTENANCE_SECONDS,
        name: str | None = None,
    ) -> None:
        self._periodic = tuple(periodic)
        self._look = look
        self._told = told
        super().__init__(
            list(names),
            name=name,
            connection=connection,
            job_class=queues.SafeJob.of(allowed),
            queue_class=queues.SafeQueue,
            serializer=JSONSerializer,
            log_job_description=False,  # it is whatever the queue entry says
            job_monitoring_interval=MONITOR_SECONDS,
            maintenance_interval=maintenance_interval,
        )

    # --- one job -----------------------------------------------------------------------------------------------------

    def execute_job(self, job: Job, queue: Queue) -> None:
        """Run a job in a process of its own; whatever comes of it, the worker goes on."""
        began, retries_left = time.monotonic(), job.retries_left or 0
        try:
            super().execute_job(job, queue)
        except StopRequested:  # SIGTERM, in a moment when no job is under way
            raise
        except Exception:
            _log.exception("job %s could not be watched to its end", job.id)
            self.kill_horse_if_any()
            self.executions.clear()
            self._state = WorkerStatus.IDLE
        self._tell(job, retries_left, time.monotonic() - began)

    def kill_horse_if_any(self) -> None:
        """No two work-horses at a time, and none that nobody watches."""
        if self.horse_pid:
            self.kill_horse()
            self.wait_for_horse()
            self._horse_pid = 0

    def _tell(self, job: Job, retries_left: int, seconds: float) -> None:
        try:
            told: Any = self.connection.hmget(job.key, ["status", "retries_left"])
            outcome = _outcome(told[0], retries_left, told[1])
            self._told(str(job.func_name), outcome, seconds)
        except StopRequested:
            raise
        except Exception:
            _log.exception("what became of job %s is not known", job.id)

    def handle_job_failure(self, job: Job, *arguments: Any, **options: Any) -> None:
        """RQ writes the whole job when it tries again: with what the work-horse noted, not with what was known before."""
        try:
            job.get_meta()
        except ValueError:
            job.meta = {}
        super().handle_job_failure(job, *arguments, **options)

    def prepare_job_execution(self, job: Job, remove_from_intermediate_queue: bool = False) -> None:
        """Our ids always come over the intermediate queue."""
        super().prepare_job_execution(job, remove_from_intermediate_queue=True)

    def get_heartbeat_ttl(self, job: Job, working_time: float = 0.0) -> int:
        """How long a job that runs is believed to run without being heard of."""
        return HEARTBEAT_SECONDS

    @property
    def dequeue_timeout(self) -> int:
        """RQ's worker does its maintenance between two waits for a job: so none is longer than that may wait."""
        return int(max(1, min(super().dequeue_timeout, self.maintenance_interval)))

    # --- stopping ----------------------------------------------------------------------------------------------------

    def _shutdown(self) -> None:
        """RQ's ``StopRequested`` rises from whatever line the signal met, and may be lost there (in a finalizer): so it is
        noted too, and rises again with the next heartbeat."""
        self._stop_requested = True
        super()._shutdown()

    def heartbeat(self, timeout: int | None = None, pipeline: Any = None) -> None:
        super().heartbeat(timeout, pipeline)
        if self._stop_requested and self.get_state() == WorkerStatus.IDLE:
            raise StopRequested

    # --- messages and maintenance ------------------------------------------------------------------------------------

    def handle_payload(self, message: Any) -> None:
        """A message that is none must not end the thread that listens."""
        try:
            payload = json.loads(message["data"])
            if not isinstance(payload, dict) or not isinstance(payload.get("command"), str):
                raise ValueError("it is no command")
            super().handle_payload(message)
        except (ValueError, KeyError, TypeError, RecursionError, InvalidJobOperation) as error:
            _log.warning("a message to this worker is passed over: %s", error)

    def run_maintenance_tasks(self) -> None:
        """Take care of what others have left; what cannot be taken care of must not end this worker."""
        try:
            super().run_maintenance_tasks()
        except StopRequested:
            raise
        except Exception:
            _log.exception("maintenance of the queues failed; it is tried again in %d s", self.maintenance_interval)
        finally:
            self.last_cleaned_at: Any = now()

    def clean_registries(self) -> None:
        for queue in self.queues:
            assert isinstance(queue, queues.SafeQueue)
            queues.sweep(queue)
            # RQ's lock outlives a worker that is killed with it in its hand by 15 minutes; all that it guards may be
            # done twice, and nothing of it takes long.
            ttl: Any = self.connection.ttl(queue.registry_cleaning_key)
            if ttl > self.maintenance_interval:
                self.connection.expire(queue.registry_cleaning_key, max(1, self.maintenance_interval))
        super().clean_registries()

    def clean_group_registries(self) -> None:
        """Jobs here have no groups."""

    # --- the scheduler -----------------------------------------------------------------------------------------------

    def _start_scheduler(self, burst: bool = False, logging_level: Any = None, *rest: Any) -> None:
        scheduler = schedule.SafeScheduler(
            self.queues, self.connection, self.job_class.allowed, self._periodic, self._look
        )
        self.scheduler = scheduler
        scheduler.acquire_locks()
        if not scheduler.acquired_locks:
            return
        if burst:
            try:
                scheduler.register_birth()
                scheduler.enqueue_scheduled_jobs()
            finally:
                scheduler.release_locks()
                scheduler.register_death()
        else:
            scheduler.start()


def _outcome(status: bytes | None, retries_before: int, retries_left: bytes | None) -> str:
    """What became of a job's part, by the state that it is in now (another worker may have it already)."""
    if status in (None, JobStatus.FINISHED.value.encode()):
        return "finished"
    if status in (JobStatus.FAILED.value.encode(), JobStatus.STOPPED.value.encode()):
        return status.decode() if status else ""
    return "retried" if retries_left is not None and int(retries_left) < retries_before else "continued"
