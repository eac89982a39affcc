"""The error tree: one root, and every error crosses a process boundary with its attributes."""

from __future__ import annotations

import copy
import pickle

import pytest

import statecache
from statecache.core import errors
from statecache.core.model import Receipt

RECEIPT = Receipt("order", "1", "pay", "placed", "paid", 2, "1-2", 1700, "t")
ERRORS: list[errors.StateCacheError] = [
    errors.InvalidTransitionError("no", "placed", "ship", ["pay"]),
    errors.StaleVersionError("old", 1, 2),
    errors.DurabilityTimeout("late", RECEIPT),
    errors.ParkedError("refused", RECEIPT),
    errors.FencedError("held", "worker-1", 1700),
    *[
        kind("message")
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.StateCacheError)
    ],
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_error_is_picklable_and_copyable(error: errors.StateCacheError) -> None:
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(other) is type(error)
        assert (str(other), other.args, vars(other)) == (str(error), error.args, vars(error))


def test_message_is_the_text_and_not_the_attributes() -> None:
    assert str(ERRORS[0]) == "no"
    assert str(ERRORS[1]) == "old"
    assert [str(error) for error in ERRORS[2:4]] == ["late", "refused"]


def test_attributes() -> None:
    refused, stale, late, parked = ERRORS[:4]
    assert isinstance(refused, errors.InvalidTransitionError)
    assert isinstance(stale, errors.StaleVersionError)
    assert isinstance(late, errors.DurabilityTimeout)
    assert (refused.state, refused.event, refused.allowed) == ("placed", "ship", ("pay",))
    assert (stale.expected, stale.actual) == (1, 2)
    assert isinstance(parked, errors.ParkedError)
    assert (late.receipt, parked.receipt, errors.ParkedError("waits").receipt) == (RECEIPT, RECEIPT, None)


DESIGN = {
    "ConfigurationError", "DefinitionError", "InvalidDataError", "NotFoundError", "AlreadyExistsError",
    "InvalidTransitionError", "StaleVersionError", "ParkedError", "BackpressureError", "RecoveringError",
    "UnavailableError", "DurabilityTimeout", "IntegrityError", "FencedError",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(DESIGN))
def test_errors_of_the_design_are_public(name: str) -> None:
    kind = getattr(errors, name)
    assert issubclass(kind, errors.StateCacheError)
    assert kind.__doc__
    assert getattr(statecache, name, kind) is kind
