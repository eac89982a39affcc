"""The SQL transactions, each a pure function from a database to the next one.

A transaction is atomic, and one that holds a partition's row makes others wait for it; the steps say which wait. Only the
flush transaction is taken in two steps (its compare-and-set, its commit), because what happens between them is hole H1.
"""

from __future__ import annotations

from tests.model import scripts
from tests.model.state import (
    MARK,
    RECONCILED,
    ZERO,
    Chain,
    Entry,
    Id,
    Letter,
    Look,
    Part,
    Recoverer,
    Row,
    Saved,
    Sql,
    Stamp,
    Violation,
    chain_text,
    entry_text,
    id_text,
    name,
    put_row,
    put_saved,
)
from tests.model.world import Rules, World


def owns(world: World, sql: Sql, p: int, stamp: Stamp, old: Id) -> bool:
    """The compare-and-set of the flush: on the partition's own row, or (H1 off) against the store's row."""
    row = sql.parts[p]
    pair = row.stamp if world.rules.epoch_in_partition_rows else sql.stamp
    return pair == stamp and (row.watermark == old or not world.rules.watermark_compared)


def flush(
    world: World,
    sql: Sql,
    p: int,
    entries: tuple[Entry, ...],
    tail: Id,
    parked_before: tuple[int, ...],
    folds: tuple[tuple[int, Chain], ...],
) -> tuple[Sql, tuple[int, ...]]:
    """The flush transaction's writes; returns also the instances that are parked now.

    ``folds`` is the flusher's own memory of checkpoints, used where it leads up to the first entry.
    """
    rules = world.rules
    cached = dict(folds)
    parked = {inst for inst, saved in enumerate(sql.saved) if saved.letters}
    if not rules.parked_read_in_flush:
        parked = set(parked_before)
    for entry in entries:
        if entry.inst == MARK:
            continue
        saved = sql.saved[entry.inst]
        letter = ""
        if entry.inst in parked:
            letter = "waiting"
        elif entry.tid in world.poison:
            letter = "refused"
            parked.add(entry.inst)
        if letter:
            if letter == "refused" or rules.letters_with_flush:
                found = (*saved.letters, Letter(entry.version, entry.id, entry.tid, letter))
                sql = put_saved(sql, entry.inst, saved._replace(letters=found))
            continue
        chain = cached.get(entry.inst, ())
        if len(chain) != entry.version - 1:
            chain = saved.chain
        sql = put_saved(sql, entry.inst, _with_row(world, saved, chain, entry))
        cached[entry.inst] = sql.saved[entry.inst].chain
    watermark = entries[-1].id
    row = sql.parts[p]._replace(watermark=watermark, tail=tail)
    mine = tuple(sorted(inst for inst in parked if world.home[inst] == p))
    return put_row(sql, p, row), mine


def _with_row(world: World, saved: Saved, chain: Chain, entry: Entry) -> Saved:
    """An instance with one more row of history. Everything that may not be is a violation here, as it is an alarm there."""
    for row in saved.history:
        if row.covers_from <= entry.version <= row.version:
            kind = "P5" if row.tid == entry.tid else "P3"
            raise Violation(kind, f"flushing {entry_text(entry)}: history has v{row.version}={row.tid} already")
    if entry.version != saved.version + 1:
        raise Violation("P3", f"flushing {entry_text(entry)} would leave a gap: SQL has {chain_text(saved.chain)}")
    if entry.tid in (row.tid for row in saved.history):
        raise Violation("P4", f"flushing {entry_text(entry)}: its id is in history already: it was applied twice")
    chain = (*chain, entry.tid)
    ring = scripts.pushed(saved.ring, entry.tid, world.ring)
    history = (*saved.history, Row(entry.version, entry.tid, entry.version))
    return saved._replace(history=history, chain=chain, ring=ring, entry_id=entry.id)


def take(world: World, sql: Sql, old: Stamp, stamp: Stamp, who: int) -> Sql | None:
    """Step 1: the epoch, by compare-and-set on the old pair; None if another recovery was faster."""
    if sql.stamp != old:
        return None
    sql = sql._replace(epoch=stamp[0], owner=stamp[1], taker=who, recoveries=sql.recoveries | {stamp})
    if world.rules.epoch_in_partition_rows:
        sql = sql._replace(parts=tuple(row._replace(epoch=stamp[0], owner=stamp[1]) for row in sql.parts))
    return sql


def superseded(sql: Sql, me: Recoverer) -> bool:
    """Does a newer recovery own this store? If the check lets an older one through, that is a violation of P6."""
    if sql.stamp != me.stamp:
        return True
    if sql.taker != me.who:
        raise Violation(
            "P6", f"recovery {me.who} of epoch {me.stamp[0]} changes SQL, which recovery {sql.taker} has taken"
        )
    return False


def entries_between(low: Id, high: Id) -> int:
    """A lower bound of the number of entries above ``low`` up to ``high``."""
    if high <= low:
        return 0
    return high[1] - low[1] if high[0] == low[0] else high[1]


# --- the classes of recovery ---------------------------------------------------------------------------------------------


def classify(world: World, sql: Sql, look: Look, p: int, part: Part) -> tuple[str, Id]:
    """The class of a partition, and the log's last entry that belongs to SQL's line of history."""
    rules, watermark = world.rules, look.watermark
    for entry in part.log:
        if entry.id == watermark:
            if rules.intact_by_content and not _same(rules, sql, entry):
                return "diverged", part.last
            behind = next((one for one in part.log if one.id > watermark), None)
            if rules.intact_needs_next and behind is not None and not scripts.follows(rules, behind, watermark):
                return "SQL behind", part.last
            return "intact", part.last
    if part.last == (0, 0):
        return "wiped", part.last
    behind = next((entry for entry in part.log if entry.id > watermark), None)
    if behind is None:
        return ("tail lost" if part.last < watermark else "intact"), part.last
    if behind.inst == MARK and behind.prev < watermark:
        if not rules.mark_behind_watermark:
            return "intact", part.last
        later = {entry.inst for entry in part.log if entry.id > behind.prev}
        ahead = _above(world, sql, p, behind.prev)
        return ("diverged" if later & set(ahead) else "tail lost"), behind.prev
    if scripts.follows(rules, behind, watermark):
        return "intact", part.last
    return "SQL behind", part.last


def _same(rules: Rules, sql: Sql, entry: Entry) -> bool:
    if entry.inst == MARK:
        return (entry.id[0], entry.owner) in sql.recoveries
    saved = sql.saved[entry.inst]
    if not rules.recovery_drops_discarded:
        saved = saved._replace(discarded=())
    return saved.knows(entry.version, entry.tid)


def _above(world: World, sql: Sql, p: int, last: Id) -> tuple[int, ...]:
    """Instances whose checkpoint, or open letter, has an entry id above ``last``."""
    found = []
    for inst, saved in enumerate(sql.saved):
        letters = saved.letters if world.rules.recovery_counts_letters else ()
        if world.home[inst] == p and (saved.entry_id > last or any(letter.id > last for letter in letters)):
            found.append(inst)
    return tuple(found)


def to_drop(world: World, sql: Sql, p: int, kind: str, last: Id, part: Part) -> tuple[int, ...]:
    """The hashes that a recovery of this class drops: what SQL knows better."""
    dropped = []
    above = _above(world, sql, p, last) if kind in ("tail lost", "wiped") else ()
    for inst, copy in enumerate(part.hashes):
        tombstone = max((letter.id for letter in sql.saved[inst].discarded), default=ZERO)
        stale = copy is not None and copy.entry_id <= tombstone and world.rules.recovery_drops_discarded
        if inst in above or stale:
            dropped.append(inst)
            continue
        if copy is None or kind != "diverged":
            continue
        fresh = [
            entry for entry in part.log if entry.inst == inst and not sql.saved[inst].knows(entry.version, entry.tid)
        ]
        stale = (copy.chain, copy.entry_id) != (sql.saved[inst].chain, sql.saved[inst].entry_id)
        if fresh or (stale and world.rules.diverged_drops_stale):
            dropped.append(inst)
    return tuple(dropped)


def mend(world: World, sql: Sql, p: int, look: Look, part: Part) -> Sql:
    """The one transaction that mends *SQL behind* or *diverged*; the caller has compared epoch, owner and watermark."""
    if look.kind == "SQL behind":
        if not world.rules.reconcile_in_sql:
            return sql
        before, tail = gap(sql, p, part)
        return move_watermark(reconcile(world, sql, p, part, before, tail), p, before)
    for entry in part.log:
        if entry.inst == MARK or sql.saved[entry.inst].knows(entry.version, entry.tid):
            continue
        saved = sql.saved[entry.inst]
        letters = (*saved.letters, Letter(entry.version, entry.id, entry.tid, "diverged"))
        sql = put_saved(sql, entry.inst, saved._replace(letters=letters))
    row = sql.parts[p]
    return put_row(sql, p, row._replace(watermark=max(row.watermark, part.last)))


def gap(sql: Sql, p: int, part: Part) -> tuple[Id, list[Entry]]:
    """The id before the log's first entry behind the watermark, and the entries from there on."""
    tail = [entry for entry in part.log if entry.id > sql.parts[p].watermark]
    first = tail[0]
    return (first.prev if first.inst == MARK else (first.id[0], first.id[1] - 1)), tail


def move_watermark(sql: Sql, p: int, before: Id) -> Sql:
    return put_row(sql, p, sql.parts[p]._replace(watermark=before))


def reconcile(world: World, sql: Sql, p: int, part: Part, before: Id, tail: list[Entry]) -> Sql:
    """*SQL behind*: a row for the range that is missing before what the log, or the hash, goes on with."""
    for inst, home in enumerate(world.home):
        if home != p:
            continue
        saved, copy = sql.saved[inst], part.hashes[inst]
        logged = [entry.version for entry in tail if entry.inst == inst]
        if not logged and copy is None:
            continue
        if copy is None and not world.rules.reconcile_cold:
            continue
        upto = (min(logged) if logged else len(copy.chain if copy else ()) + 1) - 1
        known = saved.version
        if world.rules.reconcile_counts_letters:
            known = max(known, scripts.last_letter(saved.letters))
        if upto <= known:
            continue
        if copy is None or (saved.letters and world.rules.reconcile_counts_letters):
            letter = Letter(upto, before, RECONCILED, "incomplete")
            sql = put_saved(sql, inst, saved._replace(letters=(*saved.letters, letter)))
            continue
        history = (*saved.history, Row(upto, RECONCILED, saved.version + 1))
        chain = copy.chain[:upto]
        mended = saved._replace(history=history, chain=chain, ring=chain[-world.ring :], entry_id=before)
        sql = put_saved(sql, inst, mended)
    return sql


# --- dead letters --------------------------------------------------------------------------------------------------------


def retry_letters(world: World, sql: Sql, inst: int) -> Sql | None:
    """Move all letters of an instance into history; None where one of them cannot be."""
    saved = sql.saved[inst]
    if any(letter.kind == "diverged" and letter.version <= saved.version for letter in saved.letters):
        return None
    saved = saved._replace(letters=())
    for letter in sorted(sql.saved[inst].letters):
        if letter.kind == "incomplete":
            history = (*saved.history, Row(letter.version, RECONCILED, saved.version + 1))
            chain = scripts.incomplete(saved, letter.version)
            saved = saved._replace(history=history, chain=chain, ring=(), entry_id=max(saved.entry_id, letter.id))
            continue
        if letter.version != saved.version + 1:
            raise Violation(
                "P3",
                f"retrying letter v{letter.version}={letter.tid} of {name(inst)} ({id_text(letter.id)}) would leave a gap",
            )
        saved = _with_row(world, saved, saved.chain, Entry(letter.id, inst, letter.version, letter.tid))
    return put_saved(sql, inst, saved)


def discard_letters(world: World, sql: Sql, inst: int) -> tuple[Sql, tuple[Letter, ...]]:
    """Delete the letters of an instance (all, or with H12e off the first one); they are counted as lost."""
    saved = sql.saved[inst]
    gone = saved.letters if world.rules.letters_whole_queue else saved.letters[:1]
    after = saved._replace(letters=saved.letters[len(gone) :], discarded=saved.discarded + gone)
    return put_saved(sql, inst, after), gone
