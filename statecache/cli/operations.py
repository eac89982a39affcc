"""``status``, ``recover``, ``verify``, ``db``: for whoever runs a store."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from statecache.cli import exits, options, output
from statecache.core import errors

if TYPE_CHECKING:
    from rich.console import RenderableType

    from statecache.durable import grants
    from statecache.engine.cache import StateCache
    from statecache.engine.recovery import Report
    from statecache.engine.status import Status

_PARTITIONS_SHOWN_MAX = 20


def register(app: typer.Typer) -> None:
    options.command(app, "status")(status)
    options.command(app, "recover")(recover)
    options.command(app, "verify")(verify)
    database = typer.Typer(help="The database's tables: upgrade, check.", rich_markup_mode=None)
    app.add_typer(database, name="db")
    options.command(database, "upgrade")(db_upgrade)
    options.command(database, "check")(db_check)


# --- status ------------------------------------------------------------------------------------------------------------


def status(
    store: options.Store,
    watch: Annotated[
        bool, typer.Option("--watch", help="Again and again until Ctrl-C; with --json a document a line.")
    ] = False,
    interval: Annotated[
        float, typer.Option("--interval", metavar="SECONDS", help="Of --watch.", min=0.1, max=86_400)
    ] = 1.0,
    recoveries: Annotated[
        int,
        typer.Option(
            "--recoveries", metavar="N", help="How many of the last ones to look at.", min=0, max=options.COUNT_MAX
        ),
    ] = 20,
) -> int:
    """How the store is doing: epoch, backlog and lag, flushers and what they hold, machines and counts, the last recoveries.

    It recovers no server: exit code 1 when Redis waits for that, 3 when it is away. Only a data folder's own server that
    nobody runs is started for the look, and each of its starts is a recovery.
    """
    from statecache.engine import status as engine_status

    with _open_to_look(store, admit_seconds=options.LOOK_SECONDS) as cache:
        if not watch:
            found = engine_status.status(cache, recoveries)
            _print_status(store, cache, found)
            codes = {engine_status.READY: exits.DONE, engine_status.NOT_READY: exits.FOUND}
            return codes.get(found.redis, exits.UNAVAILABLE)
        _watch(store, cache, interval, recoveries)
        return exits.DONE


def _open_to_look(store: options.Store, *, start: bool = True, admit_seconds: float | None = None) -> StateCache:
    """Open a store without recovering it.

    With ``admit_seconds`` Redis may be away. With ``start`` an embedded one is recovered all the same, as every start of its
    server needs that: nobody else may have been running it.
    """
    options.quiet_about_admission()
    if start and store.settings().is_embedded:
        return store.open()
    return store.open(auto_recover=False, admit_seconds=admit_seconds, call_timeout_seconds=options.LOOK_SECONDS)


def _watch(store: options.Store, cache: StateCache, interval: float, recoveries: int) -> None:
    from statecache.engine import status as engine_status

    out = output.console()
    pause = threading.Event()
    try:
        if store.as_json or not out.is_terminal:
            while True:
                _print_status(store, cache, engine_status.status(cache, recoveries))
                pause.wait(interval)
        from rich.live import Live

        with Live(console=out, screen=True, auto_refresh=False) as live:
            while True:
                live.update(_status_view(cache, engine_status.status(cache, recoveries)), refresh=True)
                pause.wait(interval)
    except KeyboardInterrupt:
        return


def _print_status(store: options.Store, cache: StateCache, found: Status) -> None:
    if store.as_json:
        output.emit(_status_document(cache, found))
    else:
        output.console().print(_status_view(cache, found))


def _status_document(cache: StateCache, found: Status) -> dict[str, Any]:
    import msgspec

    from statecache.settings import redact

    document: dict[str, Any] = msgspec.to_builtins(found)
    for one in document["recoveries"]:
        one["started_at"], one["finished_at"] = output.iso(one.pop("started_ms")), output.iso(one.pop("finished_ms"))
    for one in document["flushers"]:
        one["started_at"] = output.iso(one.pop("started_ms"))
    head = {
        "namespace": cache.settings.namespace, "redis_url": redact(cache.redis_url),
        "database_url": redact(cache.database_url), "at": output.iso(int(time.time() * 1000)),
    }  # fmt: skip
    return head | document


def _status_view(cache: StateCache, found: Status) -> RenderableType:
    from rich.console import Group

    from statecache.settings import redact

    backlog = None if found.backlog is None else output.counted(found.backlog, "transition")
    parts: list[RenderableType] = [
        output.facts(
            [
                ("redis", f"{redact(cache.redis_url)}: {found.redis}"),
                ("", found.redis_problem or None),
                ("database", redact(cache.database_url)),
                ("namespace", cache.settings.namespace),
                ("epoch", found.epoch),
                ("backlog", backlog),
                ("lag", None if found.lag_seconds is None else output.seconds(found.lag_seconds)),
                ("flushers", sum(one.alive for one in found.flushers) or "none is running"),
            ]
        )
    ]
    worst = sorted(found.partitions, key=lambda one: (-(one.backlog or 0), one.partition))[:_PARTITIONS_SHOWN_MAX]
    rows = [
        (one.partition, one.watermark, one.tail, one.backlog, output.seconds(one.lag_seconds) if one.backlog else None)
        for one in sorted(worst, key=lambda one: one.partition)
    ]
    columns = ["partition", "watermark", "tail", "backlog", "lag"]
    parts.append(output.table(columns, rows, right=columns))
    flushers = [
        (
            one.name, "yes" if one.alive else "no", output.moment(one.started_ms), output.seconds(one.silent_seconds),
            output.ranges(one.partitions),
        )
        for one in found.flushers
    ]  # fmt: skip
    columns = ["flusher", "alive", "since", "last heartbeat", "partitions"]
    if flushers:
        parts.append(output.table(columns, flushers, right=["last heartbeat"]))
    machines = [
        (
            one.name,
            one.version,
            output.count(one.instances),
            ", ".join(f"{state} {n:,}" for state, n in one.counts.items()),
        )
        for one in found.machines
    ]
    parts.append(
        output.table(["machine", "version", "instances", "by state"], machines, right=["version", "instances"])
    )
    past = [
        (
            one.epoch, output.moment(one.started_ms), one.classes or "under way", one.lost_at_least,
            "possible" if one.loss_possible else "no",
        )
        for place, one in enumerate(found.recoveries)
        if place == 0 or one.classes not in ("intact", "new") or one.lost_at_least
    ]  # fmt: skip
    columns = ["epoch", "recovered", "found", "lost at least", "more lost"]
    parts.append(output.table(columns, past, right=["epoch", "lost at least"]))
    return Group(*parts)


# --- recover -----------------------------------------------------------------------------------------------------------


def recover(
    store: options.Store,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what it would find and do.")] = False,
) -> int:
    """Reconcile Redis with SQL and open it for a new epoch.

    Exit code 0 when it is done, whatever was lost; with --dry-run 1 when anything is not intact or may be lost.
    """
    with _open_to_look(store, start=False) as cache:
        show = output.say if not store.as_json and output.console().is_terminal else lambda text: None
        report = cache.recover(dry_run=dry_run, progress=show)
    if store.as_json:
        output.emit(report_document(report))
    else:
        output.console().print(report_view(report))
    clean = set(report.kinds) <= {"intact", "new"} and not report.lost_at_least and not report.loss_possible
    return exits.FOUND if dry_run and not clean else exits.DONE


def report_document(report: Report) -> dict[str, Any]:
    """A recovery's report as JSON."""
    import msgspec

    document: dict[str, Any] = msgspec.to_builtins(report)
    document["started_at"] = output.iso(document.pop("started_ms"))
    return document | {
        "kinds": report.kinds, "dropped": report.dropped, "lost_at_least": report.lost_at_least,
        "loss_possible": report.loss_possible,
    }  # fmt: skip


def report_summary(report: Report) -> RenderableType:
    """The sums of a recovery's report for people."""
    found = ", ".join(f"{count} {kind}" for kind, count in report.kinds.items())
    lost = output.counted(report.lost_at_least, "acknowledged transition") if report.lost_at_least else "none known"
    head: list[tuple[str, object]] = [
        (
            "recovered" if not report.dry_run else "would recover",
            f"to epoch {report.epoch}, in {output.seconds(report.seconds)}",
        ),
        ("partitions", found),
        ("kept, to be flushed", output.counted(sum(part.unflushed for part in report.partitions), "transition")),
        ("dropped, to come back from SQL", output.counted(report.dropped, "instance")),
        ("lost at least", lost),
        ("more may be lost", "since the tails were last seen" if report.loss_possible else "no"),
    ]
    return output.facts(head)


def report_view(report: Report) -> RenderableType:
    """A recovery's report for people, with the partitions where something was amiss."""
    from rich.console import Group

    rows = [
        (
            part.partition, part.kind, part.watermark, part.last, part.unflushed, part.dropped, part.lost_at_least,
            output.moment(part.tail_seen_ms or None), "; ".join(part.findings),
        )
        for part in report.partitions
        if part.kind not in ("intact", "new") or part.lost_at_least or part.findings
    ]  # fmt: skip
    columns = ["partition", "found", "watermark", "last entry", "kept", "dropped", "lost >=", "tail seen", "findings"]
    numbers = ["partition", "watermark", "last entry", "kept", "dropped", "lost >="]
    return Group(report_summary(report), *([output.table(columns, rows, right=numbers)] if rows else []))


# --- verify ------------------------------------------------------------------------------------------------------------


def verify(
    store: options.Store,
    machine: Annotated[
        str | None, typer.Option("--machine", metavar="NAME", help="Only this machine's instances.")
    ] = None,
) -> int:
    """Compare Redis, the log and SQL with each other, and every history with versions 1..n. Changes nothing.

    Exit code 1 on any finding; with --json the findings are a machine-readable diff.
    """
    from statecache.engine import verify as engine_verify

    with _open_to_look(store) as cache:
        if machine is not None:
            cache.machine(machine)
        found = engine_verify.verify(cache, machine)
    if store.as_json:
        import msgspec

        output.emit(msgspec.to_builtins(found))
    else:
        if found.findings:
            rows = [(one.kind, one.address, one.detail) for one in found.findings]
            output.console().print(output.table(["kind", "address", "what is wrong"], rows))
        output.say(
            f"{output.counted(found.instances, 'instance')}, {output.counted(found.transitions, 'transition')}: "
            + (output.counted(len(found.findings), "finding") if found.findings else "nothing wrong")
        )
    return exits.FOUND if found.findings else exits.DONE


# --- db ----------------------------------------------------------------------------------------------------------------


def db_upgrade(
    store: options.Store,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what it would do.")] = False,
) -> int:
    """Bring the tables to this version's schema; a database without any gets them. With --dry-run 1 if there is work."""
    from statecache.durable import migrate
    from statecache.settings import redact

    url, before = _revision(store, create=not dry_run)
    if before is not None and before > migrate.HEAD:
        raise migrate.newer(redact(url), before)
    if not dry_run and before != migrate.HEAD:
        migrate.upgrade(url)
    done = before == migrate.HEAD
    _tell_revision(store, url, before, migrate.HEAD if not dry_run else before)
    return exits.FOUND if dry_run and not done else exits.DONE


def db_check(store: options.Store) -> int:
    """Tell the tables' schema version, and which rights this role lacks (PostgreSQL); exit code 1 unless it is this version's,
    and the role may write all or nothing."""
    from statecache.durable import engine, grants, migrate

    url = _database_url(store)
    database = engine.open_database(url, create=False)
    try:
        rights = grants.of_role(database)
        try:
            found = migrate.revision(database)
        except errors.ConfigurationError as error:
            if rights is None or not rights.missing:
                raise
            raise errors.ConfigurationError(f"{rights.lacks}: {rights.advice}") from error
    finally:
        database.close()
    _tell_revision(store, url, found, found, rights)
    may_work = rights is None or not rights.missing or rights.may_read
    return exits.DONE if found == migrate.HEAD and may_work else exits.FOUND


def _revision(store: options.Store, *, create: bool) -> tuple[str, str | None]:
    """The database's URL and its tables' schema version. Without ``create`` an SQLite file must be there."""
    from statecache.durable import engine, migrate

    url = _database_url(store)
    database = engine.open_database(url, create=create)
    try:
        return url, migrate.revision(database)
    finally:
        database.close()


def _database_url(store: options.Store) -> str:
    from statecache.engine.embedded import EmbeddedServer

    settings = store.settings()
    url = settings.database_url
    if url is None:
        folder = settings.data_dir
        if not folder.is_dir():
            raise errors.ConfigurationError(f"there is no folder {folder}: name the database (--database-url)")
        url = EmbeddedServer(folder).database_url
    return url


def _tell_revision(
    store: options.Store, url: str, before: str | None, now: str | None, rights: grants.Rights | None = None
) -> None:
    from statecache.durable import migrate
    from statecache.settings import redact

    if store.as_json:
        told: dict[str, Any] = {"database_url": redact(url), "before": before, "now": now, "wanted": migrate.HEAD}
        if rights is not None:
            told |= {"role": rights.role, "missing_rights": rights.missing, "advice": rights.advice}
        output.emit(told)
        return
    was = f"schema version {before}" if before else "no tables of statecache"
    if before != now:
        output.say(f"{redact(url)}: {was}, upgraded to {now}")
    else:
        advice = (
            ": upgrade the statecache package" if before and before > migrate.HEAD else ": run 'statecache db upgrade'"
        )
        output.say(
            f"{redact(url)}: {was}, this version of statecache needs {migrate.HEAD}"
            + ("" if now == migrate.HEAD else advice)
        )
    if rights is not None and rights.missing:
        output.say(f"{rights.lacks}: {rights.advice}")
