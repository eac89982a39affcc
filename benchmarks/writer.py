"""A writer process of ``together``: moves the fleet at the rate that it is told, and says what it did.

``python -m benchmarks.writer INSTANCES IN_A_ROW``; where is in the environment (``STATECACHE_REDIS_URL`` ...). A line
``RATE SECONDS`` on standard input begins a stretch (rate 0: as fast as it goes), a line of JSON on standard output ends it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence

from benchmarks.workload import Fleet, refused
from statecache import BackpressureError, Move, StateCache

PACED_CHUNK, FREE_CHUNK = 500, 4000


def main(words: Sequence[str]) -> None:
    count, in_a_row = int(words[0]), int(words[1])
    with StateCache.connect() as cache:
        fleet = Fleet(cache, count, start=False)
        print("ready", flush=True)
        for line in sys.stdin:
            rate, seconds = map(float, line.split())
            print(json.dumps(stretch(fleet, in_a_row, rate, seconds)), flush=True)


def stretch(fleet: Fleet, in_a_row: int, rate: float, seconds: float) -> dict[str, float]:
    """Write for some seconds. Behind the pace, it goes as fast as it can, and does not catch up more than a second's worth."""
    chunk = PACED_CHUNK if rate else FREE_CHUNK
    begun, cpu, written, waits = time.monotonic(), time.process_time(), 0, 0
    due = begun
    while (now := time.monotonic()) < begun + seconds:
        if rate:
            due = max(due + chunk / rate, now - 1.0)
            if due > now:
                time.sleep(due - now)
        waits += write(fleet, fleet.moves(chunk, in_a_row))
        written += chunk
    return {
        "written": written, "seconds": time.monotonic() - begun, "cpu": time.process_time() - cpu, "refused": waits,
    }  # fmt: skip


def write(fleet: Fleet, moves: Sequence[Move]) -> int:
    """Make the moves; those that the brake refused again, in their order. Returns how often that was."""
    refusals = 0
    left = list(moves)
    while left:
        results = fleet.orders.transition_many(left)
        again = [place for place, result in enumerate(results) if isinstance(result, BackpressureError)]
        refused([result for result in results if not isinstance(result, BackpressureError)])
        refusals += len(again)
        left = [left[place] for place in again]
    return refusals


if __name__ == "__main__":
    main(sys.argv[1:])
