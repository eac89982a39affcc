"""Opening a store without saying where, or saying it wrongly; and taking what was opened to another process."""

from __future__ import annotations

import asyncio
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from statecache import StateCache
from statecache.aio import AsyncStateCache
from statecache.core import errors
from tests.support import worlds
from tests.support.waiting import wait_until


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of its own, and no setting from outside."""
    for name in list(os.environ):
        if name.startswith("STATECACHE_") and not name.startswith("STATECACHE_TEST"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def test_connect_without_a_url_flushes() -> None:
    """Nobody else may: nothing ever came to SQL, and no timeout fired, without a word."""
    with StateCache.connect() as cache:
        orders = cache.machine(worlds.Order)
        orders.start("1")
        wait_until(lambda: orders.counts() == {"placed": 1}, "SQL to have it")


def test_async_connect_without_a_url_flushes() -> None:
    async def main() -> None:
        async with AsyncStateCache.connect() as cache:
            orders = await cache.machine(worlds.Order)
            await orders.start("1")
            for _ in range(500):
                if await orders.counts():
                    return
                await asyncio.sleep(0.02)
            raise AssertionError("nothing came to SQL")

    asyncio.run(main())


def test_connect_flushes_only_where_it_is_alone_or_told_to(redis_url: str, sqlite_url: str, namespace: str) -> None:
    """Where servers are named, flusher processes are; and who says no is believed."""
    with StateCache.connect(redis_url, sqlite_url, namespace) as cache:
        assert cache._thread is None
    with StateCache.connect(flusher=False) as cache:
        assert cache._thread is None
    with StateCache.connect(redis_url, sqlite_url, namespace, flusher=True) as cache:
        assert cache._thread is not None


@pytest.mark.parametrize("folder", [None, b"folder", 7, "", "a\0b", "~nobody-of-this-name/x"])
def test_folder_that_is_none(folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(errors.ConfigurationError, match="folder"):
        StateCache.embedded(folder)


def test_folder_that_is_given_twice(tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigurationError, match="data_dir is refused"):
        StateCache.embedded(tmp_path, data_dir=tmp_path)


def test_nothing_that_was_opened_is_pickled(tmp_path: Path) -> None:
    """It was "Can't pickle <function StateCache.<lambda>>"."""

    async def main() -> list[Any]:
        async with AsyncStateCache.embedded(tmp_path / "async") as cache:
            orders = await cache.machine(worlds.Order)
            await orders.start("1")
            held = await orders.claim("1", renew=False)
            return [refused(one) for one in (cache, orders, held)]

    def refused(one: Any) -> str:
        with pytest.raises(TypeError, match="one in each process") as raised:
            pickle.dumps(one)
        return str(raised.value).split()[1]

    with StateCache.embedded(tmp_path / "sync") as cache:
        orders = cache.machine(worlds.Order)
        orders.start("1")
        names = [refused(one) for one in (cache, orders, orders.claim("1", renew=False))]
    assert names == ["StateCache", "MachineHandle", "Claim"]
    assert asyncio.run(main()) == ["AsyncStateCache", "AsyncMachineHandle", "AsyncClaim"]
