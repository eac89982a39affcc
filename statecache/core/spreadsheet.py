"""Our history as CSV, so that a spreadsheet can open it and nothing is lost.

A spreadsheet runs a cell that begins with ``=``, ``+``, ``-`` or ``@`` as a formula, and an apostrophe before it makes it text.
Columns that hold what others have written get one; so does a text that begins with an apostrophe itself. Hence the way back has
one rule and no exception: in these columns, a first apostrophe is none of the text.
"""

from __future__ import annotations

COLUMNS = (
    "machine", "id", "version", "event", "from_state", "to_state", "at", "occurred_at", "transition_id", "actor", "reason",
    "patch", "unset", "increments", "machine_version", "entry_id", "covers_from", "complete",
)  # fmt: skip
GUARDED = frozenset({"id", "transition_id", "actor", "reason"})
"""The others hold words of a machine, times, numbers, and JSON, which begins with a bracket."""
_FIRST = ("=", "+", "-", "@", "\t", "\r", "'")


def guarded(text: str) -> str:
    """The cell for a text in one of the guarded columns."""
    return f"'{text}" if text.startswith(_FIRST) else text


def plain(cell: str) -> str:
    """The text of such a cell."""
    return cell.removeprefix("'")
