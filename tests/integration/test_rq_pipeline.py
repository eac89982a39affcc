"""The example pipeline: kill -9 of worker and work-horse at every point of every step; each step happens once all the same."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
import rq

from tests.support import worlds
from tests.support.background import REPOSITORY, Worker

POINTS_OF_A_STEP = ("before work", "after work", "before move", "after move", "before enqueue", "after enqueue")
STEPS = ("reserve", "charge", "ship")


@pytest.fixture
def world(redis_url: str, postgres_url: str, namespace: str) -> Iterator[worlds.World]:
    with worlds.World(redis_url, postgres_url, namespace) as made:
        yield made
        made.verify()


def _run(world: worlds.World, folder: Path, *command: object) -> Worker:
    """Run a program with the store in its environment, to its end."""
    folder.mkdir(exist_ok=True)
    worker = Worker(
        folder, [str(word) for word in command],
        STATECACHE_REDIS_URL=world.redis_url, STATECACHE_DATABASE_URL=world.database_url,
        STATECACHE_NAMESPACE=world.namespace, STATECACHE_PARTITION_COUNT="2",
        PYTHONPATH=f"{REPOSITORY}:{REPOSITORY}/docs/examples",
    )  # fmt: skip
    try:
        worker.wait(90.0)
    finally:
        if worker.alive:
            worker.kill()
    return worker


@pytest.mark.parametrize("place", range(6), ids=[one.replace(" ", "-") for one in POINTS_OF_A_STEP])
@pytest.mark.parametrize("step", range(3), ids=STEPS)
def test_killed_at_every_point_of_a_step(world: worlds.World, tmp_path: Path, step: int, place: int) -> None:
    """Its worker dies there; another one ends the order after RQ has found the job abandoned."""
    sys.path.insert(0, str(REPOSITORY / "docs" / "examples"))
    try:
        import rq_pipeline
    finally:
        sys.path.pop(0)
    effects = tmp_path / "effects"
    effects.mkdir()
    orders = world.cache.machine(rq_pipeline.Purchase)
    orders.start("1001")
    state = "placed"
    for event in STEPS[:step]:
        state = orders.transition("1001", event, transition_id=f"1001:{event}").state
    with redis.Redis.from_url(world.redis_url) as connection:
        queue = rq.Queue(rq_pipeline.QUEUE, connection=connection)
        queue.enqueue(rq_pipeline.advance, "1001", retry=rq.Retry(max=10))
        died = _run(world, tmp_path / "died", "-m", "tests.support.killed_pipeline", place + 1, effects)
        assert died.wait() == -signal.SIGKILL, died.printed
        assert (orders.state("1001") != state) == (place >= POINTS_OF_A_STEP.index("after move")), died.printed
        queue.started_job_registry.cleanup(timestamp=time.time() + 10_000)  # when the heartbeat has expired
    done = _run(world, tmp_path / "done", "-m", "rq_pipeline", "work", "--burst")
    assert [row.event for row in orders.history("1001")] == ["@start", *STEPS], done.printed
    assert orders.get("1001").data["parcel"] == "parcel of 1001"
    assert (effects / f"1001-{STEPS[step]}").exists() == (place >= 1)
    world.flush()


def test_the_example_as_its_head_says(world: worlds.World, tmp_path: Path) -> None:
    example = REPOSITORY / "docs" / "examples" / "rq_pipeline.py"
    for words in (("start", "1001", "1002"), ("start", "1001"), ("work", "--burst")):
        done = _run(world, tmp_path / words[0], example, *words)
        assert done.wait() == 0, done.printed
    from statecache import StateCache  # the machine is registered by now

    with StateCache.connect(world.redis_url, world.database_url, world.namespace) as cache:
        orders = cache.machine("purchase")
        for order_id in ("1001", "1002"):
            assert [row.event for row in orders.history(order_id)] == ["@start", *STEPS]
    world.flush()
