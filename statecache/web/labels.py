"""Where the labels of a diagram's arrows stand: on their lines, and not on each other. Pure geometry, in pixels.

Each label is tried above and below its line, in the middle first and then to its sides, and stands at the first spot where it
covers no box and no label that stands already; where there is none, at the one where it covers least. Arrows that go there come
before those that go back. Of two opposite arrows, which lie side by side, each has its label on its outer side.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

_CHARACTER_WIDTH = 6.4
_ASCENT, _DESCENT = 11.0, 3.0
_ABOVE, _BELOW = -5.0, 14.0
"""From a line to the base line of its label."""
_SHARES = (0.5, 0.38, 0.62, 0.27, 0.73, 0.85)
_STEPS_AWAY = (0.0, 5.0, 10.0, 15.0)
_FAR = 1e6
_SAFE = 0.01


class Area(NamedTuple):
    left: float
    top: float
    right: float
    bottom: float


class Label(NamedTuple):
    """A label and the points of its line. ``opposite``: there is an arrow the other way."""

    text: str
    points: tuple[tuple[float, float], ...]
    back: bool
    opposite: bool


def width(text: str) -> float:
    """How wide a label is, about."""
    return len(text) * _CHARACTER_WIDTH


def area(text: str, x: float, y: float) -> Area:
    """What a label covers whose base line has its middle at x and y."""
    half = width(text) / 2
    return Area(x - half, y - _ASCENT, x + half, y + _DESCENT)


@functools.lru_cache(maxsize=64)
def placed(labels: tuple[Label, ...], taken: tuple[Area, ...], height: float) -> tuple[tuple[float, float], ...]:
    """The spot of each label. ``taken`` is covered already, ``height`` is the picture's. The last ones asked are remembered."""
    areas = [*taken, Area(-_FAR, -_FAR, _FAR, -_DESCENT), Area(-_FAR, height, _FAR, _FAR)]
    spots: list[tuple[float, float]] = [(0.0, 0.0)] * len(labels)
    for place in sorted(range(len(labels)), key=lambda place: labels[place].back):
        label = labels[place]
        if not label.text:
            continue
        best, least = (0.0, 0.0), float("inf")
        for x, y in _spots(label):
            covered = sum(_shared(area(label.text, x, y), other) for other in areas)
            if covered < least - _SAFE:
                best, least = (x, y), covered
            if covered == 0:
                break
        spots[place] = best
        areas.append(area(label.text, *best))
    return tuple(spots)


def _spots(label: Label) -> Iterator[tuple[float, float]]:
    sides = (_BELOW, _ABOVE) if label.back and label.opposite else (_ABOVE, _BELOW)
    line = list(_along(label.points))
    for away in _STEPS_AWAY:
        for x, y in line:
            for side in sides:
                yield round(x, 1), round(y + side + (away if side > 0 else -away), 1)


def _along(points: Sequence[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """Points of the line, from its middle outwards."""
    if len(points) == 2:
        (x, y), (to_x, to_y) = points
        for share in _SHARES:
            # the curve that is drawn: its handles are level, half-way
            bend = 1.5 * share * (1 - share) + share**3
            yield x + (to_x - x) * bend, y + (to_y - y) * (3 * share**2 - 2 * share**3)
        return
    middle = len(points) // 2
    for place in sorted(range(1, len(points) - 1), key=lambda place: abs(place - middle)):
        yield points[place]
    for place in sorted(range(len(points) - 1), key=lambda place: abs(place + 0.5 - middle)):
        (x, y), (to_x, to_y) = points[place], points[place + 1]
        yield (x + to_x) / 2, (y + to_y) / 2


def _shared(one: Area, other: Area) -> float:
    wide = min(one.right, other.right) - max(one.left, other.left)
    high = min(one.bottom, other.bottom) - max(one.top, other.top)
    return wide * high if wide > 0 and high > 0 else 0.0
