"""The promises as predicates of a state. What is broken by one step alone is raised by that step (see ``Violation``).

Broken by a step: P4, P5 and P3 in history (a row that is there, a gap, an id twice: ``tables``), P6 (a commit or a fence of
an older epoch), P7 (a durable acknowledgement without its row), P8 (an accepted write on a Redis that has lost something
since the fence of the recovery that opened it), P10, P11 (an entry trimmed, a hash evicted that SQL does not have), P9 when
a partition is opened.

Here, for every partition that is ready and, as far as the ghost knows, true, and whose SQL did not go back since:

- P3, coherence ("verify"): an instance's line is its checkpoint, then its letters, then the log's entries behind the
  watermark. Versions go on one by one, and a hash's data are that line (a parked hash takes no writes and may be stale until
  it is dropped). An instance that SQL or the log knows and that has no hash is only possible where ``cold`` says so and, if
  entries of it are unflushed, hydration is refused (``evicted_to``).
- P4: no transition id twice in a line.
- P9: every accepted transition is in history (or in a reconciled range), in letters, or in the log behind the watermark.

A restored SQL that nobody has noticed yet is judged where the log still reaches its watermark.
"""

from __future__ import annotations

from tests.model import scripts
from tests.model.state import (
    MARK,
    UNKNOWN,
    Entry,
    Ghost,
    Meta,
    Part,
    Redis,
    Saved,
    Sql,
    State,
    Violation,
    chain_text,
    entry_text,
    id_text,
    name,
)
from tests.model.world import World

Judged = dict[tuple[Redis, Sql, Ghost], str]


def check(world: World, state: State) -> None:
    """Raise a ``Violation`` if the state breaks a promise."""
    for p, part in enumerate(state.redis.parts):
        ghost = state.ghost
        meta = part.meta
        if meta is None or not meta.ready or ghost.untrue[p]:
            continue
        if ghost.restored[p] and meta.stamp != state.sql.stamp:
            continue  # SQL went back to another epoch: whoever asks it next asks for a recovery
        tail = _unflushed(world, state, p)
        if tail is None:
            continue
        for inst, home in enumerate(world.home):
            if home == p:
                _coherent(state.sql.saved[inst], part, meta, inst, tail)
        if not ghost.restored[p] and "P9" in world.asserted:
            gone = nowhere(world, state, p)
            if gone:
                one = min(gone)
                raise Violation(
                    "P9", f"{name(one[0])} v{one[1]}={one[2]} was acknowledged and is nowhere; no report says so"
                )


def _unflushed(world: World, state: State, p: int) -> list[Entry] | None:
    """The log behind SQL's watermark; None where it has a hole (SQL went back): the flusher stops there and asks for a
    recovery, and has a check of its own that this recovery can mend it."""
    part, watermark = state.redis.parts[p], state.sql.parts[p].watermark
    tail = [entry for entry in part.log if entry.id > watermark]
    for entry in tail:
        if not scripts.follows(world.rules, entry, watermark):
            return None
        watermark = entry.id
    return tail


def _coherent(saved: Saved, part: Part, meta: Meta, inst: int, tail: list[Entry]) -> None:
    mine = [entry for entry in tail if entry.inst == inst]
    copy = part.hashes[inst]
    if any(letter.kind in ("diverged", "incomplete") for letter in saved.letters):
        if copy is not None and not copy.parked and len(copy.chain) <= saved.version:
            raise Violation(
                "P3", f"{name(inst)} {chain_text(copy.chain)} is open to writes, its letters {saved.letters} are ahead"
            )
        return
    line = saved.chain
    for letter in sorted(saved.letters):
        if letter.version != len(line) + 1:
            raise Violation("P3", f"letter v{letter.version} of {name(inst)} stands behind {chain_text(line)}")
        line = (*line, letter.tid)
    for entry in mine:
        if entry.version != len(line) + 1:
            raise Violation(
                "P3", f"the log's {entry_text(entry)} stands behind {chain_text(line)} of SQL and log: a fork or a gap"
            )
        line = (*line, entry.tid)
    known = [tid for tid in line if tid != UNKNOWN]
    if len(set(known)) != len(known):
        raise Violation("P4", f"{name(inst)} is {chain_text(line)}: a call was applied twice")
    if copy is None:
        if line and not meta.cold:
            raise Violation(
                "P3",
                f"{name(inst)} {chain_text(line)} has no hash and meta says that nothing is cold: a start would fork",
            )
        if mine and meta.evicted_to < mine[-1].id:
            raise Violation(
                "P3",
                f"{name(inst)} {chain_text(line)} has no hash, and an older one could be hydrated: {entry_text(mine[-1])}",
            )
    elif copy.chain != line and UNKNOWN not in line and not (copy.parked and not mine):
        raise Violation(
            "P3", f"{name(inst)} is {chain_text(copy.chain)} in its hash, {chain_text(line)} in SQL and log: a fork"
        )


def nowhere(world: World, state: State, p: int) -> frozenset[tuple[int, int, str]]:
    """Accepted transitions of a partition that are neither in SQL nor in the log behind the watermark."""
    watermark = state.sql.parts[p].watermark
    logged = {(entry.inst, entry.version, entry.tid) for entry in state.redis.parts[p].log if entry.id > watermark}
    return frozenset(
        one for one in state.ghost.applied
        if world.home[one[0]] == p and one not in logged and not state.sql.saved[one[0]].knows(one[1], one[2])
    )  # fmt: skip


def check_sql(world: World, sql: Sql, ghost: Ghost) -> None:
    """What must hold in SQL alone: history is 1..n, and the checkpoint is its fold (P3); reports never exaggerate (P9)."""
    for inst, saved in enumerate(sql.saved):
        version = 0
        for row in saved.history:
            if row.covers_from != version + 1:
                raise Violation("P3", f"history of {name(inst)} goes from v{version} to v{row.covers_from}")
            version = row.version
            if (
                row.covers_from == row.version
                and row.tid != "@reconciled"
                and saved.chain[version - 1 : version] != (row.tid,)
            ):
                raise Violation(
                    "P3", f"{name(inst)} has {row.tid} at v{version} in history, its checkpoint says {saved.chain}"
                )
        if version != saved.version:
            raise Violation(
                "P3", f"history of {name(inst)} ends at v{version}, its checkpoint is {chain_text(saved.chain)}"
            )


def exaggerated(world: World, state: State) -> None:
    """Raise if the reports count more lost transitions than were lost."""
    if any(state.ghost.restored):
        return
    lost = state.ghost.excused + sum(len(nowhere(world, state, p)) for p in range(len(state.sql.parts)))
    if state.sql.lost > lost:
        raise Violation("P9", f"the reports count {state.sql.lost} lost transitions, {lost} are")


__all__ = ["MARK", "check", "check_sql", "exaggerated", "id_text", "nowhere"]
