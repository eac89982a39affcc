"""Packing of commands into the bytes that go over the wire (RESP arrays of bulk strings), and of values for the scripts."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

STREAM_VALUES_MAX = 4000
"""A script unpacks a stream onto Lua's stack, which holds 8,000."""


def bulk(value: str | bytes | int) -> bytes:
    """One argument: ``$<length>\\r\\n<bytes>\\r\\n``."""
    data = value if isinstance(value, bytes) else str(value).encode()
    return b"$%d\r\n%b\r\n" % (len(data), data)


def command(*arguments: str | bytes | int) -> bytes:
    """A whole command."""
    return b"*%d\r\n" % len(arguments) + b"".join([bulk(argument) for argument in arguments])


def stream(values: Sequence[object]) -> bytes:
    """Values in MessagePack one behind the other, without the head of an array; as one array if they are too many."""
    packed = msgspec.msgpack.encode(values)
    if len(values) > STREAM_VALUES_MAX:
        return packed
    return packed[1 if len(values) < 16 else 3 :]
