"""The application: routes, the guard before them, and what becomes of errors."""

from __future__ import annotations

import logging
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

from statecache.core import errors
from statecache.core.machine import StateMachine
from statecache.engine import watching
from statecache.engine.cache import StateCache
from statecache.web import actions, api, guard, live, pages, probes, problems, rendering, views
from statecache.web.policy import Policy
from statecache.web.site import Site

_log = logging.getLogger(__name__)
_DESCRIPTION = (
    "Where is this right now, how did it get there, and can it go on after the crash? Errors are problems (RFC 9457); "
    "ids travel in queries and bodies, percent-encoded, never in paths."
)


def create_app(
    cache: StateCache, policy: Policy | None = None, *, machines: tuple[type[StateMachine], ...] = ()
) -> FastAPI:
    """Make the application of a store, which stays its caller's to close.

    ``policy`` says who may do what; without one that of the cache's settings. ``machines`` are classes whose guards this
    process can judge: all others are taken from SQL as they were registered. ``/metrics`` shows the registry of
    ``cache.metrics``. Raises ``ConfigurationError`` for a policy that is not safe, or a registry that shows another store.
    """
    policy = policy or Policy.of(cache.settings)
    app = FastAPI(
        title="statecache", version=version("statecache"), description=_DESCRIPTION, openapi_url="/api/v1/openapi.json",
        docs_url=None, redoc_url=None,
    )  # fmt: skip
    watching.watch(cache)
    app.state.site = Site(cache, policy, machines)
    app.include_router(api.router)
    app.include_router(probes.router)
    for faces in (pages, actions, live):
        app.include_router(faces.router)
    app.mount("/static", StaticFiles(packages=[(__package__, "static")]))
    app.add_middleware(guard.Guard, policy=policy, answer=_answer)
    for kind in (errors.StateCacheError, problems.Told, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _answer)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _answer(request: Request, error: Exception) -> Response:
    status, _, _ = problems.of(error)
    if status >= 500:
        _log.warning("%s %s: %s", request.method, request.url.path, error, exc_info=status == 500)
    return problems.response(error) if guard.is_for_programs(request.url.path) else _page(request, error)


def _page(request: Request, error: Exception) -> Response:
    status, problem, headers = problems.of(error)
    back = getattr(request.state, "back", None)
    page = rendering.page(request, "error.html", status, problem=problem, advice=views.problem(error), back=back)
    page.headers.update(headers)
    return page


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document, with our problem as the body of every refusal, that of wrong input too."""
    if app.openapi_schema is None:
        made = FastAPI.openapi(app)
        schemas = made["components"]["schemas"]
        schemas["Problem"] = problems.Problem.model_json_schema()
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        made["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        made["security"] = [{}, {"token": []}]
        for path in made["paths"].values():
            for operation in path.values():
                if "422" in operation["responses"]:
                    operation["responses"]["422"] = problems.documented(422)[422]
        app.openapi_schema = made
    return app.openapi_schema
