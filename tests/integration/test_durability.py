"""The levels ``fsync``, ``replica`` and ``durable`` on real servers: given, refused, or the receipt and "unknown" (P7)."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest

from statecache import StateCacheError
from statecache.aio import AsyncStateCache
from statecache.core import errors, model
from tests.support import proxy, servers, waiting, worlds

Start = Callable[..., servers.ValkeyServer]


# --- fsync -------------------------------------------------------------------------------------------------------------


def test_fsync_is_given_where_every_write_is_synced(start_redis: Start, sqlite_url: str, namespace: str) -> None:
    with worlds.World(start_redis(appendfsync="always").url, sqlite_url, namespace, durability="fsync") as world:
        assert world.orders.start("1").version == 1
        assert world.orders.transition("1", "note", durability="fsync").version == 2
        assert [one.version for one in world.orders.start_many(["2", "3"], durability="fsync")] == [1, 1]


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"appendonly": "no"}, "appendonly"),
        ({"appendfsync": "no"}, "appendfsync always"),
        ({"appendfsync": "always", "no_appendfsync_on_rewrite": "yes"}, "no-appendfsync-on-rewrite"),
    ],
)
def test_fsync_is_refused(
    start_redis: Start, sqlite_url: str, namespace: str, setting: dict[str, str], says: str
) -> None:
    """At connect if it is the store's level, else at the first call that wants it; nothing is written by that call."""
    server = start_redis(**setting)
    with worlds.World(server.url, sqlite_url, namespace) as world:
        with pytest.raises(errors.ConfigurationError, match=says):
            world.orders.start("1", durability="fsync")
        with pytest.raises(errors.ConfigurationError, match=says):
            world.more(durability="fsync")
        with pytest.raises(errors.NotFoundError):
            world.orders.get("1")


def test_fsync_under_everysec(start_redis: Start, sqlite_url: str, namespace: str) -> None:
    """WAITAOF is believed where it is true (fact 2): Redis 7.2 and from 8.2 on; everywhere else the level is refused."""
    with worlds.World(start_redis().url, sqlite_url, namespace) as world:
        facts = world.hot.server_facts()
        version = tuple(int(part) for part in facts["redis_version"].split(".")[:2])
        if "valkey_version" not in facts and (version == (7, 2) or version >= (8, 2)):
            assert world.orders.start("1", durability="fsync").version == 1
            sent = world.client.info("commandstats")["cmdstat_waitaof"]["calls"]
            assert sent == 1
        else:
            with pytest.raises(errors.ConfigurationError, match="appendfsync always"):
                world.orders.start("1", durability="fsync")


@pytest.mark.parametrize("client", ["sync", "async"])
def test_a_level_is_judged_though_an_idle_connection_has_died(
    start_redis: Start, sqlite_url: str, namespace: str, client: str
) -> None:
    """A load balancer's limit, or an operator: the first call that wants the level finds its connection dead, and goes on."""
    server = start_redis(appendfsync="always")
    with worlds.World(server.url, sqlite_url, namespace, client=client) as world:
        world.orders.start("1")
        world.client.client_kill_filter(_type="normal", skipme=True)
        assert world.orders.transition("1", "note", durability="fsync").version == 2
        world.cache.wait_durable(world.orders.transition("1", "pay", durability="durable"))


# --- replica -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def replica(private_redis: servers.ValkeyServer, start_redis: Start) -> servers.ValkeyServer:
    made = start_redis(replicaof=f"127.0.0.1 {private_redis.port}")
    with private_redis.client() as client:
        waiting.wait_until(
            lambda: client.info("replication").get("slave0", {}).get("state") == "online", "the replica to be online"
        )
    return made


@pytest.fixture
def replicated(
    private_redis: servers.ValkeyServer, replica: servers.ValkeyServer, sqlite_url: str, namespace: str, client: str
) -> Iterator[worlds.World]:
    with worlds.World(private_redis.url, sqlite_url, namespace, client=client) as world:
        yield world
        if replica.alive:
            replica.resume()
        world.flush()
        world.verify()


def test_replica_is_refused_without_one(redis_url: str, sqlite_url: str, namespace: str) -> None:
    with worlds.World(redis_url, sqlite_url, namespace) as world:
        with pytest.raises(errors.ConfigurationError, match="1 replicas, this server has 0"):
            world.orders.start("1", durability="replica")
        with pytest.raises(errors.ConfigurationError, match="1 replicas"):
            world.more(durability="replica")


def test_replica_is_given(replicated: worlds.World, replica: servers.ValkeyServer) -> None:
    """When the call returns, the replica has the entry."""
    receipt = replicated.orders.start("1", durability="replica")
    log = replicated.keyspace.log(replicated.partition_of("1"))
    with replica.client() as client:
        assert client.xrange(log, receipt.entry_id, receipt.entry_id)


def test_replica_that_does_not_answer(replicated: worlds.World, replica: servers.ValkeyServer) -> None:
    """The replica is stopped (SIGSTOP): the receipt comes with ``DurabilityTimeout``, the transition stands; so do those of a
    bulk call."""
    replicated.start("1")
    replica.pause()
    with pytest.raises(errors.DurabilityTimeout) as caught:
        replicated.orders.transition("1", "note", durability="replica", timeout=0.3)
    assert caught.value.receipt.version == 2
    results = replicated.orders.start_many(["2", "3"], durability="replica", timeout=0.3)
    assert [type(one) for one in results] == [errors.DurabilityTimeout] * 2
    assert [one.receipt.version for one in results if isinstance(one, errors.DurabilityTimeout)] == [1, 1]
    assert replicated.orders.get("1").version == 2
    assert replicated.orders.get("3").version == 1


def test_a_repetition_waits_for_a_write_of_its_own(replicated: worlds.World, replica: servers.ValkeyServer) -> None:
    """The replica is stopped; the call times out; it is repeated on a connection that has written nothing yet. There WAIT would
    say yes at once, had the duplicate not written its ring again (fact 3)."""
    replicated.start("1")
    replica.pause()
    with pytest.raises(errors.DurabilityTimeout):
        replicated.orders.transition("1", "note", transition_id="n1", durability="replica", timeout=0.3)
    other = replicated.more().machine(worlds.Order)
    with pytest.raises(errors.DurabilityTimeout) as caught:
        other.transition("1", "note", transition_id="n1", durability="replica", timeout=0.3)
    assert (caught.value.receipt.version, caught.value.receipt.duplicate) == (2, True)
    replica.resume()
    receipt = other.transition("1", "note", transition_id="n1", durability="replica", timeout=10.0)
    assert (receipt.version, receipt.duplicate) == (2, True)


def test_a_repetition_of_long_ago_waits_for_a_write_of_its_own(
    replicated: worlds.World, replica: servers.ValkeyServer
) -> None:
    """The ring has dropped the id, so the script answers OLD and history knows. The replica is stopped: no confirmation was
    had, and the call says so; once it goes on, the repetition is confirmed."""
    replicated.start("1")
    replicated.orders.transition("1", "note", transition_id="long ago")
    for _ in range(9):
        replicated.orders.transition("1", "note")
    replica.pause()
    other = replicated.more().machine(worlds.Order)
    with pytest.raises(errors.DurabilityTimeout) as caught:
        other.transition("1", "note", transition_id="long ago", durability="replica", timeout=0.3)
    assert (caught.value.receipt.version, caught.value.receipt.duplicate) == (2, True)
    replica.resume()
    receipt = other.transition("1", "note", transition_id="long ago", durability="replica", timeout=10.0)
    assert (receipt.version, receipt.duplicate) == (2, True)


@pytest.mark.parametrize("client", ["sync", "async"])
def test_calls_that_wait_for_a_replica_hold_up_no_others(
    private_redis: servers.ValkeyServer, replica: servers.ValkeyServer, sqlite_url: str, namespace: str, client: str
) -> None:
    """The replica stands still, and callers wait for it: those that want ``hot`` are answered meanwhile."""
    with worlds.World(private_redis.url, sqlite_url, namespace, client=client, call_timeout_seconds=30.0) as world:
        ids = [f"r{number}" for number in range(6)]
        world.orders.start_many([*ids, "hot"])
        world.orders.transition("r0", "note", durability="replica")  # the level is judged
        replica.pause()
        begun = threading.Barrier(len(ids) + 1)

        def confirmed(id: str) -> Any:
            begun.wait()
            return world.orders.transition(id, "pay", durability="replica", timeout=3.0)

        def hot() -> list[int]:
            begun.wait()
            return [world.orders.transition("hot", "note", timeout=2.0).version for _ in range(20)]

        try:
            *late, versions = worlds.together(*[lambda id=id: confirmed(id) for id in ids], hot)
        finally:
            replica.resume()
        assert versions == list(range(2, 22))
        kinds = {type(one).__name__ for one in late}
        assert "DurabilityTimeout" in kinds
        assert kinds <= {"DurabilityTimeout", "UnavailableError"}


def test_order_of_tasks_holds_over_levels(
    private_redis: servers.ValkeyServer, replica: servers.ValkeyServer, sqlite_url: str, namespace: str
) -> None:
    async def main(world: worlds.World) -> None:
        async with AsyncStateCache.connect(private_redis.url, sqlite_url, namespace, **world.settings) as cache:
            orders = await cache.machine(worlds.Order)
            await orders.start_many([f"o{number}" for number in range(20)])
            levels = ["hot", "replica", "hot", "hot", "replica", "replica", "hot"]
            tasks = [
                asyncio.create_task(orders.transition(f"o{number}", "note", {"place": place}, durability=level))
                for place, level in enumerate(levels)
                for number in range(20)
            ]
            receipts = await asyncio.gather(*tasks)
            for number in range(20):
                assert [one.version for one in receipts[number::20]] == list(range(2, 2 + len(levels)))
                assert (await orders.get(f"o{number}")).data == {"place": len(levels) - 1}

    with worlds.World(private_redis.url, sqlite_url, namespace) as world:
        asyncio.run(main(world))


@pytest.mark.parametrize("client", ["sync", "async"])
def test_confirmation_of_a_second_attempt_takes_what_is_left_of_the_calls_time(
    private_redis: servers.ValkeyServer, replica: servers.ValkeyServer, sqlite_url: str, namespace: str, client: str
) -> None:
    """The first attempt meets a cold instance, and its WAIT takes all the time, because of a write before it. The second one
    stands, and waits no longer."""
    with worlds.World(private_redis.url, sqlite_url, namespace, client=client) as world:
        world.start("cold")
        world.start("hot")
        world.flush()
        world.evict("cold")
        waits: list[int] = []
        real = world.hot.packed_apply

        def noting(chunk: Any, line: Any) -> bytes:
            waits.extend(item.confirm.timeout_ms for item in chunk if item.confirm is not None)
            return real(chunk, line)

        replica.pause()
        try:
            with mock.patch.object(world.hot, "packed_apply", noting):
                with pytest.raises(errors.DurabilityTimeout):  # a write on the same connection that the replica has not
                    world.orders.transition("hot", "note", durability="replica", timeout=0.2)
                waits.clear()
                with pytest.raises(errors.DurabilityTimeout, match="stands") as late:
                    world.orders.transition("cold", "note", durability="replica", timeout=1.0)
        finally:
            replica.resume()
        assert late.value.receipt is not None
        assert late.value.receipt.version == 2
        assert waits[0] > 500
        assert sum(waits[1:]) < 500


# --- durable -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def link(postgres_server: servers.PostgresServer) -> Iterator[proxy.Proxy]:
    with proxy.Proxy(postgres_server.port) as made:
        yield made


def test_durable_is_in_sql(redis_url: str, database_and_client: tuple[str, str], namespace: str) -> None:
    """When the call returns, the row is there; Redis may be lost now."""
    database_url, client = database_and_client
    with worlds.World(redis_url, database_url, namespace, client=client) as world:
        receipt = world.orders.start("1", {"amount": 1}, durability="durable")
        row = world.durable.transition("order", "1", 1)
        assert row is not None
        assert row.transition_id == receipt.transition_id
        results = world.orders.start_many([f"m{number}" for number in range(30)], durability="durable")
        assert all(isinstance(one, model.Receipt) for one in results)
        assert len({row.id for row in world.durable.iterate_checkpoints()}) == 31
        world.wipe()
        assert world.orders.get("1").data == {"amount": 1}
        assert world.orders.transition("1", "pay").version == 2


@pytest.mark.parametrize("fault", ["refuse", "hold"])
def test_durable_while_sql_is_away(
    link: proxy.Proxy, redis_url: str, postgres_url: str, namespace: str, fault: str
) -> None:
    """SQL cannot be reached until the deadline: the receipt comes with ``DurabilityTimeout`` - never "failed", because the
    transition stands - and can be waited on later."""
    with worlds.World(redis_url, link.url(postgres_url), namespace) as world:
        world.start("1")
        getattr(link, fault)()
        raised: list[errors.DurabilityTimeout] = []

        def call() -> None:
            with pytest.raises(errors.DurabilityTimeout) as caught:
                world.orders.transition("1", "note", durability="durable", timeout=0.5)
            raised.append(caught.value)

        thread = threading.Thread(target=call)
        thread.start()
        if fault == "hold":  # what waits in the network ends with the connections, some time after the deadline
            waiting.wait_until(lambda: world.orders.get("1").version == 2, "the transition to stand")
            link.cut()
            link.refuse()
        thread.join()
        assert raised[0].receipt.version == 2
        link.pass_through()
        waiting.wait_until(lambda: _is_durable(world, raised[0].receipt), "SQL to come back")
        assert world.versions("1") == [1, 2]


def _is_durable(world: worlds.World, receipt: model.Receipt) -> bool:
    try:
        world.cache.wait_durable(receipt)
    except errors.UnavailableError:
        return False
    return True


def test_waiters_share_flushes(redis_url: str, database_url: str, namespace: str) -> None:
    """Group commit: while one commit is under way the others' entries gather, and the next takes them all."""
    with worlds.World(redis_url, database_url, namespace) as world:
        threads, each = 8, 5
        commits = 0
        original = world.durable.flush_transaction

        def counted(limit_seconds: int) -> Any:
            nonlocal commits
            commits += 1
            return original(limit_seconds)

        def writes(thread: int) -> None:
            for number in range(each):
                world.orders.start(f"t{thread}-{number}", durability="durable")

        with mock.patch.object(world.durable, "flush_transaction", counted):
            results = worlds.together(*[lambda thread=thread: writes(thread) for thread in range(threads)])
        assert results == [None] * threads
        assert len(list(world.durable.iterate_checkpoints())) == threads * each
        assert commits < threads * each


def test_lost_is_not_durable(redis_url: str, sqlite_url: str, namespace: str) -> None:
    """Two transitions are lost, the new epoch is flushed far beyond their ids: they are lost, not durable (H11)."""
    with worlds.World(redis_url, sqlite_url, namespace, partition_count=1) as world:
        world.start("1")
        world.flush()
        lost = [world.orders.transition("1", "note") for _ in range(2)]
        world.wipe()
        for _ in range(5):
            world.orders.transition("1", "note")
        world.flush()
        for receipt in lost:
            with pytest.raises(errors.IntegrityError, match="lost"):
                world.cache.wait_durable(receipt)


def test_a_word_that_is_no_level(redis_url: str, sqlite_url: str, namespace: str) -> None:
    with worlds.World(redis_url, sqlite_url, namespace) as world:
        with pytest.raises(StateCacheError, match="hot, fsync, replica, durable"):
            world.orders.start("1", durability="forever")
        with pytest.raises(errors.NotFoundError):
            world.orders.get("1")
