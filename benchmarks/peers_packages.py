"""Two packages that people take for durable state, used as their documentation says, on the same PostgreSQL.

``eventsourcing``: an aggregate per instance, an application that gets it from the repository, calls its method and saves it.
``dbos``: a workflow per transition with one step in it. Each has a database of its own.
"""

from __future__ import annotations

import warnings
from typing import Any

import sqlalchemy as sa

from benchmarks.workload import PATCHES, Patch, order_id


class EventSourced:
    """Transitions as events of aggregates."""

    def __init__(self, url: str, count: int) -> None:
        from eventsourcing.application import Application
        from eventsourcing.domain import Aggregate, event

        class Order(Aggregate):
            @event("Placed")
            def __init__(self, data: Patch) -> None:
                self.state = "placed"
                self.values = data

            @event("Moved")
            def move(self, state: str, patch: Patch) -> None:
                self.state = state
                self.values = {**self.values, **patch}

        class Orders(Application):
            def place(self, data: Patch) -> Any:
                order = Order(data=data)
                self.save(order)
                return order.id

            def move(self, id: Any, state: str, patch: Patch) -> None:
                order = self.repository.get(id)
                order.move(state=state, patch=patch)
                self.save(order)

        at = sa.make_url(url)
        self._app = Orders(
            env={
                "PERSISTENCE_MODULE": "eventsourcing.postgres", "POSTGRES_DBNAME": str(at.database),
                "POSTGRES_HOST": str(at.host), "POSTGRES_PORT": str(at.port), "POSTGRES_USER": str(at.username),
                "POSTGRES_PASSWORD": str(at.password),
            }
        )  # fmt: skip
        self._ids = [self._app.place(PATCHES[number % 2048]) for number in range(count)]
        self._next = 0

    def transitions(self, items: int) -> int:
        for _ in range(items):
            place = self._next % len(self._ids)
            self._next += 1
            self._app.move(self._ids[place], "paid", PATCHES[place % 2048])
        return items

    def close(self) -> None:
        self._app.close()


class Workflows:
    """Transitions as workflows of one step. One at a time in a process: the package keeps its state in its module."""

    def __init__(self, url: str) -> None:
        from dbos import DBOS

        self._dbos = DBOS
        DBOS(config={"name": "bench", "system_database_url": url, "log_level": "ERROR", "console_log_level": "ERROR"})

        @DBOS.step()
        def apply(id: str, state: str, patch: Patch) -> str:
            return state

        @DBOS.workflow()
        def move(id: str, state: str, patch: Patch) -> str:
            return apply(id, state, patch)

        self._move = move
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            DBOS.launch()
        self._next = 0

    def transitions(self, items: int) -> int:
        for _ in range(items):
            self._next += 1
            self._move(order_id(self._next), "paid", PATCHES[self._next % 2048])
        return items

    def close(self) -> None:
        self._dbos.destroy(destroy_registry=True)
