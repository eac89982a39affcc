"""Power loss: what was written and not fsynced is gone, which kill -9 does not show (the page cache survives the process).

The server runs under ``strace``, which notes every write to its append-only file and every fsync of it. It is killed, the
file is cut to the length that it had when the last completed fsync began, and the server is started again: the worst that
the disk was allowed to do.
"""

from __future__ import annotations

import os
import re
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from statecache import Move, StateCache
from statecache.core import errors, model
from statecache.durable import recoveries
from statecache.engine import recovery, verify
from tests.support import programs, servers, waiting, worlds

_CALLS = "write,pwrite64,writev,fsync,fdatasync"
_WRITTEN_LATER_MS = 500
"""A transition bears the time at which the script began; it is written to the file a little later, under strace even more."""
_LINE = re.compile(r"^(?P<pid>\d+) +(?P<time>[\d.]+) (?P<rest>.*)$")
_BEGUN = re.compile(r"^(?P<call>\w+)\(\d+<(?P<path>[^>]*)>")
_RESUMED = re.compile(r"^<\.\.\. (?P<call>\w+) resumed>")
_RESULT = re.compile(r"= (?P<result>-?\d+)(?: .*)?$")


class Durable(NamedTuple):
    """What a power loss leaves of a file: its length, and when the fsync began that covers it (seconds since 1970)."""

    length: int
    since_seconds: float


def durable_part(trace: Path, name: str) -> Durable:
    """Read a trace: the length of the file at the beginning of its last completed fsync."""
    length = 0
    durable = Durable(0, 0.0)
    under_way: dict[str, tuple[str, str, int, float]] = {}
    for line in trace.read_text(errors="replace").splitlines():
        found = _LINE.match(line)
        if found is None:
            continue
        pid, moment, rest = found["pid"], float(found["time"]), found["rest"]
        begun = _BEGUN.match(rest)
        if begun is not None:
            under_way[pid] = (begun["call"], begun["path"], length, moment)
        elif not _RESUMED.match(rest):
            continue
        result = _RESULT.search(rest)
        if result is None or pid not in under_way:
            continue
        call, path, length_before, began = under_way.pop(pid)
        if Path(path).name != name or int(result["result"]) < 0:
            continue
        if "sync" in call:
            durable = max(durable, Durable(length_before, began))
        else:
            length += int(result["result"])
    return durable


def test_trace_is_read(tmp_path: Path) -> None:
    """An fsync covers what was written before it began, and only when it has ended."""
    trace = tmp_path / "trace"
    trace.write_text(
        '7 1.0 write(8</d/a.aof>, "x"..., 100) = 100\n'
        '7 1.1 write(9</d/other>, "x"..., 1000) = 1000\n'
        "8 2.0 fdatasync(8</d/a.aof> <unfinished ...>\n"
        '7 2.1 write(8</d/a.aof>, "x"..., 20) = 20\n'
        "8 2.2 <... fdatasync resumed>) = 0\n"
        '7 2.3 write(8</d/a.aof>, "x"..., 3 <unfinished ...>\n'
        "7 2.4 <... write resumed>) = 3\n"
        "8 3.0 fdatasync(8</d/a.aof> <unfinished ...>\n"
        "7 3.1 +++ killed by SIGKILL +++\n"
    )
    assert durable_part(trace, "a.aof") == Durable(100, 2.0)


class Mains:
    """A server whose power can fail."""

    def __init__(self, server: servers.ValkeyServer, trace: Path, binary: Path) -> None:
        self.server = server
        self._trace = trace
        self._binary = binary

    def fail(self) -> Durable:
        """Cut the power, and switch it on again; returns what the disk kept of the append-only file."""
        self.server.kill()
        waiting.wait_until(lambda: "+++ killed by SIGKILL" in self._trace.read_text(errors="replace"), "strace ends")
        path = self.server.aof_path
        kept = durable_part(self._trace, path.name)
        self.size = path.stat().st_size
        assert kept.length <= self.size
        os.truncate(path, kept.length)
        self.switch_on()
        return kept

    def switch_on(self) -> None:
        """Start the server again, without strace."""
        self.server.binary = self._binary
        self.server.start()


@pytest.fixture
def power(redis_binary: Path, tmp_path: Path) -> Iterator[Callable[[str], Mains]]:
    """``power(appendfsync)`` starts a server under strace, with more options for strace if wanted."""
    strace = programs.path("strace")
    started: list[servers.ValkeyServer] = []

    def start(appendfsync: str, *options: str) -> Mains:
        folder = tmp_path / f"power-{len(started)}"
        folder.mkdir()
        trace, wrapper = folder / "trace", folder / "server"
        # -D: the server keeps the pid that we have started, and the tracer is its grandchild.
        command = f"exec {strace} -D -f --seccomp-bpf -y -ttt -s 0 -e trace={_CALLS} {' '.join(options)} -o {trace}"
        wrapper.write_text(f'#!/bin/sh\n{command} {redis_binary} "$@"\n')
        wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
        server = servers.ValkeyServer(wrapper, folder, {"appendfsync": appendfsync, "auto-aof-rewrite-percentage": "0"})
        started.append(server)
        return Mains(server.start(), trace, redis_binary)

    yield start
    for server in started:
        server.stop()


def connect(mains: Mains, database_url: str) -> StateCache:
    return StateCache.connect(
        redis_url=mains.server.url, database_url=database_url, namespace="power", partition_count=2,
        call_timeout_seconds=30.0, socket_timeout_seconds=10.0,
    )  # fmt: skip


def reports(cache: StateCache) -> list[recovery.PartitionReport]:
    """What the newest recovery said of each partition."""
    row = recoveries.recoveries(cache.durable, 1)[0]
    return list(msgspec.json.decode(row.report, type=recovery.Report).partitions)


@pytest.mark.needs("strace")
def test_fsync_with_always_loses_nothing(power: Callable[[str], Mains], sqlite_url: str) -> None:
    """``appendfsync always``: every transition that was acknowledged at level ``fsync``, singly or in bulk, is there after
    the power failed right after the last acknowledgement; nothing was flushed to SQL."""
    mains = power("always")
    with connect(mains, sqlite_url) as cache:
        orders = cache.machine(worlds.Order)
        ids = [f"o{number}" for number in range(60)]
        told = [orders.start(id, {"n": 1}, durability="fsync") for id in ids[:20]]
        told += _receipts(orders.start_many(ids[20:], durability="fsync"))
        told += _receipts(orders.transition_many([Move(id, "pay") for id in ids], durability="fsync"))
        told.append(orders.transition(ids[0], "ship", durability="fsync"))
        mains.fail()
        assert orders.transition(ids[1], "ship").version == 3
        for receipt in told:
            rows = orders.history(receipt.id)
            assert rows[receipt.version - 1].transition_id == receipt.transition_id
        assert [part.lost_at_least for part in reports(cache)] == [0, 0]
        assert {part.kind for part in reports(cache)} == {recovery.INTACT}
        cache.flush()
        assert verify.verify(cache).findings == ()


@pytest.mark.needs("strace")
@pytest.mark.timeout(240)
def test_everysec_loses_a_tail_that_is_reported(power: Callable[[str], Mains], sqlite_url: str) -> None:
    """``appendfsync everysec``, and a flusher that has stopped a while ago: what was acknowledged ``durable`` is there; of the
    rest the newest are gone, none of them accepted before the last fsync began, and the recovery reports them as possible
    from an earlier moment on. Level ``fsync`` is refused by such a server."""
    for number in range(5):  # the last write may happen to be covered by an fsync: then the power fails once more
        mains = power("everysec")
        with connect(mains, f"{sqlite_url}-{number}") as cache:
            if _lose_a_tail(mains, cache):
                return
    raise AssertionError("five times the power failed right after an fsync")


def _lose_a_tail(mains: Mains, cache: StateCache) -> bool:
    orders = cache.machine(worlds.Order)
    with pytest.raises(errors.ConfigurationError, match="appendfsync always"):
        orders.start("never", durability="fsync")
    durable = [orders.start(f"d{number}", durability="durable") for number in range(5)]
    hot: list[model.Receipt] = []
    until = time.monotonic() + 1.5
    while time.monotonic() < until:  # the load itself: long enough for an fsync in its middle
        hot.append(orders.start(f"h{len(hot)}"))
    kept = mains.fail()
    if kept.length == mains.size:
        return False
    orders.start("after")
    parts = reports(cache)
    cache.flush()
    standing = {(row.id, row.version, row.transition_id) for row in cache.durable.iterate_transitions("order")}
    lost = [one for one in hot if (one.id, one.version, one.transition_id) not in standing]
    assert lost
    assert lost == hot[-len(lost) :]
    assert min(one.at_ms for one in lost) >= kept.since_seconds * 1000 - _WRITTEN_LATER_MS
    for one in lost:
        part = parts[cache.hot.keyspace.partition_of("order", one.id)]
        assert part.loss_possible
        assert part.tail_seen_ms <= one.at_ms
    for one in durable:
        cache.wait_durable(one)
    with pytest.raises(errors.IntegrityError, match="is lost"):
        cache.wait_durable(lost[0])
    assert verify.verify(cache).findings == ()
    return True


@pytest.mark.needs("strace")
def test_everysec_killed_during_an_fsync_loses_what_came_meanwhile(
    power: Callable[..., Mains], sqlite_url: str
) -> None:
    """While its fsync of a second is under way a server with ``appendfsync everysec`` does not write to its file: killed then
    (not its machine), it loses what it acknowledged meanwhile. The recovery reports it."""
    mains = power("everysec", "-e inject=fdatasync,fsync:delay_enter=1500000")
    with connect(mains, sqlite_url) as cache:
        orders = cache.machine(worlds.Order)
        hot: list[model.Receipt] = []
        until = time.monotonic() + 3.3
        while time.monotonic() < until:
            hot.append(orders.start(f"h{len(hot)}"))
        mains.server.kill()
        mains.switch_on()
        orders.start("after")
        assert all(part.loss_possible for part in reports(cache))
        cache.flush()
        standing = {row.id for row in cache.durable.iterate_transitions("order")}
        lost = [one for one in hot if one.id not in standing]
        assert lost
        assert lost == hot[-len(lost) :]
        assert verify.verify(cache).findings == ()


@pytest.mark.needs("strace")
def test_durable_survives_power_loss_under_load(power: Callable[[str], Mains], sqlite_url: str) -> None:
    """Four threads move orders ``durable`` when the power fails; a call whose transition was lost before it was durable says
    so, and is repeated with the same transition id. Every acknowledgement of before and after stands, once."""
    mains = power("everysec")
    with connect(mains, sqlite_url) as cache:
        orders = cache.machine(worlds.Order)
        told: list[model.Receipt] = []
        halfway = threading.Event()

        def work(worker: int) -> None:
            for number in range(25):
                id = f"w{worker}-{number}"
                told.append(_insist(lambda id=id: orders.start(id, transition_id=f"s-{id}", durability="durable")))  # type: ignore[misc]
                told.append(
                    _insist(lambda id=id: orders.transition(id, "pay", transition_id=f"p-{id}", durability="durable"))  # type: ignore[misc]
                )
                if number == 5:
                    halfway.set()

        def fail() -> None:
            halfway.wait()
            mains.fail()

        results = worlds.together(*[lambda worker=worker: work(worker) for worker in range(4)], fail)
        assert results == [None] * 5, results
        assert len(told) == 4 * 25 * 2
        for one in told:
            row = cache.durable.transition("order", one.id, one.version)
            assert row is not None
            assert (row.transition_id, row.version) == (one.transition_id, one.version)
        assert verify.verify(cache).findings == ()


def _insist(call: Callable[[], model.Receipt]) -> model.Receipt:
    """Repeat a durable call that was told, instead of being acknowledged, that its transition is lost."""
    while True:
        try:
            return call()
        except errors.IntegrityError as error:
            if "is lost" not in str(error):
                raise


def _receipts(results: list[model.Receipt | errors.StateCacheError]) -> list[model.Receipt]:
    found = []
    for one in results:
        assert isinstance(one, model.Receipt), one
        found.append(one)
    return found
