"""What happens to the servers, each within its budget.

Redis: ``save`` remembers the data as they are (an append-only file's last fsync, a replica's state, a snapshot); a later
fault goes back to the last save, or to the start of the exploration if there was none.

===========  ==========  =============  ===========  ============  ==================================================
fault        data        identity       scripts      connections   stands for
===========  ==========  =============  ===========  ============  ==================================================
restart      last save   new            gone         new           restart, failover to a replica (tail lost or, if
                                                                   saved just before, not)
wipe         none        new            gone         new           restart without persistence
flushall     none        same           kept         kept          FLUSHALL
detour       last save   new            kept         kept          demoted, re-synced from one without the tail, promoted
migrate      kept        new            gone / kept  kept          slot migration: the target may know the scripts already,
                                                                   as it serves other partitions of the same stamp
===========  ==========  =============  ===========  ============  ==================================================

``back``: the slot goes back to the server where it was at the start, which still knows its scripts and has its old identity.

SQL: ``backup`` and ``restore`` of the whole database; a restore ends open transactions.
"""

from __future__ import annotations

from tests.model.state import (
    IDLE_FLUSHER,
    ZERO,
    Budget,
    Part,
    State,
    Steps,
)
from tests.model.world import World


def steps(world: World, state: State) -> Steps:
    for text, after in _steps(world, state):
        yield text, _forget_copies(after)


def _forget_copies(state: State) -> State:
    """A copy that nothing can go back to any more only makes states different."""
    budget = state.budget
    if state.disk is not None and not budget.restart and not budget.detour:
        state = state._replace(disk=None)
    if state.backup is not None and not budget.restore:
        state = state._replace(backup=None)
    return state


def _steps(world: World, state: State) -> Steps:
    budget = state.budget
    if budget.save and state.disk != state.redis.parts:
        yield "Redis is saved", state._replace(disk=state.redis.parts, budget=budget._replace(save=budget.save - 1))
    yield from _losses(world, state, budget)
    if budget.migrate:
        spent = budget._replace(migrate=budget.migrate - 1)
        redis = state.redis._replace(identity=_new_identity(state))
        yield "the slot migrates, to a server that knows the scripts", state._replace(redis=redis, budget=spent)
        redis = redis._replace(cache=frozenset())
        yield "the slot migrates", state._replace(redis=redis, budget=spent)
    if budget.back and state.redis.identity != world.start.redis.identity:
        first = world.start.redis
        redis = state.redis._replace(identity=first.identity, cache=first.cache)
        spent = budget._replace(back=budget.back - 1)
        if not world.rules.away_loses_nothing or not any(state.ghost.untrue):
            yield "the slot migrates back", state._replace(redis=redis, budget=spent)
    yield from _sql(world, state, budget)


def _new_identity(state: State) -> int:
    """Identities are never used twice: each fault that gives a new one counts on."""
    return state.redis.identity + 1


def _losses(world: World, state: State, budget: Budget) -> Steps:
    saved = state.disk or ()
    if budget.restart:
        after = _lose(world, state, saved, budget._replace(restart=budget.restart - 1), new=True, cache=False, due=True)
        yield "Redis restarts as it was saved", after
    if budget.wipe:
        after = _lose(
            world, state, _empty(state), budget._replace(wipe=budget.wipe - 1), new=True, cache=False, due=True
        )
        yield "Redis restarts empty", after
    if budget.flushall:
        spent = budget._replace(flushall=budget.flushall - 1)
        yield "FLUSHALL", _lose(world, state, _empty(state), spent, new=False, cache=True, due=None)
    if budget.detour:
        spent = budget._replace(detour=budget.detour - 1)
        due = True if world.rules.detour_takes_longer else None
        yield (
            "Redis is demoted, re-synced as it was saved, promoted",
            _lose(world, state, saved, spent, new=True, cache=True, due=due),
        )


def _empty(state: State) -> tuple[Part, ...]:
    return tuple(Part(None, ZERO, (), (None,) * len(part.hashes)) for part in state.redis.parts)


def _lose(
    world: World, state: State, parts: tuple[Part, ...], budget: Budget, *, new: bool, cache: bool, due: bool | None
) -> State:
    """Put the server back to ``parts``. ``due`` None: nobody's connection or clock tells that something happened."""
    redis = state.redis._replace(parts=parts)
    if new:
        redis = redis._replace(identity=_new_identity(state))
    if not cache:
        redis = redis._replace(cache=frozenset())
    clients = state.clients
    if due and (world.rules.first_call_checks or cache):
        clients = tuple(client._replace(due=True) for client in clients)
    ghost = state.ghost
    if parts != state.redis.parts:
        changed = [old != new_part for old, new_part in zip(state.redis.parts, parts, strict=True)]
        untrue = tuple(was or now for was, now in zip(ghost.untrue, changed, strict=True))
        ghost = ghost._replace(untrue=untrue, losses=ghost.losses + 1)
    return state._replace(redis=redis, clients=clients, ghost=ghost, budget=budget)


def _sql(world: World, state: State, budget: Budget) -> Steps:
    if budget.backup and state.backup != state.sql:
        yield "SQL is backed up", state._replace(backup=state.sql, budget=budget._replace(backup=budget.backup - 1))
    old = state.backup
    if old is None:
        return
    undone = [now.discarded != was.discarded for now, was in zip(state.sql.saved, old.saved, strict=True)]
    if any(undone) and world.rules.no_discard_since_backup:
        return
    if budget.restore and old != state.sql:
        changed = [
            old.parts[p] != state.sql.parts[p]
            or any(old.saved[inst] != state.sql.saved[inst] for inst, home in enumerate(world.home) if home == p)
            for p in range(len(old.parts))
        ]
        ghost = state.ghost._replace(
            restored=tuple(was or now for was, now in zip(state.ghost.restored, changed, strict=True)),
            restores=state.ghost.restores + 1,
        )
        flushers = tuple(IDLE_FLUSHER if flusher.pc == "open" else flusher for flusher in state.flushers)
        after = state._replace(
            sql=old, ghost=ghost, flushers=tuple(sorted(flushers)), budget=budget._replace(restore=budget.restore - 1)
        )
        yield "SQL is restored from its backup", after
