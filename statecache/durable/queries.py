"""The questions. Statements that take many keys are built once per store, on the relation of keys that its database has.

Which index serves which question is said beside each; ``tests/integration/test_durable_plans.py`` holds them to it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
import sqlalchemy as sa

from statecache.core import codec, entry, errors, fold, model
from statecache.durable import bulk, engine, generic, letters, schema
from statecache.durable.rows import Above, Committed, Instance, PartitionRow, Standing

_PARKED_FEW = 1000

_checkpoints = schema.checkpoints.c
_transitions = schema.transitions.c
_letters = schema.dead_letters.c
_partitions = schema.partitions.c
_counts = schema.state_counts.c

_CHECKPOINT = (
    _checkpoints.machine, _checkpoints.id, _checkpoints.partition, _checkpoints.state, _checkpoints.version,
    _checkpoints.epoch, _checkpoints.seq, _checkpoints.created_ms, _checkpoints.updated_ms, _checkpoints.machine_version,
    _checkpoints.final, _checkpoints.recent, _checkpoints.data,
)  # fmt: skip
_TRANSITION = (
    _transitions.machine, _transitions.id, _transitions.version, _transitions.event, _transitions.from_state,
    _transitions.to_state, _transitions.at_ms, _transitions.transition_id, _transitions.actor, _transitions.reason,
    _transitions.occurred_ms, _transitions.patch, _transitions.unset, _transitions.increments,
    _transitions.machine_version, _transitions.epoch, _transitions.seq, _transitions.covers_from, _transitions.complete,
)  # fmt: skip

_ENTRY = tuple(_letters[name] for name in schema.ENTRY_COLUMNS)

_decode_json = msgspec.json.Decoder(dict[str, Any]).decode


class UnreadableError(errors.IntegrityError):
    """A row of history holds data that no reader takes: an earlier version, or a flush, let a stranger's record pass."""

    def __init__(self, message: str, machine: str = "", id: str = "") -> None:
        super().__init__(message, machine, id)
        self.instance = machine, id

    def __str__(self) -> str:
        return str(self.args[0])


def checkpoint_of(row: Sequence[Any]) -> model.Checkpoint:
    """A checkpoint from a row in ``schema.CHECKPOINT_COLUMNS`` order."""
    machine, id, partition, state, version, epoch, seq, created, updated, machine_version, final, recent, data = row
    return model.Checkpoint(
        machine, id, partition, state, version, entry.EntryId(epoch, seq), created, updated, machine_version, bool(final),
        recent, data,
    )  # fmt: skip


def _transition_of(row: Sequence[Any]) -> model.Transition:
    (machine, id, version, event, source, target, at, transition_id, actor, reason, occurred, patch, unset, increments,
     machine_version, epoch, seq, covers_from, complete, *_) = row  # fmt: skip
    try:
        data, added = _decode_json(patch) if patch else {}, _decode_json(increments) if increments else {}
    except codec.UNREADABLE as error:
        raise UnreadableError(
            f"{machine}:{id}: version {version} in SQL holds data that cannot be read, not written by statecache: {error}",
            machine, id,
        ) from error  # fmt: skip
    return model.Transition(
        machine, id, version, event, source, target, at, transition_id, actor, reason, occurred, data,
        tuple(unset.split(" ")) if unset else (), added,
        machine_version, f"{epoch}-{seq}", True, covers_from, bool(complete),
    )  # fmt: skip


class _Keyed:
    """The statements that take keys, built on one relation of keys: from each, one step into each primary key.

    Left joins, with the misses dropped by the caller: SQLite would turn an inner join round and scan.
    """

    def __init__(self, forms: bulk.Forms) -> None:
        self._keys = keys = forms.keys()
        self._lateral = forms.lateral
        located = keys.outerjoin(schema.partitions, _partitions.partition == keys.c.partition)
        watermark = (_partitions.watermark_epoch, _partitions.watermark_seq)
        known, checkpoint = self._step(located, _CHECKPOINT, self._instance(_checkpoints))
        known, letter = self._step(known, (_letters.transition_id, _letters.version), self._instance(_letters))
        self.lookup = (
            sa.select(keys.c.n, *watermark, letter[0], *checkpoint).select_from(known).order_by(keys.c.n, letter[1])
        )
        row = (_transitions.transition_id, _transitions.epoch, _transitions.seq)
        at_version = self._instance(_transitions), _transitions.version == keys.c.version
        stands, row = self._step(located, row, *at_version)
        at_version = self._instance(_letters), _letters.version == keys.c.version
        stands, letter = self._step(stands, (_letters.transition_id,), *at_version)
        self.standing = sa.select(*watermark, *row, *letter).select_from(stands).order_by(keys.c.n)
        kept, checkpoint = self._step(keys, _CHECKPOINT, self._instance(_checkpoints))
        self.checkpoints = sa.select(*checkpoint).select_from(kept)
        parked, letter = self._step(keys, (_letters.machine, _letters.id), self._instance(_letters))
        self.parked = sa.select(*letter).select_from(parked)
        self.committed_at = self._committed("version")
        self._keys = forms.keys(named=True)
        self.committed_as = self._committed("transition_id")

    def _committed(self, name: str) -> sa.Select[Any]:
        """The row of history, and the letter, that have the key's version or transition id."""
        keys = self._keys

        def wanted(columns: Any) -> tuple[sa.ColumnElement[bool], ...]:
            return self._instance(columns), columns[name] == keys.c[name]

        known, row = self._step(keys, _TRANSITION, *wanted(_transitions))
        known, letter = self._step(known, _ENTRY, *wanted(_letters))
        version = letter[schema.ENTRY_COLUMNS.index("version")]
        return sa.select(keys.c.n, *row, *letter).select_from(known).order_by(keys.c.n, version)

    def _instance(self, columns: Any) -> sa.ColumnElement[bool]:
        return sa.and_(columns.machine == self._keys.c.machine, columns.id == self._keys.c.id)

    def _step(
        self, left: sa.FromClause, columns: Sequence[Any], *conditions: sa.ColumnElement[bool]
    ) -> tuple[sa.FromClause, Any]:
        """Join the columns' table to the keys; returns the join, and the columns as its reader sees them."""
        if not self._lateral:
            return left.outerjoin(columns[0].table, sa.and_(*conditions)), columns
        # OFFSET keeps the planner from making a join of it, for which it might read the whole table.
        asked = sa.select(*columns).where(*conditions).offset(sa.literal_column("0")).correlate(self._keys).lateral()
        return left.outerjoin(asked, sa.true()), tuple(asked.c)


class _Prepared:
    """A statement that is compiled once, and then goes to the driver as it is.

    For the questions that somebody waits for alone, a cold instance's call and a lone durable one: SQLAlchemy's execution of a
    statement that it has compiled before takes as long as the driver and PostgreSQL together. No event of SQLAlchemy's tells
    of it.
    """

    def __init__(self, statement: sa.Select[Any]) -> None:
        self._statement = statement
        self._text = ""
        self._constants: dict[str, Any] = {}
        self._order: Sequence[str] | None = None

    def rows(self, connection: sa.Connection, values: Mapping[str, object]) -> list[Any]:
        """All rows, as tuples; the driver's errors as they are."""
        text, parameters = self.bound(connection.dialect, values)
        raw: Any = connection.connection
        try:
            cursor = raw.cursor()
            cursor.execute(text, parameters)
            found: list[Any] = cursor.fetchall()
            cursor.close()
        except connection.dialect.loaded_dbapi.Error as error:
            if connection.dialect.is_disconnect(error, raw.dbapi_connection, None):
                connection.invalidate(error)
            raise
        return found

    def bound(self, dialect: sa.Dialect, values: Mapping[str, object]) -> tuple[str, Any]:
        """What the driver gets: the text, and its parameters in the driver's style."""
        if not self._text:
            compiled: Any = self._statement.compile(dialect=dialect)
            self._constants = compiled.params
            self._order = compiled.positiontup if compiled.positional else None
            self._text = compiled.string
        named = {**self._constants, **values}
        return self._text, named if self._order is None else [named[name] for name in self._order]


class Queries:
    """The questions that take many keys, for one database.

    A single key goes as plain parameters: PostgreSQL then keeps one plan, while it plans each array anew (0.4 ms).
    """

    def __init__(self, forms: bulk.Forms) -> None:
        self._forms = forms
        self._many = _Keyed(forms)
        self._single = generic.Generic()
        self._one = _Keyed(self._single)
        self._alone = {"lookup": _Prepared(self._one.lookup), "standing": _Prepared(self._one.standing)}
        self._partitions = _Prepared(sa.select(schema.partitions).order_by(_partitions.partition))
        self._few_parked = _Prepared(letters.PARKED)

    def _pages(
        self, connection: sa.Connection, name: str, keys: Sequence[bulk.Key] | Sequence[bulk.NamedKey]
    ) -> Iterator[Any]:
        if len(keys) == 1 and name in self._alone:
            yield self._alone[name].rows(connection, self._single.bind_keys(keys))
            return
        forms, statements = (self._single, self._one) if len(keys) == 1 else (self._forms, self._many)
        statement = getattr(statements, name)
        for start in range(0, len(keys), forms.keys_max):
            bound = forms.bind_keys(keys[start : start + forms.keys_max])
            yield connection.execute(statement, bound).fetchall()

    def partitions(self, connection: sa.Connection, numbers: Sequence[int] | None) -> list[PartitionRow]:
        """All are read, whichever are wanted: there are few, and a list of some takes SQLAlchemy longer than all rows."""
        wanted = None if numbers is None else frozenset(numbers)
        return [
            PartitionRow(number, epoch, owner, entry.EntryId(*mark), entry.EntryId(tail_epoch, tail_seq), seen_ms)
            for number, epoch, owner, *mark, tail_epoch, tail_seq, seen_ms in self._partitions.rows(connection, {})
            if wanted is None or number in wanted
        ]

    def lookup(self, connection: sa.Connection, addresses: Sequence[tuple[str, str, int]]) -> list[model.Lookup]:
        """Served by the primary keys of partitions, checkpoints and letters."""
        keys = [(machine, id, 0, partition) for machine, id, partition in addresses]
        found: list[model.Lookup] = []
        for rows in self._pages(connection, "lookup", keys):
            for _, mine in itertools.groupby(rows, key=_first):
                found.append(_lookup_of(list(mine)))
        return found

    def standing(self, connection: sa.Connection, receipts: Sequence[tuple[str, str, int, int]]) -> list[Standing]:
        """Served by the primary keys of partitions, transitions and letters."""
        found: list[Standing] = []
        for rows in self._pages(connection, "standing", receipts):
            for watermark_epoch, watermark_seq, transition_id, epoch, seq, letter in rows:
                watermark = entry.EntryId(watermark_epoch or 0, watermark_seq or 0)
                entry_id = None if epoch is None else entry.EntryId(epoch, seq)
                found.append(Standing(watermark, transition_id, entry_id, letter))
        return found

    def checkpoints(self, connection: sa.Connection, instances: Sequence[Instance]) -> dict[Instance, model.Checkpoint]:
        """Served by the primary key of checkpoints."""
        keys = [(machine, id, 0, 0) for machine, id in instances]
        return {
            (row[0], row[1]): checkpoint_of(row)
            for rows in self._pages(connection, "checkpoints", keys)
            for row in rows
            if row[0] is not None
        }

    def committed(
        self, connection: sa.Connection, wanted: Sequence[Committed]
    ) -> list[model.Transition | entry.Entry | None]:
        """Served by the primary keys of transitions and letters; by a transition id, all rows of the instance are read: an
        index of its own would cost each flush. History goes before letters, and both are of one snapshot."""
        found: list[model.Transition | entry.Entry | None] = [None] * len(wanted)
        by_version = [place for place, one in enumerate(wanted) if one[2] is not None]
        by_id = [place for place, one in enumerate(wanted) if one[2] is None]
        at = [(wanted[place][0], wanted[place][1], wanted[place][2] or 0, 0) for place in by_version]
        named = [(wanted[place][0], wanted[place][1], 0, 0, wanted[place][3] or "") for place in by_id]
        for places, pages in (
            (by_version, self._pages(connection, "committed_at", at)),
            (by_id, self._pages(connection, "committed_as", named)),
        ):
            groups = (list(mine) for rows in pages for _, mine in itertools.groupby(rows, key=_first))
            for place, ((_, *row), *_) in zip(places, groups, strict=True):
                if row[0] is not None:
                    found[place] = _transition_of(row[: len(_TRANSITION)])
                elif row[len(_TRANSITION)] is not None:
                    found[place] = fold.entry_of_row(row[len(_TRANSITION) :])
        return found

    def parked(self, connection: sa.Connection, instances: Sequence[Instance]) -> set[Instance]:
        """While few instances are parked, read them all (mostly none); else ask for these by the letters' primary key."""
        few = {(machine, id) for machine, id in self._few_parked.rows(connection, {"k_limit": _PARKED_FEW + 1})}
        if len(few) <= _PARKED_FEW:
            return few.intersection(instances)
        keys = [(machine, id, 0, 0) for machine, id in instances]
        pages = self._pages(connection, "parked", keys)
        return {(row[0], row[1]) for rows in pages for row in rows if row[0] is not None}


def _first(row: Sequence[Any]) -> Any:
    return row[0]


def _lookup_of(rows: Sequence[Sequence[Any]]) -> model.Lookup:
    """One address' rows: as many as it has letters, at least one."""
    _, watermark_epoch, watermark_seq, letter, *checkpoint = rows[0]
    return model.Lookup(
        entry.EntryId(watermark_epoch or 0, watermark_seq or 0),
        checkpoint_of(checkpoint) if checkpoint[0] is not None else None,
        () if letter is None else tuple([codec.token_of(row[3]) for row in rows]),
    )


def counts(connection: sa.Connection, machine: str) -> dict[str, int]:
    """Served by the primary key of state_counts (machine, state, partition)."""
    asked = (
        sa.select(_counts.state, sa.func.sum(_counts.count))
        .where(_counts.machine == machine)
        .group_by(_counts.state)
        .order_by(_counts.state)
    )
    return {state: int(count) for state, count in connection.execute(asked) if count}


def counts_by_partition(connection: sa.Connection, machine: str) -> dict[tuple[int, str], int]:
    """Served by the same key: one row a state and partition."""
    asked = sa.select(_counts.partition, _counts.state, _counts.count).where(_counts.machine == machine)
    return {(partition, state): int(count) for partition, state, count in connection.execute(asked) if count > 0}


def _found(machine: str, state: str, after: tuple[int, str] | None, until_ms: int | None, limit: int) -> sa.Select[Any]:
    """One range of the find index (machine, state, updated_ms)."""
    asked = sa.select(*_CHECKPOINT).where(_checkpoints.machine == machine, _checkpoints.state == state)
    if until_ms is not None:
        asked = asked.where(_checkpoints.updated_ms <= until_ms)
    if after is not None:
        updated_ms, id = after
        asked = asked.where(_checkpoints.updated_ms >= updated_ms)
        asked = asked.where((_checkpoints.updated_ms > updated_ms) | (_checkpoints.id > id))
    return asked.order_by(_checkpoints.updated_ms, _checkpoints.id).limit(limit)


def find(
    connection: sa.Connection,
    machine: str,
    state: str | None,
    after: tuple[int, str] | None,
    until_ms: int | None,
    limit: int,
) -> list[model.Checkpoint]:
    """The oldest checkpoints of a state; of any state: the oldest of each one that the counts know, merged."""
    states = [state] if state is not None else list(counts(connection, machine))
    found = [
        checkpoint_of(row)
        for each in states
        for row in connection.execute(_found(machine, each, after, until_ms, limit))
    ]
    return sorted(found, key=lambda checkpoint: (checkpoint.updated_ms, checkpoint.id))[:limit]


_LAST_CHARACTER = chr(0x10FFFF)


def beginning_with(connection: sa.Connection, machine: str, prefix: str, limit: int) -> list[model.Checkpoint]:
    """Served by the primary key of checkpoints: ids are compared byte by byte, so those that begin alike stand together."""
    asked = (
        sa.select(*_CHECKPOINT)
        .where(_checkpoints.machine == machine, _checkpoints.id >= prefix, _checkpoints.id < prefix + _LAST_CHARACTER)
        .order_by(_checkpoints.id)
        .limit(limit)
    )
    return [checkpoint_of(row) for row in connection.execute(asked)]


def count_idle(connection: sa.Connection, machine: str, machine_version: int, state: str, until_ms: int) -> int:
    """Served by the find index (machine, state, updated_ms)."""
    asked = sa.select(sa.func.count()).where(
        _checkpoints.machine == machine,
        _checkpoints.state == state,
        _checkpoints.updated_ms <= until_ms,
        _checkpoints.machine_version == machine_version,
    )
    return connection.execute(asked).scalar() or 0


_MAX = 2**63 - 1
_wanted = (sa.bindparam("k_machine", type_=sa.Text), sa.bindparam("k_id", type_=sa.Text))
_OF_INSTANCE = sa.select(*_TRANSITION).where(_transitions.machine == _wanted[0], _transitions.id == _wanted[1])
_HAS_LETTERS = sa.exists().where(_letters.machine == _wanted[0], _letters.id == _wanted[1])
_RECORDED = _OF_INSTANCE.add_columns(_HAS_LETTERS).order_by(_transitions.version)
_HISTORY = _OF_INSTANCE.where(
    _transitions.version > sa.bindparam("after_version"),
    _transitions.version <= sa.bindparam("up_to_version"),
    _transitions.at_ms <= sa.bindparam("up_to_ms"),
).order_by(_transitions.version)


def history(
    connection: sa.Connection,
    machine: str,
    id: str,
    after_version: int,
    up_to_version: int | None,
    up_to_ms: int | None,
) -> list[model.Transition]:
    """Served by the primary key of transitions."""
    values = {
        "k_machine": machine,
        "k_id": id,
        "after_version": after_version,
        "up_to_version": _MAX if up_to_version is None else up_to_version,
        "up_to_ms": _MAX if up_to_ms is None else up_to_ms,
    }
    return [_transition_of(row) for row in connection.execute(_HISTORY, values).fetchall()]


def transition_ids(connection: sa.Connection, machine: str, id: str, version: int | None) -> list[tuple[int, str]]:
    """Served by the primary key of transitions."""
    asked = sa.select(_transitions.version, _transitions.transition_id).order_by(_transitions.version)
    asked = asked.where(_transitions.machine == machine, _transitions.id == id)
    if version is not None:
        asked = asked.where(_transitions.version == version)
    return [(row[0], row[1]) for row in connection.execute(asked).fetchall()]


def covering(connection: sa.Connection, machine: str, id: str, version: int) -> tuple[int, int, str] | None:
    """The row that stands for a version and others, as ``(covers_from, version, event)``. Served by the primary key of
    transitions."""
    asked = (
        sa.select(_transitions.covers_from, _transitions.version, _transitions.event)
        .where(_transitions.machine == machine, _transitions.id == id, _transitions.version >= version)
        .order_by(_transitions.version)
        .limit(1)
    )
    row = connection.execute(asked).first()
    return (row[0], row[1], row[2]) if row is not None and row[0] is not None and row[0] <= version else None


def recorded(connection: sa.Connection, machine: str, id: str) -> tuple[list[model.Transition], bool]:
    """All of an instance's transitions, and whether it may have open letters, in one look: without a row nothing tells.
    Served by the primary keys of transitions and of letters."""
    rows = connection.execute(_RECORDED, {"k_machine": machine, "k_id": id}).fetchall()
    return [_transition_of(row) for row in rows], not rows or bool(rows[0][-1])


def above_statement(partition: int, entry_id: entry.EntryId) -> sa.CompoundSelect[Any]:
    """Every instance with history or letters above an entry id.

    By way of history, which is written in the log's order: a BRIN index finds its tail on PostgreSQL and costs the flush
    nothing. Checkpoints are rewritten in place all over their table, so a BRIN index there would exclude nothing, and a
    B-tree would have to move an entry with every transition. A checkpoint's entry id is always that of the newest row of
    its history, as both are written in one transaction.
    """

    def behind(columns: Any) -> tuple[Any, Any]:
        return (
            (columns.partition == partition) & (columns.epoch > entry_id.epoch),
            (columns.partition == partition) & (columns.epoch == entry_id.epoch) & (columns.seq > entry_id.seq),
        )

    touched = sa.union(
        *(sa.select(_transitions.machine, _transitions.id).where(condition) for condition in behind(_transitions))
    ).subquery("touched")
    of_touched = (_checkpoints.machine == touched.c.machine) & (_checkpoints.id == touched.c.id)
    saved = sa.select(
        touched.c.machine, touched.c.id, _checkpoints.version, _checkpoints.epoch, _checkpoints.seq
    ).select_from(touched.join(schema.checkpoints, of_touched))
    aside = [
        sa.select(_letters.machine, _letters.id, _letters.version, _letters.epoch, _letters.seq).where(condition)
        for condition in behind(_letters)
    ]
    return sa.union_all(saved, *aside)


def above(database: engine.Database, partition: int, entry_id: entry.EntryId, page: int) -> Iterator[list[Above]]:
    """Stream ``above_statement``."""
    statement = above_statement(partition, entry_id)
    with database.translated(), database.engine.connect() as connection:
        streaming = connection.execution_options(stream_results=True)
        with streaming.execute(statement) as result:
            for rows in result.partitions(page):
                yield [Above(row[0], row[1], row[2], entry.EntryId(row[3], row[4])) for row in rows]


def iterate_checkpoints(
    database: engine.Database,
    partition: int | None,
    machine: str | None,
    batch: int,
    after: Instance | None = None,
) -> Iterator[model.Checkpoint]:
    """Pages by the primary key of checkpoints, behind that of ``after``; ``partition`` filters them."""
    key = sa.tuple_(_checkpoints.machine, _checkpoints.id)
    asked = sa.select(*_CHECKPOINT).order_by(_checkpoints.machine, _checkpoints.id).limit(batch)
    if machine is not None:
        asked = asked.where(_checkpoints.machine == machine)
    if partition is not None:
        asked = asked.where(_checkpoints.partition == partition)
    page = asked if after is None else asked.where(key > sa.tuple_(*after))
    while rows := _fetch(database, page):
        yield from map(checkpoint_of, rows)
        page = asked.where(key > sa.tuple_(*rows[-1][:2]))


def iterate_transitions(
    database: engine.Database, machine: str | None, batch: int, after: Instance | None = None
) -> Iterator[model.Transition]:
    """Pages by the primary key of transitions, behind all of the instance ``after``."""
    key = sa.tuple_(_transitions.machine, _transitions.id, _transitions.version)
    asked = sa.select(*_TRANSITION).order_by(_transitions.machine, _transitions.id, _transitions.version).limit(batch)
    if machine is not None:
        asked = asked.where(_transitions.machine == machine)
    page = asked if after is None else asked.where(key > sa.tuple_(*after, 2**63 - 1))
    while rows := _fetch(database, page):
        yield from map(_transition_of, rows)
        page = asked.where(key > sa.tuple_(*rows[-1][:3]))


def _fetch(database: engine.Database, statement: sa.Select[Any]) -> Sequence[Any]:
    return database.pages(lambda connection: connection.execute(statement).fetchall())
