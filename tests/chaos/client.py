"""The chaos clients, each a process of its own: ``python -m tests.chaos.client '<JSON>'``.

They use the public surface only (but the evictor: there is no public call that drops one hash), with short timeouts, so that
every fault is felt. Everything random comes from the seed that they are given. SIGTERM ends a client after its current call.
"""

from __future__ import annotations

import asyncio
import logging
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import msgspec

from statecache import Move, StateCache
from statecache.core import errors, keys, model
from tests.chaos import ledger, machine
from tests.chaos.ledger import Told, Wanted
from tests.support import blocking


class Orders(msgspec.Struct, frozen=True):
    """What a client process is told at its start."""

    role: str
    name: str
    seed: int
    redis_url: str
    database_url: str
    namespace: str
    partition_count: int
    ledger: str
    prefix: str
    instances: int = 24
    successor_of: str = ""
    pause_seconds: float = 0.004
    durable_share: float = 0.2
    flush_interval_ms: int = 50
    is_async: bool = False


class Client:
    """What the roles have in common."""

    def __init__(self, orders: Orders, stop: threading.Event) -> None:
        self.orders = orders
        self.stop = stop
        self.random = random.Random(orders.seed)
        self.ledger = ledger.Ledger(Path(orders.ledger))
        self.cache = self._connect(flusher=orders.role == "flusher")
        self.tickets = self.cache.machine(machine.Ticket)

    def _connect(self, *, flusher: bool) -> StateCache:
        """Connect, however long it takes: the nemesis may be at work already."""
        while True:
            try:
                kind: Any = blocking.BlockingCache if self.orders.is_async else StateCache
                cache: StateCache = kind.connect(
                    redis_url=self.orders.redis_url,
                    database_url=self.orders.database_url,
                    namespace=self.orders.namespace,
                    partition_count=self.orders.partition_count,
                    call_timeout_seconds=1.5,
                    socket_timeout_seconds=0.7,
                    flush_interval_ms=self.orders.flush_interval_ms,
                    flusher=flusher,
                )
                return cache
            except (errors.UnavailableError, errors.RecoveringError) as error:
                self.note("connect", error)
                if self.stop.wait(0.05):
                    sys.exit(0)

    def note(self, kind: str, error: object) -> None:
        self.ledger.write(ledger.Note(ledger.now_ms(), kind, f"{type(error).__name__}: {error}"))

    def id(self) -> str:
        """An instance that all clients of the round share; the low numbers are the busy ones."""
        return f"{self.orders.prefix}{int(self.orders.instances * self.random.random() ** 1.5)}"


class Writer(Client):
    """Starts and moves instances, one by one and in bulk, and repeats what it got no answer to."""

    def __init__(self, orders: Orders, stop: threading.Event) -> None:
        super().__init__(orders, stop)
        self.numbers = 0
        self.versions: dict[str, int] = {}
        self.mine: list[Wanted] = []
        self.unanswered: list[Wanted] = []
        if orders.successor_of:
            self.unanswered = left_open(Path(orders.successor_of))

    def run(self) -> None:
        while not self.stop.is_set():
            dice = self.random.random()
            if self.unanswered and dice < 0.3:
                self._again()
            elif dice < 0.72:
                self._one()
            elif dice < 0.92:
                self._bulk()
            elif dice < 0.96:
                self._long_ago()
            else:
                self._starts()
            self.stop.wait(self.orders.pause_seconds * self.random.uniform(0.5, 2.0))

    # --- what it wants -----------------------------------------------------------------------------------------------

    def _wanted(self, event: str, id: str) -> Wanted:
        self.numbers += 1
        key = f"{self.orders.name}.{self.numbers}"
        dice = self.random
        expect = self.versions.get(id) if event != "@start" and dice.random() < 0.15 else None
        return Wanted(
            key,
            id,
            event,
            f"id-{key}" if dice.random() < 0.75 else None,
            expect,
            {"by": key, f"f{dice.randrange(4)}": dice.randrange(1000)} if dice.random() < 0.8 else {},
            event != "@start" and dice.random() < 0.5,
        )

    def _event(self) -> str:
        dice = self.random.random()
        return "close" if dice < 0.004 else "@start" if dice < 0.12 else self.random.choice(machine.EVENTS)

    def _durability(self) -> str:
        return "durable" if self.random.random() < self.orders.durable_share else "hot"

    # --- what it does ------------------------------------------------------------------------------------------------

    def _one(self) -> None:
        self._send([self._wanted(self._event(), self.id())], self._durability())

    def _bulk(self) -> None:
        wanted = [
            self._wanted(self.random.choice(machine.EVENTS), self.id()) for _ in range(self.random.randint(2, 25))
        ]
        self._send(wanted, self._durability(), bulk=True)

    def _starts(self) -> None:
        wanted = [self._wanted("@start", self.id()) for _ in range(self.random.randint(2, 8))]
        self._send(wanted, self._durability(), bulk=True)

    def _again(self) -> None:
        """Repeat something that may have been applied, with the same id."""
        place = self.random.randrange(len(self.unanswered))
        self._send([self.unanswered.pop(place)], self._durability(), again=True)

    def _long_ago(self) -> None:
        """Repeat something that was acknowledged, maybe long after the ring has forgotten it."""
        if self.mine:
            self._send([self.random.choice(self.mine)], "hot", again=True)

    def _send(self, wanted: Sequence[Wanted], durability: str, *, bulk: bool = False, again: bool = False) -> None:
        call = self.ledger.sent(list(wanted))
        if bulk:
            results = self._many(wanted, durability)
        else:
            results = [self._guarded(lambda: self._single(wanted[0], durability))]
        told = [told_of(result, durability) for result in results]
        self.ledger.answered(call, told)
        for one, answer in zip(wanted, told, strict=True):
            if answer.word == "ok":
                self.versions[one.id] = answer.version
                if one.transition_id and not again:
                    self.mine.append(one)
            elif answer.word == "unknown" and one.transition_id and self.random.random() < 0.8:
                self.unanswered.append(one)

    def _single(self, one: Wanted, durability: str, tickets: Any = None) -> Any:
        """The receipt; with the async client's own handle an awaitable of it."""
        tickets = tickets or self.tickets
        common: dict[str, Any] = {
            "actor": self.orders.name, "reason": one.key, "transition_id": one.transition_id, "durability": durability,
            "timeout": self.random.uniform(0.8, 2.5),
        }  # fmt: skip
        if one.event == "@start":
            return tickets.start(one.id, one.data, **common)
        return tickets.transition(
            one.id, one.event, one.data, increment={"count": 1} if one.counts else None, expect_version=one.expect_version,
            **common,
        )  # fmt: skip

    def _at_once(self, wanted: Sequence[Wanted], durability: str) -> list[Any]:
        """The same as single calls of many tasks, which travel together by themselves."""
        cache: Any = self.cache
        handle = cast(Any, self.tickets).inner

        async def calls() -> list[Any]:
            return await asyncio.gather(
                *[self._single(one, durability, handle) for one in wanted], return_exceptions=True
            )

        results: list[Any] = cache.call(calls())
        for one in results:
            if isinstance(one, BaseException) and not isinstance(one, errors.StateCacheError):
                self.note("!contract", one)
        return results

    def _many(self, wanted: Sequence[Wanted], durability: str) -> Sequence[model.Receipt | Exception]:
        if self.orders.is_async and self.random.random() < 0.7:
            return self._at_once(wanted, durability)

        def call() -> Any:
            timeout = self.random.uniform(1.0, 3.0)
            if wanted[0].event == "@start":
                starts = [model.Start(one.id, one.data, self.orders.name, one.key, one.transition_id) for one in wanted]
                return self.tickets.start_many(starts, durability=durability, timeout=timeout)
            moves = [
                Move(
                    one.id, one.event, one.data, increment={"count": 1} if one.counts else None, actor=self.orders.name,
                    reason=one.key, expect_version=one.expect_version, transition_id=one.transition_id,
                )
                for one in wanted
            ]  # fmt: skip
            return self.tickets.transition_many(moves, durability=durability, timeout=timeout)

        results = self._guarded(call)
        return results if isinstance(results, list) else [results] * len(wanted)

    def _guarded(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except errors.StateCacheError as error:
            return error
        except Exception as error:
            logging.exception("an error that is none of ours")
            self.note("!contract", error)
            return errors.UnavailableError(f"foreign: {error!r}")


def told_of(result: model.Receipt | Exception, durability: str) -> Told:
    """The line of the ledger for what a call returned or raised."""
    if isinstance(result, errors.DurabilityTimeout) and result.receipt is not None:
        return msgspec.structs.replace(told_of(result.receipt, "hot"), error="DurabilityTimeout")
    if isinstance(result, model.Receipt):
        return Told(
            "ok", result.version, result.state, result.entry_id, result.transition_id, result.at_ms, result.duplicate,
            durability == "durable",
        )  # fmt: skip
    error = f"{type(result).__name__}: {str(result)[:200]}"
    if isinstance(result, errors.UnavailableError):
        return Told("unknown", error=error)
    if isinstance(result, errors.IntegrityError) and "was acknowledged and is lost" in str(result):
        return Told("lost", error=error)
    if isinstance(result, errors.ParkedError) and "was refused by SQL" in str(result):
        return Told("unknown", error=error)  # it is a letter now: not refused, and not what was wanted
    return Told("refused", error=error)


def left_open(path: Path) -> list[Wanted]:
    """What a killed client had sent and got no answer to, and can be repeated."""
    sent: dict[int, ledger.Sent] = {}
    for line in ledger.read(path):
        if isinstance(line, ledger.Sent):
            sent[line.call] = line
        elif isinstance(line, ledger.Answered):
            sent.pop(line.call, None)
    return [one for line in sent.values() for one in line.moves if one.transition_id]


class Reader(Client):
    """Reads everything in every way, and drops hot copies so that others must bring them back."""

    def run(self) -> None:
        while not self.stop.is_set():
            dice = self.random.random()
            try:
                if dice < 0.45:
                    self._get()
                elif dice < 0.6:
                    self._get_many()
                elif dice < 0.75:
                    self._history()
                elif dice < 0.8:
                    self.tickets.counts()
                    self.tickets.find("busy", limit=5)
                else:
                    self._evict()
            except errors.StateCacheError as error:
                self.note("read failed", error)
            except Exception as error:
                logging.exception("an error that is none of ours")
                self.note("!contract", error)
            self.stop.wait(self.orders.pause_seconds * self.random.uniform(0.5, 3.0))

    def _get(self) -> None:
        id, asked = self.id(), ledger.now_ms()
        try:
            seen = self.tickets.get(id, timeout=1.5)
        except errors.NotFoundError:
            self._saw(asked, id, 0, "nowhere")
        else:
            self._saw(asked, id, seen.version, seen.source)

    def _get_many(self) -> None:
        ids = [self.id() for _ in range(6)]
        asked = ledger.now_ms()
        for id, seen in zip(ids, self.tickets.get_many(ids, timeout=1.5), strict=True):
            if isinstance(seen, errors.NotFoundError):
                self._saw(asked, id, 0, "nowhere")
            elif isinstance(seen, errors.StateCacheError):
                self.note("read failed", seen)
            else:
                self._saw(asked, id, seen.version, seen.source)

    def _history(self) -> None:
        id, asked = self.id(), ledger.now_ms()
        try:
            rows = self.tickets.history(id, timeout=1.5)
        except errors.NotFoundError:
            return
        expected = 1
        for row in rows:
            if (row.covers_from or row.version) != expected:
                text = f"{id}: version {row.version} follows {expected - 1} in {[one.version for one in rows]}"
                self.ledger.write(ledger.Note(asked, "!P3", text))
            expected = row.version + 1

    def _saw(self, asked_ms: float, id: str, version: int, source: str) -> None:
        self.ledger.write(ledger.Read(asked_ms, ledger.now_ms(), id, version, source))

    def _evict(self) -> None:
        """What an evictor does: ask SQL, then drop the hash if it is what SQL has."""
        id = self.id()
        partition = keys.partition_of(self.tickets.name, id, self.orders.partition_count)
        found = self.cache.durable.lookup([(self.tickets.name, id, partition)])[0]
        if found.checkpoint is not None:
            row = (partition, f"{self.tickets.name}:{id}", found.checkpoint.version, str(found.watermark), 0)
            self.cache.hot.evict([row])


class Recoverer(Client):
    """Recovers whenever it is told to by SIGUSR1, needed or not: the nemesis kills or stops it while it does."""

    def __init__(self, orders: Orders, stop: threading.Event) -> None:
        self.wanted = threading.Event()
        signal.signal(signal.SIGUSR1, lambda *_: self.wanted.set())
        super().__init__(orders, stop)

    def run(self) -> None:
        while not self.stop.is_set():
            if not self.wanted.wait(0.05):
                continue
            self.wanted.clear()
            try:
                self.cache.recover()
            except errors.StateCacheError as error:
                self.note("recover", error)


class Flusher(Client):
    """Flushes, by the thread that ``StateCache.connect(flusher=True)`` starts."""

    def run(self) -> None:
        self.stop.wait()


ROLES: dict[str, type[Writer | Reader | Recoverer | Flusher]] = {
    "writer": Writer, "reader": Reader, "recoverer": Recoverer, "flusher": Flusher,
}  # fmt: skip


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.raiseExceptions = False
    orders = msgspec.json.decode(sys.argv[1], type=Orders)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    started = time.monotonic()
    client = ROLES[orders.role](orders, stop)
    logging.info("%s %s began after %.2f s", orders.role, orders.name, time.monotonic() - started)
    client.run()
    client.cache.close()


if __name__ == "__main__":
    main()
