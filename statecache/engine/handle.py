"""One machine of a store, as callers use it: ``orders = cache.machine(Order)``."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

from statecache import metrics
from statecache.core import codec, entry, errors, flows, model
from statecache.core.machine import StateMachine
from statecache.engine import claims as claiming
from statecache.engine import finals
from statecache.engine.calls import Build, Calls, Start, as_ids, as_list, check_kind
from statecache.engine.processes import OfOneProcess

if TYPE_CHECKING:
    from statecache.engine.cache import StateCache

CONFIRMED = (model.Durability.FSYNC, model.Durability.REPLICA)


class MachineHandle(OfOneProcess):
    """All that can be done with the instances of one machine. Thread-safe; made by ``StateCache.machine``.

    Every write is one script call, retried with the same transition id until the call's ``timeout`` (seconds), and then

    - on return: Redis has it (``durability="hot"``, the default), or what the given level says;
    - on ``UnavailableError``: it may or may not have been applied; repeat it with the same ``transition_id``;
    - on ``DurabilityTimeout``, and on ``ParkedError`` with a ``receipt``: it stands in Redis, but is not known to be in SQL (to
      have reached the given level), or waits as a dead letter because SQL refused it;
    - on ``IntegrityError``: the message tells what became of it (it was applied, and lost with Redis; it was applied before);
    - on any other error: it was not applied by this call. Those that judge the instance say so of an earlier call with the same
      ``transition_id`` too; ``BackpressureError``, ``RecoveringError`` and ``ConfigurationError`` tell nothing of that one
      (Redis may refuse before it looks): repeat it.

    Errors of every write: ``InvalidDataError`` (arguments), ``NotFoundError``, ``AlreadyExistsError``,
    ``InvalidTransitionError``, ``StaleVersionError``, ``FencedError``, ``ParkedError``, ``BackpressureError``,
    ``RecoveringError``, ``UnavailableError``, ``DurabilityTimeout``.
    """

    def __init__(self, cache: StateCache, machine: type[StateMachine]) -> None:
        self._cache = self.cache = cache
        self.machine = machine
        self.name = machine.definition.name
        self.calls = Calls(machine, cache.settings, cache.ids)
        default = machine.definition.durability or cache.settings.durability
        self.meter = metrics.MachineMeter(cache.metrics, self.name, machine.definition.events, default)

    def __repr__(self) -> str:
        return f"<MachineHandle {self.name} version {self.machine.definition.version}>"

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
        began = time.perf_counter()
        try:
            request = self.calls.door.start(
                id, data, actor=actor, reason=reason, transition_id=transition_id, occurred_at=occurred_at
            )
            receipt = self._write(request, durability, timeout)
        except errors.StateCacheError as error:
            self.meter.refused(entry.EVENT_START, error)
            raise
        self.meter.done(receipt, durability, time.perf_counter() - began)
        return receipt

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

        Data is checked against the machine's ``Data``. So are the types of fields that are added to, but not what the sums will
        be: as others may add at the same time, bounds (``le=10``) do not hold for ``increment``.

        With ``transition_id`` the call may be repeated for ever: it is applied once, and answered with the same receipt
        (``duplicate=True``), whatever version a repetition expects. ``expect_version`` refuses if somebody else moved the
        instance.
        """
        move = model.Move(id, event, data, unset, increment, actor, reason, expect_version, transition_id, occurred_at)
        return self.fire(move, durability, timeout)

    def fire(self, move: model.Move, durability: str | None = None, timeout: float | None = None) -> model.Receipt:
        """``transition`` for a move that is there already; the only way to make one under a claim (``Move.claim``)."""
        began = time.perf_counter()
        try:
            check_kind("move", move, model.Move)
            receipt = self._write(self.calls.door.transition(move), durability, timeout)
        except errors.StateCacheError as error:
            self.meter.refused(getattr(move, "event", ""), error)
            raise
        self.meter.done(receipt, durability, time.perf_counter() - began)
        return receipt

    def start_many(
        self,
        starts: Iterable[Start],
        *,
        actor: str | None = None,
        durability: str | None = None,
        timeout: float | None = None,
    ) -> list[model.Receipt | errors.StateCacheError]:
        """Begin many instances, given as (id, data), as ids or as ``Start``; a receipt or an error for each, in order.

        ``actor`` is that of the starts that name none.
        """
        ids, build = self.calls.starts(starts, actor)
        return self._write_many(ids, build, lambda index: entry.EVENT_START, durability, timeout)

    def transition_many(
        self, moves: Iterable[model.Move], *, durability: str | None = None, timeout: float | None = None
    ) -> list[model.Receipt | errors.StateCacheError]:
        """Fire many events; a receipt or an error for each, in order. One failure fails one item.

        Several moves of one instance are applied in the order given. Cost: one script call per 125 moves, two in flight.
        Without ``timeout`` a long list may take its time: it fails when nothing of it has gone on for the default timeout.
        With it, the list goes on past the deadline only as long as Redis answers.
        """
        wanted = as_list("moves", moves)
        ids, build = self.calls.moves(wanted)
        return self._write_many(ids, build, lambda index: getattr(wanted[index], "event", None), durability, timeout)

    def _write(self, request: flows.Request, durability: str | None, timeout: float | None) -> model.Receipt:
        deadline = self._cache.deadline(timeout)
        level = self._cache.level(durability, self.machine.definition.durability)
        if level in CONFIRMED:
            request.item.confirm = self._cache.confirmation(level, deadline)
        receipt = self._cache.driver.write(request, deadline)
        if level is model.Durability.DURABLE:
            self._cache.confirm([receipt], deadline)
        return receipt

    def _write_many(
        self,
        ids: Sequence[Any],
        build: Build,
        event_of: Callable[[int], object],
        durability: str | None,
        timeout: float | None,
    ) -> list[model.Receipt | errors.StateCacheError]:
        began = time.perf_counter()
        deadline = self._cache.deadline(timeout)
        level = self._cache.level(durability, self.machine.definition.durability)
        confirm = self._cache.confirmation(level, deadline) if level in CONFIRMED else None

        def confirmed(indexes: Sequence[int]) -> Iterator[flows.Request | errors.StateCacheError]:
            for request in build(indexes):
                if isinstance(request, flows.Request):
                    request.item.confirm = confirm
                yield request

        results: list[Any] = [None] * len(ids)
        patience = self._cache.settings.call_timeout_seconds if timeout is None else None
        self._cache.driver.write_many(ids, build if confirm is None else confirmed, results, deadline, patience)
        if level is model.Durability.DURABLE:
            self._cache.confirm_many(results, deadline)
        self.meter.many(results, event_of, durability, time.perf_counter() - began)
        return results

    # --- claims ------------------------------------------------------------------------------------------------------

    def claim(
        self,
        id: str,
        ttl: float | timedelta = claiming.TTL_SECONDS,
        *,
        worker: str | None = None,
        renew: bool = False,
        timeout: float | None = None,
    ) -> claiming.Claim:
        """Take the right to move an instance for ``ttl`` (seconds, or a timedelta): see ``engine/claims.py``.

            with orders.claim("1001", ttl=30) as claim:
                claim.transition("ship")

        Until the claim ends nobody else can move the instance (``FencedError``), and once it has ended its holder cannot.
        ``worker`` is the name that others are shown (default: host and process). With ``renew`` a thread renews it until it
        is released. Claims do not survive the loss of Redis: the holder is told by ``FencedError``. One round trip.

        Raises ``FencedError`` when another worker holds it, ``NotFoundError``, ``ParkedError``, and what writes raise.
        """
        return claiming.take(self, id, ttl, worker, renew, timeout)

    def claim_next(
        self,
        state: str,
        ttl: float | timedelta = claiming.TTL_SECONDS,
        *,
        older_than: timedelta | None = None,
        worker: str | None = None,
        renew: bool = False,
        timeout: float | None = None,
    ) -> claiming.Claim | None:
        """Claim the instance that has been in ``state`` for longest (at least ``older_than``) and that nobody holds; None
        if there is none. However many workers call it, each instance goes to one of them.

        Who is in the state is asked of SQL, so one that has come there since the watermark is handed out once it was flushed;
        whether it still is there, and unclaimed, is checked in Redis in the step that claims it. One SQL query and one
        script call for each hundred instances that others hold.
        """
        return claiming.take_next(self, state, ttl, older_than, worker, renew, timeout)

    def claims(self, limit: int = 1000) -> list[claiming.Held]:
        """The claims of this machine that are in force, those first that end first."""
        return claiming.listed(self.cache, self.name, limit)

    # --- reads -------------------------------------------------------------------------------------------------------

    def get(self, id: str, *, timeout: float | None = None) -> model.Snapshot:
        """The instance as it is now: one round trip when it is hot, one SQL query more when it is cold.

        Raises ``NotFoundError``. A Redis that has just become untrue (a failover that lost its tail) may be seen by a
        read until the first checked call, at most half a second later; writes are never accepted there.
        """
        try:
            deadline = self._cache.deadline(timeout)
            snapshot = self._cache.driver.read(*self.calls.address(id), self.calls.snapshot, deadline)
        except errors.NotFoundError:
            self.meter.read("missing")
            raise
        self.meter.read(snapshot.source)
        return snapshot

    def get_many(
        self, ids: Iterable[str], *, timeout: float | None = None
    ) -> list[model.Snapshot | errors.StateCacheError]:
        """Many instances as they are now; a snapshot or an error (``NotFoundError``) for each, in order."""
        wanted = as_ids(ids)
        results: list[Any] = self.calls.door.check_ids(wanted)
        self._cache.driver.read_many(self.name, wanted, self.calls.snapshot, results, self._cache.deadline(timeout))
        self.meter.read_many(results)
        return results

    def state(self, id: str, *, timeout: float | None = None) -> str:
        """The state that the instance is in now. Raises ``NotFoundError``."""
        return self.get(id, timeout=timeout).state

    def history(self, id: str, *, timeout: float | None = None) -> list[model.Transition]:
        """All transitions of the instance, oldest first, those too that are not in SQL yet. Raises ``NotFoundError``."""
        rows: list[model.Transition] = self._cache.driver.run(self.calls.history(id), self._cache.deadline(timeout))
        return rows

    def at(
        self, id: str, *, version: int | None = None, when: datetime | None = None, timeout: float | None = None
    ) -> model.Snapshot:
        """The instance as it was at a version, or at a moment by the server's clock (``Transition.at``).

        Raises ``NotFoundError`` where there was none.
        """
        deadline = self._cache.deadline(timeout)
        rows: list[model.Transition] = self._cache.driver.run(self.calls.history(id), deadline)
        snapshot = self.calls.at(id, rows, version, when)
        if rows[0].covers_from is not None:  # archived or reconciled: that row's time is not the start's
            with contextlib.suppress(errors.NotFoundError, errors.ParkedError):
                now = self._cache.driver.read(*self.calls.address(id), self.calls.snapshot, deadline)
                snapshot.created_ms = now.created_ms
        return snapshot

    def find(
        self, state: str | None = None, *, older_than: timedelta | None = None, stuck: bool = False, limit: int = 100
    ) -> list[model.Snapshot]:
        """Instances in a state, those first that have been there longest: from SQL, as of the watermark.

        A state may be one that only another registered version of the machine has. Without a state: in any. ``stuck``: those
        that are past their state's timeout and that no event moves on, see ``engine/timeouts.py``.
        """
        state = codec.plain_text(state)
        with self._in_time():
            older_than_ms = self.calls.find_bound(
                state, older_than, limit, partial(finals.states, self._cache.durable, self.name)
            )
            if stuck:
                late = self._cache.timeouts.stuck(self.name, state, limit, older_than_ms)
                return self.calls.found([one.row for one in late])
            return self.calls.found(self._cache.durable.find(self.name, state, older_than_ms, limit))

    def counts(self) -> dict[str, int]:
        """Instances by state: from SQL, as of the watermark."""
        with self._in_time():
            return self._cache.durable.counts(self.name)

    def _in_time(self) -> contextlib.AbstractContextManager[None]:
        return self._cache.durable.until(self._cache.deadline(None))
