"""The judge sees every violation that it is there to see: forged evidence, one lie at a time."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest

from tests.chaos import checker, ledger, machine
from tests.chaos.checker import Attempt, Evidence, Report, Restore, Row

_clock = itertools.count(1_000_000)


def row(version: int, event: str = "note", source: str | None = "idle", target: str = "idle", **changes: Any) -> Row:
    """A row of instance ``a``: version n is entry 1-n, with id ``id-n``, sent as ``key-n``."""
    if version == 1:
        event, source = "@start", None
    given = {"reason": f"key-{version}", "entry_id": f"1-{version}", "transition_id": f"id-{version}", **changes}
    return Row("a", version, event, source, target, **given)


def attempt(version: int, word: str = "ok", *, client: str = "w", **changes: Any) -> Attempt:
    """Somebody sent what became ``row(version)``, at time 10 * version, and was told ``word`` 5 ms later."""
    wanted = ledger.Wanted(
        changes.pop("key", f"key-{version}"), "a", "@start" if version == 1 else "note", f"id-{version}",
        data=changes.pop("data", {}), expect_version=changes.pop("expect", None),
    )  # fmt: skip
    at = changes.pop("at", 10.0 * version)
    told = ledger.Told(
        word, version, "idle", changes.pop("entry", f"1-{version}"), f"id-{version}", int(at) + 2, **changes
    )
    return Attempt(client, at, wanted, at + 5, told)


def report(**changes: Any) -> Report:
    """A recovery of partition 0, from 100 to 110, to epoch 2."""
    given: dict[str, Any] = {
        "epoch": 2,
        "kind": "tail lost",
        "started_ms": 100.0,
        "ended_ms": 110.0,
        "tail_seen_ms": 25.0,
    }
    return Report(owner="owner", partition=0, **{**given, **changes})


def evidence(**changes: Any) -> Evidence:
    """Three versions of one instance, all acknowledged, nothing wrong."""
    given: dict[str, Any] = {
        "attempts": [attempt(version) for version in (1, 2, 3)],
        "history": [row(version) for version in (1, 2, 3)],
    }
    return Evidence(**{**given, **changes}, partition_of=lambda id: 0, moves=machine.MOVES)


def promises(found: Evidence) -> set[str]:
    return {violation.promise for violation in checker.judge(found)}


def test_nothing_wrong() -> None:
    assert checker.judge(evidence()) == []


# --- history alone -----------------------------------------------------------------------------------------------------


def test_gap() -> None:
    assert "P3" in promises(evidence(history=[row(1), row(3)], attempts=[attempt(1), attempt(3)]))


def test_version_twice() -> None:
    again = row(2, entry_id="1-9", transition_id="id-9", reason="key-9")
    attempts = [attempt(1), attempt(2), msgspec.structs.replace(attempt(2, key="key-9", entry="1-9"))]
    assert "P3" in promises(evidence(history=[row(1), row(2), again], attempts=attempts))


def test_fork_by_state() -> None:
    assert "P3" in promises(evidence(history=[row(1), row(2, source="busy", target="busy"), row(3)]))


def test_undeclared_move() -> None:
    assert "P2" in promises(
        evidence(history=[row(1), row(2, target="closed"), row(3, source="closed", target="closed")])
    )


def test_entry_flushed_twice() -> None:
    assert "P5" in promises(evidence(history=[row(1), row(2), row(3, entry_id="1-2")]))


def test_reconciled_without_a_restore() -> None:
    rows = [row(1), row(3, "@reconciled", None, covers_from=2)]
    assert "P3" in promises(evidence(history=rows, attempts=[attempt(1)]))


def test_reconciled_after_a_restore() -> None:
    """SQL was restored from a copy that did not hold versions 2 and 3: one row stands for both."""
    rows = [row(1), row(3, "@reconciled", None, covers_from=2)]
    attempts = [attempt(1, durable=True), attempt(2, durable=True), attempt(3)]
    assert checker.judge(evidence(history=rows, attempts=attempts, restores=[Restore(18.0, 50.0)])) == []


@pytest.mark.parametrize(("counts", "wrong"), [((1, 2), False), ((1, 3), True), ((1, 1), True)])
def test_counter(counts: tuple[int, int], wrong: bool) -> None:
    rows = [row(1), row(2, increments={"count": counts[0]}), row(3, increments={"count": counts[1]})]
    assert ("P1" in promises(evidence(history=rows))) == wrong


# --- history against what was sent -------------------------------------------------------------------------------------


def test_phantom() -> None:
    assert "phantom" in promises(evidence(attempts=[attempt(1), attempt(2)]))


@pytest.mark.parametrize(
    "changes", [{"transition_id": "id-9"}, {"data": {"by": "somebody"}}, {"event": "hold", "target": "held"}]
)
def test_row_is_not_what_was_sent(changes: dict[str, Any]) -> None:
    assert "phantom" in promises(evidence(history=[row(1), row(2), row(3, **changes)]))


def test_expected_version_ignored() -> None:
    assert "P1" in promises(evidence(attempts=[attempt(1), attempt(2), attempt(3, expect=1)]))


def test_applied_twice() -> None:
    rows = [row(1), row(2), row(3, reason="key-2", transition_id="id-2")]
    assert "P4" in promises(evidence(history=rows, attempts=[attempt(1), attempt(2)]))


def test_applied_once_in_history_and_once_as_a_letter() -> None:
    letters = [row(4, reason="key-3", transition_id="id-3")]
    assert "P4" in promises(evidence(letters=letters, reports=[report(parked=1)]))


def test_a_lost_transition_that_came_back_beside_its_repetition() -> None:
    """Version 2 was lost with Redis, repeated, and is version 2 again in epoch 2; then an older snapshot brought the first one
    back, and it was kept aside as a letter. It applies nothing, and nobody was served out of order."""
    again = row(2, entry_id="2-1")
    attempts = [attempt(1), attempt(2), attempt(2, at=120.0, entry="2-1")]
    reports = [
        report(loss_possible=True, tail_seen_ms=15.0),
        report(epoch=3, kind="diverged", parked=1, ended_ms=200.0),
    ]
    assert checker.judge(evidence(history=[row(1), again], letters=[row(2)], attempts=attempts, reports=reports)) == []


def test_refused_and_yet_applied() -> None:
    assert "P4" in promises(evidence(attempts=[attempt(1), attempt(2), attempt(3, "refused")]))


def test_refused_after_an_attempt_without_answer() -> None:
    """The first attempt may have arrived after the second was refused: that is no lie."""
    open_attempt = msgspec.structs.replace(attempt(3), told=None)
    assert (
        checker.judge(evidence(attempts=[attempt(1), attempt(2), open_attempt, attempt(3, "refused", at=40.0)])) == []
    )


# --- acknowledgements --------------------------------------------------------------------------------------------------

LOST = {"history": [row(1), row(2)]}
"""Version 3, sent at 30 and accepted at 32, is gone."""


def test_hot_acknowledgement_gone_without_a_report() -> None:
    assert promises(evidence(**LOST)) == {"P9"}


def test_hot_acknowledgement_gone_as_reported_possible() -> None:
    assert checker.judge(evidence(**LOST, reports=[report(loss_possible=True)])) == []


def test_hot_acknowledgement_gone_that_was_seen_before() -> None:
    """The report says: possible since 50; the entry was accepted at 32, so it had to be counted."""
    assert "P9" in promises(evidence(**LOST, reports=[report(loss_possible=True, tail_seen_ms=50.0)]))


def test_hot_acknowledgement_gone_as_counted() -> None:
    assert checker.judge(evidence(**LOST, reports=[report(lost_at_least=1, tail_seen_ms=50.0)])) == []


def test_more_gone_than_counted() -> None:
    found = evidence(history=[row(1)], reports=[report(lost_at_least=1, tail_seen_ms=50.0)])
    assert "P9" in promises(found)


def test_gone_after_the_recovery_that_reported() -> None:
    """What was accepted after a recovery is not excused by its report."""
    late = [attempt(1), attempt(2), attempt(3, at=200.0, entry="2-1")]
    assert "P9" in promises(evidence(history=[row(1), row(2)], attempts=late, reports=[report(loss_possible=True)]))


def test_more_counted_than_can_be_lost() -> None:
    assert "P9" in promises(evidence(**LOST, reports=[report(lost_at_least=2, tail_seen_ms=50.0)]))


def test_durable_acknowledgement_gone() -> None:
    attempts = [attempt(1), attempt(2), attempt(3, durable=True)]
    found = evidence(history=[row(1), row(2)], attempts=attempts, reports=[report(loss_possible=True)])
    assert "P7" in promises(found)


def test_durable_acknowledgement_older_than_the_copy_gone() -> None:
    attempts = [attempt(1), attempt(2), attempt(3, durable=True)]
    found = evidence(
        history=[row(1), row(2)],
        attempts=attempts,
        reports=[report(loss_possible=True)],
        restores=[Restore(60.0, 90.0)],
    )
    assert "P7" in promises(found)


def test_durable_acknowledgement_newer_than_the_copy_gone() -> None:
    attempts = [attempt(1), attempt(2), attempt(3, durable=True)]
    changes: dict[str, Any] = {"history": [row(1), row(2)], "attempts": attempts, "restores": [Restore(20.0, 90.0)]}
    assert checker.judge(evidence(**changes, reports=[report(kind="SQL behind", loss_possible=True)])) == []
    assert "P9" in promises(evidence(**changes))


def test_acknowledged_as_a_letter() -> None:
    found = evidence(history=[row(1), row(2)], letters=[row(3)], reports=[report(kind="diverged", parked=1)])
    assert checker.judge(found) == []


def test_version_taken_by_somebody_else() -> None:
    """A fork that was papered over: version 3 was acknowledged to ``w``, and SQL holds another's."""
    other = row(3, entry_id="2-1", transition_id="id-9", reason="key-9")
    attempts = [*evidence().attempts, attempt(3, key="key-9", entry="2-1", client="v")]
    taken = attempts[-1].told
    assert taken is not None
    attempts[-1] = msgspec.structs.replace(
        attempts[-1],
        wanted=msgspec.structs.replace(attempts[-1].wanted, transition_id="id-9"),
        told=msgspec.structs.replace(taken, transition_id="id-9"),
    )
    assert "P9" in promises(evidence(history=[row(1), row(2), other], attempts=attempts))


def test_repetition_with_another_receipt() -> None:
    again = row(4, reason="key-3", transition_id="id-3", entry_id="1-4")
    told = ledger.Told("ok", 4, "idle", "1-4", "id-3", 42)
    attempts = [*evidence().attempts, Attempt("w", 40.0, attempt(3).wanted, 45.0, told)]
    found = promises(evidence(history=[row(1), row(2), row(3), again], attempts=attempts))
    assert "P4" in found


def test_order_in_time() -> None:
    """Version 3 was acknowledged before the call was sent that got version 2."""
    attempts = [attempt(1), attempt(3, at=20.0), attempt(2, at=40.0)]
    assert promises(evidence(attempts=attempts)) == {"order"}


def test_accepted_in_an_epoch_that_had_ended() -> None:
    attempts = [attempt(1), attempt(2), attempt(3, at=200.0)]
    assert promises(evidence(attempts=attempts, reports=[report(kind="intact")])) == {"P6"}


# --- reads, letters, notes ---------------------------------------------------------------------------------------------

BACK = {"r": [ledger.Read(40.0, 41.0, "a", 3), ledger.Read(50.0, 51.0, "a", 2)]}


def test_read_that_goes_back() -> None:
    assert promises(evidence(reads=BACK)) == {"reads"}


def test_read_that_finds_nothing_any_more() -> None:
    reads = {"r": [ledger.Read(40.0, 41.0, "a", 3), ledger.Read(50.0, 51.0, "a", 0, "nowhere")]}
    assert promises(evidence(reads=reads)) == {"reads"}


@pytest.mark.parametrize(("kind", "excused"), [("tail lost", True), ("intact", False)])
def test_read_that_goes_back_with_a_recovery(kind: str, excused: bool) -> None:
    assert (promises(evidence(reads=BACK, reports=[report(kind=kind)])) == set()) == excused


def test_parked_without_a_report() -> None:
    assert promises(evidence(history=[row(1), row(2)], letters=[row(3)])) == {"P10"}


def test_what_a_client_noted() -> None:
    assert promises(evidence(notes=[("r", ledger.Note(1.0, "!P3", "a gap in history()"))])) == {"P3"}
    assert promises(evidence(notes=[("r", ledger.Note(1.0, "read failed", "UnavailableError: x"))])) == set()


# --- the ledger --------------------------------------------------------------------------------------------------------


def test_ledger_of_a_killed_client(tmp_path: Any) -> None:
    """The client was killed in the middle of a line: what it had sent before stays, unanswered."""
    path = tmp_path / "w.jsonl"
    book = ledger.Ledger(path)
    wanted = [ledger.Wanted("k1", "a", "note"), ledger.Wanted("k2", "a", "note")]
    book.answered(book.sent(wanted), [ledger.Told("ok", 1), ledger.Told("unknown")])
    book.sent(wanted[:1])
    book.close()
    with path.open("ab") as file:
        file.write(b'{"type":"answered","ca')
    found = checker.attempts_of("w", ledger.read(path))
    assert [(one.wanted.key, one.told.word if one.told else None) for one in found] == [
        ("k1", "ok"), ("k2", "unknown"), ("k1", None),
    ]  # fmt: skip
