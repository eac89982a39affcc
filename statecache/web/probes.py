"""What operators' machines ask: is it alive, should it get traffic, what do its gauges say."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from statecache.metrics import CONTENT_TYPE
from statecache.web import documents, problems
from statecache.web.site import Site

router = APIRouter(tags=["probes"])


@router.get("/healthz", responses=problems.documented(421))
async def healthz() -> dict[str, str]:
    """The process answers. Needs neither token nor servers nor a free thread."""
    return {"status": "alive"}


@router.get(
    "/readyz",
    response_model=documents.Ready,
    responses={**problems.documented(401, 421), 503: {"model": documents.Ready}},
)
def readyz(request: Request) -> JSONResponse:
    """Redis is admitted, SQL answers, and the lag is within ``web_ready_lag_seconds``: 200; else 503 with the reasons."""
    site: Site = request.app.state.site
    reasons = site.not_ready()
    body = documents.Ready(ready=not reasons, reasons=reasons)
    return JSONResponse(body.model_dump(), 503 if reasons else 200)


@router.get("/metrics", response_class=PlainTextResponse, responses=problems.documented(401, 421))
def metrics(request: Request) -> Response:
    """What this process has counted, and the gauges of the store, for Prometheus."""
    site: Site = request.app.state.site
    return Response(site.cache.metrics.text(), media_type=CONTENT_TYPE)
