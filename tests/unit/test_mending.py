"""What recovery writes where SQL and the log no longer meet: from what both hold to the rows that mend it."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from statecache.core import codec, entry, fold, mending, model
from statecache.core.entry import Entry, EntryId

HERE = ("order", "1")
W = EntryId(1, 9)


def tokens(*versions: int) -> str:
    return "".join(codec.token_of(f"t{version}") for version in versions)


def record(version: int, *, seq: int = 0, id: str = "1", **parts: Any) -> Entry:
    values: dict[str, Any] = {
        "machine": "order", "id": id, "version": version, "event": "note", "from_state": f"s{version - 1}",
        "to_state": f"s{version}", "at_ms": 1000 + version, "transition_id": f"t{version}", "actor": "", "reason": "",
        "occurred_ms": "", "patch": "", "unset": "", "increments": "", "machine_version": 1,
    } | parts  # fmt: skip
    return Entry(EntryId(1, seq or version + 8), **values)


def checkpoint(version: int, data: str = "{}") -> model.Checkpoint:
    recent = tokens(*range(1, version + 1))
    return model.Checkpoint(
        "order", "1", 0, f"s{version}", version, EntryId(1, version + 8), 1, 2, 1, False, recent, data
    )


def before_next(mend: mending.Mend) -> fold.Before:
    """What the flush finds that comes next: the one checkpoint, as its table has it."""
    (line,) = mend.checkpoints
    machine, id, partition, state, version, epoch, seq, created, updated, of, final, recent, data = line.split("\x1f")
    numbers = map(int, (version, epoch, seq, created, updated, of, final))
    version_, epoch_, seq_, created_, updated_, of_, final_ = numbers
    row = model.Checkpoint(
        machine,
        id,
        int(partition),
        state,
        version_,
        EntryId(epoch_, seq_),
        created_,
        updated_,
        of_,
        bool(final_),
        recent,
        data,
    )
    return fold.Before.of_checkpoint(row)


def hot(version: int, ring: str = "", **data: str) -> mending.Hash:
    return mending.Hash(f"s{version}", version, EntryId(1, version + 8), 1, 1, 1000 + version, ring, data)


def mended(entries: list[Entry], hashes: dict[fold.Instance, mending.Hash], known: mending.Known) -> mending.Mend:
    return mending.sql_behind(
        0, fold.by_instance(entries), hashes, {HERE: known}, W, lambda machine, version: frozenset(), "reconciled-2"
    )


# --- SQL behind --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "hashes", "known"),
    [
        ([], {}, mending.Known()),
        ([record(3)], {HERE: hot(3)}, mending.Known(checkpoint(2))),
        ([], {HERE: hot(2)}, mending.Known(checkpoint(2))),
        ([record(1)], {HERE: hot(1)}, mending.Known()),
        ([], {}, mending.Known(checkpoint(2))),
    ],
    ids=["nothing", "log goes on", "hash is the checkpoint", "starts in the log", "cold"],
)
def test_what_still_meets_is_left_alone(
    entries: list[Entry], hashes: dict[fold.Instance, mending.Hash], known: mending.Known
) -> None:
    mend = mended(entries, hashes, known)
    assert (mend.transitions, mend.checkpoints, mend.letters, mend.drops, mend.covered) == ([], [], [], [], 0)


def test_one_row_stands_for_what_only_the_hash_has() -> None:
    """No entry behind the hole: the row is the hash, at its version."""
    mend = mended([], {HERE: hot(5, tokens(1, 2, 3, 4, 5), a="1")}, mending.Known(checkpoint(2)))
    (row,) = mend.transitions
    columns = dict(zip(["partition", "epoch", "seq", *entry.PARTS, "covers_from", "complete"], row, strict=True))
    assert (columns["version"], columns["covers_from"], columns["event"]) == (5, 3, "@reconciled")
    assert (columns["from_state"], columns["to_state"], columns["patch"]) == ("s2", "s5", '{"a":1}')
    assert (columns["transition_id"], columns["complete"]) == ("reconciled-2", True)
    assert (mend.covered, mend.parked) == (3, 0)
    assert EntryId(columns["epoch"], columns["seq"]) <= W


def test_history_then_folds_to_the_hash() -> None:
    """Entries behind the hole set, increment and unset fields: the row's data is the hash without them, so that the fold of
    the row and the entries is the hash again, ring included."""
    entries = [
        record(5, patch='{"a":50}'),
        record(6, increments='{"n":6}', unset="gone"),
    ]
    here = hot(6, tokens(1, 2, 3, 4, 5, 6), a="50", n="6", kept='"k"')
    mend = mended(entries, {HERE: here}, mending.Known(checkpoint(2, '{"a":1,"gone":1}')))
    assert mend.moved == [(0, "order", "s2", "s4")]
    now = before_next(mend)
    assert (now.version, now.state) == (4, "s4")
    folded = fold.after(now, entries, 0)
    assert (folded.version, folded.state, folded.recent) == (6, "s6", here.ring)
    assert json.loads(folded.data) == {name: json.loads(text) for name, text in here.data.items()}


def test_instance_that_sql_never_saw_gets_a_row_from_one() -> None:
    mend = mended([], {HERE: hot(3, tokens(1, 2, 3))}, mending.Known())
    (row,) = mend.transitions
    assert (row[5], row[-2]) == (3, 1)
    assert mend.moved == [(0, "order", None, "s3")]


def test_no_hash_means_a_letter_and_no_guess() -> None:
    """H6d: cold, and moved on behind the hole: the data is unknown, so the row waits for an operator."""
    mend = mended([record(5)], {}, mending.Known(checkpoint(2)))
    assert mend.transitions == mend.checkpoints == mend.moved == []
    (letter,) = mend.letters
    assert (letter[5], letter[6]) == (4, "@reconciled")
    assert (mend.parked, mend.covered) == (1, 2)
    assert "parked" in mend.findings[0]


def test_parked_instance_stays_parked() -> None:
    """Its letters are versions that SQL holds: what is missing behind them joins the queue."""
    known = mending.Known(checkpoint(2), ((3, "t3"),))
    assert known.version == 3
    mend = mended([], {HERE: hot(5, tokens(1, 2, 3, 4, 5))}, known)
    assert mend.transitions == []
    assert [row[5] for row in mend.letters] == [5]
    assert mended([record(4)], {HERE: hot(4)}, known).letters == []


# --- diverged ----------------------------------------------------------------------------------------------------------------


def split(
    entries: list[Entry], hashes: dict[fold.Instance, mending.Hash], known: mending.Known, held: list[tuple[int, str]]
) -> mending.Mend:
    in_sql = {one.entry_id for one in entries if (one.version, one.transition_id) in held}
    return mending.diverged(0, fold.by_instance(entries), hashes, {HERE: known}, in_sql)


def test_entries_that_sql_has_are_no_divergence() -> None:
    ring = tokens(1, 2)
    mend = split([record(1), record(2)], {HERE: hot(2, ring)}, mending.Known(checkpoint(2)), [(1, "t1"), (2, "t2")])
    assert (mend.letters, mend.drops, mend.parked) == ([], [], 0)


def test_entries_that_sql_has_not_become_letters_and_the_hash_goes() -> None:
    strange = record(2, transition_id="other")
    mend = split([record(1), strange], {HERE: hot(2)}, mending.Known(checkpoint(2)), [(1, "t1"), (2, "t2")])
    assert [fold.entry_of_row(row) for row in mend.letters] == [strange]
    assert (mend.drops, mend.parked) == (["order:1"], 1)
    assert "versions 2 of the log are not SQL's" in mend.findings[0]


@pytest.mark.parametrize(
    ("here", "known"),
    [
        (hot(3, tokens(1, 2, 3)), mending.Known(checkpoint(2))),
        (hot(1, tokens(1)), mending.Known(checkpoint(2))),
        (hot(2, tokens(1, 9)), mending.Known(checkpoint(2))),
        (hot(1), mending.Known()),
        (msgspec.structs.replace(hot(2, tokens(1, 2)), entry_id=EntryId(1, 5)), mending.Known(checkpoint(2))),
    ],
    ids=["ahead", "behind", "other transitions", "unknown to SQL", "another entry of the same transition"],
)
def test_hash_that_is_not_sqls_is_dropped(here: mending.Hash, known: mending.Known) -> None:
    mend = split([], {HERE: here}, known, [])
    assert (mend.drops, mend.letters) == (["order:1"], [])


def test_hash_of_a_parked_instance_is_dropped() -> None:
    """It equals the checkpoint, but is not parked: it comes back from SQL as a parked one."""
    ring = tokens(1, 2)
    mend = split([record(2)], {HERE: hot(2, ring)}, mending.Known(checkpoint(2), ((3, "t3"),)), [(2, "t2")])
    assert (mend.drops, mend.letters, mend.findings) == (["order:1"], [], [])


def test_entry_whose_version_has_a_letter_is_kept_apart() -> None:
    """Under its entry id, and what it says: another one there is another letter."""
    here, other = (record(3, transition_id=name, seq=20) for name in ("here", "other"))
    known = mending.Known(checkpoint(2), ((3, "t3"),))
    kept = [fold.entry_of_row(row) for one in (here, other) for row in split([one], {}, known, []).letters]
    assert [one.machine for one in kept] == [entry.FOREIGN] * 2
    assert len({one.id for one in kept}) == 2
    assert {entry.place_apart(one.id) for one in kept} == {EntryId(1, 20)}
    assert entry.parse(EntryId(1, 20), kept[0].patch) == here
    assert entry.place_apart(entry.foreign(0, EntryId(1, 20), "?").id) is None


# --- hashes ------------------------------------------------------------------------------------------------------------------


def test_hash_of_its_fields() -> None:
    fields = {b"@": b"paid 3 1-7 10 2 20", b"@r": tokens(1, 2, 3).encode(), b"a": b'"x"'}
    found = mending.Hash.parse(fields)
    assert found == mending.Hash("paid", 3, EntryId(1, 7), 10, 2, 20, tokens(1, 2, 3), {"a": '"x"'})
    for flags, parked in ((b"w", False), (b"p", True), (b"pw", True)):
        flagged = mending.Hash.parse({**fields, b"@": b"paid 3 1-7 10 2 20 " + flags})
        assert flagged == msgspec.structs.replace(found, parked=parked)


@pytest.mark.parametrize("fields", [{}, {b"a": b"1"}, {b"@": b"nonsense"}, {b"?": b"WRONGTYPE"}])
def test_strangers_hash_is_none(fields: dict[bytes, bytes]) -> None:
    assert mending.Hash.parse(fields) is None


def test_values_are_passed_unread() -> None:
    mend = mended([], {HERE: hot(3, a="12345678901234567890")}, mending.Known())
    assert before_next(mend).data == '{"a":12345678901234567890}'
