"""The async client: ``from statecache.aio import AsyncStateCache``."""

from statecache.engine.aio import AsyncMachineHandle, AsyncStateCache

__all__ = ["AsyncMachineHandle", "AsyncStateCache"]
