"""Tests for mistakes that no other test would notice."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest

from statecache.core import codec, errors
from statecache.durable import recoveries
from tests.support import servers, waiting, worlds


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
        world.start("1")
        before = world.durable.history("order", "1")
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
        assert world.durable.history("order", "1") == before == []
        assert world.durable.identity().epoch == row.epoch + 1


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
