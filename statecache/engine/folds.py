"""What a flusher remembers of the instances that it moved last, so that SQL need not be asked what they were."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from statecache.core import fold

BYTES_MAX = 256 * 2**20
BYTES_EACH = 700
"""What a fold and its place take beside the data: measured, with ids of 14 characters and full rings."""


class Folds:
    """The last fold of each instance, up to some bytes in all; those go first that have not moved for the longest time.

    Never all at once: 200,000 instances that move in turn, with room for no more, were all asked for again and again.
    For one thread.
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
            size += len(now.data) - len(before.data) if before is not None else BYTES_EACH + len(now.data)
            known[instance] = now
        self._bytes = size
        while self._bytes > self._bytes_max:
            # Many at a time: each search for the first key passes over the places of those that are gone.
            for oldest in list(itertools.islice(known, 1 + len(known) // 64)):
                self._bytes -= BYTES_EACH + len(known.pop(oldest).data)

    def clear(self) -> None:
        self._folds.clear()
        self._bytes = 0
