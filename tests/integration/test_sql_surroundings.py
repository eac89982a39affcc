"""What happens around SQL while a process runs: its file is replaced, its server restarts or becomes a standby, its roles get
limits, its owner adds triggers. Nothing that is told to be durable is lost, and nobody has to restart the process."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from statecache import Move
from statecache.core import errors
from statecache.durable import leases
from statecache.durable.faults import CommitUnknown
from statecache.engine import flusher
from tests.support import proxy, servers, worlds
from tests.support.waiting import wait_until
from tests.support.worlds import after_call, before_call


@pytest.fixture
def on_postgres(redis_url: str, private_postgres: servers.PostgresServer, namespace: str) -> Iterator[worlds.World]:
    url = private_postgres.url(private_postgres.create_database())
    with worlds.World(redis_url, url, namespace) as made:
        made.start("warm")
        made.flush()
        yield made


def _run(world: worlds.World, statement: str) -> None:
    with world.durable.database.engine.connect() as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT").exec_driver_sql(statement)


# --- the file of SQLite ------------------------------------------------------------------------------------------------


def _replaced(path: Path, how: str) -> None:
    if how == "restored":  # by a rename, as most tools do
        os.replace(f"{path}.copy", path)
        for side in ("-wal", "-shm"):
            Path(f"{path}{side}").unlink(missing_ok=True)
    elif how == "copied over":
        path.unlink()
        shutil.copy(f"{path}.copy", path)
    else:
        Path(f"{path}-wal" if how == "log deleted" else path).unlink()


@pytest.mark.parametrize("how", ["restored", "copied over", "deleted", "log deleted"])
@pytest.mark.parametrize("moment", ["before", "at the commit"])
def test_what_is_said_to_be_durable_is_in_the_file_that_stands_there(
    redis_url: str, tmp_path: Path, namespace: str, how: str, moment: str
) -> None:
    """The file is replaced under an open connection, which would go on with the old one: its commits would be gone with it."""
    path = tmp_path / "store.db"
    with worlds.World(redis_url, f"sqlite:///{path}", namespace) as world:
        world.start("a")
        world.flush()
        with sqlite3.connect(path) as one, sqlite3.connect(f"{path}.copy") as copy:
            one.backup(copy)
        one.close()
        copy.close()
        told = []
        if moment == "before":
            _replaced(path, how)
        else:
            with before_call(sa.Connection, "commit", lambda: _replaced(path, how)):
                told.append(_durable(world, "x"))
        told += [_durable(world, id) for id in ("y", "z")]
        with sqlite3.connect(path) as reading:
            try:
                there = {id for (id,) in reading.execute("SELECT id FROM statecache_checkpoints")}
            except sqlite3.DatabaseError:
                there = set()
        reading.close()
        assert {id for id in told if id} <= there
        if how in ("restored", "copied over"):
            assert told[-1]  # it goes on


def _durable(world: worlds.World, id: str) -> str:
    """The id, if it is said to be durable."""
    try:
        world.orders.start(id, durability="durable", timeout=2.0)
    except errors.DurabilityTimeout:
        return ""
    return id


# --- the server of PostgreSQL ----------------------------------------------------------------------------------------------


def _crowded(world: worlds.World, count: int) -> None:
    """Leave so many idle connections behind."""
    together = threading.Barrier(count)

    def look(connection: sa.Connection) -> None:
        together.wait(20)

    worlds.together(*[lambda: world.durable.database.read(look)] * count)


@pytest.mark.postgres
def test_after_a_restart_nobody_meets_its_dead_connections(
    on_postgres: worlds.World, private_postgres: servers.PostgresServer
) -> None:
    """Of many idle connections one tells that all are dead; it was each one's turn, and the second one failed the call."""
    calls: list[Callable[[], object]] = [
        lambda: on_postgres.durable.lookup([("order", "warm", 0)]),
        lambda: on_postgres.durable.standing([("order", "warm", 1, 0)]),
        on_postgres.durable.partitions,
        lambda: on_postgres.durable.history("order", "warm"),
    ]
    for call in calls:
        _crowded(on_postgres, 7)
        private_postgres.restart()
        for _ in range(9):
            call()


@pytest.mark.postgres
def test_a_standby_behind_the_same_address_is_left(
    redis_url: str, private_postgres: servers.PostgresServer, namespace: str
) -> None:
    """Connections were made while the address led to a server that only reads; new ones meet the primary."""
    database = private_postgres.create_database()
    with contextlib.ExitStack() as stack:
        link = stack.enter_context(proxy.Proxy(private_postgres.port))
        world = stack.enter_context(worlds.World(redis_url, link.url(private_postgres.url(database)), namespace))
        world.start("1")
        world.flush()
        link.cut()
        with private_postgres.connect(database) as connection:
            connection.execute(f'ALTER DATABASE "{database}" SET default_transaction_read_only = on')
        world.start("2")
        with pytest.raises(errors.UnavailableError, match="25006"):
            world.flusher().step()
        with private_postgres.connect(database) as connection:
            connection.execute("SET default_transaction_read_only = off")
            connection.execute(f'ALTER DATABASE "{database}" RESET default_transaction_read_only')
        world.flush()
        world.verify()


@pytest.mark.postgres
def test_a_roles_statement_timeout_does_not_end_each_flush(on_postgres: worlds.World) -> None:
    """It may be less than a batch takes: then each would end, and the next one would be as large."""
    _run(
        on_postgres,
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(1); RETURN NULL; END $$",
    )
    _run(
        on_postgres,
        "CREATE TRIGGER slow BEFORE INSERT ON statecache_transitions FOR EACH STATEMENT EXECUTE FUNCTION slow()",
    )
    _run(on_postgres, "ALTER ROLE CURRENT_USER SET statement_timeout = '500ms'")
    other = on_postgres.more()
    on_postgres.orders.start_many([f"o{number}" for number in range(100)])
    assert on_postgres.flusher(other).step().entries == 100
    _run(on_postgres, "ALTER ROLE CURRENT_USER RESET statement_timeout")
    on_postgres.flush()
    on_postgres.verify()


@pytest.mark.postgres
def test_what_a_trigger_refuses_is_put_aside(on_postgres: worlds.World) -> None:
    """RAISE EXCEPTION of the owner's: the data of one instance, not an outage of all."""
    _run(
        on_postgres,
        "CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN IF NEW.id = 'bad' THEN "
        "RAISE EXCEPTION 'not this one'; END IF; RETURN NEW; END $$",
    )
    _run(
        on_postgres,
        "CREATE TRIGGER no BEFORE INSERT ON statecache_transitions FOR EACH ROW EXECUTE FUNCTION no()",
    )
    for id in ("good", "bad", "better"):
        on_postgres.start(id)
    on_postgres.flush()
    assert on_postgres.versions("good") == on_postgres.versions("better") == [1]
    assert on_postgres.durable.parked_instances() == [("order", "bad")]


@pytest.mark.parametrize("bulk", [False, True])
def test_a_durable_call_that_stands_is_not_told_a_fault_of_sql(
    redis_url: str, database_url: str, namespace: str, bulk: bool
) -> None:
    """While it waits SQL refuses to be read (a right was taken, a file cannot be opened): the transition stands, and the error
    says so, with its receipt."""
    with worlds.World(redis_url, database_url, namespace) as world:
        world.start("a")
        world.flush()
        _run(world, "ALTER TABLE statecache_transitions RENAME TO gone")
        if bulk:
            results = world.orders.transition_many(
                [Move("a", "pay"), Move("b", "pay")], durability="durable", timeout=1
            )
            late, missing = results
            assert isinstance(missing, errors.NotFoundError)
        else:
            with pytest.raises(errors.DurabilityTimeout) as caught:
                world.orders.transition("a", "pay", durability="durable", timeout=1)
            late = caught.value
        assert isinstance(late, errors.DurabilityTimeout)
        assert isinstance(late.__cause__, errors.ConfigurationError)
        assert late.receipt.version == 2
        _run(world, "ALTER TABLE gone RENAME TO statecache_transitions")
        world.flush()
        world.verify()


# --- flushers --------------------------------------------------------------------------------------------------------------


@pytest.mark.postgres
def test_a_flusher_without_rights_gives_its_partitions_to_others(on_postgres: worlds.World) -> None:
    """Its role lost the right to write: what it holds goes to those that can, as that of a process that is gone."""
    one, other = on_postgres.more(lease_seconds=2.0), on_postgres.more(lease_seconds=2.0)
    stop = threading.Event()
    threads = [
        threading.Thread(target=each.flusher.run, args=(stop,), kwargs={"leases": each.leases}) for each in (one, other)
    ]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: len(one.leases.held) == len(other.leases.held) > 0, "both have their halves", 30)

        def refused(*_: object, **__: object) -> Any:
            raise errors.ConfigurationError("no right to write")

        one.flusher._step = refused  # type: ignore[method-assign]
        wait_until(lambda: len(other.leases.held) == on_postgres.keyspace.partition_count, "the other has all", 60)
        on_postgres.start("1")
        wait_until(lambda: on_postgres.versions("1") == [1], "it is flushed", 30)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert [found.partitions for found in leases.look(on_postgres.durable) if found.alive]


def test_each_partition_begins_a_batch_in_its_turn(
    redis_url: str, sqlite_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every look ahead is too old when it is wanted (commits take longer): it must not take a turn."""
    monkeypatch.setattr(flusher, "LOOK_SECONDS_MAX", 0.0)
    with worlds.World(redis_url, sqlite_url, namespace, flush_batch_entries=100) as world:
        count = world.keyspace.partition_count
        world.orders.start_many([(f"o{number}", None) for number in range(1000 * count)])
        mine = world.flusher()
        for _ in range(4 * count):
            mine.step()
        moved = [row.watermark.seq for row in world.durable.partitions()]
        assert max(moved) - min(moved) <= 200, moved
        world.flush()


def test_what_is_moved_is_counted_also_where_the_answer_was_lost(
    redis_url: str, sqlite_url: str, namespace: str
) -> None:
    """COMMIT's answer is lost: its entries are counted, once, when SQL tells that they are there."""
    before = 0.0

    def counted() -> float:
        return world.cache.metrics.cell("statecache_flushed_transitions_total")[0] - before

    with worlds.World(redis_url, sqlite_url, namespace) as world:
        before, mine = counted(), world.flusher()
        for number in range(10):
            world.start(str(number))
        with after_call(mine.durable.database, "_commit", _lost), pytest.raises(CommitUnknown):
            mine.step()
        assert counted() == 0
        mine.step()
        assert counted() == 10
        mine.step()
        assert counted() == 10


def _lost() -> None:
    raise CommitUnknown("the answer was lost")
