"""Ctrl-C at the moment in which a thread begins: what ends it afterwards does not stumble over it."""

from __future__ import annotations

import itertools
import threading
from functools import partial
from typing import Any

import pytest

from statecache.engine import commits, threads
from statecache.engine.duties import Duties, Duty
from tests.support.interruptions import interrupted_at


@pytest.fixture
def cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """``Thread.start`` is interrupted before the new thread's first step."""

    def start(self: threading.Thread) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", start)


def test_a_thread_whose_start_was_cut_off_is_joined(cut_off: None) -> None:
    thread = threading.Thread(target=print)
    with pytest.raises(KeyboardInterrupt):
        thread.start()
    threads.join(thread, 1)


def test_a_thread_that_runs_is_waited_for() -> None:
    go = threading.Event()
    thread = threading.Thread(target=go.wait, args=(10,))
    thread.start()
    threads.join(thread, 0.01)
    assert thread.is_alive()
    go.set()
    threads.join(thread)
    assert not thread.is_alive()


def test_a_thread_that_would_wait_for_itself_is_told_so() -> None:
    found: list[Any] = []

    def wait_for_itself() -> None:
        try:
            threads.join(threading.current_thread())
        except RuntimeError as error:
            found.append(error)

    thread = threading.Thread(target=wait_for_itself)
    thread.start()
    thread.join(10)
    assert len(found) == 1


def test_duties_are_closed_after_an_interrupted_start(cut_off: None) -> None:
    duties = Duties([Duty("never", lambda: None, 60.0)])
    with pytest.raises(KeyboardInterrupt):
        duties.start()
    duties.close(1)


@pytest.mark.parametrize("kind", [threads.Bell, threads.Event])
@pytest.mark.parametrize("work", ["set", "wait"])
def test_set_in_the_midst_of_its_own_threads_set_or_wait(kind: type[threads.Bell | threads.Event], work: str) -> None:
    """A signal's handler sets what its thread is just setting or waiting for; ``threading.Event`` waits for its own lock."""
    for file in (threads.__file__, threading.__file__):
        for nth in itertools.count(1):
            one = kind()
            run = partial(one.wait, 0.001) if work == "wait" else one.set
            met = interrupted_at(nth, file, run, one.set)
            if not met:
                break
            one.set()
            assert one.is_set()


def test_bell_is_taken_by_its_wait() -> None:
    bell = threads.Bell()
    assert not bell.wait(0.0)
    bell.set()
    bell.set()
    assert bell.wait(0.0)
    assert not bell.wait(0.0)
    bell.set()
    bell.clear()
    assert not bell.is_set()


@pytest.mark.parametrize("kind", [threads.Event, commits.Signal])
@pytest.mark.parametrize("what", ["give", "wait"])
@pytest.mark.parametrize("module", [threading, threads, commits])
def test_an_interruption_leaves_no_lock_behind(kind: type[Any], what: str, module: Any) -> None:
    """A handler raises at any place of a ring or a wait, also within Python's own ``threading``: others ring and wait."""
    for nth in itertools.count(1):
        event = kind()
        give = event.set if kind is threads.Event else event.give
        wait = partial(event.wait, 0.001) if kind is threads.Event else partial(event.wait, 0, 0.001)
        met = interrupted_at(nth, module.__file__, give if what == "give" else wait)
        others = threading.Thread(target=lambda give=give, wait=wait: (give(), wait()), daemon=True)
        others.start()
        others.join(10)
        assert not others.is_alive(), nth
        if not met:
            return
