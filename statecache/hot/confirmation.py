"""``WAIT`` and ``WAITAOF`` behind a script call, on its connection: what to ask, and whether the answer confirms."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec
import redis

from statecache.core import items
from statecache.hot import resp, wire

GRACE_SECONDS = 0.5
"""How much later than at the end of its time the answer of ``WAIT`` may come."""


def strictest(chunk: Sequence[items.Item]) -> items.Confirm | None:
    """What the items of one script call want confirmed; calls with one level travel together, so the first decides."""
    for item in chunk:
        if item.confirm is not None:
            return item.confirm
    return None


def command(confirm: items.Confirm) -> bytes:
    if confirm.aof:
        return resp.command("WAITAOF", confirm.local, confirm.replicas, confirm.timeout_ms)
    return resp.command("WAIT", confirm.replicas, confirm.timeout_ms)


def is_confirmed_by(line: wire.Wire, confirm: items.Confirm) -> bool:
    if line.until:  # the server's own wait ends at the deadline: its answer comes a little later
        line.until = time.monotonic() + confirm.timeout_ms / 1000 + GRACE_SECONDS
    try:
        return is_confirmed(line.read(), confirm)
    except redis.ResponseError:
        return False


def is_confirmed(counts: Any, confirm: items.Confirm) -> bool:
    """Judge the answer of ``WAIT`` or ``WAITAOF``: it gives counts, also when time ran out."""
    if confirm.aof:
        return bool(counts[0] >= confirm.local and counts[1] >= confirm.replicas)
    return bool(counts >= confirm.replicas)


def unconfirmed(outcomes: Sequence[items.Outcome]) -> list[items.Outcome]:
    """The same outcomes, marked as not confirmed in time."""
    return [msgspec.structs.replace(outcome, confirmed=False) for outcome in outcomes]
