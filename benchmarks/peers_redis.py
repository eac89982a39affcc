"""What people write by hand with redis-py: an ``HSET`` of the state and an ``XADD`` of what happened, with no check at all.

The hash holds state, version, updated and the data; the entry what a history needs: id, version, event, from, to, time,
transition id and the patch as JSON. The version is what the caller believes; nothing is read, compared, or refused.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.workload import PATCHES, RING, Patch, order_id, texts

PARTITIONS = 16
_ids = itertools.count()


def hash_key(number: int) -> str:
    return f"{{peer:{number % PARTITIONS:02d}}}:i:order:{order_id(number)}"


def log_key(number: int) -> str:
    return f"{{peer:{number % PARTITIONS:02d}}}:log"


def queue(pipe: Any, number: int, step: int, values: Patch) -> None:
    """Put one transition into a pipeline."""
    event, before, after = RING[step % 4]
    now = int(time.time() * 1000)
    pipe.hset(hash_key(number), mapping={"state": after, "version": step + 2, "updated": now, **texts(values)})
    pipe.xadd(
        log_key(number),
        {
            "id": order_id(number), "version": step + 2, "event": event, "from": before, "to": after, "at": now,
            "transition_id": f"{next(_ids):016x}", "patch": json.dumps(values),
        },
    )  # fmt: skip


class Writer:
    """Moves ``count`` instances round and round through one client, a pipeline for each call."""

    def __init__(self, client: Any, count: int) -> None:
        self.client = client
        self.count = count
        self._next = 0

    def transitions(self, items: int, *, transaction: bool = False) -> int:
        """One pipeline of ``items`` transitions."""
        with self.client.pipeline(transaction=transaction) as pipe:
            for _ in range(items):
                number, step = self._next % self.count, self._next // self.count
                self._next += 1
                queue(pipe, number, step, PATCHES[number % 2048])
            pipe.execute()
        return items

    def one_by_one(self, items: int) -> int:
        """A MULTI/EXEC for each transition."""
        for _ in range(items):
            self.transitions(1, transaction=True)
        return items

    def read(self, numbers: Sequence[int]) -> list[dict[str, str]]:
        """A pipeline of HGETALL."""
        with self.client.pipeline(transaction=False) as pipe:
            for number in numbers:
                pipe.hgetall(hash_key(number))
            return list(pipe.execute())
