"""The flusher as a process: the loop of ``engine/flusher.py``, what it says of its progress, and how it is stopped.

SIGTERM or SIGINT: finish the batch under way. Where other flushers are alive, give them the partitions at once and stop; the
last one goes on until everything that was acknowledged is in SQL, or ``drain_timeout_seconds`` are over. A second signal: stop
now; the transaction under way is rolled back, and whoever flushes next begins where SQL stands (P5). A SIGKILL at any moment
does no harm either.

Any number may run at once: they share the partitions by leases (``engine/leases.py``).
"""

from __future__ import annotations

import gc
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from statecache.core import errors
from statecache.engine.cache import StateCache
from statecache.engine.flusher import Step
from statecache.engine.leases import leave_quietly
from workers.notify import Notifier

_log = logging.getLogger(__name__)
_TELL_SECONDS = 5.0
_ONCE_SECONDS = 5.0
_AGAIN_SECONDS = 0.2
_HOLE_SECONDS = 60.0
"""How often a hole that stays is told of again."""

Told = Callable[[int, float, int], None]
"""Receives how many entries were flushed in how many seconds, and how many since the start."""


class StopNow(KeyboardInterrupt):
    """The second signal. ``number`` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def stopping(
    wake: Callable[[], None] = lambda: None, *, doing: str = "stopping when the batch under way is done"
) -> Iterator[threading.Event]:
    """Turn the first SIGTERM or SIGINT into an event, and the second into ``StopNow`` in the main thread.

    ``doing`` is what the log says then; ``wake`` is called when the event is set. A handler runs between any two instructions
    of the main thread, which may hold the very lock that an event or the log needs: so all it does is start a thread.
    """
    stop = threading.Event()
    received: list[int] = []

    def begin() -> None:
        stop.set()
        wake()
        _log.info("%s; signal again to stop now", doing)

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            raise StopNow(number)
        threading.Thread(target=begin, name="statecache-stopping", daemon=True).start()

    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, handle) for number in numbers]
    try:
        yield stop
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@contextmanager
def rare_collections() -> Iterator[None]:
    """Let the cyclic garbage collector look less often.

    A flush makes and drops objects by the ten thousand, none in cycles, and each full pass looks at all folded checkpoints
    again: with the defaults that takes a quarter of the flusher's time.
    """
    before = gc.get_threshold()
    gc.set_threshold(50_000, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)


class Progress:
    """Adds up steps, and tells of them every few seconds while there is something to tell; of a hole when it is found, and
    every minute while it stays."""

    def __init__(self, tell: Told) -> None:
        self._tell = tell
        self._entries = 0
        self._since = time.monotonic()
        self._holes: dict[int, tuple[str, float]] = {}
        self.total = 0

    def step(self, step: Step) -> None:
        """Count a step of the flusher."""
        self._entries += step.entries
        self.total += step.entries
        for partition, hole in step.stopped.items():
            self._tell_hole(partition, hole)
        if time.monotonic() - self._since >= _TELL_SECONDS:
            self.tell()

    def _tell_hole(self, partition: int, hole: str) -> None:
        now = time.monotonic()
        told, at = self._holes.get(partition, ("", -math.inf))
        if now - at >= (
            _HOLE_SECONDS if hole == told else _TELL_SECONDS
        ):  # its text may change with each entry written
            self._holes[partition] = hole, now
            _log.error("%s; its partition waits for 'statecache recover'", hole, extra={"partition": partition})

    def tell(self) -> None:
        now = time.monotonic()
        if self._entries:
            self._tell(self._entries, now - self._since, self.total)
        self._entries, self._since = 0, now


def log_progress(entries: int, seconds: float, total: int) -> None:
    _log.info("flushed %d transitions in %.1f s, %d since the start", entries, seconds, total)


def run(cache: StateCache, tell: Told = log_progress, notifier: Notifier | None = None) -> int:
    """Flush until a signal, and do the duties beside; returns how many entries were flushed.

    Raises ``StopNow`` at the second signal.
    """
    progress = Progress(tell)
    notifier = notifier or Notifier(None)
    leases, loop = cache.leases, threading.current_thread()

    def turn() -> None:
        notifier.turn(
            f"{len(leases.held)} of {cache.settings.partition_count} partitions, {max(1, leases.living)} flushers; "
            f"{progress.total} transitions flushed"
        )

    def turn_recovering() -> None:
        if threading.current_thread() is loop:  # a duty that recovers says nothing about the loop
            turn()

    cache.on_recovering = turn_recovering
    with stopping(cache.flusher.wake.set) as stop, rare_collections():
        _log.info("flushing as %s", leases.name)
        try:
            with cache.duties:
                cache.flusher.run(stop, progress.step, leases, turn)
            notifier.stopping("stopping")
            _hand_over(cache)
        finally:
            progress.tell()
    _log.info("stopped")
    return progress.total


def _hand_over(cache: StateCache) -> None:
    """Leave the partitions to others, or, as the last one, with nothing left to do in them.

    First leave, then look: of several that are stopped together each would else take the others for those who go on.
    """
    leave_quietly(cache.leases)
    try:
        others = cache.leases.others()
    except errors.StateCacheError:
        others = 0
    if others:
        _log.info("handed over, flushers that go on: %d", others)
    else:
        _drain(cache, cache.settings.drain_timeout_seconds)


def _drain(cache: StateCache, timeout_seconds: float) -> None:
    """Flush what was acknowledged. Servers that are away are waited for."""
    deadline = time.monotonic() + timeout_seconds
    reason: errors.StateCacheError | None = None
    while (left := deadline - time.monotonic()) > 0:
        try:
            cache.flush_alone(left)
            return
        except errors.UnavailableError as error:
            reason = error
            time.sleep(min(_AGAIN_SECONDS, max(0.0, deadline - time.monotonic())))
        except errors.StateCacheError as error:
            reason = error
            break
    _log.warning("stopped before everything was flushed; the log keeps the rest: %s", reason or "no time was given")


def once(cache: StateCache) -> int:
    """Flush what is there now; returns how many entries were flushed here: where another flusher lives it does the work.

    Raises ``IntegrityError`` for a hole, ``UnavailableError`` when a server is away.
    """
    flushed = cache.metrics.cell("statecache_flushed_transitions_total")
    before = flushed[0]
    with stopping() as stop:
        while not stop.is_set():
            try:
                cache.flush(timeout=_ONCE_SECONDS)
                break
            except errors.DurabilityTimeout as error:
                _log.info("still flushing: %s", error)
    return int(flushed[0] - before)
