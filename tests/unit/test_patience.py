"""Watching sockets: cut when their time is up, left alone when they ended in time, one thread and only while there is need."""

from __future__ import annotations

import itertools
import math
import socket
import threading
import time
import types
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from statecache.durable import patience
from tests.support.interruptions import interrupted_at
from tests.support.waiting import wait_until


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def _connection(driver: object) -> Any:
    """What SQLAlchemy hands out, as far as it is looked at."""
    return types.SimpleNamespace(connection=types.SimpleNamespace(driver_connection=driver))


def _threads() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name == "statecache-sql-patience"]


def test_a_socket_is_shut_when_its_time_is_up(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, _ = pair
    watcher = patience.Patience()
    later = watcher.begin(_connection(ours), 600)
    watch = watcher.begin(_connection(ours), 0.05)
    assert ours.recv(1) == b""  # it would wait for ever
    assert watcher.end(watch)
    assert not watcher.end(later)
    watcher.close()
    assert not _threads()


def test_what_has_ended_is_left_alone(pair: tuple[socket.socket, socket.socket]) -> None:
    """The driver may close its socket, and its number be another one's, before the time would have been up."""
    ours, theirs = pair
    watcher = patience.Patience()
    for _ in range(100):
        assert not watcher.end(watcher.begin(_connection(ours), 0.05))
    wait_until(lambda: not _threads(), "the thread has nothing to watch any more")
    theirs.sendall(b"x")
    assert ours.recv(1) == b"x"
    watch = watcher.begin(_connection(ours), 0.01)  # and begins again
    assert ours.recv(1) == b""
    assert watcher.end(watch)


@pytest.mark.parametrize(("driver", "seconds"), [(object(), 1.0), (types.SimpleNamespace(fileno=lambda: 0), math.inf)])
def test_what_cannot_or_need_not_be_watched(driver: object, seconds: float) -> None:
    watcher = patience.Patience()
    assert watcher.begin(_connection(driver), seconds) is None
    assert not watcher.end(None)
    assert not _threads()


def test_a_closed_connection_is_not_watched(pair: tuple[socket.socket, socket.socket]) -> None:
    pair[0].close()
    assert patience.Patience().begin(_connection(pair[0]), 1.0) is None


def test_until_is_of_a_thread_and_nests() -> None:
    watcher, found = patience.Patience(), []
    assert watcher.left(7.0) == 7.0
    with watcher.until(time.monotonic() + 100):
        assert 99 < watcher.left() <= 100 + patience.GRACE_SECONDS
        with watcher.until(time.monotonic() - 100):
            assert watcher.left() == patience.GRACE_SECONDS
        with watcher.until(None):
            assert watcher.left() == math.inf
        other = threading.Thread(target=lambda: found.append(watcher.left()))
        other.start()
        other.join()
        assert watcher.left() > 99
    assert found == [math.inf]


@pytest.mark.parametrize("module", [threading, patience])
def test_an_interruption_leaves_no_lock_behind(module: Any, pair: tuple[socket.socket, socket.socket]) -> None:
    """A signal's handler raises at any place of a read that is watched, also within Python's own ``threading``: others read."""
    ours, _ = pair

    def read(watcher: patience.Patience) -> None:
        watcher.end(watcher.begin(_connection(ours), 600))

    for nth in itertools.count(1):
        watcher = patience.Patience()
        first = watcher.begin(_connection(ours), 600)
        met = interrupted_at(nth, module.__file__, partial(read, watcher))
        others = threading.Thread(target=read, args=(watcher,), daemon=True)
        others.start()
        others.join(10)
        assert not others.is_alive(), nth
        assert not watcher.end(first)
        watcher.close()
        if not met:
            return
