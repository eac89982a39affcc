"""Where explorations start: a store in epoch 1, with instances as a world wants them.

Starting with a history already made keeps the interesting steps near the start. The builders write what the protocol would
have written; ``explore`` judges the start like every other state.
"""

from __future__ import annotations

from dataclasses import dataclass

from tests.model.state import (
    IDLE_EVICTOR,
    IDLE_FLUSHER,
    MARK,
    NOBODY,
    UNUSED_RECOVERER,
    ZERO,
    Budget,
    Chain,
    Client,
    Entry,
    Ghost,
    Hash,
    Id,
    Letter,
    Meta,
    Operator,
    Part,
    Redis,
    Row,
    Saved,
    Sql,
    SqlPart,
    State,
)


@dataclass(frozen=True, slots=True)
class Seed:
    """An instance at the start: the chain that SQL has, what the log has more, and whether a hash is there."""

    saved: Chain = ()
    unflushed: Chain = ()
    hot: bool = True
    letters: Chain = ()


def start(
    budget: Budget,
    *,
    seeds: tuple[Seed, ...] = (Seed(),),
    home: tuple[int, ...] = (0,),
    clients: int = 1,
    flushers: int = 0,
    evictors: int = 0,
    recoverers: int = 0,
    operator: int = 0,
    ring: int = 2,
    retained: bool = True,
) -> State:
    """Epoch 1, ready, every client admitted. Entries are numbered instance by instance, flushed ones first.

    ``retained``: the log still has what is flushed; otherwise it is trimmed to the witness.
    """
    stamp = (1, 1)
    parts, rows = [], []
    saved: list[Saved] = [Saved((), (), (), ZERO, ()) for _ in seeds]
    hashes: list[Hash | None] = [None for _ in seeds]
    for p in range(max(home) + 1):
        mine = [inst for inst, where in enumerate(home) if where == p]
        log = [Entry((1, 0), MARK, 0, "", ZERO, 1)]
        for inst in mine:
            for number, tid in enumerate(seeds[inst].saved + seeds[inst].letters, 1):
                log.append(Entry((1, len(log)), inst, number, tid))
            saved[inst] = _saved(seeds[inst], tuple(entry for entry in log if entry.inst == inst), ring)
        watermark = log[-1].id
        for inst in mine:
            flushed = len(seeds[inst].saved + seeds[inst].letters)
            for number, tid in enumerate(seeds[inst].unflushed, flushed + 1):
                log.append(Entry((1, len(log)), inst, number, tid))
        evicted_to: Id = ZERO
        cold = False
        for inst in mine:
            seed = seeds[inst]
            chain = seed.saved + seed.letters + seed.unflushed
            last = max((entry.id for entry in log if entry.inst == inst), default=ZERO)
            if not chain:
                continue
            if seed.hot:
                hashes[inst] = Hash(chain, last, chain[-ring:], bool(seed.letters))
            else:
                cold, evicted_to = True, max(evicted_to, last)
        kept = tuple(entry for entry in log if retained or entry.id >= watermark)
        meta = Meta(1, 1, True, 1, watermark, cold, evicted_to)
        own = tuple(copy if home[inst] == p else None for inst, copy in enumerate(hashes))
        parts.append(Part(meta, log[-1].id, kept, own))
        rows.append(SqlPart(1, 1, watermark, log[-1].id))
    redis = Redis(1, frozenset({stamp}), tuple(parts))
    sql = Sql(1, 1, 1, tuple(rows), tuple(saved), frozenset({stamp}), 0)
    applied = frozenset(
        (inst, version, tid)
        for inst, seed in enumerate(seeds)
        for version, tid in enumerate(seed.saved + seed.letters + seed.unflushed, 1)
    )
    no = tuple(False for _ in parts)
    return State(
        redis, sql,
        redis.parts if budget.restart or budget.detour else None,
        sql if budget.restore else None,
        tuple(Client("apply", 0, stamp, False, False, 0, ZERO, ()) for _ in range(clients)),
        (IDLE_FLUSHER,) * flushers,
        (IDLE_EVICTOR,) * evictors,
        Operator("idle", 0, NOBODY, False, ZERO, operator),
        (UNUSED_RECOVERER,) * recoverers,
        budget,
        Ghost(applied, 0, no, no, 0, 0, 1),
    )  # fmt: skip


def _saved(seed: Seed, entries: tuple[Entry, ...], ring: int) -> Saved:
    history = tuple(Row(version, tid, version) for version, tid in enumerate(seed.saved, 1))
    kinds = ("refused", *["waiting"] * len(seed.letters))
    letters = tuple(
        Letter(entry.version, entry.id, entry.tid, kind)
        for entry, kind in zip(entries[len(seed.saved) :], kinds, strict=False)
    )
    entry_id = entries[len(seed.saved) - 1].id if seed.saved else ZERO
    return Saved(history, seed.saved, seed.saved[-ring:], entry_id, letters)


def rolled_back(now: State, older: State) -> State:
    """The state after a restart that lost what Redis had since ``older``; its script cache is empty."""
    redis = older.redis._replace(identity=now.redis.identity + 1, cache=frozenset())
    untrue = tuple(True for _ in redis.parts)
    clients = tuple(client._replace(due=True) for client in now.clients)
    ghost = now.ghost._replace(untrue=untrue, losses=now.ghost.losses + 1)
    return now._replace(redis=redis, clients=clients, ghost=ghost)


def sql_restored(now: State, older: State) -> State:
    """The state after SQL was restored to what it was in ``older``."""
    restored = tuple(True for _ in now.redis.parts)
    return now._replace(sql=older.sql, ghost=now.ghost._replace(restored=restored, restores=now.ghost.restores + 1))


def backed_up(now: State, older: State) -> State:
    """The same state, with ``older`` as SQL's backup."""
    return now._replace(backup=older.sql)


def saved_on_disk(now: State, older: State) -> State:
    """The same state, with ``older`` as what Redis goes back to."""
    return now._replace(disk=older.redis.parts)
