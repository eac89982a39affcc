"""The rows that this package takes and hands out; instances and transitions are those of ``core.model``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import NamedTuple

import msgspec

from statecache.core import entry

Instance = tuple[str, str]
"""``(machine, id)``."""

Committed = tuple[str, str, int | None, str | None]
"""``(machine, id, version, transition id)`` of a transition that is asked for: by its id where the version is None."""

Row = tuple[object, ...]
"""A row in the column order that the function taking it names."""


class StoreRow(msgspec.Struct, frozen=True):
    """What kind of store this is, and whose incarnation of the hot data set is the current one."""

    deployment: str
    protocol: int
    schema_version: int
    partition_count: int
    epoch: int
    owner: str
    namespace: str


class PartitionRow(msgspec.Struct, frozen=True):
    """How far one partition is in SQL, and the log tail that a flusher last saw."""

    partition: int
    epoch: int
    owner: str
    watermark: entry.EntryId
    tail: entry.EntryId
    tail_seen_ms: int


class MachineRow(msgspec.Struct, frozen=True):
    """One registered version of a machine."""

    name: str
    version: int
    fingerprint: str
    spec: str
    registered_ms: int


class RecoveryRow(msgspec.Struct, frozen=True):
    """One recovery: alive while ``heartbeat_ms`` moves, done when ``finished_ms`` is set. ``report`` is JSON text, ``process``
    what ``engine.processes`` tells its process by (None or empty: unknown)."""

    epoch: int
    owner: str
    started_ms: int
    heartbeat_ms: int
    finished_ms: int | None
    classes: str
    report: str
    process: str | None = None


class Advance(msgspec.Struct, frozen=True):
    """Move one partition's watermark from ``old`` to ``new``, and note the log tail seen at ``seen_ms``."""

    partition: int
    epoch: int
    owner: str
    old: entry.EntryId
    new: entry.EntryId
    tail: entry.EntryId
    seen_ms: int


class Standing(msgspec.Struct, frozen=True):
    """Where one version of an instance stands in SQL, read in one snapshot (protocol hole H11).

    It is durable if ``transition_id`` is the receipt's. If it is not and the watermark is at or above the receipt's entry,
    ``letter_id`` being the receipt's means parked, anything else means lost.
    """

    watermark: entry.EntryId
    transition_id: str | None
    entry_id: entry.EntryId | None
    letter_id: str | None


class Letter(msgspec.Struct, frozen=True):
    """An open dead letter: an entry that SQL refused, or one that waits behind such an entry."""

    entry: entry.Entry
    partition: int
    error: str
    waiting: bool
    noted_ms: int


class Discard(msgspec.Struct, frozen=True):
    """A letter that an operator discarded: these entries count as known, though SQL holds them no more."""

    machine: str
    id: str
    entry_id: entry.EntryId
    version: int
    transition_id: str


class Idle(NamedTuple):
    """A checkpoint as an evictor wants it, with its partition's watermark of the same snapshot (protocol hole H8)."""

    machine: str
    id: str
    partition: int
    version: int
    updated_ms: int
    watermark: entry.EntryId


class Recents(NamedTuple):
    """A page of a state's checkpoints, newest first, as a warmer wants it; all of one snapshot (protocol holes H9, H12)."""

    rows: Sequence[tuple[int, str, int, str, str, str]]
    """(updated_ms, id, partition, text of the hash' field ``@``, text of ``@r``, data as a JSON object)."""
    watermarks: Mapping[int, str]
    """By partition; of those that were ever flushed."""
    parked: Set[str]
    """The ids of those that have open letters."""


class Above(NamedTuple):
    """An instance that SQL knows beyond some entry id."""

    machine: str
    id: str
    version: int
    entry_id: entry.EntryId
