"""Live parts of pages, by server-sent events.

A stream looks once a second, in a thread of a few that are kept for streams, and sends the parts of its page anew when
something has changed: HTML made by the same templates. There are at most ``STREAMS_MAX``; each ends after ten minutes, with the
server, or when its reader has gone; a browser comes back by itself, and is then asked for its session anew.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from typing import Annotated, Any

import anyio
import anyio.to_thread
from fastapi import APIRouter, Query, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from statecache.core import errors
from statecache.web import problems, rendering, views
from statecache.web.site import Site

_log = logging.getLogger(__name__)
router = APIRouter(include_in_schema=False)

STREAMS_MAX = 100
_THREADS = 8
_LOOK_SECONDS = 1.0
_TICK_SECONDS = 0.25
_ALIVE_SECONDS = 15.0
_LIFE_SECONDS = 600.0

_PARTS = ("now", "data", "act", "history")

Look = Callable[[str], tuple[str, dict[str, str]] | None]
"""Given the key of what the reader has seen, the new key and the page's parts by their ids; None if it is the same."""


class Streams:
    """How many are open, and the threads that look for them. Made in the event loop that serves."""

    def __init__(self) -> None:
        self.open = 0
        self.threads = anyio.CapacityLimiter(_THREADS)


class Stream(Response):
    """One reader's stream."""

    media_type = "text/event-stream"

    def __init__(self, site: Site, streams: Streams, look: Look, key: str) -> None:
        super().__init__(headers={"X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._site, self._streams, self._look, self._key = site, streams, look, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._streams.open += 1
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async with anyio.create_task_group() as group:
                group.start_soon(_until_gone, receive, group.cancel_scope)
                await self._tell(send)
                group.cancel_scope.cancel()
            await send({"type": "http.response.body", "body": b""})
        finally:
            self._streams.open -= 1

    async def _tell(self, send: Send) -> None:
        began = said = time.monotonic()
        looked = 0.0
        await _say(send, "retry: 2000\n\n")
        while not self._site.closing and time.monotonic() - began < _LIFE_SECONDS:
            now = time.monotonic()
            if now - looked >= _LOOK_SECONDS:
                looked = now
                event = await anyio.to_thread.run_sync(self._event, limiter=self._streams.threads)
                if event:
                    await _say(send, event)
                    said = now
            if now - said >= _ALIVE_SECONDS:
                await _say(send, ": still here\n\n")
                said = now
            await anyio.sleep(_TICK_SECONDS)

    def _event(self) -> str | None:
        """What is to be sent, if anything; in a thread."""
        try:
            found = self._look(self._key)
        except errors.StateCacheError as error:
            found = f"trouble: {error}", {}
            if self._key == found[0]:
                return None
        if found is None:
            return None
        self._key, parts = found
        name = "trouble" if self._key.startswith("trouble: ") else "parts"
        document = json.dumps(parts or {"message": self._key.removeprefix("trouble: ")})
        return f"event: {name}\ndata: {document}\n\n"


async def _say(send: Send, text: str) -> None:
    await send({"type": "http.response.body", "body": text.encode(), "more_body": True})


async def _until_gone(receive: Receive, scope: anyio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


def _stream(request: Request, look: Look, key: str) -> Stream:
    state: Any = request.app.state
    if not hasattr(state, "streams"):
        state.streams = Streams()
    if state.streams.open >= STREAMS_MAX:
        raise problems.Told(503, f"{STREAMS_MAX} pages are live already: load the page again to see what is new")
    return Stream(state.site, state.streams, look, key)


@router.get("/live/instance")
async def instance(
    request: Request, machine: str, id: str, key: Annotated[str, Query(max_length=100)] = ""
) -> Response:
    """The parts of an instance's page, whenever it has moved, or SQL has what it had not."""
    site: Site = request.app.state.site
    session = rendering.session_of(request)

    def look(seen: str) -> tuple[str, dict[str, str]] | None:
        handle = site.handle(machine)
        now = handle.get(id)
        version, durable, parked = ([*seen.split("."), "", "", ""])[:3]
        if (version, durable, parked) == (str(now.version), version, str(int(now.parked))):
            return None  # nothing has moved, and all of it is in SQL: no need to read history
        values = views.instance(site, machine, id)
        if values["key"] == seen:
            return None
        parts = {name: rendering.text(site, session, f"part/{name}.html", **values) for name in _PARTS}
        said = f"{values['state']}, version {values['now'].version}"
        return values["key"], {**parts, "announce": said}

    return _stream(request, look, key)


@router.get("/live/health")
async def health(request: Request) -> Response:
    """The figures of the health page, every second in which one of them changes."""
    site: Site = request.app.state.site
    session = rendering.session_of(request)

    def look(seen: str) -> tuple[str, dict[str, str]] | None:
        parts = {"health": rendering.text(site, session, "part/health.html", **views.health(site))}
        key = str(hash(parts["health"]))
        return None if key == seen else (key, parts)

    return _stream(request, look, "")
