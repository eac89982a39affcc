"""One flusher's share of the partitions: taken, renewed and given back as others come and go.

Once a heartbeat the flusher's own loop - no thread of its own, so a loop that hangs stops beating - renews its row in SQL and
looks at the others'. Everybody computes the same shares from what all can see: partitions divided evenly, the odd ones to those
who hold most already, so that nothing moves without need. Who has too many gives some back, who has too few takes those that no
living flusher holds. No leader, and nothing to agree on: two that take at once are told apart by SQL, row by row.

- *Joins*: the others see it at their next heartbeat and give back; it looks four times as often while it has too few.
- *Leaves* (``leave``): its leases are free at once.
- *Dies*: its leases end ``lease_seconds`` after its last heartbeat; on the same machine as soon as its process id is gone.
- *Stopped, then goes on*: its own clock tells it that its leases have ended: it looks before it flushes. If it was stopped
  right before a commit, the compare-and-set refuses it (P5). A lease never decides what is written.
- *Alive but of no use* (it cannot reach Redis, or that is not recovered: every step fails): no heartbeat until a step succeeds
  again, so others take over; meanwhile it goes on trying with the partitions that it had. Recoveries rest on that
  (``elsewhere.py``).

Rejected: shares by hashing the flushers' names, without leases (two believe to hold a partition until both have looked, which
makes every batch of both fail); a leader who assigns (one more thing that dies); locks held in SQL sessions (they vanish
unnoticed with the connection, and poolers forbid them).
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import time
from collections.abc import Collection, Mapping, Sequence

from statecache.core import errors
from statecache.durable import leases
from statecache.durable.leases import FlusherRow
from statecache.durable.store import DurableStore
from statecache.engine import processes

HEARTBEATS_A_LEASE = 4
LOOKS_A_HEARTBEAT = 4
"""How often a flusher that has too few partitions looks for free ones."""


class Leases:
    """The leases of one flusher. Its loop calls ``turn``; ``holds`` may be asked by any thread."""

    def __init__(
        self, durable: DurableStore, partition_count: int, *, lease_seconds: float = 4.0, redis: str | None = None
    ) -> None:
        self.host = socket.gethostname()
        self.name = f"{self.host[:32]}-{os.getpid()}-{secrets.token_hex(4)}"
        self._durable = durable
        self._partition_count = partition_count
        self._lease_seconds = lease_seconds
        self._redis = redis
        self._due = 0.0
        self._ends = 0.0
        self.held: tuple[int, ...] = ()
        """The partitions that were held when it last looked."""
        self.living = 0
        """How many flushers were alive then, this one counted."""

    def turn(self, *, well: bool = True) -> tuple[int, ...]:
        """The partitions to flush now; renews, takes and gives back when that is due.

        ``well``: whether the last step succeeded. If not there is no heartbeat. Raises ``UnavailableError`` when SQL is away.
        """
        now = time.monotonic()
        if now >= self._due and (well or not self._ends):
            self._renew(now)
        return self.held

    def holds(self, partition: int) -> bool:
        """Whether this flusher holds a partition, for work that one of all should do (that of the whole store: who holds 0).

        Of two flushers only one says yes, but a process may be stopped right behind the question, and SQL be restored: what is
        done then must be safe all the same."""
        return partition in self.held and time.monotonic() < self._ends

    def leave(self) -> None:
        """Give everything back; the next ``turn`` would join again."""
        self.held, self._due, self._ends = (), 0.0, 0.0
        leases.leave(self._durable, self.name)

    def others(self) -> int:
        """How many other flushers are alive at this moment."""
        return len(self._living(leases.look(self._durable)) - {self.name})

    def _renew(self, now: float) -> None:
        if not leases.beat(self._durable, self.name):
            leases.join(
                self._durable,
                self.name,
                self.host,
                os.getpid(),
                processes.place(),
                max(1, int(self._lease_seconds * 1000)),
                self._redis,
            )
        rows = leases.look(self._durable)
        living = self._living(rows)
        held = {row.name: set(row.partitions) for row in rows if row.name in living}
        mine = held.setdefault(self.name, set())
        share = shares({name: len(some) for name, some in held.items()}, self._partition_count)[self.name]
        if self._settle(mine, share, held, [row.name for row in rows if row.name not in living]):
            mine = {one for row in leases.look(self._durable) if row.name == self.name for one in row.partitions}
        heartbeat = self._lease_seconds / HEARTBEATS_A_LEASE
        self._due = now + (heartbeat if len(mine) >= share else heartbeat / LOOKS_A_HEARTBEAT)
        self._ends = now + self._lease_seconds
        self.held, self.living = tuple(sorted(mine)), len(held)

    def _settle(self, mine: set[int], share: int, held: Mapping[str, set[int]], dead: Sequence[str]) -> bool:
        """Give back or take what is too much or too little; True if anything was tried."""
        if len(mine) > share:
            leases.give_back(self._durable, self.name, sorted(mine)[share:])
            return True
        free = sorted(set(range(self._partition_count)).difference(*held.values()))
        if len(mine) == share or not free:
            return False
        # Those who take at the same time begin at different places.
        first = sorted(held).index(self.name) * share % len(free)
        wanted = (free[first:] + free[:first])[: share - len(mine)]
        leases.take(self._durable, self.name, wanted, dead)
        return True

    def _living(self, rows: Collection[FlusherRow]) -> set[str]:
        return {row.name for row in rows if row.alive and (row.name == self.name or not has_ended(row))}


def shares(held: Mapping[str, int], partition_count: int) -> dict[str, int]:
    """How many partitions each flusher should have, from how many each has."""
    each, odd = divmod(partition_count, len(held))
    by_wealth = sorted(held, key=lambda name: (-held[name], name))
    return {name: each + (place < odd) for place, name in enumerate(by_wealth)}


def someone_flushes(durable: DurableStore) -> bool:
    """Whether any flusher is alive, of whatever process. One statement."""
    return any(row.alive and row.partitions and not has_ended(row) for row in leases.look(durable))


def has_ended(row: FlusherRow) -> bool:
    """Whether a flusher's process is known to be gone."""
    return processes.has_ended(row.pid, row.place)


def leave_quietly(mine: Leases) -> None:
    """``leave``, where SQL may be away: then the leases end by themselves."""
    with contextlib.suppress(errors.StateCacheError):
        mine.leave()
