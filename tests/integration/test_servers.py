"""The tests' own servers and proxy do what their names say: what other tests conclude from them rests on this."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import redis
import sqlalchemy

from tests.support import processes, proxy, servers, waiting


@pytest.fixture
def through_proxy(redis_server: servers.ValkeyServer, redis_url: str) -> Iterator[proxy.Proxy]:
    with proxy.Proxy(redis_server.port) as found:
        yield found


def client_of(link: proxy.Proxy, **options: float) -> redis.Redis:
    return redis.Redis(port=link.port, retry=None, decode_responses=True, **options)  # type: ignore[arg-type]


def test_redis_url_is_empty(redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        assert client.dbsize() == 0
        client.set("key", "value")


def test_redis_url_is_empty_again(redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        assert client.dbsize() == 0
        client.set("key", "value")


@pytest.mark.parametrize("flavour", ["valkey9", "valkey8", "redis8"])
def test_every_flavour_starts(flavour: str, tmp_path: Path) -> None:
    with servers.ValkeyServer(servers.redis_binary(flavour), tmp_path) as server, server.client() as client:
        info = client.info("server")
        found = info.get("valkey_version", info["redis_version"])
    assert found.startswith({"valkey9": "9.", "valkey8": "8.", "redis8": "8."}[flavour])


def test_redis_killed_keeps_its_files_and_port(private_redis: servers.ValkeyServer) -> None:
    pid, port = private_redis.pid, private_redis.port
    with private_redis.client() as client:
        client.set("key", "value")
        assert b"value" in private_redis.aof_path.read_bytes()
        private_redis.kill()
        assert not processes.is_running(pid)
        assert not private_redis.alive
        private_redis.start()
        assert private_redis.port == port
        assert client.get("key") == "value"


def test_redis_wiped(private_redis: servers.ValkeyServer) -> None:
    with private_redis.client() as client:
        client.set("key", "value")
        private_redis.kill()
        private_redis.wipe()
        private_redis.start()
        assert client.get("key") is None


def test_redis_paused(private_redis: servers.ValkeyServer) -> None:
    with private_redis.client(socket_timeout=0.2) as client:
        private_redis.pause()
        with pytest.raises(redis.TimeoutError):
            client.ping()
        private_redis.resume()
        assert client.ping()


def test_redis_that_cannot_start_says_why(redis_binary: Path, tmp_path: Path) -> None:
    with pytest.raises(servers.ServerError, match="appendfsync"):
        servers.ValkeyServer(redis_binary, tmp_path, {"appendfsync": "sometimes"}).start()


def test_database_is_fresh(database_url: str) -> None:
    engine = sqlalchemy.create_engine(database_url)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE only_once (x INTEGER)")
    engine.dispose()


def test_database_from_a_template(postgres_server: servers.PostgresServer) -> None:
    template = postgres_server.create_database()
    with postgres_server.connect(template) as connection:
        connection.execute("CREATE TABLE t (x) AS VALUES (1)")
    copy = postgres_server.create_database(template)
    with postgres_server.connect(copy) as connection:
        assert connection.execute("SELECT x FROM t").fetchall() == [(1,)]
    postgres_server.drop_database(copy)
    postgres_server.drop_database(template)


@pytest.mark.postgres
def test_postgres_faults(private_postgres: servers.PostgresServer) -> None:
    with private_postgres.connect() as connection:
        connection.execute("CREATE TABLE t (x) AS VALUES (1)")
        private_postgres.pause()
        waiting_client = private_postgres.url().replace("+psycopg", "")
        with pytest.raises(psycopg.OperationalError, match="timeout"):
            psycopg.connect(waiting_client, connect_timeout=2)
        private_postgres.resume()
        assert connection.execute("SELECT x FROM t").fetchall() == [(1,)]
        private_postgres.kill()
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT x FROM t")
    private_postgres.start()
    private_postgres.restart()
    with private_postgres.connect() as connection:
        assert connection.execute("SELECT x FROM t").fetchall() == [(1,)]
    folder, pid = private_postgres.folder, private_postgres.pid
    private_postgres.stop()
    assert not folder.exists()
    assert not processes.is_running(pid)


@pytest.mark.postgres
def test_postgres_out_of_reach_of_its_user_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkout of root is below a closed folder, which is not opened: the server runs from a copy of the wheel."""
    if os.geteuid() != 0:
        pytest.skip("only root runs PostgreSQL as another user")
    monkeypatch.setattr(servers, "_is_open_to_others", lambda path: "site-packages" not in str(path))
    with servers.PostgresServer() as server, server.connect() as connection:
        assert (server.folder / "wheel").is_dir()
        assert connection.execute("SELECT 1").fetchall() == [(1,)]


def test_servers_end_with_a_killed_test_process(redis_binary: Path, tmp_path: Path) -> None:
    script = (
        "import pathlib, sys; from tests.support import servers\n"
        "server = servers.ValkeyServer(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])).start()\n"
        "print(server.pid, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(redis_binary), str(tmp_path)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        pid = int(child.stdout.readline())
        assert processes.is_running(pid)
        os.kill(child.pid, signal.SIGKILL)
        processes.wait_until_ended([pid], "the server's end after that of its test process")


def test_wait_until_names_what_it_waited_for() -> None:
    with pytest.raises(AssertionError, match="in vain for: a miracle"):
        waiting.wait_until(lambda: False, "a miracle", timeout_seconds=0.02)


# ------------------------------------------------------------------------------------------------------------- the proxy


def test_dropped_reply_was_executed(through_proxy: proxy.Proxy, redis_server: servers.ValkeyServer) -> None:
    with client_of(through_proxy) as client, redis_server.client() as direct:
        through_proxy.drop_replies_after_forwarding(2, matching=b"INCR")
        client.set("untouched", "1")
        for expected in ("1", "2"):
            with pytest.raises(redis.ConnectionError):
                client.incr("counter")
            assert direct.get("counter") == expected
        assert client.incr("counter") == 3
        assert through_proxy.faults_done == 2


def test_request_cut_before_forwarding_was_not_executed(
    through_proxy: proxy.Proxy, redis_server: servers.ValkeyServer
) -> None:
    with client_of(through_proxy) as client, redis_server.client() as direct:
        through_proxy.cut_before_forwarding(matching=b"INCR")
        with pytest.raises(redis.ConnectionError):
            client.incr("counter")
        assert direct.get("counter") is None
        assert client.incr("counter") == 1


def test_pattern_in_two_pieces_is_found(through_proxy: proxy.Proxy, redis_server: servers.ValkeyServer) -> None:
    through_proxy.cut_before_forwarding(matching=b"INCR")
    connection = redis.Connection(port=through_proxy.port, retry=None)  # type: ignore[arg-type]
    connection.connect()
    connection.send_packed_command([b"*2\r\n$4\r\nIN"])
    with redis_server.client() as direct:
        waiting.wait_until(lambda: _unread_bytes(direct) > 0, "the first piece to reach the server")
    connection.send_packed_command([b"CR\r\n$1\r\na\r\n"])
    with pytest.raises(redis.ConnectionError):
        connection.read_response()
    connection.disconnect()


def _unread_bytes(direct: redis.Redis) -> int:
    return max(int(client["qbuf"]) + int(client.get("multi-mem", 0)) for client in direct.client_list())


def test_cut_then_served_again(through_proxy: proxy.Proxy) -> None:
    connection = redis.Connection(port=through_proxy.port, retry=None)  # type: ignore[arg-type]
    connection.connect()
    through_proxy.cut()
    with pytest.raises(redis.ConnectionError):
        _ping(connection)
    assert _ping(connection) == b"PONG"
    connection.disconnect()
    assert through_proxy.connections_made == 2


def _ping(connection: redis.Connection) -> object:
    connection.send_command("PING")
    return connection.read_response()


def test_refused_then_served_at_the_same_port(through_proxy: proxy.Proxy) -> None:
    with client_of(through_proxy) as client:
        client.ping()
        through_proxy.refuse()
        with pytest.raises(redis.ConnectionError):
            client.ping()
        with pytest.raises(redis.ConnectionError, match="refused"):
            client.ping()
        through_proxy.pass_through()
        assert client.ping()


@pytest.mark.parametrize("fault", ["hold", "delay"])
def test_held_back_then_let_go(through_proxy: proxy.Proxy, redis_server: servers.ValkeyServer, fault: str) -> None:
    with client_of(through_proxy, socket_timeout=0.2) as client, redis_server.client() as direct:
        client.ping()
        if fault == "hold":
            through_proxy.hold()
        else:
            through_proxy.delay(60.0)
        with pytest.raises(redis.TimeoutError):
            client.set("key", "value")
        assert direct.get("key") is None
        through_proxy.pass_through()
        waiting.wait_until(lambda: direct.get("key") == "value", "the request that was held back")


def test_commit_without_an_answer(postgres_server: servers.PostgresServer) -> None:
    """The ambiguous commit: the client sees an error, the rows are there."""
    name = postgres_server.create_database()
    with proxy.Proxy(postgres_server.port) as link, postgres_server.connect(name) as direct:
        direct.execute("CREATE TABLE t (x INTEGER)")
        link.drop_replies_after_forwarding(matching=b"COMMIT")
        connection = psycopg.connect(link.url(postgres_server.url(name).replace("+psycopg", "")))
        connection.execute("INSERT INTO t VALUES (1)")
        with pytest.raises(psycopg.OperationalError):
            connection.commit()
        connection.close()
        assert direct.execute("SELECT x FROM t").fetchall() == [(1,)]
        assert direct.execute("SELECT 1").fetchall() == [(1,)]
    postgres_server.drop_database(name)
