"""Deadlines in Redis: a sorted set per partition, kept by the moves themselves (``apply.lua``).

It is an index, never the truth: what is due is looked at, and fired under the version that was seen. So a member that means
nothing any more does no harm, and one that was lost with Redis is found by its age in SQL.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from statecache.hot.store import HotStore

_encode = msgspec.json.encode


class Due(msgspec.Struct, frozen=True):
    """An instance whose deadline has passed."""

    partition: int
    machine: str
    id: str
    deadline_ms: int


def due(hot: HotStore, partitions: Sequence[int], limit: int) -> tuple[str, int, list[Due]]:
    """What is due, oldest first in each partition: (admission code or ``OK``, the server's time in ms, instances)."""
    head, *lines = hot.ask("due", partitions, limit).split("\n")
    if not lines:
        return head, 0, []
    found: list[Due] = []
    rest = iter(lines)
    for partition in partitions:
        code, *words = next(rest).split(" ")
        if code != "OK":
            return code, 0, []
        for _ in range(int(words[0])):
            deadline, _, name = next(rest).partition(" ")
            machine, _, id = name.partition(":")
            found.append(Due(partition, machine, id, int(deadline)))
    return "OK", int(head), found


def remind(hot: HotStore, rows: Sequence[tuple[int, str, int | None, int | None]]) -> list[str]:
    """Change deadlines: (partition, "machine:id", the one that was seen, the new one), None for no deadline; a code each."""
    if not rows:
        return []
    partitions: dict[int, int] = {}
    packed = [
        [partitions.setdefault(partition, len(partitions) + 1), name, *["" if ms is None else str(ms) for ms in both]]
        for partition, name, *both in rows
    ]
    lines = hot.ask("remind", list(partitions), _encode(packed)).split("\n")
    return lines if len(lines) == len(rows) else lines * len(rows)
