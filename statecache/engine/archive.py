"""Archives of history: gzipped JSON lines, written so that what is deleted afterwards is there.

The first line says what the file is, each other one is an instance: its address, its checkpoint, its transitions. The
name holds the hash of the content, so that writing the same again writes the same file. A file is complete when it
has its name: it is written under another one, flushed to the disk, read back and compared with SQL, renamed, and the
folder is flushed, too.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import itertools
import os
import secrets
import socket
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from statecache.core import errors, failpoints, model

FORMAT = "statecache-archive-1"


class Head(msgspec.Struct, frozen=True):
    """What an archive is."""

    format: str
    deployment: str
    machine: str
    instances: int
    transitions: int


class Archived(msgspec.Struct, frozen=True):
    """One instance in an archive."""

    machine: str
    id: str
    state: str
    version: int
    created_ms: int
    updated_ms: int
    data: dict[str, Any]
    transitions: list[model.Transition]


def write(folder: Path, deployment: str, machine: str, instances: Sequence[Archived]) -> Path:
    """Write an archive, and read it back; returns its path. When it returns, a power loss does not undo it.

    Raises ``OSError``, and ``IntegrityError`` if what was read back is not what was written: nothing may be deleted then.
    """
    head = Head(FORMAT, deployment, machine, len(instances), sum(len(one.transitions) for one in instances))
    encode = msgspec.json.Encoder().encode
    text = b"".join(encode(one) + b"\n" for one in (head, *instances))
    name = f"{machine}-{hashlib.sha256(text).hexdigest()[:24]}.jsonl.gz"
    folder.mkdir(parents=True, exist_ok=True)
    part, path = folder / f".{name}.{_here()}{os.getpid()}-{secrets.token_hex(4)}.part", folder / name
    try:
        with part.open("wb") as file:
            file.write(gzip.compress(text, mtime=0))
            file.flush()
            os.fsync(file.fileno())
        failpoints.hit("retention.written")
        if not all(one == other for one, other in itertools.zip_longest(read(part), instances)):
            raise errors.IntegrityError(f"archive {part} does not read as it was written: nothing is deleted")
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)
    _flush_folder(folder)
    failpoints.hit("retention.renamed")
    return path


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sweep(folder: Path) -> None:
    """Remove what processes of this machine that died while writing have left."""
    for part in folder.glob(".*.part") if folder.is_dir() else ():
        _, here, rest = part.name.rpartition(_here())
        pid = rest.partition("-")[0]
        if here and pid.isdigit() and not _is_alive(int(pid)):
            part.unlink(missing_ok=True)


def _here() -> str:
    """This machine's mark in the name of an unfinished file: the folder may be shared."""
    return f"@{socket.gethostname()}@"


def _is_alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        try:
            os.kill(pid, 0)
        except PermissionError:
            return True
        return True
    return False


def read(path: Path) -> Iterator[Archived]:
    """Read an archive, an instance after the other. Raises ``IntegrityError`` if it is none, or not whole."""
    decode = msgspec.json.Decoder(Archived).decode
    instances = transitions = 0
    try:
        with gzip.open(path, "rb") as lines:
            head = msgspec.json.decode(lines.readline(), type=Head)
            if head.format != FORMAT:
                raise errors.IntegrityError(f"{path}: its format is {head.format!r}, not {FORMAT}")
            for line in lines:
                one = decode(line)
                instances, transitions = instances + 1, transitions + len(one.transitions)
                yield one
    except (EOFError, gzip.BadGzipFile, zlib.error, msgspec.MsgspecError) as error:
        raise errors.IntegrityError(f"{path} is no archive, or damaged: {error}") from error
    if (instances, transitions) != (head.instances, head.transitions):
        raise errors.IntegrityError(
            f"{path} has {instances} instances and {transitions} transitions, its head says {head.instances} and "
            f"{head.transitions}"
        )
