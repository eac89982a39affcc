"""Admission: is this Redis true, and if not, who makes it so?

Asked whenever a script was refused or is unknown. SQL holds the epoch and owner that count; Redis must have the same in every
partition, be ready, and be served by the server that the last recovery found true. If all match, the scripts are loaded on the
connection that compared them, and the call goes on. Otherwise a recovery is under way (its heartbeat is fresh, and its process
not known to be gone: wait), or is needed: whoever meets the untrue Redis first runs it, unless ``auto_recover`` is off, or the
Redis is empty because it is another one than that where the store's flushers work (``elsewhere.py``).
"""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from collections.abc import Callable

from statecache.core import errors
from statecache.durable import recoveries
from statecache.durable.rows import StoreRow
from statecache.durable.store import DurableStore
from statecache.engine import processes
from statecache.engine.elsewhere import Elsewhere
from statecache.hot import answers, scripts
from statecache.hot.store import HotStore

_log = logging.getLogger(__name__)
HEARTBEAT_STALE_MS = 10_000
"""A recovery that has not given a sign of life for this long is taken for dead, and superseded."""
_WATCHED = 0.3
"""For so much of that time it must have given none while somebody looked, whatever the clocks say. (It gives one a second.)"""


class Admission:
    """Admits one client to its Redis. Thread-safe: one thread asks, the others wait for its answer."""

    def __init__(
        self,
        hot: HotStore,
        durable: DurableStore,
        recover: Callable[[], object],
        elsewhere: Elsewhere,
        *,
        auto_recover: bool,
        revive: Callable[[], None] = lambda: None,
    ) -> None:
        self._hot = hot
        self._durable = durable
        self._recover = recover
        self._elsewhere = elsewhere
        self._auto_recover = auto_recover
        self._revive = revive
        self._lock = threading.RLock()
        self._sign: tuple[int, str, int] | None = None
        self._sign_since = 0.0
        self._recovered: tuple[int, str] | None = None
        """The epoch that was found untrue last."""

    def ensure(self, code: str, deadline: float) -> None:
        """Return when Redis is admitted. Raises ``RecoveringError`` or ``UnavailableError`` at the deadline, and
        ``ConfigurationError`` for a Redis of another deployment, or an empty one while flushers work at another."""
        stamp = self._hot.stamp
        try:
            if not self._lock.acquire(timeout=min(max(0.0, deadline - time.monotonic()), threading.TIMEOUT_MAX)):
                raise errors.RecoveringError(
                    "another call of this process is waiting for Redis to be admitted; try again"
                )
            # Of an old epoch, and another thread has just been admitted to the new one: that is all that was wanted.
            is_done = code in ("EPOCH", "NOSCRIPT") and self._hot.stamp != stamp
            if not is_done:
                self._ensure_alone(deadline)
            self._let_go()
        except BaseException:
            self._let_go()  # not in a ``finally``, which a signal's handler may interrupt at its first step
            raise

    def _let_go(self) -> None:
        with contextlib.suppress(RuntimeError):  # not held, or given back already: the lock knows whose it is
            self._lock.release()

    def _ensure_alone(self, deadline: float) -> None:
        attempt = 0
        while True:
            try:
                row = self._durable.identity()
                answer = self._answer(row, deadline)
                if row.epoch and set(answer.codes) == {"OK"}:
                    self._hot.adopt(row.epoch, row.owner)
                    return
                reason: errors.StateCacheError = self._recover_or_wait(row, answer)
            except errors.RecoveringError as error:  # another recoverer was faster
                reason = error
            except errors.UnavailableError as error:
                reason = error
                self._revive()
            left = deadline - time.monotonic()
            if left <= 0:
                raise reason
            time.sleep(min(left, 0.25, 0.002 * 2**attempt * random.uniform(0.5, 1.0)))
            attempt = min(attempt + 1, 10)

    def _answer(self, row: StoreRow, deadline: float) -> answers.Admission:
        """What the partitions say to SQL's epoch and owner; the scripts are loaded if all say ``OK``."""
        answer = self._hot.admit(scripts.Stamp(row.epoch, row.owner), load=row.epoch > 0, deadline=deadline)
        check_belongs(row, answer, self._hot.keyspace.namespace)
        return answer

    def _recover_or_wait(self, row: StoreRow, answer: answers.Admission) -> errors.StateCacheError:
        """Run a recovery, or find a reason to wait; returns what to tell the caller if time runs out."""
        recovery = recoveries.recovery(self._durable, row.epoch, row.owner) if row.epoch else None
        if recovery is not None and recovery.heartbeat_ms != recoveries.ABANDONED:
            # Between its report and its last "ready" a recovery is finished in SQL, and Redis still says recovering.
            under_way = recovery.finished_ms is None or "RECOVERING" in answer.codes
            sign_ms = max(recovery.heartbeat_ms, recovery.finished_ms or 0)
            # A process that is known to be gone is not waited for. Superseding is safe whatever we think of it: it is fenced.
            sign = (row.epoch, row.owner, sign_ms)
            if under_way and not processes.is_gone(recovery.process) and self._shows_life(sign):
                return errors.RecoveringError(
                    f"a recovery is under way (epoch {row.epoch}); try again when it has ended"
                )
        if not self._auto_recover and row.epoch:
            return errors.RecoveringError(
                "Redis is not what SQL knows: it restarted, failed over or lost data, or redis_url leads to another one. It "
                "is not recovered here (auto_recover is off, or this only looks): if it is the right one, run "
                "'statecache recover', which tells with --dry-run what it would find"
            )
        reason = self._elsewhere.reason_to_wait(row, answer)
        if reason is not None:
            return reason
        level = logging.WARNING if row.epoch else logging.INFO  # a store that was just made has nothing to lose
        if self._recovered == (row.epoch, row.owner):
            level = logging.DEBUG  # again: no epoch could be taken, because the server takes no writes
        self._recovered = row.epoch, row.owner
        _log.log(level, "Redis is not what SQL knows: recovering", extra={"epoch": row.epoch})
        self._recover()
        return errors.RecoveringError("Redis has just been recovered; try again")

    def _shows_life(self, sign: tuple[int, str, int]) -> bool:
        """Whether a recovery's last sign of life is fresh: by our clock, or because it came while we looked.

        It was written by another host's clock: one that is wrong by more than the limit, either way, makes every sign look old,
        and two hosts would supersede each other without end.
        """
        now = time.monotonic()
        if sign != self._sign:
            self._sign, self._sign_since = sign, now
        is_recent = abs(time.time() * 1000 - sign[2]) < HEARTBEAT_STALE_MS  # one from a clock ahead is no sign of life
        return is_recent or (now - self._sign_since) * 1000 < HEARTBEAT_STALE_MS * _WATCHED


def check_belongs(row: StoreRow, answer: answers.Admission, namespace: str) -> None:
    """Raise ``ConfigurationError`` for a Redis and a database that do not belong together."""
    for what, ours, theirs in (
        ("deployment", row.deployment, answer.deployment),
        ("protocol version", str(row.protocol), answer.protocol),
        ("partition count", str(row.partition_count), answer.partitions),
    ):
        if theirs not in ("-", ours):
            raise errors.ConfigurationError(
                f"the Redis namespace {namespace!r} has the {what} {theirs}, the database has {ours}: they do not belong "
                "together; check redis_url, database_url and namespace"
            )
