"""The evictor, and the operator who mends dead letters.

Evictor: one SQL snapshot of an instance (``read``), then the evict script. Its stamp is the pair that SQL had at that
snapshot; with ``stamp_held`` off it is whatever SQL has when the script is sent.

Operator: finds an instance with letters (``idle``), sets its hash's flag (``park``, which tells the last entry), moves all
letters into history or deletes them in one SQL transaction if that entry is at or below the watermark (``move``), and drops
the hash (``drop``).
"""

from __future__ import annotations

from tests.model import scripts, tables
from tests.model.state import (
    IDLE_EVICTOR,
    NOBODY,
    ZERO,
    Evictor,
    Operator,
    State,
    Steps,
    Violation,
    chain_text,
    id_text,
    name,
    put,
)
from tests.model.steps_client import excuse
from tests.model.steps_flusher import locked
from tests.model.world import World


def steps(world: World, state: State) -> Steps:
    seen: set[Evictor] = set()
    for number, evictor in enumerate(state.evictors):
        if evictor not in seen:
            seen.add(evictor)
            for text, after in (_look if evictor.pc == "idle" else _evict)(world, state, number, evictor):
                yield f"evictor: {text}", after
    for text, after in _OPERATOR[state.operator.pc](world, state, state.operator):
        yield f"operator: {text}", after


def _put(state: State, number: int, evictor: Evictor) -> State:
    evictors = put(state.evictors, number, evictor)
    return state._replace(evictors=tuple(sorted(evictors)) if len(evictors) > 1 else evictors)


def _look(world: World, state: State, number: int, evictor: Evictor) -> Steps:
    for inst, saved in enumerate(state.sql.saved):
        if saved.version:
            watermark = state.sql.parts[world.home[inst]].watermark
            after = Evictor("evict", inst, state.sql.stamp, saved.version, watermark)
            text = f"reads {name(inst)} v{saved.version}, watermark {id_text(watermark)}"
            yield text, _put(state, number, after)


def _evict(world: World, state: State, number: int, evictor: Evictor) -> Steps:
    inst, p = evictor.inst, world.home[evictor.inst]
    stamp = evictor.stamp if world.rules.stamp_held else state.sql.stamp
    reply = scripts.evict(world, state.redis, p, stamp, inst, evictor.version, evictor.watermark)
    if reply.code == "OK" and not state.ghost.restored[p]:
        copy, saved = state.redis.parts[p].hashes[inst], state.sql.saved[inst]
        assert copy is not None
        if saved.chain != copy.chain:
            raise Violation(
                "P11",
                f"evicting {name(inst)} {chain_text(copy.chain)}, of which SQL's checkpoint is {chain_text(saved.chain)}",
            )
    text = f"evicts {name(inst)} (v{evictor.version}, epoch {stamp[0]}): {reply.code}"
    yield text, _put(state._replace(redis=reply.redis), number, IDLE_EVICTOR)


# --- the operator --------------------------------------------------------------------------------------------------------


def _list(world: World, state: State, operator: Operator) -> Steps:
    if not operator.left:
        return
    for inst, saved in enumerate(state.sql.saved):
        if saved.letters:
            for discard in (False, True):
                after = Operator("park", inst, state.sql.stamp, discard, ZERO, operator.left - 1)
                text = f"wants to {'discard' if discard else 'retry'} the letters of {name(inst)}"
                yield text, state._replace(operator=after)


def _idle(operator: Operator) -> Operator:
    return Operator("idle", 0, NOBODY, False, ZERO, operator.left)


def _park(world: World, state: State, operator: Operator) -> Steps:
    if not world.rules.letters_wait:
        yield "does not park it", state._replace(operator=operator._replace(pc="move"))
        return
    reply = scripts.park(world, state.redis, world.home[operator.inst], operator.stamp, operator.inst)
    after = operator._replace(pc="move", entry_id=reply.evicted_to) if reply.code == "OK" else _idle(operator)
    yield f"parks {name(operator.inst)}: {reply.code}", state._replace(redis=reply.redis, operator=after)


def _move(world: World, state: State, operator: Operator) -> Steps:
    inst, p = operator.inst, world.home[operator.inst]
    if locked(state, p):
        return
    sql = state.sql
    stop = state._replace(operator=_idle(operator))
    if sql.stamp != operator.stamp or not sql.saved[inst].letters:
        yield "finds that the epoch or the letters have gone", stop
    elif world.rules.letters_wait and operator.entry_id > sql.parts[p].watermark:
        yield f"is refused: {id_text(operator.entry_id)} is not flushed", stop
    elif operator.discard:
        sql, gone = tables.discard_letters(world, sql, inst)
        upto = max(letter.version for letter in gone)
        lost = frozenset(
            one for one in state.ghost.applied
            if one[0] == inst and not sql.saved[inst].knows(one[1], one[2])
            and (one[1:] in {(letter.version, letter.tid) for letter in gone}
                 or (any(letter.kind == "incomplete" for letter in gone) and one[1] <= upto))
        )  # fmt: skip
        after = state._replace(sql=sql, ghost=excuse(state.ghost, lost), operator=operator._replace(pc="drop"))
        yield f"discards {len(gone)} letters of {name(inst)}", after
    else:
        moved = tables.retry_letters(world, sql, inst)
        if moved is None:
            yield "cannot move them: another transition has their version", stop
        else:
            after = state._replace(sql=moved, operator=operator._replace(pc="drop"))
            yield f"moves the letters of {name(inst)} into history", after


def _drop(world: World, state: State, operator: Operator) -> Steps:
    """The hash goes; read after the transaction, so the watermark is at or above its last entry."""
    watermark = state.sql.parts[world.home[operator.inst]].watermark
    p = world.home[operator.inst]
    reply = scripts.evict(world, state.redis, p, operator.stamp, operator.inst, 0, watermark, unpark=True)
    yield f"drops {name(operator.inst)}: {reply.code}", state._replace(redis=reply.redis, operator=_idle(operator))


_OPERATOR = {"idle": _list, "park": _park, "move": _move, "drop": _drop}
