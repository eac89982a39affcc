"""Does a transition cost more when a million instances are hot? Two servers, a thousand on one, a million on the other."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from benchmarks import hot
from benchmarks.harness import Bench, Cost, Measure, ratio_at_most, row
from benchmarks.workload import Fleet, number_of, order_id
from statecache import Move


@row("scale.instances", "a transition with many hot instances, against one with 1,000")
def instances(bench: Bench) -> Iterator[Measure]:
    many_count = bench.pick(2000, 100_000, 1_000_000)
    servers = bench.servers
    few_server = servers.another_valkey()
    few = Fleet(servers.cache(server=few_server), 1000)
    many = Fleet(servers.cache(), many_count)
    many.flush()  # the log of the starts is no part of the question
    rng = random.Random(11)
    calls = bench.pick(1, 10, 20)

    def side(fleet: Fleet) -> Callable[[], Cost]:
        def run() -> Cost:
            lists = [_received(fleet.some(1000, rng)) for _ in range(calls)]
            return bench.cost(lambda: sum(len(hot.done(fleet.orders.transition_many(moves))) for moves in lists))

        return run

    own, peer = bench.in_turn(side(many), side(few), rounds=bench.rounds(2, 9, 11))
    bench.note = f"{many_count:,} hot instances of 5 fields against 1,000; random ones, in calls of 1,000"
    bulk = (ratio_at_most(1.2, only="valkey9"), ratio_at_most(1.2, only="valkey8"), ratio_at_most(1.35, only="redis7"))
    yield Measure(
        "bulk, an item",
        "us",
        [one.us("seconds") for one in own],
        "with 1,000",
        [one.us("seconds") for one in peer],
        bulk,
    )

    def one(fleet: Fleet) -> Callable[[], None]:
        def call() -> None:
            (move,) = _received([fleet.move(rng.randrange(len(fleet.ids)))])
            fleet.orders.transition(move.id, move.event, move.data)

        return call

    blocks = hot.interleaved(bench, bench.pick(50, 1000, 3000), one(many), one(few))
    yield hot.of_percentile("one call, p50", 50, blocks, 0, 1, "with 1,000")


def _received(moves: list[Move]) -> list[Move]:
    """The same with ids of their own, as a caller has them that was just told: a million texts that lie all over this
    process' memory would be part of the difference, and are none of the store's."""
    return [Move(order_id(number_of(move.id)), move.event, move.data) for move in moves]
