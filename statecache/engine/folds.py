"""What a flusher remembers of the instances that it moved last, so that SQL need not be asked what they were."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Mapping

from statecache.core import fold

BYTES_MAX = 256 * 2**20
BYTES_EACH = 250
"""What an instance's name and its place take beside the packed text: measured, with ids of 14 characters."""


class Folds:
    """``fold.Before`` of each instance, packed, up to some bytes in all; those go first that have not moved for longest.

    Never all at once: 200,000 instances that move in turn, with room for no more, were all asked for again and again.
    For one thread at a time.
    """

    def __init__(self, bytes_max: int = BYTES_MAX) -> None:
        self._bytes_max = bytes_max
        self._bytes = 0
        self._folds: dict[fold.Instance, str] = {}

    def __len__(self) -> int:
        return len(self._folds)

    def take(self, instances: Iterable[fold.Instance]) -> dict[fold.Instance, str]:
        """What is remembered of some instances; it is forgotten: where their flush fails, SQL is asked."""
        pop = self._folds.pop
        taken = {instance: text for instance in instances if (text := pop(instance, None)) is not None}
        self._bytes -= _bytes_of(taken)
        return taken

    def remember(self, folds: Mapping[fold.Instance, str]) -> None:
        """Put in what became of instances that were taken, or not known; the oldest of the others make room."""
        known = self._folds
        known.update(folds)
        self._bytes += _bytes_of(folds)
        while known and self._bytes > self._bytes_max:
            # Many at a time: each search for the first key passes over the places of those that are gone.
            self.take(list(itertools.islice(known, 1 + len(known) // 64)))

    def clear(self) -> None:
        self._folds.clear()
        self._bytes = 0


def _bytes_of(folds: Mapping[fold.Instance, str]) -> int:
    return BYTES_EACH * len(folds) + sum(map(sys.getsizeof, folds.values()))
