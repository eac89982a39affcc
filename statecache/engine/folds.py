"""What a flusher remembers of the instances that it moved last, so that SQL need not be asked what they were."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from statecache.core import fold

BYTES_MAX = 256 * 2**20
BYTES_EACH = 700
"""What a fold and its place take beside the data: measured, with ids of 14 characters and full rings (767 with 110 of data)."""


class Folds:
    """The last fold of each instance, up to some bytes in all; those go first that have not moved for the longest time.

    Never all at once: 200,000 instances that move in turn, with room for no more, were all asked for again and again.
    For one thread at a time.
    """

    def __init__(self, bytes_max: int = BYTES_MAX) -> None:
        self._bytes_max = bytes_max
        self._bytes = 0
        self._folds: dict[fold.Instance, fold.Folded] = {}
        self.get = self._folds.get

    def __len__(self) -> int:
        return len(self._folds)

    def remember(self, folds: Mapping[fold.Instance, fold.Folded]) -> None:
        """Put in what became of some instances; the oldest of the others make room."""
        known, size = self._folds, self._bytes
        for instance, now in folds.items():
            before = known.pop(instance, None)  # a dictionary keeps the order in which its keys came
            size += _bytes_of(now) - (_bytes_of(before) if before is not None else 0)
            known[instance] = now
        self._bytes = size
        while known and self._bytes > self._bytes_max:
            # Many at a time: each search for the first key passes over the places of those that are gone.
            for oldest in list(itertools.islice(known, 1 + len(known) // 64)):
                self._bytes -= _bytes_of(known.pop(oldest))

    def clear(self) -> None:
        self._folds.clear()
        self._bytes = 0


def _bytes_of(one: fold.Folded) -> int:
    """At most: a text with one character that is no ASCII takes two or four bytes for each."""
    return BYTES_EACH + len(one.data) * (1 if one.data.isascii() else 4)
