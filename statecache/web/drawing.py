"""A machine as a picture: what a template needs to draw it as SVG. Colours are the style sheet's, by class."""

from __future__ import annotations

import dataclasses
import itertools
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from statecache.core.spec import MachineSpec, steps
from statecache.web import labels as labelling
from statecache.web import layout

LARGE_STATES = 12
_NEXT_MAX = 6
_WAY_MAX = 24
_DRAWN_STATES_MAX, _DRAWN_MOVES_MAX = 60, 300
_LINE_CHARACTERS = 18
_LINES_MAX = 3
_CHARACTER_WIDTH = 7.4
_LINE_HEIGHT = 16.0
_LABEL_CHARACTERS = 22
_MARGIN = 14.0
_CORNER = 7.0


@dataclass(frozen=True)
class Box:
    """A state. ``kind`` is its classes: here, been, final, initial, gone (cannot be reached any more)."""

    name: str
    title: str
    lines: tuple[tuple[float, str], ...]
    x: float
    y: float
    width: float
    height: float
    kind: str
    count: int | None

    @property
    def left(self) -> float:
        return self.x - self.width / 2

    @property
    def top(self) -> float:
        return self.y - self.height / 2


@dataclass(frozen=True)
class Line:
    """An arrow. ``path`` is an SVG path, ``head`` that of its point."""

    path: str
    head: str
    label: str
    x: float
    y: float
    kind: str


@dataclass(frozen=True)
class Picture:
    """``told`` says it in words; ``left_out`` counts states of the machine that are not drawn."""

    boxes: Sequence[Box]
    lines: Sequence[Line]
    width: float
    height: float
    told: str
    left_out: int = 0


@dataclass(frozen=True)
class Way:
    """How an instance came where it is: moves as (from, to), and the state that it is in."""

    here: str
    moves: Sequence[tuple[str | None, str]]

    @property
    def been(self) -> list[str]:
        return list(dict.fromkeys(state for move in self.moves for state in move if state is not None))


def of_instance(machine: MachineSpec, way: Way) -> Picture:
    """An instance on its machine: where it has been, where it is, what remains.

    Of a large machine only its way is drawn, and what can come next.
    """
    shown = [state.name for state in machine.states]
    been = [name for name in way.been if name in shown]
    taken = {(source, target) for source, target in way.moves if source in shown and target in shown}
    moves = _moves(machine)
    if len(shown) > LARGE_STATES:
        next_ = [target for source, target in moves if source == way.here and target not in been]
        been = been[-_WAY_MAX:]
        shown = [*been, *next_[:_NEXT_MAX]] or shown[:1]
        moves = {pair: names for pair, names in moves.items() if pair in taken or pair[0] == way.here}
    reachable = _reachable(machine, way.here)
    kinds = {}
    for name in shown:
        words = ["here"] if name == way.here else ["been"] if name in been else []
        kinds[name] = [*words, *([] if words or name in reachable else ["gone"])]
    line_kinds = {
        pair: "taken" if pair in taken else "ahead" if pair[0] in reachable | {way.here} else "gone" for pair in moves
    }
    title = _titles(machine)
    told = f"{title.get(way.here, way.here)}. Came by {', '.join(title[name] for name in been) or 'no known way'}."
    left_out = len(machine.states) - len(shown)
    return _draw(machine, shown, moves, kinds, line_kinds, told, left_out=left_out)


def of_counts(machine: MachineSpec, counts: Mapping[str, int]) -> Picture | None:
    """A machine with the number of its instances in each state; None for one that is too large to be looked at."""
    names = [state.name for state in machine.states]
    kinds = {name: ["full" if counts.get(name) else "empty"] for name in names}
    title = _titles(machine)
    told = ", ".join(f"{title[name]}: {counts.get(name, 0)}" for name in names)
    moves = _moves(machine)
    if len(names) > _DRAWN_STATES_MAX or len(moves) > _DRAWN_MOVES_MAX:
        return None
    return _draw(machine, names, moves, kinds, dict.fromkeys(moves, "ahead"), told, counts=counts)


def _titles(machine: MachineSpec) -> dict[str, str]:
    return {state.name: state.title or state.name.replace("_", " ") for state in machine.states}


def _moves(machine: MachineSpec) -> dict[tuple[str, str], list[str]]:
    """The titles of the events between each two states."""
    found: dict[tuple[str, str], list[str]] = {}
    for event in machine.events:
        for move in event.transitions:
            found.setdefault((move.source, move.target), []).append(event.title or event.name.replace("_", " "))
    return found


def _reachable(machine: MachineSpec, start: str) -> set[str]:
    found: set[str] = set()
    waiting = [start]
    while waiting:
        name = waiting.pop()
        for event in machine.events:
            for move in event.transitions:
                if move.source == name and move.target not in found:
                    found.add(move.target)
                    waiting.append(move.target)
    return found


def _draw(
    machine: MachineSpec,
    names: Collection[str],
    moves: Mapping[tuple[str, str], Sequence[str]],
    kinds: Mapping[str, Sequence[str]],
    line_kinds: Mapping[tuple[str, str], str],
    told: str,
    *,
    counts: Mapping[str, int] | None = None,
    left_out: int = 0,
) -> Picture:
    title = _titles(machine)
    texts = {name: _wrapped(title[name]) for name in names}
    sizes = {name: _size(texts[name], counts is not None) for name in names}
    main = steps(machine) or ()
    on_line = set(itertools.pairwise(main))
    labels = {pair: _label(pair, events, title) for pair, events in moves.items()}
    arrows = [
        layout.Arrow(*pair, weight=_weight(pair, line_kinds[pair], on_line), room=labelling.width(labels[pair]))
        for pair in moves
        if pair[0] in sizes and pair[1] in sizes
    ]
    start = next((state.name for state in machine.states if state.initial and state.name in sizes), next(iter(names)))
    made = layout.layout(sizes, arrows, start)
    final = {state.name for state in machine.states if state.final}
    loops = [pair for pair in moves if pair[0] == pair[1] and pair[0] in sizes]
    top = _MARGIN + (22 if loops else 0)
    boxes = []
    for name, place in made.places.items():
        words = [*kinds[name], *(["final"] if name in final else []), *(["initial"] if name == start else [])]
        count = None if counts is None else counts.get(name, 0)
        boxes.append(_box(name, title[name], texts[name], place, top, " ".join(words), count))
    lines = [_line(course, top, labels, line_kinds) for course in made.courses]
    by_name = {box.name: box for box in boxes}
    turns = [_loop(by_name[pair[0]], labels[pair], line_kinds[pair]) for pair in loops]
    width, height = made.width + 2 * _MARGIN, made.height + top + _MARGIN
    lines = [*_with_labels_apart(lines, made.courses, boxes, turns, top, height), *turns]
    lines.sort(key=lambda line: line.kind == "taken")  # above the others
    return Picture(boxes, lines, width, height, told, left_out)


def _weight(pair: tuple[str, str], kind: str, main: Collection[tuple[str, str]]) -> float:
    return 40.0 if kind == "taken" or pair in main else 1.0


def _label(pair: tuple[str, str], events: Sequence[str], title: Mapping[str, str]) -> str:
    """Nothing where it would only repeat the target's title, as in machines learned from a log."""
    told = [event for event in events if event != title[pair[1]]]
    text = ", ".join(told)
    return text if len(text) <= _LABEL_CHARACTERS else text[: _LABEL_CHARACTERS - 1] + "…"


def _wrapped(text: str) -> list[str]:
    lines = textwrap.wrap(" ".join(text.split()), _LINE_CHARACTERS) or [text[:_LINE_CHARACTERS]]
    if len(lines) > _LINES_MAX:
        lines = [*lines[: _LINES_MAX - 1], lines[_LINES_MAX - 1][: _LINE_CHARACTERS - 1] + "…"]
    return lines


def _size(lines: Sequence[str], counted: bool) -> layout.Size:
    width = max(76.0, max(map(len, lines)) * _CHARACTER_WIDTH + 26)
    return layout.Size(width, len(lines) * _LINE_HEIGHT + 18 + (20 if counted else 0))


def _box(
    name: str, title: str, texts: Sequence[str], place: layout.Place, top: float, kind: str, count: int | None
) -> Box:
    y = place.y + top
    first = y - (len(texts) - 1) * _LINE_HEIGHT / 2 - (10 if count is not None else 0)
    lines = tuple((round(first + index * _LINE_HEIGHT, 1), text) for index, text in enumerate(texts))
    x, size = place.x + _MARGIN, place.size
    return Box(name, title, lines, round(x, 1), round(y, 1), round(size.width, 1), round(size.height, 1), kind, count)


def _line(
    course: layout.Course,
    top: float,
    labels: Mapping[tuple[str, str], str],
    kinds: Mapping[tuple[str, str], str],
) -> Line:
    points = [(x + _MARGIN, y + top) for x, y in course.points]
    pair = course.arrow.source, course.arrow.target
    end_x, end_y = points[-1]
    way = 1 if points[-1][0] >= points[-2][0] else -1
    points[-1] = (end_x - way * _CORNER, end_y)
    path = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
    for (x, y), (to_x, to_y) in itertools.pairwise(points):
        half = (x + to_x) / 2
        path += f"C{half:.1f} {y:.1f} {half:.1f} {to_y:.1f} {to_x:.1f} {to_y:.1f}"
    head = f"M{end_x:.1f} {end_y:.1f}l{-way * 8} -4.5v9z"
    return Line(path, head, labels[pair], 0, 0, kinds[pair])


def _with_labels_apart(
    lines: Sequence[Line],
    courses: Sequence[layout.Course],
    boxes: Sequence[Box],
    loops: Sequence[Line],
    top: float,
    height: float,
) -> list[Line]:
    pairs = {(course.arrow.source, course.arrow.target) for course in courses}
    asked = tuple(
        labelling.Label(
            line.label,
            tuple((x + _MARGIN, y + top) for x, y in course.points),
            course.back,
            (course.arrow.target, course.arrow.source) in pairs,
        )
        for line, course in zip(lines, courses, strict=True)
    )
    taken = [labelling.Area(box.left, box.top, box.left + box.width, box.top + box.height) for box in boxes]
    taken += [labelling.area(line.label, line.x, line.y) for line in loops if line.label]
    spots = labelling.placed(asked, tuple(taken), height)
    return [dataclasses.replace(line, x=x, y=y) for line, (x, y) in zip(lines, spots, strict=True)]


def _loop(box: Box, label: str, kind: str) -> Line:
    """From a box to itself, over its top."""
    x, y = box.x, box.top
    path = f"M{x - 14:.1f} {y:.1f}C{x - 18:.1f} {y - 22:.1f} {x + 18:.1f} {y - 22:.1f} {x + 14:.1f} {y - 6:.1f}"
    return Line(path, f"M{x + 13.5:.1f} {y:.1f}l-4.5 -8h9z", label, x, round(y - 19, 1), kind)
