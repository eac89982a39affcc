"""The async client: a thousand tasks and one, against redis.asyncio doing an unchecked pipelined HSET+XADD per call."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import redis.asyncio

from benchmarks.harness import Bench, Measure, own_at_least, own_at_most, percentile, ratio_at_least, ratio_at_most, row
from benchmarks.peers_redis import queue
from benchmarks.servers import NAMESPACE
from benchmarks.workload import PATCHES, Fleet, Order
from statecache.aio import AsyncStateCache

Call = Callable[[int, int], Awaitable[object]]
"""Makes a task's n-th transition, given the task's number and n."""
PATIENCE = {"host": "127.0.0.1", "socket_timeout": 60, "socket_connect_timeout": 60}
"""A thousand connections at once overflow a listening socket's queue: the system's retries take longer than 5 seconds."""
POOLS: dict[str, Callable[[int], Any]] = {
    "redis.asyncio, BlockingConnectionPool(50)": lambda port: redis.asyncio.BlockingConnectionPool(
        port=port, max_connections=50, timeout=None, **PATIENCE
    ),
    # What the default pool did until redis-py limited it to 100 connections, with an error for the task that wants one more.
    "redis.asyncio, a connection per task": lambda port: redis.asyncio.ConnectionPool(
        port=port, max_connections=10_000, **PATIENCE
    ),
}


@row("aio.tasks-1000", "1,000 tasks on one `AsyncStateCache`")
def tasks(bench: Bench) -> Iterator[Measure]:
    count, calls = bench.pick(50, 1000, 1000), bench.pick(4, 20, 40)
    own, peers = _measured(bench, count, calls, bench.rounds(2, 5, 7), list(POOLS))
    bench.note = f"{count:,} tasks of {calls} transitions each, an instance each, plain event loop"
    for (name, samples), target in zip(peers.items(), (6, 10), strict=True):
        targets = (ratio_at_least(target), own_at_least(35_000)) if target == 6 else (ratio_at_least(target),)
        rates = ([one[0] for one in side] for side in (own, samples))
        mine, theirs = rates
        yield Measure("rate", "/s", mine, name, theirs, targets)
    for name, samples in peers.items():
        yield _latency("p50", 50, own, name, samples)
        yield _latency("p99", 99, own, name, samples, *([own_at_most(50)] if "50" in name else []))


@row("aio.tasks-50", "50 tasks on one `AsyncStateCache`")
def fifty_tasks(bench: Bench) -> Iterator[Measure]:
    count, calls = 50, bench.pick(4, 200, 400)
    name = next(iter(POOLS))
    own, peers = _measured(bench, count, calls, bench.rounds(2, 5, 7), [name])
    bench.note = f"{count} tasks of {calls} transitions each, an instance each, plain event loop"
    yield Measure("rate", "/s", [one[0] for one in own], name, [one[0] for one in peers[name]])
    yield _latency("p50", 50, own, name, peers[name])
    yield _latency("p99", 99, own, name, peers[name])


@row("aio.task-1", "one task on `AsyncStateCache`")
def one_task(bench: Bench) -> Iterator[Measure]:
    calls = bench.pick(50, 2000, 5000)
    name = next(iter(POOLS))
    own, peers = _measured(bench, 1, calls, bench.rounds(), [name])
    bench.note = f"{calls} transitions one after another, plain event loop"
    yield _latency("p50", 50, own, name, peers[name], ratio_at_most(0.9))
    yield _latency("p99", 99, own, name, peers[name])


Sample = tuple[float, list[float]]
"""Transitions a second, and every latency in ms."""


def _measured(
    bench: Bench, tasks: int, calls: int, rounds: int, pools: list[str]
) -> tuple[list[Sample], dict[str, list[Sample]]]:
    """Every side has an event loop of its own that lives for all rounds: connections stay."""
    servers = bench.servers
    fleet = Fleet(servers.cache(), tasks)
    url = fleet.cache.database_url
    with asyncio.Runner() as runner:
        ours = runner.run(_connect(servers.valkey.url, url))
        orders = runner.run(ours.machine(Order))

        async def transition(task: int, step: int) -> None:
            move = fleet.move(task)
            await orders.transition(move.id, move.event, move.data)

        clients = {name: redis.asyncio.Redis(connection_pool=POOLS[name](servers.valkey.port)) for name in pools}
        sides = [transition, *(_pipelined(client) for client in clients.values())]
        works = [lambda side=side: runner.run(_crowd(side, tasks, calls)) for side in sides]
        try:
            own, *theirs = bench.in_turn(*works, rounds=rounds)
        finally:
            runner.run(ours.close())
            for client in clients.values():
                runner.run(client.aclose())
                runner.run(client.connection_pool.disconnect())
    return own, dict(zip(pools, theirs, strict=True))


async def _connect(url: str, database: str) -> AsyncStateCache:
    return await AsyncStateCache.connect(url, database, NAMESPACE)


def _pipelined(client: redis.asyncio.Redis) -> Call:
    async def transition(task: int, step: int) -> None:
        async with client.pipeline(transaction=False) as pipe:
            queue(pipe, task, step, PATCHES[task % 2048])
            await pipe.execute()

    return transition


async def _crowd(call: Call, tasks: int, calls: int) -> Sample:
    latencies: list[float] = []

    async def work(task: int) -> None:
        for step in range(calls):
            begun = time.perf_counter()
            await call(task, step)
            latencies.append((time.perf_counter() - begun) * 1e3)

    begun = time.perf_counter()
    await asyncio.gather(*(work(task) for task in range(tasks)))
    return tasks * calls / (time.perf_counter() - begun), latencies


def _latency(
    name: str, percent: float, own: list[Sample], peer_name: str, peer: list[Sample], *targets: Any
) -> Measure:
    mine, theirs = ([percentile(latencies, percent) for _, latencies in side] for side in (own, peer))
    return Measure(name, "ms", mine, peer_name, theirs, targets)
