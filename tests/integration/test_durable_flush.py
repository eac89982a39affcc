"""The flush transaction: compare-and-set, plain history, the same rows by every database's own forms."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy as sa

from statecache.core import entry, errors, fold
from statecache.durable import faults, schema
from statecache.durable.rows import Advance
from statecache.durable.store import DurableStore
from tests.support import batches, proxy, servers
from tests.support.batches import Log, flushed, ids, line, write


@pytest.fixture(params=["own forms", "generic forms"])
def store(request: pytest.FixtureRequest, database_url: str) -> Iterator[DurableStore]:
    """Each database with its own forms and with the generic ones."""
    own = request.param == "own forms"
    made = DurableStore.connect(database_url) if own else batches.with_generic_forms(database_url)
    yield made
    made.close()


@pytest.fixture
def plain(database_url: str) -> Iterator[DurableStore]:
    with_own_forms = DurableStore.connect(database_url)
    yield with_own_forms
    with_own_forms.close()


def _contents(store: DurableStore) -> dict[str, list[tuple[Any, ...]]]:
    def ask(connection: sa.Connection) -> dict[str, list[tuple[Any, ...]]]:
        return {
            table.name: [tuple(row) for row in connection.execute(sa.select(table).order_by(*table.primary_key))]
            for table in (schema.partitions, schema.checkpoints, schema.transitions, schema.state_counts)
        }

    return store.database.read(ask)


def test_a_batch_lands_once(store: DurableStore) -> None:
    log = Log()
    flushed(store, log.batch(ids(50)))
    flushed(store, log.batch(ids(30), 3))
    flushed(store, log.batch([*ids(20, "late"), *ids(5)], 2))
    checkpoints = list(store.iterate_checkpoints())
    assert {row.id: row.version for row in checkpoints} == log.versions
    for row in checkpoints:
        history = store.history("order", row.id)
        assert [each.version for each in history] == list(range(1, row.version + 1))
        assert history[-1].to_state == row.state
        assert history[-1].entry_id == str(row.entry_id)
        assert row.final == (row.state == "delivered")
    watermarks = {row.partition: row.watermark for row in store.partitions()}
    assert watermarks == log.watermarks
    by_state: dict[str, int] = {}
    for row in checkpoints:
        by_state[row.state] = by_state.get(row.state, 0) + 1
    assert store.counts("order") == by_state


def test_all_forms_write_the_same(database_url: str, tmp_path: Any) -> None:
    own = DurableStore.connect(database_url)
    generic = batches.with_generic_forms(f"sqlite:///{tmp_path / 'generic.db'}")
    for store in (own, generic):
        log = Log()
        for size, each in ((200, 1), (150, 2), (250, 1)):
            flushed(store, log.batch(ids(size), each))
    assert _contents(own) == _contents(generic)
    own.close()
    generic.close()


def test_a_batch_of_5000(plain: DurableStore) -> None:
    log = Log()
    flushed(plain, log.batch(ids(5000)))
    flushed(plain, log.batch(ids(5000)))
    assert sum(1 for _ in plain.iterate_transitions()) == 10_000
    assert plain.counts("order") == {"paid": 5000}
    found = plain.lookup([("order", id, batches.partition_of(id)) for id in ids(5000)])
    assert {(each.checkpoint.id, each.checkpoint.version) for each in found if each.checkpoint} == {
        (id, 2) for id in ids(5000)
    }


HOSTILE = [
    "'; DROP TABLE statecache_transitions; --",
    "quote \" and quote '",
    "back\\slash \\. \\N \\\\",
    "\\.",
    "%s %(name)s {braces} :colon $1 ?",
    "line\u2028separator\u2029paragraph\u0085next",
    "emoji \U0001f680 \u00fcml\u00e4ut \u65e5\u672c\u8a9e",
    " leading and trailing ",
    "comma,semicolon;tab-less",
    "NULL",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_come_back_as_they_were(store: DurableStore, text: str) -> None:
    patch = '{"note":"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"}'
    parts = {
        "transition_id": text,
        "actor": text,
        "reason": text,
        "patch": patch,
        "unset": "a b",
        "increments": '{"n":1}',
    }
    with store.flush_transaction() as tx:
        tx.insert_history([line(3, 1, text, 1, **parts), line(3, 2, text, 2, **parts, occurred_ms=-5)])
        tx.upsert_checkpoints([], [batches.checkpoint(3, 2, text, 2, data=patch)])
    first, second = store.history("order", text)
    assert (first.id, first.transition_id, first.actor, first.reason) == (text, text, text, text)
    assert first.patch == {"note": text}
    assert (first.unset, first.increments, first.from_state, first.occurred_ms) == (("a", "b"), {"n": 1}, None, None)
    assert (second.from_state, second.occurred_ms, second.covers_from, second.complete) == ("placed", -5, None, True)
    found = store.lookup([("order", text, 3), ("order", text + "x", 3)])
    assert found[0].checkpoint is not None
    assert found[0].checkpoint.data == patch
    assert found[1].checkpoint is None
    assert store.committed([("order", text, None, text)]) == [first]


def test_empty_parts_are_null(store: DurableStore) -> None:
    with store.flush_transaction() as tx:
        tx.insert_history([line(3, 1, "a", 1, patch="")])
    row = store.history("order", "a")[0]
    assert (row.from_state, row.actor, row.reason, row.occurred_ms) == (None, None, None, None)
    assert (row.patch, row.unset, row.increments) == ({}, (), {})


def test_the_checkpoints_may_be_empty_texts(store: DurableStore) -> None:
    *parts, _, _ = batches.checkpoint(3, 1, "a", 1).split("\x1f")
    with store.flush_transaction() as tx:
        tx.upsert_checkpoints(["\x1f".join([*parts, "", ""])], [])
    found = store.checkpoint("order", "a")
    assert found is not None
    assert (found.recent, found.data) == ("", "")


def test_another_flusher_went_ahead(store: DurableStore) -> None:
    """Two flushers read the same entries; the second one's compare-and-set changes no row and nothing of it stays."""
    log = Log()
    batch = log.batch(ids(20))
    flushed(store, batch)
    before = _contents(store)
    with pytest.raises(faults.Overtaken, match="another flusher"):
        flushed(store, batch)
    stale = batch.moves[0]
    for wrong in (
        {"epoch": 9, "old": stale.new},
        {"owner": "x", "old": stale.new},
        {"old": entry.EntryId(0, 10**6)},
        {"partition": 99, "old": stale.new},
    ):
        values = (
            {name: getattr(stale, name) for name in stale.__struct_fields__} | {"new": entry.EntryId(0, 999)} | wrong
        )
        with pytest.raises(faults.Overtaken), store.flush_transaction() as tx:
            tx.advance([Advance(**values)])
    assert _contents(store) == before


def test_one_overtaken_partition_stops_all(store: DurableStore) -> None:
    log = Log()
    flushed(store, log.batch(ids(20)))
    batch = log.batch(ids(20))
    flushed(store, batch._replace(moves=batch.moves[:1], lines=[], changed=[], new=[], deltas={}))
    before = _contents(store)
    with pytest.raises(faults.Overtaken, match=f"1 of {len(batch.moves)} partitions"):
        flushed(store, batch)
    assert _contents(store) == before


def test_two_flushers_at_once(plain: DurableStore) -> None:
    """The second one's compare-and-set waits for the first one's transaction, then finds its row changed."""
    batch = Log().batch(ids(20))
    advanced, may_commit = threading.Event(), threading.Event()

    def first() -> None:
        with plain.flush_transaction() as tx:
            write(tx, batch)
            advanced.set()
            assert may_commit.wait(30)

    def second() -> None:
        assert advanced.wait(30)
        threading.Timer(0.1, may_commit.set).start()
        flushed(plain, batch)

    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(first)
        with pytest.raises(faults.Overtaken):
            pool.submit(second).result()
        running.result()
    assert sum(1 for _ in plain.iterate_transitions()) == 20


def test_history_is_never_written_twice(store: DurableStore) -> None:
    """An entry that is there already is an alarm, and nothing of its transaction stays."""
    with store.flush_transaction() as tx:
        tx.insert_history([line(3, 1, "a", 1)])
    with pytest.raises(faults.KeyHit) as hit, store.flush_transaction() as tx:
        tx.insert_history([line(3, 2, "b", 1), line(3, 3, "a", 1, transition_id="fork")])
    assert isinstance(hit.value, errors.IntegrityError)
    assert [row.transition_id for row in store.iterate_transitions()] == ["t-a-1"]


def test_a_checkpoint_known_as_new_is_there(store: DurableStore) -> None:
    kept = batches.checkpoint(3, 1, "a", 1)
    with store.flush_transaction() as tx:
        tx.upsert_checkpoints([], [kept])
    with pytest.raises(faults.KeyHit), store.flush_transaction() as tx:
        tx.upsert_checkpoints([], [kept])


def test_a_checkpoint_with_a_separator_in_a_part_is_refused(store: DurableStore) -> None:
    """None that statecache makes has one; the columns behind it would each get what is its neighbour's."""
    with pytest.raises(errors.StateCacheError), store.flush_transaction() as tx:
        tx.upsert_checkpoints([batches.checkpoint(3, 1, "a\x1fb", 1)])
    assert store.checkpoint("order", "a") is None


def test_the_numbers_of_a_checkpoint_are_compared_as_numbers(store: DurableStore) -> None:
    with store.flush_transaction() as tx:
        assert tx.upsert_checkpoints([batches.checkpoint(3, 9, "a", 9)]) == 1
    with store.flush_transaction() as tx:
        assert tx.upsert_checkpoints([batches.checkpoint(3, 10, "a", 10)]) == 1
    with store.flush_transaction() as tx:
        assert tx.upsert_checkpoints([batches.checkpoint(3, 9, "a", 9)]) == 0
    found = store.checkpoint("order", "a")
    assert found is not None
    assert (found.version, found.entry_id, found.partition, found.final) == (10, entry.EntryId(0, 10), 3, False)


def test_checkpoints_only_go_forward(store: DurableStore) -> None:
    with store.flush_transaction() as tx:
        assert tx.upsert_checkpoints([batches.checkpoint(3, 5, "a", 3), batches.checkpoint(3, 6, "b", 3)]) == 2
    with store.flush_transaction() as tx:
        lines = [
            batches.checkpoint(3, 9, "c", 1),
            batches.checkpoint(3, 7, "b", 4),
            batches.checkpoint(3, 1, "a", 2),
        ]
        assert tx.upsert_checkpoints(lines) == 2
    found = store.checkpoints([("order", "a"), ("order", "b"), ("order", "c"), ("order", "d")])
    assert {id: row.version for (_, id), row in found.items()} == {"a": 3, "b": 4, "c": 1}
    assert found["order", "b"].state == "delivered"
    assert found["order", "b"].final


@pytest.mark.postgres
@pytest.mark.parametrize(
    "parts",
    [{"actor": "nul\x00"}, {"reason": "half \ud800"}, {"occurred_ms": 2**63}, {"to_state": ""}, {"at_ms": "soon"}],
    ids=["nul", "surrogate", "number", "missing", "no number"],
)
def test_postgresql_refuses_data(postgres_url: str, parts: dict[str, object]) -> None:
    store = DurableStore.connect(postgres_url)
    with pytest.raises(faults.Refused) as refused, store.flush_transaction() as tx:
        tx.insert_history([line(3, 1, "good", 1), line(3, 2, "bad", 1, **parts)])
    assert "soon" not in str(refused.value)
    assert not list(store.iterate_transitions())
    store.close()


@pytest.mark.postgres
def test_lines_that_copy_would_join_are_refused(postgres_url: str) -> None:
    """An open quote in one line, closed in a later one: one row of three lines, and nobody would miss the others."""
    store = DurableStore.connect(postgres_url)
    lines = [line(0, 1, "a", 1, actor="\x1e"), line(0, 2, "b", 1), line(0, 3, "c", 1, actor="\x1e")]
    with pytest.raises(faults.Refused, match="made 1 rows of 3 lines"), store.flush_transaction() as tx:
        tx.insert_history(lines)
    assert not list(store.iterate_transitions())
    store.close()


@pytest.mark.parametrize("parts", [{"reason": "half \ud800"}, {"to_state": ""}], ids=["surrogate", "missing"])
def test_sqlite_refuses_data(sqlite_url: str, parts: dict[str, object]) -> None:
    store = DurableStore.connect(sqlite_url)
    with pytest.raises(faults.Refused), store.flush_transaction() as tx:
        tx.insert_history([line(3, 1, "good", 1), line(3, 2, "bad", 1, **parts)])
    assert not list(store.iterate_transitions())
    store.close()


def test_a_swallowed_error_cannot_pass_for_a_commit(store: DurableStore) -> None:
    """PostgreSQL answers the COMMIT of a failed transaction with a silent ROLLBACK."""
    with store.flush_transaction() as tx:
        tx.insert_history([line(3, 1, "a", 1)])

    def swallow() -> None:
        with store.flush_transaction() as tx:
            tx.insert_history([line(3, 2, "b", 1)])
            with pytest.raises(faults.KeyHit):
                tx.insert_history([line(3, 1, "a", 1)])
            with pytest.raises(errors.StateCacheError, match="has failed"):
                tx.adjust_counts({(3, "order", "paid"): 1})

    with pytest.raises(errors.StateCacheError, match="rolled back"):
        swallow()
    assert [row.id for row in store.iterate_transitions()] == ["a"]


def test_an_error_of_the_caller_rolls_back(store: DurableStore) -> None:
    def fail() -> None:
        with store.flush_transaction() as tx:
            write(tx, Log().batch(ids(3)))
            raise LookupError("a mistake of the caller")

    with pytest.raises(LookupError):
        fail()
    assert not list(store.iterate_transitions())
    flushed(store, Log().batch(ids(3)))


def test_counts(store: DurableStore) -> None:
    for deltas in ({(1, "order", "paid"): 5, (2, "order", "paid"): 2, (1, "order", "placed"): 1, (1, "job", "new"): 9},
                   {(2, "order", "paid"): -1, (1, "order", "placed"): -1, (2, "order", "shipped"): 0}):  # fmt: skip
        with store.flush_transaction() as tx:
            tx.adjust_counts(deltas)
    assert store.counts("order") == {"paid": 6}
    assert store.counts("job") == {"new": 9}
    assert store.counts("none") == {}


def test_letters_park_an_instance(store: DurableStore) -> None:
    rows = [(3, 0, seq, "order", "a", version, "pay", "placed", "paid", 5, f"t{version}", None, "why\x00\ud800", None,
             "{}", None, None, 1) for seq, version in ((8, 2), (9, 3))]  # fmt: skip
    with store.flush_transaction() as tx:
        assert tx.parked([("order", "a"), ("order", "b")]) == set()
        tx.insert_letters(rows[:1], "refused for its \x00 data", False, 77)
        tx.insert_letters(rows[1:], "", True, 77)
    with store.flush_transaction() as tx:
        assert tx.parked([("order", "a"), ("order", "b")]) == {("order", "a")}
    first, second = store.letters("order", "a")
    assert (first.entry.version, first.waiting, first.partition, first.noted_ms) == (2, False, 3, 77)
    assert (first.entry.reason, first.entry.actor, first.entry.occurred_ms) == ("why\ufffd?", "", "")
    assert (second.entry.entry_id, second.waiting) == (entry.EntryId(0, 9), True)
    assert store.parked_instances() == [("order", "a")]
    assert len(store.lookup([("order", "a", 3)])[0].letters) == 2
    with store.flush_transaction() as tx:
        assert [row[5] for row in tx.take_letters("order", "a")] == [2, 3]
    assert store.letters("order", "a") == []


def test_letters_under_entry_ids_are_written_once(store: DurableStore) -> None:
    """The same log may be read again, by a flusher or by a recovery. Letters of an instance of ours are told apart by their
    versions, and one too many is an error."""
    foreign = [fold.entry_row(3, entry.foreign(3, entry.EntryId(1, seq), "?")) for seq in (5, 6)]
    own = (3, 1, 7, "order", "a", 2, "pay", "placed", "paid", 5, "t", None, None, None, None, None, None, 1)
    for rows in (foreign[:1], foreign, [*foreign, own]):
        with store.flush_transaction() as tx:
            tx.insert_letters(rows, "not ours", False, 77)
    assert store.parked_instances() == [(entry.FOREIGN, "3:1-5"), (entry.FOREIGN, "3:1-6"), ("order", "a")]
    with pytest.raises(faults.KeyHit), store.flush_transaction() as tx:
        tx.insert_letters([own], "again", False, 77)


def test_many_parked_instances(plain: DurableStore) -> None:
    """Above a thousand they are asked for by key instead of being read all."""
    rows = [(3, 0, seq, "order", id, 1, "@start", None, "paid", 5, "t", None, None, None, None, None, None, 1)
            for seq, id in enumerate(ids(1500))]  # fmt: skip
    with plain.flush_transaction() as tx:
        tx.insert_letters(rows, "refused", False, 77)
    with plain.flush_transaction() as tx:
        assert tx.parked([("order", "i01499"), ("order", "nobody"), ("job", "i00001")]) == {("order", "i01499")}
        assert tx.parked([("order", "nobody")]) == set()


def test_holding_a_partition(store: DurableStore) -> None:
    with store.flush_transaction() as tx:
        tx.hold(3, 0, "")
    with pytest.raises(faults.Overtaken), store.flush_transaction() as tx:
        tx.hold(3, 1, "")


@pytest.mark.postgres
@pytest.mark.parametrize("committed", [True, False])
def test_the_answer_to_commit_is_lost(
    postgres_server: servers.PostgresServer, postgres_url: str, committed: bool
) -> None:
    """The connection dies after COMMIT was sent: the caller is told that it does not know, and reads the watermark."""
    with proxy.Proxy(postgres_server.port) as between:
        store = DurableStore.connect(between.url(postgres_url))
        batch = Log().batch(ids(5))
        if committed:
            between.drop_replies_after_forwarding(matching=b"COMMIT\x00")
        else:
            between.cut_before_forwarding(matching=b"COMMIT\x00")
        with pytest.raises(faults.CommitUnknown) as unknown:
            flushed(store, batch)
        assert unknown.value.__cause__ is not None
        assert between.faults_done == 1
        moved = store.partitions([batch.moves[0].partition])[0].watermark == batch.moves[0].new
        assert moved is committed
        assert bool(list(store.iterate_transitions())) is committed
        store.close()


@pytest.mark.postgres
def test_sql_goes_away_in_the_middle(private_postgres: servers.PostgresServer) -> None:
    store = DurableStore.connect(private_postgres.url())
    log = Log()
    flushed(store, log.batch(ids(5)))
    batch = log.batch(ids(5))

    def die_between() -> None:
        with store.flush_transaction() as tx:
            tx.advance(batch.moves)
            private_postgres.kill()
            tx.insert_history(batch.lines)

    with pytest.raises(errors.UnavailableError) as away:
        die_between()
    assert not isinstance(away.value, faults.CommitUnknown)
    with pytest.raises(errors.UnavailableError):
        store.identity()
    private_postgres.start()
    assert store.identity().epoch == 0
    flushed(store, batch)
    assert sum(1 for _ in store.iterate_transitions()) == 10
    store.close()


def test_sqlite_waits_for_its_turn_and_then_gives_up(sqlite_url: str) -> None:
    store = DurableStore.connect(sqlite_url)

    @sa.event.listens_for(store.database.engine, "checkout")
    def hurry(connection: Any, *_: object) -> None:
        connection.execute("PRAGMA busy_timeout = 20")

    with store.flush_transaction() as tx:
        tx.hold(3, 0, "")
        with pytest.raises(faults.Transient), store.flush_transaction():
            pass
    store.close()
