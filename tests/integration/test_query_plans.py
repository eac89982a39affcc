"""No path of the engine reads a whole table: every statement that it sends, while everything is done once, is explained.

On both databases, with enough rows for an index to be worth it (20,000 instances and letters, 40,000 transitions, 2,000
recoveries) and with statistics. ``test_durable_plans.py`` asks the durable side's questions one by one, with their sorts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from statecache.core import errors, model
from statecache.durable import schema
from statecache.durable.store import DurableStore
from statecache.engine import eviction, letters, retention, status, warming
from tests.integration import test_durable_plans, test_holes
from tests.support.batches import ids
from tests.support.plans import Allowance, Plans
from tests.support.worlds import World

PLACED = ids(test_durable_plans.INSTANCES)[2500:5000]
ALLOWED = (
    Allowance(
        "statecache_dead_letters",
        "AS touched JOIN",
        "a recovery that looks for what lies above an id reads the open letters: few, and an index would serve nothing else",
    ),
)


def _recoveries(store: DurableStore) -> None:
    """So many that their table is worth an index."""
    row = {"started_ms": 1, "heartbeat_ms": 1, "finished_ms": 1, "classes": "", "report": "{}" + " " * 200}
    rows = [{"epoch": -number, "owner": f"o{number}", **row} for number in range(1, 2001)]
    with store.database.transaction() as connection:
        connection.execute(sa.insert(schema.recoveries), rows)


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def world(request: pytest.FixtureRequest, redis_url: str, namespace: str) -> Iterator[World]:
    """A store with much in SQL and nothing in Redis yet."""
    database_url = request.getfixturevalue(f"{request.param}_url")
    store = DurableStore.connect(database_url)
    _recoveries(store)
    test_durable_plans.fill(store)
    store.close()
    with World(redis_url, database_url, namespace, partition_count=16) as world:
        yield world


def test_no_path_reads_a_whole_table(world: World, tmp_path: Path) -> None:
    with Plans(allowances=ALLOWED) as plans:
        for name, walk in PATHS.items():
            with plans.path(name):
                walk(world, tmp_path)
    told = {f"{scan.path}: {scan.table}: {scan.statement}\n    {scan.step}" for scan in plans.scans}
    assert not told, "\n".join(sorted(told))
    assert plans.used == set(ALLOWED), "an allowance that nothing needs"


def connect(world: World, _: Path) -> None:
    world.more()


def hydrate(world: World, _: Path) -> None:
    assert world.orders.transition(PLACED[0], "pay").version == 2
    assert world.orders.get(PLACED[1]).source == "durable"
    with pytest.raises(errors.NotFoundError):
        world.orders.get("nobody")


def hydrate_in_bulk(world: World, _: Path) -> None:
    moved = world.orders.transition_many([model.Move(id, "pay") for id in PLACED[1:501]])
    assert {one.version for one in moved if isinstance(one, model.Receipt)} == {2}
    assert len(world.orders.get_many(PLACED[500:1500])) == 1000
    world.orders.start_many([f"new{number}" for number in range(300)])


def flush(world: World, _: Path) -> None:
    world.flush()
    flusher = world.flusher()  # without memory: it asks SQL for every checkpoint
    world.orders.transition_many([model.Move(id, "note") for id in PLACED[:300]])
    while flusher.step().entries:
        pass


def flush_with_leases(world: World, _: Path) -> None:
    cache = world.more()
    cache.start_flusher()
    receipt = world.orders.transition(PLACED[0], "note", durability="durable")
    assert receipt.version > 2
    assert [one for one in status.status(cache).flushers if one.alive]
    cache.close()


def wait_durable(world: World, _: Path) -> None:
    receipts = [one for one in world.orders.start_many(["w1", "w2", "w3"]) if isinstance(one, model.Receipt)]
    world.flush()
    world.cache.wait_durable(receipts)
    world.cache.wait_durable(receipts[0])


def find(world: World, _: Path) -> None:
    assert len(world.orders.find("placed", limit=50)) == 50
    assert len(world.orders.find(limit=50)) == 50
    assert sum(world.orders.counts().values()) > test_durable_plans.INSTANCES


def history(world: World, _: Path) -> None:
    assert len(world.orders.history(PLACED[1])) == 3
    assert world.orders.at(PLACED[1], version=2).state == "paid"
    assert world.orders.at(PLACED[1], when=datetime.now(UTC)).version == 3


def repeat(world: World, _: Path) -> None:
    """A repetition of what the ring has forgotten, and one of what only SQL has."""
    id = PLACED[2]
    world.orders.transition(id, "note", transition_id="mine")
    world.orders.transition_many([model.Move(id, "note") for _ in range(9)])
    world.flush()
    assert world.orders.transition(id, "note", transition_id="mine").duplicate


def repeat_in_bulk(world: World, _: Path) -> None:
    ids = PLACED[700:1000]
    moves = [model.Move(id, "note", transition_id=f"mine-{id}") for id in ids]
    world.orders.transition_many(moves)
    for dropped in (False, True):
        if dropped:
            world.orders.transition_many([model.Move(id, "note") for id in ids for _ in range(9)])
            world.flush()
        again = world.orders.transition_many(moves)
        assert all(isinstance(one, model.Receipt) and one.duplicate for one in again)


def claim(world: World, _: Path) -> None:
    assert world.orders.claim_next("placed") is not None


def evict(world: World, _: Path) -> None:
    assert eviction.evict(world.cache, idle_seconds=0).evicted > 800


def warm(world: World, _: Path) -> None:
    assert warming.warm(world.cache, limit=300, finals=True).warmed == 300
    shares = warming.shares(world.cache)
    assert len(shares) == 16
    warmed = warming.warm(world.cache, partition=3, limit=20)
    assert (warmed.warmed + warmed.hot_already, warmed.candidates) == (20, shares[3])


def park(world: World, _: Path) -> None:
    test_holes._spoil(world, "w1", moves=2)
    world.flush()
    with pytest.raises(errors.ParkedError):
        world.orders.transition("w1", "note")
    assert world.orders.get("w1").version == 3
    with pytest.raises(Exception, match=r"."):
        letters.retry(world.cache, "order", "w1")  # SQL still refuses it
    assert letters.discard(world.cache, "order", "w1") == 2


def recover(world: World, _: Path) -> None:
    """Without a loss, with one, and after a wipe."""
    world.disown()
    assert world.cache.recover().kinds == {"intact": 16}
    saved = world.redis_copy()
    world.orders.transition_many([model.Move(id, "note") for id in PLACED[600:620]])
    world.flush()
    world.redis_back(saved)
    assert "tail lost" in world.cache.recover().kinds
    world.wipe()
    world.cache.recover()


def retain(world: World, folder: Path) -> None:
    world.orders.transition_many([model.Move(id, event) for id in PLACED[1600:1620] for event in ("note", "cancel")])
    world.flush()
    assert list(retention.run(world.cache, timedelta(0), folder))


def observe(world: World, _: Path) -> None:
    status.status(world.cache)
    world.cache.metrics.text()


PATHS: dict[str, Callable[[World, Path], None]] = {
    walk.__name__: walk
    for walk in (
        connect, hydrate, hydrate_in_bulk, flush, flush_with_leases, wait_durable, find, history, repeat, repeat_in_bulk,
        claim, evict, warm, park, recover, retain, observe,
    )
}  # fmt: skip
