"""Where the time goes: ``python -m benchmarks.profiling WORKLOAD`` with one of ``one bulk get get-many flush threads``.

Client side by cProfile (whose own cost makes every small function look dearer: read it for the order, not for the sums), server
side by ``INFO commandstats``: how often the script ran and what it took, and what it called and what that took. The figures an
item without the profiler come first.
"""

from __future__ import annotations

import argparse
import cProfile
import io
import itertools
import pstats
import random
from collections.abc import Callable
from typing import Any

import redis

from benchmarks.harness import Bench
from benchmarks.servers import Servers
from benchmarks.workload import Fleet

INSTANCES = 8000
Work = Callable[[], int]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profiling", description=__doc__)
    parser.add_argument("workload", choices=sorted(WORKLOADS))
    parser.add_argument("--sql", choices=("postgresql", "sqlite"), default="postgresql", help="for flush")
    parser.add_argument("--lines", type=int, default=30, help="how many functions to print")
    options = parser.parse_args()
    with Servers() as servers:
        work, before = WORKLOADS[options.workload](servers, options.sql)
        client = servers.client()
        bench = Bench(servers, "default", lambda text: None)
        before()
        work()  # warm
        before()
        client.config_resetstat()
        cost = bench.cost(work)
        print(f"{cost.items} items; microseconds an item: wall {cost.us('seconds'):.1f}, client CPU {cost.us('client'):.1f}, "
              f"server CPU {cost.us('server'):.1f}, PostgreSQL CPU {cost.us('sql'):.1f}\n")  # fmt: skip
        print(server_side(client, cost.items))
        before()
        print(client_side(work, options.lines))


def server_side(client: redis.Redis, items: int) -> str:
    """The commands that the server ran; those of scripts are among them, and in the scripts' time as well."""
    lines = [f"{'command':24}{'calls/item':>12}{'us/call':>10}{'us/item':>10}"]
    stats: dict[str, Any] = client.info("commandstats")
    for name, one in sorted(stats.items(), key=lambda pair: -pair[1]["usec"]):
        calls, usec = one["calls"], one["usec"]
        lines.append(f"{name.removeprefix('cmdstat_'):24}{calls / items:12.3f}{usec / calls:10.2f}{usec / items:10.2f}")
    return "\n".join(lines) + "\n"


def client_side(work: Work, lines: int) -> str:
    profile = cProfile.Profile()
    profile.enable()
    items = work()
    profile.disable()
    text = io.StringIO()
    stats = pstats.Stats(profile, stream=text)
    stats.strip_dirs().sort_stats("tottime").print_stats(lines)
    return f"client side, {items} items, by own time:\n{text.getvalue()}"


# --- the workloads: what is measured, and what must be done before each time ---------------------------------------------


def _one(servers: Servers, sql: str) -> tuple[Work, Callable[[], None]]:
    fleet = Fleet(servers.cache(), INSTANCES)

    def work() -> int:
        for move in moves:
            fleet.orders.transition(move.id, move.event, move.data)
        return len(moves)

    moves: list[Any] = []
    return work, lambda: moves.__setitem__(slice(None), fleet.moves(INSTANCES))


def _bulk(servers: Servers, sql: str) -> tuple[Work, Callable[[], None]]:
    fleet = Fleet(servers.cache(), INSTANCES)

    def work() -> int:
        fleet.write(moves)
        return len(moves)

    moves: list[Any] = []
    return work, lambda: moves.__setitem__(slice(None), fleet.moves(5 * INSTANCES))


def _get(servers: Servers, sql: str) -> tuple[Work, Callable[[], None]]:
    fleet = Fleet(servers.cache(), INSTANCES)

    def work() -> int:
        return sum(1 for id in fleet.ids if fleet.orders.get(id).data)

    return work, lambda: None


def _get_many(servers: Servers, sql: str) -> tuple[Work, Callable[[], None]]:
    fleet = Fleet(servers.cache(), INSTANCES)

    def work() -> int:
        begins = itertools.chain.from_iterable([range(0, INSTANCES, 500)] * 5)
        return sum(len(fleet.orders.get_many(fleet.ids[begin : begin + 500])) for begin in begins)

    return work, lambda: None


def _flush(servers: Servers, sql: str) -> tuple[Work, Callable[[], None]]:
    fleet = Fleet(servers.cache(servers.database(sql)), 50_000)
    fleet.flush()

    def work() -> int:
        fleet.flush()
        return 50_000

    return work, lambda: fleet.write(fleet.moves(50_000))


def _threads(servers: Servers, sql: str) -> tuple[Work, Callable[[], None]]:
    """One thread of the profile's among sixteen: what a caller waits for."""
    from benchmarks.threads import crowd

    fleet = Fleet(servers.cache(), 16 * 50)
    rng = random.Random(1)

    def call(thread: int, step: int) -> None:
        move = fleet.move(thread * 50 + rng.randrange(50))
        fleet.orders.transition(move.id, move.event, move.data)

    def work() -> int:
        return len(crowd(call, 16, 500)[1])

    return work, lambda: None


WORKLOADS = {"one": _one, "bulk": _bulk, "get": _get, "get-many": _get_many, "flush": _flush, "threads": _threads}

if __name__ == "__main__":
    main()
