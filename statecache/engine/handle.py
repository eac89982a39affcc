"""One machine of a store, as callers use it: ``orders = cache.machine(Order)``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from statecache.core import entry, errors, flows, fold, model, requests
from statecache.core.machine import StateMachine

if TYPE_CHECKING:
    from statecache.engine.cache import StateCache

_CONFIRMED = (model.Durability.FSYNC, model.Durability.REPLICA)


class MachineHandle:
    """All that can be done with the instances of one machine. Thread-safe; made by ``StateCache.machine``.

    Every write is one script call, retried with the same transition id until the call's ``timeout`` (seconds), and then

    - on return: Redis has it (``durability="hot"``, the default), or what the given level says;
    - on ``UnavailableError``: it may or may not have been applied; repeat it with the same ``transition_id``;
    - on any other error: it was not applied.

    Errors of every write: ``InvalidDataError`` (arguments), ``NotFoundError``, ``AlreadyExistsError``,
    ``InvalidTransitionError``, ``StaleVersionError``, ``ParkedError``, ``BackpressureError``, ``RecoveringError``,
    ``UnavailableError``, ``DurabilityTimeout``.
    """

    def __init__(self, cache: StateCache, machine: type[StateMachine]) -> None:
        self._cache = cache
        self.machine = machine
        self.name = machine.definition.name
        self._definition = machine.definition
        settings = cache.settings
        self._door = requests.Door(
            machine.definition, machine.guards, settings.partition_count, settings.limits, cache.ids, self._snapshot
        )

    def __repr__(self) -> str:
        return f"<MachineHandle {self.name} version {self._definition.version}>"

    # --- writes ------------------------------------------------------------------------------------------------------

    def start(
        self,
        id: str,
        data: Mapping[str, Any] | None = None,
        *,
        actor: str | None = None,
        reason: str | None = None,
        transition_id: str | None = None,
        occurred_at: datetime | None = None,
        durability: str | None = None,
        timeout: float | None = None,
    ) -> model.Receipt:
        """Begin an instance in the machine's initial state, at version 1. One round trip when Redis holds the partition
        whole; one SQL look-up more when some of it is cold."""
        request = self._door.start(
            id, data, actor=actor, reason=reason, transition_id=transition_id, occurred_at=occurred_at
        )
        return self._write(request, durability, timeout)

    def transition(
        self,
        id: str,
        event: str,
        data: Mapping[str, Any] | None = None,
        *,
        unset: Sequence[str] = (),
        increment: Mapping[str, int | float] | None = None,
        actor: str | None = None,
        reason: str | None = None,
        expect_version: int | None = None,
        transition_id: str | None = None,
        occurred_at: datetime | None = None,
        durability: str | None = None,
        timeout: float | None = None,
    ) -> model.Receipt:
        """Fire an event: move the instance, set the fields of ``data``, remove those of ``unset``, add to those of
        ``increment`` (a missing field counts as 0).

        With ``transition_id`` the call may be repeated for ever: it is applied once, and answered with the same receipt
        (``duplicate=True``). ``expect_version`` refuses if somebody else moved the instance.
        """
        move = model.Move(id, event, data, unset, increment, actor, reason, expect_version, transition_id, occurred_at)
        return self._write(self._door.transition(move), durability, timeout)

    def start_many(
        self,
        starts: Iterable[model.Start | tuple[str, Mapping[str, Any] | None] | str],
        *,
        actor: str | None = None,
        durability: str | None = None,
        timeout: float | None = None,
    ) -> list[model.Receipt | errors.StateCacheError]:
        """Begin many instances, given as (id, data), as ids or as ``Start``; a receipt or an error for each, in order.

        ``actor`` is that of the starts that name none.
        """
        wanted = [_as_start(start) for start in starts]

        def build(index: int) -> flows.Request:
            one = wanted[index]
            return self._door.start(
                one.id, one.data, actor=one.actor or actor, reason=one.reason, transition_id=one.transition_id,
                occurred_at=one.occurred_at,
            )  # fmt: skip

        return self._write_many([one.id for one in wanted], build, durability, timeout)

    def transition_many(
        self, moves: Iterable[model.Move], *, durability: str | None = None, timeout: float | None = None
    ) -> list[model.Receipt | errors.StateCacheError]:
        """Fire many events; a receipt or an error for each, in order. One failure fails one item.

        Several moves of one instance are applied in the order given. Cost: one script call per 125 moves, two in flight.
        Without ``timeout`` a long list may take its time: it fails when nothing of it has gone on for the default timeout.
        """
        wanted = list(moves)
        # A move sent again is answered only after history was asked; what follows it must not overtake it meanwhile.
        repeatable = {move.id for move in wanted if move.transition_id is not None}

        def build(index: int) -> flows.Request:
            request = self._door.transition(wanted[index])
            request.own_id = request.own_id or request.item.id in repeatable
            return request

        return self._write_many([move.id for move in wanted], build, durability, timeout)

    def _write(self, request: flows.Request, durability: str | None, timeout: float | None) -> model.Receipt:
        deadline = self._cache.deadline(timeout)
        level = self._cache.level(durability or self._definition.durability)
        if level in _CONFIRMED:
            request.item.confirm = self._cache.confirmation(level, deadline)
        receipt: model.Receipt = self._cache.driver.run(flows.transition(request), deadline)
        if level is model.Durability.DURABLE:
            self._cache.confirm([receipt], deadline)
        return receipt

    def _write_many(
        self,
        ids: Sequence[Any],
        build: Callable[[int], flows.Request],
        durability: str | None,
        timeout: float | None,
    ) -> list[model.Receipt | errors.StateCacheError]:
        deadline = self._cache.deadline(timeout)
        level = self._cache.level(durability or self._definition.durability)
        confirm = self._cache.confirmation(level, deadline) if level in _CONFIRMED else None

        def begin(index: int) -> flows.Flow:
            request = build(index)
            request.item.confirm = confirm
            return flows.transition(request)

        lanes: dict[Any, list[int]] = {}
        for index, id in enumerate(ids):
            lanes.setdefault(id if isinstance(id, str) else index, []).append(index)
        results: list[Any] = [None] * len(ids)
        patience = self._cache.settings.call_timeout_seconds if timeout is None else None
        self._cache.driver.run_many(lanes.values(), begin, results, deadline, patience)
        if level is model.Durability.DURABLE:
            self._cache.confirm_many(results, deadline)
        return results

    # --- reads -------------------------------------------------------------------------------------------------------

    def get(self, id: str, *, timeout: float | None = None) -> model.Snapshot:
        """The instance as it is now: one round trip when it is hot, one SQL query more when it is cold.

        Raises ``NotFoundError``. A Redis that has just become untrue (a failover that lost its tail) may be seen by a
        read until the first checked call, at most half a second later; writes are never accepted there.
        """
        self._door.check_id(id)
        flow = flows.snapshot(self._door.partition_of(id), self.name, id, self._snapshot)
        snapshot: model.Snapshot = self._cache.driver.run(flow, self._cache.deadline(timeout))
        return snapshot

    def get_many(
        self, ids: Iterable[str], *, timeout: float | None = None
    ) -> list[model.Snapshot | errors.StateCacheError]:
        """Many instances as they are now; a snapshot or an error (``NotFoundError``) for each, in order."""
        wanted = list(ids)
        results: list[Any] = [None] * len(wanted)

        def begin(index: int) -> flows.Flow:
            id = self._door.check_id(wanted[index])
            return flows.snapshot(self._door.partition_of(id), self.name, id, self._snapshot)

        lanes = [[index] for index in range(len(wanted))]
        self._cache.driver.run_many(lanes, begin, results, self._cache.deadline(timeout))
        return results

    def state(self, id: str, *, timeout: float | None = None) -> str:
        """The state that the instance is in now. Raises ``NotFoundError``."""
        return self.get(id, timeout=timeout).state

    def history(self, id: str, *, timeout: float | None = None) -> list[model.Transition]:
        """All transitions of the instance, oldest first, those too that are not in SQL yet. Raises ``NotFoundError``."""
        self._door.check_id(id)
        flow = flows.history(self._door.partition_of(id), self.name, id)
        rows: list[model.Transition] = self._cache.driver.run(flow, self._cache.deadline(timeout))
        return rows

    def at(
        self, id: str, *, version: int | None = None, when: datetime | None = None, timeout: float | None = None
    ) -> model.Snapshot:
        """The instance as it was at a version, or at a moment by the server's clock (``Transition.at``).

        Raises ``NotFoundError`` where there was none.
        """
        if (version is None) == (when is None):
            raise errors.InvalidDataError("at() wants either a version or a moment (when=)")
        rows = self.history(id, timeout=timeout)
        if version is not None:
            kept = [row for row in rows if row.version <= version]
            if not kept or kept[-1].version != version:
                raise errors.NotFoundError(f"{self.name}:{id} has no version {version}; it has 1 to {rows[-1].version}")
        else:
            assert when is not None
            limit_ms = model.ms_of(when)
            kept = [row for row in rows if row.at_ms <= limit_ms]
            if not kept:
                raise errors.NotFoundError(
                    f"{self.name}:{id} did not exist at {when.isoformat()}: it began at {rows[0].at}"
                )
        return self._folded(kept)

    def find(
        self, state: str | None = None, *, older_than: timedelta | None = None, limit: int = 100
    ) -> list[model.Snapshot]:
        """Instances in a state, those first that have been there longest: from SQL, as of the watermark.

        Without a state: in any.
        """
        if state is not None and state not in self._definition.states:
            raise errors.InvalidDataError(
                f"state {state!r} is refused: machine {self.name!r} has {', '.join(self._definition.states)}"
            )
        older_than_ms = None if older_than is None else int((time.time() - older_than.total_seconds()) * 1000)
        rows = self._cache.durable.find(self.name, state, older_than_ms, limit)
        lookups = [model.Lookup(entry.ZERO, row) for row in rows]
        return [
            self._snapshot(row.id, flows.hash_of(found), "durable") for row, found in zip(rows, lookups, strict=True)
        ]

    def counts(self) -> dict[str, int]:
        """Instances by state: from SQL, as of the watermark."""
        return self._cache.durable.counts(self.name)

    def _snapshot(self, id: str, fields: Mapping[bytes, bytes], source: str) -> model.Snapshot:
        own = fields.get(b"@")
        if own is None:
            raise errors.IntegrityError(
                f"{self.name}:{id}: its key in Redis holds something that statecache did not write; run 'statecache verify'"
            )
        state, version, entry_id, created, machine_version, updated, *flags = own.decode().split(" ")
        data = {name.decode(): text for name, text in fields.items() if name not in (b"@", b"@r")}
        return model.Snapshot(
            self.name, id, state, int(version), data, entry_id=entry_id, created_ms=int(created), updated_ms=int(updated),
            machine_version=int(machine_version), final=state in self._definition.finals,
            available_events=self._definition.available_events(state), source=source, parked=flags == ["p"],
        )  # fmt: skip

    def _folded(self, rows: Sequence[model.Transition]) -> model.Snapshot:
        data: dict[str, Any] = {}
        for row in rows:
            fold.apply_transition(data, row)
        first, last = rows[0], rows[-1]
        return model.Snapshot(
            self.name, last.id, last.to_state, last.version, fold.texts(data), entry_id=last.entry_id,
            created_ms=first.at_ms, updated_ms=last.at_ms, machine_version=last.machine_version,
            final=last.to_state in self._definition.finals,
            available_events=self._definition.available_events(last.to_state),
            source="durable" if last.durable else "hot",
        )  # fmt: skip


def _as_start(start: model.Start | tuple[str, Mapping[str, Any] | None] | str) -> model.Start:
    if isinstance(start, model.Start):
        return start
    return model.Start(start) if isinstance(start, str) else model.Start(*start)
