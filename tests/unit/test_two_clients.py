"""``AsyncStateCache`` is ``StateCache`` with ``await``: the same public methods, the same arguments."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from statecache import StateCache
from statecache.aio import AsyncMachineHandle, AsyncStateCache
from statecache.engine.handle import MachineHandle

WITHOUT_AWAIT = {"connect", "embedded"}
"""Awaited too, or entered with ``async with``: they return an ``Opening``."""
ONLY_SYNC = {
    "open",
    "start_flusher",
    "deadline",
    "level",
    "confirmation",
    "confirm",
    "confirm_many",
    "finals",
    "make_flusher",
}
"""Not of the public surface (DESIGN section 6): what the engine's parts and the command line call."""
PAIRS = [(StateCache, AsyncStateCache), (MachineHandle, AsyncMachineHandle)]


def public(of: type) -> dict[str, Any]:
    return {name: found for name, found in vars(of).items() if not name.startswith("_") and name not in ONLY_SYNC}


def parameters(of: type, name: str) -> list[tuple[str, Any, Any]]:
    found = inspect.signature(getattr(of, name)).parameters.values()
    return [(one.name, one.kind, one.default) for one in found if one.name != "progress"]  # the command line's


@pytest.mark.parametrize(("sync", "awaited"), PAIRS, ids=["cache", "handle"])
def test_the_same_methods_with_the_same_arguments(sync: type, awaited: type) -> None:
    methods = {name for name, found in public(sync).items() if callable(found) or isinstance(found, classmethod)}
    for name in methods:
        assert hasattr(awaited, name), f"{awaited.__name__} has no {name}"
        assert parameters(sync, name) == parameters(awaited, name), name
        assert name in WITHOUT_AWAIT or inspect.iscoroutinefunction(getattr(awaited, name)), f"{name} is not awaited"
    assert {"redis_url", "database_url"} <= set(public(AsyncStateCache))


def test_what_a_design_says_is_there() -> None:
    of_cache = {"connect", "embedded", "machine", "wait_durable", "flush", "recover", "close"}
    of_handle = {
        "start", "transition", "start_many", "transition_many", "get", "get_many", "state", "history", "at", "find", "counts",
    }  # fmt: skip
    for caches, handles in ((StateCache, MachineHandle), (AsyncStateCache, AsyncMachineHandle)):
        assert of_cache <= set(public(caches))
        assert of_handle <= set(public(handles))
