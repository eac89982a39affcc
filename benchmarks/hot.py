"""The hot path: one call at a time, and bulk calls, against what redis-py does with no checks."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.harness import (
    Bench,
    Cost,
    Measure,
    Target,
    own_at_most,
    percentile,
    ratio_at_least,
    ratio_at_most,
    row,
)
from benchmarks.peers_redis import Writer, hash_key
from benchmarks.workload import PATCHES, Fleet, order_id, refused

INSTANCES = 16_000


@row("hot.transition", "one `transition` at a time")
def transition(bench: Bench) -> Iterator[Measure]:
    """Call by call in turn, so that all meet the same moment: ours, a hand-written MULTI/EXEC, a PING."""
    fleet = Fleet(bench.servers.cache(), bench.pick(500, INSTANCES, INSTANCES))
    peer = Writer(bench.servers.client(), len(fleet.ids))
    client = bench.servers.client()
    calls = bench.pick(100, 2000, 5000)
    moves = iter(fleet.moves(calls * (bench.rounds() + 1)))

    def ours() -> None:
        move = next(moves)
        fleet.orders.transition(move.id, move.event, move.data)

    sides = (ours, lambda: peer.transitions(1, transaction=True), client.ping)
    blocks = interleaved(bench, calls, *sides)
    bench.note = f"{len(fleet.ids)} instances, 5 fields, one connection, {calls} calls a round"
    yield of_percentile("p50", 50, blocks, 0, 1, "MULTI/EXEC", ratio_at_most(0.85))
    yield of_percentile("p99", 99, blocks, 0, 2, "PING", ratio_at_most(2.5))


@row("hot.get", "one `get`, its data decoded")
def get(bench: Bench) -> Iterator[Measure]:
    fleet = Fleet(bench.servers.cache(), bench.pick(500, INSTANCES, INSTANCES))
    peer = Writer(bench.servers.client(), len(fleet.ids))
    peer.transitions(len(fleet.ids))
    numbers = itertools.cycle(range(len(fleet.ids)))
    calls = bench.pick(100, 2000, 5000)
    client = peer.client

    def ours() -> Any:
        return fleet.orders.get(fleet.ids[next(numbers)]).data

    def theirs() -> Any:
        return client.hgetall(hash_key(next(numbers)))

    blocks = interleaved(bench, calls, ours, theirs)
    bench.note = f"{len(fleet.ids)} instances, 5 fields, one connection, {calls} calls a round"
    yield of_percentile("p50", 50, blocks, 0, 1, "HGETALL", ratio_at_most(0.85))
    yield of_percentile("p99", 99, blocks, 0, 1, "HGETALL")


@row("hot.transition-many-500", "`transition_many` of 500, call after call")
def transition_many_500(bench: Bench) -> Iterator[Measure]:
    yield from _transition_many(bench, 500, 2.2)


@row("hot.transition-many-4000", "`transition_many` of 4,000")
def transition_many_4000(bench: Bench) -> Iterator[Measure]:
    yield from _transition_many(bench, 4000, 2.5)


def _transition_many(bench: Bench, size: int, ratio: float) -> Iterator[Measure]:
    fleet = Fleet(bench.servers.cache(), bench.pick(4000, INSTANCES, INSTANCES))
    peer = Writer(bench.servers.client(), len(fleet.ids))
    calls = bench.pick(1, 8000, 24_000) // size or 1

    def ours() -> Cost:
        lists = [fleet.moves(size) for _ in range(calls)]
        return bench.cost(lambda: sum(len(done(fleet.orders.transition_many(moves))) for moves in lists))

    def theirs() -> Cost:
        # In pipelines of 500 whatever the list's length: longer ones are slower for redis-py.
        return bench.cost(lambda: sum(peer.transitions(500) for _ in range(calls * size // 500)))

    def by_hand() -> Cost:
        return bench.cost(lambda: peer.one_by_one(min(500, calls * size)))

    own, pipelined, single = bench.in_turn(ours, theirs, by_hand)
    bench.note = f"{len(fleet.ids)} instances, each item another one, 5 fields, one thread"
    yield rate(own, pipelined, "pipelined HSET+XADD", ratio_at_least(ratio))
    yield Measure("rate", "/s", [one.rate for one in own], "MULTI/EXEC per call", [one.rate for one in single])
    yield cpu("server CPU", "server", own, pipelined, 12)
    yield cpu("client CPU", "client", own, pipelined, 7)


@row("hot.start-many-500", "`start_many` of 500")
def start_many(bench: Bench) -> Iterator[Measure]:
    fleet = Fleet(bench.servers.cache(), 0)
    peer = Writer(bench.servers.client(), 10_000_000)
    calls = bench.pick(1, 16, 48)
    numbers = itertools.count()

    def ours() -> Cost:
        lists = [[(order_id(next(numbers)), PATCHES[place]) for place in range(500)] for _ in range(calls)]
        return bench.cost(lambda: sum(len(done(fleet.orders.start_many(pairs))) for pairs in lists))

    def theirs() -> Cost:
        return bench.cost(lambda: sum(peer.transitions(500) for _ in range(calls)))

    own, pipelined = bench.in_turn(ours, theirs)
    bench.note = "new instances, 5 fields, one thread"
    yield rate(own, pipelined, "pipelined HSET+XADD", ratio_at_least(2.2))
    yield cpu("server CPU", "server", own, pipelined)
    yield cpu("client CPU", "client", own, pipelined)


@row("hot.get-many-500", "`get_many` of 500")
def get_many(bench: Bench) -> Iterator[Measure]:
    fleet = Fleet(bench.servers.cache(), bench.pick(500, INSTANCES, INSTANCES))
    peer = Writer(bench.servers.client(), len(fleet.ids))
    peer.transitions(len(fleet.ids))
    calls = bench.pick(1, 20, 60)
    begins = itertools.cycle(range(0, len(fleet.ids), 500))

    def ours(decode: bool) -> Callable[[], Cost]:
        def read() -> int:
            for _ in range(calls):
                begin = next(begins)
                found: list[Any] = fleet.orders.get_many(fleet.ids[begin : begin + 500])
                if decode:
                    for snapshot in found:
                        _ = snapshot.data
            return calls * 500

        return lambda: bench.cost(read)

    def theirs() -> Cost:
        return bench.cost(lambda: sum(len(peer.read(range(begin := next(begins), begin + 500))) for _ in range(calls)))

    lazy, decoded, plain = bench.in_turn(ours(False), ours(True), theirs)
    bench.note = f"{len(fleet.ids)} instances, 5 fields, one thread"
    yield rate(lazy, plain, "pipelined HGETALL", ratio_at_least(1.7), name="rate, data decoded on access")
    yield rate(decoded, plain, "pipelined HGETALL", ratio_at_least(1.4), name="rate, data decoded")
    yield cpu("client CPU", "client", lazy, plain)


# --- shared with other themes ------------------------------------------------------------------------------------------


def interleaved(bench: Bench, calls: int, *sides: Callable[[], Any]) -> list[list[list[float]]]:
    """Latencies in microseconds, by round and side; the sides take turns call by call, each time in another order."""
    clock, dice = time.perf_counter, random.Random(7)
    for side in sides:
        for _ in range(calls // 10):
            side()
    blocks = []
    for turn in range(bench.rounds()):
        bench.progress(f"round {turn + 1} of {bench.rounds()}")
        block: list[list[float]] = [[] for _ in sides]
        order = list(zip(sides, block, strict=True))
        for _ in range(calls):
            dice.shuffle(order)  # who comes behind whom decides how warm the caches are
            for side, samples in order:
                begun = clock()
                side()
                samples.append((clock() - begun) * 1e6)
        blocks.append(block)
    return blocks


def of_percentile(
    name: str, percent: float, blocks: list[list[list[float]]], own: int, peer: int, peer_name: str, *targets: Target
) -> Measure:
    """A percentile of two sides of ``interleaved``, round by round."""
    return Measure(
        name, "us", [percentile(block[own], percent) for block in blocks],
        peer_name, [percentile(block[peer], percent) for block in blocks], targets,
    )  # fmt: skip


def rate(own: list[Cost], peer: list[Cost], peer_name: str, *targets: Target, name: str = "rate") -> Measure:
    """Items a second."""
    return Measure(name, "/s", [one.rate for one in own], peer_name, [one.rate for one in peer], targets)


def cpu(name: str, what: str, own: list[Cost], peer: list[Cost], at_most: float | None = None) -> Measure:
    """CPU microseconds an item of ``client``, ``server`` or ``sql``; the bound, if any, is on our own."""
    targets = () if at_most is None else (own_at_most(at_most),)
    mine, theirs = ([one.us(what) for one in side] for side in (own, peer))
    return Measure(name, "us/item", mine, "the same peer", theirs, targets)


def done(results: list[Any]) -> list[Any]:
    """The results of a bulk call, all of which must be receipts."""
    refused(results)
    return results
