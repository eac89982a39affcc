"""Is this deployment set up so that the promises hold? Each check says what it found, and what to do.

``fail``: a promise is broken or a server refuses to be judged in what it must show. ``warn``: it works, but loses more, or
costs more, than it need. Nothing is changed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import msgspec

from statecache.core import errors
from statecache.durable import grants, recoveries
from statecache.engine import servers

if TYPE_CHECKING:
    from statecache.engine.cache import StateCache

OK, WARN, FAIL = "ok", "warn", "fail"
_LISTPACK_VALUE_WANTED = 128
_CLOCK_SKEW_SECONDS_MAX = 2.0


class Check(msgspec.Struct, frozen=True):
    """One thing looked at. ``verdict`` is ``ok``, ``warn`` or ``fail``; ``advice`` is empty for ``ok``."""

    name: str
    verdict: str
    found: str
    advice: str = ""


def examine(cache: StateCache) -> list[Check]:
    """Look at the servers, the database and what stands open. Raises ``UnavailableError``."""
    facts = cache.hot.server_facts()
    settings = cache.hot.configuration(
        "maxmemory-policy", "appendonly", "appendfsync", "no-appendfsync-on-rewrite", "hash-max-listpack-value",
        "io-threads", "protected-mode", "bind",
    )  # fmt: skip
    return [
        *_server(facts),
        *_memory(facts, settings or {}),
        *_persistence(facts, settings),
        *_clock(cache),
        *_database(cache),
        *_rights(cache),
        *_open_ends(cache),
    ]


def _server(facts: Mapping[str, str]) -> Iterator[Check]:
    name, version = servers.name_and_version(facts)
    try:
        servers.check(facts, warn=False)
    except errors.ConfigurationError as error:
        yield Check("server version", FAIL, f"{name} {version}", str(error))
    else:
        yield Check("server version", OK, f"{name} {version}")


def _memory(facts: Mapping[str, str], settings: Mapping[str, str]) -> Iterator[Check]:
    policy = facts.get("maxmemory_policy", "noeviction")
    if not servers.evicts(facts):
        yield Check("maxmemory-policy", OK, policy)
    else:
        advice = (
            "set maxmemory-policy noeviction: under this one the server deletes instances and logs when memory is short"
        )
        yield Check("maxmemory-policy", FAIL, policy, advice)
    if facts.get("maxmemory", "0") == "0":
        advice = (
            "set maxmemory below what the machine has: a full server answers with an error, a killed one with nothing"
        )
        yield Check("maxmemory", WARN, "no limit", advice)
    else:
        yield Check(
            "maxmemory", OK, f"{facts.get('used_memory_human', '?')} of {facts.get('maxmemory_human', '?')} used"
        )
    value = settings.get("hash-max-listpack-value")
    if value is not None and int(value) < _LISTPACK_VALUE_WANTED:
        advice = (
            "set hash-max-listpack-value 256: one longer value turns an instance's hash into a table of thrice the size"
        )
        yield Check("hash-max-listpack-value", WARN, value, advice)
    elif value is not None:
        yield Check("hash-max-listpack-value", OK, value)


def _persistence(facts: Mapping[str, str], settings: Mapping[str, str] | None) -> Iterator[Check]:
    if facts.get("aof_enabled") != "1":
        advice = "set appendonly yes: without it every restart is a loss of all that was not flushed"
        yield Check("append-only file", WARN, "off", advice)
    else:
        yield Check("append-only file", OK, "on")
    if facts.get("aof_last_write_status", "ok") != "ok" or facts.get("aof_last_bgrewrite_status", "ok") != "ok":
        yield Check("append-only file writes", FAIL, "the last one failed", "look at the disk and the server's log")
    if settings is None:
        advice = "allow config|get to this user, or see yourself that no-appendfsync-on-rewrite is no"
        yield Check("server configuration", WARN, "may not be read", advice)
    elif settings.get("no-appendfsync-on-rewrite") == "yes":
        advice = (
            "set no-appendfsync-on-rewrite no: during a rewrite nothing is forced to disk, whatever appendfsync says"
        )
        yield Check("no-appendfsync-on-rewrite", WARN, "yes", advice)
    elif "appendfsync" in settings:
        yield Check("appendfsync", OK, settings["appendfsync"])


def _clock(cache: StateCache) -> Iterator[Check]:
    skew = cache.hot.time_ms() / 1000 - time.time()
    found = f"{skew:+.1f} s between this machine and Redis"
    if abs(skew) > _CLOCK_SKEW_SECONDS_MAX:
        yield Check("clocks", WARN, found, "run NTP on both: ages and find(older_than=...) are off by this much")
    else:
        yield Check("clocks", OK, found)


def _database(cache: StateCache) -> Iterator[Check]:
    found = cache.durable.durability_settings()
    unsafe = [
        f"{name}={found[name]}"
        for name, bad in (
            ("fsync", "off"),
            ("synchronous_commit", "off"),
            ("full_page_writes", "off"),
            ("synchronous", "1"),
        )
        if found.get(name) == bad
    ]
    shown = ", ".join(f"{name}={value}" for name, value in sorted(found.items())) or "not known for this database"
    if unsafe:
        advice = f"{', '.join(unsafe)}: a commit may be lost with the power, and with it what was called durable"
        yield Check("database durability", FAIL, shown, advice)
    else:
        yield Check("database durability", OK, shown)


def _rights(cache: StateCache) -> Iterator[Check]:
    found = grants.of_role(cache.durable.database)
    if found is None:
        return
    if found.missing:
        yield Check("database rights", WARN if found.may_read else FAIL, found.lacks, found.advice)
    else:
        yield Check("database rights", OK, f"the role {found.role} may do all that is needed")


def _open_ends(cache: StateCache) -> Iterator[Check]:
    parked = cache.durable.parked_instances(101)
    if parked:
        shown = f"{len(parked) if len(parked) <= 100 else 'more than 100'} instances"
        yield Check("dead letters", WARN, shown, "see 'statecache dead-letters list'")
    else:
        yield Check("dead letters", OK, "none")
    row = cache.durable.identity()
    last = recoveries.recovery(cache.durable, row.epoch, row.owner)
    if last is not None and last.finished_ms is None:
        yield Check("recovery", FAIL, f"that of epoch {row.epoch} has not ended", "wait, or run 'statecache recover'")
    elif problem := _not_admitted(cache):
        yield Check("recovery", FAIL, f"Redis is not ready, SQL is at epoch {row.epoch}", problem)
    else:
        yield Check("recovery", OK, f"epoch {row.epoch}, {last.classes if last else 'never recovered'}")


def _not_admitted(cache: StateCache) -> str:
    """Why Redis is not the one that SQL knows; empty if it is."""
    try:
        cache.admission.ensure("EPOCH", time.monotonic())
    except errors.RecoveringError as error:
        return str(error)
    return ""
