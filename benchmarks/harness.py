"""What a row is, and how its samples are taken.

A row is one workload: a function that gets a ``Bench`` (servers, sizes) and yields measures. A measure holds the samples of
statecache and of one peer, pair by pair: sides run in turn, in reversed order every other round (A B, B A, ...), because a
shared machine changes its speed within seconds; the ratio is judged as the median of the pairs' ratios, which such a change
hits on both sides. A target is a bound on that ratio or on our own median; one that is missed is printed, never an error.
"""

from __future__ import annotations

import gc
import importlib
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.servers import Servers

SCALES = ("quick", "default", "full")
THEMES = ("machine", "hot", "aio", "threads", "flush", "durable", "together", "history", "memory", "scale", "cold")


@dataclass(frozen=True)
class Target:
    """A bound: ``op`` is ``<=`` or ``>=``, ``of`` what is bounded: the ratio (own / peer) or our own median."""

    op: str
    limit: float
    of: str = "ratio"
    only: str = ""
    """A server flavour, when the bound is meant for that one only."""

    def met_by(self, value: float) -> bool:
        return value <= self.limit if self.op == "<=" else value >= self.limit


def ratio_at_least(limit: float, only: str = "") -> Target:
    return Target(">=", limit, only=only)


def ratio_at_most(limit: float, only: str = "") -> Target:
    return Target("<=", limit, only=only)


def own_at_least(limit: float) -> Target:
    return Target(">=", limit, of="own")


def own_at_most(limit: float) -> Target:
    return Target("<=", limit, of="own")


@dataclass
class Measure:
    """One figure of a row: our samples and, pair by pair, a peer's. ``unit`` is that of the samples."""

    name: str
    unit: str
    own: list[float]
    peer_name: str = ""
    peer: list[float] = field(default_factory=list)
    targets: tuple[Target, ...] = ()

    @property
    def ratios(self) -> list[float]:
        return [
            mine / theirs if theirs else math.inf for mine, theirs in zip(self.own, self.peer, strict=bool(self.peer))
        ]

    def value(self, of: str) -> float:
        """What a target bounds: the median of the ratios, or of our own samples."""
        return statistics.median(self.ratios if of == "ratio" else self.own)


@dataclass
class Row:
    """A workload that can be run. ``note`` is what one must know to read its figures; a row may set it while it runs."""

    name: str
    title: str
    run: Callable[[Bench], Iterator[Measure]]


_rows: list[Row] = []


def row(
    name: str, title: str
) -> Callable[[Callable[[Bench], Iterator[Measure]]], Callable[[Bench], Iterator[Measure]]]:
    """Register a function as a row."""

    def register(run: Callable[[Bench], Iterator[Measure]]) -> Callable[[Bench], Iterator[Measure]]:
        _rows.append(Row(name, title, run))
        return run

    return register


def rows(pattern: str = "") -> list[Row]:
    """All rows, or those whose name holds the pattern (a regular expression), in the order of the themes."""
    for theme in THEMES:
        importlib.import_module(f"benchmarks.{theme}")
    ordered = sorted(_rows, key=lambda one: THEMES.index(one.name.partition(".")[0]))
    return [one for one in ordered if re.search(pattern, one.name)]


@dataclass
class Cost:
    """What a stretch of work took: wall seconds, and CPU seconds of this process, of Valkey and of the database."""

    items: int
    seconds: float
    client: float
    server: float
    sql: float

    @property
    def rate(self) -> float:
        return self.items / self.seconds

    def us(self, what: str) -> float:
        """Microseconds an item of ``seconds``, ``client``, ``server`` or ``sql``."""
        return float(getattr(self, what)) / self.items * 1e6


class Bench:
    """What a row gets: the servers, its sizes, and a place for its note."""

    def __init__(
        self, servers: Servers, scale: str, progress: Callable[[str], None], rounds: int | None = None
    ) -> None:
        self.servers = servers
        self.scale = scale
        self._rounds = rounds
        self.progress = progress
        self.note = ""

    def pick(self, quick: Any, default: Any, full: Any) -> Any:
        """A size by scale."""
        return {"quick": quick, "default": default, "full": full}[self.scale]

    def rounds(self, quick: int = 2, default: int = 7, full: int = 9) -> int:
        """How many pairs to take: what the command line says, else by scale."""
        return self._rounds or int(self.pick(quick, default, full))

    def cost(self, work: Callable[[], int]) -> Cost:
        """Run ``work``, which returns how many items it did, and see what that took."""
        gc.collect()
        server, sql = self.servers.valkey_cpu(), self.servers.postgres_cpu()
        client = time.process_time()
        begun = time.perf_counter()
        items = work()
        seconds = time.perf_counter() - begun
        client = time.process_time() - client
        return Cost(items, seconds, client, self.servers.valkey_cpu() - server, self.servers.postgres_cpu() - sql)

    def in_turn(self, *sides: Callable[[], Any], rounds: int | None = None, warm: bool = True) -> list[list[Any]]:
        """Run the sides in turn for some rounds, reversed every other one; the samples of each side, by round.

        What is there when the rounds begin is kept out of Python's collections, as in a service that calls ``gc.freeze``
        when it has started: else the modules that the peers import decide on everybody's p99.
        """
        count = rounds or self.rounds()
        if warm:
            for side in sides:
                side()
        gc.collect()
        gc.freeze()
        samples: list[list[Any]] = [[] for _ in sides]
        for turn in range(count):
            self.progress(f"round {turn + 1} of {count}")
            order = range(len(sides)) if turn % 2 == 0 else reversed(range(len(sides)))
            for place in order:
                samples[place].append(sides[place]())
        return samples


def percentile(samples: Sequence[float], percent: float) -> float:
    """The smallest sample that at least ``percent`` of all do not exceed."""
    ordered = sorted(samples)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]
