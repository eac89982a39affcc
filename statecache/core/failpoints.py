"""Named places at which a test makes the process die, hang or fail: between the I/O steps where a crash would hurt most.

Unarmed, a place costs one look at a module variable. Armed by the variable ``STATECACHE_FAILPOINT`` of a child process
(``name=action`` or ``name=action@count``, several joined by commas), it acts at its count-th visit:

- ``die``: the process ends at once, as by SIGKILL: no clean-up, no flush of buffers;
- ``hang``: the thread stops there for good;
- ``error``: ``UnavailableError`` is raised there.

The tests in ``tests/crash`` and, for ``jobs.`` and ``retention.``, ``test_rq_jobs``, ``test_rq_warming`` and
``test_retention`` walk ``NAMES``: a place that is not in it cannot be armed.
"""

from __future__ import annotations

import os
import signal

from statecache.core import errors

NAMES = (
    "admission.compared",
    "admission.loaded",
    "flusher.read",
    "flusher.advanced",
    "flusher.written",
    "flusher.committed",
    "flusher.told",
    "jobs.begun",
    "jobs.noted",
    "jobs.ended",
    "jobs.enqueued",
    "jobs.looked",
    "jobs.wanted",
    "hydrate.looked_up",
    "hydrate.done",
    "letters.moved",
    "recovery.taken",
    "recovery.fenced",
    "recovery.dropped",
    "recovery.reconciled",
    "recovery.mended",
    "recovery.reported",
    "recovery.ready",
    "retention.written",
    "retention.renamed",
    "retention.deleting",
    "retention.deleted",
    "timeouts.read",
    "timeouts.fired",
)
ACTIONS = ("die", "hang", "error")

_armed: dict[str, tuple[str, int]] | None = None


def arm(text: str | None) -> None:
    """Arm what the variable says; nothing for None. Raises ``ConfigurationError`` for a name or action that is none."""
    global _armed
    _armed = None
    for part in (text or "").split(","):
        if not part:
            continue
        name, _, rest = part.partition("=")
        action, _, count = rest.partition("@")
        if name not in NAMES or action not in ACTIONS or not (count or "1").isdigit():
            raise errors.ConfigurationError(
                f"STATECACHE_FAILPOINT {part!r} is refused: it is name=action[@count] with a name of {', '.join(NAMES)} and an "
                f"action of {', '.join(ACTIONS)}"
            )
        _armed = {**(_armed or {}), name: (action, int(count or "1"))}


def hit(name: str) -> None:
    """Visit a place."""
    if _armed is not None and name in _armed:
        _visit(name)


def _visit(name: str) -> None:
    assert _armed is not None
    action, left = _armed[name]
    _armed[name] = (action, left - 1)
    if left != 1:
        return
    if action == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "hang":
        while True:
            signal.pause()
    raise errors.UnavailableError(f"failpoint {name}")
