"""Words of the command line as values, errors as exit codes, and what reaches the terminal."""

from __future__ import annotations

import inspect
import io
from datetime import timedelta
from pathlib import Path

import pytest

from statecache.cli import arguments, exits, output
from statecache.core import errors


def test_an_address_is_split_at_its_first_colon() -> None:
    assert arguments.address("order:a:b") == ("order", "a:b")


@pytest.mark.parametrize("text", ["order", ":1", "order:", ""])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(errors.InvalidDataError, match="it is machine:id, such as order:1001"):
        arguments.address(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("10s", 10), ("10m", 600), ("2h", 7200), ("3d", 259_200), ("1.5h", 5400), ("500ms", 0.5), ("7", 7)],
)
def test_durations(text: str, seconds: float) -> None:
    assert arguments.duration("--older-than", text) == timedelta(seconds=seconds)


@pytest.mark.parametrize("text", ["", "ten", "10 minutes", "-5m", "1e9d", "9" * 30 + "d"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(errors.InvalidDataError, match=r"--older-than .* is refused"):
        arguments.duration("--older-than", text)


def test_data_from_json_and_pairs(tmp_path: Path) -> None:
    assert arguments.data('{"a": 1, "b": 2}', ["b=3", "c=x=y", 'd="7"', "e=true", "f="]) == {
        "a": 1, "b": 3, "c": "x=y", "d": "7", "e": True, "f": "",
    }  # fmt: skip
    file = tmp_path / "data.json"
    file.write_text('{"a": [1]}')
    assert arguments.data(f"@{file}", []) == {"a": [1]}


@pytest.mark.parametrize(
    ("document", "pairs", "message"),
    [
        ("{a: 1}", [], "--data '{a: 1}' is refused: it is no JSON"),
        ("[1]", [], "it must be a JSON object"),
        ("[" * 100_000, [], "it is no JSON"),
        (None, ["a"], "--set 'a' is refused: it is name=value"),
        (None, ["=1"], "--set '=1' is refused"),
        (None, ["a=" + "9" * 5000], "is refused: it has a number of too many digits"),
        (None, ["a=[1, " + "9" * 5000 + "]"], "is refused: it has a number of too many digits"),
        (None, ["a=" + "[" * 100_000], "--set a='[[["),
    ],
)
def test_data_that_is_none_is_refused(document: str | None, pairs: list[str], message: str) -> None:
    with pytest.raises(errors.InvalidDataError) as caught:
        arguments.data(document, pairs)
    assert message in str(caught.value)


def test_digits_in_quotes_are_text() -> None:
    digits = "9" * 5000
    assert arguments.data(None, [f'a="{digits}"', f"b=x{digits}"]) == {"a": digits, "b": f"x{digits}"}


def test_increments_are_numbers() -> None:
    assert arguments.increments(["a=1", "b=-0.5"]) == {"a": 1, "b": -0.5}
    assert arguments.increments([]) is None
    for wrong in ("a=x", "a=true", "a", "a=" + "9" * 5000):
        with pytest.raises(errors.InvalidDataError, match="--increment"):
            arguments.increments([wrong])


def test_column_names_may_be_quoted() -> None:
    assert arguments.columns('a,"b, c",d') == ["a", "b, c", "d"]
    assert arguments.columns(None) == []
    with pytest.raises(errors.InvalidDataError, match=r"columns .* are refused"):
        arguments.columns("a\nb")


def test_every_error_has_the_exit_code_of_who_must_act() -> None:
    kinds = [one for _, one in inspect.getmembers(errors, inspect.isclass) if issubclass(one, errors.StateCacheError)]
    codes = {kind.__name__: exits.code_of(kind("x")) for kind in kinds}
    assert {name for name, code in codes.items() if code == 2} == {
        "ConfigurationError",
        "DefinitionError",
        "InvalidDataError",
    }
    assert {name for name, code in codes.items() if code == 3} == {
        "UnavailableError", "RecoveringError", "BackpressureError", "DurabilityTimeout",
    }  # fmt: skip
    assert set(codes.values()) == {1, 2, 3}
    assert exits.code_of(FileNotFoundError("x")) == 2
    assert exits.code_of(KeyError("x")) == 70


def test_nothing_steers_the_terminal() -> None:
    assert output.safe("a\x1b[31m\x00\r\n\u202eb\x9b") == "a\\x1b[31m\\x00\\r\\n\\u202eb\\x9b"
    assert output.safe("Zürich ✓") == "Zürich ✓"


def test_no_cell_is_read_as_markup() -> None:
    file = io.StringIO()
    output.console(file).print(
        output.table(["id [bold]"], [("[red]x[/red] :smile: [link=http://x]",)], title="[b]t[/b]")
    )
    output.console(file).print(output.facts([("a", "[red]y[/red]")]))
    text = file.getvalue()
    for part in ("[red]x[/red] :smile: [link=http://x]", "[b]t[/b]", "id [bold]", "[red]y[/red]"):
        assert part in text
    assert "\x1b" not in text


def test_a_pipe_gets_every_row_on_one_line() -> None:
    file = io.StringIO()
    output.console(file).print(output.table(["id", "data"], [("x" * 150, "y" * 200)]))
    assert "x" * 150 + "   " + "y" * 200 in file.getvalue()


def test_a_durability_timeout_carries_its_receipt(capsys: pytest.CaptureFixture[str]) -> None:
    from statecache.core.model import Receipt

    receipt = Receipt("order", "1", "pay", "placed", "paid", 2, "1-2", 1_700_000_000_000, "t1")
    output.error(errors.DurabilityTimeout("not yet", receipt), as_json=True)
    assert '"transition_id": "t1"' in capsys.readouterr().err
