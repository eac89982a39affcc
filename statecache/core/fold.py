"""Folding log entries into checkpoints: pure code, shared by the flusher, ``at`` and ``verify``.

A checkpoint's data stays JSON texts by field name throughout (``msgspec.Raw``): values are passed through as they are.
The ring of recent transition ids is folded too, so that hydration brings it back (promise P4 after a wipe).
"""

from __future__ import annotations

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


class Folded(msgspec.Struct, gc=False):
    """An instance's state after some entry. Treated as immutable: ``after`` makes a new one."""

    machine: str
    id: str
    partition: int
    state: str
    version: int
    entry_id: entry.EntryId
    created_ms: int
    updated_ms: int
    machine_version: int
    recent: str
    data: str
    names: tuple[str, ...] | None = None
    """The fields of ``data`` in its order, one tuple for all instances that have the same; None where nobody looked."""

    @classmethod
    def of_checkpoint(cls, row: model.Checkpoint) -> Folded:
        return cls(
            row.machine, row.id, row.partition, row.state, row.version, row.entry_id, row.created_ms, row.updated_ms,
            row.machine_version, row.recent, row.data or "{}",
        )  # fmt: skip

    def row(self, finals: Finals) -> tuple[object, ...]:
        """The checkpoint's columns, in the order of the table. (``final`` as a number: sqlite3 takes half a microsecond for a
        bool, for which it looks for adapters.)"""
        return (
            self.machine, self.id, self.partition, self.state, self.version, self.entry_id.epoch, self.entry_id.seq,
            self.created_ms, self.updated_ms, self.machine_version,
            int(self.state in finals(self.machine, self.machine_version)), self.recent, self.data,
        )  # fmt: skip


def texts_of(data: str) -> dict[str, msgspec.Raw]:
    """The JSON texts, as they are, of a checkpoint's data by name."""
    return _decode(data or "{}")


def data_text(data: Mapping[str, msgspec.Raw]) -> str:
    return _encode(data).decode()


def require_next(before: Folded | None, records: Sequence[entry.Entry]) -> None:
    """Raise ``IntegrityError`` unless an instance's versions go on one by one from what is before them."""
    version = before.version if before else 0
    for record in records:
        version += 1
        if record.version != version:
            raise errors.IntegrityError(
                f"{record.machine}:{record.id}: the log goes on with version {record.version} where {version} is due "
                f"(entry {record.entry_id}): versions were lost or written twice; run 'statecache recover'"
            )


def after(before: Folded | None, records: Sequence[entry.Entry], partition: int) -> Folded:
    """Fold an instance's entries, oldest first, onto what is before them (None: the first entry is a start).

    The versions must go on one by one (``require_next``). Raises ``IntegrityError`` for data that cannot be read.
    """
    first, last = records[0], records[-1]
    created_ms, recent = (before.created_ms, before.recent) if before else (first.at_ms, "")
    try:
        data, names = _data_after(before, records)
    except codec.UNREADABLE as error:
        raise errors.IntegrityError(
            f"the data of {first.machine}:{first.id} is none that can be read, and not written by statecache: {error}"
        ) from error
    for record in records if len(records) == 1 else records[-codec.RING_LENGTH :]:
        recent += codec.token_of(record.transition_id)
    return Folded(
        first.machine, first.id, partition, last.to_state, last.version, last.entry_id, created_ms, last.at_ms,
        last.machine_version, recent[-codec.RING_BYTES :], data, names,
    )  # fmt: skip


def _data_after(before: Folded | None, records: Sequence[entry.Entry]) -> tuple[str, tuple[str, ...] | None]:
    """The data text behind some entries, and its names. A patch of all the fields that there are is the text itself: what
    was before it need not be taken apart, nor anything put together.

    What no reader could decode (a number out of range) is found where that costs nothing, and refused; what gets by, the
    readers of that instance meet, and nobody else."""
    text, names = (before.data, before.names) if before else ("", ())
    data: dict[str, msgspec.Raw] | None = None
    for record in records:
        if record.increments or record.unset:
            data = texts_of(text) if data is None else data
            apply_patch(data, record)
            names = None
        elif record.patch:
            if data is None:
                is_short = len(record.patch) <= _DECODED_LENGTH_MAX
                patch = _decode_values(record.patch) if is_short else _decode(record.patch)
                if names == () or (names is not None and len(patch) == len(names) and _shared(patch) is names):
                    text, names = record.patch, names or _shared(patch)
                    continue
                data = texts_of(text)
            data.update(_decode(record.patch))
    if data is None:
        return text or "{}", names
    if names is None or len(names) != len(data):
        names = _shared(data)
    return data_text(data), names


_shapes: dict[tuple[str, ...], tuple[str, ...]] = {}


def _shared(data: Iterable[str]) -> tuple[str, ...]:
    """A dictionary's names as the one tuple of these names. Bounded, because names are input: one that is not remembered
    is no other's."""
    names = tuple(data)
    shared = _shapes.get(names)
    if shared is None:
        shared = names
        if len(_shapes) < _SHAPES_MAX:
            _shapes[names] = names
    return shared


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


def count_deltas(moved: Iterable[tuple[Folded | None, Folded]]) -> dict[tuple[int, str, str], int]:
    """How the counts by (partition, machine, state) change when instances go from one fold to the next."""
    deltas: dict[tuple[int, str, str], int] = {}
    for before, now in moved:
        if before is not None:
            if before.state == now.state:
                continue
            key = (now.partition, now.machine, before.state)
            deltas[key] = deltas.get(key, 0) - 1
        key = (now.partition, now.machine, now.state)
        deltas[key] = deltas.get(key, 0) + 1
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


def after_letters(before: Folded | None, records: Sequence[entry.Entry], partition: int) -> Folded:
    """Fold dead letters, oldest first. A ``@reconciled`` one stands for the versions up to its own and holds all data known."""
    first = records[0]
    if first.event != entry.EVENT_RECONCILED:
        require_next(before, records)
        return after(before, records, partition)
    data: dict[str, msgspec.Raw] = {}
    apply_patch(data, first)
    base = Folded(
        first.machine, first.id, partition, first.to_state, first.version, first.entry_id,
        before.created_ms if before else first.at_ms, first.at_ms, first.machine_version,
        "", data_text(data),  # a ring ends at its instance's version: that of before would name others
    )  # fmt: skip
    require_next(base, records[1:])
    return after(base, records[1:], partition) if len(records) > 1 else base
