"""A consumer on plain asyncio: many tasks take parcels through their life, and a killed one goes on where it stood.

Run it: ``python docs/examples/consumer.py PARCELS.csv`` (lines ``id,scan``; without settings an embedded server in
``./statecache-data``). Run it again after ``kill -9``, or twice at once: every scan is applied exactly once.

Why that holds: each scan has a transition id that is made of the message itself (its place in the file). The consumer keeps no
offset. What was applied before it died is answered with the same receipt (``duplicate=True``), and what was not is applied. The
scans of one parcel go one after the other, so that each finds the state that it needs.
"""

from __future__ import annotations

import asyncio
import csv
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from statecache import State, StateMachine
from statecache.aio import AsyncMachineHandle, AsyncStateCache
from statecache.core import errors

TASKS = 200


class Parcel(StateMachine):
    posted = State(initial=True)
    sorted = State()
    taken = State()
    delivered = State(final=True)

    sort = posted.to(sorted)
    take = sorted.to(taken)
    deliver = taken.to(delivered)


Scan = tuple[int, str]
"""Number of the line, name of the event."""


def scans_by_parcel(path: Path) -> dict[str, list[Scan]]:
    found: dict[str, list[Scan]] = defaultdict(list)
    with path.open(newline="") as lines:
        for number, (id, scan) in enumerate(csv.reader(lines)):
            found[id].append((number, scan))
    return found


async def apply(parcels: AsyncMachineHandle, id: str, event: str, transition_id: str) -> bool:
    """Apply one scan, however often it takes; whether it was applied before."""
    while True:
        try:
            if event == "post":
                receipt = await parcels.start(id, transition_id=transition_id)
            else:
                receipt = await parcels.transition(id, event, transition_id=transition_id)
        except (errors.UnavailableError, errors.RecoveringError, errors.BackpressureError):
            await asyncio.sleep(0.1)  # the same id again: if it was applied after all, it is answered as a duplicate
        else:
            return receipt.duplicate


async def follow(parcels: AsyncMachineHandle, id: str, scans: Sequence[Scan], source: str) -> tuple[int, int]:
    """Take one parcel through its scans; returns how many were applied now, and how many before."""
    before = sum([await apply(parcels, id, event, f"{source}:{number}") for number, event in scans])
    return len(scans) - before, before


async def consume(path: Path) -> tuple[int, int]:
    """Apply a file with many parcels at once; returns how many scans were applied now, and how many before."""
    gate = asyncio.Semaphore(TASKS)
    async with AsyncStateCache.connect(flusher=True) as cache:
        parcels = await cache.machine(Parcel)

        async def one(id: str, scans: Sequence[Scan]) -> tuple[int, int]:
            async with gate:
                return await follow(parcels, id, scans, path.name)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(id, scans)) for id, scans in scans_by_parcel(path).items()]
        await cache.flush()  # everything is in SQL before we say so
    done = [task.result() for task in tasks]
    return sum(now for now, _ in done), sum(before for _, before in done)


def main() -> None:
    now, before = asyncio.run(consume(Path(sys.argv[1])))
    print(f"{now} scans applied, {before} had been applied before")


if __name__ == "__main__":
    main()
