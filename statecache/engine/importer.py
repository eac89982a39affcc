"""Import: replay an event log through a machine, each row exactly once, whatever is killed on the way.

A case becomes an instance: one ``start`` at the time of its first row, then one transition a row. Every transition has an id
made from what the row says (machine, case, event, time, and its number among equal ones), never from the file's name or the
row's place. So whoever runs the import again - after a kill -9, with more rows at the end, with an overlapping file - finds
what is there already.

What makes the rows of a case stay in order, and none applied twice:

- a move names the version that it expects (the version after the row before it). A row that fails stops those behind it:
  they are refused by Redis as stale, the case's history is read, and it goes on with the first row that is not in it;
- a case that exists is compared with its history before anything is sent: rows whose ids are there are skipped, and a row
  that is not there although later ones are is refused, as it was the first time (or came too late);
- lost replies, timeouts and a full backlog are met in the same way: read the history, go on behind it;
- if Redis lost a tail meanwhile (the epoch has changed, or a version went back), everything begins anew from the file's top:
  what survived is recognised, what did not is applied again.

Rejected: leaving duplicates to the ring and to history alone, which is right too, but asks history once for every row behind
an instance's eighth; a journal beside the file, which says what was sent and not what Redis has kept.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from statecache.core import codec, entry, errors, eventlog, learn, model, requests
from statecache.core.definition import Definition
from statecache.core.eventlog import Refused, Row
from statecache.core.machine import StateMachine
from statecache.engine.cache import StateCache
from statecache.engine.logfile import LogFile, Progress, Survey

CHUNK_ROWS = 4000
CALL_SECONDS = 20.0
ID_PREFIX = "import:"
_STARTS_OVER_MAX = 10
_AGAIN = (
    errors.UnavailableError, errors.BackpressureError, errors.RecoveringError, errors.StaleVersionError,
    errors.DurabilityTimeout,
)  # fmt: skip


class RefusedFile:
    """The side file: a JSON object for every refused row, with its line, the reason and the row. Made when first needed;
    an older one, which would speak of another run, is removed when there is nothing to say."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._file: IO[str] | None = None

    def write(self, line: int, reason: str, raw: Mapping[str, Any]) -> None:
        if self.path is None:
            return
        if self._file is None:
            self._file = self.path.open("w", encoding="utf-8")
        self._file.write(json.dumps({"line": line, "reason": reason, "row": raw}, default=str) + "\n")

    def close(self) -> None:
        """Finish; what was written stays."""
        if self._file is not None:
            self._file.close()

    def settle(self) -> None:
        """Finish a run that reached the end of the log."""
        if self._file is None and self.path is not None:
            self.path.unlink(missing_ok=True)
        self.close()

    def restart(self) -> None:
        self.close()
        self._file = None


@dataclass
class Counts:
    """What became of the rows: each is applied, there already, or refused."""

    rows: int = 0
    starts: int = 0
    transitions: int = 0
    duplicates: int = 0
    starts_found: int = 0
    refused: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    started_over: int = 0


@dataclass(slots=True)
class _Step:
    """A row on its way: the machine's event and the transition's id. ``sent`` once it may have been applied."""

    row: Row
    event: str
    transition_id: str
    sent: bool = False


@dataclass(slots=True)
class _Case:
    """An instance as the import knows it: as planned (``state``, ``version``), and up to which version it is confirmed.

    ``ahead`` are transitions of this log that its history has and the walk has not come by yet: id -> (state, version).
    """

    at_ms: int = 0
    repeats: dict[str, int] | None = None
    known: bool = False
    state: str = ""
    version: int = 0
    confirmed: int = 0
    started: bool = False
    ahead: dict[str, tuple[str, int]] | None = None
    refusal: str = ""


class _StartOver(Exception):
    """Redis has lost something that was acknowledged: begin again at the file's top."""


class _Reader:
    """From rows to steps: events by the machine's names and titles, deterministic ids, typed data. No store."""

    def __init__(self, log: LogFile, machine: type[StateMachine], refuse: Callable[[int, str, Mapping[str, Any]], None]):
        self.definition = machine.definition
        self.cases: dict[str, _Case] = {}
        self._log = log
        self._events = learn.event_of(machine.spec)
        self._fields = (machine.spec.data_schema or {}).get("properties", {}) if log.form == "csv" else {}
        self._refuse = refuse

    def chunks(self, survey: Survey, progress: Progress) -> Iterator[list[_Step]]:
        """The steps of every ``CHUNK_ROWS`` rows; what is no step is refused."""
        rows = self._log.ordered(survey)
        count = 0
        while chunk := list(itertools.islice(rows, CHUNK_ROWS)):
            yield [step for row in chunk if (step := self._step(row)) is not None]
            count += len(chunk)
            progress(count)

    def _step(self, row: Row | Refused) -> _Step | None:
        if isinstance(row, Refused):
            self._refuse(row.line, row.reason, row.raw)
            return None
        event = self._events.get(row.event)
        if event is None:
            name = self.definition.name
            self._refuse(row.line, f"machine {name!r} has no event of the name or title {row.event!r}", row.raw)
            return None
        if self._fields:
            data = {
                name: eventlog.typed(self._fields.get(name), text) if isinstance(text, str) else text
                for name, text in row.data.items()
            }
            row = row._replace(data=data)
        case = self.cases.get(row.id)
        if case is None:
            case = self.cases[row.id] = _Case()
        return _Step(row, event, self._transition_id(row, event, case))

    def _transition_id(self, row: Row, event: str, case: _Case) -> str:
        at_ms = model.ms_of(row.at)
        if case.repeats is None or case.at_ms != at_ms:
            case.at_ms, case.repeats = at_ms, {}
        number = case.repeats[event] = case.repeats.get(event, 0) + 1
        return transition_id(self.definition.name, row.id, event, at_ms, number)


def transition_id(machine: str, case: str, event: str, at_ms: int | None = None, number: int = 1) -> str:
    """The id under which a row is applied: 96 bits of a hash of what it says."""
    text = "\x1f".join([machine, case, event, "" if at_ms is None else str(at_ms), str(number)])
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).digest()
    return ID_PREFIX + base64.urlsafe_b64encode(digest).decode()


def no_move(definition: Definition, state: str, event: str) -> str:
    """The reason for which a row is refused that the machine does not allow where its case is."""
    allowed = ", ".join(definition.available_events(state)) or "none, it is final"
    return f"in state {state!r} the event {event!r} is no move of machine {definition.name!r}; allowed: {allowed}"


class _Run:
    """What both kinds of run share: the counts and the side file."""

    def __init__(self, log: LogFile, survey: Survey, machine: type[StateMachine], refused: RefusedFile) -> None:
        self.log = log
        self.survey = survey
        self.machine = machine
        self.refused = refused
        self.definition = machine.definition
        self._begin()

    def _begin(self) -> None:
        self.counts = Counts(rows=self.survey.rows)
        self.reader = _Reader(self.log, self.machine, self._refuse)
        self.refused.restart()

    def _refuse(self, line: int, reason: str, raw: Mapping[str, Any]) -> None:
        self.counts.refused += 1
        kind = reason.partition(":")[0][:120]
        self.counts.reasons[kind] = self.counts.reasons.get(kind, 0) + 1
        self.refused.write(line, reason, raw)

    def _refuse_step(self, step: _Step, reason: str) -> None:
        self._refuse(step.row.line, reason, step.row.raw)


class DryRun(_Run):
    """Checks every row against the machine and the limits, as if no instance existed; needs no store."""

    def run(self, limits: codec.Limits, progress: Progress = lambda rows: None) -> Counts:
        door = requests.Door(
            self.definition, self.machine.guards, 1, limits, codec.TransitionIds(), lambda *given: _nobody()
        )
        for steps in self.reader.chunks(self.survey, progress):
            for step in steps:
                self._check(step, door)
        self.refused.settle()
        return self.counts

    def _check(self, step: _Step, door: requests.Door) -> None:
        case = self.reader.cases[step.row.id]
        state = case.state or self.definition.initial
        target = self.definition.targets[step.event].get(state)
        if target is None:
            self._refuse_step(step, no_move(self.definition, state, step.event))
            return
        try:
            door.transition(_move(step, case))
        except errors.StateCacheError as error:
            self._refuse_step(step, str(error))
            return
        self.counts.starts += not case.state
        self.counts.transitions += 1
        case.state = target


def _nobody() -> model.Snapshot:
    raise AssertionError("a dry run consults no guard")


class Import(_Run):
    """Writes a log into a store. ``patience_seconds``: how long nothing may move before the import gives up with the
    error that holds it (a server away, a full backlog); run again it goes on where it was."""

    def __init__(
        self,
        cache: StateCache,
        log: LogFile,
        survey: Survey,
        machine: type[StateMachine],
        refused: RefusedFile,
        *,
        patience_seconds: float = 60.0,
    ) -> None:
        super().__init__(log, survey, machine, refused)
        self._cache = cache
        self._handle = cache.machine(machine)
        self._patience_seconds = patience_seconds
        self._moved_at = time.monotonic()

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
            self.refused.close()
        raise errors.UnavailableError("Redis keeps losing what it acknowledged: look at 'statecache status'")

    def _once(self, progress: Progress, flush: bool) -> Counts:
        epoch = self._cache.hot.stamp
        for steps in self.reader.chunks(self.survey, progress):
            self._write(steps)
        if flush:
            self._flush()
        if self._cache.hot.stamp != epoch:
            raise _StartOver
        self.refused.settle()
        return self.counts

    def _flush(self) -> None:
        """Wait until SQL has everything, as long as something moves."""
        behind: object = None
        self._moved_at = time.monotonic()
        while True:
            try:
                self._cache.flush(timeout=min(5.0, self._patience_seconds))
                return
            except errors.RecoveringError:
                raise _StartOver from None
            except (errors.DurabilityTimeout, errors.UnavailableError) as error:
                now_behind = _watermarks(self._cache)
                self._wait(0, error, moved=now_behind != behind)
                behind = now_behind

    # --- a chunk -----------------------------------------------------------------------------------------------------

    def _write(self, steps: list[_Step]) -> None:
        """Apply the steps, again and again until each is applied, found or refused."""
        attempt = 0
        self._moved_at = time.monotonic()
        while True:
            count = len(steps)
            steps, error = self._round(steps)
            if not steps:
                return
            moved = len(steps) < count
            attempt = 0 if moved else attempt + 1
            if error is not None:
                self._wait(attempt, error, moved=moved)

    def _round(self, steps: Sequence[_Step]) -> tuple[list[_Step], errors.StateCacheError | None]:
        """One look at unknown cases and one bulk call; returns the steps that are left, and what held one of them."""
        held = self._meet(steps)
        sent: list[_Step] = []
        moves: list[model.Move] = []
        left: list[_Step] = []
        for step in steps:
            move = self._plan(step, left)
            if move is not None:
                sent.append(step)
                moves.append(move)
        results = self._handle.transition_many(moves, timeout=CALL_SECONDS) if moves else []
        for step, result in zip(sent, results, strict=True):
            case = self.reader.cases[step.row.id]
            if isinstance(result, model.Receipt):
                self.counts.transitions += 1
                case.confirmed = max(case.confirmed, result.version)
                continue
            case.known = False
            if isinstance(result, _AGAIN):
                held = held or (None if isinstance(result, errors.StaleVersionError) else result)
                left.append(step)
            else:
                self._give_up(step, result)
        return left, held

    def _plan(self, step: _Step, left: list[_Step]) -> model.Move | None:
        """The move that a step is, if it is one now; else it is counted, refused, or left for the next round."""
        case = self.reader.cases[step.row.id]
        if case.refusal:
            self._refuse_step(step, case.refusal)
        elif not case.known:
            left.append(step)
        elif case.ahead:
            self._compare(step, case, case.ahead)
        elif (target := self.definition.targets[step.event].get(case.state)) is None:
            self._refuse_step(step, no_move(self.definition, case.state, step.event))
        else:
            move = _move(step, case)
            case.state, case.version, step.sent = target, case.version + 1, True
            return move
        return None

    def _compare(self, step: _Step, case: _Case, ahead: dict[str, tuple[str, int]]) -> None:
        """A step of a case whose history goes on beyond it: there already, or refused."""
        found = ahead.pop(step.transition_id, None)
        if found is not None:
            state, case.confirmed = found
            case.state = state if ahead else case.state
            self.counts.transitions += step.sent
            self.counts.duplicates += not step.sent
        elif step.event not in self.definition.available_events(case.state):
            self._refuse_step(step, no_move(self.definition, case.state, step.event))
        else:
            self._refuse_step(step, "later rows of its case are there already: history is not rewritten")

    def _give_up(self, step: _Step, error: errors.StateCacheError) -> None:
        if isinstance(error, (errors.ConfigurationError, errors.IntegrityError)):
            raise error
        self._refuse_step(step, str(error))

    # --- cases -------------------------------------------------------------------------------------------------------

    def _meet(self, steps: Sequence[_Step]) -> errors.StateCacheError | None:
        """Start the cases that are new, and read what is known of the others; returns what held one of them."""
        first: dict[str, _Step] = {}
        for step in steps:
            case = self.reader.cases[step.row.id]
            if not case.known and not case.refusal:
                wanted = case.started or self.definition.initial in self.definition.targets[step.event]
                if wanted or step.row.id not in first:
                    first.setdefault(step.row.id, step) if not wanted else first.update({step.row.id: step})
        return None
