"""Which forms a database gets."""

from __future__ import annotations

import sqlalchemy as sa

from statecache.durable import bulk, generic, postgresql, sqlite


def of(dialect: sa.Dialect) -> bulk.Forms:
    """The fast forms where we have them; COPY is written for psycopg 3 only."""
    if dialect.name == "postgresql" and dialect.driver == "psycopg":
        return postgresql.Postgresql()
    if dialect.name == "sqlite":
        return sqlite.Sqlite()
    return generic.Generic()
