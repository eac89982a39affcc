"""Exit codes, and which error ends with which.

====  =========================================================================================================
0     done
1     found something: findings, refused rows, no such instance, a transition that is not allowed, a lost version
2     bad usage or configuration: options, settings, machines, data; nothing was done
3     unavailable: a server, a recovery under way, a full backlog, a durability not confirmed in time, a port that is
      taken, a full disk
70    a bug in statecache
130   interrupted (Ctrl-C)
141   whoever read the output has gone (a closed pipe)
====  =========================================================================================================
"""

from __future__ import annotations

import errno

from statecache.core import errors

DONE, FOUND, USAGE, UNAVAILABLE, BUG, INTERRUPTED, PIPE_CLOSED = 0, 1, 2, 3, 70, 130, 141
_PASSING = frozenset({errno.EADDRINUSE, errno.ENOSPC, errno.EDQUOT})

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
    if _may_pass(error) or _may_pass(error.__cause__):
        return UNAVAILABLE
    if isinstance(error, errors.StateCacheError):
        return next((code for kind, code in _CODES if isinstance(error, kind)), FOUND)
    return USAGE if isinstance(error, OSError) else BUG


def _may_pass(error: BaseException | None) -> bool:
    """Whether it is the machine's trouble of a moment: systemd gives up at what is refused."""
    return isinstance(error, OSError) and error.errno in _PASSING
