"""Machines learned from event logs."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest

from statecache.core import document, errors, learn
from statecache.core.definition import of
from statecache.core.spec import MachineSpec

LOG = [
    ("1", "Receive order"),
    ("2", "Receive order"),
    ("1", "2nd check (by hand)"),
    ("1", "2nd check (by hand)"),
    ("2", "Ship"),
    ("3", "Refuse"),
    ("1", "Ship"),
    ("4", "Receive order"),
    ("5", "Receive order"),
    ("5", "Rework"),
    ("5", "Rework"),
]


def replay(machine: MachineSpec, rows: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Move every case through the machine's tables; return the state of each."""
    tables = of(machine)
    events = learn.event_of(machine)
    states: dict[str, str] = {}
    for case, activity in rows:
        states[case] = tables.targets[events[activity]][states.get(case, tables.initial)]
    return states


def test_a_small_log() -> None:
    learned = learn.learn(LOG, "order", title="Orders", version=3)
    assert learned.slugs == {
        "Receive order": "receive_order",
        "2nd check (by hand)": "e_2nd_check_by_hand",
        "Ship": "ship",
        "Refuse": "refuse",
        "Rework": "rework",
    }
    assert (learned.spec.name, learned.spec.title, learned.spec.version) == ("order", "Orders", 3)
    assert [(state.name, state.title, state.initial, state.final) for state in learned.spec.states] == [
        ("new", None, True, False),
        ("receive_order", "Receive order", False, False),
        ("e_2nd_check_by_hand", "2nd check (by hand)", False, False),
        ("ship", "Ship", False, True),
        ("refuse", "Refuse", False, True),
        ("rework", "Rework", False, False),  # it was seen to follow itself
    ]
    assert {event.name: [move.source for move in event.transitions] for event in learned.spec.events} == {
        "receive_order": ["new"],
        "e_2nd_check_by_hand": ["receive_order", "e_2nd_check_by_hand"],
        "ship": ["receive_order", "e_2nd_check_by_hand"],
        "refuse": ["new"],
        "rework": ["receive_order", "rework"],
    }
    assert all(move.target == event.name for event in learned.spec.events for move in event.transitions)


def test_the_log_can_be_replayed() -> None:
    machine = learn.learn(LOG, "order").spec
    assert replay(machine, LOG) == {
        "1": "ship",
        "2": "ship",
        "3": "refuse",
        "4": "receive_order",
        "5": "rework",
    }
    with pytest.raises(KeyError):
        replay(machine, [("9", "Ship")])


def test_the_activities_are_known_from_the_yaml_file_alone() -> None:
    learned = learn.learn(LOG, "order")
    read = document.from_text(document.to_text(learned.spec))
    assert read == learned.spec
    events = learn.event_of(read)
    assert {activity: events[activity] for activity in learned.slugs} == learned.slugs
    assert events["ship"] == "ship"


def test_slugs() -> None:
    assert learn.slugs_of(
        ["T07-1 Draft", "Prüfung  ok?", "New", "new", "NEW!", "3", "受付", "完了", "", "e", "ß_x_", "İn → Out"]
    ) == {
        "T07-1 Draft": "t07_1_draft",
        "Prüfung  ok?": "prufung_ok",
        "NEW!": "new_2",
        "New": "new_3",
        "new": "new_4",
        "3": "e_3",
        "": "e",
        "e": "e_2",
        "受付": "e_4",  # after 完了, and behind the activity "3", which has e_3
        "完了": "e_5",
        "ß_x_": "ss_x",
        "İn → Out": "in_out",
    }
    long = learn.slugs_of(["x" * 100, "x" * 64, "y" * 63 + "!z"])
    assert sorted(map(len, long.values())) == [63, 64, 64]
    assert long["x" * 64] == "x" * 64
    assert long["x" * 100] == "x" * 62 + "_2"


ACTIVITIES = (
    "a",
    "A",
    "a 2",
    "a_2",
    " a",
    "new",
    "New_2",
    "1",
    "2x",
    "ä",
    "受付",
    "完了",
    "?",
    "x" * 64,
    "x" * 65,
    "x" * 62,
)


@pytest.mark.parametrize("seed", range(40))
def test_any_log_can_be_replayed_and_means_the_same_however_its_cases_mix(seed: int) -> None:
    chance = random.Random(seed)
    pool = chance.sample(ACTIVITIES, chance.randint(1, len(ACTIVITIES)))
    rows = [(chance.choice("1234"), chance.choice(pool)) for _ in range(chance.randint(1, 30))]
    learned = learn.learn(rows, "log")
    last = dict(rows)
    assert replay(learned.spec, rows) == {case: learned.slugs[last[case]] for case in last}

    waiting = {case: [row for row in rows if row[0] == case] for case in last}
    mixed = [waiting[case].pop(0) for case in chance.sample([case for case, _ in rows], len(rows))]
    again = learn.learn(mixed, "log")
    assert again.slugs == learned.slugs
    assert again.spec.fingerprint == learned.spec.fingerprint


def test_logs_that_are_refused() -> None:
    def refusal(*rows: tuple[str, object], **options: int) -> str:
        with pytest.raises(errors.InvalidDataError) as caught:
            learn.learn(rows, "log", **options)  # type: ignore[arg-type]
        return str(caught.value)

    assert refusal() == "the event log is refused: it has no rows, so there is nothing to learn"
    assert refusal(("7", " ")) == "activity ' ' of case '7' is refused: it is blank"
    assert refusal(("7", None)) == "activity None of case '7' is refused: it must be text, not NoneType"
    assert "of case '7' is refused: it has 501 characters, 1 to 500 are allowed" in refusal(("7", "x" * 501))
    assert "activity 'a\\x00' of case '7' is refused: it holds the control character" in refusal(("7", "a\0"))
    assert refusal(("7", "a"), ("7", "b"), ("7", "c"), activities_max=2) == (
        "activity 'c' of case '7' is refused: the log has more than 2 different activities; is this the right column?"
    )
    with pytest.raises(errors.DefinitionError, match="the machine's name 'My log' is refused"):
        learn.learn(LOG, "My log")


def test_two_events_of_one_title_cannot_be_told_apart() -> None:
    machine = document.from_text("""
name: twin
states: {a: {initial: true}}
events: {go: {from: a, to: a, title: Go}, run: {from: a, to: a, title: Go}, stop: {from: a, to: a}}
""")
    with pytest.raises(errors.DefinitionError) as caught:
        learn.event_of(machine)
    assert str(caught.value) == (
        "machine 'twin': the events 'go' and 'run' share the title 'Go': an activity of that name could be either"
    )
