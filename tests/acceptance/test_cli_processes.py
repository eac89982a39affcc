"""Processes and their signals: the flusher, an import that is killed, the demo."""

from __future__ import annotations

import csv
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest

from statecache import StateCache
from tests.acceptance.command import REPOSITORY, Running, run, run_here
from tests.support import servers
from tests.support.waiting import wait_until

ORDER = REPOSITORY / "config" / "machines" / "order.yaml"


def count_of(url: str, table: str) -> int:
    import sqlalchemy as sa

    engine = sa.create_engine(url)
    try:
        with engine.connect() as connection:
            return int(connection.exec_driver_sql(f"SELECT count(*) FROM statecache_{table}").scalar() or 0)
    finally:
        engine.dispose()


class Blocked:
    """A flusher that stands in its transaction, because another connection holds every partition's row."""

    def __init__(self, postgres_url: str, redis_url: str, namespace: str, folder: Path) -> None:
        self.where = ["--redis-url", redis_url, "--database-url", postgres_url, "--namespace", namespace]
        self.cache = StateCache.connect(redis_url, postgres_url, namespace)
        from statecache import StateMachine

        self.orders = self.cache.machine(StateMachine.load(ORDER))
        self.plain_url = postgres_url.replace("postgresql+psycopg://", "postgresql://")
        self.lock = psycopg.connect(self.plain_url)
        self.lock.execute("SELECT 1 FROM statecache_partitions FOR UPDATE")
        self.orders.start_many([f"{number}" for number in range(200)])
        self.flusher = Running(folder, "flusher", *self.where)
        wait_until(self._is_waiting, "the flusher waits for the lock", 60)

    def _is_waiting(self) -> bool:
        with psycopg.connect(self.plain_url) as look:
            row = look.execute("SELECT count(*) FROM pg_locks WHERE NOT granted").fetchone()
        return bool(row and row[0])

    def release(self) -> None:
        self.lock.rollback()
        self.lock.close()

    def close(self) -> None:
        self.flusher.end(signal.SIGKILL)
        self.lock.close()
        self.cache.close()


@pytest.fixture
def blocked(postgres_url: str, redis_url: str, namespace: str, tmp_path: Path) -> Any:
    made = Blocked(postgres_url, redis_url, namespace, tmp_path)
    yield made
    made.close()


@pytest.mark.postgres
def test_the_first_sigterm_lets_the_flusher_finish_its_batch(blocked: Blocked, postgres_url: str) -> None:
    blocked.flusher.send(signal.SIGTERM)
    wait_until(lambda: "stopping when the batch" in blocked.flusher.printed, "the flusher has heard the signal")
    assert blocked.flusher.alive
    assert count_of(postgres_url, "transitions") == 0
    blocked.release()
    assert blocked.flusher.wait() == 0, blocked.flusher.printed
    assert count_of(postgres_url, "transitions") == 200
    assert "flushed 200 transitions" in blocked.flusher.printed


@pytest.mark.postgres
def test_the_second_sigterm_stops_the_flusher_now(blocked: Blocked, postgres_url: str) -> None:
    blocked.flusher.send(signal.SIGTERM)
    wait_until(lambda: "stopping when the batch" in blocked.flusher.printed, "the flusher has heard the signal")
    blocked.flusher.send(signal.SIGTERM)
    assert blocked.flusher.wait() == 128 + signal.SIGTERM, blocked.flusher.printed
    assert "Traceback" not in blocked.flusher.printed
    assert count_of(postgres_url, "transitions") == 0
    blocked.release()
    assert run_here("flusher", "--once", *blocked.where).code == 0
    assert count_of(postgres_url, "transitions") == 200


def test_an_import_killed_at_any_moment_goes_on_where_it_was(
    redis_url: str, sqlite_url: str, namespace: str, tmp_path: Path
) -> None:
    """SIGSTOP when some of it is there, so that it is surely under way; then SIGKILL, and the same command again."""
    cases, steps = 1500, 8
    log = tmp_path / "log.csv"
    with log.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "event", "at"])
        for step in range(steps):
            writer.writerows([f"c{case}", f"step {step}", f"2024-01-01T{step:02d}:00:00Z"] for case in range(cases))
    columns = ["--id", "case", "--event", "event", "--at", "at"]
    machine = tmp_path / "machine.yaml"
    assert run_here("machine", "learn", log, *columns, "--name", "steps", "--output", machine).code == 0
    command = ["import", log, "--machine", machine, *columns, "--redis-url", redis_url, "--database-url", sqlite_url]
    command += ["--namespace", namespace, "--json"]
    with StateCache.connect(redis_url, sqlite_url, namespace) as cache:
        before_kill: list[int] = []
        for wanted in (cases // 2, cases * 4):
            importing = Running(tmp_path, *command)
            wait_until(lambda: _entries(cache) >= wanted or not importing.alive, "the import is under way", 60)  # noqa: B023
            importing.send(signal.SIGSTOP)
            importing.end(signal.SIGKILL)
            assert importing.wait() == -signal.SIGKILL, importing.printed
            before_kill.append(_entries(cache))
        assert before_kill[0] < before_kill[1] < cases * (steps + 1)
        done = run(*command)
        assert done.code == 0, done.err
        told = done.document
        assert told["transitions"] + told["duplicates"] == told["rows"] == cases * steps
        assert told["duplicates"] > 0
        assert told["starts"] + told["starts_found"] == cases
        assert count_of(sqlite_url, "transitions") == cases * (steps + 1)
        again = run_here(*command).document
        assert (again["transitions"], again["starts"], again["duplicates"]) == (0, 0, cases * steps)
        assert cache.machine("steps").counts() == {f"step_{steps - 1}": cases}
        histories = cache.machine("steps").history("c17")
    assert [row.event for row in histories] == ["@start", *(f"step_{step}" for step in range(steps))]
    verified = run_here(
        "verify", "--redis-url", redis_url, "--database-url", sqlite_url, "--namespace", namespace, "--json"
    )
    assert (verified.code, verified.document["transitions"]) == (0, cases * (steps + 1))


def _entries(cache: StateCache) -> int:
    """How many transitions were made so far: what SQL has, and what the logs have behind it."""
    from statecache import StateCacheError
    from statecache.engine import status

    try:
        found = status.status(cache)
    except StateCacheError:
        return 0
    return sum(entry_seq(one.tail) for one in found.partitions)


def entry_seq(tail: str | None) -> int:
    return int((tail or "0-0").split("-")[1])


def test_an_import_without_its_server_ends_with_code_3_and_says_how_to_go_on(
    start_redis: Callable[..., servers.ValkeyServer], sqlite_url: str, tmp_path: Path
) -> None:
    """The server dies while the import stands still; the import gives up after its patience, and goes on when told again."""
    server = start_redis(appendfsync="always")
    log = tmp_path / "log.csv"
    rows = "".join(
        f"c{case},{event},2024-01-01T0{hour}:00Z\n"
        for hour, event in enumerate(("pay", "ship"))
        for case in range(3000)
    )
    log.write_text("case,event,at\n" + rows)
    columns = ["--id", "case", "--event", "event", "--at", "at"]
    where = ["--redis-url", server.url, "--database-url", sqlite_url]
    command = ["import", log, "--machine", ORDER, *columns, *where, "--patience", "1"]
    with StateCache.connect(server.url, sqlite_url) as cache:
        importing = Running(tmp_path, *command)
        wait_until(lambda: _entries(cache) > 500 or not importing.alive, "the import is under way", 60)
        importing.send(signal.SIGSTOP)
    server.kill()
    importing.send(signal.SIGCONT)
    assert importing.wait() == 3, importing.printed
    assert "run the same command again to go on" in importing.printed
    assert "Traceback" not in importing.printed
    server.start()
    assert run_here("recover", *where).code == 0
    done = run_here(*command, "--json")
    assert done.code == 0, done.err
    assert done.document["transitions"] + done.document["duplicates"] == 6000
    assert run_here("verify", *where).code == 0


def test_the_demo_holds_what_it_claims_and_leaves_nothing(tmp_path: Path) -> None:
    result = run("demo", "--orders", "300", "--folder", tmp_path)
    assert result.code == 0, result.out + result.err
    assert "all hold" in result.out
    assert "BROKEN" not in result.out
    assert "\x1b" not in result.out
    assert result.err == ""
    assert list(tmp_path.iterdir()) == []


def test_the_demo_tells_programs_its_figures(tmp_path: Path) -> None:
    result = run("demo", "--orders", "300", "--keep", "--folder", tmp_path, "--json")
    assert result.code == 0, result.out
    told = result.document
    assert told["ok"] is True
    assert len(told["claims"]) >= 10
    assert all(claim["ok"] for claim in told["claims"])
    figures = told["figures"]
    assert figures["survived"] == figures["flushed"] == figures["acknowledged"] - figures["lost"]
    assert figures["recovery"]["kinds"] == {"wiped": 16}
    assert [path.name for path in next(tmp_path.iterdir()).iterdir() if path.name == "statecache.db"] == [
        "statecache.db"
    ]


def test_ctrl_c_ends_the_demo_and_its_server(tmp_path: Path) -> None:
    from tests.support import processes

    demo = Running(tmp_path, "demo", "--orders", "100000", "--folder", tmp_path)
    wait_until(
        lambda: processes.mentioning(f"unixsocket:{tmp_path}") or "2. " in demo.printed, "the demo is under way", 60
    )
    wait_until(lambda: "2. " in demo.printed, "the load has begun", 60)
    os.kill(demo.pid, signal.SIGINT)
    assert demo.wait() == 130, demo.printed
    assert "Traceback" not in demo.printed
    processes.wait_until_ended([one.pid for one in processes.mentioning(str(tmp_path))], "its server ends")
    assert [path.name for path in tmp_path.iterdir()] == ["demo.log"]


def test_status_watch_prints_a_document_a_line_until_ctrl_c(
    redis_url: str, sqlite_url: str, namespace: str, tmp_path: Path
) -> None:
    where = ["--redis-url", redis_url, "--database-url", sqlite_url, "--namespace", namespace]
    assert run_here("flusher", "--once", *where).code == 0
    watching = Running(tmp_path, "status", "--watch", "--interval", "0.1", "--json", *where)
    wait_until(lambda: len(watching.documents()) >= 3, "three documents", 60)
    watching.send(signal.SIGINT)
    assert watching.wait() == 0, watching.printed
    assert {document["redis"] for document in watching.documents()} == {"ready"}
