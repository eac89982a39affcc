"""Durability above ``hot``: what a server can give, and waiting until transitions are in SQL.

``fsync`` and ``replica`` are confirmed on the connection that wrote, right behind the script (``core.items.Confirm``). Which
servers can give them is judged once per epoch, when the level is first wanted: one that cannot is refused there, not at 3 a.m.
``WAITAOF`` answers before the fsync on Redis 7.4 and on every Valkey tried (redis#13793), so under ``appendfsync everysec``
only Redis 7.2 and from 8.2 on are believed; under ``always`` the reply itself comes after the fsync.

``durable`` waits for rows, never by comparing ids (protocol hole H11).

Waiters share flushes (group commit): whoever finds that nobody else moves the watermark runs a step of the flusher, and
what that step commits answers all the others too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from statecache.core import entry, errors, items, keys, model
from statecache.durable.store import DurableStore
from statecache.hot.store import HotStore


def confirmation(hot: HotStore, level: model.Durability, replicas: int, timeout_seconds: float) -> items.Confirm | None:
    """What to ask behind each script for a level; None where the reply itself is the confirmation.

    Raises ``ConfigurationError`` when this server cannot give the level.
    """
    timeout_ms = max(1, int(timeout_seconds * 1000))
    if level is model.Durability.REPLICA:
        have = int(hot.server_facts().get("connected_slaves", "0"))
        if have < replicas:
            raise errors.ConfigurationError(
                f"durability 'replica' wants {replicas} replicas, this server has {have}: attach one, or lower the level"
            )
        return items.Confirm(False, 0, replicas, timeout_ms)
    if level is not model.Durability.FSYNC:
        return None
    facts = hot.server_facts()
    wanted = hot.configuration("appendfsync", "no-appendfsync-on-rewrite")
    if wanted is None:
        raise errors.ConfigurationError(
            "durability 'fsync' cannot be judged: this user may not read the server's configuration (allow config|get)"
        )
    if facts.get("aof_enabled") != "1":
        raise errors.ConfigurationError("durability 'fsync' needs the append-only file: set appendonly yes")
    if wanted.get("no-appendfsync-on-rewrite") == "yes":
        raise errors.ConfigurationError(
            "durability 'fsync' is not kept while no-appendfsync-on-rewrite is yes: set it to no"
        )
    if wanted.get("appendfsync") == "always":
        return None
    version = tuple(int(part) for part in facts.get("redis_version", "0.0").split(".")[:2])
    if (
        "valkey_version" not in facts
        and wanted.get("appendfsync") == "everysec"
        and (version == (7, 2) or version >= (8, 2))
    ):
        return items.Confirm(True, 1, 0, timeout_ms)
    raise errors.ConfigurationError(
        "durability 'fsync' cannot be had from this server: set appendfsync always "
        "(under everysec its WAITAOF answers before the file is on disk)"
    )


_POLL_SECONDS = 0.004
_TROUBLE_SECONDS = 0.05
_HELP_AFTER_SECONDS = 0.25
"""With a flusher about, this long is left to it before a waiter helps itself."""

Pushed = Callable[[float], bool]
"""Runs a step of the flusher (until a deadline); True if it moved entries."""


def outcome(
    receipt: model.Receipt, standing: tuple[entry.EntryId, str | None, str | None]
) -> errors.StateCacheError | bool | None:
    """Tell whether a receipt is durable: True, False (not yet), or the error that it never will be."""
    watermark, transition_id, letter_id = standing
    if transition_id == receipt.transition_id:
        return True
    if letter_id == receipt.transition_id:
        return errors.ParkedError(
            f"{receipt.machine}:{receipt.id} version {receipt.version} was refused by SQL, or waits behind an entry that was: "
            f"see 'statecache dead-letters list {receipt.machine}:{receipt.id}'"
        )
    if watermark >= entry.EntryId.parse(receipt.entry_id):
        return errors.IntegrityError(
            f"{receipt.machine}:{receipt.id} version {receipt.version} ({receipt.event}) was acknowledged and is lost: "
            "a recovery found Redis without it; see the report in 'statecache status'"
        )
    return False


def wait(
    durable: DurableStore,
    partition_count: int,
    receipts: Sequence[model.Receipt],
    push: Pushed,
    flusher_about: Callable[[], bool],
    deadline: float,
) -> list[errors.StateCacheError | None]:
    """Wait until each receipt is in SQL; None, or the error, for each.

    ``DurabilityTimeout`` at the deadline, its cause what was in the way. Nothing else that goes wrong meanwhile is raised:
    the transitions stand, and an error that does not say so would be taken for "not applied".
    """
    trouble: errors.StateCacheError | None = None
    results: list[errors.StateCacheError | None] = [None] * len(receipts)
    waiting = list(range(len(receipts)))
    started = time.monotonic()
    helpful = not flusher_about()
    while True:
        addresses = [
            (one.machine, one.id, one.version, keys.partition_of(one.machine, one.id, partition_count))
            for one in (receipts[index] for index in waiting)
        ]
        left = []
        try:
            standing = durable.standing(addresses)
        except errors.UnavailableError as error:
            trouble, standing, left = error, [], waiting
        for index, found in zip(waiting, standing, strict=False):
            verdict = outcome(receipts[index], (found.watermark, found.transition_id, found.letter_id))
            if verdict is False:
                left.append(index)
            elif verdict is not True:
                results[index] = verdict
        waiting = left
        if not waiting:
            return results
        now = time.monotonic()
        if now >= deadline:
            for index in waiting:
                one = receipts[index]
                late = errors.DurabilityTimeout(
                    f"{one.machine}:{one.id} version {one.version} stands, but was not in SQL in time: "
                    f"{trouble or 'is a flusher running?'} See 'statecache status'",
                    one,
                )
                late.__cause__ = trouble
                results[index] = late
            return results
        moved = False
        if helpful or now - started > _HELP_AFTER_SECONDS:
            try:
                moved = push(deadline)
            except errors.StateCacheError as error:
                trouble = error
        if not moved:
            time.sleep(min(_POLL_SECONDS if trouble is None else _TROUBLE_SECONDS, max(0.0, deadline - now)))
