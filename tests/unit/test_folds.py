"""What a flusher remembers of instances: the last ones that moved, up to some bytes."""

from __future__ import annotations

from statecache.core import entry, fold
from statecache.engine import folds


def _fold(id: str, data: str = "{}", version: int = 1) -> dict[fold.Instance, fold.Folded]:
    instance = ("order", id)
    return {instance: fold.Folded(*instance, 0, "placed", version, entry.EntryId(1, 1), 0, 0, 1, "", data)}


def _many(numbers: range) -> dict[fold.Instance, fold.Folded]:
    return {key: value for number in numbers for key, value in _fold(str(number)).items()}


EACH = folds.BYTES_EACH + len("{}")


def test_who_has_not_moved_for_longest_goes_first() -> None:
    known = folds.Folds(3 * EACH)
    for id in ("a", "b", "c"):
        known.remember(_fold(id))
    known.remember(_fold("a", version=2))
    known.remember(_fold("d"))
    assert known.get(("order", "b")) is None
    found = known.get(("order", "a"))
    assert found is not None
    assert found.version == 2
    assert [known.get(("order", id)) is not None for id in ("c", "d")] == [True, True]
    assert len(known) == 3


def test_all_that_move_in_turn_stay_as_long_as_there_is_room() -> None:
    """The known issue: with as many instances as there was room for, every batch threw all of them away."""
    known = folds.Folds(1000 * EACH)
    for turn in range(3):
        for start in range(0, 1000, 50):
            some = _many(range(start, start + 50))
            assert all((known.get(instance) is not None) == (turn > 0) for instance in some)
            known.remember(some)
    assert len(known) == 1000


def test_the_bytes_of_data_count() -> None:
    """Also those of an instance whose data grows; and one that is larger than all the room is not kept."""
    known = folds.Folds(10 * EACH)
    known.remember(_many(range(5)))
    known.remember(_fold("4", "x" * (6 * EACH)))
    assert known.get(("order", "0")) is None
    assert known.get(("order", "4")) is not None
    known.remember(_fold("4", "{}"))
    known.remember(_many(range(10, 19)))
    assert len(known) == 10
    known.remember(_fold("giant", "x" * (11 * EACH)))
    assert len(known) == 0
    known.remember(_many(range(10)))
    assert len(known) == 10


def test_text_that_is_no_ascii_counts_as_what_it_may_take() -> None:
    """The bound would be of characters, a quarter of the bytes, where an emoji makes each character take four."""
    known = folds.Folds(10 * EACH)
    known.remember(_fold("emoji", "\N{PARTY POPPER}" + "x" * EACH))
    known.remember(_many(range(6)))
    assert len(known) == 6
    assert known.get(("order", "emoji")) is None


def test_much_more_than_there_is_room_for() -> None:
    known = folds.Folds(100 * EACH)
    for start in range(0, 50_000, 1000):
        known.remember(_many(range(start, start + 1000)))
    assert 90 <= len(known) <= 100
    assert known.get(("order", "49999")) is not None
    known.clear()
    assert len(known) == 0
    assert known.get(("order", "49999")) is None
