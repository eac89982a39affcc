"""The same model beside the async client, its calls in flight together: they gather in shared script calls, some are
cancelled on the way, and the server restarts, is flushed or evicts meanwhile.

What makes this exact: the writes of one instance are applied in the order in which they were called. So the model knows each
call's outcome, but for one bit of every cancelled call (applied or not), which history tells afterwards. A real server is
needed (the client speaks on a socket of its own); SQL is SQLite, or PostgreSQL with ``--real-servers``.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import rule, run_state_machine_as_test

from statecache.aio import AsyncMachineHandle
from statecache.core import errors, items, model
from tests.property.test_store_against_model import (
    EVENTS,
    IDS,
    LONG,
    MODEST,
    TARGETS,
    Record,
    Shape,
    StoreAgainstModel,
    empty_database,
    shapes,
)
from tests.support.worlds import World

TURNS_MAX = 40
"""The latest turn of the event loop at which a call is cancelled, if not right after it has left."""
ON_ITS_WAY = -1
MARK = "c"
"""A field that each call sets to a number of its own, by which history tells whose transition a row is."""


class Call(NamedTuple):
    """One call among those in flight. ``twin``: it repeats the last write of its instance, id and all, and is patient: so
    its receipt tells whether a cancelled original was applied, or only the twin."""

    id: str
    event: str
    shape: Shape
    own_id: bool
    expect_version: int | None
    cancel_at: int | None
    twin: bool


class Named(NamedTuple):
    """A call with its number, and its transition id if it has one of its own."""

    call: Call
    number: int
    transition_id: str | None

    @property
    def effect(self) -> Shape:
        """What it does to the data. An order begins with an amount, or without one, which ``approve`` wants."""
        shape, mark = self.call.shape, {MARK: self.number}
        if self.call.event == "@start":
            zeroes = dict.fromkeys(shape.unset, 0)
            return Shape({**shape.patch, **zeroes, **mark, "amount": self.number % 2}, (), {})
        return shape._replace(patch={**shape.patch, **mark})


calls = st.builds(
    Call,
    st.sampled_from(IDS[:3]),
    st.sampled_from(["@start", "get", *EVENTS, "approve", *["note"] * 9]),
    shapes,
    st.booleans(),
    st.one_of(st.none(), st.none(), st.none(), st.integers(1, 6)),
    st.one_of(st.none(), st.none(), st.none(), st.just(ON_ITS_WAY), st.integers(0, TURNS_MAX)),
    st.sampled_from([False, False, False, False, True]),
)


class AsyncStoreAgainstModel(StoreAgainstModel):
    """All rules of the sync one, done by the async client, and calls in flight together."""

    @rule(
        wanted=st.lists(calls, min_size=2, max_size=24),
        by_other=st.sets(st.sampled_from(IDS)),
        meanwhile=st.sampled_from(["nothing", "nothing", "flush", "evict", "restart"]),
        begun=st.sampled_from([True, True, False]),
    )
    def gathered(self, wanted: list[Call], by_other: set[str], meanwhile: str, begun: bool) -> None:
        """Two clients, each with its own instances, send everything at once, while something happens to the store."""
        for id in IDS[:3] if begun else ():
            if not self.history.get(id):
                self.start(id, Shape({}, (), {}))
        named = self._named(wanted)
        before = {id: len(records) for id, records in self.history.items()}
        groups = [[one for one in named if (one.call.id in by_other) == is_other] for is_other in (False, True)]
        handles: list[Any] = [self.world.orders, self.other]
        under_way = [
            handle.cache.begin(in_flight_together(handle.inner, group))
            for handle, group in zip(handles, groups, strict=True)
        ]
        self._meanwhile(meanwhile)
        answers = [future.result() for future in under_way]
        for group, answered in zip(groups, answers, strict=True):
            self._walk(group, answered)
            self._reads(group, answered, before)
        if meanwhile == "restart":
            self.world.flush_through()  # it may have come after the last call: nobody has noticed then
        self._forget_backup_of_sql_if_cold()
        self.untrue = False

    def _named(self, wanted: Sequence[Call]) -> list[Named]:
        named: list[Named] = []
        last: dict[str, Named] = {}
        for call in wanted:
            id = self._next_id()
            one = Named(call, self.number, id if call.own_id else None)
            original = last.get(call.id)
            if call.twin and call.event != "get" and original is not None and original.transition_id:
                one = original._replace(call=original.call._replace(cancel_at=None, twin=True))
            elif call.event != "get":
                last[call.id] = one
            named.append(one)
        return named

    def _meanwhile(self, what: str) -> None:
        if what == "restart":
            self.restart()
        elif what != "nothing":
            self.world.flush_through()
        if what == "evict" and "OK" in [self.world.evict(id) for id in IDS[:3]]:
            self.saved_sql = None

    def _walk(self, group: Sequence[Named], answers: Sequence[Any]) -> None:
        """Take the calls in their order, as if they had been made one by one."""
        by_twin = {
            one.transition_id
            for one, answer in zip(group, answers, strict=True)
            if one.call.twin and isinstance(answer, model.Receipt) and not answer.duplicate
        }
        for one, answer in zip(group, answers, strict=True):
            if one.call.event == "get":
                continue
            records = self.history.get(one.call.id, [])
            if answer is None:  # cancelled: history knows, but not whose it is of several with this id
                row = self._row(one.call.id, len(records) + 1)
                if row is not None and row.patch.get(MARK) == one.number and one.transition_id not in by_twin:
                    assert _refusal(one.call, records) is None
                    self._note(_receipt_of(row), one.effect)
                continue
            known = next((record for record in records if record.transition_id == one.transition_id), None)
            refusal = _refusal(one.call, records)
            if known is not None:
                assert isinstance(answer, model.Receipt), (one, answer)
                assert answer.duplicate
                assert (answer.version, answer.entry_id) == (known.version, str(known.entry_id))
            elif refusal is None:
                assert isinstance(answer, model.Receipt), (one, answer)
                assert answer.transition_id == (one.transition_id or answer.transition_id)
                self._note(answer, one.effect)
            else:
                assert type(answer) is refusal, (one, answer)

    def _row(self, id: str, version: int) -> model.Transition | None:
        """The row of a version, wherever it stands."""
        try:
            rows = self.world.orders.history(id)
        except errors.NotFoundError:
            return None
        return next((row for row in rows if row.version == version), None)

    def _reads(self, group: Sequence[Named], answers: Sequence[Any], before: dict[str, int]) -> None:
        """A read saw the instance after one of its transitions, and not before what was acknowledged when it began."""
        for one, answer in zip(group, answers, strict=True):
            if one.call.event != "get" or answer is None:
                continue
            least = before.get(one.call.id, 0)
            if isinstance(answer, errors.NotFoundError):
                assert not least
                continue
            assert isinstance(answer, model.Snapshot), answer
            assert answer.version >= least
            seen = self.history[one.call.id][answer.version - 1]
            assert (answer.state, answer.data) == (seen.state, seen.data)

    @rule(
        pick=st.integers(0, 59), place=st.integers(0, 59), times=st.integers(2, 6), cancel_at=st.integers(0, TURNS_MAX)
    )
    def repeated_together(self, pick: int, place: int, times: int, cancel_at: int) -> None:
        """A receipt asked for again by several tasks at once, the first of which gives up: each of the others gets it."""
        id = self._picked(pick)
        if id is None or id in self.reconciled:
            return
        record = self.history[id][place % len(self.history[id])]
        call = Call(id, record.event, Shape({}, (), {}), True, None, None, True)
        asked = [Named(call._replace(cancel_at=cancel_at), 0, record.transition_id)]
        asked += [Named(call, 0, record.transition_id)] * times
        handle: Any = self.world.orders
        answers = handle.cache.call(in_flight_together(handle.inner, asked))
        assert all(one.duplicate and one.version == record.version for one in answers[1:])
        self.untrue = False

    # What is cold after a race is not the same each time, and may not decide what is drawn: so these have no precondition.

    @rule()
    def copy_sql(self) -> None:
        if not self.untrue and self._all_hot():
            self.saved_sql = self.world.sql_copy(), {id: len(self.world.versions(id)) for id in IDS}

    @rule()
    def restore_sql(self) -> None:
        if self.saved_sql is not None and not self.untrue:
            self.sql_comes_back()


def _refusal(call: Call, records: Sequence[Record]) -> type[errors.StateCacheError] | None:
    """What a call meets that is nobody's repetition."""
    if call.event == "@start":
        return errors.AlreadyExistsError if records else None
    if not records:
        return errors.NotFoundError
    if call.expect_version not in (None, len(records)):
        return errors.StaleVersionError
    last = records[-1]
    if last.state not in TARGETS[call.event] or (call.event == "approve" and not last.data.get("amount")):
        return errors.InvalidTransitionError
    return None


def _receipt_of(row: model.Transition) -> model.Receipt:
    return model.Receipt(
        row.machine, row.id, row.event, row.from_state, row.to_state, row.version, row.entry_id, row.at_ms,
        row.transition_id,
    )  # fmt: skip


async def in_flight_together(orders: AsyncMachineHandle, wanted: Sequence[Named]) -> list[Any]:
    """Make all calls at once, a task each; cancel some, each in its turn of the loop, or when it has left. Their receipts,
    snapshots or errors; None for a call that was cancelled. When this returns, whatever was cancelled has been applied or
    never will be."""
    tasks = [asyncio.ensure_future(_answer(partial(_made, orders, one))) for one in wanted]
    hot, loop = orders._cache.sync.hot, asyncio.get_running_loop()
    on_its_way = {
        str(one.number): task for one, task in zip(wanted, tasks, strict=True) if one.call.cancel_at == ON_ITS_WAY
    }
    packed_apply = hot.packed_apply

    def packed(batch: Sequence[items.Item], line: Any) -> bytes:
        marks = [dict(zip(item.names, item.texts, strict=True)).get(MARK, "") for item in batch]
        for task in [on_its_way.pop(mark) for mark in marks if mark in on_its_way]:
            loop.call_soon(task.cancel)  # before the loop can look for a reply
        return packed_apply(batch, line)

    with mock.patch.object(hot, "packed_apply", packed):
        for turn in range(TURNS_MAX + 1):
            for one, task in zip(wanted, tasks, strict=True):
                if one.call.cancel_at == turn:
                    task.cancel()
            await asyncio.sleep(0)
        answers = await asyncio.gather(*tasks, return_exceptions=True)
    for id in {one.call.id for one, task in zip(wanted, tasks, strict=True) if task.cancelled()}:
        last = partial(orders.transition, id, "note", expect_version=10**6)  # waits for what is ahead of it
        assert isinstance(await _answer(last), (errors.StaleVersionError, errors.NotFoundError))
    return [None if isinstance(answer, asyncio.CancelledError) else answer for answer in answers]


async def _answer(call: Callable[[], Any]) -> Any:
    try:
        return await call()
    except errors.StateCacheError as error:
        return error


def _made(orders: AsyncMachineHandle, one: Named) -> Any:
    call, (patch, unset, increment) = one.call, one.effect
    if call.event == "get":
        return orders.get(call.id)
    if call.event == "@start":
        return orders.start(call.id, patch, transition_id=one.transition_id)
    return orders.transition(
        call.id, call.event, patch, unset=unset, increment=increment, transition_id=one.transition_id,
        expect_version=call.expect_version,
    )  # fmt: skip


FEWER = settings(MODEST, max_examples=15, phases=[Phase.explicit, Phase.generate])
"""Each example opens two clients on a real server; a race that was lost cannot be replayed to make it smaller."""


def test_async_store_does_what_the_model_says(
    request: pytest.FixtureRequest, redis_url: str, namespace: str, tmp_path: Path
) -> None:
    numbers = iter(range(10**9))
    database = _databases(request, tmp_path)

    class Async(AsyncStoreAgainstModel):
        @staticmethod
        def make_world() -> World:
            number = next(numbers)
            return World(redis_url, database(number), f"{namespace}-{number}", client="async")

    long = settings(LONG, phases=FEWER.phases)
    run_state_machine_as_test(Async, settings=long if settings.get_current_profile_name() == "long" else FEWER)


def _databases(request: pytest.FixtureRequest, folder: Path) -> Callable[[int], str]:
    """Where the database of an example is made."""
    if request.config.getoption("real_servers", default=False):
        postgres = request.getfixturevalue("postgres_server")
        return lambda number: postgres.url(postgres.create_database())

    def copied(number: int) -> str:
        path = folder / f"{number}.db"
        shutil.copy(empty_database(), path)
        return f"sqlite:///{path}"

    return copied
