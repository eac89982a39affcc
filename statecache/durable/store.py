"""``DurableStore``: what SQL knows, as plain questions and answers.

Reads are single statements, each a snapshot of its own, and are repeated once if the pooled connection had died. Every
method may raise ``UnavailableError`` (SQL is away; ``__cause__`` is the driver's error) and ``ConfigurationError``
(SQL refuses to work with us). No method reads a clock: callers pass ``now_ms``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import sqlalchemy as sa

from statecache.core import entry, errors, model, spec
from statecache.durable import bulk, cold, connecting, engine, faults, flush, forms, letters, queries, schema
from statecache.durable.rows import (
    Committed,
    Discard,
    Idle,
    Instance,
    Letter,
    MachineRow,
    PartitionRow,
    Recents,
    Standing,
    StoreRow,
)


class DurableStore:
    """The SQL side of one deployment. Thread-safe, and safe in a child process after a fork."""

    def __init__(self, database: engine.Database, bulk_forms: bulk.Forms | None = None) -> None:
        self.database = database
        self.forms = bulk_forms or forms.of(database.dialect)
        self.queries = queries.Queries(self.forms)

    @classmethod
    def connect(
        cls,
        url: str,
        *,
        partition_count: int | None = 16,
        namespace: str | None = None,
        create: bool = True,
        now_ms: int = 0,
    ) -> DurableStore:
        """Connect and check that this is a store that this version of the package can work with.

        With ``create``, a database without our tables gets them, and a store of ``partition_count`` partitions (16 for
        None) is made, noted as created at ``now_ms``; two processes doing so at once end with the same store.
        ``partition_count=None`` and ``namespace=None`` take the store as it is. Raises ``ConfigurationError`` (URL, driver,
        login, schema version, partition count, namespace) or ``UnavailableError``.
        """
        database = engine.open_database(url, create=create)
        try:
            connecting.check(database, partition_count, namespace, create, now_ms)
        except BaseException:
            database.close()
            raise
        return cls(database)

    def close(self) -> None:
        """Close the connections. What is asked from now on raises ``ConfigurationError``."""
        self.database.close()

    def until(self, deadline: float | None) -> contextlib.AbstractContextManager[None]:
        """What this thread reads meanwhile ends soon after ``deadline``, a ``time.monotonic`` time: a frozen PostgreSQL is
        given up with ``UnavailableError``. With None, after two minutes each, as everywhere else."""
        return self.database.patience.until(deadline)

    # What the store is

    def identity(self) -> StoreRow:
        """Return the store's row: deployment, versions, and the epoch and owner that count."""
        return self.database.read(connecting.identity)

    def adopt(self, namespace: str) -> None:
        """Note the namespace that a store from before schema version 4 belongs to; no other one is let in any more."""
        connecting.adopt(self.database, namespace)

    def partitions(self, numbers: Sequence[int] | None = None) -> list[PartitionRow]:
        """Return the partitions' rows (all of them for None), by number, in one snapshot."""
        return self.database.read(lambda connection: self.queries.partitions(connection, numbers))

    def durability_settings(self) -> dict[str, str]:
        """Return the database's settings that decide whether a commit survives power loss."""
        return engine.durability_settings(self.database)

    # Machines

    def register_machine(self, name: str, version: int, fingerprint: str, spec_json: str, now_ms: int) -> None:
        """Store a machine's definition. Repeating it changes nothing.

        What a fingerprint does not count (titles, durability, hot_ttl) is that of the last registration. Raises
        ``DefinitionError`` if this version is registered with another fingerprint, unless the two mean the same.
        """
        found = self._registered(name, version)
        if found is None:
            row = {"name": name, "version": version, "fingerprint": fingerprint, "spec": spec_json}
            try:
                with self.database.transaction() as connection:
                    connection.execute(sa.insert(schema.machines), {**row, "registered_ms": now_ms})
            except faults.KeyHit:
                found = self._registered(name, version)
            else:
                return
        if found is None or (found[0] != fingerprint and not _mean_the_same(found[1], spec_json)):
            raise errors.DefinitionError(
                f"machine {name!r} version {version} is registered with another definition (fingerprint "
                f"{found and found[0]}, this one is {fingerprint}): raise the machine's version when its definition changes"
            )
        if found[1] != spec_json:
            column = schema.machines.c
            changed = sa.update(schema.machines).where(column.name == name, column.version == version)
            with self.database.transaction() as connection:
                connection.execute(changed.values(spec=spec_json))

    def _registered(self, name: str, version: int) -> tuple[str, str] | None:
        column = schema.machines.c
        asked = sa.select(column.fingerprint, column.spec).where(column.name == name, column.version == version)
        row = self.database.read(lambda connection: connection.execute(asked).first())
        return None if row is None else (row.fingerprint, row.spec)

    def machine(self, name: str, version: int | None = None) -> tuple[int, str, str] | None:
        """Return ``(version, fingerprint, spec)`` of that version, or of the latest one, or None."""
        column = schema.machines.c
        asked = sa.select(column.version, column.fingerprint, column.spec).where(column.name == name)
        asked = asked.where(column.version == version) if version is not None else asked
        asked = asked.order_by(column.version.desc()).limit(1)
        row = self.database.read(lambda connection: connection.execute(asked).first())
        return None if row is None else (row.version, row.fingerprint, row.spec)

    def machines(self) -> list[MachineRow]:
        """Return every version of every machine, by name and version."""
        asked = sa.select(schema.machines).order_by(schema.machines.c.name, schema.machines.c.version)
        return [MachineRow(*row) for row in self.database.read(lambda connection: connection.execute(asked).fetchall())]

    def machine_versions(self, name: str | None = None) -> list[tuple[str, int]]:
        """Return (name, version) of everything that is registered, or of one machine."""
        column = schema.machines.c
        asked = sa.select(column.name, column.version).order_by(column.name, column.version)
        asked = asked if name is None else asked.where(column.name == name)
        return [
            (row.name, row.version) for row in self.database.read(lambda connection: connection.execute(asked).all())
        ]

    # Instances

    def lookup(self, addresses: Sequence[tuple[str, str, int]]) -> list[model.Lookup]:
        """Return what SQL knows of each ``(machine, id, partition)``, in their order.

        Watermark, checkpoint and letters of an instance come from ONE statement, hence one snapshot: read one after the
        other they let a cold instance come back in an older version (protocol hole H9). Thousands may be asked at once.
        """
        return self.database.read(lambda connection: self.queries.lookup(connection, addresses))

    def standing(self, receipts: Sequence[tuple[str, str, int, int]]) -> list[Standing]:
        """Return where each ``(machine, id, version, partition)`` stands, in their order; one snapshot each."""
        return self.database.read(lambda connection: self.queries.standing(connection, receipts))

    def checkpoint(self, machine: str, id: str) -> model.Checkpoint | None:
        """Return an instance's checkpoint."""
        found = self.database.read(lambda connection: self.queries.checkpoints(connection, [(machine, id)]))
        return found.get((machine, id))

    def checkpoints(self, instances: Sequence[Instance]) -> dict[Instance, model.Checkpoint]:
        """Return the checkpoints of those instances that have one."""
        return self.database.read(lambda connection: self.queries.checkpoints(connection, instances))

    def find(
        self,
        machine: str,
        state: str | None = None,
        older_than_ms: int | None = None,
        limit: int = 100,
        after: tuple[int, str] | None = None,
    ) -> list[model.Checkpoint]:
        """Return up to ``limit`` instances in ``state`` (in any for None) last changed at or before ``older_than_ms``.

        The oldest first. As of the watermark. ``after`` is the ``(updated_ms, id)`` of the last one of the page before.
        """
        return self.database.pages(
            lambda connection: queries.find(connection, machine, state, after, older_than_ms, limit)
        )

    def idle(self, machine: str, state: str, after: tuple[int, str], until_ms: int, limit: int = 1000) -> list[Idle]:
        """Return the next instances in ``state`` last changed up to ``until_ms``, oldest first, for eviction.

        ``after`` is the ``(updated_ms, id)`` of the last one of the page before, ``(0, "")`` at first.
        """
        return self.database.pages(lambda connection: cold.idle(connection, machine, state, after, until_ms, limit))

    def beginning_with(self, machine: str, prefix: str, limit: int) -> list[model.Checkpoint]:
        """Return up to ``limit`` instances whose id begins with ``prefix``, by id. As of the watermark."""
        return self.database.pages(lambda connection: queries.beginning_with(connection, machine, prefix, limit))

    def recent(
        self, machine: str, state: str, before: tuple[int, str], limit: int = 1000, partition: int | None = None
    ) -> Recents:
        """Return the next instances in ``state``, those that changed last first, for warming; of one partition if wanted.

        ``before`` is the ``(updated_ms, id)`` of the last one of the page before, ``(2**62, "")`` at first.
        """
        return self.database.pages(
            lambda connection: cold.recent(connection, self.queries, machine, state, before, limit, partition)
        )

    def count_idle(self, machine: str, machine_version: int, state: str, until_ms: int) -> int:
        """Return how many instances that this machine version moved last are in ``state``, changed last up to ``until_ms``."""
        return self.database.read(
            lambda connection: queries.count_idle(connection, machine, machine_version, state, until_ms)
        )

    def counts(self, machine: str) -> dict[str, int]:
        """Return how many instances are in each state that has any. As of the watermark."""
        return self.database.read(lambda connection: queries.counts(connection, machine))

    def counts_by_partition(self, machine: str) -> dict[tuple[int, str], int]:
        """Return ``counts`` for each partition: ``{(partition, state): instances}``."""
        return self.database.read(lambda connection: queries.counts_by_partition(connection, machine))

    # History

    def history(
        self,
        machine: str,
        id: str,
        after_version: int = 0,
        up_to_version: int | None = None,
        up_to_ms: int | None = None,
    ) -> list[model.Transition]:
        """Return an instance's transitions above ``after_version``, in order. ``IntegrityError`` if one cannot be read."""
        return self.database.read(
            lambda connection: queries.history(connection, machine, id, after_version, up_to_version, up_to_ms)
        )

    def story(self, machine: str, id: str) -> tuple[list[model.Transition], model.Checkpoint | None]:
        """Return an instance's whole history and its checkpoint, of one snapshot."""

        def ask(connection: sa.Connection) -> tuple[list[model.Transition], model.Checkpoint | None]:
            found = self.queries.checkpoints(connection, [(machine, id)])
            return queries.history(connection, machine, id, 0, None, None), found.get((machine, id))

        return self.database.pages(ask)

    def transition(self, machine: str, id: str, version: int) -> model.Transition | None:
        """Return one transition of an instance."""
        found = self.history(machine, id, version - 1, version)
        return found[0] if found else None

    def transition_ids(self, machine: str, id: str, version: int | None = None) -> list[tuple[int, str]]:
        """Return ``(version, transition id)`` of an instance's transitions, or of one: whatever else their rows hold."""
        return self.database.read(lambda connection: queries.transition_ids(connection, machine, id, version))

    def covering(self, machine: str, id: str, version: int) -> tuple[int, int, str] | None:
        """Return ``(covers_from, version, event)`` of the row that stands for a version and others, or None."""
        return self.database.read(lambda connection: queries.covering(connection, machine, id, version))

    def committed(self, wanted: Sequence[Committed]) -> list[model.Transition | entry.Entry | None]:
        """Return the transition that is meant by each ``(machine, id, version or None, transition id or None)``, in order.

        As a row of history or, where SQL refused it, as the entry of an open letter; both are looked at in one statement, for
        what leaves the letters is in history then. Thousands may be asked at once. By a transition id it costs one pass over
        the instance's history.
        """
        return self.database.read(lambda connection: self.queries.committed(connection, wanted))

    def recorded(self, machine: str, id: str) -> tuple[list[model.Transition], list[Letter]]:
        """Return all of an instance's transitions, and its open letters, in one visit.

        Most have none, which the first statement tells. Else the letters are read before history once more: what leaves them
        meanwhile is in history then.
        """

        def look(connection: sa.Connection) -> tuple[list[model.Transition], list[Letter]]:
            rows, may_have_letters = queries.recorded(connection, machine, id)
            if not may_have_letters:
                return rows, []
            waiting = letters.of_instance(connection, machine, id)
            return queries.history(connection, machine, id, 0, None, None), waiting

        return self.database.read(look)

    def letters(self, machine: str, id: str) -> list[Letter]:
        """Return an instance's open letters, oldest first. Any means that it is parked."""
        return self.database.read(lambda connection: letters.of_instance(connection, machine, id))

    def discards(self) -> list[Discard]:
        """Return everything that was ever discarded."""
        return self.database.read(letters.discards)

    def parked_instances(self, limit: int = 1000, after: Instance | None = None) -> list[Instance]:
        """Return up to ``limit`` instances that have open letters, by machine and id, behind ``after``."""
        return self.database.read(lambda connection: letters.parked(connection, limit, after))

    # Everything, in pages, for verify

    def iterate_checkpoints(
        self,
        partition: int | None = None,
        machine: str | None = None,
        batch: int = 1000,
        after: Instance | None = None,
    ) -> Iterator[model.Checkpoint]:
        """Yield checkpoints by machine and id, behind that of ``after``. Each page is a snapshot of its own."""
        return queries.iterate_checkpoints(self.database, partition, machine, batch, after)

    def iterate_transitions(
        self, machine: str | None = None, batch: int = 5000, after: Instance | None = None
    ) -> Iterator[model.Transition]:
        """Yield history by machine, id and version, behind that of ``after``. Each page is a snapshot of its own."""
        return queries.iterate_transitions(self.database, machine, batch, after)

    # Writing

    @contextlib.contextmanager
    def flush_transaction(
        self, limit_seconds: int = engine.TRANSACTION_SECONDS_MAX
    ) -> Iterator[flush.FlushTransaction]:
        """Open a flush transaction (see ``flush``); it commits at the end. For the limit see ``Database.transaction``.

        Besides what its methods raise: ``Transient`` (run the same again), ``CommitUnknown`` (read the watermarks back).
        """
        with flush.transaction(self.database, self.forms, self.queries, limit_seconds) as tx:
            yield tx


def _mean_the_same(one: str, other: str) -> bool:
    kept, given = spec.readable(one), spec.readable(other)
    return kept is not None and given is not None and kept.means_the_same(given)
