"""What lies between a client and its Redis fails: the reply is lost, the request never comes, the server stands still or is
another one afterwards. Every call is applied once and answered with the same receipt (P1, P3, P4)."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import redis

from statecache import Move, StateCacheError
from statecache.core import errors
from statecache.durable import engine
from statecache.durable.flush import FlushTransaction
from statecache.engine import flusher
from statecache.hot import resp, wire
from tests.support import proxy, servers, waiting, worlds


@pytest.fixture
def link(redis_server: servers.ValkeyServer, redis_url: str) -> Iterator[proxy.Proxy]:
    with proxy.Proxy(redis_server.port) as made:
        yield made


@pytest.fixture
def world(link: proxy.Proxy, redis_url: str, sqlite_url: str, namespace: str, client: str) -> Iterator[worlds.World]:
    """A store whose clients reach Redis through the proxy."""

    def connected() -> worlds.World:
        return worlds.World(link.url(redis_url), sqlite_url, namespace, client=client, socket_timeout_seconds=0.3)

    try:
        made = connected()
    except errors.UnavailableError:  # not what is tested: the machine stood still for longer than the clients wait
        made = connected()
    with made:
        yield made
        link.pass_through()
        made.flush()
        made.verify()


def applied(world: worlds.World, id: str) -> list[tuple[int, str, str]]:
    return [(row.version, row.event, row.transition_id) for row in world.orders.history(id)]


# --- replies and requests that get lost --------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["drop_replies_after_forwarding", "cut_before_forwarding"])
@pytest.mark.parametrize("times", [1, 3])
def test_a_call_that_gets_lost_is_applied_once(world: worlds.World, link: proxy.Proxy, fault: str, times: int) -> None:
    """The script ran and its reply is lost (or it never got there), as often as ``times``: the flow repeats it."""
    getattr(link, fault)(times, matching=b"EVALSHA")
    start = world.orders.start("1", {"amount": 1})
    getattr(link, fault)(times, matching=b"EVALSHA")
    note = world.orders.transition("1", "note", increment={"tries": 1})
    assert link.faults_done == 2 * times
    assert [start.version, note.version] == [1, 2]
    assert applied(world, "1") == [(1, "@start", start.transition_id), (2, "note", note.transition_id)]
    assert world.orders.get("1").data == {"amount": 1, "tries": 1}
    again = world.orders.transition("1", "note", increment={"tries": 1}, transition_id=note.transition_id)
    assert again.duplicate
    assert (again.version, again.entry_id, again.at_ms) == (note.version, note.entry_id, note.at_ms)


@pytest.mark.parametrize("fault", ["drop_replies_after_forwarding", "cut_before_forwarding"])
def test_a_bulk_call_that_gets_lost_in_its_middle(world: worlds.World, link: proxy.Proxy, fault: str) -> None:
    """400 moves of 100 instances, the second script call lost: each move is applied once, in order."""
    ids = [f"b{number}" for number in range(100)]
    world.orders.start_many(ids)
    moves = [Move(id, "note", {"step": step}) for step in range(4) for id in ids]
    with worlds.before_call(world.hot.wires, "identity_due", lambda: getattr(link, fault)(1, b"EVALSHA"), call=2):
        receipts = world.orders.transition_many(moves)
    assert link.faults_done == 1
    assert [receipt.version for receipt in receipts if not isinstance(receipt, StateCacheError)] == [
        step + 2 for step in range(4) for _ in ids
    ]
    for id in ids:
        rows = world.orders.history(id)
        assert [row.patch.get("step") for row in rows] == [None, 0, 1, 2, 3]


@pytest.mark.parametrize("fault", ["drop_replies_after_forwarding", "cut_before_forwarding"])
def test_order_of_a_list_whose_reply_was_lost(world: worlds.World, link: proxy.Proxy, fault: str) -> None:
    """Every item is a repetition then; those that expect a version are known not to have been applied up to that one, for the
    others history is asked first, because their ring has dropped ids. None overtakes another."""
    world.start("1", ["note"] * 10)
    getattr(link, fault)(1, matching=b"EVALSHA")
    moved = world.orders.transition_many([Move("1", "note"), Move("1", "pay", expect_version=12), Move("1", "ship")])
    assert link.faults_done == 1
    assert [getattr(one, "version", one) for one in moved] == [12, 13, 14]


def test_a_wire_sends_once(link: proxy.Proxy, redis_server: servers.ValkeyServer) -> None:
    """redis-py repeats commands by itself (fact 1): our connections never do."""
    wires = wire.Wires(wire.pool_of(link.url(redis_server.url), 2.0))
    line = wires.take()
    assert line._connection.retry.get_retries() == 0
    link.drop_replies_after_forwarding(1, matching=b"XADD")
    with pytest.raises((redis.RedisError, OSError)):
        line.call(resp.command("XADD", "sent", "*", "e", "once"))
    wires.close()
    line.close()
    with redis_server.client() as client:
        assert client.xlen("sent") == 1


def test_two_processes_with_one_transition_id(world: worlds.World) -> None:
    """A has looked at everything it can look at outside the script; B does the whole call; A's script call comes."""
    world.start("1")
    other = world.more().machine(worlds.Order)
    first: list[Any] = []

    def by_another() -> None:
        first.append(other.transition("1", "note", transition_id="same"))

    with worlds.before_call(world.hot.wires, "identity_due", by_another):
        second = world.orders.transition("1", "note", transition_id="same")
    assert (second.version, second.duplicate) == (2, True)
    assert first[0].version == 2
    assert applied(world, "1")[1:] == [(2, "note", "same")]


def test_an_id_that_the_ring_has_dropped(world: worlds.World) -> None:
    """The repetition comes after nine other transitions, flushed and not: history knows the id (H16)."""
    world.start("1")
    first = world.orders.transition("1", "note", transition_id="long ago")
    for _ in range(9):
        world.orders.transition("1", "note")
    for flushed in (False, True):
        if flushed:
            world.flush()
        again = world.orders.transition("1", "note", transition_id="long ago")
        assert (again.version, again.duplicate, again.entry_id) == (2, True, first.entry_id)
    with pytest.raises(errors.InvalidDataError, match="it was used before"):
        world.orders.transition("1", "pay", transition_id="long ago")


# --- a server that stands still ----------------------------------------------------------------------------------------


def test_a_server_that_is_stopped_and_goes_on(start_redis: Any, sqlite_url: str, namespace: str) -> None:
    """SIGSTOP; the request waits in the socket; the client times out and repeats it on other connections; SIGCONT: the first
    request runs too."""
    server = start_redis()
    with worlds.World(
        server.url, sqlite_url, namespace, socket_timeout_seconds=0.2, call_timeout_seconds=20.0
    ) as world:
        world.start("1")
        found: list[Any] = []
        server.pause()
        calls = threading.Thread(
            target=lambda: found.append(world.orders.transition("1", "note", increment={"tries": 1}))
        )
        lost = threading.Event()
        with mock.patch.object(wire.Wire, "close", _noticing(wire.Wire.close, lost)):
            calls.start()
            assert lost.wait(20)
            server.resume()
            calls.join()
        [receipt] = found
        assert receipt.version == 2
        assert applied(world, "1")[1:] == [(2, "note", receipt.transition_id)]
        assert world.orders.get("1").data == {"tries": 1}


def _raised(results: list[Any]) -> None:
    raise results[0]


def test_a_calls_timeout_is_kept_by_a_process_that_gets_signals(
    start_redis: Any, sqlite_url: str, namespace: str
) -> None:
    """A timer's signal comes again and again while the server is stopped: no call begins its wait anew because of it. Nor does
    one whose request the system does not take."""
    server = start_redis()
    with worlds.World(server.url, sqlite_url, namespace, patch_bytes_max=2**24, socket_timeout_seconds=60.0) as world:
        world.start("1")
        large = {"text": "x" * 2**23}
        calls: dict[str, Callable[[], Any]] = {
            "get": lambda: world.orders.get("1", timeout=0.5),
            "transition": lambda: world.orders.transition("1", "note", timeout=0.5),
            "large": lambda: world.orders.transition("1", "note", large, timeout=0.5),
            "transition_many": lambda: _raised(world.orders.transition_many([Move("1", "note")], timeout=0.5)),
        }
        before = signal.signal(signal.SIGALRM, lambda *_: None)
        server.pause()
        resumed = threading.Timer(25, server.resume)
        resumed.start()
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
            for name, call in calls.items():
                began = time.monotonic()
                with pytest.raises(errors.UnavailableError):
                    call()
                assert time.monotonic() - began < 5, name
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            resumed.cancel()
            server.resume()
        world.flush()
        world.verify()


def _calls(world: worlds.World, receipt: Any, claim: Any) -> dict[str, Any]:
    orders, cache = world.orders, world.cache
    return {
        "transition": lambda: orders.transition("1", "note", timeout=0.3),
        "get": lambda: orders.get("1", timeout=0.3),
        "get, cold": lambda: orders.get("cold", timeout=0.3),
        "start": lambda: orders.start("new", timeout=0.3),
        "durable": lambda: orders.transition("1", "note", durability="durable", timeout=0.3),
        "get_many": lambda: orders.get_many(["1", "2", "cold"], timeout=0.3),
        "transition_many": lambda: orders.transition_many([Move("1", "note"), Move("2", "note")], timeout=0.3),
        "a long list": lambda: orders.transition_many([Move(f"n{n}", "note") for n in range(5000)], timeout=0.3),
        "start_many": lambda: orders.start_many([f"s{n}" for n in range(1000)], timeout=0.3),
        "guarded": lambda: orders.transition_many([Move("1", "approve")], timeout=0.3),
        "own id": lambda: orders.transition("1", "note", transition_id="t", expect_version=1, timeout=0.3),
        "history": lambda: orders.history("1", timeout=0.3),
        "at": lambda: orders.at("1", version=1, timeout=0.3),
        "claim": lambda: orders.claim("2", timeout=0.3),
        "claim_next": lambda: orders.claim_next("placed", timeout=0.3),
        "renew": lambda: claim.renew(timeout=0.3),
        "release": lambda: claim.release(timeout=0.3),
        "flush": lambda: cache.flush(timeout=0.3),
        "wait_durable": lambda: cache.wait_durable(receipt, timeout=0.3),
    }


@pytest.mark.parametrize("idle", [True, False], ids=["idle connections", "none"])
def test_a_calls_timeout_is_kept_while_the_server_is_stopped(
    start_redis: Any, sqlite_url: str, namespace: str, client: str, idle: bool
) -> None:
    """SIGSTOP: the system still accepts connections, and nobody answers on them. Each call ends by its own timeout, not by that
    of the connection, whether it has one at hand or has to make it."""
    server = start_redis()
    with worlds.World(server.url, sqlite_url, namespace, client=client, socket_timeout_seconds=60.0) as world:
        for id in ("1", "2", "3", "cold"):
            world.start(id, amount=5)
        world.flush()
        world.evict("cold")
        claim = world.orders.claim("3", ttl=600)
        calls = _calls(world, world.orders.transition("1", "note"), claim)
        if client == "async":  # claims are the sync client's, in a thread
            calls = {name: call for name, call in calls.items() if name not in ("claim", "renew", "release")}
        server.pause()
        for name, call in calls.items():
            if idle:  # as other threads would have left them
                server.resume()
                worlds.together(*[lambda: world.hot.position(0)] * 3)
                server.pause()
            began = time.monotonic()
            try:
                found = call()
            except errors.StateCacheError as error:
                found = [error]
            assert time.monotonic() - began < 20, name
            assert all(isinstance(one, (errors.UnavailableError, errors.DurabilityTimeout)) for one in found), (
                name,
                found,
            )
        server.resume()
        assert world.orders.get("1").version >= 2
        world.flush()
        world.verify()


@pytest.mark.postgres
@pytest.mark.parametrize("idle", [True, False], ids=["idle connections", "none"])
def test_a_calls_timeout_is_kept_while_postgresql_is_frozen(
    redis_url: str, private_postgres: servers.PostgresServer, namespace: str, client: str, idle: bool
) -> None:
    """SIGSTOP to all its processes: the system answers for them, and no statement ever ends. What needs SQL ends soon after its
    deadline, what does not goes on; when PostgreSQL goes on, so does all, and nothing is lost."""
    with worlds.World(
        redis_url,
        private_postgres.url(private_postgres.create_database()),
        namespace,
        client=client,
        call_timeout_seconds=0.3,
    ) as world:
        receipts = world.start("1") + [world.orders.transition("1", "note") for _ in range(10)]
        for id in ("cold", "colder"):
            world.start(id, amount=5)
        world.flush()
        world.evict("cold")
        world.evict("colder")
        more = world.orders.transition("1", "note")
        assert world.hot.wires  # a client that is admitted
        server = private_postgres
        calls = _calls_of_sql(world, receipts[1].transition_id, more)
        server.pause()
        for name, call in calls.items():
            if idle:  # as other threads would have left them
                server.resume()
                worlds.together(*[world.durable.identity] * 3)
                server.pause()
            began = time.monotonic()
            with pytest.raises((errors.UnavailableError, errors.DurabilityTimeout)):
                _raised(call())
            assert time.monotonic() - began < 20, name
            assert world.orders.get("1").version >= 12
        hot = world.orders.transition("1", "note")
        server.resume()
        assert world.orders.get("1").version == hot.version
        assert world.orders.get("cold").data["amount"] == 5
        world.flush()
        world.verify()


def _calls_of_sql(world: worlds.World, old_id: str, receipt: Any) -> dict[str, Any]:
    orders, cache = world.orders, world.cache
    return {
        "get, cold": lambda: orders.get("cold"),
        "transition, cold": lambda: orders.transition("colder", "note"),
        "get_many": lambda: orders.get_many(["1", "cold", "colder"], timeout=0.3),
        "transition_many": lambda: orders.transition_many([Move("cold", "note"), Move("colder", "note")], timeout=0.3),
        "durable": lambda: orders.transition("1", "note", durability="durable"),
        "wait_durable": lambda: cache.wait_durable(receipt),
        "flush": lambda: cache.flush(timeout=0.3),
        "own id": lambda: orders.transition("1", "note", transition_id=old_id),
        "find": lambda: orders.find("placed"),
        "counts": orders.counts,
        "claim_next": lambda: orders.claim_next("placed", timeout=0.3),
    }


def _raised(found: Any) -> None:
    """What a list tells of its last item is raised; the first that has none of SQL's is of no interest."""
    if isinstance(found, list) and isinstance(found[-1], Exception):
        raise found[-1]


@pytest.mark.postgres
@pytest.mark.parametrize(("target", "name"), [(FlushTransaction, "upsert_checkpoints"), (engine.Database, "_commit")])
def test_a_flusher_gives_up_a_postgresql_that_freezes_in_its_transaction(
    redis_url: str, private_postgres: servers.PostgresServer, namespace: str, target: type, name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A flusher has sent its rows (or the COMMIT: then it does not know); no answer comes; it gives the connection up, and its
    next step, when PostgreSQL goes on, moves each entry once."""
    monkeypatch.setattr(flusher, "FLUSH_SECONDS_MAX", 1)
    monkeypatch.setattr(engine, "_BEYOND_LIMIT_SECONDS", 0.5)
    url = private_postgres.url(private_postgres.create_database())
    with worlds.World(redis_url, url, namespace) as world:
        for number in range(50):
            world.start(str(number), ["note"])
        began = time.monotonic()
        with worlds.before_call(target, name, private_postgres.pause), pytest.raises(errors.UnavailableError):
            world.flusher().step()
        assert 1 <= time.monotonic() - began < 20
        private_postgres.resume()
        waiting.wait_until(lambda: _moves(world) is not None, "PostgreSQL ended the session that was given up")
        world.flush()
        assert world.durable.counts("order")["placed"] == 50
        world.verify()


def _moves(world: worlds.World) -> Any:
    """What a step says when the session that was given up has ended with its locks."""
    with contextlib.suppress(errors.UnavailableError):
        return world.flusher().step()


def test_a_list_goes_on_past_its_deadline_while_the_server_answers(world: worlds.World) -> None:
    """Each item has one attempt, however near the deadline is."""
    ids = [f"p{number}" for number in range(500)]
    assert {one.version for one in world.orders.start_many(ids, timeout=1e-6)} == {1}
    assert {one.version for one in world.orders.transition_many([Move(id, "note") for id in ids], timeout=1e-6)} == {2}
    assert {one.version for one in world.orders.get_many(ids, timeout=1e-6)} == {2}


def _noticing(original: Any, event: threading.Event) -> Any:
    def noticing(self: wire.Wire) -> None:
        original(self)
        event.set()

    return noticing


@pytest.mark.parametrize("later", [0, 9])
def test_the_first_request_runs_after_its_repetition(
    world: worlds.World, link: proxy.Proxy, redis_url: str, later: int
) -> None:
    """A's request is held by the network; A gives up; B repeats it with the same id, and ``later`` other moves follow, so
    that the ring has dropped the id; the network lets A's request through: it changes nothing."""
    direct = _direct(world, redis_url)
    world.start("1")
    link.hold()
    with pytest.raises(errors.UnavailableError):
        world.orders.transition("1", "note", transition_id="held", timeout=0.4)
    second = direct.transition("1", "note", transition_id="held")
    for _ in range(later):
        direct.transition("1", "note")
    before = [(row.version, row.event, row.transition_id) for row in direct.history("1")]
    link.pass_through()
    third = world.orders.transition("1", "note", transition_id="held")
    assert (third.version, third.duplicate, third.entry_id) == (second.version, True, second.entry_id)
    assert applied(world, "1") == before


def _direct(world: worlds.World, redis_url: str) -> Any:
    """A client past the proxy."""
    through, world.redis_url = world.redis_url, redis_url
    try:
        return world.more().machine(worlds.Order)
    finally:
        world.redis_url = through


def test_a_timeout_says_that_it_may_have_been_applied(world: worlds.World, link: proxy.Proxy) -> None:
    """The network swallows everything until the deadline; the caller repeats the call later with the same id."""
    world.start("1")
    link.hold()
    with pytest.raises(errors.UnavailableError) as caught:
        world.orders.transition("1", "pay", transition_id="p1", timeout=0.5)
    assert isinstance(caught.value.__cause__, (redis.RedisError, OSError))
    link.pass_through()
    receipt = world.orders.transition("1", "pay", transition_id="p1")
    assert receipt.version == 2
    assert applied(world, "1")[1:] == [(2, "pay", "p1")]


# --- a server that is another one afterwards ---------------------------------------------------------------------------


def test_the_server_restarts_between_send_and_reply(start_redis: Any, sqlite_url: str, namespace: str) -> None:
    """The transition is in the append-only file, its reply is lost, the server restarts: the repetition meets a server that
    knows no script, has it recovered, and finds its id in the ring."""
    server = start_redis()
    with (
        proxy.Proxy(server.port) as link,
        worlds.World(link.url(server.url), sqlite_url, namespace, call_timeout_seconds=20.0) as world,
    ):
        world.start("1")
        world.flush()
        epoch = world.meta()["epoch"]
        link.drop_replies_after_forwarding(1000, matching=b"EVALSHA")
        found: list[Any] = []
        call = threading.Thread(target=lambda: found.append(world.orders.transition("1", "pay")))
        call.start()
        waiting.wait_until(lambda: link.faults_done, "the first reply to be lost")
        server.kill()
        server.start()
        link.pass_through()
        call.join()
        assert found[0].version == 2
        assert world.meta()["epoch"] > epoch
        world.flush()
        world.verify()
        assert applied(world, "1") == [(1, "@start", mock.ANY), (2, "pay", found[0].transition_id)]


def test_scripts_that_vanish_under_load(world: worlds.World, redis_server: servers.ValkeyServer) -> None:
    """SCRIPT FLUSH all the time while threads write: NOSCRIPT is answered by admission and one more try, and the epoch stays
    (fault 5)."""
    epoch = world.meta()["epoch"]
    stop = threading.Event()

    def flush_scripts() -> None:
        with redis_server.client() as client:
            while not stop.is_set():
                client.script_flush("SYNC")
                stop.wait(0.003)

    def writes(name: str) -> list[int]:
        versions = [world.orders.start(name, timeout=30.0).version]
        for _ in range(60):
            versions.append(world.orders.transition(name, "note", increment={"n": 1}, timeout=30.0).version)
        return versions

    nemesis = threading.Thread(target=flush_scripts)
    nemesis.start()
    try:
        results = worlds.together(*[lambda name=f"s{number}": writes(name) for number in range(4)])
    finally:
        stop.set()
        nemesis.join()
    assert results == [list(range(1, 62))] * 4
    assert [world.orders.get(f"s{number}").data for number in range(4)] == [{"n": 60}] * 4
    assert world.meta()["epoch"] == epoch


def test_unknown_scripts_are_not_simply_loaded_again(redis_url: str, sqlite_url: str, namespace: str) -> None:
    """Redis loses its tail and its scripts, its connections and ``meta`` stay, and no check of the identity is due: NOSCRIPT
    must lead to the comparison, else a version that SQL has is given again (P8)."""
    with worlds.World(redis_url, sqlite_url, namespace, identity_check_interval_ms=10**9) as world:
        world.start("1")
        saved = world.redis_copy()
        world.orders.transition("1", "note")
        world.flush()
        world.redis_back(saved)
        assert world.orders.transition("1", "note").version == 3
        world.flush()
        world.verify()


# --- connections that died while they were idle --------------------------------------------------------------------------


IDLE = 60
AFTER_A_CUT: dict[str, Any] = {
    "transition": lambda world: world.orders.transition("1", "note", timeout=1.0),
    "get": lambda world: world.orders.get("1", timeout=1.0),
    "get_many": lambda world: world.orders.get_many(["1"], timeout=1.0)[0].version,
    "transition_many": lambda world: world.orders.transition_many([Move("1", "note")], timeout=1.0)[0].version,
    "history": lambda world: world.orders.history("1", timeout=1.0),
    "claims": lambda world: world.orders.claims(),
    "flush": lambda world: world.cache.flush(timeout=1.0),
    "timeouts": lambda world: getattr(world.cache, "sync", world.cache).timeouts.run(),
    "verify": lambda world: world.verify(),
}


def _idle_wires(world: worlds.World, count: int) -> list[wire.Wire]:
    """So many idle connections, as after a busy hour."""
    lines: list[wire.Wire] = []
    while len(lines) < count:
        with contextlib.suppress(redis.TimeoutError):  # on a machine that has other things to do
            lines.append(world.hot.wires.take())
    for line in lines:
        world.hot.wires.give_back(line)
    return lines


@pytest.mark.parametrize("name", AFTER_A_CUT)
def test_idle_connections_that_were_cut(world: worlds.World, link: proxy.Proxy, name: str) -> None:
    """A load balancer ends all of them: the first that is found broken costs one attempt, and takes the others with it."""
    world.start("1")
    _idle_wires(world, IDLE)
    link.cut()
    AFTER_A_CUT[name](world)
    assert len(world.hot.wires._idle) < IDLE // 2


def test_flush_rides_out_a_restart(start_redis: Any, sqlite_url: str, namespace: str, client: str) -> None:
    """Redis dies and is away for a while; ``flush`` asks until it is there, as a transition does."""
    server = start_redis()
    with worlds.World(server.url, sqlite_url, namespace, client=client, call_timeout_seconds=20.0) as world:
        world.start("1")
        world.flush()
        _idle_wires(world, 5)
        server.kill()
        again = threading.Timer(0.5, server.start)
        again.start()
        world.cache.flush(timeout=20.0)
        again.join()
        assert world.orders.transition("1", "note").version == 2
        world.cache.flush(timeout=20.0)
        assert [row.version for row in world.durable.history("order", "1")] == [1, 2]


def test_flush_when_redis_dies_before_it_helps(start_redis: Any, sqlite_url: str, namespace: str) -> None:
    """The logs' ends were read; then Redis goes away, for longer than one step of the flusher takes, and comes back. It is
    recovered, and may have lost its tail: that is said, not passed over."""
    server = start_redis()
    with worlds.World(server.url, sqlite_url, namespace) as world:
        world.start("1")
        again = threading.Timer(0.5, server.start)

        def die() -> None:
            server.kill()
            again.start()

        with (
            worlds.before_call(world.cache.commits, "help", die),
            pytest.raises(errors.RecoveringError),
        ):
            world.cache.flush(timeout=20.0)
        again.join()
        world.cache.flush(timeout=20.0)
        assert [row.version for row in world.durable.history("order", "1")] == [1]


def test_a_flush_without_redis_ends_in_time(start_redis: Any, sqlite_url: str, namespace: str) -> None:
    server = start_redis()
    with worlds.World(server.url, sqlite_url, namespace) as world:
        world.start("1")
        server.kill()
        with pytest.raises(errors.UnavailableError):
            world.cache.flush(timeout=0.2)


@pytest.mark.parametrize("reused", [True, False])
def test_which_errors_drop_the_idle_connections(world: worlds.World, link: proxy.Proxy, reused: bool) -> None:
    """A slow server does not, and nor does a connection that breaks in its first exchange: they say nothing of the others."""
    wires = world.hot.wires
    wires.discard_idle()
    lines = _idle_wires(world, 3)
    link.hold()
    with pytest.raises(errors.UnavailableError):
        world.hot.position(0)
    link.pass_through()
    assert wires._idle == lines[:2]
    line = wires.take() if reused else wires.wire_class(wires._connected(0.0), 1.0)
    line._socket.close()
    wires.lose(line, OSError("broken"))
    assert wires._idle == ([] if reused else lines[:2])


def test_connections_are_dropped_while_others_take_them(world: worlds.World) -> None:
    """Threads take and give back while another drops what is idle: each connection has one owner, or is closed."""
    wires = world.hot.wires
    stop = threading.Event()

    def drop() -> None:
        while not stop.is_set():
            wires.discard_idle()

    def look() -> list[Any]:
        return [world.hot.position(0) for _ in range(300)]

    dropping = threading.Thread(target=drop)
    dropping.start()
    try:
        found = worlds.together(*[look] * 3)
    finally:
        stop.set()
        dropping.join()
    assert all(each == found[0] for each in found)


# --- connections that may not be used again ----------------------------------------------------------------------------


@pytest.mark.parametrize("client", ["sync"])  # the async client's connection outlives a cancelled call
def test_a_cancelled_call_takes_its_connection_with_it(world: worlds.World) -> None:
    """The call is interrupted (Ctrl-C) between send and reply: nobody else reads that reply."""
    for number in range(3):
        world.start(f"o{number}", amount=number)
    with mock.patch.object(wire.Wire, "read", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        world.orders.transition("o0", "note", {"amount": 100})
    with mock.patch.object(wire.Wire, "read_many", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        world.orders.get("o1")
    for number in (1, 2):
        assert world.orders.get(f"o{number}").data == {"amount": number}
        assert world.orders.transition(f"o{number}", "note").version == 2


def test_a_connection_that_timed_out_is_closed(world: worlds.World, link: proxy.Proxy) -> None:
    """Replies that come too late are read by nobody: every reader gets its own instance."""
    for number in range(20):
        world.start(f"o{number}", amount=number)
    for number in range(0, 20, 5):
        link.hold()
        with pytest.raises(errors.UnavailableError):
            world.orders.get(f"o{number}", timeout=0.1)
        link.pass_through()
        assert [world.orders.get(f"o{other}").data for other in range(20)] == [{"amount": other} for other in range(20)]
