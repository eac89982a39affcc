"""The background jobs, run by real forking workers and killed at every stage (PostgreSQL and Valkey, real processes)."""

from __future__ import annotations

import contextlib
import csv
import errno
import fcntl
import gzip
import json
import os
import re
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import rq
import sqlalchemy as sa
from rq.exceptions import StopRequested

from statecache.core import errors
from statecache.durable import schema
from statecache.engine import exporting
from statecache.engine import verify as verification
from tests.acceptance import command
from tests.acceptance.test_metrics_process import values
from tests.support import processes, refusing, worlds
from tests.support.background import Background, Worker
from tests.support.waiting import wait_until
from workers import desk, jobs, queues
from workers.worker import SafeWorker

ORDERS = 2500


@pytest.fixture
def world(redis_url: str, database_url: str, namespace: str) -> Iterator[worlds.World]:
    with worlds.World(redis_url, database_url, namespace) as made:
        yield made
        made.verify()


@pytest.fixture
def background(world: worlds.World, tmp_path: Path) -> Iterator[Background]:
    with Background(world.redis_url, world.database_url, world.namespace, tmp_path) as made:
        yield made


def _fill(world: worlds.World, orders: int = ORDERS) -> None:
    world.orders.start_many([(f"o{number}", {"amount": number}) for number in range(orders)])
    world.flush()


def _expire(background: Background) -> None:
    """What every worker's maintenance does once the heartbeat of a killed one has expired: now."""
    background.queue.started_job_registry.cleanup(timestamp=time.time() + 10_000)


def _horse(worker: Worker) -> int:
    """The work-horse, which is a child of its worker in a process group of its own."""
    found = wait_until(
        lambda: [one.pid for one in worker.children if os.getpgid(one.pid) == one.pid], "the work-horse", 60
    )
    return int(found[0])


# --- verify ------------------------------------------------------------------------------------------------------------


def test_verify_in_one_part(world: worlds.World, background: Background) -> None:
    _fill(world)
    job_id = background.start("verify")
    background.burst()
    view = background.show(job_id)
    assert view["status"] == "finished", view
    assert view["result"] == {"instances": ORDERS, "transitions": ORDERS, "hot": ORDERS, "findings": 0}


def test_verify_in_many_parts_with_another_job_between(world: worlds.World, background: Background) -> None:
    """Each part ends after one slice; the second job does not wait for the end of the first."""
    _fill(world)
    first, second = background.start("verify"), background.start("verify", machine="order")
    worker = background.burst(environment={"STATECACHE_JOB_PART_SECONDS": "0.000001"})
    for job_id in (first, second):
        assert background.show(job_id)["result"]["instances"] == ORDERS, worker.printed
    assert worker.printed.count("statecache.verify continued") >= 6
    assert worker.printed.count("statecache.verify finished") == 2


def test_verify_finds_what_is_wrong(world: worlds.World, background: Background) -> None:
    world.start("good", ["pay"])
    world.start("bad", ["pay"])
    world.flush()
    key = world.keyspace.instance(world.partition_of("bad"), "order", "bad")
    kept = world.client.hget(key, "@")
    world.client.hset(key, "@", kept.replace(b"paid", b"lost"))
    try:
        job_id = background.start("verify")
        background.burst()
        view = background.show(job_id)
        assert view["result"]["findings"] == 1
        assert [found["address"] for found in view["progress"]["first_findings"]] == ["order:bad"]
    finally:
        world.client.hset(key, "@", kept)


def test_verify_of_many_large_differences_ends(world: worlds.World, background: Background) -> None:
    """Each is told with the whole data of both sides, in letters that JSON makes six times as long: the log has it all, the
    job's notes stay so small that its worker believes them and that they are shown."""
    ids = [f"o{number}" for number in range(120)]
    world.orders.start_many([(id, {"text": "\u00e4" * 2000}) for id in ids])
    world.flush()
    column = schema.checkpoints.c
    before = world.sql_copy()
    with world.durable.database.writer.begin() as connection:
        data = json.dumps({"text": "\u00f6" * 2000}, ensure_ascii=False)
        connection.execute(sa.update(schema.checkpoints).where(column.id.in_(ids)).values(data=data))
    try:
        job_id = background.start("verify")
        worker = background.burst(environment={"STATECACHE_JOB_PART_SECONDS": "0.000001"})
        view = background.show(job_id)
        assert view["status"] == "finished", view
        assert view["result"]["findings"] == 240, "each of them beside history, and beside Redis"
        told = view["progress"]["first_findings"]
        assert 10 <= len(told) <= 100
        assert all(found["detail"].endswith("(all of it is in the worker's log)") for found in told)
        assert worker.printed.count("\u00e4" * 2000) >= 120
    finally:
        world.sql_back(before)


def test_slices_go_on_from_any_cursor(world: worlds.World) -> None:
    """The slices behind each cursor are those that would have come anyway."""
    _fill(world)
    whole = list(verification.slices(world.cache))
    assert len(whole) >= 5
    assert sum(one.instances for one in whole) == sum(one.hot for one in whole) == ORDERS
    for place, one in enumerate(whole):
        if one.cursor is not None:
            assert list(verification.slices(world.cache, None, one.cursor)) == whole[place + 1 :]


# --- killed --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["jobs.begun=hang", "jobs.noted=hang@2", "jobs.noted=hang@5", "jobs.ended=hang"])
def test_kill_9_of_worker_and_horse(world: worlds.World, background: Background, place: str) -> None:
    """A job stops at a place, everything is killed there; another worker finds it abandoned, and ends it.

    Nothing is counted twice: what was noted is not done again.
    """
    _fill(world)
    job_id = background.start("verify")
    worker = background.worker("--no-scheduler", environment={"STATECACHE_FAILPOINT": place})
    _wait_hung(background, job_id, place, _horse(worker))
    worker.kill()
    assert background.show(job_id)["status"] == "started"
    _expire(background)
    assert background.show(job_id)["retries_left"] == "2"
    background.burst()
    view = background.show(job_id)
    assert view["status"] == "finished", view
    assert view["result"] == {"instances": ORDERS, "transitions": ORDERS, "hot": ORDERS, "findings": 0}


def _wait_hung(background: Background, job_id: str, place: str, horse: int) -> None:
    """Until the work-horse stands at its failpoint: its job has started, and it sleeps in ``pause``."""
    notes = int(place.partition("@")[2] or "1") if place.startswith("jobs.noted") else 0

    def hung() -> bool:
        view = background.show(job_id)
        cursors = len(view["progress"]) > 0 if notes else True
        return view["status"] == "started" and cursors and _sleeps(horse)

    wait_until(hung, f"the job at {place}", 60)


def _sleeps(pid: int) -> bool:
    """Whether a process stands in ``signal.pause``."""
    try:
        number = Path(f"/proc/{pid}/syscall").read_text().split()[0]
    except OSError:
        return False
    return number == _PAUSE


_PAUSE = {"x86_64": "34", "aarch64": "73"}[os.uname().machine]
"""The system call of ``signal.pause`` (ppoll on the latter)."""


@pytest.mark.parametrize("place", ["jobs.noted=hang@6"])  # fewer are left for the second work-horse
def test_kill_9_of_the_horse_alone(world: worlds.World, background: Background, place: str) -> None:
    """Its worker puts the job back, with what it had noted, and runs it again (RQ wrote back what the worker knew before)."""
    _fill(world)
    job_id = background.start("verify")
    worker = background.worker("--no-scheduler", environment={"STATECACHE_FAILPOINT": place})
    horse = _horse(worker)
    _wait_hung(background, job_id, place, horse)
    noted = background.show(job_id)["progress"]
    assert noted["cursor"]
    os.kill(horse, signal.SIGKILL)
    view = background.wait_over(job_id)
    assert view["result"] == {"instances": ORDERS, "transitions": ORDERS, "hot": ORDERS, "findings": 0}
    assert "statecache.verify retried" in worker.printed
    assert worker.alive


@pytest.mark.parametrize("place", ["jobs.begun=hang", "jobs.noted=hang", "jobs.ended=hang"])
def test_kill_9_in_an_eviction(world: worlds.World, background: Background, place: str) -> None:
    """Killed before it began, after it evicted and noted, and before it said so: the next one evicts what is left."""
    _fill(world, 20)
    job_id = background.start("evict", idle_seconds=0.0)
    worker = background.worker("--no-scheduler", environment={"STATECACHE_FAILPOINT": place})
    _wait_hung(background, job_id, "", _horse(worker))
    worker.kill()
    evicted = sum(not world.is_hot(f"o{number}") for number in range(20))
    assert evicted == (0 if place.startswith("jobs.begun") else 20)
    _expire(background)
    background.burst()
    view = background.show(job_id)
    assert (view["status"], view["result"]["evicted"]) == ("finished", 20)
    assert not any(world.is_hot(f"o{number}") for number in range(20))
    assert world.orders.transition("o0", "pay").version == 2


@pytest.mark.parametrize("place", ["jobs.begun=hang", "jobs.noted=hang", "jobs.noted=hang@2", "jobs.ended=hang"])
def test_kill_9_in_an_export(world: worlds.World, background: Background, tmp_path: Path, place: str) -> None:
    """Killed at each stage, and run again: the file is whole, each transition in it once, and no part of one is left."""
    _fill(world)
    folder = tmp_path / "exports"
    settings = {"STATECACHE_EXPORT_DIR": str(folder)}
    job_id = background.start("export", machine="order", file="orders.csv")
    worker = background.worker("--no-scheduler", environment={**settings, "STATECACHE_FAILPOINT": place})
    _wait_hung(background, job_id, "", _horse(worker))
    worker.kill()
    _expire(background)
    background.burst(environment=settings)
    view = background.show(job_id)
    assert (view["status"], view["result"]["transitions"]) == ("finished", ORDERS)
    with (folder / "orders.csv").open() as lines:
        rows = [(row["id"], row["version"]) for row in csv.DictReader(lines)]
    assert sorted(rows) == sorted((f"o{number}", "1") for number in range(ORDERS))
    assert [one.name for one in folder.iterdir()] == ["orders.csv"]


def test_metrics_of_jobs(world: worlds.World, background: Background) -> None:
    """From a worker's live endpoint: what ended well, what failed, and a part whose work-horse was killed and tried again."""
    _fill(world)
    worker = background.worker(
        "--no-scheduler", "--metrics-port", "0", environment={"STATECACHE_FAILPOINT": "jobs.noted=die@6"}
    )
    port = wait_until(
        lambda: re.search(r"metrics at http://127\.0\.0\.1:(\d+)/metrics", worker.printed), "the port", 60
    )
    endpoint = int(port.group(1))
    assert background.wait_over(background.start("verify"))["status"] == "finished"
    failing = desk.start(background.queue, "retention", {}, retry_seconds=())
    assert background.wait_over(failing)["status"] == "failed"
    wanted = {
        ("statecache.verify", "retried"): 1.0,
        ("statecache.verify", "finished"): 1.0,
        ("statecache.retention", "failed"): 1.0,
    }
    wait_until(lambda: values(endpoint, "jobs_total").items() >= wanted.items(), "the outcomes to be counted", 60)
    assert values(endpoint, "job_seconds_count") == {("statecache.verify",): 2.0, ("statecache.retention",): 1.0}
    assert min(values(endpoint, "job_seconds_sum").values()) > 0


def test_worker_stops_between_jobs(world: worlds.World, background: Background) -> None:
    """SIGTERM: it ends with exit code 0, says goodbye, and its scheduler is gone."""
    worker = background.worker()
    wait_until(lambda: background.connection.exists(f"rq:scheduler-lock:{background.queue.name}"), "the scheduler", 60)
    # RQ starts the scheduler before it listens to signals: a worker that waits for jobs does.
    wait_until(lambda: [one.get_state() for one in rq.Worker.all(background.connection)] == ["idle"], "the worker", 60)
    children = worker.children
    worker.send(signal.SIGTERM)
    assert worker.wait() == 0, worker.printed
    processes.wait_until_ended([child.pid for child in children], "its scheduler")
    assert not background.connection.exists(f"rq:scheduler-lock:{background.queue.name}")
    assert "Traceback" not in worker.printed


def test_signal_during_maintenance_stops_the_worker(
    redis_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM while an idle worker does its maintenance: RQ's handler raises StopRequested there, which must get through."""

    def stopped(*_: object) -> None:
        raise StopRequested

    with queues.connected(redis_url) as connection:
        made = SafeWorker([queues.name_of(namespace)], connection, {})
        monkeypatch.setattr(queues, "sweep", stopped)
        with pytest.raises(StopRequested):
            made.run_maintenance_tasks()


@pytest.fixture
def handlers() -> Iterator[None]:
    """A worker in this process leaves its handlers of signals behind."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def test_signal_while_a_job_is_read_stops_the_worker_and_refuses_no_job(
    world: worlds.World, background: Background, monkeypatch: pytest.MonkeyPatch, handlers: None
) -> None:
    """SIGTERM comes while a taken job is looked at: RQ's StopRequested rises there. It was taken for a hostile job's doing: the
    job was refused, and the worker went on."""
    job_id = background.start("verify")
    original = queues._checked

    def interrupted(raw: Any) -> Any:
        monkeypatch.setattr(queues, "_checked", original)
        raise StopRequested

    monkeypatch.setattr(queues, "_checked", interrupted)
    made = SafeWorker([background.queue.name], background.connection, {})
    assert not made.work(burst=True)
    assert desk.show(background.queue, job_id)["status"] == "queued"


def test_signal_that_is_lost_stops_the_worker_with_its_next_heartbeat(
    redis_url: str, namespace: str, handlers: None
) -> None:
    with queues.connected(redis_url) as connection:
        made = SafeWorker([queues.name_of(namespace)], connection, {}, maintenance_interval=1)
        original = made.check_for_suspension

        def lost(burst: bool) -> None:
            with contextlib.suppress(StopRequested):
                made.request_stop(signal.SIGTERM, None)
            original(burst)

        made.check_for_suspension = lost  # type: ignore[method-assign]
        assert not made.work()


def test_job_is_stopped_on_request(world: worlds.World, background: Background) -> None:
    job_id = background.start("verify")
    worker = background.worker("--no-scheduler", environment={"STATECACHE_FAILPOINT": "jobs.begun=hang"})
    horse = _horse(worker)
    _wait_hung(background, job_id, "jobs.begun=hang", horse)
    assert desk.cancel(background.queue, job_id) == "stopping"
    assert background.wait_over(job_id)["status"] == "stopped"
    assert worker.alive


# --- dead letters --------------------------------------------------------------------------------------------------------


def test_letters_are_tried_again(world: worlds.World, background: Background) -> None:
    """What SQL accepts now goes into history; what it still refuses stays, and stops nothing."""
    for id in ("a", "b", "c"):
        world.start(id, ["pay"])
    world.flush()
    refusing.refuse(world.durable)
    for id in ("a", "b", "c"):
        world.orders.transition(id, "note", reason=refusing.REASON)
    world.flush()
    job_id = background.start("retry-letters")
    background.burst()
    assert background.show(job_id)["result"] == {"moved": 0, "kept": 3}
    refusing.accept(world.durable)
    job_id = background.start("retry-letters")
    background.burst(environment={"STATECACHE_JOB_PART_SECONDS": "0.000001"})
    assert background.show(job_id)["result"] == {"moved": 3, "kept": 0}
    assert [world.versions(id) for id in ("a", "b", "c")] == [[1, 2, 3]] * 3


# --- eviction, retention, export -----------------------------------------------------------------------------------------


def test_eviction_and_warming(world: worlds.World, background: Background) -> None:
    _fill(world, 20)
    job_id = background.start("evict", idle_seconds=0.0)
    background.burst()
    assert background.show(job_id)["result"] == {"evicted": 20, "above": 0, "more": False}
    assert not world.is_hot("o0")
    job_id = background.start("warm", limit=15)
    background.burst()
    assert background.show(job_id)["result"]["warmed"] == 15
    job_id = background.start("warm")
    background.burst(environment={"STATECACHE_JOB_PART_SECONDS": "0.000001"})
    result = background.show(job_id)["result"]
    assert (result["warmed"], result["hot_already"], result["full"]) == (5, 15, False)
    assert world.is_hot("o0")


def test_retention_and_export(world: worlds.World, background: Background, tmp_path: Path) -> None:
    for number in range(10):
        world.start(f"o{number}", ["pay", "ship", "deliver"])
    world.flush()
    folders = {
        "STATECACHE_RETENTION_ARCHIVE_DIR": str(tmp_path / "archive"), "STATECACHE_EXPORT_DIR": str(tmp_path / "exports"),
        "STATECACHE_RETENTION_AGE_DAYS": "0.000000001", "STATECACHE_JOB_PART_SECONDS": "0.000001",
    }  # fmt: skip
    exported = background.start("export", machine="order", file="orders.csv.gz")
    background.burst(environment=folders)
    assert background.show(exported)["result"]["transitions"] == 40
    with gzip.open(tmp_path / "exports" / "orders.csv.gz", "rt") as lines:
        assert len(list(csv.DictReader(lines))) == 40
    retained = background.start("retention")
    background.burst(environment=folders)
    assert background.show(retained)["result"] == {
        "instances": 10,
        "transitions": 30,
        "damaged": [],
    }, background.show(retained)
    assert len(world.orders.history("o3")) == 2
    refused = background.start("retention", older_than_days=0.0)
    hostile = background.raw_job(
        "hostile",
        data=b'["statecache.export", null, [], {"machine": "order", "file": "../orders.csv"}]',
        retries_left="3",
    )
    worked = background.burst(environment=folders)
    assert "retried after" not in worked.printed  # it would be the same each time
    for job_id in (refused, hostile):
        view = background.show(job_id)
        assert (view["status"], "is refused" in view["error"]) == ("failed", True), view


def test_export_goes_on_from_any_step(world: worlds.World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed export has written behind its last noted step is cut off; the file is the same in the end."""
    monkeypatch.setattr(exporting, "_STEP_INSTANCES", 3)
    for number in range(10):
        world.start(f"o{number}", ["pay"], note="=1+1")
    world.flush()
    for kind in ("jsonl", "csv", "csv.gz"):
        whole = tmp_path / f"whole.{kind}"
        steps = list(exporting.run(world.cache, "order", whole))
        assert steps[-1] == exporting.Step(20, whole.stat().st_size, None)
        for place in range(len(steps) - 1):
            path = tmp_path / f"killed.{kind}"
            run = exporting.run(world.cache, "order", path)
            seen = [next(run) for _ in range(place + 1)]
            run.close()
            assert not path.exists()
            with (tmp_path / f".killed.{kind}.part").open("ab") as file:
                file.write(b"half a li")
            list(exporting.run(world.cache, "order", path, seen[-1]))
            assert path.read_bytes() == whole.read_bytes()
            path.unlink()
    assert b"'=1+1" not in (tmp_path / "whole.jsonl").read_bytes()


def test_export_steps_end_where_their_bytes_are_enough(
    world: worlds.World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a history that is longer than what may wait in memory some is in the file before its instance's step; killed there,
    it is cut off."""
    for id in ("a", "b", "c"):
        world.start(id, ["pay", *["note"] * 8])
    world.flush()
    whole = {kind: tmp_path / f"whole.{kind}" for kind in ("jsonl", "csv.gz")}
    for path in whole.values():
        assert len(list(exporting.run(world.cache, "order", path))) == 1
    monkeypatch.setattr(exporting, "_STEP_BYTES_MAX", 500)
    monkeypatch.setattr(exporting, "_WAITING_BYTES_MAX", 300)
    for kind, told in whole.items():
        read = gzip.decompress if kind.endswith(".gz") else bytes
        path = tmp_path / f"steps.{kind}"
        run = exporting.run(world.cache, "order", path)
        first = next(run)
        assert (first.transitions, first.after) == (10, "a")
        next(run)
        run.close()
        rest = [(step.transitions, step.after) for step in exporting.run(world.cache, "order", path, first)]
        assert rest == [(20, "b"), (30, None)]
        assert read(path.read_bytes()) == read(told.read_bytes())


def test_export_begins_anew_where_its_file_is_shorter_than_its_note(
    world: worlds.World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The note was kept, the bytes were not."""
    monkeypatch.setattr(exporting, "_STEP_INSTANCES", 3)
    for number in range(10):
        world.start(f"o{number}", ["pay"])
    world.flush()
    for kind in ("jsonl", "csv.gz"):
        whole, path = tmp_path / f"whole.{kind}", tmp_path / f"cut.{kind}"
        list(exporting.run(world.cache, "order", whole))
        run = exporting.run(world.cache, "order", path)
        seen = [next(run) for _ in range(2)][-1]
        run.close()
        with (tmp_path / f".cut.{kind}.part").open("r+b") as file:
            file.truncate(seen.bytes - 1)
        assert list(exporting.run(world.cache, "order", path, seen))[-1].transitions == 20
        assert path.read_bytes() == whole.read_bytes()


def test_two_exports_into_one_file(world: worlds.World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second, begun while the first is under way, is refused and leaves its file alone; so is one that opened the file
    before the first ended. Those with marks of their own each write a whole file."""
    monkeypatch.setattr(exporting, "_STEP_INSTANCES", 3)
    for number in range(10):
        world.start(f"o{number}", ["pay"])
    world.flush()
    folder = tmp_path / "out"
    folder.mkdir()
    whole, path = folder / "whole.jsonl", folder / "orders.jsonl"
    list(exporting.run(world.cache, "order", whole))
    first = exporting.run(world.cache, "order", path)
    next(first)
    with pytest.raises(errors.UnavailableError, match="another export is writing"):
        next(exporting.run(world.cache, "order", path))
    with (
        worlds.before_call(fcntl, "flock", lambda: list(first)),
        pytest.raises(errors.UnavailableError, match="has just ended"),
    ):
        next(exporting.run(world.cache, "order", path))
    assert path.read_bytes() == whole.read_bytes()
    one, two = (exporting.run(world.cache, "order", path, mark=mark) for mark in ("one", "two"))
    seen = next(one)
    one.close()
    next(two)
    world.start("a-new-one")
    world.flush()
    assert list(exporting.run(world.cache, "order", path, seen, mark="one"))[-1].after is None
    assert path.read_bytes() == whole.read_bytes()
    list(two)
    assert path.read_bytes() == whole.read_bytes()
    assert sorted(folder.iterdir()) == [path, whole]


def test_export_removes_what_was_left_long_ago(world: worlds.World, tmp_path: Path) -> None:
    world.start("o1")
    world.flush()
    folder = tmp_path / "out"
    folder.mkdir()
    old, new, other = (folder / f".{name}.part" for name in ("orders.jsonl.1", "orders.jsonl.2", "others.jsonl.1"))
    for part in (old, new, other):
        part.write_text("left")
    for part in (old, other):
        os.utime(part, (time.time() - 90_000,) * 2)
    list(exporting.run(world.cache, "order", folder / "orders.jsonl"))
    assert sorted(folder.iterdir()) == sorted([new, other, folder / "orders.jsonl"])


@pytest.mark.parametrize("kind", ["jsonl", "csv.gz"])
def test_export_that_fails_leaves_only_what_can_be_gone_on_with(
    world: worlds.World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The disk is full at the third step: of a job the first two stay, of an export that nobody goes on with nothing."""
    monkeypatch.setattr(exporting, "_STEP_INSTANCES", 3)
    for number in range(10):
        world.start(f"o{number}", ["pay"])
    world.flush()
    folder = tmp_path / "out"
    folder.mkdir()
    whole, path = tmp_path / f"whole.{kind}", folder / f"orders.{kind}"
    list(exporting.run(world.cache, "order", whole))
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for mark, steps in (("", 2), ("", 0), ("job", 0), ("job", 2)):
        seen: list[exporting.Step] = []
        with monkeypatch.context() as patch:
            patch.setattr(exporting, "_written", mock.Mock(side_effect=_some(exporting._written, steps, full)))
            with pytest.raises(OSError, match="No space left"):
                seen.extend(exporting.run(world.cache, "order", path, mark=mark))
        assert len(seen) == steps
        left = {part.name: part.stat().st_size for part in folder.iterdir()}
        assert left == ({f".orders.{kind}.job.part": seen[-1].bytes} if mark and seen else {})
    list(exporting.run(world.cache, "order", path, seen[-1], mark="job"))
    assert path.read_bytes() == whole.read_bytes()


def _some(original: Callable[..., Any], count: int, error: Exception) -> Callable[..., Any]:
    """A function that works some times, and then fails."""
    left = iter(range(count))

    def some(*arguments: Any) -> Any:
        if next(left, None) is None:
            raise error
        return original(*arguments)

    return some


def test_export_that_no_file_has_room_for(world: worlds.World, tmp_path: Path) -> None:
    """A process whose files may not grow: the command fails, names the reason, and leaves nothing hidden behind."""
    world.orders.start_many([(f"o{number}", {"note": "x" * 300}) for number in range(2000)])
    world.flush()
    folder = tmp_path / "out"
    folder.mkdir()
    place = ("--redis-url", world.redis_url, "--database-url", world.database_url, "--namespace", world.namespace)
    done = subprocess.run(
        command.words("export", "order", folder / "orders.jsonl", *place),
        cwd=command.REPOSITORY, env=command.environment(), capture_output=True, text=True, check=False, timeout=90,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)),
    )  # fmt: skip
    assert done.returncode != 0
    assert "File too large" in done.stderr
    assert not list(folder.iterdir())


def test_export_is_on_the_disk_before_a_step_is_told(
    world: worlds.World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "_STEP_INSTANCES", 3)
    flushed = [0]
    flush = os.fsync

    def watched(handle: int) -> None:
        flush(handle)
        flushed.append(os.fstat(handle).st_size)

    monkeypatch.setattr(os, "fsync", watched)
    for number in range(10):
        world.start(f"o{number}")
    world.flush()
    for step in exporting.run(world.cache, "order", tmp_path / "orders.jsonl"):
        assert flushed[-1] == step.bytes


# --- the door ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "error"),
    [
        ("os.system", {}, errors.NotFoundError),
        ("verify", {"machine": 7}, errors.InvalidDataError),
        ("verify", {"machin": "order"}, errors.InvalidDataError),
        ("retention", {"older_than_days": -1.0}, errors.InvalidDataError),
        ("retention", {"older_than_days": float("nan")}, errors.InvalidDataError),
        ("warm", {"limit": -1}, errors.InvalidDataError),
        ("warm", {"partitions": "1;2"}, errors.InvalidDataError),
        ("export", {"machine": "order", "file": "../orders.csv"}, errors.InvalidDataError),
    ],
)
def test_what_cannot_be_started(
    world: worlds.World, background: Background, name: str, arguments: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        background.start(name, **arguments)
    assert len(background.queue) == 0


def test_arguments_are_checked_by_the_worker_too(world: worlds.World, background: Background) -> None:
    job_id = background.raw_job("wrong", data=b'["statecache.verify", null, [], {"machine": [1]}]', retries_left="0")
    background.burst()
    view = background.show(job_id)
    assert view["status"] == "failed"
    assert "must be str" in view["error"]


def test_words_of_the_command_line() -> None:
    assert jobs.parsed(jobs.verify, {"machine": "order"}) == {"machine": "order"}
    with pytest.raises(errors.InvalidDataError, match="argument 'x' is refused: there are machine"):
        jobs.parsed(jobs.verify, {"x": "1"})
