"""Claims: one worker's right to move an instance, for a time. What a call does between its I/O steps.

A claim lies in the instance's hash, so the script that moves the instance checks it in the same step (P1). Its token grows
with each grant of an instance: ``<epoch>-<n>``, where n counts the partition's grants of that epoch and a recovery raises the
epoch; so it does after Redis lost all it had. Claims are no part of history: they say who may go on, not what happened.

What can happen to a claim, and what its holder meets then:

- it expires, by the clock of Redis: the holder's transitions are refused from that moment on (``FencedError``), whether or not
  somebody else has claimed the instance since;
- Redis is lost, or the hash with it: a hydrated instance has no claim; the holder is refused, and whoever claims it next has
  a higher token. A recovery that finds the data intact leaves claims in force: they are checked by their token;
- the reply to a grant is lost: the call is repeated with its nonce and finds its own claim (P4).

Rejected: claims in SQL (a commit for each); a lock beside the instance (nothing could compare it in the step that moves it).
"""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import msgspec

from statecache.core import entry, errors, flows, items, model, wording

TTL_MS_MAX = 366 * 86_400_000
WORKER = re.compile(r"[!-~]{1,32}")
_TOKEN = re.compile(r"\d{1,16}-\d{1,16}")


class Row(NamedTuple):
    """An instance to claim (in ``state``, if that is not empty), or whose claim ``token`` to renew or to end."""

    partition: int
    machine: str
    id: str
    state: str = ""
    token: str = ""


class Ask(msgspec.Struct):
    """What a flow wants of ``claim.lua``. Answered by an ``Answer``. ``repeated``: it may have been done already."""

    rows: Sequence[Row]
    nonce: str
    worker: str
    ttl_ms: int
    one: bool = False
    repeated: bool = False


class Answer(msgspec.Struct, frozen=True):
    """The script's lines, and the server's time."""

    at_ms: int
    lines: list[str]


class Held(msgspec.Struct, frozen=True):
    """A claim as it stands: who may move the instance, until when by the clock of Redis."""

    machine: str
    id: str
    worker: str
    token: str
    expires_ms: int


def parse(machine: str, id: str, text: bytes) -> Held | None:
    """Read the field ``@c``; None for one that statecache did not write."""
    words = text.decode(errors="replace").split(" ")
    return Held(machine, id, words[3], words[0], int(words[1])) if len(words) == 4 and words[1].isdigit() else None


def check_token(token: object) -> str:
    """Return a fencing token. Raises ``InvalidDataError`` for what is none."""
    if not isinstance(token, str) or not _TOKEN.fullmatch(token):
        raise errors.InvalidDataError(
            f"claim {wording.shown(token)} is refused: it is the token of a claim (claim.token), such as '3-17'"
        )
    return str.__str__(token)


def check_worker(worker: object) -> str:
    """Return a worker's name. Raises ``InvalidDataError``."""
    if not isinstance(worker, str) or not WORKER.fullmatch(worker):
        raise errors.InvalidDataError(
            f"worker {wording.shown(worker)} is refused: 1 to 32 visible ASCII characters are allowed, and no blank"
        )
    return str.__str__(worker)


def order(token: str) -> tuple[int, int]:
    """A token as two numbers, by which tokens of one instance compare: for stores that check it too."""
    granted = entry.EntryId.parse(token)
    return granted.epoch, granted.seq


Found = Generator[Any, Any, Held | None]


def single(ask: Ask) -> Generator[Any, Any, Held]:
    """Claim one instance, renew its claim or end it. Raises ``FencedError``, ``NotFoundError``, ``ParkedError``."""
    row = ask.rows[0]
    address = f"{row.machine}:{row.id}"
    attempt = misses = 0
    while True:
        answer: Answer = yield ask
        code, *words = answer.lines[0].split(" ")
        if code == "OK":
            return Held(row.machine, row.id, ask.worker, words[0], int(words[1]))
        if code in items.ADMISSION_CODES:
            yield flows.Admit(code)
        elif code == "MISS" and misses < _ROUNDS:
            misses += 1
            attempt, there = yield from _hydrated(row, words, attempt)
            if not there:
                raise errors.NotFoundError(f"{address} does not exist")
        elif code in ("HELD", "FENCED"):
            raise flows.fenced_error(address, words[0], int(words[1]), claimed=code == "FENCED")
        elif code == "PARKED":
            raise errors.ParkedError(
                f"{address} is parked behind a dead letter: it cannot be moved, so it is not claimed; see "
                f"'statecache dead-letters list {address}'"
            )
        else:
            raise errors.IntegrityError(
                f"{address}: its key in Redis holds something that statecache did not write ({code})"
            )


def first_of(ask: Ask) -> Found:
    """Claim the first of several instances that is in its state and that nobody holds; None if there is none.

    The rows come from SQL, so one that is not hot is brought back and asked for again: in its turn, so that the order holds.
    """
    attempt = misses = 0
    missed: Row | None = None
    while ask.rows:
        answer: Answer = yield ask
        last = len(answer.lines) - 1
        code, *words = answer.lines[last].split(" ")
        refused = next((line for line in answer.lines if line.split(" ")[0] in items.ADMISSION_CODES), None)
        if code == "OK":
            row = ask.rows[last]
            return Held(row.machine, row.id, ask.worker, words[0], int(words[1]))
        if refused is not None:
            yield flows.Admit(refused.split(" ")[0])
            continue
        if code != "MISS":
            return None
        row = ask.rows[last]
        attempt, there = yield from _hydrated(row, words, attempt)
        missed, misses = row, misses + 1 if row is missed else 1
        passed = last if there and misses < _ROUNDS else last + 1
        ask = Ask(ask.rows[passed:], ask.nonce, ask.worker, ask.ttl_ms, one=True)
    return None


_ROUNDS = 8
"""A key that is there but is no instance answers ``MISS`` for ever."""


def _hydrated(row: Row, words: Sequence[str], attempt: int) -> Generator[Any, Any, tuple[int, bool]]:
    """Bring a cold instance back; returns the number of attempts, and whether there is such an instance."""
    cold, evicted_to = words
    if cold == "0":
        return attempt, False
    found: model.Lookup = yield flows.Lookup(row.partition, row.machine, row.id)
    if found.watermark < entry.EntryId.parse(evicted_to):
        return (yield from flows.sql_is_older(f"{row.machine}:{row.id}", attempt)), True
    if found.checkpoint is None:
        if found.letters:
            raise flows.parked_error(f"{row.machine}:{row.id}", found)
        return attempt, False
    code, _ = yield flows.Hydrate(found)
    if code in items.ADMISSION_CODES:
        yield flows.Admit(code)
    elif code == "OOM":
        attempt = yield from flows.no_room(f"{row.machine}:{row.id}", attempt)
    return attempt, True
