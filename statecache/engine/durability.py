"""Durability above ``hot``: what a server can give, and when a transition is in SQL.

``fsync`` and ``replica`` are confirmed on the connection that wrote, right behind the script (``core.items.Confirm``). Which
servers can give them is judged once per epoch, when the level is first wanted: one that cannot is refused there, not at 3 a.m.
``WAITAOF`` answers before the fsync on Redis 7.4 and on every Valkey tried (redis#13793), so under ``appendfsync everysec``
only Redis 7.2 and from 8.2 on are believed; under ``always`` the reply itself comes after the fsync.

``durable`` waits for rows, never by comparing ids (protocol hole H11): ``outcome`` judges, ``commits.py`` waits. What looks
lost is looked at once more (``explained``): retention or a recovery may have left one row for many versions.
"""

from __future__ import annotations

from statecache.core import entry, errors, items, model
from statecache.durable.store import DurableStore
from statecache.hot.store import HotStore


def confirmation(
    hot: HotStore, level: model.Durability, replicas: int, timeout_seconds: float, deadline: float | None = None
) -> items.Confirm | None:
    """What to ask behind each script for a level; None where the reply itself is the confirmation.

    Raises ``ConfigurationError`` when this server cannot give the level.
    """
    timeout_ms = max(1, int(timeout_seconds * 1000))
    if level is model.Durability.REPLICA:
        have = int(hot.server_facts(deadline).get("connected_slaves", "0"))
        if have < replicas:
            raise errors.ConfigurationError(
                f"durability 'replica' wants {replicas} replicas, this server has {have}: attach one, or lower the level"
            )
        return items.Confirm(False, 0, replicas, timeout_ms)
    if level is not model.Durability.FSYNC:
        return None
    facts = hot.server_facts(deadline)
    wanted = hot.configuration("appendfsync", "no-appendfsync-on-rewrite", deadline=deadline)
    if wanted is None:
        raise errors.ConfigurationError(
            "durability 'fsync' cannot be judged: this user may not read the server's configuration (allow config|get)"
        )
    if facts.get("aof_enabled") != "1":
        raise errors.ConfigurationError("durability 'fsync' needs the append-only file: set appendonly yes")
    if wanted.get("no-appendfsync-on-rewrite") == "yes":
        raise errors.ConfigurationError(
            "durability 'fsync' is not kept while no-appendfsync-on-rewrite is yes: set it to no"
        )
    if wanted.get("appendfsync") == "always":
        return None
    version = tuple(int(part) for part in facts.get("redis_version", "0.0").split(".")[:2])
    if (
        "valkey_version" not in facts
        and wanted.get("appendfsync") == "everysec"
        and (version == (7, 2) or version >= (8, 2))
    ):
        return items.Confirm(True, 1, 0, timeout_ms)
    raise errors.ConfigurationError(
        "durability 'fsync' cannot be had from this server: set appendfsync always "
        "(under everysec its WAITAOF answers before the file is on disk)"
    )


Standing = tuple[entry.EntryId, str | None, str | None]
"""What SQL knows of a receipt, in one snapshot: its partition's watermark, and the transition ids of the row and of the letter
in its place."""


class LostError(errors.IntegrityError):
    """The watermark is above a receipt's entry, and no row or letter is in its place. For ``explained`` alone."""


def outcome(receipt: model.Receipt, standing: Standing) -> errors.StateCacheError | bool:
    """Tell whether a receipt is durable: True, False (not yet), or the error that it never will be."""
    watermark, transition_id, letter_id = standing
    if transition_id == receipt.transition_id:
        return True
    if letter_id == receipt.transition_id:
        return errors.ParkedError(
            f"{receipt.machine}:{receipt.id} version {receipt.version} stands in Redis and waits as a dead letter: it was "
            "refused by SQL, or an entry before it was; see "
            f"'statecache dead-letters list {receipt.machine}:{receipt.id}'",
            receipt,
        )
    if watermark >= entry.EntryId.parse(receipt.entry_id):
        return LostError(
            f"{receipt.machine}:{receipt.id} version {receipt.version} ({receipt.event}) was acknowledged and is lost: "
            "a recovery found Redis without it; see the report in 'statecache status'"
        )
    return False


def explained(durable: DurableStore, receipt: model.Receipt, error: errors.StateCacheError) -> errors.StateCacheError:
    """The answer about a receipt; where it looks lost and one row stands for its version and others, that nobody can tell."""
    if not isinstance(error, LostError):
        return error
    try:
        row = durable.covering(receipt.machine, receipt.id, receipt.version)
    except (errors.UnavailableError, errors.ConfigurationError) as trouble:
        late = errors.DurabilityTimeout(f"{receipt.machine}:{receipt.id} version {receipt.version}: {trouble}", receipt)
        late.__cause__ = trouble
        return late
    if row is None or (row[2] == entry.EVENT_ARCHIVED and row[1] == receipt.version):  # that row kept its own id
        return errors.IntegrityError(str(error))
    return errors.IntegrityError(
        f"{receipt.machine}:{receipt.id} version {receipt.version} ({receipt.event}) was acknowledged; of versions {row[0]} to "
        f"{row[1]} one row is all that SQL has ({row[2]}), so it cannot be told whether this transition is among them"
    )
