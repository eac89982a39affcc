"""Folding data by texts says what folding decoded values says, however the entries are cut into flushes."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from statecache.core import fold
from statecache.core.entry import Entry, EntryId
from statecache.core.model import Checkpoint

_NAMES = st.sampled_from(["a", "b", "c", "d"])
_VALUES = st.integers(0, 9) | st.text(max_size=2)
_PATCHES = st.lists(st.tuples(_NAMES, _VALUES), max_size=4).map(dict)


@st.composite
def _entries(draw: st.DrawFn) -> list[tuple[dict[str, Any], dict[str, int], list[str]]]:
    """Patch, increments and unset names of each entry; no name in two of them."""
    found = []
    for _ in range(draw(st.integers(1, 6))):
        patch = draw(_PATCHES)
        rest = [name for name in "abcd" if name not in patch]
        increased = {name: draw(st.integers(0, 9)) for name in rest if draw(st.integers(0, 9)) == 0}
        dropped = [name for name in rest if name not in increased and draw(st.integers(0, 9)) == 0]
        found.append((patch, increased, dropped))
    return found


def _text(values: dict[str, Any]) -> str:
    return json.dumps(values, separators=(",", ":"), ensure_ascii=False) if values else ""


@given(_entries(), st.lists(st.integers(1, 3)), st.booleans())
def test_fold_of_texts_is_that_of_values(
    parts: list[tuple[dict[str, Any], dict[str, int], list[str]]], cuts: list[int], forgets: bool
) -> None:
    records = [
        Entry(
            EntryId(1, number), "m", "1", number, "e", "a", "b", number, f"t{number}", "", "", "", _text(patch),
            " ".join(dropped), _text(increased), 1,
        )
        for number, (patch, increased, dropped) in enumerate(parts, 1)
    ]  # fmt: skip
    expected: dict[str, Any] = {}
    before: fold.Before | None = None
    while records:
        some = cuts.pop() if cuts else len(records)
        for patch, increased, dropped in parts[:some]:
            expected |= patch | increased
            expected = {name: value for name, value in expected.items() if name not in dropped}
        now = fold.after(before, records[:some], 0)
        assert now.data == (_text(expected) or "{}")
        if now.shape:
            assert now.shape == fold._shape_of(tuple(expected))
        # As a checkpoint that was read from SQL, or as it was remembered.
        before = fold.Before.of_checkpoint(_checkpoint(now)) if forgets else fold.Before.unpacked(now.packed())
        del records[:some], parts[:some]


def _checkpoint(now: fold.Folded) -> Checkpoint:
    return Checkpoint(
        now.machine, now.id, now.partition, now.state, now.version, now.entry_id, now.created_ms, now.updated_ms,
        now.machine_version, False, now.recent, now.data,
    )  # fmt: skip
