"""Times, words and links of the pages."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from statecache.core import model
from statecache.web import forms, story, wording
from tests.support.worlds import Order


def row(version: int, state: str, at_ms: int, event: str = "pay", **more: Any) -> model.Transition:
    fields: dict[str, Any] = {
        "from_state": None, "transition_id": "t", "actor": None, "reason": None, "occurred_ms": None, "patch": {},
        "unset": (), "increments": {}, "machine_version": 1, "entry_id": f"1-{version}", "durable": True, **more,
    }  # fmt: skip
    return model.Transition("order", "1", version, event, to_state=state, at_ms=at_ms, **fields)


def test_time_in_each_state() -> None:
    rows = [
        row(1, "placed", 0, "@start"), row(2, "paid", 4000), row(3, "paid", 5000, "note"), row(4, "cancelled", 9000, "cancel"),
    ]  # fmt: skip
    told = story.chapters(Order, rows)
    assert [one.stayed_seconds for one in told] == [4.0, 1.0, 4.0, None]
    assert (told[0].title, told[0].state, told[0].ongoing) == ("Started", "placed", False)
    assert [(stay.state, stay.seconds) for stay in story.stays(told)] == [("placed", 4.0), ("paid", 5.0)]
    assert sum(stay.share for stay in story.stays(told)) == pytest.approx(1)


def test_the_time_that_callers_tell_counts() -> None:
    """Imported rows are recorded all at once; and a caller's clock may run backwards."""
    rows = [
        row(1, "placed", 900, occurred_ms=0),
        row(2, "paid", 901, occurred_ms=7000),
        row(3, "paid", 902, occurred_ms=10),
    ]
    told = story.chapters(Order, rows)
    assert [one.stayed_seconds for one in told[:2]] == [7.0, 0]
    assert told[2].ongoing


def test_only_what_changed_is_told() -> None:
    rows = [
        row(1, "placed", 0, patch={"a": 1, "b": [1]}),
        row(2, "paid", 1, patch={"a": 1, "b": [2]}, increments={"n": 3}),
        row(3, "paid", 2, unset=("a", "never")),
        row(4, "paid", 3, patch={"a": 1}),
    ]
    assert [list(one.changes) for one in story.chapters(Order, rows)] == [
        [("a", "1"), ("b", "[1]")], [("b", "[2]"), ("n", "3")], [("a", "removed")], [("a", "1")],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 ms"), (0.0123, "12 ms"), (1.26, "1.3 s"), (59, "59 s"), (61, "1 min 1 s"), (3600, "1 h"), (3660, "1 h 1 min"),
        (90_000, "1 d 1 h"), (31_536_000 * 2 + 86_400, "2 y 1 d"), (None, "-"),
    ],
)  # fmt: skip
def test_durations(seconds: float | None, text: str) -> None:
    assert wording.duration(seconds) == text


@pytest.mark.parametrize("id", ["..", "a/b", "%2e", "a?b#c&d=e", '"<script>', "a b+c", "日本", "{x}"])
def test_links_carry_any_id(id: str) -> None:
    parts = urlsplit(wording.instance_link("order", id))
    assert parts.path == "/instance"
    assert parse_qs(parts.query) == {"machine": ["order"], "id": [id]}


@pytest.mark.parametrize(
    "text", ["", "x", "//evil.example", "/\\evil.example", "https://evil.example", "/a\nb", "\\\\x"]
)
def test_after_a_form_nobody_is_sent_elsewhere(text: str) -> None:
    assert forms.local_path(text) == "/"


def test_a_local_path_is_kept() -> None:
    assert forms.local_path("/instance?machine=order&id=1") == "/instance?machine=order&id=1"


def test_long_values_are_shortened() -> None:
    assert wording.value("x" * 5000).endswith("…")
    assert wording.value({"a": [None, True]}) == '{"a": [null, true]}'


@pytest.mark.parametrize(
    ("numbers", "text"), [((), ""), ((3,), "3"), ((0, 1), "0-1"), ((0, 1, 2, 3, 7, 9, 10), "0-3, 7, 9-10")]
)
def test_ranges(numbers: tuple[int, ...], text: str) -> None:
    assert wording.ranges(numbers) == text
