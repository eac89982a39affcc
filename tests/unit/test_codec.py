"""The door: what is refused, with which words; and the texts that go over it."""

from __future__ import annotations

import datetime
import itertools
import json
import math
import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from statecache.core import codec, errors

LIMITS = codec.Limits()


@pytest.mark.parametrize("id", ["1", "a:b", "{x}", "ü", "日本", "a b", "x" * 200, "*", "'", '"', "\\", "😀"])
def test_ids_that_are_accepted(id: str) -> None:
    assert codec.check_text("id", id, 200) == id


@pytest.mark.parametrize(
    ("id", "rule"),
    [
        ("", "it has 0 characters, 1 to 200 are allowed"),
        ("x" * 201, "it has 201 characters"),
        (5, "it must be text, not int"),
        (None, "it must be text, not NoneType"),
        (b"x", "it must be text, not bytes"),
        ("a\x00", "control character"),
        ("a\n", "control character"),
        ("\x1f", "control character"),
        ("a\x7f", "control character"),
        ("a\x85", "control character"),
        ("a\u2028", "control character"),
        ("a\ud800", "control character"),
    ],
)
def test_ids_that_are_refused(id: object, rule: str) -> None:
    with pytest.raises(errors.InvalidDataError, match=f"^id .* is refused: .*{rule}"):
        codec.check_text("id", id, 200)
    before, mine, behind = codec.check_texts("id", ["1", id, "ü"], 200)
    assert (before, behind) == (None, None)
    assert isinstance(mine, errors.InvalidDataError)
    with pytest.raises(errors.InvalidDataError) as alone:
        codec.check_text("id", id, 200)
    assert str(mine) == str(alone.value)


def test_many_ids_that_are_accepted() -> None:
    for ids in ([], ["1", "a b", "x" * 200], ["1", "日本", "😀"]):
        assert codec.check_texts("id", ids, 200) == [None] * len(ids)


@pytest.mark.parametrize(
    ("value", "rule"),
    [
        (math.nan, "JSON knows no NaN and no infinity"),
        (math.inf, "JSON knows no NaN and no infinity"),
        ("a\0b", "it holds a NUL character"),
        ("ü\0", "it holds a NUL character"),
        ("\ud800", "half of a surrogate pair"),
        (2**63, "integers are limited to 64 bit"),
        (-(2**63) - 1, "integers are limited to 64 bit"),
        (b"x", "bytes is no JSON value"),
        ({1, 2}, "set is no JSON value"),
        (datetime.datetime(2026, 1, 1), "datetime is no JSON value"),
        (object(), "object is no JSON value"),
        ({1: 2}, "JSON object keys are text"),
        ({"a\0": 2}, "NUL character"),
        ([1, [math.nan]], "NaN"),
        ({"a": {"b": "\0"}}, "NUL character"),
    ],
)
def test_values_that_are_refused(value: object, rule: str) -> None:
    with pytest.raises(errors.InvalidDataError, match=f"field 'amount'.* is refused: .*{rule}"):
        codec.encode_value("amount", value)


class Text(str):
    """As markupsafe's Markup is."""


class Number(int):
    """As an enumeration's member may be."""


class Measure(float):
    """As numpy's float64 is."""


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Text("x"), '"x"'), (Number(3), "3"), (Measure(1.5), "1.5"), ([Measure(2), (Text("y"),)], '[2.0,["y"]]'),
        ({Text("k"): Number(1)}, '{"k":1}'),
    ],
)  # fmt: skip
def test_texts_and_numbers_of_classes_of_their_own_are_what_they_are(value: object, text: str) -> None:
    assert codec.encode_value("a", value) == text


def test_value_that_is_too_deep_is_refused() -> None:
    value: Any = 1
    for _ in range(100):
        value = [value]
    with pytest.raises(errors.InvalidDataError, match="nested deeper than 32 levels"):
        codec.encode_value("a", value)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=5), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@given(json_values)
def test_values_survive_their_text(value: Any) -> None:
    """The text is JSON for every reader, holds no control character, and reads back to the same value."""
    text = codec.encode_value("a", value)
    assert json.loads(text) == value
    assert msgspec.json.decode(text) == value
    assert not any(ord(character) < 0x20 for character in text)


@pytest.mark.parametrize("name", ["a", "_", "A.b-c_9", "x" * 64])
def test_field_names_that_are_accepted(name: str) -> None:
    assert codec.encode_patch({name: 1}, LIMITS)[:2] == ((name,), ["1"])


@pytest.mark.parametrize("name", ["", "9a", "a b", "@", "@r", "ü", "x" * 65, "a\n", "a:b", 5, None, "-a"])
def test_field_names_that_are_refused(name: Any) -> None:
    with pytest.raises(errors.InvalidDataError, match=r"field name .* is refused: a letter or '_'"):
        codec.encode_patch({name: 1}, LIMITS)
    with pytest.raises(errors.InvalidDataError, match=r"field name .* is refused"):
        codec.encode_unset([name])
    with pytest.raises(errors.InvalidDataError, match=r"field name .* is refused"):
        codec.encode_increments({name: 1})


def test_patch_has_a_limit_of_fields_and_of_bytes() -> None:
    assert len(codec.encode_patch({f"f{n}": n for n in range(64)}, LIMITS)[0]) == 64
    with pytest.raises(errors.InvalidDataError, match="it has 65 fields, at most 64 are allowed in a patch"):
        codec.encode_patch({f"f{n}": n for n in range(65)}, LIMITS)
    with pytest.raises(errors.InvalidDataError, match="at most 65536 are allowed in a patch"):
        codec.encode_patch({"blob": "x" * 65536}, LIMITS)
    with pytest.raises(errors.InvalidDataError, match="at most 65536"):
        codec.encode_patch({"blob": "ü" * 33_000}, LIMITS)  # bytes, not characters
    assert codec.encode_patch({"blob": "x" * 65_000}, LIMITS)


@pytest.mark.parametrize("data", ["text", 5, [("a", 1)], {"a"}])
def test_patch_that_is_no_mapping_is_refused(data: Any) -> None:
    with pytest.raises(errors.InvalidDataError, match="it must map field names to values"):
        codec.encode_patch(data, LIMITS)


def test_text_of_a_patch_is_a_json_object() -> None:
    names, texts, text = codec.encode_patch({"a": 'x"y', "b": [1, None], "c.d": {"e": 1.5}}, LIMITS)
    assert (
        json.loads(text)
        == json.loads(codec.patch_text(names, texts))
        == {"a": 'x"y', "b": [1, None], "c.d": {"e": 1.5}}
    )
    assert codec.patch_text((), []) == ""


@pytest.mark.parametrize(
    ("delta", "encoded"),
    [
        (1, ["n", "1", "i"]),
        (-5, ["n", "-5", "i"]),
        (0.5, ["n", "0.5", "f"]),
        (10**15 - 1, ["n", "999999999999999", "i"]),
    ],
)
def test_increments_tell_their_kind(delta: float, encoded: list[str]) -> None:
    assert codec.encode_increments({"n": delta}) == [encoded]


@given(st.floats(-1e15, 1e15, exclude_min=True, exclude_max=True))
def test_deltas_survive_their_text(delta: float) -> None:
    ((_, text, _),) = codec.encode_increments({"n": delta})
    assert float(text) == pytest.approx(delta, rel=1e-15, abs=1e-20)


@pytest.mark.parametrize("delta", [True, "1", None, 10**15, -(10**15), math.nan, math.inf, 1e15, [1]])
def test_increments_that_are_refused(delta: Any) -> None:
    with pytest.raises(errors.InvalidDataError, match=r"increment of 'n': .* is refused"):
        codec.encode_increments({"n": delta})


def test_unset_wants_a_list() -> None:
    with pytest.raises(errors.InvalidDataError, match="give a list of field names"):
        codec.encode_unset("note")


def test_tokens_are_eight_characters() -> None:
    tokens = [codec.token_of(str(number)) for number in range(20)]
    assert all(len(token) == 8 and token.isascii() for token in tokens)
    assert len(set(tokens)) == 20


def test_ids_made_here_are_never_made_twice_and_a_forked_child_has_its_own() -> None:
    ids = codec.TransitionIds()
    made = {ids.next() for _ in range(1000)}
    assert len(made) == 1000
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(write, ids.next().encode())
        os._exit(0)
    os.waitpid(pid, 0)
    child = os.read(read, 100).decode()
    os.close(read)
    os.close(write)
    assert child[:12] != ids.next()[:12]
    assert codec.check_text("transition_id", child, 200) == child


def test_threads_that_make_their_first_ids_at_once_make_no_id_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of one's beginning another begins, and makes its first id."""
    ids = codec.TransitionIds()
    real, made = itertools.count, []

    def count() -> Any:
        if not made:
            made.append("")
            made[0] = ids.next()
        return real()

    with monkeypatch.context() as patched:
        patched.setattr(codec.itertools, "count", count)
        made.append(ids.next())
    made += [ids.next(), *ids.take(2)]
    assert len(set(made)) == 5


PLAIN_VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.sampled_from(["", "ü", "\0", "\ud800", '"'])
)


@given(st.dictionaries(st.sampled_from(["a", "b", "c.d", "_e"]), PLAIN_VALUES))
def test_the_short_form_of_a_plain_patch_says_what_the_thorough_one_says(data: dict[str, Any]) -> None:
    codec.encode_patch({"a": 1, "b": 1, "c.d": 1, "_e": 1}, LIMITS)  # the names are known from now on
    assert outcome_of(data) == outcome_of(MappingProxyType(data))


ANY_PATCH = st.one_of(
    st.none(),
    st.just(MappingProxyType({"a": 1})),
    st.dictionaries(
        st.sampled_from(["a", "b", "c.d", "_e"]), PLAIN_VALUES | st.text('aü日😀\n"\\\0\x1f', max_size=9), max_size=4
    ),
)
PLAIN_PATCH = st.dictionaries(
    st.sampled_from(["a", "b", "c.d", "_e"]),
    st.booleans() | st.integers(-(2**62), 2**62) | st.text('aü\n"\\'),
    max_size=4,
)


@given(st.lists(PLAIN_PATCH, max_size=6), st.lists(ANY_PATCH, max_size=3))
def test_patches_encoded_together_are_what_each_is_alone(plain: list[Any], any_: list[Any]) -> None:
    codec.encode_patch({"a": 1, "b": 1, "c.d": 1, "_e": 1}, LIMITS)  # the names are known from now on
    together = codec.encode_patches(plain, LIMITS)
    assert together == [codec.encode_patch(data, LIMITS) if data else None for data in plain]
    mixed = codec.encode_patches([*plain, *any_, {"b": 2.5}], LIMITS)
    for data, encoded in zip([*plain, *any_, {"b": 2.5}], mixed, strict=True):
        assert encoded is None or encoded == outcome_of(data)


def test_patches_are_not_encoded_together_where_one_is_refused() -> None:
    good = {"a": 1}
    codec.encode_patch(good, LIMITS)
    for refused in (math.nan, -math.inf, 2**63, "\0", "\ud800", b"bytes", [1]):
        assert codec.encode_patches([good, {"a": refused}, good], LIMITS) == [None] * 3
        assert codec.encode_patches([{"a": refused}, {"a": 10**18}], LIMITS) == [None] * 2
    assert codec.encode_patches([good, {"9a": 1}], LIMITS) == [None] * 2
    assert codec.encode_patches([good, {f"a{n}": 1 for n in range(65)}], LIMITS) == [None] * 2
    assert codec.encode_patches([good, {"a": "x" * 65_536}], LIMITS) == [None] * 2
    assert (
        codec.encode_patches([{"a": "ü" * 30_000}] * 3, LIMITS) == [codec.encode_patch({"a": "ü" * 30_000}, LIMITS)] * 3
    )


def outcome_of(data: Mapping[str, Any]) -> object:
    try:
        return codec.encode_patch(data, LIMITS)
    except errors.InvalidDataError as error:
        return str(error)


def test_the_short_form_is_left_for_what_it_cannot_judge() -> None:
    codec.encode_patch({"a": 1}, LIMITS)
    assert codec.encode_patch({"a": "\\u0000"}, LIMITS)[1] == ['"\\\\u0000"']
    assert codec.encode_patch({"a": 1e300}, LIMITS)[1] == ["1e300"]
    assert codec.encode_patch({"a": "line\nbreak"}, LIMITS)[1] == ['"line\\nbreak"']
    for refused in (float("nan"), 2**63, 2**64 - 1, "\0", "\ud800", b"bytes"):
        with pytest.raises(errors.InvalidDataError, match="field 'a'"):
            codec.encode_patch({"a": refused}, LIMITS)


@pytest.mark.parametrize("make", [str, lambda text: [text]], ids=["plain", "nested"])
@pytest.mark.parametrize("character", ["x", "\u00e9", "\n"])
@pytest.mark.parametrize("names", [["a"], [f"{number:02d}".rjust(64, "f") for number in range(64)]], ids=["one", "64"])
def test_size_of_a_patch_is_that_of_its_text(make: Any, character: str, names: list[str]) -> None:
    """The limit holds for the very text that is sent, to the byte: alone and in a bulk call."""

    def patch(size: int) -> dict[str, Any]:
        data = dict.fromkeys(names, make(character * (60_000 // len(names) // len(character.encode()) // 2)))
        left = size - len(json.dumps(data, separators=(",", ":"), ensure_ascii=False).encode())
        return data | {
            names[-1]: make(data[names[-1]][0] + "x" * left if make is not str else data[names[-1]] + "x" * left)
        }

    for name in names:
        codec.encode_patch({name: 1}, LIMITS)
    fits, wide = patch(65536), patch(65537)
    text = codec.encode_patch(fits, LIMITS)[2]
    assert len(text.encode()) == 65536
    with pytest.raises(errors.InvalidDataError, match="data is refused: it takes 65537 bytes, at most 65536"):
        codec.encode_patch(wide, LIMITS)
    assert codec.encode_patches([wide], LIMITS) == [None], "left to encode_patch, which refuses it"
    assert codec.encode_patches([fits], LIMITS)[0] in (codec.encode_patch(fits, LIMITS), None)
