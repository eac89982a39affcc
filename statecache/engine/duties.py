"""What is done every now and then by whoever runs a flusher: a thread of a ``StateCache`` or a flusher process.

One thread, one duty after the other, so that duties never compete with each other for the servers. A duty does a bounded
piece of work and returns; what is left waits for its next turn, which comes one interval after the end of this one (a slow
duty delays the others, it does not pile up). One that fails is logged, with its name, and has its next turn as if nothing
had happened: servers go away and come back.

Every process that flushes has these duties, and several may do the same one at the same time: a duty is safe to repeat and to
run twice, and its first turn comes after a random part of its interval, so that processes started together spread out.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from statecache.core import errors
from statecache.engine import eviction, threads

if TYPE_CHECKING:
    from statecache.engine.cache import StateCache

_log = logging.getLogger(__name__)
CLOSE_SECONDS = 10.0


@dataclass(frozen=True)
class Duty:
    """Some periodic work. ``run`` may raise anything; it should look at the ``stopping`` of its ``Duties`` if it takes long."""

    name: str
    interval_seconds: float
    run: Callable[[], object]


class Duties:
    """Runs duties from ``start`` until ``close``, in a thread of its own (in none if there are no duties)."""

    def __init__(self, duties: Sequence[Duty], stopping: threading.Event | None = None) -> None:
        self.duties = tuple(duties)
        self.stopping = stopping or threads.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin. Does nothing if it has begun or was closed."""
        if self._thread is None and self.duties and not self.stopping.is_set():
            self._thread = threading.Thread(target=self._run, name="statecache-duties", daemon=True)
            self._thread.start()

    def close(self, timeout_seconds: float = CLOSE_SECONDS) -> None:
        """Stop after the duty under way; waits for it up to ``timeout_seconds``. Safe to call twice."""
        self.stopping.set()
        thread, self._thread = self._thread, None
        if thread is None or thread is threading.current_thread():
            return
        threads.join(thread, timeout_seconds)
        if thread.is_alive() and timeout_seconds:
            _log.warning("a duty is still at work after %.0f s: not waited for", timeout_seconds)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Whoever leaves by an error (the second signal) wants to be gone now.
        self.close(0.0 if kind else CLOSE_SECONDS)

    def _run(self) -> None:
        now = time.monotonic()
        due = [now + duty.interval_seconds * random.random() for duty in self.duties]
        while True:
            place = min(range(len(due)), key=due.__getitem__)
            if self.stopping.wait(max(0.0, due[place] - time.monotonic())):
                return
            self._run_one(self.duties[place])
            due[place] = time.monotonic() + self.duties[place].interval_seconds

    def _run_one(self, duty: Duty) -> None:
        try:
            duty.run()
        except errors.StateCacheError as error:
            if not self.stopping.is_set():
                _log.warning("duty %s failed, next turn in %g s: %s", duty.name, duty.interval_seconds, error,
                             extra={"duty": duty.name})  # fmt: skip
        except Exception:
            _log.exception(
                "duty %s failed, next turn in %g s", duty.name, duty.interval_seconds, extra={"duty": duty.name}
            )


def of(cache: StateCache) -> Duties:
    """The duties of a store, by its settings: one line for each kind."""
    stopping = threads.Event()
    evictor = eviction.Evictor(cache)
    duties = [
        Duty("eviction", cache.settings.eviction_interval_seconds, lambda: evictor.turn(stopping.is_set)),
        Duty("timeouts", cache.settings.timeout_interval_seconds, lambda: cache.timeouts.run(stopping)),
    ]
    return Duties(duties, stopping)
