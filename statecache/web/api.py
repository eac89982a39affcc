"""``/api/v1``: the store for programs. Ids travel in the query or in the body, never in the path: an id may be ``..``.

Nothing is taken for what it is not: a body's ``true`` or ``"5"`` is no number, and a query's number is digits alone.
"""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from statecache.core import spec
from statecache.engine import claims
from statecache.web import documents, problems
from statecache.web.site import Site

PREFIX = "/api/v1"
_READ = problems.documented(401, 404, 421, 422, 500, 501, 503)
_WRITE = problems.documented(400, 401, 403, 404, 409, 411, 412, 413, 421, 422, 423, 429, 500, 501, 503, 504)

router = APIRouter(prefix=PREFIX)

_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_MOMENT = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9]{2}:.*")


def _number(value: object) -> object:
    """Refuse in a query what only Python reads as a number: ``1_000``, `` 1 ``."""
    if isinstance(value, str) and not _NUMBER.fullmatch(value):
        raise ValueError("it is no number")
    return value


def _moment(value: object) -> object:
    """Refuse what pydantic would read as seconds or milliseconds since 1970, or as a day."""
    if not (isinstance(value, str) and _MOMENT.fullmatch(value)):
        raise ValueError("it is no time of ISO 8601, such as 2026-01-31T12:00:00Z")
    return value


Id = Annotated[str, Query(description="The instance's id; percent-encoded, as every query.")]
Limit = Annotated[int, Query(ge=1, le=1000, description="How many at most."), BeforeValidator(_number)]
Moment = Annotated[datetime, Field(strict=False), BeforeValidator(_moment)]
Seconds = Annotated[float, Field(gt=0, le=30, allow_inf_nan=False)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    id: str
    data: dict[str, Any] | None = None
    actor: str | None = None
    reason: str | None = None
    transition_id: str | None = Field(None, description="Makes the call repeatable: it is applied once.")
    occurred_at: Moment | None = None
    durability: Literal["hot", "fsync", "replica", "durable"] | None = None
    timeout_seconds: Seconds | None = None


class Start(_Body):
    """Begin an instance."""


class Move(_Body):
    """Fire an event."""

    event: str
    unset: list[str] = []
    increment: dict[str, int | float] | None = None
    expect_version: int | None = Field(None, description="Refuse with 412 if it is at another version.")


def _site(request: Request) -> Site:
    site: Site = request.app.state.site
    return site


@router.get("/where", responses=_READ, tags=["instances"])
def where(
    request: Request,
    id: Id,
    prefix: Annotated[bool, Query(description="Also those whose id begins so.")] = False,
    limit: Limit = 20,
) -> documents.Where:
    """Find an id across all machines: where is this right now?"""
    site = _site(request)
    exact = [documents.snapshot(one) for one in site.exact(id)]
    similar = site.similar(id, limit) if prefix else []
    return documents.Where(
        exact=exact,
        similar=[
            documents.Address(address=f"{one.machine}:{one.id}", machine=one.machine, id=one.id, state=one.state)
            for one in similar
        ],
    )


@router.get("/instances/{machine}", responses=_READ, tags=["instances"])
def instance(
    request: Request,
    machine: str,
    id: Id,
    version: Annotated[
        int | None, Query(ge=1, description="As it was at this version."), BeforeValidator(_number)
    ] = None,
    when: Annotated[Moment | None, Query(description="As it was at this moment.")] = None,
) -> documents.Instance:
    """One instance as it is, with who holds it, or as it was."""
    handle = _site(request).handle(machine)
    if version is None and when is None:
        return documents.instance(handle.get(id), claims.holder(handle, id))
    return documents.instance(handle.at(id, version=version, when=when))


@router.get("/history/{machine}", responses=_READ, tags=["instances"])
def history(
    request: Request,
    machine: str,
    id: Id,
    after: Annotated[int, Query(ge=0, description="Only versions above this one."), BeforeValidator(_number)] = 0,
    limit: Limit = 100,
) -> documents.History:
    """How it got there: transitions, oldest first, those too that are not in SQL yet."""
    rows = [row for row in _site(request).handle(machine).history(id) if row.version > after]
    page = rows[:limit]
    return documents.History(
        transitions=[documents.transition(row) for row in page],
        next_after=page[-1].version if len(rows) > limit else None,
    )


@router.post("/instances/{machine}", status_code=201, responses=_WRITE, tags=["instances"])
def start(request: Request, machine: str, body: Start) -> documents.Receipt:
    """Begin an instance in its machine's initial state. Needs the token, and actions enabled."""
    handle = _site(request).handle(machine)
    made = handle.start(
        body.id, body.data, actor=body.actor, reason=body.reason, transition_id=body.transition_id,
        occurred_at=body.occurred_at, durability=body.durability, timeout=body.timeout_seconds,
    )  # fmt: skip
    return documents.receipt(made)


@router.post("/transitions/{machine}", responses=_WRITE, tags=["instances"])
def transition(request: Request, machine: str, body: Move) -> documents.Receipt:
    """Fire an event. Needs the token, and actions enabled. After 503 repeat it with the same ``transition_id``."""
    handle = _site(request).handle(machine)
    made = handle.transition(
        body.id, body.event, body.data, unset=body.unset, increment=body.increment, actor=body.actor, reason=body.reason,
        expect_version=body.expect_version, transition_id=body.transition_id, occurred_at=body.occurred_at,
        durability=body.durability, timeout=body.timeout_seconds,
    )  # fmt: skip
    return documents.receipt(made)


@router.get("/machines", responses=_READ, tags=["machines"])
def machines(request: Request) -> list[documents.Machine]:
    """All machines, in their latest versions, with their instances by state."""
    site = _site(request)
    return [_machine(site, name) for name in site.machine_names()]


@router.get("/machines/{machine}", responses=_READ, tags=["machines"])
def machine(request: Request, machine: str) -> documents.Machine:
    """One machine in its latest version, with its instances by state."""
    return _machine(_site(request), machine)


def _machine(site: Site, name: str) -> documents.Machine:
    handle = site.handle(name)
    declared, definition = handle.machine.spec, handle.machine.definition
    line = spec.steps(declared)
    return documents.Machine(
        name=name, version=definition.version, title=declared.title, initial=definition.initial,
        states=list(definition.states), final=[one for one in definition.states if one in definition.finals],
        events={event: dict(targets) for event, targets in definition.targets.items()},
        steps=None if line is None else list(line), counts=handle.counts(),
    )  # fmt: skip


@router.get("/counts/{machine}", responses=_READ, tags=["machines"])
def counts(request: Request, machine: str) -> dict[str, int]:
    """Instances by state, as of the watermark."""
    return _site(request).handle(machine).counts()


@router.get("/find/{machine}", responses=_READ, tags=["machines"])
def find(
    request: Request,
    machine: str,
    state: str | None = None,
    older_than_seconds: Annotated[
        float | None, Query(ge=0, le=1e9, allow_inf_nan=False), BeforeValidator(_number)
    ] = None,
    stuck: Annotated[bool, Query(description="Only those past their state's timeout that no event moves on.")] = False,
    limit: Limit = 100,
) -> documents.Snapshots:
    """Instances in a state, those first that have been there longest, as of the watermark.

    With ``stuck`` those first that are longest past their state's timeout.
    """
    age = None if older_than_seconds is None else timedelta(seconds=older_than_seconds)
    found = _site(request).handle(machine).find(state, older_than=age, stuck=stuck, limit=limit)
    return documents.Snapshots(instances=[documents.snapshot(one) for one in found], more=len(found) == limit)


@router.get("/health", responses=_READ, tags=["health"])
def health(request: Request) -> documents.Health:
    """Epoch, lag and backlog, partition by partition; the last recoveries with their reports."""
    return documents.health(*_site(request).status())
