"""What the JSON API answers with. The names are those of the command line's ``--json``; times are ISO 8601 in UTC."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel, Field

from statecache.core import model
from statecache.core.claims import Held
from statecache.engine.status import Status


class Snapshot(BaseModel):
    """An instance as it is, or was. ``source``: ``hot`` (Redis) or ``durable`` (SQL)."""

    address: str
    machine: str
    id: str
    state: str
    version: int
    data: dict[str, Any]
    final: bool
    available_events: list[str]
    created_at: datetime
    updated_at: datetime
    entry_id: str
    machine_version: int
    source: str
    parked: bool


class Claim(BaseModel):
    """A claim in force: who alone may move the instance, until when."""

    worker: str
    token: str
    expires_at: datetime


class Instance(Snapshot):
    """An instance, with the claim on it at this moment, if there is one (null for one as it was)."""

    claim: Claim | None = None


class Transition(BaseModel):
    """One committed move. ``durable``: whether SQL has it already."""

    version: int
    event: str
    from_state: str | None
    state: str
    at: datetime
    occurred_at: datetime | None
    transition_id: str
    actor: str | None
    reason: str | None
    patch: dict[str, Any]
    unset: list[str]
    increments: dict[str, Any]
    machine_version: int
    entry_id: str
    durable: bool
    covers_from: int | None
    complete: bool


class Receipt(BaseModel):
    """What a committed transition returns. ``duplicate``: it had been applied before, under the same transition id."""

    address: str
    machine: str
    id: str
    event: str
    from_state: str | None
    state: str
    version: int
    entry_id: str
    at: datetime
    transition_id: str
    duplicate: bool


class Snapshots(BaseModel):
    """A list, cut at the limit asked for: ``more`` tells whether there may be more."""

    instances: list[Snapshot]
    more: bool


class Where(BaseModel):
    """What an id, or the beginning of one, names: ``exact`` of every machine, ``similar`` as of the watermark."""

    exact: list[Snapshot]
    similar: list[Address]


class Address(BaseModel):
    """An instance that a search has found."""

    address: str
    machine: str
    id: str
    state: str


class History(BaseModel):
    """A page of history, oldest first; ``next_after`` is the ``after`` of the next page."""

    transitions: list[Transition]
    next_after: int | None


class Machine(BaseModel):
    """A machine's latest version. ``counts`` are its instances by state, ``steps`` its main line if it is one."""

    name: str
    version: int
    title: str | None
    initial: str
    states: list[str]
    final: list[str]
    events: dict[str, dict[str, str]] = Field(
        description="By event: the state that it leads to, by the state it leaves."
    )
    steps: list[str] | None
    counts: dict[str, int]


class Partition(BaseModel):
    """``lag_seconds``: what a crash of Redis could cost now. None while Redis is not ready."""

    partition: int
    watermark: str
    tail: str | None
    backlog: int | None
    lag_seconds: float | None


class Recovery(BaseModel):
    """One recovery; ``report`` is that of ``statecache recover``, None while it is under way (or died)."""

    epoch: int
    started_at: datetime
    finished_at: datetime | None
    classes: str
    lost_at_least: int
    loss_possible: bool
    report: dict[str, Any] | None


class Flusher(BaseModel):
    """A flusher, and the partitions that it holds by its lease."""

    name: str
    alive: bool
    started_at: datetime
    silent_seconds: float
    partitions: list[int]


class Health(BaseModel):
    """How the store is doing. ``redis``: ``ready``, ``needs recovery`` or ``away``."""

    redis: str
    redis_problem: str
    epoch: int
    deployment: str
    partition_count: int
    backlog: int | None
    lag_seconds: float | None
    partitions: list[Partition]
    flushers: list[Flusher]
    recoveries: list[Recovery]
    parked_instances: int


class Ready(BaseModel):
    """``reasons`` why it is not."""

    ready: bool
    reasons: list[str]


def snapshot(one: model.Snapshot) -> Snapshot:
    return Snapshot(
        address=f"{one.machine}:{one.id}", machine=one.machine, id=one.id, state=one.state, version=one.version,
        data=one.data, final=one.final, available_events=list(one.available_events), created_at=one.created_at,
        updated_at=one.updated_at, entry_id=one.entry_id, machine_version=one.machine_version, source=one.source,
        parked=one.parked,
    )  # fmt: skip


def instance(one: model.Snapshot, held: Held | None = None) -> Instance:
    claim = None
    if held is not None:
        ends = datetime.fromtimestamp(held.expires_ms / 1000, UTC)
        claim = Claim(worker=held.worker, token=held.token, expires_at=ends)
    return Instance(**snapshot(one).model_dump(), claim=claim)


def transition(row: model.Transition) -> Transition:
    return Transition(
        version=row.version, event=row.event, from_state=row.from_state, state=row.to_state, at=row.at,
        occurred_at=row.occurred_at, transition_id=row.transition_id, actor=row.actor, reason=row.reason, patch=row.patch,
        unset=list(row.unset), increments=row.increments, machine_version=row.machine_version, entry_id=row.entry_id,
        durable=row.durable, covers_from=row.covers_from, complete=row.complete,
    )  # fmt: skip


def receipt(one: model.Receipt) -> Receipt:
    return Receipt(
        address=f"{one.machine}:{one.id}", machine=one.machine, id=one.id, event=one.event, from_state=one.from_state,
        state=one.state, version=one.version, entry_id=one.entry_id, at=one.at, transition_id=one.transition_id,
        duplicate=one.duplicate,
    )  # fmt: skip


def health(found: Status, parked: int) -> Health:
    return Health(
        redis=found.redis, redis_problem=found.redis_problem, epoch=found.epoch, deployment=found.deployment,
        partition_count=found.partition_count, backlog=found.backlog, lag_seconds=found.lag_seconds,
        partitions=[
            Partition(
                partition=one.partition, watermark=one.watermark, tail=one.tail, backlog=one.backlog,
                lag_seconds=one.lag_seconds,
            )
            for one in found.partitions
        ],
        flushers=[
            Flusher(
                name=one.name, alive=one.alive, started_at=model.datetime_of(one.started_ms),
                silent_seconds=one.silent_seconds, partitions=list(one.partitions),
            )
            for one in found.flushers
        ],
        recoveries=[
            Recovery(
                epoch=one.epoch, started_at=model.datetime_of(one.started_ms),
                finished_at=None if one.finished_ms is None else model.datetime_of(one.finished_ms), classes=one.classes,
                lost_at_least=one.lost_at_least, loss_possible=one.loss_possible, report=one.report,
            )
            for one in found.recoveries
        ],
        parked_instances=parked,
    )  # fmt: skip
