"""The two databases of a chaos run, with the same faults: copy, restore to the copy, and be away."""

from __future__ import annotations

import shutil
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

from tests.chaos import ledger
from tests.support import proxy, servers

Restored = tuple[float, float]
"""When the making of the copy began, and when SQL was back at it (ms)."""

RECOVERIES = "SELECT epoch, owner, started_ms, COALESCE(finished_ms, heartbeat_ms), report FROM statecache_recoveries"
"""A recovery that died after it had rewritten a partition leaves the report of that, unfinished."""


class Database(Protocol):
    """What the nemesis needs of a database. ``client_url`` leads through the proxy, if there is one."""

    url: str
    client_url: str
    link: proxy.Proxy | None

    def query(self, statement: str) -> list[tuple[Any, ...]]: ...
    def copy(self) -> None: ...
    def forget_copy(self) -> None: ...
    def restore(self, before: Callable[[list[tuple[Any, ...]]], None]) -> Restored | None: ...
    def away(self) -> None: ...
    def back(self) -> None: ...
    def kill(self) -> None: ...
    def save(self, folder: Path) -> None: ...
    def close(self) -> None: ...


class Sqlite:
    """One file. It cannot be killed or cut; ``away`` holds its write lock."""

    link: proxy.Proxy | None = None

    def __init__(self, folder: Path) -> None:
        self.path = folder / "statecache.db"
        self.url = self.client_url = f"sqlite:///{self.path}"
        self._copy = folder / "copy.db"
        self._copied_ms = 0.0
        self._lock: sqlite3.Connection | None = None

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=60, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA synchronous=OFF")
        return connection

    def query(self, statement: str) -> list[tuple[Any, ...]]:
        with closing(self._connect()) as connection:
            return connection.execute(statement).fetchall()

    def copy(self) -> None:
        """By the backup API, which sees one moment of it."""
        began = ledger.now_ms()
        self._copy.unlink(missing_ok=True)
        with closing(self._connect()) as source, closing(sqlite3.connect(self._copy)) as target:
            source.backup(target)
        self._copied_ms = began

    def forget_copy(self) -> None:
        self._copied_ms = 0.0

    def restore(self, before: Callable[[list[tuple[Any, ...]]], None]) -> Restored | None:
        """Every row as it was, in one transaction: clients that have the file open see SQL go back at one moment."""
        if not self._copied_ms:
            return None
        with closing(self._connect()) as connection:
            connection.execute("ATTACH ? AS copy", (str(self._copy),))
            connection.execute("BEGIN IMMEDIATE")
            before(connection.execute(RECOVERIES).fetchall())
            for (name,) in connection.execute("SELECT name FROM copy.sqlite_master WHERE type = 'table'").fetchall():
                connection.execute(f"DELETE FROM main.{name}")
                connection.execute(f"INSERT INTO main.{name} SELECT * FROM copy.{name}")
            connection.execute("COMMIT")
        return self._copied_ms, ledger.now_ms()

    def away(self) -> None:
        self._lock = self._connect()
        self._lock.execute("BEGIN IMMEDIATE")

    def back(self) -> None:
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.execute("ROLLBACK")
            lock.close()

    def kill(self) -> None:
        raise AssertionError("a file has no process")

    def save(self, folder: Path) -> None:
        with closing(self._connect()) as source, closing(sqlite3.connect(folder / "sql.db")) as target:
            source.backup(target)

    def close(self) -> None:
        self.back()


class Postgres:
    """A PostgreSQL process behind a proxy. Copies are databases made from the live one as a template."""

    def __init__(self, folder: Path) -> None:
        self.server = servers.PostgresServer().start()
        self._name = self.server.create_database()
        self.link: proxy.Proxy | None = proxy.Proxy(self.server.port)
        self.url = self.server.url(self._name)
        self.client_url = self.link.url(self.url)
        self._copied_ms = 0.0
        self._folder = folder

    def query(self, statement: str) -> list[tuple[Any, ...]]:
        with self.server.connect(self._name) as connection:
            return connection.execute(statement).fetchall()

    def copy(self) -> None:
        began = ledger.now_ms()
        with self._alone() as connection:
            connection.execute("DROP DATABASE IF EXISTS copy WITH (FORCE)")
            connection.execute(f'CREATE DATABASE copy TEMPLATE "{self._name}" STRATEGY FILE_COPY')
        self._copied_ms = began

    def forget_copy(self) -> None:
        self._copied_ms = 0.0

    def restore(self, before: Callable[[list[tuple[Any, ...]]], None]) -> Restored | None:
        if not self._copied_ms:
            return None
        with self._alone() as connection:
            before(self.query(RECOVERIES))
            connection.execute(f'DROP DATABASE "{self._name}" WITH (FORCE)')
            connection.execute(f'CREATE DATABASE "{self._name}" TEMPLATE copy STRATEGY FILE_COPY')
        return self._copied_ms, ledger.now_ms()

    def _alone(self) -> _Alone:
        return _Alone(self)

    def away(self) -> None:
        self.server.pause()

    def back(self) -> None:
        if not self.server.alive:
            self.server.start()
        self.server.resume()

    def kill(self) -> None:
        self.server.kill()

    def save(self, folder: Path) -> None:
        for table in (
            "store",
            "partitions",
            "checkpoints",
            "transitions",
            "state_counts",
            "dead_letters",
            "recoveries",
        ):
            rows = self.query(f"SELECT * FROM statecache_{table}")
            (folder / f"{table}.txt").write_text("\n".join(map(repr, rows)), encoding="utf-8")
        shutil.copy(self.server.log, folder / "postgres.log")

    def close(self) -> None:
        assert self.link is not None
        self.link.close()
        self.server.stop()


class _Alone:
    """While it is entered, nobody but the operator is connected to the database."""

    def __init__(self, database: Postgres) -> None:
        self._database = database

    def __enter__(self) -> Any:
        database = self._database
        assert database.link is not None
        database.link.refuse()
        self._connection = database.server.connect()
        deadline = time.monotonic() + 20.0
        left = True
        while left:
            assert time.monotonic() < deadline, "sessions do not end"
            left = bool(
                self._connection.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (database._name,)
                ).fetchall()
            )
        return self._connection

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        assert self._database.link is not None
        self._database.link.pass_through()
