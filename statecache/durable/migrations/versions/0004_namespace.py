"""Which namespace of Redis a store belongs to: two of them would each take the other for wiped."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    text = sa.String(64).with_variant(sa.Text(collation="C"), "postgresql").with_variant(sa.Text(), "sqlite")
    op.add_column("statecache_store", sa.Column("namespace", text, nullable=False, server_default=sa.text("''")))
