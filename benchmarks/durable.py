"""From call to SQL: transitions that are committed when the clock stops, against what commits each one by itself.

No target is set for these rows but honesty: a single durable call waits for a flush, so one caller alone is slower than with
a commit of its own; many callers share the flush.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

from benchmarks import hot
from benchmarks.flush import committer
from benchmarks.harness import Bench, Cost, Measure, percentile, row
from benchmarks.peers_packages import EventSourced, Workflows
from benchmarks.workload import Fleet


@row("durable.bulk", "`transition_many` and flush, one process, all in PostgreSQL when the clock stops")
def bulk(bench: Bench) -> Iterator[Measure]:
    count, items = bench.pick(500, 20_000, 50_000), bench.pick(500, 20_000, 50_000)
    servers = bench.servers
    fleet = Fleet(servers.cache(servers.postgres_database()), count)
    fleet.flush()
    commits = committer(bench, "postgresql", count, 1)
    events = servers.closing(EventSourced(servers.postgres_database(), bench.pick(50, 500, 2000)))
    flows = servers.closing(Workflows(servers.postgres_database()))

    def ours() -> Cost:
        moves = fleet.moves(items)

        def work() -> int:
            fleet.write(moves)
            fleet.flush()
            return items

        return bench.cost(work)

    own, single, sourced, flowed = bench.in_turn(
        ours,
        lambda: bench.cost(lambda: commits.transitions(bench.pick(20, 1500, 4000))),
        lambda: bench.cost(lambda: events.transitions(bench.pick(20, 500, 2000))),
        lambda: bench.cost(lambda: flows.transitions(bench.pick(10, 100, 500))),
        rounds=bench.rounds(2, 5, 7),
    )
    bench.note = f"{count:,} instances, each item another one, 5 fields, one process and one thread"
    yield hot.rate(own, single, "a commit each (psycopg)")
    yield hot.rate(own, sourced, "an aggregate event each (eventsourcing)")
    yield hot.rate(own, flowed, "a one-step workflow each (dbos)")


@row("durable.one", '`transition(durability="durable")`, flushed by a thread of the process')
def one(bench: Bench) -> Iterator[Measure]:
    servers = bench.servers
    fleet = Fleet(servers.cache(servers.postgres_database(), flusher=True), bench.pick(200, 5000, 5000))
    fleet.flush()
    commits = committer(bench, "postgresql", len(fleet.ids), 1)
    calls = bench.pick(10, 200, 500)

    def ours() -> list[float]:
        return _latencies(fleet, calls)

    def theirs() -> list[float]:
        samples = []
        for _ in range(calls):
            begun = time.perf_counter()
            commits.transitions(1)
            samples.append((time.perf_counter() - begun) * 1e3)
        return samples

    own, single = bench.in_turn(ours, theirs, rounds=bench.rounds(2, 5, 7))
    yield _p50("p50, one caller", own, single)
    threads = 32
    crowd, single = bench.in_turn(lambda: _crowd(fleet, threads, calls), theirs, rounds=bench.rounds(2, 5, 7))
    bench.note = f"{len(fleet.ids):,} instances, 5 fields; the peer is one caller: its rate is its latency's inverse"
    yield Measure(
        f"rate, {threads} threads", "/s", [len(latencies) / seconds for latencies, seconds in crowd],
        "a commit each, one caller", [1000 / (sum(samples) / len(samples)) for samples in single],
    )  # fmt: skip
    yield Measure(f"p50, {threads} threads", "ms", [percentile(latencies, 50) for latencies, _ in crowd])


def _p50(name: str, own: list[list[float]], peer: list[list[float]]) -> Measure:
    mine, theirs = ([percentile(samples, 50) for samples in side] for side in (own, peer))
    return Measure(name, "ms", mine, "a commit each (psycopg)", theirs)


def _latencies(fleet: Fleet, calls: int) -> list[float]:
    samples = []
    for move in fleet.moves(calls):
        begun = time.perf_counter()
        fleet.orders.transition(move.id, move.event, move.data, durability="durable", timeout=30.0)
        samples.append((time.perf_counter() - begun) * 1e3)
    return samples


def _crowd(fleet: Fleet, threads: int, calls: int) -> tuple[list[float], float]:
    """All latencies in ms, and the seconds that the crowd took."""
    lists = [fleet.moves(max(1, calls // 8)) for _ in range(threads)]
    samples: list[float] = []

    def work(place: int) -> None:
        mine = []
        for move in lists[place]:
            begun = time.perf_counter()
            fleet.orders.transition(move.id, move.event, move.data, durability="durable", timeout=30.0)
            mine.append((time.perf_counter() - begun) * 1e3)
        samples.extend(mine)

    crowd = [threading.Thread(target=work, args=(place,)) for place in range(threads)]
    begun = time.perf_counter()
    for thread in crowd:
        thread.start()
    for thread in crowd:
        thread.join()
    return samples, time.perf_counter() - begun
