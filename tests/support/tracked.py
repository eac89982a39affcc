"""Jobs of a user, and a worker of theirs that tells what becomes of them. Run as a program, it is that worker."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import redis
import rq

from statecache import StateCache
from statecache.contrib import rq as contrib


def fine(number: int = 7) -> int:
    return number


def broken() -> None:
    raise ValueError("as asked")


def flaky(folder: str) -> str:
    """Fails until it has been called three times."""
    calls = Path(folder)
    (calls / str(time.time_ns())).touch()
    if len(list(calls.iterdir())) < 3:
        raise ValueError("not yet")
    return "at last"


def again(folder: str) -> Any:
    """Asks to be called again, twice."""
    calls = Path(folder)
    (calls / str(time.time_ns())).touch()
    return rq.Retry(max=5) if len(list(calls.iterdir())) < 3 else "enough"


def slow(folder: str) -> None:
    """Begins, says so, and goes on until it is killed; at once done if it was begun before."""
    begun = Path(folder) / "begun"
    if begun.exists():
        return
    begun.touch()
    while True:
        time.sleep(0.05)


class Worker(contrib.TrackingWorker, rq.Worker):
    def get_heartbeat_ttl(self, job: Any, working_time: float = 0.0) -> int:
        return 60


def main(redis_url: str, database_url: str, namespace: str, *options: str) -> None:
    with redis.Redis.from_url(redis_url) as connection:
        queue = rq.Queue("user", connection=connection)
        with StateCache.connect(redis_url, database_url, namespace) as cache:
            worker = Worker([queue], connection=connection, job_monitoring_interval=1)
            worker.jobs = contrib.track(queue, cache)
            worker.work(burst="--burst" in options, with_scheduler="--scheduler" in options)


if __name__ == "__main__":
    main(*sys.argv[1:])
