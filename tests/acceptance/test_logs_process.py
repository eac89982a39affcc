"""Logs of real processes: JSON on request, and no password anywhere, whatever fails."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance import command
from tests.support import refusing, servers
from tests.support.waiting import wait_until
from tests.support.worlds import World

SECRET = "Tr0ub4dor"


@pytest.fixture
def world(redis_url: str, postgres_url: str, namespace: str) -> Iterator[World]:
    with World(redis_url, postgres_url, namespace) as made:
        yield made


def lines(log: str) -> list[dict[str, Any]]:
    """All lines of a log, each of which must be JSON."""
    return [json.loads(line) for line in log.splitlines()]


def test_json_log_of_a_flusher(world: World, tmp_path: Path) -> None:
    """Its whole life: begin, a dead letter, the end. Every line on both streams is JSON, fields and all."""
    places = ("--redis-url", world.redis_url, "--database-url", world.database_url, "--namespace", world.namespace)
    refusing.refuse(world.durable)
    world.start("bad id\u202e", ["pay"])
    world.orders.transition("bad id\u202e", "note", reason=refusing.REASON)
    flusher = command.Running(tmp_path, "flusher", *places, "--log-format", "json", "--log-level", "DEBUG")
    try:
        wait_until(lambda: "dead letter" in flusher.printed, "the dead letter is logged", 60)
    finally:
        flusher.end(signal.SIGTERM, signal.SIGKILL)
    found = lines(flusher.printed)
    assert all({"time", "level", "logger", "message"} <= set(line) for line in found)
    letter = next(line for line in found if line["message"].startswith("dead letter"))
    assert (letter["instance"], letter["level"]) == ("order:bad id\u202e", "error")
    assert (letter["epoch"], letter["partition"]) == (1, world.partition_of("bad id\u202e"))
    assert letter["entry"].startswith("1-")


def test_the_last_line_is_json_too(tmp_path: Path) -> None:
    done = command.run(
        "flusher", "--redis-url", "redis://127.0.0.1:1/0", "--data-dir", tmp_path, "--log-format", "json"
    )
    assert done.code == 3
    last = lines(done.err)[-1]
    assert (last["level"], last["error"]) == ("critical", "UnavailableError")


def test_levels_and_their_refusal(tmp_path: Path) -> None:
    done = command.run("flusher", "--data-dir", tmp_path, "--once", "--log-level", "error")
    assert (done.code, done.err) == (0, "")
    done = command.run("flusher", "--data-dir", tmp_path, "--once", "--log-format", "yaml")
    assert done.code == 2
    assert "log_format = 'yaml' in the arguments is refused" in done.err
    done = command.run("flusher", "--data-dir", tmp_path, "--once", env={"STATECACHE_LOG_LEVEL": "loud"})
    assert done.code == 2
    assert "STATECACHE_LOG_LEVEL" in done.err


REDIS_URLS = [
    f"redis://:{SECRET}@127.0.0.1:1/0",
    f"redis://user:{SECRET}@127.0.0.1:1/0",
    f"redis://user:{SECRET}@no-such-host.invalid:6379/0",
    f"redis://user:{SECRET}@127.0.0.1:port/0",
    f"redis://user:{SECRET}@127.0.0.1:1/zero",
    f"redis://user:{SECRET}#{SECRET}@127.0.0.1:1/0",
    f"redis://user:x/{SECRET}@127.0.0.1:1/0",
    f"redis://user:{SECRET}@127.0.0.1:1/0?socket_timeout=soon",
    f"redis://user:{SECRET}@127.0.0.1:1/0?nonsense=1",
    f"rediss://user:{SECRET}@127.0.0.1:1/0",
    f"unix:///nowhere/redis.sock?password={SECRET}",
    f"redis:/user:{SECRET}@h",
]
SQL_URLS = [
    f"postgresql://user:{SECRET}@127.0.0.1:1/db",
    f"postgresql://user:{SECRET}@no-such-host.invalid/db",
    f"postgresql://user:{SECRET}@127.0.0.1:port/db",
    f"postgresql://user:{SECRET}/{SECRET}@127.0.0.1/db",
    f"postgresql://user@127.0.0.1:1/db?password={SECRET}",
    f"postgresql://user:{SECRET}@127.0.0.1:1/db?nonsense=1",
    f"postgresql+nodriver://user:{SECRET}@127.0.0.1:1/db",
    f"postgresql+asyncpg://user:{SECRET}@127.0.0.1:1/db",
    f"mysql+pymysql://user:{SECRET}@127.0.0.1:1/db",
    f"postgresql//user:{SECRET}@h/db",
]

PROVOKE = """
import json, logging, sys, traceback
from statecache import StateCache, logs
from statecache.core import errors
logs.to_stderr(logging.DEBUG, sys.argv[1])
for redis_url, database_url in json.load(sys.stdin):
    try:
        StateCache.connect(redis_url, database_url, call_timeout_seconds=0.2, socket_timeout_seconds=0.5)
    except errors.StateCacheError as error:
        print(type(error).__name__, error)
        while error is not None:
            print(repr(error), str(error))
            error = error.__cause__
        logging.getLogger("statecache.test").exception("it failed")
    else:
        print("connected to", redis_url.partition("@")[2], database_url.partition("@")[2])
"""


@pytest.mark.parametrize("form", ["text", "json"])
def test_no_password_on_any_path(form: str, redis_url: str, postgres_url: str, sqlite_url: str) -> None:
    """Every URL that fails in its own way: unreachable, unknown host, port, database, option, driver, refused user."""
    host = redis_url.partition("//")[2]
    at_postgres = postgres_url.partition("@")[2]
    pairs = [(url, sqlite_url) for url in REDIS_URLS]
    pairs += [(redis_url, url) for url in SQL_URLS]
    pairs += [(f"redis://user:{SECRET}@{host}", sqlite_url), (f"redis://:{SECRET}@{host}", sqlite_url)]
    pairs += [(redis_url, f"postgresql://nobody:{SECRET}@{at_postgres}")]
    done = subprocess.run(
        [sys.executable, "-c", PROVOKE, form],
        input=json.dumps(pairs),
        capture_output=True,
        text=True,
        cwd=command.REPOSITORY,
        env=command.environment(PYTHONPATH=str(command.REPOSITORY)),
        timeout=command.TIMEOUT_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Error") >= len(pairs) - 4, done.stdout  # trust authentication lets some in
    for line in (done.stdout + done.stderr).splitlines():
        assert SECRET not in line, line


@pytest.mark.parametrize("url", [f"redis://user:{SECRET}@127.0.0.1:1/0", f"redis://user:{SECRET}@127.0.0.1:port/0"])
@pytest.mark.parametrize("options", [(), ("--json",), ("--log-format", "json"), ("--log-level", "debug")])
def test_no_password_from_commands(url: str, options: tuple[str, ...], sqlite_url: str) -> None:
    done = command.run_here("status", "--redis-url", url, "--database-url", sqlite_url, *options)
    assert done.code in (2, 3)
    assert SECRET not in done.out + done.err


def test_no_password_while_a_server_goes_away(
    private_redis: servers.ValkeyServer, sqlite_url: str, namespace: str, tmp_path: Path
) -> None:
    """A flusher with a password in its URL; the server demands one, dies, and comes back."""
    with private_redis.client() as client:
        client.config_set("requirepass", SECRET)
    host = private_redis.url.partition("//")[2]
    places = ("--redis-url", f"redis://:{SECRET}@{host}", "--database-url", sqlite_url, "--namespace", namespace)
    flusher = command.Running(tmp_path, "flusher", *places, "--log-level", "debug")
    try:
        wait_until(lambda: "flushing" in flusher.printed, "it flushes", 60)
        private_redis.kill()
        wait_until(lambda: "flush failed" in flusher.printed, "it fails", 60)
    finally:
        flusher.end(signal.SIGTERM, signal.SIGKILL)
    assert SECRET not in flusher.printed
