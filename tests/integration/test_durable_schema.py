"""The tables: migrations equal the declared schema, upgraders take turns, and what connecting refuses."""

from __future__ import annotations

import importlib.resources
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command, config
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from statecache.core import entry, errors
from statecache.durable import engine, leases, migrate, recoveries, schema
from statecache.durable.store import DurableStore
from tests.support import servers


def _in_step(count: int, work: Callable[[], Any]) -> list[Any]:
    """Run ``work`` in so many threads that all begin at the same moment."""
    barrier = threading.Barrier(count)

    def run(_: int) -> Any:
        barrier.wait()
        return work()

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def _execute(url: str, statement: str) -> None:
    database = engine.open_database(url)
    with database.transaction() as connection:
        connection.execute(sa.text(statement))
    database.close()


def test_migrations_make_the_declared_schema(database_url: str) -> None:
    migrate.upgrade(database_url)
    database = engine.open_database(database_url)
    options = {"compare_type": True, "compare_server_default": True, "version_table": migrate.VERSION_TABLE}
    with database.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection, opts=options), schema.metadata) == []
    assert migrate.revision(database) == migrate.HEAD
    database.close()


def test_what_comparing_does_not_see(postgres_url: str) -> None:
    """Collations, fillfactors and the kind and options of an index are the same as well."""
    migrate.upgrade(postgres_url)
    database = engine.open_database(postgres_url)
    asked = (
        "SELECT tablename, indexdef FROM pg_indexes WHERE schemaname = :schema ORDER BY indexdef",
        "SELECT relname, reloptions::text FROM pg_class WHERE relnamespace = CAST(:schema AS regnamespace) "
        "AND relname LIKE 'statecache_%' AND relname <> 'statecache_alembic' ORDER BY relname",
        "SELECT table_name, column_name, collation_name, ordinal_position FROM information_schema.columns "
        "WHERE table_schema = :schema ORDER BY 1, 4",
    )

    def described(connection: sa.Connection, name: str) -> list[list[tuple[Any, ...]]]:
        return [
            [
                tuple(str(part).replace(f"{name}.", "") for part in row)
                for row in connection.execute(sa.text(statement), {"schema": name})
                if "alembic" not in str(row)
            ]
            for statement in asked
        ]

    with database.transaction() as connection:
        connection.execute(sa.text("CREATE SCHEMA declared"))
        connection.execute(sa.text("SET LOCAL search_path = declared"))
        schema.metadata.create_all(connection, checkfirst=False)
        assert described(connection, "public") == described(connection, "declared")
    database.close()


def test_upgrading_twice_and_by_several_at_once(database_url: str) -> None:
    _in_step(4, lambda: migrate.upgrade(database_url))
    migrate.upgrade(database_url)
    store = DurableStore.connect(database_url)
    assert store.identity().schema_version == schema.SCHEMA_VERSION
    store.close()


def test_several_creators_end_with_the_same_store(database_url: str) -> None:
    stores = _in_step(4, lambda: DurableStore.connect(database_url, partition_count=8, now_ms=5))
    assert len({store.identity().deployment for store in stores}) == 1
    assert [row.partition for row in stores[0].partitions()] == list(range(8))
    for store in stores:
        store.close()


def test_a_new_store(database_url: str) -> None:
    store = DurableStore.connect(database_url)
    found = store.identity()
    assert (found.protocol, found.schema_version) == (schema.PROTOCOL, schema.SCHEMA_VERSION)
    assert (found.partition_count, found.epoch, found.owner) == (16, 0, "")
    assert len(found.deployment) == 36
    row = store.partitions([3])[0]
    assert (row.epoch, row.owner, row.watermark, row.tail, row.tail_seen_ms) == (0, "", entry.ZERO, entry.ZERO, 0)
    assert recoveries.recoveries(store) == []
    store.close()
    again = DurableStore.connect(database_url, partition_count=None, create=False)
    assert again.identity() == found
    again.close()


def test_a_store_has_one_namespace(database_url: str) -> None:
    """Another one would find nothing in Redis, and take the store for wiped."""
    DurableStore.connect(database_url, namespace="shop").close()
    for namespace in ("shop", None):
        DurableStore.connect(database_url, namespace=namespace, create=False).close()
    for create in (True, False):
        with pytest.raises(errors.ConfigurationError, match="'shop', the settings say 'shpo': correct the namespace"):
            DurableStore.connect(database_url, namespace="shpo", create=create)


def test_settings_that_decide_durability(database_url: str) -> None:
    store = DurableStore.connect(database_url)
    settings = store.durability_settings()
    if store.database.dialect.name == "sqlite":
        assert settings == {"journal_mode": "wal", "synchronous": "2"}
    else:
        assert settings["synchronous_commit"] == "on"
        assert settings["fsync"] in ("on", "off")
    store.close()


def test_no_tables_and_not_told_to_make_any(database_url: str) -> None:
    with pytest.raises(errors.ConfigurationError, match="there is no store in"):
        DurableStore.connect(database_url, create=False)
    migrate.upgrade(database_url)
    with pytest.raises(errors.ConfigurationError, match="no store in them"):
        DurableStore.connect(database_url, create=False)


@pytest.mark.parametrize("count", [0, 1025])
def test_an_impossible_partition_count(sqlite_url: str, count: int) -> None:
    with pytest.raises(errors.ConfigurationError, match=f"partition count {count} is refused"):
        DurableStore.connect(sqlite_url, partition_count=count)


def test_another_partition_count(database_url: str) -> None:
    DurableStore.connect(database_url, partition_count=8).close()
    with pytest.raises(errors.ConfigurationError, match="store of 8 partitions, the settings say 16"):
        DurableStore.connect(database_url)


def test_an_older_and_a_newer_schema(database_url: str) -> None:
    DurableStore.connect(database_url).close()
    _execute(database_url, "UPDATE statecache_alembic SET version_num = '0000'")
    with pytest.raises(
        errors.ConfigurationError, match=rf"version 0000.*needs {migrate.HEAD}: run 'statecache db upgrade'"
    ):
        DurableStore.connect(database_url)
    _execute(database_url, "UPDATE statecache_alembic SET version_num = '0099'")
    with pytest.raises(
        errors.ConfigurationError, match=rf"version 0099.*{migrate.HEAD} at most: upgrade the statecache package"
    ):
        DurableStore.connect(database_url)
    with pytest.raises(errors.ConfigurationError, match="upgrade the statecache package"):
        migrate.upgrade(database_url)
    _execute(database_url, f"UPDATE statecache_alembic SET version_num = '{migrate.HEAD}'")
    _execute(database_url, "UPDATE statecache_store SET schema_version = 99")
    with pytest.raises(errors.ConfigurationError, match=r"version 0099.*upgrade the statecache package"):
        DurableStore.connect(database_url)


def _upgrade_to(revision: str, connection: sa.Connection) -> None:
    settings = config.Config()
    folder = importlib.resources.files("statecache.durable") / "migrations"
    settings.set_main_option("script_location", str(folder))
    settings.attributes["connection"] = connection
    command.upgrade(settings, revision)


def test_a_store_of_the_first_schema_is_upgraded_with_its_data(database_url: str) -> None:
    """Every partition that is there gets a free lease; recoveries of before tell no process."""
    database = engine.open_database(database_url)
    with database.transaction(limit_seconds=None) as connection:
        _upgrade_to("0001", connection)
        for number in range(3):
            values = ", ".join([str(number), "1", "'o'", *"00000"])
            connection.execute(sa.text(f"INSERT INTO statecache_partitions VALUES ({values})"))
        connection.execute(sa.text("INSERT INTO statecache_recoveries VALUES (1, 'o', 1, 2, 3, 'new', '')"))
        connection.execute(sa.text("INSERT INTO statecache_store VALUES (1, 'd', 1, 1, 3, 1, 'o', 5)"))
    database.close()
    with pytest.raises(errors.ConfigurationError, match="run 'statecache db upgrade'"):
        DurableStore.connect(database_url, partition_count=None)
    migrate.upgrade(database_url)
    store = DurableStore.connect(database_url, partition_count=None)
    assert (store.identity().schema_version, store.identity().epoch) == (schema.SCHEMA_VERSION, 1)
    assert recoveries.recoveries(store)[0].process is None
    assert store.identity().namespace == ""
    store.adopt("first")
    store.adopt("second")
    assert store.identity().namespace == "first"
    leases.join(store, "me", "here", 1, "", 1000)
    leases.take(store, "me", [0, 1, 2], [])
    assert leases.look(store)[0].partitions == (0, 1, 2)
    store.close()


def test_flushers_of_schema_4_have_noted_no_redis(database_url: str) -> None:
    """One that runs during the upgrade goes on beating, and one of that version could still join."""
    database = engine.open_database(database_url)
    joins = sa.text(
        "INSERT INTO statecache_flushers (name, host, pid, place, started_ms, beat_ms, lease_ms) "
        "VALUES (:name, 'here', 1, '', 5, 5, 1000)"
    )
    with database.transaction(limit_seconds=None) as connection:
        _upgrade_to("0004", connection)
        connection.execute(sa.text("INSERT INTO statecache_store VALUES (1, 'd', 1, 4, 3, 1, 'o', 5, 'shop')"))
        connection.execute(joins, {"name": "before"})
    migrate.upgrade(database_url)
    store = DurableStore.connect(database_url, partition_count=None)
    assert store.identity().schema_version == schema.SCHEMA_VERSION
    assert leases.beat(store, "before")
    with database.transaction() as connection:
        connection.execute(joins, {"name": "behind"})
    leases.join(store, "new", "here", 1, "", 1000, "redis.example:6379/0")
    found = {row.name: row.redis for row in leases.look(store)}
    assert found == {"before": None, "new": "redis.example:6379/0"}  # one so long silent is forgotten
    store.close()
    database.close()


def test_another_protocol(sqlite_url: str) -> None:
    DurableStore.connect(sqlite_url).close()
    _execute(sqlite_url, "UPDATE statecache_store SET protocol = 2")
    with pytest.raises(errors.ConfigurationError, match=r"protocol 2.*speaks 1"):
        DurableStore.connect(sqlite_url)


def _password(url: str) -> str:
    return url.split(":")[2].split("@")[0]


def test_postgresql_refuses_the_login(postgres_server: servers.PostgresServer, postgres_url: str) -> None:
    password = _password(postgres_url)
    for wrong, told in [
        (postgres_url.replace(password, "wr0ngpass"), "password authentication failed"),
        (postgres_url.rsplit("/", 1)[0] + "/nosuch", 'database "nosuch" does not exist'),
    ]:
        with pytest.raises(errors.ConfigurationError, match=told) as refused:
            DurableStore.connect(wrong)
        assert "wr0ngpass" not in str(refused.value)
        assert password not in str(refused.value)
        assert refused.value.__cause__ is not None


def test_postgresql_is_not_there(postgres_server: servers.PostgresServer) -> None:
    port = postgres_server.port
    away = postgres_server.url().replace(f":{port}/", ":1/")
    with pytest.raises(errors.UnavailableError, match="could not be reached") as refused:
        DurableStore.connect(away)
    assert type(refused.value.__cause__).__name__ == "OperationalError"


def test_a_postgresql_that_cannot_hold_every_text(postgres_server: servers.PostgresServer, postgres_url: str) -> None:
    with postgres_server.connect() as connection:
        connection.execute("CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    with pytest.raises(errors.ConfigurationError, match="encoding LATIN1"):
        DurableStore.connect(postgres_server.url("latin"))
    postgres_server.drop_database("latin")


def test_a_role_that_may_not_create(postgres_server: servers.PostgresServer, postgres_url: str) -> None:
    with postgres_server.connect() as connection:
        connection.execute("CREATE ROLE meek LOGIN PASSWORD 'meek'")
    meek = postgres_url.replace(f"postgres:{_password(postgres_url)}@", "meek:meek@")
    with pytest.raises(errors.ConfigurationError, match="permission denied"):
        DurableStore.connect(meek)
    with postgres_server.connect() as connection:
        connection.execute("DROP ROLE meek")


def test_sqlite_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigurationError, match="unable to open database file"):
        DurableStore.connect(f"sqlite:///{tmp_path}/no/such/folder/x.db")
    (tmp_path / "text.db").write_text("this is not a database, it is a text that is long enough to be read as one" * 20)
    with pytest.raises(errors.ConfigurationError, match="not a database"):
        DurableStore.connect(f"sqlite:///{tmp_path}/text.db")


def test_a_sqlite_file_that_may_only_be_read(sqlite_url: str) -> None:
    """Root may write everywhere, so the connection is opened read-only instead of taking the right from the file."""
    DurableStore.connect(sqlite_url).close()
    path = sqlite_url.removeprefix("sqlite:///")
    with pytest.raises(errors.ConfigurationError, match="readonly database"):
        recoveries.take(
            DurableStore.connect(f"sqlite:///file:{path}?mode=ro&uri=true", create=False), (0, ""), 1, "owner", 5
        )


def test_connecting_again_after_a_fork(database_url: str) -> None:
    """The child uses the inherited store while the parent's connection stays in use, and each sees the other's work."""
    store = DurableStore.connect(database_url)
    store.register_machine("before", 1, "f", "{}", 1)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            store.register_machine("child", 1, "f", "{}", 1)
            store.machine("before")
            status = 0
        finally:
            os._exit(status)
    for number in range(50):
        store.register_machine(f"parent{number}", 1, "f", "{}", 1)
    assert os.waitpid(child, 0)[1] == 0
    assert {"before", "child", "parent0", "parent49"} <= {row.name for row in store.machines()}
    store.close()
