"""``serve``: the web pages and the JSON API."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from statecache.cli import exits, options, output


def register(app: typer.Typer) -> None:
    options.command(app, "serve")(serve)


def serve(
    store: options.Store,
    host: Annotated[str | None, typer.Option("--host", metavar="ADDRESS", help="Where to listen (127.0.0.1).")] = None,
    port: Annotated[int | None, typer.Option("--port", metavar="N", help="0 takes a free one (8080).", min=0)] = None,
    token: Annotated[
        str | None,
        typer.Option("--token", metavar="SECRET", help="Better in STATECACHE_WEB_TOKEN: others can see arguments."),
    ] = None,
    actions: Annotated[
        bool | None, typer.Option("--actions/--no-actions", help="Whether the web may change anything; needs a token.")
    ] = None,
) -> int:
    """Serve the web pages and the JSON API until SIGTERM or Ctrl-C.

    Reading needs no token on a loopback address; any other address needs one. With --json the URL is one line of JSON.
    """
    from statecache.web import create_app, policy
    from statecache.web.server import serve as run
    from workers import flusher as worker

    store.log()
    settings = store.settings(web_host=host, web_port=port, web_token=token, web_actions=actions)
    allowed = policy.Policy.of(settings)  # refused before a server is started for it

    def listening(url: str) -> None:
        if store.as_json:
            output.emit({"url": url, "pid": os.getpid(), "actions": allowed.actions})
        else:
            output.say(f"serving on {url}; Ctrl-C stops it")

    try:
        with worker.stopping(doing="no longer serving, closing the store"), store.open_for_writing() as cache:
            run(create_app(cache, allowed), settings.web_host, settings.web_port, listening)
    except worker.StopNow as now:
        return 128 + now.number
    return exits.DONE
