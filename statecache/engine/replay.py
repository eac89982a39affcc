"""From the rows of an event log to the moves of a machine: what an import and its dry run have in common.

Every transition gets an id made from what its row says (machine, case, event, time, and its number among equal ones), never
from the file's name or the row's place in it: the same row has the same id in another run, in a longer file, in an
overlapping one.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from statecache.core import codec, errors, eventlog, learn, model, requests
from statecache.core.definition import Definition
from statecache.core.eventlog import Refused, Row
from statecache.core.machine import StateMachine
from statecache.engine.logfile import LogFile, Progress, Survey

CHUNK_ROWS = 4000
ID_PREFIX = "import:"
_REASON_LENGTH_MAX = 160


class RefusedFile:
    """The side file: a JSON object for every refused row, with its line, the reason and the row. Made when first needed;
    an older one, which would speak of another run, is removed when there is nothing to say, but by no dry run.

    Raises ``InvalidDataError`` for a file that is something else (it would be lost), and for one that has no folder: before the
    first row is applied, and in a dry run too.
    """

    def __init__(self, path: Path | None, *, dry_run: bool = False) -> None:
        self.path = path
        self._dry_run = dry_run
        self._file: IO[str] | None = None
        if path is not None and path.exists() and not _is_side_file(path):
            raise errors.InvalidDataError(
                f"{path} is refused as the file for refused rows: it is there already, and not of an import; name another one"
            )
        if path is not None and not path.parent.is_dir():
            raise errors.InvalidDataError(
                f"{path} is refused as the file for refused rows: there is no folder {path.parent}"
            )

    def write(self, line: int, reason: str, raw: Mapping[str, Any]) -> None:
        """Note one row."""
        if self.path is None:
            return
        if self._file is None:
            self._file = self.path.open("w", encoding="utf-8")
        self._file.write(json.dumps({"line": line, "reason": reason, "row": raw}, default=str) + "\n")

    def restart(self) -> None:
        """Forget what was noted."""
        self.close()
        self._file = None

    def settle(self) -> None:
        """End a run that came to the end of the log."""
        if self._file is None and self.path is not None and not self._dry_run:
            self.path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """End a run that did not; what was noted stays."""
        if self._file is not None:
            self._file.close()


def _is_side_file(path: Path) -> bool:
    """Whether a file is what an import leaves behind: regular, and empty or begun with a refused row."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        first = file.readline(1_000_000)
    try:
        return not first or {"line", "reason", "row"} <= set(json.loads(first))
    except (ValueError, TypeError):
        return False


@dataclass
class Counts:
    """What became of the rows: ``rows`` = ``transitions`` (applied now) + ``duplicates`` (there already) + ``refused``.

    ``starts`` are the instances begun now, ``starts_found`` those that an import had begun before; ``reasons`` counts the
    refusals by their text; ``started_over`` tells how often Redis lost something meanwhile and all was compared anew.
    """

    rows: int = 0
    starts: int = 0
    transitions: int = 0
    duplicates: int = 0
    starts_found: int = 0
    refused: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    started_over: int = 0


@dataclass(slots=True)
class Step:
    """A row on its way: the machine's event and the transition's id. ``sent`` once it may have been applied."""

    row: Row
    event: str
    transition_id: str
    sent: bool = False

    def move(self, expect_version: int) -> model.Move:
        row = self.row
        return requests.Unused(
            row.id, self.event, row.data, actor=row.actor, expect_version=expect_version,
            transition_id=self.transition_id, occurred_at=row.at,
        )  # fmt: skip


def transition_id(machine: str, case: str, event: str, at_ms: int | None = None, number: int = 1) -> str:
    """The id under which a row is applied: 96 bits of a hash of what it says."""
    text = "\x1f".join([machine, case, event, "" if at_ms is None else str(at_ms), str(number)])
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).digest()
    return ID_PREFIX + base64.urlsafe_b64encode(digest).decode()


def no_move(definition: Definition, state: str, event: str) -> str:
    """Why a row is refused that the machine does not allow where its case is."""
    allowed = ", ".join(definition.available_events(state)) or "none, it is final"
    return f"{event!r} is no move of machine {definition.name!r} from state {state!r}; allowed: {allowed}"


class Replay:
    """A log about to be replayed through a machine: its steps, the counts and the side file."""

    def __init__(
        self, log: LogFile, survey: Survey, machine: type[StateMachine], refused: RefusedFile, limits: codec.Limits
    ) -> None:
        self.machine = machine
        self._door = requests.Door(machine.definition, machine.guards, 1, limits, codec.TransitionIds(), _no_snapshot)
        self.definition = machine.definition
        self._plain_length_max = min(limits.id_length_max, limits.text_length_max)
        self._log = log
        self._survey = survey
        self._refused = refused
        self._events = learn.event_of(machine.spec)
        self._fields = (machine.spec.data_schema or {}).get("properties", {}) if log.form == "csv" else {}
        self.begin()

    def begin(self) -> None:
        """Begin at the top of the file, with nothing counted."""
        self.counts = Counts(rows=self._survey.rows)
        self._moments: dict[str, tuple[int, dict[str, int]]] = {}
        self._refused.restart()

    def chunks(self, progress: Progress) -> Iterator[list[Step]]:
        """The steps of every ``CHUNK_ROWS`` rows, those of each case in order; what is no step is refused."""
        rows = self._log.ordered(self._survey)
        count = 0
        while chunk := list(itertools.islice(rows, CHUNK_ROWS)):
            yield [step for row in chunk if (step := self._step(row)) is not None]
            count += len(chunk)
            progress(count)

    def refuse(self, step: Step, reason: str) -> None:
        """Count and note a step that is not applied."""
        self._refuse(step.row, reason)

    def problem(self, step: Step) -> str:
        """What the door will say against a step, empty if nothing: asked beforehand, as a refusal holds all behind it."""
        row = step.row
        if not row.data and not self.definition.guards:
            texts = row.id + (row.actor or "")
            if len(texts) <= self._plain_length_max and texts.isascii() and texts.isprintable():
                return ""  # the usual row: nothing in it can be refused
        try:
            self._door.transition(step.move(1))
        except errors.StateCacheError as error:
            return str(error)
        return ""

    def settle(self) -> Counts:
        """The end of the log was reached."""
        self._refused.settle()
        return self.counts

    def close(self) -> None:
        self._refused.close()

    def _refuse(self, row: Row | Refused, reason: str) -> None:
        self.counts.refused += 1
        kind = reason[:_REASON_LENGTH_MAX]
        if len(self.counts.reasons) > 50 and kind not in self.counts.reasons:
            kind = "others"
        self.counts.reasons[kind] = self.counts.reasons.get(kind, 0) + 1
        self._refused.write(row.line, reason, row.raw)

    def _step(self, row: Row | Refused) -> Step | None:
        if isinstance(row, Refused):
            self._refuse(row, row.reason)
            return None
        event = self._events.get(row.event)
        if event is None:
            self._refuse(row, f"machine {self.definition.name!r} has no event of the name or title {row.event!r}")
            return None
        if self._fields:
            row = row._replace(data={name: self._typed(name, value) for name, value in row.data.items()})
        return Step(row, event, self._transition_id(row, event))

    def _typed(self, name: str, value: Any) -> Any:
        return eventlog.typed(self._fields.get(name), value) if isinstance(value, str) else value

    def _transition_id(self, row: Row, event: str) -> str:
        """Rows come in order of time, so the equal ones of a case stand together but for others of the same moment."""
        at_ms = model.ms_of(row.at)
        known = self._moments.get(row.id)
        if known is None or known[0] != at_ms:
            known = self._moments[row.id] = (at_ms, {})
        number = known[1][event] = known[1].get(event, 0) + 1
        return transition_id(self.definition.name, row.id, event, at_ms, number)


def check(replay: Replay, progress: Progress = lambda rows: None) -> Counts:
    """The dry run: check every row against the machine and the limits, as if no instance existed. Needs no store."""
    definition = replay.definition
    states: dict[str, str] = {}
    for steps in replay.chunks(progress):
        for step in steps:
            state = states.get(step.row.id, definition.initial)
            target = definition.targets[step.event].get(state)
            problem = no_move(definition, state, step.event) if target is None else replay.problem(step)
            if target is None or problem:
                replay.refuse(step, problem)
                continue
            replay.counts.starts += step.row.id not in states
            replay.counts.transitions += 1
            states[step.row.id] = target
    return replay.settle()


def _no_snapshot(*given: object) -> model.Snapshot:
    raise AssertionError("nothing is sent from here, so no guard is asked")
