"""What blocks, done in worker threads for the async client: SQL look-ups, admission, recovery, waiting until rows are there.

The threads are the client's own, so that an event loop's other work in threads cannot keep a cold instance waiting, and none is
left when the client is closed. Whole calls (a list that waits for room, a history) have threads of their own too: else eight of
them would keep all look-ups and waits waiting. Wishes of one kind that arrive while one of that kind is under way are answered
together by the next: a thousand cold instances cost a few queries, a thousand waiters share the flushes.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any, TypeVar

from statecache.core import errors, flows, model
from statecache.engine import commits, durability

Result = TypeVar("Result")
Done = Callable[[Sequence[Any], float], Sequence[Any]]
"""Answers wishes of one kind, in order, until a deadline; an error is an answer too."""
Explained = Callable[[model.Receipt, errors.StateCacheError], errors.StateCacheError]
"""``durability.explained`` of a store."""

GATHERED = (flows.Where, flows.Lookup, flows.Hydrate, flows.Admit, flows.Find)
THREADS = 8
_TOGETHER_MAX = 500
_GRACE_SECONDS = 1.0


class Threads:
    """The worker threads of one client."""

    def __init__(self) -> None:
        self._whole = futures.ThreadPoolExecutor(THREADS, thread_name_prefix="statecache-aio-call")
        self._shared = futures.ThreadPoolExecutor(THREADS, thread_name_prefix="statecache-aio")

    async def run(self, work: Callable[..., Result], *arguments: Any, **named: Any) -> Result:
        """Run what tasks share, or want in the midst of a call, in a thread. Cancelled, it goes on to its end, unheard."""
        return await _in(self._shared, functools.partial(work, *arguments, **named))

    async def take(self, work: Callable[[], Result], give_back: Callable[[Result], None]) -> Result:
        """Run what takes something; if the caller is cancelled meanwhile, it is given back, in a thread too."""
        taking = self._shared.submit(contextvars.copy_context().run, work)
        try:
            return await asyncio.wrap_future(taking)
        except asyncio.CancelledError:

            def untake(done: futures.Future[Result]) -> None:
                if not done.cancelled() and done.exception() is None:
                    give_back(done.result())

            if taking.done():
                with contextlib.suppress(RuntimeError):  # the client is closed
                    self._shared.submit(untake, taking)
            else:
                taking.add_done_callback(untake)
            raise

    async def run_whole(self, work: Callable[[], Result], latest: float | None = None) -> Result:
        """Run a whole call of the sync client in a thread. Cancelled, it goes on there to its end, unheard.

        ``latest`` (``time.monotonic``): when it must have begun, or a moment later, if not at any time. Raises
        ``UnavailableError`` if it has not, because so many others run; what has begun keeps its time itself.
        """
        queued = self._whole.submit(contextvars.copy_context().run, work)
        begun = asyncio.wrap_future(queued)
        if latest is not None:
            try:
                await asyncio.wait({begun}, timeout=max(0.0, latest - time.monotonic()) + _GRACE_SECONDS)
            except asyncio.CancelledError:
                begun.cancel()
                raise
            if not begun.done() and queued.cancel():
                raise errors.UnavailableError(
                    f"not sent: {THREADS} other calls that take their time (lists, histories, look-ups) were under way for all "
                    "of this call's timeout"
                )
        return await begun

    async def open(self, work: Callable[[], Result], close: Callable[[Result], None]) -> Result:
        """Run a function that opens something; if the caller is cancelled meanwhile, what it opens is closed again."""
        opening = self._whole.submit(work)
        try:
            return await asyncio.wrap_future(opening)
        except BaseException:
            opening.add_done_callback(
                lambda done: None if done.cancelled() or done.exception() else close(done.result())
            )
            self._whole.shutdown(wait=False)
            raise

    async def close(self, last: Callable[[], None]) -> None:
        """Wait for what still runs in the threads, do a last thing, and end them."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()

        def tell(error: BaseException | None) -> None:
            if not ended.done():
                ended.set_exception(error) if error is not None else ended.set_result(None)

        def work() -> None:
            error: BaseException | None = None
            try:
                self._whole.shutdown(wait=True)
                self._shared.shutdown(wait=True)
                last()
            except BaseException as raised:
                error = raised
            loop.call_soon_threadsafe(tell, error)

        thread = threading.Thread(target=work, name="statecache-aio-close")
        thread.start()
        await ended
        thread.join()


async def _in(executor: futures.Executor, work: Callable[[], Result]) -> Result:
    context = contextvars.copy_context()
    return await asyncio.wrap_future(executor.submit(context.run, work))


class Together:
    """Wishes of one kind: one thread at work for them, the next batch gathers meanwhile."""

    def __init__(self, threads: Threads, done: Done) -> None:
        self._threads = threads
        self._done = done
        self._waiting: deque[tuple[Any, float, asyncio.Future[Any]]] = deque()
        self._worker: asyncio.Task[None] | None = None

    async def answer(self, wish: Any, deadline: float) -> Any:
        """Answer a wish; raises its error. ``UnavailableError`` when the threads take much longer than the deadline."""
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((wish, deadline, answer))
        if self._worker is None:
            self._worker = asyncio.get_running_loop().create_task(self._work())
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic()) + _GRACE_SECONDS):
                found = await answer
        except TimeoutError as error:
            raise errors.UnavailableError(
                "SQL, or the admission to Redis, did not answer within the call's timeout"
            ) from error
        if isinstance(found, Exception):
            raise found
        return found

    async def _work(self) -> None:
        try:
            while self._waiting:
                batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), _TOGETHER_MAX))]
                batch = [one for one in batch if not one[2].done()]
                if not batch:
                    continue
                deadline = max(deadline for _, deadline, _ in batch)
                try:
                    answers = await self._threads.run(self._done, [wish for wish, _, _ in batch], deadline)
                except Exception as error:  # not ours either: whoever waits here would wait until his deadline
                    answers = [error] * len(batch)
                for (_, _, answer), found in zip(batch, answers, strict=True):
                    if not answer.done():
                        answer.set_result(found)
        finally:
            self._worker = None


class Waits:
    """Waiting until receipts are in SQL, in the rounds of the sync client (``commits.py``); one thread for all tasks."""

    def __init__(self, threads: Threads, group: commits.GroupCommit, explained: Explained) -> None:
        self._threads = threads
        self._group = group
        self._explained = explained
        self._servers: set[asyncio.Task[None]] = set()

    async def confirm(self, receipts: Sequence[model.Receipt], deadline: float) -> None:
        """Return when the receipts are in SQL. Raises the first one's error."""
        if not receipts:
            return
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits there any more
                loop.call_soon_threadsafe(ended.set)

        guest, alone = self._group.enter(receipts, deadline, tell)
        if alone:
            server = loop.create_task(self._serve())
            self._servers.add(server)
            server.add_done_callback(self._servers.discard)
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic()) + _GRACE_SECONDS):
                await ended.wait()
        except TimeoutError:
            pass  # the threads are busy, or hang in SQL: it is unknown
        finally:
            self._group.withdraw(guest)
        for receipt, error in zip(receipts, guest.answers(), strict=True):
            if isinstance(error, durability.LostError):
                error = await self._threads.run(self._explained, receipt, error)
            if error is not None:
                raise error

    async def _serve(self) -> None:
        try:
            await self._threads.run(self._group.serve)
        except RuntimeError as error:  # no thread can be started
            self._group.abandon_guests(error)
