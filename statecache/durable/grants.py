"""What the role of a PostgreSQL connection may do: one right that is missing shows only at the first flush, or the first
retention, that needs it, and from then on at every one. Other databases have no such rights, or none that are asked for here.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import sqlalchemy as sa

from statecache.durable import engine, migrate, schema

_WRITTEN: Mapping[str, tuple[str, ...]] = {
    schema.store.name: ("UPDATE",),
    schema.partitions.name: ("UPDATE",),
    schema.machines.name: ("INSERT", "UPDATE"),
    schema.checkpoints.name: ("INSERT", "UPDATE"),
    schema.transitions.name: ("INSERT", "UPDATE", "DELETE"),
    schema.state_counts.name: ("INSERT", "UPDATE"),
    schema.dead_letters.name: ("INSERT", "DELETE"),
    schema.discards.name: ("INSERT", "DELETE"),
    schema.recoveries.name: ("INSERT", "UPDATE"),
    schema.flushers.name: ("INSERT", "UPDATE", "DELETE"),
    schema.leases.name: ("UPDATE",),
}
"""What is done with each table once the store is made. Who makes it finds out at once what it may not."""
NEEDED = {migrate.VERSION_TABLE: ("SELECT",), **{name: ("SELECT", *rights) for name, rights in _WRITTEN.items()}}
"""Rights by table, of a role that all processes may have."""

_RIGHTS = ("SELECT", "INSERT", "UPDATE", "DELETE")
_ROLE = sa.text(
    "SELECT current_user, current_database(), current_schema(), has_database_privilege(current_database(), 'TEMPORARY')"
)
_MISSING = sa.text(
    "SELECT name, wanted FROM unnest(CAST(:names AS text[]), CAST(:wanted AS text[])) AS w (name, wanted) "
    "WHERE NOT has_table_privilege(CAST(to_regclass(name) AS oid), wanted) ORDER BY name, wanted"
)


class Rights(msgspec.Struct, frozen=True):
    """What a role lacks of what the processes of a store need; ``advice``, what to do about it, is empty if that is nothing."""

    role: str
    missing: tuple[str, ...]
    advice: str
    may_read: bool
    """Whether it may read everything and write nothing: enough for the web, and for who only looks."""

    @property
    def lacks(self) -> str:
        """For people: who lacks what."""
        if self.may_read:
            return f"the role {self.role} may only read, which is enough for the web and for who only looks"
        return f"the role {self.role} lacks {', '.join(self.missing)}"


def of_role(database: engine.Database) -> Rights | None:
    """Ask what the connection's own role may; None where the database has no roles. Of a table that is not there nothing is
    said."""
    return database.read(_ask) if database.dialect.name == "postgresql" else None


def _ask(connection: sa.Connection) -> Rights:
    pairs = [(name, right) for name, rights in NEEDED.items() for right in rights]
    names, wanted = map(list, zip(*pairs, strict=True))
    role, name, place, may_stage = connection.execute(_ROLE).one()
    lacking = connection.execute(_MISSING, {"names": names, "wanted": wanted}).fetchall()
    quoted = connection.dialect.identifier_preparer.quote_identifier
    missing, todo = [], []
    if place is None:
        missing.append("USAGE of any schema that it searches")
        todo.append(f"GRANT USAGE ON SCHEMA public TO {quoted(role)}")
    if not may_stage:
        missing.append(f"TEMPORARY on the database {name}")
        todo.append(f"GRANT TEMPORARY ON DATABASE {quoted(name)} TO {quoted(role)}")
    if lacking:
        missing += [f"{right} on {table}" for table, right in lacking]
        rights = {right for _, right in lacking}
        tables = dict.fromkeys(table for table, _ in lacking)
        todo.append(
            f"GRANT {', '.join(one for one in _RIGHTS if one in rights)} ON {', '.join(tables)} TO {quoted(role)}"
        )
    advice = f"to do as the owner: {'; '.join(todo)} (docs/operations.md, Security)" if todo else ""
    may_read = {(table, right) for table, right in lacking} == {pair for pair in pairs if pair[1] != "SELECT"}
    return Rights(role, tuple(missing), advice, may_read)
