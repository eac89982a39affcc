"""What is checked before a store is used, and how a new one comes to be."""

from __future__ import annotations

import uuid

import sqlalchemy as sa

from statecache.core import errors, keys
from statecache.durable import engine, migrate, schema
from statecache.durable.rows import StoreRow

PARTITION_COUNT = 16


def identity(connection: sa.Connection) -> StoreRow:
    """Read the store's row."""
    row = connection.execute(_IDENTITY).first()
    if row is None:
        raise errors.ConfigurationError(f"the database has our tables but no store in them: {engine.BEGIN}")
    return StoreRow(*row)


_store = schema.store.c
_IDENTITY = sa.select(
    _store.deployment,
    _store.protocol,
    _store.schema_version,
    _store.partition_count,
    _store.epoch,
    _store.owner,
    _store.namespace,
).where(_store.id == 1)


def check(
    database: engine.Database, partition_count: int | None, namespace: str | None, create: bool, now_ms: int
) -> None:
    """Refuse a database that this version of the package cannot work with; with ``create``, fill an empty one."""
    _check_encoding(database)
    found = migrate.revision(database)
    if found is None and not create:
        raise errors.ConfigurationError(
            f"there is no store in {database.name}, it has none of our tables: {engine.BEGIN}"
        )
    if found is None:
        migrate.upgrade_database(database)
    else:
        _check_revision(database, found)
    if create:
        _create(database, PARTITION_COUNT if partition_count is None else partition_count, namespace or "", now_ms)
    _check_store(database, database.read(identity), partition_count, namespace)


def _check_encoding(database: engine.Database) -> None:
    """Refuse a PostgreSQL database that cannot hold every text that Redis can. This is the first contact."""

    def ask(connection: sa.Connection) -> str:
        return str(connection.exec_driver_sql("SHOW server_encoding").scalar())

    if database.dialect.name == "postgresql" and (encoding := database.read(ask)) != "UTF8":
        raise errors.ConfigurationError(
            f"{database.name} has the encoding {encoding}, which cannot hold every text: make a database with UTF8"
        )


def _check_revision(database: engine.Database, found: str) -> None:
    if found == migrate.HEAD:
        return
    if found < migrate.HEAD:
        raise errors.ConfigurationError(
            f"{database.name} has schema version {found}, this version of statecache needs {migrate.HEAD}: "
            "run 'statecache db upgrade'"
        )
    raise migrate.newer(database.name, found)


def adopt(database: engine.Database, namespace: str) -> None:
    """Note the namespace of a store that tells none: a client has found its Redis there."""
    noted = sa.update(schema.store).where(_store.id == 1, _store.namespace == "").values(namespace=namespace)
    with database.transaction() as connection:
        connection.execute(noted)


def _create(database: engine.Database, partition_count: int, namespace: str, now_ms: int) -> None:
    """Make the store's row and its partitions, unless somebody has."""
    if database.read(lambda connection: connection.execute(_IDENTITY).first()) is not None:
        return
    if not 1 <= partition_count <= keys.PARTITION_COUNT_MAX:
        raise errors.ConfigurationError(
            f"partition count {partition_count} is refused: 1 to {keys.PARTITION_COUNT_MAX} are allowed"
        )
    row = {
        "id": 1, "deployment": str(uuid.uuid4()), "protocol": schema.PROTOCOL, "schema_version": schema.SCHEMA_VERSION,
        "partition_count": partition_count, "epoch": 0, "owner": "", "created_ms": now_ms, "namespace": namespace,
    }  # fmt: skip
    nothing = {"epoch": 0, "owner": "", "watermark_epoch": 0, "watermark_seq": 0}
    nothing |= {"tail_epoch": 0, "tail_seq": 0, "tail_seen_ms": 0}
    with database.transaction() as connection:
        migrate.lock(connection)
        if connection.execute(_IDENTITY).first() is None:
            connection.execute(sa.insert(schema.store), row)
            numbered = [{"partition": number, **nothing} for number in range(partition_count)]
            connection.execute(sa.insert(schema.partitions), numbered)
            free = [{"partition": number, "holder": "", "since_ms": 0} for number in range(partition_count)]
            connection.execute(sa.insert(schema.leases), free)


def _check_store(
    database: engine.Database, store: StoreRow, partition_count: int | None, namespace: str | None
) -> None:
    if store.protocol != schema.PROTOCOL:
        raise errors.ConfigurationError(
            f"{database.name} holds a store of protocol {store.protocol}, this version of statecache speaks "
            f"{schema.PROTOCOL}: use the version of the package that the other processes use"
        )
    _check_revision(database, f"{store.schema_version:04d}")
    if partition_count is not None and store.partition_count != partition_count:
        raise errors.ConfigurationError(
            f"{database.name} holds a store of {store.partition_count} partitions, the settings say {partition_count}: "
            "the number is fixed when a store is created; correct the settings"
        )
    if namespace and store.namespace not in ("", namespace):
        raise errors.ConfigurationError(
            f"{database.name} holds the store of namespace {store.namespace!r}, the settings say {namespace!r}: correct the "
            "namespace, or name another database (--database-url, --data-dir): each store has one of its own"
        )
