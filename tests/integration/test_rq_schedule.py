"""The periodic jobs: once a period, whoever schedules and whatever is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis

from tests.support import processes, worlds
from tests.support.background import Background, Worker
from tests.support.waiting import wait_until
from workers import desk, schedule

VERIFY = schedule.Periodic("statecache.verify", 10.0)


@pytest.fixture
def background(redis_url: str, sqlite_url: str, namespace: str, tmp_path: Path) -> Iterator[Background]:
    with Background(redis_url, sqlite_url, namespace, tmp_path) as made:
        yield made


def _end(background: Background, job_id: str | None, status: str = "finished") -> None:
    """What a worker does when it has run a job."""
    assert job_id is not None
    background.connection.lrem(background.queue.key, 0, job_id)
    background.connection.hset(f"rq:job:{job_id}", "status", status)


def test_once_a_period(background: Background) -> None:
    queue = background.queue
    first = schedule.enqueue_due(queue, VERIFY, 1000.0)
    assert first is not None
    assert background.show(first)["status"] == "queued"
    _end(background, first)
    assert schedule.enqueue_due(queue, VERIFY, 1009.9) is None
    second = schedule.enqueue_due(queue, VERIFY, 1010.0)
    assert second not in (None, first)
    _end(background, second, "failed")
    third = schedule.enqueue_due(queue, VERIFY, 5000.0)
    assert third is not None, "many periods that were missed are made up for by one job"
    _end(background, third)
    assert schedule.enqueue_due(queue, VERIFY, 5001.0) is None
    assert schedule.enqueue_due(queue, VERIFY, 1010.0) is None, "a clock that lags behind changes nothing"
    far = schedule.enqueue_due(queue, VERIFY, 500_000.0)
    assert far is not None
    _end(background, far)
    assert schedule.enqueue_due(queue, VERIFY, 5010.0) is not None, (
        "a clock that was days ahead stops nothing when set right"
    )


@pytest.mark.parametrize("status", ["queued", "started", "scheduled"])
def test_not_while_the_last_one_is_under_way(background: Background, status: str) -> None:
    queue = background.queue
    first = schedule.enqueue_due(queue, VERIFY, 1000.0)
    _end(background, first, status)
    assert schedule.enqueue_due(queue, VERIFY, 1010.0) is None
    _end(background, first)
    assert schedule.enqueue_due(queue, VERIFY, 1010.5) is not None


def test_another_interval_begins_at_once(background: Background) -> None:
    _end(background, schedule.enqueue_due(background.queue, VERIFY, 1000.0))
    assert schedule.enqueue_due(background.queue, schedule.Periodic("statecache.verify", 3600.0), 1001.0) is not None


def test_clocks_that_differ_at_the_boundary_of_a_long_period(background: Background) -> None:
    """Two hosts take turns; one's clock is seconds behind the other's. A day is not enqueued twice, and the next one is."""
    daily = schedule.Periodic("statecache.verify", 86400.0)
    midnight = 20_000 * 86400.0
    _end(background, schedule.enqueue_due(background.queue, daily, midnight - 50_000))
    _end(background, schedule.enqueue_due(background.queue, daily, midnight + 1))
    for at in (-1, 2, -0.5, 3, -7000, 86_000):
        assert schedule.enqueue_due(background.queue, daily, midnight + at) is None, at
    _end(background, schedule.enqueue_due(background.queue, daily, midnight + 86_400))
    assert schedule.enqueue_due(background.queue, daily, midnight) is not None, "that clock was a day ahead"


@pytest.mark.parametrize(
    "note",
    [
        b"\xff",
        b"[]",
        b"{}",
        b'{"interval": "x", "period": 1, "id": 1, "at": 1}',
        b'{"interval": 10, "period": Infinity, "id": 1, "at": 1}',
        b"[" * 100_000,
    ],
)
def test_note_that_somebody_else_wrote(background: Background, note: bytes) -> None:
    background.connection.set(schedule.note_key(background.queue.name, VERIFY.job), note)
    assert schedule.enqueue_due(background.queue, VERIFY, 1000.0) is not None


def test_schedulers_that_race(background: Background) -> None:
    """Eight schedulers, each sure to hold the lock, look at the same moment: WATCH lets one of them enqueue."""
    connections = [redis.Redis.from_url(background.redis_url) for _ in range(8)]
    try:
        for period in range(10):
            works = [
                lambda one=one, period=period: schedule.enqueue_due(  # type: ignore[misc]
                    desk.client_queue(one, background.queue.name), VERIFY, period * 10.0
                )
                for one in connections
            ]
            enqueued = [job_id for job_id in worlds.together(*works) if job_id is not None]
            assert len(enqueued) == 1, enqueued
            assert background.connection.lrange(background.queue.key, 0, -1) == [enqueued[0].encode()]
            _end(background, enqueued[0])
    finally:
        for one in connections:
            one.close()


# --- real schedulers -----------------------------------------------------------------------------------------------------


def _scheduler(background: Background) -> psutil.Process | None:
    """The process that holds the lock."""
    name = background.connection.get(f"rq:scheduler-lock:{background.queue.name}")
    pid = background.connection.hget(f"rq:scheduler:{name.decode()}", "pid") if name else None
    return psutil.Process(int(pid)) if pid and processes.is_running(int(pid)) else None


def _runs(background: Background) -> list[Any]:
    return [view for view in desk.listing(background.queue, 1000) if view["id"].startswith("verify-")]


def _more_runs(background: Background, what: str) -> None:
    before = len(_runs(background))
    wait_until(lambda: len(_runs(background)) > before, f"another periodic job {what}", 60)


def _scheduling_worker(background: Background) -> Worker:
    return background.worker(environment={"STATECACHE_VERIFY_INTERVAL_SECONDS": "1"})


def test_kill_9_of_the_scheduler_and_of_its_worker(background: Background) -> None:
    """Two workers, one scheduler. It is killed: its worker starts it again. Its worker is killed: it goes, too, and when
    its lock has expired the other worker's takes over. Each period has at most one job throughout."""
    workers = [_scheduling_worker(background), _scheduling_worker(background)]
    scheduler = wait_until(lambda: _scheduler(background), "a scheduler", 60)
    _more_runs(background, "at first")
    scheduler.send_signal(signal.SIGKILL)
    again = wait_until(
        lambda: (found := _scheduler(background)) and found.pid != scheduler.pid and found, "the scheduler again", 60
    )
    _more_runs(background, "after the scheduler's death")
    owner = next(worker for worker in workers if worker.pid == again.ppid())
    other = next(worker for worker in workers if worker is not owner)
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()
    processes.wait_until_ended([again.pid], "the scheduler whose worker is gone")
    background.connection.pexpire(f"rq:scheduler-lock:{background.queue.name}", 1)
    last = wait_until(lambda: _scheduler(background), "the other worker's scheduler", 60)
    assert last.ppid() == other.pid
    _more_runs(background, "after the worker's death")
    ids = [view["id"] for view in _runs(background)]
    assert len(ids) == len(set(ids))
    assert "Traceback" not in other.printed, other.printed


def test_retry_waits_in_the_schedule(background: Background) -> None:
    """A job that failed is tried again when its time has come, by the scheduler."""
    job_id = background.raw_job(
        "fails", data=b'["statecache.verify", null, [], {"machine": 1}]', retries_left="1", retry_intervals="[1]"
    )
    background.worker()
    view = background.wait_over(job_id)
    assert (view["status"], view["retries_left"]) == ("failed", "0")
