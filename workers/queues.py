"""The queues of the background jobs, and what of them is believed.

RQ believes its Redis: with its default serializer whoever can write there runs code in the worker (pickle), and with the
JSON one still, because the name of the function, and of the callbacks, is imported and called (``os.system``). A hash may
also ask the worker for HTTP requests (webhooks), hold a few kilobytes that decompress to gigabytes, or be no job at all, which
ends RQ's worker. So everything is read here first:

- the serializer is RQ's JSON one, on both sides, whatever was asked for;
- the function is looked up by its name among those that the process allows; nothing is ever imported;
- callbacks, webhooks, dependencies, groups and rate limits, which no job of ours has, are refused with the job;
- sizes, numbers, dates and states are checked before RQ sees them; a field that we do not know is not read.

What is refused is not run: it is logged, marked, and moved to the queue's registry of failed jobs, and the worker goes on.
What this cannot prevent: whoever can write to this Redis can enqueue the jobs that are allowed, delete jobs and stop workers.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import re
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import redis
from redis.exceptions import ResponseError, WatchError
from rq.defaults import RQ_KEY_PREFIX
from rq.exceptions import DequeueTimeout, InvalidJobOperation, NoSuchJobError, StopRequested
from rq.intermediate_queue import IntermediateQueue
from rq.job import JOB_ID_PATTERN, Job, JobStatus
from rq.queue import Queue
from rq.serializers import JSONSerializer
from rq.utils import now, utcformat, utcparse

from statecache.core import errors
from statecache.hot import failures, wire
from statecache.settings import redact

_log = logging.getLogger(__name__)

DATA_BYTES_MAX = 256 * 1024
TIMEOUT_SECONDS_MAX = 24 * 3600
REFUSED_KEPT_SECONDS = 7 * 24 * 3600
"""How long a refused job stays in the registry of failed jobs, to be looked at."""
_ID_LENGTH_MAX = 200
_CONNECT_SECONDS = 5.0
_WAIT_SECONDS = 1.0
"""With several queues, how long one is waited at before the others are looked at again."""

Function = Callable[..., Any]
Allowed = Mapping[str, Function]
"""What a worker may call, by the name that a job gives. The first argument is the job, the others come by name."""

_DATES = ("created_at", "enqueued_at", "started_at", "ended_at", "last_heartbeat")
_NUMBERS = {  # the least and the most
    "timeout": (1, TIMEOUT_SECONDS_MAX), "result_ttl": (-1, 10**9), "failure_ttl": (-1, 10**9), "ttl": (1, 10**9),
    "retries_left": (0, 100), "number_of_retries": (0, 10**9), "repeats_left": (0, 1), "enqueue_at_front": (0, 1),
    "enqueue_at_front_on_retry": (0, 1),
}  # fmt: skip
_INTERVALS = ("retry_intervals", "repeat_intervals")
_READ = ("data", "meta", "status", "origin", "worker_name", *_DATES, *_NUMBERS, *_INTERVALS)
_FORBIDDEN = (
    "success_callback_name", "failure_callback_name", "stopped_callback_name", "webhooks", "dependency_id",
    "dependency_ids", "group_id", "rate_limit_key",
)  # fmt: skip


class RefusedJobError(NoSuchJobError):
    """A job that is not believed. RQ passes over it wherever it passes over a job that is gone."""


class Call(NamedTuple):
    """What a job asks for."""

    name: str
    arguments: dict[str, Any]


@contextlib.contextmanager
def connected(url: str) -> Iterator[redis.Redis]:
    """A connection to RQ's Redis. Raises ``ConfigurationError`` for a URL that is none, and one that it refuses (a password, a
    database); anything else that goes wrong with it within the block becomes ``UnavailableError``."""
    try:
        wire.pool_of(url, _CONNECT_SECONDS)  # not connected: what is wrong with the URL shows up here
    except errors.ConfigurationError as error:
        raise errors.ConfigurationError(f"the Redis of the jobs (rq_redis_url, or redis_url): {error}") from None
    client = redis.Redis.from_url(url, socket_connect_timeout=_CONNECT_SECONDS)
    client.connection_pool.connection_kwargs["decode_responses"] = False  # whatever the URL asks for: RQ wants bytes
    try:
        client.ping()
        yield client
    except redis.RedisError as error:
        told = failures.translated(error, f"the jobs', rq_redis_url: {redact(url)}")
        if isinstance(told, errors.ConfigurationError):
            raise told from error
        raise errors.UnavailableError(f"the Redis of the jobs ({redact(url)}): {error}") from error
    finally:
        client.close()


def name_of(namespace: str) -> str:
    """The queue of a store: stores with different namespaces may share RQ's Redis."""
    return f"statecache-{namespace}"


class SafeJob(Job):
    """A job that was read with care; ``allowed`` is what it may call (``of`` makes a class for that)."""

    allowed: ClassVar[Allowed] = {}

    @classmethod
    def of(cls, allowed: Allowed) -> type[SafeJob]:
        """The class of jobs that may call ``allowed``, and nothing else."""
        return type("SafeJob", (cls,), {"allowed": dict(allowed)})

    def __init__(self, id: str | None = None, connection: Any = None, serializer: Any = None) -> None:
        super().__init__(id, connection, JSONSerializer)

    # --- reading -----------------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Read it again. Raises ``RefusedJobError``, or ``NoSuchJobError`` if it is gone."""
        self.restore(_read(self.connection, self.key))

    @classmethod
    def fetch_many(cls, job_ids: Iterable[str], connection: Any, serializer: Any = None) -> list[Any]:
        """Read some; those that are gone or refused are None."""
        found: list[Any] = []
        for job_id in job_ids:
            try:
                found.append(cls.fetch(job_id, connection))
            except (NoSuchJobError, ValueError):
                found.append(None)
        return found

    def restore(self, raw_data: Mapping[bytes, bytes]) -> None:
        """Take over what was read. Raises ``RefusedJobError`` with the reason."""
        try:
            fields, self._call = _checked(raw_data)
            if self._call.name not in self.allowed:
                raise RefusedJobError(f"function {self._call.name!r} is not one of this worker's")
            super().restore(fields)
        except (RefusedJobError, StopRequested):  # a signal's, from whatever line it met
            raise
        except Exception as error:  # RQ read something into it that we did not
            raise RefusedJobError(f"unreadable: {type(error).__name__}: {error}") from error

    def _fetch_status(self) -> JobStatus:
        status: Any = self.connection.hget(self.key, "status")
        if not status:
            raise InvalidJobOperation(f"job {self.id} is gone")
        try:
            return JobStatus(status.decode())
        except ValueError:
            return JobStatus.FAILED

    # --- what it calls -----------------------------------------------------------------------------------------------

    def _deserialize_data(self) -> None:
        try:
            call = call_of(self.data)
        except RefusedJobError as error:
            raise NoSuchJobError(str(error)) from error
        self._func_name, self._instance, self._args, self._kwargs = call.name, None, (), call.arguments

    @property
    def func(self) -> Function:
        """The function: from the allow-list, never imported; the job is its first argument."""
        return functools.partial(self.allowed[str(self.func_name)], self)

    success_callback = failure_callback = stopped_callback = None


def _read(connection: redis.Redis, key: str) -> dict[bytes, bytes]:
    """Read a job's known fields, but only if they are not too long; both in one go (WATCH)."""
    names = (*_READ, *_FORBIDDEN)
    with connection.pipeline() as pipeline:
        for _ in range(20):
            try:
                pipeline.watch(key)
                kind: Any = pipeline.type(key)
                if kind == b"none":
                    raise NoSuchJobError(f"no such job: {key}")
                if kind != b"hash":
                    raise RefusedJobError(f"not a hash but a {kind.decode()}")
                size = sum(int(pipeline.hstrlen(key, name)) for name in ("data", "meta", *_FORBIDDEN, *_INTERVALS))
                if size > DATA_BYTES_MAX:
                    raise RefusedJobError(f"{size} bytes: more than {DATA_BYTES_MAX}")
                pipeline.multi()
                pipeline.hmget(key, list(names))
                values = pipeline.execute()[0]
            except WatchError:
                continue
            return {name.encode(): value for name, value in zip(names, values, strict=True) if value not in (None, b"")}
    raise RefusedJobError("it changes all the time")


def _checked(raw: Mapping[bytes, bytes]) -> tuple[dict[bytes, bytes], Call]:
    """The fields that RQ may see, and what the job asks for."""
    fields = {name: raw[name.encode()] for name in (*_READ, *_FORBIDDEN) if raw.get(name.encode())}
    for name in _FORBIDDEN:
        if name in fields:
            raise RefusedJobError(f"{name} = {_shown(fields[name])} is refused: jobs here have none")
    for name in ("data", "status", "origin"):
        if name not in fields:
            raise RefusedJobError(f"it has no {name}")
    for name, value in fields.items():
        if len(value) > (DATA_BYTES_MAX if name in ("data", "meta") else 1000):
            raise RefusedJobError(f"{name} has {len(value)} bytes")
        _check_field(name, value)
    fields["data"] = _decompressed(fields["data"])
    call = call_of(fields["data"])
    return {name.encode(): value for name, value in fields.items()}, call


def _check_field(name: str, value: bytes) -> None:
    """Raise ``RefusedJobError`` unless a field is what RQ would have written there."""
    try:
        if name in _DATES:
            utcparse(value.decode())
        elif name in _NUMBERS:
            least, most = _NUMBERS[name]
            if not re.fullmatch(rb"-?[0-9]{1,18}", value) or not least <= int(value) <= most:
                raise ValueError(f"not a number from {least} to {most}")
        elif name in _INTERVALS:
            intervals = _json(value)
            if not isinstance(intervals, list) or not all(type(one) is int and 0 <= one <= 10**9 for one in intervals):
                raise ValueError("not a list of seconds")
        elif name == "meta":
            if not isinstance(_json(value), dict):
                raise ValueError("not a JSON object")
        elif name == "status":
            JobStatus(value.decode())
        elif name != "data":
            value.decode()
    except ValueError as error:
        raise RefusedJobError(f"{name} = {_shown(value)} is refused: {error}") from None


def _decompressed(data: bytes) -> bytes:
    """RQ compresses what it writes; a small bomb is not unpacked."""
    unpacker = zlib.decompressobj()
    try:
        text = unpacker.decompress(data, DATA_BYTES_MAX)
    except zlib.error:
        return data
    if unpacker.unconsumed_tail or not unpacker.eof:
        raise RefusedJobError(f"data unpacks to more than {DATA_BYTES_MAX} bytes, or to no end")
    return text


def call_of(data: bytes) -> Call:
    """What a job's data asks for: RQ's JSON of name, instance (none), and arguments (by name only), perhaps compressed."""
    try:
        document = _json(_decompressed(data))
    except ValueError:
        raise RefusedJobError("data is not JSON (pickle is never read)") from None
    match document:
        case [str(name), None, [], dict(arguments)]:
            return Call(name, arguments)
    raise RefusedJobError("data is not [name, null, [], {arguments}]")


def _json(text: bytes) -> Any:
    try:
        return json.loads(text.decode(), parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is no JSON")


def _shown(value: bytes) -> str:
    return repr(value[:80])


# --- queues ------------------------------------------------------------------------------------------------------------


def is_id(job_id: bytes) -> bool:
    """Whether this can be a job's id."""
    try:
        return len(job_id) <= _ID_LENGTH_MAX and JOB_ID_PATTERN.fullmatch(job_id.decode()) is not None
    except UnicodeDecodeError:
        return False


class SafeIntermediateQueue(IntermediateQueue):
    """The ids between queue and work-horse: what a killed worker has left there comes back after a minute."""

    def get_job_ids(self) -> list[str]:
        """The ids; what is none is dropped."""
        found: Any = self.connection.lrange(self.key, 0, -1)
        for job_id in found:
            if not is_id(job_id):
                _drop_id(self.connection, self.key, job_id)
        return [job_id.decode() for job_id in found if is_id(job_id)]


class SafeQueue(Queue):
    """A queue that hands out only jobs that are believed. Its jobs' serializer is JSON, whatever else is asked for."""

    def __init__(self, name: str = "default", connection: Any = None, **options: Any) -> None:
        options.setdefault("job_class", SafeJob)
        super().__init__(name, connection=connection, **{**options, "serializer": JSONSerializer})

    @property
    def intermediate_queue(self) -> SafeIntermediateQueue:
        return SafeIntermediateQueue(self.key, connection=self.connection)

    def fetch_job(self, job_id: str) -> Any:
        """A job of this queue, or None; a hostile one is moved out of the way."""
        try:
            return self.job_class.fetch(job_id, connection=self.connection)
        except RefusedJobError as error:
            refuse(self.connection, self.name, job_id, str(error))
        except (NoSuchJobError, ValueError):
            pass
        return None

    def take(self, job_id: str) -> Any:
        """A job that was popped from this queue, or None if there is nothing to run."""
        job = self.fetch_job(job_id)
        if job is not None and job.origin != self.name:
            refuse(self.connection, self.name, job_id, f"its origin is {job.origin!r}, another queue")
            job = None
        if job is None:
            self.connection.lrem(self.intermediate_queue_key, 0, job_id)
        return job

    @classmethod
    def dequeue_any(
        cls,
        queues: Iterable[Queue],
        timeout: int | None,
        connection: Any,
        job_class: type[Job] | None = None,
        serializer: Any = None,
        death_penalty_class: Any = None,
    ) -> tuple[Any, Queue] | None:
        """The next job that is believed, from the first queue that has one. None without ``timeout`` and jobs.

        An id goes over the intermediate queue with any number of queues (RQ: with one), so that a worker that is killed
        between taking a job and starting it does not lose it. Raises ``DequeueTimeout``.
        """
        safe = [queue if isinstance(queue, SafeQueue) else _refuse_queue(queue) for queue in queues]
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            popped = cls._pop(safe, connection, deadline)
            if popped is None:
                if deadline is None:
                    return None
                if time.monotonic() >= deadline:
                    raise DequeueTimeout(timeout, [queue.key for queue in safe])
                continue
            queue, raw_id = popped
            if not is_id(raw_id):
                _drop_id(connection, queue.intermediate_queue_key, raw_id)
                continue
            job = queue.take(raw_id.decode())
            if job is not None:
                return job, queue

    @classmethod
    def _pop(
        cls, queues: Sequence[SafeQueue], connection: Any, deadline: float | None
    ) -> tuple[SafeQueue, bytes] | None:
        for queue in queues:
            found = connection.lmove(queue.key, queue.intermediate_queue_key)
            if found is not None:
                return queue, found
        if deadline is None:
            return None
        left = max(0.01, deadline - time.monotonic())
        queue = queues[0]
        found = connection.blmove(
            queue.key, queue.intermediate_queue_key, left if len(queues) == 1 else min(left, _WAIT_SECONDS)
        )
        return None if found is None else (queue, found)


def _refuse_queue(queue: Queue) -> SafeQueue:
    raise TypeError(f"{queue} is not a SafeQueue")


def _drop_id(connection: Any, key: str, job_id: bytes) -> None:
    _log.error("queue entry %s is no job id: dropped", _shown(job_id))
    connection.lrem(key, 0, job_id)


def refuse(connection: Any, queue_name: str, job_id: str, reason: str) -> None:
    """Move a job that is not believed to the registry of failed jobs, with the reason; nothing of it is run.

    What is no hash is left as it is: only its id is forgotten.
    """
    _log.error("job %s in queue %s is refused and was not run: %s", job_id, queue_name, reason)
    key = SafeJob.key_for(job_id)
    try:
        long = [name for name in (*_READ, *_FORBIDDEN) if connection.hstrlen(key, name) > DATA_BYTES_MAX]
    except ResponseError:
        return
    fields = {"status": JobStatus.FAILED.value, "refused": reason, "ended_at": utcformat(now())}
    with connection.pipeline() as pipeline:
        if long:
            pipeline.hdel(key, *long)
        pipeline.hset(key, mapping=fields)
        pipeline.expire(key, REFUSED_KEPT_SECONDS)
        pipeline.zadd(f"{RQ_KEY_PREFIX}:failed:{queue_name}", {job_id: time.time() + REFUSED_KEPT_SECONDS})
        pipeline.execute()


_REGISTRIES = ("wip", "finished", "failed", "deferred", "ready", "canceled", "scheduled")


def sweep(queue: SafeQueue) -> None:
    """Drop from a queue's registries what is no job's id: RQ's maintenance would end at it, each time."""
    for name in _REGISTRIES:
        key = f"{RQ_KEY_PREFIX}:{name}:{queue.name}"
        try:
            bad = [member for member, _ in queue.connection.zscan_iter(key) if not _is_member(member)]
        except ResponseError:
            _log.exception("registry %s is not a sorted set", key)
            continue
        if bad:
            _log.error(
                "registry %s: %d entries that are no jobs are dropped, such as %s", key, len(bad), _shown(bad[0])
            )
            queue.connection.zrem(key, *bad)


def _is_member(member: bytes) -> bool:
    """``id`` or ``id:execution``."""
    job_id, _, execution = member.partition(b":")
    return is_id(job_id) and (not execution or is_id(execution))
