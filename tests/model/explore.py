"""Breadth-first exploration of a world: every interleaving of the processes' steps and the faults, shortest ones first.

States that were seen are kept by content, or (``compact``) by their 64-bit hash alone, which makes room for tens of
millions and could in theory take two states for one. A violation's trace is rebuilt by walking back to the start and, for
compact explorations, by taking the same steps again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tests.model import faults, invariants, steps_client, steps_cold, steps_flusher, steps_recovery
from tests.model.state import Ghost, Sql, State, Violation
from tests.model.world import World


@dataclass(slots=True)
class Result:
    """What an exploration found. ``complete``: every reachable state was judged."""

    world: World
    states: int = 0
    depth: int = 0
    complete: bool = False
    seconds: float = 0.0
    violation: Violation | None = None
    trace: list[str] = field(default_factory=list)
    unreached: set[str] = field(default_factory=set)

    def story(self) -> str:
        """The violation as numbered steps."""
        lines = [f"{number:3}. {text}" for number, text in enumerate(self.trace, 1)]
        return "\n".join([*lines, f"  => {self.violation}"])


def successors(world: World, state: State) -> Iterator[tuple[str, State]]:
    yield from steps_client.steps(world, state)
    yield from steps_flusher.steps(world, state)
    yield from steps_cold.steps(world, state)
    yield from steps_recovery.steps(world, state)
    yield from faults.steps(world, state)


def play(world: World) -> tuple[State, list[str]]:
    """Take the steps that a world begins with; returns the state behind them, and their descriptions."""
    state, texts = world.start, []
    for wanted in world.played:
        for text, after in successors(world, state):
            if wanted in text:
                state = after
                texts.append(text)
                break
        else:
            raise ValueError(f"{world.name}: no step has {wanted!r} in it")
    return state, texts


class _Judge:
    """Remembers what was judged: most steps change neither Redis nor SQL."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._sql: set[Sql] = set()
        self._both: set[tuple[object, ...]] = set()

    def judge(self, state: State) -> None:
        key = (state.redis.parts, state.sql, state.ghost)
        if key in self._both:
            return
        if state.sql not in self._sql:
            invariants.check_sql(self._world, state.sql, state.ghost)
            self._sql.add(state.sql)
        invariants.check(self._world, state)
        if "P9 exact" in self._world.asserted:
            invariants.exaggerated(self._world, state)
        self._both.add(key)


Progress = Callable[[Result], None]


def explore(
    world: World,
    *,
    states_max: int = 2_000_000,
    seconds_max: float = 1e9,
    compact: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Explore until everything was seen, a promise is broken, or a bound is reached."""
    started = time.monotonic()
    result = Result(world, unreached=set(world.reaches))
    judge = _Judge(world)
    parents: dict[object, tuple[object, str]] = {}

    def key(state: State) -> object:
        return hash(state) if compact else state

    def finish(last: object, violation: Violation) -> Result:
        result.violation = violation
        result.trace = [*played, *_trace(parents, last)]
        result.states, result.seconds = len(parents), time.monotonic() - started
        return result

    first, played = play(world)
    parents[key(first)] = (None, "")
    frontier = [first]
    while frontier:
        following: list[State] = []
        for state in frontier:
            here = key(state)
            try:
                for text, after in successors(world, state):
                    if result.unreached:
                        result.unreached = {wanted for wanted in result.unreached if wanted not in text}
                    there = key(after)
                    if there in parents:
                        continue
                    parents[there] = (here, text)
                    try:
                        judge.judge(after)
                    except Violation as violation:
                        return finish(there, violation)
                    following.append(after)
            except Violation as violation:
                return finish(here, violation)
            if len(parents) > states_max:
                frontier = following = []
                break
        else:
            result.states, result.seconds = len(parents), time.monotonic() - started
            if following:
                result.depth += 1
            if progress is not None:
                progress(result)
            if result.seconds > seconds_max:
                break
            frontier = following
            if not frontier:
                result.complete = True
            continue
        break
    result.states, result.seconds = len(parents), time.monotonic() - started
    return result


def _trace(parents: dict[object, tuple[object, str]], last: object) -> list[str]:
    texts = []
    while last is not None:
        last, text = parents[last]
        texts.append(text)
    return texts[-2::-1]


__all__ = ["Ghost", "Result", "explore", "successors"]
