"""Memory: what an instance takes after ten transitions against a bare hash, and what an entry of the log takes."""

from __future__ import annotations

from collections.abc import Iterator

import redis

from benchmarks.harness import Bench, Measure, own_at_most, ratio_at_most, row
from benchmarks.workload import Fleet, order_id, patch, texts

TRANSITIONS = 10


@row("memory.instance-5", "Redis memory of an instance with 5 fields after 10 transitions")
def five_fields(bench: Bench) -> Iterator[Measure]:
    yield from _memory(bench, 5, 1.4)


@row("memory.instance-2", "Redis memory of an instance with 2 fields after 10 transitions")
def two_fields(bench: Bench) -> Iterator[Measure]:
    yield from _memory(bench, 2, 1.55)


def _memory(bench: Bench, fields: int, ratio: float) -> Iterator[Measure]:
    count = bench.pick(500, 20_000, 100_000)
    own, peer, entry, kept, kept_bytes = [], [], [], [], []
    for turn in range(bench.rounds(1, 2, 3)):
        bench.progress(f"round {turn + 1}")
        one = _ours(bench, count, fields)
        own.append(one["instance"])
        entry.append(one["entry"])
        kept.append(one["kept entries"])
        kept_bytes.append(one["kept bytes"])
        peer.append(_bare(bench, count, fields))
        bench.servers.end_row()
    bench.note = (
        f"{count:,} instances, {fields} fields, used_memory; the bare hash: state, version, updated, same data and key"
    )
    yield Measure("memory of an instance", "bytes", own, "a bare hash", peer, (ratio_at_most(ratio),))
    yield Measure("log, before a flush", "bytes/entry", entry, targets=(own_at_most(220),))
    yield Measure("log kept after a flush", "entries/partition", kept)
    yield Measure("log kept after a flush", "bytes/partition", kept_bytes)


def _ours(bench: Bench, count: int, fields: int) -> dict[str, float]:
    """Start, move, look at the log, flush (which trims it), look at what is left."""
    client = bench.servers.client()
    fleet = Fleet(bench.servers.cache(), 0, fields=fields)
    before = _used(client)
    fleet = Fleet(fleet.cache, count, fields=fields)
    for _ in range(TRANSITIONS):
        fleet.write(fleet.moves(count))
    entries, logs = _logs(client)
    fleet.flush()
    kept, left = _logs(client)
    return {
        "instance": (_used(client) - left - before) / count,
        "entry": logs / entries,
        "kept entries": kept / fleet.cache.settings.partition_count,
        "kept bytes": left / fleet.cache.settings.partition_count,
    }


def _bare(bench: Bench, count: int, fields: int) -> float:
    """The same number of hashes with keys of the same length on a server of their own, written in the same chunks."""
    client = bench.servers.client(bench.servers.another_valkey())
    before = _used(client)
    for begin in range(0, count, 5000):
        with client.pipeline(transaction=False) as pipe:
            for number in range(begin, min(count, begin + 5000)):
                values = texts(patch(number % 2048, fields))
                key = f"{{bench:{number % 16:02d}}}:i:order:{order_id(number)}"
                pipe.hset(key, mapping={"state": "packed", "version": 11, "updated": 1_790_000_000_000, **values})
            pipe.execute()
    return (_used(client) - before) / count


def _logs(client: redis.Redis) -> tuple[int, int]:
    """Entries and bytes of all logs."""
    keys = list(client.scan_iter("*:log", count=10_000))
    return sum(client.xlen(key) for key in keys), sum(client.memory_usage(key, samples=0) or 0 for key in keys)


def _used(client: redis.Redis) -> int:
    return int(client.info("memory")["used_memory"])
