"""Where the boxes and arrows of a directed graph go: left to right, in ranks. Pure geometry, in pixels.

After Sugiyama, Tagawa and Toda (1981): arrows that go back are turned round; every box gets the rank of the longest way to
it; an arrow over several ranks gets a point in each rank between; the order within ranks is improved by sorting each rank by
the mean of its neighbours' places, to and fro, and the order with the fewest crossings is kept; last, every box moves towards
its neighbours as far as its rank allows. ``weight`` makes an arrow pull harder, so that a main line becomes straight.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

BOX_GAP = 22.0
POINT_GAP = 22.0
RANK_GAP = 46.0
_SWEEPS = 12
_PULLS = 60


@dataclass(frozen=True)
class Size:
    width: float
    height: float


@dataclass(frozen=True)
class Arrow:
    """``room`` is how wide its label is: the ranks that it joins stand that far apart at least."""

    source: str
    target: str
    weight: float = 1.0
    room: float = 0.0


@dataclass(frozen=True)
class Place:
    """The middle of a box."""

    x: float
    y: float
    size: Size


@dataclass(frozen=True)
class Course:
    """An arrow's way: the points that it passes, from its source's box to its target's."""

    arrow: Arrow
    points: tuple[tuple[float, float], ...]
    back: bool


@dataclass(frozen=True)
class Layout:
    places: Mapping[str, Place]
    courses: Sequence[Course]
    width: float
    height: float


@dataclass
class _Node:
    """A box, or a point of an arrow on its way through a rank."""

    key: object
    rank: int
    size: Size
    y: float = 0.0
    left: list[tuple[_Node, float]] = field(default_factory=list)
    right: list[tuple[_Node, float]] = field(default_factory=list)

    @property
    def is_point(self) -> bool:
        return self.size.height == 0


def layout(boxes: Mapping[str, Size], arrows: Sequence[Arrow], start: str) -> Layout:
    """Place the boxes. Arrows from a box to itself are left to whoever draws. The last ones made are remembered: a hundred
    arrows take a fifth of a second."""
    return _layout(tuple(boxes.items()), tuple(arrow for arrow in arrows if arrow.source != arrow.target), start)


@functools.lru_cache(maxsize=64)
def _layout(sized: tuple[tuple[str, Size], ...], arrows: tuple[Arrow, ...], start: str) -> Layout:
    boxes = dict(sized)
    back = _going_back(boxes, arrows, start)
    forward = [
        (arrow.target, arrow.source) if index in back else (arrow.source, arrow.target)
        for index, arrow in enumerate(arrows)
    ]
    ranks = _ranks(boxes, forward)
    nodes = {name: _Node(name, ranks[name], size) for name, size in boxes.items()}
    chains = [_chain(nodes, arrow, pair) for arrow, pair in zip(arrows, forward, strict=True)]
    rows: list[list[_Node]] = [[] for _ in range(max(ranks.values()) + 1)]
    for node in [*nodes.values(), *(point for chain in chains for point in chain[1:-1])]:
        rows[node.rank].append(node)
    rows = _ordered(rows)
    _set_heights(rows)
    xs, width = _columns(rows, arrows, ranks)
    top = min(node.y - node.size.height / 2 for row in rows for node in row)
    height = max(node.y + node.size.height / 2 for row in rows for node in row) - top
    places = {name: Place(xs[node.rank], node.y - top, node.size) for name, node in nodes.items()}
    courses = []
    for index, (arrow, chain) in enumerate(zip(arrows, chains, strict=True)):
        points = _course(chain, xs, top, index in back)
        courses.append(Course(arrow, tuple(reversed(points)) if index in back else tuple(points), index in back))
    return Layout(places, courses, width, height)


def _going_back(boxes: Mapping[str, Size], arrows: Sequence[Arrow], start: str) -> set[int]:
    """The arrows to a box that the walk from the start has not yet left."""
    leaving: dict[str, list[int]] = {name: [] for name in boxes}
    for index in sorted(range(len(arrows)), key=lambda index: -arrows[index].weight):
        leaving[arrows[index].source].append(index)
    back: set[int] = set()
    done: set[str] = set()
    for root in [start, *boxes]:
        if root in done:
            continue
        open_: list[tuple[str, int]] = [(root, 0)]
        on_way = {root}
        while open_:
            name, place = open_.pop()
            if place == len(leaving[name]):
                on_way.discard(name)
                done.add(name)
                continue
            open_.append((name, place + 1))
            target = arrows[leaving[name][place]].target
            if target in on_way:
                back.add(leaving[name][place])
            elif target not in done:
                on_way.add(target)
                open_.append((target, 0))
    return back


def _ranks(boxes: Mapping[str, Size], pairs: Sequence[tuple[str, str]]) -> dict[str, int]:
    """The longest way to each box; there is no circle left."""
    ranks = dict.fromkeys(boxes, 0)
    for _ in boxes:
        changed = False
        for source, target in pairs:
            if ranks[target] <= ranks[source]:
                ranks[target] = ranks[source] + 1
                changed = True
        if not changed:
            break
    return ranks


def _chain(nodes: Mapping[str, _Node], arrow: Arrow, pair: tuple[str, str]) -> list[_Node]:
    source, target = nodes[pair[0]], nodes[pair[1]]
    points = [_Node(arrow, rank, Size(0, 0)) for rank in range(source.rank + 1, target.rank)]
    chain = [source, *points, target]
    for one, next_ in itertools.pairwise(chain):
        one.right.append((next_, arrow.weight))
        next_.left.append((one, arrow.weight))
    return chain


def _ordered(rows: list[list[_Node]]) -> list[list[_Node]]:
    best, fewest = [list(row) for row in rows], _crossings(rows)
    for sweep in range(_SWEEPS):
        if fewest == 0:
            break
        forwards = sweep % 2 == 0
        for rank in range(1, len(rows)) if forwards else range(len(rows) - 2, -1, -1):
            places = {id(node): place for place, node in enumerate(rows[rank - 1 if forwards else rank + 1])}
            old = {id(node): place for place, node in enumerate(rows[rank])}
            rows[rank].sort(key=lambda node: _mean_place(node, places, old, forwards))
        count = _crossings(rows)
        if count < fewest:
            best, fewest = [list(row) for row in rows], count
    return best


def _mean_place(node: _Node, places: Mapping[int, int], old: Mapping[int, int], forwards: bool) -> float:
    neighbours = node.left if forwards else node.right
    if not neighbours:
        return float(old[id(node)])
    return sum(places[id(other)] for other, _ in neighbours) / len(neighbours)


def _crossings(rows: Sequence[Sequence[_Node]]) -> int:
    count = 0
    for row, after in itertools.pairwise(rows):
        places = {id(node): place for place, node in enumerate(after)}
        ends = [sorted(places[id(other)] for other, _ in node.right) for node in row]
        flat = [(place, end) for place, targets in enumerate(ends) for end in targets]
        count += sum(
            1
            for index, (one, end) in enumerate(flat)
            for other, last in flat[index + 1 :]
            if one < other and end > last
        )
    return count


def _set_heights(rows: Sequence[Sequence[_Node]]) -> None:
    for row in rows:
        y = 0.0
        for above, node in zip([None, *row], row, strict=False):
            y += 0 if above is None else _apart(above, node)
            node.y = y
        for node in row:
            node.y -= y / 2
    for sweep in range(_PULLS):
        for row in rows if sweep % 2 == 0 else reversed(rows):
            wanted = [_mean_height(node) for node in row]
            _settle(row, wanted)


def _mean_height(node: _Node) -> float:
    pulls = [
        (other.y, weight * (4 if other.is_point and node.is_point else 1)) for other, weight in node.left + node.right
    ]
    total = sum(weight for _, weight in pulls)
    return sum(y * weight for y, weight in pulls) / total if total else node.y


def _apart(above: _Node, below: _Node) -> float:
    gap = POINT_GAP if above.is_point or below.is_point else BOX_GAP
    return (above.size.height + below.size.height) / 2 + gap


def _settle(row: Sequence[_Node], wanted: Sequence[float]) -> None:
    """Put the nodes as near as can be to where they want, in their order and apart; heavy ones give way less.

    The weighted least squares under that order: neighbours that would overlap are joined into blocks, whose nodes stand as
    close as they may around their common mean (the "pool adjacent violators" algorithm of isotonic regression).
    """
    blocks: list[tuple[float, float, int]] = []  # mean, weight, how many nodes; heights without the gaps before them
    offset = 0.0
    offsets = []
    for index, node in enumerate(row):
        offset += _apart(row[index - 1], node) if index else 0.0
        offsets.append(offset)
        block = (wanted[index] - offset, max(1.0, sum(weight for _, weight in node.left + node.right)), 1)
        while blocks and blocks[-1][0] > block[0]:
            mean, weight, count = blocks.pop()
            whole = weight + block[1]
            block = ((mean * weight + block[0] * block[1]) / whole, whole, count + block[2])
        blocks.append(block)
    means = [mean for mean, _, count in blocks for _ in range(count)]
    for node, mean, before in zip(row, means, offsets, strict=True):
        node.y = mean + before


def _columns(
    rows: Sequence[Sequence[_Node]], arrows: Sequence[Arrow], ranks: Mapping[str, int]
) -> tuple[list[float], float]:
    """The middle of each rank, and the whole width."""
    widths = [max((node.size.width for node in row), default=0.0) for row in rows]
    rooms = [RANK_GAP] * len(rows)
    for arrow in arrows:
        low, high = sorted((ranks[arrow.source], ranks[arrow.target]))
        if high == low + 1:
            rooms[low] = max(rooms[low], arrow.room + 36)
    xs: list[float] = []
    x = 0.0
    for width, room in zip(widths, rooms, strict=True):
        xs.append(x + width / 2)
        x += width + room
    return xs, x - rooms[-1]


def _course(chain: Sequence[_Node], xs: Sequence[float], top: float, back: bool) -> list[tuple[float, float]]:
    """Left to right. One that goes back stands off a little, not to lie on one that goes there."""
    off = 9.0 if back else 0.0
    first, last = chain[0], chain[-1]
    points = [(xs[first.rank] + first.size.width / 2, first.y - top + off)]
    points += [(xs[node.rank], node.y - top) for node in chain[1:-1]]
    return [*points, (xs[last.rank] - last.size.width / 2, last.y - top + off)]
