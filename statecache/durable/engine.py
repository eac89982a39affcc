"""Connections: how each database must be spoken to so that a commit is durable and nothing waits for ever.

One ``Database`` has three faces of one pool. ``reader`` runs single statements outside a transaction: each is its own
snapshot and costs one round trip. ``writer`` opens a transaction that takes its locks at once. ``engine`` is the plain
one, for migrations, streams and pages.

- SQLite: pysqlite's own transaction control is off (it would leave a SELECT outside the transaction); a write transaction
  begins with BEGIN IMMEDIATE, because a deferred one that turns into a writer fails without waiting. WAL with
  ``synchronous=FULL``: a commit survives power loss, and costs the bulk flush nothing that could be measured.
- PostgreSQL: READ COMMITTED; the compare-and-set on the partition's row is what keeps writers apart. Limits on locks,
  idling and the whole transaction are set inside each write transaction (``SET LOCAL``), so that they hold behind a
  transaction pooler too and a stopped process cannot hold a partition for ever.

There is no ping before use (it would double the cost of a look-up). A pooled connection that died meanwhile is found by
its first statement, which is run once more on a fresh one.

What PostgreSQL does not answer in time is cut off (``patience.py``): a read at the deadline of its call, a transaction soon
after the limit that the server was told. A machine that is gone is noticed by TCP within half a minute.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import sqlite3
import time
import urllib.parse
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import URL, make_url

from statecache.core import errors
from statecache.durable import faults, forking, patience, schema

T = TypeVar("T")

_log = logging.getLogger(__name__)

CONNECT_TIMEOUT_SECONDS = 10
POOL_TIMEOUT_SECONDS = 10.0
BUSY_TIMEOUT_SECONDS = 15.0
_SQLITE_BEGIN = "statecache_sqlite_begin"
_SQLITE_WRITE = "BEGIN IMMEDIATE"
_FILES = "statecache_files"
_HAS_OUR_TABLES = f"SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = '{schema.store.name}'"
BEGIN = (
    "name another one (--database-url), or begin one with 'statecache flusher', 'machine register' or 'import', or from Python "
    "with StateCache.connect"
)
"""What to do where there is no store."""
_CACHE, _CACHE_OF_WRITERS = -8192, -65536
"""KiB of pages that a connection may keep."""
# The role's own statement_timeout may be less than a batch takes: then it would end each time anew.
_POSTGRESQL_LIMITS = (
    "SET LOCAL lock_timeout = '{lock}s'; SET LOCAL idle_in_transaction_session_timeout = '15s'; "
    "SET LOCAL statement_timeout = '{whole}s'"
)
_POSTGRESQL_NO_LIMIT = "SET LOCAL statement_timeout = 0"
_POSTGRESQL_ALONG_INDEXES = "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY; SET LOCAL enable_sort = off"
_POSTGRESQL_17_LIMIT = "; SET LOCAL transaction_timeout = '{whole}s'"
# No limit is looked at while a COPY waits for its client (tried on 18). The delimiter tells ours from a restore's.
_POSTGRESQL_END_FROZEN = (
    "SELECT count(*) FILTER (WHERE pg_terminate_backend(pid)) FROM pg_stat_activity "
    "WHERE datname = current_database() AND pg_has_role(usesysid, 'USAGE') AND state = 'active' AND wait_event = 'ClientRead' "
    "AND starts_with(query, 'COPY statecache_') AND strpos(query, 'DELIMITER E''\\x1f''') > 0 "
    "AND query_start < clock_timestamp() - interval '{}s'"
)
FROZEN_SECONDS = 15
TRANSACTION_SECONDS_MAX = 120
_BEYOND_LIMIT_SECONDS = 5.0
"""So long after the server's limit a transaction is cut off here: time for the server to tell that it has ended it."""
_LIBPQ_DEFAULTS = {
    "connect_timeout": CONNECT_TIMEOUT_SECONDS, "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3,
    "tcp_user_timeout": 25_000,
}  # fmt: skip
"""Unless the URL says otherwise. The system's own would notice that a machine is gone after 15 minutes, or two hours."""
_TOO_LATE = "SQL did not answer in time: the connection was given up"

_KEPT_MAX = 4
"""Of the pool's connections, those that stay with who reads."""

# What the parent process was connected by, kept alive in a child: closing a SQLite or TLS connection here would disturb the
# parent's.
_abandoned: list[object] = []


class _DeadConnectionError(Exception):
    """The connection at hand had died."""


class Database:
    """The connections to one database. Thread-safe; a child process after a fork gets connections of its own."""

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine
        self.dialect = engine.dialect
        self._errors = (sa.exc.SQLAlchemyError, engine.dialect.loaded_dbapi.Error)
        if engine.dialect.name == "sqlite":
            self.reader: sa.Engine = engine
            self.writer: sa.Engine = engine.execution_options(**{_SQLITE_BEGIN: _SQLITE_WRITE})
            self._snapshots: sa.Engine = engine.execution_options(**{_SQLITE_BEGIN: "BEGIN"})
        else:
            self.reader = engine.execution_options(isolation_level="AUTOCOMMIT")
            self.writer = self._snapshots = engine
        self._kept: list[sa.Connection] = []
        self._closed = False
        self.patience = patience.Patience()
        _forget_after_fork(self)

    @property
    def name(self) -> str:
        """Where it is, without the password."""
        return self.engine.url.render_as_string(hide_password=True)

    def translated(self) -> contextlib.AbstractContextManager[None]:
        return faults.translated(self.dialect)

    def read(self, work: Callable[[sa.Connection], T]) -> T:
        """Run ``work``, which reads only, on a connection where each statement is a snapshot of its own."""
        return self.alone(work)

    def pages(self, work: Callable[[sa.Connection], T]) -> T:
        """Run ``work``, which reads pages along an index, in one snapshot.

        Statistics lag behind: a state that was rare when they were gathered and holds a million instances now looks like one
        row, which PostgreSQL would then sort, all of them for each page. So it may not: the index has the order.
        """

        def unsorted(connection: sa.Connection) -> T:
            if self.dialect.name == "postgresql":
                connection.exec_driver_sql(_POSTGRESQL_ALONG_INDEXES)
            return work(connection)

        return self._once_more(self._snapshots.connect, self._give_back, unsorted)

    def alone(self, work: Callable[[sa.Connection], T]) -> T:
        """Run ``work``, each statement of which commits by itself. It may be run twice, so repeating it must do no harm.

        A few connections are kept aside for this: to take one of the pool, to turn it to autocommit and back, and to give it
        back takes a third of the look-up of a cold instance. One whose work failed is not kept.
        """
        return self._once_more(self._lent, self._keep, work)

    def _lent(self) -> sa.Connection:
        try:
            return self._kept.pop()
        except IndexError:
            return self.reader.connect()

    def _keep(self, connection: sa.Connection) -> None:
        if len(self._kept) < _KEPT_MAX and not connection.invalidated:
            self._kept.append(connection)
        else:
            self._give_back(connection)

    def _close_kept(self) -> None:
        kept, self._kept = self._kept, []
        for connection in kept:
            self._give_back(connection)

    def _once_more(
        self,
        connect: Callable[[], sa.Connection],
        end: Callable[[sa.Connection], None],
        work: Callable[[sa.Connection], T],
    ) -> T:
        """Run ``work``, on a fresh connection if the one at hand has died. One that served well goes to ``end``."""
        with self.translated():
            try:
                return self._once(connect, end, work)
            except _DeadConnectionError:
                self._begin_anew()  # the others have died with it: each would cost somebody his second attempt
            return self._once(connect, end, work, is_last=True)

    def _once(
        self,
        connect: Callable[[], sa.Connection],
        end: Callable[[sa.Connection], None],
        work: Callable[[sa.Connection], T],
        *,
        is_last: bool = False,
    ) -> T:
        self._check_open()
        connection = self._out_of_pool(connect)
        watch = None
        try:
            self._check_file(connection)
            watch = self.patience.begin(connection, self.patience.left(TRANSACTION_SECONDS_MAX))
            result = work(connection)
        except BaseException as error:
            is_late = self.patience.end(watch)
            is_gone = connection.invalidated and isinstance(error, Exception)
            self._give_back(connection, error)
            if is_late and isinstance(error, self._errors):
                raise errors.UnavailableError(_TOO_LATE) from error
            if is_gone and not is_last:
                raise _DeadConnectionError from error
            raise
        if self.patience.end(watch):  # it answered in the last moment
            connection.invalidate()
        end(connection)
        return result

    @contextlib.contextmanager
    def transaction(self, *, limit_seconds: int | None = TRANSACTION_SECONDS_MAX) -> Iterator[sa.Connection]:
        """A write transaction that commits at the end. A commit that may or may not have happened: ``CommitUnknown``.

        PostgreSQL ends one that stands idle for 15 seconds, and from version 17 on any after ``limit_seconds``, also one whose
        process was stopped in the middle of a statement. In the midst of a COPY it does not: whoever has waited for a lock in
        vain (``Transient``) does. None lets it take any time (a migration may rewrite a large table).
        """
        connection, watch = self._begin(limit_seconds)
        try:
            with self.translated():
                yield connection
            self._commit(connection)
        except BaseException as error:
            is_late = self.patience.end(watch)
            self._give_back(connection, error)
            if isinstance(error, faults.Transient):
                self._end_frozen()
            if is_late and type(error) is errors.UnavailableError:
                raise errors.UnavailableError(_TOO_LATE) from error.__cause__
            raise
        if self.patience.end(watch):
            connection.invalidate()
        self._give_back(connection)

    def connected_in_time(self, dialect: sa.Dialect, record: object, places: Any, named: dict[str, Any]) -> Any:
        """SQLAlchemy's ``do_connect``: no longer than the reader has."""
        left, limit = self.patience.left(), str(named.get("connect_timeout", ""))
        if left < math.inf and limit.isdecimal():  # anything else the driver refuses
            seconds = max(2, math.ceil(left))
            named = {**named, "connect_timeout": min(int(limit) or seconds, seconds)}
        return dialect.connect(*places, **named)

    def _end_frozen(self) -> None:
        """End the sessions of processes that stand still in the midst of a COPY: their locks would stay for ever."""
        if self.dialect.name != "postgresql":
            return
        asked = _POSTGRESQL_END_FROZEN.format(FROZEN_SECONDS)
        with contextlib.suppress(errors.StateCacheError):
            if ended := self.read(lambda connection: connection.exec_driver_sql(asked).scalar()):
                _log.warning(
                    "ended the SQL sessions of processes that stood still for %s seconds: %s", FROZEN_SECONDS, ended
                )

    def _begin(self, limit_seconds: int | None) -> tuple[sa.Connection, patience.Watch | None]:
        with self.translated():
            try:
                return self._begin_once(limit_seconds)
            except sa.exc.DBAPIError as error:
                if not error.connection_invalidated:
                    raise
            return self._begin_once(limit_seconds)

    def _begin_once(self, limit_seconds: int | None) -> tuple[sa.Connection, patience.Watch | None]:
        self._check_open()
        connection = self._out_of_pool(self.writer.connect)
        watch = None
        try:
            limit = math.inf if limit_seconds is None else limit_seconds + _BEYOND_LIMIT_SECONDS
            watch = self.patience.begin(connection, limit)
            connection.begin()
            if self.dialect.name == "postgresql":
                connection.exec_driver_sql(self._limits(limit_seconds))
        except BaseException as error:
            is_late = self.patience.end(watch)
            self._give_back(connection, error)
            if is_late and isinstance(error, self._errors):
                raise errors.UnavailableError(_TOO_LATE) from error
            raise
        return connection, watch

    def _limits(self, limit_seconds: int | None) -> str:
        if limit_seconds is None:
            return _POSTGRESQL_NO_LIMIT
        recent = (self.dialect.server_version_info or (0,)) >= (17,)
        limits = _POSTGRESQL_LIMITS + (_POSTGRESQL_17_LIMIT if recent else "")
        # Who waits for a lock gives way before the limit comes: that is no failure of the server's.
        return limits.format(lock=min(30, limit_seconds * 2 // 3), whole=limit_seconds)

    def _commit(self, connection: sa.Connection) -> None:
        self._check_file(connection)
        try:
            with self.translated():
                connection.commit()
        except faults.Transient:
            raise
        except errors.UnavailableError as error:
            raise faults.CommitUnknown(f"whether SQL committed is unknown: {error}") from error.__cause__
        try:
            self._check_file(connection)
        except errors.UnavailableError as error:
            raise faults.CommitUnknown(str(error)) from error

    def _check_file(self, connection: sa.Connection) -> None:
        """Refuse a SQLite file that stands at its path no more, or its log: what is committed there would be gone."""
        files = connection.info.get(_FILES, {})
        now = {path: _file_id(path) for path in files}
        if any(known not in (None, now[path]) for path, known in files.items()):
            connection.invalidate()
            self._begin_anew()
            raise errors.UnavailableError(
                "the SQLite file, or its -wal, was replaced or deleted while it was open: it is opened anew. Restore a backup "
                "while no process has the file open"
            )
        files.update(now)  # the log is made by the first write

    def _begin_anew(self) -> None:
        """No connection of those at hand is used again."""
        self._close_kept()
        self.engine.dispose()

    def _give_back(self, connection: sa.Connection, error: BaseException | None = None) -> None:
        """Roll back what was not committed. A connection that cannot even do that is thrown away, and so is one that neither
        the driver nor we gave up: a signal's exception (a job's timeout) may have left its statement under way."""
        if error is not None and not isinstance(error, (*self._errors, errors.StateCacheError)):
            connection.invalidate()
        if error is not None and _is_read_only(error):
            # What was the primary lives on as a standby. Behind the same address a new connection may find the new one.
            connection.invalidate()
            self._begin_anew()
        lent = None if connection.invalidated else connection.connection
        try:
            connection.close()
        except self._errors:
            if lent is not None:
                lent.invalidate()  # not the connection, which may be closed already and its place in the pool still taken
        except BaseException:
            self._leave_pool()
            raise

    def _out_of_pool(self, connect: Callable[[], sa.Connection]) -> sa.Connection:
        try:
            return connect()
        except BaseException as error:
            if not isinstance(error, self._errors):
                self._leave_pool()
            raise

    def _leave_pool(self) -> None:
        """Let go of the lock of the pool's queue: a signal's exception may have come where this thread had just taken it, or
        was about to leave it, and every other thread would wait for it for ever."""
        lock = getattr(getattr(self.engine.pool, "_pool", None), "mutex", None)
        while lock is not None and lock._is_owned():
            lock.release()

    def _check_open(self) -> None:
        if self._closed:  # the pool would make new connections, which nobody would close
            raise errors.ConfigurationError("this StateCache is closed")

    def close(self) -> None:
        """Close the connections. What is asked from now on raises ``ConfigurationError``."""
        self._closed = True
        self._close_kept()
        self.engine.dispose()
        self.patience.close()


def open_database(url: str, *, create: bool = True) -> Database:
    """Make the connections' pool; nothing is connected yet. Raises ``ConfigurationError`` for a URL that cannot work.

    Without ``create`` an SQLite file must be there, and one that has none of our tables stays as it is.
    """
    parsed = _parse(url)
    is_sqlite = parsed.get_backend_name() == "sqlite"
    if is_sqlite and (not parsed.database or ":memory:" in parsed.database or parsed.query.get("mode") == "memory"):
        raise errors.ConfigurationError("an in-memory SQLite database is refused: it is not durable; name a file")
    if is_sqlite and not create:
        _check_file_is_there(parsed)
    try:
        engine = _create_engine(parsed)
    except sa.exc.NoSuchModuleError as error:
        raise errors.ConfigurationError(f"SQLAlchemy knows no database {parsed.drivername!r}: {error}") from error
    except ImportError as error:
        raise errors.ConfigurationError(
            f"the driver for {parsed.drivername!r} is not installed ({error}); for PostgreSQL: pip install 'psycopg[binary]'"
        ) from error
    if engine.dialect.is_async:
        raise errors.ConfigurationError(f"{parsed.drivername!r} is an asyncio driver: name a synchronous one")
    if is_sqlite:
        sa.event.listen(engine, "connect", functools.partial(_prepare_sqlite, create))
        sa.event.listen(engine, "begin", _begin_sqlite)
    elif engine.dialect.driver == "psycopg":
        sa.event.listen(engine, "after_cursor_execute", _rearm_idle_timeout)
    database = Database(engine)
    if engine.dialect.driver == "psycopg":
        sa.event.listen(engine, "do_connect", database.connected_in_time)
    return database


def _create_engine(url: URL) -> sa.Engine:
    options: dict[str, Any] = {"hide_parameters": True, "pool_timeout": POOL_TIMEOUT_SECONDS}
    if url.get_backend_name() == "sqlite":
        options["connect_args"] = {"timeout": BUSY_TIMEOUT_SECONDS, "isolation_level": None}
        if url.get_driver_name() == "pysqlite":
            options["connect_args"]["factory"] = forking.Connection
        options["pool_use_lifo"] = True  # few of them write, and have a large cache
    else:
        options |= {"isolation_level": "READ COMMITTED", "skip_autocommit_rollback": True}
        if url.get_driver_name() == "psycopg":
            options["connect_args"] = {key: value for key, value in _LIBPQ_DEFAULTS.items() if key not in url.query}
            if "prepare_threshold" in url.query:
                options["connect_args"]["prepare_threshold"] = _threshold_of(url.query["prepare_threshold"])
                url = url.difference_update_query(["prepare_threshold"])
    return sa.create_engine(url, **options)


def _threshold_of(text: str | tuple[str, ...]) -> int | None:
    """psycopg's setting, which it takes from no URL: how often a statement runs before it is prepared; None for never. Not 0,
    which would prepare also what is several statements."""
    if text == "none":
        return None
    if isinstance(text, str) and text.isascii() and text.isdigit() and int(text) > 0:
        return int(text)
    raise errors.ConfigurationError(
        "the database URL's prepare_threshold is refused: it is a number from 1 on, or 'none' for a transaction pooler that "
        "knows no prepared statements"
    )


def _parse(url: str) -> URL:
    before, _, behind = url.partition("://")[2].partition("@")
    user, colon, _ = before.partition(":")
    # An @ within the password: what follows it would be taken for the host, which messages tell.
    is_cut = bool(colon) and "/" not in user and "@" in behind.partition("=")[0]
    try:
        parsed = make_url("" if is_cut else url)
        if parsed.drivername == "postgres":  # libpq's and many hosts' spelling
            parsed = parsed.set(drivername="postgresql")
        parsed.get_backend_name()
    except (sa.exc.ArgumentError, ValueError, AttributeError):
        # The text may hold a password, and the parser's message a piece of it: neither is repeated.
        raise errors.ConfigurationError(
            "the database URL cannot be read: it should look like 'sqlite:////var/lib/statecache/store.db' or "
            "'postgresql://user:password@host:5432/database' (special characters in the password %-encoded: @ is %40)"
        ) from None
    return parsed


def _check_file_is_there(url: URL) -> None:
    """SQLite makes a file that is missing as soon as it is asked anything."""
    path = url.database or ""
    if url.query.get("uri") and path.startswith("file:"):
        path = urllib.parse.unquote(urllib.parse.urlsplit(path).path)
    if not os.path.exists(path):
        raise errors.ConfigurationError(f"there is no store in {os.path.abspath(path)}, there is no such file: {BEGIN}")


def _prepare_sqlite(create: bool, connection: sqlite3.Connection, record: sa.pool.ConnectionPoolEntry) -> None:
    _switch_to_wal(connection, create)
    for pragma in ("synchronous=FULL", f"cache_size={_CACHE}", "temp_store=MEMORY", "wal_autocheckpoint=20000"):
        connection.execute(f"PRAGMA {pragma}")
    path = connection.execute("PRAGMA database_list").fetchone()[2]
    record.info[_FILES] = {name: _file_id(name) for name in (path, f"{path}-wal")}


def _file_id(path: str) -> tuple[int, int] | None:
    """Which file stands there now."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _is_read_only(error: BaseException) -> bool:
    """A transaction that wanted to write met a server, or a session, that only reads."""
    return any(
        getattr(one, "sqlstate", None) == "25006" for one in (error, getattr(error, "orig", None), error.__cause__)
    )


def _switch_to_wal(connection: sqlite3.Connection, create: bool) -> None:
    """The first connection to a file turns it to WAL; without ``create`` only one that is ours. SQLite does not wait for others
    while it does, so we do."""
    deadline = time.monotonic() + BUSY_TIMEOUT_SECONDS
    while True:
        try:
            is_wal = connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
            if not is_wal and (create or connection.execute(_HAS_OUR_TABLES).fetchone()):
                connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorname != "SQLITE_BUSY" or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _begin_sqlite(connection: sa.Connection) -> None:
    begin = connection.get_execution_options().get(_SQLITE_BEGIN)
    if begin == _SQLITE_WRITE and not connection.info.get(_SQLITE_WRITE):
        connection.exec_driver_sql(f"PRAGMA cache_size={_CACHE_OF_WRITERS}")
        connection.info[_SQLITE_WRITE] = True
    if begin:
        connection.exec_driver_sql(begin)


def _rearm_idle_timeout(
    connection: sa.Connection, cursor: Any, statement: str, parameters: object, context: object, executemany: bool
) -> None:
    """psycopg sends many parameter sets in pipeline mode, which ends with a message that stops PostgreSQL's idle timer: a
    process stopped there would hold its locks for ever. Any plain statement starts the timer again (tried on 18)."""
    if executemany:
        cursor.connection.execute("SELECT 1")


def _forget_after_fork(database: Database) -> None:
    """In a child process, leave the parent's connections alone and start with an empty pool."""
    reference = weakref.ref(database)

    def forget() -> None:
        inherited = reference()
        if inherited is not None:
            _abandoned.append((inherited.engine.pool, inherited._kept))
            inherited._kept = []
            inherited.engine.dispose(close=False)
            inherited.patience = patience.Patience()

    os.register_at_fork(after_in_child=forget)


def durability_settings(database: Database) -> dict[str, str]:
    """Return the settings that decide whether a commit survives power loss, as the server tells them (for ``doctor``)."""
    if database.dialect.name == "sqlite":
        names = ("journal_mode", "synchronous")
        return database.read(lambda c: {name: str(c.exec_driver_sql(f"PRAGMA {name}").scalar()) for name in names})
    if database.dialect.name != "postgresql":
        return {}
    wanted = sa.text(
        "SELECT name, setting FROM pg_settings WHERE name IN "
        "('fsync', 'synchronous_commit', 'full_page_writes', 'server_version', 'data_sync_retry')"
    )
    return database.read(lambda c: {str(name): str(setting) for name, setting in c.execute(wanted)})
