"""Diagrams: nothing overlaps, nothing is missing, whatever the machine looks like."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import hypothesis
import pytest
from hypothesis import strategies as st

from statecache.core.spec import EventSpec, MachineSpec, StateSpec, TransitionSpec
from statecache.web import drawing, labels, layout
from tests.support.worlds import Order


def machine(moves: Sequence[tuple[int, int]], count: int) -> MachineSpec:
    """``count`` states in a chain, the first initial, with further moves between them."""
    every = dict.fromkeys([*zip(range(count - 1), range(1, count), strict=True), *moves])
    events = [
        EventSpec(name=f"e{place}", transitions=(TransitionSpec(source=f"s{a}", target=f"s{b}"),))
        for place, (a, b) in enumerate(every)
    ]
    states = [StateSpec(name=f"s{number}", initial=number == 0) for number in range(count)]
    return MachineSpec(name="made_up", states=tuple(states), events=tuple(events))


@st.composite
def machines(draw: st.DrawFn) -> MachineSpec:
    count = draw(st.integers(1, 12))
    states = st.integers(0, count - 1)
    return machine(draw(st.lists(st.tuples(states, states), max_size=25)), count)


@hypothesis.given(machines())
@hypothesis.settings(max_examples=60, deadline=None)
def test_everything_is_drawn_and_no_two_boxes_overlap(made: MachineSpec) -> None:
    picture = drawing.of_counts(made, {"s0": 1234})
    assert picture is not None
    assert {box.name for box in picture.boxes} == {state.name for state in made.states}
    pairs = {(move.source, move.target) for event in made.events for move in event.transitions}
    assert len(picture.lines) == len(pairs)
    for box in picture.boxes:
        assert 0 <= box.left <= box.left + box.width <= picture.width
        assert 0 <= box.top <= box.top + box.height <= picture.height
    for one, other in itertools.combinations(picture.boxes, 2):
        apart_x = abs(one.x - other.x) >= (one.width + other.width) / 2
        apart_y = abs(one.y - other.y) >= (one.height + other.height) / 2
        assert apart_x or apart_y, (one, other)


def there_and_back(*pairs: str, titled: str = "") -> MachineSpec:
    """Letters are states, ``a`` the initial one; ``ab`` is a move there, ``ab+`` one there and one back, ``aa`` a loop."""
    ways = [way for pair in pairs for way in ([pair[:2], pair[1::-1]] if pair.endswith("+") else [pair])]
    events = [
        EventSpec(
            name=f"go_{way}",
            title=f"{titled} {way}" if titled else None,
            transitions=(TransitionSpec(source=way[0], target=way[1]),),
        )
        for way in ways
    ]
    states = [StateSpec(name=name, initial=name == "a") for name in sorted({name for way in ways for name in way})]
    return MachineSpec(name="made_up", states=tuple(states), events=tuple(events))


LABELLED = [
    there_and_back("ab+"),
    there_and_back("ab+", "bc+", "cd+"),
    there_and_back("ab+", "ac+", "ad+", "ae+"),
    there_and_back("ab+", "ac+", "bc+", "bd+", "cd+", titled="a long title"),
    there_and_back("aa", "ab+", "bb", "bc", "ca", "cd", "dd", "da", titled="once more from"),
    there_and_back("ab", "ac", "ad", "bd", "cd", "de", "eb", "ec", "ea"),
]


@pytest.mark.parametrize("made", LABELLED, ids=lambda made: " ".join(event.name[3:] for event in made.events))
def test_no_label_covers_another_or_a_box(made: MachineSpec) -> None:
    way = drawing.Way("b", [(None, "a"), ("a", "b")])
    for picture in (drawing.of_counts(made, {"a": 5}), drawing.of_instance(made, way)):
        assert picture is not None
        told = [line for line in picture.lines if line.label]
        assert len(told) == len(made.events)
        areas = {line.label: labels.area(line.label, line.x, line.y) for line in told}
        boxes = {
            box.name: labels.Area(box.left, box.top, box.left + box.width, box.top + box.height)
            for box in picture.boxes
        }
        for (name, one), (other_name, other) in itertools.combinations([*areas.items(), *boxes.items()], 2):
            wide = min(one.right, other.right) - max(one.left, other.left)
            high = min(one.bottom, other.bottom) - max(one.top, other.top)
            apart = min(wide, high) < 1  # a pixel: how high letters are is estimated
            assert apart or {name, other_name} <= boxes.keys(), (name, other_name)
        assert max(one.bottom for one in areas.values()) <= picture.height


def test_opposite_arrows_have_their_labels_on_their_outer_sides() -> None:
    picture = drawing.of_instance(there_and_back("ab+", "bc"), drawing.Way("b", [(None, "a"), ("a", "b")]))
    there, back = (next(line for line in picture.lines if line.label == label) for label in ("go ab", "go ba"))
    height = {line.label: float(line.path.split()[1].partition("C")[0]) for line in (there, back)}
    assert there.y < height["go ab"] < height["go ba"] < back.y - 9
    assert there.x == back.x


def test_a_line_is_drawn_straight() -> None:
    picture = drawing.of_instance(Order.spec, drawing.Way("paid", [(None, "placed"), ("placed", "paid")]))
    line = [box.y for box in picture.boxes if box.name in ("placed", "paid", "shipped", "delivered")]
    assert max(line) - min(line) < 3
    xs = {box.name: box.x for box in picture.boxes}
    assert xs["placed"] < xs["paid"] < xs["shipped"] < xs["delivered"]


def test_where_it_has_been_where_it_is_and_what_remains() -> None:
    picture = drawing.of_instance(
        Order.spec, drawing.Way("shipped", [(None, "placed"), ("placed", "paid"), ("paid", "shipped")])
    )
    kinds = {box.name: set(box.kind.split()) for box in picture.boxes}
    assert kinds["shipped"] >= {"here"}
    assert kinds["placed"] >= {"been", "initial"}
    assert kinds["delivered"] == {"final"}
    assert kinds["cancelled"] == {"gone", "final"}
    assert sorted(line.kind for line in picture.lines).count("taken") == 2
    assert picture.told == "shipped. Came by placed, paid, shipped."


def test_a_large_machine_is_drawn_around_the_way() -> None:
    made = machine([(5, 0), (5, 7), (5, 9)], 40)
    picture = drawing.of_instance(made, drawing.Way("s5", [(None, "s4"), ("s4", "s5")]))
    assert {box.name for box in picture.boxes} == {"s4", "s5", "s6", "s0", "s7", "s9"}
    assert picture.left_out == 34


def test_one_too_large_is_not_drawn() -> None:
    assert drawing.of_counts(machine([], 61), {}) is None


def test_states_of_another_version_of_the_machine_do_no_harm() -> None:
    for made in (Order.spec, machine([], 40)):
        picture = drawing.of_instance(made, drawing.Way("gone", [(None, "old"), ("old", "gone")]))
        assert all("here" not in box.kind for box in picture.boxes)


@pytest.mark.parametrize("title", ["x" * 500, "a b " * 100, "", " ", "<script>", "日本語" * 50])
def test_titles_of_any_length_fit(title: str) -> None:
    states = (StateSpec(name="only", title=title or None, initial=True),)
    picture = drawing.of_counts(MachineSpec(name="m", states=states), {})
    assert picture is not None
    assert len(picture.boxes[0].lines) <= 3
    assert all(len(text) <= 19 for _, text in picture.boxes[0].lines)


def test_back_arrows_end_where_they_point() -> None:
    sizes = {name: layout.Size(80, 30) for name in ("a", "b")}
    made = layout.layout(sizes, [layout.Arrow("a", "b"), layout.Arrow("b", "a")], "a")
    there, back = made.courses
    assert (there.back, back.back) == (False, True)
    assert there.points[0][0] < there.points[-1][0]
    assert back.points[0][0] > back.points[-1][0]
