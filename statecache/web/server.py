"""Serving by uvicorn until a signal; streams that are open then end by themselves."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from statecache.core import errors
from statecache.web.site import Site

_log = logging.getLogger(__name__)
_CLOSE_SECONDS = 5


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, site: Site, listening: Callable[[str], None]) -> None:
        super().__init__(config)
        self._site = site
        self._listening = listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        self._listening(f"http://{f'[{host}]' if ':' in host else host}:{port}")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._site.closing = True  # a flag that streams look at: a handler may not touch the event loop
        super().handle_exit(sig, frame)


def serve(app: FastAPI, host: str, port: int, listening: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; ``listening`` is told the URL. What is being answered then has five seconds.

    Raises ``UnavailableError`` when the address cannot be had.
    """
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # the application logs its errors itself
    with bind(host, port) as bound:
        _Server(configuration(app), app.state.site, listening).run([bound])


def configuration(app: FastAPI) -> uvicorn.Config:
    """How uvicorn serves the application: no access log, no name of its own, no more connections than it has room for."""
    return uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=_CLOSE_SECONDS,
        limit_concurrency=512, lifespan="off", ws="none",
    )  # fmt: skip


def bind(host: str, port: int) -> socket.socket:
    """A socket on an address; port 0 takes a free one."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise errors.ConfigurationError(f"web_host {host!r} is refused: {error.strerror}") from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise errors.UnavailableError(f"{host}:{port} cannot be listened on: {error.strerror}") from error
    return bound
