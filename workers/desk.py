"""What people ask of the background jobs: start, list, show, cancel. Used by the CLI; it runs nothing itself.

Jobs are looked at as raw fields, of which nothing is unpacked beyond a bound: a hostile entry can be shown, too.
"""

from __future__ import annotations

import base64
import binascii
import json
import uuid
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rq.command import send_command
from rq.defaults import RQ_KEY_PREFIX
from rq.exceptions import InvalidJobOperation, NoSuchJobError
from rq.job import JobStatus
from rq.results import Result

from statecache.core import errors
from workers import jobs, queues, schedule

_PREFIX = "statecache."
_TEXT_MAX = 64 * 1024
_DETAILS = ("status", "created_at", "enqueued_at", "started_at", "ended_at", "worker_name", "retries_left", "refused")
_PLACES = ("wip", "scheduled", "deferred", "failed", "finished", "canceled")
STATES_OVER = ("finished", "failed", "stopped", "canceled")
"""States in which a job needs nothing more."""

View = dict[str, Any]


def names() -> list[str]:
    """The jobs that there are, without their prefix."""
    return [name.removeprefix(_PREFIX) for name in jobs.BODIES]


def body_of(name: str) -> jobs.Body:
    """What a job does. Raises ``NotFoundError``."""
    body = jobs.BODIES.get(_PREFIX + name.removeprefix(_PREFIX))
    if body is None:
        raise errors.NotFoundError(f"there is no job {name!r}: it is one of {', '.join(names())}")
    return body


def start(
    queue: queues.SafeQueue,
    name: str,
    arguments: Mapping[str, Any],
    *,
    timeout_seconds: int = 600,
    retry_seconds: Sequence[int] = schedule.RETRY_SECONDS,
) -> str:
    """Enqueue a job; returns its id. Raises ``NotFoundError`` and ``InvalidDataError``."""
    given = jobs.checked(body_of(name), arguments)
    name = name.removeprefix(_PREFIX)
    job = queue.enqueue(
        _PREFIX + name, kwargs=given, job_id=f"{name}-{uuid.uuid4().hex[:12]}", meta={"job": _PREFIX + name},
        **schedule.options(timeout_seconds, retry_seconds),
    )  # fmt: skip
    return str(job.id)


def listing(queue: queues.SafeQueue, limit: int) -> list[View]:
    """The jobs of a queue, the latest first: at most ``limit`` of each kind."""
    found: dict[str, View] = {}
    for job_id in _ids(queue, limit):
        if job_id not in found:
            view = show(queue, job_id, whole=False)
            if view is not None:
                found[job_id] = view
    return sorted(found.values(), key=lambda view: view["created_at"] or "", reverse=True)


def _ids(queue: queues.SafeQueue, limit: int) -> Iterator[str]:
    connection: Any = queue.connection
    waiting = connection.lrange(queue.key, 0, limit - 1) + connection.lrange(queue.intermediate_queue_key, 0, limit - 1)
    for raw_id in waiting:
        if queues.is_id(raw_id):
            yield raw_id.decode()
    for place in _PLACES:
        for member in connection.zrevrange(f"{RQ_KEY_PREFIX}:{place}:{queue.name}", 0, limit - 1):
            raw_id = member.partition(b":")[0]
            if queues.is_id(raw_id):
                yield raw_id.decode()


def show(queue: queues.SafeQueue, job_id: str, *, whole: bool = True) -> View | None:
    """A job as a document, or None: its state, progress, and (``whole``) arguments, result or error."""
    connection: Any = queue.connection
    key = queues.SafeJob.key_for(job_id)
    if not queues.is_id(job_id.encode()) or connection.type(key) != b"hash":
        return None
    details = dict(zip(_DETAILS, (_text(connection, key, name) for name in _DETAILS), strict=True))
    meta = _loaded(_text(connection, key, "meta"), {})
    view: View = {"id": job_id, "job": _name_of(connection, key, meta), **details, "progress": meta.get("notes", {})}
    if whole:
        view["arguments"] = _arguments(connection, key)
        view |= _last_result(connection, job_id)
    return view


def _text(connection: Any, key: str, name: str) -> str | None:
    if connection.hstrlen(key, name) > _TEXT_MAX:
        return None
    value = connection.hget(key, name)
    return value.decode("utf-8", "replace") if value else None


def _loaded(text: str | None, default: dict[str, Any]) -> dict[str, Any]:
    try:
        found = json.loads(text or "null")
    except (ValueError, RecursionError):
        return default
    return found if isinstance(found, dict) else default


def _call(connection: Any, key: str) -> queues.Call | None:
    if connection.hstrlen(key, "data") > queues.DATA_BYTES_MAX:
        return None
    try:
        return queues.call_of(connection.hget(key, "data") or b"")
    except queues.RefusedJobError:
        return None


def _name_of(connection: Any, key: str, meta: Mapping[str, Any]) -> str:
    call = _call(connection, key)
    name = call.name if call else str(meta.get("job", "?"))
    return name.removeprefix(_PREFIX)


def _arguments(connection: Any, key: str) -> dict[str, Any]:
    call = _call(connection, key)
    return call.arguments if call else {}


def _last_result(connection: Any, job_id: str) -> View:
    """What the last part returned or raised."""
    found = connection.xrevrange(Result.get_key(job_id), "+", "-", count=1)
    if not found:
        return {"result": None, "error": None}
    fields = found[0][1]
    returned = _unpacked(fields.get(b"return_value"), compressed=False)
    raised = _unpacked(fields.get(b"exc_string"), compressed=True)
    try:
        result = json.loads(returned) if returned else None
    except (ValueError, RecursionError):
        result = None
    return {"result": result, "error": raised}


def _unpacked(value: bytes | None, *, compressed: bool) -> str | None:
    if not value or len(value) > 4 * _TEXT_MAX:
        return None
    try:
        raw = base64.b64decode(value)
        if compressed:
            raw = zlib.decompressobj().decompress(raw, _TEXT_MAX)
    except (binascii.Error, zlib.error):
        return None
    return raw.decode("utf-8", "replace")


def cancel(queue: queues.SafeQueue, job_id: str) -> str:
    """Stop a job that runs, or take one that waits out of its queue; returns ``stopping`` or ``canceled``.

    What it has done stays done. Raises ``NotFoundError``, and ``InvalidDataError`` for one that is over.
    """
    view = show(queue, job_id, whole=False)
    if view is None:
        raise errors.NotFoundError(f"there is no job {job_id!r}")
    if view["status"] in STATES_OVER:
        raise errors.InvalidDataError(f"job {job_id} is {view['status']} already")
    if view["status"] == JobStatus.STARTED.value and view["worker_name"]:
        send_command(queue.connection, view["worker_name"], "stop-job", job_id=job_id)
        return "stopping"
    try:
        job = queue.job_class.fetch(job_id, connection=queue.connection)
        job.cancel()
    except (NoSuchJobError, InvalidJobOperation) as error:
        raise errors.InvalidDataError(f"job {job_id} cannot be canceled: {error}") from error
    return "canceled"


def client_queue(connection: Any, name: str) -> queues.SafeQueue:
    """A queue to enqueue into and to look at; its jobs are those of ``workers.jobs``."""
    allowed = dict.fromkeys(jobs.BODIES, _not_here)
    return queues.SafeQueue(name, connection=connection, job_class=queues.SafeJob.of(allowed))


def _not_here(*_: object, **__: object) -> None:
    raise AssertionError("a client runs no jobs")
