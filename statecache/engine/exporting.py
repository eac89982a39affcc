"""A machine's history as a file: JSON lines or CSV, a line per transition, by instance and version.

It is written under another name, step by step; each step's ``Step`` says how long the file on the disk is then, so that
whoever goes on after a death cuts off what was written behind it, and begins anew where the file is shorter. At the end
it gets its name.

Whoever goes on in several parts (a job) has a ``mark`` of its own in that other name: nobody else writes there in between. And
whoever writes has a lock on the file, which the kernel drops with its process: of two that write under one name, the second is
refused. What was left behind a day ago is removed by the next export into the same file. Of an export that fails (a full
disk) only what can be gone on with stays: without a mark nothing.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import fcntl
import glob
import gzip
import io
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from statecache.core import errors, model, spreadsheet

if TYPE_CHECKING:
    from statecache.engine.cache import StateCache

_STEP_INSTANCES = 1000
_STEP_BYTES_MAX = 16 * 1024 * 1024
_WAITING_BYTES_MAX = 4 * 1024 * 1024
"""Lines that are in memory, not in the file yet."""
_LEFT_SECONDS = 86_400


class Step(msgspec.Struct, frozen=True):
    """How far an export came: transitions and bytes written, the last whole instance's id (None: it is done)."""

    transitions: int
    bytes: int
    after: str | None


def run(cache: StateCache, machine: str, path: Path, step: Step | None = None, *, mark: str = "") -> Iterator[Step]:
    """Export the history that is in SQL, from the start or from a ``step`` on (with the same ``mark``); the last step has no
    ``after``.

    Raises ``NotFoundError`` for a machine that nobody registered, ``InvalidDataError`` for a kind of file that is none,
    ``OSError``, ``UnavailableError``: also while another export writes under this name.
    """
    if cache.durable.machine(machine) is None:
        raise errors.NotFoundError(f"no machine {machine!r} is registered here")
    form, packed = _form(path)
    part = _part(path, mark)
    _sweep(path)
    with _locked(part) as file:
        if step is None or os.fstat(file.fileno()).st_size < step.bytes:  # new, or cut: another disk, perhaps
            step = Step(0, 0, "")
        steps = _steps(cache, machine, file, form, packed, step)
        try:
            for step in steps:
                if step.after is not None:
                    yield step
            part.rename(path)
        except GeneratorExit:  # whoever left it here may go on
            raise
        except BaseException:
            if mark and step.bytes:
                os.ftruncate(file.fileno(), step.bytes)
            else:
                part.unlink(missing_ok=True)
            raise
    yield Step(step.transitions, step.bytes, None)


def _steps(
    cache: StateCache,
    machine: str,
    file: io.FileIO,
    form: Callable[[model.Transition], bytes],
    packed: Callable[[bytes], bytes],
    step: Step,
) -> Iterator[Step]:
    """Write what is behind a step; the last step that this yields has no ``after``."""
    file.truncate(step.bytes)
    file.seek(step.bytes)
    if not step.bytes and form is _csv:
        _write(file, packed(_csv_line(spreadsheet.COLUMNS)))
    lines: list[bytes] = []
    transitions, last = step.transitions, step.after
    instances = size = waiting = 0
    for row in cache.durable.iterate_transitions(machine, after=(machine, last) if last else None):
        if transitions > step.transitions and row.id != last:
            instances += 1
            if instances == _STEP_INSTANCES or size > _STEP_BYTES_MAX:
                _put(file, packed, lines)
                step = _written(file, transitions, last)
                instances = size = waiting = 0
                yield step
        lines.append(form(row))
        size, waiting = size + len(lines[-1]), waiting + len(lines[-1])
        if waiting > _WAITING_BYTES_MAX:  # of one instance with a long history, too
            _put(file, packed, lines)
            waiting = 0
        transitions, last = transitions + 1, row.id
    _put(file, packed, lines)
    yield _written(file, transitions, None)


def can_go_on(path: Path, mark: str = "") -> bool:
    """Whether there is what an export that did not end has left."""
    return _part(path, mark).is_file()


def _part(path: Path, mark: str) -> Path:
    return path.with_name(f".{path.name}.{mark}.part" if mark else f".{path.name}.part")


def _sweep(path: Path) -> None:
    """Remove what exports that nobody goes on with have left. One that does so all the same begins anew."""
    for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - part.stat().st_mtime > _LEFT_SECONDS:
                part.unlink()


@contextlib.contextmanager
def _locked(part: Path) -> Iterator[io.FileIO]:
    """The unfinished file, for this process alone; made if there is none. Nothing of it is in a buffer, whose rest would be
    written behind a failure."""
    with os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise errors.UnavailableError(
                f"another export is writing {part}: let it end, or take another file"
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):  # a file system without locks
                raise
        if not part.exists() or not os.path.samestat(part.stat(), os.fstat(file.fileno())):
            raise errors.UnavailableError(f"another export that wrote {part} has just ended: do the same again")
        yield file


def _put(file: io.FileIO, packed: Callable[[bytes], bytes], lines: list[bytes]) -> None:
    _write(file, packed(b"".join(lines)))
    lines.clear()


def _write(file: io.FileIO, text: bytes) -> None:
    left = memoryview(text)
    while left:
        left = left[file.write(left) :]


def _written(file: io.FileIO, transitions: int, last: str | None) -> Step:
    os.fsync(file.fileno())  # a step is noted elsewhere, where it may outlive a power loss
    return Step(transitions, file.tell(), last)


def _form(path: Path) -> tuple[Callable[[model.Transition], bytes], Callable[[bytes], bytes]]:
    """How a row is written, and how a step's text is packed (gzip: several members one after the other are one file)."""
    suffixes = path.suffixes
    packed: Callable[[bytes], bytes] = bytes
    if suffixes[-1:] == [".gz"]:
        packed, suffixes = _gzipped, suffixes[:-1]
    forms = {".jsonl": _json, ".csv": _csv}
    if suffixes[-1:] == [] or suffixes[-1] not in forms:
        raise errors.InvalidDataError(
            f"file {path.name!r} is refused: its name must end with .jsonl or .csv, or those and .gz"
        )
    return forms[suffixes[-1]], packed


def _gzipped(text: bytes) -> bytes:
    return gzip.compress(text, mtime=0) if text else b""


def _values(row: model.Transition) -> dict[str, Any]:
    return {
        "machine": row.machine, "id": row.id, "version": row.version, "event": row.event, "from_state": row.from_state,
        "to_state": row.to_state, "at": row.at.isoformat(timespec="milliseconds"),
        "occurred_at": None if row.occurred_at is None else row.occurred_at.isoformat(timespec="milliseconds"),
        "transition_id": row.transition_id, "actor": row.actor, "reason": row.reason, "patch": row.patch,
        "unset": list(row.unset), "increments": row.increments, "machine_version": row.machine_version,
        "entry_id": row.entry_id, "covers_from": row.covers_from, "complete": row.complete,
    }  # fmt: skip


def _json(row: model.Transition) -> bytes:
    return json.dumps(_values(row), ensure_ascii=False).encode() + b"\n"


def _csv(row: model.Transition) -> bytes:
    values = _values(row)
    for name in ("patch", "unset", "increments"):
        values[name] = json.dumps(values[name], ensure_ascii=False) if values[name] else ""
    for name in spreadsheet.GUARDED:
        values[name] = None if values[name] is None else spreadsheet.guarded(values[name])
    return _csv_line([values[name] for name in spreadsheet.COLUMNS])


def _csv_line(values: Sequence[object]) -> bytes:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(values)
    return line.getvalue().encode()
