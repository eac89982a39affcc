"""An order goes through its machine by RQ jobs, and goes on after kill -9 of the worker at any step.

    python docs/examples/rq_pipeline.py start 1001     # begin an order and enqueue its first step
    python docs/examples/rq_pipeline.py work           # a worker; kill -9 it whenever you like, and start another
    statecache history purchase:1001                     # what happened, each step once

Redis and database come from STATECACHE_REDIS_URL and STATECACHE_DATABASE_URL. Let a `statecache flusher` run beside it.

Why each step happens exactly once, whatever is killed:

- a job looks where the order IS, does that one step, and enqueues the next: run again, it finds the step done;
- the transition carries an id made of the order and the event: a repeated call is applied once (P4);
- work outside (a payment) is asked for under the same id, so that whoever does it can tell a repetition, too;
- RQ puts the job of a killed worker back (`retry`), and a job that stands twice in the queue does no harm.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import redis
import rq

from statecache import State, StateCache, StateMachine

QUEUE = "orders"


class Purchase(StateMachine):
    placed = State(initial=True)
    reserved = State()
    charged = State()
    shipped = State(final=True)

    reserve = placed.to(reserved)
    charge = reserved.to(charged)
    ship = charged.to(shipped)


def reserve(order_id: str, key: str) -> Mapping[str, Any]:
    return {"shelf": f"A-{len(order_id)}"}


def charge(order_id: str, key: str) -> Mapping[str, Any]:
    """A payment provider would be given ``key``, and charge once for it."""
    return {"payment": f"paid under {key}"}


def ship(order_id: str, key: str) -> Mapping[str, Any]:
    return {"parcel": f"parcel of {order_id}"}


class Step(NamedTuple):
    event: str
    work: Callable[[str, str], Mapping[str, Any]]


STEPS = {"placed": Step("reserve", reserve), "reserved": Step("charge", charge), "charged": Step("ship", ship)}


def advance(order_id: str) -> str:
    """The job: one step of an order. Returns the state that it is in afterwards."""
    with StateCache.connect() as cache:
        orders = cache.machine(Purchase)
        order = orders.get(order_id)
        if order.final:
            return order.state
        step = STEPS[order.state]
        key = f"{order_id}:{step.event}"
        result = step.work(order_id, key)
        state = orders.transition(order_id, step.event, result, transition_id=key).state
    job = rq.get_current_job()
    assert job is not None
    enqueue(rq.Queue(QUEUE, connection=job.connection), order_id)
    return state


def enqueue(queue: rq.Queue, order_id: str) -> None:
    """Enqueue the next step of an order. A worker that dies with it does not lose it."""
    queue.enqueue(advance, order_id, retry=rq.Retry(max=10), result_ttl=3600)


def begin(queue: rq.Queue, order_id: str) -> None:
    """Begin an order. May be repeated: it is begun once."""
    with StateCache.connect() as cache:
        cache.machine(Purchase).start(order_id, transition_id=f"{order_id}:start")
    enqueue(queue, order_id)


def main(verb: str, *order_ids: str) -> None:
    from statecache.settings import Settings

    url = Settings().redis_url
    if url is None:
        raise SystemExit(
            "set STATECACHE_REDIS_URL and STATECACHE_DATABASE_URL first: worker and jobs share these servers"
        )
    with redis.Redis.from_url(url) as connection:
        queue = rq.Queue(QUEUE, connection=connection)
        if verb == "work":
            rq.Worker([queue], connection=connection).work(burst="--burst" in order_ids)
        else:
            for order_id in order_ids:
                begin(queue, order_id)


if __name__ == "__main__":
    sys.modules["rq_pipeline"] = sys.modules["__main__"]  # the name under which a worker finds the jobs
    for function in (advance, reserve, charge, ship):
        function.__module__ = "rq_pipeline"
    main(*sys.argv[1:])
