"""Claims in Redis: one script gives, renews and ends them; who looks reads them plainly."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from statecache.core import claims
from statecache.hot.store import HotStore

_encode = msgspec.json.encode


def ask(hot: HotStore, wish: claims.Ask, deadline: float | None = None) -> claims.Answer:
    """Do what a flow asks: see ``claim.lua``. Raises ``UnavailableError``, ``BackpressureError`` (no memory)."""
    partitions: dict[int, int] = {}
    rows = [
        [partitions.setdefault(row.partition, len(partitions) + 1), f"{row.machine}:{row.id}", row.state, row.token]
        for row in wish.rows
    ]
    repeated, wish.repeated = wish.repeated, True  # the driver sends a wish again whose reply was lost
    arguments = (wish.nonce, wish.worker, wish.ttl_ms, "1" if wish.one else "0", "1" if repeated else "0")
    reply = hot.ask("claim", list(partitions), _encode(rows), *arguments, deadline=deadline)
    head, *lines = reply.split("\n")
    return claims.Answer(int(head), lines) if lines else claims.Answer(0, [head])


def held(hot: HotStore, partition: int, limit: int) -> list[claims.Held]:
    """The claims of a partition that are in force, those first that end first. Plain reads, two round trips."""
    now_ms = hot.time_ms()
    key = hot.keyspace.claims(partition)
    found = hot.commands(("ZRANGEBYSCORE", key, now_ms, "+inf", "LIMIT", 0, limit))[0]
    if not found:
        return []
    addresses = [tuple(name.decode().split(":", 1)) for name in found]
    texts = hot.commands(*[("HGET", hot.keyspace.instance(partition, *address), "@c") for address in addresses])
    pairs = zip(addresses, texts, strict=True)
    listed = [claims.parse(machine, id, text) for (machine, id), text in pairs if text is not None]
    return [one for one in listed if one is not None and one.expires_ms > now_ms]


def holder(hot: HotStore, partition: int, machine: str, id: str) -> claims.Held | None:
    """The claim on one instance that is in force. Plain reads, two round trips, one where nobody holds it."""
    text = hot.commands(("HGET", hot.keyspace.instance(partition, machine, id), "@c"))[0]
    one = None if text is None else claims.parse(machine, id, text)
    return one if one is not None and one.expires_ms > hot.time_ms() else None


def all_held(hot: HotStore, partitions: Sequence[int], limit: int) -> list[claims.Held]:
    """The same for many partitions."""
    listed = [one for partition in partitions for one in held(hot, partition, limit)]
    return sorted(listed, key=lambda one: (one.expires_ms, one.machine, one.id))[:limit]
