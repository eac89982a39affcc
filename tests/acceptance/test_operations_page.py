"""docs/operations.md says what is so: its commands parse, its settings and runbooks exist, its combinations are tested."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from statecache.cli.app import app
from statecache.settings import Settings
from tests.integration import test_backups

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "operations.md").read_text(encoding="utf-8")
_OTHERS = {
    "pg_dump",
    "pg_stat_activity",
    "synchronous_commit",
    "synchronous_standby_names",
    "transition_id",
    "older_than",
}


def _commands(page: str) -> set[str]:
    fenced = re.findall(
        r"^(statecache .*?)(?: +#.*)?$", "\n".join(re.findall(r"```sh\n(.*?)```", page, re.DOTALL)), re.M
    )
    inline = re.findall(r"`(statecache [a-z][^`]*)`", re.sub(r"```.*?```", "", page, flags=re.DOTALL))
    return {" ".join(one.split()) for one in (*fenced, *inline)}


@pytest.mark.parametrize("line", sorted(_commands(PAGE) | _commands((REPOSITORY / "README.md").read_text("utf-8"))))
def test_each_command_parses(line: str) -> None:
    """With the commands' own parsers; nothing is run."""
    command: Any = typer.main.get_command(app)
    words = shlex.split(line.partition(" #")[0])[1:]
    while hasattr(command, "commands"):
        assert words, f"{line}: a group of commands is no command"
        assert words[0] in command.commands, line
        command = command.commands[words.pop(0)]
    command.make_context(line, words)


def test_a_discard_is_shown_as_it_works() -> None:
    """It loses transitions for good, so it is refused without ``--yes``."""
    shown = [line.split() for line in _commands(PAGE) if line.startswith("statecache dead-letters discard")]
    assert shown
    assert all("--yes" in words for words in shown)


def test_there_are_commands_to_look_at() -> None:
    assert {"statecache db upgrade", "statecache recover --dry-run", "statecache doctor"} <= _commands(PAGE)


def test_each_setting_exists() -> None:
    named = set(re.findall(r"`([a-z]+(?:_[a-z]+)+)`", PAGE)) - _OTHERS
    named = {name for name in named if not name.startswith("statecache_")}
    assert len(named) > 8
    assert named <= set(Settings.model_fields)


def test_each_combination_of_the_page_is_tested() -> None:
    """The classes in the table of restored stores are those that the tests of backups find."""
    table = PAGE.partition("| restored | recovery finds |")[2].partition("\n\n")[0]
    told = set(re.findall(r"\*([a-zA-Z ]+)\*", table))
    assert told == {case.kind for case in test_backups.CASES.values()}


def test_the_users_of_the_page_are_those_of_the_file() -> None:
    table = PAGE.partition("| user | may | for |")[2].partition("\n\n")[0]
    told = {
        name for line in table.splitlines() for name in re.findall(r"`([a-z]+)`", line.partition("| ")[2].split("|")[0])
    }
    users = set(re.findall(r"(?m)^user (\w+)", (REPOSITORY / "config" / "redis" / "users.acl").read_text("utf-8")))
    assert told == users - {"default"}
