"""The first tables. What each is for, and why its indexes are what they are, is said in ``schema.py``."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_HALF_FULL = {"fillfactor": 50}


def _text(length: int) -> sa.types.TypeEngine[str]:
    return sa.String(length).with_variant(sa.Text(collation="C"), "postgresql").with_variant(sa.Text(), "sqlite")


def _entry_columns() -> list[sa.Column[object]]:
    return [
        sa.Column("partition", sa.Integer, nullable=False),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("seq", sa.BigInteger, nullable=False),
        sa.Column("machine", _text(64), primary_key=True),
        sa.Column("id", _text(200), primary_key=True),
        sa.Column("version", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("event", _text(64), nullable=False),
        sa.Column("from_state", _text(64)),
        sa.Column("to_state", _text(64), nullable=False),
        sa.Column("at_ms", sa.BigInteger, nullable=False),
        sa.Column("transition_id", _text(200), nullable=False),
        sa.Column("actor", sa.Text),
        sa.Column("reason", sa.Text),
        sa.Column("occurred_ms", sa.BigInteger),
        sa.Column("patch", sa.Text),
        sa.Column("unset", sa.Text),
        sa.Column("increments", sa.Text),
        sa.Column("machine_version", sa.Integer, nullable=False),
    ]


def upgrade() -> None:
    _create_owners()
    _create_instances()
    _create_history()
    op.create_table(
        "statecache_recoveries",
        sa.Column("epoch", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("owner", _text(64), primary_key=True),
        sa.Column("started_ms", sa.BigInteger, nullable=False),
        sa.Column("heartbeat_ms", sa.BigInteger, nullable=False),
        sa.Column("finished_ms", sa.BigInteger),
        sa.Column("classes", sa.Text, nullable=False),
        sa.Column("report", sa.Text, nullable=False),
    )


def _create_owners() -> None:
    op.create_table(
        "statecache_store",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("deployment", _text(64), nullable=False),
        sa.Column("protocol", sa.Integer, nullable=False),
        sa.Column("schema_version", sa.Integer, nullable=False),
        sa.Column("partition_count", sa.Integer, nullable=False),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("owner", _text(64), nullable=False),
        sa.Column("created_ms", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "statecache_partitions",
        sa.Column("partition", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("owner", _text(64), nullable=False),
        sa.Column("watermark_epoch", sa.BigInteger, nullable=False),
        sa.Column("watermark_seq", sa.BigInteger, nullable=False),
        sa.Column("tail_epoch", sa.BigInteger, nullable=False),
        sa.Column("tail_seq", sa.BigInteger, nullable=False),
        sa.Column("tail_seen_ms", sa.BigInteger, nullable=False),
        postgresql_with=_HALF_FULL,
    )


def _create_instances() -> None:
    op.create_table(
        "statecache_machines",
        sa.Column("name", _text(64), primary_key=True),
        sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("fingerprint", sa.Text, nullable=False),
        sa.Column("spec", sa.Text, nullable=False),
        sa.Column("registered_ms", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "statecache_checkpoints",
        sa.Column("machine", _text(64), primary_key=True),
        sa.Column("id", _text(200), primary_key=True),
        sa.Column("partition", sa.Integer, nullable=False),
        sa.Column("state", _text(64), nullable=False),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("seq", sa.BigInteger, nullable=False),
        sa.Column("created_ms", sa.BigInteger, nullable=False),
        sa.Column("updated_ms", sa.BigInteger, nullable=False),
        sa.Column("machine_version", sa.Integer, nullable=False),
        sa.Column("final", sa.Boolean, nullable=False),
        sa.Column("recent", _text(64), nullable=False),
        sa.Column("data", sa.Text, nullable=False),
        postgresql_with=_HALF_FULL,
    )
    op.create_index("statecache_checkpoints_find", "statecache_checkpoints", ["machine", "state", "updated_ms"])
    op.create_table(
        "statecache_state_counts",
        sa.Column("partition", sa.Integer, nullable=False, autoincrement=False),
        sa.Column("machine", _text(64), nullable=False),
        sa.Column("state", _text(64), nullable=False),
        sa.Column("count", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("machine", "state", "partition"),
        postgresql_with=_HALF_FULL,
    )


def _create_history() -> None:
    op.create_table(
        "statecache_transitions",
        *_entry_columns(),
        sa.Column("covers_from", sa.BigInteger),
        sa.Column("complete", sa.Boolean, nullable=False, server_default=sa.true()),
    )
    op.create_index(
        "statecache_transitions_entry",
        "statecache_transitions",
        ["partition", "epoch", "seq"],
        postgresql_using="brin",
        postgresql_with={"pages_per_range": 32, "autosummarize": "on"},
        postgresql_ops={"seq": "int8_minmax_multi_ops"},
    )
    op.create_table(
        "statecache_discards",
        sa.Column("machine", _text(64), primary_key=True),
        sa.Column("id", _text(200), primary_key=True),
        sa.Column("epoch", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("partition", sa.Integer, nullable=False),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("transition_id", _text(200), nullable=False),
        sa.Column("discarded_ms", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "statecache_dead_letters",
        *_entry_columns(),
        sa.Column("error", sa.Text, nullable=False),
        sa.Column("waiting", sa.Boolean, nullable=False),
        sa.Column("noted_ms", sa.BigInteger, nullable=False),
    )
