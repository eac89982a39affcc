"""What every request shares: the store, its machines' handles, and one look at its health a second."""

from __future__ import annotations

import concurrent.futures
import contextlib
import math
import threading
import time

from statecache.core import codec, errors
from statecache.core.machine import StateMachine
from statecache.core.model import Checkpoint, Snapshot
from statecache.engine import status as engine_status
from statecache.engine.cache import StateCache
from statecache.engine.handle import MachineHandle
from statecache.web.policy import Policy

_STATUS_SECONDS = 0.8
_PARKED_MAX = 1000
_RECOVERIES = 20
_LOOK_SECONDS_MAX = 5.0

Health = tuple[engine_status.Status, int]


class Site:
    """Thread-safe. ``machines`` are classes whose guards this process can judge; all others come from SQL."""

    def __init__(self, cache: StateCache, policy: Policy, machines: tuple[type[StateMachine], ...] = ()) -> None:
        self.cache = cache
        self.policy = policy
        self.closing = False
        """Set when the server stops: streams end by themselves."""
        self._given = {machine.definition.name: machine for machine in machines}
        self._handles: dict[str, MachineHandle] = {}
        self._lock = threading.Lock()
        self._looked_at = -math.inf
        self._look: concurrent.futures.Future[Health] | None = None

    def handle(self, name: str) -> MachineHandle:
        """The handle of a machine's latest version. One query; the machine itself is built once a version.

        Raises ``NotFoundError``.
        """
        found = self.cache.durable.machine(name) if codec.NAME.fullmatch(name) else None
        if found is None:
            raise errors.NotFoundError(f"no machine {name!r} is registered here")
        known = self._handles.get(name)
        if known is None or known.machine.fingerprint != found[1]:
            given = self._given.get(name)
            known = self.cache.machine(given if given is not None and given.fingerprint == found[1] else name)
            self._handles[name] = known
        return known

    def machine_names(self) -> list[str]:
        return sorted({row.name for row in self.cache.durable.machines()})

    def exact(self, id: str) -> list[Snapshot]:
        """The instances with this id, one a machine at most; also that of an address ``machine:id``."""
        found = []
        for name in self.machine_names():
            prefix = f"{name}:"
            for wanted in (id, id[len(prefix) :]) if id.startswith(prefix) else (id,):
                if 0 < len(wanted) <= self.cache.settings.id_length_max:
                    with contextlib.suppress(errors.NotFoundError):
                        found.append(self.handle(name).get(wanted))
        return found

    def similar(self, prefix: str, limit: int) -> list[Checkpoint]:
        """Instances whose id begins so, as of the watermark, ``limit`` at most."""
        if len(prefix) > self.cache.settings.id_length_max:
            return []
        codec.check_text("id", prefix, self.cache.settings.id_length_max)
        found: list[Checkpoint] = []
        for name in self.machine_names():
            if len(found) < limit:
                found += self.cache.durable.beginning_with(name, prefix, limit - len(found))
        return found

    def status(self) -> Health:
        """How the store is doing, and how many instances are parked (1000 at most); at most a second old.

        Raises ``UnavailableError`` when SQL is away, or a server hangs: one look is waited for by all who ask, and no other
        is begun while it hangs.
        """
        with self._lock:
            if self._look is None or (self._look.done() and time.monotonic() - self._looked_at > _STATUS_SECONDS):
                self._look, self._looked_at = concurrent.futures.Future(), time.monotonic()
                thread = threading.Thread(target=self._fulfil, args=(self._look,), name="statecache-look", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:  # no thread to be had at this moment: the next look has another chance
                    self._look.set_exception(errors.UnavailableError(f"no thread to look at the store with: {error}"))
            look = self._look
        try:
            return look.result(_LOOK_SECONDS_MAX)
        except TimeoutError:
            raise errors.UnavailableError(f"a server has not answered for {_LOOK_SECONDS_MAX:g} s") from None

    def _fulfil(self, look: concurrent.futures.Future[Health]) -> None:
        try:
            found = engine_status.status(self.cache, _RECOVERIES)
            look.set_result((found, len(self.cache.durable.parked_instances(_PARKED_MAX))))
        except BaseException as error:
            look.set_exception(error)

    def not_ready(self) -> list[str]:
        """Why this deployment should get no traffic now; empty when it should."""
        try:
            found, _ = self.status()
        except errors.StateCacheError as error:
            return [f"SQL: {error}"]
        if found.redis != engine_status.READY:
            return [f"Redis: {found.redis_problem or found.redis}"]
        bound = self.cache.settings.web_ready_lag_seconds
        if found.lag_seconds is not None and found.lag_seconds > bound:
            oldest = f"the oldest unflushed transition is {found.lag_seconds:.1f} s old, more than {bound:g} s"
            return [f"lag: {oldest}; is a flusher running?"]
        return []
