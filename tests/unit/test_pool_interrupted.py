"""A signal's handler raises within SQLAlchemy's pool: the lock of its queue is nobody's afterwards."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path

import pytest
import sqlalchemy as sa

from statecache.durable import engine
from tests.support.interruptions import interrupted_at


@pytest.mark.parametrize("what", ["pages", "transaction"])
def test_an_interruption_within_the_pool_stops_no_other_thread(tmp_path: Path, what: str) -> None:
    """It comes at any place of Python's own ``threading``: the lock was just taken, or is about to be left. Another thread asks
    SQL afterwards (it waited for ever, whatever its timeout)."""

    def ask(database: engine.Database) -> None:
        if what == "pages":
            database.pages(lambda connection: connection.exec_driver_sql("SELECT 1").scalar())
            return
        with database.transaction() as connection:
            connection.execute(sa.text("SELECT 1"))

    for nth in itertools.count(1):
        database = engine.open_database(f"sqlite:///{tmp_path / 'x.db'}")
        ask(database)
        met = interrupted_at(nth, threading.__file__, lambda database=database: ask(database))  # type: ignore[misc]
        other = threading.Thread(target=ask, args=(database,), daemon=True)
        other.start()
        other.join(10)
        assert not other.is_alive(), nth
        database.close()
        if not met:
            assert nth > 4
            return
