"""RQ jobs followed as instances of a machine, by real workers and by the sweep, whatever is killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import redis
import rq
from rq.command import send_stop_job_command

from statecache.contrib import rq as contrib
from statecache.core import errors
from tests.support import tracked, worlds
from tests.support.background import Worker
from tests.support.waiting import wait_until


class User:
    """A user's queue, its tracker, and workers of theirs."""

    def __init__(self, world: worlds.World, folder: Path) -> None:
        self.world, self.folder = world, folder
        self.connection: Any = redis.Redis.from_url(world.redis_url)
        self.queue = rq.Queue("user", connection=self.connection)
        self.jobs = contrib.track(self.queue, world.cache)
        self._workers: list[Worker] = []

    def worker(self, *options: str) -> Worker:
        folder = self.folder / f"worker-{len(self._workers)}"
        folder.mkdir()
        command = ["-m", "tests.support.tracked", self.world.redis_url, self.world.database_url, self.world.namespace]
        made = Worker(folder, [*command, *options])
        self._workers.append(made)
        return made

    def burst(self, *options: str) -> None:
        worker = self.worker("--burst", *options)
        assert worker.wait() == 0, worker.printed
        assert "is not followed" not in worker.printed

    def events(self, job: Any) -> list[str]:
        return [row.event for row in self.jobs.machine.history(job.id)]

    def state(self, job: Any) -> str:
        return self.jobs.machine.state(job.id)

    def wait(self, job: Any, state: str) -> None:
        wait_until(lambda: self.state(job) == state, f"job {state}", 60)

    def close(self) -> None:
        for worker in self._workers:
            if worker.alive:
                worker.kill()
        self.connection.close()


@pytest.fixture
def user(redis_url: str, postgres_url: str, namespace: str, tmp_path: Path) -> Iterator[User]:
    with worlds.World(redis_url, postgres_url, namespace) as world:
        made = User(world, tmp_path)
        try:
            yield made
        finally:
            made.close()
        world.flush()
        world.verify()


def test_jobs_that_end(user: User) -> None:
    """Enqueued, begun, ended: each with RQ's own times, and in SQL when RQ has forgotten the job."""
    fine, broken = user.jobs.enqueue(tracked.fine, 5), user.jobs.enqueue(tracked.broken)
    assert user.state(fine) == "queued"
    user.burst()
    assert user.events(fine) == ["@start", "enqueue", "start_run", "finish"]
    assert user.events(broken) == ["@start", "enqueue", "start_run", "fail"]
    snapshot = user.jobs.machine.get(fine.id)
    assert (snapshot.data["queue"], snapshot.data["function"]) == ("user", "tests.support.tracked.fine")
    begun, ended = user.jobs.machine.history(fine.id)[-2:]
    assert begun.occurred_at is not None
    assert ended.occurred_at is not None
    assert begun.occurred_at <= ended.occurred_at
    fine.delete()
    user.world.flush()
    user.jobs.sweep()
    assert user.events(fine)[-1] == "finish"
    assert user.world.durable.history("rq_job", fine.id)[-1].event == "finish"


def test_retries_by_error_and_by_result(user: User, tmp_path: Path) -> None:
    """An immediate retry is run at once: what the worker did not see between is told as far as RQ knows it."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    flaky = user.jobs.enqueue(tracked.flaky, str(tmp_path / "a"), retry=rq.Retry(max=3))
    again = user.jobs.enqueue(tracked.again, str(tmp_path / "b"))
    user.burst()
    expected = ["@start", "enqueue", "start_run", "retry", "start_run", "retry", "start_run", "finish"]
    assert user.events(flaky) == expected
    assert user.events(again) == expected
    assert user.jobs.machine.get(flaky.id).data["retries_left"] == 1


def test_repeated_job(user: User) -> None:
    job = user.jobs.enqueue(tracked.fine, repeat=rq.Repeat(times=2))
    user.burst()
    expected = ["@start", "enqueue", "start_run", "repeat", "start_run", "repeat", "start_run", "finish"]
    assert user.events(job) == expected


def test_result_that_is_not_kept(user: User) -> None:
    """RQ deletes such a job as it ends: the work-horse tells it in time."""
    job = user.jobs.enqueue(tracked.fine, result_ttl=0)
    user.burst()
    assert not user.connection.exists(f"rq:job:{job.id}")
    user.jobs.sweep()
    assert user.events(job) == ["@start", "enqueue", "start_run", "finish"]


def test_failure_that_is_not_kept(user: User) -> None:
    """As a result that is not kept; it was recorded as forgotten, never as failed. What is tried again is there until it is
    over. In the end RQ has dropped them."""
    broken = user.jobs.enqueue(tracked.broken, failure_ttl=0)
    retried = user.jobs.enqueue(tracked.broken, failure_ttl=0, retry=rq.Retry(max=1))
    user.burst()
    assert not user.connection.exists(f"rq:job:{broken.id}", f"rq:job:{retried.id}")
    user.jobs.sweep()
    assert user.events(broken) == ["@start", "enqueue", "start_run", "fail", "forget"]
    assert user.events(retried) == ["@start", "enqueue", "start_run", "retry", "start_run", "fail", "forget"]


def test_scheduled_deferred_canceled_requeued_and_stopped(user: User, tmp_path: Path) -> None:
    later = user.queue.enqueue_in(timedelta(seconds=1), tracked.fine)
    canceled = user.jobs.enqueue(tracked.fine)
    canceled.cancel()
    broken = user.jobs.enqueue(tracked.broken)
    behind = user.jobs.enqueue(tracked.fine, depends_on=broken)
    user.jobs.sweep()
    assert (user.state(later), user.state(canceled), user.state(behind)) == ("scheduled", "canceled", "deferred")
    worker = user.worker("--scheduler")
    user.wait(later, "finished")
    assert user.events(later)[:3] == ["@start", "schedule", "enqueue"]
    user.wait(broken, "failed")
    broken.requeue()
    wait_until(lambda: user.events(broken)[-3:] == ["requeue", "start_run", "fail"], "the second run", 60)
    slow = user.jobs.enqueue(tracked.slow, str(tmp_path))
    user.wait(slow, "started")
    wait_until((tmp_path / "begun").exists, "the slow job")
    send_stop_job_command(user.connection, slow.id)
    user.wait(slow, "stopped")
    assert worker.alive


def test_jobs_that_nobody_told_of(user: User) -> None:
    """Enqueued past the tracker and run by RQ's own worker: the sweep tells it all afterwards."""
    jobs = [user.queue.enqueue(tracked.fine) for _ in range(3)]
    rq.SimpleWorker([user.queue], connection=user.connection).work(burst=True, logging_level="ERROR")
    assert user.jobs.sweep() == 3
    for job in jobs:
        assert user.events(job) == ["@start", "enqueue", "start_run", "finish"]
    before = user.world.sql_dump()
    user.jobs.sweep()
    user.world.flush()
    before = user.world.sql_dump()
    user.jobs.sweep()
    user.world.flush()
    assert user.world.sql_dump() == before


def test_forgotten_by_rq(user: User) -> None:
    job = user.jobs.enqueue(tracked.fine)
    user.world.flush()
    job.delete()
    user.jobs.sweep()
    assert user.events(job) == ["@start", "enqueue", "forget"]
    with pytest.raises(errors.NotFoundError, match="neither RQ nor the store"):
        user.jobs.follow("never-heard-of")


def test_an_id_that_is_used_again_stops_nobody_elses_sweep(user: User, caplog: pytest.LogCaptureFixture) -> None:
    """The first job of that id stays what it was; what stands behind it in the sweep is told."""

    def run() -> None:
        rq.SimpleWorker([user.queue], connection=user.connection).work(burst=True, logging_level="ERROR")

    nightly = user.jobs.enqueue(tracked.fine, job_id="nightly")
    dropped = user.jobs.enqueue(tracked.fine, job_id="dropped")
    run()
    user.jobs.sweep()
    assert user.state(nightly) == user.state(dropped) == "finished"
    lost = user.jobs.enqueue(tracked.fine)
    lost.delete()
    user.jobs.enqueue(tracked.fine, job_id="nightly")
    dropped.delete()
    run()
    user.world.flush()
    assert user.jobs.sweep() == 2
    assert "job nightly is finished here: its id is used again" in caplog.text
    assert user.state(lost) == "forgotten"
    assert user.events(nightly) == ["@start", "enqueue", "start_run", "finish"]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (errors.IntegrityError, errors.IntegrityError),
        (errors.InvalidTransitionError, errors.InvalidTransitionError),
        (errors.StaleVersionError, contrib.OvertakenError),
    ],
)
def test_a_job_that_cannot_be_followed_stops_nobody_elses_sweep(
    user: User, error: type[errors.StateCacheError], told: type[errors.StateCacheError]
) -> None:
    """Its data is damaged, a machine of the user's has not that event, or others are quicker at every attempt."""
    first, second = user.queue.enqueue(tracked.fine), user.queue.enqueue(tracked.fine)
    record = user.jobs._record

    def failing(job_id: str, facts: contrib.Facts) -> Any:
        if job_id == first.id:
            raise error("as asked")
        return record(job_id, facts)

    with mock.patch.object(user.jobs, "_record", failing):
        assert user.jobs.sweep() == 2
        with pytest.raises(told):
            user.jobs.follow(first.id)
    assert user.state(second) == "queued"
    user.jobs.sweep()
    assert user.state(first) == "queued"


@pytest.mark.parametrize("family", [True, False], ids=["worker-and-horse", "horse"])
@pytest.mark.parametrize("retries", [0, 1])
def test_kill_9(user: User, tmp_path: Path, family: bool, retries: int) -> None:
    """The worker and its horse, or the horse alone, are killed while the job runs. The job is seen as started, then as
    failed or tried again: told by the worker, or by the sweep once RQ has noticed."""
    job = user.jobs.enqueue(tracked.slow, str(tmp_path), retry=rq.Retry(max=1) if retries else None)
    worker = user.worker()
    user.wait(job, "started")
    wait_until((tmp_path / "begun").exists, "the slow job")
    if family:
        worker.kill()
        user.jobs.sweep()
        assert user.state(job) == "started"
        user.queue.started_job_registry.cleanup(timestamp=time.time() + 10_000)  # when the heartbeat has expired
        user.jobs.sweep()
    else:
        horse = wait_until(lambda: [one.pid for one in worker.children if os.getpgid(one.pid) == one.pid], "the horse")
        os.kill(horse[0], signal.SIGKILL)
    if not retries:
        user.wait(job, "failed")
        assert user.events(job) == ["@start", "enqueue", "start_run", "fail"]
        return
    if family:
        assert user.events(job) == ["@start", "enqueue", "start_run", "retry"]
        user.burst()
    user.wait(job, "finished")
    assert user.events(job) == ["@start", "enqueue", "start_run", "retry", "start_run", "finish"]


def test_store_that_is_away_is_none_of_the_jobs_business(user: User, caplog: pytest.LogCaptureFixture) -> None:
    """Look fails, the job is enqueued all the same, and the sweep tells it later."""
    tracker = contrib.track(user.queue, user.world.more())
    tracker.machine._cache.driver.hot.close()
    with worlds.before_call(tracker, "follow", lambda: _away()):
        job = tracker.enqueue(tracked.fine)
    assert "is not followed now" in caplog.text
    user.jobs.sweep()
    assert user.state(job) == "queued"


def _away() -> None:
    raise errors.UnavailableError("SQL is away")


def test_ten_who_follow_at_once(user: User, tmp_path: Path) -> None:
    """All read the same facts and make the same moves: each version is won by one, the others look again."""
    (tmp_path / "a").mkdir()
    jobs = [user.queue.enqueue(tracked.flaky, str(tmp_path / "a"), retry=rq.Retry(max=3)) for _ in range(3)]
    trackers = [contrib.track(user.queue, user.world.more()) for _ in range(5)]
    rq.SimpleWorker([user.queue], connection=user.connection).work(burst=True, logging_level="ERROR")
    results = worlds.together(*(one.sweep for one in trackers for _ in range(2)))
    assert results == [3] * 10
    for job in jobs:
        events = user.events(job)
        assert events[:3] == ["@start", "enqueue", "start_run"]
        assert events[-1] == "finish"
        assert events.count("start_run") == events.count("retry") + 1
