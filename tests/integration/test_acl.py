"""The users of ``config/redis/users.acl``: each role does its work with its rights alone, and is refused what is not its.

The server runs with ``config/redis/redis.conf``. Its ACL log is the judge: after a role's work it must be empty.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import httpx
import pytest
import redis
from redis.exceptions import NoPermissionError

from statecache import Move, StateCache
from statecache.core import errors
from statecache.engine import advise, doctor, eviction
from statecache.engine import verify as verification
from tests.acceptance.command import run_here
from tests.support import secured, worlds
from tests.support.background import Background
from tests.support.secured import ROLES, SecuredServer
from tests.support.waiting import wait_until

NAMESPACE = "shop.eu"
RECOVERERS = ("client", "flusher", "worker", "ops")


@pytest.fixture
def server(redis_binary: Path, tmp_path: Path) -> Iterator[SecuredServer]:
    with SecuredServer(redis_binary, tmp_path / "redis", secured.passwords(), NAMESPACE) as made:
        yield made


class Store:
    """One store, opened in several roles."""

    def __init__(self, server: SecuredServer, database_url: str) -> None:
        self.server, self.database_url = server, database_url
        self.open: list[StateCache] = []

    def by(self, role: str, **settings: object) -> StateCache:
        cache = StateCache.connect(
            self.server.url_of(role), self.database_url, NAMESPACE, **{"partition_count": 2, **settings}
        )
        cache.machine(worlds.Order)
        self.open.append(cache)
        return cache

    def command(self, role: str, *words: str) -> int:
        """Run a command of the command line in a role; its exit code."""
        place = ["--redis-url", self.server.url_of(role), "--database-url", self.database_url, "--namespace", NAMESPACE]
        done = run_here(*words, "--json", *place)
        assert "permission" not in done.err, done.err
        return done.code


@pytest.fixture
def store(server: SecuredServer, sqlite_url: str) -> Iterator[Store]:
    made = Store(server, sqlite_url)
    yield made
    for cache in made.open:
        cache.close()


def _fill(cache: StateCache, count: int = 20) -> None:
    orders = cache.machine("order")
    orders.start_many([(f"o{number}", {"amount": number, "note": "x"}) for number in range(count)])
    orders.transition_many([Move(f"o{number}", "pay") for number in range(0, count, 2)])


# --- the work ----------------------------------------------------------------------------------------------------------


def test_client(store: Store) -> None:
    """Everything a program calls; the instances have been evicted once, so that they are hydrated."""
    client, flusher = store.by("client"), store.by("flusher")
    _fill(client)
    flusher.flush_alone()
    assert eviction.evict(flusher, idle_seconds=0).evicted
    orders = client.machine("order")
    orders.transition("o1", "note", data={"amount": 3}, unset=["note"], increment={"tries": 1}, transition_id="once")
    assert orders.transition("o1", "note", transition_id="once").duplicate
    with store.server.client() as judge:
        judge.config_set("appendfsync", "always")
    orders.transition("o3", "note", durability="fsync")
    with store.server.role("client") as bare:
        assert bare.execute_command("WAIT", 0, 10) == 0
        assert len(bare.execute_command("WAITAOF", 0, 0, 10)) == 2
    assert orders.get("o1").state == "placed"
    assert [row.version for row in orders.history("o1")] == [1, 2]
    assert (
        orders.transition("o7", "pay", durability="durable", timeout=30).version == 2
    )  # no flusher: it flushes itself
    assert len(orders.get_many(["o1", "o2"])) == 2
    assert not store.server.refusals()


def test_client_that_flushes(store: Store) -> None:
    """A program with ``flusher=True`` has a flusher's duties too: it evicts by room."""
    client = store.by("client", flusher=True, hot_instances_max=1, eviction_interval_seconds=0.1)
    _fill(client)
    client.flush()
    with store.server.client() as judge:
        wait_until(lambda: len(list(judge.scan_iter("*:i:*"))) <= 1, "all but one instance are evicted", 60)
    assert not store.server.refusals()


def test_flusher(store: Store) -> None:
    """It makes the new store, flushes, trims, evicts by age and by room, and shows the gauges."""
    flusher = store.by("flusher", hot_instances_max=1)
    client = store.by("client")
    _fill(client)
    flusher.flush_alone()
    assert eviction.evict(flusher, idle_seconds=0).evicted
    client.machine("order").transition("o1", "pay")
    assert store.command("flusher", "flusher", "--once") == 0
    with store.server.client() as judge:
        assert [key for key in judge.scan_iter("*:log") if judge.xlen(key) > 1] == []
    port = flusher.serve_metrics(0)
    shown = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=30).text
    assert 'statecache_store_reachable{store="redis"} 1.0' in shown
    assert "statecache_flush_lag_seconds{" in shown
    assert not store.server.refusals()


@pytest.mark.parametrize("role", RECOVERERS)
@pytest.mark.parametrize("wiped", [False, True], ids=["restarted", "wiped"])
def test_whoever_may_recover_can(store: Store, role: str, wiped: bool) -> None:
    """The server is killed with unflushed entries, loses its data or not; the first call of this role makes it true again."""
    _fill(store.by("client"))
    store.by("flusher").flush_alone()
    store.by("client").machine("order").transition("o1", "pay")
    store.server.kill()
    if wiped:
        store.server.wipe()
    store.server.start()
    recoverer = store.by(role, auto_recover=False)
    assert recoverer.recover().kinds.get(
        "wiped" if wiped else "intact"
    )  # the append-only file was read, whoever is off
    found = verification.verify(store.by("ops"))
    assert not found.findings
    assert not store.server.refusals()


def test_worker(store: Store, tmp_path: Path) -> None:
    """A real worker process, its queue as the user "jobs" on a database of its own: every job, and the schedule."""
    _fill(store.by("client"))
    store.by("flusher").flush_alone()
    server = store.server
    with Background(server.url_of("jobs", 1), store.database_url, NAMESPACE, tmp_path) as background:
        variables = {"STATECACHE_RQ_REDIS_URL": server.url_of("jobs", 1), "STATECACHE_PARTITION_COUNT": "2"}
        background.redis_url = server.url_of("worker")
        ids = [background.start("verify"), background.start("retry-letters")]
        worker = background.worker(environment={**variables, "STATECACHE_VERIFY_INTERVAL_SECONDS": "3600"})
        for job_id in ids:
            assert background.wait_over(job_id)["status"] == "finished", worker.printed
        worker.end(signal.SIGTERM, timeout_seconds=60)
    assert not server.refusals()


def test_reader(store: Store) -> None:
    client, flusher = store.by("client"), store.by("flusher")
    _fill(client)
    flusher.flush_alone()
    client.machine("order").transition("o1", "pay")
    orders = store.by("reader", auto_recover=False).machine("order")
    assert orders.get("o1").state == "paid"
    assert [row.event for row in orders.history("o1")] == ["@start", "pay"]
    assert orders.counts()
    assert not store.server.refusals()
    for words in (("where", "order:o1"), ("history", "order:o1"), ("ls", "order"), ("status",)):
        assert store.command("reader", *words) == 0
    assert not store.server.refusals()


def test_ops(store: Store) -> None:
    """Everything that people on call type."""
    _fill(store.by("client"))
    for words in (
        ("doctor",), ("advise",), ("status",), ("recover", "--dry-run"), ("recover",), ("flusher", "--once"), ("verify",),
        ("evict", "--older-than", "0s"), ("dead-letters", "list"), ("transition", "order:o1", "pay"), ("where", "order:o1"),
    ):  # fmt: skip
        assert store.command("ops", *words) == 0, words
    configuration = next(one for one in doctor.examine(store.by("ops")) if one.name == "appendfsync")
    assert configuration.found == "everysec"
    assert advise.advise(store.by("ops")).measured.sampled > 0  # it may look at what an instance takes
    assert not store.server.refusals()


def test_a_reader_that_tries_to_recover_does_no_lasting_harm(store: Store) -> None:
    """Redis restarts; the first to meet it is a reader whose auto_recover was left on: it takes the recovery in SQL, and is
    refused at the fence. It is told why, and whoever may recover goes on at once."""
    _fill(store.by("client"))
    store.server.kill()
    store.server.start()
    with pytest.raises(errors.ConfigurationError, match="does not give this user a right"):
        store.by("reader").machine("order").history("o1")
    assert store.server.refusals()
    store.by("flusher").flush_alone(30)
    assert store.by("reader", auto_recover=False).machine("order").get("o1").version == 1
    assert not store.server.refusals()


def _commands_of_scripts() -> set[str]:
    """Every command that a script gives to Redis, but for what only emulated servers are asked."""
    called = re.compile(r"call_?\((?:\w+[.]p?call, *)?'([A-Za-z]+)'")
    folder = resources.files("statecache.hot") / "lua"
    files = [*folder.iterdir(), *(folder / "include").iterdir()]
    sources = [one.read_text() for one in files if one.name.endswith(".lua") and "emulated" not in one.name]
    return {command.lower() for source in sources for command in called.findall(source)}


def _granted(role: str) -> set[str]:
    (line,) = [
        one for one in (secured.CONFIG / "users.acl").read_text().splitlines() if one.startswith(f"user {role} ")
    ]
    return {word[1:].partition("|")[0] for word in line.split() if word.startswith("+")}


@pytest.mark.parametrize("role", RECOVERERS)
def test_a_command_that_a_script_comes_to_use_is_granted(role: str) -> None:
    """So that a new one is not found missing between two writes of a script, in production."""
    assert len(_commands_of_scripts()) > 15
    assert not _commands_of_scripts() - _granted(role)


# --- what is refused ---------------------------------------------------------------------------------------------------

LOG, META, INSTANCE = (f"{{{NAMESPACE}:00}}:{part}" for part in ("log", "meta", "i:order:o1"))
NOBODYS = [
    "FLUSHALL", "FLUSHDB", "CONFIG SET maxmemory-policy allkeys-lru", "CONFIG REWRITE", "SCRIPT FLUSH", "SCRIPT KILL",
    "FUNCTION FLUSH", "KEYS *", "DEBUG SLEEP 0", "ACL SETUSER client +@all", "ACL LIST", "SHUTDOWN NOSAVE", "MONITOR",
    "REPLICAOF NO ONE", "SWAPDB 0 1", "CLIENT KILL TYPE normal", "BGREWRITEAOF", "SAVE", "RENAME a b", "MIGRATE h 1 k 0 9",
    "GET {other:00}:meta", "HSET {other:00}:meta a b",
]  # fmt: skip
WRITES = [f"HSET {META} epoch 9", f"XADD {LOG} * e x", f"UNLINK {INSTANCE}", f"XTRIM {LOG} MAXLEN 0", f"DEL {LOG}"]
REFUSED = {
    "client": [WRITES[4], f"XDEL {LOG} 1-1", "MEMORY USAGE a", "GET rq:queues"],
    "flusher": [WRITES[4], f"XDEL {LOG} 1-1", "CONFIG GET *", "LPUSH rq:queue:x 1"],
    "worker": [WRITES[4], f"XDEL {LOG} 1-1", "CONFIG GET *", "LPUSH rq:queue:x 1"],
    "reader": [*WRITES, "SCAN 0", "CONFIG GET *", "LPUSH rq:queue:x 1"],
    "ops": [WRITES[4], f"XDEL {LOG} 1-1", "MEMORY PURGE", f"OBJECT FREQ {INSTANCE}", "LPUSH rq:queue:x 1"],
    "metrics": [*WRITES, f"HGETALL {META}", f"XRANGE {LOG} - +", "SCAN 0", "EVAL return 0", "CONFIG GET *"],
    "jobs": [*WRITES, f"HGETALL {META}", f"XRANGE {LOG} - +", "SCAN 0", "CONFIG GET *", "PUBLISH other x"],
}


@pytest.mark.parametrize("role", ROLES)
def test_refused(server: SecuredServer, role: str) -> None:
    """By name, not by accident: each is "no permission", and nothing is there afterwards."""
    with server.role(role) as client:
        for command in (*NOBODYS, *REFUSED[role]):
            with pytest.raises(NoPermissionError):
                client.execute_command(*command.split(" "))
    with server.client() as judge:
        assert judge.dbsize() == 0


@pytest.mark.parametrize("role", ["reader", "jobs"])
def test_a_script_has_its_callers_rights(server: SecuredServer, role: str) -> None:
    """A reader may name the keys, and write nothing to them; the queue's user may not even name them."""
    with server.role(role) as client, pytest.raises(redis.ResponseError, match=r"(?i)permission|acl"):
        client.eval(f"return redis.call('XADD', '{LOG}', '*', 'e', '')", 1, LOG)
    with server.role(role) as client, pytest.raises(redis.ResponseError, match=r"(?i)permission|acl"):
        client.eval("return redis.call('HGETALL', '{other:00}:meta')", 1, META)


def test_nobody_without_a_password(server: SecuredServer) -> None:
    with server.client(username=None, password=None) as nobody, pytest.raises(redis.AuthenticationError):
        nobody.ping()
    for password in ("", "x"):
        with server.client(username="default", password=password) as nobody, pytest.raises(redis.RedisError):
            nobody.ping()
    with server.client(username="client", password="wrong") as nobody, pytest.raises(redis.AuthenticationError):
        nobody.ping()


# --- how the file is made ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("password", ["", "too short"])
def test_a_missing_password_makes_no_file(role: str, password: str) -> None:
    made = secured.users(secured.passwords() | {secured.variable(role): password})
    assert (made.returncode, made.stdout) == (2, "")
    assert secured.variable(role) in made.stderr


def test_a_namespace_that_is_none_makes_no_file() -> None:
    made = secured.users(secured.passwords() | {"STATECACHE_NAMESPACE": "a/b*"})
    assert (made.returncode, made.stdout) == (2, "")


def test_the_file_holds_no_password() -> None:
    variables = secured.passwords()
    made = secured.users(variables)
    assert made.returncode == 0
    assert not [password for password in variables.values() if password in made.stdout]
    assert "{REDIS_" not in made.stdout
