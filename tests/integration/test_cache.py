"""The public surface on real servers, with both databases, as a program that uses it."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import sqlalchemy as sa

from statecache import Move, State, StateCache, StateMachine
from statecache.core import errors, flows, items, model
from statecache.durable import schema
from statecache.engine import driver as driver_module
from statecache.engine import letters, verify
from tests.support import servers, waiting
from tests.support.worlds import Order, World, after_call, before_call, together

UTC = datetime.UTC


@pytest.fixture
def world(redis_url: str, database_and_client: tuple[str, str], namespace: str) -> Iterator[World]:
    database_url, client = database_and_client
    with World(redis_url, database_url, namespace, client=client) as found:
        yield found


@pytest.fixture
def lite(redis_url: str, sqlite_url: str, namespace: str, client: str) -> Iterator[World]:
    """A world on SQLite, where the database's kind plays no part."""
    with World(redis_url, sqlite_url, namespace, client=client) as found:
        yield found


ONLY_SYNC = pytest.mark.parametrize("client", ["sync"])
"""About the sync client's own machinery (forks, threads, its wires); the async client's has tests of its own."""

# --- every method of the design -------------------------------------------------------------------------------------------


def test_one_orders_life(world: World) -> None:
    """Receipts, snapshot and history of an order, before and after its flush; the same answers from both stores."""
    orders = world.orders
    occurred = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    first = orders.start("1001", data={"amount": 12.5, "note": "x"})
    assert (first.machine, first.id, first.event, first.from_state, first.state) == (
        "order",
        "1001",
        "@start",
        None,
        "placed",
    )
    assert (first.version, first.duplicate) == (1, False)
    paid = orders.transition(
        "1001", "pay", data={"method": "card", "tags": ["a", {"b": None}]}, unset=["note"], increment={"attempts": 1},
        actor="billing", reason="webhook", expect_version=1, transition_id="evt_42", occurred_at=occurred,
    )  # fmt: skip
    assert (paid.event, paid.from_state, paid.state, paid.version, paid.transition_id) == (
        "pay",
        "placed",
        "paid",
        2,
        "evt_42",
    )

    def check(durable: bool) -> None:
        now = orders.get("1001")
        assert (now.state, now.version, now.final, now.source) == ("paid", 2, False, "hot")
        assert now.data == {"amount": 12.5, "method": "card", "tags": ["a", {"b": None}], "attempts": 1}
        assert set(now.available_events) == {"ship", "cancel", "note"}
        assert (now.created_at, now.updated_at) == (first.at, paid.at)
        assert orders.state("1001") == "paid"
        begun, moved = orders.history("1001")
        assert (begun.event, begun.version, begun.patch, begun.durable) == (
            "@start",
            1,
            {"amount": 12.5, "note": "x"},
            durable,
        )
        assert (moved.actor, moved.reason, moved.occurred_at, moved.unset) == (
            "billing",
            "webhook",
            occurred,
            ("note",),
        )
        assert (moved.transition_id, moved.increments, moved.entry_id) == ("evt_42", {"attempts": 1}, paid.entry_id)
        assert orders.at("1001", version=1).data == {"amount": 12.5, "note": "x"}
        assert orders.at("1001", version=2) == now
        assert orders.at("1001", when=paid.at).version == 2
        with pytest.raises(errors.NotFoundError, match="no version 3; it has 1 to 2"):
            orders.at("1001", version=3)
        with pytest.raises(errors.NotFoundError, match="did not exist"):
            orders.at("1001", when=first.at - datetime.timedelta(seconds=1))

    check(durable=False)
    assert orders.counts() == {}
    world.cache.wait_durable(paid, timeout=5.0)
    check(durable=True)
    assert orders.counts() == {"paid": 1}
    (found,) = orders.find(state="paid")
    assert (found.id, found.source, found.data) == ("1001", "durable", orders.get("1001").data)
    world.verify()


def test_find_is_oldest_first_and_knows_age_and_limit(world: World) -> None:
    ids = [f"f{number}" for number in range(5)]
    for id in ids:
        world.start(id, ["pay"] if id != "f3" else [])
    world.flush()
    paid = world.orders.find(state="paid")
    assert [one.id for one in paid] == ["f0", "f1", "f2", "f4"]
    assert [one.id for one in world.orders.find(state="paid", limit=2)] == ["f0", "f1"]
    assert {one.id for one in world.orders.find()} == set(ids)
    assert world.orders.find(state="paid", older_than=datetime.timedelta(hours=1)) == []
    assert len(world.orders.find(state="paid", older_than=datetime.timedelta(seconds=-5))) == 4


def test_a_state_that_a_newer_version_has_removed_can_be_asked_for(lite: World) -> None:
    """Instances stand there, and ``counts`` shows them: they can be found and claimed by a handle of any version."""
    lite.start("1", ["pay"])
    lite.start("2")
    lite.flush()

    class Shorter(StateMachine):
        name = "order"
        version = 2
        placed = State(initial=True)
        settled = State(final=True)
        settle = placed.to(settled)

    newer = lite.cache.machine(Shorter)
    assert newer.counts() == {"paid": 1, "placed": 1}
    assert [one.id for one in newer.find("paid")] == ["1"]
    assert newer.find("paid", stuck=True) == []
    claimed = newer.claim_next("paid")
    assert claimed is not None
    assert claimed.id == "1"
    assert lite.orders.find("settled") == []
    with pytest.raises(errors.InvalidDataError, match="state 'gone' is refused: machine 'order' has placed, settled"):
        newer.find("gone")


def test_backlog_is_in_history_and_not_in_counts(world: World) -> None:
    """``history`` and ``at`` include what is not flushed; ``counts`` and ``find`` are as of the watermark."""
    world.start("1", ["pay"], amount=1)
    world.flush()
    world.orders.transition("1", "ship", data={"truck": 7})
    assert [(row.version, row.durable) for row in world.orders.history("1")] == [(1, True), (2, True), (3, False)]
    assert world.orders.at("1", version=3).data == {"amount": 1, "truck": 7}
    assert world.orders.at("1", version=3).source == "hot"
    assert world.orders.counts() == {"paid": 1}
    assert [one.version for one in world.orders.find()] == [2]


def test_get_many_answers_each_in_order(world: World) -> None:
    world.start("a", ["pay"])
    world.start("b")
    world.flush()
    assert world.evict("a") == "OK"
    a, nobody, b = world.orders.get_many(["a", "nobody", "b"])
    assert (a.state, a.source) == ("paid", "durable")
    assert isinstance(nobody, errors.NotFoundError)
    assert (b.state, b.source) == ("placed", "hot")


def test_errors_tell_what_a_caller_needs(lite: World) -> None:
    lite.start("1")
    with pytest.raises(
        errors.InvalidTransitionError, match=r"order:1 is in state 'placed', where 'ship' is no move"
    ) as wrong:
        lite.orders.transition("1", "ship")
    assert (wrong.value.state, wrong.value.event) == ("placed", "ship")
    assert set(wrong.value.allowed) == {"pay", "cancel", "note", "approve"}
    with pytest.raises(errors.StaleVersionError) as stale:
        lite.orders.transition("1", "pay", expect_version=2)
    assert (stale.value.expected, stale.value.actual) == (2, 1)
    with pytest.raises(errors.AlreadyExistsError, match="order:1 exists already, at version 1"):
        lite.orders.start("1")
    for call in (lite.orders.get, lite.orders.state, lite.orders.history):
        with pytest.raises(errors.NotFoundError, match="order:2 does not exist"):
            call("2")
    with pytest.raises(errors.NotFoundError):
        lite.orders.transition("2", "pay")
    with pytest.raises(errors.InvalidTransitionError, match="has no event 'fly'"):
        lite.orders.transition("1", "fly")
    for error in (wrong.value, stale.value):
        copy = pickle.loads(pickle.dumps(error))
        assert (str(copy), copy.args) == (str(error), error.args)


def test_final_states_have_no_way_out(lite: World) -> None:
    lite.start("1", ["pay", "ship", "deliver"])
    assert lite.orders.get("1").final
    with pytest.raises(errors.InvalidTransitionError, match="none, it is final"):
        lite.orders.transition("1", "cancel")

    class Newer(StateMachine):
        name = "order"
        version = 2
        placed = State(initial=True)
        hanging = State()
        closed = State(final=True)
        hang = placed.to(hanging)
        close = placed.to(closed)

    newer = lite.cache.machine(Newer)
    with pytest.raises(errors.InvalidTransitionError, match="none, version 2 of the machine has no such state"):
        newer.transition("1", "close")
    newer.start("2")
    newer.transition("2", "hang")
    with pytest.raises(errors.InvalidTransitionError, match=r"allowed: none$"):
        newer.transition("2", "close")


def test_machine_by_name_and_from_another_process_of_the_same_store(world: World) -> None:
    """A registered machine is found by its name; another definition under the same version is refused."""
    world.start("1", ["pay"])
    other = world.more().machine("order")
    assert other.get("1").state == "paid"
    with pytest.raises(errors.InvalidTransitionError, match="is in state 'paid', where 'approve' is no move"):
        other.transition("1", "approve")
    world.start("2")
    before = world.hot_dump()
    with pytest.raises(errors.DefinitionError, match="no function is bound"):
        other.transition("2", "approve")
    assert world.hot_dump() == before
    with pytest.raises(errors.NotFoundError, match="no machine 'invoice' is registered here; known: order"):
        world.cache.machine("invoice")

    class Changed(StateMachine):
        name = "order"
        open = State(initial=True)
        closed = State(final=True)
        close = open.to(closed)

    with pytest.raises(errors.DefinitionError, match="'order' version 1 is registered with another definition"):
        world.cache.machine(Changed)


@ONLY_SYNC
def test_a_class_that_was_opened_opens_while_sql_is_away(
    private_postgres: servers.PostgresServer, redis_url: str, namespace: str, client: str
) -> None:
    """It is registered once, and again behind a recovery: SQL may have been restored from before it."""
    database_url = private_postgres.url(private_postgres.create_database())
    with World(redis_url, database_url, namespace, client=client) as world:
        world.start("1")
        private_postgres.kill()
        assert world.cache.machine(Order).transition("1", "pay").version == 2
        private_postgres.start()
        world.flush()
        with world.durable.database.engine.begin() as connection:
            connection.execute(sa.delete(schema.machines))
        world.cache.recover()
        world.start("2")
        world.cache.machine(Order)
        assert [row.name for row in world.durable.machines()] == ["order"]


# --- guards ---------------------------------------------------------------------------------------------------------------


def test_guard_decides_on_the_version_that_it_saw(lite: World) -> None:
    """Guard reads v1 with an amount; before the item is sent another client takes the amount away (v2): the item is
    pinned to v1, is refused, and the guard looks again, at v2, and refuses."""
    lite.start("1", amount=5)
    other = lite.more().machine(Order)
    with (
        before_call(lite.hot, "packed_apply", lambda: other.transition("1", "note", data={"amount": 0})),
        pytest.raises(
            errors.InvalidTransitionError, match="guard of 'approve' refused it in state 'placed' at version 2"
        ),
    ):
        lite.orders.transition("1", "approve")
    assert lite.orders.get("1").version == 2


def test_guard_that_is_overtaken_looks_again_and_passes(lite: World) -> None:
    lite.start("1", amount=5)
    other = lite.more().machine(Order)
    with before_call(lite.hot, "packed_apply", lambda: other.transition("1", "note", data={"amount": 6})):
        receipt = lite.orders.transition("1", "approve")
    assert (receipt.version, receipt.state) == (3, "paid")


def test_guarded_transition_is_repeated_with_its_receipt(lite: World) -> None:
    """The first call was applied and the guard would refuse now: the repetition is a duplicate, not a refusal."""
    lite.start("1", amount=5)
    first = lite.orders.transition("1", "approve", transition_id="t")
    lite.orders.transition("1", "note", data={"amount": 0})
    again = lite.orders.transition("1", "approve", transition_id="t")
    assert (again.version, again.entry_id, again.duplicate) == (first.version, first.entry_id, True)


def test_guard_with_expect_version(lite: World) -> None:
    lite.start("1", amount=5)
    with pytest.raises(errors.StaleVersionError):
        lite.orders.transition("1", "approve", expect_version=2)
    assert lite.orders.transition("1", "approve", expect_version=1).version == 2


def test_guards_and_a_race_apply_once(lite: World) -> None:
    lite.start("1", amount=5)
    results = together(*[lambda: lite.orders.transition("1", "approve") for _ in range(6)])
    assert sum(isinstance(one, model.Receipt) for one in results) == 1
    assert all(isinstance(one, (model.Receipt, errors.InvalidTransitionError)) for one in results)


def test_guarded_move_of_a_bulk_call_is_not_overtaken_by_its_successor(lite: World) -> None:
    """One list: ``approve`` (guarded), then ``note``. Between the guard's look and the script another client moves the
    instance, so ``approve`` is refused for its version and looks again; ``note`` must not go before it."""
    lite.start("1", amount=5)
    other = lite.more().machine(Order)
    with before_call(lite.hot, "apply_stream", lambda: other.transition("1", "note"), call=2):  # the first has no item
        first, second = lite.orders.transition_many([Move("1", "approve"), Move("1", "note", data={"n": 1})])
    assert (first.event, first.version) == ("approve", 3)
    assert (second.event, second.version, second.from_state) == ("note", 4, "paid")


def test_a_long_list_of_guarded_moves_is_looked_at_in_parts(lite: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of them leaves before its guard has looked: all would be begun, and looked at in one go, however many. Every
    third one is no guarded move, and has gone before."""
    monkeypatch.setattr(driver_module, "_UNFINISHED_MAX", 50)
    ids = [f"g{number}" for number in range(900)]
    lite.orders.start_many([(id, {"amount": 5}) for id in ids])
    looks: list[int] = []
    hashes = lite.hot.hashes
    monkeypatch.setattr(lite.hot, "hashes", lambda asked, deadline: looks.append(len(asked)) or hashes(asked, deadline))
    results = lite.orders.transition_many([Move(id, "note" if n % 3 == 0 else "approve") for n, id in enumerate(ids)])
    assert {(one.version, one.state) for one in results[0::3]} == {(2, "placed")}
    assert {(one.version, one.state) for one in results[1::3] + results[2::3]} == {(2, "paid")}
    assert sum(looks) == 600
    assert max(looks) <= 50 + 125
    looks.clear()
    results = lite.orders.transition_many([Move(id, "approve") for id in ids[0::3]])
    assert {(one.version, one.state) for one in results} == {(3, "paid")}
    assert sum(looks) == 300
    assert max(looks) <= 50 + 125


def test_guards_look_while_chunks_before_them_are_in_flight(lite: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Moves without a guard leave; then come so many guarded ones that those are finished before the replies of the former were
    read. If a guard's look fails in that moment, the call ends with its error, and the wire on which a reply is still to come
    is not used again: the next call would read that one."""
    monkeypatch.setattr(driver_module, "_UNFINISHED_MAX", 50)
    ids = [f"f{number}" for number in range(500)]
    lite.orders.start_many([(id, {"amount": 5}) for id in ids])
    in_flight = [0]
    looks: list[int] = []
    pack, answer, hashes = lite.hot.packed_apply, lite.hot._answer, lite.hot.hashes

    def counted(change: int, call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any, **named: Any) -> Any:
            in_flight[0] += change
            return call(*arguments, **named)

        return counting

    def looked(asked: Any, deadline: float | None = None) -> Any:
        looks.append(in_flight[0])
        if failing:
            raise RuntimeError("a guard's own error")
        return hashes(asked, deadline)

    failing = False
    monkeypatch.setattr(lite.hot, "packed_apply", counted(1, pack))
    monkeypatch.setattr(lite.hot, "_answer", counted(-1, answer))
    monkeypatch.setattr(lite.hot, "hashes", looked)
    moves = [Move(id, "note" if n < 150 else "approve") for n, id in enumerate(ids)]
    results = lite.orders.transition_many(moves)
    assert {(one.version, one.state) for one in results[:150]} == {(2, "placed")}
    assert {(one.version, one.state) for one in results[150:]} == {(2, "paid")}
    assert max(looks) > 0
    failing, before = True, len(looks)
    lite.orders.transition_many([Move(id, "note", {"amount": 6}) for id in ids])
    with pytest.raises(RuntimeError, match="own error"):
        lite.orders.transition_many([Move(id, "note" if n < 150 else "approve") for n, id in enumerate(ids)])
    assert looks[before] > 0
    failing = False
    results = lite.orders.transition_many([Move(id, "note", {"n": n}) for n, id in enumerate(ids)])
    assert [(one.id, one.event) for one in results] == [(id, "note") for id in ids]
    assert {one.version for one in results[150:]} == {4}
    lite.verify()


# --- threads and forks ----------------------------------------------------------------------------------------------------


def test_sixteen_threads_share_one_cache(world: World) -> None:
    """Each thread moves the same four instances and some of its own, while another flushes: versions have no gap."""
    for number in range(4):
        world.start(f"shared{number}")
    stop = threading.Event()

    def flush() -> None:
        flusher = world.flusher(world.more())
        while not stop.is_set():
            flusher.step()

    def write(thread: int) -> int:
        world.orders.start(f"own{thread}")
        for number in range(12):
            world.orders.transition(f"shared{number % 4}", "note", increment={"n": 1})
            world.orders.transition(f"own{thread}", "note")
        return thread

    flushing = threading.Thread(target=flush)
    flushing.start()
    results = together(*[lambda thread=thread: write(thread) for thread in range(16)])
    stop.set()
    flushing.join()
    assert results == list(range(16))
    world.flush()
    for number in range(4):
        snapshot = world.orders.get(f"shared{number}")
        assert (snapshot.version, snapshot.data) == (49, {"n": 48})
        assert world.versions(f"shared{number}") == list(range(1, 50))
    world.verify()


def _work_in_child(cache: StateCache, pipe: Any) -> None:
    """Runs in a forked child: uses the cache that the parent made."""
    try:
        orders = cache.machine(Order)
        orders.start("child", transition_id=None)
        receipts = [orders.transition("shared", "note") for _ in range(20)]
        cache.flush()
        pipe.send([(one.version, one.transition_id) for one in receipts])
    except BaseException as error:
        pipe.send(error)
    finally:
        pipe.close()


@pytest.mark.parametrize("way", ["multiprocessing", "os.fork"])
@pytest.mark.parametrize(
    "database_and_client",
    [("sqlite", "sync"), pytest.param(("postgres", "sync"), marks=pytest.mark.postgres)],
    indirect=True,
    ids=" ".join,
)
def test_child_forked_after_connecting_works_beside_its_parent(world: World, way: str) -> None:
    """Both use the same ``StateCache`` object at once. The child opens connections of its own, and makes ids of its own:
    a repeated id would turn one's transition into a duplicate of the other's."""
    world.start("shared")
    world.flush()
    receive, send = multiprocessing.Pipe(duplex=False)
    if way == "multiprocessing":
        child = multiprocessing.get_context("fork").Process(target=_work_in_child, args=(world.cache, send))
        child.start()
        pid = child.pid
    else:
        pid = os.fork()
        if pid == 0:
            try:
                _work_in_child(world.cache, send)
            finally:
                os._exit(0)
    send.close()
    mine = [world.orders.transition("shared", "note") for _ in range(20)]
    theirs = receive.recv()
    assert not isinstance(theirs, BaseException), theirs
    if way == "multiprocessing":
        child.join()
    else:
        assert pid is not None
        os.waitpid(pid, 0)
    receive.close()
    assert sorted([one.version for one in mine] + [version for version, _ in theirs]) == list(range(2, 42))
    assert len({one.transition_id for one in mine} | {id for _, id in theirs}) == 40
    world.flush()
    world.verify()
    assert world.orders.get("child").state == "placed"


@ONLY_SYNC
def test_fork_while_another_thread_holds_the_locks(lite: World) -> None:
    """The parent forks while another of its threads holds the admission's lock: in the child nobody would release it."""
    lite.start("1")
    receive, send = multiprocessing.Pipe(duplex=False)
    with lite.cache.admission._lock, lite.cache.flusher._lock:
        pid = os.fork()
        if pid == 0:
            try:
                lite.cache.hot.stamp = type(lite.cache.hot.stamp)(0, "")  # so that it must ask for admission
                _work_in_child_simple(lite, send)
            finally:
                os._exit(0)
    send.close()
    assert receive.poll(20)
    assert receive.recv() == 2
    os.waitpid(pid, 0)
    receive.close()


def _work_in_child_simple(world: World, pipe: Any) -> None:
    try:
        pipe.send(world.orders.transition("1", "note").version)
        world.cache.flush()
    except BaseException as error:
        pipe.send(error)
    pipe.close()


# --- retries (P4) ---------------------------------------------------------------------------------------------------------


def _same(first: model.Receipt, again: model.Receipt) -> None:
    """The same receipt but for ``duplicate``."""
    fields = ("machine", "id", "event", "from_state", "state", "version", "entry_id", "at_ms", "transition_id")
    assert [getattr(again, name) for name in fields] == [getattr(first, name) for name in fields]
    assert again.duplicate


def test_repetition_is_answered_with_the_same_receipt(world: World) -> None:
    started = world.orders.start("1", transition_id="s")
    paid = world.orders.transition("1", "pay", data={"a": 1}, transition_id="p")
    for flushed in (False, True):
        _same(started, world.orders.start("1", transition_id="s"))
        _same(paid, world.orders.transition("1", "pay", data={"a": 1}, transition_id="p"))
        if not flushed:
            world.flush()
    assert world.orders.get("1").version == 2


@pytest.mark.parametrize("flushed", ["nothing", "the first", "everything"])
def test_repetition_after_the_ring_has_moved_on(world: World, flushed: str) -> None:
    """H16: nine further transitions have pushed the id out of the ring. The script says OLD; history, or the log if it is
    not flushed, knows the id."""
    world.start("1")
    first = world.orders.transition("1", "note", transition_id="t")
    if flushed == "the first":
        world.flush()
    for _ in range(9):
        world.orders.transition("1", "note")
    if flushed == "everything":
        world.flush()
    _same(first, world.orders.transition("1", "note", transition_id="t"))
    assert world.orders.get("1").version == 11


def test_repetition_after_eviction(world: World) -> None:
    """The hash was dropped and comes back with its ring."""
    world.start("1")
    first = world.orders.transition("1", "note", transition_id="t")
    world.flush()
    assert world.evict("1") == "OK"
    _same(first, world.orders.transition("1", "note", transition_id="t"))
    assert world.orders.get("1").version == 2


@pytest.mark.parametrize("further", [0, 9])
def test_repetition_after_a_wipe(world: World, further: int) -> None:
    """Redis was wiped and recovered: the ring comes back with the checkpoint; ids beyond it are in history."""
    world.start("1")
    first = world.orders.transition("1", "note", transition_id="t")
    for _ in range(further):
        world.orders.transition("1", "note")
    world.flush()
    world.wipe()
    _same(first, world.orders.transition("1", "note", transition_id="t"))
    assert world.orders.get("1").version == 2 + further


def test_repetition_whose_first_call_was_lost_is_new(world: World) -> None:
    """Applied, not flushed, wiped: it is nowhere, so the repetition is applied, once."""
    world.start("1")
    world.flush()
    world.orders.transition("1", "note", transition_id="t")
    world.wipe()
    again = world.orders.transition("1", "note", transition_id="t")
    assert (again.version, again.duplicate) == (2, False)
    _same(again, world.orders.transition("1", "note", transition_id="t"))


def test_id_names_one_transition(lite: World) -> None:
    lite.start("1")
    lite.orders.transition("1", "note", transition_id="t")
    with pytest.raises(
        errors.InvalidDataError, match="'t' is refused: it was used before, for the event 'note' at version 2"
    ):
        lite.orders.transition("1", "pay", transition_id="t")


def test_token_that_collides_is_an_error_never_a_swallowed_transition(
    lite: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ids with the same 48 bits: the full id is compared."""
    monkeypatch.setattr("statecache.core.codec.token_of", lambda id: "AAAAAAAA")
    lite.start("1")
    with pytest.raises(errors.InvalidDataError, match="its hash is that of"):
        lite.orders.transition("1", "note", transition_id="other")


def test_repetition_whose_log_was_unreadable_for_a_moment_is_not_applied_again(lite: World) -> None:
    """Ring of 8, id applied, unflushed, nine more moves. The repetition is answered OLD; before the log is searched the
    server loses its script cache: the search is answered NOSCRIPT. That is not "absent": the id is in the log."""
    lite.start("1")
    first = lite.orders.transition("1", "note", transition_id="t")
    for _ in range(9):
        lite.orders.transition("1", "note")
    with before_call(lite.hot, "find_many", lambda: lite.client.script_flush("SYNC")):
        _same(first, lite.orders.transition("1", "note", transition_id="t"))
    assert lite.orders.get("1").version == 11


def test_duplicate_whose_log_was_unreadable_for_a_moment_is_answered(lite: World) -> None:
    """The same in the ring: an older version's receipt is completed from the log, which answers NOSCRIPT first."""
    lite.start("1")
    first = lite.orders.transition("1", "note", transition_id="t")
    lite.orders.transition("1", "note")
    with before_call(lite.hot, "find_many", lambda: lite.client.script_flush("SYNC")):
        _same(first, lite.orders.transition("1", "note", transition_id="t"))


@ONLY_SYNC
def test_an_admission_paces_the_collector_of_luas_garbage(lite: World) -> None:
    """Lua begins anew, with the collector's own pace, at each SCRIPT FLUSH. Asking for a number sets it too."""
    ask = "return {collectgarbage('setpause', 200), collectgarbage('setstepmul', 200)}"
    lite.start("1")
    assert lite.client.eval(ask, 0) == [120, 400]
    lite.client.script_flush("SYNC")
    assert lite.client.eval(ask, 0) == [200, 200]
    lite.client.script_flush("SYNC")
    lite.orders.transition("1", "note")
    assert lite.client.eval(ask, 0) == [120, 400]


def test_duplicate_that_a_recovery_took_away_is_applied(lite: World) -> None:
    """Apply answers DUP; before the flow reads the entry Redis is wiped, with the entry unflushed. The call begins again at
    apply: the transition is nowhere, so it is applied."""
    lite.start("1")
    lite.flush()
    lite.orders.transition("1", "note", transition_id="t")
    with before_call(lite.hot, "find_many", lite.wipe):
        receipt = lite.orders.transition("1", "note", transition_id="t")
    assert (receipt.version, receipt.duplicate) == (2, False)
    lite.flush()
    lite.verify()


def test_history_misses_nothing_that_was_acknowledged(world: World) -> None:
    """Version 2 is unflushed. SQL is read (version 1); then a flusher commits version 2 and raises the watermark; then the
    log is read behind it: nothing. The answer must hold version 2 all the same."""
    world.start("1")
    world.flush()
    world.orders.transition("1", "pay")
    with before_call(world.hot, "find", world.flush):
        assert [row.version for row in world.orders.history("1")] == [1, 2]


def test_history_of_a_gap_between_two_reads(world: World) -> None:
    """As above, and version 3 comes after the flush: the log's entries begin behind a gap, and SQL is read again."""
    world.start("1")
    world.flush()
    world.orders.transition("1", "pay")

    def flush_and_move() -> None:
        world.flush()
        world.orders.transition("1", "ship")

    with before_call(world.hot, "find", flush_and_move):
        assert [row.version for row in world.orders.history("1")] == [1, 2, 3]


# --- bulk calls -----------------------------------------------------------------------------------------------------------


def test_five_thousand_items_in_order(world: World) -> None:
    """5,000 starts, then 5,000 moves in an order of their own: a receipt for each, in order; every history is whole."""
    ids = [f"b{number}" for number in range(1000)]
    started = world.orders.start_many([(id, {"n": number}) for number, id in enumerate(ids)])
    assert [one.id for one in started] == ids
    moves = [Move(id, event) for event in ("pay", "note", "note", "ship", "deliver") for id in ids]
    receipts = world.orders.transition_many(moves, timeout=60.0)
    assert [(one.id, one.event) for one in receipts] == [(move.id, move.event) for move in moves]
    assert [one.version for one in receipts] == [version for version in range(2, 7) for _ in ids]
    world.cache.flush(timeout=60.0)
    assert world.orders.counts() == {"delivered": 1000}
    world.verify()


def test_one_failure_fails_one_item(world: World) -> None:
    world.start("a")
    results = world.orders.transition_many(
        [
            Move("a", "pay"), Move("nobody", "pay"), Move("a", "pay"), Move("a", "fly"), Move("a\n", "ship"),
            Move("", "ship"), Move("a", "note", expect_version=9), Move("a", "note", data={"x": float("nan")}),
            Move("a", "ship"), Move(5, "ship"),
        ]
    )  # fmt: skip
    kinds = [type(one) for one in results]
    assert kinds == [
        model.Receipt, errors.NotFoundError, errors.InvalidTransitionError, errors.InvalidTransitionError,
        errors.InvalidDataError, errors.InvalidDataError, errors.StaleVersionError, errors.InvalidDataError,
        model.Receipt, errors.InvalidDataError,
    ]  # fmt: skip
    assert world.orders.get("a").state == "shipped"


def test_starts_given_in_every_form(world: World) -> None:
    results = world.orders.start_many(
        ["a", ("b", None), ("c", {"x": 1}), model.Start("d", {"y": 2}, actor="me"), "a"], actor="us"
    )
    assert [type(one) for one in results] == [model.Receipt] * 4 + [errors.AlreadyExistsError]
    assert [row.actor for id in "abcd" for row in world.orders.history(id)] == ["us", "us", "us", "me"]


@pytest.mark.parametrize("bad", [("x", {}, 1, 2, 3, 4, 5), (), 5, None, {"id": "x"}, ([], None)])
def test_start_of_a_wrong_form_fails_alone(lite: World, bad: Any) -> None:
    """P12: a list whose 300th element is no start: that one gets the error, as any other refused item does."""
    starts: list[Any] = [f"s{number}" for number in range(300)]
    starts[250] = bad
    results = lite.orders.start_many(starts)
    assert isinstance(results[250], errors.InvalidDataError)
    assert "is refused" in str(results[250])
    assert all(isinstance(one, model.Receipt) for one in results[:250] + results[251:])


@pytest.mark.parametrize("bad", [None, "1", ("1", "note"), Move(["1"], "note", transition_id="t")])  # type: ignore[arg-type]
def test_move_of_a_wrong_form_fails_alone(lite: World, bad: Any) -> None:
    lite.start("1")
    results = lite.orders.transition_many([Move("1", "note"), bad, Move("1", "pay")])
    assert isinstance(results[1], errors.InvalidDataError)
    assert [one.version for one in results[::2] if isinstance(one, model.Receipt)] == [2, 3]


@pytest.mark.parametrize("bad", ["1", {"1": None}, 5, None])
def test_a_list_that_is_none_is_refused(lite: World, bad: Any) -> None:
    for call in (lite.orders.start_many, lite.orders.transition_many):
        with pytest.raises(errors.InvalidDataError, match="give a list"):
            call(bad)
    assert lite.client.keys(f"{{{lite.namespace}:*:i:*") == []


def sizes_from_now(world: World) -> list[int]:
    """How many items each script call holds."""
    sizes: list[int] = []
    original = world.hot.packed_apply

    def packed(chunk: Any, line: Any) -> bytes:
        sizes.append(len(chunk))
        return original(chunk, line)

    world.hot.packed_apply = packed  # type: ignore[method-assign]
    return sizes


@pytest.mark.parametrize("client", ["sync", "async"])
def test_no_script_call_holds_more_items_than_the_setting(
    redis_url: str, sqlite_url: str, namespace: str, client: str
) -> None:
    """``batch_items_max=10``: lists of many instances, of one instance, and single calls of many threads."""
    with World(redis_url, sqlite_url, namespace, client=client, batch_items_max=10) as world:
        sizes = sizes_from_now(world)
        ids = [f"o{number}" for number in range(35)]
        assert all(isinstance(one, model.Receipt) for one in world.orders.start_many(ids))
        moves = [Move(id, "note") for id in ids for _ in range(3)] + [Move("o0", "note")] * 25
        results = world.orders.transition_many(moves)
        assert [one.version for one in results[-25:] if isinstance(one, model.Receipt)] == list(range(5, 30))
        together(*[lambda id=id: world.orders.transition(id, "note") for id in ids])
        assert max(sizes) == 10


@pytest.mark.parametrize(
    ("count", "expected"),
    [(31, [31]), (32, [16, 16]), (125, [63, 62]), (126, [32, 63, 31]), (300, [32, 63, 94, 56, 55])],
)
def test_a_short_list_leaves_in_two_halves(lite: World, count: int, expected: list[int]) -> None:
    """The server works on one half while the client packs the other; a longer list begins with a small part."""
    sizes = sizes_from_now(lite)
    assert all(isinstance(one, model.Receipt) for one in lite.orders.start_many([str(n) for n in range(count)]))
    assert sizes == expected


def test_bulk_calls_of_nothing(lite: World) -> None:
    assert lite.orders.start_many([]) == []
    assert lite.orders.transition_many([]) == []
    assert lite.orders.get_many([]) == []


def test_a_long_list_of_one_instance_keeps_its_order_and_the_limit_of_a_script(lite: World) -> None:
    """2,500 moves of one instance: applied in order, in script calls of at most 1,000 items."""
    lite.start("1")
    sizes = sizes_from_now(lite)
    receipts = lite.orders.transition_many(
        [Move("1", "note", data={"n": number}) for number in range(2500)], timeout=60.0
    )
    assert [one.version for one in receipts] == list(range(2, 2502))
    assert max(sizes) <= lite.cache.settings.batch_items_max


def test_moves_of_one_instance_wait_for_each_other_when_the_backlog_is_full(lite: World) -> None:
    """No room: ``pay`` and ``ship`` of one order are both answered FULL, neither is judged without the other; a flush makes
    room, and both are applied in order."""
    lite.start("1")
    partition = lite.partition_of("1")
    lite.client.hset(lite.keyspace.meta(partition), "limit", "0")

    def relieve() -> None:
        lite.flush()
        lite.client.hset(lite.keyspace.meta(partition), "limit", "1000")

    with before_call(lite.cache.driver, "_pause", relieve):
        results = lite.orders.transition_many([Move("1", "pay"), Move("1", "ship")])
    assert [(one.event, one.version) for one in results] == [("pay", 2), ("ship", 3)]


def test_repeated_bulk_call_is_answered_with_the_same_receipts(world: World) -> None:
    """Every move had an id; between the calls the first ten moves of each left the ring."""
    world.orders.start_many([model.Start(f"r{n}", transition_id=f"s{n}") for n in range(20)])
    moves = [Move(f"r{n}", "note", transition_id=f"{n}-{k}") for k in range(12) for n in range(20)]
    first = world.orders.transition_many(moves)
    again = world.orders.transition_many(moves)
    for one, other in zip(first, again, strict=True):
        _same(one, other)
    assert all(
        one.duplicate
        for one in world.orders.start_many([model.Start(f"r{n}", transition_id=f"s{n}") for n in range(20)])
    )
    assert [one.version for one in world.orders.get_many([f"r{n}" for n in range(20)])] == [13] * 20


# --- cold instances -------------------------------------------------------------------------------------------------------


def test_cold_instance_comes_back_for_a_write_and_not_for_a_read(world: World) -> None:
    world.start("1", ["pay"], amount=3)
    world.flush()
    hot = world.orders.get("1")
    assert world.evict("1") == "OK"
    cold = world.orders.get("1")
    assert (cold, cold.source) == (hot, "durable")
    assert not world.is_hot("1")
    assert world.orders.transition("1", "ship").version == 3
    assert world.is_hot("1")
    assert world.orders.get("1").data == {"amount": 3}
    world.flush()
    world.verify()


def test_cold_and_hot_and_absent_in_one_bulk_call(world: World) -> None:
    """300 instances, two thirds of them cold, some absent, several moves of each: order and outcomes as if all were hot."""
    ids = [f"c{number}" for number in range(300)]
    world.orders.start_many(ids)
    world.flush()
    for number, id in enumerate(ids):
        if number % 3:
            assert world.evict(id) == "OK"
    moves = [Move(id, event) for id in [*ids, "absent"] for event in ("note", "pay", "ship")]
    results = world.orders.transition_many(moves)
    assert [one.version for one in results[:-3]] == [2, 3, 4] * 300
    assert all(isinstance(one, errors.NotFoundError) for one in results[-3:])
    world.flush()
    world.verify()


def test_start_of_a_cold_instance_finds_it(world: World) -> None:
    """P3: its hash is gone; a start that took that for absence would make a second version 1."""
    world.start("1")
    world.flush()
    world.evict("1")
    with pytest.raises(errors.AlreadyExistsError):
        world.orders.start("1")
    single, bulk = world.orders.start_many(["1", "new"])
    assert isinstance(single, errors.AlreadyExistsError)
    assert bulk.version == 1


def test_eviction_between_two_steps_of_a_call(world: World) -> None:
    """Hydrated, and evicted again before the item is repeated: the call begins again, and ends."""
    world.start("1")
    world.flush()
    world.evict("1")
    with after_call(world.hot, "hydrate", lambda: world.evict("1")):
        (moved,) = world.orders.transition_many([model.Move("1", "note")])
    assert isinstance(moved, model.Receipt)
    assert moved.version == 2


def test_evicted_while_it_is_read(world: World) -> None:
    """The hash is there no more when it is read, and SQL has it."""
    world.start("1", ["pay"])
    world.flush()
    hot = world.cache.inner.hot if world.kind == "async" else world.hot
    with before_call(hot, "hash", lambda: world.evict("1")):
        assert world.orders.get("1").source == "durable"


def test_strangers_key_among_many_reads_fails_one_item_only(lite: World) -> None:
    """A string stands at the key of one of 300 ids. The others are answered, each with its own data; so is the next call on
    the same connection."""
    ids = [f"m{number}" for number in range(300)]
    lite.orders.start_many([(id, {"me": id}) for id in ids])
    stranger = lite.keyspace.instance(lite.partition_of("m7"), "order", "m7")
    lite.client.delete(stranger)
    lite.client.set(stranger, "x")
    results = lite.orders.get_many(ids)
    assert isinstance(results[7], errors.IntegrityError)
    assert "order:m7" in str(results[7])
    assert [one.data["me"] for index, one in enumerate(results) if index != 7] == [id for id in ids if id != "m7"]
    assert [one.data["me"] for one in lite.orders.get_many(ids[10:20])] == ids[10:20]
    assert lite.orders.get("m42").data == {"me": "m42"}


@pytest.mark.parametrize(
    "fields",
    [
        {"@": b"\xff"},
        {"@": "paid two 1-1 1 1 1"},
        {"@": "paid 2 1-1 1"},
        {"@": "placed 1 1-1 1 1 1", "x": b"\xff"},
        {"@": "placed 1 1-1 1 1 1", b"\xff": "1"},
    ],
)
def test_a_hash_that_is_not_ours(lite: World, fields: dict[Any, Any]) -> None:
    """Somebody wrote over one instance: reading it says so, verification finds it, the others and a recovery go on. A key that
    has no name of ours is nobody's."""
    for id in ("1", "2"):
        lite.start(id)
    lite.flush()
    key = lite.keyspace.instance(lite.partition_of("1"), "order", "1")
    lite.client.delete(key)
    lite.client.hset(key, mapping=fields)
    lite.client.hset(key.encode() + b"\xff", mapping=fields)
    found = lite.orders.get_many(["1", "2"])
    assert isinstance(found[1], model.Snapshot)
    if len(fields) == 1:
        assert isinstance(found[0], errors.IntegrityError)
        with pytest.raises(errors.IntegrityError, match="statecache verify"):
            lite.orders.get("1")
    assert [finding.kind for finding in verify.verify(lite.cache).findings] == ["hot"]
    lite.disown()
    assert lite.cache.recover().kinds
    assert lite.orders.transition("2", "pay").version == 2


def test_a_list_of_large_patches_leaves_in_calls_of_bounded_size(
    redis_url: str, sqlite_url: str, namespace: str, client: str
) -> None:
    """Ten megabytes, on many instances and on one: a script call bears four, but for one item that has more by itself."""
    with World(redis_url, sqlite_url, namespace, client=client, patch_bytes_max=2**24) as world:
        ids = [f"b{number}" for number in range(8)]
        world.orders.start_many(ids)
        sent: list[list[int]] = []
        real = world.hot.packed_apply

        def noting(chunk: Any, line: Any) -> bytes:
            sent.append([len(item.tail) for item in chunk])
            return real(chunk, line)

        def move(id: str, length: int) -> Move:
            return Move(id, "note", {"text": "x" * length})

        moves = [move(id, 2**20) for id in ids] + [move("b0", 2**21), move("b1", 6 * 2**20), move("b0", 2**21 + 1)]
        with mock.patch.object(world.hot, "packed_apply", noting):
            moved = world.orders.transition_many(moves)
        assert [getattr(one, "version", one) for one in moved] == [2] * 8 + [3, 3, 4]
        assert all(len(lengths) == 1 or sum(lengths) <= 4 * 2**20 for lengths in sent), sent
        assert sum(map(len, sent)) == len(moves)
        assert len(world.orders.get("b0").data["text"]) == 2**21 + 1


@pytest.mark.parametrize("own", [b"junk", b"\xff\xfe 1 1-1 1 1 1", b"\xff\xfe x 1-1 1 1 1"])
def test_a_hash_that_is_not_ours_spoils_no_other(lite: World, own: bytes) -> None:
    """Bytes that are no text come back in the reply for all who travel with it. The others have their receipts."""
    for id in ("1", "2"):
        lite.start(id)
    key = lite.keyspace.instance(lite.partition_of("1"), "order", "1")
    lite.client.hset(key, mapping={"@": own, "@r": "12345678"})
    moved = lite.orders.transition_many([Move(id, "note") for id in ("2", "1", "2")])
    assert [getattr(one, "version", type(one)) for one in moved] == [2, errors.IntegrityError, 3]
    with pytest.raises(errors.IntegrityError, match="statecache did not write"):
        lite.orders.transition("1", "note")
    assert lite.orders.get("2").version == 3
    if b" 1 1-1 " not in own:  # else its version can be told
        for read in (lite.orders.get, lite.orders.history, lambda id: lite.orders.at(id, version=1)):
            with pytest.raises(errors.IntegrityError, match="statecache verify"):
                read("1")


def test_a_field_that_is_no_json(lite: World) -> None:
    """A stranger's fields stood where a start put an instance: reading its data says so, with the field; showing it does too
    and fails nobody."""
    key = lite.keyspace.instance(lite.partition_of("1"), "order", "1")
    lite.client.hset(key, mapping={"theirs": "not JSON"})
    lite.start("1", ["pay"], amount=1)
    lite.start("2")
    seen, other = lite.orders.get_many(["1", "2"])
    assert isinstance(seen, model.Snapshot)
    assert (seen.state, seen.version, other.data) == ("paid", 2, {})
    rule = "order:1: its field 'theirs' holds something that statecache did not write .* run 'statecache verify'"
    with pytest.raises(errors.IntegrityError, match=rule):
        assert seen.data
    assert "order:1 state='paid' version=2 source='hot' data=<unreadable: order:1: its field 'theirs'" in repr(seen)
    lite.client.hdel(key, "theirs")
    lite.client.hset(key, mapping={b"\xff": "1", "deep": "[" * 100_000})
    assert "data=<unreadable: " in repr(lite.orders.get("1"))
    lite.client.hdel(key, b"\xff", "deep")
    assert lite.orders.get("1").data == {"amount": 1}


def test_a_checkpoint_that_is_no_json(world: World) -> None:
    """It fails the calls of its own instance, reads and writes, and those of no other."""
    for id in ("1", "2", "3"):
        world.start(id)
    world.flush()
    for id in ("1", "2", "3"):
        assert world.evict(id) == "OK"
    with world.durable.database.writer.begin() as connection:
        connection.exec_driver_sql("UPDATE statecache_checkpoints SET data = 'not JSON' WHERE id = '2'")
    rule = "order:2: the data of its checkpoint in SQL is no JSON object .* run 'statecache verify'"
    found = world.orders.get_many(["1", "2", "3"])
    moved = world.orders.transition_many([Move(id, "pay") for id in ("1", "2", "3")])
    for results in (found, moved):
        assert [type(one) is errors.IntegrityError for one in results] == [False, True, False]
        with pytest.raises(errors.IntegrityError, match=rule):
            raise results[1]
    with pytest.raises(errors.IntegrityError, match=rule):
        world.orders.transition("2", "pay")
    with pytest.raises(errors.IntegrityError, match=rule):
        world.orders.get("2")


# --- durability -----------------------------------------------------------------------------------------------------------


def test_durable_means_that_sql_has_it(world: World) -> None:
    """P7. When the call returns its row is there, whatever becomes of Redis."""
    world.orders.start("1", durability="durable")
    receipt = world.orders.transition("1", "pay", durability="durable")
    assert world.versions("1") == [1, 2]
    world.wipe()
    assert world.orders.get("1").version == receipt.version


def test_durable_bulk_calls(world: World) -> None:
    results = world.orders.start_many([f"d{n}" for n in range(50)], durability="durable")
    assert all(world.versions(one.id) == [1] for one in results)
    moved = world.orders.transition_many(
        [Move("d1", "pay"), Move("nobody", "pay"), Move("d1", "ship")], durability="durable"
    )
    assert [type(one) for one in moved] == [model.Receipt, errors.NotFoundError, model.Receipt]
    assert world.versions("d1") == [1, 2, 3]


def test_durability_of_the_machine_is_the_default(redis_url: str, sqlite_url: str, namespace: str) -> None:
    with World(redis_url, sqlite_url, namespace, durability="durable") as world:
        world.orders.start("1")
        assert world.versions("1") == [1]


def test_waiting_ends_with_the_receipt_when_time_is_up(lite: World) -> None:
    """The transition stands; its durability is unknown; the error carries the receipt, also through pickle."""
    receipt = lite.orders.start("1")
    with lite.cache.flusher._lock:  # nobody flushes

        def steps(deadline: float | None = None, partitions: object = None) -> Any:
            from statecache.engine.flusher import Step

            return Step(0, False, {})

        lite.cache.flusher.step = steps  # type: ignore[method-assign]
        with pytest.raises(errors.DurabilityTimeout, match="stands, but was not in SQL in time") as late:
            lite.cache.wait_durable(receipt, timeout=0.05)
    assert late.value.receipt == receipt
    assert pickle.loads(pickle.dumps(late.value)).receipt == receipt
    del lite.cache.flusher.step
    lite.cache.wait_durable(receipt, timeout=5.0)


def test_waiting_for_a_lost_transition_says_so(world: World) -> None:
    """Acknowledged, wiped before its flush, recovered, and the partition's watermark is past it: lost, not durable."""
    world.start("1")
    world.flush()
    receipt = world.orders.transition("1", "pay")
    world.wipe()
    world.orders.transition("1", "note")
    world.flush()
    with pytest.raises(errors.IntegrityError, match="was acknowledged and is lost"):
        world.cache.wait_durable(receipt, timeout=5.0)


def test_group_commit(lite: World) -> None:
    """Thirty callers wait at once: far fewer transactions than callers."""
    lite.orders.start_many([f"g{n}" for n in range(30)])
    commits = 0
    original = lite.cache.flusher._transaction

    def count(*arguments: Any, **named: Any) -> Any:
        nonlocal commits
        commits += 1
        return original(*arguments, **named)

    lite.cache.flusher._transaction = count  # type: ignore[method-assign]
    works = [lambda n=n: lite.orders.transition(f"g{n}", "pay", durability="durable") for n in range(30)]
    results = together(*works)
    assert all(isinstance(one, model.Receipt) for one in results), results
    assert commits < 30


def test_flush_returns_when_everything_before_it_is_in_sql(world: World) -> None:
    receipts = world.orders.start_many([f"x{n}" for n in range(500)])
    world.cache.flush(timeout=30.0)
    assert all(world.versions(one.id) == [1] for one in receipts[::50])
    assert world.orders.counts() == {"placed": 500}


def test_flush_raises_when_redis_was_recovered_meanwhile(lite: World) -> None:
    """Ids of different epochs are never compared: what was acknowledged before may be lost."""
    lite.start("1")
    with (
        before_call(lite.durable, "partitions", lite.cache.recover),
        pytest.raises(errors.RecoveringError, match="recovered while this call waited"),
    ):
        lite.cache.flush()
    lite.flush()


@pytest.mark.parametrize("auto_recover", [True, False])
def test_flush_finds_that_the_log_was_deleted(
    redis_url: str, sqlite_url: str, namespace: str, client: str, auto_recover: bool
) -> None:
    """A stranger deletes a log, and nobody flushes. A new one numbers from 0 again, below SQL's watermark: what is in it was
    acknowledged, and is not in SQL."""
    with World(redis_url, sqlite_url, namespace, client=client, partition_count=1, auto_recover=auto_recover) as world:
        world.start("1", ["pay", "note", "note"])
        world.flush()
        world.client.delete(world.keyspace.log(0))
        world.orders.transition("1", "note")
        with pytest.raises(errors.RecoveringError if auto_recover else errors.IntegrityError):
            world.cache.flush()


def test_flush_beside_writers_takes_no_log_for_deleted(world: World) -> None:
    """The log goes on, and is flushed, between the two looks of a flush: SQL is ahead of what was the log's end."""
    world.start("1")
    world.flush()
    row = world.durable.partitions([world.partition_of("1")])[0]

    def go_on() -> None:
        world.orders.transition("1", "note")
        world.flush()

    with before_call(world.durable, "partitions", go_on):
        world.cache.flush()
    assert world.durable.identity().epoch == row.epoch


def test_flush_of_a_log_that_was_trimmed_to_nothing(lite: World) -> None:
    lite.start("1", ["pay"])
    lite.flush()
    epoch = lite.durable.identity().epoch
    lite.client.xtrim(lite.keyspace.log(lite.partition_of("1")), maxlen=0, approximate=False)
    lite.cache.flush()
    lite.cache.recover()
    lite.cache.flush()
    assert lite.durable.identity().epoch == epoch + 1


def test_embedded_thread_flushes_by_itself(redis_url: str, sqlite_url: str, namespace: str) -> None:
    with World(redis_url, sqlite_url, namespace) as world:
        world.cache.start_flusher()
        world.start("1", ["pay"])
        waiting.wait_until(lambda: world.versions("1") == [1, 2], "the flusher's thread")
        world.orders.transition("1", "ship")
        world.cache.close()
        other = world.more()
        assert [row.durable for row in other.machine(Order).history("1")] == [True] * 3


@ONLY_SYNC
def test_closed_cache_says_so_and_closing_twice_is_harmless(lite: World) -> None:
    lite.cache.close()
    lite.cache.close()
    calls: list[Callable[[], object]] = [
        lambda: lite.orders.get("1"), lambda: lite.orders.start("1"), lambda: lite.orders.find("placed"), lite.orders.counts,
        lambda: lite.orders.history("1"), lambda: lite.cache.machine(Order), lite.cache.flush, lite.cache.recover,
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(errors.ConfigurationError, match="closed"):
            call()


# --- dead letters ---------------------------------------------------------------------------------------------------------


def _poison(world: World, id: str) -> model.Receipt:
    """A transition whose entry contradicts SQL: somebody changed its version in the log. SQL's fold refuses it."""
    receipt = world.orders.transition(id, "note", data={"bad": 1})
    partition = world.partition_of(id)
    log = world.keyspace.log(partition)
    (found,) = [text for name, text in world.client.xrange(log, receipt.entry_id, receipt.entry_id)]
    parts = found[b"e"].split(b"\x1f")
    parts[11] = b'{"bad":'
    tail = world.client.xrange(log, receipt.entry_id)
    assert len(tail) == 1
    first = world.redis_copy()
    del first
    # The stream takes no entry twice: it is made anew with the one record changed.
    records = world.client.xrange(log)
    world.client.delete(log)
    for name, fields in records:
        text = b"\x1f".join(parts) if name.decode() == receipt.entry_id else fields[b"e"]
        world.client.xadd(log, {"e": text}, id=name)
    return receipt


def test_waiting_for_a_parked_transition_says_so(world: World) -> None:
    """SQL cannot take the entry: it is put aside as a dead letter, its instance is parked, the others go on (P10)."""
    world.start("1")
    world.start("2")
    world.flush()
    receipt = _poison(world, "1")
    other = world.orders.transition("2", "pay")
    with pytest.raises(errors.ParkedError, match="dead-letters list order:1"):
        world.cache.wait_durable(receipt, timeout=5.0)
    world.cache.wait_durable(other, timeout=5.0)
    with pytest.raises(errors.ParkedError, match="order:1 is parked"):
        world.orders.transition("1", "note")
    assert world.orders.transition("2", "note").version == 3
    assert world.orders.get("1").parked
    assert letters.discard(world.cache, "order", "1") == 1
    assert world.orders.transition("1", "note").version == 2
    world.flush()
    world.verify()


# --- servers that fail ----------------------------------------------------------------------------------------------------


def test_scripts_flushed_under_load_cost_nothing(lite: World) -> None:
    """Fault 5: the script cache is emptied again and again while eight threads write: every call succeeds, once."""
    for number in range(8):
        lite.start(f"l{number}")
    stop = threading.Event()

    def flush_scripts() -> None:
        while not stop.is_set():
            lite.client.script_flush("SYNC")
            stop.wait(0.01)

    thread = threading.Thread(target=flush_scripts)
    thread.start()
    works = [lambda n=n: [lite.orders.transition(f"l{n}", "note").version for _ in range(25)] for n in range(8)]
    try:
        results = together(*works)
    finally:
        stop.set()
        thread.join()
    assert results == [list(range(2, 27))] * 8
    lite.flush()
    lite.verify()


def test_server_restarts_between_calls(
    start_redis: Callable[..., servers.ValkeyServer], database_url: str, namespace: str
) -> None:
    """P8: SIGKILL and a restart from the append-only file. The next call finds another server, recovers, and goes on;
    nothing acknowledged is gone. (With ``everysec`` what came while an fsync was under way would be.)"""
    server = start_redis(appendfsync="always")
    with World(server.url, database_url, namespace) as world:
        world.start("1", ["pay"])
        world.start("2")
        world.flush()
        world.orders.transition("2", "note")
        server.kill()
        server.start()
        assert world.orders.transition("1", "ship", timeout=20.0).version == 3
        assert [row.version for row in world.orders.history("2")] == [1, 2]
        assert world.durable.identity().epoch == 2
        world.flush()
        world.verify()


def test_server_that_is_away_is_waited_for_and_then_reported(
    private_redis: servers.ValkeyServer, sqlite_url: str
) -> None:
    with World(private_redis.url, sqlite_url, "away", socket_timeout_seconds=0.3) as world:
        world.start("1")
        private_redis.kill()
        with pytest.raises(errors.UnavailableError) as refused:
            world.orders.transition("1", "note", timeout=0.2)
        assert refused.value.__cause__ is not None
        with pytest.raises(errors.UnavailableError):
            world.orders.get("1", timeout=0.2)
        (bulk,) = world.orders.transition_many([Move("1", "note")], timeout=0.2)
        assert isinstance(bulk, errors.UnavailableError)
        private_redis.start()
        assert world.orders.transition("1", "note", timeout=20.0).version == 2


def test_server_that_stalls_is_reported_with_our_error(private_redis: servers.ValkeyServer, sqlite_url: str) -> None:
    """The request is sent and no reply comes: it may have been applied. The error is ``UnavailableError``, its cause the
    driver's; repeated with the same id it is applied once in all."""
    with World(private_redis.url, sqlite_url, "stall", socket_timeout_seconds=0.2) as world:
        world.start("1")
        private_redis.pause()
        try:
            with pytest.raises(errors.UnavailableError, match="did not answer") as refused:
                world.orders.transition("1", "note", transition_id="t", timeout=0.1)
            (bulk,) = world.orders.transition_many([Move("1", "note", transition_id="t")], timeout=0.1)
        finally:
            private_redis.resume()
        assert refused.value.__cause__ is not None
        assert isinstance(bulk, errors.UnavailableError)
        assert world.orders.transition("1", "note", transition_id="t", timeout=20.0).version == 2
        assert world.orders.get("1").version == 2


class Interrupt(BaseException):
    """What a signal's handler may raise anywhere, like KeyboardInterrupt."""


@ONLY_SYNC
def test_interrupted_call_leaves_no_reply_to_the_next(lite: World) -> None:
    """Fault 10: a call is interrupted by a signal after its request was sent. Its connection is not used again: the
    next call would take that reply for its own."""
    lite.start("1")
    lite.start("2")
    original = lite.hot.wires.take

    def take(deadline: float | None = None) -> Any:
        line = original(deadline)
        send = type(line).send

        class Interrupted:
            fresh, pid, checks = line.fresh, line.pid, line.checks
            close, read = line.close, line.read

            def send(self, packed: bytes) -> None:
                send(line, packed)
                raise Interrupt

        return Interrupted()

    lite.hot.wires.take = take  # type: ignore[method-assign]
    with pytest.raises(Interrupt):
        lite.orders.transition("1", "pay")
    del lite.hot.wires.take
    receipt = lite.orders.transition("2", "note")
    assert (receipt.id, receipt.event, receipt.version) == ("2", "note", 2)
    assert lite.orders.get("2").version == 2


def test_identity_check_that_got_no_answer_is_made_again(redis_url: str, sqlite_url: str, namespace: str) -> None:
    """H13: a call that was to compare the identity is lost on its way. Until the comparison has been answered, calls on
    other connections may not count on it."""
    with World(redis_url, sqlite_url, namespace, identity_check_interval_ms=60_000) as world:
        world.start("1")
        lines = [world.hot.wires.take(), world.hot.wires.take()]
        for line in lines:
            line.fresh = False
        dead, alive = lines
        world.hot.wires.checked_at = 0.0
        world.hot.wires.give_back(dead)
        dead._socket.close()
        (outcome,) = world.hot.apply([_item(world, "1")])
        assert outcome.code == "LOST"
        world.disown()
        world.hot.wires.give_back(alive)
        (outcome,) = world.hot.apply([_item(world, "1")])
        assert outcome.code == "IDENTITY"


def _item(world: World, id: str) -> items.Item:
    request = world.orders.calls.door.transition(Move(id, "note"))
    assert isinstance(request, flows.Request)
    return request.item


# --- what does not belong together ----------------------------------------------------------------------------------------


def test_wrong_partition_count_is_refused(world: World) -> None:
    with pytest.raises(errors.ConfigurationError, match="2 partitions") as refused:
        world.more(partition_count=3)
    assert "3" in str(refused.value)


def test_partition_count_is_taken_from_the_store(world: World) -> None:
    world.start("1")
    settings = {name: value for name, value in world.settings.items() if name != "partition_count"}
    with StateCache.connect(
        redis_url=world.redis_url, database_url=world.database_url, namespace=world.namespace, **settings
    ) as cache:
        assert cache.settings.partition_count == 2
        assert cache.machine(Order).get("1").version == 1


def test_redis_and_database_of_two_deployments_refuse_to_work(world: World, tmp_path: Any) -> None:
    """Fault 51: production's Redis with another database, and the other way round. Nothing is changed in either."""
    world.start("1")
    before = world.hot_dump()
    with pytest.raises(errors.ConfigurationError, match="do not belong together"):
        StateCache.connect(
            redis_url=world.redis_url,
            database_url=f"sqlite:///{tmp_path / 'other.db'}",
            namespace=world.namespace,
            partition_count=2,
        )
    assert world.hot_dump() == before
    assert world.orders.get("1").version == 1


def test_namespaces_do_not_see_each_other(redis_url: str, tmp_path: Any, namespace: str) -> None:
    """Same server, ids and machines; also a namespace that begins like the other one."""
    with (
        World(redis_url, f"sqlite:///{tmp_path / 'a.db'}", namespace) as one,
        World(redis_url, f"sqlite:///{tmp_path / 'b.db'}", namespace + "x") as other,
    ):
        one.start("1", ["pay"])
        other.start("1")
        assert (one.orders.state("1"), other.orders.state("1")) == ("paid", "placed")
        assert [len(page) for page in one.hot.instances()] == [1]
        before = other.hot_dump()
        one.wipe()
        one.orders.start("2")
        assert other.hot_dump() == before
        other.flush()
        other.verify()


def test_one_namespace_has_one_store(redis_url: str, sqlite_url: str, namespace: str) -> None:
    """A second client of the same two servers joins; it does not recover what is true."""
    with World(redis_url, sqlite_url, namespace) as world:
        world.start("1")
        epoch = world.durable.identity().epoch
        other = world.more().machine(Order)
        assert other.transition("1", "note").version == 2
        assert world.durable.identity().epoch == epoch


@pytest.mark.parametrize("kind", ["connect", "embedded"])
def test_another_namespace_is_refused(
    redis_url: str, database_url: str, namespace: str, data_folder: Path, kind: str
) -> None:
    """P3, P9. It would find nothing of the store in Redis, take it for wiped, and write versions that are there already; the
    clients of the right one would do the same in their turn."""
    places: dict[str, Any] = {"redis_url": redis_url, "database_url": database_url} if kind == "connect" else {}
    open_store = (
        partial(StateCache.connect, **places) if kind == "connect" else partial(StateCache.embedded, data_folder)
    )
    with open_store(namespace=namespace) as cache:
        orders = cache.machine(Order)
        orders.start("1")
        cache.flush()
        before = cache.durable.identity()
        with pytest.raises(errors.ConfigurationError, match="correct the namespace"):
            open_store(namespace=f"{namespace}x")
        assert cache.durable.identity() == before
        assert orders.transition("1", "note").version == 2
        cache.flush()


def test_auto_recover_off_waits_for_an_operator(redis_url: str, sqlite_url: str, namespace: str) -> None:
    with World(redis_url, sqlite_url, namespace, auto_recover=False) as world:
        world.start("1")
        world.flush()
        world.wipe()
        with pytest.raises(errors.RecoveringError, match="statecache recover"):
            world.orders.transition("1", "note", timeout=1.0)
        assert world.client.keys(f"{{{namespace}:*") == []
        world.cache.recover()
        assert world.orders.transition("1", "note").version == 2
