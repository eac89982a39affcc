"""A wire's waiting: it looks for a reply for a moment, then sleeps; timeouts hold either way."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import redis.asyncio

from statecache.core import errors
from statecache.hot import wire


class Connection:
    """What a wire knows of redis-py's connection."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def disconnect(self) -> None:
        self._sock.close()


class Counting(socket.socket):
    """Not what a wire takes for a plain socket, as TLS's is not."""


class Stage:
    """A wire, and the other end of its socket."""

    def __init__(self, timeout_seconds: float, kind: type[socket.socket]) -> None:
        ours, self.server = socket.socketpair()
        if kind is not socket.socket:
            ours = kind(fileno=ours.detach())
        self.wire = wire.Wire(Connection(ours), timeout_seconds)

    def answer_after(self, seconds: float) -> None:
        threading.Timer(seconds, self.server.sendall, (b"+OK\r\n",)).start()

    def close(self) -> None:
        self.wire.close()
        self.server.close()


@pytest.fixture(params=[socket.socket, Counting], ids=["plain", "wrapped"])
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    found = Stage(0.2, request.param)
    yield found
    found.close()


def test_replies_that_are_there_and_that_come_late(stage: Stage) -> None:
    stage.server.sendall(b"+OK\r\n+O")
    assert stage.wire.read() == b"OK"
    stage.server.sendall(b"K\r\n")
    assert stage.wire.read() == b"OK"
    for seconds in (0.0001, 0.01, 0.05):
        stage.answer_after(seconds)
        assert stage.wire.read() == b"OK"
        stage.answer_after(seconds)
        stage.wire.until = time.monotonic() + 1.0
        assert stage.wire.read() == b"OK"
        stage.wire.until = 0.0


def test_timeouts(stage: Stage) -> None:
    """The connection's, a call's own that is shorter, and the connection's again."""
    for wanted, given, whose in ((0.2, None, "socket"), (0.05, 0.05, "call's"), (0.2, None, "socket")):
        began = time.monotonic()
        stage.wire.until = 0.0 if given is None else began + given
        with pytest.raises(redis.TimeoutError, match=f"no reply within the {whose} timeout"):
            stage.wire.read()
        assert wanted <= time.monotonic() - began + 0.005
    stage.answer_after(0.1)
    stage.wire.until = time.monotonic() + 0.01
    with pytest.raises(redis.TimeoutError):
        stage.wire.read()
    stage.wire.until = time.monotonic() + 5.0
    assert stage.wire.read() == b"OK"


def test_a_deadline_is_one_of_all_pieces(stage: Stage) -> None:
    """Each piece comes well within the connection's timeout; the deadline comes before the last."""
    timers = [threading.Timer(number / 20, stage.server.sendall, (b"x" * 10,)) for number in (1, 2, 3)]
    stage.server.sendall(b"$100\r\n")
    stage.wire.until = time.monotonic() + 0.12
    for timer in timers:
        timer.start()
    with pytest.raises(redis.TimeoutError, match="call's"):
        stage.wire.read()
    for timer in timers:
        timer.join()


@pytest.mark.parametrize("seconds", [0.0, 0.05])
def test_a_server_that_takes_nothing(stage: Stage, seconds: float) -> None:
    stage.wire.until = time.monotonic() + seconds if seconds else 0.0
    with pytest.raises((redis.TimeoutError, TimeoutError)):
        stage.wire.send(b"x" * 50_000_000)
    stage.wire.until = 0.0
    with pytest.raises((redis.TimeoutError, TimeoutError)):
        stage.wire.send(b"x" * 50_000_000)


def test_a_long_request_in_time(stage: Stage) -> None:
    """What the system does not take at once is sent piece by piece, before a deadline and after one."""
    got: list[int] = []

    def take() -> None:
        while sum(got) < 6_000_000:
            got.append(len(stage.server.recv(1_000_000)))

    reader = threading.Thread(target=take)
    reader.start()
    stage.wire.until = time.monotonic() + 20.0
    stage.wire.send(b"x" * 3_000_000)
    stage.wire.until = 0.0
    stage.wire.send(b"x" * 3_000_000)
    reader.join()
    assert sum(got) == 6_000_000


def test_the_connection_ends(stage: Stage) -> None:
    stage.server.close()
    with pytest.raises(redis.ConnectionError, match="closed the connection"):
        stage.wire.read()


def _looks(found: wire.Wire, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """From now on: for each piece, whether it was looked for."""
    noted: list[bool] = []
    looked_for = wire.Wire._looked_for

    def noting(self: wire.Wire) -> bytes:
        noted.append(not self._resting)
        return looked_for(self)

    monkeypatch.setattr(wire.Wire, "_looked_for", noting)
    return noted


def test_what_is_looked_for_in_vain_is_looked_for_ever_more_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(5.0, socket.socket)
    looks = _looks(stage.wire, monkeypatch)
    waited_for = stage.wire._waited_for

    def late(_: Any) -> bytes:
        stage.server.sendall(b"+OK\r\n")
        return waited_for()

    monkeypatch.setattr(wire.Wire, "_waited_for", late)
    for _ in range(1000):
        stage.wire.read()
    places = [place for place, looked in enumerate(looks) if looked]
    assert places == [0, 4, 20, 84, 340, 596, 852]
    looks.clear()
    for _ in range(600):  # answers that are there at once: looked for more often again, then always
        if not stage.wire._resting:
            stage.server.sendall(b"+OK\r\n")
        stage.wire.read()
    assert all(looks[-50:])
    stage.close()


@pytest.mark.parametrize("pool_class", [redis.ConnectionPool, redis.asyncio.ConnectionPool])
def test_an_option_of_the_url_does_not_change_what_wires_rest_on(pool_class: Any) -> None:
    """Repeats of the driver's own would apply a transition twice; replies are RESP2's, in bytes."""
    url = (
        "redis://127.0.0.1:1/3?protocol=3&decode_responses=true&health_check_interval=9&socket_timeout=7&client_name=me"
    )
    options = wire.pool_of(url, 5.0, pool_class).connection_kwargs
    assert (options["protocol"], options["decode_responses"], options["health_check_interval"]) == (2, False, 0)
    assert options["retry_on_error"] == []
    assert options["retry"].get_retries() == 0
    assert (options["db"], options["socket_timeout"], options["client_name"]) == (3, 7.0, "me")


@pytest.mark.parametrize("pool_class", [redis.ConnectionPool, redis.asyncio.ConnectionPool])
def test_a_url_that_no_connection_can_be_made_with_is_refused(pool_class: Any, tmp_path: Path) -> None:
    """Before anybody connects; what it says names the option and the file, and no password."""
    there = tmp_path / "there.pem"
    there.write_text("a certificate")
    wrong = [
        ("ssl_cert_reqs=maybe", "maybe"),
        ("ssl_bogus=1", "ssl_bogus"),
        (
            f"ssl_ca_certs={tmp_path}/none.pem",
            f"'{tmp_path}/none.pem' of its option ssl_ca_certs cannot be read: No such file",
        ),
        (f"ssl_ca_certs={there}&ssl_certfile={tmp_path}", "ssl_certfile cannot be read: Is a directory"),
        (f"ssl_certfile={there}&ssl_keyfile={there}.key", "there.pem.key' of its option ssl_keyfile"),
        ("ssl_keyfile=%00", "ssl_keyfile cannot be read"),
    ]
    for options, told in wrong:
        with pytest.raises(errors.ConfigurationError) as caught:
            wire.pool_of(f"rediss://u:hunter2@localhost:1/0?ssl_password=hunter2&{options}", 5.0, pool_class)
        assert told in str(caught.value)
        assert "hunter2" not in str(caught.value)
        assert caught.value.__suppress_context__
    assert wire.pool_of(f"rediss://localhost:1/0?ssl_ca_certs={there}", 5.0, pool_class)


def test_a_socket_file_with_a_user_before_it() -> None:
    """As redis-py reads it: what stands before the @ is user and password, what stands behind it the file."""
    options = wire.pool_of("unix://ann:p%40s%2Fs@/run/r%20s.sock?db=2", 5.0).connection_kwargs
    found = [options[name] for name in ("username", "password", "path", "db")]
    assert found == ["ann", "p@s/s", "/run/r s.sock", 2]
