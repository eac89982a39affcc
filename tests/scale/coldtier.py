"""More instances than Redis has room for: a mixed load goes on, Redis stays within its bounds, every answer is right.

Real processes: a Valkey with ``maxmemory``, PostgreSQL (or a SQLite file), ``statecache flusher``, which flushes and evicts.
One client starts all instances, then picks among all of them at random (so most are cold), one call at a time and many at once:
reads, transitions, starts, transitions that must be refused. The judge is a pure ledger: what each instance must be after
every acknowledged call. Samples of the server's keys and memory are taken all along.

Nothing is timed by assertion; the figures are printed.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from statecache import StateCache
from statecache.core import errors, model
from tests.support import processes, servers
from tests.support.waiting import wait_until
from tests.support.worlds import Order

PARTITIONS = 16
LIST = 1000
CALL_SECONDS = 60.0
EVENTS = {"placed": "pay", "paid": "ship", "shipped": "deliver"}
TARGETS = {"pay": "paid", "ship": "shipped", "deliver": "delivered"}


class Options(msgspec.Struct, frozen=True):
    """What is run. ``bytes_each`` times ``room`` plus 24 MB (its backlog and buffers) is the server's ``maxmemory``."""

    instances: int = 1_000_000
    room: int = 100_000
    operations: int = 20_000
    sql: str = "postgres"
    server: str = "valkey9"
    seed: str = "1"
    bytes_each: int = 1000


class Figures(msgspec.Struct):
    """What was seen. Wrong answers are listed, the first hundred."""

    wrong: list[str] = []
    instances: int = 0
    calls: dict[str, int] = {}
    cold: int = 0
    hot: int = 0
    keys_max: int = 0
    keys_after: int = 0
    used_max_bytes: int = 0
    max_bytes: int = 0
    fill_seconds: float = 0.0
    load_seconds: float = 0.0
    judge_seconds: float = 0.0
    p50_ms: dict[str, float] = {}
    p99_ms: dict[str, float] = {}
    refused_for_memory: int = 0


class Ledger:
    """What every instance must be: version, state and the last note, by number."""

    def __init__(self) -> None:
        self.kept: dict[str, tuple[int, str, int]] = {}

    def started(self, id: str) -> None:
        self.kept[id] = (1, "placed", 0)

    def moved(self, id: str, event: str, note: int) -> None:
        version, state, _ = self.kept[id]
        self.kept[id] = (version + 1, TARGETS.get(event, state), note)

    def problem(self, id: str, found: object) -> str | None:
        """What is wrong with a snapshot of an instance, if anything."""
        if not isinstance(found, model.Snapshot):
            return f"{id}: {found!r} instead of {self.kept[id]}"
        seen = (found.version, found.state, found.data.get("note", 0))
        return None if seen == self.kept[id] and found.data["customer"] == id else f"{id}: {seen}, not {self.kept[id]}"


class Run:
    """One client at work."""

    def __init__(self, cache: StateCache, options: Options, figures: Figures, say: Callable[[str], None]) -> None:
        self.cache = cache
        self.orders = cache.machine(Order)
        self.options = options
        self.figures = figures
        self.say = say
        self.ledger = Ledger()
        self.random = random.Random(options.seed)
        self.times: dict[str, list[float]] = {}
        self._notes = iter(range(1, sys.maxsize))

    # --- load --------------------------------------------------------------------------------------------------------

    def fill(self) -> None:
        """Start all instances, in lists."""
        for first in range(0, self.options.instances, LIST):
            self._start([f"o{number}" for number in range(first, min(first + LIST, self.options.instances))])
            if first % (100 * LIST) == 0:
                self.say(f"{len(self.ledger.kept):,} started, {self.cache.hot.fill().keys:,} keys in Redis")

    def mixed(self) -> None:
        """So many calls of all kinds, in random order."""
        acts = [
            self._get,
            self._get,
            self._get_many,
            self._move,
            self._move,
            self._move_many,
            self._begin,
            self._refused,
        ]
        for number in range(self.options.operations):
            act = self.random.choice(acts)
            began = time.perf_counter()
            act()
            name = act.__name__.strip("_")
            self.times.setdefault(name, []).append(time.perf_counter() - began)
            if number % 2000 == 0:
                self.say(f"{number:,} calls, {self.cache.hot.fill().keys:,} keys in Redis")

    def judge(self) -> None:
        """Read every instance there is, and compare."""
        ids = list(self.ledger.kept)
        for first in range(0, len(ids), LIST):
            self._compare(ids[first : first + LIST])

    # --- acts --------------------------------------------------------------------------------------------------------

    def _pick(self, count: int = 1) -> list[str]:
        """Some of all instances; at times one stands twice."""
        return [f"o{self.random.randrange(len(self.ledger.kept))}" for _ in range(count)]

    def _get(self) -> None:
        [id] = self._pick()
        self._judged(id, self._answered(lambda: self.orders.get(id, timeout=CALL_SECONDS)))

    def _get_many(self) -> None:
        self._compare(self._pick(100))

    def _compare(self, ids: Sequence[str]) -> None:
        for id, found in zip(ids, self.orders.get_many(ids, timeout=CALL_SECONDS), strict=True):
            self._judged(id, found)

    def _judged(self, id: str, found: object) -> None:
        self._note_wrong(self.ledger.problem(id, found))
        if isinstance(found, model.Snapshot):
            if found.source == "hot":
                self.figures.hot += 1
            else:
                self.figures.cold += 1

    def _move(self) -> None:
        [move] = self._moves(1)
        answered = self._answered(lambda: self.orders.transition(move.id, move.event, move.data, timeout=CALL_SECONDS))
        self._moved([move], [answered])

    def _move_many(self) -> None:
        moves = self._moves(100)
        self._moved(moves, self.orders.transition_many(moves, timeout=CALL_SECONDS))

    def _moves(self, count: int) -> list[model.Move]:
        return [model.Move(id, "note", {"note": next(self._notes)}) for id in self._pick(count)]

    def _moved(self, moves: Sequence[model.Move], answers: Sequence[object]) -> None:
        for move, answer in zip(moves, answers, strict=True):
            version, state, _ = self.ledger.kept[move.id]
            if isinstance(answer, errors.InvalidTransitionError) and state == "delivered":
                continue
            note = (move.data or {})["note"]
            if isinstance(answer, model.Receipt) and answer.version == version + 1 and state != "delivered":
                self.ledger.moved(move.id, move.event, note)
            else:
                self._note_wrong(f"{move.id}: {answer!r} for {move.event} on {self.ledger.kept[move.id]}")

    def _begin(self) -> None:
        """A new one, or one that goes on to its end."""
        if self.random.random() < 0.5:
            self._start([f"o{len(self.ledger.kept)}"])
            return
        [id] = self._pick()
        event = EVENTS.get(self.ledger.kept[id][1])
        if event is not None:
            answer = self._answered(lambda: self.orders.transition(id, event, timeout=CALL_SECONDS))
            if isinstance(answer, model.Receipt) and answer.version == self.ledger.kept[id][0] + 1:
                self.ledger.moved(id, event, self.ledger.kept[id][2])
            else:
                self._note_wrong(f"{id}: {answer!r} for {event} on {self.ledger.kept[id]}")

    def _refused(self) -> None:
        """What must be refused is, of a cold instance too: a second start, one that nobody started."""
        [id] = self._pick()
        answer = self._answered(lambda: self.orders.start(id, timeout=CALL_SECONDS))
        if not isinstance(answer, errors.AlreadyExistsError):
            self._note_wrong(f"{id}: {answer!r} for a second start")
        answer = self._answered(lambda: self.orders.transition("nobody", "pay", timeout=CALL_SECONDS))
        if not isinstance(answer, errors.NotFoundError):
            self._note_wrong(f"nobody: {answer!r}")

    def _start(self, ids: Sequence[str]) -> None:
        """Start them all, again those for which there was no memory (told so: not applied)."""
        while ids:
            starts = [(id, {"customer": id, "amount": 12.5, "currency": "EUR"}) for id in ids]
            answers = self.orders.start_many(starts, timeout=CALL_SECONDS)
            again = []
            for id, answer in zip(ids, answers, strict=True):
                if isinstance(answer, model.Receipt) and answer.version == 1:
                    self.ledger.started(id)
                elif isinstance(answer, errors.BackpressureError):
                    self.figures.refused_for_memory += 1
                    again.append(id)
                else:
                    self._note_wrong(f"{id}: {answer!r} for its start")
            ids = again

    def _answered(self, call: Callable[[], object]) -> object:
        try:
            return call()
        except errors.StateCacheError as error:
            return error

    def _note_wrong(self, text: str | None) -> None:
        if text is not None and len(self.figures.wrong) < 100:
            self.figures.wrong.append(text)


@contextmanager
def stage(options: Options, folder: Path) -> Iterator[tuple[StateCache, Path]]:
    """The servers and a flusher process, which evicts; yields a client."""
    max_bytes = options.room * options.bytes_each + 24 * 2**20
    binary = servers.redis_binary(options.server)
    postgres = servers.PostgresServer() if options.sql == "postgres" else None
    with servers.ValkeyServer(binary, folder / "redis", {"maxmemory": str(max_bytes), "appendonly": "no"}) as redis:
        try:
            url = f"sqlite:///{folder / 'cold.db'}"
            if postgres is not None:
                postgres.__enter__()
                url = postgres.url(postgres.create_database())
            wanted = {"redis_url": redis.url, "database_url": url, "namespace": "cold"}
            with StateCache.connect(**wanted, partition_count=PARTITIONS) as cache:
                cache.machine(Order)
                with _flusher(wanted, options, folder):
                    yield cache, folder
        finally:
            if postgres is not None:
                postgres.__exit__(None, None, None)


@contextmanager
def _flusher(wanted: dict[str, str], options: Options, folder: Path) -> Iterator[None]:
    own = {f"STATECACHE_{name.upper()}": text for name, text in wanted.items()}
    own |= {"STATECACHE_HOT_INSTANCES_MAX": str(options.room), "STATECACHE_EVICTION_INTERVAL_SECONDS": "0.1"}
    process = processes.Process(
        [sys.executable, "-m", "statecache", "flusher"], folder / "flusher.log", env={**os.environ, **own}
    )
    try:
        yield
        assert process.alive, (folder / "flusher.log").read_text()
    finally:
        process.end(signal.SIGTERM, signal.SIGKILL)


@contextmanager
def sampled(cache: StateCache, figures: Figures) -> Iterator[None]:
    """Look at the server's keys and memory twenty times a second."""
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(0.05):
            fill = cache.hot.fill()
            figures.keys_max = max(figures.keys_max, fill.keys)
            figures.used_max_bytes = max(figures.used_max_bytes, fill.used_bytes)
            figures.max_bytes = fill.max_bytes

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def run(options: Options, folder: Path, say: Callable[[str], None] = lambda text: None) -> Figures:
    """Play it; the figures tell what was wrong."""
    figures = Figures()
    with stage(options, folder) as (cache, _), sampled(cache, figures):
        load = Run(cache, options, figures, say)
        figures.fill_seconds = _timed(load.fill)
        say(f"filled in {figures.fill_seconds:.0f} s")
        figures.load_seconds = _timed(load.mixed)
        within = options.room + 2 * PARTITIONS
        wait_until(lambda: cache.hot.fill().keys <= within, "Redis is within its bound", 120.0, 0.05)
        figures.keys_after = cache.hot.fill().keys
        figures.judge_seconds = _timed(load.judge)
        figures.instances = len(load.ledger.kept)
        for name, times in load.times.items():
            ordered = sorted(times)
            figures.calls[name] = len(times)
            figures.p50_ms[name] = round(1000 * ordered[len(times) // 2], 2)
            figures.p99_ms[name] = round(1000 * ordered[len(times) * 99 // 100], 2)
    return figures


def _timed(work: Callable[[], Any]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began
