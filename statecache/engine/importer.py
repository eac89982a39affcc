"""Import: replay an event log into a store, each row exactly once, whatever is killed on the way.

A case becomes an instance: one ``start`` at the time of its first row, then one transition a row, under ids that depend on
what the rows say alone (``replay``). So whoever runs the import again - after a kill -9, with more rows at the end, with an
overlapping file - finds what is there already. What keeps the rows of a case in order, and none from being applied twice:

- a move names the version that it expects (the one that the row before it made). A row that fails stops those behind it:
  Redis refuses them as stale, the case's history is read, and it goes on with the first row that is not in it;
- a case that exists is compared with its history before anything is sent: rows whose ids are there are skipped, and a row
  that is not there although later ones are is refused, as it was the first time (or it came too late);
- lost replies, timeouts and a full backlog are met in the same way: read the history, go on behind it;
- if Redis lost a tail meanwhile (the epoch has changed, or a version went back), everything begins anew at the file's top:
  what survived is recognised, what did not is applied again.

Rejected: leaving duplicates to the ring and to history alone, which is right too, but asks history once for every row behind
an instance's eighth; a journal beside the file, which says what was sent and not what the store has kept.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from statecache.core import entry, errors, model
from statecache.engine.cache import StateCache
from statecache.engine.logfile import Progress
from statecache.engine.replay import ID_PREFIX, Counts, Replay, Step, no_move, transition_id

_CALL_SECONDS_MAX = 20.0
_STARTS_OVER_MAX = 10
_HELD = (errors.UnavailableError, errors.BackpressureError, errors.RecoveringError)


class _Ahead(NamedTuple):
    state: str
    version: int
    occurred_ms: int


@dataclass(slots=True)
class _Case:
    """An instance as the import knows it.

    ``state`` and ``version`` are where it will be when all that was planned is applied; ``confirmed`` is the version up to
    which that is known. ``ahead`` are the imported transitions that its history has and the walk has not come by yet: where
    they led, by id, in order of version; ``tip`` is the state behind them all.
    """

    known: bool = False
    state: str = ""
    version: int = 0
    confirmed: int = 0
    start_sent: bool = False
    ahead: dict[str, _Ahead] | None = None
    tip: str = ""
    matched: bool = False
    refusal: str = ""


class _StartOver(Exception):  # noqa: N818 - a turn of control within this file, no error
    """Redis has lost something that was acknowledged: begin again at the file's top."""


class Import:
    """Writes a log into a store. ``patience_seconds``: how long nothing may move before the import gives up with the
    error that holds it (a server away, a full backlog); run again it goes on where it was."""

    def __init__(self, cache: StateCache, replay: Replay, *, patience_seconds: float = 60.0) -> None:
        self._cache = cache
        self._replay = replay
        self._definition = replay.definition
        self._handle = cache.machine(replay.machine)
        self._patience_seconds = patience_seconds
        self._call_seconds = min(_CALL_SECONDS_MAX, max(1.0, patience_seconds / 2))
        self._moved_at = time.monotonic()
        self._begin()

    def _begin(self) -> None:
        self._replay.begin()
        self._cases: dict[str, _Case] = {}
        self._chunk_ids: set[str] = set()

    def run(self, progress: Progress = lambda rows: None, *, flush: bool = True) -> Counts:
        """Import everything; with ``flush`` it is in SQL when this returns."""
        try:
            for attempt in range(_STARTS_OVER_MAX):
                try:
                    counts = self._once(progress, flush)
                    counts.started_over = attempt
                    return counts
                except _StartOver:
                    self._begin()
        finally:
            self._replay.close()
        raise errors.UnavailableError("Redis keeps losing what it acknowledged: look at 'statecache status'")

    def _once(self, progress: Progress, flush: bool) -> Counts:
        epoch = self._cache.hot.stamp
        for steps in self._replay.chunks(progress):
            self._write(steps)
        if flush:
            self._flush()
        if self._cache.hot.stamp != epoch:
            raise _StartOver
        return self._replay.settle()

    def _flush(self) -> None:
        """Wait until SQL has everything, as long as something moves."""
        reached: object = None
        attempt = 0
        while True:
            try:
                self._cache.flush(timeout=min(5.0, self._patience_seconds))
                return
            except errors.RecoveringError:
                raise _StartOver from None
            except errors.DurabilityTimeout as error:
                held: errors.StateCacheError = errors.UnavailableError(str(error))
            except errors.UnavailableError as error:
                held = error
            before, reached = reached, _watermarks(self._cache)
            attempt = 0 if reached is not None and reached != before else attempt + 1
            self._wait(attempt, held)

    # --- a chunk -----------------------------------------------------------------------------------------------------

    def _write(self, steps: list[Step]) -> None:
        """Apply the steps, again and again until each is applied, found or refused."""
        self._chunk_ids = {step.transition_id for step in steps}
        self._moved_at = time.monotonic()
        attempt = 0
        while steps:
            count = len(steps)
            steps, held = self._round(steps)
            attempt = 0 if len(steps) < count else attempt + 1
            if attempt and held is None:
                held = errors.UnavailableError("somebody else keeps moving the instances of this log")
            if held is not None:
                self._wait(attempt, held)

    def _round(self, steps: Sequence[Step]) -> tuple[list[Step], errors.StateCacheError | None]:
        """One look at the cases not known, one bulk call; returns the steps that are left, and what held one of them."""
        held = self._meet(steps)
        sent: list[Step] = []
        moves: list[model.Move] = []
        left: list[Step] = []
        for step in steps:
            case = self._case(step.row.id)
            if not case.known and not case.refusal:
                left.append(step)
            elif self._planned(step, case):
                sent.append(step)
                moves.append(step.move(case.version))
                case.version += 1
                step.sent = True
        results = self._handle.transition_many(moves, durability="hot", timeout=self._call_seconds) if moves else []
        for step, result in zip(sent, results, strict=True):
            case = self._case(step.row.id)
            if isinstance(result, model.Receipt):
                self._replay.counts.transitions += 1
                case.confirmed = max(case.confirmed, result.version)
                continue
            case.known = False  # whatever stands behind this step was planned on it
            if isinstance(result, (*_HELD, errors.StaleVersionError)):
                held = result if isinstance(result, _HELD) else held
                left.append(step)
            else:
                self._replay.refuse(step, _reason(result))
        return left, held

    def _planned(self, step: Step, case: _Case) -> bool:
        """Whether the step is to be sent, the case being moved on by it; else it is counted or refused."""
        if case.refusal:
            self._replay.refuse(step, case.refusal)
            return False
        if case.ahead and self._compared(step, case, case.ahead):
            return False
        target = self._definition.targets[step.event].get(case.state)
        problem = no_move(self._definition, case.state, step.event) if target is None else self._replay.problem(step)
        if target is None or problem or not case.version:  # without a version: no row of it so far could begin it
            self._replay.refuse(step, problem or "its case has not begun")
            return False
        case.state = target
        return True

    def _compared(self, step: Step, case: _Case, ahead: dict[str, _Ahead]) -> bool:
        """Compare a step with the transitions that its case's history has; False when it comes after all of them."""
        found = ahead.get(step.transition_id)
        if found is not None:
            passed = itertools.takewhile(lambda other: ahead[other].version <= found.version, ahead)
            for id in list(passed):
                del ahead[id]
            case.matched, case.confirmed = True, found.version
            case.state = found.state if ahead else case.tip
            self._replay.counts.transitions += step.sent
            self._replay.counts.duplicates += not step.sent
            return True
        at_ms = model.ms_of(step.row.at)
        later = any(
            other.occurred_ms > at_ms or (other.occurred_ms == at_ms and (case.matched or id in self._chunk_ids))
            for id, other in ahead.items()
        )
        if not later:
            case.ahead, case.state = None, case.tip
            return False
        if case.state in self._definition.targets[step.event]:
            self._replay.refuse(step, "later rows of its case are there already: history is not rewritten")
        else:
            self._replay.refuse(step, no_move(self._definition, case.state, step.event))
        return True

    def _wait(self, attempt: int, held: errors.StateCacheError) -> None:
        """Wait a little; raise what holds the import when nothing has moved for too long."""
        now = time.monotonic()
        if attempt == 0:
            self._moved_at = now
        elif now - self._moved_at > self._patience_seconds:
            raise type(held)(
                f"the import was held for {self._patience_seconds:g} s: {held}. What it has applied stays applied: "
                "run the same command again to go on"
            ) from held
        time.sleep(min(1.0, 0.02 * 2 ** min(attempt, 8)))

    # --- cases -------------------------------------------------------------------------------------------------------

    def _meet(self, steps: Sequence[Step]) -> errors.StateCacheError | None:
        """Start the cases that are new, read the history of the others not known; returns what held one of them.

        A case is started by its first row that the machine allows at all, so that no instance stands empty.
        """
        openers: dict[str, Step] = {}
        for step in steps:
            case = self._case(step.row.id)
            if (case.known and case.version) or case.refusal:
                continue
            known = openers.setdefault(step.row.id, step)
            if not self._opens(known) and self._opens(step):
                openers[step.row.id] = step
        starts = {id: step for id, step in openers.items() if not self._cases[id].confirmed and self._opens(step)}
        existing, held = self._start(starts)
        for id in [*existing, *(id for id in openers if id not in starts)]:
            if held is not None:  # a server is away: each further question would wait as long
                return held
            held = self._visit(id, self._cases[id])
        return held

    def _case(self, id: str) -> _Case:
        case = self._cases.get(id)
        if case is None:
            case = self._cases[id] = _Case()
        return case

    def _opens(self, step: Step) -> bool:
        return self._definition.initial in self._definition.targets[step.event] and not self._replay.problem(step)

    def _start(self, openers: Mapping[str, Step]) -> tuple[list[str], errors.StateCacheError | None]:
        """Start instances; returns those that exist already, and what held one."""
        name = self._definition.name
        starts = [
            model.Start(id, transition_id=transition_id(name, id, entry.EVENT_START), occurred_at=step.row.at)
            for id, step in openers.items()
        ]
        results = self._handle.start_many(starts, durability="hot", timeout=self._call_seconds) if starts else []
        existing: list[str] = []
        held: errors.StateCacheError | None = None
        for start, result in zip(starts, results, strict=True):
            case = self._cases[start.id]
            if isinstance(result, errors.AlreadyExistsError) or (
                isinstance(result, model.Receipt) and result.duplicate
            ):
                existing.append(start.id)
            elif isinstance(result, model.Receipt):
                self._replay.counts.starts += 1
                case.known, case.state, case.version, case.confirmed = True, result.state, 1, 1
            elif isinstance(result, _HELD):
                held, case.start_sent = result, True
            else:
                case.refusal = _reason(result)
        return existing, held

    def _visit(self, id: str, case: _Case) -> errors.StateCacheError | None:
        """Learn from its history where a case is; returns what kept us from it."""
        try:
            rows = self._handle.history(id, timeout=self._call_seconds)
        except errors.NotFoundError:
            rows = []
        except errors.InvalidDataError as error:
            case.refusal = str(error)
            return None
        except _HELD as error:
            return error
        if (rows[-1].version if rows else 0) < case.confirmed:
            raise _StartOver
        if not rows:
            case.known, case.state, case.version = True, self._definition.initial, 0
            return None
        if rows[0].transition_id != transition_id(self._definition.name, id, entry.EVENT_START):
            why = "was not started by an import" if rows[0].covers_from is None else "its history was taken out of SQL"
            case.refusal = f"{self._definition.name}:{id} exists already, and {why}: nothing is compared or applied"
            return None
        if not case.confirmed:
            case.confirmed = 1
            self._replay.counts.starts += case.start_sent
            self._replay.counts.starts_found += not case.start_sent
        case.known, case.version, case.tip = True, rows[-1].version, rows[-1].to_state
        case.ahead = {
            row.transition_id: _Ahead(row.to_state, row.version, row.occurred_ms or 0)
            for row in rows
            if row.version > case.confirmed and row.transition_id.startswith(ID_PREFIX)
        }
        reached = [row.to_state for row in rows if row.version <= case.confirmed]
        case.state = reached[-1] if case.ahead and reached else case.tip
        return None


def _reason(error: Any) -> str:
    """Why a row is refused; raises what is no row's fault."""
    if isinstance(error, (errors.ConfigurationError, errors.IntegrityError)):
        raise error
    return str(error)


def _watermarks(cache: StateCache) -> object:
    try:
        return [row.watermark for row in cache.durable.partitions()]
    except errors.UnavailableError:
        return None
