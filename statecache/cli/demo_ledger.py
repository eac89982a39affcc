"""The demo's writers and its judge: every call that was made, what was answered, and what SQL has in the end."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent import futures
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import pydantic

from statecache.core import entry, errors, keys, model
from statecache.core.machine import State, StateMachine
from statecache.engine.cache import StateCache
from statecache.engine.handle import MachineHandle

WAVE_ORDERS = 250


class Order(StateMachine):
    """The README's machine."""

    placed = State(initial=True)
    paid = State()
    shipped = State()
    delivered = State(final=True)
    cancelled = State(final=True)

    pay = placed.to(paid)
    ship = paid.to(shipped)
    deliver = shipped.to(delivered)
    cancel = placed.to(cancelled) | paid.to(cancelled)

    class Data(pydantic.BaseModel):
        amount: float | None = None


class Call(NamedTuple):
    """One call of a writer: a start (event ``@start``) or a transition, under an id of its own."""

    id: str
    event: str
    data: dict[str, Any]
    transition_id: str

    def sent(self) -> model.Start | model.Move:
        """As the bulk calls take it."""
        if self.event == entry.EVENT_START:
            return model.Start(self.id, self.data, transition_id=self.transition_id)
        return model.Move(self.id, self.event, self.data, actor="demo", transition_id=self.transition_id)


def calls_of(number: int) -> list[Call]:
    """The life of one order; every twentieth is cancelled."""
    id = f"{number:06d}"
    amount = round(5 + number * 7919 % 20_000 / 100, 2)
    steps: list[tuple[str, dict[str, Any]]] = [
        (entry.EVENT_START, {"amount": amount, "customer": f"c{number % 997}"}),
        ("pay", {"method": "card" if number % 3 else "transfer"}),
    ]
    if number % 20 == 0:
        steps.append(("cancel", {"note": "out of stock"}))
    else:
        steps += [("ship", {"parcel": f"P{number:08d}"}), ("deliver", {})]
    return [Call(id, event, data, f"demo-{id}-{event.lstrip('@')}") for event, data in steps]


def send(orders: MachineHandle, calls: Sequence[Call], timeout: float) -> list[model.Receipt | errors.StateCacheError]:
    """Make calls of one kind (all starts, or no start) in one bulk call."""
    things = [call.sent() for call in calls]
    starts = [thing for thing in things if isinstance(thing, model.Start)]
    moves = [thing for thing in things if isinstance(thing, model.Move)]
    return orders.start_many(starts, timeout=timeout) if starts else orders.transition_many(moves, timeout=timeout)


@dataclass
class Ledger:
    """What writers sent, and what they were answered. ``unanswered`` calls may have been applied or not."""

    acknowledged: dict[str, tuple[Call, model.Receipt]] = field(default_factory=dict)
    unanswered: dict[str, Call] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, calls: Sequence[Call], results: Sequence[model.Receipt | errors.StateCacheError]) -> None:
        """Write down the answers to some calls."""
        with self.lock:
            for call, result in zip(calls, results, strict=True):
                self.calls.append(call)
                if isinstance(result, model.Receipt):
                    self.acknowledged[call.transition_id] = (call, result)
                else:
                    self.unanswered[call.transition_id] = call


class Writers:
    """Threads that send waves of orders, each wave step by step, until all are sent or they are stopped.

    A context manager: whatever ends its block stops them.
    """

    def __init__(self, cache: StateCache, ledger: Ledger, writers: int = 2) -> None:
        self._orders = cache.machine(Order)
        self._ledger = ledger
        self._stop = threading.Event()
        self._writers = writers
        self._pool = futures.ThreadPoolExecutor(writers, "writer")
        self._running: list[futures.Future[None]] = []

    def begin(self, numbers: Iterable[int], timeout: float = 20.0) -> None:
        """Send these orders; each thread takes the next wave."""
        waves = _waves(numbers)
        lock = threading.Lock()

        def write() -> None:
            while not self._stop.is_set():
                with lock:
                    wave = next(waves, None)
                if wave is None:
                    return
                self._write(wave, timeout)

        for _ in range(self._writers):
            self._running.append(self._pool.submit(write))

    def _write(self, numbers: Sequence[int], timeout: float) -> None:
        lives = [calls_of(number) for number in numbers]
        for step in range(max(map(len, lives))):
            calls = [life[step] for life in lives if step < len(life)]
            self._ledger.note(calls, send(self._orders, calls, timeout))
            if self._stop.is_set():
                return

    def stop(self) -> None:
        """Let every thread finish the call that it is in."""
        self._stop.set()
        self.join()

    def join(self) -> None:
        futures.wait(
            self._running
        )  # not Thread.join, which forgets a thread at work when Ctrl-C comes in between (bpo-45274)
        for one in self._running:
            one.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self.stop()
        finally:
            self._pool.shutdown(wait=False)

    @property
    def busy(self) -> bool:
        return not all(one.done() for one in self._running)


def _waves(numbers: Iterable[int]) -> Any:
    wave: list[int] = []
    for number in numbers:
        wave.append(number)
        if len(wave) == WAVE_ORDERS:
            yield wave
            wave = []
    if wave:
        yield wave


# --- the judge ---------------------------------------------------------------------------------------------------------


@dataclass
class Verdict:
    """What became of the acknowledged transitions, by comparison with SQL row by row."""

    acknowledged: int
    flushed: int
    survived: int
    different: list[str]
    missing_but_flushed: list[str]
    lost: list[model.Receipt]
    in_flight: int
    unanswered_applied: int
    foreign: list[str]
    gaps: list[str]


def rows_of(cache: StateCache) -> dict[tuple[str, int], model.Transition]:
    """Everything that SQL has, by (id, version)."""
    return {(row.id, row.version): row for row in cache.durable.iterate_transitions(Order.spec.name)}


def judge(
    ledger: Ledger, rows: Mapping[tuple[str, int], model.Transition], watermarks: Mapping[int, entry.EntryId]
) -> Verdict:
    """Compare what was acknowledged with what SQL has; ``watermarks`` are those last committed before the crash."""
    flushed = survived = 0
    different: list[str] = []
    missing: list[str] = []
    lost: list[model.Receipt] = []
    for call, receipt in ledger.acknowledged.values():
        partition = keys.partition_of(receipt.machine, receipt.id, len(watermarks))
        is_flushed = entry.EntryId.parse(receipt.entry_id) <= watermarks[partition]
        flushed += is_flushed
        row = rows.get((receipt.id, receipt.version))
        if row is None:
            lost.append(receipt)
            if is_flushed:
                missing.append(f"{receipt.id} version {receipt.version} ({receipt.entry_id})")
        elif _same(call, receipt, row):
            survived += 1
        else:
            different.append(f"acknowledged {receipt}, in SQL {row}")
    sent = ledger.unanswered.keys() | ledger.acknowledged.keys()
    by_id = {row.transition_id for row in rows.values()}
    foreign = sorted(by_id - sent)
    return Verdict(
        len(ledger.acknowledged), flushed, survived, different, missing, lost,
        len(ledger.unanswered), len(by_id & ledger.unanswered.keys()), foreign, gaps_of(rows),
    )  # fmt: skip


def _same(call: Call, receipt: model.Receipt, row: model.Transition) -> bool:
    said = (receipt.event, receipt.from_state, receipt.state, receipt.transition_id, receipt.entry_id, receipt.at_ms)
    kept = (row.event, row.from_state, row.to_state, row.transition_id, row.entry_id, row.at_ms)
    return said == kept and call.data == row.patch and call.transition_id == row.transition_id


def gaps_of(rows: Mapping[tuple[str, int], model.Transition]) -> list[str]:
    """Instances whose versions are not 1..n, or whose moves do not join."""
    found: list[str] = []
    last: dict[str, tuple[int, str | None]] = {}
    for (id, version), row in sorted(rows.items()):
        before, state = last.get(id, (0, None))
        if version != before + 1 or row.from_state != state:
            found.append(f"{id}: version {version} from {row.from_state!r} follows {before}, {state!r}")
        last[id] = (version, row.to_state)
    return found
