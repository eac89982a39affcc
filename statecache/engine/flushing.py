"""Waiting until what was acknowledged is in SQL, and doing the work where nobody else does."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from statecache.core import entry, errors
from statecache.durable.rows import PartitionRow
from statecache.engine import commits
from statecache.engine.leases import someone_flushes
from statecache.hot import scripts

if TYPE_CHECKING:
    from statecache.engine.cache import StateCache

_LOOK_SECONDS = 0.5
"""For so long it is believed that a flusher is alive, or that none is."""


class Flushing:
    """What ``StateCache.flush``, durable calls and ``close`` share. For any thread; a forked child makes its own.

    ``here`` tells whether a thread of this process flushes, ``revive`` starts the embedded server again if it died.
    """

    def __init__(self, cache: StateCache, *, here: Callable[[], bool], revive: Callable[[], None]) -> None:
        self._cache = cache
        self._here = here
        self._revive = revive
        self._someone: tuple[float, bool] = 0.0, False

    def wait(self, deadline: float, patience_seconds: float, asked_until: float | None = None) -> None:
        """Return when all that the logs hold now is in SQL; errors as of ``StateCache.flush``.

        ``patience_seconds``: how long to look on while others flush and none of the watermarks waited for moves.
        ``asked_until``: until when servers that cannot be reached are asked again, if not to the deadline.
        """
        cache = self._cache
        until = deadline if asked_until is None else asked_until
        trouble: errors.UnavailableError | None = None
        owner, tails = cache.driver.patiently(lambda: self._tails(deadline), until)
        before, help_at, pause = None, 0.0, commits.PAUSE_MIN_SECONDS
        while True:
            seen = cache.commits.signal.count
            rows = cache.driver.patiently(cache.durable.partitions, until)
            if any((row.epoch, row.owner) != (owner.epoch, owner.owner) for row in rows):
                cache.admission.ensure("EPOCH", deadline)  # else the next call would stand here again, if SQL went back
                raise errors.RecoveringError(
                    "Redis was recovered while this call waited: what was acknowledged before may be lost; "
                    "see 'statecache status'"
                )
            behind = {row.partition: row.watermark for row in rows if row.watermark < tails[row.partition]}
            behind = behind or self._ending_early(rows, owner, tails, deadline, until)
            if not behind:
                return
            now = time.monotonic()
            if now >= deadline:
                raise errors.DurabilityTimeout(
                    f"{len(behind)} partitions were not flushed in time: {trouble or 'is SQL slow or away?'}"
                ) from trouble
            if behind != before:
                before, help_at, pause = behind, now + patience_seconds, commits.PAUSE_MIN_SECONDS
            try:
                if now >= help_at and cache.commits.help(deadline, sorted(behind)):
                    patience_seconds, trouble = 0.0, None  # who did not move this will not move the rest
                    continue
            except errors.UnavailableError as error:
                self._revive()
                if time.monotonic() >= until:
                    raise
                trouble = error
            cache.flusher.wake.set()
            cache.commits.signal.wait(seen, max(0.0, min(pause, deadline - time.monotonic())))
            pause = min(pause * 1.5, commits.PAUSE_MAX_SECONDS)

    def _tails(self, deadline: float) -> tuple[scripts.Stamp, dict[int, entry.EntryId]]:
        """The last entry of every log, from a checked read, and under which epoch."""
        hot, count = self._cache.hot, self._cache.settings.partition_count
        begins = [(partition, entry.ZERO) for partition in range(count)]
        while True:
            stamp = hot.stamp
            replies = hot.read(begins, entries=0, bytes_max=1, deadline=deadline)
            refused = next((reply.code for reply in replies if reply.code != "OK"), None)
            if refused is None:
                return stamp, {partition: reply.last for partition, reply in enumerate(replies)}
            self._cache.admission.ensure(refused, deadline)

    def _ending_early(
        self,
        rows: Sequence[PartitionRow],
        owner: scripts.Stamp,
        tails: Mapping[int, entry.EntryId],
        deadline: float,
        until: float,
    ) -> dict[int, entry.EntryId]:
        """The watermarks of partitions whose logs end below them, though nobody has recovered: a stranger deleted the log, and
        what is written into a new one has ids that SQL has had. The flusher finds that hole and asks for a recovery.

        A log that has gone on since its end was read, and was flushed, is behind what SQL has too: until it is read again.
        """
        ahead = {row.partition: row.watermark for row in rows if row.watermark > tails[row.partition]}
        if not ahead:
            return {}
        stamp, now = self._cache.driver.patiently(lambda: self._tails(deadline), until)
        if stamp != owner:
            return ahead  # recovered meanwhile: SQL says so at the next look
        return {partition: watermark for partition, watermark in ahead.items() if now[partition] < watermark}

    def push(self, deadline: float, partitions: Sequence[int] | None = None) -> bool:
        """Run a step of the flusher; raises ``IntegrityError`` if a hole stops it."""
        step = self._cache.flusher.step(deadline, partitions)
        if step.stopped and not step.entries:
            raise errors.IntegrityError(f"{next(iter(step.stopped.values()))}; run 'statecache recover'")
        return step.entries > 0

    def is_someone_at_it(self) -> bool:
        """Whether a flusher is alive anywhere, as of a moment ago."""
        if self._here():
            return True
        looked_at, someone = self._someone
        if time.monotonic() - looked_at > _LOOK_SECONDS or not looked_at:
            someone = someone_flushes(self._cache.durable)
            self._someone = time.monotonic(), someone
        return someone
