"""Fixtures of all tests. Servers are real processes (``tests.support.servers``), started when first asked for.

``--server`` (or STATECACHE_TEST_SERVER) chooses the Redis or Valkey. Each pytest-xdist worker has servers of its own,
so that a test may empty the Redis that it is given.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from statecache.engine import lifeline
from tests.support import programs, servers

_numbers = itertools.count(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--server",
        choices=sorted(servers.FLAVOURS),
        default=os.environ.get("STATECACHE_TEST_SERVER") or "valkey9",
        help="Redis or Valkey to test with: " + ", ".join(f"{name}: {text}" for name, text in servers.FLAVOURS.items()),
    )


def pytest_configure(config: pytest.Config) -> None:
    # A shell starts what it sends to the background with SIGINT ignored, and so would be all processes of the tests: those that
    # are told to stop by Ctrl-C would not.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header(config: pytest.Config) -> str:
    flavour = config.getoption("--server")
    return f"server: {flavour}, {servers.FLAVOURS[flavour]}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        names = tuple(name for marker in item.iter_markers("needs") for name in marker.args)
        if (reason := programs.missing(names)) and not programs.ARE_REQUIRED:
            item.add_marker(pytest.mark.skip(reason))


@pytest.fixture(scope="session")
def redis_binary(pytestconfig: pytest.Config) -> Path:
    """The server program of the flavour that these tests run with."""
    return servers.redis_binary(pytestconfig.getoption("--server"))


@pytest.fixture(scope="session")
def redis_server(redis_binary: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.ValkeyServer]:
    """A server for tests that do it no harm; ``redis_url`` empties it. For faults take ``private_redis``."""
    with servers.ValkeyServer(redis_binary, tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def redis_url(redis_server: servers.ValkeyServer) -> str:
    """URL of the session's server: no keys, no scripts."""
    with redis_server.client() as client:
        client.flushall()
        client.script_flush("SYNC")
    return redis_server.url


@pytest.fixture
def namespace() -> str:
    """A namespace that no other test uses."""
    return f"test{os.getpid()}-{next(_numbers)}"


@pytest.fixture
def start_redis(redis_binary: Path, tmp_path: Path) -> Iterator[Callable[..., servers.ValkeyServer]]:
    """Starts servers that belong to this test: ``start_redis(appendfsync="always")``, settings with ``_`` for ``-``."""
    started: list[servers.ValkeyServer] = []

    def start(**settings: str) -> servers.ValkeyServer:
        args = {name.replace("_", "-"): value for name, value in settings.items()}
        server = servers.ValkeyServer(redis_binary, tmp_path / f"redis-{len(started) + 1}", args)
        started.append(server)
        return server.start()

    try:
        yield start
    finally:
        for server in started:
            server.stop()


@pytest.fixture
def private_redis(start_redis: Callable[..., servers.ValkeyServer]) -> servers.ValkeyServer:
    """A server that this test may kill, pause and wipe. It persists: append-only file with ``everysec``."""
    return start_redis()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[servers.PostgresServer]:
    """A server for tests that do it no harm; ``postgres_url`` gives each a database of its own."""
    with servers.PostgresServer() as server:
        yield server


@pytest.fixture
def postgres_url(postgres_server: servers.PostgresServer) -> Iterator[str]:
    """SQLAlchemy URL of a fresh PostgreSQL database."""
    name = postgres_server.create_database()
    yield postgres_server.url(name)
    postgres_server.drop_database(name)


@pytest.fixture
def private_postgres() -> Iterator[servers.PostgresServer]:
    """A server that this test may kill, pause and restart (1.2 s to start)."""
    with servers.PostgresServer() as server:
        yield server


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """SQLAlchemy URL of a SQLite file that does not exist yet."""
    return f"sqlite:///{tmp_path / 'statecache.db'}"


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def database_url(request: pytest.FixtureRequest) -> str:
    """SQLAlchemy URL of a fresh database: the test runs once for each kind."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture(params=["sync", "async"])
def client(request: pytest.FixtureRequest) -> str:
    """Which of the two clients a behaviour is tested on: ``World(..., client=client)``."""
    kind: str = request.param
    return kind


@pytest.fixture(
    params=[
        ("sqlite", "sync"),
        pytest.param(("postgres", "sync"), marks=pytest.mark.postgres),
        ("sqlite", "async"),  # its SQL is the sync client's
    ],
    ids=" ".join,
)
def database_and_client(request: pytest.FixtureRequest) -> tuple[str, str]:
    """SQLAlchemy URL of a fresh database, and the client: behaviour that may depend on either."""
    kind, client = request.param
    return request.getfixturevalue(f"{kind}_url"), client


@pytest.fixture
def data_folder(tmp_path: Path) -> Iterator[Path]:
    """A data folder for the embedded server. A server that the test left running in it is stopped."""
    folder = tmp_path / "data"
    yield folder
    record = folder / "socket.path"
    line = lifeline.connect(Path(record.read_text()) if record.exists() else folder / "redis.sock")
    if line is not None:
        line.stop()
        line.close()
