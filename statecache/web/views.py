"""What the pages show, gathered: from the store to a template's values. Shared by pages and live streams."""

from __future__ import annotations

import secrets
from typing import Any

from statecache.core import errors, model, spec
from statecache.engine import claims
from statecache.engine import status as engine_status
from statecache.engine.handle import MachineHandle
from statecache.web import drawing, story
from statecache.web.site import Site

CHAPTERS_MAX = 100
_OLDEST = 3
_LETTERS_MAX = 100


def instance(
    site: Site, machine: str, id: str, version: int | None = None, before: int | None = None
) -> dict[str, Any]:
    """One instance as it is, or as it was at ``version``; of a long history the part that ends before ``before``.

    Raises ``NotFoundError``.
    """
    handle = site.handle(machine)
    now = handle.get(id)
    rows = handle.history(id)
    shown = now if version is None else handle.at(id, version=version)
    told = story.chapters(handle.machine, rows)
    way_rows = [row for row in rows if row.version <= shown.version]
    page = [one for one in told if before is None or one.row.version < before]
    return {
        **_picture(site, handle, shown, way_rows),
        "machine": machine,
        "machine_title": handle.machine.spec.title or machine,
        "id": id,
        "now": now,
        "shown": shown,
        "past": version is not None and version != now.version,
        "state": story.state_title(handle.machine, shown.state),
        "chapter": next((one for one in reversed(told) if one.row.version == shown.version), None),
        "chapters": page[-CHAPTERS_MAX:][::-1],
        "older": page[-CHAPTERS_MAX].row.version if len(page) > CHAPTERS_MAX else None,
        "newer": before is not None,
        "stays": story.stays(told),
        "data": story.data_of(shown.data),
        "events": [(event, story.event_title(handle.machine, event)) for event in now.available_events],
        "transition_id": f"web:{secrets.token_urlsafe(12)}",
        "holder": claims.holder(handle, id) if version is None else None,
        "letters": site.cache.durable.letters(machine, id) if now.parked else [],
        "key": key(now, rows),
    }


def key(now: model.Snapshot, rows: list[model.Transition]) -> str:
    """What must change for the page to be another one."""
    return f"{now.version}.{sum(row.durable for row in rows)}.{int(now.parked)}"


def _picture(site: Site, handle: MachineHandle, shown: model.Snapshot, rows: list[model.Transition]) -> dict[str, Any]:
    """The diagram, on the latest version of the machine that knows the state: an old instance may be older than that."""
    declared = handle.machine.spec
    if shown.state not in handle.machine.definition.states:
        found = site.cache.durable.machine(handle.name, shown.machine_version)
        declared = (found and spec.readable(found[2])) or declared
    way = drawing.Way(shown.state, [(row.from_state, row.to_state) for row in rows])
    line = spec.steps(declared)
    return {"picture": drawing.of_instance(declared, way), "step": story.step(line, shown.state)}


def machines(site: Site) -> list[dict[str, Any]]:
    """Every machine and its instances by state, for the overview."""
    found = []
    for name in site.machine_names():
        handle = site.handle(name)
        counts = handle.counts()
        found.append(
            {
                "name": name,
                "title": handle.machine.spec.title,
                "version": handle.machine.definition.version,
                "instances": sum(counts.values()),
                "open": sum(n for state, n in counts.items() if state not in handle.machine.definition.finals),
                "states": _counted(handle, counts),
            }
        )
    return found


def _counted(handle: MachineHandle, counts: dict[str, int]) -> list[dict[str, Any]]:
    """States with their instances, as declared; those that only older versions knew last."""
    whole = sum(counts.values())
    names = [
        *handle.machine.definition.states,
        *(name for name in counts if name not in handle.machine.definition.states),
    ]
    return [
        {
            "name": name,
            "title": story.state_title(handle.machine, name),
            "count": counts.get(name, 0),
            "share": counts.get(name, 0) / whole if whole else 0.0,
            "final": name in handle.machine.definition.finals,
        }
        for name in names
    ]


def machine(site: Site, name: str) -> dict[str, Any]:
    """One machine: counts, diagram, and who has been in each state longest. Raises ``NotFoundError``."""
    handle = site.handle(name)
    counts = handle.counts()
    states = _counted(handle, counts)
    stuck = site.cache.timeouts.stuck_counts()
    for state in states:
        state["stuck"] = stuck.get((name, state["name"]), 0)
        known = state["name"] in handle.machine.definition.states
        wanted = state["count"] and not state["final"] and known
        state["oldest"] = handle.find(state["name"], limit=_OLDEST) if wanted else []
    return {
        "name": name,
        "title": handle.machine.spec.title or name,
        "version": handle.machine.definition.version,
        "instances": sum(counts.values()),
        "states": states,
        "picture": drawing.of_counts(handle.machine.spec, counts),
        "large": len(states) > drawing.LARGE_STATES,
    }


def health(site: Site) -> dict[str, Any]:
    """How the store is doing. Raises ``UnavailableError`` when SQL is away."""
    found, parked = site.status()
    instances = site.cache.durable.parked_instances(_LETTERS_MAX) if parked else []
    letters = [(one, site.cache.durable.letters(*one)) for one in instances]
    return {
        "status": found,
        "ready": found.redis == engine_status.READY,
        "parked": parked,
        "letters": [(instance, waiting) for instance, waiting in letters if waiting],
    }


def search(site: Site, text: str, limit: int) -> dict[str, Any]:
    """What an id, an address or the beginning of an id names."""
    exact = site.exact(text)
    known = {(one.machine, one.id) for one in exact}
    similar = [one for one in site.similar(text, limit + len(exact)) if (one.machine, one.id) not in known]
    names = {one.machine for one in exact} | {one.machine for one in similar}
    return {
        "exact": exact,
        "similar": similar[:limit],
        "more": len(similar) > limit,
        "titles": {name: titles(site.handle(name)) for name in names},
    }


def titles(handle: MachineHandle) -> dict[str, str]:
    """What people call the states."""
    return {state: story.state_title(handle.machine, state) for state in handle.machine.definition.states}


def problem(error: Exception) -> str | None:
    """What an operator should look at next, for the error page."""
    if isinstance(error, errors.UnavailableError):
        return "A server does not answer. The page comes back when it does."
    if isinstance(error, errors.RecoveringError):
        return "Redis is being reconciled with SQL. Try again in a moment."
    return None
