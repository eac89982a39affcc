"""The worlds with every rule on: small ones, explored completely in seconds, and large ones, for minutes, up to a bound.

``reaches`` names the steps without which an exploration would show nothing: that a class of recovery was found, that an
instance was hydrated, that somebody was refused.

Three worlds lift the assumption that a detour takes longer than the identity interval: then a write on an untrue Redis is
possible (P8 is not asserted) and everything else must still hold, by way of *diverged*.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.model.holes import INEXACT, MOVE, NEXT, NONE, START, V1, V2
from tests.model.starting import Seed, backed_up, sql_restored, start
from tests.model.state import Budget, State
from tests.model.world import Op, Rules, World

COLD = Seed(("a",), hot=False)
V3 = Seed(("a", "b", "c"))
OTHER_START, OTHER_MOVE = Op("start", 1, "e"), Op("move", 1, "f")
RIVAL_START = Op("start", 0, "c")
LAST = Op("move", 0, "d")
UNTRUE = Rules(detour_takes_longer=False)
ALWAYS = Rules(detour_takes_longer=False, identity_always=True)
POISON = frozenset("b")
TWO = (0, 0)


def world(name: str, at: State, *clients: tuple[Op, ...], **scope: Any) -> World:
    return World(name, at, clients, **scope)


def _behind(*, recoverers: int, flushers: int, budget: Budget | None = None) -> State:
    """SQL has gone back to x v1; Redis has x v3, trimmed, and y."""
    older = start(Budget(), seeds=(V1, NONE), home=TWO)
    now = start(
        budget or Budget(), seeds=(V3, Seed(("e",))), home=TWO, retained=False, flushers=flushers, recoverers=recoverers
    )
    return sql_restored(now, older) if budget is None else backed_up(now, older)


def small() -> list[World]:
    kept = backed_up(
        start(Budget(restore=1), seeds=(V2,), flushers=1, evictors=1, recoverers=1), start(Budget(), seeds=(V1,))
    )
    return [
        world("two flushers, two clients", start(Budget(kill=1), clients=2, flushers=2), (START, MOVE), (NEXT,),
              reaches=("the row changed", "is killed before it tells")),
        world("eviction and hydration", start(Budget(lost_reply=1), seeds=(V1,), clients=2, flushers=1, evictors=1),
              (MOVE,), (NEXT,), reaches=("hydrates x v1 (epoch 1): OK", "STALE", "hydrates x v1 (epoch 1): EXISTS", "DUP")),
        world("a restart anywhere", start(Budget(restart=1, save=1), clients=1, flushers=1, recoverers=1),
              (START, MOVE, NEXT), reaches=("tail lost", "intact", "NOSCRIPT")),
        world("a wipe, cold instances", start(Budget(wipe=1), seeds=(COLD,), flushers=1, evictors=1, recoverers=1),
              (MOVE, NEXT), reaches=("wiped", "hydrates x v2 (epoch 2): OK")),
        world("a detour, identity always checked", start(Budget(detour=1, save=1), flushers=1, recoverers=1),
              (START, MOVE), rules=ALWAYS, reaches=("IDENTITY", "tail lost")),
        world("a detour that takes longer", start(Budget(detour=1, save=1), flushers=1, recoverers=1), (START, MOVE),
              reaches=("IDENTITY", "tail lost")),
        world("a detour within the interval: *diverged*",
              start(Budget(detour=1), seeds=(V1,), flushers=1, recoverers=1, operator=1),
              (MOVE, NEXT), rules=UNTRUE, asserted=INEXACT - {"P8"},
              reaches=("diverged", "discards", "cannot move them")),
        world("a slot migrates", start(Budget(migrate=1), clients=1, flushers=1, recoverers=1), (START, MOVE, NEXT),
              reaches=("IDENTITY", "NOSCRIPT", "intact")),
        world("SQL restored, the log reaches", kept, (NEXT,), reaches=("older than Redis", "intact")),
        world("SQL restored, the log is trimmed", _behind(recoverers=2, flushers=2), (Op("move", 0, "d"),), home=TWO,
              reaches=("mends partition 0 (SQL behind)",)),
        world("dead letters", start(Budget(kill=1), seeds=(V1, NONE), home=TWO, clients=2, flushers=1, operator=1),
              (MOVE, NEXT), (OTHER_START,), home=TWO, poison=POISON,
              reaches=("moves the letters", "discards", "is refused", "PARKED", "SQL has no open letter")),
        world("dead letters, a wipe", start(Budget(wipe=1), seeds=(V1,), flushers=1, operator=1, recoverers=1), (MOVE, NEXT),
              poison=POISON, reaches=("wiped", "PARKED", "discards")),
        world("two partitions", start(Budget(restart=1), seeds=(NONE, NONE), home=(0, 1), clients=2, flushers=1, recoverers=1),
              (START,), (OTHER_START,), home=(0, 1), reaches=("finds partition 1 tail lost", "opens partition 1")),
        world("ids that have left the ring",
              start(Budget(lost_reply=1), seeds=(V1,), clients=2, flushers=1, recoverers=1, ring=1),
              (MOVE,), (NEXT,), ring=1, reaches=("OLD", "in the log: a repetition", "in SQL: a repetition")),
        world("durable acknowledgements", start(Budget(restart=1, save=1), flushers=1, recoverers=1),
              (replace(START, durable=True), replace(MOVE, durable=True)), reaches=("is durable", "parked or lost")),
        world("two leases, two memories of folds", start(Budget(wipe=1), seeds=(V1,), flushers=2, recoverers=1), (MOVE, NEXT),
              fold_cache=True, batches=(1,), reaches=("the row changed", "wiped")),
    ]  # fmt: skip


def large() -> list[World]:
    folds = backed_up(
        start(Budget(wipe=1, restore=1), seeds=(V1,), flushers=2, recoverers=2), start(Budget(), seeds=(V1,))
    )
    return [
        world("two clients, two flushers, two evictors", start(Budget(kill=1, lost_reply=1), clients=2, flushers=2, evictors=2),
              (START, MOVE), (NEXT,)),
        world("two clients, a restart anywhere", start(Budget(restart=1, save=1), clients=2, flushers=1, recoverers=1),
              (START, MOVE), (RIVAL_START,)),
        world("two recoverers, a restart anywhere", start(Budget(restart=1, save=1), flushers=1, recoverers=2), (START, MOVE)),
        world("two losses, three recoverers", start(Budget(restart=2, save=2), flushers=1, recoverers=3), (START, MOVE, NEXT),
              asserted=INEXACT),
        world("FLUSHALL, cold instances", start(Budget(flushall=1), seeds=(COLD,), flushers=1, evictors=1, recoverers=2),
              (MOVE, NEXT), asserted=INEXACT),
        world("two clients, a detour, always checked", start(Budget(detour=1, save=1), clients=2, flushers=1, recoverers=1),
              (START, MOVE), (NEXT,), rules=ALWAYS),
        world("two clients, a detour, interval", start(Budget(detour=1, save=1), clients=2, flushers=1, recoverers=1),
              (START, MOVE), (NEXT,)),
        world("a detour and FLUSHALL", start(Budget(detour=1, save=1, flushall=1), flushers=1, recoverers=2), (START, MOVE),
              asserted=INEXACT),
        world("*diverged*, two clients, two recoverers",
              start(Budget(detour=1, save=1), seeds=(V1, NONE), home=TWO, clients=2, flushers=1, recoverers=2, operator=1),
              (MOVE, NEXT), (OTHER_START,), home=TWO, rules=UNTRUE, asserted=INEXACT - {"P8"}),
        world("*diverged* behind dead letters",
              start(Budget(detour=1, save=1), seeds=(V1,), flushers=1, recoverers=2, operator=1),
              (MOVE, NEXT, LAST), rules=UNTRUE, asserted=INEXACT - {"P8"}, poison=POISON),
        world("a slot migrates, then a restart", start(Budget(migrate=1, restart=1, save=1), flushers=1, recoverers=2),
              (START, MOVE)),
        world("SQL backed up and restored", start(Budget(backup=1, restore=1), flushers=1, recoverers=2), (START, MOVE)),
        world("SQL restored, two evictors",
              start(Budget(backup=1, restore=1), seeds=(V1,), clients=2, flushers=1, evictors=2, recoverers=1),
              (MOVE,), (NEXT,)),
        world("a restart, SQL restored", start(Budget(restart=1, save=1, backup=1, restore=1), flushers=1, recoverers=3),
              (START, MOVE), asserted=INEXACT),
        world("a wipe, SQL restored, cold instances",
              start(Budget(wipe=1, backup=1, restore=1), seeds=(COLD,), flushers=1, evictors=1, recoverers=2), (MOVE, NEXT),
              asserted=INEXACT),
        world("SQL restored and trimmed, a restart",
              _behind(recoverers=3, flushers=1, budget=Budget(restore=1, restart=1, save=1)), (LAST,), home=TWO,
              asserted=INEXACT),
        world("two leases, a wipe, SQL restored", folds, (MOVE, NEXT), fold_cache=True, batches=(1,), asserted=INEXACT),
        world("dead letters, a restart",
              start(Budget(restart=1, save=1), seeds=(V1,), flushers=1, operator=1, recoverers=1), (MOVE, NEXT), poison=POISON,
              asserted=INEXACT),
        world("dead letters, a restart, two instances",
              start(Budget(restart=1, save=1), seeds=(V1, NONE), home=TWO, flushers=1, operator=2, recoverers=1),
              (MOVE, OTHER_START, NEXT), home=TWO, poison=POISON, asserted=INEXACT),
        world("dead letters, SQL restored",
              start(Budget(backup=1, restore=1), seeds=(V1,), flushers=1, operator=1, recoverers=2), (MOVE, NEXT, LAST),
              poison=POISON, asserted=INEXACT),
        world("two partitions, a restart anywhere",
              start(Budget(restart=1, save=1), seeds=(NONE, NONE), home=(0, 1), clients=2, flushers=1, recoverers=2),
              (START, MOVE), (OTHER_START, OTHER_MOVE), home=(0, 1)),
        world("old ids, evicted, a restart",
              start(Budget(lost_reply=1, restart=1, save=1), seeds=(V1,), clients=2, flushers=1, evictors=1, recoverers=1,
                    ring=1),
              (MOVE,), (NEXT,), ring=1),
    ]  # fmt: skip


__all__ = ["large", "small"]
