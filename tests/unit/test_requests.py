"""From a caller's arguments to an item: everything is checked before anything is sent (P12)."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import pytest

from statecache import Move
from statecache.core import codec, errors, flows, keys, model, requests
from tests.support.worlds import Order


def door(**limits: int) -> requests.Door:
    return requests.Door(
        Order.definition, Order.guards, 16, codec.Limits(**limits), codec.TransitionIds(), lambda id, fields, source: None  # type: ignore[arg-type,return-value]
    )  # fmt: skip


DOOR = door()


def test_transition_as_an_item() -> None:
    move = Move(
        "1", "pay", {"a": 1, "b": "x"}, unset=["c"], increment={"n": 2}, actor="me", reason="why", expect_version=3,
        transition_id="t", occurred_at=datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
    )  # fmt: skip
    request = DOOR.transition(move)
    item = request.item
    assert item.partition == keys.partition_of("order", "1", 16)
    assert (item.id, item.expected, item.token, item.transition_id) == ("1", 3, codec.token_of("t"), "t")
    assert item.tail.split("\x1f") == ["t", "me", "why", "1767225600000", '{"a":1,"b":"x"}', "c"]
    assert (item.names, item.texts) == (("a", "b"), ["1", '"x"'])
    assert (item.unset, item.increments) == (["c"], [["n", "2", "i"]])
    assert (item.move.event, item.move.targets, request.own_id, request.address) == (
        "pay",
        {"placed": "paid"},
        True,
        "order:1",
    )
    flat: list[object] = []
    item.pack_into(flat, 2, 5, 7)
    extras = (-1, "", ["c"], [["n", "2", "i"]], "")
    assert flat == [2, "1", 5, item.token, item.tail, -7, 3, extras, "1", '"x"']


def test_plain_item_is_packed_without_extras() -> None:
    request = DOOR.transition(Move("1", "pay"))
    flat: list[object] = []
    request.item.pack_into(flat, 1, 1, 4)
    assert flat[5:] == [4]
    assert not request.own_id
    assert DOOR.transition(Move("1", "pay")).item.transition_id != request.item.transition_id


def test_start_is_a_move_from_nowhere() -> None:
    request = DOOR.start("1", {"a": 1})
    assert request.item.move.targets == {"": "placed"}
    assert request.item.expected == 0
    assert request.guard is None


def test_guarded_event_brings_its_guard() -> None:
    guard = DOOR.transition(Move("1", "approve")).guard
    assert isinstance(guard, flows.Guard)
    assert list(guard.predicates) == ["placed"]
    assert DOOR.transition(Move("1", "pay")).guard is None


def test_moves_are_made_once_per_event() -> None:
    """``apply.lua`` gets each distinct move once: they are known by identity."""
    assert DOOR.transition(Move("1", "pay")).item.move is DOOR.transition(Move("2", "pay")).item.move


REFUSED: list[tuple[Move, str]] = [
    (Move("", "pay"), "id '' is refused"),
    (Move("a\n", "pay"), "id .* holds the control character"),
    (Move(5, "pay"), "id 5 is refused: it must be text"),  # type: ignore[arg-type]
    (Move("1", "pay", {"a": float("nan")}), "field 'a': nan is refused"),
    (Move("1", "pay", {"@": 1}), "field name '@' is refused"),
    (Move("1", "pay", "text"), "data 'text' is refused"),  # type: ignore[arg-type]
    (Move("1", "pay", unset="note"), "unset 'note' is refused: give a list"),
    (Move("1", "pay", unset=["9"]), "field name '9' is refused"),
    (Move("1", "pay", unset=5), "unset 5 is refused"),  # type: ignore[arg-type]
    (Move("1", "pay", increment={"n": True}), "increment of 'n': True is refused"),
    (Move("1", "pay", increment=5), "increment 5 is refused"),  # type: ignore[arg-type]
    (Move("1", "pay", {"a": 1}, unset=["a"]), "field 'a' is refused: it stands in more than one"),
    (Move("1", "pay", {"a": 1}, increment={"a": 1}), "field 'a' is refused: it stands in more than one"),
    (Move("1", "pay", unset=["a", "a"]), "field 'a' is refused: it stands in more than one"),
    (Move("1", "pay", unset=[f"f{n}" for n in range(65)]), "touches 65 fields, at most 64"),
    (Move("1", "pay", actor=""), "actor '' is refused"),
    (Move("1", "pay", actor="a\x1fb"), "actor .* control character"),
    (Move("1", "pay", actor=5), "actor 5 is refused"),  # type: ignore[arg-type]
    (Move("1", "pay", reason="x" * 1001), "reason .* has 1001 characters"),
    (Move("1", "pay", reason="a\nb"), "reason .* control character"),
    (Move("1", "pay", transition_id=""), "transition_id '' is refused"),
    (Move("1", "pay", transition_id="x" * 201), "transition_id .* has 201 characters"),
    (Move("1", "pay", transition_id=7), "transition_id 7 is refused"),  # type: ignore[arg-type]
    (Move("1", "pay", expect_version=0), "expect_version 0 is refused"),
    (Move("1", "pay", expect_version=True), "expect_version True is refused"),
    (Move("1", "pay", expect_version=1.0), "expect_version 1.0 is refused"),  # type: ignore[arg-type]
    (Move("1", "pay", expect_version="2"), "expect_version '2' is refused"),  # type: ignore[arg-type]
    (Move("1", "pay", expect_version=2**60), "expect_version .* is refused"),
    (Move("1", "pay", occurred_at="now"), "occurred_at 'now' is refused: it must be a datetime"),  # type: ignore[arg-type]
    (Move("1", "pay", occurred_at=datetime.date(2026, 1, 1)), "occurred_at .* must be a datetime"),  # type: ignore[arg-type]
    (Move("1", "fly"), "machine 'order' has no event 'fly'; it has pay"),
    (Move("1", None), "has no event None"),  # type: ignore[arg-type]
    (Move("1", ["pay"]), r"has no event \['pay'\]"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("move", "message"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_bad_input_is_refused_with_field_value_and_rule(move: Move, message: str) -> None:
    with pytest.raises(errors.StateCacheError, match=message) as refused:
        DOOR.transition(move)
    assert type(refused.value) in (errors.InvalidDataError, errors.InvalidTransitionError)


@pytest.mark.parametrize("data", [[], 0, "", False])
def test_data_that_is_empty_and_no_mapping_is_refused(data: Any) -> None:
    """Falsy is not the same as none."""
    with pytest.raises(errors.InvalidDataError, match="must map field names to values"):
        DOOR.start("1", data)


def test_limits_are_those_of_the_settings() -> None:
    tight = door(id_length_max=3, patch_fields_max=1, patch_bytes_max=10)
    with pytest.raises(errors.InvalidDataError, match="1 to 3 are allowed"):
        tight.start("1234")
    with pytest.raises(errors.InvalidDataError, match="at most 1 are allowed"):
        tight.start("1", {"a": 1, "b": 2})
    with pytest.raises(errors.InvalidDataError, match="at most 10 are allowed"):
        tight.start("1", {"a": "x" * 20})


def test_naive_time_is_utc_and_times_before_1970_are_times() -> None:
    for when, text in (
        (datetime.datetime(2026, 1, 1), "1767225600000"),
        (datetime.datetime(1969, 12, 31, 23, 59, 59), "-1000"),
        (datetime.datetime(2026, 1, 1, 2, tzinfo=datetime.timezone(datetime.timedelta(hours=2))), "1767225600000"),
    ):
        assert DOOR.transition(Move("1", "pay", occurred_at=when)).item.tail.split("\x1f")[3] == text


def told(request: object) -> object:
    """A request without what is made anew each time, or its error."""
    if not isinstance(request, flows.Request):
        return type(request), str(request)
    item = request.item
    own = item.transition_id if request.own_id else ""
    assert item.token == codec.token_of(item.transition_id)
    assert item.tail.startswith(item.transition_id + "\x1f")
    rest = (item.tail.split("\x1f")[1:], item.names, item.texts, item.unset, item.increments, item.claim, item.retry)
    return own, item.partition, item.id, item.move, item.expected, rest, request.address, request.expect_version


def alone(make: Callable[[], flows.Request]) -> object:
    try:
        return make()
    except errors.StateCacheError as error:
        return error


MOVES = [
    Move("1", "pay"),
    Move("2", "pay", {"a": 1, "b": "x"}),
    Move("3", "pay", {"a": 1}, actor="me"),
    Move("4", "pay", {"a": 1}, actor="m\u00e9"),
    Move("5", "pay", {"a": 1}, actor=""),
    Move("6", "pay", {"a": 1}, actor="two\nlines"),
    Move("7", "pay", {"a": 1}, actor=5),  # type: ignore[arg-type]
    Move("8", "pay", {}),
    Move("9", "pay", []),  # type: ignore[arg-type]
    Move("10", "pay", MappingProxyType({"a": 1})),
    Move("11", "pay", {"9a": 1}),
    Move("12", "pay", {"a": float("nan")}),
    Move("13", "nothing", {"a": 1}),
    Move("14", 5),  # type: ignore[arg-type]
    Move("15", ["pay"]),  # type: ignore[arg-type]
    Move("", "pay"),
    Move("a\nb", "pay"),
    Move(None, "pay"),  # type: ignore[arg-type]
    Move("\u00fc", "pay", unset=["a"]),
    Move("17", "pay", increment={"n": 1}),
    Move("18", "pay", increment={}),
    Move("19", "pay", expect_version=0),
    Move("20", "pay", expect_version=4),
    Move("21", "pay", reason="why"),
    Move("22", "pay", transition_id="mine"),
    Move("23", "pay", occurred_at=datetime.datetime(2026, 1, 1)),
    Move("24", "pay", claim="1-2"),
    Move("25", "pay", claim=""),
]


# With one that is no plain patch among them, none are encoded together: so once more without such.
ENCODED_TOGETHER = [move for move in MOVES if move.id not in ("9", "10", "11", "12")]


@pytest.mark.parametrize("given", [MOVES, ENCODED_TOGETHER])
def test_transitions_built_together_are_what_each_is_alone(given: list[Move]) -> None:
    codec.encode_patch({"a": 1, "b": 1}, codec.Limits())  # the names are known from now on
    assert any(codec.encode_patches([move.data for move in given], codec.Limits())) == (given is ENCODED_TOGETHER)
    together = DOOR.transitions(given)
    assert [told(one) for one in together] == [told(alone(lambda m=m: DOOR.transition(m))) for m in given]  # type: ignore[misc]
    made = [one.item.transition_id for one in together if isinstance(one, flows.Request)]
    assert len(set(made)) == len(made)


@pytest.mark.parametrize("actor", [None, "all", "", "two\nlines"])
def test_starts_built_together_are_what_each_is_alone(actor: str | None) -> None:
    given = [
        model.Start("1"), model.Start("2", {"a": 1}), model.Start("3", {"a": 1}, actor="me"), model.Start("4", actor=""),
        model.Start("5", transition_id="mine"), model.Start("6", reason="why"), model.Start("", {"a": 1}),
        model.Start("7", {"9a": 1}),
    ]  # fmt: skip

    def one(start: model.Start) -> flows.Request:
        return DOOR.start(
            start.id, start.data, actor=start.actor or actor, reason=start.reason, transition_id=start.transition_id
        )

    assert [told(each) for each in DOOR.starts(given, actor)] == [told(alone(lambda s=s: one(s))) for s in given]  # type: ignore[misc]


def test_what_is_an_error_already_stays_one() -> None:
    error = errors.InvalidDataError("no move")
    built = DOOR.transitions([Move("1", "pay"), error])
    assert isinstance(built[0], flows.Request)
    assert built[1] is error
