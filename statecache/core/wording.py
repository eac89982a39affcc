"""How values appear in messages."""

from __future__ import annotations


def shown(value: object) -> str:
    """The value as Python writes it, at most 80 characters."""
    try:
        return shortened(repr(value), 80)
    except RecursionError:
        return f"a {type(value).__name__} nested too deep to be shown"


def uncapitalized(text: str) -> str:
    return text[:1].lower() + text[1:]


def shortened(text: str, length_max: int) -> str:
    return text if len(text) <= length_max else text[: length_max - 3] + "..."
