"""The door: hosts, tokens, lengths, origins, headers."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from statecache.web import guard
from statecache.web.policy import Policy
from tests.support import webs, worlds

REMOTE = Policy(webs.TOKEN, actions=True, local=False)


@pytest.fixture
def world(redis_url: str, sqlite_url: str, namespace: str) -> Iterator[worlds.World]:
    with worlds.World(redis_url, sqlite_url, namespace) as made:
        made.start("1")
        yield made


def start(web: webs.Served, **headers: str) -> int:
    return web.post("/api/v1/instances/order", json={"id": "new"}, headers=headers).status_code


def test_on_loopback_reading_is_free_and_nothing_can_be_changed(world: worlds.World) -> None:
    with webs.serving(world) as web:
        assert web.get("/api/v1/instances/order?id=1").status_code == 200
        assert start(web, **web.bearer) == 403


def test_changes_need_the_bearer_token(world: worlds.World) -> None:
    with webs.serving(world, webs.ACTING) as web:
        assert start(web) == 401
        assert start(web, Authorization="Bearer wrong") == 401
        assert start(web, Authorization=f"Basic {webs.TOKEN}") == 401
        session = webs.ACTING.new_session("ann")
        assert start(web, Cookie=f"statecache_session={session.cookie}") == 401, (
            "a cookie is sent by the browser itself"
        )
        assert start(web, **web.bearer) == 201


def test_elsewhere_everything_but_healthz_needs_the_token(world: worlds.World) -> None:
    with webs.serving(world, REMOTE) as web:
        assert web.get("/healthz").status_code == 200
        for path in ("/api/v1/machines", "/api/v1/openapi.json", "/readyz", "/api/v1/where?id=1", "/nothing", "/"):
            answer = web.get(path)
            assert answer.status_code in (401, 303), path
            assert answer.status_code == 401 or answer.headers["location"].startswith("/login?next=")
            assert web.get(path, headers={"Authorization": "Bearer x"}).status_code == answer.status_code
        answer = web.get("/api/v1/machines")
        assert (answer.headers["www-authenticate"], answer.json()["status"]) == ("Bearer", 401)
        assert web.get("/api/v1/machines", headers=web.bearer).status_code == 200
        assert web.get("/readyz", headers=web.bearer).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "[", "10.0.0.1"])
def test_another_name_of_this_machine_is_refused_on_loopback(world: worlds.World, host: str) -> None:
    """DNS rebinding: a page of evil.example, whose name now means 127.0.0.1, asks us in its visitor's browser."""
    with webs.serving(world) as web:
        assert web.get("/api/v1/machines", headers={"Host": host}).status_code == 421
        for mine in ("localhost:1", "LocalHost", "127.0.0.1:99", "[::1]:5"):
            assert web.get("/api/v1/machines", headers={"Host": mine}).status_code == 200


def test_bodies_are_bounded(world: worlds.World) -> None:
    with webs.serving(world, webs.ACTING) as web:
        large = b'{"id": "' + b"x" * guard.BODY_BYTES_MAX + b'"}'
        assert web.post("/api/v1/instances/order", content=large, headers=web.bearer).status_code == 413
        endless = (b"x" for _ in range(3))
        assert web.post("/api/v1/instances/order", content=endless, headers=web.bearer).status_code == 411
        deep = b'{"id": "1", "data": {"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}}"
        assert web.post("/api/v1/instances/order", content=deep, headers=web.bearer).status_code in (400, 422)


def test_forms_of_other_sites_are_refused(world: worlds.World) -> None:
    with webs.serving(world, webs.ACTING) as web:
        for origin in ("http://evil.example", "null", "", "http://127.0.0.1:1", "http://["):
            assert web.post("/login", data={"token": webs.TOKEN}, headers={"Origin": origin}).status_code == 403
        assert web.post("/login", data={"token": webs.TOKEN}).status_code == 403


def test_every_answer_carries_the_headers(world: worlds.World) -> None:
    with webs.serving(world, REMOTE) as web:
        for path in ("/healthz", "/api/v1/machines", "/nothing", "/"):
            answer = web.get(path)
            for name, value in guard.SECURITY_HEADERS.items():
                assert answer.headers[name] == value
            assert answer.headers["cache-control"] == "no-store"
            assert "server" not in answer.headers


def test_head_tells_what_get_would(world: worlds.World) -> None:
    """Load balancers ask so. A stream has no end to tell."""
    with webs.serving(world) as web:
        paths = ("/", "/healthz", "/readyz", "/metrics", "/machines/order", "/api/v1/instances/order?id=1", "/nowhere")
        for path in paths:
            whole, head = web.get(path), web.head(path)
            assert (head.status_code, head.content) == (whole.status_code, b""), path
            assert head.headers["content-type"] == whole.headers["content-type"]
        assert web.head("/live/health").status_code == 405


def test_what_is_not_http_is_survived(world: worlds.World) -> None:
    with webs.serving(world) as web:
        port = int(web.url.rpartition(":")[2])
        for junk in (b"\x16\x03\x01 hello", b"GET /%zz%ff HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"):
            with socket.create_connection(("127.0.0.1", port), 10) as connection:
                connection.sendall(junk)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65536):
                    pass
        assert web.get("/healthz").status_code == 200
