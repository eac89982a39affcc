"""The cold tier: serving again after Redis lost everything, and transitions of instances that only SQL has.

Valkey is killed, its files are deleted, and it is started again empty on the same port; then somebody moves one instance. That
call finds its connection dead, meets a server that it does not know, recovers it, hydrates the instance, and applies.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

from benchmarks import hot
from benchmarks.flush import committer
from benchmarks.harness import Bench, Cost, Measure, own_at_least, own_at_most, percentile, row
from benchmarks.peers_sql import Committer
from benchmarks.workload import Fleet, number_of
from statecache import Move
from statecache.engine import warming


@row("cold.after-wipe", "the first transition after Redis was wiped, and cold ones after it")
def after_wipe(bench: Bench) -> Iterator[Measure]:
    count = bench.pick(500, 100_000, 1_000_000)
    servers = bench.servers
    fleet = Fleet(servers.cache(servers.postgres_database()), count)
    fleet.flush()
    rng = random.Random(5)
    first, cold, calls = [], [], bench.pick(20, 300, 1000)
    for turn in range(bench.rounds(2, 5, 7)):
        bench.progress(f"wipe {turn + 1}")
        _wipe(bench)
        moves = fleet.some(calls + 1, rng)
        first.append(_timed(fleet, moves[:1])[0] / 1000)
        cold.append([value / 1000 for value in _timed(fleet, moves[1:])])
        fleet.flush()  # else the next wipe loses them, and the fleet would be of another mind than SQL
    peer = committer(bench, "postgresql", min(count, 100_000), 1)
    single = [_commits(peer, calls) for _ in cold]
    bench.note = f"{count:,} checkpoints in PostgreSQL; the first call's time holds reconnecting and the whole recovery"
    yield Measure("first transition", "ms", first, targets=(own_at_most(100),))
    yield Measure(
        "cold transition, p50", "ms", [percentile(values, 50) for values in cold],
        "a commit each (psycopg)", [percentile(values, 50) for values in single], (own_at_most(1.5),),
    )  # fmt: skip
    yield Measure("cold transition, p99", "ms", [percentile(values, 99) for values in cold])


@row("cold.bulk", "`transition_many` of cold instances")
def bulk(bench: Bench) -> Iterator[Measure]:
    """Each item is hydrated and moved; the same instances are then moved hot, for comparison."""
    count = bench.pick(500, 50_000, 200_000)
    servers = bench.servers
    fleet = Fleet(servers.cache(servers.postgres_database()), count)
    fleet.flush()
    rng, size = random.Random(3), bench.pick(200, 10_000, 40_000)
    cold: list[Cost] = []
    warm: list[Cost] = []
    for turn in range(bench.rounds(2, 5, 5)):
        bench.progress(f"wipe {turn + 1}")
        _wipe(bench)
        moves = fleet.some(size + 1, rng)
        _timed(fleet, moves[:1])
        cold.append(_bulk(bench, fleet, moves[1:]))
        warm.append(_bulk(bench, fleet, [fleet.move(number_of(move.id)) for move in moves[1:]]))
        fleet.flush()
    bench.note = f"{count:,} checkpoints in PostgreSQL, {size:,} random ones moved in calls of 1,000; 5 fields"
    yield hot.rate(cold, warm, "the same, hot")


@row("cold.warming", "the hot set brought back from SQL after a wipe, rings of transition ids with it")
def warm(bench: Bench) -> Iterator[Measure]:
    count = bench.pick(500, 50_000, 1_000_000)
    servers = bench.servers
    fleet = Fleet(servers.cache(servers.postgres_database()), count)
    for _ in range(8):  # until the rings are full
        for _ in range(0, count, 50_000):
            fleet.write(fleet.moves(min(count, 50_000)))
            fleet.flush()
    samples: list[Cost] = []
    for turn in range(bench.rounds(2, 5, 5)):
        bench.progress(f"wipe {turn + 1}")
        _wipe(bench)
        fleet.cache.recover()
        samples.append(bench.cost(lambda: _warmed(fleet, count)))
    bench.note = f"{count:,} checkpoints in PostgreSQL, five fields, nine transitions each; one process"
    yield Measure("rate", "/s", [one.rate for one in samples], targets=(own_at_least(70_000),))
    yield Measure("client CPU", "us/item", [one.us("client") for one in samples])
    yield Measure("Valkey CPU", "us/item", [one.us("server") for one in samples])
    yield Measure("PostgreSQL CPU", "us/item", [one.us("sql") for one in samples])


def _warmed(fleet: Fleet, count: int) -> int:
    report = warming.warm(fleet.cache)
    if report.warmed != count:
        raise RuntimeError(f"{report.warmed} of {count} instances were warmed")
    return report.warmed


def _bulk(bench: Bench, fleet: Fleet, moves: list[Move]) -> Cost:
    def work() -> int:
        fleet.write(moves, chunk=1000)
        return len(moves)

    return bench.cost(work)


def _wipe(bench: Bench) -> None:
    valkey = bench.servers.valkey
    valkey.kill()
    if valkey.data.exists():
        valkey.wipe()
    valkey.start()


def _timed(fleet: Fleet, moves: list[Move]) -> list[float]:
    """Microseconds of each."""
    samples = []
    for move in moves:
        begun = time.perf_counter()
        fleet.orders.transition(move.id, move.event, move.data, timeout=30.0)
        samples.append((time.perf_counter() - begun) * 1e6)
    return samples


def _commits(peer: Committer, calls: int) -> list[float]:
    samples = []
    for _ in range(calls):
        begun = time.perf_counter()
        peer.transitions(1)
        samples.append((time.perf_counter() - begun) * 1e3)
    return samples
