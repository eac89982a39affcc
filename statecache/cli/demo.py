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

import msgspec

from statecache.cli import exits, operations, output
from statecache.cli.demo_ledger import (
    WAVE_ORDERS,
    Call,
    Ledger,
    Order,
    Verdict,
    Writers,
    calls_of,
    gaps_of,
    judge,
    rows_of,
    send,
)
from statecache.core import errors, model
from statecache.engine import status as engine_status
from statecache.engine import verify as engine_verify
from statecache.engine.cache import StateCache

if TYPE_CHECKING:
    from statecache.core.entry import EntryId
    from statecache.engine.recovery import Report

_MID_STREAM_CALLS_MIN = 1_500
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

            self._out.print(Padding(thing, (0, 0, 0, 3), expand=False))

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
            server = (
                f"{facts.get('server_name', 'redis')} {facts.get('valkey_version', facts.get('redis_version', ''))}"
            )
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
        stage.say(
            f"{len(claims.held)} claims checked in {figures['seconds']} s: {'all hold' if ok else 'SOME ARE BROKEN'}{kept}"
        )
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
    watermarks, bound_ms = _crash(stage, cache, ledger, orders, figures)
    report = _recover(stage, cache, figures)
    verdict = _compare(stage, cache, ledger, watermarks, figures)
    stage.scene("What was claimed")
    survivor = cache.machine(Order).get(_SHOWN)
    claims.check(
        f"order:{_SHOWN} is where it was, read from SQL now: {survivor.state}, version {survivor.version}",
        survivor == before and survivor.source == "durable", before, survivor,
    )  # fmt: skip
    _check(claims, verdict, report, bound_ms)
    repeated = _go_on(cache, ledger, verdict, claims, figures)
    _check_end(cache, ledger, claims, figures)
    stage.claims(claims)
    stage.say("")
    stage.say(repeated)


# --- before the crash --------------------------------------------------------------------------------------------------


def _quiet_load(
    stage: Stage, cache: StateCache, ledger: Ledger, orders: int, figures: dict[str, Any]
) -> model.Snapshot:
    """Push orders through and show one of them."""
    stage.scene(f"{output.counted(orders, 'order')} from placed to delivered")
    with _client(cache) as client, Writers(client, ledger) as writers:
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

    Returns the watermarks last committed, and a time before which everything was in SQL when the server was killed.
    """
    stage.scene("More orders - and mid-stream a SIGKILL for Valkey, and its data deleted")
    with _client(cache) as client, Writers(client, ledger) as writers:
        known = len(ledger.acknowledged)
        writers.begin(range(orders + 1, orders + 1_000_000), timeout=1.0)
        enough = known + max(_MID_STREAM_CALLS_MIN, orders * 6 // 10)
        while len(ledger.acknowledged) < enough and writers.busy:
            time.sleep(0.01)
        before, bound_ms = _unflushed(client)
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
    figures |= {"lag_ms": round(lag * 1000), "backlog": before.backlog, "in_flight": len(ledger.unanswered)}
    stage.say(
        f"just before: {output.counted(before.backlog or 0, 'transition')} not in SQL yet, "
        f"the oldest {output.seconds(lag)} old: that is what the crash may cost"
    )
    stage.say(f"in flight: {output.counted(len(ledger.unanswered), 'call')} without an answer, applied or not")
    return watermarks, bound_ms


def _unflushed(client: StateCache) -> tuple[engine_status.Status, int]:
    """The store's status at a moment when something is not flushed yet, and a time before which all is in SQL."""
    deadline = time.monotonic() + _BACKLOG_PATIENCE_SECONDS
    while True:
        began_ms = int(time.time() * 1000)
        found = engine_status.status(client)
        if (found.backlog or 0) >= _BACKLOG_WANTED or time.monotonic() > deadline:
            oldest = [one.oldest_ms for one in found.partitions if one.oldest_ms is not None]
            return found, min([began_ms, *oldest])


def _wait_until_dead(cache: StateCache) -> None:
    while True:
        try:
            cache.hot.position(0)
        except errors.UnavailableError:
            return
        time.sleep(0.005)


# --- after the crash ---------------------------------------------------------------------------------------------------


def _recover(stage: Stage, cache: StateCache, figures: dict[str, Any]) -> Report:
    stage.scene("Recovery: an empty server, and SQL")
    assert cache.server is not None
    cache.server.ensure_running()
    report = cache.recover()
    figures["recovery"] = operations.report_document(report)
    stage.show(operations.report_summary(report))
    return report


def _compare(
    stage: Stage, cache: StateCache, ledger: Ledger, watermarks: dict[int, EntryId], figures: dict[str, Any]
) -> Verdict:
    stage.scene("What came back: every acknowledged transition compared with SQL, row by row")
    verdict = judge(ledger, rows_of(cache), watermarks)
    figures |= {
        "acknowledged": verdict.acknowledged, "flushed": verdict.flushed, "survived": verdict.survived,
        "lost": len(verdict.lost), "unanswered_applied": verdict.unanswered_applied,
    }  # fmt: skip
    stage.show(
        output.facts(
            [
                ("acknowledged", output.count(verdict.acknowledged)),
                ("of them in SQL before the crash", output.count(verdict.flushed)),
                ("back, with the same content", output.count(verdict.survived)),
                ("lost", output.count(len(verdict.lost))),
                ("not acknowledged, applied all the same", output.count(verdict.unanswered_applied)),
            ]
        )
    )
    return verdict


def _check(claims: Claims, verdict: Verdict, report: Report, bound_ms: int) -> None:
    lost, unflushed = len(verdict.lost), verdict.acknowledged - verdict.flushed
    claims.check(
        f"all {verdict.flushed:,} transitions that were in SQL are there, none of them changed",
        not verdict.missing_but_flushed and not verdict.different and verdict.survived == verdict.flushed,
        *verdict.missing_but_flushed, *verdict.different,
    )  # fmt: skip
    claims.check(
        f"all {lost:,} that are lost were made after everything up to then was in SQL: the lag shown bounds the loss",
        all(one.at_ms >= bound_ms for one in verdict.lost),
        *[one for one in verdict.lost if one.at_ms < bound_ms],
    )
    claims.check(
        f"the report is right: at least {report.lost_at_least:,} lost, and {lost:,} were, of {unflushed:,} not yet in SQL",
        report.lost_at_least <= lost + verdict.in_flight and lost <= unflushed and (report.loss_possible or not lost),
        f"reported {report.lost_at_least}, lost {lost}, in flight {verdict.in_flight}, unflushed {unflushed}",
    )
    claims.check("nothing came back that nobody had sent", not verdict.foreign, *verdict.foreign)
    claims.check(
        "every history is versions 1..n, each move beginning where the last one ended", not verdict.gaps, *verdict.gaps
    )


def _go_on(cache: StateCache, ledger: Ledger, verdict: Verdict, claims: Claims, figures: dict[str, Any]) -> str:
    """Make the calls of all orders under way at the crash again, under the same transition ids, up to their ends."""
    lost = {one.transition_id for one in verdict.lost}
    seen = sorted({int(call.id) for call in ledger.calls if int(call.id) > figures["orders"]})
    wrong: list[str] = []
    counts = {"there": 0, "again": 0, "new": 0}
    with _client(cache) as client:
        handle = client.machine(Order)
        for start in range(0, len(seen), WAVE_ORDERS):
            lives = [calls_of(number) for number in seen[start : start + WAVE_ORDERS]]
            for step in range(max(map(len, lives))):
                calls = [life[step] for life in lives if step < len(life)]
                for call, result in zip(calls, send(handle, calls, timeout=20.0), strict=True):
                    wrong += _judge_repetition(ledger, call, result, call.transition_id in lost, counts)
        client.flush(timeout=60.0)
    figures["repeated"] = counts
    claims.check("every call made again, under its transition id, was applied exactly once in all", not wrong, *wrong)
    return (
        f"The writers made their calls of the last orders again: {counts['there']:,} were there, {counts['again']:,} that were "
        f"lost or unanswered were applied now, {counts['new']:,} followed."
    )


def _judge_repetition(
    ledger: Ledger, call: Call, result: model.Receipt | errors.StateCacheError, was_lost: bool, counts: dict[str, int]
) -> list[str]:
    known = ledger.acknowledged.get(call.transition_id)
    if not isinstance(result, model.Receipt):
        return [f"{call.id} {call.event}: {result}"]
    if known is not None and not was_lost:
        counts["there"] += 1
        return [] if result == msgspec.structs.replace(known[1], duplicate=True) else [f"{known[1]} became {result}"]
    unanswered = call.transition_id in ledger.unanswered
    counts["there" if result.duplicate else "again" if was_lost or unanswered else "new"] += 1
    ledger.acknowledged[call.transition_id] = (call, result)
    return [f"{call.id} {call.event} was there already"] if result.duplicate and not unanswered else []


def _check_end(cache: StateCache, ledger: Ledger, claims: Claims, figures: dict[str, Any]) -> None:
    """At the end every order of the ledger is where it should be, and the stores agree."""
    rows = rows_of(cache)
    verdict = judge(ledger, rows, {row.partition: row.watermark for row in cache.durable.partitions()})
    gaps = gaps_of(rows)
    claims.check(
        f"all {verdict.acknowledged:,} transitions are in SQL in the end, gap-free",
        verdict.survived == verdict.acknowledged == len(rows) and not gaps, *verdict.different, *gaps,
    )  # fmt: skip
    counts = cache.machine(Order).counts()
    figures["counts"] = counts
    claims.check(
        "every order has come to its end: " + ", ".join(f"{state} {count:,}" for state, count in counts.items()),
        set(counts) == {"delivered", "cancelled"} and sum(counts.values()) == len({id for id, _ in rows}), counts,
    )  # fmt: skip
    found = engine_verify.verify(cache)
    claims.check(
        f"verify finds nothing wrong in {found.instances:,} instances and {found.transitions:,} transitions",
        not found.findings, *found.findings,
    )  # fmt: skip
