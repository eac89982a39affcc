"""Commands that need no store, run in this process: machines, usage errors, help."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from statecache import StateMachine
from tests.acceptance.command import Result, run_here

COLUMNS = ["--id", "case", "--event", "event", "--at", "at"]
LOG = "case,event,at\n1,Pay up,2024-01-01\n1,Ship,2024-01-02\n2,Pay up,2024-01-01\n2,Ship,2024-01-01T10:00\n"


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs a command line in this process, without settings from outside."""
    for name in ("STATECACHE_REDIS_URL", "STATECACHE_DATABASE_URL", "STATECACHE_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    return run_here


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log.csv"
    path.write_text(LOG)
    return path


def test_every_command_of_the_design_is_there(command: Callable[..., Result]) -> None:
    help_text = command("--help").out
    wanted = "up demo where history ls start transition import machine flusher status recover verify db"
    for name in wanted.split():
        assert f"\n  {name} " in help_text
    machine_help = command("machine", "--help").out
    for name in ("learn", "show", "check", "register", "list"):
        assert f"\n  {name} " in machine_help


@pytest.mark.parametrize(
    ("words", "usage"),
    [
        ("claims", "statecache claims [OPTIONS] [MACHINE]\n"),
        ("dead-letters list", "statecache dead-letters list [OPTIONS] [ADDRESS]\n"),
        ("jobs run", "[KEY=VALUE]...\n"),
    ],
)
def test_what_may_be_left_out_is_in_one_pair_of_brackets(
    command: Callable[..., Result], words: str, usage: str
) -> None:
    help_text = command(*words.split(), "--help").out
    assert usage in help_text
    assert "[[" not in help_text


def test_no_command_is_help(command: Callable[..., Result]) -> None:
    assert command().code == 0
    assert command("--version").out.startswith("statecache ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], "No such command 'fly'"),
        (["where"], "Missing argument 'ADDRESS' (see 'statecache where --help')"),
        (["where", "order:1", "--fly"], "No such option: --fly"),
        (["ls", "order", "--limit", "many"], "Invalid value for '--limit'"),
        (["ls", "order", "--limit", "0"], "Invalid value for '--limit'"),
        (["machine", "show", "x.yaml", "--format", "art"], "'art' is not one of"),
        (["status", "--watch", "--interval", "inf"], "Invalid value for '--interval'"),
        (["ls", "order", "--data-dir", ""], "Invalid value for '--data-dir': it is empty"),
        *(
            ([*words.split(), "9" * 23], f"Invalid value for '{words.split()[-1]}'")
            for words in (
                "status --recoveries",
                "ls order --limit",
                "claims --limit",
                "dead-letters list --limit",
                "warm --limit",
                "jobs list --limit",
                "demo --orders",
                "machine learn x.csv --id a --event b --at c --name m --version",
            )
        ),
    ],
)
def test_a_wrong_command_line_is_one_sentence_and_code_2(
    command: Callable[..., Result], arguments: list[str], message: str
) -> None:
    result = command(*arguments)
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("error: ")
    assert message in result.err
    assert len(result.err.splitlines()) == 1
    told = json.loads(command(*arguments, "--json").err)["error"]
    assert told["type"] == "UsageError"
    assert message in told["message"]


def test_learn_writes_a_machine_that_loads(command: Callable[..., Result], log: Path, tmp_path: Path) -> None:
    path = tmp_path / "order.yaml"
    result = command("machine", "learn", log, *COLUMNS, "--name", "order", "--output", path, "--json")
    assert result.code == 0
    told = json.loads(result.out)
    assert (told["states"], told["events"], told["rows"], told["cases"]) == (3, 2, 4, 2)
    machine = StateMachine.load(path)
    assert machine.spec.name == "order"
    assert [(event.name, event.title) for event in machine.spec.events] == [("pay_up", "Pay up"), ("ship", "Ship")]
    assert machine.definition.finals == {"ship"}
    assert told["fingerprint"] == machine.fingerprint


def test_learn_without_a_file_prints_the_yaml(command: Callable[..., Result], log: Path) -> None:
    assert command("machine", "learn", log, *COLUMNS, "--name", "order").out.startswith("name: order\n")


def test_learn_orders_each_case_by_time_and_passes_over_what_is_no_event(
    command: Callable[..., Result], log: Path, tmp_path: Path
) -> None:
    log.write_text("case,event,at\n1,Ship,2024-01-02\n1,Pay,2024-01-01\n,Pay,2024-01-01\n2,Pay,soon\n")
    told = json.loads(command("machine", "learn", log, *COLUMNS, "--name", "order", "--json").out)
    assert (told["rows_passed_over"], told["cases_sorted_by_time"]) == (2, 1)
    path = tmp_path / "order.yaml"
    path.write_text(told["yaml"])
    assert StateMachine.load(path).definition.targets["pay"] == {"new": "pay"}


def test_a_missing_column_is_code_2_and_named(command: Callable[..., Result], log: Path) -> None:
    wrong = ["--id", "order", "--event", "event", "--at", "at"]
    for arguments in (["machine", "learn", log, *wrong, "--name", "x"], ["import", log, *wrong, "--machine", "x.yaml"]):
        result = command(*arguments)
        assert result.code == 2
        assert "the file has no column 'order'; it has 'case', 'event', 'at'" in result.err


def test_a_truncated_machine_is_code_2_with_its_line(command: Callable[..., Result], log: Path, tmp_path: Path) -> None:
    path = tmp_path / "order.yaml"
    path.write_text("name: order\nstates:\n  placed: {initial: true\n")
    for arguments in (["machine", "check", path], ["import", log, *COLUMNS, "--machine", path, "--dry-run"]):
        result = command(*arguments)
        assert result.code == 2
        assert f"{path}:" in result.err
        assert "no valid YAML" in result.err


def test_check_tells_every_broken_rule(command: Callable[..., Result], tmp_path: Path) -> None:
    path = tmp_path / "order.yaml"
    path.write_text("name: order\nstates:\n  a: {}\n  b: {}\nevents:\n  go: {from: a, to: c}\n")
    result = command("machine", "check", path, "--json")
    assert result.code == 2
    assert json.loads(result.err)["error"]["type"] == "DefinitionError"
    path.write_text("name: order\nstates:\n  a: {initial: true}\n  b: {final: true}\nevents:\n  go: {from: a, to: b}\n")
    assert json.loads(command("machine", "check", path, "--json").out)["ok"] is True


def test_show_draws_a_file_in_every_form(command: Callable[..., Result]) -> None:
    path = Path(__file__).parents[2] / "config" / "machines" / "order.yaml"
    assert "placed -> paid -> shipped -> delivered" in command("machine", "show", path).out
    assert command("machine", "show", path, "--format", "mermaid").out.startswith("stateDiagram-v2")
    assert command("machine", "show", path, "--format", "dot").out.startswith("digraph")
    assert command("machine", "show", path, "--format", "yaml").out.startswith("name: order")
    assert json.loads(command("machine", "show", path, "--json").out)["name"] == "order"


def test_a_highlight_that_is_not_drawn_is_refused(command: Callable[..., Result]) -> None:
    path = Path(__file__).parents[2] / "config" / "machines" / "order.yaml"
    for more in ([], ["--format", "dot"], ["--format", "yaml"], ["--format", "mermaid", "--json"]):
        told = command("machine", "show", path, "--highlight", "paid", *more)
        assert (told.code, told.out) == (2, ""), more
        assert "--highlight 'paid' is refused: only --format mermaid fills a state" in told.err
    assert "class paid here" in command("machine", "show", path, "--highlight", "paid", "--format", "mermaid").out


def test_a_dry_run_needs_no_store_and_keeps_the_side_file(
    command: Callable[..., Result], log: Path, tmp_path: Path
) -> None:
    path = tmp_path / "order.yaml"
    command("machine", "learn", log, *COLUMNS, "--name", "order", "-o", path)
    side_file = log.with_name(log.name + ".refused.jsonl")
    side_file.write_text("of another run\n")
    result = command("import", log, *COLUMNS, "--machine", path, "--dry-run", "--json")
    assert result.code == 0
    assert json.loads(result.out)["transitions"] == 4
    assert side_file.read_text() == "of another run\n"
    log.write_text(LOG + "1,Pay up,2024-02-01\n")
    refused = tmp_path / "refused.jsonl"
    result = command("import", log, *COLUMNS, "--machine", path, "--dry-run", "--refused", refused)
    assert result.code == 1
    assert "'pay_up' is no move of machine 'order' from state 'ship'" in result.out
    assert json.loads(refused.read_text())["line"] == 6


def test_options_may_stand_before_the_command(command: Callable[..., Result], tmp_path: Path) -> None:
    result = command("--data-dir", tmp_path / "outer", "where", "order:1")
    assert result.code == 2
    assert str(tmp_path / "outer") in result.err
    result = command("--data-dir", tmp_path / "outer", "where", "order:1", "--data-dir", tmp_path / "inner", "--json")
    assert str(tmp_path / "inner") in json.loads(result.err)["error"]["message"]
    assert not list(tmp_path.iterdir()), "a command that only looks made a folder"


def test_the_folder_of_the_command_line_wins_over_the_environments_urls(
    command: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STATECACHE_REDIS_URL", "redis://127.0.0.1:1/0")
    monkeypatch.setenv("STATECACHE_DATABASE_URL", "sqlite:////nowhere/x.db")
    assert "there is no store in the folder" in command("where", "order:1", "--data-dir", tmp_path / "data").err


@pytest.mark.parametrize("option", ["--redis-url", "--database-url", "--namespace", "--log-format", "--log-level"])
def test_an_option_that_is_empty_is_refused(command: Callable[..., Result], tmp_path: Path, option: str) -> None:
    """What a shell makes of a variable that is not set: it would be another store, of which nobody has spoken."""
    for arguments in (["ls", "order", option, ""], [option, "", "ls", "order"]):
        result = command(*arguments, "--data-dir", tmp_path, "--json")
        assert (result.code, result.error["type"]) == (2, "ConfigurationError"), result.err
        assert f"{option[2:].replace('-', '_')} = '' in the arguments is refused" in result.error["message"] or (
            option == "--namespace" and "namespace '' is refused" in result.error["message"]
        )


@pytest.mark.parametrize("encoding", ["", "nosuch", "hex", "rot13", "\udcff"])
def test_an_encoding_of_no_text_is_refused(command: Callable[..., Result], log: Path, encoding: str) -> None:
    result = command("machine", "learn", log, *COLUMNS, "--name", "m", "--encoding", encoding)
    assert (result.code, "Python knows no encoding of text of that name" in result.err) == (2, True), result.err


def test_settings_that_are_wrong_are_code_2(command: Callable[..., Result], tmp_path: Path) -> None:
    config = tmp_path / "statecache.toml"
    config.write_text("partition_cuont = 4\n")
    result = command("status", "--config", config)
    assert result.code == 2
    assert "did you mean partition_count?" in result.err
    assert command("demo", "--redis-url", "redis://localhost").code == 2
    assert command("where", "order").code == 2


def test_show_tells_what_happens_after_a_states_timeout(command: Callable[..., Result], tmp_path: Path) -> None:
    path = tmp_path / "parcel.yaml"
    path.write_text(
        "name: parcel\nstates:\n  received: {initial: true, timeout_seconds: 1800, on_timeout: drop}\n"
        "  packed: {timeout_seconds: 20}\n  gone: {final: true}\n"
        "events:\n  pack: {from: received, to: packed}\n  drop: {from: [received, packed], to: gone}\n"
    )
    shown = {line.split()[0]: line for line in command("machine", "show", path).out.splitlines() if line.split()}
    assert "30 min: drop" in shown["received"]
    assert "20 s: stuck" in shown["packed"]
    assert ":" not in shown["gone"]
    states = json.loads(command("machine", "show", path, "--json").out)["states"]
    assert [(one["name"], one.get("timeout_seconds")) for one in states] == [
        ("received", 1800.0), ("packed", 20.0), ("gone", None),
    ]  # fmt: skip
