"""A flusher, partition by partition: load, read, compare-and-set, commit, tell.

Between ``open`` and ``committed`` its transaction holds the partition's row, so other flushers, the operator and (if it
writes that row, H1) the taking of an epoch wait. A restore of SQL ends an open transaction. It may be killed with an open
transaction, or between the commit and the telling; a kill anywhere else is the same as never going on.

Two flushers that both believe to hold the lease are simply two flushers: no step asks for a lease. What a lease does allow,
a memory of folded checkpoints from batch to batch, is modelled where the world says so (``fold_cache``).
"""

from __future__ import annotations

from tests.model import scripts, tables
from tests.model.state import (
    IDLE_FLUSHER,
    MARK,
    NOBODY,
    UNSEEN,
    Entry,
    Flusher,
    State,
    Steps,
    Violation,
    entry_text,
    id_text,
    put,
    put_row,
)
from tests.model.world import World


def steps(world: World, state: State) -> Steps:
    seen: set[Flusher] = set()
    for number, flusher in enumerate(state.flushers):
        if flusher not in seen:  # two flushers in the same place are one
            seen.add(flusher)
            for text, after in _STEPS[flusher.pc](world, state, number, flusher):
                yield f"flusher: {text}", after


def locked(state: State, p: int) -> bool:
    """Does an open flush transaction hold the partition's row?"""
    return any(flusher.pc == "open" and flusher.part == p for flusher in state.flushers)


def _put(state: State, number: int, flusher: Flusher) -> State:
    """Flushers have no names: they are kept in order, which halves the states."""
    flushers = put(state.flushers, number, flusher)
    return state._replace(flushers=tuple(sorted(flushers)) if len(flushers) > 1 else flushers)


def _idle(world: World, flusher: Flusher) -> Flusher:
    if not world.fold_cache:
        return IDLE_FLUSHER
    return IDLE_FLUSHER._replace(folds=flusher.folds, stamp=flusher.stamp if flusher.folds else NOBODY)


def _load(world: World, state: State, number: int, flusher: Flusher) -> Steps:
    for p, row in enumerate(state.sql.parts):
        pair = row.stamp if world.rules.epoch_in_partition_rows else state.sql.stamp
        folds = flusher.folds
        if pair != flusher.stamp and world.rules.folds_dropped_on_epoch:
            folds = ()
        after = IDLE_FLUSHER._replace(pc="loaded", part=p, stamp=pair, watermark=row.watermark, folds=folds)
        yield (
            f"loads epoch {pair[0]} and watermark {id_text(row.watermark)} of partition {p}",
            _put(state, number, after),
        )


def _read(world: World, state: State, number: int, flusher: Flusher) -> Steps:
    code, entries, last = scripts.read(world, state.redis, flusher.part, flusher.stamp, flusher.watermark)
    if code != "OK":
        yield f"reads the log: {code}", _put(state, number, _idle(world, flusher))
        return
    cursor = flusher.watermark
    kept: list[Entry] = []
    for entry in entries:
        if not scripts.follows(world.rules, entry, cursor):
            if not kept:
                _check_hole(world, state, flusher, entry)
            break
        kept.append(entry)
        cursor = entry.id
    if not kept:
        after = flusher._replace(pc="committed") if _untold(world, state, flusher) else _idle(world, flusher)
        yield f"reads nothing behind {id_text(flusher.watermark)}", _put(state, number, after)
        return
    for size in sorted({size or len(kept) for size in world.batches}):
        batch = tuple(kept[:size])
        parked = () if world.rules.parked_read_in_flush else _flagged(state, flusher.part)
        after = flusher._replace(pc="read", entries=batch, tail=last, parked=parked)
        yield f"reads {', '.join(map(entry_text, batch))}", _put(state, number, after)


def _untold(world: World, state: State, flusher: Flusher) -> bool:
    """Is there something that an earlier step committed and did not get to tell?"""
    part = state.redis.parts[flusher.part]
    behind = part.meta is not None and part.meta.watermark < flusher.watermark
    return behind or (world.trim and bool(part.log) and part.log[0].id < flusher.watermark)


def _flagged(state: State, p: int) -> tuple[int, ...]:
    """Who is parked by the flags in Redis (H12a off): they come later than the letters, and may be lost."""
    return tuple(inst for inst, copy in enumerate(state.redis.parts[p].hashes) if copy is not None and copy.parked)


def _check_hole(world: World, state: State, flusher: Flusher, entry: Entry) -> None:
    """The flusher asks for a recovery: one that found nothing to mend would leave it here for ever."""
    p = flusher.part
    row, part = state.sql.parts[p], state.redis.parts[p]
    if row.watermark != flusher.watermark or row.stamp != flusher.stamp or state.ghost.untrue[p]:
        return
    look = UNSEEN._replace(watermark=row.watermark)
    kind, _ = tables.classify(world, state.sql, look, p, part)
    if kind == "intact" or not world.rules.reconcile_in_sql:
        text = f"{entry_text(entry)} does not follow {id_text(row.watermark)}: the flusher stops, a recovery would mend nothing"
        raise Violation("P3", text)


def _begin(world: World, state: State, number: int, flusher: Flusher) -> Steps:
    if locked(state, flusher.part):
        return  # waits for the row
    if tables.owns(world, state.sql, flusher.part, flusher.stamp, flusher.watermark):
        yield f"begins, the row is at {id_text(flusher.watermark)}", _put(state, number, flusher._replace(pc="open"))
    else:
        yield "begins: the row changed, drops everything", _put(state, number, _idle(world, flusher)._replace(folds=()))


def _commit(world: World, state: State, number: int, flusher: Flusher) -> Steps:
    if state.budget.kill:
        budget = state.budget._replace(kill=state.budget.kill - 1)
        yield "is killed before its commit", _put(state._replace(budget=budget), number, IDLE_FLUSHER)
    if not world.rules.poison_stops_one and any(entry.tid in world.poison for entry in flusher.entries):
        raise Violation(
            "P10", f"SQL refuses the batch {', '.join(map(entry_text, flusher.entries))}: the partition stops"
        )
    sql, parked = tables.flush(
        world, state.sql, flusher.part, flusher.entries, flusher.tail, flusher.parked, flusher.folds
    )
    if state.sql.stamp != flusher.stamp:
        raise Violation("P6", f"a flush of epoch {flusher.stamp[0]} commits, SQL is at epoch {state.sql.epoch}")
    watermark = flusher.entries[-1].id
    folds = flusher.folds
    if world.fold_cache:
        touched = {entry.inst for entry in flusher.entries if entry.inst != MARK}
        known = dict(folds) | {inst: sql.saved[inst].chain for inst in touched}
        folds = tuple(sorted(known.items()))
    if not world.rules.watermark_with_rows:
        sql = sql._replace(parts=state.sql.parts)
    after = IDLE_FLUSHER._replace(
        pc="committed", part=flusher.part, stamp=flusher.stamp, watermark=watermark, parked=parked, folds=folds
    )
    yield f"commits up to {id_text(watermark)}", _put(state._replace(sql=sql), number, after)


def _tell(world: World, state: State, number: int, flusher: Flusher) -> Steps:
    if state.budget.kill:
        budget = state.budget._replace(kill=state.budget.kill - 1)
        yield "is killed before it tells Redis", _put(state._replace(budget=budget), number, IDLE_FLUSHER)
    p = flusher.part
    if not world.rules.watermark_with_rows:
        row = state.sql.parts[p]._replace(watermark=max(flusher.watermark, state.sql.parts[p].watermark))
        state = state._replace(sql=put_row(state.sql, p, row))
    stamp = flusher.stamp if world.rules.stamp_held else state.sql.stamp
    reply = scripts.flushed(world, state.redis, p, stamp, flusher.watermark, flusher.parked)
    gone = [entry for entry in state.redis.parts[p].log if entry not in set(reply.redis.parts[p].log)]
    for entry in gone:
        saved = entry.inst != MARK and state.sql.saved[entry.inst].knows(entry.version, entry.tid)
        if entry.inst != MARK and not saved and not state.ghost.restored[p]:
            raise Violation(
                "P11", f"telling {id_text(flusher.watermark)} trims {entry_text(entry)}, which is not in SQL"
            )
    text = f"tells Redis {id_text(flusher.watermark)} (epoch {stamp[0]}): {reply.code}"
    if gone:
        text += f", trims {', '.join(map(entry_text, gone))}"
    yield text, _put(state._replace(redis=reply.redis), number, _idle(world, flusher))


_STEPS = {"idle": _load, "loaded": _read, "read": _begin, "open": _commit, "committed": _tell}
