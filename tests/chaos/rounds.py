"""A round of chaos: load and faults, then healing, then the judgement; and what is kept when it fails."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from statecache import StateCache
from statecache.core import errors, keys
from statecache.engine import verify as verification
from tests.chaos import checker, ledger, machine, nemesis
from tests.chaos.checker import Evidence, Report, Row, Violation
from tests.chaos.stage import NAMESPACE, PARTITIONS, Stage

WRITERS, FLUSHERS, READERS = 3, 2, 1
PROBES = 200
"""Ids to find one of each partition among."""
HEAL_SECONDS = 60.0
SELF_HEAL_SECONDS = 12.0
"""How long the store has to come right by itself before the operator recovers it."""


class Options(msgspec.Struct, frozen=True):
    seed: str
    round_seconds: float
    sql: str = "sqlite"
    server: str = "valkey9"
    aof: str = "everysec"
    only: str = ""
    client: str = "mixed"


class Result(msgspec.Struct):
    """What one round did and found."""

    number: int
    faults: Counter[str]
    told: Counter[str]
    kinds: Counter[str]
    violations: list[Violation]
    recovered_by_operator: int
    seconds: float
    transitions: int


def play(stage: Stage, options: Options, number: int, say: Callable[[str], None]) -> Result:
    """Play one round and judge it."""
    began, began_ms = time.monotonic(), ledger.now_ms()
    seed = f"{options.seed}/{number}"
    dice = random.Random(f"players of {seed}")
    planned = nemesis.plan(seed, options.round_seconds, sql=options.sql, aof=options.aof, only=options.only)
    stage.begin(number, dice)
    for role, count in (("flusher", FLUSHERS), ("writer", WRITERS), ("reader", READERS), ("recoverer", 1)):
        for number_of in range(count):
            stage.cast(role, f"{role}{number_of}", dice.getrandbits(32))
    stage.wait_for_players()
    faults = nemesis.play(stage, planned, say)
    stage.heal()
    for place in [place for place in stage.players if not place.startswith("flusher")]:
        stage.dismiss(place)
    found, operator = _settled(stage, say)
    for place in list(stage.players):
        stage.dismiss(place)
    with _connected(stage) as cache:
        found += _consistent(cache, stage)
        stage.collect_reports()
        evidence = gather(stage, cache, began_ms)
        found += checker.judge(evidence)
        found += _recovers_to_nothing(cache)
    told: Counter[str] = Counter(checker.summary(evidence))
    told.subtract({"unanswered": PROBES})
    kinds = Counter(report.kind for report in evidence.reports)
    return Result(
        number, faults, told, kinds, found, operator, time.monotonic() - began,
        sum(row.event != "@reconciled" for row in evidence.history),
    )  # fmt: skip


def _connected(stage: Stage) -> StateCache:
    return StateCache.connect(
        redis_url=stage.redis.url, database_url=stage.database.url, namespace=NAMESPACE, partition_count=PARTITIONS,
        call_timeout_seconds=10.0,
    )  # fmt: skip


# --- healing -----------------------------------------------------------------------------------------------------------


def _settled(stage: Stage, say: Callable[[str], None]) -> tuple[list[Violation], int]:
    """Let recovery and flushers finish; returns what did not come right, and how often the operator had to recover."""
    began = time.monotonic()
    operator = 0
    problem = ""
    while time.monotonic() - began < HEAL_SECONDS:
        try:
            with _connected(stage) as cache:
                if time.monotonic() - began > SELF_HEAL_SECONDS * (operator + 1):
                    operator += 1
                    say(f"        the operator recovers: {problem}")
                    cache.recover()
                _use(stage, cache)
                return [], operator
        except errors.StateCacheError as error:
            problem = f"{type(error).__name__}: {error}"
        time.sleep(0.1)
    return [Violation("liveness", "store", f"not well {HEAL_SECONDS} s after every fault ended: {problem}")], operator


def _use(stage: Stage, cache: StateCache) -> None:
    """Start one instance in every partition, durably, and see all that was written before in SQL."""
    tickets = cache.machine(machine.Ticket)
    probes = {keys.partition_of(tickets.name, id, PARTITIONS): id for id in _probe_ids(stage)}
    for id in probes.values():
        tickets.start(id, reason=f"probe-{id}", transition_id=f"probe-{id}", durability="durable")
    cache.flush(timeout=10.0)


def _probe_ids(stage: Stage) -> list[str]:
    return [f"{stage.prefix}probe{number}" for number in range(PROBES)]


# --- the store as it is ------------------------------------------------------------------------------------------------


def _consistent(cache: StateCache, stage: Stage) -> list[Violation]:
    """Hot equals folded history, and the counts are those of the checkpoints."""
    found = [
        Violation("verify", finding.address, f"{finding.kind}: {finding.detail}")
        for finding in verification.verify(cache).findings
    ]
    counted = Counter(row.state for row in cache.durable.iterate_checkpoints(machine="ticket"))
    told = {state: count for state, count in cache.machine(machine.Ticket).counts().items() if count}
    if told != dict(counted):
        found.append(Violation("counts", "ticket", f"counts() tells {told}, the checkpoints are {dict(counted)}"))
    return found


def _recovers_to_nothing(cache: StateCache) -> list[Violation]:
    """A recovery of a store that is well finds nothing, and ``dry_run`` foretells exactly that."""
    foretold = cache.recover(dry_run=True)
    found = cache.recover()
    bad = []
    for dry, real in zip(foretold.partitions, found.partitions, strict=True):
        if dry != real:
            bad.append(Violation("dry run", f"partition {real.partition}", f"foretold {dry}, done {real}"))
        if real.kind != "intact" or real.lost_at_least or real.loss_possible or real.dropped:
            bad.append(Violation("P9", f"partition {real.partition}", f"nothing had happened, reported is {real}"))
    return bad


def gather(stage: Stage, cache: StateCache, since_ms: float) -> Evidence:
    """The evidence of this round: its instances, its clients, its recoveries."""
    lines = {**stage.ledger_lines("writer")}
    attempts = [one for client, found in lines.items() for one in checker.attempts_of(client, found)]
    attempts += _probes(stage)
    notes = [
        (client, line)
        for role in ("writer", "reader", "recoverer", "flusher")
        for client, found in stage.ledger_lines(role).items()
        for line in found
        if isinstance(line, ledger.Note)
    ]
    reads = {
        client: [line for line in found if isinstance(line, ledger.Read)]
        for client, found in stage.ledger_lines("reader").items()
    }
    history = [_row(one) for one in cache.durable.iterate_transitions("ticket") if one.id.startswith(stage.prefix)]
    letters = [
        _letter(letter.entry)
        for parked in cache.durable.parked_instances()
        if parked[1].startswith(stage.prefix)
        for letter in cache.durable.letters(*parked)
    ]
    reports: list[Report] = [one for one in stage.reports.values() if one.ended_ms >= since_ms]
    return Evidence(
        attempts, history, lambda id: keys.partition_of("ticket", id, PARTITIONS), machine.MOVES, reads, notes, letters,
        reports, stage.restores, stage.foreign,
    )  # fmt: skip


def _probes(stage: Stage) -> list[checker.Attempt]:
    return [
        checker.Attempt("probe", 0.0, ledger.Wanted(f"probe-{id}", id, "@start", f"probe-{id}"))
        for id in _probe_ids(stage)
    ]


def _row(one: Any) -> Row:
    return Row(
        one.id, one.version, one.event, one.from_state, one.to_state, one.transition_id, one.entry_id, one.reason or "",
        one.patch, one.increments, one.covers_from, one.complete,
    )  # fmt: skip


def _letter(one: Any) -> Row:
    decode = msgspec.json.decode
    return Row(
        one.id, one.version, one.event, one.from_state or None, one.to_state, one.transition_id, str(one.entry_id),
        one.reason, decode(one.patch) if one.patch else {}, decode(one.increments) if one.increments else {},
    )  # fmt: skip


def keep(stage: Stage, result: Result, options: Options) -> Path:
    """Put the evidence of a failed round together; returns the folder."""
    folder = stage.folder / f"evidence-{result.number}"
    folder.mkdir(exist_ok=True)
    stage.database.save(folder)
    shutil.copytree(stage.ledgers, folder / "ledgers", dirs_exist_ok=True)
    shutil.copytree(stage.redis.data, folder / "redis-data", dirs_exist_ok=True)
    for log in (*stage.folder.glob("*.log"), stage.redis.log):
        shutil.copy(log, folder / log.name)
    findings = {
        "options": msgspec.to_builtins(options),
        "violations": [str(one) for one in result.violations],
        "faults": result.faults,
        "restores": msgspec.to_builtins(stage.restores),
        "reports": msgspec.to_builtins(sorted(stage.reports.values(), key=lambda one: (one.started_ms, one.partition))),
    }
    (folder / "findings.json").write_text(json.dumps(findings, indent=1), encoding="utf-8")
    return folder
