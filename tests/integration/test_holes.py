"""The holes H1 to H18 of the protocol, each interleaving forced.

Some are forced where their subject is tested: H3 and H6 (recoverer killed at each step) in ``test_recovery.py``, H11 and H16
(lost receipts, the ring of eight) in ``test_cache.py``, the refusals of single scripts in ``tests/lua``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from statecache.core import entry, errors, items, model
from statecache.durable.flush import FlushTransaction
from statecache.engine import letters, recovery
from statecache.hot import scripts
from tests.support import servers
from tests.support.waiting import wait_until
from tests.support.worlds import Order, World, after_call, before_call


@pytest.fixture
def world(redis_url: str, sqlite_url: str, namespace: str) -> Iterator[World]:
    with World(redis_url, sqlite_url, namespace) as found:
        yield found


@pytest.fixture
def postgres_world(redis_url: str, postgres_url: str, namespace: str) -> Iterator[World]:
    with World(redis_url, postgres_url, namespace) as found:
        yield found


class Died(BaseException):
    """The process that does a step is gone."""


def die() -> None:
    raise Died


def in_thread(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(work())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, results


# --- H1, H2: what an older flusher may still commit -----------------------------------------------------------------------


@pytest.mark.postgres
def test_h1_recovery_waits_for_an_open_flush_and_counts_it(postgres_world: World) -> None:
    """H1 (P6). A flusher has advanced the watermark and has not committed; a recovery takes its epoch in SQL. As that writes
    every partition row, it waits (PostgreSQL shows it waiting for a lock) until the flusher commits; then it reads the
    watermark that the flusher wrote. With the epoch in the store's row only, both would go on side by side."""
    world = postgres_world
    world.start("1", ["pay"])
    other = world.more()
    advanced, go_on = threading.Event(), threading.Event()
    original = FlushTransaction.insert_history

    def paused(self: FlushTransaction, *arguments: Any, **named: Any) -> None:
        advanced.set()
        assert go_on.wait(20)
        original(self, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FlushTransaction, "insert_history", paused)
        flushing, steps = in_thread(world.flusher().step)
        assert advanced.wait(20)
        recovering, reports = in_thread(other.recover)

        def waits() -> bool:
            with world.durable.database.reader.connect() as connection:
                asked = "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()"
                return bool(connection.exec_driver_sql(asked).scalar())

        wait_until(waits, "the recovery to wait for the flusher's rows")
        assert not reports
        go_on.set()
        flushing.join()
        recovering.join()
    assert steps[0].entries == 2
    assert reports[0].kinds == {"intact": 2}
    assert sum(part.unflushed for part in reports[0].partitions if part.partition == world.partition_of("1")) == 0
    assert world.versions("1") == [1, 2]
    world.flush()
    world.verify()


@pytest.mark.parametrize("kind", ["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def test_h1_flusher_that_read_before_the_recovery_commits_nothing(request: pytest.FixtureRequest, kind: str) -> None:
    """H1 (P6). The flusher has read the entries and stands before its transaction; a whole recovery passes. Its
    compare-and-set names the old epoch: it changes no row, and everything it had read is dropped."""
    world: World = request.getfixturevalue("world" if kind == "sqlite" else "postgres_world")
    world.start("1", ["pay"])
    other = world.more()
    flusher = world.flusher()
    with before_call(flusher, "_commit", other.recover):
        assert flusher.step().entries == 0
    assert world.versions("1") == []
    assert world.watermark(world.partition_of("1")) == entry.ZERO
    world.flush()
    assert world.versions("1") == [1, 2]
    world.verify()


def test_h2_flusher_of_the_new_epoch_reads_nothing_before_the_fence(world: World) -> None:
    """H2 (P3). A recovery has its epoch in SQL and has not fenced: a flusher that starts now has the new epoch and owner from
    SQL, but the log answers only where ``meta`` has them too. Then Redis loses the tail that it might have read; nothing of
    that tail reaches SQL, and the lost start's version 1 exists once."""
    saved = world.redis_copy()
    world.start("lost")
    other = world.more(auto_recover=False)

    def flush_then_lose() -> None:
        with pytest.raises(errors.RecoveringError):
            world.flusher(other).step(0.0)
        assert world.versions("lost") == []
        world.redis_back(saved)

    with before_call(world.hot, "fence", flush_then_lose):
        world.cache.recover()
    receipt = world.orders.start("lost")
    world.flush()
    assert [row.transition_id for row in world.durable.history("order", "lost")] == [receipt.transition_id]
    world.verify()


# --- H3 -------------------------------------------------------------------------------------------------------------------


def test_h3_recoverer_dies_after_a_drop_and_sql_goes_back(world: World) -> None:
    """H3. Version 2 was flushed and lost by Redis; the recoverer drops the hash of version 1 and dies. SQL is restored to
    version 1, so that the next recovery finds the log intact, with the hash missing. The drop itself said "cold": the
    instance is looked up, not taken for absent."""
    world.start("1")
    world.flush()
    saved_sql, saved_redis = world.sql_copy(), world.redis_copy()
    world.orders.transition("1", "pay")
    world.flush()
    world.redis_back(saved_redis)
    with pytest.raises(Died), after_call(world.hot, "drop", die, call=3):
        world.cache.recover()
    assert not world.is_hot("1")
    world.sql_back(saved_sql)
    assert world.cache.recover().kinds == {"intact": 2}
    world.flush()
    assert world.orders.get("1").version == 1
    with pytest.raises(errors.AlreadyExistsError):
        world.orders.start("1")
    assert world.orders.transition("1", "pay").version == 2


# --- H4: the recovery's own steps ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["probe", "drop", "ready"])
def test_h4a_redis_rolls_back_between_the_fence_and_a_step(world: World, step: str) -> None:
    """H4a. After the fence Redis comes back from data of before it: fence and drops are gone. The step is refused (``meta``
    has the old epoch), and the recovery begins again at step 1."""
    world.start("1", ["pay"])
    world.flush()
    saved = world.redis_copy()
    world.orders.transition("1", "ship")
    world.flush()
    world.redis_back(saved)
    with before_call(world.hot, step, lambda: world.redis_back(saved, detour=True)):
        report = world.cache.recover()
    assert report.epoch == 3
    assert report.kinds == {"tail lost": 1, "intact": 1}
    assert world.orders.transition("1", "deliver").version == 4
    world.flush()
    world.verify()


def test_h4b_server_restarts_after_the_fence_and_loses_the_drops(
    start_redis: Callable[..., servers.ValkeyServer], sqlite_url: str, namespace: str
) -> None:
    """H4b. A snapshot is taken after the fence; the drops follow; the server dies and comes back from the snapshot: fence and
    epoch are there, the dropped hash is back. ``ready`` compares the server's identity with that of the fence, is refused, and
    does not bless this server."""
    server = start_redis(appendonly="no")
    with World(server.url, sqlite_url, namespace) as world:
        world.start("1", ["pay"])
        world.flush()
        saved = world.redis_copy()
        world.orders.transition("1", "ship")
        world.flush()
        world.redis_back(saved)

        def restart() -> None:
            server.kill()
            server.start()
            idle, world.hot.wires._idle = world.hot.wires._idle, []
            for line in idle:  # the next step finds the new server, not a dead connection
                line.close()

        with (
            after_call(world.hot, "fence", lambda: world.client.save(), call=2),
            before_call(world.hot, "ready", restart),
        ):
            world.cache.recover()
        assert world.orders.transition("1", "deliver").version == 4
        world.flush()
        world.verify()


def test_h4c_log_is_wiped_before_it_is_classified(world: World) -> None:
    """H4c. Wiped after the fence: the look at the log is refused, no watermark is moved back."""
    world.start("1", ["pay"])
    world.flush()
    before = world.watermark(world.partition_of("1"))
    with before_call(world.hot, "probe", lambda: world.wipe(scripts_stay=True)):
        report = world.cache.recover()
    assert report.kinds == {"wiped": 2}
    assert world.watermark(world.partition_of("1")) == before
    assert world.orders.transition("1", "ship").version == 3


def test_h4d_paused_older_recoverer_fences_after_the_newer_is_ready(world: World) -> None:
    """H4d. ``meta.epoch`` never goes backwards: the late fence is refused in every partition, and serving goes on."""
    world.start("1")
    other = world.more()
    with pytest.raises(errors.RecoveringError), before_call(world.hot, "fence", other.recover):
        world.cache.recover()
    assert {world.meta(partition)["epoch"] for partition in (0, 1)} == {"3"}
    assert world.orders.transition("1", "note").version == 2


# --- H5 -------------------------------------------------------------------------------------------------------------------


def test_h5_epochs_are_not_crossed_by_their_numbers(world: World) -> None:
    """H5 (P3). SQL is restored to a watermark of epoch 1; entries of epoch 1 behind it were flushed since and trimmed; the log
    begins with the mark of epoch 2. A rule like "a new epoch begins at 0" would take that mark for the next entry: it is not,
    its ``prev`` lies above the watermark. The missing versions are reconciled."""
    world.start("1")
    world.flush()
    saved = world.sql_copy()
    for _ in range(2):
        world.orders.transition("1", "note", data={"n": 1})
    world.flush()
    world.cache.recover()
    world.flush()
    assert world.log(world.partition_of("1")) == ["2-0"]
    world.sql_back(saved)
    world.flush_through()
    assert [(row.covers_from, row.version) for row in world.durable.history("order", "1")] == [(None, 1), (2, 3)]
    assert world.orders.transition("1", "pay").version == 4
    world.flush()
    world.verify()


# --- H7, H8: late hands of an older epoch ----------------------------------------------------------------------------------


def test_h7_trim_that_comes_after_an_sql_restore_removes_nothing(world: World) -> None:
    """H7 (P11). Committed, and paused before the trim; SQL is restored to before that commit; a recovery finds the log intact.
    Then the flusher wakes: its trim is of the old epoch, and refused. What SQL has not any more is flushed again."""
    world.start("1")
    world.flush()
    saved = world.sql_copy()
    world.orders.transition("1", "pay")
    other = world.more()
    flusher = world.flusher()

    def restore_and_recover() -> None:
        world.sql_back(saved)
        assert other.recover().kinds == {"intact": 2}

    with before_call(world.hot, "flushed", restore_and_recover):
        flusher.step()
    assert world.versions("1") == [1]
    world.flush()
    assert world.versions("1") == [1, 2]
    world.verify()


def test_h7_trim_that_comes_after_a_wipe_makes_no_meta(world: World) -> None:
    """H7. A late write to ``meta`` after FLUSHALL would create one without an epoch."""
    world.start("1")
    flusher = world.flusher()
    with before_call(world.hot, "flushed", lambda: world.wipe(scripts_stay=True)):
        flusher.step()
    assert world.hot_dump() == {}
    assert world.orders.transition("1", "pay").version == 2


def test_h8_evictor_that_read_sql_before_its_restore_drops_nothing(world: World) -> None:
    """H8 (P11). The evictor reads version 2 from SQL; SQL is restored to version 1 and recovered; then its script runs, which
    is of the old epoch: version 2 stays, the only copy there is."""
    world.start("1")
    world.flush()
    saved = world.sql_copy()
    world.orders.transition("1", "pay")
    world.flush()
    other = world.more()

    def restore_and_recover() -> None:
        world.sql_back(saved)
        other.recover()

    with before_call(world.hot, "evict", restore_and_recover):
        assert world.evict("1") == "EPOCH"
    assert world.orders.get("1").version == 2
    world.flush_through()
    world.verify()


def test_h8_restored_sql_evicts_nothing_by_metas_watermark(world: World) -> None:
    """H8. SQL went back and nobody has noticed: ``meta.watermark`` is newer than SQL. Eviction goes by what SQL says now."""
    world.start("1")
    world.flush()
    saved = world.sql_copy()
    world.orders.transition("1", "pay")
    world.flush()
    world.sql_back(saved)
    assert world.evict("1") == "KEPT"
    assert world.orders.get("1").version == 2


def test_h8_parked_instance_is_kept_before_its_flag_is_set(world: World) -> None:
    """H8. The flusher put the entry aside as a letter and died before it flagged the hash. Its entry is below the watermark
    and not in history: by the watermark alone it would be evicted, and come back at an older version."""
    world.start("1")
    world.flush()
    _spoil(world, "1")
    with pytest.raises(Died), before_call(world.hot, "park", die):
        world.flusher().step()
    assert world.evict("1") == "KEPT"
    assert world.orders.get("1").version == 2


# --- H9, H10: hydration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["transition", "start", "get"])
def test_h9_sql_that_went_back_hydrates_nothing(world: World, call: str) -> None:
    """H9. Evicted at version 2; SQL restored to version 1 (or to nothing), and nobody has noticed. What Redis has dropped
    (``evicted_to``) is above SQL's watermark: neither is version 1 brought back (a second version 2 would follow), nor is
    "not found" believed, nor a start."""
    saved = world.sql_copy()
    world.start("1")
    world.flush()
    if call == "transition":
        saved = world.sql_copy()
    world.orders.transition("1", "pay")
    world.flush()
    assert world.evict("1") == "OK"
    world.sql_back(saved)
    calls: dict[str, Callable[[], object]] = {
        "transition": lambda: world.orders.transition("1", "note", timeout=1.0),
        "start": lambda: world.orders.start("1", timeout=1.0),
        "get": lambda: world.orders.get("1", timeout=1.0),
    }
    with pytest.raises(errors.IntegrityError, match="SQL is older than what Redis has dropped"):
        calls[call]()
    assert not world.is_hot("1")


def test_h9_sql_goes_back_between_apply_and_the_look_up(world: World) -> None:
    """H9. MISS was answered while SQL had version 2; it is restored before the look-up. The snapshot's own watermark tells."""
    world.start("1")
    world.flush()
    saved = world.sql_copy()
    world.orders.transition("1", "pay")
    world.flush()
    world.evict("1")
    with (
        before_call(world.durable, "lookup", lambda: world.sql_back(saved)),
        pytest.raises(errors.IntegrityError, match="SQL is older"),
    ):
        world.orders.transition("1", "note", timeout=1.0)


def test_h9_evicted_again_behind_the_look_up(world: World) -> None:
    """H9. The look-up found version 1; then the instance was hydrated, moved, flushed and evicted by others; then our
    hydration comes, with version 1: it is refused (STALE), and the call begins again with version 2."""
    world.start("1")
    world.flush()
    world.evict("1")
    other = world.more().machine(Order)

    def by_others() -> None:
        other.transition("1", "pay")
        world.flusher(world.cache).step()
        assert world.evict("1") == "OK"

    with before_call(world.hot, "hydrate_and_apply", by_others):
        receipt = world.orders.transition("1", "note")
    assert (receipt.version, receipt.from_state) == (3, "paid")
    world.flush()
    world.verify()


def test_h10_slow_hydrator_overwrites_nothing(world: World) -> None:
    """H10. Looked up at version 1; another client hydrated and moved it to version 2 meanwhile: the hash exists, hydration
    does nothing."""
    world.start("1")
    world.flush()
    world.evict("1")
    other = world.more().machine(Order)
    with before_call(world.hot, "hydrate_and_apply", lambda: other.transition("1", "pay")):
        assert world.orders.transition("1", "ship").version == 3


def test_h10_hydration_of_an_older_epoch_is_refused(world: World) -> None:
    """H10. MISS in epoch 1 and a look-up of version 1; a recovery passes; version 2 was flushed and dropped. The hydration is
    stamped with epoch 1: refused; nothing that was read before is used."""
    world.start("1")
    world.flush()
    world.evict("1")
    other_cache = world.more()
    other = other_cache.machine(Order)

    def recover_and_move() -> None:
        other_cache.recover()
        other.transition("1", "pay")
        other_cache.flush()
        found = other_cache.durable.lookup([("order", "1", world.partition_of("1"))])[0]
        assert other_cache.hot.evict([(world.partition_of("1"), "order:1", 2, str(found.watermark), 0)]) == ["OK"]

    with before_call(world.hot, "hydrate_and_apply", recover_and_move):
        assert world.orders.transition("1", "ship").version == 3
    world.flush()
    world.verify()


# --- H12: dead letters ------------------------------------------------------------------------------------------------------


def _spoil(world: World, id: str, *, moves: int = 1) -> list[model.Receipt]:
    """Transitions of which SQL cannot take the first: its patch in the log is no JSON any more."""
    receipts = [world.orders.transition(id, "note", data={"k": number}) for number in range(moves)]
    log = world.keyspace.log(world.partition_of(id))
    records: Any = world.client.xrange(log)
    world.client.delete(log)
    for name, fields in records:
        text = fields[b"e"]
        if name.decode() == receipts[0].entry_id:
            text = text.replace(b'{"k":0}', b'{"k":0')
        world.client.xadd(log, {"e": text}, id=name)
    return receipts


def test_h12a_what_waits_behind_a_letter_is_a_letter_too(world: World) -> None:
    """H12a (P10, P11). Version 2 is refused, 3 waits, both below the watermark and trimmed; the flusher dies before it flags
    the hash, so version 4 is accepted; another flusher, without memory, puts that behind the letters too, because it asks SQL
    after its compare-and-set. Nothing of them is in history, nothing is lost."""
    world.start("1")
    world.start("2")
    world.flush()
    _spoil(world, "1", moves=2)
    with pytest.raises(Died), before_call(world.hot, "park", die):
        world.flusher().step()
    assert world.orders.transition("1", "note").version == 4
    assert world.orders.transition("2", "note").version == 2
    world.flusher(world.more()).step()
    found = world.durable.letters("order", "1")
    assert [(letter.entry.version, letter.waiting) for letter in found] == [(2, False), (3, True), (4, True)]
    assert world.versions("1") == [1]
    assert world.versions("2") == [1, 2]
    with pytest.raises(errors.ParkedError):
        world.orders.transition("1", "note")


def test_h12b_letters_are_things_that_sql_knows(world: World) -> None:
    """H12b. Version 2 is a letter; Redis rolls back to version 1, unparked. SQL knows of version 2: the hash is dropped, and
    comes back parked, so that there is no second version 2."""
    world.start("1")
    world.flush()
    saved = world.redis_copy()
    _spoil(world, "1")
    world.flush()
    world.redis_back(saved)
    with pytest.raises(errors.ParkedError):
        world.orders.transition("1", "note")
    assert world.versions("1") == [1]
    assert [letter.entry.version for letter in world.durable.letters("order", "1")] == [2]


@pytest.mark.parametrize("act", ["retry", "discard"])
def test_h12d_letters_are_moved_only_when_nothing_is_under_way(world: World, act: str) -> None:
    """H12d, H12e. Version 2 is a letter, version 3 is still in the log, the flag was never set. Retry and discard first flag
    the hash and flush; then they take the whole queue: history has no gap either way."""
    world.start("1")
    world.flush()
    _spoil(world, "1")
    with pytest.raises(Died), before_call(world.hot, "park", die):
        world.flusher().step()
    assert world.orders.transition("1", "note").version == 3
    if act == "discard":
        assert letters.discard(world.cache, "order", "1") == 2
        assert world.orders.transition("1", "note").version == 2
    else:
        with pytest.raises(Exception, match=r"."):
            letters.retry(world.cache, "order", "1")  # it is still no JSON: refused again, nothing changed
        assert len(world.durable.letters("order", "1")) == 2
        with pytest.raises(errors.ParkedError):
            world.orders.transition("1", "note")
        letters.discard(world.cache, "order", "1")
    world.flush()
    world.verify()


def test_h12d_died_before_the_hash_was_dropped(world: World) -> None:
    """The letters are gone from SQL, and the parked hash of version 2 is still there: whoever meets it drops it."""
    world.start("1")
    world.flush()
    _spoil(world, "1")
    world.flush()
    with pytest.raises(Died), before_call(letters, "_drop_hash", die):
        letters.discard(world.cache, "order", "1")
    assert world.is_hot("1")
    receipt = world.orders.transition("1", "note")
    assert receipt.version == 2
    world.flush()
    world.verify()


# --- H13: an untrue Redis within the identity interval ----------------------------------------------------------------------


def test_h13a_ids_that_were_given_twice_are_no_proof(world: World) -> None:
    """H13a. Redis came back without its tail by the detour, and a call within 500 ms is accepted there: the id at SQL's
    watermark is given a second time, to another transition. By ids the log would be intact; by content it has diverged, and
    the fork is reported, not merged."""
    partition = world.partition_of("1")
    world.start("1")
    world.flush()
    saved = world.redis_copy()
    first = world.orders.transition("1", "note", data={"line": "SQL"})
    world.flush()
    identity = world.meta(partition)["identity"]
    world.redis_back(saved, detour=True)
    for one in (0, 1):
        world.client.hset(world.keyspace.meta(one), "identity", identity)
    second = world.orders.transition("1", "note", data={"line": "log"})
    assert second.entry_id == first.entry_id
    report = world.cache.recover()
    assert report.partitions[partition].kind == "diverged"
    assert report.partitions[partition].parked == 1
    assert [row.transition_id for row in world.durable.history("order", "1")][-1] == first.transition_id
    assert [letter.entry.transition_id for letter in world.durable.letters("order", "1")] == [second.transition_id]


def test_h13a_identity_always_notices_at_once(redis_url: str, sqlite_url: str, namespace: str) -> None:
    """``identity_check="always"``: the first call after the detour is refused, with scripts and connection still there."""
    with World(redis_url, sqlite_url, namespace, identity_check="always") as world:
        world.start("1")
        world.flush()
        saved = world.redis_copy()
        world.orders.transition("1", "pay")
        world.flush()
        world.redis_back(saved, detour=True)
        assert world.orders.transition("1", "ship").version == 3
        assert world.durable.identity().epoch == 2
        world.flush()
        world.verify()


def test_h13b_server_changes_between_comparison_and_load(private_redis: servers.ValkeyServer, sqlite_url: str) -> None:
    """H13b. NOSCRIPT, the identity matches, then the server restarts: the load must not go to the new one. It fails with the
    connection, and the next comparison finds another identity: recovery."""
    with World(private_redis.url, sqlite_url, "h13b") as world:
        world.start("1")
        world.flush()
        world.client.script_flush("SYNC")

        def restart() -> None:
            private_redis.kill()
            private_redis.start()

        with before_call(world.hot, "_load", restart):
            assert world.orders.transition("1", "pay", timeout=30.0).version == 2
        assert world.durable.identity().epoch == 2
        world.flush()
        world.verify()


def test_h13b_first_call_on_a_connection_compares_the_identity(world: World) -> None:
    """H13b. Another client's load made the scripts known to a server that is not the true one; our last check is younger than
    the interval, but it was on another connection: the first call on a new one compares."""
    world.start("1")
    world.hot.identity_interval_seconds = 3600.0
    world.orders.transition("1", "note")
    world.disown()
    held = world.hot.wires.take()
    try:
        request = world.orders.calls.door.transition(model.Move("1", "note"))
        (outcome,) = world.hot.apply([request.item])
        assert outcome.code == "IDENTITY"
    finally:
        held.close()


def _codes(world: World, chunks: Iterator[list[items.Item]]) -> dict[str, str]:
    """The code of each item's outcome, sent chunk by chunk, two script calls in flight."""
    answered = world.hot.apply_stream(chunks)
    return {
        item.id: outcome.code for chunk, outcomes in answered for item, outcome in zip(chunk, outcomes, strict=True)
    }


def _note(world: World, id: str) -> list[items.Item]:
    return [world.orders.calls.door.transition(model.Move(id, "note")).item]


def test_h13_reply_of_an_unchecked_call_says_nothing_of_the_check_behind_it(world: World) -> None:
    """H13 with two script calls in flight. The first leaves within the interval and compares nothing. The client stands still
    while the server becomes an untrue one; the second compares. The first one's reply is read: it is not the answer to that
    check, so the third, which leaves now, compares too. (It went unchecked, was applied, and what it was told was lost.)"""
    for id in "1234":
        world.start(id)
    world.hot.identity_interval_seconds = 3600.0
    world.orders.transition("1", "note")

    def chunks() -> Iterator[list[items.Item]]:
        yield _note(world, "1")
        wait_until(lambda: world.orders.get("1").version == 3, "the first to be applied")
        world.disown()
        world.hot.wires.checked_at = 0.0  # the interval is over
        for id in "234":
            yield _note(world, id)

    assert _codes(world, chunks()) == {"1": "OK", "2": "IDENTITY", "3": "IDENTITY", "4": "IDENTITY"}


def test_h13_all_calls_on_a_connection_compare_until_one_is_answered(world: World) -> None:
    """H13b with two script calls in flight on a new connection, whose server is not the true one, while another connection's
    check is young: the second call compares as the first one does, because the answer is not there yet. So do all later
    ones, even if the other connection is found true again meanwhile."""
    for id in "123":
        world.start(id)
    world.hot.identity_interval_seconds = 3600.0
    held = world.hot.wires.take()
    world.orders.transition("1", "note")
    world.hot.wires.discard_idle()
    world.disown()

    def chunks() -> Iterator[list[items.Item]]:
        yield _note(world, "1")
        yield _note(world, "2")
        world.hot.wires.checked_at = time.monotonic()
        yield _note(world, "3")

    try:
        assert _codes(world, chunks()) == {"1": "IDENTITY", "2": "IDENTITY", "3": "IDENTITY"}
    finally:
        held.close()


def test_h13_failover_detour_of_a_real_server(
    start_redis: Callable[..., servers.ValkeyServer], sqlite_url: str, namespace: str
) -> None:
    """Fact 6. The primary is demoted, synced from a promoted replica that lacks its tail, and promoted again: same ``run_id``,
    same connections, scripts still cached. Only ``master_replid2`` and its offset tell. The next call is refused there,
    recovers, and goes on from what SQL has; the unflushed tail is lost and reported as possible."""
    primary, replica = start_redis(), start_redis()
    with World(primary.url, sqlite_url, namespace, identity_check="always") as world, replica.client() as second:
        world.start("1")
        world.flush()
        second.replicaof("127.0.0.1", primary.port)
        wait_until(lambda: second.info("replication").get("master_link_status") == "up", "the replica's sync", 30)
        wait_until(lambda: world.client.wait(1, 100) == 1, "the replica to have it all", 30)
        second.replicaof("no", "one")
        world.orders.transition("1", "pay")
        world.flush()
        world.orders.transition("1", "note")
        run_id = world.client.info("server")["run_id"]
        world.client.replicaof("127.0.0.1", replica.port)
        wait_until(lambda: world.client.info("replication").get("master_link_status") == "up", "the primary's sync", 30)
        world.client.replicaof("no", "one")
        assert world.client.info("server")["run_id"] == run_id
        receipt = world.orders.transition("1", "ship", timeout=30.0)
        assert (receipt.version, receipt.from_state) == (3, "paid")
        world.flush()
        world.verify()


# --- H14 to H18 -------------------------------------------------------------------------------------------------------------


def test_h14_epoch_that_is_taken_twice_is_not_the_same(world: World) -> None:
    """H14. Recoverer A takes epoch 2 in SQL; SQL is restored; B takes epoch 2 again, and right before that A's fences arrive in
    Redis. SQL says (2, B), Redis (2, A): not equal. B's fence is refused and it starts over with a higher epoch."""
    world.start("1")
    world.flush()
    saved = world.sql_copy()
    with pytest.raises(Died), after_call(recovery.recoveries, "take", die):
        world.cache.recover()
    taken = world.durable.identity()
    stamp_a = scripts.Stamp(taken.epoch, taken.owner)
    world.sql_back(saved)
    other = world.more(auto_recover=False)

    def fences_of_a() -> None:
        for partition in (0, 1):
            code, _ = world.hot.fence(partition, stamp_a, taken.deployment, taken.protocol)
            assert code == "OK"

    owners: list[tuple[int, str]] = []

    def look() -> None:
        row = world.durable.identity()
        owners.append((row.epoch, row.owner))
        with pytest.raises(errors.RecoveringError):
            world.flusher(other).step(0.0)

    with before_call(recovery.recoveries, "take", fences_of_a), after_call(recovery.recoveries, "take", look):
        report = world.cache.recover()
    assert owners[0][0] == stamp_a.epoch == 2
    assert owners[0][1] != stamp_a.owner
    assert report.epoch == 3
    assert world.orders.transition("1", "pay").version == 2
    world.flush()
    world.verify()


def test_h15_recoverer_that_dies_after_its_fence_hides_no_loss(world: World) -> None:
    """H15 (P9). The unflushed tail is lost; A fences and dies; B finds the identity that the last ready recorded, not A's."""
    world.start("1")
    world.flush()
    saved = world.redis_copy()
    world.orders.transition("1", "pay")
    world.redis_back(saved)
    with pytest.raises(Died), after_call(world.hot, "fence", die, call=2):
        world.cache.recover()
    report = world.cache.recover()
    assert report.kinds == {"intact": 2}
    assert all(part.loss_possible for part in report.partitions)


@pytest.mark.parametrize("written", [False, True])
def test_h17_mark_of_an_unknown_recovery_below_the_watermark(world: World, written: bool) -> None:
    """H17. A recovery saw an older SQL (its watermark below what Redis had lost), and SQL has forgotten its owner: the log
    ends before SQL's watermark and goes on with that recovery's mark. Ids above the watermark exist, so by their order the
    log would "cover" it. It has lost a tail, counted from before the mark; and if an instance that SQL is ahead of was moved
    behind the mark, two lines of history exist."""
    partition = world.partition_of("1")
    world.start("1")
    world.flush()
    saved = world.redis_copy()
    seen = [world.watermark(0), world.watermark(1)]
    world.orders.transition("1", "note", data={"line": "SQL"})
    world.flush()
    world.redis_back(saved)
    row = world.durable.identity()
    forgotten = scripts.Stamp(2, "forgotten")
    for one in (0, 1):
        _, fenced = world.hot.fence(one, forgotten, row.deployment, row.protocol)
        assert fenced is not None
        code = world.hot.ready(
            one, forgotten, identity=fenced.identity, watermark=seen[one], limit=100, new=False, report=""
        )
        assert code == "OK 2-0"
    world.hot.adopt(2, "forgotten")
    assert world.hot.admit(forgotten).codes == ["OK", "OK"]
    if written:
        request = world.orders.calls.door.transition(model.Move("1", "note", data={"line": "log"}))
        (outcome,) = world.hot.apply([request.item])
        assert outcome.code == "OK"
    report = world.cache.recover()
    assert report.partitions[partition].kind == ("diverged" if written else "tail lost")
    if written:
        with pytest.raises(errors.ParkedError):
            world.orders.transition("1", "note")
    else:
        assert world.orders.transition("1", "note").version == 3
        world.flush()
        world.verify()


def test_h18_unseen_tail_is_reported_as_a_possible_loss(world: World) -> None:
    """H18 (P9). The flusher had not seen the lost tail: the log fits SQL, the class is intact and the lower bound 0. The report
    says that a loss is possible since the tail was last seen, in SQL and, for an SQL restore, in ``meta``."""
    world.start("1")
    world.flush()
    saved = world.redis_copy()
    seen = world.durable.partitions([world.partition_of("1")])[0].tail_seen_ms
    world.orders.transition("1", "pay")
    world.redis_back(saved)
    report = world.cache.recover()
    assert (report.kinds, report.lost_at_least, report.loss_possible) == ({"intact": 2}, 0, True)
    part = report.partitions[world.partition_of("1")]
    assert part.tail_seen_ms == seen
    assert '"loss_possible":true' in world.meta(part.partition)["report"]


def test_h18_tail_that_the_flusher_saw_is_counted_once(world: World) -> None:
    """H18 (P9). The flusher had seen five entries beyond what it committed: the report counts them; a recovery that dies after
    its report and the next one count them once."""
    world.start("1")
    world.flush()
    saved = world.redis_copy()
    for _ in range(6):
        world.orders.transition("1", "note")
    world.flusher(batch_entries=1).step()
    world.flusher(batch_entries=1).step()
    row = world.durable.partitions([world.partition_of("1")])[0]
    lost = row.tail.seq - row.watermark.seq
    assert lost in (4, 5)
    world.redis_back(saved)
    with pytest.raises(Died), after_call(recovery.recoveries, "finish", die):
        world.cache.recover()
    assert world.cache.recover().lost_at_least == 0
    reports = [found.report for found in recovery.recoveries.recoveries(world.durable)]
    assert sum(text.count(f'"lost_at_least":{lost},') for text in reports) == 1
