"""``statecache demo``: the main job, a crash, the recovery, and a judge.

Everything that is claimed at the end was checked against the ledger of what the writers were answered, row by row.

The writers and the flusher use a connection that does not belong to the embedded server, so that nobody starts it again
behind the demo's back between its death and the deletion of its data.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from statecache.cli import exits, operations, output
from statecache.cli.demo_ledger import Ledger, Order, Verdict, Writers, gaps_of, judge, rows_of, send
from statecache.core import errors, model
from statecache.engine import status as engine_status
from statecache.engine import verify as engine_verify
from statecache.engine.cache import StateCache

if TYPE_CHECKING:
    from statecache.core.entry import EntryId
    from statecache.engine.recovery import Report

_MID_STREAM_CALLS = 6_000
_BACKLOG_WANTED = 300
_BACKLOG_PATIENCE_SECONDS = 5.0
_SHOWN = "000042"
_DIFFERENCES_SHOWN = 5


@dataclass
class Claims:
    """What the demo asserts, and whether it was so."""

    held: list[tuple[str, bool]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def check(self, claim: str, ok: bool, *differences: object) -> None:
        """Note a claim; ``differences`` tell what was found where it does not hold."""
        self.held.append((claim, ok))
        if not ok:
            found = [str(one) for one in differences[:_DIFFERENCES_SHOWN]] or ["(nothing more is known)"]
            self.failures += [f"{claim}: {one}" for one in found]


class Stage:
    """Where the demo prints; nowhere with --json."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self._out = output.console()
        self._number = itertools.count(1)

    def scene(self, title: str) -> None:
        """Begin a section."""
        if not self.as_json:
            self._out.print()
            self._out.print(f"{next(self._number)}. {title}", style="bold cyan")

    def say(self, text: str, style: str = "") -> None:
        if not self.as_json:
            self._out.print("   " + output.safe(text), style=style or None, soft_wrap=True)

    def show(self, thing: Any) -> None:
        if not self.as_json:
            from rich.padding import Padding

            self._out.print(Padding(thing, (0, 0, 0, 3)))

    def claims(self, claims: Claims) -> None:
        for claim, ok in claims.held:
            self.say(("ok      " if ok else "BROKEN  ") + claim, "green" if ok else "bold red")
        for failure in claims.failures:
            self.say(failure, "red")


def run(*, as_json: bool, orders: int, keep: bool, folder: Path | None) -> int:
    """Run it all; returns the exit code."""
    started = time.monotonic()
    stage = Stage(as_json)
    claims = Claims()
    figures: dict[str, Any] = {}
    with _fresh_folder(folder, keep) as place:
        stage.scene("A server and a database of their own")
        with StateCache.embedded(place, flusher=False) as cache:
            facts = cache.hot.server_facts()
            server = f"{facts.get('server_name', 'redis')} {facts.get('valkey_version', facts.get('redis_version', ''))}"
            stage.say(f"{server}, its append-only file on: {cache.redis_url}")
            stage.say(f"SQLite: {cache.database_url}")
            _play(stage, cache, orders, claims, figures)
    figures["seconds"] = round(time.monotonic() - started, 1)
    ok = all(held for _, held in claims.held)
    if as_json:
        checked = [{"claim": claim, "ok": held} for claim, held in claims.held]
        output.emit({"ok": ok, "claims": checked, "failures": claims.failures, "figures": figures})
    else:
        stage.say("")
        kept = f"; the folder is {place}" if keep else ""
        stage.say(f"{len(claims.held)} claims checked in {figures['seconds']} s: {'all hold' if ok else 'SOME ARE BROKEN'}{kept}")
    return exits.DONE if ok else exits.FOUND


@contextmanager
def _fresh_folder(parent: Path | None, keep: bool) -> Iterator[Path]:
    place = Path(tempfile.mkdtemp(prefix="statecache-demo-", dir=parent))
    try:
        yield place
    finally:
        if not keep:
            shutil.rmtree(place, ignore_errors=True)


def _play(stage: Stage, cache: StateCache, orders: int, claims: Claims, figures: dict[str, Any]) -> None:
    ledger = Ledger()
    before = _quiet_load(stage, cache, ledger, orders, figures)
    watermarks, oldest_ms = _crash(stage, cache, ledger, orders, figures)
    report = _recover(stage, cache, figures)
    verdict = _compare(stage, cache, ledger, watermarks, figures)
    stage.scene("What was claimed")
    survivor = cache.machine(Order).get(_SHOWN)
    claims.check(
        f"order:{_SHOWN} is where it was, read from SQL now: {survivor.state}, version {survivor.version}",
        survivor == before and survivor.source == "durable", before, survivor,
    )  # fmt: skip
    _check(claims, verdict, report, oldest_ms)
    repeated = _go_on(cache, ledger, verdict, claims, figures)
    _check_end(cache, ledger, claims, figures)
    stage.claims(claims)
    stage.say("")
    stage.say(repeated)


# --- before the crash --------------------------------------------------------------------------------------------------


def _quiet_load(stage: Stage, cache: StateCache, ledger: Ledger, orders: int, figures: dict[str, Any]) -> model.Snapshot:
    """Push orders through and show one of them."""
    stage.scene(f"{output.counted(orders, 'order')} from placed to delivered")
    with _client(cache) as client:
        writers = Writers(client, ledger)
        began = time.monotonic()
        writers.begin(range(1, orders + 1))
        _follow(writers, ledger, orders)
        seconds = time.monotonic() - began
        client.flush(timeout=60.0)
        flushed_seconds = time.monotonic() - began
        for problem in list(ledger.unanswered.values())[:1]:
            raise errors.IntegrityError(f"the load without any fault did not go through: {problem}")
        count = len(ledger.acknowledged)
        figures |= {"orders": orders, "transitions_before": count, "load_seconds": round(seconds, 2)}
        figures["transitions_per_second"] = int(count / seconds)
        stage.say(
            f"{count:,} transitions acknowledged in {seconds:.1f} s ({count / seconds:,.0f} a second, 2 threads), "
            f"all of them in SQL after {flushed_seconds:.1f} s"
        )
        handle = client.machine(Order)
        seen, past = handle.get(_SHOWN), handle.history(_SHOWN)
    stage.say(f"where   order:{_SHOWN} is {seen.state}, version {seen.version}: {output.data_text(seen.data)}")
    rows = [
        (row.version, row.event, row.from_state, row.to_state, output.moment(row.at_ms), output.data_text(row.patch))
        for row in past
    ]
    stage.show(output.table(["version", "event", "from", "to", "at", "data"], rows, title="history", right=["version"]))
    return seen


@contextmanager
def _client(cache: StateCache) -> Iterator[StateCache]:
    """A connection as another process would have it: no hand on the server, a flusher of its own."""
    client = StateCache.connect(
        cache.redis_url, cache.database_url, cache.settings.namespace, flusher=True, auto_recover=False
    )
    try:
        yield client
    finally:
        client.close()


def _follow(writers: Writers, ledger: Ledger, orders: int) -> None:
    """Show the progress of the writers until they are done."""
    total = sum(3 if number % 20 == 0 else 4 for number in range(1, orders + 1))
    with output.progress("   transitions", total) as update:
        while writers.busy:
            update(len(ledger.acknowledged))
            time.sleep(0.05)


# --- the crash ---------------------------------------------------------------------------------------------------------


def _crash(
    stage: Stage, cache: StateCache, ledger: Ledger, orders: int, figures: dict[str, Any]
) -> tuple[dict[int, EntryId], int]:
    """Kill the server while writers write, and delete its data.

    Returns the watermarks last committed, and the time of the oldest transition that was not in SQL just before.
    """
    stage.scene("More orders - and mid-stream a SIGKILL for Valkey, and its data deleted")
    with _client(cache) as client:
        writers = Writers(client, ledger)
        known = len(ledger.acknowledged)
        writers.begin(range(orders + 1, orders + 1_000_000), timeout=1.0)
        while len(ledger.acknowledged) < known + _MID_STREAM_CALLS and writers.busy:
            time.sleep(0.01)
        before = _unflushed(client)
        pid = cache.server.pid if cache.server else None
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        _wait_until_dead(cache)
        assert cache.server is not None
        shutil.rmtree(cache.server.folder / "redis")
        writers.stop()
        stage.say(f"kill -9 {pid}; rm -r {cache.server.folder / 'redis'}")
    # The client is closed and its flusher has ended: what SQL has now is what it had at the end.
    watermarks = {row.partition: row.watermark for row in cache.durable.partitions()}
    lag = before.lag_seconds or 0.0
    now_ms = int(time.time() * 1000)
    figures |= {"lag_ms": round(lag * 1000), "backlog": before.backlog, "in_flight": len(ledger.unanswered)}
    stage.say(
        f"just before: {output.counted(before.backlog or 0, 'transition')} not in SQL yet, the oldest {output.seconds(lag)} old: "
        "that is what the crash may cost"
    )
    stage.say(f"in flight: {output.counted(len(ledger.unanswered), 'call')} without an answer, applied or not")
    return watermarks, min((one.at_ms for one in _behind(ledger, watermarks)), default=now_ms)


def _unflushed(client: StateCache) -> engine_status.Status:
    """The store's status at a moment when something is not flushed yet."""
    deadline = time.monotonic() + _BACKLOG_PATIENCE_SECONDS
    while True:
        found = engine_status.status(client)
        if (found.backlog or 0) >= _BACKLOG_WANTED or time.monotonic() > deadline:
            return found


def _wait_until_dead(cache: StateCache) -> None:
    while True:
        try:
            cache.hot.position(0)
        except errors.UnavailableError:
            return
        time.sleep(0.005)
