"""EXPLAIN of every statement on its way to the database, and a judge who fails what reads a whole table.

A statement is explained on its own connection, with its own parameters, right before it runs: so temporary tables and settings
of its transaction count. PostgreSQL is asked twice, once for the plan that does not know the parameters: a driver that
prepares statements gets that one after some repetitions. COPY has no plan.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import sqlalchemy as sa

from statecache.durable import queries

SMALL = {
    "statecache_store": "one row",
    "statecache_partitions": "a row for each partition",
    "statecache_leases": "a row for each partition",
    "statecache_flushers": "a row for each flusher alive",
    "statecache_machines": "a row for each version of each machine",
    "statecache_alembic": "one row",
    "statecache_discards": "what operators have discarded",
    "statecache_stage": "the batch itself, all of which is wanted",
}
"""Tables that may be read whole, and why: they do not grow with the instances."""

_EXPLAINED_EACH = 3
_WORDS = ("SELECT", "UPDATE", "INSERT", "DELETE", "WITH")


_PASSING_ON = ("Nested Loop", "Incremental Sort", "Unique", "Result", "Subquery Scan")
"""Steps that ask for no more rows than they are asked for."""


class Allowance(NamedTuple):
    """One more table that statements with these words in them may read whole, and why."""

    table: str
    words: str
    why: str


class Scan(NamedTuple):
    """A table that was read whole, or an answer that was sorted: on which path, by which step of which statement."""

    path: str
    table: str
    step: str
    statement: str


@contextmanager
def prepared(note: Callable[[sa.Connection, str, Any], None]) -> Iterator[None]:
    """Tells of the statements that SQLAlchemy's events do not tell of, before they run: with their text and parameters."""
    rows = queries._Prepared.rows

    def told(asked: Any, connection: sa.Connection, values: Mapping[str, object]) -> Any:
        note(connection, *asked.bound(connection.dialect, values))
        return rows(asked, connection, values)

    with mock.patch.object(queries._Prepared, "rows", told):
        yield


@contextmanager
def told(target: Any, note: Callable[[sa.Connection, str, Any], None]) -> Iterator[None]:
    """Tells of all statements of an engine: those of SQLAlchemy's events, and the prepared ones."""

    def listen(connection: sa.Connection, _cursor: Any, statement: str, values: Any, *_: Any) -> None:
        note(connection, statement, values)

    sa.event.listen(target, "before_cursor_execute", listen)
    try:
        with prepared(note):
            yield
    finally:
        sa.event.remove(target, "before_cursor_execute", listen)


class Plans:
    """Explains what runs while it listens: on one engine, or on all of this process."""

    def __init__(self, target: Any = sa.Engine, allowances: tuple[Allowance, ...] = ()) -> None:
        self._target = target
        self._allowances = allowances
        self._seen: Counter[tuple[str, str]] = Counter()
        self._path = ""
        self.used: set[Allowance] = set()
        self.scans: list[Scan] = []
        self.sorts: list[Scan] = []

    def __enter__(self) -> Plans:
        sa.event.listen(self._target, "before_cursor_execute", self._explain)
        self._prepared = prepared(
            lambda connection, text, values: self._explain(connection, None, text, values, None, False)
        )
        self._prepared.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._prepared.__exit__(None, None, None)
        sa.event.remove(self._target, "before_cursor_execute", self._explain)

    @contextmanager
    def path(self, name: str) -> Iterator[None]:
        """What runs inside belongs to a path of the engine. Fails if nothing does."""
        before, self._path = self._path, name
        yield
        self._path = before
        assert self.explained(name), f"nothing was asked of SQL on the path {name!r}"

    def explained(self, path: str = "") -> list[str]:
        """The different statements of a path."""
        return [statement for on, statement in self._seen if on == path]

    def _explain(
        self, connection: sa.Connection, _cursor: Any, statement: str, values: Any, context: Any, many: bool
    ) -> None:
        if not statement.startswith(_WORDS) or "statecache_" not in statement or "brin_summarize" in statement:
            return
        self._seen[self._path, statement] += 1
        if self._seen[self._path, statement] > _EXPLAINED_EACH:
            return
        values = values[0] if many else values
        raw: Any = connection.connection.dbapi_connection
        if connection.dialect.name == "sqlite":
            self._judge_sqlite(raw, statement, values)
            return
        self._judge_postgresql(_plan(raw.execute("EXPLAIN (FORMAT JSON) " + statement, values)), statement, False)
        if context is not None and context.execution_options.get("stream_results"):
            return  # cursors that stream are not prepared
        generic = "EXPLAIN (FORMAT JSON, GENERIC_PLAN) " + _numbered(statement, values)
        with raw.cursor() as cursor:
            self._judge_postgresql(_plan(cursor.execute(generic, prepare=False)), statement, False)

    def _judge_sqlite(self, raw: sqlite3.Connection, statement: str, values: Any) -> None:
        steps = [row[3] for row in raw.execute("EXPLAIN QUERY PLAN " + statement, values).fetchall()]
        sorting = [step for step in steps if step.startswith("USE TEMP B-TREE FOR") and "RIGHT PART" not in step]
        for step in sorting:
            self.sorts.append(Scan(self._path, "", step, statement))
        for step in steps:
            words = step.split()
            # A walk along an index that stops at a LIMIT is as long as the answer.
            limited = " USING " in step and "LIMIT" in statement and not sorting
            if (words[0] == "SCAN" and not limited) or "AUTOMATIC" in step:
                self._found(words[1], step, statement)

    def _judge_postgresql(self, node: Mapping[str, Any], statement: str, limited: bool) -> None:
        kind = node["Node Type"]
        along_an_index = "Index" in kind and (limited or "Index Cond" in node)
        if "Relation Name" in node and kind != "ModifyTable":
            reads_whole = kind == "Seq Scan" or ("Index" in kind and not along_an_index)
            if reads_whole and kind != "Bitmap Heap Scan":
                self._found(node["Relation Name"], json.dumps(node), statement)
        if kind == "Sort":  # an incremental one sorts what is equal in the index only
            self.sorts.append(Scan(self._path, "", json.dumps(node), statement))
        limited = kind == "Limit" or (limited and kind in _PASSING_ON)
        for child in node.get("Plans", []):
            self._judge_postgresql(child, statement, limited and child.get("Parent Relationship") == "Outer")

    def _found(self, table: str, step: str, statement: str) -> None:
        if not table.startswith("statecache_") or table in SMALL:
            return
        for allowance in self._allowances:
            if allowance.table == table and allowance.words in statement:
                self.used.add(allowance)
                return
        self.scans.append(Scan(self._path, table, step, statement))


def _plan(answer: Any) -> dict[str, Any]:
    found = answer.fetchone()[0]
    plan: dict[str, Any] = (json.loads(found) if isinstance(found, str) else found)[0]["Plan"]
    return plan


def _numbered(statement: str, values: Any) -> str:
    """``%(name)s`` and ``%s`` as ``$1``, ``$2`` ..."""
    places: dict[str, int] = {}
    count = iter(range(1, 10_000))

    def number(found: re.Match[str]) -> str:
        name = found.group(1)
        if name is None:
            return f"${next(count)}"
        return f"${places.setdefault(name, len(places) + 1)}"

    return re.sub(r"%(?:\((\w+)\))?s", number, statement).replace("%%", "%")
