"""The database's clock: one for all hosts, whatever theirs say."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles

from statecache.durable.store import DurableStore


class Now(sa.ColumnElement[int]):
    """The database's clock, in milliseconds since 1970. SQLite's is that of the one host that its file is on."""

    inherit_cache = True
    type = sa.BigInteger()


@compiles(Now)
def _now(element: Now, compiler: Any, **_: object) -> str:
    return "CAST(EXTRACT(EPOCH FROM CURRENT_TIMESTAMP) * 1000 AS BIGINT)"


@compiles(Now, "postgresql")
def _now_postgresql(element: Now, compiler: Any, **_: object) -> str:
    return "CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT)"


@compiles(Now, "sqlite")
def _now_sqlite(element: Now, compiler: Any, **_: object) -> str:
    return "CAST((julianday('now') - 2440587.5) * 86400000.0 AS INTEGER)"


@compiles(Now, "mysql", "mariadb")
def _now_mysql(element: Now, compiler: Any, **_: object) -> str:
    return "CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED)"


def now_ms(store: DurableStore) -> int:
    """Ask the database what time it is."""
    asked = sa.select(Now())
    return store.database.read(lambda connection: int(connection.execute(asked).scalar_one()))
