"""Tests for mistakes that no other test would notice."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest

from statecache.core import codec, errors
from statecache.durable import engine, recoveries
from statecache.durable.store import DurableStore
from tests.support import batches, servers, waiting, worlds


@pytest.fixture
def lite(redis_url: str, sqlite_url: str, namespace: str) -> Iterator[worlds.World]:
    with worlds.World(redis_url, sqlite_url, namespace) as world:
        yield world


@pytest.mark.postgres
def test_an_open_recovery_ends_a_flush_that_waits_for_it(
    redis_url: str, postgres_url: str, postgres_server: servers.PostgresServer, namespace: str
) -> None:
    """Recovery has written its epoch and has not committed; a flusher's compare-and-set waits for the row; recovery commits.
    An epoch compared in any other row than the one that is waited for would be the old one, from the statement's snapshot."""
    with worlds.World(redis_url, postgres_url, namespace) as world:
        world.flush()
        world.start(
            "1"
        )  # one partition alone has something: a second row's statement would begin with a newer snapshot
        row = world.durable.identity()
        results: list[Any] = []
        flusher = world.flusher()
        thread = threading.Thread(target=lambda: results.append(flusher.step()))
        with (
            postgres_server.connect(postgres_url.rpartition("/")[2]) as look,
            postgres_server.connect(postgres_url.rpartition("/")[2]) as taking,
        ):
            taking.execute("BEGIN")
            taking.execute("UPDATE statecache_store SET epoch = epoch + 1, owner = 'taker'")
            taking.execute("UPDATE statecache_partitions SET epoch = epoch + 1, owner = 'taker'")
            thread.start()
            waiting.wait_until(
                lambda: look.execute("SELECT 1 FROM pg_locks WHERE NOT granted").fetchone(), "the flusher to wait"
            )
            taking.execute("COMMIT")
            thread.join()
        assert results[0].entries == 0
        assert world.durable.history("order", "1") == []
        assert world.durable.identity().epoch == row.epoch + 1


@pytest.mark.postgres
def test_postgresql_ends_a_transaction_that_stands_still(
    postgres_url: str, postgres_server: servers.PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process stops right after the compare-and-set of several partitions, a statement with many parameter sets: psycopg
    sends those in a way that stops PostgreSQL's idle timer, and the rows would stay locked for ever."""
    monkeypatch.setattr(
        engine,
        "_POSTGRESQL_LIMITS",
        "SET LOCAL idle_in_transaction_session_timeout = '200ms'; SET LOCAL lock_timeout = '5s'",
    )
    log = batches.Log()
    store = DurableStore.connect(postgres_url)
    with contextlib.closing(store), postgres_server.connect(postgres_url.rpartition("/")[2]) as look:
        moves = log.batch(batches.ids(50)).moves
        assert len(moves) > 1

        def stand_still() -> None:
            with store.flush_transaction() as transaction:
                transaction.advance(moves)
                idle = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND state LIKE 'idle in%'"
                waiting.wait_until(lambda: look.execute(idle).fetchone() is None, "the session to be ended")

        for _ in range(5):  # whether the timer stops depends on how the messages happen to arrive
            with pytest.raises(errors.UnavailableError):
                stand_still()
        assert {row.watermark for row in store.partitions()} == {worlds.entry.ZERO}


def test_a_slower_flusher_does_not_set_the_watermark_back(lite: worlds.World) -> None:
    """A has read two entries; B reads five, commits and trims; A's compare-and-set must find another watermark: what it would
    set has been trimmed behind."""
    id = lite.id(0)
    lite.flush()
    lite.start(id, ["note", "note", "note", "note"])
    slow = lite.flusher(batch_entries=2)
    with worlds.before_call(lite.durable, "flush_transaction", lite.flush):
        assert slow.step().entries == 0
    after = lite.watermark(lite.partition_of(id))
    assert str(after) == lite.log(lite.partition_of(id))[-1]
    lite.verify()


def test_an_evicted_instance_comes_back(lite: worlds.World) -> None:
    """In a partition that held everything so far: from the first eviction on a missing hash is a reason to ask SQL."""
    lite.start("1", ["pay"])
    lite.flush()
    assert lite.evict("1") == "OK"
    with pytest.raises(errors.AlreadyExistsError):
        lite.orders.start("1")
    assert lite.evict("1") == "OK"
    assert lite.orders.transition("1", "ship").version == 3


def test_a_flusher_forgets_what_it_folded_before_a_recovery(lite: worlds.World) -> None:
    """A flusher has folded version 2; SQL is restored to version 1, Redis wiped and recovered; version 2 is another one now,
    with other data: what is flushed on top of it is folded onto SQL's, not onto what the flusher remembers."""
    lite.start("1", amount=1)
    lite.flush()
    saved = lite.sql_copy()
    flusher = lite.flusher()
    lite.orders.transition("1", "note", {"first": True})
    flusher.step()
    lite.sql_back(saved)
    lite.wipe()
    lite.cache.recover()
    lite.orders.transition("1", "note", {"second": True})
    lite.flush()
    lite.orders.transition("1", "note", {"third": True})
    while flusher.step().more:
        pass
    flusher.step()
    lite.verify()
    kept = lite.durable.checkpoint("order", "1")
    assert kept is not None
    assert kept.data == '{"amount":1,"second":true,"third":true}'


@pytest.mark.parametrize("table", ["statecache_partitions", "statecache_recoveries"])
def test_the_report_and_the_tails_are_one_transaction(lite: worlds.World, table: str) -> None:
    """One of the two writes fails: neither is there. Else a loss would be counted twice, or never (H18)."""
    row = lite.durable.identity()
    recoveries.take(lite.durable, (row.epoch, row.owner), row.epoch + 1, "me", 1)
    before = lite.sql_dump()
    with lite.durable.database.writer.begin() as connection:
        connection.exec_driver_sql(
            f"CREATE TRIGGER fail BEFORE UPDATE ON {table} WHEN NEW.owner = 'me' AND "
            + ("NEW.tail_seq = 77" if table == "statecache_partitions" else "NEW.report = 'lost'")
            + " BEGIN SELECT RAISE(ABORT, 'fail'); END"
        )
    tails = {0: worlds.entry.EntryId(1, 77), 1: worlds.entry.EntryId(1, 77)}
    with pytest.raises(errors.StateCacheError):
        recoveries.finish(lite.durable, row.epoch + 1, "me", "lost", "wiped", tails, 2)
    assert lite.sql_dump() == before


def test_two_ids_with_one_token(lite: worlds.World) -> None:
    """A ring's token is 48 bits of the id's hash: two ids with the same token are an error, never a swallowed transition."""
    lite.start("1")
    with mock.patch.object(codec, "token_of", return_value="AAAAAAAA"):
        lite.orders.transition("1", "note", transition_id="one")
        with pytest.raises(errors.InvalidDataError, match="choose another one"):
            lite.orders.transition("1", "note", transition_id="two")
    assert lite.orders.get("1").version == 2
