"""``evict`` and ``warm``: what leaves Redis for SQL alone, and what comes back before it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from statecache.cli import arguments, exits, options, output

if TYPE_CHECKING:
    from statecache.engine.eviction import Report

DryRun = Annotated[bool, typer.Option("--dry-run", help="Only tell what would be done.")]
Machine = Annotated[str | None, typer.Option("--machine", metavar="NAME", help="Only this machine's instances.")]


def register(app: typer.Typer) -> None:
    options.command(app, "evict")(evict)


def evict(
    store: options.Store,
    older_than: Annotated[
        str | None,
        typer.Option(
            "--older-than", metavar="TIME", help="Whatever is idle for so long, by no other rule: 10m, 2h, 3d."
        ),
    ] = None,
    machine: Machine = None,
    dry_run: DryRun = False,
) -> int:
    """Let idle instances that are in SQL leave Redis: by their machine's hot_ttl and the settings, or --older-than.

    They come back when a call wants them. Whoever flushes does this by itself. With --dry-run 1 if any would leave.
    """
    from statecache.engine import eviction

    age = None if older_than is None else arguments.duration("--older-than", older_than)
    with store.open() as cache:
        if machine is not None:
            cache.machine(machine)
        idle_seconds = None if age is None else age.total_seconds()
        report = eviction.evict(cache, idle_seconds=idle_seconds, machine=machine, dry_run=dry_run)
    if store.as_json:
        import msgspec

        output.emit(msgspec.to_builtins(report))
    else:
        output.console().print(output.facts(_evicted_facts(report)))
    return exits.FOUND if dry_run and report.evicted else exits.DONE


def _evicted_facts(report: Report) -> list[tuple[str, object]]:
    kept = ", ".join(f"{count} {reason}" for reason, count in sorted(report.kept.items()))
    facts: list[tuple[str, object]] = [
        ("would be evicted" if report.dry_run else "evicted", output.counted(report.evicted, "instance")),
        ("cold already", output.count(report.gone)),
        ("kept", kept or "none"),
    ]
    if report.above:
        facts.append(("still beyond the bounds", output.counted(report.above, "instance")))
    return [*facts, ("took", output.seconds(report.seconds))]
