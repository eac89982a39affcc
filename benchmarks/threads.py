"""The sync client shared by threads, against as many threads of redis-py; and what batching costs a lone thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import hot
from benchmarks.harness import Bench, Measure, percentile, ratio_at_least, ratio_at_most, row
from benchmarks.peers_redis import Writer, queue
from benchmarks.workload import PATCHES, Fleet
from statecache.core import items
from statecache.engine.cache import StateCache

Sample = tuple[float, list[float]]
"""Transitions a second, and every latency in ms."""


@row("threads.16", "16 threads on one `StateCache`")
def sixteen(bench: Bench) -> Iterator[Measure]:
    yield from _threads(bench, 16, (ratio_at_least(2),), (ratio_at_most(1 / 3),))


@row("threads.4", "4 threads on one `StateCache`")
def four(bench: Bench) -> Iterator[Measure]:
    yield from _threads(bench, 4, (), ())


def _threads(bench: Bench, count: int, rate: tuple[Any, ...], tail: tuple[Any, ...]) -> Iterator[Measure]:
    fleet = Fleet(bench.servers.cache(), count * 50)
    client = bench.servers.client()
    calls = bench.pick(20, 1000, 4000)

    def ours(thread: int, step: int) -> None:
        move = fleet.move(thread * 50 + step % 50)  # instances of its own: what it counts, no other thread touches
        fleet.orders.transition(move.id, move.event, move.data)

    def theirs(thread: int, step: int) -> None:
        with client.pipeline(transaction=False) as pipe:
            queue(pipe, thread * 50 + step % 50, step // 50, PATCHES[step % 2048])
            pipe.execute()

    own, pipelined = bench.in_turn(lambda: crowd(ours, count, calls), lambda: crowd(theirs, count, calls))
    bench.note = f"{count} threads of {calls} transitions each, 50 instances each"
    name = "redis-py, pipelined HSET+XADD per call"
    yield Measure("rate", "/s", [one[0] for one in own], name, [one[0] for one in pipelined], rate)
    for word, percent, targets in (("p50", 50, ()), ("p99", 99, tail)):
        mine, other = ([percentile(latencies, percent) for _, latencies in side] for side in (own, pipelined))
        yield Measure(word, "ms", mine, name, other, targets)


@row("threads.1", "one thread, with and without batching")
def alone(bench: Bench) -> Iterator[Measure]:
    """There is no setting without batching: the peer is the same client with its batcher taken out."""
    servers = bench.servers
    database = servers.database("sqlite")
    fleet = Fleet(servers.cache(database), 1000)
    bare = Fleet(servers.cache(database), 1000, start=False, seed=8)
    bare.steps = fleet.steps  # the same instances
    _take_batching_out(bare.cache)
    peer = Writer(servers.client(), 1000)
    calls = bench.pick(50, 2000, 5000)

    def one(side: Fleet) -> Callable[[], None]:
        moves = (move for _ in iter(int, 1) for move in side.moves(1))

        def call() -> None:
            move = next(moves)
            side.orders.transition(move.id, move.event, move.data)

        return call

    blocks = hot.interleaved(bench, calls, one(fleet), one(bare), lambda: peer.transitions(1))
    bench.note = f"1,000 instances, {calls} calls a round, call by call in turn"
    yield hot.of_percentile("p50", 50, blocks, 0, 1, "the same without its batcher", ratio_at_most(1.05))
    yield hot.of_percentile("p50", 50, blocks, 0, 2, "redis-py, pipelined HSET+XADD per call")


def _take_batching_out(cache: StateCache) -> None:
    """The one place where a row reaches behind the public surface: what it compares with is not to be had otherwise."""

    class Direct:
        def apply(self, item: items.Item, timeout_seconds: float | None = None) -> items.Outcome:
            return cache.hot.apply([item], timeout_seconds)[0]

    cache.driver._batcher = Direct()  # type: ignore[assignment]


def crowd(call: Callable[[int, int], None], count: int, calls: int) -> Sample:
    latencies: list[float] = []
    barrier = threading.Barrier(count + 1)

    def work(thread: int) -> None:
        mine = []
        barrier.wait()
        for step in range(calls):
            begun = time.perf_counter()
            call(thread, step)
            mine.append((time.perf_counter() - begun) * 1e3)
        latencies.extend(mine)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(count)]
    for thread in threads:
        thread.start()
    barrier.wait()
    begun = time.perf_counter()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - begun
    if len(latencies) != count * calls:
        raise ValueError(f"{count * calls - len(latencies)} of {count * calls} calls failed in their threads")
    return count * calls / seconds, latencies
