"""``worker``, ``jobs``, ``retention``, ``export`` as a person uses them."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from statecache.core import eventlog
from statecache.engine.logfile import LogFile
from tests.acceptance import command
from tests.support import worlds


@pytest.fixture
def world(redis_url: str, sqlite_url: str, namespace: str) -> Iterator[worlds.World]:
    with worlds.World(redis_url, sqlite_url, namespace) as made:
        for number in range(5):
            made.start(f"o{number}", ["pay", "ship", "deliver"])
        made.flush()
        yield made
        made.verify()


def _run(world: worlds.World, *arguments: object) -> command.Result:
    place = ("--redis-url", world.redis_url, "--database-url", world.database_url, "--namespace", world.namespace)
    return command.run_here(*arguments, *place, "--json")


def test_jobs_from_the_command_line(world: worlds.World) -> None:
    """Start, list, run, show, cancel; each refusal says what to do and ends with its code."""
    first = _run(world, "jobs", "run", "verify", "machine=order").document
    second = _run(world, "jobs", "run", "verify").document
    assert (first["status"], first["arguments"]) == ("queued", {"machine": "order"})
    assert _run(world, "jobs", "cancel", second["id"]).document == {"id": second["id"], "action": "canceled"}
    assert {view["id"] for view in _run(world, "jobs", "list").document["jobs"]} == {first["id"], second["id"]}
    place = ("--redis-url", world.redis_url, "--database-url", world.database_url, "--namespace", world.namespace)
    worked = command.run("worker", "--burst", "--no-scheduler", *place, "--json")
    assert (worked.code, [json.loads(line)["outcome"] for line in worked.out.splitlines()]) == (0, ["finished"])
    shown = _run(world, "jobs", "show", first["id"])
    assert (shown.code, shown.document["result"]["instances"]) == (0, 5)
    for arguments, code, words in (
        (("jobs", "run", "nothing"), 2, "it is one of verify"),
        (("jobs", "run", "verify", "machine"), 2, "it is KEY=VALUE"),
        (("jobs", "run", "verify", "x=1"), 2, "there are machine"),
        (("jobs", "run", "evict", "idle_seconds=soon"), 2, "must be float"),
        (("jobs", "run", "evict", "idle_seconds=-1"), 2, "must be 0 to"),
        (("jobs", "run", "retention", "older_than_days=-5"), 2, "must be 0 to"),
        (("jobs", "run", "retention", "older_than_days=nan"), 2, "must be 0 to"),
        (("jobs", "run", "retention", "older_than_days=inf"), 2, "must be 0 to"),
        (("jobs", "run", "warm", "limit=-1"), 2, "must be 0 to"),
        (("jobs", "run", "warm", "partitions=x"), 2, "numbers with commas"),
        (("jobs", "run", "warm", "partitions=0,99"), 2, "partition 99 is refused"),
        (("jobs", "run", "verify", "machine=nope"), 1, "no machine 'nope' is registered"),
        (("jobs", "run", "export", "file=x.csv"), 2, "'machine' is missing"),
        (("jobs", "run", "export", "machine=order", "file=../../x.csv"), 2, "a plain name"),
        (("jobs", "run", "export", "machine=order", "file=x.xml"), 2, "ends with .jsonl"),
        (("jobs", "run", "verify", "machine=order", "machine=other"), 2, "machine is given twice"),
        (("jobs", "run", "retention", "machine="), 2, "machine= is refused: it is empty"),
        (("dead-letters", "list", ""), 2, "address '' is refused"),
        (("jobs", "show", "nothing"), 1, "there is no job"),
        (("jobs", "show", "\udcff"), 1, "there is no job"),
        (("jobs", "cancel", "\udcff"), 1, "there is no job"),
        (("jobs", "cancel", first["id"]), 2, "is finished already"),
    ):
        found = _run(world, *arguments)
        assert (found.code, words in found.error["message"]) == (code, True), found


@pytest.mark.parametrize(
    "url",
    [
        "redis://localhost:port/0", "redis://[::1/0", "redis://localhost/0?nonsense=1", "redis://localhost/0?socket_timeout=x",
        "http://localhost", "redis://localhost/zero",
    ],
)  # fmt: skip
def test_url_of_the_jobs_that_is_none(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was said to be a bug in statecache."""
    monkeypatch.setenv("STATECACHE_RQ_REDIS_URL", url)
    found = command.run_here("jobs", "list", "--json")
    assert (found.code, found.error["type"]) == (2, "ConfigurationError"), found


def test_url_of_the_jobs_that_is_refused(world: worlds.World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A password, a database: as for ``redis_url``. What the URL says of decoding harms nobody."""
    for change, code in (("/4000", 2), ("?decode_responses=true", 0)):
        base = world.redis_url.rpartition("/")[0] if change[0] == "/" else world.redis_url
        monkeypatch.setenv("STATECACHE_RQ_REDIS_URL", base + change)
        found = _run(world, "jobs", "list")
        assert found.code == code, found
    place = ("--redis-url", world.redis_url, "--database-url", world.database_url, "--namespace", world.namespace)
    worked = command.run("worker", "--burst", "--no-scheduler", *place, env={"STATECACHE_RQ_REDIS_URL": base + change})
    assert worked.code == 0, worked


def test_server_of_the_jobs_that_is_away(world: worlds.World) -> None:
    found = command.run_here("jobs", "list", "--redis-url", "redis://:secret@127.0.0.1:1/0", "--json")
    assert found.code == 3
    assert "secret" not in found.err


def test_retention_and_export(world: worlds.World, tmp_path: Path) -> None:
    folder, file = tmp_path / "archive", tmp_path / "orders.jsonl"
    assert _run(world, "retention", "--older-than", "0s").code == 2
    assert _run(world, "retention", "--older-than", "0s", "--archive", folder, "--delete").code == 2
    (tmp_path / "file").touch()
    for more in ([], ["--dry-run"]):
        told = _run(world, "retention", "--older-than", "0s", "--archive", tmp_path / "file", *more)
        assert (told.code, "file is refused: it is no folder" in told.error["message"]) == (2, True), told
    dry = _run(world, "retention", "--older-than", "0s", "--archive", folder, "--dry-run").document
    assert (dry["instances"], dry["transitions"], dry["files"], folder.exists()) == (5, 15, [], False)
    assert _run(world, "export", "order", file).document["transitions"] == 20
    assert _run(world, "export", "order", file).code == 2
    assert _run(world, "export", "order", tmp_path / "orders.xml").code == 2
    assert len(file.read_text().splitlines()) == 20
    done = _run(world, "retention", "--older-than", "0s", "--archive", folder).document
    assert (done["instances"], len(done["files"])) == (5, 1)
    assert [row["event"] for row in _run(world, "history", "order:o1").document] == ["@archived", "deliver"]


ODD = ("@x", "'@x", "''@x", "=x", "'=x", "-1", "'-1", "+1", "-", "'", "x'y", "x,y", 'x"y', "\ufeffx", "é =x")


def test_an_export_as_csv_gives_back_what_is_stored(world: worlds.World, tmp_path: Path) -> None:
    """No cell of others is a formula, no two ids share a cell, and an import reads the ids that were exported."""
    for id in ODD:
        world.orders.start(id, {"note": f"'{id}"}, actor=id, reason=f"'{id}", transition_id=f"-{id}")
        world.orders.transition(id, "pay", actor=id)
    world.flush()
    file, lines = tmp_path / "orders.csv", tmp_path / "orders.jsonl"
    assert _run(world, "export", "order", file).document["transitions"] == 20 + 2 * len(ODD)
    _run(world, "export", "order", lines)
    with file.open(encoding="utf-8", newline="") as text:
        rows = list(csv.DictReader(text))
    written = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    others = ("id", "transition_id", "actor", "reason")
    assert not [row for row in rows for name in others if row[name][:1] in ("=", "+", "-", "@")]
    assert [[row[name].removeprefix("'") for name in others] for row in rows] == [
        [one[name] or "" for name in others] for one in written
    ]
    words = ("event", "from_state", "to_state", "at", "version", "entry_id")
    assert [[row[name] for name in words] for row in rows] == [
        ["" if one[name] is None else str(one[name]) for name in words] for one in written
    ]
    columns = ["--machine", "order", "--id", "id", "--event", "event", "--at", "at"]
    read = _run(world, "import", file, *columns, "--dry-run").document
    assert (read["cases"], read["refused"]) == (5 + len(ODD), 5 + len(ODD)), "what is refused is each @start"
    log = LogFile(file, eventlog.Columns("id", "event", "at", "actor"))
    assert {row.id for row in log if isinstance(row, eventlog.Row)} >= set(ODD)


def test_an_export_that_has_no_place_is_told_by_its_name(world: worlds.World, tmp_path: Path) -> None:
    missing = tmp_path / "nowhere" / "orders.csv"
    told = _run(world, "export", "order", missing)
    assert (told.code, ".part" in told.err) == (2, False), told.err
    assert told.error["message"] == f"{missing} is refused: there is no folder {missing.parent}"
    long = tmp_path / f"{'x' * 250}.csv"
    told = _run(world, "export", "order", long)
    assert (told.code, told.error["message"]) == (2, f"{long}: File name too long")
