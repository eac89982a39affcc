"""What Redis answers, taken apart: replies of the scripts, hashes, records of a log that may be anybody's."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import redis

from statecache.core import entry, errors, items
from statecache.hot import failures


class PartitionReply(msgspec.Struct, frozen=True):
    """What ``read.lua`` said of a partition: its code, the log's last id, and the entries as ``<id>\\x1f<text>`` lines."""

    code: str
    last: entry.EntryId
    lines: list[str]


class Fenced(msgspec.Struct, frozen=True):
    """What a recovery's fence met in a partition. ``existed`` is False where there was no ``meta``."""

    existed: bool
    epoch: int
    owner: str
    watermark: entry.EntryId | None
    cold: str
    evicted_to: entry.EntryId | None
    recorded_identity: str
    identity: str


class Probed(msgspec.Struct, frozen=True):
    """What a partition's log holds: its ends, the entry at SQL's watermark and the one behind it (None if there is none)."""

    first: entry.EntryId | None
    last: entry.EntryId
    length: int
    at_watermark: entry.Entry | None
    behind: entry.Entry | None


class Admission(msgspec.Struct, frozen=True):
    """What ``admit.lua`` said: the server's identity, a code per partition, and whose Redis this is. ``empty``: nobody's."""

    identity: str
    codes: list[str]
    deployment: str
    protocol: str
    partitions: str
    empty: bool = False


class Fill(msgspec.Struct, frozen=True):
    """How full a server is: keys in our database, bytes used of those that it may use (0: it has no limit)."""

    keys: int
    used_bytes: int
    max_bytes: int


class Position(msgspec.Struct, frozen=True):
    """What ``meta`` says about cold instances, read without a script."""

    epoch: int
    owner: str
    status: str
    cold: bool
    evicted_to: entry.EntryId


def hydrated(reply: bytes | redis.ResponseError, count: int) -> list[str]:
    """The codes of one script call; an error reply that is one code for all of them is told as such."""
    if isinstance(reply, redis.ResponseError):
        code = failures.code_of(reply, sent=True)
        if code not in ("NOSCRIPT", "OOM"):
            raise failures.translated(reply, "hydrate")
        return [code] * count
    codes: list[str] = reply.decode(errors="backslashreplace").split("\n")
    return codes


def parse_any(partition: int, line: str) -> entry.Entry:
    """``entry.parse_line`` for a line that may be anybody's: what statecache did not write becomes an ``entry.FOREIGN`` one."""
    try:
        return entry.parse_line(line)
    except errors.IntegrityError:
        id_text, _, text = line.partition(entry.SEPARATOR)
        return entry.foreign(partition, entry.EntryId.parse(id_text), text)


def position_of(found: Sequence[bytes | None]) -> Position | None:
    """The five fields of ``meta``; None where there is none."""
    if found[0] is None:
        return None
    epoch, owner, status, cold, evicted_to = (b"" if part is None else part for part in found)
    evicted = entry.EntryId.parse(evicted_to.decode() or "0-0")
    return Position(int(epoch), owner.decode(), status.decode(), cold != b"0", evicted)


def optional_id(text: str) -> entry.EntryId | None:
    """An entry id, or None for "-"."""
    return None if text == "-" else entry.EntryId.parse(text)


def hash_of(reply: list[bytes] | dict[bytes, bytes] | redis.ResponseError) -> dict[bytes, bytes]:
    """The fields of a hash. A key that holds something else is a hash of no field of ours: only its reader fails."""
    if isinstance(reply, list):
        parts = iter(reply)
        return dict(zip(parts, parts, strict=True))
    if isinstance(reply, dict):  # RESP3, as an emulated server speaks it
        return reply
    if "WRONGTYPE" in str(reply):
        return {b"?": b"WRONGTYPE"}
    raise reply


def outcomes_of(reply: bytes) -> list[items.Outcome]:
    """What ``apply.lua`` said: the time, and a line of words for each item."""
    # A stranger's hash may be anything: its bytes show in the line of its item, and spoil no other's.
    head, *lines = reply.decode(errors="backslashreplace").split("\n")
    at_ms = int(head)
    outcomes = []
    for line in lines:
        words = line.split(" ")
        outcomes.append(items.Outcome(words.pop(0), words, at_ms))
    return outcomes
