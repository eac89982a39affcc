"""What is written and read: one machine, ids and patches of a realistic size, and a fleet of instances that moves in order."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

from statecache import Move, Receipt, State, StateCache, StateMachine

Patch = dict[str, Any]


class Order(StateMachine):
    """Four states in a ring, so that an instance can move for ever."""

    placed = State(initial=True)
    paid = State()
    packed = State()
    shipped = State()
    cancelled = State(final=True)

    pay = placed.to(paid)
    pack = paid.to(packed)
    ship = packed.to(shipped)
    reorder = shipped.to(placed)
    cancel = placed.to(cancelled) | paid.to(cancelled)


RING = (
    ("pay", "placed", "paid"),
    ("pack", "paid", "packed"),
    ("ship", "packed", "shipped"),
    ("reorder", "shipped", "placed"),
)


def order_id(number: int) -> str:
    return f"2026-{number:09d}"


def number_of(id: str) -> int:
    return int(id.partition("-")[2])


def patch(number: int, fields: int = 5) -> Patch:
    """2 to 6 fields; five of them are about 110 bytes of JSON texts."""
    full = {
        "amount": number % 100_000 / 100,
        "currency": "EUR",
        "customer": f"C-{number % 1_000_003:08d}",
        "method": "card",
        "ref": f"pi_3Nx{number * 2654435761 % 2**48:012x}",
        "note": "left with the neighbour on the second floor, " * 2,
    }
    return dict(list(full.items())[:fields])


PATCHES = [patch(number) for number in range(2048)]


def texts(values: Patch) -> dict[str, str]:
    """The fields as people put them into a hash: strings as they are, the rest as JSON."""
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}


def refused(results: Sequence[Any]) -> None:
    """Raise the first error among the results of a bulk call: a benchmark of refusals measures nothing."""
    for result in results:
        if not isinstance(result, Receipt):
            raise result


class Fleet:
    """Instances that exist, and whose turn it is. Every move that it hands out is legal if the ones before were made."""

    def __init__(self, cache: StateCache, count: int, *, start: bool = True, fields: int = 5, seed: int = 7) -> None:
        self.cache = cache
        self.orders = cache.machine(Order)
        self.ids = [order_id(number) for number in range(count)]
        self.steps = [0] * count
        self._order = list(range(count))
        random.Random(seed).shuffle(self._order)
        self._next = 0
        self._patches = PATCHES if fields == 5 else [patch(number, fields) for number in range(2048)]
        if start:
            for begin in range(0, count, 5000):
                chunk = self.ids[begin : begin + 5000]
                pairs = [(id, self._patches[place % 2048]) for place, id in enumerate(chunk)]
                refused(self.orders.start_many(pairs, timeout=60.0))

    def moves(self, count: int, in_a_row: int = 1) -> list[Move]:
        """The next moves: instances in a shuffled order, each ``in_a_row`` times in succession."""
        made = []
        while len(made) < count:
            place = self._order[self._next]
            self._next = (self._next + 1) % len(self._order)
            for _ in range(in_a_row):
                made.append(self.move(place))
        return made

    def some(self, count: int, rng: random.Random) -> list[Move]:
        """Moves of random different instances."""
        return [self.move(place) for place in rng.sample(range(len(self.ids)), count)]

    def move(self, place: int) -> Move:
        step = self.steps[place]
        self.steps[place] = step + 1
        return Move(self.ids[place], RING[step % 4][0], self._patches[(place + step) % 2048])

    def write(self, moves: Sequence[Move], chunk: int = 4000) -> None:
        """Make the moves, in bulk calls."""
        for begin in range(0, len(moves), chunk):
            refused(self.orders.transition_many(moves[begin : begin + chunk]))

    def flush(self) -> None:
        self.cache.flush(timeout=600.0)
