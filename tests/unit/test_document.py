"""A machine's YAML form: pleasant ways to write it, an equal machine after a round trip, a line for every slip."""

from __future__ import annotations

from pathlib import Path

import pytest

from statecache.core import document, errors, yamltree
from statecache.core.spec import EventSpec, MachineSpec, StateSpec, TransitionSpec

LAMP = """\
name: lamp
states:
  off: {initial: true}
  on:
  broken: {final: true, title: Broken for good}
events:
  switch:
    - {from: off, to: on}
    - {from: on, to: off, guard: is_dark}
  crack: {from: [off, on], to: broken, title: Crack}
"""


def refusal(text: str) -> str:
    with pytest.raises(errors.DefinitionError) as caught:
        document.from_text(text, "lamp.yaml")
    return str(caught.value)


def lamp_with(old: str, new: str) -> str:
    assert LAMP.count(old) == 1
    return LAMP.replace(old, new)


def test_a_machine_written_by_hand() -> None:
    assert document.from_text(LAMP) == MachineSpec(
        name="lamp",
        states=(
            StateSpec(name="off", initial=True),
            StateSpec(name="on"),
            StateSpec(name="broken", final=True, title="Broken for good"),
        ),
        events=(
            EventSpec(
                name="switch",
                transitions=(
                    TransitionSpec(source="off", target="on"),
                    TransitionSpec(source="on", target="off", guard="is_dark"),
                ),
            ),
            EventSpec(
                name="crack",
                title="Crack",
                transitions=(
                    TransitionSpec(source="off", target="broken"),
                    TransitionSpec(source="on", target="broken"),
                ),
            ),
        ),
    )


def test_an_event_with_a_title_and_several_targets() -> None:
    text = lamp_with("  switch:\n    - {from: off", "  switch:\n    title: Switch\n    moves:\n    - {from: off")
    switch = document.from_text(text).events[0]
    assert (switch.title, len(switch.transitions)) == ("Switch", 2)


AWKWARD_TITLES = (
    "no|on|null|~|123|0x1f|1e3|1_000|12:30:00|2020-01-01|.inf|=|<<|true| blank |a: b|- x|# y|'\"|{a}|*x|!t|two\nlines\n|"
    "tab\t|ünï 漢字 🚚|\\|%x|@y|trail:|" + "x" * 300
).split("|")


@pytest.mark.parametrize("title", AWKWARD_TITLES)
def test_the_round_trip_is_equal_whatever_the_title(title: str) -> None:
    names = ("off", "on", "null", "true", "y", "no")
    machine = MachineSpec(
        name="no",
        title=title,
        states=tuple(StateSpec(name=name, title=title, initial=name == "off") for name in names),
        events=tuple(
            EventSpec(name=name, title=title, transitions=(TransitionSpec(source="off", target=name),))
            for name in names
        ),
    )
    text = document.to_text(machine)
    assert document.from_text(text) == machine
    assert text.encode().decode() == text


def test_the_round_trip_of_every_field(tmp_path: Path) -> None:
    machine = document.from_text(LAMP).model_copy(
        update={
            "version": 7,
            "durability": "fsync",
            "hot_ttl_seconds": 0.25,
            "data_schema": {
                "type": "object",
                "properties": {"a": {"enum": ["no", 1, 1.5, 1e30, -2e-7, None, True, "2020-01-01", [], {}, ""]}},
            },
        }
    )
    document.dump(machine, tmp_path / "lamp.yaml")
    assert document.load(tmp_path / "lamp.yaml") == machine
    assert "hot_ttl_seconds: 60\n" in document.to_text(machine.model_copy(update={"hot_ttl_seconds": 60.0}))


def test_a_written_machine_is_pleasant_to_read() -> None:
    assert document.to_text(document.from_text(LAMP)) == (
        "name: lamp\n"
        "version: 1\n"
        "states:\n"
        "  'off': {initial: true}\n"
        "  'on': {}\n"
        "  broken: {title: Broken for good, final: true}\n"
        "events:\n"
        "  switch:\n"
        "    - {from: 'off', to: 'on'}\n"
        "    - {from: 'on', to: 'off', guard: is_dark}\n"
        "  crack:\n"
        "    title: Crack\n"
        "    from: ['off', 'on']\n"
        "    to: broken\n"
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name: lamp\n", "", "lamp.yaml:1: name: it is missing"),
        ("name: lamp", "name: 5", "lamp.yaml:1: name: 5 is refused: input should be a valid string"),
        ("name: lamp", "name: Lamp", "lamp.yaml:1: name: the machine's name 'Lamp' is refused: names match [a-z]"),
        (
            "name: lamp",
            "name: lamp\nversion: '2'",
            "lamp.yaml:2: version: '2' is refused: input should be a valid integer",
        ),
        (
            "name: lamp",
            "name: lamp\nversion: 0",
            "lamp.yaml:2: version: 0 is refused: input should be greater than or equal",
        ),
        (
            "name: lamp",
            "name: lamp\nhot_ttl_seconds: .nan",
            "lamp.yaml:2: hot_ttl_seconds: nan is refused: input should be",
        ),
        (
            "name: lamp",
            "name: lamp\ndurability: x",
            "lamp.yaml:2: durability: 'x' is refused: input should be 'hot', 'fsync'",
        ),
        ("name: lamp", "name: lamp\nowner: me", "lamp.yaml:2: owner: there is no such key"),
        (
            "initial: true",
            "initial: yes",
            "lamp.yaml:3: states.off.initial: 'yes' is refused: input should be a valid bool",
        ),
        ("initial: true", "start: true", "lamp.yaml:3: states.off.start: there is no such key"),
        *(
            (
                "  on:\n",
                f"  on: {{timeout_seconds: {value}}}\n",
                f"lamp.yaml:4: states.on.timeout_seconds: {shown} is refused: ",
            )
            for value, shown in (("0", "0"), ("-1", "-1"), ("1e10", "10000000000.0"), (".nan", "nan"), ("'5'", "'5'"))
        ),
        ("  on:\n", "  on: 1\n", "lamp.yaml:4: states.on: 1 is refused: input should be a valid dictionary"),
        ("crack: {from: [off, on], ", "crack: {form: off, ", "lamp.yaml:10: events.crack.from: it is missing\n"),
        (
            "to: broken,",
            "too: broken,",
            "lamp.yaml:10: events.crack.to: it is missing\nlamp.yaml:10: events.crack.too: there",
        ),
        (
            "[off, on], to",
            "[off, 1], to",
            "lamp.yaml:10: events.crack.from.1: 1 is refused: input should be a valid string",
        ),
        ("[off, on], to", "[], to", "lamp.yaml:10: events.crack.from: [] is refused: "),
        (
            "to: off, guard",
            "to: of, guard",
            "lamp.yaml:7: events.switch: event 'switch' refers to the state 'of', which is",
        ),
        (
            "guard: is_dark",
            "guard: 7",
            "lamp.yaml:9: events.switch.1.guard: 7 is refused: input should be a valid string",
        ),
        ("  crack: {", "  crack: 5 #", "lamp.yaml:10: events.crack: 5 is refused: input should be a valid dictionary"),
        (
            "  on:\n",
            "  on:\n  dim:\n",
            "lamp.yaml:5: states.dim: state 'dim' cannot be reached from the initial state 'off'",
        ),
        ("final: true", "initial: true", "lamp.yaml:2: states: exactly one state must be initial, 2 are (off, broken)"),
        (
            "name: lamp",
            "name: lamp\ndata: {type: array}",
            "lamp.yaml:2: data.type: the data schema is refused: its type is",
        ),
        (
            "name: lamp",
            "name: lamp\ndata: {x: {$ref: a}, items: {$ref: b}}",
            "lamp.yaml:2: data.items.$ref: the data schema",
        ),
    ],
)
def test_slips_are_named_with_file_line_and_field(old: str, new: str, message: str) -> None:
    assert refusal(lamp_with(old, new)).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lamp.yaml: the file is empty: a machine was expected"),
        ("# nothing\n", "lamp.yaml: the file is empty: a machine was expected"),
        ("- a\n", "lamp.yaml:1: keys such as 'name' and 'states' were expected, not ['a']"),
        ("name,states\n", "lamp.yaml:1: keys such as 'name' and 'states' were expected, not 'name,states'"),
        (
            "name: lamp\nstates: {off: {ini",
            "lamp.yaml:2: this is no valid YAML: while parsing a flow mapping expected ',' or",
        ),
        ("name: lamp\nname: bulb\n", "lamp.yaml:2: this is no valid YAML: the key 'name' stands there twice"),
        ("name: lamp\n1: x\n", "lamp.yaml:2: this is no valid YAML: the key '1' is refused: keys are text"),
        (
            "name: lamp\n? [a]\n: x\n",
            "lamp.yaml:2: this is no valid YAML: the key 'a sequence' is refused: keys are text",
        ),
        ("name: &a lamp\ntitle: *a\n", "lamp.yaml:2: this is no valid YAML: aliases are not supported"),
        (
            "name: !!python/name:os.system x\n",
            "lamp.yaml:1: this is no valid YAML: the tag 'tag:yaml.org,2002:python/name:os",
        ),
        ("name: !!set {a}\n", "lamp.yaml:1: this is no valid YAML: the tag 'tag:yaml.org,2002:set' is not supported"),
        ("name: !!int x\n", "lamp.yaml:1: this is no valid YAML: 'x' does not fit the tag 'tag:yaml.org,2002:int'"),
        (
            "name: lamp\n---\nname: bulb\n",
            "lamp.yaml:2: this is no valid YAML: expected a single document in the stream",
        ),
        ("name: lamp\ntitle: \x07\n", "lamp.yaml:2: this is no valid YAML: the character '\\x07' is not allowed"),
        ("name: lamp\n\tstates: x\n", "lamp.yaml:2: this is no valid YAML: while scanning for the next token found"),
        ("name: " + "[" * 400, "lamp.yaml: this is no machine: it is nested too deep to be read"),
    ],
)
def test_garbled_files(text: str, message: str) -> None:
    assert refusal(text).startswith(message)


def test_every_truncation_of_a_file_is_refused_or_a_smaller_machine() -> None:
    """A cut file never gives a half-read machine: what is accepted is the machine that the remaining text declares."""
    for end in range(LAMP.index("events:") + 8, len(LAMP) - 1):
        try:
            machine = document.from_text(LAMP[:end], "lamp.yaml")
        except errors.DefinitionError as error:
            assert str(error).startswith("lamp.yaml:")  # noqa: PT017 - both outcomes are right
        else:
            assert document.from_text(document.to_text(machine)) == machine


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(
        errors.DefinitionError, match=r"missing\.yaml: the file cannot be read: No such file or directory"
    ):
        document.load(tmp_path / "missing.yaml")
    (tmp_path / "latin.yaml").write_bytes("title: Grün".encode("latin-1"))
    with pytest.raises(errors.DefinitionError, match=r"latin\.yaml: the file is no UTF-8 text: .* at byte 9"):
        document.load(tmp_path / "latin.yaml")
    (tmp_path / "bad.yaml").write_text("name: [")
    with pytest.raises(errors.DefinitionError, match=r"/bad\.yaml:1: this is no valid YAML"):
        document.load(tmp_path / "bad.yaml")


def test_scalars_mean_what_they_mean_in_json() -> None:
    values = "[no, on, y, true, 010, 10, 1e3, 1.5, .5, 2020-01-01, 1:30, null, ~, '', -3, 0x1f, -.inf]"
    assert yamltree.read(f"name: {values}", "x").value["name"] == [
        "no", "on", "y", True, "010", 10, 1000.0, 1.5, 0.5, "2020-01-01", "1:30", None, None, "", -3, "0x1f", float("-inf"),
    ]  # fmt: skip
