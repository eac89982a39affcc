"""Concurrent calls of the async client: company, order, cancellation, deadlines. Each race is forced."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Iterator
from typing import Any

import pytest
import pytest_asyncio

from statecache.aio import AsyncMachineHandle, AsyncStateCache
from statecache.core import errors, items, model
from statecache.hot import store
from tests.support import proxy, servers, worlds
from tests.support.waiting import wait_until

pytestmark = pytest.mark.asyncio


@pytest.fixture
def link(redis_server: servers.ValkeyServer, redis_url: str) -> Iterator[proxy.Proxy]:
    with proxy.Proxy(redis_server.port) as made:
        yield made


@pytest.fixture
def world(redis_url: str, sqlite_url: str, namespace: str) -> Iterator[worlds.World]:
    """A sync client of the same store, straight to the server, to look and to do harm with."""
    with worlds.World(redis_url, sqlite_url, namespace) as made:
        yield made
        made.flush_through()
        made.verify()


@pytest_asyncio.fixture
async def cache(world: worlds.World, link: proxy.Proxy) -> AsyncIterator[AsyncStateCache]:
    """The client under test, behind the proxy."""
    settings = {**world.settings, "call_timeout_seconds": 10.0}
    async with AsyncStateCache.connect(
        link.url(world.redis_url), world.database_url, world.namespace, **settings
    ) as made:
        yield made
        link.pass_through()


@pytest_asyncio.fixture
async def orders(cache: AsyncStateCache) -> AsyncMachineHandle:
    handle = await cache.machine(worlds.Order)
    await handle.start("warm")  # the connection is made by the first call
    return handle


def sent_by(cache: AsyncStateCache) -> list[list[str]]:
    """The ids in each script call from now on."""
    batches: list[list[str]] = []
    original = cache.sync.hot.packed_apply

    def packed(chunk: Any, line: Any) -> bytes:
        batches.append([item.id for item in chunk])
        return original(chunk, line)

    cache.sync.hot.packed_apply = packed  # type: ignore[method-assign]
    return batches


async def until(condition: Any, description: str) -> None:
    """``wait_until`` beside a running loop."""
    await asyncio.to_thread(wait_until, condition, description)


def applied(world: worlds.World, id: str) -> list[str]:
    return [row.event for row in world.orders.history(id)]


async def all_in_flight(
    link: proxy.Proxy, batches: list[list[str]], orders: AsyncMachineHandle, call: Awaitable[model.Receipt]
) -> asyncio.Task[Any]:
    """The same, and a second call behind it, of the instance ``beside``: no other may leave now."""
    first = await in_flight(link, batches, call)
    await in_flight(link, batches, orders.start("beside"))
    return first


async def in_flight(link: proxy.Proxy, batches: list[list[str]], call: Awaitable[model.Receipt]) -> asyncio.Task[Any]:
    """Start a call whose request does not arrive until the proxy passes it through."""
    link.hold()
    count = len(batches)
    task = asyncio.ensure_future(call)
    await until(lambda: len(batches) > count, "the call to leave")
    return task


# --- company -----------------------------------------------------------------------------------------------------------


async def test_calls_that_arrive_meanwhile_leave_together(cache: AsyncStateCache, orders: AsyncMachineHandle) -> None:
    """A thousand tasks: the first leaves alone, the others in few script calls, none of more than the bound."""
    batches = sent_by(cache)
    receipts = await asyncio.gather(*[orders.start(f"o{number}") for number in range(1000)])
    assert [receipt.id for receipt in receipts] == [f"o{number}" for number in range(1000)]
    sizes = [len(batch) for batch in batches]
    assert max(sizes) <= store.BATCH_ITEMS_MAX
    assert len(sizes) <= 10
    reads = await asyncio.gather(*[orders.get(f"o{number}") for number in range(1000)])
    assert [seen.version for seen in reads] == [1] * 1000


async def test_the_second_exchange_takes_half_of_the_callers(
    cache: AsyncStateCache, orders: AsyncMachineHandle
) -> None:
    """Forty tasks, one call after another: the server has one half of them while the loop has the other. (As one exchange of
    one and one of thirty-nine they waited for each other in turn.)"""
    ids = [f"o{number}" for number in range(40)]
    await asyncio.gather(*[orders.start(id) for id in ids])
    batches = sent_by(cache)

    async def caller(id: str) -> None:
        for _ in range(20):
            await orders.transition(id, "note")

    await asyncio.gather(*[caller(id) for id in ids])
    sizes = [len(batch) for batch in batches]
    assert sum(sizes) == 800
    assert max(sizes[len(sizes) // 4 :]) <= 20


async def test_a_second_call_need_not_wait_for_the_first(
    cache: AsyncStateCache, orders: AsyncMachineHandle, link: proxy.Proxy
) -> None:
    """Where callers were alone until now, one that comes while another is in flight leaves at once; the third waits."""
    batches = sent_by(cache)
    first = await all_in_flight(link, batches, orders, orders.start("first"))
    third = asyncio.ensure_future(orders.start("third"))
    await asyncio.sleep(0)
    assert batches == [["first"], ["beside"]]
    link.pass_through()
    await first
    assert (await third).version == 1


async def test_nothing_leaves_behind_a_call_that_waits_for_a_replica(
    cache: AsyncStateCache, orders: AsyncMachineHandle, link: proxy.Proxy
) -> None:
    """The server takes nothing from the connection while it waits for a replica: the socket timeout of what is sent behind
    would run meanwhile, and two such waits in a row would end the connection for all. Calls that wait for none have another
    connection."""

    def confirmed(id: str) -> asyncio.Future[items.Outcome]:
        request = orders._sync.calls.door.start(id)
        request.item.confirm = items.Confirm(False, 0, 0, 100)
        return cache.hot.apply(request.item, float("inf"), None)

    await confirmed("connected")
    batches = sent_by(cache)
    link.hold()
    first, second = confirmed("first"), confirmed("second")
    third = asyncio.ensure_future(orders.start("third"))
    await asyncio.sleep(0)
    assert batches == [["first"], ["third"]]
    link.pass_through()
    assert [(await one).code for one in (first, second)] == ["OK", "OK"]
    assert (await third).version == 1
    assert batches == [["first"], ["third"], ["second"]]


async def test_the_reply_of_an_unchecked_call_says_nothing_of_the_check_behind_it(
    world: worlds.World, cache: AsyncStateCache, orders: AsyncMachineHandle, link: proxy.Proxy
) -> None:
    """H13: the first call is in flight and compares no identity, the second one does, three others leave when the first is
    answered. The second one's check has no answer yet: so they compare too."""
    compares: list[bool] = []
    hot = cache.sync.hot
    batches = sent_by(cache)
    leaves = hot.packed_apply

    def packed(chunk: Any, line: Any) -> bytes:
        text = leaves(chunk, line)
        compares.append(bool(line.checks[-1]))
        return text

    hot.packed_apply = packed  # type: ignore[method-assign]
    hot.identity_interval_seconds = 3600.0
    first = await in_flight(link, batches, orders.start("first"))
    hot.wires.checked_at = 0.0
    second = await in_flight(link, batches, orders.start("second"))
    others = [asyncio.ensure_future(orders.start(id)) for id in ("third", "fourth", "fifth")]
    await asyncio.sleep(0)
    link.pass_through()
    for task in (first, second, *others):
        assert (await task).version == 1
    assert batches == [["first"], ["second"], ["third", "fourth", "fifth"]]
    assert compares == [False, True, True]


async def test_a_script_call_is_bounded_by_bytes(
    cache: AsyncStateCache, orders: AsyncMachineHandle, link: proxy.Proxy
) -> None:
    """60 patches of 60 kB: no script call takes more than the bound, however many wait."""
    sizes: list[int] = []
    original = cache.sync.hot.packed_apply

    def packed(chunk: Any, line: Any) -> bytes:
        sizes.append(sum(len(item.tail) for item in chunk))
        return original(chunk, line)

    cache.sync.hot.packed_apply = packed  # type: ignore[method-assign]
    await asyncio.gather(*[orders.start(f"o{number}", {"text": "x" * 60_000}) for number in range(60)])
    assert max(sizes) <= store.BATCH_BYTES_MAX
    assert len(sizes) >= 4


async def test_levels_of_durability_do_not_travel_together(
    cache: AsyncStateCache, orders: AsyncMachineHandle, link: proxy.Proxy
) -> None:
    """A WAIT behind the script speaks for its whole batch: calls that want another confirmation go by themselves."""
    batches = sent_by(cache)
    first = await all_in_flight(link, batches, orders, orders.start("first"))
    asked = []
    for id, confirm in (("plain", None), ("confirmed", items.Confirm(False, 0, 0, 100)), ("plain2", None)):
        request = orders._sync.calls.door.start(id)
        request.item.confirm = confirm
        asked.append(cache.hot.apply(request.item, float("inf"), None))
    link.pass_through()
    await first
    assert [(await one).code for one in asked] == ["OK"] * 3
    assert batches[:2] == [["first"], ["beside"]]
    assert sorted(batches[2:]) == [["confirmed"], ["plain", "plain2"]]


# --- order -------------------------------------------------------------------------------------------------------------


async def test_many_calls_of_one_instance_stand_in_one_script_call(
    cache: AsyncStateCache, orders: AsyncMachineHandle
) -> None:
    """Five hundred calls for one instance at once: applied in the order of the calls, not one by one."""
    await orders.start("1")
    batches = sent_by(cache)
    receipts = await asyncio.gather(*[orders.transition("1", "note", {"n": number}) for number in range(500)])
    assert [receipt.version for receipt in receipts] == list(range(2, 502))
    assert len(batches) <= 10
    assert [row.patch.get("n") for row in await orders.history("1")] == [None, *range(500)]


async def test_evicted_again_before_its_item_is_repeated(
    world: worlds.World, cache: AsyncStateCache, orders: AsyncMachineHandle
) -> None:
    """A call of its own brings it back in a thread, and the item follows later: evicted between the two, it begins again."""
    world.start("1")
    world.flush()
    world.evict("1")
    with worlds.after_call(cache.sync.hot, "hydrate", lambda: world.evict("1")):
        assert (await orders.transition("1", "pay")).version == 2
    assert applied(world, "1") == ["@start", "pay"]


async def test_a_cold_instance_is_not_overtaken_while_it_comes_back(
    world: worlds.World, cache: AsyncStateCache, orders: AsyncMachineHandle
) -> None:
    """The instance is evicted. ``pay`` meets MISS and hydrates in a thread, which is stopped there after the hash is back;
    now ``ship`` is called: alone it would be applied at once, and refused. It waits for ``pay``."""
    world.start("1")
    world.flush()
    world.evict("1")
    back, go_on = threading.Event(), threading.Event()

    def stop() -> None:
        back.set()
        assert go_on.wait(10)

    batches = sent_by(cache)
    with worlds.after_call(cache.sync.hot, "hydrate", stop):
        pay = asyncio.ensure_future(orders.transition("1", "pay"))
        await until(back.is_set, "the hash to be back")
        ship = asyncio.ensure_future(orders.transition("1", "ship"))
        other = await orders.start("2")
        go_on.set()
        assert [(await call).version for call in (pay, ship)] == [2, 3]
    assert other.version == 1
    assert batches[-1][-1] == "1"
    assert applied(world, "1") == ["@start", "pay", "ship"]


async def test_a_move_behind_its_start_waits_while_sql_is_asked_for_the_start(
    world: worlds.World, orders: AsyncMachineHandle
) -> None:
    """Something of each partition is cold, so that a start asks SQL first. ``pay`` is called behind the start, and was answered
    MISS in the same script call: SQL knew no such instance, which was then started."""
    for partition in range(world.keyspace.partition_count):
        id = world.id(partition)
        await asyncio.to_thread(world.start, id)
        await asyncio.to_thread(world.flush)
        await asyncio.to_thread(world.evict, id)

    async def pair(id: str) -> list[int]:
        return [one.version for one in await asyncio.gather(orders.start(id), orders.transition(id, "pay"))]

    assert await asyncio.gather(*[pair(f"n{number}") for number in range(60)]) == [[1, 2]] * 60


@pytest.mark.parametrize("trouble", ["scripts gone", "not the server", "reply lost", "request lost", "evicted"])
async def test_calls_of_one_instance_keep_their_order_in_trouble(
    world: worlds.World, cache: AsyncStateCache, orders: AsyncMachineHandle, link: proxy.Proxy, trouble: str
) -> None:
    """``pay``, ``ship`` and ``deliver`` of each of thirty orders are called at once; the first script call meets trouble. In
    any other order one of the three would be refused."""
    ids = [f"o{number}" for number in range(30)]
    world.orders.start_many(ids)
    world.flush()
    if trouble == "scripts gone":
        world.client.script_flush("SYNC")
    elif trouble == "not the server":
        cache.sync.hot.wires.checked_at = 0.0
        world.disown()
    elif trouble == "reply lost":
        link.drop_replies_after_forwarding(1, b"EVALSHA")
    elif trouble == "request lost":
        link.cut_before_forwarding(1, b"EVALSHA")
    else:
        for id in ids:
            world.evict(id)
    events = ("pay", "ship", "deliver")
    receipts = await asyncio.gather(*[orders.transition(id, event) for event in events for id in ids])
    assert [receipt.version for receipt in receipts] == [2] * 30 + [3] * 30 + [4] * 30
    assert all(applied(world, id) == ["@start", *events] for id in ids)


async def test_a_repetition_is_not_overtaken_while_history_is_asked(
    world: worlds.World, orders: AsyncMachineHandle, cache: AsyncStateCache, link: proxy.Proxy
) -> None:
    """After ten moves a call with an id of its own is answered OLD and asks history; ``ship``, which gathers with it behind
    calls in flight, would be refused if it stood in the same script call."""
    world.start("1", ["note"] * 10)
    first = await all_in_flight(link, sent_by(cache), orders, orders.start("first"))
    calls = [
        asyncio.ensure_future(orders.transition("1", "pay", transition_id="mine")),
        asyncio.ensure_future(orders.transition("1", "ship")),
        asyncio.ensure_future(orders.transition("1", "deliver")),
    ]
    await asyncio.sleep(0)
    link.pass_through()
    await first
    assert [(receipt.event, receipt.version) for receipt in await asyncio.gather(*calls)] == [
        ("pay", 12), ("ship", 13), ("deliver", 14),
    ]  # fmt: skip


async def test_guarded_moves_keep_their_order(orders: AsyncMachineHandle) -> None:
    """``approve`` reads before it writes; ``ship`` behind it waits."""
    await orders.start("1", {"amount": 5})
    receipts = await asyncio.gather(orders.transition("1", "approve"), orders.transition("1", "ship"))
    assert [receipt.version for receipt in receipts] == [2, 3]


@pytest.mark.parametrize("amounts", [(5,), (0, 5), (5, 0)], ids=["started", "made good", "spoilt"])
async def test_a_guard_looks_at_what_the_calls_before_it_left(
    world: worlds.World, orders: AsyncMachineHandle, link: proxy.Proxy, cache: AsyncStateCache, amounts: tuple[int, ...]
) -> None:
    """``start``, notes that change the amount, and ``approve`` are called at once, behind calls in flight. A guard that read
    at once would meet no order, or the amount before the note, and its verdict would stand."""
    first = await all_in_flight(link, sent_by(cache), orders, orders.start("first"))
    calls = [asyncio.ensure_future(orders.start("1", {"amount": amounts[0]}))]
    calls += [asyncio.ensure_future(orders.transition("1", "note", {"amount": amount})) for amount in amounts[1:]]
    approve = asyncio.ensure_future(orders.transition("1", "approve"))
    ship = asyncio.ensure_future(orders.transition("1", "ship"))
    await asyncio.sleep(0)
    link.pass_through()
    await asyncio.gather(first, *calls)
    if amounts[-1]:
        assert [(await one).event for one in (approve, ship)] == ["approve", "ship"]
    else:
        for one in (approve, ship):
            with pytest.raises(errors.InvalidTransitionError):
                await one


async def test_a_guarded_call_runs_out_of_time_or_is_cancelled_in_its_place(
    world: worlds.World, orders: AsyncMachineHandle, link: proxy.Proxy, cache: AsyncStateCache
) -> None:
    """``note`` is held on its way; two ``approve`` wait behind it for their turn: one has no time left, one is cancelled; they
    are not sent, and ``pay`` behind them is."""
    world.start("1", amount=5)
    batches = sent_by(cache)
    note = await in_flight(link, batches, orders.transition("1", "note"))
    late = asyncio.ensure_future(orders.transition("1", "approve", timeout=0.05))
    cancelled = asyncio.ensure_future(orders.transition("1", "approve"))
    pay = asyncio.ensure_future(orders.transition("1", "pay"))
    with pytest.raises(errors.UnavailableError, match="not sent"):
        await late
    cancelled.cancel()
    await asyncio.wait([cancelled])
    link.pass_through()
    assert [(await one).version for one in (note, pay)] == [2, 3]
    assert applied(world, "1") == ["@start", "note", "pay"]


# --- cancellation --------------------------------------------------------------------------------------------------------


async def test_a_call_cancelled_while_it_gathers_is_not_sent(
    world: worlds.World, cache: AsyncStateCache, orders: AsyncMachineHandle, link: proxy.Proxy
) -> None:
    """Two calls are in flight (their requests are held on the way); three gather behind them; the middle one is cancelled."""
    world.orders.start_many(["1", "2", "3", "4"])
    batches = sent_by(cache)
    first = await all_in_flight(link, batches, orders, orders.transition("1", "note"))
    gathered = [asyncio.ensure_future(orders.transition(id, "note")) for id in ("2", "3", "4")]
    await asyncio.sleep(0)
    gathered[1].cancel()
    await asyncio.wait([gathered[1]])
    link.pass_through()
    assert [(await one).version for one in (first, gathered[0], gathered[2])] == [2, 2, 2]
    assert gathered[1].cancelled()
    assert batches == [["1"], ["beside"], ["2", "4"]]
    assert [len(applied(world, id)) for id in ("1", "2", "3", "4")] == [2, 2, 1, 2]


async def test_a_call_cancelled_in_flight_is_applied_once_and_harms_nobody(
    world: worlds.World, cache: AsyncStateCache, orders: AsyncMachineHandle, link: proxy.Proxy
) -> None:
    """A batch of three is in flight; one of its callers is cancelled. The others get their receipts, on the same
    connection; the cancelled one's transition is there, once."""
    world.orders.start_many(["0", "1", "2", "3"])
    batches = sent_by(cache)
    alone = await all_in_flight(link, batches, orders, orders.transition("0", "note"))
    calls = [asyncio.ensure_future(orders.transition(id, "note")) for id in ("1", "2", "3")]
    await asyncio.sleep(0)
    connections = link.connections_made
    leaves = cache.sync.hot.packed_apply

    def held_again(chunk: Any, line: Any) -> bytes:
        link.hold()
        return leaves(chunk, line)

    cache.sync.hot.packed_apply = held_again  # type: ignore[method-assign]
    link.pass_through()
    await alone
    await until(lambda: len(batches) == 3, "the batch to leave")
    cache.sync.hot.packed_apply = leaves  # type: ignore[method-assign]
    calls[1].cancel()
    await asyncio.wait([calls[1]])
    link.pass_through()
    assert [(await one).version for one in (calls[0], calls[2])] == [2, 2]
    assert calls[1].cancelled()
    await until(lambda: world.orders.get("2").version == 2, "the cancelled call's transition")
    assert (await orders.transition("2", "note")).version == 3
    assert applied(world, "2") == ["@start", "note", "note"]
    assert link.connections_made == connections


async def test_what_follows_a_cancelled_call_does_not_overtake_it(
    world: worlds.World, cache: AsyncStateCache, orders: AsyncMachineHandle, link: proxy.Proxy
) -> None:
    """``pay`` is on its way to the server, held there, and its caller is cancelled. ``ship`` of the same order is called: on
    a connection of its own it would arrive first, and be refused."""
    world.start("1")
    batches = sent_by(cache)
    pay = await in_flight(link, batches, orders.transition("1", "pay"))
    pay.cancel()
    await asyncio.wait([pay])
    ship = asyncio.ensure_future(orders.transition("1", "ship"))
    await asyncio.sleep(0)
    assert len(batches) == 1
    link.pass_through()
    assert (await ship).version == 3
    assert applied(world, "1") == ["@start", "pay", "ship"]


async def test_a_cancelled_call_lets_the_next_of_its_instance_go(
    world: worlds.World, cache: AsyncStateCache, orders: AsyncMachineHandle, link: proxy.Proxy
) -> None:
    """Three notes of one order gather behind calls in flight; the first and the second are cancelled, by a timeout and by
    their task group; the third is applied."""
    world.start("1")
    batches = sent_by(cache)
    first = await all_in_flight(link, batches, orders, orders.start("2"))

    async def impatient() -> None:
        async with asyncio.timeout(0.01):
            await orders.transition("1", "note", {"n": 1})

    async def group() -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(orders.transition("1", "note", {"n": 2}))
            tasks.create_task(impatient())

    failing = asyncio.ensure_future(group())
    await asyncio.sleep(0)
    third = asyncio.ensure_future(orders.transition("1", "note", {"n": 3}))
    with pytest.raises(ExceptionGroup):
        await failing
    link.pass_through()
    await first
    assert (await third).version == 2
    assert [row.patch for row in world.orders.history("1")] == [{}, {"n": 3}]


async def test_cancelled_at_random(world: worlds.World, cache: AsyncStateCache, orders: AsyncMachineHandle) -> None:
    """Six hundred calls, a third of them cancelled, each at another moment: what was answered stands, in its place; nothing
    is applied twice, and the rest of the calls is answered."""
    ids = [f"o{number}" for number in range(20)]
    world.orders.start_many(ids)
    calls = []
    for number in range(600):
        calls.append(asyncio.ensure_future(orders.transition(ids[number % 20], "note", {"n": number})))
        if number % 3 == 0:
            asyncio.get_running_loop().call_later(0.0002 * (number % 50), calls[-1].cancel)
        if number % 40 == 0:
            await asyncio.sleep(0)
    done = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(one, (model.Receipt, asyncio.CancelledError)) for one in done)
    world.flush()
    for place, id in enumerate(ids):
        numbers = [row.patch["n"] for row in world.orders.history(id)[1:]]
        assert numbers == sorted(set(numbers))
        assert {n for n in range(place, 600, 20) if isinstance(done[n], model.Receipt)} <= set(numbers)


# --- deadlines -----------------------------------------------------------------------------------------------------------


async def test_deadlines_are_each_calls_own(
    world: worlds.World, cache: AsyncStateCache, orders: AsyncMachineHandle, link: proxy.Proxy
) -> None:
    """The network holds. One in flight and one that gathers run out of time and are told so; their neighbours, more patient,
    are answered when the network goes on, on the same connection."""
    world.orders.start_many(["1", "2", "3", "4"])
    batches = sent_by(cache)
    await orders.get("1")
    connections = link.connections_made
    short = await all_in_flight(link, batches, orders, orders.transition("1", "note", timeout=0.3))
    gathered = asyncio.ensure_future(orders.transition("2", "note", timeout=0.3))
    patient = [asyncio.ensure_future(orders.transition(id, "note", timeout=20.0)) for id in ("1", "3", "4")]
    for call, message in ((short, "may have been applied|did not answer"), (gathered, "did not answer")):
        with pytest.raises(errors.UnavailableError, match=message):
            await call
    assert not any(call.done() for call in patient)
    link.pass_through()
    assert [(await call).version for call in patient] == [3, 2, 2]
    assert [len(applied(world, id)) for id in ("1", "2", "3", "4")] == [3, 1, 2, 2]
    assert [sorted(batch) for batch in batches] == [["1"], ["beside"], ["1", "3", "4"]]
    assert link.connections_made == connections


async def test_errors_are_each_calls_own(orders: AsyncMachineHandle) -> None:
    await orders.start("1")
    results = await asyncio.gather(
        orders.transition("1", "ship"), orders.transition("2", "pay"), orders.start("1"), orders.start("3"),
        orders.transition("1", "pay", expect_version=7), orders.transition("1", "pay"),
        return_exceptions=True,
    )  # fmt: skip
    kinds = [errors.InvalidTransitionError, errors.NotFoundError, errors.AlreadyExistsError, model.Receipt,
             errors.StaleVersionError, model.Receipt]  # fmt: skip
    assert [type(one) for one in results] == kinds


async def test_a_server_that_gives_no_reply_is_given_up(
    world: worlds.World, link: proxy.Proxy, orders: AsyncMachineHandle
) -> None:
    """The connection is dropped after the socket timeout; the call is repeated on another one, and applied once."""
    settings = {**world.settings, "socket_timeout_seconds": 0.3, "call_timeout_seconds": 20.0}
    async with AsyncStateCache.connect(
        link.url(world.redis_url), world.database_url, world.namespace, **settings
    ) as cache:
        impatient = await cache.machine(worlds.Order)
        await impatient.start("1")
        connections = link.connections_made
        batches = sent_by(cache)
        call = await in_flight(link, batches, impatient.transition("1", "note"))
        await until(lambda: cache.hot._items._pipe is None, "the connection to be given up")
        link.pass_through()
        assert (await call).version == 2
        assert link.connections_made > connections
    assert applied(world, "1") == ["@start", "note"]
