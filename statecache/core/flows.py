"""What a call does between its I/O steps, written once for every driver.

A flow is a generator: it yields what it wants done (an ``Item`` to apply, a ``Lookup`` in SQL, an ``Admit`` ...) and is sent
the answer. It does no I/O, reads no clock and knows no thread; a driver of a few dozen lines (``engine/driver.py``, and one
for asyncio) does what it asks, and may do the wishes of many flows in one exchange.

What a transition can meet, and what its flow does then:

- ``MISS``: the instance is not hot. SQL is looked up in ONE snapshot (watermark, checkpoint, letters); the answer counts
  only if that watermark is at or above what Redis has dropped (``evicted_to``), else SQL is older than Redis: an instance
  evicted after SQL's backup was taken would come back at an old version and fork (H9). Then hydrate, and begin again at apply.
- ``EPOCH``, ``IDENTITY``, ``RECOVERING``, ``NOSCRIPT``: this Redis is not the one that was found true. Admission decides;
  then the item begins again at apply, and nothing that was read before is used (H10).
- ``LOST``: it may have been applied. The same item goes again, with the same transition id, marked as a repetition: the
  ring answers ``DUP``, or ``OLD`` when it has dropped ids (H16), and then history knows.
- ``FULL``: writers have outrun SQL: wait within the deadline, then ``BackpressureError``.

Rejected: a reply that hydrates and applies in one script (it would need SQL's snapshot before knowing that it is needed);
exceptions between the layers (a bulk call has one outcome per item).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from typing import Any, NamedTuple

import msgspec

from statecache.core import codec, entry, errors, fold, items, model, wording
from statecache.core.definition import Definition

# --- what a flow may yield, beside an Item (answered by an Outcome) ----------------------------------------------------


class Admit(NamedTuple):
    """Make sure that Redis is true and the stamp is its epoch's. Answered by None; raises when that cannot be had."""

    code: str


class Pause(NamedTuple):
    """Wait a little, longer with each attempt. Answered by False when the call's deadline has passed."""

    attempt: int
    why: str


class Lookup(NamedTuple):
    """Read an instance's checkpoint, letters and watermark from SQL in one snapshot. Answered by a ``model.Lookup``."""

    partition: int
    machine: str
    id: str


class Hydrate(NamedTuple):
    """Bring a checkpoint back into Redis. Answered by a reply code of ``hydrate.lua``, or ``OOM``, and an outcome or None.

    The item may be sent right behind: it is judged as ever, whatever became of the hydration. None: it was not sent.
    """

    found: model.Lookup
    item: items.Item | None = None


class Unpark(NamedTuple):
    """Drop a parked hash of which SQL holds no open letter. Answered by the reply's line of ``evict.lua``."""

    partition: int
    machine: str
    id: str
    found: model.Lookup


class Find(NamedTuple):
    """Find a committed transition by version or by id, in the unflushed log, then in SQL. Answered by it or None."""

    partition: int
    machine: str
    id: str
    version: int | None
    transition_id: str | None


class Hot(NamedTuple):
    """Read a hash. Answered by its fields, empty if it is not hot."""

    partition: int
    machine: str
    id: str


class Where(NamedTuple):
    """Ask ``meta`` what is cold, and whether it is admitted. Answered by (admission code or ``OK``, cold, evicted_to)."""

    partition: int


class Version(NamedTuple):
    """Ask for an instance's version in Redis. Answered by it, or None if it is not hot."""

    partition: int
    machine: str
    id: str


class Unflushed(NamedTuple):
    """Read an instance's entries behind the watermark, or in the whole log. Answered by (code, entries)."""

    partition: int
    machine: str
    id: str
    whole: bool


class Recorded(NamedTuple):
    """Read an instance's history rows from SQL. Answered by transitions in order of version."""

    machine: str
    id: str


Wish = items.Item | Admit | Pause | Lookup | Hydrate | Unpark | Find | Hot | Where | Version | Unflushed | Recorded
Flow = Generator[Wish, Any, Any]

_MISSES_MANY = 8
"""Misses of one call after which it waits in between: its instance is evicted again before it can be moved."""


class Request(msgspec.Struct, gc=False):
    """One transition or start as a caller wants it, checked and packed. ``own_id`` tells that the caller gave the id."""

    item: items.Item
    address: str
    own_id: bool
    definition: Definition
    expect_version: int | None = None
    guard: Guard | None = None


class Guard(msgspec.Struct):
    """The predicates of an event by source state, and how to build the snapshot that they look at."""

    predicates: Mapping[str, Callable[[model.Snapshot], bool]]
    snapshot_of: SnapshotOf


SnapshotOf = Callable[[str, Mapping[bytes, bytes], str], model.Snapshot]
"""Builds a snapshot from an id, the fields of a hash, and where they came from (``hot`` or ``durable``)."""

NEVER_MATCHES = -1
"""An expected version that no instance has: the item can only turn out to be a duplicate."""


# --- transitions -------------------------------------------------------------------------------------------------------


def opening(request: Request) -> items.Item | None:
    """The item that a transition's flow begins with, if it begins with one and not with a look at the instance.

    What nearly every transition meets is ``OK``: so a driver may send the opening by itself, make the ``receipt``, and need
    no flow; any other outcome it hands to ``transition``, which goes on from there.
    """
    if request.guard is not None:
        return None
    request.item.retry = request.own_id
    return request.item


def receipt(request: Request, outcome: items.Outcome) -> model.Receipt:
    """What the caller gets for ``OK``. Raises ``DurabilityTimeout`` if what was asked behind the script was not confirmed."""
    item = request.item
    move = item.move
    version, entry_id, source, target = outcome.words
    made = model.Receipt(
        move.machine, item.id, move.event, None if source == "-" else source, target, int(version), entry_id,
        outcome.at_ms, item.transition_id,
    )  # fmt: skip
    return made if outcome.confirmed else _confirmed(outcome, made)


def transition(request: Request, answered: items.Outcome | None = None) -> Generator[Wish, Any, model.Receipt]:
    """Apply one start or transition; returns its receipt or raises the caller's error.

    ``answered`` is the outcome of its ``opening``, if that was sent already.
    """
    item = request.item
    item.retry = request.own_id
    attempt = 0
    misses = vanished = 0
    verdict: errors.StateCacheError | None = None
    guard_wanted = request.guard is not None
    is_open = False  # an attempt may have been applied, and no script has said since that it was not
    try:
        while True:
            if guard_wanted:
                verdict = yield from _consult_guard(request)
                guard_wanted = False
            outcome: items.Outcome
            if answered is None:
                outcome = yield item
            else:
                outcome, answered = answered, None
            code = outcome.code
            is_open = code in ("LOST", "DUP") or (is_open and code in _NO_JUDGEMENT)
            if code == "OK":
                return receipt(request, outcome)
            if code == "DUP":
                found: model.Receipt | None = yield from _duplicate(request, int(outcome.words[0]), last=vanished > 0)
                if found is not None:
                    return _confirmed(outcome, found)
                vanished += 1  # a recovery came between: begin again
                continue
            if code == "MISS":
                misses += 1
                attempt, answered = yield from _miss(request, outcome, attempt, misses)
            elif code in items.ADMISSION_CODES:
                yield Admit(code)
                # Nothing that was read before is used: begin again.
                item.absent, item.expected = "", request.expect_version or 0
                item.asked = 0 if request.own_id else item.expected
                guard_wanted = request.guard is not None
            elif code in _PAUSES:
                item.retry = item.retry or code == "LOST"
                attempt = yield from _pause(request, outcome, attempt)
            elif code == "PARKED":
                waiting = yield from _parked(request)
                if waiting is not None:
                    return _confirmed(outcome, waiting)
            elif code == "OLD":
                known = yield from _long_ago(request)
                if known is not None:
                    return _confirmed(outcome, known)
                is_open = False
                item.asked = int(outcome.words[0])
                if request.guard is not None:
                    guard_wanted = _pin(request, item.asked, verdict)
                # Else whether it may be applied is not judged here: what stands before it in a list was answered OLD too.
            elif code == "VERSION":
                guard_wanted = _pin(request, int(outcome.words[0]), verdict)
            else:
                raise _refusal(request, outcome)
    except _NO_VERDICTS as error:
        if is_open:
            raise errors.UnavailableError(
                f"{request.address}: it may have been applied; repeat it with the same transition_id ({error})"
            ) from error
        raise


_NO_JUDGEMENT = frozenset({"LOST", "UNSENT", "UNREADY", "OOM", "MISS", "OLD", "ERROR", *items.ADMISSION_CODES})
"""Answers that do not tell whether an earlier attempt was applied."""
_NO_VERDICTS = (errors.RecoveringError, errors.BackpressureError, errors.ConfigurationError)
"""What a caller must take for "not applied": true only if no attempt is open."""


def _confirmed(outcome: items.Outcome, made: model.Receipt) -> model.Receipt:
    """The script wrote (a duplicate too), and what was asked behind it on the same connection speaks of that write."""
    if not outcome.confirmed:
        raise errors.DurabilityTimeout(
            f"{made.machine}:{made.id} version {made.version} stands, but its durability was not confirmed in time",
            made,
        )
    return made


def _pin(request: Request, version: int, verdict: errors.StateCacheError | None) -> bool:
    """The instance is at another version than the item's: refuse, or ask for this version. True = consult the guard again.

    What may happen until it is sent again is refused by the script, because the item then names this version; that a repetition
    is not applied up to some version (history was asked) is another matter, which ``Item.asked`` tells it (H16).
    """
    if verdict is not None:
        raise verdict
    if request.expect_version is not None and request.expect_version != version:
        raise errors.StaleVersionError(
            f"{request.address} is at version {version}, not at {request.expect_version}: somebody moved it",
            request.expect_version,
            version,
        )
    request.item.expected = version
    return request.guard is not None


def _consult_guard(request: Request) -> Generator[Wish, Any, errors.StateCacheError | None]:
    """Ask the guard about the instance as it is, and pin the item to the version that it saw.

    A refusal is returned, not raised: the call may be the repetition of one that was applied, so the item is sent with a
    version that cannot match, and the refusal is raised when it turns out to be no duplicate.
    """
    item, guard = request.item, request.guard
    assert guard is not None
    seen = yield from snapshot(item.partition, item.move.machine, item.id, guard.snapshot_of)
    item.expected, item.pinned = seen.version, True
    predicate = guard.predicates.get(seen.state)
    if request.expect_version not in (None, seen.version):
        item.expected = NEVER_MATCHES
        return None
    try:
        if predicate is None or predicate(seen):
            return None
    except errors.DefinitionError as error:  # nothing is bound to its name
        item.expected = NEVER_MATCHES
        return error
    except wording.MISTAKES as error:
        item.expected = NEVER_MATCHES
        failed = errors.DefinitionError(
            f"{request.address}: the guard of {item.move.event!r} failed in state {seen.state!r} at version {seen.version}: "
            f"{type(error).__name__}: {error}"
        )
        failed.__cause__ = error
        return failed
    item.expected = NEVER_MATCHES
    return errors.InvalidTransitionError(
        f"{request.address}: the guard of {item.move.event!r} refused it in state {seen.state!r} at version {seen.version}",
        seen.state,
        item.move.event,
        request.definition.available_events(seen.state),
    )


_PAUSES = frozenset({"FULL", "OOM", "LOST", "UNSENT", "UNREADY"})


def _pause(request: Request, outcome: items.Outcome, attempt: int) -> Generator[Wish, Any, int]:
    if (yield Pause(attempt, outcome.code)):
        return attempt + 1
    if outcome.code == "FULL":
        raise errors.BackpressureError(
            f"{request.address}: not applied: its partition's backlog has reached its limit, because writers outrun the "
            "flusher or SQL is away; slow down, see 'statecache status'"
        )
    assert outcome.cause is not None
    raise outcome.cause


def _refusal(request: Request, outcome: items.Outcome) -> errors.StateCacheError:
    item, words, address = request.item, outcome.words, request.address
    if outcome.code == "EXISTS":
        return errors.AlreadyExistsError(f"{address} exists already, at version {words[0]}")
    if outcome.code == "STATE" and codec.NAME.fullmatch(words[0]):
        definition, state = request.definition, words[0]
        allowed = definition.available_events(state)
        none = "none"
        if state in definition.finals:
            none = "none, it is final"
        elif state not in definition.states:
            none = f"none, version {definition.version} of the machine has no such state"
        return errors.InvalidTransitionError(
            f"{address} is in state {state!r}, where {item.move.event!r} is no move of machine {item.move.machine!r}; "
            f"allowed: {', '.join(allowed) or none}",
            state,
            item.move.event,
            allowed,
        )
    if outcome.code == "FENCED":
        return fenced_error(address, words[0], int(words[1]), claimed=bool(item.claim))
    if outcome.code == "DATA":
        rule, subject = words
        if rule == "fields":
            return errors.InvalidDataError(
                f"{address}: the data is refused: it would have {subject} fields, more than an instance may have"
            )
        return errors.InvalidDataError(
            f"{address}: increment of field {subject!r} is refused: "
            + ("it holds no number" if rule == "number" else "the result leaves the range of exact numbers")
        )
    if outcome.code == "ERROR" and isinstance(outcome.cause, errors.StateCacheError):
        return outcome.cause
    return errors.IntegrityError(
        f"{address}: its key in Redis holds something that statecache did not write ({outcome.code})"
    )


def fenced_error(address: str, worker: str, expires_ms: int, *, claimed: bool) -> errors.FencedError:
    """What a caller is told whom a claim keeps out; ``worker`` is ``-`` when nobody holds the instance."""
    held = "" if worker == "-" else f"{worker} holds it until {model.datetime_of(expires_ms):%Y-%m-%d %H:%M:%S} UTC"
    if claimed:
        lost = f"the claim on {address} is no longer in force: it has expired, was released, or went with the hot copy"
        return errors.FencedError(f"{lost}; {held or 'claim it again'}", worker if held else "", expires_ms)
    return errors.FencedError(f"{address} is claimed: {held}", worker, expires_ms)


def _duplicate(request: Request, version: int, *, last: bool) -> Generator[Wish, Any, model.Receipt | None]:
    """Complete the receipt of a transition that was applied before (P4). A ring's token is 48 bits of the id's hash, so
    the full id is compared: a collision is an error, never a swallowed transition. None: it is there no more."""
    item = request.item
    known = yield Find(item.partition, item.move.machine, item.id, version, None)
    if known is None and not last:
        return None
    if known is None:
        raise errors.IntegrityError(
            f"{request.address}: by its transition_id this was applied before, as version {version}, whose row neither the log "
            "nor SQL has: retention takes out those of instances that ended long ago. Do not repeat it under another id; if "
            "nothing was taken out, run 'statecache verify'"
        )
    if known.transition_id != item.transition_id:
        if known.covers_from is not None:
            raise errors.IntegrityError(
                f"{request.address}: by its transition_id this was applied before, as version {version}; of versions "
                f"{known.covers_from} to {known.version} one row is all that SQL has ({known.event}), so the receipt cannot "
                "be told. Do not repeat it under another id"
            )
        raise errors.InvalidDataError(
            f"{request.address}: transition_id {item.transition_id!r} is refused: its hash is that of {known.transition_id!r}, "
            "applied before; choose another one"
        )
    return _receipt_of(request, known)


def _receipt_of(request: Request, known: model.Transition) -> model.Receipt:
    event = request.item.move.event  # what a row that stands for several versions does not tell
    if known.event != event and known.covers_from is None:
        raise errors.InvalidDataError(
            f"{request.address}: transition_id {known.transition_id!r} is refused: it was used before, for the event "
            f"{known.event!r} at version {known.version}; an id names one transition"
        )
    return model.Receipt(
        known.machine, known.id, event, known.from_state, known.to_state, known.version, known.entry_id, known.at_ms,
        known.transition_id, duplicate=True,
    )  # fmt: skip


def _long_ago(request: Request) -> Generator[Wish, Any, model.Receipt | None]:
    """Was it applied before, though the ring does not hold its id (any more)? (H16)"""
    item = request.item
    known = yield Find(item.partition, item.move.machine, item.id, None, item.transition_id)
    return None if known is None else _receipt_of(request, known)


def _miss(
    request: Request, outcome: items.Outcome, attempt: int, misses: int
) -> Generator[Wish, Any, tuple[int, items.Outcome | None]]:
    """Look a cold instance up and bring it back, or establish that it does not exist; returns the number of attempts, and
    the item's outcome if it was sent along."""
    item = request.item
    cold, evicted_to = outcome.words
    starting = "" in item.move.targets
    if cold == "0":
        raise errors.NotFoundError(f"{request.address} does not exist")
    found: model.Lookup = yield Lookup(item.partition, item.move.machine, item.id)
    if found.watermark < entry.EntryId.parse(evicted_to):
        return (yield from sql_is_older(request.address, attempt)), None
    if found.checkpoint is None:
        if found.letters:
            return attempt, _PARKED
        if not starting:
            raise errors.NotFoundError(f"{request.address} does not exist")
        item.absent, item.asked_under = str(found.watermark), found.asked_under
        return attempt, None
    code, sent = yield Hydrate(found, item)
    if sent is not None and sent.code != "MISS":
        return attempt, sent
    if code in items.ADMISSION_CODES:
        yield Admit(code)
    elif code == "OOM":
        return (yield from no_room(request.address, attempt)), None
    elif misses > 1:
        if code == "EXISTS":
            fields = yield Hot(item.partition, item.move.machine, item.id)
            if fields and b"@" not in fields:
                raise errors.IntegrityError(
                    f"{request.address}: its key in Redis is there, but is no instance; run 'statecache verify'"
                )
        if misses > _MISSES_MANY:
            return (yield from no_room(request.address, attempt)), None
    return attempt, None


def no_room(address: str, attempt: int) -> Generator[Wish, Any, int]:
    if not (yield Pause(attempt, "OOM")):
        raise errors.BackpressureError(
            f"{address}: not applied: Redis has no room to bring a cold instance back; give it more memory (maxmemory), or "
            "let more be evicted (hot_memory_share, hot_ttl_seconds)"
        )
    return attempt + 1


def sql_is_older(address: str, attempt: int) -> Generator[Wish, Any, int]:
    if not (yield Pause(attempt, "STALE")):
        raise errors.IntegrityError(
            f"{address}: SQL is older than what Redis has dropped: if no flusher runs, or it is behind, run 'statecache "
            "flusher --once' and try again; if that does not help, SQL was restored from a backup: run 'statecache recover'"
        )
    return attempt + 1


_PARKED = items.Outcome("PARKED", [])
"""What the script would say of an instance of which SQL has letters only."""


def _parked(request: Request) -> Generator[Wish, Any, model.Receipt | None]:
    """Refuse, unless SQL holds no open letter any more: then the parked hash is stale and is dropped. The repetition of what
    waits as a letter gets its receipt: the ring of a hash that was brought back does not hold it."""
    item = request.item
    found: model.Lookup = yield Lookup(item.partition, item.move.machine, item.id)
    if found.letters:
        known = (yield from _long_ago(request)) if item.token in found.letters else None
        if known is None:
            raise parked_error(request.address, found)
        return known
    code = yield Unpark(item.partition, item.move.machine, item.id, found)
    if code == "KEPT unflushed":
        raise errors.ParkedError(f"{request.address} is parked: entries of it are not in SQL yet; try again")
    return None


def parked_error(address: str, found: model.Lookup) -> errors.ParkedError:
    """What a caller is told of an instance that has open letters."""
    return errors.ParkedError(
        f"{address} is parked: SQL refused an entry of it, {len(found.letters)} wait; see "
        f"'statecache dead-letters list {address}'"
    )


# --- reads -------------------------------------------------------------------------------------------------------------


def snapshot(
    partition: int, machine: str, id: str, snapshot_of: SnapshotOf, *, missed: bool = False
) -> Generator[Wish, Any, model.Snapshot]:
    """Read an instance: from its hash, or from its checkpoint when it is cold. ``missed``: its hash was not there just now.

    It stays cold: a report over many old instances must not push out those that are at work.
    """
    attempt = 0
    while True:
        fields = None if missed else (yield Hot(partition, machine, id))
        missed = False
        if fields:
            return snapshot_of(id, fields, "hot")
        code, cold, evicted_to = yield Where(partition)
        if code != "OK":
            yield Admit(code)
            continue
        if not cold:
            raise errors.NotFoundError(f"{machine}:{id} does not exist")
        found: model.Lookup = yield Lookup(partition, machine, id)
        if found.watermark < evicted_to:
            attempt = yield from sql_is_older(f"{machine}:{id}", attempt)
            continue
        if found.checkpoint is None:
            if (
                found.letters
            ):  # all there is of it are entries that SQL refused: it exists, in no state that SQL could tell
                raise parked_error(f"{machine}:{id}", found)
            raise errors.NotFoundError(f"{machine}:{id} does not exist")
        return snapshot_of(id, hash_of(found), "durable")


def hash_of(found: model.Lookup) -> dict[bytes, bytes]:
    """The fields of the hash that a checkpoint is hydrated to."""
    assert found.checkpoint is not None
    own, ring, texts = hash_texts(found)
    return {b"@": own.encode(), b"@r": ring.encode(), **{name.encode(): bytes(text) for name, text in texts.items()}}


def hash_texts(found: model.Lookup) -> tuple[str, str, dict[str, msgspec.Raw]]:
    """``@``, ``@r`` and the fields' JSON texts by name, of the hash that a checkpoint and its open letters are hydrated to.

    Open letters park it (H12): a repetition of one of them is told so, and not applied again.
    """
    kept = found.checkpoint
    assert kept is not None
    own = f"{kept.state} {kept.version} {kept.entry_id} {kept.created_ms} {kept.machine_version} {kept.updated_ms}"
    try:
        texts = fold.texts_of(kept.data)
    except codec.UNREADABLE as error:
        raise errors.IntegrityError(
            f"{kept.machine}:{kept.id}: the data of its checkpoint in SQL is no JSON object ({error}): not written by "
            "statecache; run 'statecache verify'"
        ) from error
    return flagged(own, len(texts), parked=bool(found.letters)), kept.recent, texts


WIDE_ABOVE = 64
"""An instance with more data fields than this has a flag in its hash: only of such are fields counted before each patch."""


def flagged(own: str, field_count: int, *, parked: bool = False) -> str:
    """``@`` with the flags of an instance with so many data fields."""
    flags = ("p" if parked else "") + ("w" if field_count > WIDE_ABOVE else "")
    return f"{own} {flags}" if flags else own


def history(partition: int, machine: str, id: str) -> Generator[Wish, Any, list[model.Transition]]:
    """All transitions of an instance, those too that are not in SQL yet.

    SQL first, then the log: what was flushed in between is missing from the log, which shows as a gap, or as a hash that is
    further on than both; SQL is read again. No answer is given with a gap in it, and none is called a loss that was only seen
    once, however little time there was. What a cold instance has is all in SQL: only if SQL is no older than what Redis has
    dropped (H9), and its rows no older than that look.
    """
    attempt = 0
    before = -1
    trimmed = 0  # up to this version a log had let go of it before SQL was read: SQL has it, or nothing has
    whole = False
    while True:
        hot_version = yield Version(partition, machine, id)
        rows: list[model.Transition] = yield Recorded(machine, id)
        if hot_version is not None and rows and rows[-1].version >= hot_version:
            return rows
        code, entries = yield Unflushed(partition, machine, id, whole)
        if code != "OK":
            yield Admit(code)
            continue
        version = rows[-1].version if rows else 0
        fresh = [record for record in entries if record.version > version]
        if not fresh and hot_version is not None and hot_version > version > before:
            before, whole = version, True  # flushed between the two reads, or SQL went back; else it is parked
            continue
        if not fresh or fresh[0].version == version + 1:
            if hot_version is not None:
                break
            code, cold, evicted_to = yield Where(partition)
            if code != "OK":
                yield Admit(code)
                continue
            if not cold:
                break
            found: model.Lookup = yield Lookup(partition, machine, id)
            if found.watermark < evicted_to:
                attempt = yield from sql_is_older(f"{machine}:{id}", attempt)
                continue
            reached = fresh[-1].version if fresh else version
            if found.checkpoint is None or not found.checkpoint.version > reached > before:
                break
            before = reached  # flushed between the two looks at SQL; else its rows are not whole, which verify tells
            continue
        whole = True
        if not (yield Pause(attempt, "GAP")):
            if version < trimmed:
                raise errors.IntegrityError(
                    f"{machine}:{id}: versions {version + 1} to {fresh[0].version - 1} are neither in SQL nor in the log; "
                    "run 'statecache verify'"
                )
            if attempt:
                raise errors.UnavailableError(
                    f"{machine}:{id}: its history could not be read in time: it went on to SQL meanwhile; give it more time"
                )
        trimmed = fresh[0].version - 1
        attempt += 1
    if not rows and not fresh:
        raise errors.NotFoundError(f"{machine}:{id} does not exist")
    return rows + [transition_of(record) for record in fresh]


def transition_of(record: entry.Entry) -> model.Transition:
    """An entry of the log as history tells it. Raises ``IntegrityError`` for one whose data no reader can be shown."""
    try:
        patch, increments = _fields(record.patch), _fields(record.increments)
    except codec.UNREADABLE as error:
        raise errors.IntegrityError(
            f"{record.machine}:{record.id}: entry {record.entry_id} of the log holds data that cannot be read: not written "
            f"by statecache; see 'statecache dead-letters list {record.machine}:{record.id}'"
        ) from error
    return model.Transition(
        record.machine, record.id, record.version, record.event, record.from_state or None, record.to_state, record.at_ms,
        record.transition_id, record.actor or None, record.reason or None,
        int(record.occurred_ms) if record.occurred_ms else None, patch, tuple(record.unset.split()), increments,
        record.machine_version, str(record.entry_id), False,
    )  # fmt: skip


def _fields(text: str) -> dict[str, Any]:
    return _decode_fields(text) if text else {}


_decode_fields = msgspec.json.Decoder(dict[str, Any]).decode
