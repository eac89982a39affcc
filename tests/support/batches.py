"""Batches of log entries for tests of the durable side: packed texts and the checkpoints that they fold to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from statecache.core import codec, entry, keys
from statecache.durable import engine, flush, generic
from statecache.durable.rows import Advance
from statecache.durable.store import DurableStore

STATES = ("placed", "paid", "shipped", "delivered")
EVENTS = (entry.EVENT_START, "pay", "ship", "deliver")
NOW_MS = 1_790_000_000_000
PATCH = '{"amount":12.5,"currency":"EUR","method":"card"}'


class Batch(NamedTuple):
    """What one flush of consecutive versions of some instances writes."""

    moves: list[Advance]
    lines: list[str]
    changed: list[str]
    new: list[str]
    deltas: dict[tuple[int, str, str], int]


def partition_of(id: str, machine: str = "order") -> int:
    return keys.partition_of(machine, id, 16)


def line(
    partition: int, seq: int, id: str, version: int, *, epoch: int = 0, machine: str = "order", **parts: object
) -> str:
    """The packed text of an entry with its place before it. ``parts`` replace those of ``entry.PARTS``."""
    state = (version - 1) % len(STATES)
    values: dict[str, object] = {
        "machine": machine,
        "id": id,
        "version": version,
        "event": EVENTS[state],
        "from_state": STATES[state - 1] if version > 1 else "",
        "to_state": STATES[state],
        "at_ms": NOW_MS + seq,
        "transition_id": f"t-{id}-{version}",
        "actor": "",
        "reason": "",
        "occurred_ms": "",
        "patch": PATCH,
        "unset": "",
        "increments": "",
        "machine_version": 1,
    } | parts
    return entry.SEPARATOR.join(map(str, (partition, epoch, seq, *(values[name] for name in entry.PARTS))))


def checkpoint(
    partition: int, seq: int, id: str, version: int, *, epoch: int = 0, machine: str = "order", data: str = PATCH
) -> str:
    """A checkpoint's line, as the fold of versions 1 to ``version``."""
    state = state_at(version)
    ring = "".join(codec.token_of(f"t-{id}-{each}") for each in range(1, version + 1))[-codec.RING_BYTES :]
    final = int(state == "delivered")
    parts = (machine, id, partition, state, version, epoch, seq, NOW_MS, NOW_MS + seq, 1, final, ring, data)
    return entry.SEPARATOR.join(map(str, parts))


def state_at(version: int) -> str:
    return STATES[(version - 1) % len(STATES)]


class Log:
    """The logs of 16 partitions: makes batches that go on where the last one ended."""

    def __init__(self, machine: str = "order") -> None:
        self.machine = machine
        self.epoch = 0
        self.owner = ""
        self.versions: dict[str, int] = {}
        self.watermarks = dict.fromkeys(range(16), entry.ZERO)

    def batch(self, ids: Sequence[str], versions_each: int = 1) -> Batch:
        """The next ``versions_each`` transitions of each instance."""
        old = dict(self.watermarks)
        made = Batch([], [], [], [], {})
        for id in ids:
            partition, before = partition_of(id, self.machine), self.versions.get(id, 0)
            cursor = self.watermarks[partition]
            for version in range(before + 1, before + versions_each + 1):
                cursor = entry.EntryId(self.epoch, cursor.seq + 1)
                made.lines.append(line(partition, cursor.seq, id, version, epoch=self.epoch, machine=self.machine))
            self.watermarks[partition] = cursor
            self.versions[id] = version = before + versions_each
            kept = checkpoint(partition, cursor.seq, id, version, epoch=self.epoch, machine=self.machine)
            (made.changed if before else made.new).append(kept)
            for state, change in [(state_at(version), 1)] + ([(state_at(before), -1)] if before else []):
                made.deltas[partition, self.machine, state] = (
                    made.deltas.get((partition, self.machine, state), 0) + change
                )
        made.moves.extend(
            Advance(partition, self.epoch, self.owner, old[partition], new, new, NOW_MS)
            for partition, new in self.watermarks.items()
            if new != old[partition]
        )
        return made


def flushed(store: DurableStore, batch: Batch) -> None:
    """Flush a batch, all of it in one transaction."""
    with store.flush_transaction() as tx:
        write(tx, batch)


def write(tx: flush.FlushTransaction, batch: Batch) -> None:
    tx.advance(batch.moves)
    tx.insert_history(batch.lines)
    tx.upsert_checkpoints(batch.changed, batch.new)
    tx.adjust_counts(batch.deltas)


def with_generic_forms(url: str) -> DurableStore:
    """A store that uses the forms of a database that we know nothing of."""
    DurableStore.connect(url).close()
    return DurableStore(engine.open_database(url), generic.Generic())


def ids(count: int, prefix: str = "i") -> list[str]:
    return [f"{prefix}{number:05d}" for number in range(count)]


Connect = Callable[[str], DurableStore]
"""``DurableStore.connect`` or ``with_generic_forms``."""
