"""What a chaos client writes down: what it is about to send, then what it was told.

One file per client process, one JSON object a line, each line one ``write`` to the kernel before the client goes on: what
is in the file survives the client's SIGKILL. A call that has no answer in the file may or may not have been applied.
Times are ``time.time()`` in ms: clients, server and checker share one machine and one clock.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec


class Wanted(msgspec.Struct, frozen=True):
    """One transition that a client wants. ``key`` names it for the checker, and travels as the transition's reason.

    A repetition has the key (and the ``transition_id``) of the first attempt.
    """

    key: str
    id: str
    event: str
    transition_id: str | None = None
    expect_version: int | None = None
    data: dict[str, Any] = {}
    counts: bool = False
    """Whether it adds 1 to the field ``count``."""


class Told(msgspec.Struct, frozen=True):
    """What the client was told of one transition.

    ``word``: ``ok`` (a receipt), ``unknown`` (it may have been applied), ``refused`` (it was not), ``lost`` (it was applied,
    and is gone: a recovery has reported it). ``durable``: it was said to be in SQL. ``at_ms`` is the receipt's.
    """

    word: str
    version: int = 0
    state: str = ""
    entry_id: str = ""
    transition_id: str = ""
    at_ms: int = 0
    duplicate: bool = False
    durable: bool = False
    error: str = ""


class Sent(msgspec.Struct, frozen=True, tag="sent"):
    call: int
    at_ms: float
    moves: list[Wanted]


class Answered(msgspec.Struct, frozen=True, tag="answered"):
    call: int
    at_ms: float
    told: list[Told]


class Read(msgspec.Struct, frozen=True, tag="read"):
    """A read that was answered: the version seen, 0 for "not found"."""

    asked_ms: float
    at_ms: float
    id: str
    version: int
    source: str = "hot"


class Note(msgspec.Struct, frozen=True, tag="note"):
    """Something that a client noticed by itself: an answer that can never be right, or an error of a read."""

    at_ms: float
    kind: str
    text: str


Line = Sent | Answered | Read | Note
_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Line)


def now_ms() -> float:
    return round(time.time() * 1000, 3)


class Ledger:
    """The ledger of one client process, open for appending."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._calls = 0

    def sent(self, moves: list[Wanted]) -> int:
        """Note what will be sent now; returns the call's number."""
        self._calls += 1
        self.write(Sent(self._calls, now_ms(), moves))
        return self._calls

    def answered(self, call: int, told: list[Told]) -> None:
        self.write(Answered(call, now_ms(), told))

    def write(self, line: Line) -> None:
        os.write(self._file, _encoder.encode(line) + b"\n")

    def close(self) -> None:
        os.close(self._file)


def read(path: Path) -> Iterator[Line]:
    """The lines of a ledger; a last one without its end (the client was killed while it wrote) is left out."""
    if not path.exists():
        return
    for line in path.read_bytes().split(b"\n")[:-1]:
        yield _decoder.decode(line)
