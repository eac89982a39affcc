"""Exit codes, and which error ends with which.

====  =========================================================================================================
0     done
1     found something: findings, refused rows, no such instance, a transition that is not allowed, a lost version
2     bad usage or configuration: options, settings, machines, data; nothing was done
3     unavailable: a server, a recovery under way, a full backlog, a durability not confirmed in time
70    a bug in statecache
130   interrupted (Ctrl-C)
====  =========================================================================================================
"""

from __future__ import annotations

from statecache.core import errors

DONE, FOUND, USAGE, UNAVAILABLE, BUG, INTERRUPTED = 0, 1, 2, 3, 70, 130

_CODES: tuple[tuple[type[errors.StateCacheError], int], ...] = (
    (errors.ConfigurationError, USAGE),
    (errors.DefinitionError, USAGE),
    (errors.InvalidDataError, USAGE),
    (errors.UnavailableError, UNAVAILABLE),
    (errors.RecoveringError, UNAVAILABLE),
    (errors.BackpressureError, UNAVAILABLE),
    (errors.DurabilityTimeout, UNAVAILABLE),
)


def code_of(error: BaseException) -> int:
    """The exit code for an error that ends a command."""
    if isinstance(error, errors.StateCacheError):
        return next((code for kind, code in _CODES if isinstance(error, kind)), FOUND)
    return USAGE if isinstance(error, OSError) else BUG
