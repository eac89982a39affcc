"""Nothing that a call makes outlives it: a pipeline makes a hundred million calls a day."""

from __future__ import annotations

import asyncio
import collections
import gc
from collections.abc import Awaitable, Callable, Iterator

import pytest

from statecache import Move
from statecache.aio import AsyncStateCache
from tests.support.worlds import Order, World

CALLS = 300


@pytest.fixture
def world(redis_url: str, sqlite_url: str, namespace: str) -> Iterator[World]:
    with World(redis_url, sqlite_url, namespace) as found:
        found.start("1", amount=1)
        yield found


def _objects() -> collections.Counter[str]:
    """The objects that Python's collector knows and cannot free, by type."""
    gc.collect()
    return collections.Counter(type(one).__qualname__ for one in gc.get_objects())


def _left_by(before: collections.Counter[str]) -> dict[str, int]:
    """Types of which about as many objects are left as calls were made."""
    return {name: count for name, count in (_objects() - before).items() if count >= CALLS // 2}


def _calls(world: World) -> dict[str, Callable[[], object]]:
    orders, patch = world.orders, {"amount": 2, "note": "left at the door", "paid": True, "weight": 1.5, "gift": None}
    names = iter(range(10**6))
    return {
        "start": lambda: orders.start(f"s{next(names)}", patch),
        "transition": lambda: orders.transition("1", "note", patch),
        "increment": lambda: orders.transition("1", "note", increment={"n": 1}, unset=["note"]),
        "refused": lambda: orders.transition_many([Move("1", "start-again"), Move("none", "pay")]),
        "transition_many": lambda: orders.transition_many([Move("1", "note", patch)] * 3),
        "get": lambda: orders.get("1").data,
        "get_many": lambda: orders.get_many(["1", "none"]),
    }


@pytest.mark.parametrize("name", ["start", "transition", "increment", "refused", "transition_many", "get", "get_many"])
def test_calls_leave_nothing_behind(world: World, name: str) -> None:
    """The known issue: the encoder of a patch lost an iterator at every call."""
    call = _calls(world)[name]
    for _ in range(10):
        call()
    before = _objects()
    for _ in range(CALLS):
        call()
    assert _left_by(before) == {}


def test_calls_of_the_async_client_leave_nothing_behind(world: World, redis_url: str) -> None:
    async def run() -> dict[str, int]:
        async with await AsyncStateCache.connect(redis_url, world.cache.database_url, world.namespace) as cache:
            orders = await cache.machine(Order)

            async def crowd(count: int) -> None:
                calls: list[Awaitable[object]] = [orders.transition("1", "note", {"n": n}) for n in range(count)]
                await asyncio.gather(*calls, *[orders.get("1") for _ in range(count)])
                await asyncio.sleep(0)  # the loop holds what it has just woken somebody for

            await crowd(10)
            before = _objects()
            await crowd(CALLS)
            return _left_by(before)

    assert asyncio.run(run()) == {}
