"""Every point between two I/O steps of the flusher, of recovery and of ``dead-letters``, in each situation: die there, be
started again, and end where an undisturbed run ends (P3, P5, P8, P9, P10).

The situation is made once and frozen (a copy of Redis' keys and of the SQLite file); each death begins from that copy. What
must be the same afterwards: history, checkpoints, letters and counts in SQL, what a reader sees, and what the reports say was
lost, all recoveries together. Then every instance goes on, and no fork shows.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from statecache import StateCache
from statecache.core import errors
from statecache.durable import recoveries
from statecache.engine import admission, letters
from tests.crash import points, situations
from tests.support import worlds


class Scenario(NamedTuple):
    """``prepare`` makes the situation, ``run`` is what dies; ``repeat`` is what an operator does again after it.

    An operator runs recovery where nothing but he knows that SQL was restored, or that Redis was another for a while.
    """

    prepare: Callable[[worlds.World], None]
    run: Callable[[StateCache], object]
    repeat: Callable[[worlds.World], object] = lambda world: None


def once(
    act: Callable[[StateCache, str, str], object], id_of: Callable[[StateCache], str]
) -> Callable[[StateCache], object]:
    return lambda cache: act(cache, "order", id_of(cache))


def again(
    act: Callable[[StateCache, str, str], object], id_of: Callable[[StateCache], str]
) -> Callable[[worlds.World], None]:
    """The operator does it again; it may have been done before the death."""

    def repeat(world: worlds.World) -> None:
        id = id_of(world.cache)
        try:
            act(world.cache, "order", id)
        except errors.NotFoundError:
            assert world.durable.letters("order", id) == []

    return repeat


SCENARIOS = {
    "flush": Scenario(situations.mixed_batch, lambda cache: cache.flush()),
    "recover intact": Scenario(situations.intact, lambda cache: cache.recover()),
    "recover wiped": Scenario(situations.wiped, lambda cache: cache.recover()),
    "recover tail lost": Scenario(situations.tail_lost, lambda cache: cache.recover()),
    "recover SQL behind": Scenario(
        situations.sql_behind, lambda cache: cache.recover(), lambda world: world.cache.recover()
    ),
    "recover diverged": Scenario(
        situations.diverged, lambda cache: cache.recover(), lambda world: world.cache.recover()
    ),
    "recover diverged apart": Scenario(
        situations.diverged_apart, lambda cache: cache.recover(), lambda world: world.cache.recover()
    ),
    "retry letters": Scenario(
        situations.with_letters, once(letters.retry, situations.parked_id), again(letters.retry, situations.parked_id)
    ),
    "discard letters": Scenario(
        situations.with_letters,
        once(letters.discard, situations.parked_id),
        again(letters.discard, situations.parked_id),
    ),
    "discard a start": Scenario(
        situations.with_letters,
        once(letters.discard, situations.refused_start),
        again(letters.discard, situations.refused_start),
    ),
}


# --- freezing and thawing ----------------------------------------------------------------------------------------------


class Frozen:
    """A situation, to begin from as often as one likes."""

    def __init__(self, redis_url: str, folder: Path, namespace: str, scenario: Scenario) -> None:
        self.redis_url = redis_url
        self.folder = folder
        self.namespace = namespace
        self.scenario = scenario
        self._file = folder / "frozen.db"
        self._number = 0
        with worlds.World(redis_url, f"sqlite:///{self._file}", namespace) as world:
            scenario.prepare(world)
            self._redis = world.redis_copy()

    def thaw(self) -> str:
        """Make the situation anew; returns the URL of its database."""
        self._number += 1
        copy = self.folder / f"thawed{self._number}.db"
        shutil.copy(self._file, copy)
        self.redis_again()
        return f"sqlite:///{copy}"

    def redis_again(self) -> None:
        """Redis as it was when the situation was made, whatever has become of SQL since."""
        with worlds.redis.Redis.from_url(self.redis_url) as client:
            for key in client.scan_iter(match=f"{{{self.namespace}:*", count=1000):
                client.delete(key)
            for key, dumped in self._redis.items():
                client.restore(key, 0, dumped)

    def die(self, database_url: str, die_before: int | None) -> points.Points:
        """Run the scenario in a process that dies at a point; what it did."""
        watch = points.Points(die_before)
        cache = StateCache.connect(
            redis_url=self.redis_url,
            database_url=database_url,
            namespace=self.namespace,
            auto_recover=False,  # what dies is the scenario, not the connecting
            call_timeout_seconds=0.05,
        )
        cache.machine(worlds.Order)
        try:
            with points.watched(cache, watch):
                self.scenario.run(cache)
        except points.Died:
            watch.died = True
        finally:
            cache.close()
        return watch

    def outcome(self, database_url: str) -> dict[str, Any]:
        """What there is after another process has taken over and gone on to the end."""
        with worlds.World(self.redis_url, database_url, self.namespace) as world:
            self.scenario.repeat(world)
            world.flush()
            world.verify()
            found = facts(world)
            go_on(world)
            return found


@pytest.fixture(autouse=True)
def _dead_recoveries_are_superseded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "HEARTBEAT_STALE_MS", -1)


def facts(world: worlds.World) -> dict[str, Any]:
    """What must not depend on where anybody died."""
    found = world.sql_dump()
    history, checkpoints, kept = (
        [dict(zip(columns, row, strict=True)) for row in found[name]]
        for name, columns in (
            ("statecache_transitions", worlds.schema.transitions.columns.keys()),
            ("statecache_checkpoints", worlds.schema.checkpoints.columns.keys()),
            ("statecache_dead_letters", worlds.schema.dead_letters.columns.keys()),
        )
    )
    for row in [*history, *kept]:
        if row["event"] == "@reconciled":  # named after the recovery that wrote it
            row["transition_id"] = "reconciled"
    for row in kept:
        row["error"] = row["noted_ms"] = None
    ids = sorted({row["id"] for row in [*history, *kept]})
    reports = [row.report for row in recoveries.recoveries(world.durable, limit=1000) if row.report]
    parts = [part for text in reports for part in msgspec.json.decode(text)["partitions"]]
    return {
        "history": history,
        "checkpoints": checkpoints,
        "letters": sorted(kept, key=repr),
        "counts": {row for row in found["statecache_state_counts"] if row[-1]},
        "read": [seen(world, id) for id in ids],
        "lost at least": sum(part["lost_at_least"] for part in parts),
        "loss possible": any(part["loss_possible"] for part in parts),
    }


def seen(world: worlds.World, id: str) -> tuple[Any, ...]:
    try:
        snapshot = world.orders.get(id)
    except errors.StateCacheError as error:
        return id, type(error).__name__
    # A parked instance's hash may be ahead of its checkpoint, or dropped and hydrated: SQL says who is parked.
    if world.durable.letters("order", id):
        return id, "has letters"
    return id, snapshot.state, snapshot.version, snapshot.data, snapshot.parked


def go_on(world: worlds.World) -> None:
    """Move everything that is not parked or final once more, and look again: a fork would show now."""
    for kept in list(world.durable.iterate_checkpoints(machine="order")):
        if world.durable.letters("order", kept.id):
            with pytest.raises(errors.ParkedError):
                # Where the flag did not get into the hash any more, the move is taken, and waits with the letters.
                world.cache.wait_durable(world.orders.transition(kept.id, "note"))
        elif kept.state in ("placed", "paid", "shipped"):
            assert world.orders.transition(kept.id, "note").version == kept.version + 1
    world.flush()
    world.verify()


# --- the walk ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=SCENARIOS)
def frozen(request: pytest.FixtureRequest, redis_url: str, tmp_path: Path, namespace: str) -> Frozen:
    return Frozen(redis_url, tmp_path, namespace, SCENARIOS[request.param])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_dying_between_any_two_steps(frozen: Frozen) -> None:
    """Die before the first call, before the second ... and after the last: the end is always the same. (How many there are
    depends on the moment: a slow recovery says that it is alive, which is three.)"""
    database_url = frozen.thaw()
    undisturbed = frozen.die(database_url, None)
    wanted = frozen.outcome(database_url)
    due = len(undisturbed.names) - 3 * undisturbed.names.count("recoveries.heartbeat")
    assert due > 5
    for die_before in itertools.count(1):
        database_url = frozen.thaw()
        watch = frozen.die(database_url, die_before)
        place = f"died before call {die_before}, behind {watch.names[-1:]}" if watch.died else "did not die"
        try:
            found = frozen.outcome(database_url)
        except (errors.StateCacheError, AssertionError) as error:
            raise AssertionError(f"{place}: {error}") from error
        assert found == wanted, place
        if not watch.died:
            break
    assert die_before > due


def test_dying_twice(frozen: Frozen) -> None:
    """The process that takes over dies too, one step later each time, until one has nothing left to do."""
    database_url = frozen.thaw()
    frozen.die(database_url, None)
    wanted = frozen.outcome(database_url)
    database_url = frozen.thaw()
    for die_before in itertools.count(1, 3):
        try:
            if not frozen.die(database_url, die_before).died:
                break
        except errors.NotFoundError:  # no letters: one that died had done it
            break
    assert frozen.outcome(database_url) == wanted


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["recover tail lost", "recover diverged", "recover diverged apart"])
def test_the_same_older_redis_comes_back(redis_url: str, tmp_path: Path, namespace: str, name: str) -> None:
    """A recovery ends, or dies at a point, and the server starts from the same old file once more (a crash loop, a snapshot
    that is restored twice): nothing is kept twice, and no version is given twice."""
    frozen = Frozen(redis_url, tmp_path, namespace, SCENARIOS[name])
    database_url = frozen.thaw()
    calls = len(frozen.die(database_url, None).names)
    wanted = frozen.outcome(database_url)
    for die_before in (None, *range(calls, 0, -3)):
        database_url = frozen.thaw()
        frozen.die(database_url, die_before)
        frozen.redis_again()
        try:
            found = frozen.outcome(database_url)
        except (errors.StateCacheError, AssertionError) as error:
            raise AssertionError(f"died before call {die_before} of {calls}: {error}") from error
        for report in ("lost at least", "loss possible"):  # there is one recovery more
            found[report] = wanted[report]
        assert found == wanted, f"died before call {die_before} of {calls}"


def test_every_kind_of_call_is_a_point(redis_url: str, tmp_path: Path) -> None:
    """The walk would prove nothing if calls went past the counter."""
    names: set[str] = set()
    for number, scenario in enumerate(SCENARIOS.values()):
        folder = tmp_path / str(number)
        folder.mkdir()
        frozen = Frozen(redis_url, folder, f"points{number}", scenario)
        names |= set(frozen.die(frozen.thaw(), None).names)
    expected = {f"hot.{name}" for name in points.HOT} - {"hot.find", "hot.find_many"}
    expected |= {f"transaction.{name}" for name in points.TRANSACTION}
    expected |= {f"recoveries.{name}" for name in points.RECOVERIES} - {"recoveries.heartbeat"}
    assert expected - names == set()
    assert {"BEGIN", "COMMIT"} <= names
