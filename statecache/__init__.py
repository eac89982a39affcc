"""statecache: where is this right now, how did it get there, and can it go on after the crash?

Names are loaded when they are first used: SQLAlchemy alone takes half a second, which ``statecache --help`` need not wait for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from statecache.core.errors import (
        AlreadyExistsError,
        BackpressureError,
        ConfigurationError,
        DefinitionError,
        DurabilityTimeout,
        FencedError,
        IntegrityError,
        InvalidDataError,
        InvalidTransitionError,
        NotFoundError,
        ParkedError,
        RecoveringError,
        StaleVersionError,
        StateCacheError,
        UnavailableError,
    )
    from statecache.core.machine import State, StateMachine
    from statecache.core.model import Durability, Move, Receipt, Snapshot, Start, Transition
    from statecache.engine.cache import StateCache

__version__ = "0.1.0"

__all__ = [
    "AlreadyExistsError",
    "BackpressureError",
    "ConfigurationError",
    "DefinitionError",
    "Durability",
    "DurabilityTimeout",
    "FencedError",
    "IntegrityError",
    "InvalidDataError",
    "InvalidTransitionError",
    "Move",
    "NotFoundError",
    "ParkedError",
    "Receipt",
    "RecoveringError",
    "Snapshot",
    "StaleVersionError",
    "Start",
    "State",
    "StateCache",
    "StateCacheError",
    "StateMachine",
    "Transition",
    "UnavailableError",
]

_MODULES = {
    "StateCache": "statecache.engine.cache",
    **dict.fromkeys(("State", "StateMachine"), "statecache.core.machine"),
    **dict.fromkeys(("Durability", "Move", "Receipt", "Snapshot", "Start", "Transition"), "statecache.core.model"),
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(_MODULES.get(name, "statecache.core.errors")), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
