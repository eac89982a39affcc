"""What SQL is asked: look-ups in one snapshot, history, searches, pages; and connections that died meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pytest
import sqlalchemy as sa

from statecache.core import codec, entry, errors, model, spec
from statecache.durable.rows import Advance, Idle
from statecache.durable.store import DurableStore
from tests.support import batches, plans, proxy, servers
from tests.support.batches import NOW_MS, Log, flushed, ids, partition_of
from tests.support.interruptions import Interrupt, JobTimeoutError, interrupted_when
from tests.support.worlds import Order


@pytest.fixture
def store(database_url: str) -> Iterator[DurableStore]:
    made = DurableStore.connect(database_url)
    yield made
    made.close()


def _statements(store: DurableStore) -> list[str]:
    """A list that grows by every statement the store sends."""
    seen: list[str] = []

    @sa.event.listens_for(store.database.engine, "before_cursor_execute")
    def note(_connection: Any, _cursor: Any, statement: str, *_: object) -> None:
        seen.append(statement)

    return seen


def _with_letters(store: DurableStore, id: str, versions: range) -> None:
    rows = [(partition_of(id), 0, 100 + version, "order", id, version, "pay", "placed", "paid", 5, f"letter-{version}",
             None, None, None, None, None, None, 1) for version in versions]  # fmt: skip
    with store.flush_transaction() as tx:
        tx.insert_letters(rows, "refused", False, 77)


@pytest.mark.parametrize("size", [1, 3, 3000])
def test_a_look_up_is_one_statement(store: DurableStore, size: int) -> None:
    """Hole H9: watermark, checkpoint and letters read one after the other would come from different moments. One
    statement is one snapshot, under READ COMMITTED and in SQLite."""
    flushed(store, Log().batch(ids(10)))
    seen = _statements(store)
    with plans.prepared(lambda _connection, statement, _values: seen.append(statement)):
        assert len(store.lookup([("order", id, partition_of(id)) for id in ids(size)])) == size
    assert len([statement for statement in seen if "BEGIN" not in statement]) == 1


@pytest.mark.parametrize("generic", [False, True])
@pytest.mark.parametrize("alone", [False, True])
def test_look_ups(database_url: str, generic: bool, alone: bool) -> None:
    store = batches.with_generic_forms(database_url) if generic else DurableStore.connect(database_url)
    log = Log()
    flushed(store, log.batch(["a", "b"], 3))
    _with_letters(store, "b", range(4, 7))
    _with_letters(store, "unborn", range(1, 2))
    asked = [("order", id, partition_of(id)) for id in ("unborn", "b", "nobody", "a", "b")]
    asked += [("job", "a", partition_of("a")), ("order", "a", 99)]
    found = [store.lookup([each])[0] for each in asked] if alone else store.lookup(asked)
    unborn, b, nobody, a, again, job, nowhere = found
    assert b == again
    assert a == model.Lookup(
        log.watermarks[partition_of("a")],
        model.Checkpoint(
            "order", "a", partition_of("a"), "shipped", 3, log.watermarks[partition_of("a")], NOW_MS, NOW_MS + 3, 1, False,
            "".join(codec.token_of(f"t-a-{version}") for version in (1, 2, 3)), batches.PATCH,
        ),
        (),
    )  # fmt: skip
    assert b.checkpoint is not None
    assert b.letters == tuple(codec.token_of(f"letter-{version}") for version in (4, 5, 6))
    assert unborn == model.Lookup(log.watermarks[partition_of("unborn")], None, (codec.token_of("letter-1"),))
    assert nobody == model.Lookup(log.watermarks[partition_of("nobody")], None, ())
    assert job.checkpoint is None
    assert nowhere.watermark == entry.ZERO
    assert store.lookup([]) == []
    store.close()


def test_where_receipts_stand(store: DurableStore) -> None:
    """One statement tells durable, parked and lost apart (hole H11)."""
    log = Log()
    flushed(store, log.batch(["a"], 2))
    _with_letters(store, "a", range(3, 4))
    partition = partition_of("a")
    seen = _statements(store)
    durable, parked, lost, other = store.standing([("order", "a", version, partition) for version in (2, 3, 4)] + [
        ("order", "zzz", 1, (partition + 1) % 16)
    ])  # fmt: skip
    assert len([statement for statement in seen if "BEGIN" not in statement]) == 1
    assert (durable.transition_id, durable.entry_id, durable.letter_id) == ("t-a-2", entry.EntryId(0, 2), None)
    assert (parked.transition_id, parked.entry_id, parked.letter_id) == (None, None, "letter-3")
    assert (lost.transition_id, lost.letter_id, lost.watermark) == (None, None, entry.EntryId(0, 2))
    assert other.watermark == entry.ZERO
    assert store.standing([("order", "a", 2, partition)]) == [durable]


def test_history_with_letters_behind_it(store: DurableStore) -> None:
    """One statement while there are none, which is one snapshot; else letters first: what leaves them is in history then."""
    flushed(store, Log().batch(["a", "b"], 3))
    _with_letters(store, "b", range(4, 6))
    _with_letters(store, "unborn", range(1, 2))

    def recorded(id: str) -> tuple[list[int], list[int]]:
        rows, waiting = store.recorded("order", id)
        assert [(row.machine, row.id) for row in rows] == [("order", id)] * len(rows)
        return [row.version for row in rows], [letter.entry.version for letter in waiting]

    seen = _statements(store)
    assert recorded("a") == ([1, 2, 3], [])
    assert len([statement for statement in seen if "BEGIN" not in statement]) == 1
    assert recorded("b") == ([1, 2, 3], [4, 5])
    assert recorded("unborn") == ([], [1])
    assert recorded("nobody") == ([], [])
    assert "dead_letters" in seen[-2]
    assert "statecache_transitions" in seen[-1]


def test_history(store: DurableStore) -> None:
    flushed(store, Log().batch(["a", "aa", "b"], 9))

    def versions(*limits: int | None) -> list[int]:
        return [row.version for row in store.history("order", "a", *limits)]  # type: ignore[arg-type]

    assert versions() == list(range(1, 10))
    assert versions(4) == [5, 6, 7, 8, 9]
    assert versions(4, 6) == [5, 6]
    assert versions(0, None, NOW_MS + 3) == [1, 2, 3]
    assert store.history("order", "nobody") == []
    one = store.transition("order", "a", 3)
    assert one is not None
    assert (one.version, one.event, one.from_state, one.to_state, one.durable) == (3, "ship", "paid", "shipped", True)
    assert store.transition("order", "a", 10) is None
    assert store.committed([("order", "a", None, "t-a-3")]) == [one]
    assert store.committed([("order", "a", 3, None), ("order", "a", None, "t-b-3")]) == [one, None]


def test_a_reconciled_row(store: DurableStore) -> None:
    row = (3, 1, 7, "order", "a", 5, entry.EVENT_RECONCILED, None, "paid", 5, "r", None, None, None, "{}", None, None, 1, 2,
           False)  # fmt: skip
    with store.flush_transaction() as tx:
        tx.insert_transitions([row])
    found = store.history("order", "a")[0]
    assert (found.event, found.covers_from, found.version, found.complete, found.entry_id) == (
        "@reconciled", 2, 5, False, "1-7",
    )  # fmt: skip


def test_find_and_idle(store: DurableStore) -> None:
    log = Log()
    for size, versions in ((40, 1), (30, 1), (20, 1), (10, 1)):  # 10 of each state
        flushed(store, log.batch(ids(size), versions))
    flushed(store, Log("job").batch(ids(3))._replace(moves=[]))
    everything = store.find("order", limit=1000)
    assert len(everything) == 40
    assert [(row.updated_ms, row.id) for row in everything] == sorted((row.updated_ms, row.id) for row in everything)
    assert {row.id for row in store.find("order", "paid")} == set(ids(30)[20:])
    assert {row.id for row in store.find("order", "delivered")} == set(ids(10))
    assert store.find("order", limit=7) == everything[:7]
    assert store.find("order", "paid", limit=3) == [row for row in everything if row.state == "paid"][:3]
    bound = everything[17].updated_ms
    assert store.find("order", older_than_ms=bound, limit=1000) == [
        row for row in everything if row.updated_ms <= bound
    ]
    assert store.find("order", "nowhere") == store.find("nobody") == []
    assert len(store.find("job")) == 3

    cursor, paged = (0, ""), []
    while page := store.idle("order", "delivered", cursor, NOW_MS + 10**6, limit=3):
        paged += page
        cursor = (page[-1].updated_ms, page[-1].id)
    watermarks = {row.partition: row.watermark for row in store.partitions()}
    assert paged == [
        Idle("order", row.id, row.partition, row.version, row.updated_ms, watermarks[row.partition])
        for row in everything
        if row.state == "delivered"
    ]
    assert store.idle("order", "delivered", (0, ""), NOW_MS) == []


def test_pages(store: DurableStore) -> None:
    log = Log()
    flushed(store, log.batch([*ids(30), "\U0001f680", "Z", "a", "\u00e4"], 2))
    flushed(store, Log("job").batch(ids(5))._replace(moves=[]))
    rows = list(store.iterate_checkpoints(batch=7))
    assert [(row.machine, row.id) for row in rows] == sorted((row.machine, row.id) for row in rows)
    assert len(rows) == 39
    assert [row.id for row in store.iterate_checkpoints(partition=3, machine="order", batch=2)] == [
        row.id for row in rows if row.partition == 3 and row.machine == "order"
    ]
    history = list(store.iterate_transitions(batch=7))
    keys = [(row.machine, row.id, row.version) for row in history]
    assert keys == sorted(keys)
    assert len(keys) == 73
    assert len(list(store.iterate_transitions("job", batch=5))) == 5


def test_machines(store: DurableStore) -> None:
    assert store.machine("order") is None
    store.register_machine("order", 1, "f1", '{"states": []}', 5)
    store.register_machine("order", 1, "f1", '{"title": "what the fingerprint does not count"}', 6)
    store.register_machine("order", 10, "f10", "ten", 5)
    store.register_machine("order", 2, "f2", "two", 5)
    assert store.machine("order") == (10, "f10", "ten")
    assert store.machine("order", 1) == (1, "f1", '{"title": "what the fingerprint does not count"}')
    assert store.machine("order", 3) is None
    assert [(row.name, row.version, row.registered_ms) for row in store.machines()] == [
        ("order", 1, 5), ("order", 2, 5), ("order", 10, 5),
    ]  # fmt: skip
    with pytest.raises(
        errors.DefinitionError, match=r"'order' version 2 is registered with another.*raise the machine's"
    ):
        store.register_machine("order", 2, "else", "two", 5)


def test_a_machine_that_another_pydantic_has_registered(store: DurableStore) -> None:
    """Its fingerprint is another one, though nobody has changed the class: it is the same machine, in turn for both."""

    def declared(**text: str) -> spec.MachineSpec:
        branches = [{"type": "number"}, {"type": "string", **text}]
        schema = {"type": "object", "properties": {"amount": {"anyOf": branches}}}
        return spec.MachineSpec.model_validate({**Order.spec.model_dump(), "data_schema": schema})

    older, newer = declared(pattern=r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"), declared()
    assert older.fingerprint != newer.fingerprint
    for one in (older, newer, older, newer):
        store.register_machine("order", 1, one.fingerprint, one.model_dump_json(), 5)
    kept = store.machine("order")
    assert kept is not None
    assert kept[1:] == (older.fingerprint, newer.model_dump_json())
    changed = declared(format="date")
    with pytest.raises(errors.DefinitionError, match="registered with another definition"):
        store.register_machine("order", 1, changed.fingerprint, changed.model_dump_json(), 5)


def test_two_register_the_same_machine_at_once(store: DurableStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both looked before either wrote: the second one's insert hits the key, and it looks again."""
    answers = [None]
    real = store._registered
    monkeypatch.setattr(store, "_registered", lambda *key: answers.pop() if answers else real(*key))
    other = DurableStore(store.database)
    other.register_machine("order", 1, "f", "{}", 5)
    store.register_machine("order", 1, "f", "{}", 5)
    answers.append(None)
    with pytest.raises(errors.DefinitionError):
        store.register_machine("order", 1, "g", "{}", 5)


@pytest.mark.postgres
def test_a_pooled_connection_that_died_is_replaced(postgres_server: servers.PostgresServer, postgres_url: str) -> None:
    with proxy.Proxy(postgres_server.port) as between:
        store = DurableStore.connect(between.url(postgres_url))
        between.cut()
        assert store.identity().epoch == 0
        between.cut()
        flushed(store, Log().batch(["a"]))
        between.cut()
        assert store.counts("order") == {"placed": 1}
        between.cut()
        (found,) = store.lookup([("order", "a", partition_of("a"))])
        assert found.checkpoint is not None
        store.close()


@pytest.mark.postgres
def test_all_connections_kept_for_reading_died(postgres_server: servers.PostgresServer, postgres_url: str) -> None:
    """More read at once than are kept; then all that are kept are dead, and each reader needs one fresh one only."""
    with proxy.Proxy(postgres_server.port) as between:
        store = DurableStore.connect(between.url(postgres_url))
        all_at_work = threading.Barrier(7)

        def read_with_the_others(number: int) -> int:
            def ask(connection: sa.Connection) -> int:
                all_at_work.wait(30)
                return int(connection.exec_driver_sql(f"SELECT {number}").scalar_one())

            return store.database.read(ask)

        with ThreadPoolExecutor(7) as pool:
            assert list(pool.map(read_with_the_others, range(7))) == list(range(7))
        assert store.database.engine.pool.checkedout() == 4  # type: ignore[attr-defined]
        between.cut()
        for _ in range(8):
            assert store.identity().epoch == 0
        assert store.database.engine.pool.checkedout() == 1  # type: ignore[attr-defined]
        store.close()
        assert store.database.engine.pool.checkedout() == 0  # type: ignore[attr-defined]


@pytest.mark.postgres
def test_sql_is_away(postgres_server: servers.PostgresServer, postgres_url: str) -> None:
    with proxy.Proxy(postgres_server.port) as between:
        store = DurableStore.connect(between.url(postgres_url))
        between.refuse()
        for ask in (
            store.identity,
            lambda: store.lookup([("order", "a", 1)]),
            lambda: store.lookup([("order", "a", 1), ("order", "b", 1)]),
            lambda: list(store.iterate_checkpoints()),
        ):
            with pytest.raises(errors.UnavailableError) as away:
                ask()
            assert away.value.__cause__ is not None
        with pytest.raises(errors.UnavailableError), store.flush_transaction() as tx:
            tx.advance([Advance(1, 0, "", entry.ZERO, entry.ZERO, entry.ZERO, 0)])
        between.pass_through()
        assert store.identity().epoch == 0
        store.close()


@pytest.mark.postgres
@pytest.mark.parametrize(("threshold", "prepared"), [("none", False), ("1", True)])
def test_the_url_says_whether_statements_are_prepared(postgres_url: str, threshold: str, prepared: bool) -> None:
    """A transaction pooler may know no prepared statements: ``prepare_threshold=none`` in the URL is for it."""
    asked = sa.text("SELECT count(*) FROM pg_prepared_statements WHERE statement LIKE '%statecache_partitions%'")
    with closing(DurableStore.connect(f"{postgres_url}?prepare_threshold={threshold}")) as made:
        for _ in range(10):
            made.partitions()
        assert bool(made.database.read(lambda connection: connection.execute(asked).scalar_one())) is prepared


@pytest.mark.postgres
@pytest.mark.parametrize("kind", [JobTimeoutError, Interrupt])
@pytest.mark.parametrize("what", ["prepared", "built", "in a transaction", "in a snapshot"])
def test_interrupted_statement_takes_no_place_of_the_pool(
    postgres_server: servers.PostgresServer, postgres_url: str, kind: type[BaseException], what: str
) -> None:
    """A signal's handler raises while a statement is under way. Its connection, busy still, is not used again and not counted
    as lent: after as many interruptions as the pool has places SQL is there as before. The caller sees the handler's own
    exception."""
    made = DurableStore.connect(postgres_url)

    def ask() -> object:
        if what == "prepared":
            return made.partitions()
        if what == "built":
            return made.identity()
        if what == "in a snapshot":
            return made.beginning_with("order", "1", 10)
        with made.flush_transaction() as tx:
            return tx.checkpoints([("order", "1")])

    ask()
    tables = ("partitions", "store", "checkpoints")
    name = postgres_url.rsplit("/", 1)[1]
    with closing(made), postgres_server.connect(name) as other, postgres_server.connect(name) as looking:

        def waiting() -> int:
            asked = (
                "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
            )
            (count,) = looking.execute(asked).fetchone() or (0,)
            return int(count)

        other.autocommit = False
        other.execute(";".join(f"LOCK TABLE statecache_{table} IN ACCESS EXCLUSIVE MODE" for table in tables))
        for _ in range(16):
            before = waiting()  # PostgreSQL's ends of connections that are gone wait on
            with pytest.raises(kind), interrupted_when(kind, lambda before=before: waiting() > before):  # type: ignore[misc]
                ask()
        other.rollback()
        ask()
        assert made.database.engine.pool.checkedout() <= 1  # what reads keep
