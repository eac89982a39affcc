"""The nemesis: a seeded plan of faults, and how each is done and undone.

A plan is made before the round begins, in its own time: (when, which fault, how long, a seed of its own), never two at once
on one victim. So a seed gives the same faults in the same order, whatever the machine's speed; what they hit differs a little
from run to run.
"""

from __future__ import annotations

import contextlib
import random
import signal
import time
from collections import Counter
from collections.abc import Callable

import msgspec
import redis

from statecache.core import keys
from tests.chaos.stage import NAMESPACE, PARTITIONS, Player, Stage


class Fault(msgspec.Struct, frozen=True):
    """One kind of fault. ``begin`` does it; ``end``, so many seconds later, undoes it."""

    name: str
    victim: str
    seconds: tuple[float, float]
    weight: float
    begin: Callable[[Stage, random.Random], None]
    end: Callable[[Stage, random.Random], None] = lambda stage, dice: None
    only: str = ""
    """``sqlite``, ``postgres`` or ``aof``: where it makes sense."""


class Planned(msgspec.Struct, frozen=True):
    at_seconds: float
    fault: Fault
    for_seconds: float
    seed: int


# --- the server --------------------------------------------------------------------------------------------------------


def _kill_server(stage: Stage, dice: random.Random) -> None:
    stage.redis.kill()


def _start_server(stage: Stage, dice: random.Random) -> None:
    stage.redis.start()


def _truncate(stage: Stage, dice: random.Random) -> None:
    """Cut the end off the append-only file: a power loss, as far as the server can tell."""
    stage.redis.kill()
    path = stage.redis.aof_path
    size = path.stat().st_size
    cut = dice.randint(1, dice.choice([200, 5_000, 60_000]))
    with path.open("r+b") as file:
        file.truncate(max(0, size - cut))


def _swap_snapshot(stage: Stage, dice: random.Random) -> None:
    stage.redis.kill()
    stage.swap_snapshot()


def _wipe(stage: Stage, dice: random.Random) -> None:
    stage.redis.kill()
    stage.redis.wipe()


def _pause_server(stage: Stage, dice: random.Random) -> None:
    stage.redis.pause()


def _resume_server(stage: Stage, dice: random.Random) -> None:
    stage.redis.resume()


def _flushall(stage: Stage, dice: random.Random) -> None:
    with stage.redis.client() as connection:
        connection.flushall()


def _script_flush(stage: Stage, dice: random.Random) -> None:
    with stage.redis.client() as connection:
        connection.script_flush(dice.choice(["SYNC", "ASYNC"]))


def _fill_memory(stage: Stage, dice: random.Random) -> None:
    with stage.redis.client() as connection:
        used = int(connection.info("memory")["used_memory"])
        connection.config_set("maxmemory", used + dice.choice([1, 30_000]))


def _free_memory(stage: Stage, dice: random.Random) -> None:
    with stage.redis.client() as connection:
        connection.config_set("maxmemory", 0)


def _snapshot(stage: Stage, dice: random.Random) -> None:
    stage.take_snapshot()


def _write_garbage(stage: Stage, dice: random.Random) -> None:
    """Somebody writes to a log what statecache never would: it must not stop the partition (P10)."""
    keyspace = keys.Keyspace(NAMESPACE, PARTITIONS)
    partition = dice.randrange(PARTITIONS)
    with stage.redis.client() as connection:
        epoch = connection.hget(keyspace.meta(partition), "epoch")
        if epoch is not None and connection.exists(keyspace.log(partition)):
            connection.xadd(keyspace.log(partition), {"e": "garbage"}, id=f"{epoch}-*")
            stage.foreign += 1


# --- the network -------------------------------------------------------------------------------------------------------


def _cut(stage: Stage, dice: random.Random) -> None:
    stage.link.cut()


def _refuse(stage: Stage, dice: random.Random) -> None:
    stage.link.refuse()


def _delay(stage: Stage, dice: random.Random) -> None:
    stage.link.delay(dice.uniform(0.005, 0.2))


def _hold(stage: Stage, dice: random.Random) -> None:
    stage.link.hold()


def _swallow(stage: Stage, dice: random.Random) -> None:
    stage.link.drop_replies_after_forwarding(dice.randint(1, 6), matching=b"EVALSHA")


def _lose(stage: Stage, dice: random.Random) -> None:
    stage.link.cut_before_forwarding(dice.randint(1, 6), matching=b"EVALSHA")


def _pass_through(stage: Stage, dice: random.Random) -> None:
    stage.link.pass_through()


# --- SQL ---------------------------------------------------------------------------------------------------------------


def _sql_away(stage: Stage, dice: random.Random) -> None:
    stage.database.away()


def _sql_back(stage: Stage, dice: random.Random) -> None:
    stage.database.back()


def _sql_kill(stage: Stage, dice: random.Random) -> None:
    stage.database.kill()


def _sql_cut(stage: Stage, dice: random.Random) -> None:
    assert stage.database.link is not None
    stage.database.link.cut()


def _sql_delay(stage: Stage, dice: random.Random) -> None:
    assert stage.database.link is not None
    stage.database.link.delay(dice.uniform(0.005, 0.1))


def _sql_swallow_commit(stage: Stage, dice: random.Random) -> None:
    """COMMIT is done, and whoever sent it never hears."""
    assert stage.database.link is not None
    stage.database.link.drop_replies_after_forwarding(dice.randint(1, 3), matching=b"COMMIT")


def _sql_pass_through(stage: Stage, dice: random.Random) -> None:
    assert stage.database.link is not None
    stage.database.link.pass_through()


def _sql_copy(stage: Stage, dice: random.Random) -> None:
    stage.database.copy()


def _sql_restore(stage: Stage, dice: random.Random) -> None:
    stage.restore_sql()


# --- the players -------------------------------------------------------------------------------------------------------


def _one(stage: Stage, dice: random.Random, role: str) -> Player:
    return stage.players[dice.choice(sorted(place for place in stage.players if place.startswith(role)))]


def _kill(role: str) -> Callable[[Stage, random.Random], None]:
    def begin(stage: Stage, dice: random.Random) -> None:
        player = _one(stage, dice, role)
        if player.process.alive:
            player.kill()

    return begin


def _replace(role: str) -> Callable[[Stage, random.Random], None]:
    """Start a successor of the one that ``_kill(role)`` killed with the same dice."""

    def end(stage: Stage, dice: random.Random) -> None:
        player = _one(stage, dice, role)
        place = next(place for place, found in stage.players.items() if found is player)
        if not player.process.alive:
            stage.cast(player.orders.role, place, dice.getrandbits(32))

    return end


def _pause(role: str) -> Callable[[Stage, random.Random], None]:
    def begin(stage: Stage, dice: random.Random) -> None:
        player = _one(stage, dice, role)
        if player.process.alive:
            player.pause()

    return begin


def _resume(role: str) -> Callable[[Stage, random.Random], None]:
    def end(stage: Stage, dice: random.Random) -> None:
        player = _one(stage, dice, role)
        if player.process.alive:
            player.resume()

    return end


def _pause_all(stage: Stage, dice: random.Random) -> None:
    """No flusher works (but the writers that wait for durability help themselves): the tail at risk grows."""
    for place, player in stage.players.items():
        if place.startswith("flusher") and player.process.alive:
            player.pause()


def _resume_all(stage: Stage, dice: random.Random) -> None:
    for place, player in stage.players.items():
        if place.startswith("flusher") and player.process.alive:
            player.resume()


def _recover_and(act: str) -> Callable[[Stage, random.Random], None]:
    """Tell a recoverer to recover, and hit it at some point of its work."""

    def begin(stage: Stage, dice: random.Random) -> None:
        player = _one(stage, dice, "recoverer")
        if not player.process.alive:
            return
        player.process.send(signal.SIGUSR1)
        time.sleep(0.05 + dice.uniform(0.0, 0.06))
        if act == "kill":
            player.kill()
        else:
            player.pause()

    return begin


FAULTS = (
    Fault("server killed", "redis", (0.0, 0.8), 3, _kill_server, _start_server),
    Fault("server paused", "redis", (0.1, 2.5), 2, _pause_server, _resume_server),
    Fault("append-only file cut", "redis", (0.0, 0.3), 3, _truncate, _start_server, "aof"),
    Fault("snapshot taken", "redis", (0.0, 0.0), 1.5, _snapshot),
    Fault("older snapshot swapped in", "redis", (0.0, 0.3), 2, _swap_snapshot, _start_server),
    Fault("FLUSHALL", "redis", (0.0, 0.0), 2, _flushall),
    Fault("data folder deleted", "redis", (0.0, 0.3), 1.5, _wipe, _start_server),
    Fault("SCRIPT FLUSH", "redis", (0.0, 0.0), 1, _script_flush),
    Fault("memory full", "redis", (0.3, 1.5), 1.5, _fill_memory, _free_memory),
    Fault("garbage in a log", "redis", (0.0, 0.0), 1, _write_garbage),
    Fault("connections cut", "link", (0.0, 0.0), 2, _cut),
    Fault("connections refused", "link", (0.1, 1.0), 1, _refuse, _pass_through),
    Fault("network slow", "link", (0.3, 1.5), 1, _delay, _pass_through),
    Fault("network black hole", "link", (0.2, 2.0), 1.5, _hold, _pass_through),
    Fault("replies swallowed", "link", (0.3, 0.8), 2, _swallow, _pass_through),
    Fault("requests lost", "link", (0.3, 0.8), 1, _lose, _pass_through),
    Fault("SQL away", "sql", (0.2, 2.5), 2, _sql_away, _sql_back),
    Fault("SQL killed", "sql", (0.0, 1.0), 1.5, _sql_kill, _sql_back, "postgres"),
    Fault("SQL connections cut", "sql", (0.0, 0.0), 1.5, _sql_cut, only="postgres"),
    Fault("SQL slow", "sql", (0.3, 1.5), 1, _sql_delay, _sql_pass_through, "postgres"),
    Fault("COMMIT replies swallowed", "sql", (0.3, 1.0), 2, _sql_swallow_commit, _sql_pass_through, "postgres"),
    Fault("SQL copied", "sql", (0.0, 0.0), 1.5, _sql_copy),
    Fault("SQL restored", "sql", (0.0, 0.0), 2, _sql_restore),
    Fault("flusher killed", "flusher", (0.0, 1.0), 2, _kill("flusher"), _replace("flusher")),
    Fault("all flushers paused", "flusher", (0.3, 2.5), 2, _pause_all, _resume_all),
    Fault("flusher paused", "flusher", (0.2, 3.0), 3, _pause("flusher"), _resume("flusher")),
    Fault("writer killed", "writer", (0.0, 0.5), 1.5, _kill("writer"), _replace("writer")),
    Fault("writer paused", "writer", (0.2, 3.0), 1.5, _pause("writer"), _resume("writer")),
    Fault("recovery killed half-way", "recoverer", (0.0, 0.2), 2, _recover_and("kill"), _replace("recoverer")),
    Fault("recovery paused half-way", "recoverer", (0.2, 2.0), 2, _recover_and("pause"), _resume("recoverer")),
)  # fmt: skip


def plan(seed: str, seconds: float, *, sql: str, aof: str, only: str = "") -> list[Planned]:
    """The faults of one round. ``only``: names of faults, joined by commas."""
    dice = random.Random(seed)
    wanted = [name for name in only.split(",") if name]
    faults = [
        fault
        for fault in FAULTS
        if fault.only in ("", sql, "aof" if aof != "no" else "") and (not wanted or fault.name in wanted)
    ]
    found: list[Planned] = []
    busy: dict[str, float] = {}
    now = dice.uniform(0.3, 0.8)
    has_snapshot = False
    while now < seconds:
        fault = dice.choices(faults, [one.weight for one in faults])[0]
        if fault.name == "older snapshot swapped in" and not has_snapshot:
            fault = next(one for one in FAULTS if one.name == "snapshot taken")
        lasting = dice.uniform(*fault.seconds)
        if busy.get(fault.victim, 0.0) <= now:
            found.append(Planned(round(now, 3), fault, round(lasting, 3), dice.getrandbits(32)))
            busy[fault.victim] = now + lasting + 0.05
            has_snapshot = has_snapshot or fault.name == "snapshot taken"
        now += dice.expovariate(1 / 0.7)
    return found


def play(stage: Stage, planned: list[Planned], say: Callable[[str], None]) -> Counter[str]:
    """Do the plan; returns how often each fault was done. Every fault that was begun is ended."""
    done: Counter[str] = Counter()
    began = time.monotonic()
    steps = [(one.at_seconds, 0, one) for one in planned]
    steps += [(one.at_seconds + one.for_seconds, 1, one) for one in planned]
    for at_seconds, is_end, one in sorted(steps, key=lambda step: step[:2]):
        time.sleep(max(0.0, began + at_seconds - time.monotonic()))
        dice = random.Random(one.seed)
        if not is_end:
            say(f"{time.monotonic() - began:6.2f}  {one.fault.name} for {one.for_seconds:.2f} s")
            done[one.fault.name] += 1
        act = one.fault.end if is_end else one.fault.begin
        with contextlib.suppress(redis.ConnectionError):  # of a server that another fault keeps from answering
            act(stage, dice)
    return done
