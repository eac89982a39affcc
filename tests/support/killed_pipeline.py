"""A worker of ``docs/examples/rq_pipeline.py`` that is killed, with its work-horse, at the n-th point between two steps."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "docs" / "examples"))
import rq
import rq_pipeline

from statecache.engine.handle import MachineHandle


def kill_at(point: int, effects: Path) -> None:
    """Count what the pipeline does to the world; before and after each call is a point."""
    reached = 0
    worker = os.getpid()

    def reach() -> None:
        nonlocal reached
        reached += 1
        if reached == point:
            os.kill(worker, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            reach()
            result = function(*arguments, **named)
            reach()
            return result

        return call

    def effect(step: rq_pipeline.Step) -> rq_pipeline.Step:
        def work(order_id: str, key: str) -> Any:
            (effects / key.replace(":", "-")).touch()
            return step.work(order_id, key)

        return rq_pipeline.Step(step.event, watched(work))

    MachineHandle.transition = watched(MachineHandle.transition)  # type: ignore[method-assign]
    rq.Queue.enqueue = watched(rq.Queue.enqueue)  # type: ignore[method-assign]
    rq_pipeline.STEPS = {state: effect(step) for state, step in rq_pipeline.STEPS.items()}


if __name__ == "__main__":
    kill_at(int(sys.argv[1]), Path(sys.argv[2]))
    rq_pipeline.main("work", "--burst")
