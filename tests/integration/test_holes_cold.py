"""The protocol's holes H7 to H10 where eviction and hydration meet a trim, a start, a bulk call: each interleaving forced.

Those of single calls are in ``test_holes.py``; what an evictor meets between its look and its drop in ``test_eviction.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any
from unittest import mock

import pytest
import redis

from statecache.core import errors, model
from statecache.engine import eviction
from statecache.hot import wire
from tests.support.worlds import Order, World, after_call, before_call


@pytest.fixture
def world(redis_url: str, database_url: str, namespace: str) -> Iterator[World]:
    with World(redis_url, database_url, namespace) as found:
        yield found


def cold(world: World, *ids: str) -> None:
    """Start instances, flush and evict them."""
    for id in ids:
        world.start(id)
    world.flush()
    for id in ids:
        assert world.evict(id) == "OK"


def moved_by_another(world: World, id: str, event: str = "pay") -> Callable[[], model.Receipt]:
    other = world.more().machine(Order)
    return lambda: other.transition(id, event)


# --- the trim ----------------------------------------------------------------------------------------------------------


def test_h7_evicted_and_brought_back_between_the_commit_and_the_trim(world: World) -> None:
    """H7. The flusher has committed version 1 and not yet trimmed: ``meta.watermark`` is behind SQL's. An evictor, who goes by
    SQL, drops the hash; a call brings it back (SQL's watermark is at ``evicted_to``, whatever ``meta`` says) and moves it to
    version 2. Then the trim comes: it takes what is in SQL, and leaves version 2."""
    partition = world.partition_of("1")
    world.start("1")
    flusher = world.flusher(world.more(log_keep_seconds=0.0))
    other = world.more()

    def evict_and_move() -> None:
        assert world.meta(partition)["watermark"] < str(world.watermark(partition))
        assert eviction.evict(other, idle_seconds=0).evicted == 1
        assert other.machine(Order).transition("1", "pay").version == 2

    with before_call(flusher.hot, "flushed", evict_and_move):
        flusher.step()
    log = world.log(partition)
    assert log[0] == str(world.watermark(partition)), "what is in SQL was trimmed, up to the witness"
    assert len(log) == 2
    assert [row.version for row in world.orders.history("1")] == [1, 2]
    world.flush()
    assert world.versions("1") == [1, 2]
    world.verify()


def test_h7_trimmed_between_the_look_up_and_the_hydration(world: World) -> None:
    """H7, H10. Looked up at version 1; others bring it back, move it twice, flush, and the trim takes those entries out of the
    log. Our hydration finds the hash there and does nothing; versions 2 and 3 are nowhere but in the hash and in SQL."""
    cold(world, "1")
    move = moved_by_another(world, "1", "note")

    def move_flush_and_trim() -> None:
        move()
        move()
        flusher = world.flusher(log_keep_seconds=0.0)
        while flusher.step().entries:
            pass
        assert len(world.log(world.partition_of("1"))) == 1, "the witness"

    with before_call(world.hot, "hydrate_and_apply", move_flush_and_trim):
        assert world.orders.transition("1", "pay").version == 4
    world.flush()
    assert world.versions("1") == [1, 2, 3, 4]
    world.verify()


@pytest.mark.parametrize("lost", [1, 2])
def test_h16_connection_lost_behind_a_hydration_and_its_item(world: World, lost: int) -> None:
    """H16. A cold call sends both scripts at once; both have run when the connection is lost, with the first reply or with the
    second. It may have been applied: the item goes again, and finds its id in the ring."""
    cold(world, "1")
    hydrate_and_apply, reply_of = world.hot.hydrate_and_apply, wire.Wire._reply
    replies: list[Any] = []

    def losing(line: wire.Wire) -> Any:
        replies.append(reply_of(line))
        if len(replies) < lost:
            return replies[-1]
        while len(replies) < 2:
            replies.append(reply_of(line))
        raise redis.ConnectionError("lost, for the test")

    def cut_off(*arguments: Any) -> Any:
        with mock.patch.object(wire.Wire, "_reply", losing):
            return hydrate_and_apply(*arguments)

    with mock.patch.object(world.hot, "hydrate_and_apply", cut_off):
        receipt = world.orders.transition("1", "pay")
    assert (receipt.version, receipt.from_state, receipt.duplicate) == (2, "placed", True)
    assert replies[0] == b"OK"
    assert b"OK 2 " in replies[1]
    world.flush()
    assert world.versions("1") == [1, 2]
    world.verify()


def test_h7_late_trim_of_an_older_epoch_behind_an_eviction(world: World) -> None:
    """H7, H8. A flusher commits version 2 and pauses before its trim. SQL is restored to version 1 and recovered; in the new
    epoch an evictor looks: it keeps version 2, which SQL does not have; then the old trim comes, and removes nothing of it."""
    partition = world.partition_of("1")
    world.start("1")
    world.flush()
    saved = world.sql_copy()
    world.orders.transition("1", "pay")
    flusher, other = world.flusher(log_keep_seconds=0.0), world.more()
    before = world.log(partition)

    def restore_recover_and_evict() -> None:
        world.sql_back(saved)
        other.recover()
        assert eviction.evict(other, idle_seconds=0).kept == {"moved": 1}

    with before_call(world.hot, "flushed", restore_recover_and_evict):
        flusher.step()
    assert set(before) <= set(world.log(partition))
    world.flush_through()
    assert world.versions("1") == [1, 2]
    world.verify()


# --- SQL that went back ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bulk", [False, True])
def test_h9_sql_goes_back_between_the_two_looks_of_a_read(world: World, bulk: bool) -> None:
    """H9. The hash is not there, ``meta`` was asked what it has dropped; SQL is restored; then SQL is asked: version 1, of a
    snapshot below ``evicted_to``. Neither that is shown, nor "not found" for what was started since."""
    world.start("1")
    world.flush()
    saved = world.sql_copy()
    world.orders.transition("1", "pay")
    world.start("2")
    world.flush()
    for id in ("1", "2"):
        assert world.evict(id) == "OK"
    restored = before_call(world.durable, "lookup", lambda: world.sql_back(saved))
    if bulk:
        with restored:
            results = world.orders.get_many(["1", "2"], timeout=1.0)
        assert [type(one) for one in results] == [errors.IntegrityError] * 2
    else:
        with restored, pytest.raises(errors.IntegrityError, match="SQL is older"):
            world.orders.get("2", timeout=1.0)


def test_h9_history_of_a_cold_instance_that_sql_has_forgotten(
    redis_url: str, sqlite_url: str, namespace: str, client: str
) -> None:
    """H9. SQL is restored below ``evicted_to``: the rows that it has left are no history of what was dropped since. A flusher
    brings them back from the log that was kept."""
    with World(redis_url, sqlite_url, namespace, client=client, log_keep_seconds=3600.0) as world:
        world.start("1")
        world.flush()
        saved = world.sql_copy()
        world.orders.transition("1", "pay")
        world.start("2")
        world.flush()
        for id in ("1", "2"):
            assert world.evict(id) == "OK"
        world.sql_back(saved)
        asked = (
            lambda: world.orders.history("1", timeout=0.5),
            lambda: world.orders.history("2", timeout=0.5),
            lambda: world.orders.at("1", when=datetime.now(UTC), timeout=0.5),
        )
        for ask in asked:
            with pytest.raises(errors.IntegrityError, match="SQL is older than what Redis has dropped"):
                ask()
        world.flush()
        assert [row.version for row in world.orders.history("1")] == [1, 2]
        assert world.orders.at("1", when=datetime.now(UTC)).state == "paid"


def test_history_of_a_cold_instance_that_is_moved_flushed_and_evicted_between_its_looks(world: World) -> None:
    """Its rows are read; then another program moves it, and it is flushed and evicted again: the second look at SQL shows
    more than those rows."""
    cold(world, "1")

    def move() -> None:
        moved_by_another(world, "1")()
        world.flush()
        assert world.evict("1") == "OK"

    with after_call(world.durable, "recorded", move):
        assert [row.version for row in world.orders.history("1")] == [1, 2]


def test_h9_bulk_call_of_which_sql_has_forgotten_some(world: World) -> None:
    """H9. One query answers for all; in one partition SQL is older than what was dropped, in the other nothing was dropped
    since: this one's instance is moved, that one's is not brought back at an older version."""
    ids = [world.id(0), world.id(1)]
    cold(world, *ids)
    saved = world.sql_copy()
    world.orders.transition(ids[0], "pay")
    world.flush()
    assert world.evict(ids[0]) == "OK"
    with before_call(world.durable, "lookup", lambda: world.sql_back(saved)):
        results = world.orders.transition_many([model.Move(id, "note") for id in ids], timeout=1.0)
    assert isinstance(results[0], errors.IntegrityError)
    assert isinstance(results[1], model.Receipt)
    assert results[1].version == 2
    assert not world.is_hot(ids[0])


# --- behind the look-up ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bulk", [False, True])
def test_h9_started_flushed_and_evicted_behind_the_look_of_a_start(world: World, bulk: bool) -> None:
    """H9 (P3 fork). A start finds nothing in SQL; then another client starts it, moves it, it is flushed and evicted. The hash
    is absent again, as our start expects; but its look is below ``evicted_to`` now: it looks again, and finds it."""
    other = world.more()
    handle = other.machine(Order)
    partition = world.partition_of("1")
    cold(world, world.id(partition, "x"))  # so that SQL is asked

    def by_others() -> None:
        handle.start("1")
        handle.transition("1", "pay")
        other.flush()
        assert eviction.evict(other, idle_seconds=0).evicted >= 1

    with after_call(world.durable, "lookup", by_others):
        if bulk:
            (result,) = world.orders.start_many(["1"])
            assert isinstance(result, errors.AlreadyExistsError)
        else:
            with pytest.raises(errors.AlreadyExistsError):
                world.orders.start("1")
    assert world.orders.get("1").version == 2
    world.verify()


def test_h10_bulk_hydration_meets_what_is_hot_again(world: World) -> None:
    """H10. Three were looked up at version 1; then one is brought back and moved, one is brought back, moved, flushed and
    evicted by others. One script hydrates the three: it does nothing for the first, refuses the second, writes the third."""
    cold(world, "1", "2", "3")
    other = world.more()
    handle = other.machine(Order)

    def by_others() -> None:
        handle.transition("2", "pay")
        other.flush()
        assert world.evict("2") == "OK"
        handle.transition("1", "pay")

    codes: list[str] = []
    hydrate = world.hot.hydrate

    def noted(*arguments: Any) -> list[str]:
        found = hydrate(*arguments)
        codes.extend(code.split(" ")[0] for code in found)
        return found

    world.hot.hydrate = noted  # type: ignore[method-assign]
    try:
        with before_call(world.hot, "hydrate", by_others):
            results = world.orders.transition_many([model.Move(id, "note") for id in "123"])
    finally:
        world.hot.hydrate = hydrate  # type: ignore[method-assign]
    assert [(one.version, one.from_state) for one in results if isinstance(one, model.Receipt)] == [
        (3, "paid"), (3, "paid"), (2, "placed"),
    ]  # fmt: skip
    assert codes[:2] == ["EXISTS", "STALE"]
    world.flush()
    world.verify()


@pytest.mark.parametrize("fault", ["recovery", "wipe"])
def test_h10_bulk_call_meets_another_epoch_behind_its_look_up(world: World, fault: str) -> None:
    """H10. Looked up in epoch 1; then a recovery passes, or Redis is wiped and recovered, and others move one of the two and
    evict it. The hydration of both is of epoch 1: refused; the call begins again and takes nothing that it had read."""
    cold(world, "1", "2")
    other = world.more()
    handle = other.machine(Order)

    def by_others() -> None:
        if fault == "wipe":
            world.wipe()
        other.recover()
        handle.transition("1", "pay")
        other.flush()
        assert eviction.evict(other, idle_seconds=0).evicted == 1

    with before_call(world.hot, "hydrate", by_others):
        results = world.orders.transition_many([model.Move(id, "note") for id in "12"])
    assert [one.version for one in results if isinstance(one, model.Receipt)] == [3, 2]
    world.flush()
    world.verify()


def test_h10_sql_goes_back_and_redis_is_lost_behind_the_look_up(world: World) -> None:
    """H10. Looked up at version 2; then SQL is restored to version 1 and Redis is wiped (by FLUSHALL: the scripts stay) and
    recovered by it. By watermarks the look is newer than anything that was dropped: the stamp alone refuses it. Brought back
    at version 2 it would leave a gap in SQL, for ever."""
    cold(world, "1")
    saved = world.sql_copy()
    world.orders.transition("1", "note")
    world.flush()
    assert world.evict("1") == "OK"
    other = world.more()

    def restore_wipe_and_recover() -> None:
        world.sql_back(saved)
        world.wipe(scripts_stay=True)
        other.recover()

    with before_call(world.hot, "hydrate", restore_wipe_and_recover):
        (result,) = world.orders.transition_many([model.Move("1", "pay")])
    assert isinstance(result, model.Receipt)
    assert (result.version, result.from_state) == (2, "placed")
    world.flush()
    assert world.versions("1") == [1, 2]
    world.verify()
