"""What systemd is told, on a real datagram socket."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from statecache import settings
from workers.notify import Notifier


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as one:
        one.bind(str(tmp_path / "notify"))
        one.setblocking(False)
        yield one


def _told(listener: socket.socket) -> list[str]:
    lines: list[str] = []
    while True:
        try:
            lines += listener.recv(4096).decode().split("\n")
        except BlockingIOError:
            return lines


def test_ready_once_and_signs_of_life_when_due(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    now = 1000.0
    monkeypatch.setattr("workers.notify.time.monotonic", lambda: now)
    notifier = Notifier(str(tmp_path / "notify"), 4.0)
    notifier.turn("first")
    assert _told(listener) == ["READY=1", "WATCHDOG=1", "STATUS=first"]
    notifier.turn("too early")
    assert _told(listener) == []
    now += 1.0
    notifier.turn("a quarter of the time")
    assert _told(listener) == ["WATCHDOG=1"]
    now += 5.0
    notifier.turn("later")
    assert _told(listener) == ["WATCHDOG=1", "STATUS=later"]
    notifier.stopping("bye")
    assert _told(listener) == ["STOPPING=1", "STATUS=bye"]


def test_a_start_that_takes_longer(listener: socket.socket, tmp_path: Path) -> None:
    notifier = Notifier(str(tmp_path / "notify"), 4.0)
    notifier.starting()
    assert _told(listener) == ["EXTEND_TIMEOUT_USEC=180000000", "STATUS=recovering"]
    notifier.turn("first")
    assert _told(listener) == ["READY=1", "WATCHDOG=1", "STATUS=first"]


def test_an_abstract_socket() -> None:
    name = f"statecache-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as one:
        one.bind("\0" + name)
        one.setblocking(False)
        Notifier(f"@{name}").turn("here")
        assert _told(one) == ["READY=1", "STATUS=here"]


def test_nobody_listens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is said once, and nothing stops."""
    notifier = Notifier(str(tmp_path / "nowhere"), 0.0001)
    with caplog.at_level(logging.WARNING):
        notifier.turn("a")
        notifier.stopping("b")
    assert len(caplog.records) == 1
    Notifier(None).turn("nobody asked")


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({}, (None, None)),
        ({"NOTIFY_SOCKET": "", "WATCHDOG_USEC": "junk"}, (None, None)),
        ({"NOTIFY_SOCKET": "/run/x", "WATCHDOG_USEC": "2500000"}, ("/run/x", 2.5)),
        ({"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"}, ("@x", None)),
        ({"WATCHDOG_USEC": "0", "WATCHDOG_PID": str(os.getpid())}, (None, None)),
    ],
)
def test_what_systemd_asks_for(
    variables: dict[str, str], told: tuple[str | None, float | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert settings.systemd_variables() == told
