"""Commands on a store that ``statecache up`` runs: what they print, their exit codes, their errors."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from statecache import StateCache
from tests.acceptance.command import REPOSITORY, Result, Running, run, run_here
from tests.support import processes, servers
from tests.support.waiting import wait_until

ORDER = REPOSITORY / "config" / "machines" / "order.yaml"
HOSTILE = "a:b [red]x[/red] :smile: ☃"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("up") / "data"


@pytest.fixture(scope="module")
def up(folder: Path) -> Iterator[dict[str, Any]]:
    """``statecache up`` on a fresh folder, with the machine ``order``; yields the addresses that it printed."""
    process = Running(folder.parent, "up", "--data-dir", folder, "--json")
    try:
        places = wait_until(lambda: process.documents(), "up prints where it works", 60)[0]
        assert run("machine", "register", ORDER, "--data-dir", folder).code == 0
        yield places
        process.send(signal.SIGTERM)
        assert process.wait() == 0, process.printed
        assert processes.mentioning(str(folder)) == [], "up left a process behind"
    finally:
        process.end(signal.SIGTERM, signal.SIGKILL)


@pytest.fixture
def store(up: dict[str, Any], folder: Path) -> Any:
    """Runs a command on the store, in this process."""

    def on_store(*arguments: object) -> Result:
        return run_here(*arguments, "--data-dir", folder)

    return on_store


def test_a_command_is_a_process_with_an_exit_code(folder: Path, up: dict[str, Any]) -> None:
    where = ["--data-dir", folder, "--json"]
    assert run("start", "order:process", *where).document["state"] == "placed"
    missing = run("where", "order:nobody", *where)
    assert (missing.code, missing.out, missing.error["type"]) == (1, "", "NotFoundError")
    assert run("where", *where).code == 2


def test_an_order_from_start_to_end(store: Any) -> None:
    started = store("start", "order:1001", "--set", "amount=12.5", "--actor", "shop", "--json").document
    assert (started["state"], started["version"], started["from_state"], started["duplicate"]) == (
        "placed",
        1,
        None,
        False,
    )
    paid = store(
        "transition", "order:1001", "pay", "--data", '{"method": "card", "note": "x"}', "--increment", "attempts=2",
        "--transition-id", "evt_42", "--expect-version", "1", "--durability", "durable", "--reason", "webhook", "--json",
    ).document  # fmt: skip
    assert (paid["from_state"], paid["state"], paid["version"], paid["transition_id"]) == (
        "placed",
        "paid",
        2,
        "evt_42",
    )
    again = store("transition", "order:1001", "pay", "--transition-id", "evt_42")
    assert (again.code, "applied before" in again.out) == (0, True)
    assert store("transition", "order:1001", "ship", "--unset", "note").code == 0
    where = store("where", "order:1001", "--json").document
    assert where["data"] == {"amount": 12.5, "method": "card", "attempts": 2}
    assert (where["state"], where["version"], where["available_events"], where["final"]) == (
        "shipped",
        3,
        ["deliver"],
        False,
    )
    history = store("history", "order:1001", "--json").document
    assert [row["event"] for row in history] == ["@start", "pay", "ship"]
    assert (history[1]["patch"], history[1]["increments"]) == ({"method": "card", "note": "x"}, {"attempts": 2})
    assert (history[1]["reason"], history[2]["unset"]) == ("webhook", ["note"])


def test_people_get_tables_in_which_no_id_is_markup(store: Any) -> None:
    address = f"order:{HOSTILE}"
    assert f"{address} placed, version 1" in store("start", address, "--data", '{"t": "\\u001b[31m[bold]"}').out
    for result in (store("where", address), store("history", address)):
        assert result.code == 0
        assert HOSTILE in result.out
        assert "\x1b" not in result.out
        assert "\\u001b[31m[bold]" in result.out


def test_ls_lists_by_state_and_age(store: Any) -> None:
    for number in range(3):
        store("start", f"order:ls{number}", "--durability", "durable")
    listed = store("ls", "order", "--state", "placed", "--limit", "2", "--json").document
    assert [one["state"] for one in listed] == ["placed", "placed"]
    assert store("ls", "order", "--older-than", "2h", "--json").document == []
    assert "ls2" in store("ls", "order").out
    assert store("ls", "order", "--older-than", "ages").code == 2


@pytest.mark.parametrize(
    ("arguments", "code", "kind", "message"),
    [
        (["where", "order:nobody"], 1, "NotFoundError", "order:nobody does not exist"),
        (["where", "dragon:1"], 1, "NotFoundError", "no machine 'dragon' is registered here; known: order"),
        (["start", "order:" + "x" * 201], 2, "InvalidDataError", "it has 201 characters, 1 to 200 are allowed"),
        (["start", "order:a\tb"], 2, "InvalidDataError", "control character '\\t' at position 1"),
        (["start", "order:e1", "--data", "{oops"], 2, "InvalidDataError", "--data '{oops' is refused: it is no JSON"),
        (["start", "order:e1", "--data", '{"a": NaN}'], 2, "InvalidDataError", "JSON knows no NaN"),
        (["start", "order:e1", "--data", '{"a": "\\u0000"}'], 2, "InvalidDataError", "holds a NUL character"),
        (["start", "order:e1", "--set", "amount=lots"], 2, "InvalidDataError", "field 'amount': 'lots' is refused"),
        (["transition", "order:nobody", "pay"], 1, "NotFoundError", "does not exist"),
        (["transition", "order:x", "fly"], 1, "InvalidTransitionError", "no event 'fly'; it has pay, ship"),
        (["ls", "order", "--state", "lost"], 2, "InvalidDataError", "has placed, paid, shipped"),
        (["start", "order:e2", "--durability", "forever"], 2, "InvalidDataError", "'forever' is refused"),
    ],
)  # fmt: skip
def test_what_is_refused_is_one_clear_error(
    store: Any, arguments: list[str], code: int, kind: str, message: str
) -> None:
    result = store(*arguments, "--json")
    assert (result.code, result.out) == (code, "")
    assert result.error["type"] == kind
    assert message in result.error["message"]


def test_a_move_that_is_not_allowed_is_code_1_and_says_what_is(store: Any) -> None:
    assert store("start", "order:moves").code == 0
    result = store("transition", "order:moves", "ship")
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("error: order:moves is in state 'placed'")
    assert "allowed: pay, cancel" in result.err
    assert store("start", "order:moves").code == 1
    stale = store("transition", "order:moves", "pay", "--expect-version", "7", "--json")
    assert (stale.code, stale.error["type"]) == (1, "StaleVersionError")


def test_a_ten_megabyte_patch_is_refused(store: Any, tmp_path: Path) -> None:
    document = tmp_path / "data.json"
    document.write_text(json.dumps({"scan": "x" * 10_000_000}))
    result = store("start", "order:big", "--data", f"@{document}")
    assert result.code == 2
    assert "at most 65536 are allowed in a patch" in result.err


def test_status_verify_recover_and_list(store: Any, up: dict[str, Any]) -> None:
    assert store("start", "order:status", "--durability", "durable").code == 0
    status = store("status", "--json")
    assert status.code == 0
    told = status.document
    assert (told["redis"], told["redis_url"], told["database_url"]) == ("ready", up["redis_url"], up["database_url"])
    assert len(told["partitions"]) == told["partition_count"] == 16
    assert {"partition", "watermark", "tail", "backlog", "lag_seconds"} <= set(told["partitions"][0])
    assert told["machines"][0]["name"] == "order"
    assert told["machines"][0]["counts"]["placed"] >= 1
    assert told["recoveries"][-1]["classes"] == "new"
    assert "order" in store("status").out
    verified = store("verify", "--json")
    assert (verified.code, verified.document["findings"]) == (0, [])
    assert "nothing wrong" in store("verify", "--machine", "order").out
    recovered = store("recover", "--json").document
    assert recovered["epoch"] == told["epoch"] + 1
    assert recovered["kinds"] == {"intact": 16}
    listed = store("machine", "list", "--json").document
    assert [(one["machine"], one["version"]) for one in listed] == [("order", 1)]
    assert "placed" in store("machine", "show", "order").out
    assert store("db", "check").code == 0
    assert store("db", "upgrade", "--dry-run").code == 0


def test_another_definition_under_a_known_name_is_refused(store: Any, tmp_path: Path) -> None:
    other = tmp_path / "order.yaml"
    other.write_text(
        "name: order\nstates:\n  a: {initial: true}\n  b: {final: true}\nevents:\n  go: {from: a, to: b}\n"
    )
    result = store("machine", "register", other, "--json")
    assert (result.code, result.error["type"]) == (2, "DefinitionError")
    assert "raise the machine's version" in result.error["message"]


def test_a_wrong_partition_count_is_refused(folder: Path, up: dict[str, Any]) -> None:
    result = run("status", "--data-dir", folder, env={"STATECACHE_PARTITION_COUNT": "8"})
    assert result.code == 2
    assert "holds a store of 16 partitions, the settings say 8" in result.err


def test_a_reader_that_goes_away_is_no_error(folder: Path, up: dict[str, Any]) -> None:
    import subprocess

    from tests.acceptance.command import environment, words

    with subprocess.Popen(
        words("machine", "show", ORDER, "--format", "yaml"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=REPOSITORY, env=environment(),
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
    assert b"Traceback" not in said


def test_flusher_once_tells_what_it_did(redis_url: str, sqlite_url: str, namespace: str) -> None:
    where = ["--redis-url", redis_url, "--database-url", sqlite_url, "--namespace", namespace]
    assert run_here("machine", "register", ORDER, *where).code == 0
    assert run_here("start", "order:1", *where).code == 0
    for flushed in (1, 0):
        told = run_here("flusher", "--once", "--json", *where)
        assert (told.code, told.document["flushed"], told.document["total"]) == (0, flushed, flushed), told.out
        assert told.document["seconds"] >= 0


# --- servers of others -------------------------------------------------------------------------------------------------


def test_a_redis_that_came_back_waits_for_recover_and_one_that_is_away_is_code_3(
    private_redis: servers.ValkeyServer, sqlite_url: str
) -> None:
    where = ["--redis-url", private_redis.url, "--database-url", sqlite_url]
    assert run_here("machine", "register", ORDER, *where).code == 0
    assert run_here("start", "order:1", *where).code == 0
    assert run_here("flusher", "--once", *where).code == 0
    private_redis.restart()
    status = run_here("status", *where, "--json")
    assert (status.code, status.document["redis"]) == (1, "needs recovery")
    assert run_here("verify", *where, "--json").error["type"] == "RecoveringError"
    dry = run_here("recover", "--dry-run", *where, "--json")
    assert (dry.document["dry_run"], dry.document["kinds"]) == (True, {"intact": 16})
    assert run_here("status", *where).code == 1, "a dry run changed something"
    assert run_here("recover", *where).code == 0
    assert run_here("status", *where).code == 0
    private_redis.kill()
    for arguments in (
        ["where", "order:1"],
        ["history", "order:1"],
        ["doctor"],
        ["verify"],
        ["recover"],
        ["flusher", "--once"],
    ):
        away = run_here(*arguments, *where, "--json")
        assert (away.code, away.error["type"]) == (3, "UnavailableError"), arguments


def test_what_sql_knows_is_told_while_redis_is_away(private_redis: servers.ValkeyServer, sqlite_url: str) -> None:
    """Status tells SQL's side when it is wanted most, and ends with 3; lists from SQL are as good as ever."""
    where = ["--redis-url", private_redis.url, "--database-url", sqlite_url, "--json"]
    assert run_here("machine", "register", ORDER, *where).code == 0
    assert run_here("start", "order:1", "--durability", "durable", *where).code == 0
    private_redis.kill()
    status = run_here("status", *where)
    assert (status.code, status.document["redis"], status.document["backlog"]) == (3, "away", None)
    assert status.document["machines"][0]["counts"] == {"placed": 1}
    assert "Redis did not answer" in status.document["redis_problem"]
    assert "did not answer" in run_here("status", *where[:-1]).out
    listed = run_here("ls", "order", *where)
    assert (listed.code, [one["id"] for one in listed.document]) == (0, ["1"])
    assert run_here("machine", "list", *where).document[0]["instances"] == 1
    assert run_here("dead-letters", "list", *where).document == {"letters": []}


def test_verify_finds_what_somebody_else_wrote(redis_url: str, sqlite_url: str, namespace: str) -> None:
    import redis

    where = ["--redis-url", redis_url, "--database-url", sqlite_url, "--namespace", namespace]
    assert run_here("machine", "register", ORDER, *where).code == 0
    assert run_here("start", "order:1", "--set", "amount=1", "--durability", "durable", *where).code == 0
    with StateCache.connect(redis_url, sqlite_url, namespace) as cache, redis.Redis.from_url(redis_url) as client:
        partition = cache.hot.keyspace.partition_of("order", "1")
        client.hset(cache.hot.keyspace.instance(partition, "order", "1"), "amount", "2")
    result = run_here("verify", *where, "--json")
    assert result.code == 1
    assert [(one["kind"], one["address"]) for one in result.document["findings"]] == [("hot", "order:1")]
    assert "order:1" in run_here("verify", *where).out


def test_db_upgrade_makes_the_tables(sqlite_url: str) -> None:
    where = ["--database-url", sqlite_url]
    for command in (["check"], ["upgrade", "--dry-run"]):
        assert run_here("db", *command, *where).code == 2  # no file, perhaps a mistake: a look makes none
    Path(sqlite_url.removeprefix("sqlite:///")).touch()
    for command in (["check"], ["upgrade", "--dry-run"]):
        assert run_here("db", *command, *where).code == 1
    assert run_here("db", "check", *where, "--json").document["now"] is None
    assert run_here("db", "upgrade", *where, "--json").code == 0
    assert run_here("db", "check", *where).code == 0
