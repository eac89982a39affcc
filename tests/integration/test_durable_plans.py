"""Every question on a hot path is answered by an index, on both databases: their own EXPLAIN says so.

The statements are those that the store really sends, caught on their way and explained just before they run.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from statecache.core import entry
from statecache.durable import recoveries, retention, schema
from statecache.durable.store import DurableStore
from tests.support import servers
from tests.support.batches import NOW_MS, Log, flushed, ids, partition_of
from tests.support.plans import Plans

INSTANCES = 20_000


def fill(store: DurableStore) -> Log:
    """20,000 instances and 40,000 transitions of one machine, some of another, 20,000 letters, many counts."""
    log = Log()
    for start in range(0, INSTANCES, 5000):
        flushed(store, log.batch(ids(INSTANCES)[start : start + 5000]))
        flushed(store, log.batch(ids(INSTANCES)[start : start + 2500], 2))
    flushed(store, Log("job").batch(ids(2000))._replace(moves=[]))
    letters = [(partition_of(id), 0, 10**6, "order", id, 1, "pay", None, "paid", 5, "t", None, None, None, None, None, None,
                1) for id in ids(20_000, "letter")]  # fmt: skip
    counts = {
        (partition, f"m{number}", state): 1 for partition in range(16) for number in range(60) for state in ("a", "b")
    }
    with store.flush_transaction() as tx:
        tx.insert_letters(letters, "refused", False, 5)
        tx.adjust_counts(counts)
    with store.database.engine.connect() as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT") if connection.dialect.name != "sqlite" else None
        connection.exec_driver_sql("ANALYZE")
    return log


@pytest.fixture(scope="module")
def filled_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[DurableStore, Log]]:
    store = DurableStore.connect(f"sqlite:///{tmp_path_factory.mktemp('plans') / 'plans.db'}")
    yield store, fill(store)
    store.close()


@pytest.fixture(scope="module")
def filled_postgres(postgres_server: servers.PostgresServer) -> Iterator[tuple[DurableStore, Log]]:
    name = postgres_server.create_database()
    store = DurableStore.connect(postgres_server.url(name))
    yield store, fill(store)
    store.close()
    postgres_server.drop_database(name)


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def filled(request: pytest.FixtureRequest) -> tuple[DurableStore, Log]:
    found: tuple[DurableStore, Log] = request.getfixturevalue(f"filled_{request.param}")
    return found


def test_the_judge_sees_a_scan(filled: tuple[DurableStore, Log]) -> None:
    store, _ = filled
    with Plans(store.database.engine) as plans:
        store.database.read(
            lambda connection: connection.execute(
                sa.text("SELECT * FROM statecache_checkpoints WHERE recent = 'x' ORDER BY data")
            ).fetchall()
        )
    assert plans.scans
    assert plans.sorts


@pytest.mark.parametrize("count", [1, 50])
def test_look_ups(filled: tuple[DurableStore, Log], count: int) -> None:
    store, _ = filled
    some = ids(INSTANCES)[: 100 * count : 100]
    with Plans(store.database.engine) as plans:
        store.lookup([("order", id, partition_of(id)) for id in some])
        store.standing([("order", id, 1, partition_of(id)) for id in some])
        store.checkpoints([("order", id) for id in some])
        with store.flush_transaction() as tx:
            tx.checkpoints([("order", id) for id in some])
            tx.parked([("order", id) for id in some])
    assert len(plans.explained()) == 5
    assert plans.scans == []


def test_history(filled: tuple[DurableStore, Log]) -> None:
    store, _ = filled
    with Plans(store.database.engine) as plans:
        store.history("order", "i00100")
        store.history("order", "i00100", 1, 2, NOW_MS)
        store.transition("order", "i00100", 2)
        store.committed([("order", "i00100", None, "t-i00100-1")])
        store.letters("order", "letter00001")
        store.recorded("order", "i00100")
    assert len(plans.explained()) == 4
    assert plans.scans == []


def test_find_counts_and_what_may_be_evicted(filled: tuple[DurableStore, Log]) -> None:
    store, _ = filled
    with Plans(store.database.engine) as plans:
        assert len(store.find("order", "placed")) == 100
        assert len(store.find("order", "shipped", NOW_MS + 1500)) == 100
        assert len(store.idle("order", "shipped", (NOW_MS + 200, "i1"), NOW_MS + 1500, limit=50)) == 50
    assert plans.scans == []
    assert plans.sorts == []
    with Plans(store.database.engine) as plans:
        assert len(store.find("order")) == 100
        assert store.counts("m7") == {"a": 16, "b": 16}
    assert plans.scans == []


def test_pages_are_not_sorted_when_the_statistics_are_old(filled: tuple[DurableStore, Log]) -> None:
    """All of a state's instances have moved on since the last ANALYZE, as a pipeline of few stages does every minute."""
    store, _ = filled
    moved = sa.update(schema.checkpoints).where(schema.checkpoints.c.state == "placed").values(state="unheard of")
    with store.database.transaction() as connection:
        assert connection.execute(moved).rowcount > INSTANCES / 4
    with Plans(store.database.engine) as plans:
        assert len(store.find("order", "unheard of", limit=50)) == 50
        assert len(store.idle("order", "unheard of", (NOW_MS + 2, "i1"), NOW_MS + 1500, limit=50)) == 50
        assert len(store.recent("order", "unheard of", (NOW_MS + 1500, "i1"), limit=50).rows) == 50
        assert retention.ended(store, "order", "unheard of", [1], NOW_MS, (0, ""), 50) == []
    with store.database.transaction() as connection:
        connection.execute(
            sa.update(schema.checkpoints).where(schema.checkpoints.c.state == "unheard of").values(state="placed")
        )
    assert plans.scans == []
    assert plans.sorts == []


def test_ids_that_begin_alike(filled: tuple[DurableStore, Log]) -> None:
    store, _ = filled
    with Plans(store.database.engine) as plans:
        found = [kept.id for kept in store.beginning_with("order", "i199", limit=50)]
    assert found == sorted(id for id in ids(INSTANCES) if id.startswith("i199"))[:50]
    assert plans.scans == []
    assert plans.sorts == []


def test_pages(filled: tuple[DurableStore, Log]) -> None:
    store, _ = filled
    with Plans(store.database.engine) as plans:
        assert sum(1 for _ in store.iterate_checkpoints(batch=4000)) == INSTANCES + 2000
        assert sum(1 for _ in store.iterate_transitions("order", batch=9000)) == 2 * INSTANCES
    assert plans.scans == []
    assert plans.sorts == []


def test_flushing(filled: tuple[DurableStore, Log]) -> None:
    store, log = filled
    batch = log.batch(ids(INSTANCES)[::10])
    machine, _, rest = batch.changed[0].split("\x1f", 2)
    absent = ["\x1f".join([machine, "absent", rest])]
    with Plans(store.database.engine) as plans, store.flush_transaction() as tx:
        tx.advance(batch.moves)
        tx.insert_history(batch.lines)
        assert tx.upsert_checkpoints(batch.changed + absent) == len(batch.changed) + 1
        tx.adjust_counts(batch.deltas)
    assert any("UPDATE statecache_checkpoints" in each or "ON CONFLICT" in each for each in plans.explained())
    assert plans.scans == []


def test_what_lies_above_an_entry(filled: tuple[DurableStore, Log]) -> None:
    """The open letters are read all; they are few."""
    store, log = filled
    epoch, owner = store.identity().epoch, store.identity().owner
    recoveries.take(store, (epoch, owner), epoch + 1, "me", 5)
    log.epoch, log.owner = epoch + 1, "me"
    recoveries.complete_index(store)
    bound = entry.EntryId(log.watermarks[5].epoch, log.watermarks[5].seq - 50)
    with Plans(store.database.engine) as plans:
        found = [row for page in recoveries.instances_above(store, 5, bound) for row in page]
    assert len(found) > 49
    assert [scan for scan in plans.scans if "dead_letters" not in scan.table] == []
