"""Verification: is what is hot what SQL and the log say it is, and is every history whole?

Three passes, each over everything:

1. SQL: every history is versions 1..n, without gap and fork (a ``@reconciled`` row stands for the range it names), each
   transition begins where the one before it ended, and the checkpoint is the fold of them all; none is without a history;
2. the logs: behind its watermark each goes on without a hole;
3. Redis: every hot hash is its checkpoint with its open dead letters and the unflushed entries of the log folded on; none of
   the log's entries of it stands at SQL's watermark or below and is not in SQL.

It reads while writers write and flushers flush: whatever looks wrong is looked at again, alone, before it is called a finding.
Then history and checkpoint come from one snapshot; where a log does not go on, the watermark is asked whether it was flushed
and trimmed meanwhile; a hash that has moved on meanwhile is compared at the version that it had.

With a backlog every hash of it differs from its checkpoint. So a log is read once for many of them, first behind its watermark
alone; below that, where ``log_keep_seconds`` keeps what is flushed long since, only for those that look wrong all the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from statecache.core import codec, entry, errors, flows, fold, model
from statecache.durable.queries import UnreadableError
from statecache.hot.store import READ_BYTES_MAX

if TYPE_CHECKING:
    from statecache.engine.cache import StateCache

Answer = TypeVar("Answer")

_LOOKS = 4
_PAGE = 500
_TOGETHER = 10_000
"""Unflushed entries of the hashes for which a log is read once. They are in memory; fewer are more readings of the backlog."""


class Finding(msgspec.Struct, frozen=True):
    """One thing that is not as it must be. ``kind``: ``history``, ``checkpoint``, ``log`` or ``hot``."""

    kind: str
    address: str
    detail: str


class Findings(msgspec.Struct, frozen=True):
    """What was looked at, and what was found."""

    instances: int
    transitions: int
    hot: int
    findings: tuple[Finding, ...]


class _Folded(msgspec.Struct):
    """One instance's history as far as it was followed, and the first thing wrong with it."""

    state: str = ""
    version: int = 0
    data: dict[str, Any] = {}
    complete: bool = True
    problem: str = ""

    def follow(self, row: model.Transition) -> None:
        first = row.covers_from or row.version
        if first != self.version + 1:
            self.problem = self.problem or f"version {first} follows {self.version}"
        elif row.covers_from is None and (row.from_state or "") != self.state:
            self.problem = (
                self.problem
                or f"version {row.version} leaves {row.from_state!r}, but the one before led to {self.state!r}"
            )
        self.complete = self.complete if row.covers_from is None else row.complete
        fold.apply_transition(self.data, row)
        self.state, self.version = row.to_state, row.version


Cursor = list[str | int]
"""Where a verification stands, fit for JSON: ``["histories", machine, id]``, ``["logs", partition]``, ``["hot", scan]``."""


class Slice(msgspec.Struct, frozen=True):
    """A part of a verification; ``cursor`` is where the next one begins, None behind the last."""

    cursor: Cursor | None
    findings: tuple[Finding, ...] = ()
    instances: int = 0
    transitions: int = 0
    hot: int = 0


def verify(
    cache: StateCache, machine: str | None = None, progress: Callable[[str], None] = lambda text: None
) -> Findings:
    """Compare everything with everything, and change nothing.

    Cost: one pass over history, checkpoints and hot hashes, and one over the backlog for each ten thousand entries of it;
    memory: one page of each, and those entries. Raises ``UnavailableError`` and ``RecoveringError``.
    """
    found: list[Finding] = []
    instances = transitions = hot = 0
    for one in slices(cache, machine):
        found += one.findings
        instances, transitions, hot = instances + one.instances, transitions + one.transitions, hot + one.hot
        progress(f"{instances} histories, {transitions} transitions, {hot} hot instances, {len(found)} findings")
    return Findings(instances, transitions, hot, tuple(found))


def slices(cache: StateCache, machine: str | None = None, cursor: Cursor | None = None) -> Iterator[Slice]:
    """The same, a slice (about a thousand instances, or a log) after the other; it can go on later from any ``cursor``."""
    phase, *place = cursor or ["histories"]
    if phase == "histories":
        after = (str(place[0]), str(place[1])) if place else None
        yield from _history_slices(cache, machine, after)
    if phase in ("histories", "logs"):
        for partition in range(int(place[0]) if phase == "logs" else 0, cache.settings.partition_count):
            yield Slice(["logs", partition + 1], tuple(_log_findings(cache, partition)))
    yield from _hot_slices(cache, machine, str(place[0]) if phase == "hot" else "0")


def _history_slices(cache: StateCache, machine: str | None, after: fold.Instance | None) -> Iterator[Slice]:
    found: list[Finding] = []
    instances = transitions = 0
    address = after
    for address, rows, checkpoint in _instances(cache, machine, after):
        instances += 1
        if isinstance(rows, UnreadableError):
            _note(found, address, ("history", str(rows)))
            continue
        transitions += len(rows)
        if _sql_problem(rows, checkpoint):
            _note(found, address, _settled(lambda address=address: _sql_problem_of(cache, *address)))  # type: ignore[misc]
        if instances % 1000 == 0 or transitions > 10 * _PAGE:
            yield Slice(["histories", *address], tuple(found), instances, transitions)
            found, instances, transitions = [], 0, 0
    yield Slice(["logs", 0], tuple(found), instances, transitions)


def _hot_slices(cache: StateCache, machine: str | None, scan: str) -> Iterator[Slice]:
    """A slice is a page of the SCAN, or as many as it takes to read the logs for ``_TOGETHER`` entries."""
    suspects: dict[fold.Instance, int] = {}
    hot = 0
    while True:
        scan, page = cache.hot.scan(scan, machine)
        suspects |= _suspects(cache, page) if page else {}
        hot += len(page)
        if scan != "0" and 0 < sum(suspects.values()) < _TOGETHER:
            continue
        yield Slice(None if scan == "0" else ["hot", scan], tuple(_hot_findings(cache, list(suspects))), hot=hot)
        if scan == "0":
            return
        suspects, hot = {}, 0


Problem = tuple[str, str] | None
"""(kind, detail)."""


def _note(found: list[Finding], address: fold.Instance, problem: Problem) -> None:
    if problem:
        found.append(Finding(problem[0], ":".join(address), problem[1]))


def _settled(look: Callable[[], Problem]) -> Problem:
    """Look until nothing is wrong, a few times: what is wrong only while somebody writes is no finding."""
    problem: Problem = None
    for attempt in range(_LOOKS):
        problem = _looked(look)
        if problem is None:
            return None
        time.sleep(0.01 * 2**attempt)
    return problem


def _looked(look: Callable[[], Problem]) -> Problem:
    try:
        return look()
    except UnreadableError as error:
        return "history", str(error)


# --- SQL ---------------------------------------------------------------------------------------------------------------


def _instances(
    cache: StateCache, machine: str | None, after: fold.Instance | None
) -> Iterator[tuple[fold.Instance, list[model.Transition] | UnreadableError, model.Checkpoint | None]]:
    """Histories and checkpoints in SQL, side by side: no rows for a checkpoint without a history. The two are read page by
    page, each of another moment."""
    checkpoints = cache.durable.iterate_checkpoints(machine=machine, after=after)
    kept = next(checkpoints, None)
    for rows in _histories(cache, machine, after):
        address = rows.instance if isinstance(rows, UnreadableError) else (rows[0].machine, rows[0].id)
        while kept is not None and (kept.machine, kept.id) < address:
            yield (kept.machine, kept.id), [], kept
            kept = next(checkpoints, None)
        is_here = kept is not None and (kept.machine, kept.id) == address
        yield address, rows, kept if is_here else None
        if is_here:
            kept = next(checkpoints, None)
    while kept is not None:
        yield (kept.machine, kept.id), [], kept
        kept = next(checkpoints, None)


def _histories(
    cache: StateCache, machine: str | None, after: fold.Instance | None = None
) -> Iterator[list[model.Transition] | UnreadableError]:
    """The histories in SQL, one instance after the other, behind that of ``after``; what is wrong with one that cannot be
    read."""
    while True:
        rows: list[model.Transition] = []
        unreadable: UnreadableError | None = None
        try:
            for row in cache.durable.iterate_transitions(machine, after=after):
                if rows and (row.machine, row.id) != (rows[0].machine, rows[0].id):
                    yield rows
                    rows = []
                rows.append(row)
        except UnreadableError as error:
            unreadable = error
        if rows and (unreadable is None or (rows[0].machine, rows[0].id) != unreadable.instance):
            yield rows
        if unreadable is None:
            return
        yield unreadable
        after = unreadable.instance


def _sql_problem_of(cache: StateCache, machine: str, id: str) -> Problem:
    return _sql_problem(*cache.durable.story(machine, id))


def _sql_problem(rows: Sequence[model.Transition], checkpoint: model.Checkpoint | None) -> Problem:
    folded = _folded(rows)
    if folded.problem:
        return "history", folded.problem
    if not rows:
        return (
            ("history", f"the checkpoint is at version {checkpoint.version}, but there is no history")
            if checkpoint
            else None
        )
    if checkpoint is None:
        return "checkpoint", f"history has {folded.version} versions, but there is no checkpoint"
    if (checkpoint.state, checkpoint.version) != (folded.state, folded.version):
        return "checkpoint", (
            f"the checkpoint is {checkpoint.state!r} at {checkpoint.version}, history {folded.state!r} at {folded.version}"
        )
    if folded.complete and _as_folded(checkpoint).data != folded.data:
        return "checkpoint", f"the checkpoint's data is {checkpoint.data}, that of history {folded.data}"
    return None


def _folded(rows: Sequence[model.Transition]) -> _Folded:
    folded = _Folded(data={})
    for row in rows:
        folded.follow(row)
    return folded


# --- logs --------------------------------------------------------------------------------------------------------------


def _log_findings(cache: StateCache, partition: int) -> list[Finding]:
    """Follow a log from its watermark to its end."""
    found: list[Finding] = []
    cursor = _watermark(cache, partition)
    while True:
        read = partial(cache.hot.read, [(partition, cursor)], entries=_PAGE, bytes_max=READ_BYTES_MAX)
        reply = _asked(cache, read)[0]
        if reply.code != "OK":
            cache.admission.ensure(reply.code, cache.deadline(None))
            cursor = _watermark(cache, partition)
            continue
        for line in reply.lines:
            try:
                record = entry.parse_line(line)
            except errors.IntegrityError as error:
                return [*found, Finding("log", f"partition {partition}", str(error))]
            if not entry.follows(record.entry_id, cursor, record.prev if record.is_mark else None):
                watermark = _watermark(cache, partition)
                if watermark > cursor:  # what stood between was flushed and trimmed
                    cursor = watermark
                    break
                detail = f"{record.entry_id} does not follow {cursor}: entries are missing"
                found.append(Finding("log", f"partition {partition}", detail))
            cursor = record.entry_id
        else:
            if not reply.lines or cursor >= reply.last:
                return found


def _asked(cache: StateCache, ask: Callable[[], Answer]) -> Answer:
    """What Redis says; while it cannot be reached it is asked again, as long as a call may take."""
    return cache.driver.patiently(ask, cache.deadline(None))


def _watermark(cache: StateCache, partition: int) -> entry.EntryId:
    return cache.durable.partitions([partition])[0].watermark


# --- Redis -------------------------------------------------------------------------------------------------------------


def _suspects(cache: StateCache, page: Sequence[fold.Instance]) -> dict[fold.Instance, int]:
    """Those of a page whose hash is not simply their checkpoint, and how many entries they may have in the log."""
    checkpoints = cache.durable.checkpoints(page)
    keyspace = cache.hot.keyspace
    hashes = _asked(cache, lambda: cache.hot.hashes([(keyspace.partition_of(*one), *one) for one in page]))
    suspects = {}
    for address, fields in zip(page, hashes, strict=True):
        expected = _as_folded(checkpoints.get(address))
        if _difference(fields, expected) is not None:
            suspects[address] = max(1, _stand(fields)[1] - expected.version)
    return suspects


def _as_folded(checkpoint: model.Checkpoint | None) -> _Folded:
    if checkpoint is None:
        return _Folded(data={})
    try:
        data = msgspec.json.decode(checkpoint.data or "{}")
    except codec.UNREADABLE:  # no data is equal to what cannot be read
        return _Folded(checkpoint.state, checkpoint.version, {"@": None})
    return _Folded(checkpoint.state, checkpoint.version, data)


def _hot_findings(cache: StateCache, suspects: Sequence[fold.Instance]) -> list[Finding]:
    """Look at all of a partition together behind its watermark, at what looks wrong then in its whole log, and at what is left
    alone."""
    partitions: dict[int, list[fold.Instance]] = {}
    for address in suspects:
        partitions.setdefault(cache.hot.keyspace.partition_of(*address), []).append(address)
    found: list[Finding] = []
    for partition, left in partitions.items():
        for whole in (False, True):
            problems = _hot_problems(cache, partition, left, whole=whole) if left else []
            left = [address for address, problem in zip(left, problems, strict=True) if problem]
        for address in left:
            _note(found, address, _settled(partial(_hot_problem_alone, cache, partition, address)))
    return found


def _hot_problem_alone(cache: StateCache, partition: int, address: fold.Instance) -> Problem:
    return _hot_problems(cache, partition, [address], whole=True)[0]


def _hot_problems(
    cache: StateCache, partition: int, addresses: Sequence[fold.Instance], *, whole: bool
) -> list[Problem]:
    """Compare hashes of a partition with their checkpoints and the unflushed entries behind those, in one reading of its log.

    The order of the reads counts: what leaves the log between them is in SQL by then.
    """
    hashes = _asked(cache, lambda: cache.hot.hashes([(partition, *one) for one in addresses]))
    wanted = {one: [""] for one in addresses}
    code, entries = _asked(cache, lambda: cache.hot.find_many(partition, wanted, whole=whole))
    if code != "OK":
        cache.admission.ensure(code, cache.deadline(None))
        return [("hot", f"Redis was {code}")] * len(addresses)
    records = fold.by_instance(cache.driver.not_discarded(entries))
    known = cache.durable.lookup([(*one, partition) for one in addresses])
    return [
        _looked(partial(_hot_problem, cache, partition, one, fields, records.get(one, []), kept))
        for one, fields, kept in zip(addresses, hashes, known, strict=True)
    ]


def _hot_problem(
    cache: StateCache,
    partition: int,
    address: fold.Instance,
    fields: Mapping[bytes, bytes],
    entries: Sequence[entry.Entry],
    known: model.Lookup,
) -> Problem:
    machine, id = address

    def hash_() -> Mapping[bytes, bytes]:
        return _asked(cache, lambda: cache.hot.hashes([(partition, machine, id)])[0])

    letters: list[entry.Entry] = []
    if known.letters:  # before what SQL knows: one that was retried in between is in the checkpoint
        letters = [letter.entry for letter in cache.durable.letters(machine, id)]
        (known,) = cache.durable.lookup([(machine, id, partition)])
    expected = _as_folded(known.checkpoint)
    # A parked hash is ahead of its checkpoint by its letters, or was hydrated from the checkpoint alone.
    if letters and _difference(fields, expected) is None:
        return None
    unflushed, lost = _unflushed(cache, partition, known, entries)
    if lost is not None:
        return "log", (
            f"entry {lost.entry_id}, version {lost.version}, is not in SQL, whose watermark is {known.watermark} already: "
            "it will not be flushed"
        )
    records = [*letters, *unflushed]
    version = _stand(fields)[1]
    reached = max([expected.version, *(record.version for record in records)])
    has_moved_on = version < reached <= _stand(hash_())[1]
    if has_moved_on and expected.version > version:
        expected = _folded(cache.durable.history(machine, id, up_to_version=version))
        if (expected.version, expected.complete) != (version, True):
            return None
    for record in records:
        if expected.version < record.version <= (version if has_moved_on else reached):
            try:
                expected.follow(_as_history(record, expected.version))
            except errors.IntegrityError as error:
                return "log", str(error)
    return ("log", expected.problem) if expected.problem else _difference(fields, expected)


def _unflushed(
    cache: StateCache, partition: int, known: model.Lookup, entries: Sequence[entry.Entry]
) -> tuple[list[entry.Entry], entry.Entry | None]:
    """The entries of an instance that SQL has not yet, and the first that it will never have: it stands at SQL's watermark or
    below, in neither history nor a letter. (``known`` is of one snapshot, later than the entries.)"""
    version = known.checkpoint.version if known.checkpoint else 0
    unflushed: list[entry.Entry] = []
    for record in entries:
        if record.version <= version:
            continue
        if record.entry_id > known.watermark:
            unflushed.append(record)
        elif codec.token_of(record.transition_id) not in known.letters and not _is_kept_apart(cache, partition, record):
            return unflushed, record
    return unflushed, None


def _is_kept_apart(cache: StateCache, partition: int, record: entry.Entry) -> bool:
    """Is, or was until it was discarded, an entry a letter under its entry id, because another had its version?"""
    name = (entry.FOREIGN, entry.apart(partition, record).id)
    return bool(cache.durable.letters(*name)) or name in {(one.machine, one.id) for one in cache.durable.discards()}


def _as_history(record: entry.Entry, version: int) -> model.Transition:
    """An entry or a letter as the row of history that follows a version. A ``@reconciled`` letter stands for all up to its own,
    and whether its data is all of it no letter tells."""
    row = flows.transition_of(record)
    if record.event != entry.EVENT_RECONCILED:
        return row
    return msgspec.structs.replace(row, covers_from=version + 1, complete=False)


def _stand(fields: Mapping[bytes, bytes]) -> tuple[str, int]:
    """State and version of a hash; version 0 for what is none of ours."""
    state, version, *_ = [*fields.get(b"@", b"").decode(errors="backslashreplace").split(" "), ""]
    return state, int(version) if version.isascii() and version.isdigit() else 0


def _difference(fields: Mapping[bytes, bytes], expected: _Folded) -> Problem:
    if not fields:
        return None
    state, version = _stand(fields)
    if (state, version) != (expected.state, expected.version):
        return "hot", f"Redis has {state!r} at {version}, SQL and log have {expected.state!r} at {expected.version}"
    try:
        data = {
            name.decode(): msgspec.json.decode(text)
            for name, text in fields.items()
            if name not in (b"@", b"@r", b"@c")
        }
    except codec.UNREADABLE as error:
        return "hot", f"the data in Redis is not what statecache wrote: {error}"
    if expected.complete and data != expected.data:
        return "hot", f"the data in Redis is {data}, that of SQL and log {expected.data}"
    return None
