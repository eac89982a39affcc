"""Background jobs under test: RQ workers as processes of their own, and a hand that writes into their queue.

``Background`` is a store's queue with the means to look at it; ``worker`` starts ``statecache worker``. Whatever was started is
killed at the end, its children too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import psutil
import redis

from tests.support import processes
from tests.support.waiting import wait_until
from workers import desk, queues

REPOSITORY = Path(__file__).parents[2]


class Worker(processes.Process):
    """One ``statecache worker`` process (or any other command), its output in ``log``."""

    def __init__(self, folder: Path, command: list[str], **environment: str) -> None:
        self.log = folder / "worker.log"
        kept = {name: value for name, value in os.environ.items() if not name.startswith("STATECACHE_")}
        super().__init__(
            [sys.executable, *command], self.log, cwd=REPOSITORY, env={**kept, "PYTHONUNBUFFERED": "1", **environment}
        )

    @property
    def printed(self) -> str:
        return self.log.read_text(encoding="utf-8")

    @property
    def children(self) -> list[psutil.Process]:
        """Its work-horse and its scheduler."""
        try:
            return psutil.Process(self.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def kill(self, *, family: bool = True) -> None:
        """SIGKILL, its children with it if wanted."""
        children = self.children
        self.end(signal.SIGKILL)
        if family:
            for child in children:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            processes.wait_until_ended([child.pid for child in children], "the worker's children")

    def wait(self, timeout_seconds: float = 90.0) -> int:
        return self._popen.wait(timeout_seconds)


class Background:
    """The queue of one store."""

    def __init__(self, redis_url: str, database_url: str, namespace: str, folder: Path) -> None:
        self.redis_url, self.database_url, self.namespace, self.folder = redis_url, database_url, namespace, folder
        self.connection: Any = redis.Redis.from_url(redis_url)
        self.queue = desk.client_queue(self.connection, queues.name_of(namespace))
        self._workers: list[Worker] = []

    def worker(self, *options: str, environment: Mapping[str, str] | None = None) -> Worker:
        """Start a worker of the command line."""
        folder = self.folder / f"worker-{len(self._workers) + 1}"
        folder.mkdir(parents=True)
        place = ["--redis-url", self.redis_url, "--database-url", self.database_url, "--namespace", self.namespace]
        made = Worker(folder, ["-m", "statecache", "worker", *place, *options], **(environment or {}))
        self._workers.append(made)
        return made

    def adopt(self, worker: Worker) -> Worker:
        self._workers.append(worker)
        return worker

    def burst(self, *options: str, environment: Mapping[str, str] | None = None) -> Worker:
        """Run a worker until its queue is empty."""
        made = self.worker("--burst", "--no-scheduler", *options, environment=environment)
        assert made.wait(90.0) == 0, made.printed
        return made

    def start(self, name: str, **arguments: Any) -> str:
        return desk.start(self.queue, name, arguments, retry_seconds=(0, 0, 0))

    def show(self, job_id: str) -> dict[str, Any]:
        view = desk.show(self.queue, job_id)
        assert view is not None, f"job {job_id} is gone"
        return view

    def wait_over(self, job_id: str, timeout_seconds: float = 60.0) -> dict[str, Any]:
        """Wait until a job is over."""
        wait_until(lambda: self.show(job_id)["status"] in desk.STATES_OVER, f"the end of {job_id}", timeout_seconds)
        return self.show(job_id)

    def raw_job(self, job_id: str, *, push: bool = True, without: Sequence[str] = (), **fields: bytes | str) -> str:
        """Write a job's hash as somebody else would, with some fields left out, and its id into the queue."""
        good = {
            "status": "queued", "origin": self.queue.name, "created_at": "2026-01-01T00:00:00.000000Z", "timeout": "30",
            "data": b'["statecache.verify", null, [], {}]',
        }  # fmt: skip
        written = {name: value for name, value in {**good, **fields}.items() if name not in without}
        self.connection.hset(f"rq:job:{job_id}", mapping=written)
        if push:
            self.connection.sadd("rq:queues", self.queue.key)
            self.connection.rpush(self.queue.key, job_id)
        return job_id

    def close(self) -> None:
        for worker in self._workers:
            if worker.alive:
                worker.kill()
        self.connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
