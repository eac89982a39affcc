"""Does a flusher work at another Redis, while ours is empty?

A Redis that knows nothing of the store was wiped - or is another one, to which a mistaken ``redis_url`` leads. To recover
that one would split the store: either side would go on acknowledging, and SQL would take the transitions of one of them. So
whoever finds its Redis empty, of a store that has been in use, looks at the flushers' rows in SQL first.

- Nobody lives, or only flushers that noted the same endpoint: it was wiped. One statement, and the recovery begins at once.
- Some live that noted another endpoint, or none. If theirs is our Redis by another name, they fail like us, and so send no
  heartbeat: they fall silent within a lease, and the recovery begins. If it is another one, they go on. A flusher may send one
  more heartbeat for a step that it made before the wipe; two, and Redis asked behind them is still empty, prove that it works
  elsewhere. Then this is a mistake of the configuration, and nothing is written.
- Some live that hold no partition: they show nothing by their heartbeats, as they have nothing to do. Within a lease they take
  over from the dead, or there is nothing to take over.

An endpoint of the loopback interface, or a socket, is the same one only on the same machine.

Not seen: another Redis at which no flusher works at this moment; one that has the same name where it is used (a name that two
networks resolve differently).
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

from statecache.core import errors
from statecache.durable import leases as rows
from statecache.durable.leases import FlusherRow
from statecache.durable.rows import StoreRow
from statecache.durable.store import DurableStore
from statecache.engine import leases, processes
from statecache.hot import answers, endpoint, scripts
from statecache.hot.store import HotStore

_log = logging.getLogger(__name__)
PROVING_BEATS = 2
_POLL_SECONDS = 0.1
_GAP_SECONDS_MIN = 1.0


@dataclass(frozen=True)
class _Watched:
    """A flusher's last heartbeat, how many more came ``since`` it was first seen, and when it was last looked at."""

    beat_ms: int
    beats: int
    since: float
    looked: float


class Elsewhere:
    """Watches the flushers of other Redis servers, from one look to the next. One thread at a time."""

    def __init__(self, hot: HotStore, durable: DurableStore, own_flusher: str) -> None:
        self._hot = hot
        self._durable = durable
        self._own_flusher = own_flusher
        self._host = socket.gethostname()
        self._watched: dict[str, _Watched] = {}

    def reason_to_wait(self, row: StoreRow, answer: answers.Admission) -> errors.RecoveringError | None:
        """Why a recovery must not begin yet; None if it may. To be asked again and again, each time with a new ``answer``.

        Raises ``ConfigurationError`` when a flusher works at another Redis.
        """
        before, self._watched = self._watched, {}
        if not row.epoch or not answer.empty:
            return None
        reason = None
        for one in rows.look(self._durable):
            if not self._is_suspect(one):
                continue
            watched = self._seen(before.get(one.name), one)
            self._watched[one.name] = watched
            # A lease is up, and nothing was there for it to take over.
            if one.partitions or (watched.looked - watched.since) * 1000 <= one.lease_ms:
                reason = errors.RecoveringError(
                    f"{self._empty()}, and {_described(one)} was alive {one.silent_ms / 1000:.1f} s ago: it is watched "
                    "before Redis is recovered as wiped; see that redis_url is the right one, or try again"
                )
        return reason

    def wait(self, on_beat: Callable[[], None]) -> None:
        """Return when a recovery may begin: at most a lease later. ``on_beat`` is called at each look."""
        while (reason := self._asked()) is not None:
            _log.info("waiting before the recovery: %s", reason)
            on_beat()
            time.sleep(_POLL_SECONDS)

    def tell(self, progress: Callable[[str], None]) -> None:
        """For a dry run: say what a recovery would wait for."""
        reason = self._asked()
        if reason is not None:
            _log.warning("a recovery would wait, and be refused if that flusher goes on: %s", reason)
            progress(f"a recovery would wait, and be refused if that flusher goes on: {reason}")

    def _asked(self) -> errors.RecoveringError | None:
        row = self._durable.identity()
        return self.reason_to_wait(row, self._hot.admit(scripts.NEVER, load=False))

    def _seen(self, watched: _Watched | None, one: FlusherRow) -> _Watched:
        now = time.monotonic()
        gap = max(_GAP_SECONDS_MIN, one.lease_ms / 1000 / leases.HEARTBEATS_A_LEASE)
        if watched is None or now - watched.looked > gap:
            return _Watched(one.beat_ms, 0, now, now)
        if watched.beats >= PROVING_BEATS:
            raise errors.ConfigurationError(
                f"{self._empty()}, and {_described(one)} works at another one: nothing was changed. Check redis_url; if this "
                "Redis is to take over, stop that flusher first, and all that use the other Redis"
            )
        beats = watched.beats + (one.beat_ms != watched.beat_ms) if one.partitions else 0
        return _Watched(one.beat_ms, beats, watched.since, now)

    def _is_suspect(self, one: FlusherRow) -> bool:
        return one.alive and one.name != self._own_flusher and not self._is_here(one) and not leases.has_ended(one)

    def _is_here(self, one: FlusherRow) -> bool:
        if one.redis != self._hot.endpoint:
            return False
        return not one.redis or not endpoint.is_local(one.redis) or self._is_on_this_machine(one)

    def _is_on_this_machine(self, one: FlusherRow) -> bool:
        return one.host == self._host and processes.same_machine(one.place)

    def _empty(self) -> str:
        return f"the Redis at {self._hot.endpoint} has nothing of namespace {self._hot.keyspace.namespace!r}"


def _described(one: FlusherRow) -> str:
    where = one.redis or "an endpoint that it has not noted"
    return f"the flusher of process {one.pid} on host {one.host!r} (redis: {where})"
