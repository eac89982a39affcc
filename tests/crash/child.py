"""A process that works on a store until a failpoint ends it: a real ``StateCache``, a real SIGKILL.

Children are forked from a small server process that has imported everything (``multiprocessing``'s forkserver): 20 ms
instead of a second. What a child was told by the store it writes to its ledger before it goes on: one ``write`` a line,
which survives SIGKILL (the page cache is the kernel's).
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from statecache import StateCache
from statecache.core import errors, failpoints, keys, model
from statecache.durable import engine
from statecache.engine import admission, letters
from tests.crash import situations
from tests.support import worlds

STALE_MS = 400
"""How long a child, and the test, leave a recoverer that gives no sign of life."""
_ATTEMPTS = 50


class Step(NamedTuple):
    """One call of the workload, with the transition id that it has at every repetition."""

    id: str
    event: str
    transition_id: str


def steps(partition_count: int = 2) -> list[Step]:
    """The workload: in each partition one instance that moves often (its ring drops ids), two that run through, and one that
    the situation may have left in SQL."""
    keyspace = keys.Keyspace("any", partition_count)
    events = {
        "often": ["@start", *["note"] * 11, "pay"],
        "through": ["@start", "pay", "ship", "deliver"],
        "second": ["@start", "note", "cancel"],
    }
    return [
        Step(id, event, f"{id}-{number}")
        for prefix, moves in events.items()
        for id in (situations.first_id(keyspace, partition, prefix) for partition in range(partition_count))
        for number, event in enumerate(moves, 1)
    ]


class Ledger:
    """Lines of JSON on disk: what was begun, what was acknowledged, what was acknowledged as durable."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def note(self, kind: str, *words: Any) -> None:
        os.write(self._file, (json.dumps([kind, *words]) + "\n").encode())

    def lines(self, kind: str) -> Iterator[list[Any]]:
        for text in self.path.read_text().splitlines():
            line = json.loads(text)
            if line[0] == kind:
                yield line[1:]

    def close(self) -> None:
        os.close(self._file)


class Task(NamedTuple):
    """What a child is to do, and where it ends."""

    redis_url: str
    database_url: str
    namespace: str
    ledger: Path
    work: str
    failpoint: str
    stop: bool = False
    """``hang`` becomes SIGSTOP: the test may let it go on, as a process that was away for a while."""


def write(cache: StateCache, ledger: Ledger) -> None:
    """Do all steps, flush now and then. What was done by an earlier process is answered with the same receipt (P4)."""
    orders = cache.machine(worlds.Order)
    known = {transition_id: line for transition_id, *line in ledger.lines("ack")}
    for number, step in enumerate(steps(), 1):
        ledger.note("begun", step.transition_id)
        receipt = _patiently(lambda step=step: _send(orders, step))  # type: ignore[misc]
        told = [receipt.version, receipt.state, receipt.entry_id]
        assert known.get(step.transition_id, told) == told, (step, known[step.transition_id], told)
        ledger.note("ack", receipt.transition_id, *told)
        if number % 12 == 0:
            _patiently(cache.flush)
            ledger.note("durable", number)
    old = [row.id for row in cache.durable.iterate_checkpoints(machine="order") if row.id.startswith("old")]
    for id in old:
        with contextlib.suppress(errors.ParkedError):
            receipt = _patiently(
                lambda id=id: orders.transition(id, "note", transition_id=f"{id}-touched")  # type: ignore[misc]
            )
            ledger.note("ack", receipt.transition_id, receipt.version, receipt.state, receipt.entry_id)
    _patiently(cache.flush)


def _send(orders: Any, step: Step) -> model.Receipt:
    receipt: model.Receipt
    if step.event == "@start":
        receipt = orders.start(step.id, transition_id=step.transition_id)
    else:
        receipt = orders.transition(step.id, step.event, transition_id=step.transition_id)
    return receipt


def _patiently(act: Any) -> Any:
    """As callers do: what may or may not have happened is done again, with the same ids."""
    for attempt in range(_ATTEMPTS):
        try:
            return act()
        except (errors.UnavailableError, errors.RecoveringError):
            if attempt == _ATTEMPTS - 1:
                raise
    raise AssertionError


def recover(cache: StateCache, ledger: Ledger) -> None:
    _patiently(cache.recover)


def retry(cache: StateCache, ledger: Ledger) -> None:
    _act(cache, letters.retry, situations.parked_id(cache))


def discard(cache: StateCache, ledger: Ledger) -> None:
    _act(cache, letters.discard, situations.parked_id(cache))


def discard_start(cache: StateCache, ledger: Ledger) -> None:
    _act(cache, letters.discard, situations.refused_start(cache))


def _act(cache: StateCache, act: Any, id: str) -> None:
    try:
        _patiently(lambda: act(cache, "order", id))
    except errors.NotFoundError:  # it was done before an error
        assert cache.durable.letters("order", id) == []


def time_out(cache: StateCache, ledger: Ledger) -> None:
    _patiently(cache.timeouts.run)


WORKS = {
    "write": write, "recover": recover, "retry": retry, "discard": discard, "discard start": discard_start,
    "time out": time_out,
}  # fmt: skip


def run(task: Task) -> None:
    """Be the child."""
    os.environ["STATECACHE_FAILPOINT"] = task.failpoint
    logging.disable(logging.CRITICAL)
    admission.HEARTBEAT_STALE_MS = STALE_MS
    # So that a hanging transaction ends within the test: 15 s otherwise.
    engine._POSTGRESQL_LIMITS = (
        "SET LOCAL lock_timeout = '30s'; SET LOCAL idle_in_transaction_session_timeout = '500ms'"
    )
    ledger = Ledger(task.ledger)
    _announce_hanging(ledger, task.stop)
    with StateCache.connect(
        redis_url=task.redis_url, database_url=task.database_url, namespace=task.namespace, partition_count=2
    ) as cache:
        WORKS[task.work](cache, ledger)
    ledger.note("ended")


def _announce_hanging(ledger: Ledger, stop: bool) -> None:
    """Tell the ledger when the process begins to hang; with ``stop`` let it be SIGSTOPped there instead."""
    pause, visit = signal.pause, failpoints._visit

    def announced() -> None:
        ledger.note("hanging")
        pause()

    def stopped(name: str) -> None:
        assert failpoints._armed is not None
        action, left = failpoints._armed[name]
        if action != "hang" or left != 1:
            visit(name)
            return
        failpoints._armed[name] = (action, 0)
        ledger.note("hanging")
        os.kill(os.getpid(), signal.SIGSTOP)

    signal.pause = announced  # type: ignore[assignment]
    if stop:
        failpoints._visit = stopped


def start(task: Task) -> Any:
    """Start a child; a ``multiprocessing.Process``."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.crash.child"])
    process = context.Process(target=run, args=(task,))
    process.start()
    return process
