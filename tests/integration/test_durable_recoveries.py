"""Recovery's SQL: it waits for open flushes and ends them (H1), steps of an older one are refused, what lies above an id."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa

from statecache.core import entry, errors
from statecache.durable import engine, faults, recoveries, schema
from statecache.durable.rows import Advance
from statecache.durable.store import DurableStore
from tests.support import batches, proxy, servers
from tests.support.batches import Log, flushed, ids, write
from tests.support.waiting import wait_until


@pytest.fixture
def store(database_url: str) -> Iterator[DurableStore]:
    made = DurableStore.connect(database_url)
    yield made
    made.close()


def test_taking(store: DurableStore) -> None:
    recoveries.take(store, (0, ""), 3, "me", 99)
    assert (store.identity().epoch, store.identity().owner) == (3, "me")
    assert {(row.epoch, row.owner) for row in store.partitions()} == {(3, "me")}
    found = recoveries.recovery(store, 3, "me")
    assert found is not None
    assert (found.started_ms, found.heartbeat_ms, found.finished_ms, found.report) == (99, 99, None, "")
    assert recoveries.recovery(store, 3, "other") is None


@pytest.mark.parametrize("stale", [(0, ""), (3, "other"), (2, "me")])
def test_the_older_of_two_recoverers(store: DurableStore, stale: tuple[int, str]) -> None:
    """Both read the same pair; the second one's compare-and-set fails and changes nothing."""
    recoveries.take(store, (0, ""), 3, "me", 99)
    with pytest.raises(faults.Superseded):
        recoveries.take(store, stale, 4, "late", 99)
    assert (store.identity().epoch, store.identity().owner) == (3, "me")
    assert {(row.epoch, row.owner) for row in store.partitions()} == {(3, "me")}
    assert [row.owner for row in recoveries.recoveries(store)] == ["me"]
    with pytest.raises(ValueError, match="not above"):
        recoveries.take(store, (3, "me"), 3, "again", 99)


@pytest.mark.postgres
def test_a_flush_that_stands_still_in_the_midst_of_a_copy(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PostgreSQL looks at no limit while a COPY waits for its client: whoever waits for its locks in vain ends it, but not
    before it has stood for as long as an idle one may."""
    limits = "SET LOCAL lock_timeout = '500ms'; SET LOCAL idle_in_transaction_session_timeout = '300ms'"
    monkeypatch.setattr(engine, "_POSTGRESQL_LIMITS", limits)
    log = Log()
    frozen, other = DurableStore.connect(postgres_url), DurableStore.connect(postgres_url)
    batch, stands, goes_on = log.batch(["a"]), threading.Event(), threading.Event()

    def stand_still() -> None:
        stands.set()
        goes_on.wait(60)

    def flush() -> None:
        with frozen.flush_transaction() as transaction:
            transaction.advance(batch.moves)
            transaction.insert_history(batch.lines, meanwhile=stand_still)

    with contextlib.closing(frozen), contextlib.closing(other), ThreadPoolExecutor(1) as pool:
        flushing = pool.submit(flush)
        try:
            assert stands.wait(60)
            with pytest.raises(faults.Transient):  # it stands for half a second or one: that may be slowness
                flushed(other, batch)
            with pytest.raises(faults.Transient):
                recoveries.take(other, (0, ""), 1, "early", 5)
            monkeypatch.setattr(engine, "FROZEN_SECONDS", 0.1)
            with pytest.raises(faults.Transient):  # ended now, and the next one gets in
                flushed(other, batch)
            flushed(other, batch)
        finally:
            goes_on.set()
        with pytest.raises(errors.UnavailableError):
            flushing.result(60)
        assert [each.version for each in other.history("order", "a")] == [1]


@pytest.mark.postgres
def test_taking_from_one_that_stands_still_in_the_midst_of_a_copy(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No second call of the operator's is needed."""
    monkeypatch.setattr(engine, "_POSTGRESQL_LIMITS", "SET LOCAL lock_timeout = '500ms'")
    monkeypatch.setattr(engine, "FROZEN_SECONDS", 0.1)
    frozen, other = DurableStore.connect(postgres_url), DurableStore.connect(postgres_url)
    batch = Log().batch(["a"])

    def flush() -> None:
        with frozen.flush_transaction() as transaction:
            transaction.advance(batch.moves)
            transaction.insert_history(batch.lines, meanwhile=lambda: recoveries.take(other, (0, ""), 1, "new", 5))

    with contextlib.closing(frozen), contextlib.closing(other):
        with pytest.raises(errors.UnavailableError):
            flush()
        assert other.identity().owner == "new"
        assert other.history("order", "a") == []


def test_steps_of_an_older_recovery_are_refused(store: DurableStore) -> None:
    flushed(store, Log().batch(["a"]))
    partition = batches.partition_of("a")
    recoveries.take(store, (0, ""), 1, "old", 5)
    recoveries.heartbeat(store, 1, "old", 6)
    recoveries.take(store, (1, "old"), 2, "new", 7)
    move = Advance(partition, 1, "old", entry.EntryId(0, 1), entry.EntryId(0, 9), entry.ZERO, 5)
    for step in (
        lambda: recoveries.heartbeat(store, 1, "old", 8),
        lambda: recoveries.finish(store, 1, "old", "{}", "intact", {partition: entry.ZERO}, 8),
        lambda: recoveries.reconcile(store, move, [], [], [], {}),
    ):
        with pytest.raises(faults.Superseded):
            step()
    old = recoveries.recovery(store, 1, "old")
    assert old is not None
    assert (old.heartbeat_ms, old.finished_ms) == (6, None)
    assert store.partitions([partition])[0].watermark == entry.EntryId(0, 1)


def test_finishing_resets_the_tails_with_the_report(store: DurableStore) -> None:
    log = Log()
    flushed(store, log.batch(ids(20)))
    recoveries.take(store, (0, ""), 1, "me", 5)
    tails = {number: entry.EntryId(1, 0) for number in range(16)}
    for _ in range(2):  # an ambiguous commit may be repeated
        recoveries.finish(store, 1, "me", '{"lost": 3}', "tail_lost", tails, 8)
    found = recoveries.recovery(store, 1, "me")
    assert found is not None
    assert (found.finished_ms, found.classes, found.report) == (8, "tail_lost", '{"lost": 3}')
    assert {(row.tail, row.tail_seen_ms) for row in store.partitions()} == {(entry.EntryId(1, 0), 8)}
    assert {row.partition: row.watermark for row in store.partitions()} == log.watermarks


def test_taking_waits_for_an_open_flush_and_ends_the_next(store: DurableStore) -> None:
    """Hole H1: flusher advances the watermark (epoch 0) - recovery takes epoch 1 - flusher commits. With the epoch in the
    store's row alone the recovery would not wait and the flusher's rows of epoch 0 would land behind it. It must wait, see
    the flushed watermark, and the same flusher's next transaction must change no row."""
    log = Log()
    batch, following = log.batch(ids(20)), log.batch(ids(20))
    advanced, may_commit, taken = threading.Event(), threading.Event(), threading.Event()

    def flush() -> None:
        with store.flush_transaction() as tx:
            tx.advance(batch.moves)
            advanced.set()
            assert may_commit.wait(30)
            assert not taken.is_set()
            tx.insert_history(batch.lines)
            tx.upsert_checkpoints([], batch.new)

    def take() -> list[entry.EntryId]:
        assert advanced.wait(30)
        recoveries.take(store, (0, ""), 1, "me", 5)
        taken.set()
        return [row.watermark for row in store.partitions()]

    with ThreadPoolExecutor(2) as pool:
        flushing, taking = pool.submit(flush), pool.submit(take)
        assert advanced.wait(30)
        if store.database.dialect.name == "postgresql":
            asked = sa.text("SELECT count(*) FROM pg_locks WHERE NOT granted")
            wait_until(
                lambda: store.database.read(lambda c: c.execute(asked).scalar()), "the recovery waits for a lock"
            )
        may_commit.set()
        flushing.result()
        assert taking.result() == _first_watermarks(batch)
    with pytest.raises(faults.Overtaken):
        flushed(store, following)
    assert sum(1 for _ in store.iterate_transitions()) == 20


def _first_watermarks(batch: batches.Batch) -> list[entry.EntryId]:
    reached = {move.partition: move.new for move in batch.moves}
    return [reached.get(number, entry.ZERO) for number in range(16)]


@pytest.mark.postgres
def test_the_answer_to_taking_is_lost(postgres_server: servers.PostgresServer, postgres_url: str) -> None:
    with proxy.Proxy(postgres_server.port) as between:
        store = DurableStore.connect(between.url(postgres_url))
        between.drop_replies_after_forwarding(matching=b"COMMIT\x00")
        with pytest.raises(faults.CommitUnknown):
            recoveries.take(store, (0, ""), 1, "me", 5)
        assert (store.identity().epoch, store.identity().owner) == (1, "me")
        store.close()


@pytest.mark.postgres
def test_a_role_that_does_not_own_the_tables_may_recover(
    postgres_server: servers.PostgresServer, postgres_url: str
) -> None:
    """Only the owner may bring the entry index up to date; without that the look-ups are slower, not wrong."""
    DurableStore.connect(postgres_url).close()
    name = postgres_url.rsplit("/", 1)[1]
    with postgres_server.connect(name) as connection:
        connection.execute("CREATE ROLE worker LOGIN PASSWORD 'worker'")
        connection.execute("GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO worker")
        connection.execute(f'GRANT TEMPORARY ON DATABASE "{name}" TO worker')
    user = postgres_url.split("//")[1].split("@")[0]
    store = DurableStore.connect(postgres_url.replace(user, "worker:worker"))
    log = Log()
    flushed(store, log.batch(ids(20)))
    flushed(store, log.batch(ids(20)))
    recoveries.take(store, (0, ""), 1, "me", 5)
    recoveries.complete_index(store)
    assert (
        sum(len(page) for number in range(16) for page in recoveries.instances_above(store, number, entry.ZERO)) == 20
    )
    store.close()
    with postgres_server.connect(name) as connection:
        connection.execute("DROP OWNED BY worker")
        connection.execute("DROP ROLE worker")


def test_what_lies_above_an_entry(store: DurableStore) -> None:
    """By way of history, it finds exactly the instances whose checkpoint or letter is above, over epochs too."""
    log = Log()
    rng = random.Random(7)
    for epoch in (1, 2):
        recoveries.take(store, (store.identity().epoch, store.identity().owner), epoch, f"owner{epoch}", 5)
        log.epoch, log.owner = epoch, f"owner{epoch}"
        flushed(store, log.batch(ids(120)))
        for _ in range(10):
            flushed(store, log.batch(sorted(rng.sample(ids(120), 20))))
    partition = 5
    aside = [(partition, 2, seq, "order", f"letter{seq}", 1, "pay", None, "paid", 5, "t", None, None, None, None, None, None,
              1) for seq in (3, 10**6)]  # fmt: skip
    with store.flush_transaction() as tx:
        tx.insert_letters(aside, "refused", False, 5)
    checkpoints = [row for row in store.iterate_checkpoints() if row.partition == partition]
    highest = max(row.entry_id for row in checkpoints)
    for bound in (entry.ZERO, entry.EntryId(1, 5), entry.EntryId(1, 10**6), entry.EntryId(2, 3), highest,
                  entry.EntryId(3, 0)):  # fmt: skip
        pages = list(recoveries.instances_above(store, partition, bound, page=4))
        assert all(0 < len(page) <= 4 for page in pages)
        found = [row for page in pages for row in page]
        expected = {(row.id, row.version, row.entry_id) for row in checkpoints if row.entry_id > bound}
        expected |= {(row[4], 1, id) for row in aside if (id := entry.EntryId(row[1], row[2])) > bound}
        assert {(row.id, row.version, row.entry_id) for row in found} == expected
        assert len(found) == len(expected)


def test_leaving_a_stream_early_gives_its_connection_back(store: DurableStore) -> None:
    log = Log()
    flushed(store, log.batch(ids(200)))
    partition = batches.partition_of(ids(1)[0])
    for _ in range(30):  # more often than there are connections
        pages = recoveries.instances_above(store, partition, entry.ZERO, page=1)
        assert next(pages)
        flushed(store, log.batch(ids(3)))
        pages.close()


def test_reconciling_is_one_transaction(store: DurableStore) -> None:
    """Watermark and rows move together (hole H6 c): a failure in the last statement leaves nothing of it."""
    log = Log()
    flushed(store, log.batch(["a"]))
    partition = batches.partition_of("a")
    recoveries.take(store, (0, ""), 1, "me", 5)
    move = Advance(partition, 1, "me", entry.EntryId(0, 1), entry.EntryId(0, 40), entry.EntryId(0, 50), 9)
    reconciled = (partition, 0, 40, "order", "a", 6, entry.EVENT_RECONCILED, None, "paid", 5, "r", None, None, None, "{}",
                  None, None, 1, 2, True)  # fmt: skip
    kept = batches.checkpoint(partition, 40, "a", 6)
    letter = (partition, 0, 41, "order", "b", 1, "pay", None, "paid", 5, "t", None, None, None, None, None, None, 1)
    deltas = {(partition, "order", "placed"): -1, (partition, "order", "paid"): 1}

    with pytest.raises(faults.KeyHit):
        recoveries.reconcile(store, move, [reconciled], [kept], [letter, letter], deltas, error="e", now_ms=5)
    assert store.partitions([partition])[0].watermark == entry.EntryId(0, 1)
    assert len(store.history("order", "a")) == 1

    recoveries.reconcile(store, move, [reconciled], [kept], [letter], deltas, error="diverged", now_ms=5)
    row = store.partitions([partition])[0]
    assert (row.watermark, row.tail, row.tail_seen_ms) == (entry.EntryId(0, 40), entry.EntryId(0, 50), 9)
    assert [(each.version, each.covers_from) for each in store.history("order", "a")] == [(1, None), (6, 2)]
    assert store.checkpoint("order", "a").version == 6  # type: ignore[union-attr]
    assert [each.error for each in store.letters("order", "b")] == ["diverged"]
    assert store.counts("order") == {"paid": 1}
    with pytest.raises(faults.Superseded):
        recoveries.reconcile(store, move, [], [], [], {})


def test_a_partition_row_that_went_astray_is_taken_too(store: DurableStore) -> None:
    """Whatever pair a partition row has (an SQL restored by hand), a recovery makes all rows one again."""
    with store.database.transaction() as connection:
        connection.execute(sa.update(schema.partitions).where(schema.partitions.c.partition == 3).values(owner="stray"))
    recoveries.take(store, (0, ""), 1, "me", 5)
    assert {(row.epoch, row.owner) for row in store.partitions()} == {(1, "me")}


def test_a_flusher_of_the_new_epoch_goes_on(store: DurableStore) -> None:
    log = Log()
    flushed(store, log.batch(ids(5)))
    recoveries.take(store, (0, ""), 1, "me", 5)
    log.owner, log.epoch = "me", 1
    with store.flush_transaction() as tx:
        write(tx, log.batch(ids(5)))
    assert store.counts("order") == {"paid": 5}
