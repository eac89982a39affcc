"""``Claim`` with ``await``: granting, renewing and releasing are rare and run in a thread, transitions on the event loop."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Self

from statecache.core import model
from statecache.engine.claims import Claim, ending
from statecache.engine.processes import OfOneProcess

if TYPE_CHECKING:
    from statecache.engine.aio_handle import AsyncMachineHandle


class AsyncClaim(OfOneProcess):
    """As ``statecache.engine.claims.Claim``; an async context manager, which ends it. ``sync`` has its attributes."""

    def __init__(self, handle: AsyncMachineHandle, sync: Claim, briefly: Callable[..., Awaitable[Any]]) -> None:
        self._handle = handle
        self._briefly = briefly
        self.sync = sync
        self.machine, self.id, self.worker, self.token = sync.machine, sync.id, sync.worker, sync.token

    def __repr__(self) -> str:
        return f"<Async{repr(self.sync)[1:]}"

    @property
    def order(self) -> tuple[int, int]:
        """The token as two numbers."""
        return self.sync.order

    @property
    def expires_ms(self) -> int:
        """When it ends if it is not renewed, by the clock of Redis."""
        return self.sync.expires_ms

    @property
    def expires_at(self) -> datetime:
        return self.sync.expires_at

    async def get(self, *, timeout: float | None = None) -> model.Snapshot:
        """The instance as it is now."""
        return await self._handle.get(self.id, timeout=timeout)

    async def transition(
        self,
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
        """As ``Claim.transition``."""
        move = model.Move(
            self.id,
            event,
            data,
            unset,
            increment,
            actor,
            reason,
            expect_version,
            transition_id,
            occurred_at,
            self.token,
        )
        return await self._handle.fire(move, durability, timeout)

    async def renew(self, ttl: float | timedelta | None = None, *, timeout: float | None = None) -> None:
        """As ``Claim.renew``."""
        await self._briefly(self.sync.renew, ttl, timeout=timeout)

    async def release(self, *, timeout: float | None = None) -> bool:
        """As ``Claim.release``."""
        released: bool = await self._briefly(self.sync.release, timeout=timeout)
        return released

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        # A task that is cancelled here gives up waiting, not the release, which its thread goes on with.
        with ending(self.sync):
            await self._briefly(self.sync.release)


class Claiming:
    """What ``AsyncMachineHandle.claim`` returns: ``await`` it, or enter it with ``async with``."""

    def __init__(self, take: Callable[[], Awaitable[AsyncClaim]]) -> None:
        self._take = take
        self._claim: AsyncClaim | None = None

    def __await__(self) -> Generator[Any, None, AsyncClaim]:
        return self._take().__await__()

    async def __aenter__(self) -> AsyncClaim:
        self._claim = await self._take()
        return self._claim

    async def __aexit__(self, *exception: object) -> None:
        assert self._claim is not None
        await self._claim.__aexit__(*exception)
