"""Waiting until transitions are in SQL: by their rows, never by comparing ids (protocol hole H11).

Waiters share flushes (group commit): whoever finds that nobody else moves the watermark runs a step of the flusher, and
what that step commits answers all the others too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from statecache.core import entry, errors, keys, model
from statecache.durable.store import DurableStore

_POLL_SECONDS = 0.004
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
            f"{receipt.machine}:{receipt.id} version {receipt.version} ({receipt.event}) was acknowledged and is lost: a recovery "
            "found Redis without it; see the report in 'statecache status'"
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
    """Wait until each receipt is in SQL; None, or the error, for each. ``DurabilityTimeout`` at the deadline."""
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
        for index, found in zip(waiting, durable.standing(addresses), strict=True):
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
                results[index] = errors.DurabilityTimeout(
                    f"{one.machine}:{one.id} version {one.version} stands, but was not in SQL in time: is a flusher running? "
                    "See 'statecache status'",
                    one,
                )
            return results
        if helpful or now - started > _HELP_AFTER_SECONDS:
            if not push(deadline):
                time.sleep(min(_POLL_SECONDS, max(0.0, deadline - now)))
        else:
            time.sleep(min(_POLL_SECONDS, max(0.0, deadline - now)))
