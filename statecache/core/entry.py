"""The log's records: entry ids, the packed text of an entry, and the rule by which one entry follows another.

An entry is ONE stream field of parts joined by ``\\x1f``. Parts hold no control character (free text is refused at the door,
data is JSON text, which escapes them), so the text needs no quoting, can be split without a parser, and can be COPYed into
PostgreSQL as it is.
"""

from __future__ import annotations

import hashlib
from sys import intern

import msgspec

from statecache.core import errors

SEPARATOR = "\x1f"
COPY_QUOTE = "\x1e"
"""What PostgreSQL is told that quotes are: a part that held one would join its line with those behind it."""
EVENT_START = "@start"
EVENT_EPOCH = "@epoch"
EVENT_RECONCILED = "@reconciled"
EVENT_ARCHIVED = "@archived"

PARTS = (
    "machine",
    "id",
    "version",
    "event",
    "from_state",
    "to_state",
    "at_ms",
    "transition_id",
    "actor",
    "reason",
    "occurred_ms",
    "patch",
    "unset",
    "increments",
    "machine_version",
)


FOREIGN = "@foreign"
"""The machine under which a record that statecache did not write is kept as a letter; its id is partition and entry id. So is
an entry of ours that cannot be kept under its own name (``apart``): its id tells its text too."""
_NAME_LENGTH_MAX = 1100


class EntryId(msgspec.Struct, frozen=True, order=True, gc=False):
    """A log position, ordered: the epoch, then the number within it. ``0-0`` stands before everything. (No tuple: the
    collector would visit every one that the flusher remembers.)"""

    epoch: int
    seq: int

    def __str__(self) -> str:
        return f"{self.epoch}-{self.seq}"

    @classmethod
    def parse(cls, text: str) -> EntryId:
        epoch, _, seq = text.partition("-")
        return cls(int(epoch), int(seq))


ZERO = EntryId(0, 0)


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One record of the log, its parts still text where nobody has needed more. (``gc=False``: made by the ten thousand, and
    without cycles; the collector's passes over them cost a flush more than making them.)

    For a mark (``event`` is ``@epoch``) ``from_state`` holds the id before it and ``transition_id`` the epoch's owner.
    ``patch`` and ``increments`` are JSON object texts or empty, ``unset`` is field names joined by blanks.
    """

    entry_id: EntryId
    machine: str
    id: str
    version: int
    event: str
    from_state: str
    to_state: str
    at_ms: int
    transition_id: str
    actor: str
    reason: str
    occurred_ms: str
    patch: str
    unset: str
    increments: str
    machine_version: int

    @property
    def is_mark(self) -> bool:
        return self.event == EVENT_EPOCH

    @property
    def prev(self) -> EntryId:
        """The id before a mark."""
        return EntryId.parse(self.from_state)


def parse_line(line: str) -> Entry:
    """Read ``<id>\\x1f<text>``, an entry as the scripts give it.

    Names that many entries share are one text for all of them: what a flush costs is mostly memory that it has to touch.

    Raises ``IntegrityError`` for a record that this protocol did not write.
    """
    try:
        (entry_id, machine, id, version, event, source, target, at, transition_id, actor, reason, occurred, patch, unset,
         increments, machine_version) = line.split(SEPARATOR)  # fmt: skip
        epoch, seq = entry_id.split("-")
        number, at_ms, of_machine = int(version), int(at), int(machine_version)
        # SQL has columns of 64 bits, and of 32 for the machine's version; readers know the years 1 to 9999.
        if not (0 <= number < 2**63 and 0 <= at_ms < 253402300800000 and 0 <= of_machine < 2**31) or (
            occurred and not -62135596800000 <= int(occurred) < 253402300800000
        ):
            raise ValueError("a number is out of range")
        if COPY_QUOTE in line:
            raise ValueError("a part holds what no part can hold")
        if machine == FOREIGN:
            raise ValueError("the name under which strangers' records are kept")
        if event == EVENT_EPOCH:
            EntryId.parse(source)
        return Entry(
            EntryId(int(epoch), int(seq)), intern(machine), id, number, intern(event), intern(source), intern(target), at_ms,
            transition_id, actor, reason, occurred, patch, unset, increments, of_machine,
        )  # fmt: skip
    except ValueError as error:
        entry_id, *parts = line.split(SEPARATOR)
        raise errors.IntegrityError(
            f"the log entry {entry_id} is not one that statecache wrote ({len(parts)} parts): somebody else writes to this "
            "stream; look at it with XRANGE and run 'statecache recover'"
        ) from error


def parse(entry_id: EntryId, text: str) -> Entry:
    """Read an entry's packed text, as ``parse_line`` does."""
    return parse_line(f"{entry_id}{SEPARATOR}{text}")


def foreign(partition: int, entry_id: EntryId, text: str) -> Entry:
    """A record that this protocol did not write, as an entry: it keeps its place in the log, and its text as patch."""
    return Entry(entry_id, FOREIGN, f"{partition}:{entry_id}", 0, FOREIGN, "", "", 0, "", "", "", "", text, "", "", 0)


def fits(record: Entry) -> bool:
    """Whether SQL can have an instance of this name: no NUL, and not too long for a key."""
    name = record.machine + record.id
    return len(name) <= _NAME_LENGTH_MAX and "\0" not in name


def apart(partition: int, record: Entry) -> Entry:
    """An entry as ``foreign`` keeps it, where another has its version. The id names the text too: an entry id may have been
    given twice, and whoever meets this entry again has to know it again."""
    kept = foreign(partition, record.entry_id, SEPARATOR.join(str(getattr(record, name)) for name in PARTS))
    digest = hashlib.blake2b(kept.patch.encode(errors="backslashreplace"), digest_size=6).hexdigest()
    return msgspec.structs.replace(kept, id=f"{kept.id}:{digest}")


def place_apart(id: str) -> EntryId | None:
    """Where the entry stood in the log that ``apart`` gave this id; None for a stranger's record."""
    _, place, *digest = id.split(":")
    return EntryId.parse(place) if digest else None


def follows(entry_id: EntryId, cursor: EntryId, prev: EntryId | None) -> bool:
    """Tell whether the entry stands right behind ``cursor``; ``prev`` is that of a mark, else None (protocol hole H5)."""
    if prev is not None:
        return prev <= cursor < entry_id
    return entry_id.epoch == cursor.epoch and entry_id.seq == cursor.seq + 1
