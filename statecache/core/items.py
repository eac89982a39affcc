"""What travels between the flows and the hot store: the items of a script call, and what the script said of each.

``gc=False``: these are made by the ten thousand and hold no cycles, and the collector's passes over them cost more than
making them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec


class MoveSpec:
    """One event of a machine as the script wants it; made once per machine and event, known by identity."""

    __slots__ = ("event", "machine", "machine_version", "targets", "values")

    def __init__(
        self,
        machine: str,
        event: str,
        targets: Mapping[str, str],
        machine_version: int,
        deadlines_ms: Mapping[str, int] | None = None,
    ) -> None:
        self.machine = machine
        self.event = event
        self.targets = targets
        self.machine_version = machine_version
        self.values: list[object] = [machine, event, str(machine_version), deadlines_ms or False, len(targets)]
        """What ``apply.lua`` reads of a move."""
        for pair in targets.items():
            self.values += pair


class Confirm(msgspec.Struct, frozen=True):
    """What is asked on the connection that wrote, right behind the script: ``WAIT`` or ``WAITAOF``, and who must answer.

    ``local`` counts the server's own disk, ``replicas`` those that have received it (``WAIT``, ``aof`` False) or have it
    on disk. On another connection, or inside the script, the answer would speak of other writes.
    """

    aof: bool
    local: int
    replicas: int
    timeout_ms: int


class Item(msgspec.Struct, gc=False):
    """One transition to be applied.

    ``tail`` is the entry's text from the transition id to the unset names, ``names`` and ``texts`` are the patch.
    Mutable on purpose: a flow sends the same item again with ``retry``, ``expected`` or ``absent`` changed.
    """

    partition: int
    id: str
    move: MoveSpec
    expected: int
    token: str
    tail: str
    names: tuple[str, ...]
    texts: list[str]
    transition_id: str
    retry: bool = False
    absent: str = ""
    asked_under: tuple[int, str] | None = None
    unset: Sequence[str] = ()
    increments: Sequence[Sequence[str]] = ()
    confirm: Confirm | None = None
    pinned: bool = False
    """A guard has seen the version that it names: refused for its version it comes back, so nothing may be sent behind it."""
    claim: str = ""
    """The fencing token of the claim under which it is sent."""
    asked: int = 0
    """A repetition was not applied up to this version: history was asked, or its caller expects this version."""

    def pack_into(self, flat: list[object], partition_index: int, move_index: int, shape_index: int) -> None:
        """Append what ``apply.lua`` reads of an item."""
        if self.expected or self.retry or self.absent or self.unset or self.increments or self.claim:
            extras = (self.asked if self.retry else -1, self.absent, self.unset, self.increments, self.claim)
            flat += (partition_index, self.id, move_index, self.token, self.tail, -shape_index, self.expected, extras)
        else:
            flat += (partition_index, self.id, move_index, self.token, self.tail, shape_index)
        flat += self.texts


class Outcome(msgspec.Struct, frozen=True, gc=False):
    """The script's answer to an item: a reply code of ``apply.lua`` with its words, and the server's time.

    Six codes are made by the client: ``NOSCRIPT`` (the server does not know the script), ``UNSENT`` (it could not be
    reached), ``LOST`` (sent, but the reply is unknown: it may have been applied), ``UNREADY`` (the server answered that it
    cannot serve now), ``OOM`` (its memory is full) and
    ``ERROR`` (no retry mends it). ``cause`` is the error for the caller.
    """

    code: str
    words: list[str]
    at_ms: int = 0
    cause: Exception | None = None
    confirmed: bool = True
    """Whether what the item's ``confirm`` asked for was answered in time."""


ADMISSION_CODES = frozenset({"EPOCH", "RECOVERING", "IDENTITY", "NOSCRIPT"})
"""Answers that ask for admission: nothing was written."""
