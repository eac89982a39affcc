"""What a flusher remembers of instances: the last ones that moved, up to some bytes."""

from __future__ import annotations

import sys

from statecache.core import fold
from statecache.engine import folds


def _fold(id: str, data: str = "{}", version: int = 1) -> dict[fold.Instance, str]:
    return {("order", id): fold.Before(version, 0, "placed", "0", "", data).packed()}


def _many(numbers: range) -> dict[fold.Instance, str]:
    return {key: value for number in numbers for key, value in _fold(str(number)).items()}


def _moved(known: folds.Folds, some: dict[fold.Instance, str]) -> dict[fold.Instance, str]:
    """As a flush does; what was known before it."""
    before = known.take(some)
    known.remember(some)
    return before


def _known(known: folds.Folds, *ids: str) -> dict[str, int]:
    """The versions of those that are known, which stay as they are."""
    found = {id: known._folds.get(("order", id)) for id in ids}
    return {id: fold.Before.unpacked(text).version for id, text in found.items() if text is not None}


EACH = folds.BYTES_EACH + sys.getsizeof(_fold("a")["order", "a"])


def test_who_has_not_moved_for_longest_goes_first() -> None:
    known = folds.Folds(3 * EACH)
    for id in ("a", "b", "c"):
        _moved(known, _fold(id))
    assert _moved(known, _fold("a", version=2)) == _fold("a")
    _moved(known, _fold("d"))
    assert _known(known, "a", "b", "c", "d") == {"a": 2, "c": 1, "d": 1}
    assert len(known) == 3


def test_what_is_taken_is_forgotten() -> None:
    """A flush that fails says nothing of what SQL has."""
    known = folds.Folds()
    _moved(known, _many(range(3)))
    assert known.take([("order", "1"), ("order", "7")]) == _fold("1")
    assert known.take([("order", "1")]) == {}
    assert _known(known, "0", "1", "2") == {"0": 1, "2": 1}


def test_all_that_move_in_turn_stay_as_long_as_there_is_room() -> None:
    """The known issue: with as many instances as there was room for, every batch threw all of them away."""
    known = folds.Folds(1000 * EACH + 1000 * 3)
    for turn in range(3):
        for start in range(0, 1000, 50):
            some = _many(range(start, start + 50))
            assert len(_moved(known, some)) == (50 if turn else 0)
    assert len(known) == 1000


def test_the_bytes_of_data_count() -> None:
    """Also those of an instance whose data grows; and one that is larger than all the room is not kept."""
    known = folds.Folds(10 * EACH)
    _moved(known, _many(range(5)))
    _moved(known, _fold("4", "x" * (6 * EACH)))
    assert list(_known(known, "0", "4")) == ["4"]
    _moved(known, _fold("4", "{}"))
    _moved(known, _many(range(10, 19)))
    assert len(known) == 10
    _moved(known, _fold("giant", "x" * (11 * EACH)))
    assert len(known) == 0
    _moved(known, _many(range(10)))
    assert len(known) == 10


def test_text_that_is_no_ascii_counts_as_what_it_may_take() -> None:
    """The bound would be of characters, a quarter of the bytes, where an emoji makes each character take four."""
    known = folds.Folds(10 * EACH)
    _moved(known, _fold("emoji", "\N{PARTY POPPER}" + "x" * EACH))
    _moved(known, _many(range(6)))
    assert len(known) == 6
    assert _known(known, "emoji") == {}


def test_much_more_than_there_is_room_for() -> None:
    known = folds.Folds(100 * EACH)
    for start in range(0, 50_000, 1000):
        _moved(known, _many(range(start, start + 1000)))
    assert 90 <= len(known) <= 100
    assert _known(known, "49999") == {"49999": 1}
    known.clear()
    assert len(known) == 0
    assert _known(known, "49999") == {}
