"""A call of the async client, cancelled at each point where it waits: for every situation, and every such point in it.

The same call is made again and again, cancelled at the first await, at the second ..., until it ends before it is cancelled.
Each time there is company: calls of other instances in the same batch, and calls of its own before and behind it.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterator
from typing import Any

import pytest
import pytest_asyncio

from statecache.aio import AsyncMachineHandle, AsyncStateCache
from statecache.core import errors, model
from tests.support import proxy, servers, worlds

pytestmark = pytest.mark.asyncio


class CancelledAt:
    """Awaits a coroutine; its task is cancelled when that waits for the ``nth`` time (0: before it begins)."""

    def __init__(self, work: Coroutine[Any, Any, Any], nth: int) -> None:
        self._work, self._nth, self.waits = work, nth, 0

    def __await__(self) -> Generator[Any, Any, Any]:
        task = asyncio.current_task()
        assert task is not None
        inner = self._work.__await__()
        resume: Callable[[Any], Any] = inner.send
        value: Any = None
        if self._nth == 0:
            task.cancel()
        while True:
            try:
                wanted = resume(value)
            except StopIteration as end:
                return end.value
            self.waits += 1
            if self.waits == self._nth:
                task.get_loop().call_soon(task.cancel)
            try:
                value = yield wanted
                resume = inner.send
            except BaseException as error:
                resume, value = inner.throw, error


@pytest.fixture
def link(redis_server: servers.ValkeyServer, redis_url: str) -> Iterator[proxy.Proxy]:
    with proxy.Proxy(redis_server.port) as made:
        yield made


@pytest.fixture
def world(redis_url: str, sqlite_url: str, namespace: str) -> Iterator[worlds.World]:
    with worlds.World(redis_url, sqlite_url, namespace) as made:
        yield made
        made.flush_through()
        made.verify()


@pytest_asyncio.fixture
async def cache(world: worlds.World, link: proxy.Proxy) -> AsyncIterator[AsyncStateCache]:
    """The client; afterwards nothing is left running, and the loop was told of no error that nobody took."""
    told: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda loop, context: told.append(context))
    loop.set_debug(True)
    settings = {**world.settings, "call_timeout_seconds": 20.0}
    async with AsyncStateCache.connect(
        link.url(world.redis_url), world.database_url, world.namespace, **settings
    ) as made:
        yield made
    assert asyncio.all_tasks() == {asyncio.current_task()}
    gc.collect()
    assert told == []


@pytest_asyncio.fixture
async def orders(cache: AsyncStateCache) -> AsyncMachineHandle:
    return await cache.machine(worlds.Order)


def plain(world: worlds.World, link: proxy.Proxy, id: str) -> dict[str, Any]:
    """Returns the call's arguments, as all of these do."""
    return {"event": "note"}


def cold(world: worlds.World, link: proxy.Proxy, id: str) -> dict[str, Any]:
    """It is looked up and hydrated."""
    world.flush()
    assert world.evict(id) == "OK"
    return {"event": "note"}


def old(world: worlds.World, link: proxy.Proxy, id: str) -> dict[str, Any]:
    """An id of its own, behind more moves than the ring holds: history is asked."""
    world.orders.transition_many([model.Move(id, "note") for _ in range(9)])
    return {"event": "note", "transition_id": f"mine-{id}"}


def guarded(world: worlds.World, link: proxy.Proxy, id: str) -> dict[str, Any]:
    """It waits for its turn, and reads."""
    return {"event": "approve"}


def durable(world: worlds.World, link: proxy.Proxy, id: str) -> dict[str, Any]:
    """It waits for SQL."""
    return {"event": "note", "durability": "durable"}


def restarted(world: worlds.World, link: proxy.Proxy, id: str) -> dict[str, Any]:
    """The server is another one: it waits for admission, which recovers."""
    world.client.script_flush("SYNC")
    world.disown()
    return {"event": "note"}


def reply_lost(world: worlds.World, link: proxy.Proxy, id: str) -> dict[str, Any]:
    """The connection breaks, it pauses, and goes again."""
    link.drop_replies_after_forwarding(1, b'"cancelled"')
    return {"event": "note"}


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "in company"])
@pytest.mark.parametrize("situation", [plain, cold, old, guarded, durable, restarted, reply_lost])
async def test_cancelled_at_every_await(
    world: worlds.World,
    cache: AsyncStateCache,
    orders: AsyncMachineHandle,
    link: proxy.Proxy,
    situation: Callable[[worlds.World, proxy.Proxy, str], dict[str, Any]],
    alone: bool,
) -> None:
    """Whoever else is under way is answered, in order; the cancelled call's transition is there once, or not; the next call
    of its instance is applied behind it."""
    for nth in itertools.count():
        id, others = f"c{nth}", [f"d{nth}-{number}" for number in range(5)]
        for one in (id, *others):
            world.start(one, amount=5)
        named = situation(world, link, id)
        version = world.orders.get(id).version if situation is not cold else 1
        company: list[asyncio.Task[model.Receipt]] = []
        if not alone:
            company = [asyncio.ensure_future(orders.transition(one, "note")) for one in others]
            company.append(asyncio.ensure_future(orders.transition(id, "note", {"place": "before"})))
        cancelled = CancelledAt(orders.transition(id, data={"place": "cancelled"}, **named), nth)
        call = asyncio.ensure_future(_awaited(cancelled))
        if not alone:
            company.append(asyncio.ensure_future(orders.transition(id, "note", {"place": "behind"})))
        await asyncio.wait([call, *company])
        link.pass_through()
        assert [one.exception() for one in company] == [None] * len(company)
        last = await orders.transition(id, "note", {"place": "last"})
        rows = await orders.history(id)
        places = [row.patch["place"] for row in rows if "place" in row.patch]
        expected = ["cancelled", "last"] if alone else ["before", "cancelled", "behind", "last"]
        assert places in (expected, [place for place in expected if place != "cancelled"])
        assert [row.version for row in rows] == list(range(1, last.version + 1))
        assert last.version == version + len(places)
        if not call.cancelled():
            assert call.result().version == last.version - (1 if alone else 2)
            assert nth > cancelled.waits >= 1
            return


async def _awaited(work: CancelledAt) -> Any:
    return await work


@pytest.mark.parametrize("what", ["get", "cold get", "wait_durable", "flush", "start_many", "history"])
async def test_other_calls_cancelled_at_every_await(
    world: worlds.World, cache: AsyncStateCache, orders: AsyncMachineHandle, what: str
) -> None:
    """Reads, waits and what a thread does: the next one is answered, and nothing is left."""
    for nth in itertools.count():
        id = f"e{nth}"
        receipt = await orders.start(id)
        if what == "cold get":
            world.flush()
            assert world.evict(id) == "OK"
        calls: dict[str, Callable[[], Coroutine[Any, Any, Any]]] = {
            "get": lambda id=id: orders.get(id),
            "cold get": lambda id=id: orders.get(id),
            "wait_durable": lambda receipt=receipt: cache.wait_durable(receipt),
            "flush": lambda: cache.flush(),
            "start_many": lambda nth=nth: orders.start_many([f"f{nth}"]),
            "history": lambda id=id: orders.history(id),
        }
        call = asyncio.ensure_future(_awaited(CancelledAt(calls[what](), nth)))
        beside = asyncio.ensure_future(calls[what]() if what != "start_many" else orders.get(id))
        await asyncio.wait([call, beside])
        assert beside.exception() is None
        assert (await orders.get(id)).version == 1
        if not call.cancelled():
            assert call.exception() is None
            return


async def test_connect_and_close_cancelled_at_every_await(world: worlds.World) -> None:
    """What a cancelled ``connect`` has opened is closed; a cancelled ``close`` goes on, and the next one waits for it."""
    for nth in itertools.count():
        opening = asyncio.ensure_future(_awaited(CancelledAt(_opened(world), nth)))
        await asyncio.wait([opening])
        if not opening.cancelled():
            break
    cache: AsyncStateCache = opening.result()
    orders = await cache.machine(worlds.Order)
    await orders.start("1")
    call = asyncio.ensure_future(orders.transition("1", "note"))
    await asyncio.sleep(0)
    closing = asyncio.ensure_future(_awaited(CancelledAt(cache.close(), 1)))
    await asyncio.wait([closing])
    assert closing.cancelled()
    assert (await call).version == 2
    with pytest.raises(errors.ConfigurationError, match="closed"):
        await orders.get("1")
    await cache.close()
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def _opened(world: worlds.World) -> AsyncStateCache:
    return await AsyncStateCache.connect(world.redis_url, world.database_url, world.namespace, **world.settings)
