"""``claims``: which worker holds which instance."""

from __future__ import annotations

from typing import Annotated

import typer

from statecache.cli import options, output


def register(app: typer.Typer) -> None:
    options.command(app, "claims")(claims)


def claims(
    store: options.Store,
    machine: Annotated[str | None, typer.Argument(metavar="MACHINE", help="Only instances of this machine.")] = None,
    limit: Annotated[
        int, typer.Option("--limit", metavar="N", help="How many at most.", min=1, max=options.COUNT_MAX)
    ] = 100,
) -> None:
    """Which worker holds which instance: the claims in force, those first that end first.

    With --json one list of objects.
    """
    from statecache.engine.claims import listed

    with store.look(redis=True) as cache:
        if machine is not None:
            cache.machine(machine)  # a misspelt name is refused
        found = listed(cache, machine, limit)
    if store.as_json:
        output.emit([{"address": f"{one.machine}:{one.id}", **output.claim_document(one)} for one in found])
        return
    if found:
        rows = [(f"{one.machine}:{one.id}", one.worker, one.token, output.moment(one.expires_ms)) for one in found]
        output.console().print(output.table(["instance", "worker", "token", "until"], rows))
    full = f" (--limit {limit}: there may be more)" if len(found) == limit else ""
    output.say(f"{output.counted(len(found), 'claim')}{full}")
