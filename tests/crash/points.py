"""Crash-point enumeration: every call of the engine to Redis or SQL is a point at which the process may die.

``watched`` counts the calls that one ``StateCache`` makes to its hot store, its SQL transactions and the functions of
recovery, and raises ``Died`` when the point is reached that a test wants. A dead process does nothing more: every further
call raises too, and an open SQL transaction is rolled back, as the server does it when the connection ends.

Between two calls nothing but the process's own memory changes. So dying before call k + 1 is dying after call k, and N + 1
deaths (before each of the N calls, and after the last) are all that there are. What dies *inside* a call - the request done,
the reply lost - is what comes after it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from statecache import StateCache
from statecache.durable import flush, recoveries

HOT = (
    "admit",
    "drop",
    "evict",
    "fence",
    "find",
    "find_many",
    "flushed",
    "hashes",
    "park",
    "position",
    "probe",
    "read",
    "ready",
)
DURABLE = ("checkpoints", "history", "identity", "letters", "lookup", "partitions", "standing", "transition")
TRANSACTION = (
    "adjust_counts", "advance", "checkpoints", "hold", "insert_history", "insert_letters", "insert_transitions", "parked",
    "take_letters", "upsert_checkpoints",
)  # fmt: skip
RECOVERIES = ("complete_index", "finish", "heartbeat", "instances_above", "recovery", "take")


class Died(BaseException):
    """The process is dead. Not an ``Exception``: nothing that goes on after a failure goes on after this."""


class Points:
    """Counts calls; dies before call ``die_before`` (the first is 1), or never."""

    def __init__(self, die_before: int | None = None) -> None:
        self.die_before = die_before
        self.names: list[str] = []
        self.died = False

    def reach(self, name: str) -> None:
        if self.die_before is not None and len(self.names) + 1 >= self.die_before:
            raise Died(f"before {name}, after {self.names[-1:]}")
        self.names.append(name)

    def wrapped(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            self.reach(name)
            return function(*arguments, **named)

        return call


@contextlib.contextmanager
def watched(cache: StateCache, points: Points) -> Iterator[None]:
    """Count the calls of this cache; only one may be under watch at a time."""
    begin = cache.durable.database.transaction

    @contextlib.contextmanager
    def transaction(**options: Any) -> Iterator[Any]:
        points.reach("BEGIN")
        with begin(**options) as connection:
            yield connection
            points.reach("COMMIT")

    with contextlib.ExitStack() as patches:

        def patch(target: Any, name: str, where: str) -> None:
            patches.enter_context(mock.patch.object(target, name, points.wrapped(where + name, getattr(target, name))))

        for name in HOT:
            patch(cache.hot, name, "hot.")
        for name in DURABLE:
            patch(cache.durable, name, "sql.")
        for name in TRANSACTION:
            original = getattr(flush.FlushTransaction, name)
            patches.enter_context(
                mock.patch.object(flush.FlushTransaction, name, _method(points, f"transaction.{name}", original))
            )
        for name in RECOVERIES:
            patch(recoveries, name, "recoveries.")
        patches.enter_context(mock.patch.object(cache.durable.database, "transaction", transaction))
        yield


def _method(points: Points, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Any, *arguments: Any, **named: Any) -> Any:
        points.reach(name)
        return original(self, *arguments, **named)

    return method
