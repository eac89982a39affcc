"""Writer, flusher, Valkey and PostgreSQL at once, each a process, on the same cores, against one commit per transition.

Paced rows offer what the target asks for, and a little more, in multiples of the peer's rate just measured: what counts is what
is in SQL when the writer stops, with a lag that is small and does not grow. The unpaced row leaves the pace to the brake. Then
everything is flushed, and SQL must hold as many transitions as were acknowledged.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil
import psycopg

from benchmarks.flush import committer
from benchmarks.harness import Bench, Cost, Measure, own_at_most, ratio_at_least, row
from benchmarks.servers import NAMESPACE
from benchmarks.workload import Fleet
from statecache.engine import status
from tests.support import waiting

_SAMPLE_SECONDS = 0.5


@row("together.different", "writer + flusher + Valkey + PostgreSQL, every move another instance, paced")
def different(bench: Bench) -> Iterator[Measure]:
    yield from _together(bench, 1, 16.0, ratio_at_least(15))


@row("together.bursts", "writer + flusher + Valkey + PostgreSQL, four moves in a row, paced")
def bursts(bench: Bench) -> Iterator[Measure]:
    yield from _together(bench, 4, 21.0, ratio_at_least(20))


@row("together.unpaced", "writer + flusher + Valkey + PostgreSQL, every move another instance, unpaced")
def unpaced(bench: Bench) -> Iterator[Measure]:
    yield from _together(bench, 1, 0.0, None)


@row("together.two-flushers", "the same with two flusher processes, every move another instance, paced")
def two_flushers(bench: Bench) -> Iterator[Measure]:
    yield from _together(bench, 1, 20.0, ratio_at_least(15), flushers=2)


@row("together.two-flushers-bursts", "the same with two flusher processes, four moves in a row, paced")
def two_flushers_bursts(bench: Bench) -> Iterator[Measure]:
    yield from _together(bench, 4, 26.0, ratio_at_least(20), flushers=2)


@dataclass
class Stretch:
    """What one stretch of writing came to; CPU in seconds."""

    written: int
    seconds: float
    flushed: int
    writer_cpu: float
    flusher_cpu: float
    cost: Cost
    refused: int
    lags: list[float] = field(default_factory=list)

    @property
    def growth(self) -> float:
        """Median lag of the last third less that of the first, in seconds."""
        third = max(1, len(self.lags) // 3)
        return statistics.median(self.lags[-third:]) - statistics.median(self.lags[:third])


def _together(bench: Bench, in_a_row: int, offered: float, target: Any, *, flushers: int = 1) -> Iterator[Measure]:
    count = bench.pick(1000, 50_000, 200_000)
    seconds = bench.pick(1.5, 20.0, 60.0)
    servers = bench.servers
    url = servers.postgres_database()
    fleet = Fleet(servers.cache(url), count)
    fleet.flush()
    peer = committer(bench, "postgresql", count, in_a_row)
    commits, stretches = [], []
    with _processes(bench, url, count, in_a_row, flushers) as (writer, flushing):
        warm = _warmed(fleet, writer)
        for turn in range(bench.rounds(1, 2, 2)):
            bench.progress(f"stretch {turn + 1}: the peer")
            before = _peer(bench, peer)
            bench.progress(f"stretch {turn + 1}: {seconds:g} s")
            stretches.append(_stretch(bench, fleet, writer, flushing, before * offered, seconds))
            commits.append(statistics.mean([before, _peer(bench, peer)]))
    written = sum(one.written for one in stretches)
    _all_there(url, count + warm + written)
    bench.note = (
        f"{count:,} instances, {in_a_row} moves in a row, {flushers} flusher{'s' * (flushers > 1)}, {seconds:g} s a stretch, "
        + (f"offered {offered:g} x the peer's rate" if offered else "as fast as the brake lets")
        + f", {written:,} transitions, all found in SQL after; {sum(one.refused for one in stretches):,} refusals by the brake"
    )
    yield from _measures(stretches, commits, target)


def _measures(stretches: list[Stretch], commits: list[float], target: Any) -> Iterator[Measure]:
    paced = target is not None
    rates = [one.flushed / one.seconds for one in stretches]
    yield Measure("in SQL", "/s", rates, "a commit each", commits, (target,) if paced else ())
    yield Measure("written", "/s", [one.written / one.seconds for one in stretches])
    lag = [statistics.median(one.lags) for one in stretches]
    yield Measure("lag, median", "s", lag, targets=(own_at_most(0.5),) if paced else ())
    longest = [max(one.lags) for one in stretches]
    yield Measure("lag, longest", "s", longest, targets=() if paced else (own_at_most(1.0),))
    yield Measure("lag's growth", "s", [one.growth for one in stretches], targets=(own_at_most(0.25),))
    for name, value in (
        ("writer CPU", lambda one: one.writer_cpu),
        ("flusher CPU", lambda one: one.flusher_cpu),
        ("Valkey CPU", lambda one: one.cost.server),
        ("PostgreSQL CPU", lambda one: one.cost.sql),
    ):
        yield Measure(name, "us/transition", [value(one) / one.written * 1e6 for one in stretches])


def _warmed(fleet: Fleet, writer: subprocess.Popen[str]) -> int:
    """Write a little, and wait until the flusher process, which takes a second to begin, has moved it; how much it was."""
    _tell(writer, "1000 0.5")
    written = int(json.loads(_line(writer))["written"])
    waiting.wait_until(lambda: status.status(fleet.cache).backlog == 0, "the flusher process", 60.0)
    return written


def _stretch(
    bench: Bench,
    fleet: Fleet,
    writer: subprocess.Popen[str],
    flushing: list[psutil.Process],
    rate: float,
    seconds: float,
) -> Stretch:
    """Let the writer write, and look at the lag meanwhile; then wait until all is flushed."""
    lags: list[float] = []
    told: dict[str, float] = {}

    def listen() -> None:
        told.update(json.loads(_line(writer)))

    def work() -> int:
        listener = threading.Thread(target=listen)
        _tell(writer, f"{rate} {seconds}")
        listener.start()
        while listener.is_alive():
            lags.append(status.status(fleet.cache).lag_seconds or 0.0)
            listener.join(_SAMPLE_SECONDS)
        return max(1, int(told.get("written", 0)))

    used = _cpu_seconds(flushing)
    cost = bench.cost(work)
    used = _cpu_seconds(flushing) - used
    if not told:
        raise RuntimeError("the writer process died; its error is above")
    left = status.status(fleet.cache).backlog or 0
    fleet.cache.flush(timeout=600.0)
    written = int(told["written"])
    return Stretch(written, told["seconds"], written - left, told["cpu"], used, cost, int(told["refused"]), lags)


def _peer(bench: Bench, peer: Any) -> float:
    return float(bench.cost(lambda: peer.seconds_of(bench.pick(0.2, 2.0, 5.0))).rate)


def _cpu_seconds(processes: list[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


@contextmanager
def _processes(
    bench: Bench, url: str, count: int, in_a_row: int, flushers: int
) -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """The writer, ready, and the flushers; all ended in the end."""
    where = {
        "STATECACHE_REDIS_URL": bench.servers.valkey.url, "STATECACHE_DATABASE_URL": url, "STATECACHE_NAMESPACE": NAMESPACE,
        "STATECACHE_CALL_TIMEOUT_SECONDS": "30",
    }  # fmt: skip
    env = {**{name: value for name, value in os.environ.items() if not name.startswith("STATECACHE_")}, **where}
    log = (bench.servers.folder / "flusher.log").open("ab")
    flushing = [
        subprocess.Popen([sys.executable, "-m", "statecache", "flusher"], env=env, stdout=log, stderr=log)
        for _ in range(flushers)
    ]
    writer = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.writer", str(count), str(in_a_row)],
        env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        _line(writer)  # "ready"
        if ended := [each.returncode for each in flushing if each.poll() is not None]:
            raise RuntimeError(f"a flusher ended with {ended[0]}")
        yield writer, [psutil.Process(each.pid) for each in flushing]
    finally:
        for process in (writer, *flushing):
            process.terminate()
        for process in (writer, *flushing):
            try:
                process.wait(30.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for stream in (writer.stdin, writer.stdout, log):
            if stream is not None:
                stream.close()


def _tell(writer: subprocess.Popen[str], line: str) -> None:
    assert writer.stdin is not None
    writer.stdin.write(line + "\n")
    writer.stdin.flush()


def _line(writer: subprocess.Popen[str]) -> str:
    assert writer.stdout is not None
    line = writer.stdout.readline()
    if not line:
        raise RuntimeError(f"the writer process ended with {writer.wait()}")
    return line


def _all_there(url: str, expected: int) -> None:
    """SQL holds what was acknowledged, exactly."""
    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection:
        found = connection.execute("SELECT count(*) FROM statecache_transitions").fetchone()
    if found is None or found[0] != expected:
        raise RuntimeError(f"SQL holds {found and found[0]} transitions, {expected} were acknowledged")
