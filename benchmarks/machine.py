"""The machine: what its server takes when nothing but the server's own work is asked of it.

Targets in /s and in us were set on one machine. How fast the one is that a run was made on stands in this row: the same command
and the same number of connections as there (``redis-benchmark -P 100 HSET``, eight fields, 50 connections).
"""

from __future__ import annotations

import itertools
import random
import selectors
import socket
import time
from collections.abc import Iterator

from benchmarks.harness import Bench, Measure, row

_KEYS, _CONNECTIONS, _TOGETHER, _WRITES = 16_000, 50, 100, 200
_THERE = {"valkey9": 484_000.0, "redis7": 557_000.0}
"""Commands a second where the targets were set."""
_REPLY = len(b":0\r\n")


@row("machine.server", "the server's own limit: `HSET` of eight fields, 100 in a write, by 50 connections")
def server(bench: Bench) -> Iterator[Measure]:
    rng = random.Random(1)
    writes = [b"".join(_hset(rng.randrange(_KEYS)) for _ in range(_TOGETHER)) for _ in range(_WRITES)]
    rounds, seconds = bench.rounds(), bench.pick(0.05, 0.5, 1.0)
    _rate(bench, writes, seconds)
    samples = [_rate(bench, writes, seconds) for _ in range(rounds)]
    there = _THERE.get(bench.servers.flavour)
    bench.note = "the ratio is how fast this machine is: a target in /s or us is one of the machine where they were set"
    yield Measure(
        "rate", "/s", samples, "where the targets were set" if there else "", [there] * rounds if there else []
    )


def _hset(number: int) -> bytes:
    words = ["HSET", f"native:{number:012d}"]
    for size, name in enumerate("abcdefgh", 1):
        words += [name, str(size) * size]
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word.encode()) for word in words)


def _rate(bench: Bench, writes: list[bytes], seconds: float) -> float:
    """Commands a second: each connection writes again when its last hundred is answered."""
    chosen, waiting, following = selectors.DefaultSelector(), [0] * _CONNECTIONS, itertools.cycle(writes)
    lines = [socket.create_connection(("127.0.0.1", bench.servers.valkey.port), 10) for _ in waiting]

    def write(place: int) -> None:
        waiting[place] = _REPLY * _TOGETHER
        lines[place].sendall(next(following))

    done = 0
    begun = time.perf_counter()
    for place, line in enumerate(lines):
        chosen.register(line, selectors.EVENT_READ, place)
        write(place)
    while (took := time.perf_counter() - begun) < seconds:
        for key, _ in chosen.select(1):
            waiting[key.data] -= len(lines[key.data].recv(65536))
            if not waiting[key.data]:
                done += _TOGETHER
                write(key.data)
    for line in lines:
        line.close()
    chosen.close()
    return done / took
