"""The async client: ``from statecache.aio import AsyncStateCache``."""

from statecache.engine.aio import AsyncStateCache
from statecache.engine.aio_handle import AsyncMachineHandle

__all__ = ["AsyncMachineHandle", "AsyncStateCache"]
