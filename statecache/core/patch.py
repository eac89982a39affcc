"""Validators of patches: the data fields of one transition, each by itself, before anything is sent (promise P12).

A patch is a part, so nothing is asked of the whole: required fields may be missing, and rules that compare fields
(model validators, ``anyOf`` at the top of a schema) are left out. Fields that the declaration does not know pass as
they are unless it forbids them. What comes out is JSON values; their sizes and ranges are checked by ``codec``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any

import jsonschema
import pydantic

from statecache.core import errors, schema
from statecache.core.wording import MISTAKES, shown, uncapitalized

PatchValidator = Callable[[Mapping[str, Any]], Mapping[str, Any]]

_TOLD_MAX = 3
_FORMATS = jsonschema.FormatChecker(("date", "email", "ipv4", "ipv6", "uuid"))


@_FORMATS.checks("date-time", raises=ValueError)
def _is_date_time(value: object) -> bool:
    if isinstance(value, str):
        datetime.fromisoformat(value)
    return True


def unchecked(patch: Mapping[str, Any]) -> Mapping[str, Any]:
    """The validator of a machine that declares no data: every patch passes."""
    return patch


def schema_of(subject: str, model: type[pydantic.BaseModel]) -> dict[str, Any]:
    """Return the JSON Schema of a machine's ``Data``. Raises ``DefinitionError`` for one that makes no data fields."""
    if issubclass(model, pydantic.RootModel):
        raise errors.DefinitionError(f"{subject}: Data is a RootModel, which has no fields: use a BaseModel")
    for name, field in model.model_fields.items():
        if field.alias or field.validation_alias or field.serialization_alias:
            raise errors.DefinitionError(
                f"{subject}: the field {name!r} of Data has an alias: data fields are stored under their own names"
            )
    try:
        made = model.model_json_schema()
    except (pydantic.errors.PydanticUserError, NameError) as error:
        raise errors.DefinitionError(f"{subject}: Data has no JSON Schema: {str(error).splitlines()[0]}") from error
    if _has_secret(made):
        raise errors.DefinitionError(
            f"{subject}: Data has a secret (SecretStr, SecretBytes), which would be stored as asterisks: declare a str, and "
            "encrypt it or keep it elsewhere"
        )
    return made


def _has_secret(made: dict[str, Any]) -> bool:
    """Whether a schema that pydantic made says of anything that it is written as asterisks."""
    return any(part.get("writeOnly") is True and part.get("format") == "password" for _, part in schema.walk(made))


def by_model(machine: str, model: type[pydantic.BaseModel]) -> PatchValidator:
    """Return a validator that applies the model's types, constraints and field validators to the fields given.

    Results are what the model would write as JSON (datetimes, Decimals, UUIDs, Enums become JSON values); a field that
    the model excludes from serialization is left out.
    """
    partial = _partial(model)
    declared = frozenset(model.model_fields)
    forbids = model.model_config.get("extra") == "forbid"

    def validate(patch: Mapping[str, Any]) -> dict[str, Any]:
        _check_mapping(machine, patch)
        known = {name: value for name, value in patch.items() if name in declared}
        unknown = {name: value for name, value in patch.items() if name not in declared}
        if unknown and forbids:
            raise _refused(machine, [(name, value, "Data declares no such field") for name, value in unknown.items()])
        try:
            valid = partial.model_validate(known)
        except pydantic.ValidationError as error:  # a ValueError, as what a validator raises by mistake may be
            found = error.errors(include_url=False, include_context=False)
            raise _refused(
                machine, [(_dotted(one["loc"]), one["input"], uncapitalized(one["msg"])) for one in found]
            ) from error
        except MISTAKES as error:
            raise errors.InvalidDataError(
                f"machine {machine!r}: data {shown(patch)} is refused: a validator failed: {type(error).__name__}: {error}"
            ) from error
        try:
            return unknown | valid.model_dump(mode="json", include=set(known))
        except ValueError as error:
            raise _refused(machine, _not_json(valid, known)) from error

    return validate


def _not_json(valid: pydantic.BaseModel, given: Mapping[str, Any]) -> list[tuple[str, object, str]]:
    """Find the fields that the model accepts (``Any``) and cannot write as JSON."""
    broken: list[tuple[str, object, str]] = []
    for name, value in given.items():
        try:
            valid.model_dump(mode="json", include={name})
        except ValueError as error:
            broken.append((name, value, f"it is no JSON value: {uncapitalized(str(error))}"))
    return broken


class _Part(pydantic.BaseModel):
    def model_post_init(self, context: Any) -> None:
        """Do nothing: what the model does once it is whole cannot be done to a part of it."""


def _partial(model: type[pydantic.BaseModel]) -> type[pydantic.BaseModel]:
    """Derive a model without required fields and without validators of the whole."""
    fields: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        parts = field.asdict()
        attributes = dict(parts["attributes"], validate_default=False)
        attributes.pop("default", None)
        attributes.pop("default_factory", None)
        annotation, constraints = parts["annotation"], parts["metadata"]
        fields[name] = (Annotated[(annotation, *constraints, pydantic.Field(**attributes))], None)
    # A validator is overridden by another one of its name, as any method is.
    silenced: dict[str, Any] = dict.fromkeys(model.__pydantic_decorators__.model_validators, _pass_all)
    name = f"{model.__name__}Patch"
    return pydantic.create_model(
        name, __base__=(_Part, model), __module__=model.__module__, __validators__=silenced, **fields
    )


@pydantic.model_validator(mode="after")
def _pass_all(self: Any) -> Any:
    return self


def by_schema(machine: str, data_schema: dict[str, Any]) -> PatchValidator:
    """Return a validator that applies a JSON Schema (one that ``schema.problems`` accepts) to the fields given."""
    rules = schema.for_patch(data_schema)
    validator = jsonschema.Draft202012Validator(rules, format_checker=_FORMATS)

    def validate(patch: Mapping[str, Any]) -> dict[str, Any]:
        _check_mapping(machine, patch)
        given = dict(patch)
        try:
            found = list(validator.iter_errors(given))
        except (RecursionError, ArithmeticError, ValueError) as error:  # nested too deep; NaN by multipleOf
            raise errors.InvalidDataError(
                f"machine {machine!r}: data {shown(given)} is refused: it cannot be checked: {error}"
            ) from error
        if found:
            raise _refused(machine, [broken for error in found for broken in _broken(error, rules, given)])
        return given

    return validate


def _broken(
    error: jsonschema.ValidationError, rules: dict[str, Any], patch: dict[str, Any]
) -> Iterator[tuple[str, object, str]]:
    path = tuple(error.absolute_path)
    rule = f"the data schema says {error.validator}: {shown(error.validator_value)}"
    if path:
        yield _dotted(path), error.instance, rule
    elif error.validator == "additionalProperties":
        known = rules.get("properties", {})
        patterns = rules.get("patternProperties", {})
        for name, value in patch.items():
            if name not in known and not any(re.search(pattern, name) for pattern in patterns):
                yield name, value, "the data schema declares no such field"
    else:  # a rule of propertyNames: the instance is the name
        name = str(error.instance)
        yield name, patch.get(name), rule


def _check_mapping(machine: str, patch: object) -> None:
    if not isinstance(patch, Mapping) or not all(isinstance(name, str) for name in patch):
        raise errors.InvalidDataError(
            f"machine {machine!r}: data {shown(patch)} is refused: it must map field names to values"
        )


def _dotted(path: Iterable[str | int]) -> str:
    return ".".join(str(part) for part in path)


def _refused(machine: str, broken: Sequence[tuple[str, object, str]]) -> errors.InvalidDataError:
    told = [f"field {field!r}: {shown(value)} is refused: {rule}" for field, value, rule in broken[:_TOLD_MAX]]
    more = [f"and {len(broken) - _TOLD_MAX} more"] if len(broken) > _TOLD_MAX else []
    return errors.InvalidDataError(f"machine {machine!r}: " + "; ".join(told + more))
