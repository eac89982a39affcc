"""Flushers, and their leases of partitions: see ``durable/leases.py``."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def _text(length: int) -> sa.types.TypeEngine[str]:
    return sa.String(length).with_variant(sa.Text(collation="C"), "postgresql").with_variant(sa.Text(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "statecache_flushers",
        sa.Column("name", _text(64), primary_key=True),
        sa.Column("host", sa.Text, nullable=False),
        sa.Column("pid", sa.BigInteger, nullable=False),
        sa.Column("place", sa.Text, nullable=False),
        sa.Column("started_ms", sa.BigInteger, nullable=False),
        sa.Column("beat_ms", sa.BigInteger, nullable=False),
        sa.Column("lease_ms", sa.BigInteger, nullable=False),
    )
    leases = op.create_table(
        "statecache_leases",
        sa.Column("partition", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("holder", _text(64), nullable=False),
        sa.Column("since_ms", sa.BigInteger, nullable=False),
    )
    # A store that is there already has its partitions; a new one gets rows in both tables when it is created.
    partitions = sa.table("statecache_partitions", sa.column("partition"))
    every = sa.select(partitions.c.partition, sa.literal(""), sa.literal(0))
    op.execute(sa.insert(leases).from_select(["partition", "holder", "since_ms"], every))
