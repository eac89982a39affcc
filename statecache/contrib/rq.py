"""RQ jobs as instances of a machine: what became of each, in SQL, long after RQ has forgotten it.

    jobs = track(queue, cache)
    jobs.enqueue(send_mail, "ann@example.org")       # queue.enqueue, and the job is followed from now on

    class Worker(TrackingWorker, rq.Worker):         # a worker that tells at once
        jobs = jobs

    jobs.sweep()                                     # now and then: what nobody told

``follow`` reads a job's hash in Redis, compares it with what is recorded, and records the moves in between.
Everything else only says when to look: after ``enqueue``, when a work-horse begins, when its worker sees it end, and
the sweep for the rest (jobs enqueued elsewhere, workers that were killed, jobs that RQ has dropped). So it does not
matter who looks, how often, or whether two do so at once: a move is made for the version that was looked at
(``expect_version``), under an id made of the job's own marks, and whoever comes too late looks again. What happened
between two looks is told as far as RQ still knows it: each attempt and each repetition is a move, their times are
known for the last one only.

The job's function and arguments are never unpacked: they may be pickled.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

from rq.defaults import RQ_KEY_PREFIX
from rq.job import Job, JobStatus
from rq.queue import Queue
from rq.registry import (
    CanceledJobRegistry,
    DeferredJobRegistry,
    FailedJobRegistry,
    FinishedJobRegistry,
    ScheduledJobRegistry,
    StartedJobRegistry,
)

from statecache.core import errors
from statecache.core.machine import State, StateMachine
from statecache.core.model import Snapshot
from statecache.engine.cache import StateCache
from statecache.engine.handle import MachineHandle

_log = logging.getLogger(__name__)
_ATTEMPTS = 10
_PAGE = 500
_ERROR_LENGTH = 500


class RqJob(StateMachine):
    """A job of RQ. Final are ``finished``, and ``forgotten``: RQ has dropped the job."""

    name = "rq_job"

    created = State(initial=True)
    deferred = State(title="waits for other jobs")
    scheduled = State(title="waits for its time")
    queued = State()
    started = State()
    finished = State(final=True)
    failed = State()
    stopped = State()
    canceled = State()
    forgotten = State(final=True)

    defer = created.to(deferred) | queued.to(deferred) | scheduled.to(deferred)
    schedule = created.to(scheduled) | queued.to(scheduled) | deferred.to(scheduled)
    enqueue = created.to(queued) | deferred.to(queued) | scheduled.to(queued)
    start_run = queued.to(started)
    finish = started.to(finished)
    fail = started.to(failed) | queued.to(failed)
    stop = started.to(stopped)
    retry = started.to(queued)
    repeat = started.to(queued)
    cancel = (
        created.to(canceled) | deferred.to(canceled) | scheduled.to(canceled) | queued.to(canceled) | started.to(canceled)
        | failed.to(canceled) | stopped.to(canceled)
    )  # fmt: skip
    requeue = failed.to(queued) | stopped.to(queued) | canceled.to(queued)
    forget = (
        created.to(forgotten) | deferred.to(forgotten) | scheduled.to(forgotten) | queued.to(forgotten)
        | started.to(forgotten) | failed.to(forgotten) | stopped.to(forgotten) | canceled.to(forgotten)
    )  # fmt: skip


_STATES = {
    "created": "created", "deferred": "deferred", "ready_to_enqueue": "deferred", "rate_limited": "deferred",
    "scheduled": "scheduled", "queued": "queued", "started": "started", "finished": "finished", "failed": "failed",
    "stopped": "stopped", "canceled": "canceled",
}  # fmt: skip
_OVER = {"failed", "stopped", "canceled"}
_ENDED = {"finished", "forgotten"}
_FIELDS = (
    "status", "origin", "description", "worker_name", "enqueued_at", "started_at", "ended_at", "retries_left",
    "number_of_retries", "repeats_left",
)  # fmt: skip


class Facts(NamedTuple):
    """What RQ says of a job now. ``status`` is empty when it has dropped the job. Times are RQ's texts."""

    status: str = ""
    origin: str = ""
    function: str = ""
    worker: str = ""
    enqueued_at: str = ""
    started_at: str = ""
    ended_at: str = ""
    retries_left: int | None = None
    retries_returned: int = 0
    repeats_left: int | None = None


class Move(NamedTuple):
    """One move to be recorded: ``mark`` makes its id, ``at`` is RQ's text of its time."""

    event: str
    mark: str
    at: str = ""
    data: Mapping[str, Any] = {}


def moves(state: str, seen: Mapping[str, Any], facts: Facts) -> Iterator[Move]:
    """The moves from what is recorded (``state``, with the data ``seen``) to what RQ says. None from where a job ended, also
    if its id is used again."""
    if state in _ENDED:
        return
    target = _STATES.get(facts.status)
    if target is None:
        if not facts.status:
            yield Move("forget", "", "")
        return
    run = str(seen.get("run", ""))
    for event, mark, left in _missed(seen, facts):
        if state != "started":
            yield from _to_queue(state, mark, "")
            yield Move("start_run", mark)
        yield Move(event, mark, facts.ended_at if target in ("queued", "scheduled") else "", left)
        state = "queued"
    if facts.started_at and facts.enqueued_at != run and target in ("started", "finished", "failed", "stopped"):
        if state == "started":  # that run was lost, and RQ does not say how it ended
            yield Move("retry", f"lost:{facts.enqueued_at}")
            state = "queued"
        yield from _to_queue(state, facts.enqueued_at, facts.enqueued_at)
        yield Move("start_run", facts.enqueued_at, facts.started_at, _run_data(facts))
        state = "started"
    if state != target:
        yield from _last(state, target, facts)


def _missed(seen: Mapping[str, Any], facts: Facts) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """The ends of runs after which the job was put back: (event, mark, what to remember)."""
    before = seen.get("retries_left")
    if isinstance(before, int) and facts.retries_left is not None:
        for left in range(before - 1, facts.retries_left - 1, -1):
            yield "retry", f"left:{left}", {"retries_left": left}
    for number in range(int(seen.get("retries_returned", 0)) + 1, facts.retries_returned + 1):
        yield "retry", f"returned:{number}", {"retries_returned": number}
    before = seen.get("repeats_left")
    if isinstance(before, int) and facts.repeats_left is not None:
        for left in range(before - 1, facts.repeats_left - 1, -1):
            yield "repeat", f"repeats:{left}", {"repeats_left": left}


def _to_queue(state: str, mark: str, at: str) -> Iterator[Move]:
    """From wherever it waits or ended into the queue."""
    if state in ("created", "deferred", "scheduled"):
        yield Move("enqueue", mark, at)
    elif state in _OVER:
        yield Move("requeue", mark, at)


def _run_data(facts: Facts) -> dict[str, Any]:
    """What tells this run from others: when it was enqueued. RQ notes its start twice, at two moments."""
    return {"run": facts.enqueued_at, "worker": facts.worker}


def _last(state: str, target: str, facts: Facts) -> Iterator[Move]:
    """The last moves, once all runs are told: the shortest way."""
    times = {
        "enqueue": facts.enqueued_at, "requeue": facts.enqueued_at, "start_run": facts.started_at,
        "retry": facts.ended_at, "finish": facts.ended_at, "fail": facts.ended_at, "stop": facts.ended_at,
    }  # fmt: skip
    for event in _way(state, target):
        at = times.get(event, "")
        yield Move(event, facts.ended_at or facts.enqueued_at, at, _run_data(facts) if event == "start_run" else {})


_ORDER = ("enqueue", "schedule", "defer", "start_run", "finish", "fail", "stop", "retry", "requeue", "cancel")
"""The events of which ways are made; of two of the same length the one whose event stands first is taken."""


@functools.cache
def _way(state: str, target: str) -> tuple[str, ...]:
    """The events that lead from a state to another; none to ``created``, nor from where nothing leads."""
    arcs = [
        (name, arc.source, arc.target)
        for name in _ORDER
        for event in RqJob.spec.events
        if event.name == name
        for arc in event.transitions
    ]
    ways: dict[str, tuple[str, ...]] = {state: ()}
    edge = [state]
    while edge and target not in ways:
        found = {
            goal: (*ways[source], name) for name, source, goal in reversed(arcs) if source in edge and goal not in ways
        }
        ways |= found
        edge = list(found)
    return ways.get(target, ())


class OvertakenError(errors.UnavailableError):
    """Others who follow the job, too, were quicker at every attempt: it is looked at again with the next sweep."""


_MEANWHILE = (errors.StaleVersionError, errors.InvalidTransitionError, errors.AlreadyExistsError)
_OF_ONE_JOB = (
    errors.NotFoundError, errors.ParkedError, errors.InvalidDataError, errors.InvalidTransitionError, errors.IntegrityError,
    errors.FencedError, OvertakenError,
)  # fmt: skip
"""What is the matter with one job: the sweep goes on with the others."""


class Tracker:
    """Follows the jobs of one queue. Thread-safe, and safe in a work-horse."""

    def __init__(self, queue: Queue, cache: StateCache, machine: MachineHandle) -> None:
        self.queue = queue
        self.machine = machine
        self.durable = cache.durable

    def enqueue(self, *arguments: Any, **options: Any) -> Job:
        """``queue.enqueue``, and follow the job. Enqueued is enqueued: if the store is away, the sweep follows it later."""
        job = self.queue.enqueue(*arguments, **options)
        self.look(job.id)
        return job

    def look(self, job_id: str, facts: Facts | None = None) -> None:
        """``follow``, for hooks: what goes wrong with the store is logged, and is none of the job's business."""
        try:
            self.follow(job_id, facts)
        except errors.StateCacheError as error:
            _log.warning("job %s is not followed now, the next sweep will: %s", job_id, error)

    def follow(self, job_id: str, facts: Facts | None = None) -> Snapshot:
        """Record what became of a job since it was looked at last (``facts``: as told by who has it in hand).

        Idempotent. An instance that is ``finished`` or ``forgotten`` stays so: where RQ has a job of its id again, that one is
        not followed, and a warning says so. Raises ``NotFoundError`` for a job that neither RQ nor the store knows,
        ``OvertakenError``, and what a transition raises.
        """
        error: errors.StateCacheError | None = None
        for _ in range(_ATTEMPTS):
            known = facts or self._facts([job_id])[0]
            try:
                return self._record(job_id, known)
            except _MEANWHILE as met:  # somebody else follows it, too
                error = met
        if isinstance(error, errors.InvalidTransitionError):  # no: a machine of the user's has not this event there
            raise error
        raise OvertakenError(f"job {job_id} moves faster than it can be followed") from error

    def _record(self, job_id: str, facts: Facts) -> Snapshot:
        try:
            snapshot = self.machine.get(job_id)
        except errors.NotFoundError:
            if not facts.status:
                raise errors.NotFoundError(f"job {job_id}: neither RQ nor the store knows it") from None
            first = {"queue": facts.origin, "function": facts.function}
            for name in ("retries_left", "repeats_left"):
                if getattr(facts, name) is not None:
                    first[name] = getattr(facts, name)
            self.machine.start(job_id, first, transition_id="rq:created")
            snapshot = self.machine.get(job_id)
        if snapshot.state in _ENDED and facts.status and facts.enqueued_at != snapshot.data.get("run", ""):
            _log.warning(
                "job %s is %s here: its id is used again in RQ, and what becomes of it now is not recorded; give each job an "
                "id of its own", job_id, snapshot.state,
            )  # fmt: skip
        version = snapshot.version
        for move in moves(snapshot.state, snapshot.data, facts):
            receipt = self.machine.transition(
                job_id, move.event, dict(move.data) or None, expect_version=version, occurred_at=_time(move.at),
                transition_id=f"rq:{move.event}:{move.mark}:{version}",
            )  # fmt: skip
            version = receipt.version
        return self.machine.get(job_id) if version != snapshot.version else snapshot

    def _facts(self, job_ids: list[str]) -> list[Facts]:
        with self.queue.connection.pipeline(transaction=False) as pipeline:
            for job_id in job_ids:
                pipeline.hmget(f"{RQ_KEY_PREFIX}:job:{job_id}", list(_FIELDS))
            return [_facts_of(fields) for fields in pipeline.execute()]

    def sweep(self, *, clean: bool = False) -> int:
        """Look at every job that RQ has of this queue, and at every tracked one that was not over; returns how many.

        ``clean``: first let RQ look for abandoned jobs, as each worker's maintenance does every ten minutes (it may call
        their failure callbacks, in this process). Costs a look-up for each job that RQ still keeps.
        """
        if clean:
            StartedJobRegistry(queue=self.queue, job_class=self.queue.job_class).cleanup()
        seen: set[str] = set()
        for job_id in self._ids():
            if job_id not in seen:
                seen.add(job_id)
                self._look_if_there(job_id)
        for job_id in list(self._open_ids()):
            if job_id not in seen:
                seen.add(job_id)
                self._look_if_there(job_id)
        return len(seen)

    def _look_if_there(self, job_id: str) -> None:
        try:
            self.follow(job_id)
        except _OF_ONE_JOB as error:
            _log.warning("job %s is passed over: %s", job_id, error)

    def _ids(self) -> Iterator[str]:
        """What RQ has. The lists are read raw: looking at a registry by RQ's own methods cleans it up, which runs callbacks."""
        connection: Any = self.queue.connection
        yield from _texts(connection.lrange(self.queue.key, 0, -1))
        yield from _texts(connection.lrange(self.queue.intermediate_queue_key, 0, -1))
        for registry in (
            StartedJobRegistry, ScheduledJobRegistry, DeferredJobRegistry, FailedJobRegistry, FinishedJobRegistry,
            CanceledJobRegistry,
        ):  # fmt: skip
            key = registry(queue=self.queue).key
            for member, _ in connection.zscan_iter(key):
                yield from _texts([member.partition(b":")[0]])

    def _open_ids(self) -> Iterator[str]:
        """The tracked jobs of this queue that were not over, as of the watermark."""
        definition = self.machine.machine.definition
        durable = self.durable
        for state in definition.states:
            after = (0, "")
            while state not in definition.finals:
                page = durable.idle(self.machine.name, state, after, 2**62, _PAGE)
                for row in page:
                    yield row.id
                if len(page) < _PAGE:
                    break
                after = page[-1].updated_ms, page[-1].id


def track(queue: Queue, cache: StateCache, machine: type[StateMachine] = RqJob) -> Tracker:
    """Follow the jobs of a queue as instances of ``machine``: ``RqJob``, or a machine of yours with its states and events."""
    missing = set(RqJob.definition.states) - set(machine.definition.states)
    if missing:
        raise errors.DefinitionError(
            f"machine {machine.definition.name!r} cannot follow RQ jobs: it has no {', '.join(sorted(missing))}"
        )
    return Tracker(queue, cache, cache.machine(machine))


class TrackingWorker:
    """Beside RQ's worker class, before it: ``class Worker(TrackingWorker, rq.Worker): jobs = track(queue, cache)``."""

    jobs: Tracker

    def prepare_job_execution(self, job: Job, *arguments: Any, **options: Any) -> None:
        """In the work-horse: it begins."""
        super().prepare_job_execution(job, *arguments, **options)  # type: ignore[misc]
        self.jobs.look(job.id)

    def handle_job_success(self, job: Job, *arguments: Any, **options: Any) -> None:
        """In the work-horse: a job whose result is not kept is gone from Redis after this."""
        super().handle_job_success(job, *arguments, **options)  # type: ignore[misc]
        if job.get_result_ttl(1) == 0:
            self.jobs.look(job.id, facts_of(job))

    def handle_job_failure(self, job: Job, *arguments: Any, **options: Any) -> None:
        """In the work-horse or, if that died, in the worker: a job whose failure is not kept is gone from Redis after this."""
        super().handle_job_failure(job, *arguments, **options)  # type: ignore[misc]
        self._look_at_failed(job)

    def handle_job_retry(self, job: Job, *arguments: Any, **options: Any) -> None:
        """In the work-horse: a job that asked for one retry too many has failed."""
        super().handle_job_retry(job, *arguments, **options)  # type: ignore[misc]
        self._look_at_failed(job)

    def _look_at_failed(self, job: Job) -> None:
        """What is tried again is still in Redis, and may be under way elsewhere by now: it is looked at there."""
        if job.failure_ttl == 0 and job.get_status(refresh=False) in (JobStatus.FAILED, JobStatus.STOPPED):
            self.jobs.look(job.id, facts_of(job))

    def execute_job(self, job: Job, *arguments: Any, **options: Any) -> None:
        """In the worker: it has ended, in whatever way."""
        super().execute_job(job, *arguments, **options)  # type: ignore[misc]
        if job.get_result_ttl(1) != 0:
            self.jobs.look(job.id)


def facts_of(job: Job) -> Facts:
    """What a job in hand says of itself."""
    from rq.utils import utcformat

    def text(moment: datetime | None) -> str:
        return utcformat(moment) if moment else ""

    return Facts(
        job.get_status(refresh=False).value, job.origin, _function(job.description or ""), job.worker_name or "",
        text(job.enqueued_at), text(job.started_at), text(job.ended_at), job.retries_left, job.number_of_retries or 0,
        job.repeats_left,
    )  # fmt: skip


def _facts_of(fields: Iterable[bytes | None]) -> Facts:
    status, origin, description, worker, enqueued, started, ended, left, returned, repeats = (
        "" if value is None else value[:1000].decode("utf-8", "replace") for value in fields
    )
    return Facts(
        status, origin, _function(description), worker, enqueued, started, ended, _number(left), _number(returned) or 0,
        _number(repeats),
    )  # fmt: skip


def _function(description: str) -> str:
    return description.partition("(")[0][:200]


def _number(text: str) -> int | None:
    return int(text) if text.isdecimal() and len(text) < 10 else None


def _texts(values: Iterable[bytes]) -> Iterator[str]:
    for value in values:
        text = value.decode("utf-8", "replace")
        if text and text.isprintable():
            yield text


def _time(text: str) -> datetime | None:
    try:
        return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC) if text else None
    except ValueError:
        return None
