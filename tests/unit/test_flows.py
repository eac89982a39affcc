"""The flows, without I/O: what a call wishes for next, for every answer that it may get."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from statecache import Move
from statecache.core import codec, entry, errors, flows, items, model, requests
from statecache.hot import scripts
from tests.support.worlds import Order


def snapshot_of(id: str, fields: Any, source: str) -> model.Snapshot:
    state, version, *_ = fields[b"@"].decode().split(" ")
    return model.Snapshot(
        "order", id, state, int(version), {name.decode(): text for name, text in fields.items() if name[:1] != b"@"},
        entry_id="1-1", created_ms=0, updated_ms=0, machine_version=1, final=False, available_events=(), source=source,
    )  # fmt: skip


DOOR = requests.Door(Order.definition, Order.guards, 16, codec.Limits(), codec.TransitionIds(), snapshot_of)
KEPT = model.Checkpoint("order", "1", 3, "placed", 2, entry.EntryId(1, 5), 10, 20, 1, False, "AAAAAAAA", '{"a":1}')
W = entry.EntryId(1, 9)


def outcome(line: str, cause: Exception | None = None) -> items.Outcome:
    code, *words = line.split(" ")
    return items.Outcome(code, words, 1700, cause)


class Call:
    """One flow under way. ``answer`` sends an answer and gives the next wish; the result or error ends it."""

    def __init__(self, flow: flows.Flow) -> None:
        self.flow = flow
        self.wish = next(flow)

    def answer(self, answer: Any) -> Any:
        self.wish = self.flow.send(
            outcome(answer) if isinstance(answer, str) and type(self.wish) is items.Item else answer
        )
        return self.wish

    def result(self, answer: Any) -> Any:
        with pytest.raises(StopIteration) as end:
            self.answer(answer)
        return end.value.value

    def error(self, answer: Any) -> errors.StateCacheError:
        with pytest.raises(errors.StateCacheError) as error:
            self.answer(answer)
        return error.value


def transition(event: str = "note", **fields: Any) -> Call:
    return Call(flows.transition(DOOR.transition(Move("1", event, **fields))))


def start(**fields: Any) -> Call:
    return Call(flows.transition(DOOR.start("1", **fields)))


# --- every code of apply.lua -------------------------------------------------------------------------------------------------


def _ends_with(line: str, kind: type[Exception]) -> None:
    assert type(transition().error(line)) is kind


CODES = {
    "OK": lambda: transition().result("OK 2 1-2 placed placed"),
    "DUP": lambda: isinstance(transition().answer("DUP 2 1-2"), flows.Find),
    "OLD": lambda: isinstance(transition().answer("OLD 12"), flows.Find),
    "MISS": lambda: isinstance(transition().answer("MISS 1 1-5"), flows.Lookup),
    "EXISTS": lambda: _ends_with("EXISTS 2", errors.AlreadyExistsError),
    "STATE": lambda: _ends_with("STATE paid 2", errors.InvalidTransitionError),
    "VERSION": lambda: transition(expect_version=1).error("VERSION 2"),
    "FULL": lambda: isinstance(transition().answer("FULL"), flows.Pause),
    "PARKED": lambda: isinstance(transition().answer("PARKED"), flows.Lookup),
    "FENCED": lambda: _ends_with("FENCED worker-1 1700000000000", errors.FencedError),
    "DATA": lambda: _ends_with("DATA number n", errors.InvalidDataError),
    "TYPE": lambda: _ends_with("TYPE", errors.IntegrityError),
    "EPOCH": lambda: isinstance(transition().answer("EPOCH"), flows.Admit),
    "RECOVERING": lambda: isinstance(transition().answer("RECOVERING"), flows.Admit),
    "IDENTITY": lambda: isinstance(transition().answer("IDENTITY"), flows.Admit),
}


@pytest.mark.parametrize("code", sorted(scripts.reply_codes("apply")))
def test_every_code_of_the_script_has_its_outcome(code: str) -> None:
    assert CODES[code]() is not False


@pytest.mark.parametrize("code", ["NOSCRIPT", "UNSENT", "LOST", "UNREADY", "OOM", "ERROR"])
def test_every_code_of_the_client_has_its_outcome(code: str) -> None:
    cause = errors.UnavailableError("away")
    call = transition()
    if code == "ERROR":
        assert call.error(outcome("ERROR", cause)) is cause
    else:
        wish = call.answer(outcome(code, cause))
        assert isinstance(wish, flows.Admit if code == "NOSCRIPT" else flows.Pause)


# --- receipts ----------------------------------------------------------------------------------------------------------------


def test_receipt_of_a_transition_and_of_a_start() -> None:
    receipt = transition(transition_id="t").result("OK 2 1-2 placed placed")
    assert (receipt.version, receipt.entry_id, receipt.from_state, receipt.state) == (2, "1-2", "placed", "placed")
    assert (receipt.transition_id, receipt.at_ms, receipt.duplicate) == ("t", 1700, False)
    assert start().result("OK 1 1-1 - placed").from_state is None


def _known(**fields: Any) -> model.Transition:
    values: dict[str, Any] = {"version": 2, "event": "note", "transition_id": "t"} | fields
    return model.Transition(
        "order", "1", values["version"], values["event"], "placed", "placed", 1600, values["transition_id"], None, None, None,
        {}, (), {}, 1, "1-2", True,
    )  # fmt: skip


def test_duplicate_is_completed_by_version_and_compared_by_its_whole_id() -> None:
    call = transition(transition_id="t")
    wish = call.answer("DUP 2 -")
    assert (wish.version, wish.transition_id) == (2, None)
    receipt = call.result(_known())
    assert (receipt.duplicate, receipt.at_ms, receipt.entry_id) == (True, 1600, "1-2")
    call = transition(transition_id="t")
    call.answer("DUP 2 -")
    assert "its hash is that of 'other'" in str(call.error(_known(transition_id="other")))
    call = transition("pay", transition_id="t")
    call.answer("DUP 2 -")
    assert "was used before, for the event 'note'" in str(call.error(_known()))


def test_duplicate_that_is_there_no_more_begins_again_once() -> None:
    call = transition(transition_id="t")
    call.answer("DUP 2 -")
    assert type(call.answer(None)) is items.Item
    call.answer("DUP 2 -")
    assert isinstance(call.error(None), errors.IntegrityError)


# --- retries -----------------------------------------------------------------------------------------------------------------


def test_lost_call_goes_again_marked_as_a_repetition() -> None:
    call = transition()
    assert not call.wish.retry
    cause = errors.UnavailableError("away")
    assert isinstance(call.answer(outcome("LOST", cause)), flows.Pause)
    assert call.answer(True).retry
    assert call.wish.transition_id == call.wish.tail.split("\x1f")[0]


def test_call_that_was_not_sent_is_no_repetition() -> None:
    call = transition()
    call.answer(outcome("UNSENT", errors.UnavailableError("away")))
    assert not call.answer(True).retry


def test_own_id_is_a_repetition_from_the_start() -> None:
    assert transition(transition_id="t").wish.retry


@pytest.mark.parametrize(("code", "kind"), [("LOST", errors.UnavailableError), ("FULL", errors.BackpressureError)])
def test_deadline_ends_the_waiting(code: str, kind: type[Exception]) -> None:
    call = transition()
    call.answer(outcome(code, errors.UnavailableError("away")))
    assert type(call.error(False)) is kind


def test_old_id_that_is_nowhere_is_known_to_be_unused_up_to_that_version() -> None:
    """H16: history was asked up to version 12; what may happen until the item comes again the ring tells, or history anew."""
    call = transition(transition_id="t")
    wish = call.answer("OLD 12")
    assert (wish.version, wish.transition_id) == (None, "t")
    item = call.answer(None)
    assert (item.retry, item.asked, item.expected) == (True, 12, 0)
    wish = call.answer("OLD 21")
    assert wish.transition_id == "t"
    assert call.answer(None).asked == 21


def test_old_id_with_an_expected_version_is_judged_by_the_script() -> None:
    """In a list what stands before it was answered OLD as well, and is applied first."""
    call = transition(transition_id="t", expect_version=3)
    assert call.wish.asked == 0
    call.answer("OLD 12")
    item = call.answer(None)
    assert (item.asked, item.expected) == (12, 3)
    error = call.error(outcome("VERSION 12"))
    assert isinstance(error, errors.StaleVersionError)
    assert (error.expected, error.actual) == (3, 12)


# --- cold --------------------------------------------------------------------------------------------------------------------


def test_cold_instance_is_looked_up_hydrated_and_tried_again() -> None:
    call = transition()
    wish = call.answer("MISS 1 1-9")
    assert (wish.machine, wish.id) == ("order", "1")
    wish = call.answer(model.Lookup(W, KEPT))
    assert wish.found.checkpoint is KEPT
    assert type(call.answer(("OK", None))) is items.Item


def cold_call() -> Call:
    """A call that wants a hydration, its item behind it."""
    call = transition()
    item = call.wish
    call.answer("MISS 1 1-9")
    assert call.answer(model.Lookup(W, KEPT)).item is item
    return call


def test_item_sent_behind_its_hydration_decides() -> None:
    """Whatever became of the hydration: another one may have brought the instance back, or moved it, meanwhile."""
    for code in ("OK", "EXISTS", "STALE 1-9", "OOM", "EPOCH", ""):
        assert cold_call().result((code, outcome("OK 3 1-6 placed placed"))).version == 3
        assert isinstance(cold_call().error((code, outcome("STATE paid 3"))), errors.InvalidTransitionError)
        call = cold_call()
        assert isinstance(call.answer((code, outcome("LOST", errors.UnavailableError("away")))), flows.Pause)
        assert call.answer(True).retry, "it may have been applied"


def test_item_sent_behind_its_hydration_that_misses_begins_again() -> None:
    """Refused, without memory, or evicted again between the two: what became of the hydration says what comes next."""
    for code, wanted in (("OK", items.Item), ("STALE 1-9", items.Item), ("OOM", flows.Pause), ("EPOCH", flows.Admit)):
        assert isinstance(cold_call().answer((code, outcome("MISS 1 1-9"))), wanted)


def test_nothing_cold_means_not_found_without_a_look_up() -> None:
    assert isinstance(transition().error("MISS 0 0-0"), errors.NotFoundError)


def test_not_in_sql_means_not_found_or_a_start_with_sqls_watermark() -> None:
    call = transition()
    call.answer("MISS 1 1-9")
    assert isinstance(call.error(model.Lookup(W, None)), errors.NotFoundError)
    call = start()
    call.answer("MISS 1 1-9")
    assert call.answer(model.Lookup(W, None)).absent == "1-9"


def test_sql_below_what_redis_dropped_is_not_believed() -> None:
    """H9: wait for it to catch up; at the deadline say so."""
    for lookup in (model.Lookup(W, KEPT), model.Lookup(W, None)):
        call = start()
        call.answer("MISS 1 1-10")
        assert isinstance(call.answer(lookup), flows.Pause)
        assert type(call.answer(True)) is items.Item
        call.answer("MISS 1 1-10")
        call.answer(lookup)
        assert "SQL is older" in str(call.error(False))


def test_refused_hydration_forgets_what_was_read() -> None:
    """H10: nothing read before an admission is used after it, least of all that the instance is absent."""
    call = start()
    call.answer("MISS 1 1-9")
    assert call.answer(model.Lookup(W, None)).absent == "1-9"
    assert isinstance(call.answer("EPOCH"), flows.Admit)
    assert call.answer(None).absent == ""
    call = transition()
    call.answer("MISS 1 1-9")
    call.answer(model.Lookup(W, KEPT))
    assert isinstance(call.answer(("EPOCH", None)), flows.Admit)
    assert type(call.answer(None)) is items.Item


def test_letters_without_a_checkpoint_park_a_start() -> None:
    call = start()
    call.answer("MISS 1 1-9")
    letters_only = model.Lookup(W, None, ("AAAAAAAA",))
    assert isinstance(call.answer(letters_only), flows.Lookup)
    assert isinstance(call.error(letters_only), errors.ParkedError)


def test_hash_of_a_checkpoint_with_letters_is_parked() -> None:
    own, ring, texts = flows.hash_texts(model.Lookup(W, KEPT, ("BBBBBBBB",)))
    assert (own, ring, {name: bytes(text) for name, text in texts.items()}) == (
        "placed 2 1-5 10 1 20 p", "AAAAAAAA", {"a": b"1"}
    )  # fmt: skip
    assert flows.hash_texts(model.Lookup(W, KEPT))[0] == "placed 2 1-5 10 1 20"


def test_hash_of_a_checkpoint_with_many_fields_says_so() -> None:
    many = msgspec.json.encode({f"f{number}": number for number in range(65)}).decode()
    kept = msgspec.structs.replace(KEPT, data=many)
    assert flows.hash_texts(model.Lookup(W, kept))[0] == "placed 2 1-5 10 1 20 w"
    assert flows.hash_texts(model.Lookup(W, kept, ("BBBBBBBB",)))[0] == "placed 2 1-5 10 1 20 pw"


def test_parked_hash_without_letters_is_dropped() -> None:
    call = transition()
    call.answer("PARKED")
    assert isinstance(call.answer(model.Lookup(W, KEPT)), flows.Unpark)
    assert type(call.answer("OK")) is items.Item
    call.answer("PARKED")
    call.answer(model.Lookup(W, KEPT))
    assert isinstance(call.error("KEPT unflushed"), errors.ParkedError)


# --- guards ------------------------------------------------------------------------------------------------------------------


def _hot(state: str, version: int, amount: int) -> dict[bytes, bytes]:
    return {b"@": f"{state} {version} 1-1 0 1 0".encode(), b"@r": b"", b"amount": str(amount).encode()}


def test_guard_pins_the_version_that_it_saw() -> None:
    call = transition("approve")
    assert isinstance(call.wish, flows.Hot)
    item = call.answer(_hot("placed", 4, 1))
    assert (item.expected, item.pinned) == (4, True)
    assert isinstance(call.answer("VERSION 5"), flows.Hot)
    assert call.answer(_hot("placed", 5, 1)).expected == 5
    assert call.result("OK 6 1-6 placed paid").state == "paid"


def test_guards_refusal_is_told_only_when_it_is_no_repetition() -> None:
    call = transition("approve", transition_id="t")
    item = call.answer(_hot("placed", 4, 0))
    assert item.expected == flows.NEVER_MATCHES
    assert "guard of 'approve' refused it" in str(call.error("VERSION 4"))
    call = transition("approve", transition_id="t")
    call.answer(_hot("placed", 4, 0))
    call.answer("DUP 2 1-2")
    assert call.result(_known(event="approve")).duplicate


# --- history -----------------------------------------------------------------------------------------------------------------


def _entry(version: int) -> entry.Entry:
    return entry.Entry(
        entry.EntryId(1, version), "order", "1", version, "note", "placed", "placed", 1600, f"t{version}", "", "", "", "", "",
        "", 1,
    )  # fmt: skip


def history() -> Call:
    return Call(flows.history(3, "order", "1"))


def test_history_is_sql_and_what_stands_behind_it_in_the_log() -> None:
    call = history()
    call.answer(4)
    call.answer([_known(version=1), _known(version=2)])
    rows = call.result(("OK", [_entry(2), _entry(3), _entry(4)]))
    assert [(row.version, row.durable) for row in rows] == [(1, True), (2, True), (3, False), (4, False)]


def test_history_needs_no_log_when_sql_has_all() -> None:
    call = history()
    call.answer(2)
    assert len(call.result([_known(version=1), _known(version=2)])) == 2


def test_history_with_a_gap_is_read_again_the_whole_log_too() -> None:
    call = history()
    call.answer(4)
    call.answer([_known(version=1)])
    assert isinstance(call.answer(("OK", [_entry(4)])), flows.Pause)
    call.answer(True)
    call.answer(4)
    assert call.answer([_known(version=1)]).whole
    assert isinstance(call.answer(("OK", [_entry(4)])), flows.Pause)
    assert "versions 2 to 3 are neither in SQL nor in the log" in str(call.error(False))


def test_history_that_is_flushed_while_it_is_read_is_no_loss_to_a_call_without_time() -> None:
    """SQL has 1, versions 2 and 3 are flushed, the log has 4: the call's time is over, and SQL is read once more."""
    call = history()
    call.answer(4)
    call.answer([_known(version=1)])
    assert isinstance(call.answer(("OK", [_entry(4)])), flows.Pause)
    assert isinstance(call.answer(False), flows.Version)
    call.answer(4)
    call.answer([_known(version=version) for version in (1, 2, 3)])
    assert [row.version for row in call.result(("OK", [_entry(4)]))] == [1, 2, 3, 4]


def test_history_that_goes_on_being_flushed_is_out_of_time() -> None:
    """The second look finds what the first one missed, and another gap, of what has been flushed since."""
    call = history()
    call.answer(4)
    call.answer([_known(version=1)])
    call.answer(("OK", [_entry(4)]))
    call.answer(False)
    call.answer(6)
    call.answer([_known(version=version) for version in (1, 2, 3)])
    assert isinstance(call.answer(("OK", [_entry(6)])), flows.Pause)
    assert isinstance(call.error(False), errors.UnavailableError)


def test_history_of_nothing_is_not_found() -> None:
    call = history()
    call.answer(None)
    call.answer([])
    assert isinstance(call.answer(("OK", [])), flows.Where)
    assert isinstance(call.error(("OK", False, entry.ZERO)), errors.NotFoundError)


def cold_history(*versions: int) -> Call:
    """One of an instance that is not hot, at its look into SQL; so many rows were found."""
    call = history()
    call.answer(None)
    call.answer([_known(version=version) for version in versions])
    call.answer(("OK", []))
    assert isinstance(call.answer(("OK", True, W)), flows.Lookup)
    return call


def test_history_of_a_cold_instance_is_that_of_sql() -> None:
    assert len(cold_history(1, 2).result(model.Lookup(W, KEPT))) == 2


def test_history_of_a_cold_instance_waits_for_an_sql_that_is_as_new_as_what_was_dropped() -> None:
    call = cold_history(1, 2)
    assert isinstance(call.answer(model.Lookup(entry.EntryId(1, 8), KEPT)), flows.Pause)
    assert "SQL is older than what Redis has dropped" in str(call.error(False))


def test_history_of_a_cold_instance_is_read_again_when_its_rows_came_between_the_looks() -> None:
    call = cold_history(1)
    assert isinstance(call.answer(model.Lookup(W, KEPT)), flows.Version)
    call.answer(None)
    call.answer([_known(version=1)])
    call.answer(("OK", []))
    call.answer(("OK", True, W))
    assert len(call.result(model.Lookup(W, KEPT))) == 1, "rows are missing: verify tells that, and no look mends it"


# --- reads -------------------------------------------------------------------------------------------------------------------


def test_read_of_a_cold_instance_asks_meta_then_sql() -> None:
    call = Call(flows.snapshot(3, "order", "1", snapshot_of))
    assert isinstance(call.answer({}), flows.Where)
    assert isinstance(call.answer(("EPOCH", True, entry.ZERO)), flows.Admit)
    assert isinstance(call.answer(None), flows.Hot)
    call.answer({})
    assert isinstance(call.answer(("OK", True, W)), flows.Lookup)
    found = call.result(model.Lookup(W, KEPT))
    assert (found.state, found.version, found.source, found.data) == ("placed", 2, "durable", {"a": 1})


def test_read_of_what_is_nowhere() -> None:
    call = Call(flows.snapshot(3, "order", "1", snapshot_of))
    call.answer({})
    assert isinstance(call.error(("OK", False, entry.ZERO)), errors.NotFoundError)


def test_read_of_what_sql_has_only_letters_of() -> None:
    """Its start was refused by SQL, then Redis was wiped: it exists, so "not found" would be a lie; its state is unknown."""
    call = Call(flows.snapshot(3, "order", "1", snapshot_of, missed=True))
    assert isinstance(call.answer(("OK", True, W)), flows.Lookup)
    error = call.error(model.Lookup(W, None, ("AAAAAAAA", "BBBBBBBB")))
    assert isinstance(error, errors.ParkedError)
    assert "order:1 is parked: SQL refused an entry of it, 2 wait" in str(error)


def test_read_does_not_believe_an_older_sql() -> None:
    call = Call(flows.snapshot(3, "order", "1", snapshot_of))
    call.answer({})
    call.answer(("OK", True, entry.EntryId(1, 10)))
    assert isinstance(call.answer(model.Lookup(W, None)), flows.Pause)


def test_recovery_behind_a_lost_attempt_that_history_was_asked_about() -> None:
    """LOST, then OLD: until history has answered nobody knows whether it was applied; once it has, it was not."""
    for found in (errors.RecoveringError("a recovery is under way"), None):
        call = transition()
        call.answer(outcome("LOST", errors.UnavailableError("away")))
        call.answer(True)
        assert isinstance(call.answer("OLD 20"), flows.Find)
        if found is not None:
            with pytest.raises(errors.UnavailableError, match="may have been applied"):
                call.flow.throw(found)
            continue
        assert isinstance(call.answer(None), items.Item)
        assert isinstance(call.answer("EPOCH"), flows.Admit)
        with pytest.raises(errors.RecoveringError):
            call.flow.throw(errors.RecoveringError("a recovery is under way"))


def test_error_behind_a_lost_attempt_says_that_it_may_have_been_applied() -> None:
    """The reply to the first attempt is lost; to the second the server says that the user may not do this (any more). That is
    no "not applied"."""
    call = transition()
    assert isinstance(call.answer(outcome("LOST", errors.UnavailableError("away"))), flows.Pause)
    assert isinstance(call.answer(True), items.Item)
    error = call.error(outcome("ERROR", errors.ConfigurationError("NOPERM")))
    assert isinstance(error, errors.UnavailableError)
    assert "may have been applied" in str(error)
