"""Is this server one that the protocol can stand on?"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from statecache.core import errors

_log = logging.getLogger(__name__)
REDIS_OLDEST = (7, 0)
VALKEY_OLDEST = (7, 2)


def check(facts: Mapping[str, str], *, warn: bool = True) -> None:
    """Refuse a server that is too old, or deletes keys when memory is short (``ConfigurationError``).

    The latter lose more than can be found: logs with what SQL has not yet, and hashes that are ahead of SQL, which then come
    back from SQL as they were. Without a limit of memory none is deleted, and a word of warning will do.

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
    if not warn or not evicts(facts):
        return
    told = (
        f"the server's maxmemory-policy is {facts['maxmemory_policy']}: it may delete instances and logs when memory is short; "
        "set it to noeviction (see 'statecache doctor')"
    )
    if facts.get("maxmemory", "0") != "0":
        raise errors.ConfigurationError(told)
    _log.warning("%s", told)


def evicts(facts: Mapping[str, str]) -> bool:
    """Whether the server's policy lets it delete keys of ours. ``volatile-*`` does not: none of them expires."""
    return facts.get("maxmemory_policy", "noeviction").startswith("allkeys-")


def has_evicted(facts: Mapping[str, str]) -> bool:
    """Whether keys of ours may be gone that nobody dropped. Under ``volatile-*`` what was evicted is taken for others'."""
    policy = facts.get("maxmemory_policy", "noeviction")
    return evicts(facts) or (policy == "noeviction" and facts.get("evicted_keys", "0") != "0")


def name_and_version(facts: Mapping[str, str]) -> tuple[str, str]:
    """``Valkey`` or ``Redis``, and its version: Valkey also gives the version of Redis that it is compatible with."""
    if facts.get("server_name") == "valkey" or "valkey_version" in facts:
        return "Valkey", facts.get("valkey_version", "0")
    return "Redis", facts.get("redis_version", "0")


def _numbers(text: str) -> tuple[int, int]:
    parts = [int(part) if part.isdigit() else 0 for part in [*text.split("."), "0", "0"][:2]]
    return parts[0], parts[1]
