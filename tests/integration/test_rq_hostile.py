"""A hostile queue entry is refused, logged, moved away without being run, and the worker lives on."""

from __future__ import annotations

import json
import pickle
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import servers
from tests.support.background import Background, Worker
from tests.support.waiting import wait_until

Hostile = Callable[[Background, Path], Any]


@pytest.fixture(scope="module")
def stage(redis_binary: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Background, Worker]]:
    """One worker, with a scheduler, that all hostile entries are thrown at."""
    folder = tmp_path_factory.mktemp("hostile")
    with (
        servers.ValkeyServer(redis_binary, folder / "redis") as server,
        Background(server.url, f"sqlite:///{folder / 'store.db'}", "hostile", folder) as background,
    ):
        never = {"STATECACHE_VERIFY_INTERVAL_SECONDS": "0", "STATECACHE_LETTERS_INTERVAL_SECONDS": "0"}
        worker = background.worker(environment=never)
        wait_until(lambda: background.connection.smembers("rq:workers"), "the worker's birth", 60)
        yield background, worker


class _Shell:
    """What runs when it is unpickled."""

    def __init__(self, command: str) -> None:
        self._command = command

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, (self._command,)


def _touch(canary: Path) -> str:
    return f"touch {canary}"


def _call(canary: Path, name: str = "os.system", instance: Any = None) -> bytes:
    return json.dumps([name, instance, [_touch(canary)], {}]).encode()


def _pickled(background: Background, canary: Path) -> str:
    return background.raw_job("pickled", data=zlib.compress(pickle.dumps(_Shell(_touch(canary)))))


def _pickled_call(background: Background, canary: Path) -> str:
    return background.raw_job("pickled-call", data=pickle.dumps(("os.system", None, (_touch(canary),), {})))


def _pickled_meta(background: Background, canary: Path) -> str:
    return background.raw_job("pickled-meta", meta=pickle.dumps(_Shell(_touch(canary))))


def _system(background: Background, canary: Path) -> str:
    return background.raw_job("system", data=zlib.compress(_call(canary)))


def _allowed_with_positional(background: Background, canary: Path) -> str:
    return background.raw_job("positional", data=_call(canary, "statecache.verify"))


def _instance(background: Background, canary: Path) -> str:
    return background.raw_job("instance", data=_call(canary, "system", "os"))


def _not_utf8(background: Background, canary: Path) -> str:
    return background.raw_job("not-utf8", data=b'["\xff", null, [], {}]')


def _deep(background: Background, canary: Path) -> str:
    return background.raw_job("deep", data=b"[" * 100_000)


def _bomb(background: Background, canary: Path) -> str:
    return background.raw_job("bomb", data=zlib.compress(b" " * 50_000_000 + b"[]"))


def _huge(background: Background, canary: Path) -> str:
    return background.raw_job(
        "huge", data=b'["statecache.verify", null, [], {"machine": "' + b"x" * 20_000_000 + b'"}]'
    )


def _success_callback(background: Background, canary: Path) -> str:
    return background.raw_job("on-success", success_callback_name="os.system")


def _failure_callback(background: Background, canary: Path) -> str:
    return background.raw_job("on-failure", failure_callback_name="os.abort", data=b"nonsense")


def _stopped_callback(background: Background, canary: Path) -> str:
    return background.raw_job("on-stopped", stopped_callback_name="os.abort")


def _webhook(background: Background, canary: Path) -> str:
    hook = [{"url": "http://127.0.0.1:9/", "job_status": "finished"}]
    return background.raw_job("webhook", webhooks=json.dumps(hook))


def _bad_state(background: Background, canary: Path) -> str:
    return background.raw_job("bad-state", status="\x1b[2Jnonsense")


def _bad_date(background: Background, canary: Path) -> str:
    return background.raw_job("bad-date", enqueued_at="yesterday")


def _bad_timeout(background: Background, canary: Path) -> str:
    return background.raw_job("bad-timeout", timeout="-1")


def _bad_retries(background: Background, canary: Path) -> str:
    return background.raw_job("bad-retries", retries_left="9" * 4000)


def _no_data(background: Background, canary: Path) -> str:
    return background.raw_job("no-data", without=["data"])


def _other_origin(background: Background, canary: Path) -> str:
    return background.raw_job("other-origin", origin="somewhere-else")


HOSTILE = (
    _pickled, _pickled_call, _pickled_meta, _system, _allowed_with_positional, _instance, _not_utf8, _deep, _bomb, _huge,
    _success_callback, _failure_callback, _stopped_callback, _webhook, _bad_state, _bad_date, _bad_timeout, _bad_retries,
    _no_data, _other_origin,
)  # fmt: skip


def _still_works(background: Background, worker: Worker) -> None:
    """The same worker runs the next honest job."""
    view = background.wait_over(background.start("verify"))
    assert view["status"] == "finished", (view, worker.printed)
    assert worker.alive
    assert background.connection.llen(background.queue.intermediate_queue_key) == 0
    assert "Traceback" not in worker.printed, worker.printed


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda one: one.__name__[1:])
def test_hostile_entry_is_refused(stage: tuple[Background, Worker], tmp_path: Path, hostile: Hostile) -> None:
    background, worker = stage
    canary = tmp_path / "canary"
    job_id = hostile(background, canary)
    _still_works(background, worker)
    assert not canary.exists()
    view = background.show(job_id)
    assert view["status"] == "failed"
    assert view["refused"]
    assert view["started_at"] is None
    assert background.connection.zscore(f"rq:failed:{background.queue.name}", job_id) is not None
    assert f"job {job_id} in queue {background.queue.name} is refused and was not run" in worker.printed


@pytest.mark.parametrize("entry", [b"\xff\xfe", b"", b"../../etc/passwd", b"a:b:c", b"x" * 5000, b"no-such-job"])
def test_queue_entry_that_is_no_job(stage: tuple[Background, Worker], entry: bytes) -> None:
    background, worker = stage
    background.connection.rpush(background.queue.key, entry)
    _still_works(background, worker)


def test_job_that_is_no_hash(stage: tuple[Background, Worker]) -> None:
    background, worker = stage
    background.connection.set("rq:job:text", "os.system")
    background.connection.rpush(background.queue.key, "text")
    _still_works(background, worker)
    assert background.connection.get("rq:job:text") == b"os.system"


def test_schedule_with_hostile_jobs(stage: tuple[Background, Worker], tmp_path: Path) -> None:
    """RQ's own scheduler dies of a malformed job, at every start again; ours enqueues the honest one behind it."""
    background, worker = stage
    canary = tmp_path / "canary"
    background.raw_job("late-system", push=False, status="scheduled", data=_call(canary))
    background.raw_job("late-state", push=False, status="nonsense")
    honest = background.raw_job("late-honest", push=False, status="scheduled")
    schedule = f"rq:scheduled:{background.queue.name}"
    background.connection.zadd(schedule, {"late-system": 1, "late-state": 2, b"\xff": 3, "absent": 4, honest: 5})
    assert background.wait_over(honest)["status"] == "finished"
    wait_until(lambda: background.connection.zcard(schedule) == 0, "the schedule done")
    assert background.show("late-system")["refused"]
    assert background.show("late-state")["refused"]
    assert not canary.exists()
    _still_works(background, worker)


def test_registries_and_messages_with_nonsense(stage: tuple[Background, Worker], tmp_path: Path) -> None:
    """Maintenance reads the registries, and an abandoned job's failure callback was a function's name, too."""
    background, worker = stage
    canary = tmp_path / "canary"
    name, connection = background.queue.name, background.connection
    background.raw_job("left", push=False, status="started", failure_callback_name="os.abort", data=_call(canary))
    connection.zadd(f"rq:wip:{name}", {b"\xff": 1, "a:b:c": 2, "left:1234": 3})
    connection.rpush(background.queue.intermediate_queue_key, b"\xff\xff")
    connection.sadd("rq:groups", b"\xff")
    channel = f"rq:pubsub:{next(iter(connection.smembers('rq:workers'))).decode().removeprefix('rq:worker:')}"
    for message in (b"\xff", b"[]", b"{}", b"[" * 100_000, b'{"command": 7}', b'{"command": "stop-job"}'):
        connection.publish(channel, message)
    wait_until(lambda: connection.zcard(f"rq:wip:{name}") == 0, "maintenance", 60)
    _still_works(background, worker)
    assert connection.pubsub_numsub(channel)[0][1] == 1
    connection.delete("rq:groups")  # RQ's own worker dies of it
    assert not canary.exists()


@pytest.mark.parametrize(
    ("hostile", "serializer"), [(_system, "json"), (_pickled, "pickle"), (_pickled_meta, "pickle")]
)
def test_rqs_own_worker_runs_them(
    stage: tuple[Background, Worker], tmp_path: Path, hostile: Hostile, serializer: str
) -> None:
    """The control: the same entries are calls to RQ as it comes, so the tests above could fail."""
    canary = tmp_path / "canary"
    job_id = hostile(stage[0], canary)
    stage[0].connection.lrem(stage[0].queue.key, 0, job_id)
    program = (
        "import sys, redis, rq\n"
        "connection = redis.Redis.from_url(sys.argv[1])\n"
        "queue = rq.Queue('control', connection=connection, serializer=sys.argv[2])\n"
        "connection.rpush(queue.key, sys.argv[3])\n"
        "rq.SimpleWorker([queue], connection=connection, serializer=sys.argv[2]).work(burst=True)\n"
    )
    worker = Worker(tmp_path, ["-c", program, stage[0].redis_url, serializer, job_id])
    worker.wait()
    assert canary.exists(), worker.printed
