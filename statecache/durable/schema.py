"""The tables. Times are milliseconds since 1970, an entry id is the two columns ``epoch`` and ``seq``, JSON is TEXT.

Migrations create them (``migrations/``); a test holds both equal. Names and ids are compared byte by byte (COLLATE "C" on
PostgreSQL, BINARY on SQLite), as Redis and Python compare them, and because that makes their B-trees twice as fast.
"""

from __future__ import annotations

import sqlalchemy as sa

SCHEMA_VERSION = 5
PROTOCOL = 1

metadata = sa.MetaData()


def _text(length: int) -> sa.types.TypeEngine[str]:
    """A key column: TEXT where that can be a key, a bounded VARCHAR elsewhere."""
    return sa.String(length).with_variant(sa.Text(collation="C"), "postgresql").with_variant(sa.Text(), "sqlite")


NAME = _text(64)
ID = _text(200)
TOKEN = _text(64)

store = sa.Table(
    "statecache_store",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("deployment", TOKEN, nullable=False),
    sa.Column("protocol", sa.Integer, nullable=False),
    sa.Column("schema_version", sa.Integer, nullable=False),
    sa.Column("partition_count", sa.Integer, nullable=False),
    sa.Column("epoch", sa.BigInteger, nullable=False),
    sa.Column("owner", TOKEN, nullable=False),
    sa.Column("created_ms", sa.BigInteger, nullable=False),
    # Empty where the store is older than this column, until a client is admitted.
    sa.Column("namespace", TOKEN, nullable=False, server_default=sa.text("''")),
)

# Epoch and owner stand in every row, so that a recovery's write conflicts with an open flush transaction (hole H1).
partitions = sa.Table(
    "statecache_partitions",
    metadata,
    sa.Column("partition", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("epoch", sa.BigInteger, nullable=False),
    sa.Column("owner", TOKEN, nullable=False),
    sa.Column("watermark_epoch", sa.BigInteger, nullable=False),
    sa.Column("watermark_seq", sa.BigInteger, nullable=False),
    sa.Column("tail_epoch", sa.BigInteger, nullable=False),
    sa.Column("tail_seq", sa.BigInteger, nullable=False),
    sa.Column("tail_seen_ms", sa.BigInteger, nullable=False),
    postgresql_with={"fillfactor": 50},
)

machines = sa.Table(
    "statecache_machines",
    metadata,
    sa.Column("name", NAME, primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("fingerprint", sa.Text, nullable=False),
    sa.Column("spec", sa.Text, nullable=False),
    sa.Column("registered_ms", sa.BigInteger, nullable=False),
)

checkpoints = sa.Table(
    "statecache_checkpoints",
    metadata,
    sa.Column("machine", NAME, primary_key=True),
    sa.Column("id", ID, primary_key=True),
    sa.Column("partition", sa.Integer, nullable=False),
    sa.Column("state", NAME, nullable=False),
    sa.Column("version", sa.BigInteger, nullable=False),
    sa.Column("epoch", sa.BigInteger, nullable=False),
    sa.Column("seq", sa.BigInteger, nullable=False),
    sa.Column("created_ms", sa.BigInteger, nullable=False),
    sa.Column("updated_ms", sa.BigInteger, nullable=False),
    sa.Column("machine_version", sa.Integer, nullable=False),
    sa.Column("final", sa.Boolean, nullable=False),
    sa.Column("recent", TOKEN, nullable=False),
    sa.Column("data", sa.Text, nullable=False),
    postgresql_with={"fillfactor": 50},
)


# The only index that transitions change: a state's instances by age serve ``find`` and the evictor. Without it PostgreSQL
# updates in place (HOT) and flushes 1.2 times as fast (200,000 instances); but then a search reads every checkpoint.
# Partial (non-final states only) was not faster within the noise: an instance enters a final state once, at the right end
# of its range; and final instances are what the evictor asks for.
sa.Index("statecache_checkpoints_find", checkpoints.c.machine, checkpoints.c.state, checkpoints.c.updated_ms)


def _entry_columns() -> list[sa.Column[object]]:
    """The columns of an entry, in the order of the log's packed text: PostgreSQL gets that text by COPY as it is."""
    return [
        sa.Column("partition", sa.Integer, nullable=False),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("seq", sa.BigInteger, nullable=False),
        sa.Column("machine", NAME, primary_key=True),
        sa.Column("id", ID, primary_key=True),
        sa.Column("version", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("event", NAME, nullable=False),
        sa.Column("from_state", NAME),
        sa.Column("to_state", NAME, nullable=False),
        sa.Column("at_ms", sa.BigInteger, nullable=False),
        sa.Column("transition_id", ID, nullable=False),
        sa.Column("actor", sa.Text),
        sa.Column("reason", sa.Text),
        sa.Column("occurred_ms", sa.BigInteger),
        sa.Column("patch", sa.Text),
        sa.Column("unset", sa.Text),
        sa.Column("increments", sa.Text),
        sa.Column("machine_version", sa.Integer, nullable=False),
    ]


transitions = sa.Table(
    "statecache_transitions",
    metadata,
    *_entry_columns(),
    sa.Column("covers_from", sa.BigInteger),
    sa.Column("complete", sa.Boolean, nullable=False, server_default=sa.true()),
)

# History is written in the log's order, so a BRIN index finds an entry id, or all above one, in a few pages, and costs the
# flush nothing. Multi-minmax, because the partitions' numbers lie interleaved. Elsewhere it is a B-tree.
# SQLite: a table WITHOUT ROWID, clustered by the primary key, takes half again as long to flush and reads no faster.
sa.Index(
    "statecache_transitions_entry",
    transitions.c.partition,
    transitions.c.epoch,
    transitions.c.seq,
    postgresql_using="brin",
    postgresql_with={"pages_per_range": 32, "autosummarize": "on"},
    postgresql_ops={"seq": "int8_minmax_multi_ops"},
)

state_counts = sa.Table(
    "statecache_state_counts",
    metadata,
    sa.Column("partition", sa.Integer, nullable=False, autoincrement=False),
    sa.Column("machine", NAME, nullable=False),
    sa.Column("state", NAME, nullable=False),
    sa.Column("count", sa.BigInteger, nullable=False),
    # The machine first: counts are asked for by machine, and changed by the whole key.
    sa.PrimaryKeyConstraint("machine", "state", "partition"),
    postgresql_with={"fillfactor": 50},
)

dead_letters = sa.Table(
    "statecache_dead_letters",
    metadata,
    *_entry_columns(),
    sa.Column("error", sa.Text, nullable=False),
    sa.Column("waiting", sa.Boolean, nullable=False),
    sa.Column("noted_ms", sa.BigInteger, nullable=False),
)

# What an operator discarded: recovery must know these entries when an older copy of Redis brings them back.
discards = sa.Table(
    "statecache_discards",
    metadata,
    sa.Column("machine", NAME, primary_key=True),
    sa.Column("id", ID, primary_key=True),
    sa.Column("epoch", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("partition", sa.Integer, nullable=False),
    sa.Column("version", sa.BigInteger, nullable=False),
    sa.Column("transition_id", ID, nullable=False),
    sa.Column("discarded_ms", sa.BigInteger, nullable=False),
)

recoveries = sa.Table(
    "statecache_recoveries",
    metadata,
    sa.Column("epoch", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("owner", TOKEN, primary_key=True),
    sa.Column("started_ms", sa.BigInteger, nullable=False),
    sa.Column("heartbeat_ms", sa.BigInteger, nullable=False),
    sa.Column("finished_ms", sa.BigInteger),
    sa.Column("classes", sa.Text, nullable=False),
    sa.Column("report", sa.Text, nullable=False),
    sa.Column("process", sa.Text),
)

# Who flushes what. Tables of their own: the partitions' rows are the flush's compare-and-set, and stay as small as it needs.
flushers = sa.Table(
    "statecache_flushers",
    metadata,
    sa.Column("name", TOKEN, primary_key=True),
    sa.Column("host", sa.Text, nullable=False),
    sa.Column("pid", sa.BigInteger, nullable=False),
    sa.Column("place", sa.Text, nullable=False),
    sa.Column("started_ms", sa.BigInteger, nullable=False),
    sa.Column("beat_ms", sa.BigInteger, nullable=False),
    sa.Column("lease_ms", sa.BigInteger, nullable=False),
    # NULL where the flusher is older than this column.
    sa.Column("redis", sa.Text),
)

leases = sa.Table(
    "statecache_leases",
    metadata,
    sa.Column("partition", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("holder", TOKEN, nullable=False),
    sa.Column("since_ms", sa.BigInteger, nullable=False),
)

ENTRY_COLUMNS = tuple(column.name for column in _entry_columns())
CHECKPOINT_COLUMNS = tuple(checkpoints.columns.keys())
CHECKPOINT_CHANGES = ("state", "version", "epoch", "seq", "updated_ms", "machine_version", "final", "recent", "data")
"""What a transition changes; the rest of a checkpoint stands from its first row on."""
