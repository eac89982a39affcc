"""The states of the model: nested named tuples, hashable, compared by content, never changed in place.

Entry ids are pairs (epoch, seq), so they are ordered as the protocol orders them. A stamp is a pair (epoch, owner): owners
are small numbers, given out as recoveries take an epoch. Instances are numbers 0, 1, printed as x, y. A transition is known
by its id, one letter; an instance's data is the tuple of the ids of its transitions (its *chain*), so "data equals folded
history" is a comparison of tuples, and a fork is two chains that part.

``Ghost`` is what no process knows: what was ever acknowledged, and whether Redis still holds what it held.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeVar

Id = tuple[int, int]
Stamp = tuple[int, int]
Chain = tuple[str, ...]

ZERO: Id = (0, 0)
NOBODY: Stamp = (0, 0)
MARK = 9
"""The ``inst`` of an epoch mark."""
UNKNOWN = "?"
"""Stands in a chain for a transition whose content is known to nobody any more."""
RECONCILED = "@reconciled"

Item = TypeVar("Item")


# --- Redis ---------------------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A record of the log; a mark has ``inst`` MARK, ``prev`` and ``owner``."""

    id: Id
    inst: int
    version: int
    tid: str
    prev: Id = ZERO
    owner: int = 0


class Meta(NamedTuple):
    epoch: int
    owner: int
    ready: bool
    identity: int
    watermark: Id
    cold: bool
    evicted_to: Id

    @property
    def stamp(self) -> Stamp:
        return (self.epoch, self.owner)


class Hash(NamedTuple):
    """A hot instance. Its version is the length of its chain."""

    chain: Chain
    entry_id: Id
    ring: Chain
    parked: bool


class Part(NamedTuple):
    """A partition in Redis; ``last`` is the stream's last-generated id, ZERO where there is no stream."""

    meta: Meta | None
    last: Id
    log: tuple[Entry, ...]
    hashes: tuple[Hash | None, ...]


class Redis(NamedTuple):
    """The server. ``cache`` holds the stamps whose scripts are loaded; ``identity`` is what its INFO says."""

    identity: int
    cache: frozenset[Stamp]
    parts: tuple[Part, ...]


# --- SQL -----------------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A row of history; a reconciled one stands for versions ``covers_from`` to ``version``."""

    version: int
    tid: str
    covers_from: int


class Letter(NamedTuple):
    """An open letter: ``refused`` by SQL, ``waiting`` behind one, ``diverged``, or ``incomplete`` (a hole nobody can fill)."""

    version: int
    id: Id
    tid: str
    kind: str


class Saved(NamedTuple):
    """What SQL knows of an instance: history, the checkpoint (its chain, ring and entry id) and open letters.

    ``discarded`` are the tombstones of letters that were discarded.
    """

    history: tuple[Row, ...]
    chain: Chain
    ring: Chain
    entry_id: Id
    letters: tuple[Letter, ...]
    discarded: tuple[Letter, ...] = ()

    @property
    def version(self) -> int:
        return len(self.chain)

    def knows(self, version: int, tid: str) -> bool:
        """Is this transition in history, named by a reconciled range, a letter or the tombstone of one?"""
        return any(
            (row.version == version and row.tid == tid)
            or (row.tid == RECONCILED and row.covers_from <= version <= row.version)
            for row in self.history
        ) or any(
            (letter.version, letter.tid) == (version, tid)
            or (letter.kind == "incomplete" and version <= letter.version)
            for letter in self.letters + self.discarded
        )


class SqlPart(NamedTuple):
    epoch: int
    owner: int
    watermark: Id
    tail: Id

    @property
    def stamp(self) -> Stamp:
        return (self.epoch, self.owner)


class Sql(NamedTuple):
    """The database. ``lost`` is the sum of ``lost_at_least`` over its reports; ``taker`` (ghost) is who took the epoch last."""

    epoch: int
    owner: int
    taker: int
    parts: tuple[SqlPart, ...]
    saved: tuple[Saved, ...]
    recoveries: frozenset[Stamp]
    lost: int

    @property
    def stamp(self) -> Stamp:
        return (self.epoch, self.owner)


# --- processes -----------------------------------------------------------------------------------------------------------


class Client(NamedTuple):
    """A client at operation ``at`` of its list. ``due``: its next call must compare the server's identity."""

    pc: str
    at: int
    stamp: Stamp
    due: bool
    retry: bool
    expected: int
    absent: Id
    held: tuple[object, ...]


class Flusher(NamedTuple):
    """``pc`` is idle, loaded, read, open (its transaction holds the partition's row) or committed."""

    pc: str
    part: int
    stamp: Stamp
    watermark: Id
    entries: tuple[Entry, ...]
    tail: Id
    parked: tuple[int, ...]
    folds: tuple[tuple[int, Chain], ...]


class Evictor(NamedTuple):
    pc: str
    inst: int
    stamp: Stamp
    version: int
    watermark: Id


class Operator(NamedTuple):
    """Mends dead letters: list, park, move (one SQL transaction), drop."""

    pc: str
    inst: int
    stamp: Stamp
    discard: bool
    entry_id: Id
    left: int


class Look(NamedTuple):
    """What a recovery has found in a partition. ``losses`` is ghost: how often Redis had lost data when it was fenced."""

    watermark: Id
    identity: int
    existed: bool
    recorded: int
    found: Stamp
    losses: int
    kind: str
    last: Id
    drop: tuple[int, ...]
    view: Part | None
    lost: int
    possible: bool


class Recoverer(NamedTuple):
    """One recovery; ``who`` is ghost (1, 2, ... in the order of taking), ``restores`` too."""

    pc: str
    who: int
    stamp: Stamp
    old: Stamp
    part: int
    looks: tuple[Look, ...]
    restores: int


class Budget(NamedTuple):
    """How many of each fault may still happen."""

    save: int = 0
    restart: int = 0
    wipe: int = 0
    flushall: int = 0
    detour: int = 0
    migrate: int = 0
    back: int = 0
    backup: int = 0
    restore: int = 0
    lost_reply: int = 0
    kill: int = 0


class Ghost(NamedTuple):
    """``applied``: (inst, version, tid) of every accepted write that is not excused by a report. ``untrue``: per partition,
    Redis has lost something since the fence of the recovery that opened it. ``restored``: SQL went back since then."""

    applied: frozenset[tuple[int, int, str]]
    excused: int
    untrue: tuple[bool, ...]
    restored: tuple[bool, ...]
    losses: int
    restores: int
    takes: int
    flaw: tuple[str, str] = ("", "")


class State(NamedTuple):
    redis: Redis
    sql: Sql
    disk: tuple[Part, ...] | None
    backup: Sql | None
    clients: tuple[Client, ...]
    flushers: tuple[Flusher, ...]
    evictors: tuple[Evictor, ...]
    operator: Operator
    recoverers: tuple[Recoverer, ...]
    budget: Budget
    ghost: Ghost


Step = tuple[str, State]
Steps = Iterator[Step]

IDLE_FLUSHER = Flusher("idle", 0, NOBODY, ZERO, (), ZERO, (), ())
IDLE_EVICTOR = Evictor("idle", 0, NOBODY, 0, ZERO)
UNSEEN = Look(ZERO, 0, False, 0, NOBODY, 0, "", ZERO, (), None, 0, False)
UNUSED_RECOVERER = Recoverer("unused", 0, NOBODY, NOBODY, 0, (), 0)


class Violation(Exception):  # noqa: N818 - a finding, not an error of the model
    """A promise is broken by the step that was being taken."""

    def __init__(self, promise: str, text: str) -> None:
        super().__init__(f"{promise}: {text}")
        self.promise = promise
        self.text = text


# --- small helpers -------------------------------------------------------------------------------------------------------


def put(items: tuple[Item, ...], index: int, item: Item) -> tuple[Item, ...]:
    """A tuple with one item replaced."""
    return (*items[:index], item, *items[index + 1 :])


def put_part(redis: Redis, p: int, part: Part) -> Redis:
    return redis._replace(parts=put(redis.parts, p, part))


def put_hash(part: Part, inst: int, copy: Hash | None) -> Part:
    return part._replace(hashes=put(part.hashes, inst, copy))


def put_saved(sql: Sql, inst: int, saved: Saved) -> Sql:
    return sql._replace(saved=put(sql.saved, inst, saved))


def put_row(sql: Sql, p: int, row: SqlPart) -> Sql:
    return sql._replace(parts=put(sql.parts, p, row))


def id_text(id: Id) -> str:
    return f"{id[0]}-{id[1]}"


def name(inst: int) -> str:
    return "xyz"[inst]


def chain_text(chain: Chain) -> str:
    return f"v{len(chain)}({','.join(chain)})" if chain else "nothing"


def entry_text(entry: Entry) -> str:
    if entry.inst == MARK:
        return f"{id_text(entry.id)} mark(prev {id_text(entry.prev)})"
    return f"{id_text(entry.id)} {name(entry.inst)} v{entry.version}={entry.tid}"
