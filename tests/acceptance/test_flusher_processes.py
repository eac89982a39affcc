"""``statecache flusher`` as a fleet: real processes that join, leave, die, stand still; and what systemd is told of them."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis
import sqlalchemy as sa

from statecache import Move, StateCache, StateMachine
from statecache.durable import engine, recoveries
from statecache.engine import recovery
from tests.acceptance.command import REPOSITORY, environment, run_here, words
from tests.support import processes, servers, worlds
from tests.support.waiting import wait_until
from workers import flusher as worker
from workers.notify import Notifier

ORDER = REPOSITORY / "config" / "machines" / "order.yaml"
UNIT = REPOSITORY / "config" / "systemd" / "statecache-flusher.service"
PARTITIONS = 16


class Flusher(processes.Process):
    """A ``statecache flusher``; its output is in ``log``."""

    def __init__(self, folder: Path, number: int, *arguments: str, **variables: str) -> None:
        self.log = folder / f"flusher{number}.log"
        super().__init__(
            words("flusher", *arguments),
            self.log,
            cwd=REPOSITORY,
            env=environment(PYTHONUNBUFFERED="1", **variables),
        )

    @property
    def printed(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def wait(self, timeout_seconds: float = 60.0) -> int:
        return self._popen.wait(timeout_seconds)


class Fleet:
    """A store, some flusher processes of it, and a client that does not flush."""

    def __init__(self, redis_url: str, database_url: str, namespace: str, folder: Path) -> None:
        self.where = ["--redis-url", redis_url, "--database-url", database_url, "--namespace", namespace]
        self.folder = folder
        self.cache = StateCache.connect(redis_url, database_url, namespace)
        self.orders = self.cache.machine(StateMachine.load(ORDER))
        self.flushers: list[Flusher] = []
        self.started = 0

    def add(self, count: int = 1, **variables: str) -> list[Flusher]:
        more = [Flusher(self.folder, len(self.flushers) + place, *self.where, **variables) for place in range(count)]
        self.flushers += more
        return more

    def shares(self) -> dict[int, list[int]]:
        """The partitions of each living flusher, by process id, as ``statecache status --json`` tells it."""
        document = run_here("status", "--json", *self.where).document
        return {one["pid"]: one["partitions"] for one in document["flushers"] if one["alive"]}

    def are_shared(self, *flushers: Flusher) -> bool:
        """Whether exactly these hold all partitions, evenly."""
        shares = self.shares()
        sizes = [len(one) for one in shares.values()]
        return (
            set(shares) == {one.pid for one in flushers}
            and sorted(itertools.chain(*shares.values())) == list(range(PARTITIONS))
            and max(sizes) - min(sizes) <= 1
        )

    def wait_until_shared(self, *flushers: Flusher) -> None:
        wait_until(lambda: self.are_shared(*flushers), f"{len(flushers)} flushers share everything", 60, 0.1)

    def stand_still(self, one: Flusher) -> None:
        """SIGSTOP, wherever it is; but not in the midst of a transaction of SQLite's, whose one lock would stop everybody."""
        url = sa.engine.make_url(self.cache.database_url)

        def is_free() -> bool:
            one.send(signal.SIGSTOP)
            if url.get_backend_name() != "sqlite":
                return True
            with contextlib.closing(sqlite3.connect(str(url.database), timeout=0.0, isolation_level=None)) as probe:
                try:
                    probe.execute("BEGIN IMMEDIATE")
                except sqlite3.OperationalError:  # by this one, or by another for a moment
                    one.send(signal.SIGCONT)
                    return False
                return True

        wait_until(is_free, "a moment in which nobody writes to SQLite", 60, 0.003)

    def write(self, count: int = 200) -> None:
        """Start so many orders and pay them."""
        ids = [f"o{self.started + number}" for number in range(count)]
        self.started += count
        assert not [one for one in self.orders.start_many(ids) if isinstance(one, Exception)]
        assert not [
            one for one in self.orders.transition_many([Move(id, "pay") for id in ids]) if isinstance(one, Exception)
        ]

    def wait_until_flushed(self, timeout_seconds: float = 60.0) -> None:
        wait_until(
            lambda: self.orders.counts() == {"paid": self.started}, "everything is in SQL", timeout_seconds, 0.05
        )

    def wait_until_begun(self, *flushers: Flusher) -> None:
        """Until all of them run, and something is in SQL."""
        wait_until(
            lambda: all("flushing as" in one.printed for one in flushers) and sum(self.orders.counts().values()) > 0,
            "the first ones move",
            60,
        )

    def check(self) -> None:
        """Everything written is in SQL once, and nothing else."""
        self.wait_until_flushed()
        found = run_here("verify", "--json", *self.where)
        assert (found.code, found.document["transitions"]) == (0, 2 * self.started), found.out

    def close(self) -> None:
        for one in self.flushers:
            if one.alive:
                one.end(signal.SIGTERM, signal.SIGKILL)
        self.cache.close()


@pytest.fixture
def fleet(redis_url: str, database_url: str, namespace: str, tmp_path: Path) -> Iterator[Fleet]:
    made = Fleet(redis_url, database_url, namespace, tmp_path)
    yield made
    made.close()


@contextlib.contextmanager
def writing(fleet: Fleet) -> Iterator[None]:
    """Write all the while, from a thread, at a pace that leaves the machine to the flushers."""
    stop = threading.Event()

    def write() -> None:
        while not stop.wait(0.05):  # some hundred a second: enough that every batch has something in it
            fleet.write(20)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(60)
    assert not thread.is_alive()


def test_three_share_one_dies_one_leaves_one_joins(fleet: Fleet) -> None:
    """Under load: three share 16 partitions; kill -9 one, the others take its part; SIGTERM one, the last takes all; another
    joins. No transition is missing or doubled, and nobody says a word of trouble."""
    first, second, third = fleet.add(3)
    with writing(fleet):
        fleet.wait_until_shared(first, second, third)
        second.end(signal.SIGKILL)
        fleet.wait_until_shared(first, third)
        first.send(signal.SIGTERM)
        assert first.wait() == 0
        assert "handed over, flushers that go on: 1" in first.printed
        fleet.wait_until_shared(third)
        (fourth,) = fleet.add()
        fleet.wait_until_shared(third, fourth)
    fleet.check()
    for one in (first, third, fourth):
        assert "WARNING" not in one.printed
        assert "ERROR" not in one.printed
        assert "Traceback" not in one.printed


def test_status_shows_who_flushes_what(fleet: Fleet) -> None:
    assert "none is running" in run_here("status", *fleet.where).out
    (one,) = fleet.add()
    fleet.wait_until_shared(one)
    told = run_here("status", "--json", *fleet.where).document["flushers"]
    assert (told[0]["pid"], told[0]["alive"], told[0]["partitions"]) == (one.pid, True, list(range(PARTITIONS)))
    assert told[0]["name"] in one.printed
    assert told[0]["started_at"].startswith("20")
    assert "0-15" in run_here("status", *fleet.where).out


def test_a_stopped_holder_that_wakes_does_no_harm(fleet: Fleet) -> None:
    """SIGSTOP in the middle of its work - its leases end, the other takes everything and flushes - SIGCONT: what it had in its
    hands is refused, it gets its half back, SQL has everything once."""
    stopped, other = fleet.add(2, STATECACHE_LEASE_SECONDS="1")
    fleet.wait_until_shared(stopped, other)
    for _ in range(2):
        with writing(fleet):
            wait_until(lambda: fleet.orders.counts().get("paid", 0) > 0, "the load has begun")
            fleet.stand_still(stopped)
            fleet.wait_until_shared(other)
        fleet.wait_until_flushed()
        with writing(fleet):
            stopped.send(signal.SIGCONT)
            fleet.wait_until_shared(stopped, other)
        fleet.check()


@pytest.mark.postgres
def test_a_holder_that_stands_still_in_the_midst_of_a_copy(
    redis_url: str, postgres_url: str, postgres_server: servers.PostgresServer, namespace: str, tmp_path: Path
) -> None:
    """The one moment at which PostgreSQL's own limits do not hold: the other one ends that session, and moves everything."""
    copying = "SELECT pid FROM pg_stat_activity WHERE query LIKE 'COPY statecache%' AND wait_event = 'ClientRead'"
    with (
        contextlib.closing(Fleet(redis_url, postgres_url, namespace, tmp_path)) as fleet,
        postgres_server.connect(postgres_url.rpartition("/")[2]) as look,
    ):
        frozen, other = fleet.add(2, STATECACHE_LEASE_SECONDS="1")
        fleet.wait_until_shared(frozen, other)

        def is_copying() -> bool:
            frozen.send(signal.SIGSTOP)
            for _ in range(5):  # the other one's COPY is over sooner
                if not look.execute(copying).fetchall():
                    frozen.send(signal.SIGCONT)
                    return False
                time.sleep(0.02)
            return True

        with writing(fleet):
            wait_until(is_copying, "a COPY", 60, 0.003)
            fleet.wait_until_shared(other)
        fleet.wait_until_flushed()
        assert "stood still" in other.printed
        frozen.send(signal.SIGCONT)
        fleet.wait_until_shared(frozen, other)
        fleet.check()


@pytest.mark.postgres
def test_sql_goes_away_and_comes_back(
    private_postgres: servers.PostgresServer, redis_url: str, namespace: str, tmp_path: Path
) -> None:
    url = private_postgres.url(private_postgres.create_database())
    with contextlib.closing(Fleet(redis_url, url, namespace, tmp_path)) as fleet:
        first, second = fleet.add(2, STATECACHE_LEASE_SECONDS="1")
        fleet.wait_until_shared(first, second)
        fleet.write()
        fleet.wait_until_flushed()
        private_postgres.kill()
        fleet.write()
        wait_until(lambda: all("flush failed" in one.printed for one in (first, second)), "both have noticed")
        private_postgres.start()
        fleet.wait_until_flushed()
        fleet.wait_until_shared(first, second)
        fleet.check()


# --- stopping ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2])
def test_the_last_one_drains_the_backlog(fleet: Fleet, count: int) -> None:
    """4,000 transitions wait, in batches of 100; SIGTERM comes, to all at the same time, while the first ones move: they end
    with 0, and all is in SQL."""
    fleet.write(2000)
    flushers = fleet.add(count, STATECACHE_FLUSH_BATCH_ENTRIES="100", STATECACHE_DRAIN_TIMEOUT_SECONDS="60")
    fleet.wait_until_begun(*flushers)
    for one in flushers:
        one.send(signal.SIGTERM)
    for one in flushers:
        assert one.wait() == 0, one.printed
        assert "before everything was flushed" not in one.printed
    assert fleet.orders.counts() == {"paid": 2000}
    assert fleet.shares() == {}
    fleet.check()


@pytest.mark.postgres
def test_draining_ends_when_its_time_is_over(
    private_postgres: servers.PostgresServer, redis_url: str, namespace: str, tmp_path: Path
) -> None:
    """SQL is away for good: the end comes all the same, with code 0 and a word of what is left."""
    url = private_postgres.url(private_postgres.create_database())
    with contextlib.closing(Fleet(redis_url, url, namespace, tmp_path)) as fleet:
        (one,) = fleet.add(STATECACHE_DRAIN_TIMEOUT_SECONDS="1")
        fleet.wait_until_shared(one)
        private_postgres.kill()
        fleet.write()
        one.send(signal.SIGINT)
        assert one.wait() == 0, one.printed
        assert "the log keeps the rest" in one.printed
        private_postgres.start()
        fleet.cache.flush()
        fleet.check()


# --- systemd -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Callable[[], list[str]]]:
    """A real notification socket at ``tmp_path / "notify"``; call it for the lines that have come since."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.setblocking(False)

        def told() -> list[str]:
            lines: list[str] = []
            with contextlib.suppress(BlockingIOError):
                while True:
                    lines += listener.recv(4096).decode().split("\n")
            return lines

        yield told


def test_systemd_is_told(
    redis_url: str, sqlite_url: str, namespace: str, tmp_path: Path, systemd: Callable[[], list[str]]
) -> None:
    with contextlib.closing(Fleet(redis_url, sqlite_url, namespace, tmp_path)) as fleet:
        (one,) = fleet.add(NOTIFY_SOCKET=str(tmp_path / "notify"), WATCHDOG_USEC="200000")
        seen: list[str] = []

        def has(line: str) -> bool:
            seen.extend(systemd())
            return line in seen

        wait_until(lambda: has("READY=1"), "ready", 60)
        wait_until(lambda: has("WATCHDOG=1") and seen.count("WATCHDOG=1") > 3, "signs of life")
        wait_until(lambda: has("STATUS=16 of 16 partitions, 1 flushers; 0 transitions flushed"), "what it does", 30)
        assert seen.count("READY=1") == 1
        one.send(signal.SIGTERM)
        assert one.wait() == 0
        wait_until(lambda: has("STOPPING=1"), "stopping")


@pytest.mark.postgres
def test_a_loop_that_hangs_gives_no_sign_of_life(
    redis_url: str, postgres_url: str, namespace: str, tmp_path: Path, systemd: Callable[[], list[str]]
) -> None:
    """Somebody holds the partitions' rows: the loop stands in its transaction, and neither systemd nor SQL hear of it."""
    with contextlib.closing(Fleet(redis_url, postgres_url, namespace, tmp_path)) as fleet:
        plain = postgres_url.replace("postgresql+psycopg://", "postgresql://")
        (one,) = fleet.add(NOTIFY_SOCKET=str(tmp_path / "notify"), WATCHDOG_USEC="200000", STATECACHE_LEASE_SECONDS="1")
        fleet.wait_until_shared(one)
        with psycopg.connect(plain) as lock, psycopg.connect(plain, autocommit=True) as look:
            lock.execute("SELECT 1 FROM statecache_partitions FOR UPDATE")
            fleet.write(1)
            waits = "SELECT count(*) FROM pg_locks WHERE NOT granted"
            wait_until(lambda: look.execute(waits).fetchone() != (0,), "the loop hangs", 30)
            systemd()
            wait_until(lambda: fleet.shares() == {}, "its leases end", 30)
            assert "WATCHDOG=1" not in systemd()
        wait_until(lambda: "WATCHDOG=1" in systemd(), "it goes on", 30)
        fleet.wait_until_flushed()


def test_a_recovery_at_the_start_asks_for_time(
    redis_url: str, sqlite_url: str, namespace: str, tmp_path: Path, systemd: Callable[[], list[str]]
) -> None:
    with contextlib.closing(Fleet(redis_url, sqlite_url, namespace, tmp_path)) as fleet:
        fleet.write(10)
        fleet.cache.flush()
        with contextlib.closing(redis.Redis.from_url(redis_url)) as client:
            client.delete(*client.keys(f"{{{namespace}:*"))
        fleet.add(NOTIFY_SOCKET=str(tmp_path / "notify"), WATCHDOG_USEC="200000")
        seen: list[str] = []
        wait_until(lambda: seen.extend(systemd()) or "READY=1" in seen, "ready", 60)
        assert any(line.startswith("EXTEND_TIMEOUT_USEC=") for line in seen[: seen.index("READY=1")]), seen


def test_a_recovery_within_the_loop_gives_signs_of_life(
    redis_url: str,
    sqlite_url: str,
    namespace: str,
    tmp_path: Path,
    systemd: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SQL was restored from an older copy under a flusher that runs. What systemd hears between the recovery's first
    statement and its last one comes from within it, however long it takes."""
    monkeypatch.setattr(recovery, "_BEAT_SECONDS", 0.0)
    take, finish = recoveries.take, recoveries.finish
    heard: list[list[str]] = []

    def taking(*arguments: Any) -> None:
        systemd()
        take(*arguments)

    def finishing(*arguments: Any) -> None:
        heard.append(systemd())
        finish(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    with worlds.World(redis_url, sqlite_url, namespace) as world:
        for number in range(20):
            world.start(f"o{number}")
        world.flush()
        older = world.sql_copy()
        for number in range(20):
            world.orders.transition(f"o{number}", "pay")
        world.flush()
        world.sql_back(older)
        monkeypatch.setattr(recoveries, "take", taking)
        monkeypatch.setattr(recoveries, "finish", finishing)
        worker.run(world.cache, lambda *_: None, Notifier(str(tmp_path / "notify"), 0.000_001))
    assert len(heard) == 1
    assert heard[0].count("WATCHDOG=1") > 3


def test_the_unit_file_is_one(tmp_path: Path) -> None:
    """Checked by systemd itself where it is there; what the code relies on is looked at everywhere."""
    settings: dict[str, list[str]] = {}
    for line in UNIT.read_text(encoding="utf-8").splitlines():
        if "=" in line and not line.startswith("#"):
            name, _, value = line.partition("=")
            settings.setdefault(name, []).append(value)
    assert settings["Type"] == ["notify"]
    assert settings["Restart"] == ["always"]
    assert settings["RestartPreventExitStatus"] == ["2"]
    assert settings["ExecStart"][0].startswith("/usr/bin/env statecache flusher ")
    # A quarter of the time passes between two signs of life, and a transaction is given up 5 s behind its limit.
    assert 0.75 * float(settings["WatchdogSec"][0].removesuffix("s")) > engine.TRANSACTION_SECONDS_MAX + 5
    from statecache.settings import Settings

    drain = Settings.model_fields["drain_timeout_seconds"].default
    assert float(settings["TimeoutStopSec"][0].removesuffix("s")) > 2 * drain
    for unit in UNIT.parent.glob("*.service"):
        with contextlib.suppress(FileNotFoundError):
            checked = subprocess.run(
                ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False
            )
            complaints = [line for line in checked.stderr.splitlines() if unit.name in line]
            assert not complaints, complaints
