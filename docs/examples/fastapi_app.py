"""Orders behind FastAPI, on one ``AsyncStateCache`` for the whole process.

Run it: ``uvicorn docs.examples.fastapi_app:app`` (without settings: an embedded server in ``./statecache-data``; otherwise
``STATECACHE_REDIS_URL`` and ``STATECACHE_DATABASE_URL``). The cache is opened when the application starts and closed when it
ends; this process flushes too, which it need not where a ``statecache flusher`` runs. Requests that run at the same time
share script calls by themselves.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import fastapi
import pydantic

from statecache import State, StateMachine
from statecache.aio import AsyncMachineHandle, AsyncStateCache
from statecache.core import errors


class Order(StateMachine):
    placed = State(initial=True)
    paid = State()
    shipped = State(final=True)
    cancelled = State(final=True)

    pay = placed.to(paid)
    ship = paid.to(shipped)
    cancel = placed.to(cancelled) | paid.to(cancelled)


@asynccontextmanager
async def lifespan(app: fastapi.FastAPI) -> AsyncIterator[None]:
    async with AsyncStateCache.connect(flusher=True) as cache:
        app.state.orders = await cache.machine(Order)
        yield  # on the way out: requests under way are waited for, then every connection is closed


app = fastapi.FastAPI(title="orders", lifespan=lifespan)


def orders_of(request: fastapi.Request) -> AsyncMachineHandle:
    handle: AsyncMachineHandle = request.app.state.orders
    return handle


Orders = Annotated[AsyncMachineHandle, fastapi.Depends(orders_of)]

STATUS_OF: dict[type[errors.StateCacheError], int] = {
    errors.InvalidDataError: 422,
    errors.NotFoundError: 404,
    errors.AlreadyExistsError: 409,
    errors.InvalidTransitionError: 409,
    errors.StaleVersionError: 412,
    errors.ParkedError: 423,
    errors.BackpressureError: 503,
    errors.RecoveringError: 503,
    errors.UnavailableError: 503,  # it may have been applied: the client repeats it with the same Idempotency-Key
    errors.DurabilityTimeout: 202,  # it stands, and will be in SQL later
}


@app.exception_handler(errors.StateCacheError)
async def refused(request: fastapi.Request, error: Exception) -> fastapi.Response:
    status = next((status for kind, status in STATUS_OF.items() if isinstance(error, kind)), 500)
    headers = {"Retry-After": "1"} if status == 503 else None
    body = {"error": type(error).__name__, "detail": str(error)}
    return fastapi.responses.JSONResponse(body, status, headers)


class Event(pydantic.BaseModel):
    data: dict[str, Any] = {}
    expect_version: int | None = None


IdempotencyKey = Annotated[str | None, fastapi.Header(alias="Idempotency-Key")]


@app.put("/orders/{id}", status_code=201)
async def place(id: str, orders: Orders, data: dict[str, Any], key: IdempotencyKey = None) -> dict[str, Any]:
    receipt = await orders.start(id, data, transition_id=key)
    return {"id": receipt.id, "state": receipt.state, "version": receipt.version}


@app.post("/orders/{id}/{event}")
async def fire(id: str, event: str, body: Event, orders: Orders, key: IdempotencyKey = None) -> dict[str, Any]:
    receipt = await orders.transition(
        id, event, body.data, expect_version=body.expect_version, transition_id=key, actor="api", timeout=2.0
    )
    return {"id": receipt.id, "state": receipt.state, "version": receipt.version, "duplicate": receipt.duplicate}


@app.get("/orders/{id}")
async def look(id: str, orders: Orders) -> dict[str, Any]:
    seen = await orders.get(id)
    return {"id": seen.id, "state": seen.state, "version": seen.version, "data": dict(seen.data)}
