"""A claim in its holder's hands: the right to move one instance, until it ends. The mechanism is in ``core/claims.py``."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from statecache.core import claims, codec, errors, model, wording
from statecache.core.claims import Held
from statecache.engine import finals
from statecache.engine.calls import check_kind, check_limit
from statecache.engine.processes import OfOneProcess
from statecache.hot import claims as hot_claims

if TYPE_CHECKING:
    from statecache.engine.cache import StateCache
    from statecache.engine.handle import MachineHandle

__all__ = ["TTL_SECONDS", "Claim", "Held", "ask_for", "listed", "take", "take_next"]

_log = logging.getLogger(__name__)
TTL_SECONDS = 30.0
PAGE = 100


class Claim(OfOneProcess):
    """The right to move one instance. Made by ``MachineHandle.claim`` and ``claim_next``; a context manager, which ends it.

    ``token`` grows with each grant of this instance: give it to whatever else the worker writes to, and let that refuse a
    lower one (``order`` has it as two numbers, which compare). ``expires_ms`` is when it ends by the clock of Redis.
    Not for several threads at once, but for the one that renews it.
    """

    def __init__(self, handle: MachineHandle, held: Held, ttl_ms: int, *, renew: bool) -> None:
        self._handle = handle
        self.machine, self.id, self.worker, self.token = held.machine, held.id, held.worker, held.token
        self.expires_ms = held.expires_ms
        self._ttl_ms = self._last_ttl_ms = ttl_ms
        self._ended = False
        self._news = threading.Event()
        """For the thread that renews it: it has ended, or ends earlier than was known."""
        if renew:
            kept = weakref.ref(self), self._news
            threading.Thread(target=_keep, args=kept, name=f"statecache-claim-{self.id}", daemon=True).start()

    def __repr__(self) -> str:
        return f"<Claim {self.machine}:{self.id} {self.token} of {self.worker} until {self.expires_at}>"

    @property
    def order(self) -> tuple[int, int]:
        """The token as two numbers."""
        return claims.order(self.token)

    @property
    def expires_at(self) -> datetime:
        """When it ends if it is not renewed (the server's clock, UTC)."""
        return model.datetime_of(self.expires_ms)

    def get(self, *, timeout: float | None = None) -> model.Snapshot:
        """The instance as it is now."""
        return self._handle.get(self.id, timeout=timeout)

    def transition(
        self,
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
        """As ``MachineHandle.transition``, under this claim: refused with ``FencedError`` when it is no longer in force, even
        if nobody else has claimed the instance since. A repetition of what was applied in time is answered as ever."""
        move = model.Move(
            self.id,
            event,
            data,
            unset,
            increment,
            actor,
            reason,
            expect_version,
            transition_id,
            occurred_at,
            self.token,
        )
        return self._handle.fire(move, durability, timeout)

    def renew(self, ttl: float | timedelta | None = None, *, timeout: float | None = None) -> None:
        """Let it last for ``ttl`` (default: as at first) from now on, under the same token. One round trip.

        Raises ``FencedError`` when it has ended: stop, somebody else may have begun.
        """
        ttl_ms = self._ttl_ms if ttl is None else ttl_ms_of(ttl)
        self.expires_ms = self._again(ttl_ms, timeout).expires_ms
        if ttl_ms < self._last_ttl_ms:
            self._news.set()
        self._last_ttl_ms = ttl_ms

    def release(self, *, timeout: float | None = None) -> bool:
        """End it, so that others may go on at once. False if it had ended already. Safe to call twice."""
        self._ended = True
        self._news.set()
        try:
            self._again(0, timeout)
        except (errors.FencedError, errors.NotFoundError):
            return False
        return True

    def _again(self, ttl_ms: int, timeout: float | None) -> Held:
        ask = ask_for(self._handle, self.id, ttl_ms, self.worker, self.token)
        cache = self._handle.cache
        held: Held = cache.driver.run(claims.single(ask), cache.deadline(timeout))
        return held

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        with ending(self):
            self.release()

    def _renew_in_time(self) -> bool:
        """Renew it, for the thread that does so; False when there is no more to renew."""
        try:
            self.renew()
        except errors.FencedError as error:
            if not self._ended:
                _log.warning("a claim was lost: %s", error, extra={"machine": self.machine, "id": self.id})
            return False
        except errors.StateCacheError as error:
            if self._handle.cache.driver.closing.is_set():
                return False
            _log.warning("a claim was not renewed, trying again: %s", error, extra={"machine": self.machine})
        return True


@contextlib.contextmanager
def ending(claim: Claim) -> Iterator[None]:
    """For the end of a block that held a claim: what goes wrong with its release is logged."""
    try:
        yield
    except errors.StateCacheError as error:  # it ends by itself; what the block did or raised matters more
        _log.warning("the claim on %s:%s was not released, it ends at %s: %s", claim.machine, claim.id, claim.expires_at,
                     error, extra={"machine": claim.machine, "id": claim.id})  # fmt: skip


def _keep(claim: weakref.ref[Claim], news: threading.Event) -> None:
    """Renew a claim three times in its time, so that one lost renewal does no harm.

    Until it is released, the store is closed, or nobody has it any more (a task was cancelled while it claimed): then it ends.
    """
    is_due = False
    while (held := claim()) is not None and not held._ended:
        if is_due and not held._renew_in_time():
            return
        pause_seconds = held._last_ttl_ms / 3000
        del held
        is_due = not news.wait(pause_seconds)
        news.clear()


def take(
    handle: MachineHandle, id: str, ttl: float | timedelta, worker: str | None, renew: bool, timeout: float | None
) -> Claim:
    """Claim one instance: see ``MachineHandle.claim``."""
    ttl_ms = ttl_ms_of(ttl)
    ask = ask_for(handle, id, ttl_ms, worker_of(worker))
    cache = handle.cache
    held: Held = cache.driver.run(claims.single(ask), cache.deadline(timeout))
    return Claim(handle, held, ttl_ms, renew=renew)


def take_next(
    handle: MachineHandle,
    state: str,
    ttl: float | timedelta,
    older_than: timedelta | None,
    worker: str | None,
    renew: bool,
    timeout: float | None,
) -> Claim | None:
    """Claim the oldest instance of a state that nobody holds: see ``MachineHandle.claim_next``."""
    cache, ttl_ms, name = handle.cache, ttl_ms_of(ttl), worker_of(worker)
    check_kind("state", state, str)
    state = codec.plain_text(state)
    deadline = cache.deadline(timeout)
    with cache.durable.until(deadline):
        until_ms = handle.calls.find_bound(state, older_than, PAGE, partial(finals.states, cache.durable, handle.name))
    after, nonce = (0, ""), nonce_of_a_call()
    while True:
        with cache.durable.until(deadline):
            page = cache.durable.idle(handle.name, state, after, _LATEST if until_ms is None else until_ms, PAGE)
        rows = [claims.Row(row.partition, row.machine, row.id, state) for row in page]
        held: Held | None = cache.driver.run(claims.first_of(claims.Ask(rows, nonce, name, ttl_ms, one=True)), deadline)
        if held is not None:
            return Claim(handle, held, ttl_ms, renew=renew)
        if len(page) < PAGE:
            return None
        after = page[-1].updated_ms, page[-1].id


_LATEST = 2**62


def ask_for(handle: MachineHandle, id: str, ttl_ms: int, worker: str, token: str = "") -> claims.Ask:
    """What is asked of the script for one instance; ``ttl_ms`` 0 ends the claim ``token``."""
    row = claims.Row(*handle.calls.address(id), token=token)
    return claims.Ask([row], nonce_of_a_call(), worker, ttl_ms)


def holder(handle: MachineHandle, id: str) -> Held | None:
    """Who holds an instance now, or None: for people who look. One plain read more where it is shown.

    Raises ``UnavailableError``.
    """
    return hot_claims.holder(handle.cache.hot, *handle.calls.address(id))


def listed(cache: StateCache, machine: str | None, limit: int) -> list[Held]:
    """The claims in force, of one machine or of all, those first that end first."""
    check_limit(limit)
    partitions = range(cache.settings.partition_count)
    count = limit if machine is None else _ALL
    found = cache.driver.patiently(lambda: hot_claims.all_held(cache.hot, partitions, count), cache.deadline(None))
    return [one for one in found if machine in (None, one.machine)][:limit]


_ALL = 1_000_000


def ttl_ms_of(ttl: object) -> int:
    """A claim's time in ms. Raises ``InvalidDataError``."""
    seconds = ttl.total_seconds() if isinstance(ttl, timedelta) else ttl
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        if not isinstance(seconds, (bool, str)) and 1 <= (ms := round(float(seconds) * 1000)) <= claims.TTL_MS_MAX:  # type: ignore[arg-type]
            return ms
    raise errors.InvalidDataError(
        f"ttl {wording.shown(ttl)} is refused: it is a time in seconds or a timedelta, from 1 ms to "
        f"{claims.TTL_MS_MAX // 86_400_000} days"
    )


def worker_of(worker: str | None) -> str:
    """A worker's name; by default host and process."""
    if worker is not None:
        return claims.check_worker(worker)
    host = "".join(part if claims.WORKER.fullmatch(part) else "-" for part in socket.gethostname()[:22])
    return f"{host}:{os.getpid()}"


def nonce_of_a_call() -> str:
    """What a repetition of a call finds its own claim by: 36 random bits."""
    return secrets.token_urlsafe(5)[:6]
