"""What people do without a hot store: one SQL commit per transition, a row of history and the instance's row in it.

The tables hold what ours hold: history by (id, version), the instance by id with an index to find a state's oldest.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg

from benchmarks.workload import PATCHES, RING, order_id

_TABLES = """
CREATE TABLE history (
    machine text NOT NULL, id text NOT NULL, version bigint NOT NULL, event text NOT NULL, from_state text,
    to_state text NOT NULL, at_ms bigint NOT NULL, transition_id text NOT NULL, actor text, reason text, patch text,
    PRIMARY KEY (machine, id, version)
);
CREATE TABLE instances (
    machine text NOT NULL, id text NOT NULL, state text NOT NULL, version bigint NOT NULL, updated_ms bigint NOT NULL,
    data text NOT NULL, PRIMARY KEY (machine, id)
);
CREATE INDEX instances_find ON instances (machine, state, updated_ms);
"""
_HISTORY = "INSERT INTO history VALUES ('order', {0}, {0}, {0}, {0}, {0}, {0}, {0}, NULL, NULL, {0})"
_INSTANCE = (
    "INSERT INTO instances VALUES ('order', {0}, {0}, {0}, {0}, {0}) ON CONFLICT (machine, id) DO UPDATE SET "
    "state = excluded.state, version = excluded.version, updated_ms = excluded.updated_ms, data = excluded.data"
)


class Committer:
    """Makes transitions of ``count`` instances, ``in_a_row`` of an instance in succession, each in a transaction."""

    def __init__(self, count: int, in_a_row: int, commit: Callable[[tuple[Any, ...], tuple[Any, ...]], None]) -> None:
        self.count = count
        self.in_a_row = in_a_row
        self._commit = commit
        self._done = 0

    def transitions(self, items: int) -> int:
        for _ in range(items):
            turn, within = divmod(self._done, self.in_a_row)
            number, before = turn * 7919 % self.count, turn // self.count * self.in_a_row + within
            self._done += 1
            event, old, new = RING[before % 4]
            data, now = json.dumps(PATCHES[number % 2048]), int(time.time() * 1000)
            id, version = order_id(number), before + 2
            self._commit((id, version, event, old, new, now, f"{self._done:016x}", data), (id, new, version, now, data))
        return items

    def seconds_of(self, seconds: float) -> int:
        """As many transitions as fit into some seconds."""
        done, end = 0, time.monotonic() + seconds
        while time.monotonic() < end:
            done += self.transitions(20)
        return done


def postgres_committer(closing: Callable[[Any], Any], url: str, count: int, in_a_row: int = 1) -> Committer:
    """Through psycopg: two prepared statements and a COMMIT."""
    connection = closing(psycopg.connect(url.replace("+psycopg", ""), autocommit=True))
    connection.execute(_TABLES)
    history, instance = _HISTORY.format("%s"), _INSTANCE.format("%s")

    def commit(entry: tuple[Any, ...], state: tuple[Any, ...]) -> None:
        with connection.transaction():
            connection.execute(history, entry)
            connection.execute(instance, state)

    made = Committer(count, in_a_row, commit)
    _fill(lambda rows: _many(connection, instance, rows), count)
    return made


def sqlite_committer(closing: Callable[[Any], Any], path: Path, count: int, in_a_row: int = 1) -> Committer:
    """Through sqlite3, write-ahead log, ``synchronous=FULL`` as ours."""
    connection = closing(sqlite3.connect(path, isolation_level=None))
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.executescript(_TABLES)
    history, instance = _HISTORY.format("?"), _INSTANCE.format("?")

    def commit(entry: tuple[Any, ...], state: tuple[Any, ...]) -> None:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute(history, entry)
        connection.execute(instance, state)
        connection.execute("COMMIT")

    def many(rows: list[tuple[Any, ...]]) -> None:
        connection.execute("BEGIN")
        connection.executemany(instance, rows)
        connection.execute("COMMIT")

    _fill(many, count)
    return Committer(count, in_a_row, commit)


def _many(connection: psycopg.Connection[Any], statement: str, rows: list[tuple[Any, ...]]) -> None:
    with connection.transaction(), connection.cursor() as cursor:
        cursor.executemany(statement, rows)


def _fill(many: Callable[[list[tuple[Any, ...]]], None], count: int) -> None:
    """The instances exist before any is moved, as ours do."""
    for begin in range(0, count, 5000):
        numbers = range(begin, min(count, begin + 5000))
        many([(order_id(one), "placed", 1, 0, json.dumps(PATCHES[one % 2048])) for one in numbers])
