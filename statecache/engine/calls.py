"""What a machine's calls are made of: requests, flows and snapshots. Shared by the sync and the async handle; no I/O."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from statecache.core import codec, entry, errors, flows, fold, model, requests, wording
from statecache.core.machine import StateMachine
from statecache.settings import Settings

Start = model.Start | tuple[str, Mapping[str, Any] | None] | str
_LIMIT_MAX = 2**31 - 1
Build = Callable[[Sequence[int]], Iterable[flows.Request | errors.StateCacheError]]
"""Makes the requests of some places of a bulk call, or the errors that say why they are refused."""


class Calls:
    """The calls of one machine. Thread-safe."""

    def __init__(self, machine: type[StateMachine], settings: Settings, ids: codec.TransitionIds) -> None:
        self.machine = machine
        self.definition = machine.definition
        self.name = machine.definition.name
        self.door = requests.Door(
            machine.definition, machine.guards, settings.partition_count, settings.limits, ids, self.snapshot
        )

    def starts(self, starts: Iterable[Start], actor: str | None) -> tuple[list[Any], Build]:
        """The ids of many starts, and what builds the request of each."""
        wanted = [_as_start(start) for start in as_list("starts", starts)]

        def build(indexes: Sequence[int]) -> Iterable[flows.Request | errors.StateCacheError]:
            return self.door.starts([wanted[index] for index in indexes], actor)

        return _ids(wanted), build

    def moves(self, moves: Iterable[model.Move]) -> tuple[list[Any], Build]:
        """The ids of many moves, and what builds the request of each."""
        wanted = [_as_move(move) for move in as_list("moves", moves)]
        # A move sent again is answered only after history was asked; what follows it must not overtake it meanwhile, and not be
        # judged by the version that is there without it: so it waits for the same answer.
        own = [move for move in wanted if getattr(move, "transition_id", None) is not None]
        repeatable = {
            codec.plain_text(move.id) for move in own if isinstance(move, model.Move) and isinstance(move.id, str)
        }

        def build(indexes: Sequence[int]) -> Iterable[flows.Request | errors.StateCacheError]:
            built = self.door.transitions([wanted[index] for index in indexes])
            for request in built if repeatable else ():
                if isinstance(request, flows.Request) and not request.own_id and request.item.id in repeatable:
                    request.own_id, request.item.asked = True, 0
            return built

        return _ids(wanted), build

    def address(self, id: str) -> tuple[int, str, str]:
        """Where an instance lies: partition, machine, id."""
        id = self.door.check_id(id)
        return self.door.partition_of(id), self.name, id

    def get(self, id: str) -> flows.Flow:
        """The flow that reads an instance."""
        return flows.snapshot(*self.address(id), self.snapshot)

    def history(self, id: str) -> flows.Flow:
        """The flow that reads an instance's history."""
        return flows.history(*self.address(id))

    def at(
        self, id: str, rows: Sequence[model.Transition], version: int | None, when: datetime | None
    ) -> model.Snapshot:
        """The instance as it was, from its history."""
        if (version is None) == (when is None):
            raise errors.InvalidDataError("at() wants either a version or a moment (when=)")
        if version is not None:
            check_kind("version", version, int)
            kept = [row for row in rows if row.version <= version]
            if not kept or kept[-1].version != version:
                raise errors.NotFoundError(f"{self.name}:{id} has no version {version}; it has 1 to {rows[-1].version}")
        else:
            check_kind("when", when, datetime)
            assert when is not None
            limit_ms = model.ms_of(when)
            # Up to the last one of that time: after a failover the server's clock may have gone back.
            count = max((n for n, row in enumerate(rows, 1) if row.at_ms <= limit_ms), default=0)
            kept = list(rows[:count])
            if not kept:
                raise errors.NotFoundError(
                    f"{self.name}:{id} did not exist at {when.isoformat()}: it began at {rows[0].at}"
                )
        return self._folded(kept)

    def find_bound(
        self, state: str | None, older_than: timedelta | None, limit: int, of_other_versions: Callable[[], set[str]]
    ) -> int | None:
        """Check the arguments of ``find``; returns the time before which instances must have changed last.

        A state may be one that only another version of the machine has: instances stand there until something moves them.
        """
        if state is not None and state not in self.definition.states and state not in of_other_versions():
            raise errors.InvalidDataError(
                f"state {wording.shown(state)} is refused: machine {self.name!r} has {', '.join(self.definition.states)}"
            )
        return idle_bound(older_than, limit)

    def found(self, rows: Sequence[model.Checkpoint]) -> list[model.Snapshot]:
        """Checkpoints as snapshots."""
        return [self.snapshot(row.id, flows.hash_of(model.Lookup(entry.ZERO, row)), "durable") for row in rows]

    def snapshot(self, id: str, fields: Mapping[bytes, bytes], source: str) -> model.Snapshot:
        """An instance from the fields of its hash."""
        definition = self.definition
        try:
            state, version, entry_id, created, machine_version, updated, *flags = fields[b"@"].decode().split(" ")
            return model.Snapshot(
                self.name, id, state, int(version), fields, entry_id, int(created), int(updated), int(machine_version),
                state in definition.finals, definition.available_events(state), source, bool(flags) and "p" in flags[0],
            )  # fmt: skip
        except (KeyError, ValueError):
            raise _foreign(f"{self.name}:{id}") from None

    def _folded(self, rows: Sequence[model.Transition]) -> model.Snapshot:
        data: dict[str, Any] = {}
        for row in rows:
            fold.apply_transition(data, row)
        first, last = rows[0], rows[-1]
        return model.Snapshot(
            self.name, last.id, last.to_state, last.version, fold.texts(data), entry_id=last.entry_id,
            created_ms=first.at_ms, updated_ms=last.at_ms, machine_version=last.machine_version,
            final=last.to_state in self.definition.finals,
            available_events=self.definition.available_events(last.to_state),
            source="durable" if last.durable else "hot",
        )  # fmt: skip


def idle_bound(older_than: timedelta | None, limit: int) -> int | None:
    """Check how many of which age are asked for; returns the time before which they must have changed last."""
    if older_than is not None:
        check_kind("older_than", older_than, timedelta)
    check_limit(limit)
    return None if older_than is None else int((time.time() - older_than.total_seconds()) * 1000)


def check_limit(limit: int) -> None:
    """Refuse what is no number of instances."""
    check_kind("limit", limit, int)
    if not 1 <= limit <= _LIMIT_MAX:
        raise errors.InvalidDataError(f"limit {wording.shown(limit)} is refused: it must be from 1 to {_LIMIT_MAX}")


def version_of(own: bytes, address: str) -> int:
    """The version that an instance's field ``@`` tells. Raises ``IntegrityError`` if statecache did not write it."""
    try:
        return int(own.split(b" ")[1])
    except (IndexError, ValueError):
        raise _foreign(address) from None


def _foreign(address: str) -> errors.IntegrityError:
    return errors.IntegrityError(
        f"{address}: its key in Redis holds something that statecache did not write; run 'statecache verify'"
    )


def as_ids(ids: Iterable[str]) -> list[str]:
    """A list of ids; a text is one id, not a list of its characters."""
    if isinstance(ids, str) or not isinstance(ids, Iterable):
        raise errors.InvalidDataError(f"ids {wording.shown(ids)} is refused: give a list of ids")
    return codec.plain_texts(list(ids))


def _ids(wanted: Iterable[object]) -> list[Any]:
    """The ids of what a bulk call was given, None where one has none."""
    return codec.plain_texts([getattr(one, "id", None) for one in wanted])


def check_kind(what: str, value: object, kind: type) -> None:
    """Refuse an argument of another type."""
    if type(value) is kind:  # five times as fast as isinstance, where it is a Struct
        return
    if not isinstance(value, kind) or isinstance(value, bool):
        raise errors.InvalidDataError(
            f"{what} {wording.shown(value)} is refused: it must be a {kind.__name__}, not {type(value).__name__}"
        )


def as_list(what: str, given: Iterable[Any]) -> list[Any]:
    """A list of what a bulk call was given."""
    if isinstance(given, (str, Mapping)) or not isinstance(given, Iterable):
        raise errors.InvalidDataError(f"{what} {wording.shown(given)} is refused: give a list")
    return list(given)


def as_receipts(given: model.Receipt | Sequence[model.Receipt]) -> list[model.Receipt]:
    """A list of the receipts to wait for, of which there may be one."""
    receipts = [given] if isinstance(given, model.Receipt) else as_list("receipt", given)
    for one in receipts:
        check_kind("receipt", one, model.Receipt)
    return receipts


def _as_start(start: Any) -> model.Start | errors.InvalidDataError:
    """One element of a list of starts, or the error that it will get: the others are begun."""
    match start:
        case (id, data):
            return model.Start(id, data)
        case str(id):
            return model.Start(id)
        case model.Start():
            return start
    return errors.InvalidDataError(
        f"the start {wording.shown(start)} is refused: it must be an id, (id, data) or a Start, not {type(start).__name__}"
    )


def _as_move(move: object) -> model.Move | errors.InvalidDataError:
    """One element of a list of moves, or the error that it will get."""
    if type(move) is model.Move or isinstance(move, model.Move):  # isinstance of a Struct takes five times as long
        return move
    return errors.InvalidDataError(
        f"the move {wording.shown(move)} is refused: it must be a Move, not {type(move).__name__}"
    )
