"""The pages: search, an instance, a machine, health."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.responses import RedirectResponse, Response

from statecache.core import errors
from statecache.web import rendering, views, wording
from statecache.web.site import Site

router = APIRouter(include_in_schema=False)
_FOUND_MAX = 50
_LISTED_MAX = 100
_MINUTES_MAX = 10_000_000


def _site(request: Request) -> Site:
    site: Site = request.app.state.site
    return site


@router.get("/")
def home(request: Request, q: str | None = None) -> Response:
    """Search, and all machines. One exact hit and nothing like it is gone to at once."""
    site = _site(request)
    text = (q or "").strip()
    found = views.search(site, text, _FOUND_MAX) if text else None
    if found and len(found["exact"]) == 1 and not found["similar"]:
        hit = found["exact"][0]
        return RedirectResponse(wording.instance_link(hit.machine, hit.id), 303)
    titles = found["titles"] if found else {}
    return rendering.page(request, "home.html", q=text, found=found, titles=titles, machines=views.machines(site))


@router.get("/instance")
def instance(
    request: Request,
    machine: str,
    id: str,
    version: Annotated[int | None, Query(ge=1)] = None,
    before: Annotated[int | None, Query(ge=1)] = None,
    done: str | None = None,
) -> Response:
    """One instance."""
    values = views.instance(_site(request), machine, id, version, before)
    live = None
    if version is None and before is None:
        live = wording.link("/live/instance", machine=machine, id=id, key=values["key"])
    return rendering.page(request, "instance.html", live=live, done=done is not None, **values)


@router.get("/machines/{name}")
def machine(request: Request, name: str) -> Response:
    """One machine."""
    return rendering.page(request, "machine.html", **views.machine(_site(request), name))


@router.get("/machines/{name}/instances")
def instances(
    request: Request,
    name: str,
    state: str | None = None,
    older_than_minutes: str = "",
) -> Response:
    """Instances of a machine, those first that have been longest where they are."""
    handle = _site(request).handle(name)
    state = state or None
    minutes = _minutes(older_than_minutes)
    age = None if minutes is None else timedelta(minutes=minutes)
    found = handle.find(state, older_than=age, limit=_LISTED_MAX)
    return rendering.page(
        request, "instances.html", name=name, title=handle.machine.spec.title or name, state=state, titles=views.titles(handle),
        older_than_minutes=minutes, found=found, more=len(found) == _LISTED_MAX,
    )  # fmt: skip


def _minutes(text: str) -> float | None:
    """A field that may be left empty."""
    if not text.strip():
        return None
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not 0 <= minutes <= _MINUTES_MAX:
        raise errors.InvalidDataError(
            f"minutes {wording.value(text)!r} is refused: a number from 0 to {_MINUTES_MAX:,}"
        )
    return minutes


@router.get("/health")
def health(request: Request) -> Response:
    """How the store is doing."""
    return rendering.page(request, "health.html", live="/live/health", **views.health(_site(request)))
