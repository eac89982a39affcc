"""A recovery: look, peek, take, rows, fence each partition, then for each probe, judge and mend, then report, ready each.

``look`` and ``peek`` read the epochs of SQL and of Redis; ``take`` is step 1; ``rows`` reads the watermarks; ``fence`` is
step 2; ``probe`` reads the log, ``judge`` compares it with SQL, ``drop`` and ``mend`` do what the class asks for (step 3);
``report`` is step 4, ``ready`` step 5. It may begin at any time, needed or not (a false alarm), and stop for ever anywhere
(a recoverer that died). Whatever is refused ends it; the next one in the world's list may begin.
"""

from __future__ import annotations

from typing import Any

from tests.model import invariants, scripts, tables
from tests.model.state import (
    NOBODY,
    UNSEEN,
    UNUSED_RECOVERER,
    Recoverer,
    State,
    Steps,
    Violation,
    id_text,
    name,
    put,
)
from tests.model.steps_client import excuse
from tests.model.steps_flusher import locked
from tests.model.world import World


def steps(world: World, state: State) -> Steps:
    for number, me in enumerate(state.recoverers):
        if me.pc == "ended":
            continue
        for text, after in _STEPS[me.pc](world, state, number, me):
            yield f"recovery {number + 1}: {text}", after
        if me.pc == "unused":
            return  # they begin in order


def _put(state: State, number: int, me: Recoverer) -> State:
    return state._replace(recoverers=put(state.recoverers, number, me))


def _end(state: State, number: int) -> State:
    return _put(state, number, UNUSED_RECOVERER._replace(pc="ended"))


def _look_at(me: Recoverer, **changes: Any) -> Recoverer:
    look = me.looks[me.part]._replace(**changes)
    return me._replace(looks=put(me.looks, me.part, look))


def _next(me: Recoverer, pc: str, then: str) -> Recoverer:
    """On to the next partition, or to what comes after the last one."""
    if me.part + 1 < len(me.looks):
        return me._replace(pc=pc, part=me.part + 1)
    return me._replace(pc=then, part=0)


# --- steps 1 and 2 -------------------------------------------------------------------------------------------------------


def _look(world: World, state: State, number: int, me: Recoverer) -> Steps:
    yield f"reads epoch {state.sql.epoch} from SQL", _put(state, number, me._replace(pc="peek", old=state.sql.stamp))


def _peek(world: World, state: State, number: int, me: Recoverer) -> Steps:
    epochs = [part.meta.epoch if part.meta else 0 for part in state.redis.parts]
    epoch = 1 + max(me.old[0], *epochs)
    yield f"reads the epochs of Redis, wants {epoch}", _put(state, number, me._replace(pc="take", stamp=(epoch, 0)))


def _take(world: World, state: State, number: int, me: Recoverer) -> Steps:
    if world.rules.epoch_in_partition_rows and any(locked(state, p) for p in range(len(state.sql.parts))):
        return  # waits for the open flush transactions
    who = state.ghost.takes + 1
    stamp = (me.stamp[0], who if world.rules.owner_token else 0)
    sql = tables.take(world, state.sql, me.old, stamp, who)
    if sql is None:
        yield "another one was faster", _end(state, number)
        return
    ghost = state.ghost._replace(takes=who)
    me = Recoverer("rows", who, stamp, NOBODY, 0, (), state.ghost.restores)
    yield f"takes epoch {stamp[0]} in SQL as number {who}", _put(state._replace(sql=sql, ghost=ghost), number, me)


def _rows(world: World, state: State, number: int, me: Recoverer) -> Steps:
    looks = tuple(UNSEEN._replace(watermark=row.watermark) for row in state.sql.parts)
    text = "reads the watermarks " + ", ".join(id_text(look.watermark) for look in looks)
    yield text, _put(state, number, me._replace(pc="fence", looks=looks))


def _fence(world: World, state: State, number: int, me: Recoverer) -> Steps:
    meta = state.redis.parts[me.part].meta
    reply = scripts.fence(world, state.redis, me.part, me.stamp)
    if reply.code != "OK":
        yield f"fences partition {me.part}: {reply.code}", _end(state, number)
        return
    me = _look_at(
        me, identity=state.redis.identity, existed=meta is not None, recorded=meta.identity if meta else 0,
        found=meta.stamp if meta else NOBODY, losses=state.ghost.losses,
    )  # fmt: skip
    text = f"fences partition {me.part}"
    yield text, _put(state._replace(redis=reply.redis), number, _next(me, "fence", "probe"))


# --- step 3 --------------------------------------------------------------------------------------------------------------


def _probe(world: World, state: State, number: int, me: Recoverer) -> Steps:
    identity = me.looks[me.part].identity
    if world.rules.probe_fenced and not scripts.fenced(state.redis, me.part, me.stamp, identity):
        yield f"probes partition {me.part}: refused", _end(state, number)
        return
    me = _look_at(me, view=state.redis.parts[me.part])
    yield f"probes partition {me.part}", _put(state, number, me._replace(pc="judge"))


def _judge(world: World, state: State, number: int, me: Recoverer) -> Steps:
    look, p = me.looks[me.part], me.part
    part = look.view
    assert part is not None
    kind, last = tables.classify(world, state.sql, look, p, part)
    dropped = tables.to_drop(world, state.sql, p, kind, last, part)
    tail = state.sql.parts[p].tail
    strange = look.existed and look.found not in state.sql.recoveries
    possible = not look.existed or look.recorded != look.identity or strange
    if kind == "SQL behind" and world.rules.behind_says_loss:
        possible = True
    keep = part if kind in ("SQL behind", "diverged") else None
    me = _look_at(
        me, kind=kind, last=last, drop=dropped, view=keep, possible=possible and world.rules.loss_possible,
        lost=tables.entries_between(max(last, look.watermark), tail),
    )  # fmt: skip
    pc = {"intact": "drop" if dropped else "", "SQL behind": "mend", "diverged": "mend"}.get(kind, "drop")
    after = me._replace(pc=pc) if pc else _next(me, "probe", "report")
    yield f"finds partition {p} {kind}", _put(state, number, after)


def _drop(world: World, state: State, number: int, me: Recoverer) -> Steps:
    look = me.looks[me.part]
    reply = scripts.drop(world, state.redis, me.part, me.stamp, look)
    if reply.code != "OK":
        yield f"drops hashes of partition {me.part}: {reply.code}", _end(state, number)
        return
    me = _next(_look_at(me, drop=(), view=None), "probe", "report")
    text = f"drops {', '.join(map(name, look.drop)) or 'nothing'}, cold up to {id_text(look.watermark)}"
    yield text, _put(state._replace(redis=reply.redis), number, me)


def _mend(world: World, state: State, number: int, me: Recoverer) -> Steps:
    p, look, sql = me.part, me.looks[me.part], state.sql
    part = look.view
    assert part is not None
    if tables.superseded(sql, me) or sql.parts[p].watermark != look.watermark:
        yield f"mends partition {p}: SQL has changed", _end(state, number)
        return
    if look.kind == "SQL behind" and not world.rules.reconcile_one_tx:
        sql = tables.move_watermark(sql, p, tables.gap(sql, p, part)[0])
        after = _look_at(me, watermark=sql.parts[p].watermark)._replace(pc="mend 2")
        yield f"moves the watermark to {id_text(sql.parts[p].watermark)}", _put(state._replace(sql=sql), number, after)
        return
    sql = tables.mend(world, sql, p, look, part)
    me = _look_at(me, watermark=sql.parts[p].watermark)
    if look.kind == "diverged" or look.drop:
        me = me._replace(pc="drop")
    else:
        me = _next(_look_at(me, view=None), "probe", "report")
    text = f"mends partition {p} ({look.kind}), watermark {id_text(sql.parts[p].watermark)}"
    yield text, _put(state._replace(sql=sql), number, me)


def _mend_2(world: World, state: State, number: int, me: Recoverer) -> Steps:
    part = me.looks[me.part].view
    assert part is not None
    if tables.superseded(state.sql, me):
        yield "writes reconciled rows: SQL has changed", _end(state, number)
        return
    before = me.looks[me.part].watermark
    tail = [entry for entry in part.log if entry.id > before]
    sql = tables.reconcile(world, state.sql, me.part, part, before, tail)
    me = _next(_look_at(me, view=None), "probe", "report")
    yield "writes reconciled rows", _put(state._replace(sql=sql), number, me)


# --- steps 4 and 5 -------------------------------------------------------------------------------------------------------


def _report(world: World, state: State, number: int, me: Recoverer) -> Steps:
    sql = state.sql
    if tables.superseded(sql, me):
        yield "reports: superseded", _end(state, number)
        return
    lost = sum(look.lost for look in me.looks)
    sql = sql._replace(lost=sql.lost + lost)
    if world.rules.report_resets_tail:
        sql = _reset(state._replace(sql=sql), me).sql
    after = me._replace(pc="ready" if world.rules.report_resets_tail else "reset")
    text = "; ".join(f"{one.kind}, lost at least {one.lost}{', more possible' * one.possible}" for one in me.looks)
    yield f"reports {text}", _put(state._replace(sql=sql), number, after)


def _reset(state: State, me: Recoverer) -> State:
    parts = tuple(row._replace(tail=look.last) for row, look in zip(state.sql.parts, me.looks, strict=True))
    return state._replace(sql=state.sql._replace(parts=parts))


def _reset_later(world: World, state: State, number: int, me: Recoverer) -> Steps:
    if tables.superseded(state.sql, me):
        yield "resets the tails: superseded", _end(state, number)
        return
    yield "resets the tails last seen", _put(_reset(state, me), number, me._replace(pc="ready"))


def _ready(world: World, state: State, number: int, me: Recoverer) -> Steps:
    p, look = me.part, me.looks[me.part]
    reply = scripts.ready(world, state.redis, p, me.stamp, look)
    if reply.code != "OK":
        yield f"opens partition {p}: {reply.code}", _end(state, number)
        return
    ghost = state.ghost
    if ghost.losses == look.losses:
        ghost = ghost._replace(untrue=put(ghost.untrue, p, False))
    if ghost.restores == me.restores:
        ghost = ghost._replace(restored=put(ghost.restored, p, False))
    state = state._replace(redis=reply.redis, ghost=ghost)
    if not ghost.untrue[p] and not ghost.restored[p]:
        gone = invariants.nowhere(world, state, p)
        if gone and not (look.possible or look.lost) and "P9" in world.asserted:
            raise Violation(
                "P9", f"partition {p} is opened ({look.kind}) and no report says that {_names(gone)} are lost"
            )
        state = state._replace(ghost=excuse(ghost, gone))
    after = me._replace(pc="ready", part=p + 1) if p + 1 < len(me.looks) else UNUSED_RECOVERER._replace(pc="ended")
    yield f"opens partition {p}", _put(state, number, after)


def _names(gone: frozenset[tuple[int, int, str]]) -> str:
    return ", ".join(f"{name(inst)} v{version}={tid}" for inst, version, tid in sorted(gone))


_STEPS = {
    "unused": _look,
    "peek": _peek,
    "take": _take,
    "rows": _rows,
    "fence": _fence,
    "probe": _probe,
    "judge": _judge,
    "drop": _drop,
    "mend": _mend,
    "mend 2": _mend_2,
    "report": _report,
    "reset": _reset_later,
    "ready": _ready,
}
