"""The async client in the clothes of the sync one, so that one suite of tests runs on both.

``BlockingCache`` has an event loop in a thread of its own and passes every call to an ``AsyncStateCache`` there. What is not
public (``cache.hot``, ``cache.durable`` ...) is that of the sync client inside, which tests look into and do harm to.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent import futures
from typing import Any, Self, TypeVar

from statecache.aio import AsyncMachineHandle, AsyncStateCache

Result = TypeVar("Result")

METHODS = ("flush", "recover", "wait_durable")
"""The public methods of a cache that are coroutines, beside ``machine`` and ``close``."""


class LoopThread:
    """An event loop that runs in a thread until it is closed; asyncio's debug mode is the caller's to turn on."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="test-loop", daemon=True)
        self._thread.start()

    def begin(self, work: Coroutine[Any, Any, Result]) -> futures.Future[Result]:
        """Start a coroutine in the loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def call(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run a coroutine in the loop, wait for it here; an interruption of the waiting thread cancels it."""
        future = self.begin(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        async def rest() -> None:
            left = asyncio.all_tasks() - {asyncio.current_task()}
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)
            await asyncio.get_running_loop().shutdown_default_executor()

        self.call(rest())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


class BlockingCache:
    """An ``AsyncStateCache`` that blocks."""

    def __init__(self, open: Callable[[], Awaitable[AsyncStateCache]]) -> None:
        self._runner = LoopThread()
        self._closed = False

        async def opened() -> AsyncStateCache:
            return await open()

        try:
            self.inner = self._runner.call(opened())
        except BaseException:
            self._runner.close()
            raise

    @classmethod
    def connect(cls, *arguments: Any, **named: Any) -> Self:
        async def open() -> AsyncStateCache:
            return await AsyncStateCache.connect(*arguments, **named)

        return cls(open)

    @classmethod
    def embedded(cls, *arguments: Any, **named: Any) -> Self:
        async def open() -> AsyncStateCache:
            return await AsyncStateCache.embedded(*arguments, **named)

        return cls(open)

    def machine(self, machine: Any) -> BlockingHandle:
        return BlockingHandle(self, self.call(self.inner.machine(machine)))

    def close(self) -> None:
        if self._closed:
            return
        self.call(self.inner.close())
        self._closed = True
        self._runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def call(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run a coroutine in the client's loop."""
        return self._runner.call(work)

    def begin(self, work: Coroutine[Any, Any, Result]) -> futures.Future[Result]:
        """Start a coroutine in the client's loop, and do not wait for it."""
        return self._runner.begin(work)

    def __getattr__(self, name: str) -> Any:
        if name in METHODS:
            method = getattr(self.inner, name)
            return lambda *arguments, **named: self.call(method(*arguments, **named))
        return getattr(self.inner.sync, name)


class BlockingHandle:
    """An ``AsyncMachineHandle`` that blocks."""

    def __init__(self, cache: BlockingCache, inner: AsyncMachineHandle) -> None:
        self.cache = cache
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.inner, name)
        if inspect.iscoroutinefunction(found):
            return lambda *arguments, **named: self.cache.call(found(*arguments, **named))
        return found
