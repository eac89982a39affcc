"""JSON Schemas of data fields (Draft 2020-12): which are accepted, what they mean, what of them applies to a patch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jsonschema

from statecache.core.wording import shortened, shown

FIELD_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")
_LOCAL_REF = re.compile(r"#/\$defs/([^/~%]+)")

# Where schemas stand inside a schema. All other keywords hold plain values, which may look like schemas and are none.
_NAMED = frozenset({"properties", "patternProperties", "$defs", "dependentSchemas"})
_LISTED = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
_SINGLE = frozenset({
    "items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames", "unevaluatedItems",
    "unevaluatedProperties", "contentSchema",
})  # fmt: skip
_ANNOTATIONS = frozenset({
    "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "$schema",
})  # fmt: skip
# These give a name or a base address to a subschema. A machine's schema has one file and '$defs'; with that, every
# reference can be followed here and none is fetched from the network.
_ADDRESSES = frozenset({"$id", "$anchor", "$dynamicRef", "$dynamicAnchor"})
_DRAFT = "https://json-schema.org/draft/2020-12/schema"

# Rules for fields by themselves. Those for the whole (required, minProperties, anyOf ...) cannot be asked of a patch.
_PATCH_KEYWORDS = ("$defs", "properties", "patternProperties", "additionalProperties", "propertyNames")

Path = tuple[str | int, ...]


def problems(schema: dict[str, Any]) -> list[tuple[Path, str]]:
    """Return the path and the rule for everything that makes ``schema`` unfit to describe data fields."""
    try:
        return list(_problems(schema))
    except RecursionError:
        return [((), "it is nested too deep")]


def _problems(schema: dict[str, Any]) -> Iterator[tuple[Path, str]]:
    try:
        json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError) as error:
        yield (), f"it is no JSON ({error})"
        return
    draft = schema.get("$schema", _DRAFT)
    if str(draft).rstrip("#") != _DRAFT:
        yield ("$schema",), f"it is written for {draft!r}, only {_DRAFT} is understood"
        return
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.SchemaError as error:
        yield tuple(error.absolute_path), shortened(error.message, 200)
        return
    yield from _wrong_references(schema)
    fields = _object(schema)
    if fields.get("type", "object") != "object":
        yield ("type",), f"its type is {fields['type']!r}, data fields are an 'object'"
    for name in fields.get("properties", {}):
        if not FIELD_NAME.fullmatch(name):
            yield ("properties", name), f"the field name {shown(name)} is refused: names match {FIELD_NAME.pattern}"


def _wrong_references(schema: dict[str, Any]) -> Iterator[tuple[Path, str]]:
    known = schema.get("$defs", {})
    for path, part in walk(schema):
        for keyword in sorted(_ADDRESSES & part.keys()):
            yield (*path, keyword), f"{keyword} is not supported: put shared parts in '$defs'"
        if "$ref" in part:
            target = _LOCAL_REF.fullmatch(part["$ref"])
            if target is None or target.group(1) not in known:
                yield (*path, "$ref"), f"the reference {shown(part['$ref'])} leads to no entry of '$defs'"


def walk(schema: Any, path: Path = ()) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every schema that stands in a schema, itself first, with its path."""
    if not isinstance(schema, dict):  # true and false are schemas too
        return
    yield path, schema
    for keyword, value in schema.items():
        for key, part in _parts(keyword, value):
            yield from walk(part, (*path, keyword, *key))


def _parts(keyword: str, value: Any) -> Iterator[tuple[Path, Any]]:
    if keyword in _NAMED:
        yield from (((name,), part) for name, part in value.items())
    elif keyword in _LISTED:
        yield from (((index,), part) for index, part in enumerate(value))
    elif keyword in _SINGLE:
        yield (), value


def meaning(schema: Any) -> Any:
    """Return ``schema`` without annotations (titles, descriptions, defaults ...), which decide nothing."""
    if not isinstance(schema, dict):
        return schema
    result: dict[str, Any] = {}
    for keyword, value in schema.items():
        if keyword in _NAMED:
            result[keyword] = {name: meaning(part) for name, part in value.items()}
        elif keyword in _LISTED:
            result[keyword] = [meaning(part) for part in value]
        elif keyword in _SINGLE:
            result[keyword] = meaning(value)
        elif keyword not in _ANNOTATIONS:
            result[keyword] = value
    return result


_DECIMAL_PATTERN = "^(?!^[-+.]*$)"
"""How pydantic, up to 2.13, begins the pattern of a Decimal that is given as text. Later versions write none."""


def alike(one: Any, two: Any) -> bool:
    """Whether two meanings are the same, but for the patterns of Decimals in one of them that the other has none of."""
    if one == two:
        return True
    (bare_one, patterns_one), (bare_two, patterns_two) = _without_decimals(one), _without_decimals(two)
    return bare_one == bare_two and not (patterns_one and patterns_two)


def _without_decimals(schema: Any) -> tuple[Any, int]:
    """A schema without the patterns that pydantic wrote for Decimals, and how many there were."""
    if isinstance(schema, list):
        parts = [_without_decimals(part) for part in schema]
        return [part for part, _ in parts], sum(count for _, count in parts)
    if not isinstance(schema, dict):
        return schema, 0
    pattern = schema.get("pattern")
    is_theirs = isinstance(pattern, str) and pattern.startswith(_DECIMAL_PATTERN)
    named = {
        keyword: _without_decimals(value) for keyword, value in schema.items() if keyword != "pattern" or not is_theirs
    }
    return {keyword: part for keyword, (part, _) in named.items()}, is_theirs + sum(
        count for _, count in named.values()
    )


def for_patch(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the rules that apply to each field by itself."""
    fields = _object(schema)
    return {keyword: fields[keyword] for keyword in _PATCH_KEYWORDS if keyword in fields}


ANY_TYPE = frozenset({"null", "boolean", "integer", "number", "string", "array", "object"})


def types_of_fields(schema: dict[str, Any]) -> Callable[[str], frozenset[str]]:
    """Return what tells the JSON types that a field may have: none where it is forbidden; ``number`` comes with ``integer``,
    which comes alone where only whole numbers are meant. Rules that are no types (``not``, ``if``) narrow nothing."""
    rules = for_patch(schema)
    shared = rules.get("$defs", {})
    named = {name: _types(part, shared) for name, part in rules.get("properties", {}).items()}
    patterns = [
        (re.compile(pattern), _types(part, shared)) for pattern, part in rules.get("patternProperties", {}).items()
    ]
    others = _types(rules.get("additionalProperties", True), shared)

    def types_of(name: str) -> frozenset[str]:
        found = [types for pattern, types in patterns if pattern.search(name)]
        if name in named:
            found.append(named[name])
        return ANY_TYPE.intersection(*found) if found else others

    return types_of


def _types(schema: Any, shared: dict[str, Any], followed: frozenset[str] = frozenset()) -> frozenset[str]:
    if not isinstance(schema, dict):
        return ANY_TYPE if schema else frozenset()
    types = ANY_TYPE
    if "type" in schema:
        told = schema["type"]
        types &= _with_integer([told] if isinstance(told, str) else told)
    if "const" in schema or "enum" in schema:
        types &= _with_integer(map(_type_of, [schema["const"]] if "const" in schema else schema["enum"]))
    for keyword in ("anyOf", "oneOf"):
        if keyword in schema:
            types &= frozenset().union(*(_types(part, shared, followed) for part in schema[keyword]))
    for part in schema.get("allOf", ()):
        types &= _types(part, shared, followed)
    target = _LOCAL_REF.fullmatch(schema.get("$ref", ""))
    if target is not None and target.group(1) not in followed:
        types &= _types(shared.get(target.group(1), True), shared, followed | {target.group(1)})
    return types


def _with_integer(types: Iterable[str]) -> frozenset[str]:
    found = frozenset(types)
    return found | {"integer"} if "number" in found else found


def _type_of(value: object) -> str:
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return kinds.get(type(value), "null")


def _object(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of the object itself: pydantic puts that of a recursive model into ``$defs`` and refers to it."""
    target = _LOCAL_REF.fullmatch(schema.get("$ref", ""))
    if target is None:
        return schema
    shared = schema.get("$defs", {})
    found = shared.get(target.group(1))
    return {"$defs": shared, **(found if isinstance(found, dict) else {})}
