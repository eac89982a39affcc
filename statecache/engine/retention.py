"""Retention: the history of instances that ended long ago leaves the database, into an archive or for good.

A chunk of instances after the other: read their history; write the archive, which is on the disk and was read back
when that returns; then ONE SQL transaction deletes what is in it (``durable/retention.py`` says what stays). Killed
before the transaction: the history is still there, and the next run writes the same archive again (its name is the
hash of its content; with other instances in the chunk it is another one, and these stand in both). Killed after it:
the chunk is not looked at again. Whatever was deleted is in an archive, always; a file may hold what was not deleted.

An instance with dead letters, or with fewer than three versions, is left alone. How old an end is the database's clock
says, whatever host this runs on. The ends were written by Redis' clock, so where the two are far apart nothing is touched:
one of them is wrong, and what was deleted does not come back.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from statecache.core import codec, definition, errors, failpoints, fold, model
from statecache.core.spec import readable
from statecache.durable import clock, faults
from statecache.durable import retention as durable_retention
from statecache.durable.retention import Collapse, Ended
from statecache.engine import archive

if TYPE_CHECKING:
    from statecache.engine.cache import StateCache

_log = logging.getLogger(__name__)
CHUNK_INSTANCES = 500
CHUNK_BYTES_MAX = 16 * 1024 * 1024
"""Of an archive's text, after which a chunk takes no further instance: it is in memory some times over."""
_ATTEMPTS = 5
_CLOCKS_DIFFER_MS = 3_600_000

Cursor = list[str | int]
"""Where retention stands, fit for JSON: machine, state, and (updated_ms, id) of the last instance."""


class Step(msgspec.Struct, frozen=True):
    """One chunk: how many instances and transitions left the database, and into which file."""

    cursor: Cursor
    instances: int
    transitions: int
    file: str | None = None
    damaged: tuple[str, ...] = ()
    """What was left out because its history does not lead to its checkpoint, or cannot be read."""


def run(
    cache: StateCache,
    older_than: timedelta,
    folder: Path | None,
    *,
    machine: str | None = None,
    dry_run: bool = False,
    cursor: Cursor | None = None,
    now_ms: int | None = None,
) -> Iterator[Step]:
    """Archive into ``folder``, or delete for None, what ended ``older_than`` ago, a chunk with each step.

    It may be left after any step, and go on from that step's ``cursor``. ``dry_run`` reads only. Raises ``NotFoundError`` for a
    machine that nobody registered, ``InvalidDataError``, ``UnavailableError``, ``OSError`` (the folder), and
    ``ConfigurationError`` where the clocks of the database and of Redis are over an hour apart: set them right. Instances
    whose history is damaged are left out, and told by each step.
    """
    if older_than < timedelta(0):
        raise errors.InvalidDataError(f"older_than {older_than} is refused: it must not be negative")
    until_ms = (_now_ms(cache) if now_ms is None else now_ms) - int(older_than.total_seconds() * 1000)
    if folder is not None and not dry_run:
        archive.sweep(folder)
    for (name, state), versions in _final_states(cache, machine):
        after = (0, "")
        if cursor is not None:
            place = str(cursor[0]), str(cursor[1])
            if (name, state) < place:
                continue
            if (name, state) == place:
                after = (int(cursor[2]), str(cursor[3]))
        yield from _state(cache, name, state, versions, until_ms, after, folder, dry_run)


def _now_ms(cache: StateCache) -> int:
    now_ms = clock.now_ms(cache.durable)
    ahead_ms = now_ms - cache.hot.time_ms()
    if abs(ahead_ms) > _CLOCKS_DIFFER_MS:
        apart = f"{abs(ahead_ms) / 1000:.0f} s {'ahead of' if ahead_ms > 0 else 'behind'}"
        raise errors.ConfigurationError(
            f"retention is refused: the database's clock is {apart} Redis', so how long ago anything ended is not known; set "
            "the clocks right (NTP on both servers) and run it again"
        )
    return now_ms


def _final_states(cache: StateCache, machine: str | None) -> list[tuple[tuple[str, str], list[int]]]:
    """The (machine, state) that are final, in order, each with the machine's versions in which it is."""
    rows = [row for row in cache.durable.machines() if machine in (None, row.name)]
    if machine is not None and not rows:
        raise errors.NotFoundError(f"no machine {machine!r} is registered here")
    found: dict[tuple[str, str], list[int]] = {}
    for spec in filter(None, (readable(row.spec) for row in rows)):
        for state in definition.of(spec).finals:
            found.setdefault((spec.name, state), []).append(spec.version)
    return sorted(found.items())


def _state(
    cache: StateCache,
    machine: str,
    state: str,
    versions: Sequence[int],
    until_ms: int,
    after: tuple[int, str],
    folder: Path | None,
    dry_run: bool,
) -> Iterator[Step]:
    attempts = 0
    while True:
        found = durable_retention.ended(cache.durable, machine, state, versions, until_ms, after, CHUNK_INSTANCES)
        if not found:
            return
        try:
            step = _chunk(cache, machine, state, found, folder, dry_run)
        except (faults.Overtaken, faults.Transient) as error:
            attempts += 1
            if attempts == _ATTEMPTS:
                raise errors.UnavailableError(f"retention of {machine} finds no quiet moment: {error}") from error
            continue
        attempts = 0
        after = int(step.cursor[2]), str(step.cursor[3])
        yield step


def _chunk(cache: StateCache, machine: str, state: str, found: list[Ended], folder: Path | None, dry_run: bool) -> Step:
    partitions = {row.partition: (row.partition, row.epoch, row.owner) for row in cache.durable.partitions()}
    checkpoints = cache.durable.checkpoints([(one.machine, one.id) for one in found])
    kept: list[archive.Archived] = []
    damaged: list[str] = []
    last, size = found[0], 0
    for last in found:
        one = _read(cache, checkpoints[last.machine, last.id]) if (last.machine, last.id) in checkpoints else None
        if isinstance(one, str):
            damaged.append(one)
            _log.error("retention leaves %s out: its history is damaged; run 'statecache verify'", one)
        elif one is not None:
            kept.append(one)
            size += len(msgspec.json.encode(one))
            if size > CHUNK_BYTES_MAX:
                break
    cursor: Cursor = [machine, state, last.updated_ms, last.id]
    gone = sum(len(one.transitions) - 1 for one in kept)
    if dry_run or not kept:
        return Step(cursor, len(kept), gone, None, tuple(damaged))
    path = None
    if folder is not None:
        path = archive.write(folder, cache.durable.identity().deployment, machine, kept)
    reason = "deleted by retention" if path is None else f"archived in {path.name}"
    whole = {(one.machine, one.id) for one in kept}
    held = {one.partition for one in found if (one.machine, one.id) in whole}
    failpoints.hit("retention.deleting")
    durable_retention.collapse(
        cache.durable, [partitions[number] for number in held], [_collapsed(one, reason) for one in kept]
    )
    failpoints.hit("retention.deleted")
    return Step(cursor, len(kept), gone, None if path is None else str(path), tuple(damaged))


def _read(cache: StateCache, kept: model.Checkpoint) -> archive.Archived | str:
    """An instance with its whole history; its address where that is damaged: it is not archived, and nothing deleted of it."""
    try:
        rows, data = cache.durable.history(kept.machine, kept.id), msgspec.json.decode(kept.data or "{}")
    except (errors.IntegrityError, *codec.UNREADABLE):
        return f"{kept.machine}:{kept.id}"
    version = 0
    for row in rows:
        if (row.covers_from or row.version) != version + 1:
            return f"{kept.machine}:{kept.id}"
        version = row.version
    if version < kept.version:
        return f"{kept.machine}:{kept.id}"
    if version > kept.version:  # one of both was read later: has it moved, or does the checkpoint stand behind?
        rows, now = cache.durable.story(kept.machine, kept.id)
        if now is None or (rows and rows[-1].version) != now.version:
            return f"{kept.machine}:{kept.id}"
        raise faults.Overtaken(f"{kept.machine}:{kept.id} has moved")
    return archive.Archived(
        kept.machine, kept.id, kept.state, kept.version, kept.created_ms, kept.updated_ms, data, rows,
    )  # fmt: skip


def _collapsed(one: archive.Archived, reason: str) -> Collapse:
    """All but the last transition as one row: the data that they lead to."""
    data: dict[str, object] = {}
    older, last = one.transitions[:-1], one.transitions[-2]
    for row in older:
        fold.apply_transition(data, row)
    return Collapse(
        one.machine, one.id, one.version, len(older) - 1, last.transition_id, msgspec.json.encode(data).decode(),
        all(row.complete for row in older), f"versions 1 to {last.version} {reason}",
    )  # fmt: skip
