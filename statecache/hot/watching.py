"""What an onlooker reads from Redis: plain reads, few round trips, nothing loaded, nothing admitted, nothing changed.

For the gauges of metrics: they must be right also when this process has no part in anything, so no stamped script is called.
Whether what is read here is true, ``HotStore.admit`` tells (it compares and, told so, loads nothing).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import redis

from statecache.core import entry
from statecache.hot import failures, resp
from statecache.hot.answers import parse_any
from statecache.hot.store import HotStore

_META = ("status", "watermark", "limit")
_PAGE = 2
_STEPS_MAX = 100


class Overview(msgspec.Struct, frozen=True):
    """The server's INFO and clock, and of each partition its watermark as Redis has it (None: there is no ``meta``) and the
    backlog at which writers are slowed down now."""

    facts: Mapping[str, str]
    now_ms: int
    watermarks: Sequence[entry.EntryId | None]
    limits: Sequence[int | None]


class Unflushed(msgspec.Struct, frozen=True):
    """What a partition's log holds behind a watermark: how many entries, and when the oldest of them was acknowledged."""

    entries: int
    oldest_ms: int | None


def overview(hot: HotStore) -> Overview:
    """One round trip. Raises ``UnavailableError``."""
    metas = [resp.command("HMGET", hot.keyspace.meta(p), *_META) for p in range(hot.keyspace.partition_count)]
    info = resp.command("INFO", "server", "memory", "persistence")
    text, (seconds, microseconds), *rows = _replies(hot, [info, resp.command("TIME"), *metas])
    facts = dict(part.split(":", 1) for part in text.decode().split("\r\n") if ":" in part)
    found = [tuple(None if part is None else part.decode() for part in row) for row in rows]
    return Overview(
        facts,
        int(seconds) * 1000 + int(microseconds) // 1000,
        [entry.EntryId.parse(watermark or "0-0") if status else None for status, watermark, _ in found],
        [int(limit) if limit else None for *_, limit in found],
    )


def unflushed(hot: HotStore, cursors: Mapping[int, entry.EntryId]) -> dict[int, Unflushed]:
    """What is behind each partition's watermark. One round trip, and a few more for a partition that crosses an epoch.

    Entries are counted by their numbers, which have no gaps: also those that are missing from the log.
    """
    commands = []
    for partition, cursor in cursors.items():
        log = hot.keyspace.log(partition)
        commands.append(resp.command("XRANGE", log, f"({cursor}", "+", "COUNT", _PAGE))
        commands.append(resp.command("XREVRANGE", log, "+", "-", "COUNT", 1))
    replies = _replies(hot, commands)
    found = {}
    for (partition, cursor), page, last in zip(cursors.items(), replies[::2], replies[1::2], strict=True):
        tail = _records(partition, last)
        count = _between(hot, partition, cursor, tail[0].entry_id) if tail else 0
        found[partition] = Unflushed(count, _oldest_ms(hot, partition, _records(partition, page)) if count else None)
    return found


def _oldest_ms(hot: HotStore, partition: int, page: Sequence[entry.Entry]) -> int | None:
    """The time of the first transition: marks of recoveries and records of strangers have none to lose."""
    for _ in range(_STEPS_MAX):
        for record in page:
            if not record.is_mark and record.machine != entry.FOREIGN:
                return record.at_ms
        if len(page) < _PAGE:
            return None
        log, behind = hot.keyspace.log(partition), f"({page[-1].entry_id}"
        page = _records(partition, _replies(hot, [resp.command("XRANGE", log, behind, "+", "COUNT", _PAGE)])[0])
    return None


def _between(hot: HotStore, partition: int, cursor: entry.EntryId, tail: entry.EntryId) -> int:
    """Transitions above ``cursor`` up to ``tail``, from epoch to epoch by the marks, which name the id before them."""
    count = 0
    for _ in range(_STEPS_MAX):
        if tail.epoch <= cursor.epoch:
            break
        count += tail.seq
        log, mark = hot.keyspace.log(partition), f"{tail.epoch}-0"
        found = _records(partition, _replies(hot, [resp.command("XRANGE", log, mark, mark)])[0])
        if not found or not found[0].is_mark:
            return count
        tail = found[0].prev
    return count + (max(0, tail.seq - cursor.seq) if tail.epoch == cursor.epoch else 0)


def newest_older(hot: HotStore, partition: int, watermark: entry.EntryId, than_ms: int) -> entry.EntryId:
    """The id of the newest entry, up to the watermark and of its epoch, that was written before ``than_ms``; ``ZERO`` if none
    is known. By halving, because times rise with the numbers: 17 round trips for 100,000. Raises ``UnavailableError``."""

    def first_from(seq: int) -> entry.Entry | None:
        begin = f"{watermark.epoch}-{seq}"
        command = resp.command("XRANGE", hot.keyspace.log(partition), begin, str(watermark), "COUNT", 1)
        found = _records(partition, _replies(hot, [command])[0])
        return found[0] if found else None

    first = first_from(0)
    if first is None:
        return entry.ZERO
    newest, low, high = entry.ZERO, first.entry_id.seq, watermark.seq
    while low <= high:
        middle = (low + high) // 2
        record = first_from(middle)
        if record is None or record.machine == entry.FOREIGN or record.at_ms >= than_ms:
            high = middle - 1
        else:
            newest, low = record.entry_id, record.entry_id.seq + 1
    return newest


def sizes(hot: HotStore, addresses: Sequence[tuple[str, str]]) -> list[tuple[int, str]]:
    """The bytes and the encoding of the hash of each that is hot; none where the server does not let us look.

    Raises ``UnavailableError``.
    """
    keyspace = hot.keyspace
    keys = [keyspace.instance(keyspace.partition_of(*one), *one) for one in addresses]
    commands = []
    for key in keys:
        commands += [resp.command("MEMORY", "USAGE", key), resp.command("OBJECT", "ENCODING", key)]
    replies = _replies(hot, commands, refusable=True)
    return [
        (size, encoding.decode())
        for size, encoding in zip(replies[::2], replies[1::2], strict=True)
        if isinstance(size, int) and isinstance(encoding, bytes)
    ]


def _records(partition: int, reply: Sequence[Any]) -> list[entry.Entry]:
    """The entries of an XRANGE reply, those too that statecache did not write."""
    found = []
    for id, fields in reply:
        text = fields[1].decode(errors="replace") if len(fields) == 2 and fields[0] == b"e" else "?"
        found.append(parse_any(partition, f"{id.decode()}{entry.SEPARATOR}{text}"))
    return found


def _replies(hot: HotStore, commands: Sequence[bytes], *, refusable: bool = False) -> list[Any]:
    """A reply for each command. All are read before an error is raised: the wire is used again. ``refusable``: an error reply
    is a reply."""
    try:
        with hot.wires.wire() as line:
            line.send(b"".join(commands))
            replies = line.read_many(len(commands))
        for reply in replies:
            if isinstance(reply, redis.ResponseError) and not refusable:
                raise reply
    except (redis.RedisError, OSError) as error:
        raise failures.translated(error, "metrics") from error
    return replies
