"""Ten worker processes race for claims and timeouts; some are killed, Redis is restarted, then wiped; a checker is the judge.

Each worker claims the next job of a state, moves it one step under its claim, and now and then dawdles past the end of its
claim before it tries. Every transition's reason is the token that it was made under, so history tells who did what under which
claim. The checker finds: two grants that overlap, a transition of a holder that was fenced, a timeout that was missed or fired
twice. It is tested itself, with each kind of damage.
"""

from __future__ import annotations

import itertools
import json
import logging
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from statecache import State, StateCache, StateMachine
from statecache.core import errors, model
from statecache.engine import admission
from tests.support import servers, waiting

WORKERS, JOBS, TTL_MS = 10, 40, 400
EVENTS = ["@start", "begin", "rest", "wake", "finish"]


class Job(StateMachine):
    """``wake`` is a timeout's; the other moves are made by workers that hold a claim."""

    queued = State(initial=True)
    running = State()
    resting = State(timeout=timedelta(milliseconds=100), on_timeout="wake")
    awake = State()
    done = State(final=True)

    begin = queued.to(running)
    rest = running.to(resting)
    wake = resting.to(awake)
    finish = awake.to(done)


STEPS = {"queued": "begin", "running": "rest", "awake": "finish"}


class Grant(NamedTuple):
    """One claim as its worker was told of it."""

    id: str
    token: tuple[int, int]
    worker: str
    expires_ms: int
    released: bool

    @property
    def granted_ms(self) -> int:
        return self.expires_ms - TTL_MS


def findings(grants: Sequence[Grant], histories: dict[str, list[model.Transition]]) -> list[str]:
    """What is wrong; nothing, it is to be hoped."""
    found: list[str] = []
    by_id: dict[str, dict[tuple[int, int], Grant]] = {}
    for grant in grants:
        if grant.token in by_id.setdefault(grant.id, {}):
            found.append(f"{grant.id}: {grant.token} was given twice")
        by_id[grant.id][grant.token] = grant
    for mine in by_id.values():
        found += _overlaps([mine[token] for token in sorted(mine)])
    for id, rows in histories.items():
        events = [row.event for row in rows]
        if events != EVENTS:
            found.append(f"{id}: {events}")
        found += _fenced_moves(id, rows, by_id.get(id, {}))
    return found


def _overlaps(grants: Sequence[Grant]) -> Iterable[str]:
    """A grant before the one before it had ended. A recovery between them may have lost the first: its epoch tells."""
    for one, other in itertools.pairwise(grants):
        if one.token[0] == other.token[0] and not one.released and other.granted_ms < one.expires_ms:
            yield f"{one.id}: {other.token} was given while {one.token} was in force"


def _fenced_moves(id: str, rows: Sequence[model.Transition], grants: dict[tuple[int, int], Grant]) -> Iterable[str]:
    highest = (0, 0)
    for row in rows:
        if row.event not in STEPS.values():
            continue
        token = tuple(map(int, (row.reason or "0-0").split("-")))
        if token < highest:
            yield f"{id}: version {row.version} was made under {token}, after one under {highest}"
        highest = max(highest, token)  # type: ignore[assignment]
        grant = grants.get(token)  # type: ignore[arg-type]
        if grant is not None and row.at_ms >= grant.expires_ms:
            yield f"{id}: version {row.version} was made after the claim {token} had ended"


# --- the checker itself ---------------------------------------------------------------------------------------------------


def _row(version: int, event: str, reason: str | None = None, at_ms: int = 1000) -> model.Transition:
    return model.Transition(
        "job",
        "1",
        version,
        event,
        None,
        "x",
        at_ms,
        f"t{version}",
        None,
        reason,
        None,
        {},
        (),
        {},
        1,
        f"1-{version}",
        True,
    )


def _whole(**changed: model.Transition) -> dict[str, list[model.Transition]]:
    rows = [
        _row(1, "@start"), _row(2, "begin", "1-1"), _row(3, "rest", "1-1"), _row(4, "wake"), _row(5, "finish", "1-2"),
    ]  # fmt: skip
    return {"1": [changed.get(row.event.strip("@"), row) for row in rows]}


GRANTS = [Grant("1", (1, 1), "a", 1400, False), Grant("1", (1, 2), "b", 1800, True)]


def test_the_checker_is_content_with_what_is_right() -> None:
    assert findings(GRANTS, _whole()) == []


@pytest.mark.parametrize(
    ("grants", "histories", "told"),
    [
        ([GRANTS[0], Grant("1", (1, 2), "b", 1799, True)], _whole(), "while"),
        ([*GRANTS, Grant("1", (1, 2), "c", 9000, True)], _whole(), "given twice"),
        (GRANTS, _whole(rest=_row(3, "rest", "1-3")), "after one under"),
        (GRANTS, _whole(begin=_row(2, "begin", "1-1", 1400)), "had ended"),
        (GRANTS, {"1": _whole()["1"][:3]}, "rest"),
        (GRANTS, {"1": [*_whole()["1"], _row(6, "wake")]}, "wake"),
    ],
)
def test_the_checker_finds_each_damage(grants: list[Grant], histories: Any, told: str) -> None:
    found = findings(grants, histories)
    assert len(found) == 1
    assert told in found[0]


# --- a worker ---------------------------------------------------------------------------------------------------------------


def work(redis_url: str, database_url: str, namespace: str, folder: Path, name: str) -> None:
    """Claim, move, release, and look for timeouts, until every job is done."""
    logging.disable(logging.CRITICAL)
    admission.HEARTBEAT_STALE_MS = 400
    chance = random.Random(name)
    ledger = os.open(folder / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def note(*words: Any) -> None:
        os.write(ledger, (json.dumps(words) + "\n").encode())

    with connected(redis_url, database_url, namespace) as cache:
        jobs = cache.machine(Job)
        pause = cache.driver.closing.wait
        while not (folder / "stop").exists():
            try:
                cache.timeouts.run()
                state = chance.choice(list(STEPS))
                claim = jobs.claim_next(state, ttl=TTL_MS / 1000, worker=name)
                if claim is None:
                    pause(0.01)
                    continue
                note("granted", claim.id, claim.order, claim.expires_ms)
                if chance.random() < 0.15:
                    pause(TTL_MS / 1000 * chance.uniform(0.8, 1.5))  # a worker that was away for too long
                claim.transition(STEPS[state], actor=name, reason=claim.token)
                note("releasing", claim.id, claim.order)
                claim.release()
            except errors.FencedError:
                note("fenced")
            except errors.StateCacheError as error:
                note("error", type(error).__name__, str(error))


def connected(*where: str) -> StateCache:
    """Connect, again until Redis is there: a worker may be started in the moment in which it is killed."""
    deadline = time.monotonic() + 60.0
    while True:
        try:
            return StateCache.connect(*where, timeout_sweep_seconds=0.5)
        except (errors.UnavailableError, errors.RecoveringError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)  # in a worker, which has nothing to wait on yet


def start(*arguments: Any) -> Any:
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=work, args=arguments, daemon=True)
    process.start()
    return process


def read(folder: Path) -> tuple[list[Grant], int]:
    """The workers' ledgers: grants, and how often one was told that it was fenced."""
    grants: list[Grant] = []
    fenced = 0
    for path in folder.glob("w*"):
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("]")]
        released = {(line[1], tuple(line[2])) for line in lines if line[0] == "releasing"}
        fenced += sum(line[0] == "fenced" for line in lines)
        for kind, *words in lines:
            if kind == "granted":
                id, token, expires_ms = words
                grants.append(Grant(id, tuple(token), path.name, expires_ms, (id, tuple(token)) in released))
    return grants, fenced


@pytest.mark.slow
@pytest.mark.postgres
def test_ten_workers_race(
    private_redis: servers.ValkeyServer, postgres_url: str, namespace: str, tmp_path: Path
) -> None:
    """P1, P3, P4: claims and timeouts by ten processes. Five of them are killed at any moment and others started; Redis is
    killed and comes back, and later loses everything."""
    chance = random.Random(7)
    where = private_redis.url, postgres_url, namespace, tmp_path
    with StateCache.connect(*where[:3], partition_count=4, flusher=True, timeout_interval_seconds=0.1) as cache:
        jobs = cache.machine(Job)
        assert not any(isinstance(one, Exception) for one in jobs.start_many([str(number) for number in range(JOBS)]))
        cache.flush()
        workers = [start(*where, f"w{number}") for number in range(WORKERS)]
        try:
            for round_ in range(5):
                grants = len(read(tmp_path)[0])
                waiting.wait_until(lambda grants=grants: len(read(tmp_path)[0]) > grants + 8, "work goes on", 90)  # type: ignore[misc]
                victim = chance.randrange(WORKERS)
                os.kill(workers[victim].pid, signal.SIGKILL)
                workers[victim].join()
                workers[victim] = start(*where, f"w{WORKERS + round_}")
                if round_ == 1:
                    private_redis.restart()
                elif round_ == 3:
                    with private_redis.client() as client:
                        client.flushall()
                        client.script_flush("SYNC")
            waiting.wait_until(lambda: jobs.counts().get("done") == JOBS, "all jobs are done", 120, 0.2)
            (tmp_path / "stop").touch()
            for worker in workers:
                worker.join(30)
        finally:
            for worker in workers:
                worker.kill()
        histories = {str(number): jobs.history(str(number)) for number in range(JOBS)}
    grants, fenced = read(tmp_path)
    assert findings(grants, histories) == []
    assert fenced > 0, "nobody was ever fenced: the race was none"
    assert len({grant.worker for grant in grants}) > 2  # who of them gets to work is the machine's choice
