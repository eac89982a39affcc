"""Values of classes of the caller's own: written as what they are, or refused; the other items of a bulk call go through."""

from __future__ import annotations

import datetime
import enum
from collections.abc import Callable, Iterator
from typing import Any

import pydantic
import pytest

from statecache import Move, State, StateMachine
from statecache.core import errors, model
from tests.support.worlds import World


class Old(str, enum.Enum):  # noqa: UP042 - a StrEnum's text is the same everywhere
    """As Python before 3.11 had it: its text in an f-string is another than on the wire."""

    ID = "x"
    FIELD = "amount"
    EVENT = "note"


class Sub(str):
    """A plain class of its own, as ``numpy.str_`` is."""

    __slots__ = ()


class Odd(str):
    """One whose hash is another."""

    __slots__ = ()

    def __hash__(self) -> int:
        return 1

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other)  # type: ignore[arg-type]


class One(int, enum.Enum):
    ONE = 1


class _Unshowable:
    def __repr__(self) -> str:
        raise KeyError("no text")


class _NoZone(datetime.tzinfo):
    def utcoffset(self, when: datetime.datetime | None) -> datetime.timedelta | None:
        return None


class _FailingZone(datetime.tzinfo):
    def utcoffset(self, when: datetime.datetime | None) -> datetime.timedelta | None:
        raise LookupError("no such zone")


class _FailingMapping(dict[str, Any]):
    def items(self) -> Any:
        raise RuntimeError("no items")


def _is_fine(snapshot: model.Snapshot) -> bool:
    return 1 / snapshot.data["amount"] > 0


class Careful(StateMachine):
    """A machine whose guard and validator fail on some values."""

    open = State(initial=True)
    shut = State(final=True)
    shut_it = open.to(shut, guard=_is_fine)
    touch = open.to(open)

    class Data(pydantic.BaseModel, extra="forbid"):
        amount: float | None = None
        text: Any = None

        @pydantic.field_validator("text")
        @classmethod
        def _stripped(cls, value: Any) -> Any:
            return value.strip()


@pytest.fixture
def world(redis_url: str, sqlite_url: str, namespace: str, client: str) -> Iterator[World]:
    with World(redis_url, sqlite_url, namespace, client=client) as found:
        yield found


@pytest.mark.parametrize(("hostile", "plain"), [(Old.ID, "x"), (Sub("x"), "x")], ids=["an Enum's", "a class's own"])
def test_a_text_of_another_class_is_the_same_text(world: World, hostile: Any, plain: str) -> None:
    """One instance, one transition id, one field, in Redis, in the log and in SQL."""
    world.orders.start(hostile, {"amount": 1})
    with pytest.raises(errors.AlreadyExistsError):
        world.orders.start(plain)
    name: Any = Old.FIELD if hostile is Old.ID else Sub("amount")
    event: Any = Old.EVENT if hostile is Old.ID else Sub("note")
    first = world.orders.transition(hostile, event, {name: 2}, transition_id=hostile, actor=hostile, reason=hostile)
    again = world.orders.transition(plain, "note", {"amount": 2}, transition_id=plain)
    assert (again.version, again.duplicate, again.transition_id) == (first.version, True, plain)
    world.orders.transition(plain, "note", increment={name: 2})
    world.orders.transition_many([Move(hostile, "note", {name: 9}), Move(plain, event, {"amount": 10})])
    assert [type(each) for each in world.orders.get_many([hostile, plain])] == [model.Snapshot] * 2
    assert (world.orders.get(hostile).id, world.orders.get(plain).data) == (plain, {"amount": 10})
    world.orders.transition(plain, "note", unset=[name])
    world.flush()
    assert [row.patch for row in world.orders.history(hostile)] == [
        {"amount": 1}, {"amount": 2}, {}, {"amount": 9}, {"amount": 10}, {},
    ]  # fmt: skip
    if world.kind == "sync":
        claim = world.orders.claim(hostile)
        assert (type(claim.id), claim.release()) == (str, True)
    world.verify()


class Named(str, enum.Enum):  # noqa: UP042
    PLACED = "placed"
    WORKER = "packer"


def test_states_workers_and_tokens_of_another_class(world: World) -> None:
    """They are asked of SQL, and sent to the script."""
    world.orders.start("1")
    world.flush()
    placed: Any = Named.PLACED
    assert [one.id for one in world.orders.find(placed)] == ["1"]
    if world.kind == "sync":
        claim = world.orders.claim_next(placed, worker=Named.WORKER)
        assert claim is not None
        assert claim.worker == "packer"
        assert world.orders.fire(Move("1", "note", claim=Sub(claim.token))).version == 2


def test_one_field_by_two_names(world: World) -> None:
    """Names that a dictionary keeps apart and that are one text."""
    names: Any = {Odd("amount"): 1, "amount": 2}
    with pytest.raises(errors.InvalidDataError, match="a field twice"):
        world.orders.start("1", names)


def test_numbers_of_another_class(world: World) -> None:
    world.orders.start("1", {"n": 1, "f": 1e-24})
    world.orders.transition("1", "note", increment={"n": One.ONE}, expect_version=One.ONE)
    results = world.orders.transition_many(
        [Move("1", "note", increment={"n": 1}), Move("1", "note", increment={"n": One.ONE})]
    )
    assert [each.version for each in results] == [3, 4]
    world.orders.transition("1", "note", increment={"f": 1.23456789012345e-10})
    assert world.orders.get("1").data == {"n": 4, "f": 1e-24 + 1.23456789012345e-10}
    world.orders.transition("1", "note", {"large": 2**53 + 1})
    with pytest.raises(errors.InvalidDataError, match="'large'"):
        world.orders.transition("1", "note", increment={"large": 0.0})
    world.orders.transition("1", "note", increment={"g": 1e-25})
    assert world.orders.get("1").data["g"] == 1e-25
    world.flush()
    world.verify()


HOSTILE: list[tuple[Callable[[], Move], str]] = [
    (lambda: Move("h", "note", {"n": 10**5000}), "field 'n': a int that cannot be shown is refused"),
    (lambda: Move("h", "note", increment={"n": 10**5000}), "at most 15 digits"),
    (lambda: Move("h", "note", expect_version=10**5000), "expect_version a int that cannot be shown is refused"),
    (lambda: Move("h", "note", {"n": _Unshowable()}), "a _Unshowable that cannot be shown is refused"),
    (lambda: Move("h", "note", _FailingMapping(n=1)), "RuntimeError while its arguments were looked at"),
    (lambda: Move("h", "note", occurred_at=datetime.datetime.max), "no time of the years 1 to 9999"),
    (
        lambda: Move("h", "note", occurred_at=datetime.datetime.min.replace(
            tzinfo=datetime.timezone(datetime.timedelta(hours=14)))),
        "no time of the years 1 to 9999",
    ),
    (lambda: Move("h", "note", occurred_at=datetime.datetime(2026, 1, 1, tzinfo=_FailingZone())), "no time of the years"),
]  # fmt: skip


@pytest.mark.parametrize(("move", "message"), HOSTILE)
def test_one_hostile_element_fails_alone(world: World, move: Callable[[], Move], message: str) -> None:
    ids = [f"g{number}" for number in range(600)]
    world.orders.start_many([*ids, "h"])
    moves = [Move(id, "note", {"n": 1}) for id in ids]
    moves.insert(400, move())
    results = world.orders.transition_many(moves)
    failed = results.pop(400)
    with pytest.raises(errors.InvalidDataError, match=message):
        raise failed
    assert {each.version for each in results} == {2}
    assert world.orders.get("h").version == 1


def test_a_time_zone_that_knows_no_offset(world: World) -> None:
    """Such a time is naive, so UTC."""
    world.orders.start("1", occurred_at=datetime.datetime(2026, 1, 1, tzinfo=_NoZone()))
    assert world.orders.history("1")[0].occurred_at == datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


def test_guards_and_validators_that_fail(world: World) -> None:
    """The instance that they fail for is not moved; the others are."""
    careful = world.cache.machine(Careful)
    careful.start_many([(id, {"amount": 0 if id == "c2" else 1}) for id in ("c1", "c2", "c3")])
    results = careful.transition_many([Move(id, "shut_it") for id in ("c1", "c2", "c3")])
    assert [getattr(each, "state", None) for each in (results[0], results[2])] == ["shut", "shut"]
    with pytest.raises(errors.DefinitionError, match=r"c2: the guard of 'shut_it' failed .* ZeroDivisionError"):
        raise results[1]
    assert isinstance(results[1].__cause__, ZeroDivisionError)
    with pytest.raises(errors.DefinitionError, match="ZeroDivisionError"):
        careful.transition("c2", "shut_it")
    moved = careful.transition_many([Move("c2", "touch", {"text": None}), Move("c2", "touch", {"text": " a "})])
    with pytest.raises(errors.InvalidDataError, match="a validator failed: AttributeError"):
        raise moved[0]
    assert careful.get("c2").data == {"amount": 0, "text": "a"}


def test_an_increment_of_what_the_data_forbids(world: World) -> None:
    careful = world.cache.machine(Careful)
    careful.start("1", {"amount": 1})
    with pytest.raises(errors.InvalidDataError, match="the increment of 'amout' is refused"):
        careful.transition("1", "touch", increment={"amout": 1})
    careful.transition("1", "touch", increment={"amount": 1}, unset=["left_over"])
    assert careful.get("1").data == {"amount": 2}


RECEIPT = model.Receipt("order", "1", "@start", None, "placed", 1, "1-1", 1700, "t")


@pytest.mark.parametrize("call", [
    lambda world: world.orders.start("1", durability=""),
    lambda world: world.orders.start_many(["1"], durability=[]),
    lambda world: world.orders.start("1", timeout=float("nan")),
    lambda world: world.orders.start("1", timeout="5"),
    lambda world: world.orders.get("1", timeout="5"),
    lambda world: world.cache.flush(timeout="5"),
    lambda world: world.orders.find(limit=2**63),
    lambda world: world.orders.find(limit=None),
    lambda world: world.orders.get_many(None),
    lambda world: world.cache.wait_durable(None),
    lambda world: world.cache.wait_durable(5),
    lambda world: world.cache.wait_durable("receipt"),
    lambda world: world.cache.wait_durable([RECEIPT, errors.NotFoundError("no")]),
    lambda world: world.cache.wait_durable(RECEIPT, timeout="5"),
])  # fmt: skip
def test_arguments_that_are_none(world: World, call: Callable[[World], object]) -> None:
    with pytest.raises(errors.InvalidDataError, match="is refused"):
        call(world)
    with pytest.raises(errors.NotFoundError):
        world.orders.get("1")


@pytest.mark.parametrize("machine", [5, StateMachine, object])
def test_what_is_no_machine(world: World, machine: Any) -> None:
    with pytest.raises(errors.DefinitionError, match="is no machine"):
        world.cache.machine(machine)


def test_flush_with_the_default_timeout(world: World) -> None:
    world.orders.start("1")
    world.cache.flush(timeout=None)
    assert world.durable.checkpoint("order", "1") is not None
