"""The table "Backup and restore" of docs/operations.md: each combination of restored stores, with real files.

Versions of the one order: 1 and 2 are in both copies; 3 and 4 were flushed after them, one by one; 5 was acknowledged and not
flushed.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest

from statecache import StateCache
from statecache.engine import verify as verification
from tests.support import servers, worlds


class Case(NamedTuple):
    """What is restored and what the page says of it. ``versions`` is the history afterwards."""

    redis: str
    sql: bool
    keep_seconds: float
    first: str
    kind: str
    versions: list[int]


CASES = {
    "redis older": Case("copy", False, 0, "sql", "tail lost", [1, 2, 3, 4]),
    "redis empty": Case("wipe", False, 0, "sql", "wiped", [1, 2, 3, 4]),
    "sql older, the log reaches": Case("", True, 3600, "sql", "intact", [1, 2, 3, 4, 5]),
    "sql older, the log does not reach": Case("", True, 0, "sql", "SQL behind", [1, 2, 3, 4, 5]),
    "both, sql copied first": Case("copy", True, 3600, "sql", "intact", [1, 2]),
    "both, redis copied first": Case("copy", True, 0, "redis", "tail lost", [1, 2]),
    "sql older, redis empty": Case("wipe", True, 0, "sql", "wiped", [1, 2]),
}


class Stores:
    """A store with its files."""

    def __init__(self, redis: servers.ValkeyServer, folder: Path, keep_seconds: float) -> None:
        self.redis, self.folder, self.keep_seconds = redis, folder, keep_seconds
        self.file = folder / "store.db"
        self.cache = self.open(auto_recover=True)

    def open(self, *, auto_recover: bool) -> StateCache:
        cache = StateCache.connect(
            self.redis.url, f"sqlite:///{self.file}", partition_count=1, auto_recover=auto_recover,
            log_keep_seconds=self.keep_seconds,
        )  # fmt: skip
        cache.machine(worlds.Order)
        return cache

    def copy_sql(self) -> None:
        with closing(sqlite3.connect(self.file)) as source, closing(sqlite3.connect(self.folder / "copy.db")) as target:
            source.backup(target)

    def copy_redis(self) -> None:
        shutil.copytree(self.redis.data, self.folder / "redis-copy")

    def restore(self, case: Case) -> None:
        self.cache.close()
        self.redis.stop()
        if case.redis:
            self.redis.wipe()
        if case.redis == "copy":
            shutil.copytree(self.folder / "redis-copy", self.redis.data)
        if case.sql:
            for path in self.folder.glob("store.db*"):
                path.unlink()
            shutil.copy(self.folder / "copy.db", self.file)
        self.redis.start()
        self.cache = self.open(auto_recover=False)


@pytest.fixture
def make(private_redis: servers.ValkeyServer, tmp_path: Path) -> Iterator[Callable[[float], Stores]]:
    made: list[Stores] = []

    def make(keep_seconds: float) -> Stores:
        made.append(Stores(private_redis, tmp_path, keep_seconds))
        return made[-1]

    yield make
    for one in made:
        one.cache.close()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_restored(make: Callable[[float], Stores], case: Case) -> None:
    stores = make(case.keep_seconds)
    orders = stores.cache.machine("order")
    orders.start("1")
    orders.transition("1", "pay")
    if case.first == "redis":
        stores.cache.flush()
        stores.copy_redis()
        orders.start("later")
    stores.cache.flush()
    stores.copy_sql()
    if case.first == "sql":
        stores.copy_redis()
    for _ in range(2):
        orders.transition("1", "note")
        stores.cache.flush()
    orders.transition("1", "ship")
    stores.restore(case)

    assert stores.cache.recover(dry_run=True).kinds == {case.kind: 1}
    assert stores.cache.recover().kinds == {case.kind: 1}
    stores.cache.flush_alone(30)
    orders = stores.cache.machine("order")
    assert orders.get("1").version == case.versions[-1]
    covered = [
        version
        for row in orders.history("1")
        for version in range(row.covers_from or row.version, row.version + 1)
    ]  # fmt: skip
    assert covered == case.versions
    assert not verification.verify(stores.cache).findings
    assert orders.transition("1", "note").version == case.versions[-1] + 1
