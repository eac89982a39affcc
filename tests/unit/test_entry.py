"""The log's records: ids, the packed text, and the rule by which one entry follows another."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statecache.core import entry, errors, model
from statecache.core.entry import EntryId

ids = st.builds(EntryId, st.integers(0, 2**40), st.integers(0, 2**50))
TEXT = "\x1f".join(
    ["order", "1", "2", "pay", "placed", "paid", "1700", "t1", "me", "why", "5", '{"a":1}', "b c", '{"n":2}', "3"]
)


@given(ids)
def test_id_survives_its_text(id: EntryId) -> None:
    assert EntryId.parse(str(id)) == id


@given(ids, ids)
def test_ids_are_ordered_by_epoch_then_number(left: EntryId, right: EntryId) -> None:
    assert (left < right) == ((left.epoch, left.seq) < (right.epoch, right.seq))
    assert left >= entry.ZERO


def test_entry_of_a_text() -> None:
    record = entry.parse(EntryId(1, 2), TEXT)
    assert (record.machine, record.id, record.version, record.at_ms, record.machine_version) == (
        "order",
        "1",
        2,
        1700,
        3,
    )
    assert (record.patch, record.unset, record.increments, record.occurred_ms) == ('{"a":1}', "b c", '{"n":2}', "5")
    assert not record.is_mark


def test_mark_tells_the_id_before_it() -> None:
    text = "\x1f".join(["", "", "0", "@epoch", "1-7", "", "1700", "owner", "", "", "", "", "", "", "0"])
    mark = entry.parse(EntryId(2, 0), text)
    assert (mark.is_mark, mark.prev, mark.transition_id) == (True, EntryId(1, 7), "owner")


@pytest.mark.parametrize(
    "text",
    ["", "?", "a\x1fb", TEXT + "\x1fmore", TEXT.rpartition("\x1f")[0], TEXT.replace("1700", "soon"), TEXT[:-1] + "x",
     TEXT.replace("me", "m\x1ee"), TEXT.replace("1700", "253402300800000"),
     TEXT.replace("\x1f5\x1f", "\x1f-62135596800001\x1f")],
)  # fmt: skip
def test_strangers_text_is_refused(text: str) -> None:
    with pytest.raises(errors.IntegrityError, match="1-2 is not one that statecache wrote"):
        entry.parse(EntryId(1, 2), text)


@pytest.mark.parametrize("ms", [-62135596800000, -1, 0, 253402300799999])
def test_times_that_are_taken_can_be_shown(ms: int) -> None:
    record = entry.parse(EntryId(1, 2), TEXT.replace("\x1f5\x1f", f"\x1f{ms}\x1f").replace("1700", str(max(0, ms))))
    assert model.datetime_of(int(record.occurred_ms)) <= model.datetime_of(record.at_ms)


@pytest.mark.parametrize(
    ("id", "cursor", "prev", "follows"),
    [
        ("1-1", "1-0", None, True),
        ("1-2", "1-0", None, False),
        ("1-1", "1-1", None, False),
        ("1-0", "1-1", None, False),
        ("2-0", "1-5", None, False),
        ("2-1", "1-0", None, False),
        ("2-0", "1-5", "1-5", True),
        ("2-0", "1-5", "1-4", True),
        ("2-0", "1-5", "1-6", False),
        ("2-0", "1-5", "0-0", True),
        ("3-0", "1-5", "2-0", False),
        ("3-0", "2-0", "2-0", True),
        ("2-0", "2-0", "1-5", False),
        ("2-0", "3-1", "1-5", False),
        ("1-0", "0-0", "0-0", True),
    ],
)
def test_entry_follows_by_its_number_and_a_mark_by_its_prev(
    id: str, cursor: str, prev: str | None, follows: bool
) -> None:
    """H5: never by "a new epoch begins at 0"."""
    parse = EntryId.parse
    assert entry.follows(parse(id), parse(cursor), None if prev is None else parse(prev)) is follows
