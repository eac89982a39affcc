"""The background jobs: what is not continuous. Each may be killed at any point and be run twice.

A job works until its time is over (``Run.time_is_over``), and then asks to be called again: RQ puts it back into its queue in
the same transaction that ends this part, under the same id, with what it had reached in its ``meta``. So a job has one id, one
progress and one result, however many parts it takes; a part that is killed begins again where the last note was made, and
other jobs come in between.

A job's arguments come from Redis, hence from anyone who can write there: they are checked here, once more than at the CLI.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from rq.timeouts import JobTimeoutException

from statecache.core import codec, errors, failpoints, wording
from statecache.engine import eviction, exporting, retention, warming
from statecache.engine import letters as engine_letters
from statecache.engine import verify as engine_verify
from workers import warmings

if TYPE_CHECKING:
    from rq.job import Job

    from statecache.durable.store import DurableStore
    from statecache.engine.cache import StateCache

_log = logging.getLogger(__name__)
RETRIES = 3
_LETTERS_PAGE = 500
_FILES_KEPT = 20
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,89}\.(jsonl|csv)(\.gz)?")
_NUMBER_MAX = 10**9 - 1
_FINDINGS_KEPT = 100
_FINDINGS_BYTES_MAX = 32 * 1024
"""In a job's notes: up to twice as many are shown, and a job with far more is not believed any more (``queues.py``)."""
_DETAIL_LENGTH = 300
_OVER = ["over"]
"""A cursor behind the end: a job that is killed after its last slice has nothing left to do."""


@dataclass
class Run:
    """One part of a job: where the part before ended, and where this one writes down how far it came."""

    cache: StateCache
    job: Job
    ends_at: float
    notes: dict[str, Any] = field(default_factory=dict)
    """What the job remembers from part to part (JSON)."""
    more: bool = False

    @property
    def time_is_over(self) -> bool:
        return time.monotonic() >= self.ends_at

    def note(self, **progress: Any) -> None:
        """Remember how far this is, now: a job that is killed after it goes on from here."""
        self.notes.update(progress)
        self.job.meta["notes"] = self.notes
        self.job.meta["noted_at"] = time.time()
        self.job.save_meta()
        failpoints.hit("jobs.noted")

    def again(self) -> dict[str, Any]:
        """Say that there is more to do; what has been noted is the part's result."""
        self.more = True
        return self.notes


Result = dict[str, Any]
Body = Callable[..., Result]


def verify(run: Run, *, machine: str = "") -> Result:
    """Compare a slice of history, logs and Redis after the other; ``machine``: only this one's."""
    if machine:
        run.cache.machine(machine)  # raises for one that is not registered
    notes = run.notes
    cursor = notes.get("cursor")
    for one in engine_verify.slices(run.cache, machine or None, cursor) if cursor != _OVER else ():
        run.note(
            cursor=one.cursor or _OVER,
            instances=notes.get("instances", 0) + one.instances,
            transitions=notes.get("transitions", 0) + one.transitions,
            hot=notes.get("hot", 0) + one.hot,
            findings=notes.get("findings", 0) + len(one.findings),
            first_findings=_first([*notes.get("first_findings", []), *map(_shown, one.findings)]),
        )
        for found in one.findings:
            _log.error("verify: %s %s: %s", found.kind, found.address, found.detail)
        if one.cursor is not None and run.time_is_over:
            return run.again()
    return {name: notes.get(name, 0) for name in ("instances", "transitions", "hot", "findings")}


def _shown(found: engine_verify.Finding) -> dict[str, str]:
    """A finding as it is noted. What differs may be an instance's whole data, twice: the worker's log has all of it."""
    cut = len(found.detail) > _DETAIL_LENGTH
    return {
        "kind": found.kind, "address": found.address,
        "detail": f"{found.detail[:_DETAIL_LENGTH]}... (all of it is in the worker's log)" if cut else found.detail,
    }  # fmt: skip


def _first(findings: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """The first that there is room for in a job's notes."""
    kept: list[dict[str, str]] = []
    size = 0
    for one in findings[:_FINDINGS_KEPT]:
        size += len(json.dumps(one))
        if size > _FINDINGS_BYTES_MAX:
            break
        kept.append(one)
    return kept


def retry_letters(run: Run) -> Result:
    """Try to move every instance's dead letters into history; those that SQL still refuses stay."""
    notes = run.notes
    after = notes.get("after")
    while True:
        page = run.cache.durable.parked_instances(_LETTERS_PAGE, tuple(after) if after else None)
        for machine, id in page:
            moved, kept = _retry_one(run.cache, machine, id)
            after = [machine, id]
            run.note(after=after, moved=notes.get("moved", 0) + moved, kept=notes.get("kept", 0) + kept)
            if run.time_is_over:
                return run.again()
        if len(page) < _LETTERS_PAGE:
            return {"moved": notes.get("moved", 0), "kept": notes.get("kept", 0)}


def _retry_one(cache: StateCache, machine: str, id: str) -> tuple[int, int]:
    """(letters moved, instances that stay parked)."""
    try:
        return engine_letters.retry(cache, machine, id), 0
    except errors.NotFoundError:  # somebody was quicker
        return 0, 0
    except (errors.UnavailableError, errors.RecoveringError, JobTimeoutException):
        raise
    except Exception as error:  # whatever SQL has against it now: the next instance's may be well
        _log.warning("letters of %s:%s stay: %s", machine, id, error)
        return 0, 1


def evict(run: Run, *, machine: str = "", idle_seconds: float = -1.0) -> Result:
    """Let idle instances leave Redis, by the rules of the settings, or (``idle_seconds``) all that are idle for so long."""
    if machine:
        run.cache.machine(machine)
    report = eviction.evict(
        run.cache,
        idle_seconds=None if idle_seconds < 0 else float(idle_seconds),
        machine=machine or None,
        seconds_max=max(0.1, run.ends_at - time.monotonic()),
    )
    run.note(evicted=run.notes.get("evicted", 0) + report.evicted, looked_at=report.looked_at)
    if report.more and report.evicted:
        return run.again()
    return {"evicted": run.notes["evicted"], "above": report.above, "more": report.more}


def warm(run: Run, *, machine: str = "", limit: int = 0, partitions: str = "", partition: int = -1) -> Result:
    """Bring back into Redis what moved last, after a recovery; ``limit`` instances, or (0) until Redis is at its bounds.

    One job for each partition (of ``partitions``, numbers with commas between): this one only enqueues them, with
    ``partition``.
    """
    if partition < 0:
        return warmings.fan_out(run, machine, limit, partitions)
    notes = run.notes
    if notes.get("ended"):
        return warmings.result(notes)
    done = notes.get("warmed", 0) + notes.get("hot_already", 0)
    report = warming.warm(
        run.cache,
        limit=limit - done if limit else None,
        machine=machine or None,
        partition=partition,
        position={name: (int(at), str(id)) for name, (at, id) in notes.get("position", {}).items()},
        seconds_max=max(0.1, run.ends_at - time.monotonic()),
    )
    left_cold = notes.get("left_cold", 0) + report.stale + report.parked
    warmed, hot_already = notes.get("warmed", 0) + report.warmed, notes.get("hot_already", 0) + report.hot_already
    more = report.more and not report.full and not (limit and warmed + hot_already >= limit)
    run.note(
        done=warmed + hot_already + left_cold,
        of=min(report.candidates, limit or report.candidates),
        warmed=warmed,
        hot_already=hot_already,
        left_cold=left_cold,
        full=report.full,
        ended=not more,
        position=report.position,
    )
    return run.again() if more else warmings.result(notes)


def retain(run: Run, *, machine: str = "", older_than_days: float = -1.0) -> Result:
    """Archive the history of instances that ended long ago, in the folder that the settings of the worker name."""
    settings = run.cache.settings
    if settings.retention_archive_dir is None:
        raise errors.ConfigurationError(
            "retention_archive_dir is not set: the retention job keeps what it deletes in that folder"
        )
    days = settings.retention_age_days if older_than_days < 0 else float(older_than_days)
    if (
        days < settings.retention_age_days
    ):  # whoever can write to the queue cannot take out more than the settings allow
        raise errors.InvalidDataError(
            f"older_than_days = {days:g} is refused: retention_age_days is {settings.retention_age_days:g}"
        )
    age = timedelta(days=days)
    notes = run.notes
    folder = settings.retention_archive_dir
    for step in retention.run(run.cache, age, folder, machine=machine or None, cursor=notes.get("cursor")):
        run.note(
            cursor=step.cursor,
            instances=notes.get("instances", 0) + step.instances,
            transitions=notes.get("transitions", 0) + step.transitions,
            files=[*notes.get("files", []), *([step.file] if step.file else [])][-_FILES_KEPT:],
            damaged=[*notes.get("damaged", []), *step.damaged][:_FILES_KEPT],
        )
        if run.time_is_over:
            return run.again()
    return {
        "instances": notes.get("instances", 0), "transitions": notes.get("transitions", 0), "damaged": notes.get("damaged", []),
    }  # fmt: skip


def export(run: Run, *, machine: str, file: str) -> Result:
    """Write a machine's history to ``file`` (a plain name) in the folder that the settings of the worker name."""
    folder = run.cache.settings.export_dir
    if folder is None:
        raise errors.ConfigurationError("export_dir is not set: the export job has no folder to write to")
    folder.mkdir(parents=True, exist_ok=True)
    notes = run.notes
    mark = hashlib.sha256(str(run.job.id).encode()).hexdigest()[:12]
    begun = exporting.Step(*notes["step"]) if "step" in notes and exporting.can_go_on(folder / file, mark) else None
    transitions = begun.transitions if begun else 0
    for step in exporting.run(run.cache, machine, folder / file, begun, mark=mark):
        transitions = step.transitions
        if step.after is not None:
            run.note(step=[step.transitions, step.bytes, step.after], transitions=step.transitions)
            if run.time_is_over:
                return run.again()
    return {"transitions": transitions, "file": str(folder / file)}


BODIES: Mapping[str, Body] = {
    "statecache.verify": verify,
    "statecache.retry-letters": retry_letters,
    "statecache.evict": evict,
    "statecache.warm": warm,
    "statecache.retention": retain,
    "statecache.export": export,
}
"""The allow-list: a job's name, and what it does."""


def allowed(cache: StateCache) -> dict[str, Callable[..., Any]]:
    """The functions for a worker that works on ``cache``."""

    def of(body: Body) -> Callable[..., Any]:
        def run(job: Job, **arguments: Any) -> Result:
            return perform(cache, body, job, arguments)

        return run

    return {name: of(body) for name, body in BODIES.items()}


def perform(cache: StateCache, body: Body, job: Job, arguments: Mapping[str, Any]) -> Result:
    """Run one part of a job, in the work-horse."""
    try:
        given = checked(body, arguments)
    except errors.InvalidDataError:
        job.retries_left = 0
        raise
    notes = job.meta.get("notes")
    run = Run(cache, job, time.monotonic() + cache.settings.job_part_seconds, notes if isinstance(notes, dict) else {})
    failpoints.hit("jobs.begun")
    try:
        result = body(run, **given)
    except _THE_SAME_EACH_TIME:
        job.retries_left = 0
        raise
    if run.more:
        job.repeats_left, job.repeat_intervals = 1, [0]
        job.retries_left = RETRIES  # it got somewhere
    failpoints.hit("jobs.ended")
    return result


_THE_SAME_EACH_TIME = (errors.InvalidDataError, errors.NotFoundError, errors.ConfigurationError)
"""What ends a job at once: it is not tried again."""
_TYPES: Mapping[str, type] = {"str": str, "int": int, "bool": bool, "float": float}


def parameters(body: Body) -> dict[str, tuple[type, Any]]:
    """A job's arguments: the type and the default (``inspect.Parameter.empty`` for none) of each."""
    found = list(inspect.signature(body).parameters.values())[1:]
    return {one.name: (_TYPES[str(one.annotation)], one.default) for one in found}


def checked(body: Body, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments, if they are those of the job. Raises ``InvalidDataError``."""
    known = parameters(body)
    for name, value in arguments.items():
        if name not in known:
            raise errors.InvalidDataError(f"argument {name!r} is refused: there are {', '.join(known) or 'none'}")
        wanted = known[name][0]
        if type(value) is not wanted and not (wanted is float and type(value) is int):
            raise errors.InvalidDataError(f"{name} = {wording.shown(value)} is refused: it must be {wanted.__name__}")
        number: Any = value
        if wanted in (int, float) and not 0 <= number <= _NUMBER_MAX:
            raise errors.InvalidDataError(f"{name} = {wording.shown(value)} is refused: it must be 0 to {_NUMBER_MAX}")
    for name, (_, default) in known.items():
        if default is inspect.Parameter.empty and arguments.get(name, "") == "":
            raise errors.InvalidDataError(f"argument {name!r} is missing")
    file = arguments.get("file")
    if file is not None and not _FILE_NAME.fullmatch(file):
        raise errors.InvalidDataError(
            f"file {wording.shown(file)} is refused: a plain name of letters, digits, '.', '_' and '-' that ends with .jsonl "
            "or .csv, or those and .gz"
        )
    warmings.numbers(arguments.get("partitions", ""))
    return dict(arguments)


def check_store(durable: DurableStore, arguments: Mapping[str, Any]) -> None:
    """Refuse a machine, or a partition, that the store has not: raises ``NotFoundError`` and ``InvalidDataError``."""
    machine = arguments.get("machine")
    if machine and not (codec.NAME.fullmatch(machine) and durable.machine(machine)):
        raise errors.NotFoundError(f"no machine {wording.shown(machine)} is registered here")
    warmings.numbers(arguments.get("partitions", ""), durable.identity().partition_count)


def parsed(body: Body, words: Mapping[str, str]) -> dict[str, Any]:
    """Arguments from words of a command line. Raises ``InvalidDataError``."""
    known = parameters(body)
    given: dict[str, Any] = {}
    for name, word in words.items():
        wanted = known[name][0] if name in known else str
        if not word:  # what a shell makes of an unset variable: it would be every machine
            raise errors.InvalidDataError(f"{name}= is refused: it is empty")
        try:
            given[name] = {"true": True, "false": False}[word.lower()] if wanted is bool else wanted(word)
        except (ValueError, KeyError):
            raise errors.InvalidDataError(f"{name}={word} is refused: it must be {wanted.__name__}") from None
    return checked(body, given)
