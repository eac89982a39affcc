"""Patches are checked field by field: by pydantic for classes, by JSON Schema for machines from YAML."""

from __future__ import annotations

import enum
import uuid
from collections.abc import Mapping
from datetime import UTC, date, datetime
from decimal import Decimal
from types import MappingProxyType
from typing import Any

import pydantic
import pytest

from statecache.core import errors, patch, schema
from statecache.core.machine import State, StateMachine


class Colour(enum.Enum):
    RED = "red"


class Line(pydantic.BaseModel):
    item: str
    count: int = pydantic.Field(ge=1)


class Everything(pydantic.BaseModel):
    amount: float | None = None
    price: Decimal = pydantic.Field(gt=0)
    key: uuid.UUID
    when: datetime
    day: date
    colour: Colour
    lines: list[Line]
    code: str = pydantic.Field(max_length=4)
    anything: Any = None

    @pydantic.field_validator("code")
    @classmethod
    def _no_x(cls, value: str) -> str:
        if "x" in value:
            raise ValueError("no x, please")
        return value.upper()


CLASS = patch.by_model("order", Everything)
YAML = patch.by_schema("order", Everything.model_json_schema())


def refusal(validate: patch.PatchValidator, given: Any) -> str:
    with pytest.raises(errors.InvalidDataError) as caught:
        validate(given)
    return str(caught.value)


def test_a_machine_without_data_passes_every_patch_at_no_cost() -> None:
    given = {"a": object()}
    bare = type(StateMachine)("Bare", (StateMachine,), {"a": State(initial=True)})
    assert bare.definition.validate_patch is patch.unchecked
    assert bare.definition.validate_patch(given) is given


def test_a_class_turns_values_into_json() -> None:
    key = uuid.UUID(int=7)
    assert CLASS(
        {
            "price": Decimal("1.50"),
            "key": key,
            "when": datetime(2020, 1, 2, tzinfo=UTC),
            "day": date(2020, 1, 2),
            "colour": Colour.RED,
            "lines": [{"item": "nut", "count": "3"}],
            "code": "abc",
            "amount": None,
            "anything": (1, "two"),
        }
    ) == {
        "price": "1.50",
        "key": str(key),
        "when": "2020-01-02T00:00:00Z",
        "day": "2020-01-02",
        "colour": "red",
        "lines": [{"item": "nut", "count": 3}],
        "code": "ABC",
        "amount": None,
        "anything": [1, "two"],
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"amount": "much"},
            "field 'amount': 'much' is refused: input should be a valid number, unable to parse string",
        ),
        ({"price": 0}, "field 'price': 0 is refused: input should be greater than 0"),
        ({"code": "abcde"}, "field 'code': 'abcde' is refused: string should have at most 4 characters"),
        ({"code": "x"}, "field 'code': 'x' is refused: value error, no x, please"),
        ({"lines": [{"item": "nut", "count": 0}]}, "field 'lines.0.count': 0 is refused: input should be greater than"),
        ({"lines": [{"count": 1}]}, "field 'lines.0.item': {'count': 1} is refused: field required"),
        ({"code": "y" * 999}, f"field 'code': '{'y' * 76}... is refused: string should have at most 4 characters"),
        ({"code": 1, "price": 0}, "field 'price': 0 is refused: input should be greater than 0; field 'code': 1 is"),
        ({"anything": object(), "code": "a"}, "field 'anything': <object object at 0x"),
        (
            {"code": "\ud800"},
            "field 'code': '\\ud800' is refused: input should be a valid string, unable to parse raw data",
        ),
        ([("code", "a")], "data [('code', 'a')] is refused: it must map field names to values"),
        ({1: "a"}, "data {1: 'a'} is refused: it must map field names to values"),
    ],
)
def test_a_class_refuses(given: Any, message: str) -> None:
    assert refusal(CLASS, given).startswith(f"machine 'order': {message}")


def test_what_no_json_can_hold_is_refused_and_named() -> None:
    deep: list[Any] = []
    for _ in range(2000):
        deep = [deep]
    assert "is refused: it is no JSON value: unable to serialize unknown type" in refusal(CLASS, {"anything": object()})
    assert refusal(CLASS, {"anything": deep, "code": "a"}).startswith(
        "machine 'order': field 'anything': a list nested too deep to be shown is refused: it is no JSON value: "
    )


def test_at_most_three_broken_fields_are_told() -> None:
    told = refusal(CLASS, {"price": 0, "code": 1, "key": 1, "when": "x", "day": "x"})
    assert told.count("is refused") == 3
    assert told.endswith("; and 2 more")


def test_unknown_fields_pass_unless_the_class_forbids_them() -> None:
    class Strict(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(extra="forbid")
        a: int = 0

    class Open(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(extra="allow")
        a: int = 0

    now = datetime.now(UTC)
    assert CLASS({"note": now, "code": "a"}) == {"note": now, "code": "A"}
    assert patch.by_model("order", Open)({"note": now, "a": 1}) == {"note": now, "a": 1}
    strict = patch.by_model("order", Strict)
    assert strict({"a": "1"}) == {"a": 1}
    assert refusal(strict, {"a": 1, "b": 2}) == "machine 'order': field 'b': 2 is refused: Data declares no such field"


def test_nothing_is_asked_of_the_whole_of_a_class() -> None:
    """Required fields, model validators, defaults and post-init speak of a complete object, which a patch is not."""

    class Whole(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(frozen=True, validate_default=True, str_strip_whitespace=True)
        start: int
        end: int = pydantic.Field(default_factory=lambda: 1 // 0)
        name: str = pydantic.Field("", validate_default=True)
        secret: str = pydantic.Field("", exclude=True)

        @pydantic.computed_field
        def length(self) -> int:
            return self.end - self.start

        @pydantic.model_validator(mode="before")
        @classmethod
        def _first(cls, value: Any) -> Any:
            raise AssertionError

        @pydantic.model_validator(mode="wrap")
        @classmethod
        def _round(cls, value: Any, handler: Any) -> Any:
            raise AssertionError

        @pydantic.model_validator(mode="after")
        def _last(self) -> Any:
            raise AssertionError

        def model_post_init(self, context: Any) -> None:
            raise AssertionError

    validate = patch.by_model("order", Whole)
    assert validate({}) == {}
    assert validate({"start": 2}) == {"start": 2}
    assert validate({"name": " n ", "secret": "s", "other": 1}) == {"name": "n", "other": 1}
    with pytest.raises(pydantic.ValidationError):
        Whole(start=1, end=2)


def test_a_machine_from_yaml_checks_the_same_fields() -> None:
    given = {"price": "1.5", "when": "2020-01-02T00:00:00Z", "lines": [{"item": "nut", "count": 1}], "note": [1]}
    assert YAML(given) == given
    assert YAML(MappingProxyType(given)) == given


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"amount": "much"},
            "field 'amount': 'much' is refused: the data schema says anyOf: [{'type': 'number'}, {'type",
        ),
        ({"code": "abcde"}, "field 'code': 'abcde' is refused: the data schema says maxLength: 4"),
        ({"code": "y" * 999}, f"field 'code': '{'y' * 76}... is refused: the data schema says maxLength: 4"),
        (
            {"lines": [{"item": "nut", "count": 0}]},
            "field 'lines.0.count': 0 is refused: the data schema says minimum: 1",
        ),
        ({"lines": [{"count": 1}]}, "field 'lines.0': {'count': 1} is refused: the data schema says required: ['item'"),
        ({"colour": "blue"}, "field 'colour': 'blue' is refused: the data schema says enum: ['red']"),
        ({"when": "today"}, "field 'when': 'today' is refused: the data schema says format: 'date-time'"),
        ({"day": "2020-13-01"}, "field 'day': '2020-13-01' is refused: the data schema says format: 'date'"),
        ({"key": "7"}, "field 'key': '7' is refused: the data schema says format: 'uuid'"),
        (
            {"when": datetime(2020, 1, 1)},
            "field 'when': datetime.datetime(2020, 1, 1, 0, 0) is refused: the data schema says",
        ),
        ([("code", "a")], "data [('code', 'a')] is refused: it must map field names to values"),
        ({1: "a"}, "data {1: 'a'} is refused: it must map field names to values"),
    ],
)
def test_a_machine_from_yaml_refuses(given: Any, message: str) -> None:
    assert refusal(YAML, given).startswith(f"machine 'order': {message}")
    assert refusal(YAML, MappingProxyType(given) if isinstance(given, Mapping) else given)


def test_additional_properties_of_a_schema() -> None:
    closed = {"properties": {"a": {}}, "patternProperties": {"^x_": {"type": "string"}}, "additionalProperties": False}
    validate = patch.by_schema("order", closed)
    assert validate({"a": 1, "x_b": "c"}) == {"a": 1, "x_b": "c"}
    assert refusal(validate, {"a": 1, "b": 2, "c": 3}) == (
        "machine 'order': field 'b': 2 is refused: the data schema declares no such field; field 'c': 3 is refused: the data "
        "schema declares no such field"
    )
    assert "field 'x_b': 2 is refused: the data schema says type: 'string'" in refusal(validate, {"x_b": 2})
    typed = patch.by_schema("order", {"additionalProperties": {"type": "integer"}, "propertyNames": {"maxLength": 3}})
    assert "field 'b': 'c' is refused: the data schema says type: 'integer'" in refusal(typed, {"b": "c"})
    assert "field 'long': 1 is refused: the data schema says maxLength: 3" in refusal(typed, {"long": 1})


def test_rules_for_the_whole_of_a_schema_are_left_out() -> None:
    whole = {
        "required": ["a"],
        "minProperties": 5,
        "anyOf": [{"required": ["b"]}],
        "properties": {"a": {"type": "integer"}},
    }
    assert patch.by_schema("order", whole)({}) == {}


def test_a_recursive_model_has_a_schema_that_works() -> None:
    class Tree(pydantic.BaseModel):
        name: str
        children: list[Tree] = []

    Tree.model_rebuild(_types_namespace={"Tree": Tree})
    made = type(StateMachine)("Wood", (StateMachine,), {"a": State(initial=True), "Data": Tree})
    assert "$ref" in made.spec.data_schema
    for machine in (made, StateMachine.from_spec(made.spec)):
        validate = machine.definition.validate_patch
        assert validate({"children": [{"name": "a", "children": []}]})
        assert "field 'children.0.name': 1 is refused" in refusal(validate, {"children": [{"name": 1, "children": []}]})


def test_what_a_schema_cannot_check_is_refused() -> None:
    deep: dict[str, Any] = {}
    for _ in range(500):
        deep = {"a": deep}
    endless = {"$defs": {"a": {"properties": {"a": {"$ref": "#/$defs/a"}}}}, "$ref": "#/$defs/a"}
    assert schema.problems(endless) == []
    assert "it cannot be checked: maximum recursion depth" in refusal(patch.by_schema("order", endless), deep)
    halves = patch.by_schema("order", {"properties": {"a": {"multipleOf": 0.5}}})
    assert "field 'a': 0.7 is refused: the data schema says multipleOf: 0.5" in refusal(halves, {"a": 0.7})
    assert "data {'a': inf} is refused: it cannot be checked" in refusal(halves, {"a": float("inf")})


NUMBER = frozenset({"integer", "number"})


@pytest.mark.parametrize(
    ("rule", "types"),
    [
        (True, schema.ANY_TYPE),
        (False, set()),
        ({}, schema.ANY_TYPE),
        ({"type": "integer", "maximum": 10}, {"integer"}),
        ({"type": "number"}, NUMBER),
        ({"type": ["null", "number"]}, NUMBER | {"null"}),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, {"integer", "string"}),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, NUMBER),
        ({"allOf": [{"type": "integer"}, {"type": "number"}]}, {"integer"}),
        ({"enum": ["x", None]}, {"string", "null"}),
        ({"enum": [1, 2.5, True]}, NUMBER | {"boolean"}),
        ({"const": 5}, {"integer"}),
        ({"const": {}, "type": ["object", "array"]}, {"object"}),
        ({"$ref": "#/$defs/Kind"}, {"string"}),
        ({"$ref": "#/$defs/Loop"}, NUMBER),
        ({"not": {"type": "number"}}, schema.ANY_TYPE),
    ],
)
def test_types_of_a_field(rule: Any, types: Any) -> None:
    shared = {
        "Kind": {"enum": ["x"]},
        "Loop": {"anyOf": [{"type": "number"}, {"$ref": "#/$defs/Loop", "type": "number"}]},
    }
    types_of = schema.types_of_fields({"properties": {"a": rule}, "$defs": shared})
    assert (types_of("a"), types_of("other")) == (types, schema.ANY_TYPE)


def test_types_of_fields_by_pattern() -> None:
    types_of = schema.types_of_fields({
        "properties": {"n_a": {"type": "integer"}},
        "patternProperties": {"^n_": {"type": "number"}, "_text$": {"type": "string"}},
        "additionalProperties": False,
    })  # fmt: skip
    found = [types_of(name) for name in ("n_a", "n_b", "a_text", "n_text", "other")]
    assert found == [{"integer"}, NUMBER, {"string"}, set(), set()]
