"""What goes over the wire: values for the scripts, one behind the other."""

from __future__ import annotations

import msgspec
import pytest

from statecache.hot import resp


@pytest.mark.parametrize("count", [2, 15, 16, 255, 256, resp.STREAM_VALUES_MAX])
def test_a_stream_is_its_values_without_the_head_of_an_array(count: int) -> None:
    values: list[object] = [number if number % 2 else f"text {number}" for number in range(count)]
    assert resp.stream(values) == b"".join(msgspec.msgpack.encode(value) for value in values)


@pytest.mark.parametrize("count", [resp.STREAM_VALUES_MAX + 1, 70_000])
def test_more_than_a_script_can_unpack_at_once_is_one_array(count: int) -> None:
    assert msgspec.msgpack.decode(resp.stream([1] * count)) == [1] * count
