"""The async client: the flows of ``core/flows.py`` run by an async driver; everything rare is the sync client's, in a thread.

Transitions and reads of hot instances are awaited on the event loop and batched by themselves (``hot/gather.py``). Look-ups in
SQL, admission, recovery, history and bulk calls run in worker threads (``engine/aside.py``) on the same stores as the sync
client, so there is one copy of all logic, and what the sync client survives this one survives.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
import weakref
from collections.abc import Awaitable, Callable, Generator, Sequence
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from statecache import metrics as metering
from statecache.core import errors, flows, items, model
from statecache.core.machine import StateMachine
from statecache.engine import aside, durability, recovery
from statecache.engine.aio_handle import AsyncMachineHandle
from statecache.engine.cache import StateCache
from statecache.engine.calls import as_receipts
from statecache.engine.driver import UNREACHABLE, pause_seconds, shorten_confirmation
from statecache.engine.handle import CONFIRMED
from statecache.engine.processes import OfOneProcess
from statecache.hot import confirmation
from statecache.hot.aio import AsyncHotStore, Turn
from statecache.hot.wire import EXCHANGE_SECONDS_MIN

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

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


class AsyncStateCache(OfOneProcess):
    """``StateCache`` with ``await``: see there for what each method does and raises.

    Made by ``connect`` or ``embedded`` inside a running event loop (asyncio, uvloop, anyio on asyncio), which it belongs to;
    in another loop, or in a forked child, make another one. Concurrent calls travel together by themselves; those of one
    instance are applied in the order in which they were called (bulk calls are not part of that order). A cancelled call's
    transition is applied once or not at all; no other call notices. ``close`` waits for what is under way.
    """

    def __init__(self, sync: StateCache, threads: aside.Threads | None = None) -> None:
        self.sync = sync
        """The sync client that does what is rare; it may be used too, from threads."""
        settings = sync.settings
        self.hot = AsyncHotStore(sync.hot, sync.redis_url, settings.socket_timeout_seconds, settings.batch_items_max)
        self.threads = threads or aside.Threads()
        self._loop = asyncio.get_running_loop()
        self._gathered = {
            kind: aside.Together(self.threads, sync.driver.answers) for kind in aside.GATHERED
        }  # a batch for each: one query, or one script, serves wishes of one kind only
        self._waits = aside.Waits(self.threads, sync.commits, partial(durability.explained, sync.durable))
        self._under_way = 0
        self._nothing_under_way: asyncio.Future[None] | None = None
        self._closer: asyncio.Task[None] | None = None
        self._unusable = ""
        _open_caches.add(self)

    @classmethod
    def connect(
        cls,
        redis_url: str | None = None,
        database_url: str | None = None,
        namespace: str | None = None,
        *,
        flusher: bool | None = None,
        metrics: metering.Metrics | CollectorRegistry | None = None,
        **settings: Any,
    ) -> Opening[Self]:
        """As ``StateCache.connect``."""

        def connect() -> StateCache:
            return StateCache.connect(redis_url, database_url, namespace, flusher=flusher, metrics=metrics, **settings)

        return cls._opening(connect)

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
        return cls._opening(lambda: StateCache.embedded(folder, flusher=flusher, metrics=metrics, **settings))

    @classmethod
    def _opening(cls, connect: Callable[[], StateCache]) -> Opening[Self]:
        async def open() -> Self:
            try:
                asyncio.get_running_loop()
            except RuntimeError:
                raise errors.ConfigurationError(
                    "AsyncStateCache needs a running asyncio event loop (asyncio.run, uvloop, anyio with its asyncio backend); "
                    "trio is not supported"
                ) from None
            threads = aside.Threads()
            sync = await threads.open(connect, StateCache.close)
            return cls(sync, threads)

        return Opening(open)

    async def close(self) -> None:
        """Wait for what is under way, flush (if this process flushes), close every connection, end every thread.

        Calls that begin afterwards raise ``ConfigurationError``. Safe to call twice; cancelled, it goes on by itself.
        """
        if self._unusable == _FORKED:
            self._refuse()
        if asyncio.get_running_loop() is not self._loop and not self._loop.is_closed():
            raise errors.ConfigurationError(_OTHER_LOOP)
        self._unusable = self._unusable or "this AsyncStateCache is closed"
        if self._closer is None:
            self._closer = asyncio.get_running_loop().create_task(self._close())
        await asyncio.shield(self._closer)

    async def _close(self) -> None:
        if asyncio.get_running_loop() is self._loop:
            if self._under_way:
                self._nothing_under_way = self._loop.create_future()
                await self._nothing_under_way
            await self.hot.close()
        self.sync.driver.closing.set()
        await self.threads.close(self.sync.close)
        _open_caches.discard(self)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    # --- what is under way -------------------------------------------------------------------------------------------

    def enter(self) -> None:
        """Begin a call: ``close`` waits for its ``leave``. Raises ``ConfigurationError`` where no call may begin."""
        if self._unusable:
            self._refuse()
        try:
            here = asyncio.get_running_loop() is self._loop
        except RuntimeError:
            here = False
        if not here:
            raise errors.ConfigurationError(_OTHER_LOOP)
        self._under_way += 1

    def leave(self) -> None:
        """End a call."""
        self._under_way -= 1
        if not self._under_way and self._nothing_under_way is not None and not self._nothing_under_way.done():
            self._nothing_under_way.set_result(None)

    def _refuse(self) -> None:
        raise errors.ConfigurationError(self._unusable)

    def _after_fork(self) -> None:
        self._unusable = _FORKED

    async def blocking(self, work: Callable[..., Result], *arguments: Any, **named: Any) -> Result:
        """A call that the sync client does, in a thread, when one is free."""
        self.enter()
        try:
            return await self.threads.run_whole(partial(work, *arguments, **named))
        finally:
            self.leave()

    async def in_time(
        self, work: Callable[..., Result], *arguments: Any, timeout: float | None, **named: Any
    ) -> Result:
        """The same for one that has a timeout of its own, which begins now. None: a list's, which may take its time."""
        if timeout is None:
            return await self.blocking(work, *arguments, **named, timeout=None)
        self.enter()
        try:
            deadline = self.sync.deadline(timeout)

            def what_is_left() -> Result:
                return work(*arguments, **named, timeout=max(0.0, deadline - time.monotonic()))

            return await self.threads.run_whole(what_is_left, deadline)
        finally:
            self.leave()

    async def briefly(self, work: Callable[..., Result], *arguments: Any, **named: Any) -> Result:
        """A call that the sync client does in an exchange or two, in a thread that waits for no list."""
        self.enter()
        try:
            return await self.threads.run(work, *arguments, **named)
        finally:
            self.leave()

    async def take(self, work: Callable[[], Result], give_back: Callable[[Result], None]) -> Result:
        """The same for what must not be left with nobody, if the caller is cancelled."""
        self.enter()
        try:
            return await self.threads.take(work, give_back)
        finally:
            self.leave()

    # --- where it works ----------------------------------------------------------------------------------------------

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
        return AsyncMachineHandle(self, await self.blocking(self.sync.machine, machine))

    async def wait_durable(
        self, receipt: model.Receipt | Sequence[model.Receipt], timeout: float | None = None
    ) -> None:
        """As ``StateCache.wait_durable``."""
        receipts = as_receipts(receipt)
        self.enter()
        try:
            await self._waits.confirm(receipts, self.sync.deadline(timeout))
        finally:
            self.leave()

    async def flush(self, timeout: float | None = 10.0) -> None:
        """As ``StateCache.flush``."""
        await self.in_time(self.sync.flush, timeout=timeout)

    async def stuck(self, *, older_than: timedelta | None = None, limit: int = 100) -> list[model.Snapshot]:
        """As ``StateCache.stuck``."""
        return await self.blocking(self.sync.stuck, older_than=older_than, limit=limit)

    async def serve_metrics(self, port: int = 9464, address: str | None = None) -> int:
        """As ``StateCache.serve_metrics``."""
        return await self.blocking(self.sync.serve_metrics, port, address)

    async def recover(self, *, dry_run: bool = False) -> recovery.Report:
        """As ``StateCache.recover``."""
        return await self.blocking(self.sync.recover, dry_run=dry_run)

    # --- the driver --------------------------------------------------------------------------------------------------

    async def read(self, flow: flows.Flow, deadline: float) -> Any:
        """Run a flow that reads."""
        self.enter()
        try:
            return await self._run(flow, deadline, None)
        finally:
            self.leave()

    async def write(self, request: flows.Request, level: model.Durability, deadline: float) -> model.Receipt:
        """Apply a transition in its turn, and wait for its durability."""
        self.enter()
        turn = self.hot.enter(request.address)  # before anything is awaited: this is the order of the callers
        try:
            # A guard looks at the instance before anything is sent: at what the calls before this one have left.
            if request.guard is not None and not await self.hot.come_first(turn, deadline):
                raise errors.UnavailableError(
                    f"{request.address}: not sent: earlier calls for it were not answered within this call's timeout"
                )
            if level in CONFIRMED:
                request.item.confirm = await self.threads.run(self.sync.confirmation, level, deadline)
            outcome: items.Outcome | None = None
            item = flows.opening(request)
            if item is not None:
                outcome = await self._applied(item, deadline, turn)
            if outcome is not None and outcome.code == "OK":
                receipt = flows.receipt(request, outcome)
            else:
                receipt = await self._run(flows.transition(request, outcome), deadline, turn)
        except BaseException:
            self.hot.leave(turn)
            self.leave()
            raise
        self.hot.leave(turn)
        try:
            if level is model.Durability.DURABLE:
                await self._waits.confirm([receipt], deadline)
            return receipt
        finally:
            self.leave()

    async def _run(self, flow: flows.Flow, deadline: float, turn: Turn | None) -> Any:
        try:
            wish = next(flow)
            while True:
                try:
                    if type(wish) is items.Item:
                        answer: Any = await self._applied(wish, deadline, turn)
                    else:
                        answer = await self._answer(wish, deadline)
                except errors.StateCacheError as error:
                    wish = flow.throw(error)
                else:
                    wish = flow.send(answer)
        except StopIteration as end:
            return end.value

    def _applied(self, item: items.Item, deadline: float, turn: Turn | None) -> asyncio.Future[items.Outcome]:
        shorten_confirmation(item, deadline)
        # The server's own wait for a confirmation ends at the deadline: its answer comes a little later.
        grace = 0.0 if item.confirm is None else confirmation.GRACE_SECONDS
        return self.hot.apply(item, max(deadline, time.monotonic() + EXCHANGE_SECONDS_MIN) + grace, turn)

    async def _answer(self, wish: Any, deadline: float) -> Any:
        kind = type(wish)
        if kind is flows.Hot:
            return await self._hash(wish, deadline)
        if kind is flows.Pause:
            if wish.why in UNREACHABLE:
                await self._revive()
            return await self._pause(wish.attempt, deadline)
        gathered = self._gathered.get(kind)
        if gathered is not None:
            return await gathered.answer(wish, deadline)
        return await self.threads.run(self.sync.driver.answer, wish, deadline)

    async def _hash(self, wish: flows.Hot, deadline: float) -> dict[bytes, bytes]:
        """Read a hash; while the server cannot be reached, again until the deadline."""
        attempt = 0
        while True:
            try:
                return await self.hot.hash((wish.partition, wish.machine, wish.id), deadline)
            except errors.UnavailableError:
                await self._revive()
                if not await self._pause(attempt, deadline):
                    raise
                attempt += 1

    async def _pause(self, attempt: int, deadline: float) -> bool:
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        await asyncio.sleep(min(left, pause_seconds(attempt) * random.uniform(0.5, 1.0)))
        return True

    async def _revive(self) -> None:
        if self.sync.server is not None:
            await self.threads.run(self.sync.driver.revive)


_OTHER_LOOP = "this AsyncStateCache belongs to another event loop: make one in each loop"
_FORKED = "this AsyncStateCache was made before the process was forked: make another one in the child"
_open_caches: weakref.WeakSet[AsyncStateCache] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for cache in list(_open_caches):
        cache._after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
