"""``worker`` and ``jobs``: the background jobs, in RQ."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from statecache.cli import exits, options, output
from statecache.core import errors

if TYPE_CHECKING:
    from statecache.settings import Settings
    from workers.queues import SafeQueue

JobId = Annotated[str, typer.Argument(metavar="ID", help="The job's id, as 'jobs run' and 'jobs list' print it.")]


def register(app: typer.Typer) -> None:
    options.command(app, "worker")(worker)
    commands = typer.Typer(
        help="The background jobs: what there is to run, what runs, what came of it.", rich_markup_mode=None
    )
    app.add_typer(commands, name="jobs")
    options.command(commands, "list")(list_jobs)
    options.command(commands, "run")(run_job)
    options.command(commands, "show")(show_job)
    options.command(commands, "cancel")(cancel_job)


def worker(
    store: options.Store,
    burst: Annotated[bool, typer.Option("--burst", help="Run what is there, then end.")] = False,
    queues: Annotated[str, typer.Option("--queues", metavar="NAME,NAME", help="Other queues than the store's.")] = "",
    no_scheduler: Annotated[bool, typer.Option("--no-scheduler", help="Leave the schedule to other workers.")] = False,
    metrics_port: options.MetricsPort = None,
) -> int:
    """Run background jobs until SIGTERM or Ctrl-C, which let the job under way end its part; a second one kills it.

    Only statecache's own jobs are run, whatever the queue holds. With --json it prints a line for each job.
    """
    from statecache.engine import watching
    from workers import jobs, schedule, warmings
    from workers import queues as job_queues
    from workers.worker import SafeWorker, log_outcome

    def tell(name: str, outcome: str, seconds: float) -> None:
        cache.metrics.add("statecache_jobs_total", 1, name, outcome)
        cache.metrics.observe("statecache_job_seconds", seconds, name)
        (_tell_json if store.as_json else log_outcome)(name, outcome, seconds)

    store.log()
    with (
        store.open(create=True) as cache,
        watching.endpoint(cache, metrics_port),
        job_queues.connected(rq_url(cache.settings)) as connection,
    ):
        names = [name.strip() for name in queues.split(",") if name.strip()]
        made = SafeWorker(
            names or [job_queues.name_of(cache.settings.namespace)],
            connection,
            jobs.allowed(cache),
            periodic=schedule.of_settings(cache.settings),
            look=functools.partial(warmings.after_recovery, cache) if cache.settings.warm_after_recovery else None,
            told=tell,
        )
        made.work(burst=burst, with_scheduler=not no_scheduler, logging_level="WARNING")
    return exits.DONE


def _tell_json(name: str, outcome: str, seconds: float) -> None:
    output.emit({"job": name, "outcome": outcome, "seconds": round(seconds, 3)})


def rq_url(settings: Settings) -> str:
    """Where the jobs are: RQ's own Redis, or that of the hot store."""
    url = settings.rq_redis_url or settings.redis_url
    if url is None:
        raise errors.ConfigurationError("there is no Redis for the jobs: give --redis-url, or STATECACHE_RQ_REDIS_URL")
    return url


@contextlib.contextmanager
def _queue(store: options.Store) -> Iterator[SafeQueue]:
    """The store's queue. An embedded store is joined for it: it is where the jobs are."""
    from workers import desk
    from workers import queues as job_queues

    with contextlib.ExitStack() as stack:
        settings = store.settings()
        if settings.rq_redis_url is None and settings.redis_url is None:
            settings = stack.enter_context(store.open()).settings
        connection = stack.enter_context(job_queues.connected(rq_url(settings)))
        yield desk.client_queue(connection, job_queues.name_of(settings.namespace))


def list_jobs(
    store: options.Store,
    limit: Annotated[
        int, typer.Option("--limit", metavar="N", help="At most so many of each kind.", min=1, max=options.COUNT_MAX)
    ] = 100,
) -> int:
    """The jobs that wait, run, or ran, the latest first."""
    from workers import desk

    with _queue(store) as queue:
        found = desk.listing(queue, limit)
    if store.as_json:
        output.emit({"jobs": found})
    else:
        rows = [
            (view["id"], view["job"], view["status"], view["created_at"], view["ended_at"], _progress(view))
            for view in found
        ]
        output.console().print(output.table(["id", "job", "state", "created", "ended", "progress"], rows))
    return exits.DONE


def _progress(view: dict[str, Any]) -> str:
    if view["refused"]:
        return f"refused: {view['refused']}"
    progress = dict(view["progress"]) if isinstance(view["progress"], dict) else {}
    told = []
    if type(progress.get("done")) is int and type(progress.get("of")) is int:
        told.append(f"{output.count(progress.pop('done'))} of {output.count(progress.pop('of'))}")
    if "parts" in view:
        told.append(f"{view['parts'].get('finished', 0)} of {view['parts']['of']} partitions")
    told += [f"{name} {value}" for name, value in progress.items() if type(value) in (int, str)]
    return output.shortened(", ".join(told))


def run_job(
    store: options.Store,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Which job; an unknown name lists them.")],
    arguments: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Its arguments.")] = None,
    wait: Annotated[
        float,
        typer.Option(
            "--wait",
            metavar="SECONDS",
            help="Wait so long for its end; exit code 1 if it fails, 3 if it has not come.",
            min=0,
        ),
    ] = 0.0,
) -> int:
    """Enqueue a job for a worker, and print its id."""
    from workers import desk, jobs

    words: dict[str, str] = {}
    for word in arguments or []:
        key, value = _pair(word)
        if key in words:
            raise errors.InvalidDataError(f"argument {word!r} is refused: {key} is given twice")
        words[key] = value
    try:
        body = desk.body_of(name)
    except errors.NotFoundError as error:
        raise errors.InvalidDataError(str(error)) from None
    given = jobs.parsed(body, words)
    _check_store(store, given)
    with _queue(store) as queue:
        job_id = desk.start(queue, name, given)
        view = _awaited(queue, job_id, wait)
    code = _print_job(store, view)
    return exits.UNAVAILABLE if wait and view["status"] not in desk.STATES_OVER else code


def _check_store(store: options.Store, given: dict[str, Any]) -> None:
    """Refuse what the store has not, where it can be asked: if not, the worker finds it out."""
    from statecache.durable.store import DurableStore
    from statecache.engine.embedded import EmbeddedServer
    from workers import jobs

    settings = store.settings()
    if settings.database_url is None and settings.redis_url is not None:
        return  # only the queue is known here
    if not given.get("machine") and not given.get("partitions"):
        return
    url = settings.database_url or EmbeddedServer(settings.data_dir).database_url
    with contextlib.suppress(errors.UnavailableError):
        durable = DurableStore.connect(url, partition_count=None, namespace=settings.namespace, create=False)
        try:
            jobs.check_store(durable, given)
        finally:
            durable.close()


def _pair(word: str) -> tuple[str, str]:
    key, equals, value = word.partition("=")
    if not (key and equals):
        raise errors.InvalidDataError(f"argument {word!r} is refused: it is KEY=VALUE")
    return key, value


def _awaited(queue: SafeQueue, job_id: str, seconds: float) -> dict[str, Any]:
    from workers import desk

    deadline = time.monotonic() + seconds
    while True:
        view = desk.show(queue, job_id)
        if view is None:
            raise errors.NotFoundError(f"job {job_id!r} is gone")
        if view["status"] in desk.STATES_OVER or time.monotonic() >= deadline:
            return view
        time.sleep(0.1)


def show_job(store: options.Store, job_id: JobId) -> int:
    """A job's state, progress, and result or error. Exit code 1 if it failed."""
    from workers import desk

    with _queue(store) as queue:
        view = desk.show(queue, job_id)
    if view is None:
        raise errors.NotFoundError(f"there is no job {job_id!r} (finished ones are kept for a day)")
    return _print_job(store, view)


def _print_job(store: options.Store, view: dict[str, Any]) -> int:
    if store.as_json:
        output.emit(view)
    else:
        parts = {name: view[name] for name in ("progress", "arguments", "parts") if isinstance(view.get(name), dict)}
        rows: list[tuple[str, object]] = [(name, value) for name, value in view.items() if name not in parts]
        rows += [(f"{part} {name}", value) for part, found in parts.items() for name, value in found.items()]
        output.console().print(output.facts(rows))
    return exits.FOUND if view["status"] == "failed" else exits.DONE


def cancel_job(store: options.Store, job_id: JobId) -> int:
    """Stop a job. What it has done stays done."""
    from workers import desk

    with _queue(store) as queue:
        action = desk.cancel(queue, job_id)
    if store.as_json:
        output.emit({"id": job_id, "action": action})
    else:
        output.say(f"{job_id}: {action}")
    return exits.DONE
