"""The async client: the flows of ``core/flows.py`` run by an async driver; everything rare is the sync client's, in a thread.

Transitions and reads of hot instances are awaited on the event loop and batched by themselves (``hot/aio.py``). Look-ups in
SQL, admission, recovery, history and bulk calls run in worker threads on the same stores as the sync client, so there is one
copy of all logic, and what the sync client survives this one survives.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Awaitable, Callable, Generator, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Generic, Self, TypeVar

from prometheus_client import CollectorRegistry

from statecache import metrics as metering
from statecache.core import entry, errors, flows, items, model
from statecache.core.machine import StateMachine
from statecache.engine import recovery
from statecache.engine.cache import StateCache
from statecache.engine.calls import Start
from statecache.engine.driver import pause_seconds
from statecache.engine.handle import CONFIRMED, MachineHandle
from statecache.hot.aio import AsyncHotStore

Opened = TypeVar("Opened", bound="AsyncStateCache")
Result = TypeVar("Result")


class Opening(Generic[Opened]):
    """What ``connect`` and ``embedded`` return: ``await`` it, or enter it with ``async with``."""

    def __init__(self, open: Callable[[], Awaitable[Opened]]) -> None:
        self._open = open
        self._opened: Opened | None = None

    def __await__(self) -> Generator[Any, None, Opened]:
        return self._open().__await__()

    async def __aenter__(self) -> Opened:
        self._opened = await self._open()
        return self._opened

    async def __aexit__(self, *exception: object) -> None:
        assert self._opened is not None
        await self._opened.close()


class AsyncStateCache:
    """``StateCache`` with ``await``: see there for what each method does and raises.

    Made by ``connect`` or ``embedded`` inside a running event loop, which it belongs to. Concurrent calls of one process
    travel together by themselves. ``close`` waits for what is in flight.
    """

    def __init__(self, sync: StateCache) -> None:
        self.sync = sync
        """The sync client that does what is rare; it may be used too, from threads."""
        settings = sync.settings
        self.hot = AsyncHotStore(sync.hot, sync.redis_url, settings.socket_timeout_seconds, settings.batch_items_max)

    @classmethod
    def connect(
        cls,
        redis_url: str | None = None,
        database_url: str | None = None,
        namespace: str | None = None,
        *,
        flusher: bool = False,
        metrics: metering.Metrics | CollectorRegistry | None = None,
        **settings: Any,
    ) -> Opening[Self]:
        """As ``StateCache.connect``."""

        async def open() -> Self:
            made = asyncio.to_thread(
                StateCache.connect, redis_url, database_url, namespace, flusher=flusher, metrics=metrics, **settings
            )
            return cls(await made)

        return Opening(open)

    @classmethod
    def embedded(
        cls,
        folder: str | os.PathLike[str],
        *,
        flusher: bool = True,
        metrics: metering.Metrics | CollectorRegistry | None = None,
        **settings: Any,
    ) -> Opening[Self]:
        """As ``StateCache.embedded``."""

        async def open() -> Self:
            made = asyncio.to_thread(StateCache.embedded, folder, flusher=flusher, metrics=metrics, **settings)
            return cls(await made)

        return Opening(open)

    async def close(self) -> None:
        """Wait for what is in flight, flush (if this process flushes), close every connection."""
        await self.hot.close()
        await asyncio.to_thread(self.sync.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    @property
    def redis_url(self) -> str:
        """Where the hot store works."""
        return self.sync.redis_url

    @property
    def metrics(self) -> metering.Metrics:
        """What this process counts."""
        return self.sync.metrics

    @property
    def database_url(self) -> str:
        """Where the durable store works."""
        return self.sync.database_url

    async def machine(self, machine: type[StateMachine] | str) -> AsyncMachineHandle:
        """As ``StateCache.machine``."""
        return AsyncMachineHandle(self, await asyncio.to_thread(self.sync.machine, machine))

    async def wait_durable(
        self, receipt: model.Receipt | Sequence[model.Receipt], timeout: float | None = None
    ) -> None:
        """As ``StateCache.wait_durable``."""
        await asyncio.to_thread(self.sync.wait_durable, receipt, timeout)

    async def flush(self, timeout: float = 10.0) -> None:
        """As ``StateCache.flush``."""
        await asyncio.to_thread(self.sync.flush, timeout)

    async def recover(self, *, dry_run: bool = False) -> recovery.Report:
        """As ``StateCache.recover``."""
        return await asyncio.to_thread(self.sync.recover, dry_run=dry_run)

    async def run(self, flow: flows.Flow, deadline: float) -> Any:
        """Run a flow to its end and return its result."""
        try:
            wish = next(flow)
            while True:
                try:
                    answer = await self._answer(wish, deadline)
                except errors.StateCacheError as error:
                    wish = flow.throw(error)
                else:
                    wish = flow.send(answer)
        except StopIteration as end:
            return end.value

    async def _answer(self, wish: Any, deadline: float) -> Any:
        kind = type(wish)
        if kind is items.Item:
            return await self.hot.apply(wish)
        if kind is flows.Hot:
            try:
                return await self.hot.hash((wish.partition, wish.machine, wish.id))
            except errors.UnavailableError:
                pass  # the sync driver asks again until the deadline
        elif kind is flows.Pause and wish.why not in ("LOST", "UNSENT"):
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            await asyncio.sleep(min(left, pause_seconds(wish.attempt) * random.uniform(0.5, 1.0)))
            return True
        return await asyncio.to_thread(self.sync.driver.answer, wish, deadline)


class AsyncMachineHandle:
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
            receipt = await self._write(request, durability, timeout)
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
        began = time.perf_counter()
        move = model.Move(id, event, data, unset, increment, actor, reason, expect_version, transition_id, occurred_at)
        try:
            receipt = await self._write(self._sync.calls.door.transition(move), durability, timeout)
        except errors.StateCacheError as error:
            self._sync.meter.refused(event, error)
            raise
        self._sync.meter.done(receipt, durability, time.perf_counter() - began)
        return receipt

    async def _write(self, request: flows.Request, durability: str | None, timeout: float | None) -> model.Receipt:
        sync = self._cache.sync
        deadline = sync.deadline(timeout)
        level = sync.level(durability or self.machine.definition.durability)
        if level in CONFIRMED:
            request.item.confirm = await asyncio.to_thread(sync.confirmation, level, deadline)
        receipt: model.Receipt = await self._cache.run(flows.transition(request), deadline)
        if level is model.Durability.DURABLE:
            await asyncio.to_thread(sync.confirm, [receipt], deadline)
        return receipt

    async def start_many(
        self,
        starts: Iterable[Start],
        *,
        actor: str | None = None,
        durability: str | None = None,
        timeout: float | None = None,
    ) -> list[model.Receipt | errors.StateCacheError]:
        """As ``MachineHandle.start_many``."""
        return await asyncio.to_thread(
            self._sync.start_many, starts, actor=actor, durability=durability, timeout=timeout
        )

    async def transition_many(
        self, moves: Iterable[model.Move], *, durability: str | None = None, timeout: float | None = None
    ) -> list[model.Receipt | errors.StateCacheError]:
        """As ``MachineHandle.transition_many``."""
        return await asyncio.to_thread(self._sync.transition_many, moves, durability=durability, timeout=timeout)

    async def get(self, id: str, *, timeout: float | None = None) -> model.Snapshot:
        """As ``MachineHandle.get``."""
        try:
            snapshot: model.Snapshot = await self._cache.run(
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
        return await asyncio.to_thread(self._sync.get_many, ids, timeout=timeout)

    async def state(self, id: str, *, timeout: float | None = None) -> str:
        """As ``MachineHandle.state``."""
        return (await self.get(id, timeout=timeout)).state

    async def history(self, id: str, *, timeout: float | None = None) -> list[model.Transition]:
        """As ``MachineHandle.history``."""
        return await asyncio.to_thread(self._sync.history, id, timeout=timeout)

    async def at(
        self, id: str, *, version: int | None = None, when: datetime | None = None, timeout: float | None = None
    ) -> model.Snapshot:
        """As ``MachineHandle.at``."""
        return await asyncio.to_thread(self._sync.at, id, version=version, when=when, timeout=timeout)

    async def find(
        self, state: str | None = None, *, older_than: timedelta | None = None, limit: int = 100
    ) -> list[model.Snapshot]:
        """As ``MachineHandle.find``."""
        return await asyncio.to_thread(self._sync.find, state, older_than=older_than, limit=limit)

    async def counts(self) -> dict[str, int]:
        """As ``MachineHandle.counts``."""
        return await asyncio.to_thread(self._sync.counts)
