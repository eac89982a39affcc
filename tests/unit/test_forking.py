"""A fork while another thread is inside of SQLite: the child would inherit locks of SQLite's that nobody lets go of."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from statecache.durable import engine, forking
from tests.support.waiting import wait_until


def test_a_fork_waits_for_who_is_inside_and_keeps_others_out() -> None:
    gate = forking.Gate()
    entered, leave, is_shut, second = (threading.Event() for _ in range(4))

    def stay() -> None:
        with gate:
            entered.set()
            leave.wait(10)

    def shut() -> None:
        gate.shut()
        is_shut.set()
        second.wait(10)
        gate.open()

    def come() -> None:
        with gate:
            came.set()

    came = threading.Event()
    threads = [threading.Thread(target=stay), threading.Thread(target=shut), threading.Thread(target=come)]
    threads[0].start()
    assert entered.wait(10)
    threads[1].start()
    wait_until(lambda: gate._shut, "the fork at the gate")
    threads[2].start()
    assert not is_shut.is_set()
    leave.set()
    assert is_shut.wait(10)
    assert not came.is_set()
    second.set()
    assert came.wait(10)
    for thread in threads:
        thread.join()


def test_a_handler_may_fork_in_the_midst_of_a_call() -> None:
    """Its own thread is inside: it does not wait for itself, and the gate is open again afterwards."""
    gate = forking.Gate()
    with gate:
        gate.shut()
        gate.open()
    thread = threading.Thread(target=lambda: gate.__enter__())
    thread.start()
    thread.join(10)
    assert not thread.is_alive()


def test_a_child_is_not_made_within_another_threads_statement(tmp_path: Path) -> None:
    """A statement is held up in its midst; a fork begins, and lets it go on: the child must be made behind its end.

    Its first statement waits for ever, now and then, when it is made before: three of a thousand, under load.
    """
    database = engine.open_database(f"sqlite:///{tmp_path / 'x.db'}")
    begun, go_on, is_forking = threading.Event(), threading.Event(), threading.Event()
    ended: list[bool] = []

    def hold() -> int:
        begun.set()
        go_on.wait(10)
        ended.append(True)
        return 1

    def ask() -> None:
        with database.engine.connect() as connection:
            driver = connection.connection.driver_connection
            assert driver is not None
            driver.create_function("hold", 0, hold)
            connection.exec_driver_sql("SELECT hold()").scalar()

    os.register_at_fork(before=lambda: is_forking.is_set() and go_on.set())  # the last registered is the first called
    thread = threading.Thread(target=ask)
    thread.start()
    assert begun.wait(10)
    is_forking.set()
    child = os.fork()
    if child == 0:
        try:
            asked = database.read(lambda connection: connection.exec_driver_sql("SELECT 1").scalar())
            os._exit(0 if ended and asked == 1 else 1)
        finally:
            os._exit(2)
    _, status = os.waitpid(child, 0)
    is_forking.clear()
    thread.join()
    database.close()
    assert os.waitstatus_to_exitcode(status) == 0
