"""The async client's life: opening, closing, loops, forks, kinds of loops; nothing is left running."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import warnings
from collections.abc import Callable, Coroutine, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import httpx
import psutil
import pytest
import uvloop

from statecache import Move, StateCache
from statecache.aio import AsyncStateCache
from statecache.core import errors, model
from statecache.engine import aio_claims, aside, claims
from statecache.engine.aio_handle import AsyncMachineHandle
from statecache.engine.handle import MachineHandle
from tests.support import proxy, servers, worlds
from tests.support.waiting import wait_until


@pytest.fixture
def link(redis_server: servers.ValkeyServer, redis_url: str) -> Iterator[proxy.Proxy]:
    with proxy.Proxy(redis_server.port) as made:
        yield made


@pytest.fixture
def world(redis_url: str, sqlite_url: str, namespace: str) -> Iterator[worlds.World]:
    with worlds.World(redis_url, sqlite_url, namespace) as made:
        yield made


def connect(world: worlds.World, url: str = "", **settings: Any) -> Any:
    return AsyncStateCache.connect(
        url or world.redis_url, world.database_url, world.namespace, **{**world.settings, **settings}
    )


def sockets_to(port: int) -> int:
    """Connections of this process to a port of the loopback interface."""
    own = psutil.Process().net_connections("tcp")
    return sum(bool(one.raddr) and one.raddr.port == port and one.status == "ESTABLISHED" for one in own)


# --- closing -------------------------------------------------------------------------------------------------------------


def test_close_waits_for_what_is_in_flight_and_leaves_nothing(world: worlds.World, link: proxy.Proxy) -> None:
    """A call in flight, one that gathers, one that is cancelled in flight: ``close`` is called; the first two get their
    receipts; then no task, no thread and no socket is left, and calls are refused with a clear error."""

    async def main() -> None:
        threads = set(threading.enumerate())
        cache = await connect(world, link.url(world.redis_url), call_timeout_seconds=20.0)
        orders = await cache.machine(worlds.Order)
        await orders.start("1")
        link.hold()
        calls = [asyncio.create_task(orders.transition("1", "note")), asyncio.create_task(orders.start("2"))]
        cancelled = asyncio.create_task(orders.start("3"))
        await asyncio.sleep(0)
        cancelled.cancel()
        closing = asyncio.create_task(cache.close())
        await asyncio.sleep(0)
        for call in (orders.start("4"), orders.get("1"), cache.flush(), orders.history("1"), cache.machine("order")):
            with pytest.raises(errors.ConfigurationError, match="closed"):
                await call
        assert not closing.done()
        link.pass_through()
        assert [(await call).version for call in calls] == [2, 1]
        await closing
        await cache.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert set(threading.enumerate()) - threads <= {one for one in threading.enumerate() if "proxy" in one.name}

    asyncio.run(main())
    assert sockets_to(link.port) == 0


def test_close_while_the_server_is_away(world: worlds.World, link: proxy.Proxy) -> None:
    """The server refuses connections; a call tries again and again; ``close`` waits for it, and it for its deadline. Another
    one is answered because the server is back in time."""

    async def main() -> None:
        for is_back in (False, True):
            cache = await connect(world, link.url(world.redis_url))
            orders = await cache.machine(worlds.Order)
            await orders.start(f"{is_back}")
            link.refuse()
            call = asyncio.create_task(orders.transition(f"{is_back}", "note", timeout=20.0 if is_back else 0.3))
            await asyncio.sleep(0.05)
            closing = asyncio.create_task(cache.close())
            if is_back:
                link.pass_through()
                assert (await call).version == 2
            else:
                with pytest.raises(errors.UnavailableError):
                    await call
                link.pass_through()
            await closing

    asyncio.run(main())
    assert sockets_to(link.port) == 0


def test_a_close_that_is_cancelled_goes_on(world: worlds.World) -> None:
    async def main() -> None:
        cache = await connect(world, flusher=True)
        orders = await cache.machine(worlds.Order)
        await orders.start("1")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await cache.close()
        await cache.close()
        assert world.versions("1") == [1]

    asyncio.run(main())


def test_what_a_cancelled_connect_opens_is_closed(world: worlds.World, redis_server: servers.ValkeyServer) -> None:
    """The caller gives up while a thread connects: nobody would close what that makes."""
    world.close()
    before = sockets_to(redis_server.port)

    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                await connect(world)

    asyncio.run(main())
    wait_until(lambda: not any("statecache" in one.name for one in threading.enumerate()), "the threads to end")
    assert sockets_to(redis_server.port) == before


def test_a_loop_that_ends_without_close(world: worlds.World) -> None:
    """The program forgot to close: what Python says of that, it says; nothing hangs, and the rest can be closed later."""
    kept: list[AsyncStateCache] = []

    async def main() -> None:
        cache = await connect(world)
        kept.append(cache)
        await (await cache.machine(worlds.Order)).start("1")

    asyncio.run(main())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        asyncio.run(kept[0].close())
        kept.clear()
        gc.collect()
    assert world.orders.get("1").version == 1


# --- loops ---------------------------------------------------------------------------------------------------------------


def test_two_loops_in_one_process(world: worlds.World) -> None:
    """Each thread has a loop and a client of its own; both move the same order."""

    async def work(events: int) -> list[int]:
        async with connect(world) as cache:
            orders = await cache.machine(worlds.Order)
            return [(await orders.transition("1", "note")).version for _ in range(events)]

    world.start("1")
    first, second = worlds.together(lambda: asyncio.run(work(30)), lambda: asyncio.run(work(30)))
    assert sorted(first + second) == list(range(2, 62))


def test_a_client_belongs_to_its_loop(world: worlds.World) -> None:
    async def main() -> None:
        async with connect(world) as cache:
            orders = await cache.machine(worlds.Order)

            def elsewhere() -> None:
                with pytest.raises(errors.ConfigurationError, match="another event loop"):
                    asyncio.run(orders.get("1"))
                with pytest.raises(errors.ConfigurationError, match="another event loop"):
                    asyncio.run(cache.close())

            await asyncio.to_thread(elsewhere)
            with pytest.raises(errors.NotFoundError):
                await orders.get("1")

    asyncio.run(main())


def test_without_an_asyncio_loop_it_says_what_is_needed() -> None:
    """As under trio: somebody else drives the coroutine."""
    coroutine = AsyncStateCache.connect("redis://localhost:1/0", "sqlite://").__await__()
    with pytest.raises(errors.ConfigurationError, match="trio is not supported"):
        next(coroutine)


def test_a_forked_child_makes_its_own(world: worlds.World) -> None:
    """The parent forks with a connected client. In the child that one refuses, and a new one works; the parent's goes on."""

    async def child() -> None:
        async with connect(world) as cache:
            assert (await (await cache.machine(worlds.Order)).transition("1", "note")).version == 3

    def in_child(orders: Any) -> int:
        with pytest.raises(errors.ConfigurationError, match="forked"):
            orders.get("1").send(None)
        asyncio.run(child())
        return 0

    async def main() -> None:
        async with connect(world) as cache:
            orders = await cache.machine(worlds.Order)
            await orders.start("1")
            await orders.transition("1", "note")
            pid = os.fork()
            if pid == 0:
                code = 2
                try:
                    asyncio.events._set_running_loop(None)
                    code = in_child(orders)
                finally:
                    os._exit(code)
            _, status = await asyncio.to_thread(os.waitpid, pid, 0)
            assert os.waitstatus_to_exitcode(status) == 0
            assert (await orders.transition("1", "note")).version == 4

    asyncio.run(main())


# --- kinds of loops, and the whole surface ---------------------------------------------------------------------------------


async def whole_life(cache: AsyncStateCache) -> None:
    """Every method once."""
    orders = await cache.machine(worlds.Order)
    started = await orders.start("1", {"amount": 1})
    paid = await orders.transition("1", "pay", {"method": "card"}, increment={"tries": 1}, transition_id="p")
    assert (await orders.transition("1", "pay", transition_id="p")).duplicate
    assert [one.version for one in await orders.start_many(["2", ("3", None)]) if isinstance(one, model.Receipt)] == [
        1,
        1,
    ]
    many = await orders.transition_many([model.Move("2", "pay"), model.Move("2", "deliver")])
    assert [type(one) for one in many] == [model.Receipt, errors.InvalidTransitionError]
    seen = await orders.get("1")
    assert (seen.state, seen.data) == ("paid", {"amount": 1, "method": "card", "tries": 1})
    assert [one.version for one in await orders.get_many(["1", "2"]) if isinstance(one, model.Snapshot)] == [2, 2]
    assert await orders.state("1") == "paid"
    await cache.wait_durable([started, paid])
    await cache.wait_durable(paid)
    await cache.flush()
    assert [row.event for row in await orders.history("1")] == ["@start", "pay"]
    assert (await orders.at("1", version=1)).state == "placed"
    assert {one.id for one in await orders.find("paid")} == {"1", "2"}
    assert (await orders.counts()) == {"placed": 1, "paid": 2}
    assert (await orders.start("4", durability="durable")).version == 1
    assert await cache.stuck(older_than=timedelta(0), limit=5) == []
    port = await cache.serve_metrics(port=0)
    async with httpx.AsyncClient() as http:
        assert "statecache_transitions_total" in (await http.get(f"http://127.0.0.1:{port}/metrics")).text
    assert cache.redis_url
    assert cache.database_url


def test_calls_that_take_their_time_do_not_hold_up_those_that_have_none(world: worlds.World) -> None:
    """As many lists as there are threads for them are under way, without an end. Claims, and waits for durability, go on; a
    call with a timeout of its own that has not begun by then says so, and is not made later."""

    async def main() -> None:
        async with connect(world, flusher=True) as cache:
            orders = await cache.machine(worlds.Order)
            receipts = [await orders.start(id) for id in ("1", "2")]
            go_on = threading.Event()
            lists = [asyncio.create_task(cache.blocking(go_on.wait)) for _ in range(aside.THREADS)]
            try:
                await asyncio.sleep(0)
                async with orders.claim("1", ttl=30) as claim:
                    await claim.renew(60)
                    assert [held.token for held in await orders.claims()] == [claim.token]
                await cache.wait_durable(receipts)
                for call in (
                    orders.get_many(["1", "2"], timeout=0.05),
                    orders.transition_many([Move("1", "pay")], timeout=0.05),
                    orders.history("1", timeout=0.05),
                    cache.flush(0.05),
                ):
                    with pytest.raises(errors.UnavailableError, match="not sent: 8 other calls"):
                        await call
                waiting = asyncio.create_task(orders.transition_many([Move("1", "pay")], timeout=30.0))
                await asyncio.sleep(0.01)
                waiting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await waiting
            finally:
                go_on.set()
            await asyncio.gather(*lists)
            assert [one.version for one in await orders.get_many(["1", "2"], timeout=5)] == [1, 1]

    asyncio.run(main())


_OF_OUR_PROCESSES = {
    "confirm", "confirm_many", "confirmation", "deadline", "flush_alone", "level", "make_flusher",
    "on_close", "open", "server", "start_flusher",
}  # fmt: skip
"""What only statecache itself calls (docs/asyncio.md)."""


def test_the_methods_are_those_of_the_sync_client() -> None:
    for sync, its_async, inner in (
        (StateCache, AsyncStateCache, _OF_OUR_PROCESSES),
        (MachineHandle, AsyncMachineHandle, set()),
        (claims.Claim, aio_claims.AsyncClaim, set()),
    ):
        public = {name for name in dir(sync) if not name.startswith("_")}
        assert public - set(dir(its_async)) == inner, sync.__name__


@pytest.mark.parametrize("runner", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("flusher", [True, False])
def test_every_method_on_every_loop(
    world: worlds.World, runner: Callable[[Coroutine[Any, Any, None]], None], flusher: bool
) -> None:
    async def main() -> None:
        async with connect(world, flusher=flusher) as cache:
            await whole_life(cache)

    runner(main())


@pytest.mark.parametrize("runner", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_embedded(data_folder: Path, runner: Callable[[Coroutine[Any, Any, None]], None]) -> None:
    async def main() -> None:
        async with AsyncStateCache.embedded(data_folder) as cache:
            await whole_life(cache)

    runner(main())


def test_anyio(world: worlds.World) -> None:
    """Task groups and cancel scopes of anyio, on its asyncio backend."""

    async def main() -> None:
        async with connect(world) as cache:
            orders = await cache.machine(worlds.Order)
            async with anyio.create_task_group() as group:
                for number in range(50):
                    group.start_soon(orders.start, f"o{number}")
            with anyio.move_on_after(0) as scope:
                await orders.start("late")
            assert scope.cancelled_caught
            assert (await orders.get("o49")).version == 1

    anyio.run(main, backend="asyncio")


def test_a_thousand_cold_instances_cost_a_few_queries(world: worlds.World) -> None:
    """Their look-ups and hydrations are gathered, as a bulk call's are."""
    ids = [f"o{number}" for number in range(300)]
    world.orders.start_many(ids)
    world.flush()
    for id in ids:
        world.evict(id)

    async def main() -> None:
        async with connect(world) as cache:
            queries = 0
            original = cache.sync.durable.lookup

            def counted(*arguments: Any) -> Any:
                nonlocal queries
                queries += 1
                return original(*arguments)

            cache.sync.durable.lookup = counted
            orders = await cache.machine(worlds.Order)
            receipts = await asyncio.gather(*[orders.transition(id, "note") for id in ids])
            assert [one.version for one in receipts] == [2] * 300
            assert queries <= 30

    asyncio.run(main())


def test_many_durable_calls_share_the_flushes(world: worlds.World) -> None:
    """Three hundred calls with ``durability="durable"`` at once, nobody else flushes: each is in SQL when it returns, and there
    were few commits."""

    async def main() -> None:
        async with connect(world) as cache:
            orders = await cache.machine(worlds.Order)
            steps = 0
            original = cache.sync.flusher.step

            def counted(*arguments: Any, **named: Any) -> Any:
                nonlocal steps
                steps += 1
                return original(*arguments, **named)

            cache.sync.flusher.step = counted

            async def one(number: int) -> None:
                receipt = await orders.start(f"o{number}", durability="durable", timeout=30.0)
                row = await asyncio.to_thread(world.durable.transition, "order", receipt.id, 1)
                assert row is not None

            await asyncio.gather(*[one(number) for number in range(300)])
            assert steps <= 30

    asyncio.run(main())


def test_bulk_calls_that_wait_keep_nobody_waiting(world: worlds.World) -> None:
    """More of them than there are threads wait for room in one partition; in the other a cold instance is read, and a durable
    transition confirmed, meanwhile."""
    full, cold, hot = world.id(0), world.id(1), world.id(1, "hot")
    for id in (full, cold, hot):
        world.start(id)
    world.flush()
    world.cache.durable.checkpoint("order", cold)
    assert world.evict(cold)

    async def main() -> None:
        async with await connect(world, flusher=True, call_timeout_seconds=30.0) as cache:
            orders = await cache.machine(worlds.Order)
            await orders.get(hot)
            braked = asyncio.create_task(brake())
            await asyncio.sleep(0.1)
            bulk = [asyncio.create_task(orders.transition_many([model.Move(full, "note")])) for _ in range(20)]
            await asyncio.sleep(0.5)
            assert (await orders.get(cold)).version == 1
            assert (await orders.transition(hot, "note", durability="durable")).version == 2
            assert not any(each.done() for each in bulk)
            braked.cancel()
            world.client.hset(world.keyspace.meta(0), "limit", "1000")
            found = [one for each in await asyncio.gather(*bulk) for one in each]
            assert sorted(one.version for one in found) == list(range(2, 22))

    async def brake() -> None:
        while True:
            world.client.hset(world.keyspace.meta(0), "limit", "-100000")
            await asyncio.sleep(0.005)

    asyncio.run(main())
