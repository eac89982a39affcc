"""Warming: what comes back, in which order, and what may happen between the look at SQL and the hydration."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa

from statecache.core import errors
from statecache.durable import schema
from statecache.engine import eviction, letters, retention, warming
from statecache.hot import packing
from tests.integration.test_eviction import hot, started
from tests.integration.test_holes import _spoil
from tests.support.worlds import Order, World, after_call, before_call


@pytest.fixture
def world(redis_url: str, database_url: str, namespace: str) -> Iterator[World]:
    with World(redis_url, database_url, namespace) as world:
        yield world


def wiped(world: World) -> None:
    """Redis lost everything and was recovered; our client is admitted to the new epoch."""
    world.wipe()
    world.cache.recover()
    world.cache.admission.ensure("EPOCH", world.cache.deadline(None))


def hashes(world: World) -> dict[bytes, object]:
    """The instances' hashes, field by field."""
    return {key: world.client.hgetall(key) for key in world.client.scan_iter(match=f"{{{world.namespace}:*}}:i:*")}


def test_wiped_instances_come_back_as_they_were_rings_too(world: World) -> None:
    """P4 after a warming: a repetition of a call of before the wipe is answered from the ring, not applied again."""
    ids = started(world, 6, ("pay", "ship"))
    world.orders.transition(ids[0], "note", transition_id="twice", data={"n": 1.5, "text": 'ü "x"'}, unset=["amount"])
    world.orders.transition(ids[5], "deliver")
    world.flush()
    before = hashes(world)
    wiped(world)
    told = warming.warm(world.cache, dry_run=True)
    assert (told.dry_run, told.candidates, told.warmed) == (True, 5, 0)
    report = warming.warm(world.cache, finals=True)
    assert (report.candidates, report.warmed, report.hot_already, report.full, report.more) == (6, 6, 0, False, False)
    assert hashes(world) == before
    assert world.orders.transition(ids[0], "note", transition_id="twice").duplicate
    again = warming.warm(world.cache, finals=True)
    assert (again.warmed, again.hot_already) == (0, 6)
    world.verify()


def test_the_last_moved_first_final_ones_last(world: World) -> None:
    ids = started(world, 8)
    for event in ("pay", "ship", "deliver"):
        world.orders.transition(ids[7], event)
    world.orders.transition(ids[1], "pay")
    world.flush()
    wiped(world)
    assert warming.warm(world.cache, limit=3).warmed == 3
    assert hot(world) == {ids[1], ids[6], ids[5]}
    report = warming.warm(world.cache, limit=4)
    assert (report.warmed, report.hot_already) == (1, 3)
    assert hot(world) == {ids[1], *ids[4:7]}
    assert warming.warm(world.cache).warmed == 3
    assert hot(world) == set(ids[:7])
    assert warming.warm(world.cache, finals=True).warmed == 1


def test_it_goes_on_at_its_position(world: World) -> None:
    """Stopped in the midst, and begun again with the position, as JSON keeps it: everything comes back, each once."""
    world.orders.start_many([f"o{number}" for number in range(2300)])
    world.flush()
    wiped(world)
    report = warming.warm(world.cache, seconds_max=0.0)
    assert (report.warmed, report.more) == (0, True)
    warmed, runs, looks = 0, 0, 0
    while report.more:
        position = msgspec.json.decode(msgspec.json.encode(report.position), type=dict[str, tuple[int, str]])
        seen: list[int] = []
        report = warming.warm(
            world.cache,
            position=position,
            progress=lambda report, seen=seen: seen.append(report.warmed),  # type: ignore[misc]
            stopping=lambda seen=seen: seen[-1] > 0,  # type: ignore[misc]
        )
        warmed += report.warmed
        looks += report.hot_already
        runs += 1
    assert (warmed, looks) == (2300, 0)
    assert runs > 1
    assert len(hot(world)) == 2300


def test_it_ends_where_redis_is_full(world: World) -> None:
    """Never beyond a number of instances: what is under way counts too."""
    world.orders.start_many([f"o{number}" for number in range(3000)])
    world.flush()
    wiped(world)
    for bound, more in ((10, 10), (1500, 1490)):
        report = warming.warm(world.more(hot_instances_max=bound))
        assert (report.full, report.warmed, len(hot(world))) == (True, more, bound)
    world.client.config_set("maxmemory", 1)
    try:
        report = warming.warm(world.more(hot_memory_share=0.0))
    finally:
        world.client.config_set("maxmemory", 0)
    assert (report.full, report.warmed) == (True, 0)


def test_bad_limit_is_refused(world: World) -> None:
    with pytest.raises(errors.InvalidDataError, match="limit 0 is refused"):
        warming.warm(world.cache, limit=0)


def test_parked_ones_are_left_to_the_call_that_wants_them(world: World) -> None:
    started(world, 3)
    _spoil(world, "o001")
    world.flush()
    wiped(world)
    report = warming.warm(world.cache)
    assert (report.warmed, report.parked) == (2, 1)
    with pytest.raises(errors.ParkedError):
        world.orders.transition("o001", "note")


# --- between the look and the hydration ----------------------------------------------------------------------------------


def test_a_checkpoint_that_cannot_be_read_keeps_nobody_cold(world: World) -> None:
    """Somebody wrote into SQL: the others come back, the call that wants it is told, and retention leaves it alone."""
    for id in ("1", "2", "3"):
        world.start(id, ["note", "cancel"], amount=1)
    world.flush()
    broken = sa.update(schema.checkpoints).where(schema.checkpoints.c.id == "2").values(data='{"amount":')
    with world.durable.database.transaction() as connection:
        connection.execute(broken)
    world.wipe()
    world.cache.recover()
    report = warming.warm(world.cache, finals=True)
    assert (report.warmed, report.parked) == (2, 1)
    with pytest.raises(errors.IntegrityError, match="order:2: the data of its checkpoint in SQL is no JSON"):
        world.orders.get("2")
    steps = list(retention.run(world.cache, timedelta(0), None, dry_run=True))
    assert [address for step in steps for address in step.damaged] == ["order:2"]


def test_moved_between_the_look_and_the_hydration(world: World) -> None:
    """A client brings an instance back and moves it to version 2; the page says version 1: nothing is overwritten (H10)."""
    started(world, 3)
    wiped(world)
    other = world.more().machine(Order)
    with before_call(world.hot, "_packed_hydrate", lambda: other.transition("o001", "pay")):
        report = warming.warm(world.cache)
    assert (report.warmed, report.hot_already) == (2, 1)
    assert world.orders.transition("o001", "ship").version == 3
    world.flush()
    world.verify()


def test_moved_flushed_and_evicted_between_the_look_and_the_hydration(world: World) -> None:
    """The same, and version 2 was flushed and evicted: what Redis has dropped is above the page's watermark (H9)."""
    ids = started(world, 3)
    wiped(world)
    with before_call(world.hot, "_packed_hydrate", lambda: _move_and_evict(world, ids[0])):
        report = warming.warm(world.cache)
    _nothing_stale_came_back(world, ids[0], report)


def test_moved_flushed_and_evicted_within_the_look(world: World) -> None:
    """The same, between a page's checkpoints and its watermarks: were they not of one snapshot, version 1 would come back
    under the watermark of version 2 (H9). A later page has version 2."""
    ids = started(world, 3)
    wiped(world)
    with before_call(world.durable.queries, "parked", lambda: _move_and_evict(world, ids[0])):
        report = warming.warm(world.cache)
    _nothing_stale_came_back(world, ids[0], report)


def _move_and_evict(world: World, id: str) -> None:
    other = world.more()
    other.machine(Order).transition(id, "pay")
    other.flush()
    assert eviction.evict(other, idle_seconds=0).evicted == 1


def _nothing_stale_came_back(world: World, id: str, report: warming.Report) -> None:
    assert report.stale >= 1
    assert world.orders.transition(id, "ship").version == 3
    world.flush()
    world.verify()


def test_recovery_between_the_look_and_the_hydration(world: World) -> None:
    """The hydration is of the old epoch: refused; pages are read again under the new one."""
    started(world, 3)
    wiped(world)
    with before_call(world.hot, "_packed_hydrate", world.more().recover):
        assert warming.warm(world.cache).warmed == 3
    world.verify()


def test_wiped_again_between_the_look_and_the_hydration(world: World) -> None:
    started(world, 3)
    wiped(world)
    with before_call(world.hot, "_packed_hydrate", world.wipe):
        assert warming.warm(world.cache).warmed == 3
    world.verify()


def test_sql_goes_back_behind_the_look(world: World) -> None:
    """Redis holds nothing, SQL is restored to version 1 and nobody has noticed: the wipe was at SQL's newer watermark, so
    version 1 is not brought back by a look at the older SQL (H9). The next recovery settles it."""
    started(world, 3)
    saved = world.sql_copy()
    world.orders.transition("o001", "pay")
    world.flush()
    wiped(world)
    row = world.durable.identity()
    world.sql_back(saved)
    assert world.durable.identity().epoch < row.epoch
    report = warming.warm(world.cache)
    assert report.warmed + report.stale == 3
    assert not world.is_hot("o001")
    world.flush_through()
    world.verify()


def test_letters_are_retried_between_the_look_and_the_hydration(world: World) -> None:
    """H12. The page says: version 1, with letters. An operator moves the letters into history (version 2), and the hash is
    dropped. Hydrated from the page without its letters it would stand at version 1, unparked: it is left cold."""
    started(world, 1)
    _spoil(world, "o000", moves=1)
    world.flush()
    with world.durable.database.writer.begin() as connection:
        connection.exec_driver_sql("UPDATE statecache_dead_letters SET patch = NULL")
    wiped(world)

    def retry() -> None:
        letters.retry(world.more(), "order", "o000")

    with after_call(world.durable, "recent", retry):
        report = warming.warm(world.cache)
    assert (report.warmed, report.parked) == (0, 1)
    assert world.orders.get("o000").version == 2
    assert world.orders.transition("o000", "note").version == 3
    world.flush()
    world.verify()


def test_warmers_and_evictors_side_by_side(world: World) -> None:
    """Dropped behind the look, and brought back: whoever is last decides whether it is hot, nobody what it is."""
    started(world, 5)
    with before_call(world.hot, "_packed_hydrate", lambda: eviction.evict(world.more(), idle_seconds=0)):
        report = warming.warm(world.cache)
    assert report.warmed == 5
    world.verify()


def test_pages_and_calls_are_bounded_in_bytes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page behind one of large instances is smaller; what is too much for one argument goes in several calls."""
    world.orders.start_many([(f"o{number:03}", {"blob": "x" * 2000}) for number in range(200)])
    world.flush()
    wiped(world)
    monkeypatch.setattr(warming, "_PAGE_BYTES_MAX", 40_000)
    monkeypatch.setattr(packing, "HYDRATE_BYTES_MAX", 10_000)
    pages, packed = [], []
    recent, packs = world.durable.recent, world.hot._packed_hydrate

    def told(*arguments: Any) -> Any:
        pages.append(len((found := recent(*arguments)).rows))
        return found

    def call(rows: Any, under: Any) -> bytes:
        packed.append(len(rows))
        return packs(rows, under)

    monkeypatch.setattr(world.durable, "recent", told)
    monkeypatch.setattr(world.hot, "_packed_hydrate", call)
    report = warming.warm(world.cache)
    assert (report.warmed, len(hot(world))) == (200, 200)
    assert sum(pages) == sum(packed) == 200
    assert max(pages[1:]) <= 20
    assert max(packed) == 4
