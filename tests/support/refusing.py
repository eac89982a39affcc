"""SQL that refuses entries for their data, until told otherwise: a constraint or trigger on history."""

from __future__ import annotations

from statecache.durable.store import DurableStore

REASON = "SQL refuses this"
"""A transition with this reason is refused while ``refuse`` is in force."""

_REFUSE = {
    "sqlite": "CREATE TRIGGER refuse BEFORE INSERT ON statecache_transitions WHEN NEW.reason = '{0}' "
    "BEGIN SELECT RAISE(ABORT, 'refused'); END",
    "postgresql": "ALTER TABLE statecache_transitions ADD CONSTRAINT refuse CHECK (reason IS DISTINCT FROM '{0}') NOT VALID",
}
_ACCEPT = {
    "sqlite": "DROP TRIGGER IF EXISTS refuse",
    "postgresql": "ALTER TABLE statecache_transitions DROP CONSTRAINT IF EXISTS refuse",
}


def refuse(durable: DurableStore) -> None:
    _run(durable, _REFUSE[durable.database.dialect.name].format(REASON))


def accept(durable: DurableStore) -> None:
    _run(durable, _ACCEPT[durable.database.dialect.name])


def _run(durable: DurableStore, statement: str) -> None:
    with durable.database.writer.begin() as connection:
        connection.exec_driver_sql(statement)
