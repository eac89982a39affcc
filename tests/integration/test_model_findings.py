"""Interleavings that the model of the protocol found beyond H1-H18 (``tests/model``), forced on real servers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from statecache.engine import letters, recovery
from tests.support import refusing
from tests.support.worlds import World, before_call


@pytest.fixture
def world(redis_url: str, sqlite_url: str, namespace: str) -> Iterator[World]:
    with World(redis_url, sqlite_url, namespace) as found:
        yield found


def test_a_mark_shows_that_sql_went_back_behind_a_lost_tail(world: World) -> None:
    """F8. SQL has v2; Redis loses v2; a recovery (tail lost) writes its mark; the instance is hydrated at v2; SQL is restored
    to v1. The mark, whose ``prev`` were the log's own last id, would follow SQL's watermark: *intact*, with hash v2 over
    SQL's v1, and v3 would land behind a gap. Its ``prev`` is SQL's watermark of then: *SQL behind*, one row stands for v2."""
    id = world.id()
    world.start(id)
    world.flush()
    older_redis, older_sql = world.redis_copy(), world.sql_copy()
    world.orders.transition(id, "pay")
    world.flush()
    world.redis_back(older_redis)
    world.cache.recover()
    assert world.orders.transition(id, "ship").version == 3
    world.sql_back(older_sql)
    report = world.cache.recover()
    assert recovery.SQL_BEHIND in report.kinds
    world.flush_through()
    world.verify()
    assert world.orders.get(id).version == 3


def test_a_discarded_entry_at_the_watermark_is_known(world: World) -> None:
    """F9, first half. The log's entry at the watermark was discarded by an operator: SQL holds it no more, and yet nothing has
    diverged."""
    id = world.id()
    world.start(id)
    world.flush()
    refusing.refuse(world.durable)
    world.orders.transition(id, "pay", reason=refusing.REASON)
    world.flush()
    refusing.accept(world.durable)
    assert letters.discard(world.cache, "order", id) == 1
    world.disown()
    report = world.cache.recover()
    assert set(report.kinds) == {recovery.INTACT}
    assert world.orders.transition(id, "pay").version == 2
    world.flush_through()
    world.verify()


def test_a_discarded_version_does_not_come_back_with_an_older_redis(world: World) -> None:
    """F9, second half. Redis is copied while the hash still holds v2; v2 becomes a letter and is discarded; the copy comes
    back. The class is *intact*, but that hash must go: v3 behind SQL's v1 would be a gap."""
    id = world.id()
    world.start(id)
    world.flush()
    refusing.refuse(world.durable)
    world.orders.transition(id, "pay", reason=refusing.REASON)
    older_redis = world.redis_copy()
    world.flush()
    refusing.accept(world.durable)
    letters.discard(world.cache, "order", id)
    world.redis_back(older_redis)
    world.cache.recover()
    assert world.orders.get(id).version == 1
    assert world.orders.transition(id, "pay").version == 2
    world.flush_through()
    world.verify()


def test_a_trim_goes_under_the_epoch_of_the_commit(world: World) -> None:
    """F1. A flusher has committed v2. Before it trims, SQL is restored to v1, a recovery ends, and another thread of the same
    process is admitted to the new epoch: the process's stamp is new, what the flusher knows is old. Its trim must be refused,
    or the log's only copy of v2 is gone."""
    id = world.id()
    partition = world.partition_of(id)
    world.start(id)
    world.flush()
    older_sql = world.sql_copy()
    world.orders.transition(id, "pay")

    def restore_and_be_admitted() -> None:
        world.sql_back(older_sql)
        world.cache.recover()
        world.orders.transition(id, "note")

    with before_call(world.hot, "flushed", restore_and_be_admitted):
        world.cache.flusher.step()
    assert any(line.endswith("-2") or "-2" in line for line in world.log(partition)), "v2's entry was trimmed"
    world.flush_through()
    world.verify()
    assert world.versions(id) == [1, 2, 3]
