"""Warming as background jobs: one a partition, once for each set and each recovery, killed at every stage."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from statecache.core import errors
from statecache.engine import warming
from tests.integration.test_rq_jobs import _expire, _horse, _sleeps, _wait_hung
from tests.integration.test_warming import wiped
from tests.support import worlds
from tests.support.background import Background
from tests.support.waiting import wait_until
from workers import desk, warmings

ORDERS = 400
PARTITIONS = 16


@pytest.fixture
def world(redis_url: str, database_url: str, namespace: str) -> Iterator[worlds.World]:
    with worlds.World(redis_url, database_url, namespace, partition_count=PARTITIONS) as made:
        made.orders.start_many([(f"o{number}", {"amount": number}) for number in range(ORDERS)])
        made.flush()
        yield made
        made.verify()


@pytest.fixture
def background(world: worlds.World, tmp_path: Path) -> Iterator[Background]:
    with Background(world.redis_url, world.database_url, world.namespace, tmp_path) as made:
        yield made


def _hot(world: worlds.World) -> int:
    return sum(world.is_hot(f"o{number}") for number in range(ORDERS))


def _warm_jobs(background: Background) -> tuple[list[str], list[str]]:
    """The ids of the parents and of the parts."""
    found = [view["id"] for view in desk.listing(background.queue, 1000) if view["job"] == "warm"]
    assert len(found) == len(set(found))
    parents = [job_id for job_id in found if "-p" not in job_id]
    return parents, sorted(job_id for job_id in found if "-p" in job_id)


def _done(background: Background, parent: str) -> dict[str, Any]:
    """The parent, when everything has been warmed by one job for each partition."""
    view = background.show(parent)
    assert view["status"] == "finished", view
    assert view["parts"] == {"partitions": list(range(PARTITIONS)), "of": PARTITIONS, "finished": PARTITIONS}
    assert _warm_jobs(background) == (
        [parent],
        [warmings.part_id(parent, number) for number in range(PARTITIONS)],
    )
    return view


def test_one_job_a_partition_and_the_sum_of_them(world: worlds.World, background: Background) -> None:
    wiped(world)
    parent = background.start("warm")
    assert background.show(parent)["status"] == "queued"
    background.burst()
    view = _done(background, parent)
    assert view["result"] == {"partitions": PARTITIONS, "warmed": ORDERS, "hot_already": 0, "full": False}
    assert view["progress"] == {"done": ORDERS, "of": ORDERS, "warmed": ORDERS, "hot_already": 0, "left_cold": 0}
    assert _hot(world) == ORDERS
    partition = world.partition_of("o0")
    part = background.show(warmings.part_id(parent, partition))
    held = sum(world.partition_of(f"o{number}") == partition for number in range(ORDERS))
    assert (part["arguments"]["partition"], part["progress"]["done"], part["progress"]["of"]) == (partition, held, held)


def test_limit_is_shared_and_kept(world: worlds.World, background: Background) -> None:
    """Each partition has its share of the limit, and of the settings' bound; they add up to it exactly."""
    wiped(world)
    limited = background.start("warm", limit=101)
    background.burst()
    assert (background.show(limited)["result"]["warmed"], _hot(world)) == (101, 101)
    bounded = background.start("warm")
    background.burst(environment={"STATECACHE_HOT_INSTANCES_MAX": "150"})
    assert background.show(bounded)["progress"]["of"] == 150
    assert _hot(world) <= 150  # the bound counts all keys of the database, also those of the queue


def test_only_some_partitions(world: worlds.World, background: Background) -> None:
    wiped(world)
    parent = background.start("warm", partitions="3,7")
    background.burst()
    wanted = {f"o{number}" for number in range(ORDERS) if world.partition_of(f"o{number}") in (3, 7)}
    assert background.show(parent)["result"]["warmed"] == len(wanted)
    assert {f"o{number}" for number in range(ORDERS) if world.is_hot(f"o{number}")} == wanted


@pytest.mark.parametrize("arguments", [{"partitions": "3;7"}, {"limit": -1}])
def test_what_no_store_could_do_is_refused_at_once(background: Background, arguments: dict[str, Any]) -> None:
    with pytest.raises(errors.InvalidDataError, match="is refused"):
        desk.start(background.queue, "warm", arguments, retry_seconds=())
    assert not background.queue.job_ids


@pytest.mark.parametrize("arguments", [{"partition": 16}, {"partitions": "16"}])
def test_bad_arguments_fail_the_job(world: worlds.World, background: Background, arguments: dict[str, Any]) -> None:
    job_id = desk.start(background.queue, "warm", arguments, retry_seconds=())
    background.burst()
    view = background.show(job_id)
    assert (view["status"], "is refused" in view["error"]) == ("failed", True)


def test_progress_while_it_runs_then_cancelled(world: worlds.World, background: Background) -> None:
    """One part stands after its note, the others wait: the parent shows what is done, of what; its cancelling ends them."""
    wiped(world)
    parent = background.start("warm")
    worker = background.worker("--no-scheduler", environment={"STATECACHE_FAILPOINT": "jobs.enqueued=hang@16"})
    horse = _horse(worker)
    _wait_hung(background, parent, "jobs.enqueued=hang@16", horse)
    worker.kill()
    _expire(background)
    worker = background.worker("--no-scheduler", environment={"STATECACHE_FAILPOINT": "jobs.noted=hang"})
    wait_until(lambda: background.show(parent)["progress"]["done"] > 0, "progress of a part", 60)
    view = background.show(parent)
    assert view["status"] in ("queued", "started")  # it is behind its parts, to be run again
    assert 0 < view["progress"]["done"] < view["progress"]["of"] == ORDERS
    assert desk.cancel(background.queue, parent) == "stopping"
    assert background.wait_over(parent)["status"] in ("stopped", "canceled")
    assert all(background.show(job_id)["status"] != "queued" for job_id in _warm_jobs(background)[1])
    assert worker.alive
    with pytest.raises(errors.InvalidDataError, match="already"):
        desk.cancel(background.queue, parent)


# --- killed --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place", ["jobs.begun=hang", "jobs.noted=hang", "jobs.enqueued=hang", "jobs.enqueued=hang@9", "jobs.ended=hang"]
)
def test_kill_9_of_the_parent(world: worlds.World, background: Background, place: str) -> None:
    """It dies before, between and after it enqueues its parts, and is run again: no second set, none is missing."""
    wiped(world)
    parent = background.start("warm")
    worker = background.worker("--no-scheduler", environment={"STATECACHE_FAILPOINT": place})
    _wait_hung(background, parent, "", _horse(worker))
    worker.kill()
    _expire(background)
    background.burst()
    assert _done(background, parent)["result"]["warmed"] == ORDERS
    assert _hot(world) == ORDERS


@pytest.mark.parametrize("place", ["jobs.begun=hang", "jobs.noted=hang", "jobs.ended=hang"])
def test_kill_9_in_a_part(world: worlds.World, background: Background, place: str) -> None:
    """The work-horse alone is killed: its worker puts the part back and begins it again. Then both: another worker ends it.

    What was noted is not done again, so nothing is counted twice.
    """
    wiped(world)
    partition = world.partition_of("o0")
    held = sum(world.partition_of(f"o{number}") == partition for number in range(ORDERS))
    job_id = background.start("warm", partition=partition)
    worker = background.worker("--no-scheduler", environment={"STATECACHE_FAILPOINT": place})
    first = _horse(worker)
    _wait_hung(background, job_id, "", first)
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: background.show(job_id)["retries_left"] == "2", "the part's second beginning", 60)
    if not place.startswith("jobs.noted"):  # nothing is left for the second work-horse: it ends
        second = wait_until(lambda: (found := _horse(worker)) != first and found, "the next work-horse", 60)
        _wait_hung(background, job_id, "", second)
        worker.kill()
        _expire(background)
        background.burst()
    view = background.wait_over(job_id)
    assert view["status"] == "finished", view
    progress, result = view["progress"], view["result"]
    assert (progress["done"], progress["of"]) == (held, held)
    assert result["warmed"] + result["hot_already"] == held
    assert world.is_hot("o0")


# --- after a recovery ------------------------------------------------------------------------------------------------------


def test_wiped_and_recovered_everything_comes_back(world: worlds.World, background: Background) -> None:
    """Two workers with schedulers, and a wipe: one set of jobs for this recovery. An intact one afterwards asks for none."""
    workers = [background.worker(), background.worker()]
    wiped(world)
    wait_until(lambda: _hot(world) == ORDERS, "all instances to be hot", 90)
    parents, _ = _warm_jobs(background)
    assert background.wait_over(parents[0])["status"] == "finished"
    _done(background, parents[0])
    world.disown()
    world.cache.recover()
    assert warmings.after_recovery(world.cache, background.queue) is None
    world.wipe()
    world.cache.recover()
    wait_until(lambda: len(_warm_jobs(background)[0]) == 2, "the warming after the next recovery", 90)
    wait_until(lambda: _hot(world) == ORDERS, "all instances to be hot again", 90)
    assert all(worker.alive and "Traceback" not in worker.printed for worker in workers)


def test_schedulers_that_race_for_a_recovery(world: worlds.World, background: Background) -> None:
    """Eight of them look at the same moment: one enqueues. Later ones see that job, also when it has failed or is over."""
    wiped(world)
    connections = [redis.Redis.from_url(background.redis_url) for _ in range(8)]
    caches = [world.more() for _ in connections]
    try:
        works = [
            lambda one=one, cache=cache: warmings.after_recovery(cache, desk.client_queue(one, background.queue.name))  # type: ignore[misc]
            for one, cache in zip(connections, caches, strict=True)
        ]
        enqueued = [found for found in worlds.together(*works) if found is not None]
    finally:
        for one in connections:
            one.close()
    assert len(enqueued) == 1, enqueued
    assert background.connection.lrange(background.queue.key, 0, -1) == [enqueued[0].encode()]
    for status in ("started", "failed", "finished"):
        background.connection.hset(f"rq:job:{enqueued[0]}", "status", status)
        assert warmings.after_recovery(world.cache, background.queue) is None


def test_kill_9_of_the_scheduler_with_the_recovery_before_it(world: worlds.World, background: Background) -> None:
    """The scheduler is killed when it stands before, and after, it has enqueued the job: the next one enqueues it, or sees
    that it is there."""
    wiped(world)
    for place in ("jobs.looked=hang", "jobs.wanted=hang"):
        worker = background.worker(environment={"STATECACHE_FAILPOINT": place})
        wait_until(
            lambda worker=worker: [child for child in worker.children if _sleeps(child.pid)],  # type: ignore[misc]
            f"the scheduler at {place}",
            60,
        )
        worker.kill()
        background.connection.delete(f"rq:scheduler-lock:{background.queue.name}")
        _expire(background)
    background.worker()
    wait_until(lambda: _hot(world) == ORDERS, "all instances to be hot", 90)
    parents, parts = _warm_jobs(background)
    assert (len(parents), len(parts)) == (1, PARTITIONS)


def test_recovery_of_long_ago_asks_for_nothing(
    world: worlds.World, background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RQ forgets a job that is over after a day: by then the recovery is too old to ask for it again."""
    wiped(world)
    later = time.time() + warmings.RECENT_SECONDS + 1
    monkeypatch.setattr(warmings.time, "time", lambda: later)
    assert warmings.after_recovery(world.cache, background.queue) is None


def test_switched_off(world: worlds.World, background: Background) -> None:
    wiped(world)
    worker = background.worker(
        environment={"STATECACHE_WARM_AFTER_RECOVERY": "false", "STATECACHE_VERIFY_INTERVAL_SECONDS": "1"}
    )
    wait_until(lambda: len([v for v in desk.listing(background.queue, 99) if v["job"] == "verify"]) >= 4, "looks", 90)
    assert _warm_jobs(background) == ([], [])
    assert worker.alive


def test_shares_are_in_proportion() -> None:
    assert warming.proportional({0: 10, 1: 20, 2: 30}, 60) == {0: 10, 1: 20, 2: 30}
    assert warming.proportional({0: 10, 1: 20, 2: 30}, 7) == {0: 1, 1: 2, 2: 4}
    assert warming.proportional({0: 1, 1: 1, 2: 1}, 2) == {0: 1, 1: 1}
    assert warming.proportional({}, 5) == {}
    held = {number: number * number for number in range(1, 50)}
    for bound in range(1, sum(held.values()), 97):
        found = warming.proportional(held, bound)
        assert sum(found.values()) == bound
        assert all(found[number] <= held[number] for number in found)
