"""What goes over the door: rules for ids, names, free text and data, and their texts on the wire.

Everything is checked here, before anything is sent (promise P12): the message names the field, the value and the rule.
Values become JSON text; ids, actors and reasons are stored as they are and so may hold no control characters.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import itertools
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from statecache.core import errors, wording

UNREADABLE = (msgspec.MsgspecError, RecursionError, ValueError)
"""What decoding a stranger's text may raise: no JSON, a number out of range, nested too deep, half of a surrogate pair."""

FIELD_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")
NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_INTEGER_MIN, _INTEGER_MAX = -(2**63), 2**63 - 1
_DEPTH_MAX = 32

TOKEN_LENGTH = 8
RING_LENGTH = 8
RING_BYTES = TOKEN_LENGTH * RING_LENGTH


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes above which input is refused."""

    id_length_max: int = 200
    patch_fields_max: int = 64
    instance_fields_max: int = 256
    patch_bytes_max: int = 64 * 1024
    batch_items_max: int = 1000
    text_length_max: int = 1000


_shown = wording.shown


def plain_text(value: Any) -> Any:
    """A text of a class of its own (an Enum's member, ``numpy.str_``) as what it is; anything else as it stands.

    Such a class may have another hash, and another text in an f-string than on the wire: what is to be written in several
    places must be one and the same.
    """
    return str.__str__(value) if isinstance(value, str) else value


def plain_texts(values: list[Any]) -> list[Any]:
    """``plain_text`` of each."""
    return values if set(map(type, values)) <= {str} else list(map(plain_text, values))


def check_text(what: str, value: object, length_max: int) -> str:
    """Return ``value`` as plain text: 1 to ``length_max`` characters without control characters or lone surrogates."""
    if type(value) is not str:
        if not isinstance(value, str):
            raise errors.InvalidDataError(
                f"{what} {_shown(value)} is refused: it must be text, not {type(value).__name__}"
            )
        value = str.__str__(value)
    if not 0 < len(value) <= length_max:
        raise errors.InvalidDataError(
            f"{what} {_shown(value)} is refused: it has {len(value)} characters, 1 to {length_max} are allowed"
        )
    if value.isascii() and value.isprintable():
        return value
    found = _CONTROL.search(value)
    if found:
        raise errors.InvalidDataError(
            f"{what} {_shown(value)} is refused: it holds the control character {found.group()!r} at position {found.start()}"
        )
    return value


def check_texts(what: str, values: Sequence[object], length_max: int) -> list[errors.InvalidDataError | None]:
    """The error that ``check_text`` has for each value, None for what it lets pass."""
    texts = [value for value in values if isinstance(value, str)]
    if len(texts) == len(values) and all(texts) and max(map(len, texts), default=0) <= length_max:
        together = "".join(texts)
        if together.isascii() and together.isprintable():
            return [None] * len(values)
    return [_error_of(what, value, length_max) for value in values]


def _error_of(what: str, value: object, length_max: int) -> errors.InvalidDataError | None:
    try:
        check_text(what, value, length_max)
    except errors.InvalidDataError as error:
        return error
    return None


_begin_hash = hashlib.blake2b(digest_size=6).copy  # a copy costs half of what a new one does
_base64_of = binascii.b2a_base64


def token_of(transition_id: str) -> str:
    """The ring's token of a transition id: 48 bits of its BLAKE2b hash as 8 base64 characters."""
    hashed = _begin_hash()
    hashed.update(transition_id.encode())
    return _base64_of(hashed.digest(), newline=False).decode()


_forks = 0


def _count_fork() -> None:
    global _forks
    _forks += 1


os.register_at_fork(after_in_child=_count_fork)


class TransitionIds:
    """Makes transition ids that no other process makes: 72 random bits for the process, then a counter.

    A forked child takes a prefix of its own. (Not known by its pid: asking for that is a system call for every id.) A prefix
    and its counter are one value, set and read at once: threads that make their first ids at the same time may each make a
    pair, but none uses the prefix of one with the counter of another.
    """

    def __init__(self) -> None:
        self._made = -1, "", itertools.count()

    def next(self) -> str:
        forks, prefix, counter = self._made
        if forks != _forks:
            prefix, counter = self._begin()
        return f"{prefix}{next(counter):x}"

    def take(self, count: int) -> list[str]:
        """So many of them."""
        forks, prefix, counter = self._made
        if forks != _forks:
            prefix, counter = self._begin()
        return [f"{prefix}{number:x}" for number in itertools.islice(counter, count)]

    def _begin(self) -> tuple[str, itertools.count[int]]:
        prefix, counter = base64.urlsafe_b64encode(os.urandom(9)).decode(), itertools.count()
        self._made = _forks, prefix, counter
        return prefix, counter


def _check_value(field: str, value: object, depth: int) -> None:
    kind = type(value)
    if kind is str:
        if not value.isascii():  # type: ignore[attr-defined]
            _check_string(field, value)  # type: ignore[arg-type]
        elif "\0" in value:  # type: ignore[operator]
            raise errors.InvalidDataError(f"field {field!r}: {_shown(value)} is refused: it holds a NUL character")
    elif kind is bool or value is None:
        return
    elif isinstance(value, int):
        if not _INTEGER_MIN <= value <= _INTEGER_MAX:
            raise errors.InvalidDataError(
                f"field {field!r}: {_shown(value)} is refused: integers are limited to 64 bit"
            )
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise errors.InvalidDataError(f"field {field!r}: {value!r} is refused: JSON knows no NaN and no infinity")
    elif isinstance(value, str):
        _check_string(field, value)
    elif depth >= _DEPTH_MAX:
        raise errors.InvalidDataError(f"field {field!r} is refused: nested deeper than {_DEPTH_MAX} levels")
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check_value(field, item, depth + 1)
    elif isinstance(value, dict):
        for name, item in value.items():
            if not isinstance(name, str):
                raise errors.InvalidDataError(
                    f"field {field!r}: the key {_shown(name)} is refused: JSON object keys are text"
                )
            _check_string(field, name)
            _check_value(field, item, depth + 1)
    else:
        raise errors.InvalidDataError(
            f"field {field!r}: {_shown(value)} is refused: {type(value).__name__} is no JSON value "
            "(text, number, true, false, null, list, object)"
        )


def _check_string(field: str, value: str) -> None:
    if "\0" in value:
        raise errors.InvalidDataError(f"field {field!r}: {_shown(value)} is refused: it holds a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise errors.InvalidDataError(
            f"field {field!r}: {_shown(value)} is refused: it holds half of a surrogate pair, which is no character"
        ) from None


def _plain(value: object) -> object:
    """A text or number of a class of its own (``numpy.float64``, ``markupsafe.Markup``) as what it is."""
    if isinstance(value, str):
        return str.__str__(value)
    return int.__index__(value) if isinstance(value, int) else float.__float__(value)  # type: ignore[arg-type]


# Ten times as fast as the standard library's; what is no JSON value was refused before.
_encode_json = msgspec.json.Encoder(enc_hook=_plain).encode


def encode_value(field: str, value: object) -> str:
    """Return the JSON text of a field's value, or raise ``InvalidDataError``."""
    _check_value(field, value, 0)
    return _encode_json(value).decode()


def check_field_name(name: object) -> str:
    name = plain_text(name)
    if not isinstance(name, str) or not FIELD_NAME.fullmatch(name):
        raise errors.InvalidDataError(
            f"field name {_shown(name)} is refused: a letter or '_', then at most 63 letters, digits, '_', '.' or '-'"
        )
    return name


Encoded = tuple[tuple[str, ...], list[str], str]
"""The names of a patch's fields, their JSON texts, and the JSON object text of the whole."""


def encode_patch(data: Mapping[str, Any], limits: Limits) -> Encoded:
    """Return a patch as it is sent.

    Raises ``InvalidDataError`` for a name, value or size that is refused.
    """
    if type(data) is dict and 0 < len(data) <= limits.patch_fields_max:
        encoded = _encode_plain_patch(data, limits)
        if encoded is not None:
            return encoded
    if not isinstance(data, Mapping):
        raise errors.InvalidDataError(f"data {_shown(data)} is refused: it must map field names to values")
    if len(data) > limits.patch_fields_max:
        raise errors.InvalidDataError(
            f"data is refused: it has {len(data)} fields, at most {limits.patch_fields_max} are allowed in a patch"
        )
    names: list[str] = []
    texts: list[str] = []
    size = 1  # of the object's text: two braces, and for each field two quotes, a colon, and a comma but for the last
    for given, value in data.items():
        name = _seen_names.get(given) or _remembered(check_field_name(given))
        text = encode_value(name, value)
        size += 4 + len(name) + (len(text) if text.isascii() else len(text.encode()))
        names.append(name)
        texts.append(text)
    if len(set(names)) < len(names):  # names that are equal as texts, of classes whose hashes differ
        raise errors.InvalidDataError(f"data {_shown(data)} is refused: it has a field twice")
    if size > limits.patch_bytes_max:
        raise errors.InvalidDataError(
            f"data is refused: it takes {size} bytes, at most {limits.patch_bytes_max} are allowed in a patch; "
            "keep large documents elsewhere and store their address here"
        )
    return tuple(names), texts, patch_text(names, texts)


_PLAIN = frozenset({str, bool, int, float, type(None)})
_NUMBERS = frozenset({int, float})
_PLAIN_NUMBER_MAX = 9e18
# A JSON text holds no line break. Given a list: msgspec 0.22 loses an iterator (86 bytes for ever) with any other iterable.
_encode_lines = msgspec.json.Encoder().encode_lines
_chained = itertools.chain.from_iterable


def _encode_plain_patch(data: dict[str, Any], limits: Limits) -> Encoded | None:
    """The same for what most patches are: known names and plain values, in one call instead of two for each field. None
    leaves it to the thorough form, which finds what is wrong, if anything is."""
    names = _names_of(tuple(data))
    if names is None:
        return None
    values: list[Any] = list(data.values())
    for value in values:
        kind = type(value)
        if kind is str:
            continue
        if kind is float or kind is int:
            if not -_PLAIN_NUMBER_MAX < value < _PLAIN_NUMBER_MAX:  # not for NaN either
                return None
        elif value is not None and kind is not bool:
            return None
    values.append(data)  # the whole is the last line
    try:
        lines = _encode_lines(values)
    except UnicodeEncodeError:  # half of a surrogate pair
        return None
    # Longer than the object alone: what may be too much is measured by the thorough form.
    if len(lines) > limits.patch_bytes_max:
        return None
    together = lines.decode()
    # One character is looked for many times as fast as six, and is rare.
    if "\\" in together and "\\u0000" in together:
        return None
    texts = together.split("\n")
    texts.pop()  # empty: a line break ends the last one
    text = texts.pop()
    return names, texts, text


def encode_patches(patches: Sequence[object], limits: Limits) -> list[Encoded | None]:
    """The same for many patches, in a few calls for all of them; None for each that is empty or no plain dict, and for all
    where one holds what is not plain: ``encode_patch`` does those."""
    encoded: list[Encoded | None] = [None] * len(patches)
    plain: list[dict[str, Any]] = [data for data in patches if type(data) is dict and data]
    if not plain or max(map(len, plain)) > limits.patch_fields_max:
        return encoded
    shapes = list(map(tuple, plain))
    values = list(_chained(map(dict.values, plain)))
    kinds = set(map(type, values))
    names_of: dict[tuple[str, ...], tuple[str, ...]] = {}
    for shape in set(shapes):
        names = _names_of(shape)
        if names is None:
            return encoded
        names_of[shape] = names
    if not _PLAIN.issuperset(kinds):
        return encoded
    if not _NUMBERS.isdisjoint(kinds):
        numbers = [value for value in values if type(value) in _NUMBERS]
        # The sum tells of a NaN, which comparisons may pass over.
        if not (min(numbers) > -_PLAIN_NUMBER_MAX and max(numbers) < _PLAIN_NUMBER_MAX and math.isfinite(sum(numbers))):
            return encoded
    try:
        lines, objects = _encode_lines(values), _encode_lines(plain)
    except UnicodeEncodeError:  # half of a surrogate pair
        return encoded
    if b"\\u0000" in lines:
        return encoded
    if len(objects) > limits.patch_bytes_max and max(map(len, objects.split(b"\n"))) > limits.patch_bytes_max:
        return encoded
    texts = lines.decode().split("\n")
    begin = 0
    each = zip(shapes, objects.decode().split("\n"), strict=False)  # a line break ends the last object
    for index, data in enumerate(patches):
        if type(data) is dict and data:
            shape, text = next(each)
            end = begin + len(shape)
            encoded[index] = names_of[shape], texts[begin:end], text
            begin = end
    return encoded


# Field names recur in every call: those found good are not matched again, and all calls share one text. Bounded, because
# names are input.
_seen_names: dict[str, str] = {}
_seen_shapes: dict[tuple[str, ...], tuple[str, ...]] = {}
"""The same for all names of a patch, in their order."""
_SEEN_MAX = 10_000


def _remembered(name: str) -> str:
    return _seen_names.setdefault(name, name) if len(_seen_names) < _SEEN_MAX else name


def _names_of(shape: tuple[str, ...]) -> tuple[str, ...] | None:
    """The names of a patch as those that were found good, None if any of them was not seen."""
    known = _seen_shapes.get(shape)
    if known is not None:
        return known
    try:
        names = tuple([_seen_names[name] for name in shape])
    except KeyError:
        return None
    return _seen_shapes.setdefault(names, names) if len(_seen_shapes) < _SEEN_MAX else names


def patch_text(names: Sequence[str], texts: Sequence[str]) -> str:
    """The JSON object text of a patch: names need no escaping, texts are JSON already."""
    if not names:
        return ""
    return "{" + ",".join([f'"{name}":{text}' for name, text in zip(names, texts, strict=True)]) + "}"


def encode_increments(increments: Mapping[str, int | float]) -> list[list[str]]:
    """Return ``[[name, delta, kind], ...]`` with kind ``i`` for integers and ``f`` for floats."""
    if not isinstance(increments, Mapping):
        raise errors.InvalidDataError(f"increment {_shown(increments)} is refused: it must map field names to numbers")
    result: list[list[str]] = []
    for given, value in increments.items():
        name = check_field_name(given)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise errors.InvalidDataError(f"increment of {name!r}: {_shown(value)} is refused: it must be a number")
        if isinstance(value, int):
            whole = int.__index__(value)
            if abs(whole) >= 10**15:
                raise errors.InvalidDataError(
                    f"increment of {name!r}: {_shown(whole)} is refused: at most 15 digits are allowed"
                )
            result.append([name, str(whole), "i"])
        else:
            delta = float.__float__(value)
            if not math.isfinite(delta) or abs(delta) >= 1e15:
                raise errors.InvalidDataError(
                    f"increment of {name!r}: {delta!r} is refused: it must be finite and below 1e15"
                )
            result.append([name, repr(delta), "f"])
    return result


def encode_unset(names: Iterable[str]) -> list[str]:
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise errors.InvalidDataError(f"unset {_shown(names)} is refused: give a list of field names")
    return [check_field_name(name) for name in names]
