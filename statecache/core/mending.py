"""What recovery writes where SQL and the log no longer meet: pure code, from what both hold to the rows that mend it.

*SQL behind* (SQL was restored from an older copy, and the log no longer reaches back to its watermark): for every instance
whose next known version is not the checkpoint's next, one ``@reconciled`` transition stands for the versions between. Its data
is the hot hash without the fields that later entries of the log touch, so that the fold of history and log is the hash again.
Without a hash that data is unknown: the row waits as a dead letter, and parks the instance, until an operator decides (H6).

*Diverged* (the log holds other entries than SQL under the same ids or versions): nothing is guessed. What the log has and SQL
has not becomes dead letters; every hash that is not what SQL says is dropped, and comes back from SQL, parked if it has
letters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

import msgspec

from statecache.core import codec, entry, fold, model

Row = tuple[Any, ...]


class Hash(msgspec.Struct, frozen=True):
    """An instance as its hash has it."""

    state: str
    version: int
    entry_id: entry.EntryId
    created_ms: int
    machine_version: int
    updated_ms: int
    ring: str
    data: dict[str, str]
    parked: bool = False
    """SQL refused an entry of it."""

    @classmethod
    def parse(cls, fields: Mapping[bytes, bytes]) -> Hash | None:
        """Read a hash; None for one that statecache did not write."""
        try:
            words = fields.get(b"@", b"").decode().split(" ")
            if len(words) < 6:
                return None
            data = {name.decode(): text.decode() for name, text in fields.items() if name not in (b"@", b"@r", b"@c")}
            return cls(
                words[0], int(words[1]), entry.EntryId.parse(words[2]), int(words[3]), int(words[4]), int(words[5]),
                fields.get(b"@r", b"").decode(), data, "p" in "".join(words[6:]),
            )  # fmt: skip
        except ValueError:  # no number, no UTF-8
            return None


class Known(msgspec.Struct, frozen=True):
    """What SQL knows of an instance: its checkpoint, and its open letters as (version, transition id)."""

    checkpoint: model.Checkpoint | None = None
    letters: tuple[tuple[int, str], ...] = ()

    @property
    def version(self) -> int:
        """The highest version that SQL holds, in history or as a letter."""
        kept = self.checkpoint.version if self.checkpoint else 0
        return max([kept, *(version for version, _ in self.letters)])


class Mend(msgspec.Struct):
    """Rows to write in one transaction, and hashes to drop after it. Rows are in the tables' column order, checkpoints are
    the lines of ``fold.Folded``."""

    transitions: list[Row] = []
    checkpoints: list[str] = []
    letters: list[Row] = []
    moved: list[fold.Moved] = []
    drops: list[str] = []
    covered: int = 0
    parked: int = 0
    findings: list[str] = []


def sql_behind(
    partition: int,
    entries: Mapping[fold.Instance, Sequence[entry.Entry]],
    hashes: Mapping[fold.Instance, Hash],
    known: Mapping[fold.Instance, Known],
    watermark: entry.EntryId,
    finals: fold.Finals,
    transition_id: str,
) -> Mend:
    """The rows that stand for what SQL lost: ``watermark`` is the id before the log's first entry behind the hole."""
    mend = Mend([], [], [], [], [], 0, 0, [])
    for instance in sorted({*entries, *hashes}):
        later = entries.get(instance, ())
        hot = hashes.get(instance)
        sql = known.get(instance, Known())
        next_version = later[0].version if later else hot.version + 1 if hot else 0
        if next_version <= sql.version + 1:
            continue
        mend.covered += next_version - 1 - sql.version
        touched = _touched(later)
        # A parked hash holds what SQL refused before it went back, and would refuse again, and all the mending with it.
        complete = hot is not None and touched is not None and (not hot.parked or bool(sql.letters))
        now = _before(instance, partition, later, hot, sql, watermark, next_version - 1, touched or set())
        if not complete:
            now = msgspec.structs.replace(now, data="{}")
        row = _reconciled(now, sql, transition_id, complete=complete)
        address = ":".join(instance)
        if not complete or sql.letters:
            mend.letters.append(row[: len(_ENTRY_COLUMNS)])
            mend.parked += 1
            mend.findings.append(f"{address}: versions {sql.version + 1} to {now.version} are lost, parked")
            continue
        mend.transitions.append(row)
        mend.checkpoints.append(now.line(finals))
        mend.moved.append((partition, now.machine, sql.checkpoint.state if sql.checkpoint else None, now.state))
        mend.findings.append(f"{address}: one row stands for versions {sql.version + 1} to {now.version}")
    return mend


def _touched(records: Sequence[entry.Entry]) -> set[str] | None:
    """The fields that the entries touch; None if one of them, a stranger's, cannot be read."""
    try:
        return {name for record in records for name in fold.touched(record)}
    except codec.UNREADABLE:
        return None


def _before(
    instance: fold.Instance,
    partition: int,
    later: Sequence[entry.Entry],
    hot: Hash | None,
    sql: Known,
    watermark: entry.EntryId,
    version: int,
    touched: set[str],
) -> fold.Folded:
    """The instance as it was before the log's entries of it, which changed the fields ``touched``."""
    machine, id = instance
    kept = sql.checkpoint
    data: dict[str, msgspec.Raw] = {}
    ring = kept.recent if kept else ""
    if hot is not None:
        data = {name: msgspec.Raw(text.encode()) for name, text in hot.data.items() if name not in touched}
        ring = hot.ring[: max(0, len(hot.ring) - codec.TOKEN_LENGTH * len(later))]
    state = later[0].from_state if later else hot.state if hot else ""
    created = hot.created_ms if hot else kept.created_ms if kept else later[0].at_ms
    updated = later[0].at_ms if later else hot.updated_ms if hot else created
    machine_version = later[0].machine_version if later else hot.machine_version if hot else 1
    entry_id = min(hot.entry_id, watermark) if hot and not later else watermark
    text = fold.data_text(data)
    return fold.Folded(
        version, created, state, "", ring, text, machine, id, partition, entry_id, updated, machine_version
    )


_ENTRY_COLUMNS = ("partition", "epoch", "seq", *entry.PARTS)


def _reconciled(now: fold.Folded, sql: Known, transition_id: str, *, complete: bool) -> Row:
    """The history row (all its columns) that stands for the versions between."""
    return (
        now.partition, now.entry_id.epoch, now.entry_id.seq, now.machine, now.id, now.version, entry.EVENT_RECONCILED,
        sql.checkpoint.state if sql.checkpoint else None, now.state, now.updated_ms, transition_id, None,
        "SQL was restored from an older copy" if complete else "SQL was restored from an older copy; the data is not known",
        None, now.data, None, None, now.machine_version, sql.version + 1, complete,
    )  # fmt: skip


def diverged(
    partition: int,
    entries: Mapping[fold.Instance, Sequence[entry.Entry]],
    hashes: Mapping[fold.Instance, Hash],
    known: Mapping[fold.Instance, Known],
    held: Set[entry.EntryId],
) -> Mend:
    """Keep as letters what the log has and SQL has not; ``held`` are the log's entries that SQL knows: in history, as letters,
    or discarded."""
    mend = Mend([], [], [], [], [], 0, 0, [])
    parted = set()
    for instance, records in sorted(entries.items()):
        strange = [one for one in records if one.entry_id not in held]
        if not strange:
            continue
        parted.add(instance)
        taken = {version for version, _ in known.get(instance, Known()).letters}
        for one in strange:
            # Letters are told apart by their versions: the second of a version is kept as a stranger's, as the flusher does.
            mend.letters.append(fold.entry_row(partition, entry.apart(partition, one) if one.version in taken else one))
            taken.add(one.version)
        mend.parked += 1
        versions = ", ".join(str(one.version) for one in strange[:10])
        mend.findings.append(
            f"{':'.join(instance)}: versions {versions} of the log are not SQL's: kept as dead letters, parked"
        )
        mend.drops.append(":".join(instance))
    for instance, hot in sorted(hashes.items()):
        if instance in parted:
            continue
        sql = known.get(instance, Known())
        kept = sql.checkpoint
        # A call that was lost and came again has the same transition id in another entry, and perhaps other data.
        here = (hot.version, hot.ring, hot.entry_id)
        same = kept is not None and (kept.version, kept.recent, kept.entry_id) == here
        if not same or sql.letters:
            mend.drops.append(":".join(instance))
        if not same:
            mend.findings.append(
                f"{':'.join(instance)}: Redis has version {hot.version} ({hot.entry_id}), SQL "
                + (f"{kept.version} ({kept.entry_id})" if kept else "none")
            )
    return mend
