"""SQL refuses an entry for its data: it becomes a dead letter, its instance waits, everything else flows (P10, H12)."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from statecache import Move
from statecache.cli import exits
from statecache.core import errors
from statecache.durable import recoveries
from statecache.engine import letters
from tests.support import refusing, servers, worlds
from tests.support.worlds import before_call
from workers import jobs


@pytest.fixture
def world(redis_url: str, database_and_client: tuple[str, str], namespace: str) -> Iterator[worlds.World]:
    database_url, client = database_and_client
    with worlds.World(redis_url, database_url, namespace, client=client) as made:
        yield made
        made.verify()


def refused(world: worlds.World, id: str = "bad", *, behind: int = 2) -> list[Any]:
    """Start and pay an order, have its note refused by SQL, and let some notes wait behind it; those receipts."""
    world.start(id, ["pay"], amount=1)
    world.flush()
    refusing.refuse(world.durable)
    receipts = [world.orders.transition(id, "note", {"seen": "refused"}, reason=refusing.REASON)]
    receipts += [world.orders.transition(id, "note", {"behind": number}) for number in range(behind)]
    world.flush()
    return receipts


def waiting_ones(world: worlds.World, id: str = "bad") -> list[tuple[int, bool]]:
    return [(letter.entry.version, letter.waiting) for letter in world.durable.letters("order", id)]


def test_one_refused_entry_stops_only_its_own_instance(world: worlds.World) -> None:
    for number in range(6):
        world.start(f"good{number}")
    refused(world)
    for number in range(6):
        world.orders.transition(f"good{number}", "pay")
    more = world.orders.start("later")
    world.flush()
    assert waiting_ones(world) == [(3, False), (4, True), (5, True)]
    assert world.versions("bad") == [1, 2]
    assert [world.versions(f"good{number}") for number in range(6)] == [[1, 2]] * 6
    world.cache.wait_durable(more)
    for partition in (0, 1):
        assert str(world.watermark(partition)) == world.log(partition)[-1]


def test_who_waits_for_it_is_told(world: worlds.World) -> None:
    receipts = refused(world)
    for receipt in receipts:
        with pytest.raises(errors.ParkedError, match="dead-letters"):
            world.cache.wait_durable(receipt)
    with pytest.raises(errors.ParkedError, match="dead-letters"):
        world.orders.transition("bad", "ship")
    with pytest.raises(errors.ParkedError):
        world.orders.transition("bad", "note", durability="durable")
    seen = world.orders.get("bad")
    assert (seen.version, seen.parked, seen.data) == (5, True, {"amount": 1, "seen": "refused", "behind": 1})


def test_a_durable_call_whose_own_entry_is_refused(world: worlds.World) -> None:
    """Its error tells that the transition stands, and which it is; the next call's, that nothing was written (P7, P10)."""
    for id in ("one", "many"):
        world.start(id, ["pay"])
    world.flush()
    refusing.refuse(world.durable)
    with pytest.raises(
        errors.ParkedError, match="order:one version 3 stands in Redis and waits as a dead letter"
    ) as one:
        world.orders.transition("one", "note", reason=refusing.REASON, durability="durable")
    moves = [Move("many", "note", reason=refusing.REASON), Move("many", "ship")]
    many = world.orders.transition_many(moves, durability="durable")
    told = [one.value, *many]
    assert [type(error) for error in told] == [errors.ParkedError] * 3
    for error, (id, version, state) in zip(
        told, [("one", 3, "paid"), ("many", 3, "paid"), ("many", 4, "shipped")], strict=True
    ):
        assert isinstance(error, errors.ParkedError)
        receipt = pickle.loads(pickle.dumps(error)).receipt
        assert (receipt.id, receipt.version, receipt.state) == (id, version, state)
        assert world.orders.history(id)[receipt.version - 1].entry_id == receipt.entry_id
    with pytest.raises(errors.ParkedError, match="order:one is parked") as not_applied:
        world.orders.transition("one", "ship", durability="durable")
    assert not_applied.value.receipt is None
    assert world.orders.get("one").version == 3
    refusing.accept(world.durable)
    letters.retry(world.cache, "order", "one")
    world.cache.wait_durable(one.value.receipt)


def test_a_repetition_of_a_parked_transition(world: worlds.World) -> None:
    """The reply of the refused transition was lost, and the caller repeats it: applied once, and the same receipt or the
    truth about it; the ids are known to nobody but the letters (P4)."""
    receipts = refused(world)
    for receipt in receipts:
        try:
            again = world.orders.transition("bad", "note", transition_id=receipt.transition_id)
        except errors.ParkedError:
            continue
        assert (again.version, again.duplicate) == (receipt.version, True)
    refusing.accept(world.durable)
    assert letters.retry(world.cache, "order", "bad") == 3
    for receipt in receipts:
        again = world.orders.transition("bad", "note", transition_id=receipt.transition_id)
        assert (again.version, again.duplicate) == (receipt.version, True)


def test_retry_after_the_constraint_is_gone(world: worlds.World) -> None:
    receipts = refused(world)
    refusing.accept(world.durable)
    assert letters.retry(world.cache, "order", "bad") == 3
    for receipt in receipts:
        world.cache.wait_durable(receipt)
    assert [row.version for row in world.orders.history("bad")] == [1, 2, 3, 4, 5]
    assert world.orders.transition("bad", "ship").version == 6
    seen = world.orders.get("bad")
    assert (seen.state, seen.parked, seen.data) == ("shipped", False, {"amount": 1, "seen": "refused", "behind": 1})
    world.flush()
    with pytest.raises(errors.NotFoundError):
        letters.retry(world.cache, "order", "bad")


def test_retry_while_sql_still_refuses(world: worlds.World) -> None:
    refused(world)
    before = world.sql_dump()
    with pytest.raises(errors.StateCacheError):
        letters.retry(world.cache, "order", "bad")
    assert world.sql_dump() == before
    with pytest.raises(errors.ParkedError):
        world.orders.transition("bad", "ship")


def test_discard_goes_on_from_the_checkpoint(world: worlds.World) -> None:
    receipts = refused(world)
    refusing.accept(world.durable)
    assert letters.discard(world.cache, "order", "bad") == 3
    for receipt in receipts:
        with pytest.raises(errors.IntegrityError, match="lost"):
            world.cache.wait_durable(receipt)
    seen = world.orders.get("bad")
    assert (seen.state, seen.version, seen.parked, seen.data) == ("paid", 2, False, {"amount": 1})
    assert world.orders.transition("bad", "ship").version == 3
    world.flush()
    assert [row.event for row in world.orders.history("bad")] == ["@start", "pay", "ship"]


@pytest.mark.parametrize("act", [letters.discard, letters.retry])
def test_a_recovery_begins_between_the_flag_and_the_letters(world: worlds.World, act: Callable[..., int]) -> None:
    """It counts on the letters that it finds: none is taken from under it, until Redis is found true again."""
    refused(world)
    refusing.accept(world.durable)

    def take() -> None:
        row = world.durable.identity()
        recoveries.take(world.durable, (row.epoch, row.owner), row.epoch + 1, "other", int(time.time() * 1000))

    client = world.more(call_timeout_seconds=1.0)
    with before_call(client.durable, "partitions", take), pytest.raises(errors.RecoveringError):
        act(client, "order", "bad")
    assert waiting_ones(world) == [(3, False), (4, True), (5, True)]
    world.cache.recover()
    assert act(world.cache, "order", "bad") == 3


@pytest.mark.parametrize("act", [letters.discard, letters.retry])
def test_a_recovery_goes_ahead_between_the_look_and_the_transaction(
    world: worlds.World, act: Callable[..., int]
) -> None:
    """It has ended when the partition's row is held: a public error says so, nothing was changed, the next try works."""
    refused(world)
    refusing.accept(world.durable)
    other = world.more()
    with (
        before_call(world.durable, "flush_transaction", other.recover),
        pytest.raises(errors.RecoveringError, match="order:bad: a recovery went ahead, nothing was changed") as told,
    ):
        act(world.cache, "order", "bad")
    assert exits.code_of(told.value) == exits.UNAVAILABLE
    assert waiting_ones(world) == [(3, False), (4, True), (5, True)]
    assert act(world.cache, "order", "bad") == 3


def test_the_job_is_tried_again_where_a_recovery_goes_ahead(world: worlds.World) -> None:
    """The letters' instance is not counted among those that SQL still refuses."""
    refused(world)
    refusing.accept(world.durable)
    other = world.more()
    with before_call(world.durable, "flush_transaction", other.recover), pytest.raises(errors.RecoveringError):
        jobs._retry_one(world.cache, "order", "bad")
    assert jobs._retry_one(world.cache, "order", "bad") == (3, 0)


def test_a_start_that_sql_refuses(world: worlds.World) -> None:
    """Nothing of the instance is in SQL; discarded, it can be started again."""
    refusing.refuse(world.durable)
    world.orders.start("bad", reason=refusing.REASON)
    world.orders.transition("bad", "pay")
    world.flush()
    assert waiting_ones(world) == [(1, False), (2, True)]
    with pytest.raises((errors.ParkedError, errors.AlreadyExistsError)):
        world.orders.start("bad")
    assert letters.discard(world.cache, "order", "bad") == 2
    assert world.orders.start("bad").version == 1
    world.flush()
    assert world.versions("bad") == [1]


def test_a_discarded_start_whose_hash_is_still_parked(world: worlds.World) -> None:
    """The letters are deleted, the process dies before it drops the hash, and SQL has never had the instance: whoever meets
    the hash drops it, and it can be started again."""
    refusing.refuse(world.durable)
    world.orders.start("bad", reason=refusing.REASON)
    world.flush()
    refusing.accept(world.durable)
    with world.durable.flush_transaction() as transaction:
        assert len(transaction.take_letters("order", "bad")) == 1
    with pytest.raises(errors.NotFoundError):
        world.orders.transition("bad", "pay")
    assert world.orders.start("bad").version == 1
    world.flush()


def test_moves_that_come_before_the_flag(world: worlds.World) -> None:
    """The flusher commits the letters and dies before it flags the hash; more moves are accepted, and wait too (H12 a)."""
    world.start("bad", ["pay"])
    world.flush()
    refusing.refuse(world.durable)
    world.orders.transition("bad", "note", reason=refusing.REASON)

    class Died(BaseException):
        """Caught by nobody, and no ``KeyboardInterrupt``: that would end the async client's event loop."""

    def die(*_: object) -> None:
        raise Died

    with pytest.raises(Died), worlds.before_call(world.hot, "park", die):
        world.flush()
    world.orders.transition("bad", "note")
    world.flusher().step()  # another process's: it knows of the letters from SQL alone
    assert waiting_ones(world) == [(3, False), (4, True)]
    with pytest.raises(errors.ParkedError):
        world.orders.transition("bad", "note")


def test_acting_while_entries_are_still_in_the_log(world: worlds.World) -> None:
    """Two moves slipped in before the flag and are not flushed: ``retry`` takes them along, no gap (H12 d)."""
    refused(world, behind=0)
    refusing.accept(world.durable)
    key = world.keyspace.instance(world.partition_of("bad"), "order", "bad")
    own = world.client.hget(key, "@")
    world.client.hset(key, "@", own.decode().removesuffix(" p"))
    world.orders.transition("bad", "note")
    world.orders.transition("bad", "ship")
    assert letters.retry(world.cache, "order", "bad") == 3
    assert world.versions("bad") == [1, 2, 3, 4, 5]
    assert world.orders.get("bad").state == "shipped"


def test_a_parked_instance_is_not_evicted_and_comes_back_parked(world: worlds.World) -> None:
    """Evicted it would come back at an older version (H8); wiped and hydrated it is parked (H12 c)."""
    refused(world)
    assert world.evict("bad") == "KEPT"
    world.wipe()
    with pytest.raises(errors.ParkedError):
        world.orders.transition("bad", "note")
    assert world.orders.get("bad").parked
    refusing.accept(world.durable)
    assert letters.retry(world.cache, "order", "bad") == 3
    assert world.orders.transition("bad", "note").version == 6
    world.flush()


def test_a_rollback_below_a_letter(world: worlds.World) -> None:
    """Redis comes back without the entries that SQL holds as letters: their versions are not given again (H12 b)."""
    world.start("bad", ["pay"])
    world.flush()
    saved = world.redis_copy()
    refusing.refuse(world.durable)
    world.orders.transition("bad", "note", reason=refusing.REASON)
    world.orders.transition("bad", "note")
    world.flush()
    world.redis_back(saved)
    with pytest.raises(errors.ParkedError):
        world.orders.transition("bad", "note")
    assert waiting_ones(world) == [(3, False), (4, True)]


def test_a_wipe_before_anything_of_it_is_in_sql(world: worlds.World) -> None:
    """Only letters are left of an instance: neither can it be started, nor is it unknown."""
    refusing.refuse(world.durable)
    world.orders.start("bad", reason=refusing.REASON)
    world.flush()
    world.wipe()
    with pytest.raises(errors.ParkedError):
        world.orders.start("bad")


def test_a_record_that_somebody_else_wrote(world: worlds.World) -> None:
    """A foreign XADD is kept as a letter; nothing stops, and a recovery that finds it at the watermark does not either."""
    world.start("a")
    partition = world.partition_of("a")
    epoch = world.meta(partition)["epoch"]
    forged = world.client.xadd(world.keyspace.log(partition), {"x": "y"}, id=f"{epoch}-*")
    world.flush()
    foreign = ("@foreign", f"{partition}:{forged.decode()}")
    assert world.durable.parked_instances() == [foreign]
    assert world.watermark(partition) == worlds.entry.EntryId.parse(forged.decode())
    world.cache.recover()
    world.orders.transition("a", "pay")
    world.flush()
    assert world.versions("a") == [1, 2]
    assert letters.discard(world.cache, *foreign) == 1
    assert world.durable.parked_instances() == []


def test_an_entry_that_contradicts_sql(world: worlds.World) -> None:
    """A forged entry names a version that SQL has: it is kept aside, the history stays."""
    world.start("a", ["pay"])
    world.flush()
    partition = world.partition_of("a")
    log = world.keyspace.log(partition)
    [(_, fields)] = world.client.xrevrange(log, count=1)
    text = fields[b"e"].decode().split("\x1f")
    text[7] = "forged"
    world.client.xadd(log, {"e": "\x1f".join(text)}, id=f"{world.meta(partition)['epoch']}-*")
    world.flush()
    assert [letter.entry.transition_id for letter in world.durable.letters("order", "a")] == ["forged"]
    assert len(world.versions("a")) == 2
    assert letters.discard(world.cache, "order", "a") == 1
    assert world.orders.transition("a", "ship").version == 3
    world.flush()


def test_a_row_that_is_in_history_already_is_not_swallowed(world: worlds.World) -> None:
    """SQL holds version 2 by another hand, the checkpoint is at 1: the key hit is an alarm, not a thing to skip (fact 8)."""
    world.start("a")
    world.flush()
    with world.durable.database.writer.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO statecache_transitions (partition, epoch, seq, machine, id, version, event, from_state, to_state, "
            "at_ms, transition_id, machine_version) VALUES (0, 0, 1, 'order', 'a', 2, 'pay', 'placed', 'paid', 1, 'other', 1)"
        )
    world.orders.transition("a", "pay")
    world.flush()
    assert waiting_ones(world, "a") == [(2, False)]
    with world.durable.database.writer.begin() as connection:
        connection.exec_driver_sql("DELETE FROM statecache_transitions WHERE transition_id = 'other'")
    assert letters.retry(world.cache, "order", "a") == 1


def test_parked_over_a_restart_of_the_server(start_redis: Any, sqlite_url: str, namespace: str) -> None:
    server: servers.ValkeyServer = start_redis()
    with worlds.World(server.url, sqlite_url, namespace, call_timeout_seconds=20.0) as world:
        receipts = refused(world)
        server.kill()
        server.start()
        with pytest.raises(errors.ParkedError):
            world.orders.transition("bad", "ship")
        refusing.accept(world.durable)
        assert letters.retry(world.cache, "order", "bad") == 3
        server.kill()
        server.start()
        assert world.orders.transition("bad", "ship").version == receipts[-1].version + 1
        world.flush()
        world.verify()


def test_history_while_letters_and_later_entries_exist(world: worlds.World) -> None:
    """Letters 3 and 4, and version 5 in the log behind them because the flag came late: history has no gap."""
    refused(world, behind=1)
    key = world.keyspace.instance(world.partition_of("bad"), "order", "bad")
    own = world.client.hget(key, "@")
    world.client.hset(key, "@", own.decode().removesuffix(" p"))
    world.orders.transition("bad", "note", timeout=0.5)
    rows = world.orders.history("bad", timeout=0.5)
    assert [row.version for row in rows] == [1, 2, 3, 4, 5]
    assert [row.durable for row in rows] == [True, True, False, False, False]
    world.flush()


def test_repetition_of_what_waits_as_a_letter_after_redis_was_lost(world: worlds.World) -> None:
    """Its hash comes back from SQL, whose ring does not know the letters. A refusal without a receipt would mean that nothing
    was written, and who repeats it under another id would have it twice after a retry."""
    refusing.refuse(world.durable)
    world.start("1")
    told = [
        world.orders.transition("1", "note", {"n": 1}, reason=refusing.REASON, transition_id="refused"),
        world.orders.transition("1", "pay", transition_id="behind"),
        world.orders.start("2", reason=refusing.REASON, transition_id="begun"),
    ]
    world.flush()
    world.wipe()

    def again(**options: Any) -> list[Any]:
        return [
            world.orders.transition("1", "note", {"n": 1}, reason=refusing.REASON, transition_id="refused", **options),
            world.orders.transition("1", "pay", transition_id="behind", **options),
            world.orders.start("2", reason=refusing.REASON, transition_id="begun", **options),
        ]

    found = again()
    assert [(one.version, one.entry_id, one.duplicate) for one in found] == [
        (one.version, one.entry_id, True) for one in told
    ]
    (bulk,) = world.orders.transition_many([Move("1", "pay", transition_id="behind")])
    assert (bulk.version, bulk.duplicate) == (3, True)
    with pytest.raises(errors.ParkedError) as parked:
        again(durability="durable")
    assert parked.value.receipt is not None
    for id in ("other", None):
        with pytest.raises(errors.ParkedError) as refused:
            world.orders.transition("1", "note", transition_id=id)
        assert refused.value.receipt is None
    with pytest.raises(errors.InvalidDataError, match="it was used before, for the event"):
        world.orders.transition("1", "pay", transition_id="refused")
