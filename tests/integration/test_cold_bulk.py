"""Cold instances in bulk calls: one query in SQL for all misses, few commands in Redis, on both clients.

Redis counts its commands itself (``INFO commandstats``); SQL's statements are counted on their way.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from statecache.core import errors, model
from statecache.engine import eviction
from statecache.hot import packing
from tests.support import plans
from tests.support.servers import ValkeyServer
from tests.support.worlds import World

COUNT = 500
PARTITIONS = 2
IDS = [f"o{number:03d}" for number in range(COUNT)]


@pytest.fixture
def world(redis_url: str, database_and_client: tuple[str, str], namespace: str) -> Iterator[World]:
    database_url, client = database_and_client
    with World(redis_url, database_url, namespace, client=client) as world:
        assert not [one for one in world.orders.start_many(IDS) if isinstance(one, Exception)]
        world.flush()
        assert eviction.evict(world.cache, idle_seconds=0).evicted == COUNT
        yield world


@contextmanager
def counted(world: World) -> Iterator[Counter[str]]:
    """How often each command ran in Redis (inside scripts too), as ``SQL`` the statements that SQL was sent, as ``connections``
    those that were opened to Redis."""
    found: Counter[str] = Counter()

    def note(*_: Any) -> None:
        found["SQL"] += 1

    world.client.config_resetstat()
    with plans.told(world.durable.database.engine, note):
        yield found
    for name, told in world.client.info("commandstats").items():
        found[name.removeprefix("cmdstat_")] += told["calls"]
    found["connections"] = world.client.info("stats")["total_connections_received"]


def versions(results: list[Any]) -> list[int]:
    return [one.version for one in results]


def test_reading_many(world: World) -> None:
    """One HGETALL each finds them cold, one HMGET a partition tells what SQL must know, one query reads them all."""
    with counted(world) as found:
        snapshots = world.orders.get_many(IDS)
    assert versions(snapshots) == [1] * COUNT
    assert {one.source for one in snapshots if isinstance(one, model.Snapshot)} == {"durable"}
    assert (found["SQL"], found["hgetall"], found["hmget"]) == (1, COUNT, PARTITIONS)


def test_reading_many_of_which_some_are_hot_and_some_are_not_there(world: World) -> None:
    world.orders.transition_many([model.Move(id, "pay") for id in IDS[:100]])
    with counted(world) as found:
        results = world.orders.get_many([*IDS, "nobody", "nothing"])
    assert versions(results[:COUNT]) == [2] * 100 + [1] * 400
    assert [type(one) for one in results[COUNT:]] == [errors.NotFoundError] * 2
    assert (found["SQL"], found["hmget"]) == (1, PARTITIONS)


def test_moving_many(world: World) -> None:
    """Seven script calls find them cold (the first and the last ones are small), one query, one script brings them back, four
    apply."""
    with counted(world) as found:
        receipts = world.orders.transition_many([model.Move(id, "pay") for id in IDS])
    assert versions(receipts) == [2] * COUNT
    assert (found["SQL"], found["evalsha"], found["xadd"]) == (1, 12, COUNT)
    world.flush()
    world.verify()


def test_bringing_back_opens_no_connection(world: World) -> None:
    world.orders.transition(IDS[0], "pay")  # the first one of a client may open some
    with counted(world) as found:
        for id in IDS[1:6]:
            assert world.orders.transition(id, "pay").version == 2
        assert versions(world.orders.transition_many([model.Move(id, "pay") for id in IDS[6:]])) == [2] * (COUNT - 6)
    assert found["hset"] >= 2 * (COUNT - 1), "they were not brought back"
    assert found["connections"] == 0


def test_several_moves_of_each(world: World) -> None:
    """The first move of an instance brings it back for those behind it."""
    moves = [model.Move(id, event) for id in IDS for event in ("pay", "ship")]
    with counted(world) as found:
        receipts = world.orders.transition_many(moves)
    assert versions(receipts) == [2, 3] * COUNT
    assert found["SQL"] <= 2
    assert found["xadd"] == 2 * COUNT
    world.flush()
    world.verify()


def test_a_guard_behind_a_move_that_has_to_come_again(world: World) -> None:
    """One bulk call: ``note`` gives the order its amount, ``approve`` wants one. ``note`` has an id of its own, and so many
    have been before it that it is answered OLD: history is asked, and it is sent again. A guard that read meanwhile would find
    no amount, and its refusal would stand."""
    world.orders.transition_many([model.Move(id, "note") for id in IDS[:3] for _ in range(9)])
    moves = [
        (model.Move(id, "note", {"amount": 5}, transition_id=f"{id}-5"), model.Move(id, "approve")) for id in IDS[:3]
    ]
    receipts = world.orders.transition_many([move for pair in moves for move in pair])
    assert [one.version if isinstance(one, model.Receipt) else one for one in receipts] == [11, 12] * 3


def test_starting_many_where_some_may_be_cold(world: World) -> None:
    """In a partition with cold instances SQL is asked whether a new id exists: once, for new ones and old ones together."""
    fresh = [f"n{number:03d}" for number in range(COUNT - 100)]
    with counted(world) as found:
        results = world.orders.start_many(IDS[:100] + fresh)
    assert [type(one) for one in results[:100]] == [errors.AlreadyExistsError] * 100
    assert versions(results[100:]) == [1] * len(fresh)
    assert (found["SQL"], found["xadd"]) == (1, len(fresh))
    world.flush()
    world.verify()


def test_more_than_a_thousand(world: World) -> None:
    """Lists are taken a thousand at a time, so that memory does not grow with them."""
    more = [f"m{number:04d}" for number in range(1100)]
    world.orders.start_many(more)
    world.flush()
    assert eviction.evict(world.cache, idle_seconds=0).evicted == len(more)
    with counted(world) as found:
        snapshots = world.orders.get_many(IDS + more)
    assert versions(snapshots) == [1] * (COUNT + len(more))
    assert (found["SQL"], found["hmget"]) == (2, 2 * PARTITIONS)
    with counted(world) as found:
        receipts = world.orders.transition_many([model.Move(id, "pay") for id in IDS + more])
    assert versions(receipts) == [2] * (COUNT + len(more))
    assert found["SQL"] == 2


def test_a_pipelined_refusal_leaves_no_reply_behind(
    start_redis: Callable[..., ValkeyServer], sqlite_url: str, namespace: str
) -> None:
    """A user who may not DBSIZE: what was asked behind it is read all the same, so that the next call on that connection
    does not take it for its own answer."""
    server = start_redis()
    with server.client() as client:
        client.execute_command("ACL", "SETUSER", "small", "on", "nopass", "~*", "&*", "+@all", "-dbsize")
    url = server.url.replace("redis://", "redis://small:@")
    with World(url, sqlite_url, namespace, hot_instances_max=1) as world:
        world.start("1")
        for _ in range(3):
            with pytest.raises((errors.StateCacheError, OSError)) as caught:
                eviction.evict(world.cache)
            assert "dbsize" in str(caught.value).lower()
            assert world.orders.get("1").version == 1
        assert world.orders.transition("1", "pay").version == 2


def test_single_calls_of_many_tasks(redis_url: str, sqlite_url: str, namespace: str) -> None:
    """Concurrent calls of the async client look up together: what arrives during a query is asked by the next."""
    with World(redis_url, sqlite_url, namespace, client="async") as world:
        world.orders.start_many(IDS)
        world.flush()
        assert eviction.evict(world.cache, idle_seconds=0).evicted == COUNT
        inner: Any = world.orders

        async def read_all() -> list[Any]:
            return await asyncio.gather(*[inner.inner.get(id) for id in IDS])

        async def move_all() -> list[Any]:
            return await asyncio.gather(*[inner.inner.transition(id, "pay") for id in IDS])

        cache: Any = world.cache
        with counted(world) as found:
            assert versions(cache.call(read_all())) == [1] * COUNT
        assert found["SQL"] <= 25
        assert found["hmget"] <= 50
        with counted(world) as found:
            assert versions(cache.call(move_all())) == [2] * COUNT
        assert found["SQL"] <= 25
        assert found["xadd"] == COUNT


def test_many_large_instances_come_back_in_several_calls(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """All in one argument, 40 of 15 MB were more than Redis takes at all (``proto-max-bulk-len``). One larger than a call's
    bound goes alone."""
    monkeypatch.setattr(packing, "HYDRATE_BYTES_MAX", 10_000)
    sizes = [3000] * 10 + [20_000] + [10_000, 1] * 5
    ids = [f"large{number}" for number in range(len(sizes))]
    world.orders.start_many([(id, {"blob": "x" * size}) for id, size in zip(ids, sizes, strict=True)])
    world.flush()
    assert eviction.evict(world.cache, idle_seconds=0).evicted == len(ids)
    with counted(world) as found:
        assert versions(world.orders.transition_many([model.Move(id, "pay") for id in ids])) == [2] * len(ids)
    assert found["exists"] >= 15
    world.verify()
