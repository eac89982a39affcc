"""``/healthz`` and ``/readyz`` while servers go away and come back."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from statecache.core import errors
from statecache.web.policy import Policy
from statecache.web.site import Site
from tests.support import prometheus, servers, webs, worlds
from tests.support.waiting import wait_until


def test_ready_while_all_is_well(redis_url: str, database_url: str, namespace: str) -> None:
    with worlds.World(redis_url, database_url, namespace) as world, webs.serving(world) as web:
        assert web.get("/healthz").json() == {"status": "alive"}
        answer = web.get("/readyz")
        assert (answer.status_code, answer.json()) == (200, {"ready": True, "reasons": []})


def test_not_ready_without_redis(
    start_redis: Callable[..., servers.ValkeyServer], sqlite_url: str, namespace: str
) -> None:
    server = start_redis()
    short = {"call_timeout_seconds": 0.5, "socket_timeout_seconds": 0.5, "auto_recover": False}
    with worlds.World(server.url, sqlite_url, namespace, **short) as world, webs.serving(world) as web:
        assert web.get("/readyz").status_code == 200
        server.kill()
        told = wait_until(lambda: _reasons(web), "it is not ready")
        assert told[0].startswith("Redis: ")
        assert web.get("/healthz").status_code == 200
        assert web.get("/api/v1/instances/order?id=1").status_code == 503
        health = web.get("/api/v1/health").json()
        assert (health["redis"], health["lag_seconds"]) == ("away", None)
        server.start()
        told = wait_until(lambda: [one for one in _reasons(web) if "recover" in one], "it waits for its recovery")
        world.cache.recover()
        wait_until(lambda: not _reasons(web), "it is ready again")


def _reasons(web: webs.Served) -> list[str]:
    answer = web.get("/readyz")
    assert (answer.status_code == 200) is answer.json()["ready"]
    reasons: list[str] = answer.json()["reasons"]
    return reasons


def test_not_ready_without_sql(redis_url: str, private_postgres: servers.PostgresServer, namespace: str) -> None:
    url = private_postgres.url(private_postgres.create_database())
    with worlds.World(redis_url, url, namespace) as world, webs.serving(world) as web:
        world.start("1")
        assert web.get("/readyz").status_code == 200
        private_postgres.kill()
        told = wait_until(lambda: _reasons(web), "it is not ready")
        assert told[0].startswith("SQL: ")
        answer = web.get("/api/v1/machines")
        assert (answer.status_code, answer.json()["type"]) == (503, "urn:statecache:UnavailableError")
        assert "retry-after" in answer.headers
        private_postgres.start()
        wait_until(lambda: not _reasons(web), "it is ready again", 30)


def test_not_ready_behind_its_bound(redis_url: str, sqlite_url: str, namespace: str) -> None:
    """Nobody flushes, so the oldest transition grows older than the bound, however small that is."""
    bound = {"web_ready_lag_seconds": 0.001}
    with worlds.World(redis_url, sqlite_url, namespace, **bound) as world, webs.serving(world, Policy()) as web:
        world.start("1")
        told = wait_until(lambda: _reasons(web), "it is not ready")
        assert told[0].startswith("lag: ")
        world.flush()
        wait_until(lambda: not _reasons(web), "it is ready again")


def test_a_server_that_hangs_is_not_waited_for_without_end(
    redis_url: str, private_postgres: servers.PostgresServer, namespace: str
) -> None:
    """SQL is stopped, not dead: its connections stand and say nothing. Each probe is answered all the same."""
    url = private_postgres.url(private_postgres.create_database())
    with worlds.World(redis_url, url, namespace) as world, webs.serving(world) as web:
        assert web.get("/readyz").status_code == 200
        private_postgres.pause()
        try:
            told = wait_until(lambda: _reasons(web), "it is not ready", 30)
            assert told[0].startswith("SQL: ")
            assert web.get("/healthz").status_code == 200
        finally:
            private_postgres.resume()
        wait_until(lambda: not _reasons(web), "it is ready again", 30)


def test_a_look_that_found_no_thread_is_made_again(
    redis_url: str, sqlite_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit of threads is reached for a moment: that look fails at once, and the next one answers."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with worlds.World(redis_url, sqlite_url, namespace) as world:
        site = Site(world.cache, Policy())
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refuse)
            with pytest.raises(errors.UnavailableError, match="can't start new thread"):
                site.status()
        wait_until(lambda: not site.not_ready(), "it is ready again")


@pytest.mark.needs("promtool")
def test_metrics_of_the_process_and_of_the_store(redis_url: str, sqlite_url: str, namespace: str) -> None:
    with worlds.World(redis_url, sqlite_url, namespace) as world, webs.serving(world, webs.ACTING) as web:
        web.post("/api/v1/instances/order", json={"id": "1"}, headers=web.bearer)
        answer = web.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=")
        prometheus.promtool("check", "metrics", stdin=answer.content)
        lines = answer.text.splitlines()
        assert any(line.startswith("statecache_flush_lag_seconds{") and not line.endswith(" 0.0") for line in lines)
        assert any(line.startswith('statecache_transitions_total{event="@start",machine="order"') for line in lines)
