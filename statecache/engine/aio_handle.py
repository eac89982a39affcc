"""A machine's handle with ``await``: single calls are run by the async driver, what is rare by the sync handle, in a thread."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

from statecache.core import entry, errors, model
from statecache.engine.aio_claims import AsyncClaim, Claiming
from statecache.engine.calls import Start, as_ids, as_list, check_kind
from statecache.engine.claims import TTL_SECONDS, Claim, Held, ending
from statecache.engine.handle import MachineHandle
from statecache.engine.processes import OfOneProcess

if TYPE_CHECKING:
    from statecache.engine.aio import AsyncStateCache


class AsyncMachineHandle(OfOneProcess):
    """``MachineHandle`` with ``await``: see there for what each method does and raises."""

    def __init__(self, cache: AsyncStateCache, sync: MachineHandle) -> None:
        self._cache = cache
        self._sync = sync
        self.name = sync.name
        self.machine = sync.machine

    async def start(
        self,
        id: str,
        data: Mapping[str, Any] | None = None,
        *,
        actor: str | None = None,
        reason: str | None = None,
        transition_id: str | None = None,
        occurred_at: datetime | None = None,
        durability: str | None = None,
        timeout: float | None = None,
    ) -> model.Receipt:
        """As ``MachineHandle.start``."""
        began = time.perf_counter()
        try:
            request = self._sync.calls.door.start(
                id, data, actor=actor, reason=reason, transition_id=transition_id, occurred_at=occurred_at
            )
            receipt = await self._cache.write(request, self._level(durability), self._cache.sync.deadline(timeout))
        except errors.StateCacheError as error:
            self._sync.meter.refused(entry.EVENT_START, error)
            raise
        self._sync.meter.done(receipt, durability, time.perf_counter() - began)
        return receipt

    async def transition(
        self,
        id: str,
        event: str,
        data: Mapping[str, Any] | None = None,
        *,
        unset: Sequence[str] = (),
        increment: Mapping[str, int | float] | None = None,
        actor: str | None = None,
        reason: str | None = None,
        expect_version: int | None = None,
        transition_id: str | None = None,
        occurred_at: datetime | None = None,
        durability: str | None = None,
        timeout: float | None = None,
    ) -> model.Receipt:
        """As ``MachineHandle.transition``."""
        return await self.fire(
            model.Move(id, event, data, unset, increment, actor, reason, expect_version, transition_id, occurred_at),
            durability,
            timeout,
        )

    async def fire(
        self, move: model.Move, durability: str | None = None, timeout: float | None = None
    ) -> model.Receipt:
        """As ``MachineHandle.fire``."""
        began = time.perf_counter()
        try:
            check_kind("move", move, model.Move)
            request = self._sync.calls.door.transition(move)
            receipt = await self._cache.write(request, self._level(durability), self._cache.sync.deadline(timeout))
        except errors.StateCacheError as error:
            self._sync.meter.refused(getattr(move, "event", ""), error)
            raise
        self._sync.meter.done(receipt, durability, time.perf_counter() - began)
        return receipt

    def _level(self, durability: str | None) -> model.Durability:
        return self._cache.sync.level(durability, self.machine.definition.durability)

    async def start_many(
        self,
        starts: Iterable[Start],
        *,
        actor: str | None = None,
        durability: str | None = None,
        timeout: float | None = None,
    ) -> list[model.Receipt | errors.StateCacheError]:
        """As ``MachineHandle.start_many``."""
        return await self._cache.in_time(
            self._sync.start_many, as_list("starts", starts), actor=actor, durability=durability, timeout=timeout
        )

    async def transition_many(
        self, moves: Iterable[model.Move], *, durability: str | None = None, timeout: float | None = None
    ) -> list[model.Receipt | errors.StateCacheError]:
        """As ``MachineHandle.transition_many``."""
        return await self._cache.in_time(
            self._sync.transition_many, as_list("moves", moves), durability=durability, timeout=timeout
        )

    def claim(
        self,
        id: str,
        ttl: float | timedelta = TTL_SECONDS,
        *,
        worker: str | None = None,
        renew: bool = False,
        timeout: float | None = None,
    ) -> Claiming:
        """As ``MachineHandle.claim``: ``await orders.claim("1001")``, or ``async with orders.claim("1001") as claim:``."""

        async def take() -> AsyncClaim:
            ask = partial(self._sync.claim, id, ttl, worker=worker, renew=renew, timeout=timeout)
            return AsyncClaim(self, await self._cache.take(ask, _end), self._cache.briefly)

        return Claiming(take)

    async def claim_next(
        self,
        state: str,
        ttl: float | timedelta = TTL_SECONDS,
        *,
        older_than: timedelta | None = None,
        worker: str | None = None,
        renew: bool = False,
        timeout: float | None = None,
    ) -> AsyncClaim | None:
        """As ``MachineHandle.claim_next``."""
        ask = partial(
            self._sync.claim_next, state, ttl, older_than=older_than, worker=worker, renew=renew, timeout=timeout
        )
        taken = await self._cache.take(ask, _end)
        return None if taken is None else AsyncClaim(self, taken, self._cache.briefly)

    async def claims(self, limit: int = 1000) -> list[Held]:
        """As ``MachineHandle.claims``."""
        return await self._cache.briefly(self._sync.claims, limit)

    async def get(self, id: str, *, timeout: float | None = None) -> model.Snapshot:
        """As ``MachineHandle.get``."""
        try:
            snapshot: model.Snapshot = await self._cache.read(
                self._sync.calls.get(id), self._cache.sync.deadline(timeout)
            )
        except errors.NotFoundError:
            self._sync.meter.read("missing")
            raise
        self._sync.meter.read(snapshot.source)
        return snapshot

    async def get_many(
        self, ids: Iterable[str], *, timeout: float | None = None
    ) -> list[model.Snapshot | errors.StateCacheError]:
        """As ``MachineHandle.get_many``."""
        return await self._cache.in_time(self._sync.get_many, as_ids(ids), timeout=timeout)

    async def state(self, id: str, *, timeout: float | None = None) -> str:
        """As ``MachineHandle.state``."""
        return (await self.get(id, timeout=timeout)).state

    async def history(self, id: str, *, timeout: float | None = None) -> list[model.Transition]:
        """As ``MachineHandle.history``."""
        return await self._cache.in_time(self._sync.history, id, timeout=timeout)

    async def at(
        self, id: str, *, version: int | None = None, when: datetime | None = None, timeout: float | None = None
    ) -> model.Snapshot:
        """As ``MachineHandle.at``."""
        return await self._cache.in_time(self._sync.at, id, version=version, when=when, timeout=timeout)

    async def find(
        self, state: str | None = None, *, older_than: timedelta | None = None, stuck: bool = False, limit: int = 100
    ) -> list[model.Snapshot]:
        """As ``MachineHandle.find``."""
        return await self._cache.blocking(self._sync.find, state, older_than=older_than, stuck=stuck, limit=limit)

    async def counts(self) -> dict[str, int]:
        """As ``MachineHandle.counts``."""
        return await self._cache.blocking(self._sync.counts)


def _end(claim: Claim | None) -> None:
    """Of a caller that was cancelled while it claimed."""
    if claim is not None:
        with ending(claim):
            claim.release()
