"""The whole engine on fakeredis and SQLite: what its calls do there, in milliseconds, without a process."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from statecache import Move
from statecache.core import entry, errors, keys, model
from statecache.durable.store import DurableStore
from statecache.hot import scripts
from statecache.hot.store import HotStore
from tests.support.worlds import EmulatedWorld, before_call


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("empty") / "empty.db"
    DurableStore.connect(f"sqlite:///{path}", partition_count=2).close()
    return path


@pytest.fixture
def world(empty_database: Path, tmp_path: Path) -> Iterator[EmulatedWorld]:
    shutil.copy(empty_database, tmp_path / "store.db")
    with EmulatedWorld(f"sqlite:///{tmp_path / 'store.db'}") as found:
        yield found


def test_life_of_an_order(world: EmulatedWorld) -> None:
    world.start("1", ["pay", "ship"], amount=2)
    world.flush()
    assert world.orders.get("1").data == {"amount": 2}
    assert [row.event for row in world.orders.history("1")] == ["@start", "pay", "ship"]
    assert world.orders.counts() == {"shipped": 1}
    world.verify()


def test_script_cache_is_loaded_only_by_admission(world: EmulatedWorld) -> None:
    world.start("1")
    world.client.script_flush("SYNC")
    assert world.hot.read([(0, entry.ZERO), (1, entry.ZERO)], entries=1, bytes_max=1)[1].code == "NOSCRIPT"
    assert world.hot.flushed([(0, entry.ZERO, entry.ZERO, 1), (1, entry.ZERO, entry.ZERO, 1)]) == [
        "NOSCRIPT",
        "NOSCRIPT",
    ]
    assert world.hot.evict([(0, "order:1", 1, "1-1", 0), (1, "order:2", 1, "1-1", 0)]) == ["NOSCRIPT", "NOSCRIPT"]
    assert world.hot.find(0, "order", "1") == ("NOSCRIPT", [])
    assert world.orders.transition("1", "pay").version == 2


def test_restart_wipe_and_tail_loss_are_recovered(world: EmulatedWorld) -> None:
    world.start("1")
    world.flush()
    saved = world.redis_copy()
    world.client.script_flush("SYNC")
    world.disown()
    assert world.orders.transition("1", "pay").version == 2
    world.flush()
    world.redis_back(saved)
    assert world.orders.transition("1", "ship").version == 3
    world.flush()
    world.wipe()
    assert world.orders.transition("1", "deliver").version == 4
    assert world.durable.identity().epoch == 4
    world.flush()
    world.verify()


def test_repeated_call_is_one_transition(world: EmulatedWorld) -> None:
    world.start("1")
    first = world.orders.transition("1", "pay", transition_id="t")
    again = world.orders.transition("1", "pay", transition_id="t")
    assert (again.version, again.duplicate, first.duplicate) == (2, True, False)


def test_bulk_calls(world: EmulatedWorld) -> None:
    assert [one.version for one in world.orders.start_many(["a", "b"])] == [1, 1]
    results = world.orders.transition_many([Move("a", "pay"), Move("a", "ship"), Move("c", "pay"), Move("b", "ship")])
    assert [type(one) for one in results] == [
        model.Receipt, model.Receipt, errors.NotFoundError, errors.InvalidTransitionError,
    ]  # fmt: skip


def test_call_that_meets_a_recovery_begins_again(world: EmulatedWorld) -> None:
    world.start("1")
    other = world.more()
    with before_call(world.hot, "packed_apply", other.recover):
        assert world.orders.transition("1", "pay").version == 2
    assert world.hot.stamp == scripts.Stamp(*_pair(world))


def _pair(world: EmulatedWorld) -> tuple[int, str]:
    row = world.durable.identity()
    return row.epoch, row.owner


def test_namespace_with_pattern_characters_lists_its_own(world: EmulatedWorld) -> None:
    """SCAN's pattern is made of the namespace, which may hold what a pattern gives a meaning."""
    for namespace in ("a.b-c_d", "a"):
        store = HotStore(keys.Keyspace(namespace, 2), client=world._client(), emulated=True)
        world.client.hset(store.keyspace.instance(0, "order", "x:y{}*"), "@", "placed 1 1-1 1 1 1")
        assert list(store.instances()) == [[("order", "x:y{}*")]]
        assert list(store.instances("order")) == [[("order", "x:y{}*")]]
        assert list(store.instances("orde")) == []
        store.close()


def test_hashes_of_many_come_in_order_and_missing_ones_are_empty(world: EmulatedWorld) -> None:
    ids = [f"m{number}" for number in range(260)]
    world.orders.start_many([(id, {"me": id}) for id in ids])
    found = world.hot.hashes([(world.partition_of(id), "order", id) for id in [*ids, "missing"]])
    assert [one.get(b"me") for one in found] == [*[f'"{id}"'.encode() for id in ids], None]


def test_position_of_a_wiped_partition_is_none(world: EmulatedWorld) -> None:
    position = world.hot.position(0)
    assert position is not None
    assert (position.epoch, position.status, position.cold) == (1, "ready", False)
    world.wipe()
    assert world.hot.position(0) is None


def test_line_of_a_stranger_is_refused() -> None:
    with pytest.raises(errors.IntegrityError):
        entry.parse_line("1-1\x1f?")


def test_closed_store_says_so(world: EmulatedWorld) -> None:
    world.hot.close()
    with pytest.raises(errors.ConfigurationError, match="closed"):
        world.hot.position(0)


@pytest.mark.parametrize("method", ["admit", "fence"])
def test_foreign_redis_is_refused(world: EmulatedWorld, method: str) -> None:
    for partition in (0, 1):
        world.client.hset(world.keyspace.meta(partition), "deployment", "another")
    call: dict[str, Any] = {
        "admit": world.cache.recover,
        "fence": lambda: world.more(auto_recover=False),
    }
    with pytest.raises(errors.ConfigurationError, match="do not belong together"):
        call[method]()
