"""Run by alembic: applies the migrations on the connection, and in the transaction, of ``migrate.upgrade_database``."""

from __future__ import annotations

from alembic import context

from statecache.durable import migrate, schema

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=schema.metadata,
    version_table=migrate.VERSION_TABLE,
    transactional_ddl=True,
)
context.run_migrations()
