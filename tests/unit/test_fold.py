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
        fold.require_next(0, records)
    before = fold.after(None, [record(1)], 0)
    later = [record(one.version + 1) for one in records]
    with pytest.raises(errors.IntegrityError, match="the log goes on with version"):
        fold.require_next(before.version, later)
    with pytest.raises(errors.IntegrityError, match="the log goes on with version"):
        fold.after_letters(before, later, 0)


def test_versions_that_go_on() -> None:
    fold.require_next(0, [record(1), record(2)])
    fold.require_next(2, [record(3)])


def test_ring_is_folded_too() -> None:
    """What hydration restores is what apply.lua would have: the last eight tokens over all batches (P4)."""
    now = None
    for start in (1, 4, 20):
        now = fold.after(now, [record(version) for version in range(now.version + 1 if now else 1, start + 5)], 0)
    assert now is not None
    assert now.recent == "".join(codec.token_of(f"t{version}") for version in range(now.version - 7, now.version + 1))


def test_the_line_of_a_checkpoint() -> None:
    now = fold.after(None, [record(1, patch='{"x":1}')], 3)
    token = codec.token_of("t1")
    finals = {("order", 1): frozenset({"b"})}
    parts = now.line(lambda *key: finals[key]).split(entry.SEPARATOR)
    assert parts == ["order", "1", "3", "b", "1", "1", "1", "1001", "1001", "1", "1", token, '{"x":1}']
    finals = {("order", 1): frozenset({"c"})}
    assert now.line(lambda *key: finals[key]).split(entry.SEPARATOR)[10] == "0"


def _what_goes_on(before: fold.Before) -> tuple[object, ...]:
    return (before.version, before.created_ms, before.state, before.recent, before.data)


def test_what_is_before_a_fold_comes_from_a_checkpoint_or_a_text() -> None:
    now = fold.after(None, [record(version, patch='{"x":1}') for version in (1, 2)], 3)
    kept = model.Checkpoint("order", "1", 3, "b", 2, EntryId(1, 2), 1001, 1002, 1, True, now.recent, now.data)
    assert _what_goes_on(fold.Before.of_checkpoint(kept)) == _what_goes_on(now)
    again = fold.Before.unpacked(now.packed())
    assert (_what_goes_on(again), again.shape) == (_what_goes_on(now), now.shape)
    # Data that statecache did not write may hold anything.
    odd = msgspec.structs.replace(again, data='{"x":"\x1f\x1f"}')
    assert fold.Before.unpacked(odd.packed()) == odd


def test_a_patch_of_all_fields_in_their_order_is_the_data_as_it_stands() -> None:
    """Also where what was before it could not be read: it is not looked at. Any other patch is put together with it."""
    now = fold.after(None, [record(1, patch='{"x": 1,"y":2}')], 0)
    unreadable = msgspec.structs.replace(fold.Before.unpacked(now.packed()), data="{")
    assert fold.after(unreadable, [record(2, patch='{"x":3, "y":4}')], 0).data == '{"x":3, "y":4}'
    for patch, data in [
        ('{"y":4,"x":3}', '{"x":3,"y":4}'),
        ('{"x":3}', '{"x":3,"y":2}'),
        ('{"x":3,"z":4}', '{"x":3,"y":2,"z":4}'),
    ]:
        assert fold.after(now, [record(2, patch=patch)], 0).data == data
        with pytest.raises(errors.IntegrityError):
            fold.after(unreadable, [record(2, patch=patch)], 0)


def test_shapes_beyond_the_bound_are_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of them must not be taken for one another: the one's patch would become all of the other's data."""
    monkeypatch.setattr(fold, "_SHAPES_MAX", 0)
    first = fold.after(None, [record(1, patch='{"nobody_else_has":1}')], 0)
    assert first.shape == ""
    assert fold.after(first, [record(2, patch='{"nor_this":2}')], 0).data == '{"nobody_else_has":1,"nor_this":2}'


def test_entries_by_instance_keep_their_order() -> None:
    groups = fold.by_instance([record(1, seq=1), record(1, seq=2, id="2"), record(2, seq=3)])
    assert {instance: [one.version for one in found] for instance, found in groups.items()} == {
        ("order", "1"): [1, 2], ("order", "2"): [1],
    }  # fmt: skip


def test_counts_change_by_what_moved() -> None:
    start, moved, same = (0, "order", None, "a"), (0, "order", "a", "b"), (0, "order", "b", "b")
    assert fold.count_deltas([start]) == {(0, "order", "a"): 1}
    assert fold.count_deltas([moved]) == {(0, "order", "a"): -1, (0, "order", "b"): 1}
    assert fold.count_deltas([same]) == {}
    assert fold.count_deltas([start, moved]) == {(0, "order", "b"): 1}
    assert fold.count_deltas([start, start, moved]) == {(0, "order", "a"): 1, (0, "order", "b"): 1}


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
