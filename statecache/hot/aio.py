"""The hot store for asyncio: transitions and reads of hashes, each gathered on a connection of its own (``hot/gather.py``).

Only what is frequent is here; admission, hydration, look-ups and all else go through the sync store in a worker thread.
"""

from __future__ import annotations

import asyncio
from typing import Any

import redis

from statecache.core import items
from statecache.hot import answers, confirmation, failures, gather, pipe, resp, store, wire

Address = tuple[int, str, str]
Turn = gather.Turn


class _Transitions:
    """A script call of items."""

    def __init__(self, hot: store.HotStore) -> None:
        self._hot = hot

    def size(self, wish: items.Item) -> int:
        return len(wish.tail)

    def together(self, first: items.Item, other: items.Item) -> bool:
        return first.confirm == other.confirm

    def holds_up(self, first: items.Item) -> bool:
        return first.confirm is not None  # WAIT and WAITAOF block the connection

    def rides(self, ahead: items.Item) -> bool:
        # A repetition may be answered OLD, a guarded one VERSION, and come back: what stood behind it would have been applied.
        # A start may be answered MISS: what stood behind it would find nothing in SQL.
        return not ahead.retry and not ahead.pinned and "" not in ahead.move.targets

    def pack(self, batch: list[items.Item], line: pipe.Pipe) -> tuple[bytes, int]:
        return self._hot.packed_apply(batch, line), 1 if confirmation.strictest(batch) is None else 2

    def read(self, batch: list[items.Item], replies: list[Any], line: pipe.Pipe) -> list[items.Outcome]:
        answer = replies[0]
        if isinstance(answer, Exception):
            self._hot.wires.distrust(line)
            return [self.lost(answer, sent=True)] * len(batch)
        outcomes = self._hot.told(line, answer)
        confirm = confirmation.strictest(batch)
        if confirm is None:
            return outcomes
        confirmed = not isinstance(replies[1], Exception) and confirmation.is_confirmed(replies[1], confirm)
        return outcomes if confirmed else confirmation.unconfirmed(outcomes)

    def lost(self, error: Exception, *, sent: bool) -> items.Outcome:
        return failures.outcome_of(_of_driver(error), sent=sent)


class _Hashes:
    """Pipelined HGETALLs. An answer is a hash, or the caller's error."""

    def __init__(self, hot: store.HotStore) -> None:
        self._hot = hot

    def size(self, wish: Address) -> int:
        return 64

    def together(self, first: Address, other: Address) -> bool:
        return True

    def holds_up(self, first: Address) -> bool:
        return False

    def rides(self, ahead: Address) -> bool:
        return True

    def pack(self, batch: list[Address], line: pipe.Pipe) -> tuple[bytes, int]:
        instance = self._hot.keyspace.instance
        return b"".join([resp.command("HGETALL", instance(*address)) for address in batch]), len(batch)

    def read(self, batch: list[Address], replies: list[Any], line: pipe.Pipe) -> list[dict[bytes, bytes] | Exception]:
        return [self._hash(reply) for reply in replies]

    def _hash(self, reply: Any) -> dict[bytes, bytes] | Exception:
        if isinstance(reply, Exception) and not isinstance(reply, redis.ResponseError):
            return self.lost(reply, sent=True)
        try:
            return answers.hash_of(reply)
        except redis.ResponseError as error:
            return self.lost(error, sent=True)

    def lost(self, error: Exception, *, sent: bool) -> dict[bytes, bytes] | Exception:
        return failures.translated(_of_driver(error), "HGETALL")


def _of_driver(error: Exception) -> redis.RedisError | OSError:
    return (
        error
        if isinstance(error, (redis.RedisError, OSError))
        else redis.RedisError(f"{type(error).__name__}: {error}")
    )


class AsyncHotStore:
    """The frequent exchanges of a ``HotStore``, with ``await``. For the event loop that is running when it is made."""

    def __init__(
        self,
        hot: store.HotStore,
        url: str,
        socket_timeout_seconds: float,
        batch_items_max: int = store.BATCH_ITEMS_MAX,
    ) -> None:
        pool = pipe.pool_of(url, socket_timeout_seconds)
        bounds: dict[str, Any] = {
            "items_max": min(batch_items_max, store.BATCH_ITEMS_MAX),
            "bytes_max": store.BATCH_BYTES_MAX,
            "timeout_seconds": socket_timeout_seconds,
        }

        def broken(error: Exception) -> None:
            if wire.is_break(error):  # those of the sync client are dead too: see there
                hot.wires.discard_idle()

        def unchecked(error: Exception) -> None:
            hot.wires.checked_at = 0.0  # whether a lost call compared the identity is not known
            broken(error)

        self._items: gather.Gatherer[items.Item, items.Outcome] = gather.Gatherer(
            pool, _Transitions(hot), on_lost=unchecked, **bounds
        )
        self._confirming: gather.Gatherer[items.Item, items.Outcome] = gather.Gatherer(
            pool, _Transitions(hot), on_lost=unchecked, turns_of=self._items, **bounds
        )  # over a connection of its own, made when it is wanted: WAIT and WAITAOF block it
        self._hashes: gather.Gatherer[Address, dict[bytes, bytes] | Exception] = gather.Gatherer(
            pool, _Hashes(hot), on_lost=broken, **bounds
        )
        self.enter = self._items.enter
        """Take a write's turn among those of its instance, by address ``machine:id``."""
        self.leave = self._items.leave
        self.come_first = self._items.come_first
        """Wait until a write's turn has come, (turn, deadline); False if the deadline came first."""

    def apply(self, item: items.Item, deadline: float, turn: Turn | None) -> asyncio.Future[items.Outcome]:
        """Apply an item, in company if there is any; a future of its outcome."""
        return (self._items if item.confirm is None else self._confirming).ask(item, deadline, turn)

    async def hash(self, address: Address, deadline: float) -> dict[bytes, bytes]:
        """The fields of one hash, read in company if there is any. Raises ``UnavailableError``."""
        found = await self._hashes.ask(address, deadline)
        if isinstance(found, Exception):
            raise found
        return found

    async def close(self) -> None:
        """Close the connections. Nothing may be under way."""
        await asyncio.gather(self._items.close(), self._confirming.close(), self._hashes.close())
