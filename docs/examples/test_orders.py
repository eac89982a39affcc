"""Tests of a program that uses statecache: ``pytest docs/examples/test_orders.py``. Nothing need run for them.

One server, Valkey from its wheel, for the whole run: to start it takes about a second. Each test has a store of its own in it,
a namespace, and an empty SQLite file, few partitions and a short flush interval. So tests see nothing of each other, and may
run side by side (with pytest-xdist each of its processes has a server). A test of one program alone can do with less:
``StateCache.embedded(tmp_path)``, which starts a server and stops it again.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from statecache import State, StateCache, StateMachine
from statecache.core import errors
from statecache.engine.handle import MachineHandle


class Order(StateMachine):
    placed = State(initial=True)
    paid = State()
    shipped = State(final=True)

    pay = placed.to(paid)
    ship = paid.to(shipped)


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with StateCache.embedded(tmp_path_factory.mktemp("valkey"), flusher=False) as server:
        yield server.redis_url


@pytest.fixture
def cache(redis_url: str, tmp_path: Path) -> Iterator[StateCache]:
    with StateCache.connect(
        redis_url,
        f"sqlite:///{tmp_path}/store.db",
        namespace=f"test-{uuid.uuid4().hex[:12]}",
        partition_count=2,
        flush_interval_ms=5,
        flusher=True,
    ) as opened:
        yield opened


@pytest.fixture
def orders(cache: StateCache) -> MachineHandle:
    return cache.machine(Order)


def test_an_order_is_shipped_when_it_is_paid(orders: MachineHandle) -> None:
    orders.start("1", {"amount": 5})
    with pytest.raises(errors.InvalidTransitionError):
        orders.transition("1", "ship")
    orders.transition("1", "pay", {"method": "card"})
    orders.transition("1", "ship")
    assert orders.get("1").state == "shipped"
    assert orders.get("1").data == {"amount": 5, "method": "card"}


def test_what_sql_knows(cache: StateCache, orders: MachineHandle) -> None:
    """Counts and lists are read from SQL, where a transition is a moment later: ``flush`` waits until it is there."""
    for number in range(3):
        orders.start(f"{number}")
    orders.transition("1", "pay")
    cache.flush()
    assert orders.counts() == {"placed": 2, "paid": 1}
    assert [one.id for one in orders.find("paid")] == ["1"]
    assert [one.event for one in orders.history("1")] == ["@start", "pay"]
