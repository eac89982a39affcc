"""The values that callers meet: what they send (``Move``) and what they get back (``Receipt``, ``Snapshot``, ``Transition``).

``Receipt`` and ``Transition`` are ``msgspec`` structs rather than dataclasses: one is made per transition, and a frozen
dataclass costs ten times as much to build. ``gc=False``: they hold no cycles, so the collector need not look at them.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from statecache.core import codec, entry, errors, wording


class Durability(enum.StrEnum):
    """What must be true before a transition is acknowledged."""

    HOT = "hot"
    """Redis has it. Survives the death of clients and flushers and an outage of SQL, not the loss of Redis."""
    FSYNC = "fsync"
    """The server's append-only file has it on disk. Survives kill -9 and power loss of that node, not the loss of its disk."""
    REPLICA = "replica"
    """A replica has received it. Survives the loss of the primary if that replica is promoted."""
    DURABLE = "durable"
    """SQL has committed it. Survives the loss of Redis, disk and all."""


def datetime_of(ms: int) -> datetime:
    """The aware UTC datetime of a count of milliseconds since 1970."""
    return datetime.fromtimestamp(ms / 1000, UTC)


def ms_of(when: datetime) -> int:
    """Milliseconds since 1970; a naive datetime is taken as UTC."""
    return round((when.replace(tzinfo=UTC) if when.utcoffset() is None else when).timestamp() * 1000)


class Receipt(msgspec.Struct, frozen=True, gc=False):
    """What a committed transition returns. It can be waited on until durable (``StateCache.wait_durable``).

    ``duplicate`` tells that the call was a repetition: the transition had been applied before, by this very
    ``transition_id``, and this is its receipt. ``from_state`` is None for a start.
    """

    machine: str
    id: str
    event: str
    from_state: str | None
    state: str
    version: int
    entry_id: str
    at_ms: int
    transition_id: str
    duplicate: bool = False

    @property
    def at(self) -> datetime:
        """When Redis applied it (the server's clock, UTC)."""
        return datetime_of(self.at_ms)


class Transition(msgspec.Struct, frozen=True):
    """One committed move as history tells it. ``to_state`` is also called ``state``.

    ``patch`` are the fields it set, ``unset`` the names it removed, ``increments`` the results (not the deltas) of its
    increments. ``occurred_at`` is the caller's time, ``at`` the server's. A transition with event ``@reconciled`` stands
    for the versions ``covers_from`` to ``version``, which an SQL restore lost; one with ``@archived`` for those that
    retention took out (``reason`` says where they are). ``complete`` is False when its data is not known.
    """

    machine: str
    id: str
    version: int
    event: str
    from_state: str | None
    to_state: str
    at_ms: int
    transition_id: str
    actor: str | None
    reason: str | None
    occurred_ms: int | None
    patch: dict[str, Any]
    unset: tuple[str, ...]
    increments: dict[str, Any]
    machine_version: int
    entry_id: str
    durable: bool
    covers_from: int | None = None
    complete: bool = True

    @property
    def state(self) -> str:
        return self.to_state

    @property
    def at(self) -> datetime:
        return datetime_of(self.at_ms)

    @property
    def occurred_at(self) -> datetime | None:
        return None if self.occurred_ms is None else datetime_of(self.occurred_ms)


_decode_json = msgspec.json.Decoder().decode
_OWN_FIELDS = frozenset({b"@", b"@r", b"@c"})
_NAMES: dict[bytes, str] = {}
"""Names of fields as texts: a look here costs half of what decoding does."""
_NAMES_MAX = 10_000


def _name(name: bytes) -> str:
    text = name.decode()
    if len(_NAMES) < _NAMES_MAX:
        _NAMES[name] = text
    return text


def _field_shown(name: str | bytes) -> str:
    return wording.shown(name if isinstance(name, str) else name.decode(errors="backslashreplace"))


class Snapshot(msgspec.Struct, eq=False):
    """One instance as it is, or was. ``data`` is decoded when it is first asked for.

    ``source`` tells where it was read: ``"hot"`` (Redis) or ``"durable"`` (SQL). A snapshot of the past
    (``MachineHandle.at``) is always ``"durable"`` or ``"hot"`` by where its newest transition stood.
    """

    machine: str
    id: str
    state: str
    version: int
    _raw: Mapping[str, str | bytes] | Mapping[bytes, bytes]
    entry_id: str
    created_ms: int
    updated_ms: int
    machine_version: int
    final: bool
    available_events: tuple[str, ...]
    source: str
    parked: bool = False
    _data: dict[str, Any] | None = None

    @property
    def data(self) -> dict[str, Any]:
        """The fields collected so far. Raises ``IntegrityError`` if one holds what statecache did not write."""
        if self._data is None:
            decode, names = _decode_json, _NAMES
            try:
                self._data = {
                    name if isinstance(name, str) else names.get(name) or _name(name): decode(text)
                    for name, text in self._raw.items()
                    if name not in _OWN_FIELDS
                }
            except codec.UNREADABLE as error:
                raise self._unreadable() from error
        return self._data

    def _unreadable(self) -> errors.IntegrityError:
        for name, text in self._raw.items():
            try:
                if name not in _OWN_FIELDS:
                    _decode_json(text)
                    name if isinstance(name, str) else name.decode()
            except codec.UNREADABLE as error:
                return errors.IntegrityError(
                    f"{self.machine}:{self.id}: its field {_field_shown(name)} holds something that statecache did not write "
                    f"({error}); run 'statecache verify'"
                )
        raise AssertionError("a field that could not be read can be read now")

    @property
    def created_at(self) -> datetime:
        return datetime_of(self.created_ms)

    @property
    def updated_at(self) -> datetime:
        return datetime_of(self.updated_ms)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Snapshot):
            return NotImplemented
        same = ("machine", "id", "state", "version", "data", "created_ms", "updated_ms")
        return all(getattr(self, name) == getattr(other, name) for name in same)

    __hash__ = None  # type: ignore[assignment] # it holds a dictionary

    def __repr__(self) -> str:
        try:
            data = repr(self.data)
        except errors.IntegrityError as error:
            data = f"<unreadable: {error}>"
        return (
            f"Snapshot({self.machine}:{self.id} state={self.state!r} version={self.version} source={self.source!r} "
            f"data={data})"
        )


class Start(msgspec.Struct, frozen=True):
    """One start of a bulk call; the fields are those of ``MachineHandle.start``."""

    id: str
    data: Mapping[str, Any] | None = None
    actor: str | None = None
    reason: str | None = None
    transition_id: str | None = None
    occurred_at: datetime | None = None


class Move(msgspec.Struct, frozen=True, gc=False):
    """One transition of a bulk call; the fields are those of ``MachineHandle.transition``. ``claim`` is the token of
    the claim (``MachineHandle.claim``) under which it is made."""

    id: str
    event: str
    data: Mapping[str, Any] | None = None
    unset: Sequence[str] = ()
    increment: Mapping[str, int | float] | None = None
    actor: str | None = None
    reason: str | None = None
    expect_version: int | None = None
    transition_id: str | None = None
    occurred_at: datetime | None = None
    claim: str | None = None


class Checkpoint(msgspec.Struct, frozen=True):
    """The SQL row with an instance's latest state as of the watermark. ``data`` is one JSON object text; ``recent`` is
    the ring of transition id tokens that hydration restores."""

    machine: str
    id: str
    partition: int
    state: str
    version: int
    entry_id: entry.EntryId
    created_ms: int
    updated_ms: int
    machine_version: int
    final: bool
    recent: str
    data: str


class Lookup(msgspec.Struct, frozen=True):
    """What SQL knows of an instance, read in one snapshot: the partition's watermark, the checkpoint if there is one,
    and the open dead letters' transition id tokens (oldest first; not empty means parked)."""

    watermark: entry.EntryId
    checkpoint: Checkpoint | None
    letters: tuple[str, ...] = ()
    asked_under: tuple[int, str] | None = None
    """The epoch and owner that the client believed in before it asked: what follows from the answer goes under these."""
