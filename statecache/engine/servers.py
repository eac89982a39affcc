"""Is this server one that the protocol can stand on?"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from statecache.core import errors

_log = logging.getLogger(__name__)
REDIS_OLDEST = (7, 0)
VALKEY_OLDEST = (7, 2)


def check(facts: Mapping[str, str], *, warn: bool = True) -> None:
    """Refuse a server that is too old (``ConfigurationError``); warn about one that may lose what it was given.

    ``facts`` are those of ``HotStore.server_facts``; none (an emulated server) are not judged.
    """
    if not facts:
        return
    name, text = name_and_version(facts)
    oldest = VALKEY_OLDEST if name == "Valkey" else REDIS_OLDEST
    if _numbers(text) < oldest:
        raise errors.ConfigurationError(
            f"this server is {name} {text}: {name} {oldest[0]}.{oldest[1]} or newer is needed (Redis 7.0, Valkey 7.2)"
        )
    policy = facts.get("maxmemory_policy", "noeviction")
    if warn and policy != "noeviction":
        _log.warning(
            "the server's maxmemory-policy is %s: it may delete instances and logs when memory is short; "
            "set it to noeviction (see 'statecache doctor')",
            policy,
        )


def name_and_version(facts: Mapping[str, str]) -> tuple[str, str]:
    """``Valkey`` or ``Redis``, and its version: Valkey also gives the version of Redis that it is compatible with."""
    if facts.get("server_name") == "valkey" or "valkey_version" in facts:
        return "Valkey", facts.get("valkey_version", "0")
    return "Redis", facts.get("redis_version", "0")


def _numbers(text: str) -> tuple[int, int]:
    parts = [int(part) if part.isdigit() else 0 for part in [*text.split("."), "0", "0"][:2]]
    return parts[0], parts[1]
