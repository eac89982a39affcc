"""Leases: which flusher works on which partition, so that several do not do the same work.

A lease is efficiency, never safety: that is the compare-and-set of the flush (P5). So nothing here is locked, every statement
commits by itself and may be repeated, and a holder that was stopped for an hour and wakes up does no harm.

A flusher's row is renewed once a heartbeat; its leases live as long as it does. Only the DATABASE's clock is looked at, on both
sides of every comparison, so a host whose clock is wrong keeps, gains and loses nothing. Where that clock itself is set back
or forward, a heartbeat too far in the future is no heartbeat either: nothing lasts longer than a lease.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import sqlalchemy as sa

from statecache.durable import clock, schema
from statecache.durable.store import DurableStore

FORGOTTEN_AFTER_MS = 3_600_000
"""How long the row of a flusher that died is kept for whoever looks at the status."""

_flushers = schema.flushers.c
_leases = schema.leases.c


class FlusherRow(msgspec.Struct, frozen=True):
    """A flusher and the partitions that it holds.

    ``place`` tells which processes can see each other's ids (empty: none). ``silent_ms`` is how long ago its last heartbeat
    was, at ``beat_ms``; ``alive`` that this is less than its lease, ``lease_ms``. All by the database's clock. ``redis`` is the
    endpoint of the Redis that it works at; None if it has noted none.
    """

    name: str
    host: str
    pid: int
    place: str
    started_ms: int
    silent_ms: int
    lease_ms: int
    alive: bool
    partitions: tuple[int, ...] = ()
    redis: str | None = None
    beat_ms: int = 0


_BEAT = sa.update(schema.flushers).where(_flushers.name == sa.bindparam("me")).values(beat_ms=clock.Now())
_LOOK = (
    sa.select(
        _flushers.name, _flushers.host, _flushers.pid, _flushers.place, _flushers.started_ms,
        (clock.Now() - _flushers.beat_ms).label("silent_ms"), _flushers.lease_ms, _flushers.redis, _flushers.beat_ms,
        _leases.partition,
    )
    .select_from(schema.flushers.outerjoin(schema.leases, _leases.holder == _flushers.name))
    .order_by(_flushers.name, _leases.partition)
)  # fmt: skip


def beat(store: DurableStore, name: str) -> bool:
    """Show that this flusher is alive; False if nobody knows it (any more): ``join``."""
    return bool(store.database.alone(lambda connection: connection.execute(_BEAT, {"me": name}).rowcount))


def join(
    store: DurableStore, name: str, host: str, pid: int, place: str, lease_ms: int, redis: str | None = None
) -> None:
    """Make a flusher known, and forget those that died long ago. Harmless to repeat."""
    row = {"name": name, "host": host, "pid": pid, "place": place, "lease_ms": lease_ms, "redis": redis}

    def write(connection: sa.Connection) -> None:
        gone = clock.Now() - _flushers.beat_ms > FORGOTTEN_AFTER_MS
        connection.execute(sa.delete(schema.flushers).where(gone | (_flushers.name == name)))
        connection.execute(sa.insert(schema.flushers).values(**row, started_ms=clock.Now(), beat_ms=clock.Now()))

    store.database.alone(write)


def look(store: DurableStore) -> list[FlusherRow]:
    """Return all flushers that are known, the dead too, by name, each with its partitions. One statement."""
    found: dict[str, FlusherRow] = {}
    for name, host, pid, place, started_ms, silent_ms, lease_ms, redis, beat_ms, partition in store.database.read(
        lambda connection: connection.execute(_LOOK).fetchall()
    ):
        before = found[name].partitions if name in found else ()
        found[name] = FlusherRow(
            name, host, pid, place, started_ms, silent_ms, lease_ms, abs(silent_ms) <= lease_ms,
            before if partition is None else (*before, partition), redis, beat_ms,
        )  # fmt: skip
    return list(found.values())


def take(store: DurableStore, name: str, partitions: Sequence[int], dead: Sequence[str]) -> None:
    """Take those of the partitions that nobody holds at this moment, or one of the ``dead``, or one that is not known (any
    more); ``look`` tells which ones that were."""
    free = _leases.holder.in_(["", *dead]) | _leases.holder.not_in(sa.select(_flushers.name))
    statement = (
        sa.update(schema.leases)
        .where(_leases.partition.in_(partitions), free)
        .values(holder=name, since_ms=clock.Now())
    )
    store.database.alone(lambda connection: connection.execute(statement))


def give_back(store: DurableStore, name: str, partitions: Sequence[int]) -> None:
    """Let go of partitions, for whoever has too few."""
    statement = (
        sa.update(schema.leases)
        .where(_leases.partition.in_(partitions), _leases.holder == name)
        .values(holder="", since_ms=clock.Now())
    )
    store.database.alone(lambda connection: connection.execute(statement))


def leave(store: DurableStore, name: str) -> None:
    """Let go of everything and be forgotten: others take over at their next heartbeat."""

    def write(connection: sa.Connection) -> None:
        connection.execute(
            sa.update(schema.leases).where(_leases.holder == name).values(holder="", since_ms=clock.Now())
        )
        connection.execute(sa.delete(schema.flushers).where(_flushers.name == name))

    store.database.alone(write)
