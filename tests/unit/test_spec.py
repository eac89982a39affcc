"""The machine as data: its rules, its fingerprint, its main line, the data schemas that it accepts."""

from __future__ import annotations

from typing import Any

import pytest

from statecache.core import codec, errors, schema, spec
from statecache.core.spec import EventSpec, MachineSpec, StateSpec, TransitionSpec


def machine(states: str = "a! b.", events: str = "go: a b", **fields: Any) -> MachineSpec:
    """Build a spec of a short text: ``!`` marks the initial state, ``.`` final ones, ``;`` parts events and ``,`` moves."""
    made = [
        StateSpec(name=word.rstrip("!."), initial="!" in word, final="." in word, title=fields.pop("state_title", None))
        for word in states.split()
    ]
    declared = []
    for text in filter(None, events.split(";")):
        name, _, moves = text.strip().partition(":")
        pairs = [move.split() for move in moves.split(",") if move.strip()]
        transitions = tuple(
            TransitionSpec(source=pair[0], target=pair[1], guard=pair[2] if pair[2:] else None) for pair in pairs
        )
        declared.append(EventSpec(name=name, transitions=transitions, title=fields.pop("event_title", None)))
    return MachineSpec(**{"name": "lamp", "states": tuple(made), "events": tuple(declared)} | fields)


def refusal(*args: Any, **fields: Any) -> str:
    with pytest.raises(errors.DefinitionError) as caught:
        machine(*args, **fields)
    return str(caught.value)


def test_names_follow_the_rules_of_the_wire() -> None:
    """The patterns stand in both modules, as this one may not import ``codec``; they must not drift apart."""
    assert spec.NAME.pattern == codec.NAME.pattern
    assert schema.FIELD_NAME.pattern == codec.FIELD_NAME.pattern


def test_a_state_and_an_event_may_share_a_name() -> None:
    assert machine("new! sent.", "sent: new sent").events[0].name == "sent"


def test_one_state_is_enough() -> None:
    assert machine("a!", "").states[0].name == "a"
    assert machine("a!.", "").states[0].final


def test_json_round_trip() -> None:
    made = machine(title="Lamp", hot_ttl_seconds=60, durability="hot", data_schema={"type": "object"})
    assert MachineSpec.model_validate_json(made.model_dump_json()) == made
    assert type(made.hot_ttl_seconds) is float


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("", ""), "machine 'lamp': it has no state: a machine needs at least one"),
        (("a b", "go: a b"), "machine 'lamp': exactly one state must be initial, none is"),
        (("a! b!", "go: a b"), "machine 'lamp': exactly one state must be initial, 2 are (a, b)"),
        (("a! b c", "go: a b"), "machine 'lamp': state 'c' cannot be reached from the initial state 'a'"),
        (("a! b c", "go: a b; on: c c"), "machine 'lamp': state 'c' cannot be reached from the initial state 'a'"),
        (
            ("a! b.", "go: a b; back: b a"),
            "machine 'lamp': event 'back' leads out of state 'b', which is final: nothing leads out of a final state",
        ),
        (
            ("a! b.", "go: a b; stay: b b"),
            "machine 'lamp': event 'stay' leads out of state 'b', which is final: nothing leads out of a final state",
        ),
        (
            ("a! b c", "go: a b, a c"),
            "machine 'lamp': event 'go' has two transitions from state 'a' (to 'b' and to 'c'): one event has one target "
            "from one state",
        ),
        (
            ("a! b", "go: a b, a b x"),
            "machine 'lamp': event 'go' has two transitions from state 'a' (to 'b' and to 'b'): one event has one target "
            "from one state",
        ),
        (("a! b", "go: a c"), "machine 'lamp': event 'go' refers to the state 'c', which is not declared"),
        (("a! b", "go: a b; no:"), "machine 'lamp': event 'no' has no transition: it needs at least one"),
        (("a! a", ""), "machine 'lamp': state 'a' is declared 2 times"),
        (("a! b", "go: a b; go: b a"), "machine 'lamp': event 'go' is declared 2 times"),
        (("a! B", "go: a B"), "machine 'lamp': state 'B' is refused: names match [a-z][a-z0-9_]{0,63}"),
        (("a! b", "@go: a b"), "machine 'lamp': event '@go' is refused: names match [a-z][a-z0-9_]{0,63}"),
        (
            ("a! b", "go: a b <lambda>"),
            "machine 'lamp': event 'go': the guard '<lambda>' is refused: names of guards match [A-Za-z_][A-Za-z0-9_]{0,63}",
        ),
    ],
)
def test_broken_rules(args: tuple[str, str], message: str) -> None:
    assert refusal(*args) == message


def test_all_broken_rules_of_a_kind_are_told() -> None:
    told = refusal("a! b c", "go: a d")
    assert told == "machine 'lamp': event 'go' refers to the state 'd', which is not declared"
    told = refusal("a! b c", "")
    assert "state 'b' cannot be reached" in told
    assert "state 'c' cannot be reached" in told


def test_names_and_titles() -> None:
    assert "the machine's name 'Lamp' is refused" in refusal(name="Lamp")
    assert f"the machine's name '{'x' * 65}' is refused" in refusal(name="x" * 65)
    assert "the title '' of the machine is refused: it has 0 characters, 1 to 500 are allowed" in refusal(title="")
    assert "of state 'a' is refused: it has 501 characters, 1 to 500 are allowed" in refusal(state_title="x" * 501)
    assert (
        "the title 'a\\x1b[2J' of event 'go' is refused: it holds the control character '\\x1b' at position 1"
        in refusal(event_title="a\x1b[2J")
    )
    assert "it holds the control character '\\ud800' at position 0" in refusal(title="\ud800")
    assert machine(title="two\nlines, ünïcode").title == "two\nlines, ünïcode"


def test_the_fingerprint_tells_what_a_machine_means() -> None:
    one = machine("a! b c.", "go: a b; end: a c, b c")
    # Stores hold fingerprints: another way of computing them would make every known machine look changed.
    assert one.fingerprint == "3de50992c091f38ef9fbdccec18c3f42b5e54113ed4dce4f95226074d9a650cc"
    same = [
        machine("c. a! b", "end: b c, a c; go: a b"),
        machine("a! b c.", "go: a b; end: a c, b c", title="Lamp", durability="durable", hot_ttl_seconds=5.0),
        machine("a! b c.", "go: a b; end: a c, b c", state_title="Off", event_title="On"),
    ]
    other = [
        machine("a! b c.", "go: a b; end: a c, b c", name="bulb"),
        machine("a! b c.", "go: a b; end: a c, b c", version=2),
        machine("a! b c", "go: a b; end: a c, b c"),
        machine("a! b c.", "go: a b; end: b c"),
        machine("a! b c.", "go: a b is_dark; end: a c, b c"),
        machine("a! b c.", "go: a b; end: a c, b c", data_schema={}),
    ]
    assert {made.fingerprint for made in same} == {one.fingerprint}
    assert len({made.fingerprint for made in other} | {one.fingerprint}) == len(other) + 1


def test_the_fingerprint_counts_the_rules_of_the_data_and_not_their_annotations() -> None:
    def fingerprint(data_schema: dict[str, Any]) -> str:
        return machine(data_schema=data_schema).fingerprint

    bare = {"properties": {"title": {"anyOf": [{"type": "string"}, {"type": "null"}]}, "x": {"items": {"enum": [1]}}}}
    told = {
        "title": "Data",
        "description": "...",
        "properties": {
            "title": {"anyOf": [{"type": "string", "title": "T"}, {"type": "null"}], "default": None},
            "x": {"items": {"enum": [1], "examples": [1]}},
        },
    }
    assert fingerprint(told) == fingerprint(bare)
    assert fingerprint({"properties": {"title": {}}}) != fingerprint({"properties": {"default": {}}})
    assert fingerprint({"properties": {"x": {"enum": [{"title": 1}]}}}) != fingerprint(
        {"properties": {"x": {"enum": [{}]}}}
    )


@pytest.mark.parametrize(
    ("states", "events", "line"),
    [
        ("a! b c. x.", "go: a b; on: b c; stop: a x, b x", "a b c"),
        ("a! b.", "go: a b", "a b"),
        ("a! b.", "go: a b; again: a a", "a b"),
        ("a! b c.", "go: a b; back: b a; on: b c", None),
        ("a! b. c.", "go: a b; on: a c", None),
        ("a! b c d.", "go: a b; on: a c; end: b d, c d", None),
        ("a! b", "go: a b", None),
        ("a! b. c", "go: a b; skip: a c", None),
        ("a!", "", None),
        ("a!.", "", None),
    ],
)
def test_steps(states: str, events: str, line: str | None) -> None:
    assert spec.steps(machine(states, events)) == (None if line is None else tuple(line.split()))


@pytest.mark.parametrize(
    ("data_schema", "path", "rule"),
    [
        ({"const": {1, 2}}, (), "it is no JSON (Object of type set is not JSON serializable)"),
        ({"properties": {"a": {"maximum": float("nan")}}}, (), "it is no JSON (Out of range float values are not JSON"),
        (
            {"$schema": "http://json-schema.org/draft-07/schema#"},
            ("$schema",),
            "it is written for 'http://json-schema.org/d",
        ),
        (
            {"properties": {"a": {"type": "money"}}},
            ("properties", "a", "type"),
            "'money' is not valid under any of the",
        ),
        ({"properties": {"a": {"pattern": "("}}}, ("properties", "a", "pattern"), "'(' is not a 'regex'"),
        ({"type": "array"}, ("type",), "its type is 'array', data fields are an 'object'"),
        ({"properties": {"ä": {}}}, ("properties", "ä"), "the field name 'ä' is refused: names match [A-Za-z_]"),
        (
            {"properties": {"a": {"$ref": "#/$defs/b"}}},
            ("properties", "a", "$ref"),
            "the reference '#/$defs/b' leads to no",
        ),
        (
            {"items": {"$ref": "http://localhost/x"}},
            ("items", "$ref"),
            "the reference 'http://localhost/x' leads to no",
        ),
        ({"anyOf": [{"$id": "x"}]}, ("anyOf", 0, "$id"), "$id is not supported: put shared parts in '$defs'"),
        ({"$ref": "#/$defs/b"}, ("$ref",), "the reference '#/$defs/b' leads to no entry of '$defs'"),
    ],
)
def test_data_schemas_that_are_refused(data_schema: dict[str, Any], path: tuple[Any, ...], rule: str) -> None:
    found = schema.problems(data_schema)
    assert [where for where, _ in found] == [path]
    assert found[0][1].startswith(rule)
    assert f"machine 'lamp': the data schema is refused: {rule}" in refusal(data_schema=data_schema)


def test_a_data_schema_that_is_nested_too_deep_is_refused() -> None:
    deep: dict[str, Any] = {}
    for _ in range(400):
        deep = {"items": deep}
    assert schema.problems(deep) == [((), "it is nested too deep")]


def test_a_property_may_be_named_like_a_keyword() -> None:
    named = {"properties": {"a": {"properties": {"$ref": {"type": "string"}, "$id": True}, "const": {"$ref": 1}}}}
    assert schema.problems(named) == []
    assert schema.problems({"$defs": {"b": True}, "$ref": "#/$defs/b"}) == []


_DECIMAL = r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"


def _amount(**text: str) -> dict[str, Any]:
    branches = [{"type": "number"}, {"type": "string", **text}, {"type": "null"}]
    return {"type": "object", "properties": {"amount": {"anyOf": branches, "default": None}}}


def test_what_another_pydantic_writes_for_a_decimal_is_no_other_definition() -> None:
    """Up to 2.13 it writes a pattern for Decimals, later none. What people write counts, and so does a pattern that changes."""
    older, newer = machine(data_schema=_amount(pattern=_DECIMAL)), machine(data_schema=_amount())
    assert older.fingerprint != newer.fingerprint
    assert older.means_the_same(newer)
    assert newer.means_the_same(older)
    digits = machine(data_schema=_amount(pattern=_DECIMAL + "(?!0)"))
    assert digits.means_the_same(newer)
    assert not digits.means_the_same(older)
    assert not machine(data_schema=_amount(pattern="^[0-9]+$")).means_the_same(newer)
    assert not machine(data_schema=_amount(format="date")).means_the_same(newer)
    assert not machine("a! c.", "go: a c").means_the_same(machine())
    assert machine().means_the_same(machine())
    assert not machine().means_the_same(newer)
