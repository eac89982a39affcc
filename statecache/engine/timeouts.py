"""Timeouts: what happens to an instance that stays in a state longer than its machine allows.

The script that moves an instance into a state with a timeout and an event for it notes the deadline in a sorted set of the
partition, in the same step (``apply.lua``); the one that moves it on takes it away. Whoever runs a flusher looks every second
for what is due and fires the event by the ordinary path.

The set is an index, the instance is the truth: what is due is read, its deadline computed from the time of its last
transition and from the machine version that made it, and the event is fired under the version that was seen and a transition
id made of it. So

- it fires once, however many processes look and wherever they die (P3, P4): a second one meets ``DUP`` or another version;
- a member that means nothing any more (Redis went back, a newer machine version without that timeout made the last move) is
  taken away; it never fires;
- a member that was lost with Redis comes back: a sweep asks SQL who has been in such a state for too long, at once after a
  recovery and every ``timeout_sweep_seconds``. Between a move and its flush there is the hash, which has its member;
- a cold instance keeps its member; the ordinary path brings it back when it is due.

A timeout is that of the machine version which made the instance's last transition, and its event is fired under that version:
another version changes it for instances that it moves. A transition from the state to itself begins it anew.

What cannot be fired now waits and is looked at again: a claimed instance until its claim ends, a parked one a minute, and so
one whose machine version a newer statecache has registered in words that this one cannot read. These and those without an
event for their timeout are *stuck*: reported, from SQL, as of the watermark.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from statecache.core import errors, failpoints, model, requests
from statecache.core.machine import StateMachine
from statecache.core.spec import readable
from statecache.engine.handle import MachineHandle
from statecache.hot import deadlines

if TYPE_CHECKING:
    from statecache.engine.cache import StateCache

_log = logging.getLogger(__name__)
ACTOR = "statecache"
PAGE = 200
"""Instances of each partition that are looked at together."""
_PASSES_MAX = 50
_SWEEP_PAGE = 1000
RETRY_MS = 60_000
"""When one that could not be fired is tried again; and how long after its deadline it is called stuck."""
_AGAIN_SECONDS = 0.1
"""So long a turn's first look is repeated: connections may have died since the last one. A server that is away waits."""
_LATER = (errors.UnavailableError, errors.RecoveringError, errors.BackpressureError)
_MOVED_ON = (errors.StaleVersionError, errors.NotFoundError)

Remind = tuple[int, str, int | None, int | None]


class Stuck(NamedTuple):
    """An instance that has been in its state for longer than its machine allows, and since when that is."""

    row: model.Checkpoint
    deadline_ms: int


class Timeouts:
    """Fires what is due, and tells what is stuck. Thread-safe; several may work at once."""

    def __init__(self, cache: StateCache) -> None:
        self._cache = cache
        self._handles: dict[tuple[str, int], MachineHandle | None] = {}
        self._lock = threading.Lock()
        self._swept: tuple[object, float] = (None, 0.0)

    # --- firing ------------------------------------------------------------------------------------------------------

    def run(self, stopping: threading.Event | None = None) -> int:
        """One turn: fire what is due, and if it is time sweep first; returns how many events were fired.

        Raises ``UnavailableError``, ``RecoveringError`` or ``BackpressureError`` when the rest has to wait for its next turn.
        """
        stopping = stopping or threading.Event()
        with self._lock:
            fired = self._fire_due(stopping)
            stamp, swept_at = self._swept
            now = time.monotonic()
            if stamp != self._cache.hot.stamp or now - swept_at >= self._cache.settings.timeout_sweep_seconds:
                stamp = self._cache.hot.stamp
                if self.sweep(stopping):
                    fired += self._fire_due(stopping)
                self._swept = stamp, now
            return fired

    def _fire_due(self, stopping: threading.Event) -> int:
        fired = 0
        for _ in range(_PASSES_MAX):
            found, now_ms = self._due()
            if not found or stopping.is_set():
                break
            failpoints.hit("timeouts.read")
            fired += self._fire(found, now_ms)
            if len(found) < PAGE:
                break
        return fired

    def _due(self) -> tuple[list[deadlines.Due], int]:
        cache = self._cache
        deadline = cache.deadline(None)
        partitions = range(cache.settings.partition_count)
        while True:
            again_until = min(deadline, time.monotonic() + _AGAIN_SECONDS)
            look = partial(deadlines.due, cache.hot, partitions, PAGE)
            code, now_ms, found = cache.driver.patiently(look, again_until)
            if code == "OK":
                return found, now_ms
            cache.admission.ensure(code, deadline)

    def _fire(self, found: Sequence[deadlines.Due], now_ms: int) -> int:
        """Fire the events of those that are due indeed; tell the index of the others."""
        reminders: list[Remind] = []
        wanted: dict[tuple[str, int], list[tuple[deadlines.Due, model.Move]]] = {}
        unreadable: dict[tuple[str, int], bool] = {}
        for one, seen in self._seen(found, now_ms):
            key = seen.machine, seen.machine_version
            if key not in unreadable:
                unreadable[key] = self._is_unreadable(*key)
            if unreadable[key]:
                reminders.append(_reminder(one, now_ms + RETRY_MS))
                continue
            move, reminder = self._judged(one, seen, now_ms)
            if move is not None:
                wanted.setdefault((seen.machine, seen.machine_version), []).append((one, move))
            elif reminder is not None:
                reminders.append(reminder)
        fired = 0
        later: errors.StateCacheError | None = None
        for (machine, version), pairs in wanted.items():
            handle = self._handle(machine, version)
            assert handle is not None
            results = handle.transition_many([move for _, move in pairs], durability="hot")
            failpoints.hit("timeouts.fired")
            for (one, move), result in zip(pairs, results, strict=True):
                if isinstance(result, model.Receipt):
                    fired += not result.duplicate
                elif isinstance(result, _LATER):
                    later = later or result
                elif not isinstance(result, _MOVED_ON):
                    reminders.append(_postponed(one, move.event, result, now_ms))
        self._remind(reminders)
        if later is not None:
            raise later
        return fired

    def _seen(self, found: Sequence[deadlines.Due], now_ms: int) -> Iterator[tuple[deadlines.Due, model.Snapshot]]:
        """The instances as they are. One that does not exist leaves the index; what cannot be read is tried again later, so
        that it does not stand before the others."""
        gone: list[Remind] = []
        for machine in dict.fromkeys(one.machine for one in found):
            mine = [one for one in found if one.machine == machine]
            handle = self._latest(machine)
            if handle is None:  # put off, or nobody has registered it here: SQL went back to before it
                again_ms = now_ms + RETRY_MS if self._cache.durable.machine(machine) else None
                gone += [_reminder(one, again_ms) for one in mine]
                continue
            for one, seen in zip(mine, handle.get_many([one.id for one in mine]), strict=True):
                if isinstance(seen, model.Snapshot):
                    yield one, seen
                elif isinstance(seen, errors.NotFoundError):
                    gone.append(_reminder(one, None))
                elif not isinstance(seen, _LATER):
                    gone.append(_postponed(one, "read", seen, now_ms))
        self._remind(gone)

    def _judged(self, one: deadlines.Due, seen: model.Snapshot, now_ms: int) -> tuple[model.Move | None, Remind | None]:
        """What to do about an instance whose deadline has passed by the index: a move, or a change of the index."""
        handle = self._handle(seen.machine, seen.machine_version)
        timeout = handle.machine.definition.timeouts.get(seen.state) if handle else None
        if timeout is None or timeout.event is None:
            return None, _reminder(one, None)
        deadline_ms = seen.updated_ms + timeout.ms
        if deadline_ms > now_ms:
            return None, _reminder(one, deadline_ms)
        if seen.parked and self._cache.durable.letters(seen.machine, seen.id):  # without letters the call unparks it
            return None, _reminder(one, now_ms + RETRY_MS)
        move = requests.Unused(
            seen.id, timeout.event, actor=ACTOR, reason=f"timeout after {timeout.ms / 1000:g} s in {seen.state}",
            expect_version=seen.version, transition_id=f"timeout:{seen.version}",
        )  # fmt: skip
        return move, None

    def _remind(self, rows: Sequence[Remind]) -> int:
        """Change the index; returns how many deadlines were changed. Refused by a recovery: the next turn sees to it."""
        return deadlines.remind(self._cache.hot, rows).count("OK") if rows else 0

    # --- what Redis has lost -----------------------------------------------------------------------------------------

    def sweep(self, stopping: threading.Event | None = None) -> int:
        """Bring deadlines back that have passed by SQL and are not in Redis; returns how many."""
        now_ms = self._cache.hot.time_ms()
        added = 0
        for machine, state, shortest_ms in self._timed(fired=True):
            for rows in self._pages(machine, state, now_ms - shortest_ms):
                overdue = [one for row in rows if (one := self._overdue(row, now_ms, fired=True)) is not None]
                reminders: list[Remind] = [
                    (one.row.partition, f"{one.row.machine}:{one.row.id}", None, one.deadline_ms) for one in overdue
                ]
                added += self._remind(reminders)
                if stopping is not None and stopping.is_set():
                    return added
        if added:
            _log.info("%d deadlines that Redis had lost are back", added)
        return added

    def _pages(self, machine: str, state: str, until_ms: int) -> Iterator[list[model.Checkpoint]]:
        after = (0, "")
        while rows := self._cache.durable.find(machine, state, until_ms, _SWEEP_PAGE, after):
            yield rows
            if len(rows) < _SWEEP_PAGE:
                return
            after = rows[-1].updated_ms, rows[-1].id

    def _timed(self, *, fired: bool | None = None, machine: str | None = None) -> list[tuple[str, str, int]]:
        """(machine, state, shortest timeout in ms of any version) of all states that have one; ``fired``: with an event."""
        shortest: dict[tuple[str, str], int] = {}
        for row in self._cache.durable.machine_versions(machine):
            handle = self._handle(*row)
            for state, timeout in handle.machine.definition.timeouts.items() if handle else ():
                if fired in (None, timeout.event is not None):
                    key = row[0], state
                    shortest[key] = min(timeout.ms, shortest.get(key, timeout.ms))
        return [(name, state, ms) for (name, state), ms in shortest.items()]

    def _overdue(self, row: model.Checkpoint, now_ms: int, *, fired: bool) -> Stuck | None:
        """A checkpoint whose deadline has passed; ``fired``: only if there is an event for it."""
        handle = self._handle(row.machine, row.machine_version)
        timeout = handle.machine.definition.timeouts.get(row.state) if handle else None
        if timeout is None or (fired and timeout.event is None):
            return None
        deadline_ms = row.updated_ms + timeout.ms
        grace_ms = 0 if fired or timeout.event is None else RETRY_MS
        return Stuck(row, deadline_ms) if deadline_ms + grace_ms <= now_ms else None

    # --- what is stuck -----------------------------------------------------------------------------------------------

    def stuck(
        self, machine: str | None = None, state: str | None = None, limit: int = 100, until_ms: int | None = None
    ) -> list[Stuck]:
        """Instances that are past their state's timeout and that no event moves on: those first that are longest.

        From SQL, as of the watermark. Where an event should have moved them, those count that are a minute late: parked,
        claimed, or with nobody who runs a flusher. ``until_ms``: only those that changed last at or before it.
        """
        now_ms = int(time.time() * 1000)
        found: list[Stuck] = []
        for name, each, shortest_ms in self._timed(machine=machine):
            if state not in (None, each):
                continue
            mine: list[Stuck] = []
            for rows in self._pages(name, each, min(now_ms - shortest_ms, until_ms or now_ms)):
                mine += [one for row in rows if (one := self._overdue(row, now_ms, fired=False)) is not None]
                if len(mine) >= limit:
                    break
            found += mine
        return sorted(found, key=lambda one: (one.deadline_ms, one.row.machine, one.row.id))[:limit]

    def stuck_counts(self) -> dict[tuple[str, str], int]:
        """How many instances are stuck, by machine and state, 0 included: for gauges. One indexed count for each timed state
        of each machine version; a parked or claimed one counts when it is a minute late."""
        now_ms = int(time.time() * 1000)
        counts: dict[tuple[str, str], int] = {}
        for name, version in self._cache.durable.machine_versions():
            handle = self._handle(name, version)
            for state, timeout in handle.machine.definition.timeouts.items() if handle else ():
                grace_ms = 0 if timeout.event is None else RETRY_MS
                late = self._cache.durable.count_idle(name, version, state, now_ms - timeout.ms - grace_ms)
                counts[name, state] = counts.get((name, state), 0) + late
        return counts

    # --- machines ----------------------------------------------------------------------------------------------------

    def _handle(self, machine: str, version: int) -> MachineHandle | None:
        """A handle of a registered machine's version, which never changes; None if it is not registered (yet), or has a
        definition that this version of statecache cannot read."""
        handle = self._handles.get((machine, version))
        if handle is None:
            found = self._cache.durable.machine(machine, version)
            spec = found and readable(found[2])
            if spec:
                handle = self._handles[machine, version] = MachineHandle(self._cache, StateMachine.from_spec(spec))
        return handle

    def _latest(self, machine: str) -> MachineHandle | None:
        """The handle of the newest version that can be read: a newer statecache may have registered others."""
        versions = self._cache.durable.machine_versions(machine)
        return next(filter(None, (self._handle(*one) for one in reversed(versions))), None)

    def _is_unreadable(self, machine: str, version: int) -> bool:
        """Whether it is registered, by a newer statecache: what to do about its instances is not known here."""
        if self._handle(machine, version) is not None or self._cache.durable.machine(machine, version) is None:
            return False
        _log.warning(
            "timeouts of machine %s, version %d, wait for a newer statecache, trying again in %d s: its definition cannot "
            "be read by this version", machine, version, RETRY_MS // 1000, extra={"machine": machine},
        )  # fmt: skip
        return True


def _reminder(one: deadlines.Due, deadline_ms: int | None) -> Remind:
    return one.partition, f"{one.machine}:{one.id}", one.deadline_ms, deadline_ms


def _postponed(one: deadlines.Due, what: str, error: errors.StateCacheError, now_ms: int) -> Remind:
    """When to look again at an instance whose event was refused."""
    if isinstance(error, errors.FencedError) and error.expires_ms > now_ms:
        return _reminder(
            one, min(error.expires_ms, now_ms + RETRY_MS)
        )  # a claim may be released before its time is over
    _log.warning(
        "the timeout of %s:%s could not be fired (%s), trying again in %d s: %s", one.machine, one.id, what,
        RETRY_MS // 1000, error, extra={"machine": one.machine, "id": one.id},
    )  # fmt: skip
    return _reminder(one, now_ms + RETRY_MS)
