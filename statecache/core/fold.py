"""Folding log entries into checkpoints: pure code, shared by the flusher, ``at`` and ``verify``.

A checkpoint's data stays JSON texts by field name throughout (``msgspec.Raw``): values are passed through as they are.
The ring of recent transition ids is folded too, so that hydration brings it back (promise P4 after a wipe).
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec

from statecache.core import codec, entry, errors, model

_decode = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_values = msgspec.json.Decoder(dict[str, Any]).decode
_encode = msgspec.json.encode

_SHAPES_MAX = 10_000
_DECODED_LENGTH_MAX = 128
"""To decode the values of a patch up to so long takes no longer than to find their texts."""

Finals = Callable[[str, int], frozenset[str]]
"""Final states of a machine's version."""
Instance = tuple[str, str]
"""(machine, id)."""


Moved = tuple[int, str, str | None, str]
"""An instance's partition and machine, its state before (None: there was no instance) and its state now."""


class Before(msgspec.Struct, gc=False):
    """What of an instance the next fold needs."""

    version: int
    created_ms: int
    state: str
    shape: str
    """Which fields ``data`` has, in its order (``_shape_of``); empty where nobody looked."""
    recent: str
    data: str

    @classmethod
    def of_checkpoint(cls, row: model.Checkpoint) -> Before:
        return cls(row.version, row.created_ms, row.state, "", row.recent, row.data or "{}")

    def packed(self) -> str:
        """It as one text, which begins with the version and ``entry.SEPARATOR``. An instance that is remembered among 100,000
        others is in none of the processor's caches when it moves again: so its parts lie together."""
        return f"{self.version}\x1f{self.created_ms}\x1f{self.state}\x1f{self.shape}\x1f{self.recent}\x1f{self.data}"

    @classmethod
    def unpacked(cls, text: str) -> Before:
        version, created_ms, state, shape, recent, data = text.split(entry.SEPARATOR, 5)
        return cls(int(version), int(created_ms), state, shape, recent, data)


class Folded(Before, gc=False):
    """An instance's state after some entry. Treated as immutable: ``after`` makes a new one."""

    machine: str
    id: str
    partition: int
    entry_id: entry.EntryId
    updated_ms: int
    machine_version: int

    def line(self, finals: Finals) -> str:
        """The checkpoint's columns, in the order of the table, joined by ``entry.SEPARATOR``."""
        place = self.entry_id
        final = 1 if self.state in finals(self.machine, self.machine_version) else 0
        return (
            f"{self.machine}\x1f{self.id}\x1f{self.partition}\x1f{self.state}\x1f{self.version}\x1f{place.epoch}\x1f{place.seq}"
            f"\x1f{self.created_ms}\x1f{self.updated_ms}\x1f{self.machine_version}\x1f{final}\x1f{self.recent}\x1f{self.data}"
        )


def texts_of(data: str) -> dict[str, msgspec.Raw]:
    """The JSON texts, as they are, of a checkpoint's data by name."""
    return _decode(data or "{}")


def data_text(data: Mapping[str, msgspec.Raw]) -> str:
    return _encode(data).decode()


def require_next(version: int, records: Sequence[entry.Entry]) -> None:
    """Raise ``IntegrityError`` unless an instance's versions go on one by one from the one before them (0: none)."""
    for record in records:
        version += 1
        if record.version != version:
            raise errors.IntegrityError(
                f"{record.machine}:{record.id}: the log goes on with version {record.version} where {version} is due "
                f"(entry {record.entry_id}): versions were lost or written twice; run 'statecache recover'"
            )


def after(before: Before | None, records: Sequence[entry.Entry], partition: int) -> Folded:
    """Fold an instance's entries, oldest first, onto what is before them (None: the first entry is a start).

    The versions must go on one by one (``require_next``). Raises ``IntegrityError`` for data that cannot be read.
    """
    first, last = records[0], records[-1]
    created_ms, recent = (before.created_ms, before.recent) if before else (first.at_ms, "")
    try:
        data, shape = _data_after(before, records)
    except codec.UNREADABLE as error:
        raise errors.IntegrityError(
            f"the data of {first.machine}:{first.id} is none that can be read, and not written by statecache: {error}"
        ) from error
    for record in records if len(records) == 1 else records[-codec.RING_LENGTH :]:
        recent += codec.token_of(record.transition_id)
    return Folded(
        last.version, created_ms, last.to_state, shape, recent[-codec.RING_BYTES :], data,
        first.machine, first.id, partition, last.entry_id, last.at_ms, last.machine_version,
    )  # fmt: skip


def _data_after(before: Before | None, records: Sequence[entry.Entry]) -> tuple[str, str]:
    """The data text behind some entries, and its shape. A patch of all the fields that there are is the text itself: what
    was before it need not be taken apart, nor anything put together.

    What no reader could decode (a number out of range) is found where that costs nothing, and refused; what gets by, the
    readers of that instance meet, and nobody else."""
    text, shape = (before.data, before.shape) if before else ("", _NO_FIELDS)
    data: dict[str, msgspec.Raw] | None = None
    for record in records:
        if record.increments or record.unset:
            data = texts_of(text) if data is None else data
            apply_patch(data, record)
        elif record.patch:
            if data is None:
                is_short = len(record.patch) <= _DECODED_LENGTH_MAX
                found = _shape_of(_decode_values(record.patch) if is_short else _decode(record.patch))
                if shape == _NO_FIELDS or (shape and found == shape):
                    text, shape = record.patch, found
                    continue
                data = texts_of(text)
            data.update(_decode(record.patch))
    if data is None:
        return text or "{}", shape
    return data_text(data), _shape_of(data)


_NO_FIELDS = "0"
_shapes: dict[tuple[str, ...], str] = {(): _NO_FIELDS}
_numbers = itertools.count(1)


def _shape_of(data: Iterable[str]) -> str:
    """The number under which this process knows these names in this order; empty if it knows too many others, because names
    are input."""
    names = tuple(data)
    shape = _shapes.get(names)
    if shape is None:
        # Two threads may come here at once: no number is given twice, and the first one counts.
        shape = _shapes.setdefault(names, str(next(_numbers))) if len(_shapes) < _SHAPES_MAX else ""
    return shape


def apply_patch(data: dict[str, msgspec.Raw], record: entry.Entry) -> None:
    """Apply one entry's patch, increments and unset names to data."""
    if record.patch:
        data.update(_decode(record.patch))
    if record.increments:
        data.update(_decode(record.increments))
    if record.unset:
        for name in record.unset.split():
            data.pop(name, None)


def touched(record: entry.Entry) -> set[str]:
    """The fields that an entry sets, increments or removes."""
    names = set(record.unset.split())
    for text in (record.patch, record.increments):
        if text:
            names.update(_decode(text))
    return names


def apply_transition(data: dict[str, Any], row: model.Transition) -> None:
    """The same for a transition as history tells it, whose values are decoded. A ``@reconciled`` row holds all data."""
    if row.covers_from is not None:
        data.clear()
    data.update(row.patch)
    data.update(row.increments)
    for name in row.unset:
        data.pop(name, None)


def by_instance(records: Iterable[entry.Entry]) -> dict[Instance, list[entry.Entry]]:
    """Group entries by instance, each group in log order."""
    groups: dict[Instance, list[entry.Entry]] = {}
    for record in records:
        instance = (record.machine, record.id)
        group = groups.get(instance)
        if group is None:
            groups[instance] = [record]
        else:
            group.append(record)
    return groups


def count_deltas(moved: Iterable[Moved]) -> dict[tuple[int, str, str], int]:
    """How the counts by (partition, machine, state) change when instances move."""
    deltas: collections.Counter[tuple[int, str, str]] = collections.Counter()
    for (partition, machine, before, now), times in collections.Counter(moved).items():
        deltas[partition, machine, now] += times
        if before is not None:
            deltas[partition, machine, before] -= times
    return {key: delta for key, delta in deltas.items() if delta}


def texts(data: Mapping[str, object]) -> dict[str, str]:
    """Data as JSON texts by field name, as hashes hold it."""
    return {name: _encode(value).decode() for name, value in data.items()}


def entry_row(partition: int, record: entry.Entry) -> tuple[Any, ...]:
    """An entry as a row of history or of dead letters, in the tables' column order; None for an empty part."""
    return (
        partition, record.entry_id.epoch, record.entry_id.seq, record.machine, record.id, record.version, record.event,
        record.from_state or None, record.to_state, record.at_ms, record.transition_id, record.actor or None,
        record.reason or None, int(record.occurred_ms) if record.occurred_ms else None, record.patch or None,
        record.unset or None, record.increments or None, record.machine_version,
    )  # fmt: skip


def entry_parts(partition: int, record: entry.Entry) -> tuple[Any, ...]:
    """The same with an empty text for an empty part, as the log has it."""
    return (
        partition, record.entry_id.epoch, record.entry_id.seq, record.machine, record.id, record.version, record.event,
        record.from_state, record.to_state, record.at_ms, record.transition_id, record.actor, record.reason,
        int(record.occurred_ms) if record.occurred_ms else "", record.patch, record.unset, record.increments,
        record.machine_version,
    )  # fmt: skip


def entry_of_row(row: Sequence[Any]) -> entry.Entry:
    """The entry that a row of ``entry_row`` holds."""
    _, epoch, seq, *parts = row
    texts: list[Any] = ["" if part is None else part for part in parts]
    occurred = entry.PARTS.index("occurred_ms")
    texts[occurred] = str(texts[occurred])
    return entry.Entry(entry.EntryId(epoch, seq), *texts)


def after_letters(before: Before | None, records: Sequence[entry.Entry], partition: int) -> Folded:
    """Fold dead letters, oldest first. A ``@reconciled`` one stands for the versions up to its own and holds all data known."""
    first = records[0]
    if first.event != entry.EVENT_RECONCILED:
        require_next(before.version if before else 0, records)
        return after(before, records, partition)
    data: dict[str, msgspec.Raw] = {}
    apply_patch(data, first)
    base = Folded(
        first.version, before.created_ms if before else first.at_ms, first.to_state, "",
        "", data_text(data),  # a ring ends at its instance's version: that of before would name others
        first.machine, first.id, partition, first.entry_id, first.at_ms, first.machine_version,
    )  # fmt: skip
    require_next(base.version, records[1:])
    return after(base, records[1:], partition) if len(records) > 1 else base
