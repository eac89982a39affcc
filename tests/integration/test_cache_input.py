"""P12 at the public surface: bad input is refused at the door; the message tells field, value and rule; nothing is written."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import pytest

from statecache import Move, State, StateMachine
from statecache.core import errors
from tests.support.worlds import World

NAN = float("nan")


class Invoice(StateMachine):
    """A machine whose data is declared."""

    open = State(initial=True)
    closed = State(final=True)
    close = open.to(closed)
    touch = open.to(open)

    class Data(pydantic.BaseModel):
        amount: float | None = None
        lines: list[str] = []


class Strict(StateMachine):
    """A machine whose class converts nothing."""

    open = State(initial=True)
    touch = open.to(open)

    class Data(pydantic.BaseModel):
        amount: float | None = pydantic.Field(None, strict=True)


class Counter(StateMachine):
    """A machine whose data is counted."""

    open = State(initial=True)
    touch = open.to(open)

    class Data(pydantic.BaseModel):
        n: Annotated[int, pydantic.Field(le=10)] = 0
        kind: Literal["x", "y"] = "x"
        share: float | None = None
        when: datetime.datetime | None = None
        tags: list[str] = []


@pytest.fixture
def world(redis_url: str, sqlite_url: str, namespace: str, client: str) -> Iterator[World]:
    with World(redis_url, sqlite_url, namespace, client=client) as found:
        found.start("1")
        yield found


WRITES: list[tuple[Callable[[Any], object], str]] = [
    (lambda orders: orders.start("a\nb"), r"id 'a\\nb' is refused: it holds the control character '\\n' at position 1"),
    (lambda orders: orders.start("x" * 201), "id .* is refused: it has 201 characters, 1 to 200 are allowed"),
    (lambda orders: orders.start(""), "id '' is refused"),
    (lambda orders: orders.start(None), "id None is refused: it must be text, not NoneType"),
    (lambda orders: orders.start("2", {"a": NAN}), "field 'a': nan is refused: JSON knows no NaN"),
    (lambda orders: orders.start("2", {"a": "x\0"}), "field 'a': .* is refused: it holds a NUL character"),
    (lambda orders: orders.start("2", {"a": object()}), "field 'a': .* is refused: object is no JSON value"),
    (lambda orders: orders.start("2", {"a": 2**70}), "field 'a': .* is refused: integers are limited to 64 bit"),
    (lambda orders: orders.start("2", {"a b": 1}), "field name 'a b' is refused"),
    (
        lambda orders: orders.start("2", {"a": "x" * 10_000_000}),
        "data is refused: it takes 10000008 bytes, at most 65536",
    ),
    (lambda orders: orders.start("2", {f"f{n}": n for n in range(65)}), "it has 65 fields, at most 64 are allowed"),
    (lambda orders: orders.start("2", [("a", 1)]), "is refused: it must map field names to values"),
    (lambda orders: orders.transition("1", "fly"), "machine 'order' has no event 'fly'; it has pay, ship"),
    (lambda orders: orders.transition("1", "note", unset="a"), "unset 'a' is refused: give a list of field names"),
    (lambda orders: orders.transition("1", "note", unset=["a b"]), "field name 'a b' is refused"),
    (lambda orders: orders.transition("1", "note", increment={"n": "1"}), "increment of 'n': '1' is refused"),
    (
        lambda orders: orders.transition("1", "note", {"n": 1}, increment={"n": 1}),
        "field 'n' is refused: it stands in more",
    ),
    (lambda orders: orders.transition("1", "note", expect_version="1"), "expect_version '1' is refused"),
    (lambda orders: orders.transition("1", "note", transition_id="a\x1fb"), "transition_id .* control character"),
    (lambda orders: orders.transition("1", "note", actor="a\nb"), "actor .* control character"),
    (lambda orders: orders.transition("1", "note", reason=5), "reason 5 is refused: it must be text, not int"),
    (lambda orders: orders.transition("1", "note", occurred_at="yesterday"), "occurred_at 'yesterday' is refused"),
    (
        lambda orders: orders.transition("1", "note", durability="forever"),
        "durability 'forever' is refused: it is one of hot",
    ),
    (lambda orders: orders.start("2", durability="forever"), "durability 'forever' is refused"),
    (lambda orders: orders.start_many(["2"], durability="forever"), "durability 'forever' is refused"),
    (lambda orders: orders.fire("1"), "move '1' is refused: it must be a Move"),
    (lambda orders: orders.transition("1", "note", timeout=10**400), "timeout 1000.* is refused: it must be a number"),
]


@pytest.mark.parametrize(("call", "message"), WRITES, ids=[message for _, message in WRITES])
def test_write_is_refused_and_nothing_is_written(world: World, call: Callable[[Any], object], message: str) -> None:
    before = world.hot_dump(), world.sql_dump()
    with pytest.raises((errors.InvalidDataError, errors.InvalidTransitionError), match=message):
        call(world.orders)
    assert (world.hot_dump(), world.sql_dump()) == before


def _past(when: object) -> Callable[[Any], object]:
    return lambda orders: orders.at("1", when=when)


READS: list[tuple[Callable[[Any], object], str]] = [
    (lambda orders: orders.get("a\0"), "id .* is refused"),
    (lambda orders: orders.get(5), "id 5 is refused"),
    (lambda orders: orders.state(""), "id '' is refused"),
    (lambda orders: orders.history("a\n"), "id .* is refused"),
    (lambda orders: orders.at("1"), "either a version or a moment"),
    (lambda orders: orders.at("1", version=1, when=datetime.datetime.now()), "either a version or a moment"),
    (lambda orders: orders.at("1", version="1"), "version '1' is refused"),
    (lambda orders: orders.at("1", version=True), "version True is refused"),
    (_past("now"), "when 'now' is refused: it must be a datetime"),
    (_past(datetime.date(2026, 1, 1)), "when .* is refused: it must be a datetime"),
    (lambda orders: orders.find(state="flying"), "state 'flying' is refused: machine 'order' has placed, paid"),
    (lambda orders: orders.find(older_than=10), "older_than 10 is refused: it must be a timedelta"),
    (lambda orders: orders.find(limit=-1), "limit -1 is refused"),
    (lambda orders: orders.find(limit="5"), "limit '5' is refused"),
    (lambda orders: orders.get_many("abc"), "ids 'abc' is refused: give a list of ids"),
]


@pytest.mark.parametrize(("call", "message"), READS, ids=[message for _, message in READS])
def test_read_is_refused_with_our_error(world: World, call: Callable[[Any], object], message: str) -> None:
    with pytest.raises(errors.InvalidDataError, match=message):
        call(world.orders)


def test_questions_about_all_machines_are_refused_with_our_error(world: World) -> None:
    for limit in ("x", 0, True):
        with pytest.raises(errors.InvalidDataError, match=r"limit .* is refused"):
            world.cache.stuck(limit=limit)
    with pytest.raises(errors.InvalidDataError, match="older_than 5 is refused: it must be a timedelta"):
        world.cache.stuck(older_than=5)
    for name in ("\ud800", "a\0b", ""):
        with pytest.raises(errors.NotFoundError, match=r"no machine .* is registered here"):
            world.cache.machine(name)


def test_declared_data_is_checked_field_by_field(world: World) -> None:
    invoices = world.cache.machine(Invoice)
    with pytest.raises(
        errors.InvalidDataError, match="field 'amount': 'much' is refused: input should be a valid number"
    ):
        invoices.start("1", data={"amount": "much"})
    invoices.start("1", data={"amount": "12.5", "free": 1})
    assert invoices.get("1").data == {"amount": 12.5, "free": 1}
    with pytest.raises(errors.InvalidDataError, match=r"field 'lines\.0': 1 is refused"):
        invoices.transition("1", "touch", data={"lines": [1]})
    assert invoices.get("1").version == 1


def test_a_class_converts_and_its_stored_schema_does_not(world: World) -> None:
    """As ``StateMachine`` says; a strict field makes both the same."""
    values: list[Any] = ["12.5", True, "much", 12]
    for machine, by_class in ((Invoice, [12.5, 1.0, None, 12]), (Strict, [None, None, None, 12])):
        for handle, expected in (
            (world.cache.machine(machine), by_class),
            (world.cache.machine(machine.name), [None, None, None, 12]),
        ):
            prefix = "class" if handle.machine is machine else "name"
            found = handle.start_many([(f"{prefix}{n}", {"amount": value}) for n, value in enumerate(values)])
            refused = [isinstance(one, errors.InvalidDataError) for one in found]
            assert refused == [value is None for value in expected], (machine, prefix)
            for n, value in enumerate(expected):
                if value is not None:
                    assert handle.get(f"{prefix}{n}").data == {"amount": value}


@pytest.mark.parametrize("is_loaded", [False, True], ids=["class", "yaml"])
def test_increment_of_what_is_declared_as_no_number_is_refused(world: World, tmp_path: Path, is_loaded: bool) -> None:
    Counter.dump(tmp_path / "counter.yaml")
    counters = world.cache.machine(StateMachine.load(tmp_path / "counter.yaml") if is_loaded else Counter)
    counters.start("1", data={"n": 3})
    before = world.hot_dump()
    for increment, rule in (
        ({"n": 0.5}, "the increment of 'n' is refused: its data declares whole numbers, 0.5 is a float"),
        ({"n": 1, "kind": 1}, "the increment of 'kind' is refused: its data declares no number there, but string"),
        ({"when": 1}, "the increment of 'when' is refused: its data declares no number there, but null or string"),
        ({"tags": 1.5}, "the increment of 'tags' is refused: its data declares no number there, but array"),
    ):
        with pytest.raises(errors.InvalidDataError, match=rule):
            counters.transition("1", "touch", increment=increment)
        (told,) = counters.transition_many([Move("1", "touch", increment=increment)])
        assert rule in str(told)
    assert world.hot_dump() == before
    counters.transition("1", "touch", increment={"n": 100, "share": 0.5, "free": 1.5})
    assert counters.get("1").data == {"n": 103, "share": 0.5, "free": 1.5}, "bounds are not looked at"


def test_increment_of_what_is_no_number_is_refused_by_the_script(world: World) -> None:
    world.start("2", word="x", big=2**53 - 1)
    for field, rule in (("word", "it holds no number"), ("big", "leaves the range of exact numbers")):
        before = world.hot_dump()
        with pytest.raises(
            errors.InvalidDataError, match=f"order:2: increment of field '{field}' is refused: .*{rule}"
        ):
            world.orders.transition("2", "note", increment={field: 1})
        assert world.hot_dump() == before


def test_instance_has_a_limit_of_fields(world: World) -> None:
    world.start("2")
    for part in range(4):
        world.orders.transition("2", "note", data={f"f{part}_{n}": n for n in range(64)})
    with pytest.raises(errors.InvalidDataError, match="order:2: the data is refused: it would have 257 fields"):
        world.orders.transition("2", "note", data={"one_more": 1})
    assert world.orders.transition("2", "note", data={"one_more": 1}, unset=["f0_0"]).version == 6
    assert len(world.orders.get("2").data) == 256
    world.flush()
    assert world.evict("2") == "OK"
    assert world.orders.transition("2", "note").version == 7
    assert len(world.orders.get("2").data) == 256


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"redis_url": "http://x"}, "redis_url = 'http://x'"),
        ({"redis_url": "redis://127.0.0.1:1/0"}, "."),
        ({"namespace": "a b"}, "namespace 'a b' is refused"),
        ({"namespace": "{x}"}, "namespace '{x}' is refused"),
        ({"partition_count": 0}, "partition count 0 is refused"),
        ({"database_url": "sqlite://"}, "in-memory SQLite database is refused"),
        ({"database_url": "nonsense"}, "database_url"),
        ({"socket_timeout_seconds": -1}, "socket_timeout_seconds"),
        ({"no_such_setting": 1}, "unknown setting 'no_such_setting'"),
    ],
)
def test_wrong_settings_are_told_at_connect(world: World, settings: dict[str, Any], message: str) -> None:
    from statecache import StateCache

    given = {"redis_url": world.redis_url, "database_url": world.database_url, "namespace": world.namespace}
    kinds = (errors.ConfigurationError, errors.UnavailableError)
    with pytest.raises(kinds, match=message):
        StateCache.connect(**{**given, "partition_count": 2, "call_timeout_seconds": 0.3, **settings})
