"""From a caller's arguments to a checked, packed request: the door of promise P12. Nothing is sent before all is checked."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from statecache.core import claims, codec, entry, errors, flows, items, keys, model, patch, wording
from statecache.core.definition import Definition, Guard

_SEPARATOR = entry.SEPARATOR
_NOTHING_BETWEEN = 3 * _SEPARATOR  # between actor and patch: no reason, no time of the caller's
_NO_PATCH: codec.Encoded = ((), [], "")


class Door:
    """Builds the requests of one machine. Thread-safe."""

    def __init__(
        self,
        definition: Definition,
        guards: Mapping[str, Guard],
        partition_count: int,
        limits: codec.Limits,
        ids: codec.TransitionIds,
        snapshot_of: flows.SnapshotOf,
    ) -> None:
        self.definition = definition
        self._partition_count = partition_count
        self._limits = limits
        self._ids = ids
        version, deadlines_ms = definition.version, definition.deadlines_ms
        self._start = items.MoveSpec(
            definition.name, entry.EVENT_START, {"": definition.initial}, version, deadlines_ms
        )
        self._moves = {
            event: items.MoveSpec(definition.name, event, targets, version, deadlines_ms)
            for event, targets in definition.targets.items()
        }
        self._guards = _guards_by_event(definition, guards, snapshot_of)
        self._validate_patch = definition.validate_patch

    def partition_of(self, id: str) -> int:
        return keys.partition_of(self.definition.name, id, self._partition_count)

    def check_id(self, id: object) -> str:
        return codec.check_text("id", id, self._limits.id_length_max)

    def check_ids(self, ids: Sequence[object]) -> list[errors.InvalidDataError | None]:
        """The error of each id that is refused, None for the others."""
        return codec.check_texts("id", ids, self._limits.id_length_max)

    def start(
        self,
        id: str,
        data: Mapping[str, Any] | None = None,
        *,
        actor: str | None = None,
        reason: str | None = None,
        transition_id: str | None = None,
        occurred_at: datetime | None = None,
        encoded: codec.Encoded | None = None,
    ) -> flows.Request:
        """A start as a request. ``encoded`` is its data, if that was encoded already."""
        move = model.Move(id, entry.EVENT_START, data, (), None, actor, reason, None, transition_id, occurred_at)
        return self._request(self._start, move, None, encoded)

    def starts(self, starts: Sequence[object], actor: str | None) -> list[flows.Request | errors.StateCacheError]:
        """Many starts as requests, or the error of each that is refused. ``actor`` is that of those that name none."""

        def one(start: Any, encoded: codec.Encoded | None) -> flows.Request:
            return self.start(
                start.id, start.data, actor=start.actor or actor, reason=start.reason, transition_id=start.transition_id,
                occurred_at=start.occurred_at, encoded=encoded,
            )  # fmt: skip

        def plain(start: Any) -> tuple[items.MoveSpec, str | None] | None:
            is_plain = start.transition_id is None and start.reason is None and start.occurred_at is None
            return (self._start, start.actor or actor) if is_plain else None

        return self._many(starts, one, plain)

    def transitions(self, moves: Sequence[object]) -> list[flows.Request | errors.StateCacheError]:
        """Many transitions as requests, or the error of each that is refused."""
        specs, guards = self._moves, self._guards

        def plain(move: Any) -> tuple[items.MoveSpec, str | None] | None:
            event = move.event
            is_plain = (
                type(event) is str and event not in guards and not move.unset and move.increment is None
                and move.transition_id is None and move.expect_version is None and move.reason is None
                and move.occurred_at is None and move.claim is None
            )  # fmt: skip
            return (specs[event], move.actor) if is_plain and event in specs else None

        return self._many(moves, self.transition, plain)

    def _many(
        self,
        wanted: Sequence[Any],
        one: Callable[[Any, codec.Encoded | None], flows.Request],
        plain: Callable[[Any], tuple[items.MoveSpec, str | None] | None],
    ) -> list[flows.Request | errors.StateCacheError]:
        """Build many requests: together those that ask for nothing but an event, data and an actor, the others one by one.

        What is an error already stays one. ``plain`` gives the move and the actor of one that may be among the former.
        """
        limits = self._limits
        results: list[Any] = [None] * len(wanted)
        together: list[tuple[int, items.MoveSpec, str | None, codec.Encoded]] = []
        ids: list[Any] = codec.plain_texts([getattr(each, "id", None) for each in wanted])
        refused = codec.check_texts("id", ids, limits.id_length_max)
        for place, (each, encoded) in enumerate(zip(wanted, self._patches(wanted), strict=True)):
            try:
                found = None if refused[place] or (encoded is None and each.data is not None) else plain(each)
                if found is None:
                    results[place] = each if isinstance(each, errors.StateCacheError) else one(each, encoded)
                    continue
                spec, actor = found
                if actor is not None:
                    actor = codec.check_text("actor", actor, limits.text_length_max)
                together.append((place, spec, actor, encoded or _NO_PATCH))
            except errors.StateCacheError as error:
                results[place] = error
            except wording.MISTAKES as error:  # a value of a class of the caller's: the others go through
                results[place] = _failed(ids[place], error)
        definition, begin = self.definition, f"{self.definition.name}:"
        encoded_ids = [ids[place].encode() for place, *_ in together]
        partitions = keys.partitions_of(self.definition.name, encoded_ids, self._partition_count)
        made_ids = self._ids.take(len(together))
        for (place, spec, actor, (names, texts, text)), made_id, partition in zip(
            together, made_ids, partitions, strict=True
        ):
            id = ids[place]
            tail = f"{made_id}{_SEPARATOR}{actor or ''}{_NOTHING_BETWEEN}{text}{_SEPARATOR}"
            item = items.Item(partition, id, spec, 0, codec.token_of(made_id), tail, names, texts, made_id)
            results[place] = flows.Request(item, begin + id, False, definition)
        return results

    def _patches(self, many: Sequence[object]) -> Sequence[codec.Encoded | None]:
        """The data of many transitions encoded at once, where that is all there is to do with it."""
        if self._validate_patch is not patch.unchecked:
            return [None] * len(many)
        return codec.encode_patches([getattr(each, "data", None) for each in many], self._limits)

    def transition(self, move: model.Move, encoded: codec.Encoded | None = None) -> flows.Request:
        """A transition as a request. ``encoded`` is its data, if that was encoded already. Raises ``InvalidTransitionError``
        for an event that the machine does not have."""
        event: object = codec.plain_text(move.event)
        spec = self._moves.get(event) if isinstance(event, str) else None
        if spec is None:
            name = self.definition.name
            raise errors.InvalidTransitionError(
                f"{name}:{move.id}: machine {name!r} has no event {wording.shown(event)}; it has {', '.join(self._moves)}",
                "",
                event if isinstance(event, str) else wording.shown(event),
                tuple(self._moves),
            )
        guard = self._guards.get(spec.event) if self._guards else None
        request = self._request(spec, move, guard, encoded)
        if type(move) is Unused:
            request.item.asked = move.expect_version or 0
        if move.claim is not None:
            request.item.claim = claims.check_token(move.claim)
        return request

    def _check_increments(self, increments: Sequence[Sequence[str]]) -> None:
        """Refuse to add to a field that the machine's data forbids, or declares to be no number, and a part to a whole number.

        What the sum will be only Redis knows, as others may add too: bounds are not checked.
        """
        for name, delta, kind in increments:
            types = self.definition.types_of(name)
            if "number" in types or (kind == "i" and "integer" in types):
                continue
            if not types:
                rule = "its data declares no such field"
            elif "integer" in types:
                rule = f"its data declares whole numbers, {delta} is a float"
            else:
                rule = f"its data declares no number there, but {' or '.join(sorted(types))}"
            raise errors.InvalidDataError(
                f"machine {self.definition.name!r}: the increment of {name!r} is refused: {rule}"
            )

    def _request(
        self, spec: items.MoveSpec, move: model.Move, guard: flows.Guard | None, encoded: codec.Encoded | None
    ) -> flows.Request:
        limits = self._limits
        id = codec.check_text("id", move.id, limits.id_length_max)
        data = move.data
        if encoded is not None:
            names, texts, text = encoded
        elif data or data not in (None, {}):
            names, texts, text = codec.encode_patch(self._validate_patch(data), limits)
        else:
            names, texts, text = (), [], ""
        dropped = codec.encode_unset(move.unset) if move.unset else []
        increments = codec.encode_increments(move.increment) if move.increment else []
        if dropped or increments:
            self._check_increments(increments)
            _check_disjoint(names, dropped, [name for name, *_ in increments], limits)
        made_id, own_id = move.transition_id, True
        if made_id is None:
            made_id, own_id = self._ids.next(), False
        else:
            made_id = codec.check_text("transition_id", made_id, limits.id_length_max)
        expect_version = move.expect_version
        if expect_version is not None:
            expect_version = _check_version(expect_version)
        actor, reason = move.actor, move.reason
        if actor is not None:
            actor = codec.check_text("actor", actor, limits.text_length_max)
        if reason is not None:
            reason = codec.check_text("reason", reason, limits.text_length_max)
        occurred = "" if move.occurred_at is None else _ms_of(move.occurred_at)
        tail = (
            f"{made_id}{_SEPARATOR}{actor or ''}{_SEPARATOR}{reason or ''}{_SEPARATOR}{occurred}{_SEPARATOR}{text}"
            f"{_SEPARATOR}{' '.join(dropped)}"
        )
        address = f"{spec.machine}:{id}"
        partition = keys.partition_of_address(address, self._partition_count)
        item = items.Item(
            partition, id, spec, expect_version or 0, codec.token_of(made_id), tail, names, texts, made_id
        )
        if dropped or increments:
            item.unset, item.increments = dropped, increments
        if expect_version is not None and not own_id:
            item.asked = expect_version  # what was sent before under this id expected the same version
        return flows.Request(item, address, own_id, self.definition, expect_version, guard)


class Unused(model.Move, frozen=True, gc=False):
    """A move whose transition id its caller knows to be unused up to the version that it expects: history is not asked."""


def _guards_by_event(
    definition: Definition, guards: Mapping[str, Guard], snapshot_of: flows.SnapshotOf
) -> dict[str, flows.Guard]:
    """The guards of each guarded event. One that nothing is bound to raises ``DefinitionError`` in its state, and no other."""
    found: dict[str, flows.Guard] = {}
    for event, source in definition.guards:
        predicate: Callable[[model.Snapshot], bool] | None
        try:
            predicate = definition.guard_for(event, source, guards)
        except errors.DefinitionError as error:
            predicate = functools.partial(_raise, error)
        guard = found.setdefault(event, flows.Guard({}, snapshot_of))
        if predicate is not None:
            guard.predicates = {**guard.predicates, source: predicate}
    return found


def _raise(error: errors.DefinitionError, seen: model.Snapshot) -> bool:
    raise error


def _check_disjoint(
    patched: Sequence[str], dropped: Sequence[str], increased: Sequence[str], limits: codec.Limits
) -> None:
    names = [*patched, *dropped, *increased]
    if len(names) > limits.patch_fields_max:
        raise errors.InvalidDataError(
            f"the transition is refused: it touches {len(names)} fields, at most {limits.patch_fields_max} are allowed"
        )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise errors.InvalidDataError(
            f"field {twice[0]!r} is refused: it stands in more than one of data, unset and increment (or twice in one)"
        )


def _check_version(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= int.__index__(value) < 2**53:
        raise errors.InvalidDataError(
            f"expect_version {wording.shown(value)} is refused: versions are whole numbers from 1 on"
        )
    return int.__index__(value)


def _ms_of(value: object) -> int:
    if not isinstance(value, datetime):
        raise errors.InvalidDataError(f"occurred_at {wording.shown(value)} is refused: it must be a datetime")
    try:
        ms = model.ms_of(value)
        model.datetime_of(ms)  # readers will be shown it
    except wording.MISTAKES as error:  # rounded beyond the year 9999, or before 1; a time zone that fails
        raise errors.InvalidDataError(
            f"occurred_at {wording.shown(value)} is refused: it is no time of the years 1 to 9999 in UTC"
        ) from error
    return ms


def _failed(id: object, error: Exception) -> errors.InvalidDataError:
    """What one element of a bulk call is told that nothing could be made of."""
    refused = errors.InvalidDataError(
        f"{wording.shown(id)} is refused: {type(error).__name__} while its arguments were looked at: {wording.shown(error)}"
    )
    refused.__cause__ = error
    return refused
