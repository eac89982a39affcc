"""Duties: one after the other, again and again; one that fails stops nobody."""

from __future__ import annotations

import logging
import threading

import pytest

from statecache.core import errors
from statecache.engine.duties import Duties, Duty
from tests.support.waiting import wait_until


def test_each_has_its_turn_again_and_again() -> None:
    seen: list[str] = []
    with Duties([Duty("a", 0.001, lambda: seen.append("a")), Duty("b", 0.002, lambda: seen.append("b"))]):
        wait_until(lambda: seen.count("a") > 2 and seen.count("b") > 2, "both duties had turns")


def test_one_at_a_time() -> None:
    """Two duties that are always due: neither begins while the other is at work."""
    at_work = threading.Lock()
    turns: list[str] = []

    def work(name: str) -> None:
        turns.append(name if at_work.acquire(blocking=False) else "overlap")
        at_work.release()

    with Duties([Duty(name, 0.0001, lambda name=name: work(name)) for name in "ab"]):  # type: ignore[misc]
        wait_until(lambda: {"a", "b"} <= set(turns) and len(turns) > 20, "many turns")
    assert "overlap" not in turns


@pytest.mark.parametrize(
    ("error", "level"), [(errors.UnavailableError("SQL is away"), "WARNING"), (ZeroDivisionError("no"), "ERROR")]
)
def test_failing_duty_is_logged_and_goes_on(error: Exception, level: str, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[str] = []

    def fail() -> None:
        seen.append("bad")
        raise error

    with (
        caplog.at_level(logging.WARNING),
        Duties([Duty("bad", 0.001, fail), Duty("good", 0.001, lambda: seen.append("good"))]),
    ):
        wait_until(lambda: seen.count("bad") > 2 and seen.count("good") > 2, "both had turns")
    record = caplog.records[0]
    assert (record.levelname, record.duty) == (level, "bad")  # type: ignore[attr-defined]
    assert "duty bad failed" in record.getMessage()


def test_close_does_not_wait_for_the_next_turn() -> None:
    duties = Duties([Duty("rare", 3600.0, lambda: None)])
    duties.start()
    thread = next(one for one in threading.enumerate() if one.name == "statecache-duties")
    duties.close()
    assert not thread.is_alive()
    duties.close()
    duties.start()
    assert not any(one.name == "statecache-duties" for one in threading.enumerate())


def test_close_waits_for_the_duty_under_way() -> None:
    begun, end = threading.Event(), threading.Event()
    done: list[bool] = []

    def work() -> None:
        begun.set()
        end.wait(10)
        done.append(True)

    duties = Duties([Duty("slow", 0.001, work)])
    duties.start()
    assert begun.wait(10)
    threading.Thread(target=lambda: (duties.stopping.wait(10), end.set())).start()
    duties.close()
    assert done == [True]


def test_without_duties_there_is_no_thread() -> None:
    with Duties([]):
        assert not any(one.name == "statecache-duties" for one in threading.enumerate())
