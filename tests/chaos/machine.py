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

# Every declared move as (event, from, to), written out: the checker must not ask the code under test (P2).
MOVES = frozenset(
    {
        ("@start", None, "idle"),
        ("hold", "idle", "held"),
        ("resume", "held", "idle"),
        ("take", "idle", "busy"),
        ("take", "held", "busy"),
        ("give", "busy", "idle"),
        ("note", "idle", "idle"),
        ("note", "held", "held"),
        ("note", "busy", "busy"),
        ("close", "busy", "closed"),
    }
)
