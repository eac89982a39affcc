"""Machines declared as classes: what a class collects, and what it refuses."""

from __future__ import annotations

import enum
from datetime import timedelta
from pathlib import Path
from typing import Any

import pydantic
import pytest

from statecache.core import errors
from statecache.core.machine import State, StateMachine, Transitions

ORDER_YAML = Path(__file__).parents[2] / "config" / "machines" / "order.yaml"


class Order(StateMachine):
    placed = State(initial=True)
    paid = State()
    shipped = State()
    delivered = State(final=True)
    cancelled = State(final=True)

    pay = placed.to(paid)
    ship = paid.to(shipped)
    deliver = shipped.to(delivered)
    cancel = placed.to(cancelled) | paid.to(cancelled)

    class Data(pydantic.BaseModel):
        amount: float | None = None


def is_covered(snapshot: Any) -> bool:
    return snapshot == "covered"


def refusal_of(body: dict[str, Any], *bases: type) -> str:
    """Make a class of the body; return what the DefinitionError says."""
    with pytest.raises(errors.DefinitionError) as caught:
        make(body, *bases)
    return str(caught.value)


def make(body: dict[str, Any], *bases: type) -> type[StateMachine]:
    return type(StateMachine)("Broken", (*bases, StateMachine), dict(body))


def test_the_example_of_the_design() -> None:
    assert (Order.spec.name, Order.spec.version, Order.name) == ("order", 1, "order")
    assert [(state.name, state.initial, state.final) for state in Order.spec.states] == [
        ("placed", True, False),
        ("paid", False, False),
        ("shipped", False, False),
        ("delivered", False, True),
        ("cancelled", False, True),
    ]
    assert {event.name: [(m.source, m.target) for m in event.transitions] for event in Order.spec.events} == {
        "pay": [("placed", "paid")],
        "ship": [("paid", "shipped")],
        "deliver": [("shipped", "delivered")],
        "cancel": [("placed", "cancelled"), ("paid", "cancelled")],
    }
    assert Order.spec.data_schema == Order.Data.model_json_schema()
    assert Order.fingerprint == Order.spec.fingerprint


def test_the_tables_of_a_machine() -> None:
    tables = Order.definition
    assert (tables.name, tables.version, tables.initial) == ("order", 1, "placed")
    assert tables.finals == {"delivered", "cancelled"}
    assert tables.states == ("placed", "paid", "shipped", "delivered", "cancelled")
    assert tables.events == ("pay", "ship", "deliver", "cancel")
    assert tables.targets["cancel"] == {"placed": "cancelled", "paid": "cancelled"}
    assert tables.events_from["paid"] == tables.available_events("paid") == ("ship", "cancel")
    assert tables.available_events("delivered") == tables.available_events("of_another_version") == ()
    assert tables.is_final("delivered")
    assert not tables.is_final("paid")
    assert tables.titles["paid"] == "paid"
    assert tables.guards == {}


def test_one_event_may_lead_to_different_states_from_different_states() -> None:
    class Refund(StateMachine):
        placed = State(initial=True)
        paid = State()
        void = State(final=True)
        refunded = State(final=True)
        pay = placed.to(paid)
        cancel = placed.to(void)
        cancel |= paid.to(refunded)

    assert Refund.definition.targets["cancel"] == {"placed": "void", "paid": "refunded"}


def test_a_state_may_lead_to_itself() -> None:
    class Poll(StateMachine):
        waiting = State(initial=True)
        done = State(final=True)
        look = waiting.to(waiting)
        finish = waiting.to(done)

    assert Poll.definition.targets["look"] == {"waiting": "waiting"}


@pytest.mark.parametrize(
    ("class_name", "machine_name"),
    [("Order", "order"), ("MyOrder", "my_order"), ("HTTPJob2", "http_job2"), ("_Order", "order"), ("my_job", "my_job")],
)
def test_the_name_comes_from_the_class(class_name: str, machine_name: str) -> None:
    machine = type(StateMachine)(class_name, (StateMachine,), {"here": State(initial=True)})
    assert machine.name == machine.spec.name == machine_name


def test_options_are_class_attributes() -> None:
    class Level(enum.StrEnum):
        DURABLE = "durable"

    class Defaults:
        durability = Level.DURABLE

    class Parcel(Defaults, StateMachine):
        name = "box"
        version = 3
        title = "A box"
        hot_ttl = timedelta(hours=1)
        packed = State(initial=True, final=True, title="Packed up")

    assert (Parcel.spec.name, Parcel.spec.version, Parcel.spec.title) == ("box", 3, "A box")
    assert (Parcel.spec.durability, Parcel.spec.hot_ttl_seconds) == ("durable", 3600.0)
    assert type(Parcel.spec.durability) is str
    assert (Parcel.definition.durability, Parcel.definition.hot_ttl_seconds) == ("durable", 3600.0)
    assert Parcel.definition.titles == {"packed": "Packed up"}
    assert Parcel.packed.name == "packed"
    assert repr(Parcel.packed) == "<State box.packed>"


def test_a_machine_has_no_objects() -> None:
    with pytest.raises(TypeError, match=r"Order is a declaration.*StateCache\.machine\(\)"):
        Order()


def test_guards_stand_in_the_spec_by_name_and_in_the_class_as_functions() -> None:
    class Guarded(StateMachine):
        placed = State(initial=True)
        paid = State()
        void = State(final=True)
        pay = placed.to(paid, guard=is_covered)
        cancel = placed.to(void) | paid.to(void, guard=is_covered)

    assert [m.guard for event in Guarded.spec.events for m in event.transitions] == ["is_covered", None, "is_covered"]
    assert Guarded.guards == {"is_covered": is_covered}
    assert Guarded.definition.guards == {("pay", "placed"): "is_covered", ("cancel", "paid"): "is_covered"}
    assert Guarded.definition.guard_for("pay", "placed", Guarded.guards) is is_covered
    assert Guarded.definition.guard_for("cancel", "placed", {}) is None

    loaded = StateMachine.from_spec(Guarded.spec)
    assert loaded.spec == Guarded.spec
    with pytest.raises(errors.DefinitionError) as caught:
        loaded.definition.guard_for("pay", "placed", loaded.guards)
    assert str(caught.value) == (
        "machine 'guarded': event 'pay' from state 'placed' has the guard 'is_covered', to which no function is bound "
        "here: only a program that has it, and loads the machine with guards={'is_covered': function}, can fire this event"
    )
    bound = StateMachine.from_spec(Guarded.spec, guards={"is_covered": is_covered})
    assert bound.definition.guard_for("pay", "placed", bound.guards) is is_covered


def test_only_functions_that_the_spec_names_are_bound() -> None:
    with pytest.raises(errors.DefinitionError, match=r"machine 'order': the guard 'is_rich' is refused: no transition"):
        StateMachine.from_spec(Order.spec, guards={"is_rich": is_covered})
    spec = make({"a": (a := State(initial=True)), "go": a.to(a, guard=is_covered)}).spec
    with pytest.raises(errors.DefinitionError, match=r"the guard 'is_covered' is refused: 7 is no function"):
        StateMachine.from_spec(spec, guards={"is_covered": 7})  # type: ignore[dict-item]


def test_load_and_dump(tmp_path: Any) -> None:
    class Refund(StateMachine):
        version = 2
        title = "Refunds"
        durability = "durable"
        hot_ttl = timedelta(minutes=1.5)
        placed = State(initial=True, title="Placed by the customer")
        void = State(final=True)
        cancel = placed.to(void, guard=is_covered)

    Refund.dump(tmp_path / "refund.yaml")
    loaded = StateMachine.load(tmp_path / "refund.yaml", guards={"is_covered": is_covered})
    assert loaded.spec == Refund.spec
    assert loaded.to_yaml() == Refund.to_yaml() == (tmp_path / "refund.yaml").read_text()
    assert (loaded.name, loaded.version, loaded.title, loaded.durability, loaded.hot_ttl) == (
        "refund",
        2,
        "Refunds",
        "durable",
        timedelta(seconds=90),
    )
    assert issubclass(loaded, StateMachine)
    assert loaded.__name__ == "Refund"
    assert loaded.fingerprint == Refund.fingerprint


def test_the_yaml_file_of_the_project_is_the_same_machine() -> None:
    assert StateMachine.load(ORDER_YAML).spec == Order.spec


class Other(StateMachine):
    start = State(initial=True)


def test_broken_rules_of_the_spec_are_refused_when_the_class_is_made() -> None:
    with pytest.raises(errors.DefinitionError) as caught:

        class Lamp(StateMachine):
            off = State(initial=True)
            on = State()

    assert str(caught.value) == "machine 'lamp': state 'on' cannot be reached from the initial state 'off'"


def test_a_name_that_is_declared_twice_is_refused() -> None:
    with pytest.raises(
        errors.DefinitionError, match="class Twice: 'go' is declared twice, as an event and then an event"
    ):

        class Twice(StateMachine):
            a = State(initial=True)
            b = State()
            go = a.to(b)
            go = b.to(a)  # noqa: PIE794 - the slip that is tested

    with pytest.raises(
        errors.DefinitionError, match="class Clash: 'b' is declared twice, as a state and then an event"
    ):

        class Clash(StateMachine):
            a = State(initial=True)
            b = State()
            b = a.to(b)


def test_slips_in_a_class_body_are_refused() -> None:
    a, b = State(initial=True), State()
    assert refusal_of({"a": State}) == "class Broken: 'a' is the class State itself: write State()"
    assert refusal_of({"a": a, "go": a.to(b)}) == (
        "class Broken: event 'go' refers to a state without a name: transitions join the states that are declared in the "
        "same class"
    )
    a = State(initial=True)
    assert "event 'go' refers to a state 'start' of machine 'other'" in refusal_of({"a": a, "go": a.to(Other.start)})
    assert "'a' is the state 'start' of machine 'other'" in refusal_of({"a": Other.start})
    a = State(initial=True)
    assert "'b' is the state 'a' of machine 'broken'" in refusal_of({"a": a, "b": a})
    assert refusal_of({"load": State(initial=True)}) == (
        "class Broken: 'load' cannot be a state: StateMachine uses that name itself"
    )
    a = State(initial=True)
    assert "'version' cannot be an event" in refusal_of({"a": a, "version": a.to(a)})


def test_options_of_the_wrong_type_are_refused() -> None:
    def refusal(**options: Any) -> str:
        return refusal_of({"a": State(initial=True), **options})

    assert refusal(version="2") == "class Broken: version: '2' is refused: input should be a valid integer"
    assert "version: 0 is refused: input should be greater than or equal to 1" in refusal(version=0)
    assert "version: True is refused" in refusal(version=True)
    assert "durability: 'forever' is refused: input should be 'hot', 'fsync'" in refusal(durability="forever")
    assert "hot_ttl: 60 is refused: it must be a timedelta or None" in refusal(hot_ttl=60)
    assert "hot_ttl_seconds: 2000000000.0 is refused" in refusal(hot_ttl=timedelta(seconds=2e9))
    assert "hot_ttl_seconds: -1.0 is refused: input should be greater than 0" in refusal(hot_ttl=timedelta(seconds=-1))
    assert "the machine's name 'Order' is refused: names match [a-z][a-z0-9_]{0,63}" in refusal(name="Order")
    assert "class Broken: state 'a': title: 5 is refused" in refusal_of({"a": State(initial=True, title=5)})  # type: ignore[arg-type]


def test_data_must_be_a_model_of_fields() -> None:
    def refusal(data: Any) -> str:
        return refusal_of({"a": State(initial=True), "Data": data})

    class Renamed(pydantic.BaseModel):
        customer: str = pydantic.Field(alias="customerId")

    class Root(pydantic.RootModel[list[int]]):
        pass

    class Unwritable(pydantic.BaseModel):
        call: type(is_covered)  # type: ignore[valid-type]
        model_config = pydantic.ConfigDict(arbitrary_types_allowed=True)

    class Account(pydantic.BaseModel):
        token: pydantic.SecretStr | None = None

    class Secret(pydantic.BaseModel):
        accounts: list[Account] = []

    class Accented(pydantic.BaseModel):
        größe: int = 0

    assert refusal(dict) == "class Broken: Data is refused: <class 'dict'> is no subclass of pydantic.BaseModel"
    assert "the field 'customer' of Data has an alias" in refusal(Renamed)
    assert "Data is a RootModel, which has no fields" in refusal(Root)
    assert "class Broken: Data has no JSON Schema" in refusal(Unwritable)
    assert "Data has a secret (SecretStr, SecretBytes), which would be stored as asterisks" in refusal(Secret)
    assert "the field name 'größe' is refused: names match [A-Za-z_][A-Za-z0-9_.-]{0,63}" in refusal(Accented)


def test_guards_need_names() -> None:
    def refusal(*guards: Any) -> str:
        a = State(initial=True)
        events = {f"go{number}": a.to(a, guard=guard) for number, guard in enumerate(guards)}
        return refusal_of({"a": a, **events})

    def other() -> Any:
        def is_covered(snapshot: Any) -> bool:
            return False

        return is_covered

    assert "class Broken: event 'go0': the guard <function" in refusal(lambda snapshot: True)
    assert "it must be a function with a name (def)" in refusal("is_covered")
    assert "event 'go1': the guard" in refusal(is_covered, other())
    assert "another function named 'is_covered' is a guard of this machine" in refusal(is_covered, other())


def test_machines_are_not_inherited() -> None:
    with pytest.raises(
        errors.DefinitionError, match="class Broken inherits from the machine Order: a machine cannot be ext"
    ):

        class Broken(Order):
            pass

    mixin = type("Mixin", (), {"a": State(initial=True)})
    assert "class Broken: a state 'a' stands in the base Mixin" in refusal_of({}, mixin)


def test_transitions_join_states() -> None:
    with pytest.raises(
        errors.DefinitionError, match="the target 'paid' of a transition is refused: it must be a State"
    ):
        State().to("paid")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unsupported operand"):
        State().to(State()) | State()  # type: ignore[operator]
    assert isinstance(State().to(State()), Transitions)
    assert repr(State()) == "<State without a name>"
