"""Claims on real servers: who may move an instance, and what becomes of a claim when anything ends (P1, P4, P8)."""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest

from statecache import Move
from statecache.aio import AsyncStateCache
from statecache.core import errors, model
from statecache.engine import warming
from statecache.hot import claims as hot_claims
from statecache.hot.store import HotStore
from tests.support import refusing, waiting, worlds


@pytest.fixture
def world(redis_url: str, database_url: str, namespace: str) -> Iterator[worlds.World]:
    with worlds.World(redis_url, database_url, namespace) as made:
        yield made


def expire(world: worlds.World, claim: Any) -> None:
    """Let the claim's time pass: its end is moved into the past, in Redis, which alone judges it."""
    key = world.keyspace.instance(world.partition_of(claim.id), "order", claim.id)
    words = world.client.hget(key, "@c").decode().split(" ")
    words[1] = str(world.hot.time_ms() - 1)
    world.client.hset(key, "@c", " ".join(words))
    world.client.zadd(world.keyspace.claims(world.partition_of(claim.id)), {f"order:{claim.id}": int(words[1])})


# --- the right to move -------------------------------------------------------------------------------------------------


def test_only_the_holder_moves_it(world: worlds.World) -> None:
    world.start("1")
    with world.orders.claim("1", ttl=30, worker="packer") as claim:
        with pytest.raises(errors.FencedError, match="packer holds it until") as refused:
            world.orders.transition("1", "pay")
        assert (refused.value.worker, refused.value.expires_ms) == ("packer", claim.expires_ms)
        with pytest.raises(errors.FencedError, match="packer holds it"):
            world.orders.claim("1")
        assert claim.transition("pay", {"method": "card"}, increment={"tries": 1}).version == 2
        assert claim.get().data == {"method": "card", "tries": 1}
        assert claim.transition("note", unset=["method"], expect_version=2).version == 3
    assert world.orders.transition("1", "ship").version == 4
    world.flush()
    world.verify()
    assert [row.event for row in world.orders.history("1")] == ["@start", "pay", "note", "ship"]


def test_a_claim_leaves_no_trace_in_data_and_hash(world: worlds.World) -> None:
    """Claimed, moved and released, a hash is as it would be without: no field and no flag is left."""
    world.start("1", amount=1)
    with world.orders.claim("1") as claim:
        assert world.orders.get("1").data == {"amount": 1}
        world.flush()
        world.verify()
        claim.transition("pay")
    key = world.keyspace.instance(world.partition_of("1"), "order", "1")
    fields = world.client.hgetall(key)
    assert set(fields) == {b"@", b"@r", b"amount"}
    assert len(fields[b"@"].split(b" ")) == 6


def test_an_instance_of_many_fields_stays_marked(world: worlds.World) -> None:
    """Its fields are counted before each patch, because a flag says so: claims, evictions and warmings keep that flag."""
    many = {f"f{number}": number for number in range(64)}
    world.start("1", **many)
    world.orders.transition("1", "note", data={f"g{number}": number for number in range(64)})
    key = world.keyspace.instance(world.partition_of("1"), "order", "1")

    def flags() -> set[str]:
        return set(world.client.hget(key, "@").decode().split(" ")[6])

    assert flags() == {"w"}
    claim = world.orders.claim("1")
    assert flags() == {"w", "c"}
    claim.transition("note", {f"h{number}": number for number in range(64)})
    assert flags() == {"w", "c"}
    expire(world, claim)
    world.orders.transition("1", "note", {f"i{number}": number for number in range(64)})
    assert flags() == {"w"}
    with world.orders.claim("1"):
        world.flush()
        world.verify()
        assert world.evict("1") == "KEPT"
    assert flags() == {"w"}
    for come_back in (lambda: warming.warm(world.cache), lambda: world.orders.transition("1", "note")):
        world.flush()
        assert world.evict("1") == "OK"
        come_back()
        assert flags() == {"w"}
        with pytest.raises(errors.InvalidDataError, match="257"):
            world.orders.transition("1", "note", {"one_more": 1})


def test_the_late_holder_is_refused_though_nobody_else_has_come(world: worlds.World) -> None:
    world.start("1")
    claim = world.orders.claim("1")
    expire(world, claim)
    with pytest.raises(errors.FencedError, match="no longer in force"):
        claim.transition("pay")
    with pytest.raises(errors.FencedError, match="no longer in force"):
        claim.renew()
    assert claim.release() is False
    assert world.orders.transition("1", "pay").version == 2, "anybody may move it again, which ends the claim"
    with pytest.raises(errors.FencedError):
        claim.transition("ship")


def test_the_late_holder_meets_the_next_one(world: worlds.World) -> None:
    """A claims - its time passes - B claims - A's transition arrives: refused, B's is applied."""
    world.start("1")
    late = world.orders.claim("1", worker="a")
    expire(world, late)
    now = world.orders.claim("1", worker="b")
    assert now.order > late.order
    with pytest.raises(errors.FencedError, match="b holds it until"):
        late.transition("pay")
    assert late.release() is False, "and its release does not end B's claim"
    assert now.transition("pay").version == 2


def test_a_released_claim_is_of_no_use(world: worlds.World) -> None:
    world.start("1")
    claim = world.orders.claim("1")
    assert claim.release() is True
    with pytest.raises(errors.FencedError, match="claim it again"):
        claim.transition("pay")
    assert claim.release() is False


def test_renewing_keeps_the_token(world: worlds.World) -> None:
    world.start("1")
    claim = world.orders.claim("1", ttl=10)
    before, token = claim.expires_ms, claim.token
    claim.renew(timedelta(minutes=5))
    assert claim.expires_ms >= before + 280_000
    assert claim.transition("pay").version == 2
    assert claim.token == token


def test_tokens_grow_with_each_grant(world: worlds.World) -> None:
    world.start("1")
    orders = []
    for _ in range(12):
        with world.orders.claim("1") as claim:
            orders.append(claim.order)
    assert orders == sorted(set(orders))


def test_moves_of_a_list_name_their_claims(world: worlds.World) -> None:
    for id in ("1", "2", "3"):
        world.start(id)
    mine, others = world.orders.claim("1"), world.orders.claim("2")
    results = world.orders.transition_many(
        [Move("1", "pay", claim=mine.token), Move("1", "ship", claim=mine.token), Move("2", "pay"), Move("3", "pay")]
    )
    assert [type(one).__name__ for one in results] == ["Receipt", "Receipt", "FencedError", "Receipt"]
    assert others.transition("pay").version == 2


def test_a_renewed_claim_outlives_its_time(world: worlds.World) -> None:
    """A thread renews it: after many times its length it is still in force, and ends with its block."""
    world.start("1")
    with world.orders.claim("1", ttl=0.5, renew=True) as claim:
        first = claim.expires_ms
        waiting.wait_until(lambda: claim.expires_ms > first + 1000, "the claim was renewed")
        assert claim.transition("pay").version == 2
    assert world.orders.claims() == []


def test_a_renewed_claim_that_was_shortened_is_renewed_in_time(world: worlds.World) -> None:
    world.start("1")
    with world.orders.claim("1", ttl=60, renew=True) as claim:
        claim.renew(0.6)
        shortened = claim.expires_ms
        waiting.wait_until(lambda: claim.expires_ms > shortened + 10_000, "the claim was renewed")
        assert claim.transition("pay").version == 2


# --- what is refused at the door ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ttl", [0, -1, "30", None, True, float("nan"), float("inf"), timedelta(days=400), 1e300])
def test_a_wrong_ttl_is_refused(world: worlds.World, ttl: Any) -> None:
    with pytest.raises(errors.InvalidDataError, match=r"ttl .* is refused"):
        world.orders.claim("1", ttl=ttl)


def test_wrong_arguments_are_refused(world: worlds.World) -> None:
    world.start("1")
    for worker in ("", "two words", "x" * 33, 5, "ä"):
        with pytest.raises(errors.InvalidDataError, match=r"worker .* is refused"):
            world.orders.claim("1", worker=worker)  # type: ignore[arg-type]
    for token in ("", "1", "1-", "a-b", 5, "1-1 1"):
        (refused,) = world.orders.transition_many([Move("1", "pay", claim=token)])  # type: ignore[arg-type]
        assert isinstance(refused, errors.InvalidDataError)
    for state in ("nowhere", None, []):
        with pytest.raises(errors.InvalidDataError, match=r"state .* is refused"):
            world.orders.claim_next(state)  # type: ignore[arg-type]
    for limit in ("x", 0, True):
        with pytest.raises(errors.InvalidDataError, match=r"limit .* is refused"):
            world.orders.claims(limit)  # type: ignore[arg-type]
    with pytest.raises(errors.NotFoundError):
        world.orders.claim("nobody")


# --- the next one ---------------------------------------------------------------------------------------------------------


def test_the_oldest_that_nobody_holds_comes_first(world: worlds.World) -> None:
    ids = [f"o{number}" for number in range(5)]
    for id in ids:
        world.start(id)
        world.orders.transition(id, "pay")
    assert world.orders.claim_next("paid") is None, "nothing was flushed yet: SQL does not know of them"
    world.flush()
    held = world.orders.claim(ids[1])
    world.orders.transition(ids[2], "ship")  # SQL still says paid
    taken = [world.orders.claim_next("paid") for _ in range(3)]
    assert [claim.id for claim in taken if claim] == [ids[0], ids[3], ids[4]]
    assert world.orders.claim_next("paid") is None
    held.release()
    again = world.orders.claim_next("paid", worker="late")
    assert again is not None
    assert (again.id, again.worker) == (ids[1], "late")


def test_cold_instances_are_handed_out_in_their_turn(world: worlds.World) -> None:
    """The two oldest are evicted: they are brought back, and come before the younger hot one."""
    for id in ("1", "2", "3"):
        world.start(id)
        world.orders.transition(id, "pay")
    world.flush()
    assert [world.evict(id) for id in ("1", "2")] == ["OK", "OK"]
    claims = [world.orders.claim_next("paid") for _ in range(4)]
    assert [claim.id if claim else None for claim in claims] == ["1", "2", "3", None]
    assert claims[0].transition("ship").version == 3  # type: ignore[union-attr]


def test_held_ones_are_passed_over_page_after_page(world: worlds.World) -> None:
    """More are held than fit one page of the search."""
    ids = [f"o{number:03}" for number in range(130)]
    world.orders.start_many(ids)
    world.flush()
    found = [world.orders.claim_next("placed") for _ in range(130)]
    assert {claim.id for claim in found if claim} == set(ids)
    assert world.orders.claim_next("placed") is None
    assert len(world.orders.claims()) == 130


def test_older_than(world: worlds.World) -> None:
    world.start("1")
    world.flush()
    assert world.orders.claim_next("placed", older_than=timedelta(hours=1)) is None
    assert world.orders.claim_next("placed", older_than=timedelta(0)) is not None


def test_threads_that_ask_together_get_one_each(world: worlds.World) -> None:
    world.orders.start_many([f"o{number}" for number in range(8)])
    world.flush()
    claims = worlds.together(*[lambda: world.orders.claim_next("placed") for _ in range(10)])
    ids = [claim.id for claim in claims if claim]
    assert len(ids) == len(set(ids)) == 8


# --- lost replies -----------------------------------------------------------------------------------------------------------


def lose_one_reply(world: worlds.World, call: int = 1) -> Any:
    """The script runs, its reply is lost: what a cut connection leaves behind."""

    def fail() -> None:
        raise errors.UnavailableError("the reply is lost")

    return worlds.after_call(HotStore, "ask", fail, call=call)


def test_a_claim_whose_reply_was_lost_is_found_again(world: worlds.World) -> None:
    """P4: claim.lua runs - the reply is lost - the call is repeated: it gets its own claim, not a refusal."""
    world.start("1")
    with lose_one_reply(world):
        claim = world.orders.claim("1")
    assert claim.token == "1-1"
    assert claim.transition("pay").version == 2


def test_the_next_one_whose_reply_was_lost_is_the_same_one(world: worlds.World) -> None:
    """P4: 2 is claimed, 1 being held - the reply is lost - 1 is released - repeated: 2 again, and 1 is left to others."""
    world.orders.start_many(["1", "2"])
    world.flush()
    first = world.orders.claim("1")
    ids = {"1", "2"}

    def release_and_lose() -> None:
        first.release()
        raise errors.UnavailableError("the reply is lost")

    with worlds.after_call(HotStore, "ask", release_and_lose):
        claim = world.orders.claim_next("placed")
    assert claim is not None
    other = world.orders.claim_next("placed")
    assert other is not None
    assert {claim.id, other.id} == ids
    assert claim.id == "2"
    assert len(world.orders.claims()) == 2


def test_renewals_and_releases_whose_replies_were_lost(world: worlds.World) -> None:
    world.start("1")
    claim = world.orders.claim("1")
    with lose_one_reply(world):
        claim.renew()
    with lose_one_reply(world):
        claim.release()
    assert world.orders.claims() == []


def test_a_transition_repeated_after_its_claim_ended_is_the_same(world: worlds.World) -> None:
    """P4: applied under the claim - the reply is lost, the claim ends - repeated with its id: the same receipt."""
    world.start("1")
    claim = world.orders.claim("1")
    first = claim.transition("pay", transition_id="t1")
    claim.release()
    again = claim.transition("pay", transition_id="t1")
    assert (again.version, again.duplicate) == (first.version, True)


# --- the cold tier, dead letters, recovery ------------------------------------------------------------------------------------


def test_a_claimed_hash_is_not_evicted_until_the_claim_ends(world: worlds.World) -> None:
    world.start("1")
    world.flush()
    claim = world.orders.claim("1")
    assert world.evict("1") == "KEPT"
    expire(world, claim)
    assert world.evict("1") == "OK"
    with pytest.raises(errors.FencedError):
        claim.transition("pay")
    assert world.orders.claim("1").order > claim.order


def test_a_parked_instance_is_not_claimed(world: worlds.World) -> None:
    """Parked while it is claimed it keeps its claim, and its holder is told what is the matter."""
    world.start("1")
    claim = world.orders.claim("1")
    world.hot.park([(world.partition_of("1"), "order:1")])
    claim.renew()
    assert world.orders.get("1").parked
    claim.release()
    assert world.orders.get("1").parked
    with pytest.raises(errors.ParkedError):
        world.orders.claim("1")


def test_an_instance_of_letters_only_is_parked_for_claims_too(world: worlds.World) -> None:
    """SQL refused its very first entry, and the hot copy is gone: it exists, as a read and a write of it say."""
    refusing.refuse(world.durable)
    world.orders.start("1", reason=refusing.REASON)
    world.flush()
    world.wipe()
    for act in (world.orders.get, world.orders.claim, lambda id: world.orders.transition(id, "pay")):
        with pytest.raises(errors.ParkedError):
            act("1")


def test_a_claim_survives_a_recovery_that_finds_all_intact(world: worlds.World) -> None:
    world.start("1")
    claim = world.orders.claim("1")
    world.disown()
    world.client.script_flush("SYNC")
    assert claim.transition("pay").version == 2
    assert world.meta(world.partition_of("1"))["epoch"] == "2"
    claim.renew()
    claim.release()
    assert world.orders.claim("1").token == "2-2", "the counter stands in meta; its epoch has grown"


def test_tokens_grow_over_the_loss_of_redis(world: worlds.World) -> None:
    """Wiped: the holder is refused, and the next token is above all that were given."""
    world.start("1")
    world.flush()
    claims = [world.orders.claim("1")]
    for _ in range(3):
        world.wipe()
        with pytest.raises(errors.FencedError):
            claims[-1].transition("pay")
        claims.append(world.orders.claim("1"))
    assert [claim.order for claim in claims] == sorted({claim.order for claim in claims})
    assert claims[-1].transition("pay").version == 2


def test_a_claim_given_in_a_lost_tail_is_void(world: worlds.World) -> None:
    """A copy of Redis is made - A claims and moves - the copy comes back - B claims: A is refused, versions have no fork."""
    world.start("1")
    world.flush()
    saved = world.redis_copy()
    lost = world.orders.claim("1", worker="a")
    lost.transition("pay")
    world.flush()
    world.redis_back(saved)
    found = world.orders.claim("1", worker="b")
    assert found.order > lost.order
    with pytest.raises(errors.FencedError, match="b holds it"):
        lost.transition("ship")
    assert found.transition("ship").version == 3
    world.flush()
    world.verify()


def test_holders_are_listed(world: worlds.World) -> None:
    world.orders.start_many(["1", "2", "with:colons"])
    claims = [
        world.orders.claim(id, ttl=ttl, worker=f"w-{ttl}") for id, ttl in (("1", 60), ("2", 20), ("with:colons", 40))
    ]
    listed = world.orders.claims()
    assert [(one.id, one.worker) for one in listed] == [("2", "w-20"), ("with:colons", "w-40"), ("1", "w-60")]
    assert [one.token for one in listed] == [claims[place].token for place in (1, 2, 0)]
    claims[1].release()
    expire(world, claims[0])
    assert [one.id for one in world.orders.claims()] == ["with:colons"]


def test_memory_is_as_without_claims(world: worlds.World) -> None:
    """A claimed hash stays a listpack with the server's own limits: no value is above 64 bytes."""
    world.client.config_set("hash-max-listpack-value", 64)
    try:
        world.start("1")
        world.orders.claim("1", worker="a-worker-of-thirty-characters0")
        key = world.keyspace.instance(world.partition_of("1"), "order", "1")
        assert world.client.object("encoding", key) == b"listpack"
    finally:
        world.client.config_set("hash-max-listpack-value", 256)


def test_histories_do_not_know_of_claims(world: worlds.World) -> None:
    world.start("1")
    with world.orders.claim("1") as claim:
        receipts: list[model.Receipt] = [claim.transition("pay"), claim.transition("ship")]
    world.flush()
    rows = world.orders.history("1")
    assert [row.version for row in rows] == [1, *[one.version for one in receipts]]
    assert list(itertools.chain(*[row.patch for row in rows])) == []


# --- asyncio ------------------------------------------------------------------------------------------------------------------


def test_the_same_with_await(world: worlds.World) -> None:
    """``async with``, ``await`` and ``claim_next``: the same claims, beside those of threads."""

    async def use() -> None:
        async with AsyncStateCache.connect(
            world.redis_url, world.database_url, world.namespace, partition_count=2
        ) as cache:
            orders = await cache.machine(worlds.Order)
            async with orders.claim("1", ttl=30, worker="task") as claim:
                with pytest.raises(errors.FencedError, match="task holds it"):
                    await orders.transition("1", "pay")
                with pytest.raises(errors.FencedError, match="task holds it"):
                    world.orders.transition("1", "pay")
                assert (await claim.transition("pay")).version == 2
                await claim.renew(60)
                assert (await claim.get()).state == "paid"
                assert [one.token for one in await orders.claims()] == [claim.token]
            assert await claim.release() is False
            with pytest.raises(errors.FencedError, match="no longer in force"):
                await claim.transition("ship")
            held = await orders.claim_next("placed")
            assert held is not None
            assert held.id == "2"
            assert held.order >= (1, 1)
            assert await orders.claim_next("placed") is None
            again = await orders.claim("1")
            assert await again.release() is True
            assert await orders.find(stuck=True) == []

    world.orders.start_many(["1", "2"])
    world.flush()
    asyncio.run(use())


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_what_a_block_raised_matters_more_than_its_release(
    redis_url: str, sqlite_url: str, namespace: str, kind: str
) -> None:
    """The client is closed within the block: the error of the block comes out."""

    async def use() -> None:
        cache = await AsyncStateCache.connect(redis_url, sqlite_url, namespace, partition_count=2)
        orders = await cache.machine(worlds.Order)
        await orders.start("1")
        async with orders.claim("1"):
            await cache.close()
            raise ValueError("of the block")

    def use_sync() -> None:
        with worlds.World(redis_url, sqlite_url, namespace) as world:
            world.start("1")
            with world.orders.claim("1"):
                world.cache.close()
                raise ValueError("of the block")

    with pytest.raises(ValueError, match="of the block"):
        use_sync() if kind == "sync" else asyncio.run(use())


@pytest.mark.parametrize("kind", ["claim", "claim_next"])
def test_a_claim_whose_task_was_cancelled_meanwhile_is_given_back(world: worlds.World, kind: str) -> None:
    """Redis has granted it, and the task that asked is gone: nobody could end it, and all others were refused for an hour."""
    world.start("1")
    world.flush()
    granted, go_on = threading.Event(), threading.Event()
    real = hot_claims.ask

    def ask(*arguments: Any) -> Any:
        answer = real(*arguments)
        if not granted.is_set():
            granted.set()
            go_on.wait(30)
        return answer

    async def use() -> None:
        async with AsyncStateCache.connect(
            world.redis_url, world.database_url, world.namespace, partition_count=2
        ) as cache:
            orders = await cache.machine(worlds.Order)

            async def take() -> Any:
                if kind == "claim":
                    return await orders.claim("1", ttl=3600)
                return await orders.claim_next("placed", ttl=3600)

            with mock.patch.object(hot_claims, "ask", ask):
                task = asyncio.create_task(take())
                await asyncio.to_thread(granted.wait, 30)
                assert [held.id for held in world.orders.claims()] == ["1"]
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                go_on.set()
                await asyncio.to_thread(waiting.wait_until, lambda: not world.orders.claims(), "it is given back")

    asyncio.run(use())
    assert world.orders.transition("1", "pay").version == 2


def test_claim_that_nobody_has_is_not_renewed(world: worlds.World) -> None:
    """Its holder is gone: it ends when its time is over, and its thread with it."""
    world.start("1")
    world.orders.claim("1", ttl=0.6, renew=True)
    gc.collect()
    waiting.wait_until(lambda: not world.orders.claims(), "the claim to end", 30)
    waiting.wait_until(lambda: not _renewing("1"), "its thread to end", 30)
    world.orders.transition("1", "note")


def test_claim_does_not_outlive_the_store(redis_url: str, sqlite_url: str, namespace: str) -> None:
    with worlds.World(redis_url, sqlite_url, namespace) as world:
        world.start("closed")
        claim = world.orders.claim("closed", ttl=0.6, renew=True)
        assert _renewing("closed")
    waiting.wait_until(lambda: not _renewing("closed"), "its thread to end", 30)
    assert claim.id == "closed"


def _renewing(id: str) -> bool:
    return f"statecache-claim-{id}" in {thread.name for thread in threading.enumerate()}
