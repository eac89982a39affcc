"""The machine that the chaos clients move: it never has to end, and most events are wrong most of the time."""

from __future__ import annotations

from statecache import State, StateMachine


class Ticket(StateMachine):
    idle = State(initial=True)
    held = State()
    busy = State()
    closed = State(final=True)

    hold = idle.to(held)
    resume = held.to(idle)
    take = idle.to(busy) | held.to(busy)
    give = busy.to(idle)
    note = idle.to(idle) | held.to(held) | busy.to(busy)
    close = busy.to(closed)


EVENTS = ("hold", "resume", "take", "give", "note")
"""What clients fire at random; ``close`` is rare, so that instances live long enough to be interesting."""

MOVES = frozenset(
    [("@start", None, "idle")]
    + [(event, source, target) for event, by_source in Ticket.definition.targets.items() for source, target in by_source.items() if source]
)
"""Every declared move as (event, from, to): the checker's own copy of the rules (P2)."""
