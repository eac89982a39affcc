"""A client: one call after the other, each with its own transition id, repeated until it is answered.

``apply`` sends the item. A refusal leads to admission: the pair from SQL (``admit``), compared in Redis (``compare``), the
scripts loaded (``load``), and apply again with nothing of what was read before. A miss leads to one SQL snapshot
(``lookup``), ``hydrate``, and apply again. ``OLD`` leads to the look-ups in the log (``find log``) and in SQL (``find
sql``). A durable call then waits for its row (``wait``).

A reply that is lost (budget) leaves an applied transition whose client repeats it. A client that waits for something (a
recovery, the flusher) stays in a state that was seen before, so waiting costs nothing here.

The identity: ``due`` is set where the next call is the first on a new connection, or later than the identity interval.
The passing of time is not modelled otherwise: between faults no check is ever due, which is the worst case.
"""

from __future__ import annotations

from typing import cast

from tests.model import scripts
from tests.model.state import (
    RECONCILED,
    ZERO,
    Client,
    Ghost,
    Hash,
    Id,
    Saved,
    Stamp,
    State,
    Step,
    Steps,
    Violation,
    id_text,
    name,
    put,
)
from tests.model.world import Op, World

_WHO = "AB"


def steps(world: World, state: State) -> Steps:
    for number, client in enumerate(state.clients):
        ops = world.clients[number]
        if client.at < len(ops):
            for text, after in _STEPS[client.pc](world, state, number, client, ops[client.at]):
                yield f"client {_WHO[number]}: {text}", after


def put_client(state: State, number: int, client: Client) -> State:
    return state._replace(clients=put(state.clients, number, client))


def next_op(client: Client) -> Client:
    return client._replace(pc="apply", at=client.at + 1, retry=False, expected=0, absent=ZERO, held=())


def _again(client: Client) -> Client:
    """Begin the item again at apply; nothing that was read before is used."""
    return client._replace(pc="apply", expected=0, absent=ZERO, held=())


def _refused(client: Client) -> Client:
    return client._replace(pc="admit", expected=0, absent=ZERO, held=())


def _apply(world: World, state: State, number: int, client: Client, op: Op) -> Steps:
    check = client.due or world.rules.identity_always
    retry = client.retry or op.retry
    reply = scripts.apply(world, state.redis, client.stamp, op, check, retry, client.expected, client.absent)
    wish = f"{op.kind} {name(op.inst)} '{op.tid}'"
    if reply.code in scripts.ADMISSION:
        due = client.due if reply.code == "NOSCRIPT" or not world.rules.first_call_checks else False
        if check and reply.code != "NOSCRIPT" and not world.rules.checked_when_answered:
            state = state._replace(clients=tuple(one._replace(due=False) for one in state.clients))
        after = _refused(client)._replace(due=due)
        if not world.rules.refusal_forgets_pin:
            after = after._replace(expected=client.expected)
        yield f"{wish}: {reply.code}", put_client(state, number, after)
        return
    client = client._replace(due=False)
    if reply.code == "OK":
        entry = reply.entry
        assert entry is not None
        p = world.home[op.inst]
        if state.ghost.untrue[p] and "P8" in world.asserted:
            raise Violation(
                "P8", f"{wish} is accepted as v{entry.version}, on a Redis that lost data and was not reconciled"
            )
        ghost = state.ghost._replace(applied=state.ghost.applied | {(op.inst, entry.version, op.tid)})
        state = state._replace(redis=reply.redis, ghost=ghost)
        if state.budget.lost_reply:
            budget = state.budget._replace(lost_reply=state.budget.lost_reply - 1)
            lost = put_client(state._replace(budget=budget), number, client._replace(retry=True, absent=ZERO))
            yield f"{wish}: written as v{entry.version} ({id_text(entry.id)}), the reply is lost", lost
        done = next_op(client)
        if op.durable:
            done = client._replace(pc="wait", held=(entry.id, entry.version), retry=False, expected=0, absent=ZERO)
        yield f"{wish}: OK v{entry.version} ({id_text(entry.id)})", put_client(state, number, done)
    elif reply.code == "MISS":
        client = client._replace(pc="lookup", held=(reply.evicted_to,), absent=ZERO)
        yield f"{wish}: MISS, evicted_to {id_text(reply.evicted_to)}", put_client(state, number, client)
    elif reply.code == "OLD":
        yield (
            f"{wish}: OLD",
            put_client(state, number, client._replace(pc="find log", held=(_version(state, world, op),))),
        )
    elif reply.code == "PARKED":
        yield f"{wish}: PARKED", put_client(state, number, client._replace(pc="parked", held=()))
    elif reply.code == "VERSION":
        yield f"{wish}: VERSION, asked again", put_client(state, number, client._replace(expected=0))
    else:  # ABSENT, EXISTS, DUP, REFUSED: the call ends
        yield f"{wish}: {reply.code}", put_client(state, number, next_op(client))


def _version(state: State, world: World, op: Op) -> int:
    copy = state.redis.parts[world.home[op.inst]].hashes[op.inst]
    return len(cast(Hash, copy).chain)


# --- admission -----------------------------------------------------------------------------------------------------------


def _admit(world: World, state: State, number: int, client: Client, op: Op) -> Steps:
    pair = state.sql.stamp
    text = f"reads epoch {pair[0]} of owner {pair[1]} from SQL"
    if not world.rules.noscript_asks:
        yield f"{text}, loads without asking", _loaded(world, state, number, client, pair)
        return
    yield text, put_client(state, number, client._replace(pc="compare", held=(pair,)))


def _compare(world: World, state: State, number: int, client: Client, op: Op) -> Steps:
    (pair,) = cast(tuple[Stamp], client.held)
    codes = {scripts.refusal(world.rules, state.redis, p, pair) for p in range(len(state.redis.parts))}
    if codes == {""}:
        yield "the server is the one recorded", put_client(state, number, client._replace(pc="load"))
    else:
        yield "the server is not admitted, waits", put_client(state, number, client._replace(pc="admit", held=()))


def _load(world: World, state: State, number: int, client: Client, op: Op) -> Steps:
    (pair,) = cast(tuple[Stamp], client.held)
    yield f"loads the scripts of epoch {pair[0]}", _loaded(world, state, number, client, pair)


def _loaded(world: World, state: State, number: int, client: Client, pair: Stamp) -> State:
    redis = state.redis._replace(cache=state.redis.cache | {pair})
    pin = 0 if world.rules.refusal_forgets_pin else client.expected
    client = _again(client)._replace(stamp=pair, due=world.rules.first_call_checks, expected=pin)
    return put_client(state._replace(redis=redis), number, client)


# --- cold instances ------------------------------------------------------------------------------------------------------


def _lookup(world: World, state: State, number: int, client: Client, op: Op) -> Steps:
    (evicted_to,) = cast(tuple[Id], client.held)
    saved = state.sql.saved[op.inst]
    watermark = state.sql.parts[world.home[op.inst]].watermark
    if world.rules.lookup_snapshot == "checkpoint first":
        held = client._replace(pc="lookup 2", held=(evicted_to, saved))
        yield f"reads checkpoint v{saved.version} from SQL", put_client(state, number, held)
    elif world.rules.lookup_snapshot == "watermark first":
        held = client._replace(pc="lookup 2", held=(evicted_to, watermark))
        yield f"reads watermark {id_text(watermark)} from SQL", put_client(state, number, held)
    else:
        text, client = _found(world, client, op, evicted_to, saved, watermark)
        yield text, put_client(state, number, client)


def _lookup_2(world: World, state: State, number: int, client: Client, op: Op) -> Steps:
    evicted_to, other = client.held
    saved = state.sql.saved[op.inst]
    watermark = state.sql.parts[world.home[op.inst]].watermark
    if isinstance(other, Saved):
        saved = other
    else:
        watermark = cast(Id, other)
    text, client = _found(world, client, op, cast(Id, evicted_to), saved, watermark)
    yield text, put_client(state, number, client)


def _found(world: World, client: Client, op: Op, evicted_to: Id, saved: Saved, watermark: Id) -> tuple[str, Client]:
    """What a look-up in SQL leads to."""
    text = f"SQL has {name(op.inst)} v{saved.version}, watermark {id_text(watermark)}"
    if world.rules.evicted_to and watermark < evicted_to:
        return f"{text}: older than Redis, waits", _again(client)
    if saved.version:
        return text, client._replace(pc="hydrate", held=(saved, watermark))
    if saved.letters or op.kind != "start":
        return f"{text}: the call ends", next_op(client)
    return text, client._replace(pc="apply", absent=watermark, held=())


def _hydrate(world: World, state: State, number: int, client: Client, op: Op) -> Steps:
    saved, watermark = cast(tuple[Saved, Id], client.held)
    stamp = client.stamp if world.rules.stamp_held else state.sql.stamp
    p = world.home[op.inst]
    reply = scripts.hydrate(world, state.redis, p, stamp, op.inst, saved, watermark)
    after = _refused(client) if reply.code in scripts.ADMISSION else _again(client)._replace(stamp=stamp)
    text = f"hydrates {name(op.inst)} v{saved.version} (epoch {stamp[0]}): {reply.code}"
    yield text, put_client(state._replace(redis=reply.redis), number, after)


# --- parked, old, durable ------------------------------------------------------------------------------------------------


def _parked(world: World, state: State, number: int, client: Client, op: Op) -> Steps:
    saved = state.sql.saved[op.inst]
    if saved.letters:
        yield "SQL has open letters: the call ends", put_client(state, number, next_op(client))
        return
    watermark = state.sql.parts[world.home[op.inst]].watermark
    yield "SQL has no open letter", put_client(state, number, client._replace(pc="unpark", held=(watermark,)))


def _unpark(world: World, state: State, number: int, client: Client, op: Op) -> Steps:
    (watermark,) = cast(tuple[Id], client.held)
    stamp = client.stamp if world.rules.stamp_held else state.sql.stamp
    reply = scripts.evict(world, state.redis, world.home[op.inst], stamp, op.inst, 0, watermark, unpark=True)
    after = _refused(client) if reply.code in scripts.ADMISSION else _again(client)
    if reply.code == "KEPT":
        after = next_op(client)
    text = f"drops the parked {name(op.inst)}: {reply.code}"
    yield text, put_client(state._replace(redis=reply.redis), number, after)


def _find_log(world: World, state: State, number: int, client: Client, op: Op) -> Steps:
    p = world.home[op.inst]
    behind = state.sql.parts[p].watermark if world.rules.find_from_sql_watermark else None
    code, tids = scripts.find(state.redis, world.rules, p, client.stamp, op.inst, behind)
    if code and code != "OK" and world.rules.find_refusal_restarts:
        yield f"looks for '{op.tid}' in the log: {code}", put_client(state, number, _refused(client))
    elif op.tid in tids:
        yield f"finds '{op.tid}' in the log: a repetition", put_client(state, number, next_op(client))
    else:
        yield f"does not find '{op.tid}' in the log ({code})", put_client(state, number, client._replace(pc="find sql"))


def _find_sql(world: World, state: State, number: int, client: Client, op: Op) -> Steps:
    (version,) = cast(tuple[int], client.held)
    saved = state.sql.saved[op.inst]
    known = {row.tid for row in saved.history if row.tid != RECONCILED}
    if world.rules.find_in_letters:
        known |= {letter.tid for letter in saved.letters}
    if op.tid in known:
        yield f"finds '{op.tid}' in SQL: a repetition", put_client(state, number, next_op(client))
    else:
        after = client._replace(pc="apply", expected=version, held=())
        yield f"does not find '{op.tid}' in SQL: expects v{version}", put_client(state, number, after)


def _wait(world: World, state: State, number: int, client: Client, op: Op) -> Steps:
    id, version = cast(tuple[Id, int], client.held)
    saved, watermark = state.sql.saved[op.inst], state.sql.parts[world.home[op.inst]].watermark
    has_row = any(row.version == version and row.tid == op.tid for row in saved.history)
    durable = has_row if world.rules.durable_by_row else watermark >= id
    if durable:
        if not has_row:
            raise Violation("P7", f"'{op.tid}' of {name(op.inst)} is acknowledged as durable, and SQL does not have it")
        yield f"'{op.tid}' is durable", put_client(state, number, next_op(client))
    elif watermark >= id:
        yield f"'{op.tid}' is parked or lost: an error", put_client(state, number, next_op(client))


def excuse(ghost: Ghost, gone: frozenset[tuple[int, int, str]]) -> Ghost:
    """Transitions that are gone and that a report covers."""
    return ghost._replace(applied=ghost.applied - gone, excused=ghost.excused + len(gone & ghost.applied))


_STEPS = {
    "apply": _apply,
    "admit": _admit,
    "compare": _compare,
    "load": _load,
    "lookup": _lookup,
    "lookup 2": _lookup_2,
    "hydrate": _hydrate,
    "parked": _parked,
    "unpark": _unpark,
    "find log": _find_log,
    "find sql": _find_sql,
    "wait": _wait,
}

__all__ = ["Step", "excuse", "next_op", "put_client", "steps"]
