"""The sync client shared by threads, on a real server: closed, forked, interrupted and out of time in the midst of a batch."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import pytest

from statecache import StateCache
from statecache.core import errors, model
from statecache.engine.batcher import LEADERS_MAX
from tests.support import proxy, servers, worlds
from tests.support.waiting import wait_until

THREADS = 16


@pytest.fixture
def link(redis_server: servers.ValkeyServer, redis_url: str) -> Iterator[proxy.Proxy]:
    with proxy.Proxy(redis_server.port) as made:
        yield made


@pytest.fixture
def world(redis_url: str, sqlite_url: str, namespace: str) -> Iterator[worlds.World]:
    """A client straight to the server, to look with."""
    with worlds.World(redis_url, sqlite_url, namespace) as made:
        yield made
        made.flush_through()
        made.verify()


@pytest.fixture
def cache(world: worlds.World, link: proxy.Proxy) -> Iterator[StateCache]:
    """The client under test, behind the proxy; its threads' calls have left when ``in_flight`` says so."""
    settings: dict[str, Any] = {**world.settings, "call_timeout_seconds": 20.0}
    with StateCache.connect(link.url(world.redis_url), world.database_url, world.namespace, **settings) as made:
        made.machine(worlds.Order).start("warm")
        yield made
        link.pass_through()


@pytest.fixture
def pool() -> Iterator[futures.ThreadPoolExecutor]:
    with futures.ThreadPoolExecutor(THREADS) as made:
        yield made


def outcome(call: Callable[[], model.Receipt]) -> Any:
    try:
        return call()
    except errors.StateCacheError as error:
        return error


def queued(cache: StateCache) -> int:
    return len(cache.driver._batcher._queue)


def leading(cache: StateCache) -> int:
    return len(cache.driver._batcher._leaders)


def in_flight(
    cache: StateCache, link: proxy.Proxy, pool: futures.ThreadPoolExecutor, ids: list[str], **named: Any
) -> list[futures.Future[Any]]:
    """A call for each id: the first are in flight and held on their way, the others wait behind them."""
    orders = cache.machine(worlds.Order)
    link.hold()
    calls: list[futures.Future[Any]] = []
    for id in ids:
        calls.append(pool.submit(outcome, lambda id=id: orders.transition(id, "note", **named)))
        wait_until(lambda: leading(cache) + queued(cache) == len(calls), "the call to leave, or to queue")
    assert leading(cache) == min(len(ids), LEADERS_MAX)
    return calls


def test_close_while_sixteen_threads_call(
    world: worlds.World, cache: StateCache, link: proxy.Proxy, pool: futures.ThreadPoolExecutor
) -> None:
    """Two calls are in flight, fourteen wait behind them, the client is closed. The two get their receipts; the leader of the
    others finds the store closed, and so do those that travel with it: nobody hangs, or is told "perhaps"."""
    ids = [f"o{number}" for number in range(THREADS)]
    world.orders.start_many(ids)
    calls = in_flight(cache, link, pool, ids)
    cache.close()
    link.pass_through()
    found = [call.result(30) for call in calls]
    assert [type(one) for one in found] == [model.Receipt] * LEADERS_MAX + [errors.ConfigurationError] * (
        THREADS - LEADERS_MAX
    )
    assert all("closed" in str(one) for one in found[LEADERS_MAX:])
    assert [world.orders.get(id).version for id in ids] == [2] * LEADERS_MAX + [1] * (THREADS - LEADERS_MAX)


def test_close_among_calls_that_never_end(world: worlds.World, cache: StateCache) -> None:
    """Sixteen threads call as fast as they can, wherever that is in a call when the client is closed: each is refused in the
    end, and what was acknowledged is there."""
    world.orders.start_many([f"o{number}" for number in range(THREADS)])
    orders = cache.machine(worlds.Order)
    counts = [1] * THREADS
    ends: list[Any] = [None] * THREADS

    def work(number: int) -> None:
        while ends[number] is None:
            found = outcome(lambda: orders.transition(f"o{number}", "note"))
            if isinstance(found, model.Receipt):
                counts[number] = found.version
            else:
                ends[number] = found

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    wait_until(lambda: min(counts) > 5, "all threads to be at it")
    cache.close()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert {type(end) for end in ends} == {errors.ConfigurationError}
    assert [world.orders.get(f"o{number}").version for number in range(THREADS)] == counts


def test_fork_while_a_batch_is_in_flight(
    world: worlds.World, cache: StateCache, link: proxy.Proxy, pool: futures.ThreadPoolExecutor
) -> None:
    """Two calls are on their way, six wait; the process forks. The child has none of those threads, and leaders that do not
    run: it begins anew, on a connection of its own. In the parent each call is applied once."""
    ids = [f"o{number}" for number in range(8)]
    world.orders.start_many(ids)
    calls = in_flight(cache, link, pool, ids)
    done, told = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.read(done, 1)
            code = 0 if cache.machine(worlds.Order).transition("warm", "note").version == 2 else 2
        finally:
            os._exit(code)
    link.pass_through()
    os.write(told, b".")
    assert [call.result(30).version for call in calls] == [2] * 8
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert cache.machine(worlds.Order).transition("warm", "note").version == 3
    for end in (done, told):
        os.close(end)


def test_out_of_time_in_the_queue_and_in_flight(
    world: worlds.World, cache: StateCache, link: proxy.Proxy, pool: futures.ThreadPoolExecutor
) -> None:
    """The network holds two patient leaders' calls. A hasty call behind them is over before it has left: it is not sent, its
    repetition is applied. A hasty leader's is over in flight: it was applied, or its repetition is, which gets that receipt."""
    world.orders.start_many(["1", "2", "3", "4"])
    orders = cache.machine(worlds.Order)
    patient = in_flight(cache, link, pool, ["1", "2"])
    with pytest.raises(errors.UnavailableError, match="not sent"):
        orders.transition("3", "note", transition_id="mine-3", timeout=0.2)
    link.pass_through()
    assert [call.result(30).version for call in patient] == [2, 2]
    assert world.orders.get("3").version == 1
    assert orders.transition("3", "note", transition_id="mine-3").version == 2
    link.hold()
    with pytest.raises(errors.UnavailableError):
        orders.transition("4", "note", transition_id="mine-4", timeout=0.2)
    link.pass_through()
    assert orders.transition("4", "note", transition_id="mine-4").version == 2
    assert [len(world.orders.history(id)) for id in ("1", "2", "3", "4")] == [2] * 4


def test_a_lost_reply_of_a_leader_and_its_followers(
    world: worlds.World, cache: StateCache, link: proxy.Proxy, pool: futures.ThreadPoolExecutor
) -> None:
    """Two calls are in flight, six gather behind them and leave together; they are applied, and the reply is lost. Each repeats
    its own, and gets the receipt of what was applied."""
    ids = [f"o{number}" for number in range(8)]
    world.orders.start_many(ids)
    calls = in_flight(cache, link, pool, ids)
    link.drop_replies_after_forwarding(1, ids[7].encode())
    link.go_on()
    assert [call.result(30).version for call in calls] == [2] * 8
    assert link.faults_done == 1
    assert [len(world.orders.history(id)) for id in ids] == [2] * 8


def test_ctrl_c_between_sending_and_reading(
    world: worlds.World, cache: StateCache, link: proxy.Proxy, pool: futures.ThreadPoolExecutor
) -> None:
    """The main thread leads, and so does another: their requests are on their way; three threads wait behind them. Ctrl-C ends
    the main thread's call, at once. The others are answered, and its own move is applied once or not at all."""
    world.orders.start_many(["0", "1", "2", "3", "4"])
    orders = cache.machine(worlds.Order)
    link.hold()
    calls: list[futures.Future[Any]] = []

    def interrupt() -> None:
        wait_until(lambda: leading(cache) == 1, "the main thread to lead")
        for number in (1, 2, 3, 4):
            calls.append(pool.submit(orders.transition, f"{number}", "note"))
            wait_until(lambda: leading(cache) + queued(cache) == len(calls) + 1, "the call to leave, or to queue")
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # type: ignore[arg-type]

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        orders.transition("0", "note", transition_id="mine")
    thread.join()
    link.pass_through()
    assert [call.result(30).version for call in calls] == [2] * 4
    assert orders.transition("0", "note", transition_id="mine").version == 2
    assert len(world.orders.history("0")) == 2
