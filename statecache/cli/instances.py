"""``where``, ``history``, ``ls``, ``start``, ``transition``: one instance, or a list of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from statecache.cli import arguments, options, output
from statecache.core import errors

if TYPE_CHECKING:
    from statecache.core import model

Address = Annotated[str, typer.Argument(metavar="ADDRESS", help="machine:id, such as order:1001.")]
Data = Annotated[str | None, typer.Option("--data", metavar="JSON", help="Data fields as a JSON object, or @FILE.")]
Set = Annotated[list[str], typer.Option("--set", metavar="NAME=VALUE", help="One data field: JSON, or else text.")]
Actor = Annotated[str | None, typer.Option("--actor", help="Who does it.")]
Reason = Annotated[str | None, typer.Option("--reason", help="Why.")]
TransitionId = Annotated[
    str | None, typer.Option("--transition-id", metavar="ID", help="Makes the call repeatable: it is applied once.")
]
Durability = Annotated[
    str | None, typer.Option("--durability", metavar="LEVEL", help="hot, fsync, replica or durable.")
]
Timeout = Annotated[
    float | None, typer.Option("--timeout", metavar="SECONDS", help="How long to try and to wait.", min=0)
]


def register(app: typer.Typer) -> None:
    options.command(app, "where")(where)
    options.command(app, "history")(history)
    options.command(app, "ls")(ls)
    options.command(app, "start")(start)
    options.command(app, "transition")(transition)


def where(store: options.Store, address: Address) -> None:
    """Where an instance is now: its state, version and data, and who holds it."""
    from statecache.engine.claims import holder

    machine, id = arguments.address(address)
    with store.look(redis=True) as cache:
        handle = cache.machine(machine)
        found = handle.get(id)
        held = holder(handle, id)
    if store.as_json:
        claim = None if held is None else output.claim_document(held)
        output.emit({**output.snapshot_document(found), "claim": claim})
        return
    state = f"{found.state} (final)" if found.final else found.state
    rows: list[tuple[str, object]] = [
        ("address", address),
        ("state", f"{state}, parked behind a dead letter" if found.parked else state),
        ("version", found.version),
        ("since", output.moment(found.updated_ms)),
        ("began", output.moment(found.created_ms)),
        ("next", ", ".join(found.available_events) or "nothing, it is final"),
        ("read from", "Redis" if found.source == "hot" else "SQL: it is cold"),
    ]
    if held is not None:
        rows.append(("held by", f"{held.worker}, until {output.moment(held.expires_ms)}"))
    output.console().print(output.facts(rows))
    if found.data:
        fields = [(name, output.data_text({"": value})[1:]) for name, value in found.data.items()]
        output.console().print(output.table(["field", "value"], fields))


def history(store: options.Store, address: Address) -> None:
    """How an instance got there: every transition, oldest first, those too that are not in SQL yet.

    With --json one list of objects.
    """
    machine, id = arguments.address(address)
    with store.look(redis=True) as cache:
        rows = cache.machine(machine).history(id)
    if store.as_json:
        output.emit([output.transition_document(row) for row in rows])
        return
    columns = ["version", "event", "from", "to", "at", "occurred", "actor", "reason", "data", "in SQL"]
    shown = [
        (
            row.version, row.event, row.from_state, row.to_state, output.moment(row.at_ms), output.moment(row.occurred_ms),
            row.actor, row.reason, _changes(row), "yes" if row.durable else "not yet",
        )
        for row in rows
    ]  # fmt: skip
    output.console().print(output.table(columns, shown, title=address, right=["version"]))


def _changes(row: model.Transition) -> str:
    parts = [output.data_text({**row.patch, **row.increments})]
    parts += [f"{name} unset" for name in row.unset]
    return output.shortened(", ".join(part for part in parts if part), 200)


def ls(
    store: options.Store,
    machine: Annotated[
        str | None, typer.Argument(metavar="MACHINE", help="The machine's name; with --stuck it may be left out.")
    ] = None,
    state: Annotated[str | None, typer.Option("--state", metavar="STATE", help="Only those in this state.")] = None,
    older_than: Annotated[
        str | None, typer.Option("--older-than", metavar="TIME", help="Only those there for so long: 10s, 10m, 2h, 3d.")
    ] = None,
    stuck: Annotated[
        bool, typer.Option("--stuck", help="Only those past their state's timeout that no event moves on.")
    ] = False,
    limit: Annotated[
        int, typer.Option("--limit", metavar="N", help="How many at most.", min=1, max=options.COUNT_MAX)
    ] = 100,
) -> None:
    """Instances of a machine, those first that have been longest where they are. From SQL, as of the watermark.

    With --stuck those first that are longest past their state's timeout; without MACHINE those of all machines.

    With --json one list of objects.
    """
    age = None if older_than is None else arguments.duration("--older-than", older_than)
    if machine is None and not (stuck and state is None):
        raise errors.InvalidDataError("MACHINE is missing: only --stuck without --state tells of all machines")
    with store.look() as cache:
        if machine is not None:
            found = cache.machine(machine).find(state, older_than=age, stuck=stuck, limit=limit)
        else:
            found = cache.stuck(older_than=age, limit=limit)
    if store.as_json:
        output.emit([output.snapshot_document(one) for one in found])
        return
    rows = [
        (
            one.id if machine else f"{one.machine}:{one.id}", one.state, one.version, output.moment(one.updated_ms),
            output.shortened(output.data_text(one.data)),
        )
        for one in found
    ]  # fmt: skip
    if rows:
        output.console().print(output.table(["id", "state", "version", "since", "data"], rows, right=["version"]))
    full = f" (--limit {limit}: there may be more)" if len(found) == limit else ""
    output.say(f"{output.counted(len(found), 'instance')}{full}")


def start(
    store: options.Store,
    address: Address,
    data: Data = None,
    set_: Set = [],  # noqa: B006 - typer makes a list of its own for each call
    actor: Actor = None,
    reason: Reason = None,
    transition_id: TransitionId = None,
    durability: Durability = None,
    timeout: Timeout = None,
) -> None:
    """Begin an instance, in its machine's initial state."""
    machine, id = arguments.address(address)
    fields = arguments.data(data, set_)
    with store.open_for_writing() as cache:
        receipt = cache.machine(machine).start(
            id, fields, actor=actor, reason=reason, transition_id=transition_id, durability=durability, timeout=timeout
        )
    _tell(store, receipt)


def transition(
    store: options.Store,
    address: Address,
    event: Annotated[str, typer.Argument(metavar="EVENT", help="The event to fire.")],
    data: Data = None,
    set_: Set = [],  # noqa: B006
    unset: Annotated[list[str], typer.Option("--unset", metavar="NAME", help="Remove a data field.")] = [],  # noqa: B006
    increment: Annotated[
        list[str], typer.Option("--increment", metavar="NAME=NUMBER", help="Add to a data field; a missing one is 0.")
    ] = [],  # noqa: B006
    actor: Actor = None,
    reason: Reason = None,
    expect_version: Annotated[
        int | None, typer.Option("--expect-version", metavar="N", help="Refuse if it is at another version.")
    ] = None,
    transition_id: TransitionId = None,
    durability: Durability = None,
    timeout: Timeout = None,
) -> None:
    """Fire an event: move an instance to its next state."""
    machine, id = arguments.address(address)
    fields = arguments.data(data, set_)
    increments = arguments.increments(increment)
    with store.open_for_writing() as cache:
        receipt = cache.machine(machine).transition(
            id, event, fields, unset=unset, increment=increments, actor=actor, reason=reason,
            expect_version=expect_version, transition_id=transition_id, durability=durability, timeout=timeout,
        )  # fmt: skip
    _tell(store, receipt)


def _tell(store: options.Store, receipt: model.Receipt) -> None:
    if store.as_json:
        output.emit(output.receipt_document(receipt))
        return
    before = f"{receipt.from_state} -> " if receipt.from_state else ""
    again = "; it had been applied before, under the same transition id" if receipt.duplicate else ""
    output.say(
        f"{receipt.machine}:{receipt.id} {before}{receipt.state}, version {receipt.version} "
        f"at {output.moment(receipt.at_ms)}{again}"
    )
