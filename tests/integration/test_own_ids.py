"""Transition ids of the callers' own on instances whose rings have dropped ids: only the log and SQL can say (P4, H16).

Those of a bulk call, and of calls under way together, are looked up together; each gets the answer that it would get alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import sqlalchemy as sa

from statecache.aio import AsyncStateCache
from statecache.core import errors, model
from tests.integration import test_holes
from tests.support import worlds

RING = 9
"""So many moves more, and an id is in the ring no more."""


@pytest.fixture
def world(redis_url: str, database_url: str, namespace: str) -> Iterator[worlds.World]:
    with worlds.World(redis_url, database_url, namespace, call_timeout_seconds=10.0) as made:
        yield made


def advance(world: worlds.World, ids: Sequence[str], times: int = RING) -> None:
    moved = world.orders.transition_many([model.Move(id, "note") for id in ids for _ in range(times)])
    assert all(isinstance(one, model.Receipt) for one in moved)


def started(world: worlds.World, prefix: str, count: int) -> list[str]:
    ids = [f"{prefix}{number}" for number in range(count)]
    world.orders.start_many(ids)
    return ids


def moves(ids: Sequence[str], own: str) -> list[model.Move]:
    return [model.Move(id, "note", transition_id=f"{own}-{id}") for id in ids]


def receipts(found: Sequence[Any]) -> list[model.Receipt]:
    assert [one for one in found if not isinstance(one, model.Receipt)] == []
    return list(found)


@contextmanager
def statements(world: worlds.World) -> Iterator[list[str]]:
    """What SQL is asked of history meanwhile."""
    asked: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if "FROM" in statement and "statecache_transitions" in statement:
            asked.append(statement)

    engine = world.durable.database.engine
    sa.event.listen(engine, "before_cursor_execute", note)
    try:
        yield asked
    finally:
        sa.event.remove(engine, "before_cursor_execute", note)


def test_a_bulk_call_asks_sql_once(world: worlds.World) -> None:
    """500 new ids, then the same call again, and again when the rings have dropped them: one statement each."""
    ids = started(world, "o", 500)
    advance(world, ids)
    world.flush()
    with statements(world) as asked:
        first = receipts(world.orders.transition_many(moves(ids, "mine")))
    assert {(one.version, one.duplicate) for one in first} == {(RING + 2, False)}
    assert len(asked) == 1
    world.flush()
    with statements(world) as asked:
        again = receipts(world.orders.transition_many(moves(ids, "mine")))
    assert [(one.entry_id, one.duplicate) for one in again] == [(one.entry_id, True) for one in first]
    assert len(asked) == 1
    advance(world, ids)
    world.flush()
    with statements(world) as asked:
        again = receipts(world.orders.transition_many(moves(ids, "mine")))
    assert [(one.entry_id, one.duplicate) for one in again] == [(one.entry_id, True) for one in first]
    assert len(asked) == 1


def test_tasks_ask_sql_together(world: worlds.World) -> None:
    """The same of 200 tasks: a statement for those that wait while another is under way."""
    ids = started(world, "o", 200)
    advance(world, ids)
    world.flush()

    async def run() -> tuple[list[model.Receipt], int]:
        async with AsyncStateCache.connect(
            world.redis_url, world.database_url, world.namespace, **world.settings
        ) as cache:
            orders = await cache.machine(worlds.Order)
            asked: list[str] = []

            def note(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
                asked.append(statement)

            sa.event.listen(cache.sync.durable.database.engine, "before_cursor_execute", note)
            found = await asyncio.gather(*[orders.transition(id, "note", transition_id=f"mine-{id}") for id in ids])
            return found, len([statement for statement in asked if "statecache_transitions" in statement])

    found, count = asyncio.run(run())
    assert {(one.version, one.duplicate) for one in found} == {(RING + 2, False)}
    assert count < 20


def test_each_is_found_where_it_is(world: worlds.World) -> None:
    """One bulk call: ids that are in history, in the log's unflushed tail, in both stores' ends of one instance, and new ones;
    one that was used for another event."""
    flushed, tail, fresh = started(world, "f", 5), started(world, "t", 5), started(world, "n", 5)
    old = receipts(world.orders.transition_many(moves(flushed, "mine")))
    advance(world, [*flushed, *fresh])
    world.flush()
    new = receipts(world.orders.transition_many(moves(tail, "mine")))
    advance(world, tail)
    wanted = moves([*flushed, *tail, *fresh], "mine")
    other = model.Move(flushed[0], "pay", transition_id=f"mine-{flushed[0]}")
    *found, refused = world.orders.transition_many([*wanted, other])
    assert isinstance(refused, errors.InvalidDataError)
    known = [(one.id, one.version, one.entry_id) for one in receipts(found) if one.duplicate]
    assert known == [(one.id, one.version, one.entry_id) for one in [*old, *new]]
    assert [(one.id, one.version) for one in receipts(found) if not one.duplicate] == [(id, RING + 2) for id in fresh]
    world.flush()
    world.verify()


def test_flushed_between_the_two_looks(world: worlds.World) -> None:
    """The log is read, then a flush commits and trims, then SQL is read: what left the log in between is found there."""
    ids = started(world, "o", 20)
    old = receipts(world.orders.transition_many(moves(ids, "mine")))
    advance(world, ids)
    world.flush()
    with worlds.before_call(world.durable, "committed", world.flush):
        again = receipts(world.orders.transition_many(moves(ids, "mine")))
    assert [(one.entry_id, one.duplicate) for one in again] == [(one.entry_id, True) for one in old]


def test_sql_went_back_before_the_look(redis_url: str, database_url: str, namespace: str) -> None:
    """SQL is restored from an older copy; ``meta`` has the higher watermark of before. What SQL has no more stands in the log
    below that watermark, and is found there, not applied again."""
    with worlds.World(redis_url, database_url, namespace, log_keep_seconds=3600.0) as world:
        ids = started(world, "o", 20)
        world.flush()
        saved = world.sql_copy()
        old = receipts(world.orders.transition_many(moves(ids, "mine")))
        advance(world, ids)
        world.flush()
        world.sql_back(saved)
        again = receipts(world.orders.transition_many(moves(ids, "mine")))
        assert [(one.entry_id, one.duplicate) for one in again] == [(one.entry_id, True) for one in old]


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_recovered_between_the_looks(world: worlds.World, call: int) -> None:
    """Redis loses its tail, and is recovered, before the log of one of the two partitions is read: the first time, or the last
    time, below the watermark. What the call finds then is of the new epoch: known ids stay known, new ones are applied once."""
    known, fresh = started(world, "k", 20), started(world, "n", 20)
    old = receipts(world.orders.transition_many(moves(known, "mine")))
    advance(world, [*known, *fresh])
    world.flush()
    saved = world.redis_copy()
    advance(world, [*known, *fresh], 1)

    with worlds.before_call(world.cache.hot, "find_many", lambda: world.redis_back(saved), call=call):
        found = receipts(world.orders.transition_many(moves([*known, *fresh], "mine")))
    assert [(one.entry_id, one.duplicate) for one in found[:20]] == [(one.entry_id, True) for one in old]
    assert {(one.version, one.duplicate) for one in found[20:]} == {(RING + 2, False)}
    world.flush_through()
    for id in fresh:
        assert [row.transition_id for row in world.durable.history("order", id)].count(f"mine-{id}") == 1
    world.verify()


def test_one_that_waits_as_a_letter(world: worlds.World) -> None:
    """SQL refused the entry of an id: it is known, in a bulk call too."""
    world.start("a")
    advance(world, ["a"])
    world.start("spoilt")
    test_holes._spoil(world, "spoilt", moves=2)
    world.flush()
    row = world.durable.letters("order", "spoilt")[0].entry
    wanted = [
        ("order", "spoilt", row.version, None),
        ("order", "spoilt", None, row.transition_id),
        ("order", "a", None, "?"),
    ]
    assert world.durable.committed(wanted) == [row, row, None]
    assert world.durable.committed(wanted[:1]) == world.durable.committed(wanted[1:2]) == [row]


def test_a_strangers_record_is_nobodys(world: worlds.World) -> None:
    """A record of the log that begins like one of the instance's, and is none, is passed over: no other item fails of it."""
    ids = started(world, "o", 3)
    advance(world, ids)
    world.flush()
    world.client.xadd(world.keyspace.log(world.partition_of("o0")), {"e": "order\x1fo0\x1fmine-o0\x1f"}, id="1-*")
    assert [one.duplicate for one in receipts(world.orders.transition_many(moves(ids, "mine")))] == [False] * 3


# --- order within a list ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [0, RING], ids=["ring whole", "ring dropped ids"])
def test_a_move_that_expects_a_version_does_not_overtake(world: worlds.World, rounds: int) -> None:
    """The move before it has an id of its own: where the ring has dropped ids history is asked about that one first, while the
    script would apply the other at once."""
    started(world, "o", 1)
    advance(world, ["o0"], rounds)
    at = world.orders.get("o0").version
    pair = [model.Move("o0", "note", transition_id="first"), model.Move("o0", "pay", expect_version=at + 1)]
    assert [one.version for one in receipts(world.orders.transition_many(pair))] == [at + 1, at + 2]
    pair = [model.Move("o0", "note", transition_id="third"), model.Move("o0", "ship", expect_version=at + 2)]
    third, stale = world.orders.transition_many(pair)
    assert third.version == at + 3  # type: ignore[union-attr]
    assert isinstance(stale, errors.StaleVersionError)
    world.verify()


NOTE, PAY = "note", "pay"
Wanted = tuple[str | None, int | None]
"""A move's own id, and the version that it expects, counted from where the instance is."""
LISTS: dict[str, tuple[list[Wanted], list[int | None]]] = {
    "two ids, then one that expects": ([("a", None), ("b", None), (None, 2)], [1, 2, 3]),
    "two ids, then one that expects too little": ([("a", None), ("b", None), (None, 1)], [1, 2, None]),
    "all with ids, all expecting": ([("a", 0), ("b", 1), ("c", 2)], [1, 2, 3]),
    "an id that expects too much, and goes nowhere": ([("a", None), ("b", 5), ("c", 1)], [1, None, 2]),
    "one without an id between": ([("a", None), (None, None), (None, 2)], [1, 2, 3]),
    "one without an id first": ([(None, None), ("a", None), (None, 2), ("b", 3)], [1, 2, 3, 4]),
    "more than a ring, then one that expects": (
        [(f"i{number}", None) for number in range(20)] + [(None, 20)],
        list(range(1, 22)),
    ),
}


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("where", ["ring whole", "ring dropped ids", "cold"])
def test_moves_of_one_instance_are_judged_in_their_order(world: worlds.World, name: str, where: str) -> None:
    wanted, versions = LISTS[name]
    started(world, "o", 1)
    if where != "ring whole":
        advance(world, ["o0"])
    if where == "cold":
        world.flush()
        world.evict("o0")
    at = world.orders.get("o0").version if where != "cold" else 1 + RING
    moves = [
        model.Move("o0", NOTE, transition_id=own, expect_version=None if expected is None else at + expected)
        for own, expected in wanted
    ]
    found = world.orders.transition_many(moves)
    assert [one.version - at if isinstance(one, model.Receipt) else None for one in found] == versions
    assert all(isinstance(one, (model.Receipt, errors.StaleVersionError)) for one in found)
    own = {move.transition_id for move in moves}
    assert [row.transition_id for row in world.orders.history("o0") if row.transition_id in own] == [
        move.transition_id for move, version in zip(moves, versions, strict=True) if version and move.transition_id
    ]


@pytest.mark.parametrize("rounds", [0, RING], ids=["ring whole", "ring dropped ids"])
def test_history_is_asked_once_for_a_list_of_one_instances_moves(world: worlds.World, rounds: int) -> None:
    """What the list itself applies is not looked up: each ninth move asked for all behind it."""
    started(world, "o", 1)
    advance(world, ["o0"], rounds)
    with statements(world) as asked:
        found = world.orders.transition_many(
            [model.Move("o0", NOTE, transition_id=f"m{number}") for number in range(120)]
        )
        assert [one.version for one in receipts(found)] == list(range(rounds + 2, rounds + 122))
        assert len(asked) == 1
    again = world.orders.transition_many([model.Move("o0", NOTE, transition_id=f"m{number}") for number in range(120)])
    assert [one.version for one in receipts(again)] == list(range(rounds + 2, rounds + 122))
    assert all(one.duplicate for one in receipts(again))


def test_one_id_twice_in_a_list_is_applied_once(world: worlds.World) -> None:
    started(world, "o", 1)
    advance(world, ["o0"])
    ids = [f"m{number % 15}" for number in range(45)]
    found = receipts(world.orders.transition_many([model.Move("o0", NOTE, transition_id=own) for own in ids]))
    assert [one.version - 10 for one in found] == [number % 15 + 1 for number in range(45)]
    assert [one.duplicate for one in found] == [number >= 15 for number in range(45)]


def test_a_redelivery_that_expects_the_version_of_now(world: worlds.World) -> None:
    """A consumer reads the version, moves the order under the event's id, and gets the same event again ten moves later."""

    def consume() -> model.Receipt:
        seen = world.orders.get("o0").version
        return world.orders.transition("o0", NOTE, expect_version=seen, transition_id="evt_42")

    started(world, "o", 1)
    first = consume()
    for flushed in (False, True):
        advance(world, ["o0"], 10)
        if flushed:
            world.flush()
        again = consume()
        assert (again.version, again.duplicate) == (first.version, True)
    (many,) = world.orders.transition_many([model.Move("o0", NOTE, transition_id="evt_42", expect_version=22)])
    assert isinstance(many, model.Receipt)
    assert many.version == first.version
