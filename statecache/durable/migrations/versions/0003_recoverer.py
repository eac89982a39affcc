"""Which process runs a recovery: one that is known to be gone is not waited for."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("statecache_recoveries", sa.Column("process", sa.Text))
