"""``evict`` and ``warm``: what leaves Redis for SQL alone, and what comes back before it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from statecache.cli import arguments, exits, options, output

if TYPE_CHECKING:
    from statecache.engine import eviction, warming

DryRun = Annotated[bool, typer.Option("--dry-run", help="Only tell what would be done.")]
Machine = Annotated[str | None, typer.Option("--machine", metavar="NAME", help="Only this machine's instances.")]


def register(app: typer.Typer) -> None:
    options.command(app, "evict")(evict)
    options.command(app, "warm")(warm)


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
    with store.look(redis=True) if dry_run else store.open() as cache:
        if machine is not None:
            cache.machine(machine)
        idle_seconds = None if age is None else age.total_seconds()
        with output.progress("evicting") as update:
            report = eviction.evict(
                cache, idle_seconds=idle_seconds, machine=machine, dry_run=dry_run,
                progress=lambda report: update(report.evicted),
            )  # fmt: skip
    if store.as_json:
        import msgspec

        output.emit(msgspec.to_builtins(report))
    else:
        output.console().print(output.facts(_evicted_facts(report)))
    return exits.FOUND if dry_run and report.evicted else exits.DONE


def _evicted_facts(report: eviction.Report) -> list[tuple[str, object]]:
    kept = ", ".join(f"{count} {reason}" for reason, count in sorted(report.kept.items()))
    facts: list[tuple[str, object]] = [
        ("would be evicted" if report.dry_run else "evicted", output.counted(report.evicted, "instance")),
        ("cold already", output.count(report.gone)),
        ("kept", kept or "none"),
    ]
    if report.above:
        facts.append(("still beyond the bounds", output.counted(report.above, "instance")))
    return [*facts, ("took", output.seconds(report.seconds))]


def warm(
    store: options.Store,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit", metavar="N", help="At most so many, those that moved last.", min=1, max=options.COUNT_MAX
        ),
    ] = None,
    machine: Machine = None,
    finals: Annotated[bool, typer.Option("--finals", help="Those in a final state too, behind the others.")] = False,
    dry_run: DryRun = False,
) -> int:
    """Bring instances back into Redis before they are asked for, those that moved last first: after a wipe, say.

    It ends when Redis is at its bounds (hot_instances_max, hot_memory_share). With --dry-run 1 if SQL has any to bring back.
    """
    from statecache.engine import warming

    with store.look() if dry_run else store.open() as cache:
        if machine is not None:
            cache.machine(machine)
        with output.progress("warming", limit) as update:
            report = warming.warm(
                cache, limit=limit, machine=machine, finals=finals, dry_run=dry_run,
                progress=lambda report: update(report.warmed + report.hot_already),
            )  # fmt: skip
    if store.as_json:
        import msgspec

        output.emit(msgspec.to_builtins(report))
    else:
        output.console().print(output.facts(_warmed_facts(report, limit)))
    return exits.FOUND if dry_run and report.candidates else exits.DONE


def _warmed_facts(report: warming.Report, limit: int | None) -> list[tuple[str, object]]:
    facts: list[tuple[str, object]] = [("in SQL, in these states", output.counted(report.candidates, "instance"))]
    if report.dry_run:
        most = report.candidates if limit is None else min(report.candidates, limit)
        return [
            *facts,
            ("would be brought back", f"{output.counted(most, 'instance')} at most: some may be hot already"),
        ]
    facts += [
        ("brought back", output.counted(report.warmed, "instance")),
        ("hot already", output.count(report.hot_already)),
    ]
    if report.stale:
        facts.append(("not brought back", f"{output.count(report.stale)}: SQL is older than what Redis has dropped"))
    if report.parked:
        facts.append(("parked, left cold", output.count(report.parked)))
    if report.full:
        facts.append(("ended", "Redis is at its bounds"))
    return [*facts, ("took", output.seconds(report.seconds))]
