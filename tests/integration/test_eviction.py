"""Eviction: who leaves Redis, who stays, and what may happen between the look at SQL and the drop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest

from statecache import State, StateMachine
from statecache.core import errors, items, model
from statecache.engine import eviction, letters
from tests.integration.test_holes import _spoil
from tests.support.servers import ValkeyServer
from tests.support.waiting import wait_until
from tests.support.worlds import Order, World, before_call


@pytest.fixture
def world(redis_url: str, database_url: str, namespace: str) -> Iterator[World]:
    with World(redis_url, database_url, namespace) as world:
        yield world


def hot(world: World) -> set[str]:
    return {id for page in world.hot.instances("order") for _, id in page}


def counted(world: World) -> float:
    return float(world.cache.metrics.text().decode().split("\nstatecache_evictions_total ")[1].split("\n")[0])


def started(world: World, count: int, events: tuple[str, ...] = ()) -> list[str]:
    """So many flushed orders, in the order of their age: each call has a millisecond of its own."""
    ids = [f"o{number:03d}" for number in range(count)]
    at = 0
    for id in ids:
        last = world.start(id, events, amount=1)[-1]
        wait_until(lambda last=last: world.hot.time_ms() > last.at_ms, "the next millisecond")  # type: ignore[misc]
        assert last.at_ms > at
        at = last.at_ms
    world.flush()
    return ids


def aged(hot_ttl: timedelta | None) -> type[StateMachine]:
    """The same machine with another ``hot_ttl``."""
    seconds = None if hot_ttl is None else hot_ttl.total_seconds()
    return StateMachine.from_spec(Order.spec.model_copy(update={"hot_ttl_seconds": seconds}))


# --- who leaves --------------------------------------------------------------------------------------------------------


def test_idle_instances_leave_and_come_back_as_they_were(world: World) -> None:
    ids = started(world, 7, ("pay",))
    before = {id: world.orders.get(id) for id in ids}
    report = eviction.evict(world.cache, idle_seconds=0)
    assert (report.evicted, report.kept, report.above, report.more) == (7, {}, 0, False)
    assert hot(world) == set()
    for id in ids:
        found = world.orders.get(id)
        assert found.source == "durable"
        assert (found.state, found.version, found.data) == ("paid", 2, before[id].data)
    assert hot(world) == set(), "a read leaves it cold"
    assert [world.orders.transition(id, "ship").version for id in ids] == [3] * 7
    assert hot(world) == set(ids)
    world.flush()
    world.verify()


def test_what_is_younger_stays(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the server's clock, which stands still while evictions run: it would move on by more than the 50 ms between them."""
    ids = started(world, 4)
    moved = world.orders.transition(ids[0], "note")
    world.flush()
    wait_until(lambda: world.hot.time_ms() > moved.at_ms + 50, "50 ms idle")
    young = world.orders.transition(ids[3], "note")
    world.flush()
    now = world.hot.time_ms()
    assert now - young.at_ms < 3_600_000
    monkeypatch.setattr(world.hot, "time_ms", lambda: now)
    assert eviction.evict(world.cache, idle_seconds=3600).evicted == 0
    assert eviction.evict(world.cache, idle_seconds=(now - moved.at_ms) / 1000).evicted == 3
    assert hot(world) == {ids[3]}


def test_dry_run_tells_what_a_run_then_does(world: World) -> None:
    started(world, 5)
    world.orders.transition("o001", "pay")  # not flushed
    before, counted_before = world.hot_dump(), counted(world)
    told = eviction.evict(world.cache, idle_seconds=0, dry_run=True)
    assert (told.dry_run, told.evicted, told.kept) == (True, 4, {"moved": 1})
    assert world.hot_dump() == before
    done = eviction.evict(world.cache, idle_seconds=0)
    assert (done.evicted, done.kept, done.gone) == (4, {"moved": 1}, 0)
    assert counted(world) == counted_before + 4
    again = eviction.evict(world.cache, idle_seconds=0)
    assert (again.evicted, again.kept, again.gone) == (0, {"moved": 1}, 4)


def test_only_one_machines_instances(world: World) -> None:
    class Job(StateMachine):
        waiting = State(initial=True)
        done = State(final=True)
        end = waiting.to(done)

    jobs = world.cache.machine(Job)
    jobs.start_many([f"j{number}" for number in range(600)])  # more than a batch
    started(world, 2)
    assert eviction.evict(world.cache, idle_seconds=0, machine="job").evicted == 600
    assert hot(world) == {"o000", "o001"}


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf"), 1e17])
def test_bad_age_is_refused(world: World, seconds: float) -> None:
    with pytest.raises(errors.InvalidDataError, match=r"idle_seconds .* is refused"):
        eviction.evict(world.cache, idle_seconds=seconds)


def test_room_is_made_after_the_servers_clock_was_set_back(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """All have moved later than now: nobody is of any age, and the longest idle leave all the same."""
    ids = started(world, 8)
    cache = world.more(hot_instances_max=5)
    hour_ago = world.hot.time_ms() - 3_600_000
    monkeypatch.setattr(cache.hot, "time_ms", lambda: hour_ago)
    assert eviction.evict(cache).evicted == 3
    assert hot(world) == set(ids[3:])


@pytest.mark.parametrize(
    ("settings", "hot_ttl", "ranges"),
    [
        ({}, None, {"placed": 0.0, "delivered": 0.0}),
        ({"hot_ttl_seconds": 60.0}, None, {"placed": 60.0, "delivered": 60.0}),
        ({"hot_ttl_final_seconds": 5.0}, None, {"placed": 0.0, "delivered": 5.0}),
        ({"hot_ttl_seconds": 60.0, "hot_ttl_final_seconds": 5.0}, timedelta(hours=1), {"placed": 3600.0, "delivered": 5.0}),
        ({"hot_ttl_seconds": 60.0, "hot_ttl_final_seconds": 5.0}, timedelta(seconds=2), {"placed": 2.0, "delivered": 2.0}),
    ],
)  # fmt: skip
def test_age_is_the_machines_or_the_settings(
    world: World, settings: dict[str, float], hot_ttl: timedelta | None, ranges: dict[str, float]
) -> None:
    cache = world.more(**settings)
    cache.machine(aged(hot_ttl))
    found = {one.state: one.ttl_seconds for one in eviction.ranges(cache) if one.machine == "order"}
    assert found["placed"] == ranges["placed"]
    assert found["delivered"] == ranges["delivered"]


def test_by_age_final_ones_sooner(world: World) -> None:
    ids = started(world, 4)
    for event in ("pay", "ship", "deliver"):
        world.orders.transition(ids[0], event)
    world.orders.transition(ids[1], "cancel")
    world.flush()
    cache = world.more(hot_ttl_seconds=3600, hot_ttl_final_seconds=0.001)
    wait_until(lambda: not eviction.evict(cache).kept and hot(world) == set(ids[2:]), "the final ones are cold")


def test_bound_evicts_the_longest_idle_of_all_states(world: World) -> None:
    """Room for 5 of 12: those that moved last stay, whatever their state; and so again when others have moved."""
    ids = started(world, 12)
    for id in ids[:3]:
        last = world.orders.transition(id, "pay")
        wait_until(lambda last=last: world.hot.time_ms() > last.at_ms, "the next millisecond")  # type: ignore[misc]
    world.flush()
    cache = world.more(hot_instances_max=5)
    told = eviction.evict(cache, dry_run=True)
    assert (told.evicted, told.above, hot(world)) == (7, 0, set(ids))
    evictor = eviction.Evictor(cache)
    report = evictor.run()
    assert (report.evicted, report.above) == (7, 0)
    assert hot(world) == {*ids[:3], *ids[-2:]}
    for id in ids[5:8]:
        last = world.orders.transition(id, "cancel")
        wait_until(lambda last=last: world.hot.time_ms() > last.at_ms, "the next millisecond")  # type: ignore[misc]
    world.flush()
    assert evictor.run().evicted == 3
    assert hot(world) == {ids[1], ids[2], *ids[5:8]}
    assert evictor.run().looked_at == 0


def test_bound_that_cannot_be_kept_is_told(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is in SQL: nothing leaves, and it is said, once."""
    for number in range(6):
        world.start(f"o{number}")
    evictor = eviction.Evictor(world.more(hot_instances_max=2))
    assert evictor.run().above == 4
    for _ in range(3):
        evictor.turn(lambda: False)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "4 instances beyond hot_instances_max" in caplog.text
    world.flush()
    assert evictor.run().evicted == 4


def test_share_of_maxmemory_is_kept(start_redis: Callable[..., ValkeyServer], sqlite_url: str, namespace: str) -> None:
    """Instances come until memory is full beyond the share: the oldest leave, until it is below again, and no more."""
    server = start_redis(maxmemory="8mb", appendonly="no")
    with World(server.url, sqlite_url, namespace, hot_memory_share=0.5) as world:
        evictor = eviction.Evictor(world.cache)
        number = 0
        while world.hot.fill().used_bytes < 0.6 * 8 * 2**20:
            results = world.orders.start_many([(f"o{number + n}", {"note": "x" * 300}) for n in range(500)])
            assert not [one for one in results if isinstance(one, Exception)]
            number += 500
            world.flush()
        report = evictor.run()
        fill = world.hot.fill()
        assert report.above == 0
        assert 0.4 * fill.max_bytes < fill.used_bytes <= 0.5 * fill.max_bytes
        assert 0 < report.evicted < number
        assert len(hot(world)) == number - report.evicted
        assert world.orders.transition("o0", "pay").version == 2


def test_memory_that_is_full_is_made_free(
    start_redis: Callable[..., ValkeyServer], sqlite_url: str, namespace: str
) -> None:
    """Redis is full: calls are refused with a clear error, nothing is half written. Eviction works on a full server, and then
    the cold instance that had no room comes back."""
    server = start_redis(appendonly="no")
    with World(server.url, sqlite_url, namespace, hot_memory_share=0.5, call_timeout_seconds=0.3) as world:
        world.start("cold")
        world.flush()
        assert world.evict("cold") == "OK"
        world.orders.start_many([(f"o{number}", {"note": "x" * 300}) for number in range(6000)])
        world.client.config_set("maxmemory", world.hot.fill().used_bytes - 500_000)
        with pytest.raises(errors.BackpressureError, match="no memory left"):
            world.orders.transition("o1", "pay")
        with pytest.raises(errors.BackpressureError, match="no memory left"):
            world.orders.transition("cold", "pay")
        world.flush()
        assert eviction.evict(world.cache).evicted > 0
        assert world.orders.transition("cold", "pay").version == 2
        world.flush()
        world.verify()


def test_no_memory_to_bring_it_back_is_waited_out(
    start_redis: Callable[..., ValkeyServer], sqlite_url: str, namespace: str
) -> None:
    """MISS is answered while there is room; there is none when the hydration comes, and some again after it: the call waits,
    and begins again at apply."""
    server = start_redis(appendonly="no")
    with World(server.url, sqlite_url, namespace) as world:
        started(world, 2)
        assert eviction.evict(world.cache, idle_seconds=0).evicted == 2
        codes: list[str] = []
        hydrate, hydrate_and_apply = world.hot.hydrate, world.hot.hydrate_and_apply

        def without_memory(*arguments: Any) -> list[str]:
            world.client.config_set("maxmemory", 1 if not codes else 0)
            codes.extend(hydrate(*arguments))
            world.client.config_set("maxmemory", 0)
            return codes[-len(arguments[0]) :]

        def both_without_memory(*arguments: Any) -> tuple[str, items.Outcome]:
            world.client.config_set("maxmemory", 1 if not codes else 0)
            code, outcome = hydrate_and_apply(*arguments)
            codes.append(outcome.code)
            world.client.config_set("maxmemory", 0)
            return code, outcome

        with mock.patch.object(world.hot, "hydrate_and_apply", both_without_memory):
            assert world.orders.transition("o000", "pay").version == 2
        assert codes == ["OOM", "OK"]
        codes.clear()
        with mock.patch.object(world.hot, "hydrate", without_memory):
            moved = world.orders.transition_many([model.Move("o001", "pay"), model.Move("o001", "ship")])
        assert [one.version for one in moved if isinstance(one, model.Receipt)] == [2, 3]
        assert codes[0] == "OOM"


# --- what stays --------------------------------------------------------------------------------------------------------


def test_parked_and_foreign_keys_stay_and_the_others_leave(world: World) -> None:
    """One instance is parked behind a dead letter, one key holds somebody's string: told as kept, and no obstacle."""
    started(world, 6)
    _spoil(world, "o002")
    world.flush()
    world.client.set(world.keyspace.instance(world.partition_of("o004"), "order", "o004"), "a stranger's")
    report = eviction.evict(world.cache, idle_seconds=0)
    assert report.evicted == 4
    assert report.kept == {"parked": 1, "foreign": 1}
    with pytest.raises(errors.IntegrityError, match="holds something that statecache did not write"):
        letters_quiet(world, "o004")


def letters_quiet(world: World, id: str) -> None:
    """Acting on the letters of an instance whose key is a stranger's is refused: nobody waits for ever."""
    with mock.patch.object(world.durable, "letters", return_value=[object()]):
        letters.retry(world.cache, "order", id)


def test_what_is_behind_the_cursor_is_found_when_it_begins_anew(world: World) -> None:
    """An evictor remembers where it looked; a call that is refused has brought an instance back without moving it."""
    ids = started(world, 3)
    cache = world.more(hot_instances_max=1)
    evictor = eviction.Evictor(cache)
    with mock.patch.object(eviction, "_FRESH_MS", 0):
        wait_until(lambda: evictor.run().evicted + (len(hot(world)) == 1), "two are cold")
        assert evictor.run().evicted == 0
        for id in ids[:2]:
            with pytest.raises(errors.InvalidTransitionError):
                world.orders.transition(id, "deliver")
        assert len(hot(world)) == 3
        report = evictor.run()
        assert (report.evicted, report.above) == (1, 1), "the others stand behind the cursor"
        assert evictor.run().above == 1
        assert evictor.run().evicted == 1
    assert hot(world) == {ids[1]}


def test_stopped_in_between_goes_on_later(world: World) -> None:
    world.orders.start_many([f"o{number}" for number in range(1000)])
    world.flush()
    evictor = eviction.Evictor(world.cache)
    report = evictor.run(idle_seconds=0, stopping=lambda: True)
    assert (report.evicted, report.more) == (250, True)
    seen: list[int] = []
    report = evictor.run(idle_seconds=0, progress=lambda report: seen.append(report.evicted))
    assert (report.evicted, report.more) == (750, False)
    assert seen == sorted(seen)
    assert len(seen) >= 3
    world.verify()


def test_a_flushers_process_evicts_by_itself(world: World) -> None:
    started(world, 3)
    cache = world.more(hot_ttl_seconds=0.001, eviction_interval_seconds=0.01)
    cache.start_flusher()
    wait_until(lambda: hot(world) == set(), "the duty evicts")
    assert world.orders.transition("o001", "pay").version == 2
    cache.close()
    world.verify()


def test_changed_age_counts_without_a_new_version(world: World) -> None:
    """``hot_ttl`` is no part of a machine's fingerprint: the last registration's is in force."""
    for hot_ttl in (timedelta(hours=2), timedelta(minutes=1), None):
        world.cache.machine(aged(hot_ttl))
        expected = hot_ttl.total_seconds() if hot_ttl else 0.0
        assert {one.ttl_seconds for one in eviction.ranges(world.cache)} == {expected}


# --- between the look and the drop --------------------------------------------------------------------------------------


def move(world: World) -> Callable[[], model.Receipt]:
    """Another client's."""
    other = world.more().machine(Order)
    return lambda: other.transition("o001", "pay")


def test_moved_between_the_look_and_the_drop(world: World) -> None:
    """SQL says version 1; another client moves it to version 2, which is not flushed: it stays."""
    started(world, 3)
    with before_call(world.hot, "evict", move(world)):
        report = eviction.evict(world.cache, idle_seconds=0)
    assert (report.evicted, report.kept) == (2, {"moved": 1})
    assert hot(world) == {"o001"}
    assert world.orders.get("o001").version == 2


def test_moved_and_flushed_between_the_look_and_the_drop(world: World) -> None:
    """The same, and version 2 is in SQL too by then: by the look at SQL it is not, so it stays (its next look drops it)."""
    started(world, 3)
    act = move(world)

    def move_and_flush() -> None:
        act()
        world.flush()

    with before_call(world.hot, "evict", move_and_flush):
        assert eviction.evict(world.cache, idle_seconds=0).kept == {"moved": 1}
    assert eviction.evict(world.cache, idle_seconds=0).evicted == 1
    assert world.orders.get("o001").version == 2
    world.verify()


def test_evicted_and_brought_back_between_the_look_and_the_drop(world: World) -> None:
    """Two evictors: the other drops it, a client brings it back and is refused; ours drops it again, at the same version."""
    started(world, 3)
    other = world.more()

    def drop_and_bring_back() -> None:
        assert eviction.evict(other, idle_seconds=0).evicted == 3
        with pytest.raises(errors.InvalidTransitionError):
            other.machine(Order).transition("o001", "deliver")

    with before_call(world.hot, "evict", drop_and_bring_back):
        report = eviction.evict(world.cache, idle_seconds=0)
    assert (report.evicted, report.gone) == (1, 2)
    assert world.orders.transition("o001", "pay").version == 2
    world.flush()
    world.verify()


def test_recovery_between_the_look_and_the_drop(world: World) -> None:
    """The drop is of the old epoch: refused. The evictor looks again, under the new one, and goes on (H8)."""
    started(world, 3)
    with before_call(world.hot, "evict", world.more().recover):
        assert eviction.evict(world.cache, idle_seconds=0).evicted == 3
    assert world.orders.get("o001").version == 1
    world.verify()


def test_wipe_between_the_look_and_the_drop(world: World) -> None:
    """Nothing is there, the script neither: a recovery, and then nothing is left to evict."""
    started(world, 3)
    with before_call(world.hot, "evict", world.wipe):
        report = eviction.evict(world.cache, idle_seconds=0)
    assert (report.evicted, report.gone) == (0, 3)
    assert world.orders.transition("o001", "pay").version == 2
    world.flush()
    world.verify()


def test_sql_restored_between_the_look_and_the_drop(world: World) -> None:
    """The look saw version 2; SQL goes back to version 1 and nobody has noticed: the drop goes by what SQL had. Version 1 is
    not brought back for it (``evicted_to`` is above SQL's watermark); the log, which is kept, gives version 2 back (H9)."""
    ids = started(world, 3)
    saved = world.sql_copy()
    world.settings["log_keep_seconds"] = 3600.0
    keeping = world.more()
    world.orders.transition(ids[1], "pay")
    flusher = world.flusher(keeping, log_keep_seconds=3600.0)
    while flusher.step().entries:
        pass
    with before_call(world.hot, "evict", lambda: world.sql_back(saved)):
        assert eviction.evict(world.cache, idle_seconds=0).evicted == 3
    with pytest.raises(errors.IntegrityError, match="SQL is older"):
        world.orders.transition(ids[1], "note", timeout=1.0)
    world.flush_through()
    assert world.orders.get(ids[1]).version == 2
    assert world.orders.transition(ids[1], "note").version == 3
    world.flush()
    world.verify()


def test_evicted_again_and_again_is_told_at_the_deadline(world: World) -> None:
    """An evictor drops the instance each time before the call that brought it back can move it: no false alarm about a
    strange key, but an error that says what is the matter, and nothing was applied."""
    started(world, 1)
    hydrate = world.hot.hydrate

    def brought_back_in_vain(*arguments: Any) -> list[str]:
        codes = hydrate(*arguments)
        assert world.evict("o000") == "OK"
        return codes

    assert world.evict("o000") == "OK"
    with mock.patch.object(world.hot, "hydrate", brought_back_in_vain):
        (error,) = world.orders.transition_many([model.Move("o000", "pay")], timeout=0.5)
    assert isinstance(error, errors.BackpressureError)
    assert "no room to bring a cold instance back" in str(error)
    assert world.orders.transition("o000", "pay").version == 2
