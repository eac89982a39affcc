"""The Lua scripts, each a pure function from a server to (reply code, server): atomic, as Redis runs them.

Refusals change nothing. Where a rule is off, the check that it stands for is left out.
"""

from __future__ import annotations

from typing import NamedTuple

from tests.model.state import (
    MARK,
    UNKNOWN,
    ZERO,
    Chain,
    Entry,
    Hash,
    Id,
    Letter,
    Look,
    Meta,
    Part,
    Redis,
    Saved,
    Stamp,
    Violation,
    put_hash,
    put_part,
)
from tests.model.world import Op, Rules, World

ADMISSION = frozenset({"NOSCRIPT", "EPOCH", "RECOVERING", "IDENTITY"})


class Reply(NamedTuple):
    code: str
    redis: Redis
    entry: Entry | None = None
    evicted_to: Id = ZERO


def follows(rules: Rules, entry: Entry, cursor: Id) -> bool:
    """Does the entry stand right behind the cursor? Without marks (H5 off) a new epoch begins at 0 behind anything."""
    if entry.inst == MARK:
        return entry.prev <= cursor < entry.id
    if not rules.marks and entry.id[0] > cursor[0] and entry.id[1] == 0:
        return True
    return entry.id == (cursor[0], cursor[1] + 1)


def refusal(rules: Rules, redis: Redis, p: int, stamp: Stamp, check: bool = True) -> str:
    """The code with which a stamped script refuses, or nothing."""
    meta = redis.parts[p].meta
    if meta is None or (rules.stamped_scripts and meta.stamp != stamp):
        return "EPOCH"
    if rules.stamped_scripts and not meta.ready:
        return "RECOVERING"
    if check and meta.identity != redis.identity:
        return "IDENTITY"
    return ""


def fenced(
    redis: Redis, p: int, stamp: Stamp, identity: int, guard_meta: bool = True, guard_identity: bool = True
) -> bool:
    """Is this partition as the fence of this recovery left it, on the server that the fence met?"""
    meta = redis.parts[p].meta
    if guard_meta and (meta is None or meta.stamp != stamp or meta.ready):
        return False
    return not guard_identity or redis.identity == identity


def pushed(ring: Chain, tid: str, size: int) -> Chain:
    return (*ring, tid)[-size:]


def next_id(part: Part, epoch: int) -> Id | None:
    """What `XADD <epoch>-*` gives, or None where Redis refuses the id."""
    if part.last[0] > epoch:
        return None
    return (epoch, part.last[1] + 1) if part.last[0] == epoch else (epoch, 0)


def apply(
    world: World, redis: Redis, stamp: Stamp, op: Op, check: bool, retry: bool, expected: int, absent: Id
) -> Reply:
    """``apply.lua`` for one item."""
    rules, p = world.rules, world.home[op.inst]
    if stamp not in redis.cache:
        return Reply("NOSCRIPT", redis)
    code = refusal(rules, redis, p, stamp, check)
    if code:
        return Reply(code, redis)
    part = redis.parts[p]
    meta, copy = part.meta, part.hashes[op.inst]
    assert meta is not None
    if copy is None:
        known_absent = absent != ZERO and (not rules.evicted_to or absent >= meta.evicted_to)
        if op.kind != "start" or (meta.cold and not known_absent):
            return Reply("MISS" if meta.cold else "ABSENT", redis, evicted_to=meta.evicted_to)
        chain: Chain = ()
        ring: Chain = ()
    else:
        chain, ring = copy.chain, copy.ring
        if rules.ring_checked and op.tid in ring:
            return Reply("DUP", redis)
        if rules.old_answer and retry and len(chain) > len(ring) and expected != len(chain):
            return Reply("OLD", redis)
        if op.kind == "start":
            return Reply("EXISTS", redis)
        if copy.parked:
            return Reply("PARKED", redis)
        if expected not in (0, len(chain)):
            return Reply("VERSION", redis)
    id = next_id(part, stamp[0])
    if id is None:
        return Reply("REFUSED", redis)
    entry = Entry(id, op.inst, len(chain) + 1, op.tid)
    copy = Hash((*chain, op.tid), id, pushed(ring, op.tid, world.ring), False)
    part = put_hash(part._replace(last=id, log=(*part.log, entry)), op.inst, copy)
    return Reply("OK", put_part(redis, p, part), entry)


def read(world: World, redis: Redis, p: int, stamp: Stamp, watermark: Id) -> tuple[str, tuple[Entry, ...], Id]:
    """``read.lua``: entries behind the watermark, and the log's last id."""
    if world.rules.log_read_admitted:
        code = refusal(world.rules, redis, p, stamp)
        if code:
            return code, (), ZERO
    part = redis.parts[p]
    return "OK", tuple(entry for entry in part.log if entry.id > watermark), part.last


def find(redis: Redis, rules: Rules, p: int, stamp: Stamp, inst: int, behind: Id | None) -> tuple[str, frozenset[str]]:
    """``find.lua``: the transition ids of an instance behind an id, or behind ``meta.watermark``."""
    code = refusal(rules, redis, p, stamp)
    if code:
        return code, frozenset()
    part = redis.parts[p]
    assert part.meta is not None
    cursor = part.meta.watermark if behind is None else behind
    return "OK", frozenset(entry.tid for entry in part.log if entry.inst == inst and entry.id > cursor)


def flushed(world: World, redis: Redis, p: int, stamp: Stamp, watermark: Id, parked: tuple[int, ...]) -> Reply:
    """``flushed.lua``: raise the watermark, mark parked hashes, trim."""
    rules, part = world.rules, redis.parts[p]
    if rules.trim_stamped:
        code = refusal(rules, redis, p, stamp)
        if code:
            return Reply(code, redis)
    elif part.meta is None:
        return Reply("EPOCH", redis)
    assert part.meta is not None
    for inst in parked:
        copy = part.hashes[inst]
        if copy is not None:
            part = put_hash(part, inst, copy._replace(parked=True))
    log = part.log
    if world.trim:
        log = tuple(
            entry for entry in log if entry.id > watermark or (entry.id == watermark and rules.trim_keeps_witness)
        )
    meta = part.meta
    assert meta is not None
    part = part._replace(log=log, meta=meta._replace(watermark=max(meta.watermark, watermark)))
    return Reply("OK", put_part(redis, p, part))


def evict(
    world: World, redis: Redis, p: int, stamp: Stamp, inst: int, version: int, watermark: Id, unpark: bool = False
) -> Reply:
    """``evict.lua``; with ``unpark`` it drops a parked hash whatever its version, if its last entry is flushed."""
    rules, part = world.rules, redis.parts[p]
    if rules.evict_stamped:
        code = refusal(rules, redis, p, stamp)
        if code:
            return Reply(code, redis)
    meta, copy = part.meta, part.hashes[inst]
    if meta is None or copy is None:
        return Reply("GONE", redis)
    if unpark:
        may = copy.parked and copy.entry_id <= watermark
    elif rules.evict_by == "checkpoint":
        may = len(copy.chain) == version and copy.entry_id <= watermark and not copy.parked
    else:
        may = copy.entry_id <= (watermark if rules.evict_by == "sql watermark" else meta.watermark) and not copy.parked
    if not may:
        return Reply("KEPT", redis)
    meta = meta._replace(cold=True, evicted_to=max(meta.evicted_to, copy.entry_id))
    return Reply("OK", put_part(redis, p, put_hash(part, inst, None)._replace(meta=meta)))


def thawed(rules: Rules, saved: Saved) -> Hash:
    """The hash that a checkpoint and its open letters are hydrated to."""
    ring = saved.ring if rules.hydrate_brings_ring else ()
    return Hash(saved.chain, saved.entry_id, ring, bool(saved.letters) and rules.hydrate_parks)


def hydrate(world: World, redis: Redis, p: int, stamp: Stamp, inst: int, saved: Saved, watermark: Id) -> Reply:
    """``hydrate.lua``."""
    rules, part = world.rules, redis.parts[p]
    if rules.hydrate_stamped:
        code = refusal(rules, redis, p, stamp)
        if code:
            return Reply(code, redis)
    if part.meta is None:
        return Reply("EPOCH", redis)
    if rules.hydrate_only_absent and part.hashes[inst] is not None:
        return Reply("EXISTS", redis)
    if rules.evicted_to and part.meta.evicted_to > watermark:
        return Reply("STALE", redis)
    return Reply("OK", put_part(redis, p, put_hash(part, inst, thawed(rules, saved))))


def park(world: World, redis: Redis, p: int, stamp: Stamp, inst: int) -> Reply:
    """Set the flag of a hash before its letters are mended; gives the id of its last entry (ZERO if it is not hot)."""
    code = refusal(world.rules, redis, p, stamp)
    if code:
        return Reply(code, redis)
    part = redis.parts[p]
    copy = part.hashes[inst]
    if copy is None:
        return Reply("OK", redis)
    redis = put_part(redis, p, put_hash(part, inst, copy._replace(parked=True)))
    return Reply("OK", redis, evicted_to=copy.entry_id)


# --- recovery ------------------------------------------------------------------------------------------------------------


def fence(world: World, redis: Redis, p: int, stamp: Stamp) -> Reply:
    """``fence.lua``. What it met is read by the caller from the server before it."""
    rules, part = world.rules, redis.parts[p]
    meta = part.meta
    if meta is not None and meta.epoch >= stamp[0]:
        if rules.fence_only_raises:
            return Reply("NEWER", redis)
        if meta.epoch > stamp[0]:
            raise Violation("P6", f"the fence of epoch {stamp[0]} takes partition {p} back from epoch {meta.epoch}")
    if meta is None:
        meta = Meta(stamp[0], stamp[1], False, 0, ZERO, True, ZERO)
    else:
        meta = meta._replace(epoch=stamp[0], owner=stamp[1], ready=False)
    if not rules.fence_keeps_identity:
        meta = meta._replace(identity=redis.identity)
    return Reply("OK", put_part(redis, p, part._replace(meta=meta)))


def drop(world: World, redis: Redis, p: int, stamp: Stamp, look: Look) -> Reply:
    """``drop.lua``: hashes that SQL knows better go, and the partition is marked cold up to SQL's watermark."""
    if not fenced(redis, p, stamp, look.identity):
        return Reply("REFUSED", redis)
    part = redis.parts[p]
    meta = part.meta
    assert meta is not None
    for inst in look.drop:
        part = put_hash(part, inst, None)
    if world.rules.drop_sets_cold == "drop":
        meta = meta._replace(cold=True, evicted_to=max(meta.evicted_to, look.watermark))
    return Reply("OK", put_part(redis, p, part._replace(meta=meta)))


def ready(world: World, redis: Redis, p: int, stamp: Stamp, look: Look) -> Reply:
    """``ready.lua``: the epoch's mark, the fence's identity, and the partition serves."""
    rules, part = world.rules, redis.parts[p]
    if not fenced(redis, p, stamp, look.identity, rules.ready_guards_meta, rules.ready_guards_identity):
        return Reply("REFUSED", redis)
    meta = part.meta or Meta(stamp[0], stamp[1], False, 0, ZERO, True, ZERO)
    identity = look.identity if rules.ready_guards_identity else redis.identity
    meta = meta._replace(epoch=stamp[0], owner=stamp[1], ready=True, identity=identity)
    meta = meta._replace(watermark=max(meta.watermark, look.watermark))
    if rules.drop_sets_cold == "ready" and look.kind != "intact":
        meta = meta._replace(cold=True, evicted_to=max(meta.evicted_to, look.watermark))
    if rules.marks:
        if part.last >= (stamp[0], 0):
            raise Violation("P6", f"the mark of epoch {stamp[0]} meets a log that is at {part.last}")
        prev = max(part.last, look.watermark) if rules.mark_names_watermark else part.last
        mark = Entry((stamp[0], 0), MARK, 0, "", prev, stamp[1])
        part = part._replace(log=(*part.log, mark), last=mark.id)
    return Reply("OK", put_part(redis, p, part._replace(meta=meta)))


def incomplete(saved: Saved, version: int) -> Chain:
    """A chain filled up to a version with transitions that nobody knows any more."""
    return saved.chain + (UNKNOWN,) * (version - saved.version)


def last_letter(letters: tuple[Letter, ...]) -> int:
    return max((letter.version for letter in letters), default=0)
