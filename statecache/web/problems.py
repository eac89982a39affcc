"""Errors as answers: each ``StateCacheError`` has one status, and a body of the form of RFC 9457."""

from __future__ import annotations

import logging
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from statecache.core import errors
from statecache.durable import faults
from statecache.web import documents

_log = logging.getLogger(__name__)
MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_SECONDS = 1

STATUSES: dict[type[errors.StateCacheError], int] = {
    errors.NotFoundError: 404,
    errors.AlreadyExistsError: 409,
    errors.InvalidTransitionError: 409,
    errors.StaleVersionError: 412,
    errors.InvalidDataError: 422,
    errors.FencedError: 423,  # a worker has claimed it: ``worker`` and until when
    errors.ParkedError: 423,
    errors.BackpressureError: 429,
    errors.IntegrityError: 500,
    errors.ConfigurationError: 501,  # this deployment cannot do that: no replica, no append-only file
    errors.DefinitionError: 501,  # a guard to which no function is bound in this process
    errors.RecoveringError: 503,
    errors.UnavailableError: 503,
    errors.DurabilityTimeout: 504,  # it stands; ``receipt`` tells what
    # What only operators' acts meet: SQL still refuses a dead letter; a flusher or a recovery was faster.
    faults.Refused: 409,
    faults.Overtaken: 503,
    faults.Superseded: 503,
    errors.StateCacheError: 500,
}

_TITLES = {
    400: "The request cannot be read", 401: "A token is needed", 403: "Not allowed", 404: "Not found", 405: "No such method",
    409: "Not possible in this state", 411: "The length is missing", 412: "Somebody else has moved it",
    413: "The request is too large", 421: "Not served under this name", 422: "The input is refused",
    423: "It waits behind a dead letter", 429: "SQL cannot keep up", 500: "Something is wrong", 501: "Not possible here",
    503: "Not available now", 504: "Not yet known to be durable",
}  # fmt: skip


class Problem(BaseModel):
    """What went wrong. ``type`` is the error's name, ``detail`` says what to do."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The entries of these statuses for the OpenAPI document."""
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": _TITLES[status], "content": content} for status in statuses}


class Told(Exception):  # noqa: N818 - not raised by mistake: an answer on its way
    """An answer that is a problem: of the web itself, not of the store."""

    def __init__(self, status: int, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(status, detail)
        self.status = status
        self.detail = detail
        self.headers = headers or {}


def of(error: Exception) -> tuple[int, Problem, dict[str, str]]:
    """Status, body and headers for an error. What is none of ours says nothing of itself: the log has it."""
    more: dict[str, Any] = {}
    headers: dict[str, str] = {}
    kind, detail = type(error).__name__, str(error)
    if isinstance(error, errors.StateCacheError):
        status = next(STATUSES[kind] for kind in type(error).__mro__ if kind in STATUSES)
        more = _attributes(error)
    elif isinstance(error, RequestValidationError):
        status, kind, detail = 422, "InvalidRequest", _what_is_wrong(error)
    elif isinstance(error, Told):
        status, kind, detail, headers = error.status, "Refused", error.detail, error.headers
    elif isinstance(error, HTTPException):
        status, kind, detail = error.status_code, "HTTP", str(error.detail)
        headers = dict(error.headers or {})
    else:
        status, kind, detail = 500, "InternalError", "an unexpected error: see the server's log"
    if status in (429, 503):
        headers.setdefault("Retry-After", str(RETRY_AFTER_SECONDS))
    title = _TITLES.get(status, "Refused")
    return status, Problem(type=f"urn:statecache:{kind}", title=title, status=status, detail=detail, **more), headers


def _attributes(error: errors.StateCacheError) -> dict[str, Any]:
    if isinstance(error, errors.InvalidTransitionError):
        return {"state": error.state, "event": error.event, "allowed": list(error.allowed)}
    if isinstance(error, errors.StaleVersionError):
        return {"expected": error.expected, "actual": error.actual}
    if isinstance(error, errors.FencedError):
        return {"worker": error.worker, "expires_ms": error.expires_ms}
    if isinstance(error, (errors.DurabilityTimeout, errors.ParkedError)) and error.receipt is not None:
        return {"receipt": documents.receipt(error.receipt).model_dump(mode="json")}
    return {}


def _what_is_wrong(error: RequestValidationError) -> str:
    """Which field breaks which rule; not its value, which may be as long as the request."""
    found = [f"{'.'.join(str(part) for part in one['loc'])}: {one['msg']}" for one in error.errors()[:10]]
    return "; ".join(found).encode("utf-8", "replace").decode()


def response(error: Exception) -> JSONResponse:
    """The answer for programs."""
    status, problem, headers = of(error)
    return JSONResponse(problem.model_dump(mode="json"), status, headers, MEDIA_TYPE)
