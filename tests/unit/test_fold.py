"""Folding entries into checkpoints."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from statecache.core import codec, entry, errors, fold, model
from statecache.core.entry import Entry, EntryId


def record(version: int, event: str = "note", *, seq: int = 0, id: str = "1", **parts: Any) -> Entry:
    values: dict[str, Any] = {
        "machine": "order", "id": id, "version": version, "event": event, "from_state": "a", "to_state": "b",
        "at_ms": 1000 + version, "transition_id": f"t{version}", "actor": "", "reason": "", "occurred_ms": "", "patch": "",
        "unset": "", "increments": "", "machine_version": 1,
    } | parts  # fmt: skip
    return Entry(EntryId(1, seq or version), **values)


def test_first_entry_makes_an_instance() -> None:
    now = fold.after(None, [record(1, "@start", patch='{"x":1}')], 3)
    assert (now.machine, now.id, now.partition, now.state, now.version) == ("order", "1", 3, "b", 1)
    assert (now.created_ms, now.updated_ms, now.entry_id, now.data) == (1001, 1001, EntryId(1, 1), '{"x":1}')


def test_entries_are_folded_in_order() -> None:
    before = fold.after(None, [record(1, patch='{"x":1,"y":2}')], 0)
    now = fold.after(
        before,
        [
            record(2, patch='{"x":[1, {"deep":  true}]}'),
            record(3, increments='{"n":4}', unset="y never"),
            record(4, patch='{"y":"again"}', to_state="c"),
        ],
        0,
    )
    assert (now.version, now.state, now.created_ms, now.updated_ms) == (4, "c", 1001, 1004)
    assert now.data == '{"x":[1, {"deep":  true}],"n":4,"y":"again"}'
    assert before.data == '{"x":1,"y":2}'


def test_values_pass_as_they_are() -> None:
    """Numbers as nobody writes them, escapes: the texts are those of the entry."""
    text = '{"big":12345678901234567890,"e":1e+0300,"s":"\\u00fc\\u0001"}'
    assert fold.after(None, [record(1, patch=text)], 0).data == text
    with pytest.raises(errors.IntegrityError, match="none that can be read"):
        fold.after(None, [record(1, patch=text.replace("0300", "0400"))], 0)


@pytest.mark.parametrize("versions", [[2], [1, 3], [1, 1], [1, 2, 2]])
def test_versions_must_go_on_one_by_one(versions: list[int]) -> None:
    records = [record(version, seq=number + 1) for number, version in enumerate(versions)]
    with pytest.raises(errors.IntegrityError, match="the log goes on with version"):
        fold.require_next(None, records)
    before = fold.after(None, [record(1)], 0)
    later = [record(one.version + 1) for one in records]
    with pytest.raises(errors.IntegrityError, match="the log goes on with version"):
        fold.require_next(before, later)
    with pytest.raises(errors.IntegrityError, match="the log goes on with version"):
        fold.after_letters(before, later, 0)


def test_versions_that_go_on() -> None:
    fold.require_next(None, [record(1), record(2)])
    fold.require_next(fold.after(None, [record(1), record(2)], 0), [record(3)])


def test_ring_is_folded_too() -> None:
    """What hydration restores is what apply.lua would have: the last eight tokens over all batches (P4)."""
    now = None
    for start in (1, 4, 20):
        now = fold.after(now, [record(version) for version in range(now.version + 1 if now else 1, start + 5)], 0)
    assert now is not None
    assert now.recent == "".join(codec.token_of(f"t{version}") for version in range(now.version - 7, now.version + 1))


def test_checkpoint_of_a_row_is_the_fold() -> None:
    now = fold.after(None, [record(1, patch='{"x":1}')], 3)
    row = now.row(lambda machine, version: frozenset({"b"}))
    kept = model.Checkpoint(*row[:5], EntryId(row[5], row[6]), *row[7:])  # type: ignore[arg-type]
    assert kept.final
    assert fold.Folded.of_checkpoint(kept) == msgspec.structs.replace(now, names=None)


def test_entries_by_instance_keep_their_order() -> None:
    groups = fold.by_instance([record(1, seq=1), record(1, seq=2, id="2"), record(2, seq=3)])
    assert {instance: [one.version for one in found] for instance, found in groups.items()} == {
        ("order", "1"): [1, 2], ("order", "2"): [1],
    }  # fmt: skip


def test_counts_change_by_what_moved() -> None:
    start = fold.after(None, [record(1, to_state="a")], 0)
    moved = fold.after(start, [record(2, to_state="b")], 0)
    same = fold.after(moved, [record(3, to_state="b")], 0)
    assert fold.count_deltas([(None, start)]) == {(0, "order", "a"): 1}
    assert fold.count_deltas([(start, moved)]) == {(0, "order", "a"): -1, (0, "order", "b"): 1}
    assert fold.count_deltas([(moved, same)]) == {}
    assert fold.count_deltas([(None, start), (start, moved)]) == {(0, "order", "b"): 1}


def test_reconciled_transition_holds_all_data() -> None:
    known: dict[str, Any] = {"old": 1}
    fold.apply_transition(
        known,
        model.Transition(
            "order", "1", 5, entry.EVENT_RECONCILED, "a", "b", 0, "r", None, None, None, {"new": 2}, (), {}, 1, "1-5", True, 3
        ),
    )  # fmt: skip
    assert known == {"new": 2}


def test_touched_are_all_names_of_an_entry() -> None:
    assert fold.touched(record(1, patch='{"a":1}', increments='{"b":2}', unset="c d")) == {"a", "b", "c", "d"}


def test_entry_survives_its_row() -> None:
    for one in (
        record(2, actor="me", reason="why", occurred_ms="7", patch='{"a":1}', unset="b", increments='{"n":1}'),
        record(1, "@start", from_state=""),
    ):
        assert fold.entry_of_row(fold.entry_row(3, one)) == one


def test_letters_are_folded_onto_what_is_before_them() -> None:
    before = fold.after(None, [record(1, patch='{"x":1}')], 0)
    assert fold.after_letters(before, [record(2, patch='{"y":2}')], 0).data == '{"x":1,"y":2}'
    jump = record(4, entry.EVENT_RECONCILED, patch='{"z":3}', to_state="q")
    now = fold.after_letters(before, [jump, record(5, patch='{"w":4}', to_state="r")], 0)
    assert (now.version, now.state, now.data, now.created_ms) == (5, "r", '{"z":3,"w":4}', 1001)
