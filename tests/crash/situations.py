"""What a process may find when it is started: the situations of the crash tests, each made by a world that then goes away.

A world has two partitions; ids beginning with ``old`` are in SQL when the situation begins.
"""

from __future__ import annotations

import itertools
from datetime import timedelta
from typing import Any

from statecache import State, StateCache, StateMachine
from statecache.core import keys, model
from tests.support import refusing, worlds


class Timed(StateMachine):
    """Its instances are due at once."""

    waiting = State(initial=True, timeout=timedelta(milliseconds=1), on_timeout="expire")
    expired = State(final=True)

    expire = waiting.to(expired)


class Recorder:
    """A machine's handle that notes every receipt: what was acknowledged."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self.receipts: list[model.Receipt] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)

    def start(self, *arguments: Any, **named: Any) -> model.Receipt:
        self.receipts.append(self._handle.start(*arguments, **named))
        return self.receipts[-1]

    def transition(self, *arguments: Any, **named: Any) -> model.Receipt:
        self.receipts.append(self._handle.transition(*arguments, **named))
        return self.receipts[-1]


class RecordingWorld(worlds.World):
    """A world that remembers what was acknowledged to it."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.orders: Any = Recorder(self.orders)

    @property
    def acknowledged(self) -> list[model.Receipt]:
        receipts: list[model.Receipt] = self.orders.receipts
        return receipts


def some(world: worlds.World, prefix: str, moves: tuple[str, ...] = (), *, each: int = 2) -> list[str]:
    """Start orders in each partition."""
    made = []
    for partition in (0, 1):
        for id in itertools.islice(world.ids(partition, prefix), each):
            made.append(id)
            world.start(id, moves, amount=1)
    return made


def fresh(world: worlds.World) -> None:
    """An empty store that has just been made."""


def mixed_batch(world: worlds.World) -> None:
    """In SQL: some. In the log: starts, moves of both, several of one instance, an entry that SQL refuses, two behind it."""
    old = some(world, "old")
    world.flush()
    some(world, "new", ("pay",), each=1)
    for id in old:
        world.orders.transition(id, "pay", {"method": "card"}, increment={"tries": 1}, unset=["amount"])
    world.orders.transition(old[0], "note", reason=refusing.REASON)
    world.orders.transition(old[0], "note")
    world.orders.transition(old[1], "ship")
    world.orders.transition(old[0], "note")
    refusing.refuse(world.durable)


def timed_out(world: worlds.World) -> None:
    """Instances whose deadline has passed: in SQL, in the log, and one whose hash is gone."""
    some(world, "old")
    timed = world.cache.machine(Timed)
    timed.start_many(["1", "2", "3"])
    world.flush()
    for partition in (0, 1):  # as after a wipe: SQL alone knows of their deadlines
        world.client.delete(world.keyspace.due(partition))
    timed.start_many(["4", "5"])


def with_letters(world: worlds.World) -> None:
    """One instance is parked behind an entry that SQL would take now; another one's very start was refused."""
    mixed_batch(world)
    world.orders.start(world.id(1, "first"), reason=refusing.REASON)
    world.flush()
    refusing.accept(world.durable)


def cold(world: worlds.World) -> None:
    """Everything is in SQL and nothing in Redis but the logs."""
    for id in some(world, "old", ("pay",)):
        world.flush()
        assert world.evict(id) == "OK"


def restarted(world: worlds.World) -> None:
    """To be followed by a restart of the server."""
    some(world, "old", ("pay",))
    world.flush()
    some(world, "unflushed")


def intact(world: worlds.World) -> None:
    """The server was restarted; some of the log is not in SQL."""
    mixed_batch(world)
    world.disown()


def wiped(world: worlds.World) -> None:
    """Everything in Redis is gone: flushed, unflushed and a dead letter's hash."""
    with_letters(world)
    some(world, "unflushed")
    world.wipe()


def seen_but_not_flushed(world: worlds.World) -> None:
    """Write on, and let a flusher take two entries and see the tail: what is behind them is known to have existed."""
    some(world, "seen", ("pay", "ship"))
    world.flusher(batch_entries=2).step()


def tail_lost(world: worlds.World) -> None:
    """Redis comes back older than SQL: moves, starts and a letter are known to SQL alone; some are known to nobody."""
    old = some(world, "old", ("pay",))
    world.flush()
    saved = world.redis_copy()
    for id in old[:2]:
        world.orders.transition(id, "ship")
    some(world, "later")
    world.orders.transition(old[3], "note", reason=refusing.REASON)
    refusing.refuse(world.durable)
    world.flush()
    refusing.accept(world.durable)
    seen_but_not_flushed(world)
    world.redis_back(saved)


def sql_behind(world: worlds.World) -> None:
    """SQL comes back older, and the log does not reach back: one instance goes on in the log, one is cold."""
    old = some(world, "old", ("pay",))
    world.flush()
    saved = world.sql_copy()
    for id in old:
        world.orders.transition(id, "ship", {"carrier": "x"})
    some(world, "later", ("pay",))
    world.flush()
    assert world.evict(old[3]) == "OK"
    world.orders.transition(old[0], "note", {"late": True})
    world.sql_back(saved)


def diverged(world: worlds.World, *, refused: bool = False) -> None:
    """Redis lost its tail, nobody noticed, and the lost ids were given again: two lines of history (H13)."""
    old = some(world, "old", ("pay",))
    world.flush()
    saved = world.redis_copy()
    if refused:
        refusing.refuse(world.durable)
        world.orders.transition(old[0], "note", reason=refusing.REASON)
    for id in old:
        world.orders.transition(id, "ship")
    world.flush()
    if refused:
        refusing.accept(world.durable)
    identity = world.meta()["identity"]
    world.redis_back(saved, detour=True)
    for partition in (0, 1):
        world.client.hset(world.keyspace.meta(partition), "identity", identity)
    for id in old[:3]:
        world.orders.transition(id, "cancel")
    some(world, "fork")


def diverged_apart(world: worlds.World) -> None:
    """The same, and where one of the lost entries is a dead letter another one has its version: it is kept apart."""
    diverged(world, refused=True)


def parked_id(cache: StateCache) -> str:
    """The instance with letters of ``with_letters``."""
    return first_id(cache.hot.keyspace, 0, "old")


def refused_start(cache: StateCache) -> str:
    """The instance of ``with_letters`` that SQL has never taken."""
    return first_id(cache.hot.keyspace, 1, "first")


def first_id(keyspace: keys.Keyspace, partition: int, prefix: str) -> str:
    """The id that ``World.id`` gives."""
    numbered = (f"{prefix}{number}" for number in itertools.count(1))
    return next(id for id in numbered if keyspace.partition_of("order", id) == partition)
