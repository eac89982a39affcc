"""A pure model of the design beside the real engine: whatever is done, and whatever fails in between.

The model knows what a caller was told: for each order the acknowledged transitions. It says what may be gone after a fault
(what was not in SQL, and not in what Redis came back with), and that all else must be there: versions, states, data, history,
counts, and the same receipt for a repeated id. Run longer: ``pytest tests/property --hypothesis-profile=long``; on real
servers: ``pytest tests/property --real-servers``.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from statecache import Move
from statecache.core import entry, errors, model
from statecache.durable.store import DurableStore
from tests.support.worlds import EmulatedWorld, Order, World

IDS = ["a", "b", "c", "d", "e"]
EVENTS = sorted(set(Order.definition.events) - {"approve"})
TARGETS = Order.definition.targets


class Died(BaseException):
    """The flusher's process is gone."""


class Record(NamedTuple):
    """One acknowledged transition, and the data after it."""

    event: str
    state: str
    version: int
    transition_id: str
    entry_id: entry.EntryId
    data: dict[str, Any]


class Shape(NamedTuple):
    """A transition's effect on data."""

    patch: dict[str, Any]
    unset: tuple[str, ...]
    increment: dict[str, int]


values = st.one_of(
    st.integers(-(2**53), 2**53), st.booleans(), st.none(), st.text(max_size=4).filter(lambda text: "\0" not in text),
    st.floats(allow_nan=False, allow_infinity=False), st.lists(st.integers(0, 9), max_size=2),
)  # fmt: skip
shapes = st.builds(
    Shape,
    st.dictionaries(st.sampled_from(["x", "y", "z"]), values, max_size=2),
    st.sets(st.sampled_from(["u", "v"]), max_size=2).map(lambda names: tuple(sorted(names))),
    st.dictionaries(st.sampled_from(["n", "m"]), st.integers(-5, 5), max_size=2),
)


class StoreAgainstModel(RuleBasedStateMachine):
    """Rules are what callers, flushers and faults do; ``untrue`` is set from a fault until somebody has noticed."""

    make_world: Callable[[], World]

    def __init__(self) -> None:
        super().__init__()
        self.world = self.make_world()
        self.flusher = self.world.flusher()
        self.other = self.world.more().machine(Order)
        self.history: dict[str, list[Record]] = {}
        self.saved_redis: tuple[Any, dict[int, entry.EntryId]] | None = None
        self.saved_sql: tuple[Any, dict[str, int]] | None = None
        self.reconciled: set[str] = set()
        self.untrue = False
        self.number = 0

    def teardown(self) -> None:
        try:
            self.check_everything()
        finally:
            self.world.close()

    # --- what callers do -------------------------------------------------------------------------------------------------

    def _next_id(self) -> str:
        self.number += 1
        return f"t{self.number}"

    def _note(self, receipt: model.Receipt, shape: Shape) -> None:
        records = self.history.setdefault(receipt.id, [])
        data = dict(records[-1].data) if records else {}
        data.update(shape.patch)
        for name, delta in shape.increment.items():
            data[name] = data.get(name, 0) + delta
        for name in shape.unset:
            data.pop(name, None)
        assert receipt.version == len(records) + 1
        assert not receipt.duplicate
        assert (receipt.from_state or "") == (records[-1].state if records else "")
        records.append(
            Record(
                receipt.event,
                receipt.state,
                receipt.version,
                receipt.transition_id,
                entry.EntryId.parse(receipt.entry_id),
                data,
            )
        )
        self.untrue = False

    @rule(id=st.sampled_from(IDS), patch=shapes)
    def start(self, id: str, patch: Shape) -> None:
        data = {**patch.patch, **dict.fromkeys(patch.unset, 0)}
        try:
            receipt = self.world.orders.start(id, data, transition_id=self._next_id())
        except errors.AlreadyExistsError:
            assert self.history.get(id)
            self.untrue = False
        else:
            assert receipt.state == "placed"
            self._note(receipt, Shape(data, (), {}))

    @rule(id=st.sampled_from(IDS), event=st.sampled_from(EVENTS), shape=shapes, by_other=st.booleans())
    def transition(self, id: str, event: str, shape: Shape, by_other: bool) -> None:
        orders = self.other if by_other else self.world.orders
        move = {"unset": shape.unset, "increment": shape.increment, "transition_id": self._next_id()}
        state = self.history[id][-1].state if self.history.get(id) else None
        try:
            receipt = orders.transition(id, event, shape.patch, **move)
        except errors.NotFoundError:
            assert state is None
        except errors.InvalidTransitionError:
            assert state is not None
            assert state not in TARGETS[event]
        else:
            assert state is not None
            assert receipt.state == TARGETS[event][state]
            self._note(receipt, shape)
        self.untrue = False

    @rule(ids=st.lists(st.tuples(st.sampled_from(IDS), st.sampled_from(EVENTS)), min_size=2, max_size=8))
    def many(self, ids: list[tuple[str, str]]) -> None:
        """One bulk call, several moves of an instance among them: the outcomes are those of the calls one by one."""
        results = self.world.orders.transition_many(
            [Move(id, event, transition_id=self._next_id()) for id, event in ids]
        )
        for (id, event), result in zip(ids, results, strict=True):
            state = self.history[id][-1].state if self.history.get(id) else None
            if state is None:
                assert isinstance(result, errors.NotFoundError)
            elif state not in TARGETS[event]:
                assert isinstance(result, errors.InvalidTransitionError)
            else:
                assert isinstance(result, model.Receipt), result
                self._note(result, Shape({}, (), {}))
        self.untrue = False

    def _picked(self, pick: int) -> str | None:
        """One of the orders that there are. Not drawn from them: what is drawn must not depend on what happened, which in a
        race is not the same each time."""
        known = sorted(id for id, records in self.history.items() if records)
        return known[pick % len(known)] if known else None

    @rule(pick=st.integers(0, 59), place=st.integers(0, 59))
    def repeat(self, pick: int, place: int) -> None:
        """A repeated id gets its receipt, however long ago it was."""
        id = self._picked(pick)
        if id is None or id in self.reconciled:
            return
        record = self.history[id][place % len(self.history[id])]
        if record.event == "@start":
            receipt = self.world.orders.start(id, transition_id=record.transition_id)
        else:
            receipt = self.world.orders.transition(id, record.event, transition_id=record.transition_id)
        assert receipt.duplicate
        assert (receipt.version, receipt.state, receipt.entry_id) == (
            record.version,
            record.state,
            str(record.entry_id),
        )
        self.untrue = False

    @rule(pick=st.integers(0, 59), wrong=st.sampled_from([-2, -1, 1, 7]))
    def stale_version(self, pick: int, wrong: int) -> None:
        id = self._picked(pick)
        if id is None:
            return
        version = len(self.history[id])
        if version + wrong < 1:
            return
        with pytest.raises(errors.StaleVersionError) as stale:
            self.world.orders.transition(id, "note", expect_version=version + wrong)
        assert stale.value.actual == version
        self.untrue = False

    # --- flusher, cold tier ----------------------------------------------------------------------------------------------

    @rule()
    def flush(self) -> None:
        self.world.flush_through()
        self.untrue = False
        self._forget_backup_of_sql_if_cold()

    @rule(entries=st.integers(1, 4), dies=st.booleans())
    def flush_some(self, entries: int, dies: bool) -> None:
        """One step of a flusher with a memory of its own; perhaps it dies between commit and trim."""
        self.flusher.batch_entries = entries
        with pytest.MonkeyPatch.context() as patch:
            if dies:
                patch.setattr(self.world.hot, "flushed", _die)
            with contextlib.suppress(Died):
                self.flusher.step()
                self.untrue = False
        if dies:
            self.flusher = self.world.flusher()

    @rule(id=st.sampled_from(IDS))
    def evict(self, id: str) -> None:
        was_hot = self.world.is_hot(id)
        code = self.world.evict(id)
        if code == "OK":
            assert was_hot
            self.saved_sql = None  # an older SQL would not know what only the hash had
        if code == "KEPT":
            partition = self.world.partition_of(id)
            assert self.untrue or self.history[id][-1].entry_id > self.world.watermark(partition)

    def _forget_backup_of_sql_if_cold(self) -> None:
        if self.saved_sql and not self._all_hot():
            self.saved_sql = None

    # --- faults ----------------------------------------------------------------------------------------------------------

    def _lose(self, kept_in_redis: dict[int, entry.EntryId]) -> None:
        """What is neither in SQL nor in what Redis came back with is gone."""
        for id, records in self.history.items():
            partition = self.world.partition_of(id)
            kept = max(self.world.watermark(partition), kept_in_redis.get(partition, entry.ZERO))
            self.history[id] = [record for record in records if record.entry_id <= kept]

    @rule()
    def restart(self) -> None:
        """The server restarts with everything."""
        self.world.client.script_flush("SYNC")
        self.world.disown()
        self.untrue = True

    @rule()
    def wipe(self) -> None:
        if self.world.hot_dump():
            self._lose({})
            self.saved_redis = self.saved_sql = None
        self.world.wipe()
        self.untrue = True

    @precondition(lambda self: not self.untrue)
    @rule()
    def copy_redis(self) -> None:
        last = {partition: self._last(partition) for partition in (0, 1)}
        self.saved_redis = self.world.redis_copy(), last

    def _last(self, partition: int) -> entry.EntryId:
        found = self.world.client.xinfo_stream(self.world.keyspace.log(partition))["last-generated-id"]
        return entry.EntryId.parse(found.decode() if isinstance(found, bytes) else found)

    @precondition(lambda self: self.saved_redis is not None)
    @rule()
    def lose_tail(self) -> None:
        """Redis comes back with what it was some time ago."""
        assert self.saved_redis is not None
        saved, last = self.saved_redis
        self._lose(last)
        self.world.redis_back(saved)
        self.saved_redis = self.saved_sql = None
        self.untrue = True

    @rule(dry=st.booleans())
    def recover(self, dry: bool) -> None:
        if dry:
            before = self.world.hot_dump(), self.world.sql_dump()
            self.world.cache.recover(dry_run=True)
            assert (self.world.hot_dump(), self.world.sql_dump()) == before
            return
        planned = self.world.cache.recover(dry_run=True)
        report = self.world.cache.recover()
        assert report.partitions == planned.partitions
        assert sum(part.parked for part in report.partitions) == 0
        self.untrue = False

    def _all_hot(self) -> bool:
        return all(self.world.is_hot(id) for id, found in self.history.items() if found)

    @precondition(lambda self: not self.untrue and self._all_hot())
    @rule()
    def copy_sql(self) -> None:
        self.saved_sql = self.world.sql_copy(), {id: len(self.world.versions(id)) for id in IDS}

    @precondition(lambda self: self.saved_sql is not None and not self.untrue)
    @rule()
    def restore_sql(self) -> None:
        self.sql_comes_back()

    def sql_comes_back(self) -> None:
        """SQL comes back from a backup, while Redis has everything. A recovery makes them one history again, in which one row
        may stand for versions that only Redis had; ids of those are forgotten."""
        assert self.saved_sql is not None
        saved, _ = self.saved_sql
        self.world.sql_back(saved)
        self.flusher = self.world.flusher()
        self.world.cache.recover()
        self.world.flush_through()
        self.saved_sql = self.saved_redis = None
        self.reconciled |= {id for id in IDS if any(row.covers_from for row in self.world.durable.history("order", id))}

    # --- what must hold --------------------------------------------------------------------------------------------------

    @invariant()
    def instances_are_what_was_acknowledged(self) -> None:
        if self.untrue:
            return
        for id, found in zip(IDS, self.world.orders.get_many(IDS), strict=True):
            records = self.history.get(id)
            if not records:
                assert isinstance(found, errors.NotFoundError), (id, found)
                continue
            last = records[-1]
            assert isinstance(found, model.Snapshot), (id, found)
            assert (found.state, found.version, found.data) == (last.state, last.version, last.data), id

    @invariant()
    def sql_is_a_prefix_and_its_counts_are_right(self) -> None:
        rows: dict[str, list[model.Transition]] = {}
        for row in self.world.durable.iterate_transitions():
            rows.setdefault(row.id, []).append(row)
        counted: dict[str, int] = {}
        for id, found in rows.items():
            records = self.history[id]
            assert found[-1].version <= len(records), id
            assert found[-1].to_state == records[found[-1].version - 1].state
            counted[found[-1].to_state] = counted.get(found[-1].to_state, 0) + 1
            if id in self.reconciled:
                continue
            assert [row.version for row in found] == list(range(1, len(found) + 1))
            assert [row.transition_id for row in found] == [record.transition_id for record in records[: len(found)]]
        assert self.world.orders.counts() == counted

    def check_everything(self) -> None:
        """At the end: flush, then history, ``at`` and ``verify`` agree with what was acknowledged."""
        self.world.flush_through()
        self.untrue = False
        self.instances_are_what_was_acknowledged()
        self.world.verify()
        for id, records in self.history.items():
            if not records:
                continue
            rows = self.world.orders.history(id)
            covered = [version for row in rows for version in range(row.covers_from or row.version, row.version + 1)]
            assert covered == list(range(1, len(records) + 1))
            for row in rows:
                record = records[row.version - 1]
                assert row.to_state == record.state
                if id not in self.reconciled:
                    assert self.world.orders.at(id, version=row.version).data == record.data


def _die(*arguments: object) -> None:
    raise Died


MODEST = settings(
    max_examples=25, stateful_step_count=30, deadline=None, derandomize=True, print_blob=True,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
LONG = settings(deadline=None, print_blob=True, suppress_health_check=list(HealthCheck))


def _settings() -> settings:
    return LONG if settings.get_current_profile_name() == "long" else MODEST


@functools.cache
def empty_database() -> Path:
    """A store without an epoch, made once: the migrations take longer than an example."""
    path = Path(tempfile.mkdtemp(prefix="statecache-model-")) / "empty.db"
    DurableStore.connect(f"sqlite:///{path}", partition_count=2).close()
    return path


def test_emulated_store_does_what_the_model_says(tmp_path: Path) -> None:
    """fakeredis runs the real scripts; SQLite holds the rest."""
    numbers = iter(range(10**9))

    class Emulated(StoreAgainstModel):
        @staticmethod
        def make_world() -> World:
            path = tmp_path / f"{next(numbers)}.db"
            shutil.copy(empty_database(), path)
            return EmulatedWorld(f"sqlite:///{path}")

    run_state_machine_as_test(Emulated, settings=_settings())


def test_real_store_does_what_the_model_says(request: pytest.FixtureRequest, namespace: str) -> None:
    """The same on a real server and a real database; only with ``--real-servers``."""
    redis_url = request.getfixturevalue("redis_url")
    postgres = request.getfixturevalue("postgres_server")
    numbers = iter(range(10**9))

    class Real(StoreAgainstModel):
        @staticmethod
        def make_world() -> World:
            number = next(numbers)
            return World(redis_url, postgres.url(postgres.create_database()), f"{namespace}-{number}")

    run_state_machine_as_test(Real, settings=_settings())
