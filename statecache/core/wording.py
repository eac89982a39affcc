"""How values appear in messages."""

from __future__ import annotations

MISTAKES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a value, a validator or a guard of the caller's raises by mistake. Not all there is: the exception of a signal's handler
(a job's timeout) may come at the same moment, and is for whoever set the signal."""


def shown(value: object) -> str:
    """The value as Python writes it, at most 80 characters."""
    try:
        return shortened(repr(value), 80)
    except RecursionError:
        return f"a {type(value).__name__} nested too deep to be shown"
    except MISTAKES:  # a number of more digits than Python writes; a class whose own text fails
        return f"a {type(value).__name__} that cannot be shown"


def uncapitalized(text: str) -> str:
    return text[:1].lower() + text[1:]


def shortened(text: str, length_max: int) -> str:
    return text if len(text) <= length_max else text[: length_max - 3] + "..."
