"""Every error that statecache raises, named by who must act.

All are picklable: attributes travel in ``args`` so that an error may cross a process boundary (RQ, multiprocessing).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from statecache.core.model import Receipt


class StateCacheError(Exception):
    """The root of all errors of this package."""


class ConfigurationError(StateCacheError):
    """The deployment is set up wrongly: the operator must act (settings, versions, servers that do not belong together)."""


class DefinitionError(StateCacheError):
    """A machine is declared wrongly, or two declarations of it disagree: its author must act."""


class InvalidDataError(StateCacheError):
    """An argument breaks a rule; nothing was written. Its message names the field, the value and the rule."""


class NotFoundError(StateCacheError):
    """There is no such instance, neither in Redis nor in SQL."""


class AlreadyExistsError(StateCacheError):
    """A start found the instance already there, started by another call."""


class InvalidTransitionError(StateCacheError):
    """The machine declares no such move from the instance's current state, or a guard refused it."""

    def __init__(self, message: str, state: str = "", event: str = "", allowed: Sequence[str] = ()) -> None:
        super().__init__(message, state, event, tuple(allowed))
        self.state = state
        self.event = event
        self.allowed = tuple(allowed)

    def __str__(self) -> str:
        return str(self.args[0])


class StaleVersionError(StateCacheError):
    """``expect_version`` was not the instance's version: somebody else moved it. Read it again and decide."""

    def __init__(self, message: str, expected: int = 0, actual: int = 0) -> None:
        super().__init__(message, expected, actual)
        self.expected = expected
        self.actual = actual

    def __str__(self) -> str:
        return str(self.args[0])


class FencedError(StateCacheError):
    """Another worker holds the instance, or the claim of the call is no longer in force; nothing was written.

    ``worker`` is who holds it (empty when nobody does), ``expires_ms`` until when, by the clock of Redis. Who lost a claim
    must not go on with what it does for the instance: another worker may have begun it anew.
    """

    def __init__(self, message: str, worker: str = "", expires_ms: int = 0) -> None:
        super().__init__(message, worker, expires_ms)
        self.worker = worker
        self.expires_ms = expires_ms

    def __str__(self) -> str:
        return str(self.args[0])


class ParkedError(StateCacheError):
    """The instance waits behind a dead letter: an operator must retry or discard it (``statecache dead-letters``).

    Without ``receipt`` nothing was written. With it (from a wait for SQL) the transition stands in Redis, and is a dead letter
    itself: retried, it will be in history; discarded, it never was. Do not repeat it under another id.
    """

    def __init__(self, message: str, receipt: Receipt | None = None) -> None:
        super().__init__(message, receipt)
        self.receipt = receipt

    def __str__(self) -> str:
        return str(self.args[0])


class BackpressureError(StateCacheError):
    """Writers have outrun SQL and the call's deadline passed while waiting: slow down, or look at the flusher."""


class RecoveringError(StateCacheError):
    """Redis is being reconciled with SQL (or waits for ``statecache recover``) and the call's deadline passed."""


class UnavailableError(StateCacheError):
    """A server could not be reached in time. ``__cause__`` is the driver's error. Whether a write took effect is unknown:
    repeat it with the same ``transition_id``."""


class DurabilityTimeout(StateCacheError):  # noqa: N818 - the public name, fixed by the design
    """The transition stands, but the wanted durability was not confirmed in time. ``receipt`` can be waited on again."""

    def __init__(self, message: str, receipt: Receipt | None = None) -> None:
        super().__init__(message, receipt)
        self.receipt = receipt

    def __str__(self) -> str:
        return str(self.args[0])


class IntegrityError(StateCacheError):
    """The two copies disagree in a way that must not be papered over (a hole, a fork, a lost transition)."""
