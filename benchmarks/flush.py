"""The flush alone: a log of unflushed entries, moved into SQL by one process, against one commit per transition.

``StateCache.flush`` does the work itself when no flusher is alive, so that the figure is of one process and nothing else runs.
All instances exist in SQL before: every entry is a row of history and, once per instance and batch, an updated checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import hot
from benchmarks.harness import Bench, Cost, Measure, Target, own_at_least, own_at_most, ratio_at_least, row
from benchmarks.peers_sql import Committer, postgres_committer, sqlite_committer
from benchmarks.workload import Fleet
from workers.flusher import rare_collections


@row("flush.postgresql-different", "flush to PostgreSQL, every entry another instance")
def postgresql_different(bench: Bench) -> Iterator[Measure]:
    yield from _flush(bench, "postgresql", 1, 22, 33_000, own_at_most(10))


@row("flush.postgresql-four", "flush to PostgreSQL, four moves per instance in a row")
def postgresql_four(bench: Bench) -> Iterator[Measure]:
    yield from _flush(bench, "postgresql", 4, 40, 60_000, own_at_most(10))


@row("flush.sqlite-different", "flush to SQLite, every entry another instance, FULL against FULL")
def sqlite_different(bench: Bench) -> Iterator[Measure]:
    yield from _flush(bench, "sqlite", 1, 15, 45_000)


@row("flush.sqlite-four", "flush to SQLite, four moves per instance in a row, FULL against FULL")
def sqlite_four(bench: Bench) -> Iterator[Measure]:
    yield from _flush(bench, "sqlite", 4, 15, 45_000)


def _flush(bench: Bench, kind: str, in_a_row: int, ratio: float, rate: float, *client: Target) -> Iterator[Measure]:
    count = bench.pick(1000, 50_000, 200_000)
    entries = bench.pick(1000, 50_000, 200_000)
    fleet = Fleet(bench.servers.cache(bench.servers.database(kind)), count)
    fleet.flush()
    peer = committer(bench, kind, count, in_a_row)

    def ours() -> Cost:
        fleet.write(fleet.moves(entries, in_a_row))

        def flush() -> int:
            with rare_collections():  # as the flusher's process does
                fleet.flush()
            return entries

        return bench.cost(flush)

    def theirs() -> Cost:
        return bench.cost(lambda: peer.seconds_of(bench.pick(0.1, 1.5, 3.0)))

    own, commits = bench.in_turn(ours, theirs, rounds=bench.rounds(2, 5, 7))
    bench.note = f"{count:,} instances, {in_a_row} moves per instance, {entries:,} entries a flush, 5 fields"
    yield hot.rate(own, commits, "a commit each", ratio_at_least(ratio), own_at_least(rate))
    yield Measure("flusher CPU", "us/item", [one.us("client") for one in own], targets=client)
    yield Measure("Valkey CPU", "us/item", [one.us("server") for one in own])
    if kind == "postgresql":
        yield hot.cpu("PostgreSQL CPU", "sql", own, commits)


def committer(bench: Bench, kind: str, count: int, in_a_row: int) -> Committer:
    """The peer on a database of its own, with the same instances in it."""
    closing = bench.servers.closing
    if kind == "postgresql":
        return postgres_committer(closing, bench.servers.postgres_database(), count, in_a_row)
    return sqlite_committer(closing, bench.servers.sqlite_file(), count, in_a_row)
