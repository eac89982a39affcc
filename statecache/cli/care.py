"""``doctor`` and ``dead-letters``: what keeps a store healthy, and what to do with what SQL refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from statecache.cli import arguments, exits, jobs, options, output, upkeep
from statecache.core import errors

if TYPE_CHECKING:
    from statecache.durable.rows import Letter
    from statecache.engine.cache import StateCache

Address = Annotated[str, typer.Argument(metavar="ADDRESS", help="machine:id, such as order:1001.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only tell what would be done.")]


def register(app: typer.Typer) -> None:
    options.command(app, "doctor")(doctor)
    options.command(app, "advise")(advise)
    letters = typer.Typer(help="Entries that SQL refused, and what waits behind them.", rich_markup_mode=None)
    app.add_typer(letters, name="dead-letters")
    options.command(letters, "list")(list_letters)
    options.command(letters, "retry")(retry)
    options.command(letters, "discard")(discard)
    jobs.register(app)
    upkeep.register(app)


def doctor(store: options.Store) -> int:
    """Check servers, database and what stands open against the promises. Changes nothing. Exit code 1 if a check fails."""
    from statecache.engine import doctor as engine_doctor

    with store.look() as cache:
        checks = engine_doctor.examine(cache)
    if store.as_json:
        import msgspec

        output.emit({"checks": msgspec.to_builtins(checks)})
    else:
        rows = [(one.verdict, one.name, one.found, one.advice) for one in checks]
        output.console().print(output.table(["", "check", "found", "advice"], rows))
    return exits.FOUND if any(one.verdict == engine_doctor.FAIL for one in checks) else exits.DONE


def advise(store: options.Store) -> int:
    """Which settings would fit the load that is there, with the figures that say so. Changes nothing."""
    from statecache.engine import advise as engine_advise

    with store.look(redis=True) as cache:
        found = engine_advise.advise(cache)
    if store.as_json:
        import msgspec

        output.emit(msgspec.to_builtins(found))
    elif not found.advice:
        output.console().print("Nothing to advise: the settings fit what was measured.")
    else:
        rows = [(one.setting, one.now, one.advised, one.why) for one in found.advice]
        output.console().print(output.table(["setting", "now", "advised", "why"], rows))
    return exits.DONE


def list_letters(
    store: options.Store,
    address: Annotated[str | None, typer.Argument(metavar="ADDRESS", help="Only this instance's.")] = None,
    limit: Annotated[
        int, typer.Option("--limit", metavar="N", help="How many instances.", min=1, max=options.COUNT_MAX)
    ] = 100,
) -> int:
    """The parked instances and their letters, oldest first. Exit code 1 if there are any."""
    with store.look() as cache:
        found = _letters(
            cache, [arguments.address(address)] if address is not None else cache.durable.parked_instances(limit)
        )
    if store.as_json:
        output.emit({"letters": [_document(one) for one in found]})
    elif not found:
        output.say("no dead letters")
    else:
        rows = [
            (
                f"{one.entry.machine}:{one.entry.id}", one.entry.version, one.entry.event, one.entry.entry_id,
                output.moment(one.noted_ms), one.error,
            )
            for one in found
        ]  # fmt: skip
        columns = ["instance", "version", "event", "entry", "since", "why"]
        output.console().print(output.table(columns, rows, right=["version", "entry"]))
    return exits.FOUND if found else exits.DONE


def retry(store: options.Store, address: Address, dry_run: DryRun = False) -> int:
    """Move all letters of an instance into history, once the reason for their refusal is gone; it goes on then."""
    return _act(store, address, dry_run, "retry")


def discard(
    store: options.Store,
    address: Address,
    dry_run: DryRun = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do it: these transitions are lost for good.")] = False,
) -> int:
    """Delete all letters of an instance: these transitions are lost, and it goes on from its checkpoint."""
    if not (yes or dry_run):
        raise errors.InvalidDataError("discard loses transitions for good: say --yes, or look first with --dry-run")
    return _act(store, address, dry_run, "discard")


def _act(store: options.Store, address: str, dry_run: bool, verb: str) -> int:
    from statecache.durable import faults
    from statecache.engine import letters as engine_letters

    machine, id = arguments.address(address)
    with store.look() if dry_run else store.open() as cache:
        found = _letters(cache, [(machine, id)])
        if not found:
            raise errors.NotFoundError(f"{address} has no dead letters")
        count = len(found)
        if not dry_run:
            try:
                count = getattr(engine_letters, verb)(cache, machine, id)
            except faults.Refused as error:
                raise faults.Refused(
                    f"{address}: {error}; nothing was changed. Change what makes SQL refuse its letters (version "
                    f"{found[0].entry.version} on) and retry, or discard them"
                ) from error
    if store.as_json:
        output.emit({"address": address, "action": verb, "letters": count, "dry_run": dry_run})
    else:
        done = {"retry": "moved into history", "discard": "discarded"}[verb]
        output.say(f"{address}: {output.counted(count, 'letter')} {'would be ' if dry_run else ''}{done}")
    return exits.FOUND if dry_run else exits.DONE


def _letters(cache: StateCache, instances: list[tuple[str, str]]) -> list[Letter]:
    return [letter for instance in instances for letter in cache.durable.letters(*instance)]


def _document(letter: Letter) -> dict[str, Any]:
    entry = letter.entry
    return {
        "machine": entry.machine, "id": entry.id, "version": entry.version, "event": entry.event,
        "from_state": entry.from_state or None, "to_state": entry.to_state, "entry_id": str(entry.entry_id),
        "transition_id": entry.transition_id, "patch": _patch(entry.patch), "error": letter.error,
        "waiting": letter.waiting, "noted_at": output.iso(letter.noted_ms),
    }  # fmt: skip


def _patch(text: str) -> Any:
    """A letter's patch as an object; as the text that it is where a stranger's record holds no JSON: SQL may have refused it
    for just that."""
    import msgspec

    from statecache.core import codec

    try:
        return msgspec.json.decode(text or "{}")
    except codec.UNREADABLE:
        return text
