"""Which Redis a flusher works at: an empty one somewhere else must not be taken for that one, wiped."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column("statecache_flushers", sa.Column("redis", sa.Text))
