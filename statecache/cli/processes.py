"""``up``, ``flusher``, ``demo``: commands that run for a while."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from statecache import logs
from statecache.cli import exits, options, output

if TYPE_CHECKING:
    from statecache.engine.cache import StateCache


def register(app: typer.Typer) -> None:
    options.command(app, "up")(up)
    options.command(app, "flusher")(flusher)
    options.command(app, "demo")(demo)


def up(store: options.Store, metrics_port: options.MetricsPort = None) -> int:
    """Run everything on this machine: the embedded server and the flusher. Stays until SIGTERM or Ctrl-C.

    Programs join with StateCache.embedded(FOLDER), or connect to the addresses that it prints. When it stops it flushes
    what is left; a second signal stops it at once. With --json the addresses are one line of JSON.
    """
    from statecache.engine import watching
    from statecache.settings import redact
    from workers import flusher as worker

    store.log()
    try:
        with worker.stopping() as stop, store.open(create=True, flusher=True) as cache:
            places = {"redis_url": redact(cache.redis_url), "database_url": redact(cache.database_url)}
            if store.as_json:
                server = cache.server.pid if cache.server else None
                output.emit({**places, "namespace": cache.settings.namespace, "pid": os.getpid(), "server_pid": server})
            else:
                output.console().print(output.facts([*places.items(), ("namespace", cache.settings.namespace)]))
                output.say("up; Ctrl-C stops it")
            with watching.endpoint(cache, metrics_port):
                stop.wait()
            left = _flushed(cache)
    except worker.StopNow as now:
        return 128 + now.number
    if not store.as_json:
        output.say(left)
    return exits.DONE


def _flushed(cache: StateCache) -> str:
    from statecache.core import errors

    try:
        cache.flush(timeout=10.0)
    except errors.StateCacheError as error:
        return f"stopped; not everything is in SQL: {error}"
    return "stopped; everything is in SQL"


def flusher(
    store: options.Store,
    once: Annotated[bool, typer.Option("--once", help="Flush what is there, then end.")] = False,
    metrics_port: options.MetricsPort = None,
) -> int:
    """Move the logs into SQL until SIGTERM or Ctrl-C. Any number of them share the partitions.

    The signal lets it finish the batch under way and hand over to the others, or, as the last one, flush what is there
    (drain_timeout_seconds); a second one stops it at once. Under systemd (Type=notify, WatchdogSec) it says how it is.
    Progress is logged; with --json it is a line of JSON every few seconds, and with --once one at the end.
    """
    from statecache.engine import watching
    from statecache.settings import systemd_variables
    from workers import flusher as worker
    from workers.notify import Notifier

    store.log()
    notifier = Notifier(*systemd_variables())
    try:
        with (
            store.open(create=True, on_recovering=notifier.starting) as cache,
            watching.endpoint(cache, metrics_port),
        ):
            if once:
                began = time.monotonic()
                count = worker.once(cache)
                if store.as_json:
                    _tell_json(count, time.monotonic() - began, count)
            else:
                worker.run(cache, _tell_json if store.as_json else worker.log_progress, notifier)
    except worker.StopNow as now:
        return 128 + now.number
    return exits.DONE


def _tell_json(entries: int, seconds: float, total: int) -> None:
    output.emit({"flushed": entries, "seconds": round(seconds, 3), "total": total})


def demo(
    store: options.Store,
    orders: Annotated[
        int, typer.Option("--orders", metavar="N", help="Orders before the crash.", min=100, max=options.COUNT_MAX)
    ] = 10_000,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the folder.")] = False,
    seed_folder: Annotated[
        Path | None,
        typer.Option("--folder", metavar="FOLDER", help="Where to make the demo's folder (a temporary one)."),
    ] = None,
) -> int:
    """Push orders through, kill Valkey with SIGKILL, delete its data, recover, and check every claim.

    On a server and a database of its own, in a temporary folder. Exit code 0 only if every claim holds.
    """
    from statecache.cli import demo as show
    from statecache.core import errors

    if store.redis_url or store.database_url or store.data_dir:
        raise errors.ConfigurationError("the demo runs on a server and a database of its own: it takes no other")
    logs.to_stderr(logging.CRITICAL)  # what it does to its server is no news to it
    return show.run(as_json=store.as_json, orders=orders, keep=keep, folder=seed_folder)
