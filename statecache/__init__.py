"""statecache: where is this right now, how did it get there, and can it go on after the crash?"""

from statecache.core.errors import (
    AlreadyExistsError,
    BackpressureError,
    ConfigurationError,
    DefinitionError,
    DurabilityTimeout,
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
from statecache.core.model import Durability, Move, Receipt, Snapshot, Transition
from statecache.engine.cache import StateCache

__version__ = "0.1.0"

__all__ = [
    "AlreadyExistsError",
    "BackpressureError",
    "ConfigurationError",
    "DefinitionError",
    "Durability",
    "DurabilityTimeout",
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
    "State",
    "StateCache",
    "StateCacheError",
    "StateMachine",
    "Transition",
    "UnavailableError",
]
