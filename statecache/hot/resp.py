"""Packing of commands into the bytes that go over the wire (RESP arrays of bulk strings)."""

from __future__ import annotations


def bulk(value: str | bytes | int) -> bytes:
    """One argument: ``$<length>\\r\\n<bytes>\\r\\n``."""
    data = value if isinstance(value, bytes) else str(value).encode()
    return b"$%d\r\n%b\r\n" % (len(data), data)


def command(*arguments: str | bytes | int) -> bytes:
    """A whole command."""
    return b"*%d\r\n" % len(arguments) + b"".join([bulk(argument) for argument in arguments])
