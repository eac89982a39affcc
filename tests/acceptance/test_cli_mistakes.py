"""Commands given by mistake: the wrong file, the wrong database, a forgotten unit. Nothing is made, and nothing is lost."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import redis
import sqlalchemy as sa

from statecache import StateCache, StateMachine
from statecache.cli import exits
from tests.acceptance.command import REPOSITORY, environment, run_here, words
from tests.support import servers

ORDER = REPOSITORY / "config" / "machines" / "order.yaml"
LOG = "case,event,at\n1,pay,2026-01-01T00:00:00Z\n"


@pytest.fixture
def nowhere(redis_url: str, database_url: str, namespace: str) -> list[str]:
    """Servers on which there is no store."""
    return ["--redis-url", redis_url, "--database-url", database_url, "--namespace", namespace]


@pytest.mark.parametrize("command", [
    ["status"], ["doctor"], ["verify"], ["recover", "--dry-run"], ["recover"], ["where", "order:1"], ["history", "order:1"],
    ["ls", "order"], ["machine", "list"], ["dead-letters", "list"], ["evict", "--dry-run"], ["warm", "--dry-run"], ["claims"],
    ["advise"], ["retention", "--older-than", "1d", "--delete", "--dry-run"], ["transition", "order:1", "pay"],
], ids=" ".join)  # fmt: skip
def test_a_look_at_empty_servers_makes_no_store(
    nowhere: list[str], redis_url: str, database_url: str, namespace: str, command: list[str]
) -> None:
    told = run_here(*command, *nowhere)
    assert told.code == exits.USAGE, (told.out, told.err)
    assert "there is no store in" in told.err
    engine = sa.create_engine(database_url)
    with contextlib.closing(redis.Redis.from_url(redis_url)) as client, engine.connect() as connection:
        assert not list(client.scan_iter(match=f"{{{namespace}:*"))
        assert "statecache_store" not in sa.inspect(connection).get_table_names()
    engine.dispose()


def test_tables_without_a_store(nowhere: list[str]) -> None:
    assert run_here("db", "upgrade", *nowhere).code == 0
    told = run_here("status", *nowhere)
    assert (told.code, "no store in them" in told.err) == (exits.USAGE, True), told.err
    assert run_here("machine", "register", ORDER, *nowhere).code == 0
    assert run_here("status", *nowhere).code == 0


LOOKS = {
    "where order:1": exits.UNAVAILABLE, "history order:1": exits.UNAVAILABLE, "claims": exits.UNAVAILABLE,
    "advise": exits.UNAVAILABLE, "evict --older-than 0s --dry-run": exits.UNAVAILABLE, "verify": exits.UNAVAILABLE,
    "doctor": exits.FOUND, "status": exits.FOUND, "recover --dry-run": exits.FOUND, "warm --dry-run": exits.FOUND,
    "ls order": exits.DONE, "ls --stuck": exits.DONE, "machine list": exits.DONE, "machine show order": exits.DONE,
    "dead-letters list": exits.DONE, "export order FOLDER/out.jsonl": exits.DONE,
    "retention --older-than 1d --delete --dry-run": exits.DONE,
    "import FOLDER/log.csv --machine order --id case --event event --at at --dry-run": exits.DONE,
}  # fmt: skip
"""Commands that only look, and how they end where Redis is not the one that SQL knows: SQL alone answers some of them."""


@pytest.mark.parametrize("command", LOOKS)
def test_a_look_at_the_wrong_redis_changes_nothing(
    redis_url: str, sqlite_url: str, namespace: str, tmp_path: Path, command: str
) -> None:
    """The number of the Redis database is mistyped: what is found there is an empty one. Production goes on as it was."""
    (tmp_path / "log.csv").write_text(LOG, encoding="utf-8")
    wrong = redis_url.removesuffix("/0") + "/2"
    given = ["--redis-url", wrong, "--database-url", sqlite_url, "--namespace", namespace]
    with StateCache.connect(redis_url, sqlite_url, namespace) as cache:
        orders = cache.machine(StateMachine.load(ORDER))
        orders.start("1")
        cache.flush()
        orders.start("2")
        before = cache.durable.identity()
        told = run_here(*command.replace("FOLDER", str(tmp_path)).split(), *given, "--json")
        with contextlib.closing(redis.Redis.from_url(wrong)) as client:
            assert client.dbsize() == 0
        assert cache.durable.identity() == before
        assert orders.transition("2", "pay").version == 2
    assert told.code == LOOKS[command], (told.out, told.err)
    if told.code == exits.UNAVAILABLE:
        assert told.error["type"] == "RecoveringError"
        assert "redis_url leads to another one" in told.error["message"]
        assert "run 'statecache recover'" in told.error["message"]
    else:
        assert (json.loads(told.out) is not None, told.err) == (True, "")


def test_doctor_tells_that_redis_waits_for_a_recovery(redis_url: str, sqlite_url: str, namespace: str) -> None:
    given = ["--redis-url", redis_url, "--database-url", sqlite_url, "--namespace", namespace, "--json"]
    made = StateCache.connect(redis_url, sqlite_url, namespace)
    with made, contextlib.closing(redis.Redis.from_url(redis_url)) as client:
        assert _recovery_check(given) == ("ok", "epoch 1, new")
        client.flushdb()
        assert _recovery_check(given) == ("fail", "Redis is not ready, SQL is at epoch 1")
        assert run_here("recover", *given).code == 0
        assert _recovery_check(given)[0] == "ok"


def _recovery_check(given: list[str]) -> tuple[str, str]:
    checks = run_here("doctor", *given).document["checks"]
    return next((one["verdict"], one["found"]) for one in checks if one["name"] == "recovery")


@pytest.mark.parametrize("command", ["where order:1", "ls order", "doctor", "transition order:1 pay"])
def test_one_of_the_two_urls_is_missing(
    redis_url: str, sqlite_url: str, namespace: str, tmp_path: Path, command: str
) -> None:
    """Neither is a server started, nor a file made, in a folder that nobody named; the error names what is missing."""
    folder = tmp_path / "data"
    with StateCache.connect(redis_url, sqlite_url, namespace) as cache:
        cache.machine(StateMachine.load(ORDER)).start("1")
        before = cache.durable.identity()
        for given, missing in (("--redis-url", "database_url"), ("--database-url", "redis_url")):
            url = redis_url if given == "--redis-url" else sqlite_url
            place = ["--data-dir", folder, "--namespace", namespace]
            told = run_here(*command.split(), given, url, *place, "--json")
            assert (told.code, told.error["type"]) == (exits.USAGE, "ConfigurationError"), told.err
            assert f"{missing} is not" in told.error["message"]
            assert f"STATECACHE_{missing.upper()}" in told.error["message"]
            assert str(folder) in told.error["message"]
            assert "db upgrade" not in told.error["message"]
            assert not folder.exists()
        assert cache.durable.identity() == before


def test_what_makes_a_store_wants_a_folder_for_its_file(redis_url: str, tmp_path: Path) -> None:
    told = run_here("flusher", "--once", "--redis-url", redis_url, "--data-dir", tmp_path / "data")
    assert told.code == exits.USAGE
    assert "redis_url is set and database_url is not" in told.err


def test_a_used_store_wants_its_redis(redis_url: str, sqlite_url: str, namespace: str, tmp_path: Path) -> None:
    """Its Redis' URL was forgotten: a new server would have nothing, and the store would be recovered as wiped. A database that
    is new, or a folder that is there, is another matter."""
    folder = tmp_path / "data"
    given = ["--database-url", sqlite_url, "--namespace", namespace, "--data-dir", folder]
    with StateCache.connect(redis_url, sqlite_url, namespace) as cache:
        before = cache.durable.identity()
        told = run_here("flusher", "--once", *given)
        assert told.code == exits.USAGE
        assert "set redis_url (STATECACHE_REDIS_URL), or make the folder" in told.err
        assert not folder.exists()
        assert cache.durable.identity() == before
    folder.mkdir()
    assert run_here("flusher", "--once", *given).code == exits.DONE
    new = ["--database-url", f"{sqlite_url}-new", "--namespace", namespace, "--data-dir", tmp_path / "other"]
    assert run_here("flusher", "--once", *new).code == exits.DONE


def _import(folder: Path, refused: Path | None, *more: str) -> Any:
    log = folder / "log.csv"
    log.write_text(LOG, encoding="utf-8")
    named = ["--refused", refused] if refused else []
    columns = ["--machine", ORDER, "--id", "case", "--event", "event", "--at", "at"]
    return run_here("import", log, *columns, *named, "--data-dir", folder / "store", *more)


@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["import", "dry run"])
def test_an_import_spares_files_that_are_not_its_own(tmp_path: Path, more: list[str]) -> None:
    """The log itself by its name or by another, notes, a folder."""
    log, notes, link = tmp_path / "log.csv", tmp_path / "notes.txt", tmp_path / "link.csv"
    notes.write_text("mine\n", encoding="utf-8")
    os.symlink(log, link)
    for refused in (log, link, notes, tmp_path):
        told = _import(tmp_path, refused, *more)
        assert (told.code, "is there already" in told.err) == (exits.USAGE, True), (refused, told.err)
    assert (log.read_text(encoding="utf-8"), notes.read_text(encoding="utf-8")) == (LOG, "mine\n")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["import", "dry run"])
def test_an_import_whose_side_file_has_no_folder(tmp_path: Path, more: list[str]) -> None:
    """It was told at the first row that was refused, when others had been applied."""
    told = _import(tmp_path, tmp_path / "nowhere" / "side.jsonl", *more)
    assert (told.code, f"there is no folder {tmp_path / 'nowhere'}" in told.err) == (exits.USAGE, True), told.err
    assert not (tmp_path / "store").exists()


def test_an_import_replaces_its_own_side_file(tmp_path: Path) -> None:
    side = tmp_path / "side.jsonl"
    side.write_text(json.dumps({"line": 2, "reason": "an older run's", "row": {}}) + "\n", encoding="utf-8")
    assert _import(tmp_path, side, "--dry-run").code == 0
    assert side.exists(), "a dry run writes nothing"
    assert _import(tmp_path, side).code == 0
    assert not side.exists()


def test_a_machine_learned_onto_its_own_log(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    log.write_text(LOG, encoding="utf-8")
    told = run_here(
        "machine", "learn", log, "--id", "case", "--event", "event", "--at", "at", "--name", "m", "--output", log
    )
    assert (told.code, log.read_text(encoding="utf-8")) == (exits.USAGE, LOG)


def test_retention_wants_a_unit(nowhere: list[str]) -> None:
    """90 would be seconds, and take nearly everything."""
    told = run_here("retention", "--older-than", "90", "--delete", "--dry-run", *nowhere)
    assert (told.code, "--older-than '90' is refused" in told.err) == (exits.USAGE, True)


def test_a_port_that_is_taken_may_be_free_later(nowhere: list[str]) -> None:
    """Code 3: systemd tries again (2 would end the flusher for good)."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        told = run_here("flusher", "--once", "--metrics-port", taken.getsockname()[1], *nowhere)
    assert told.code == exits.UNAVAILABLE, told.err


def test_output_that_is_closed(nowhere: list[str], redis_url: str, database_url: str, namespace: str) -> None:
    with StateCache.connect(redis_url, database_url, namespace) as cache:
        cache.machine(StateMachine.load(ORDER)).start_many([f"o{number}" for number in range(3000)])
        cache.flush()
    listing = words("ls", "order", "--limit", "3000", *nowhere)
    closed = subprocess.run(
        [sys.executable, "-c", "import os, sys; os.close(1); os.execv(sys.argv[1], sys.argv[1:])", *listing],
        cwd=REPOSITORY, env=environment(), stderr=subprocess.PIPE, check=False, timeout=60,
    )  # fmt: skip
    assert (closed.returncode, b"bug" in closed.stderr) == (0, False), closed.stderr
    reader, writer = os.pipe()
    os.close(reader)
    try:
        gone = subprocess.run(
            listing, cwd=REPOSITORY, env=environment(), stdout=writer, stderr=subprocess.PIPE, check=False, timeout=60
        )
    finally:
        os.close(writer)
    assert (gone.returncode, gone.stderr) == (128 + signal.SIGPIPE, b"")


def test_a_login_that_is_refused(private_redis: servers.ValkeyServer, sqlite_url: str, postgres_url: str) -> None:
    """The advice is for the login, not for rights or for missing tables; all of it is a wrong configuration."""
    url = sa.make_url(postgres_url)
    for other, told in (
        (url.set(database="nosuch"), "the database's name"),
        (url.set(password="wrong"), "check the user, the password"),
        (url.set(username="nobody"), "check the user, the password"),
    ):
        given = ["--redis-url", private_redis.url, "--database-url", other.render_as_string(hide_password=False)]
        for command in (["flusher", "--once"], ["status"], ["db", "check"]):
            _is_refused([*command, *given], told)
    beyond = private_redis.url.removesuffix("/0") + "/99"
    _is_refused(
        ["flusher", "--once", "--redis-url", beyond, "--database-url", sqlite_url], "number at the end of redis_url"
    )
    with private_redis.client() as client:
        client.config_set("requirepass", "secret")
    for login in ("", ":wrong@", "nobody:wrong@"):
        redis_url = private_redis.url.replace("//", f"//{login}")
        given = ["--redis-url", redis_url, "--database-url", sqlite_url]
        _is_refused(["flusher", "--once", *given], "check the user and the password in redis_url")
    with private_redis.client(password="secret") as client:
        client.acl_setuser("weak", enabled=True, passwords=["+weak"], keys=["*"], commands=["+ping", "+info"])
    weak = private_redis.url.replace("//", "//weak:weak@")
    _is_refused(["flusher", "--once", "--redis-url", weak, "--database-url", sqlite_url], "config/redis/users.acl")


def _is_refused(words: list[str], told: str) -> None:
    done = run_here(*words, "--json")
    assert (done.code, done.error["type"]) == (exits.USAGE, "ConfigurationError"), (words, done.err)
    message = done.error["message"]
    assert told in message
    assert "db upgrade" not in message
    assert ("users.acl" in message) == ("users.acl" in told)


@pytest.mark.parametrize(("place", "command"), [
    ("workers/__init__.py", "flusher --once"), ("workers/__init__.py", "worker --burst"), ("workers/__init__.py", "jobs list"),
    ("workers/__init__.py", "serve"), ("workers.py", "up"),
])  # fmt: skip
def test_a_projects_own_package_of_the_name_workers(tmp_path: Path, place: str, command: str) -> None:
    """It is found before ours, from the folder that the command is started in: the error says whose it is and what to do."""
    own = tmp_path / place
    own.parent.mkdir(exist_ok=True)
    own.touch()
    (own.parent / "flusher.py").touch()
    done = subprocess.run(
        words(*command.split(), "--data-dir", tmp_path / "data", "--json"), cwd=tmp_path, capture_output=True, text=True,
        env=environment(PYTHONPATH=os.pathsep.join((str(tmp_path), str(REPOSITORY)))), check=False, timeout=60,
    )  # fmt: skip
    told = json.loads(done.stderr.splitlines()[-1])["error"]
    assert (done.returncode, told["type"]) == (exits.USAGE, "ConfigurationError"), done.stderr
    assert f"another package 'workers' hides that of statecache: {own} is found before" in told["message"]
    assert "PYTHONPATH" in told["message"]
    assert not (tmp_path / "data").exists()


LOOKING = (
    "status", "where order:1", "ls order", "machine list", "verify", "db check", "db upgrade --dry-run", "recover --dry-run",
    "import FOLDER/log.csv --machine order --id case --event event --at at --dry-run",
)  # fmt: skip


@pytest.mark.parametrize("command", LOOKING)
def test_a_look_through_a_mistyped_path_makes_no_file(
    redis_url: str, namespace: str, tmp_path: Path, command: str
) -> None:
    """The error names the file that is not there. An empty file, and a database of others, stay as they are to the byte."""
    (tmp_path / "log.csv").write_text(LOG, encoding="utf-8")
    looked = tmp_path / "looked"
    looked.mkdir()
    given = [
        *command.replace("FOLDER", str(tmp_path)).split(),
        "--redis-url",
        redis_url,
        "--namespace",
        namespace,
        "--json",
    ]
    missing = looked / "mistyped.db"
    for url in (f"sqlite:///{missing}", f"sqlite:///file:{missing}?uri=true"):
        told = run_here(*given, "--database-url", url)
        assert (told.code, told.error["type"]) == (exits.USAGE, "ConfigurationError"), (told.out, told.err)
        assert f"there is no store in {missing}, there is no such file" in told.error["message"]
    assert list(looked.iterdir()) == []
    (looked / "empty.db").touch()
    with contextlib.closing(sqlite3.connect(looked / "others.db")) as others:
        others.execute("CREATE TABLE notes (text TEXT)")
        others.commit()
    before = {path.name: path.read_bytes() for path in looked.iterdir()}
    for name in before:
        told = run_here(*given, "--database-url", f"sqlite:///{looked / name}")
        assert told.code == (exits.FOUND if command.startswith("db") else exits.USAGE), (told.out, told.err)
    assert {path.name: path.read_bytes() for path in looked.iterdir()} == before


def test_an_upgrade_makes_the_file(tmp_path: Path) -> None:
    made = tmp_path / "new.db"
    assert run_here("db", "upgrade", "--database-url", f"sqlite:///{made}").code == exits.DONE
    assert run_here("db", "check", "--database-url", f"sqlite:///{made}").code == exits.DONE
    assert made.stat().st_size > 4096


def test_a_database_of_a_newer_version(sqlite_url: str) -> None:
    """There is no work that an upgrade could do: a dry run says so, and ends as the upgrade."""
    assert run_here("db", "upgrade", "--database-url", sqlite_url).code == exits.DONE
    engine = sa.create_engine(sqlite_url)
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE statecache_alembic SET version_num = '0099'"))
    engine.dispose()
    for more in ([], ["--dry-run"]):
        told = run_here("db", "upgrade", *more, "--database-url", sqlite_url, "--json")
        assert (told.code, told.error["type"]) == (exits.USAGE, "ConfigurationError"), more
        assert "has schema version 0099" in told.error["message"]
        assert "upgrade the statecache package" in told.error["message"]
    told = run_here("db", "check", "--database-url", sqlite_url)
    assert (told.code, "upgrade the statecache package" in told.out) == (exits.FOUND, True), told.out


def test_a_data_folder_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting, where no shell has put the folder in for the tilde."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data").mkdir()
    config = tmp_path / "statecache.toml"
    config.write_text('data_dir = "~/data"\n', encoding="utf-8")
    assert run_here("db", "upgrade", "--config", config).code == exits.DONE
    assert (tmp_path / "data" / "statecache.db").exists()
    assert run_here("db", "check", "--config", config).code == exits.DONE
