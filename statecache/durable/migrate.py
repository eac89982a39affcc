"""Creating and upgrading the tables. The migrations are in the package (``migrations/``) and need no ``alembic.ini``.

All of an upgrade is one transaction where the database can do that (PostgreSQL, SQLite), and upgraders take turns.
"""

from __future__ import annotations

import importlib.resources

import sqlalchemy as sa

from statecache.core import errors
from statecache.durable import engine, schema

VERSION_TABLE = "statecache_alembic"
HEAD = f"{schema.SCHEMA_VERSION:04d}"
_LOCK = int.from_bytes(b"statecac", "big")


def upgrade(url: str) -> None:
    """Bring the tables in the database at ``url`` to this version's schema; a database without any gets them.

    Safe to run twice and by several at once. Raises ``ConfigurationError`` if the tables are of a newer version.
    """
    database = engine.open_database(url)
    try:
        upgrade_database(database)
    finally:
        database.close()


def revision(database: engine.Database) -> str | None:
    """Return the schema version of the tables as four digits, or None if there are none of ours."""

    def ask(connection: sa.Connection) -> str | None:
        if not sa.inspect(connection).has_table(VERSION_TABLE):
            return None
        found: str | None = connection.execute(sa.text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar()
        return found

    return database.read(ask)


def newer(name: str, found: str) -> errors.ConfigurationError:
    """The error for tables of a newer version than this one."""
    return errors.ConfigurationError(
        f"{name} has schema version {found}, this version of statecache knows {HEAD} at most: upgrade the statecache package"
    )


def lock(connection: sa.Connection) -> None:
    """Wait for others who create or upgrade. SQLite needs nothing: its write transactions are alone anyway."""
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))


def upgrade_database(database: engine.Database) -> None:
    """``upgrade`` on open connections."""
    from alembic import command, config, util

    folder = importlib.resources.files("statecache.durable") / "migrations"
    with importlib.resources.as_file(folder) as path, database.transaction(limit_seconds=None) as connection:
        lock(connection)
        settings = config.Config()
        settings.set_main_option("script_location", str(path).replace("%", "%%"))
        settings.attributes["connection"] = connection
        try:
            command.upgrade(settings, "head")
        except util.CommandError as error:
            raise errors.ConfigurationError(
                f"{database.name} cannot be upgraded to schema version {HEAD}: {error}; if its tables are of a newer "
                "version, upgrade the statecache package"
            ) from error
        connection.execute(sa.update(schema.store).values(schema_version=schema.SCHEMA_VERSION))
