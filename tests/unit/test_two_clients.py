"""``AsyncStateCache`` is ``StateCache`` with ``await``: the same public methods, the same arguments."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from statecache import StateCache
from statecache.aio import AsyncMachineHandle, AsyncStateCache
from statecache.engine.handle import MachineHandle

WITHOUT_AWAIT = {"connect", "embedded", "claim"}
"""Awaited too, or entered with ``async with``."""
OF_CACHE = {"connect", "embedded", "machine", "wait_durable", "flush", "recover", "close"}
"""What else ``StateCache`` has serves the engine's parts and the command line."""


def public(of: type) -> set[str]:
    return {name for name, found in vars(of).items() if not name.startswith("_") and callable(found)}


def parameters(of: type, name: str) -> list[tuple[str, Any, Any]]:
    found = inspect.signature(getattr(of, name)).parameters.values()
    return [(one.name, one.kind, one.default) for one in found if one.name != "progress"]  # the command line's


@pytest.mark.parametrize(
    ("sync", "awaited", "names"),
    [(StateCache, AsyncStateCache, OF_CACHE), (MachineHandle, AsyncMachineHandle, public(MachineHandle))],
    ids=["cache", "handle"],
)
def test_the_same_methods_with_the_same_arguments(sync: type, awaited: type, names: set[str]) -> None:
    for name in names:
        assert hasattr(awaited, name), f"{awaited.__name__} has no {name}"
        assert parameters(sync, name) == parameters(awaited, name), name
        assert name in WITHOUT_AWAIT or inspect.iscoroutinefunction(getattr(awaited, name)), f"{name} is not awaited"
    assert {"redis_url", "database_url"} <= set(vars(AsyncStateCache))


def test_what_the_design_says_is_there() -> None:
    of_handle = {
        "start", "transition", "start_many", "transition_many", "get", "get_many", "state", "history", "at", "find", "counts",
    }  # fmt: skip
    assert of_handle <= public(MachineHandle)
