"""What people ask of the background jobs: start, list, show, cancel. Used by the CLI; it runs nothing itself.

Jobs are looked at as raw fields, of which nothing is unpacked beyond a bound: a hostile entry can be shown, too.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
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
from workers import jobs, queues, schedule, warmings

_PREFIX = "statecache."
_TEXT_MAX = 64 * 1024
_PARTS_MAX = 4096
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
    if not queues.is_id(job_id.encode(errors="surrogatepass")) or connection.type(key) != b"hash":
        return None
    details = dict(zip(_DETAILS, (_text(connection, key, name) for name in _DETAILS), strict=True))
    meta = _loaded(_text(connection, key, "meta"), {})
    notes = meta.get("notes", {})
    view: View = {"id": job_id, "job": _name_of(connection, key, meta), **details, "progress": notes}
    if whole:
        view["arguments"] = _arguments(connection, key)
        view |= _last_result(connection, job_id)
    shares = _shares(notes)
    return view if shares is None else _with_parts(queue, view, shares)


def _shares(notes: object) -> dict[int, int] | None:
    """The parts of a job that was fanned out, and what each has to do."""
    shares = notes.get("shares") if isinstance(notes, dict) else None
    if not isinstance(shares, dict) or len(shares) > _PARTS_MAX:
        return None
    found = [(number, share) for number, share in shares.items() if re.fullmatch("[0-9]{1,6}", number)]
    return {int(number): share for number, share in found if type(share) is int}


def _with_parts(queue: queues.SafeQueue, view: View, shares: Mapping[int, int]) -> View:
    """What is shown of a job that was fanned out: the sum of its parts; under way while one of them is."""
    parts = {number: show(queue, warmings.part_id(view["id"], number), whole=False) for number in shares}
    sums = dict.fromkeys(warmings.SUMS, 0)
    full = False
    for number, part in parts.items():
        notes = part["progress"] if part and isinstance(part["progress"], dict) else {}
        for name in warmings.SUMS:
            value = notes.get(name, shares[number] if name == "of" else 0)
            sums[name] += value if type(value) is int else 0
        full = full or notes.get("full") is True
    states = [part["status"] for part in parts.values() if part]
    view["parts"] = {
        "partitions": sorted(shares),
        "of": len(shares),
        **{state: states.count(state) for state in sorted(set(states))},
    }
    view["progress"] = sums
    if view["status"] in STATES_OVER and any(state not in STATES_OVER for state in states):
        view |= {"status": JobStatus.STARTED.value, "ended_at": None}
    elif view["status"] == JobStatus.FINISHED.value:
        view["status"] = next((state for state in ("failed", "stopped", "canceled") if state in states), "finished")
    if "result" in view:
        _sum_up(queue, view, parts, full)
    return view


def _sum_up(queue: queues.SafeQueue, view: View, parts: Mapping[int, View | None], full: bool) -> None:
    """The result, or the first error, of all parts."""
    view["result"] = None
    if view["status"] == JobStatus.FINISHED.value:
        view["result"] = {"partitions": len(parts), **warmings.result({**view["progress"], "full": full})}
    failed = next((part for part in parts.values() if part and part["status"] == JobStatus.FAILED.value), None)
    if failed and not view["error"]:
        view["error"] = f"{failed['id']}: {_last_result(queue.connection, failed['id'])['error'] or failed['refused']}"


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
    everything = [*(warmings.part_id(job_id, number) for number in view.get("parts", {}).get("partitions", ())), job_id]
    # Those that wait first: a worker whose job is stopped would take the next of them.
    actions = [_cancel_own(queue, one, waiting=True) for one in everything]
    actions += [_cancel_own(queue, one, waiting=False) for one in everything]
    return "stopping" if "stopping" in actions else "canceled"


def _cancel_own(queue: queues.SafeQueue, job_id: str, *, waiting: bool) -> str:
    """End this job, not its parts; if it waits, or if it runs. Empty if it is over, or not there yet."""
    key = queues.SafeJob.key_for(job_id)
    status, worker = _text(queue.connection, key, "status"), _text(queue.connection, key, "worker_name")
    if status is None or status in STATES_OVER or waiting != (status != JobStatus.STARTED.value):
        return ""
    return _cancel_one(queue, job_id, {"status": status, "worker_name": worker})


def _cancel_one(queue: queues.SafeQueue, job_id: str, view: View) -> str:
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
