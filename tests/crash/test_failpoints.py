"""Every failpoint, armed by environment in a child process that really dies there, fails there, or stops there while others
go on (P1, P3, P4, P5, P6, P8, P9). Then it is started again, and the ledger, SQL, Redis and the reports are compared.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from statecache.core import errors, failpoints, model
from statecache.durable import recoveries
from statecache.engine import admission
from tests.crash import child, situations
from tests.support import processes, waiting, worlds

# name, count, situation, work
_PLACES = [
    ("admission.compared", 1, "fresh", "write"),
    ("admission.compared", 1, "restarted", "write"),
    ("admission.loaded", 1, "restarted", "write"),
    ("flusher.read", 2, "fresh", "write"),
    ("flusher.advanced", 1, "fresh", "write"),
    ("flusher.advanced", 2, "cold", "write"),
    ("flusher.written", 2, "fresh", "write"),
    ("flusher.committed", 1, "fresh", "write"),
    ("flusher.committed", 3, "cold", "write"),
    ("flusher.told", 2, "fresh", "write"),
    ("hydrate.looked_up", 1, "cold", "write"),
    ("hydrate.done", 1, "cold", "write"),
    ("hydrate.done", 2, "wiped", "write"),
    ("letters.moved", 1, "with_letters", "retry"),
    ("letters.moved", 1, "with_letters", "discard"),
    ("letters.moved", 1, "with_letters", "discard start"),
    ("recovery.taken", 1, "fresh", "recover"),
    ("recovery.taken", 1, "restarted", "write"),
    ("recovery.fenced", 1, "wiped", "write"),
    ("recovery.fenced", 2, "restarted", "write"),
    ("recovery.dropped", 1, "wiped", "write"),
    ("recovery.dropped", 2, "tail_lost", "write"),
    ("recovery.reconciled", 1, "sql_behind", "recover"),
    ("recovery.reconciled", 2, "sql_behind", "recover"),
    ("recovery.reconciled", 1, "diverged", "recover"),
    ("recovery.mended", 1, "tail_lost", "write"),
    ("recovery.reported", 1, "tail_lost", "write"),
    ("recovery.ready", 1, "wiped", "write"),
    ("recovery.ready", 2, "tail_lost", "write"),
    ("timeouts.read", 1, "timed_out", "time out"),
    ("timeouts.read", 2, "timed_out", "time out"),
    ("timeouts.fired", 1, "timed_out", "time out"),
]
_FIRST_OF_EACH = list({place[0]: place for place in reversed(_PLACES)}.values())
_OF_SEVERAL = ("flusher.", "recovery.", "timeouts.")
_TAKE_OVER = [place for place in _FIRST_OF_EACH if place[0].startswith(_OF_SEVERAL)]
_HOLD_SQL = ("flusher.advanced", "flusher.written")
"""Places inside an SQL transaction: on SQLite nobody else writes while the process lives."""


def test_every_failpoint_is_walked() -> None:
    of_jobs = {
        name for name in failpoints.NAMES if name.startswith(("jobs.", "retention."))
    }  # walked by tests of the jobs
    assert {place[0] for place in _PLACES} == set(failpoints.NAMES) - of_jobs
    assert {place[0] for place in _TAKE_OVER} == {name for name in failpoints.NAMES if name.startswith(_OF_SEVERAL)}


def test_what_cannot_be_armed() -> None:
    for text in ("no.such=die", "flusher.read", "flusher.read=explode", "flusher.read=die@x"):
        with pytest.raises(errors.ConfigurationError, match="STATECACHE_FAILPOINT"):
            failpoints.arm(text)
    failpoints.arm(None)
    failpoints.hit("no.such")


# --- the store under test ----------------------------------------------------------------------------------------------


class Store:
    """Where children work, and what the test knows of it."""

    def __init__(self, redis: Any, database_url: str, namespace: str, folder: Path) -> None:
        self.redis = redis
        self.database_url = database_url
        self.namespace = namespace
        self.ledger = child.Ledger(folder / "ledger")
        self.acknowledged: list[model.Receipt] = []
        self.discarded: frozenset[str] = frozenset()

    def prepare(self, situation: str) -> None:
        """Make a situation. ``restarted``: the server really was, its append-only file kept."""
        with situations.RecordingWorld(self.redis.url, self.database_url, self.namespace) as world:
            getattr(situations, situation)(world)
            self.acknowledged = world.acknowledged
        if situation == "restarted":
            self.redis.restart()

    def start(self, work: str, failpoint: str, *, stop: bool = False) -> Any:
        return child.start(
            child.Task(self.redis.url, self.database_url, self.namespace, self.ledger.path, work, failpoint, stop)
        )

    @contextmanager
    def world(self) -> Iterator[worlds.World]:
        with worlds.World(self.redis.url, self.database_url, self.namespace) as world:
            yield world

    def go_on(self, work: str) -> None:
        """Do all the work, as the process that is started after the dead one."""
        with self.world() as world:
            if work != "write":
                child.WORKS[work](world.cache, self.ledger)
            child.write(world.cache, self.ledger)

    def judge(self) -> None:
        """Compare everything with everything."""
        with self.world() as world:
            world.flush()
            world.verify()
            rows = list(world.durable.iterate_transitions("order"))
            self._histories_are_whole(rows)
            letter_ids = {
                letter.entry.transition_id
                for instance in world.durable.parked_instances()
                for letter in world.durable.letters(*instance)
            }
            by_id: dict[str, list[model.Transition]] = {}
            for row in rows:
                by_id.setdefault(row.transition_id, []).append(row)
            told = list(self.ledger.lines("ack"))
            for transition_id, version, state, entry_id in told:
                if transition_id in letter_ids:
                    continue
                [row] = by_id[transition_id]  # applied, and applied once
                assert (row.version, row.to_state, row.entry_id) == (version, state, entry_id), row
            for step in child.steps():
                assert len(by_id.get(step.transition_id, ())) == 1, step
            timed: dict[str, list[str]] = {}
            for row in world.durable.iterate_transitions("timed"):
                timed.setdefault(row.id, []).append(row.event)
            assert all(events == ["@start", "expire"] for events in timed.values()), timed  # none missed, none twice
            self._losses_are_reported(world, rows, {*by_id, *letter_ids})

    @staticmethod
    def _histories_are_whole(rows: list[model.Transition]) -> None:
        last: dict[str, int] = {}
        for row in rows:
            assert (row.covers_from or row.version) == last.get(row.id, 0) + 1, row
            last[row.id] = row.version

    def _losses_are_reported(self, world: worlds.World, rows: list[model.Transition], known: set[str]) -> None:
        """What was acknowledged before the situation and is nowhere now: covered, discarded, or inside a report."""
        covered = {
            (row.id, version) for row in rows if row.covers_from for version in range(row.covers_from, row.version + 1)
        }
        missing = [
            one
            for one in self.acknowledged
            if one.transition_id not in known and (one.id, one.version) not in covered and one.id not in self.discarded
        ]
        texts = [row.report for row in recoveries.recoveries(world.durable, limit=1000) if row.report]
        parts = [part for text in texts for part in msgspec.json.decode(text)["partitions"]]
        assert sum(part["lost_at_least"] for part in parts) <= len(missing)
        for one in missing:
            partition = world.partition_of(one.id)
            assert any(part["loss_possible"] for part in parts if part["partition"] == partition), one


@pytest.fixture(autouse=True)
def _dead_recoveries_are_superseded_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "HEARTBEAT_STALE_MS", child.STALE_MS)


@pytest.fixture
def make_store(request: pytest.FixtureRequest, namespace: str, tmp_path: Path) -> Iterator[Callable[[str, str], Store]]:
    made: list[Store] = []

    def make(situation: str, database: str) -> Store:
        # Only a situation that restarts the server needs one of its own.
        redis = request.getfixturevalue("private_redis" if situation == "restarted" else "shared_redis")
        store = Store(redis, request.getfixturevalue(f"{database}_url"), namespace, tmp_path)
        made.append(store)
        store.prepare(situation)
        return store

    yield make
    for store in made:
        store.ledger.close()


@pytest.fixture
def shared_redis(redis_server: Any, redis_url: str) -> Any:
    return redis_server


def _place_id(place: tuple[str, int, str, str]) -> str:
    return "{}@{} {} {}".format(*place).replace(" ", "-")


def _kinds(name: str) -> list[str]:
    return ["sqlite", "postgres"] if name.startswith("flusher.") else ["sqlite"]


def _cases(places: list[tuple[str, int, str, str]], *, postgres: bool) -> list[Any]:
    return [
        pytest.param(place, kind, id=f"{_place_id(place)}-{kind}", marks=[pytest.mark.postgres] * (kind == "postgres"))
        for place in places
        for kind in (_kinds(place[0]) if postgres else ["sqlite"])
    ]


# --- the walk ----------------------------------------------------------------------------------------------------------


def _discarded(store: Store, work: str) -> None:
    if work.startswith("discard"):
        with store.world() as world:
            id = situations.parked_id(world.cache) if work == "discard" else situations.refused_start(world.cache)
            store.discarded = frozenset([id])


@pytest.mark.parametrize(("place", "database"), _cases(_PLACES, postgres=True))
def test_dying_there(make_store: Callable[..., Store], place: tuple[str, int, str, str], database: str) -> None:
    """The process dies at the place, by SIGKILL, and is started again."""
    name, count, situation, work = place
    store = make_store(situation, database)
    process = store.start(work, f"{name}=die@{count}")
    process.join(60)
    assert process.exitcode == -signal.SIGKILL, f"{name} was not reached: exit code {process.exitcode}"
    _discarded(store, work)
    store.go_on(work)
    store.judge()


@pytest.mark.parametrize(("place", "database"), _cases(_FIRST_OF_EACH, postgres=False))
def test_failing_there(make_store: Callable[..., Store], place: tuple[str, int, str, str], database: str) -> None:
    """A step fails there with ``UnavailableError``; the same process goes on, as callers do."""
    name, count, situation, work = place
    store = make_store(situation, database)
    process = store.start(work, f"{name}=error@{count}")
    process.join(60)
    assert process.exitcode == 0
    _discarded(store, work)
    store.go_on(work)
    store.judge()


@pytest.mark.parametrize("place", _TAKE_OVER, ids=_place_id)
def test_hanging_there_while_another_takes_over(
    make_store: Callable[..., Store], request: pytest.FixtureRequest, place: tuple[str, int, str, str]
) -> None:
    """The process hangs at the place. Another one does all the work, without waiting for it to be ended by anybody.

    Inside an SQL transaction it is PostgreSQL that ends it (``idle_in_transaction_session_timeout``).
    """
    name, count, situation, work = place
    store = make_store(situation, "postgres" if name in _HOLD_SQL else "sqlite")
    process = store.start(work, f"{name}=hang@{count}")
    try:
        waiting.wait_until(lambda: list(store.ledger.lines("hanging")), f"{name} to be reached")
        store.go_on(work)
        store.judge()
        assert process.is_alive()
    finally:
        process.kill()
        process.join()


@pytest.mark.parametrize("place", _TAKE_OVER, ids=_place_id)
def test_going_on_there_after_another_took_over(
    make_store: Callable[..., Store], place: tuple[str, int, str, str]
) -> None:
    """A zombie: stopped (SIGSTOP) at the place, for so long that another one recovers, does all the work and flushes it;
    then it goes on where it was. Nothing that it still holds may get in (P6)."""
    name, count, situation, work = place
    store = make_store(situation, "postgres" if name in _HOLD_SQL else "sqlite")
    process = store.start(work, f"{name}=hang@{count}", stop=True)
    try:
        waiting.wait_until(
            lambda: processes.psutil.Process(process.pid).status() == "stopped" or not process.is_alive(),
            f"{name} to be reached",
        )
        with store.world() as world:
            world.cache.recover()
        store.go_on(work)
        before = _without_times(store)
        os.kill(process.pid, signal.SIGCONT)
        process.join(60)
        assert process.exitcode is not None
        assert work == "recover" or process.exitcode == 0  # an overtaken recoverer may give up
        assert _without_times(store)["statecache_transitions"] == before["statecache_transitions"]
        store.judge()
    finally:
        process.kill()
        process.join()


def _without_times(store: Store) -> dict[str, list[Any]]:
    with store.world() as world:
        return world.sql_dump()
