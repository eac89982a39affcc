"""The sync driver: does what flows ask for, one flow or hundreds side by side.

Side by side means that one exchange serves the wishes of all: items leave in shared script calls, look-ups in shared
queries. Two moves of one instance keep their order: they form a *lane*, stand in one script call, and no item of a lane is
sent while another flow of that lane wants something else (else the second could overtake the first, which has met a MISS).
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import msgspec

from statecache.core import claims, entry, errors, failpoints, flows, fold, items, model
from statecache.durable.store import DurableStore
from statecache.engine import threads
from statecache.engine.admission import Admission
from statecache.engine.batcher import Batcher
from statecache.engine.calls import Build, version_of
from statecache.hot import claims as hot_claims
from statecache.hot import scripts
from statecache.hot.answers import Position
from statecache.hot.packing import Cold
from statecache.hot.store import HotStore
from statecache.hot.wire import EXCHANGE_SECONDS_MIN

Answer = TypeVar("Answer")

CHUNK_ITEMS = 125
CHUNK_LENGTH_MAX = 4 * 2**20
"""What one script call of a list bears at most, in characters, but for a single item: Redis does nothing else meanwhile, and
refuses an argument of 512 MB. (A patch travels twice, as the entry's text and as fields.)"""
_UNFINISHED_MAX = 1000
_LANE_ITEMS_MAX = 500
_RING_TOKENS = 8
UNREACHABLE = ("LOST", "UNSENT")
_PAUSE_SECONDS_MIN, _PAUSE_SECONDS_MAX = 0.001, 0.1
HISTORY_SECONDS_MAX = 30.0


class Running:
    """One flow under way in a bulk call, with its place in the caller's list; ``wish`` is None when it has ended."""

    __slots__ = ("address", "flow", "index", "wish")

    def __init__(self, index: int, address: str, flow: flows.Flow) -> None:
        self.index = index
        self.address = address
        self.flow = flow
        self.wish: Any = None


class Driver:
    """Runs flows against the two stores. Thread-safe: it holds no state of a call."""

    def __init__(
        self,
        hot: HotStore,
        durable: DurableStore,
        admission: Admission,
        revive: Callable[[], None] = lambda: None,
        on_hydrated: Callable[[int], None] = lambda count: None,
        *,
        batch_items_max: int = 1000,
    ) -> None:
        self.hot = hot
        self.durable = durable
        self.admission = admission
        self.revive = revive
        self._on_hydrated = on_hydrated
        self._batch_items_max = batch_items_max
        self._lane_items_max = min(batch_items_max, _LANE_ITEMS_MAX)
        self._batcher = Batcher(hot.apply, batch_items_max)
        self._confirming = Batcher(hot.apply, batch_items_max)
        """Of those that wait for a replica or a disk: the others do not wait for these."""
        self.closing = threads.Event()

    # --- one flow ----------------------------------------------------------------------------------------------------

    def write(self, request: flows.Request, deadline: float) -> model.Receipt:
        """Apply one start or transition. ``deadline`` is a ``time.monotonic`` time."""
        outcome: items.Outcome | None = None
        item = flows.opening(request)
        if item is not None:
            outcome = self._applied(item, deadline)
            if outcome.code == "OK":
                return flows.receipt(request, outcome)
        receipt: model.Receipt = self.run(flows.transition(request, outcome), deadline)
        return receipt

    def _applied(self, item: items.Item, deadline: float) -> items.Outcome:
        batcher = self._batcher if item.confirm is None else self._confirming
        return batcher.apply(item, max(EXCHANGE_SECONDS_MIN, deadline - time.monotonic()))

    def read(
        self, partition: int, machine: str, id: str, snapshot_of: flows.SnapshotOf, deadline: float
    ) -> model.Snapshot:
        """Read one instance. ``deadline`` is a ``time.monotonic`` time."""
        missed = True
        try:
            fields = self.hot.hash(partition, machine, id, deadline)
            if fields:
                return snapshot_of(id, fields, "hot")
        except errors.UnavailableError:
            self.revive()
            if time.monotonic() >= deadline:
                raise
            missed = False
        found: model.Snapshot = self.run(flows.snapshot(partition, machine, id, snapshot_of, missed=missed), deadline)
        return found

    def run(self, flow: flows.Flow, deadline: float) -> Any:
        """Run a flow to its end and return its result. ``deadline`` is a ``time.monotonic`` time."""
        try:
            wish = next(flow)
            while True:
                try:
                    answer = self.answer(wish, deadline)
                except errors.StateCacheError as error:
                    wish = flow.throw(error)
                else:
                    wish = flow.send(answer)
        except StopIteration as end:
            return end.value

    def answer(self, wish: Any, deadline: float) -> Any:
        """Do what one flow wants."""
        if type(wish) is items.Item:
            shorten_confirmation(wish, deadline)
            return self._applied(wish, deadline)
        if type(wish) is flows.Hydrate and wish.item is not None:
            shorten_confirmation(wish.item, deadline)
            return self._hydrate_and_apply(wish.found, wish.item, deadline)
        answer = self.answers([wish], deadline)[0]
        if isinstance(answer, errors.StateCacheError):
            raise answer
        return answer

    def answers(self, wishes: Sequence[Any], deadline: float) -> Sequence[Any]:
        """Answer wishes of one kind, however long a server is away, until the deadline. Raises the error of all of them."""
        with self.durable.until(deadline):
            return self.patiently(lambda: self._answers(wishes, deadline), deadline)

    def patiently(self, ask: Callable[[], Answer], deadline: float) -> Answer:
        """Ask, and while a server cannot be reached ask again until the deadline: nothing but an item does harm twice."""
        attempt = 0
        while True:
            try:
                return ask()
            except errors.UnavailableError:
                self.revive()
                if not self._pause(attempt, deadline):
                    raise
                attempt += 1

    # --- many flows --------------------------------------------------------------------------------------------------

    def write_many(
        self,
        ids: Sequence[Any],
        build: Build,
        results: list[Any],
        deadline: float,
        patience_seconds: float | None = None,
    ) -> None:
        """Apply the requests that ``build`` makes; receipts or errors are put into ``results`` by index.

        Requests are built chunk by chunk, so that checking the next chunk's input overlaps the server's work on the last. With
        ``patience_seconds`` the deadline moves on whenever a flow ends: a long list may take its time, a stuck one not. Without
        it, when a script call gets no answer by the deadline, nothing more is sent.
        """
        unfinished: list[list[Running]] = []
        sent: deque[tuple[list[int], list[flows.Request], list[Running]]] = deque()

        def put_off(ones: list[Running]) -> None:
            unfinished.extend(_lanes(ones))
            if sum(map(len, unfinished)) >= _UNFINISHED_MAX:  # the brake is on, or all are guarded: do not pile up more
                self._finish(unfinished, results, deadline, patience_seconds)
                unfinished.clear()

        def opened() -> Iterator[list[items.Item]]:
            for indexes in _chunks(ids, self._batch_items_max):
                built, requests, held = self._opened(indexes, build, results)
                if requests:
                    sent.append((built, requests, held))
                    yield [request.item for request in requests]
                elif held:
                    put_off(held)

        for _, outcomes in self.hot.apply_stream(opened(), deadline if patience_seconds is None else None):
            built, requests, held = sent.popleft()
            put_off(self._answered(built, requests, outcomes, results) + held)
        self._finish(unfinished, results, deadline, patience_seconds)

    def _opened(
        self, indexes: Sequence[int], build: Build, results: list[Any]
    ) -> tuple[list[int], list[flows.Request], list[Running]]:
        """Build the requests of a chunk: those whose items may leave at once with their indexes, and the flows of the rest.

        What stands behind a request that first looks at its instance is held with it, and so is what would make a lane, or the
        whole, too long for one script call.
        """
        built: list[int] = []
        requests: list[flows.Request] = []
        held: list[Running] = []
        holding: set[str] = set()
        length = 0
        for index, request in zip(indexes, build(indexes), strict=True):
            if isinstance(request, errors.StateCacheError):
                results[index] = request
                continue
            length += len(request.item.tail)
            if (
                flows.opening(request) is None
                or len(requests) >= self._lane_items_max
                or request.address in holding
                or (length > CHUNK_LENGTH_MAX and requests)
            ):
                holding.add(request.address)
                one = Running(index, request.address, flows.transition(request))
                one.wish = next(one.flow)
                held.append(one)
            else:
                built.append(index)
                requests.append(request)
        return built, requests, held

    def _answered(
        self,
        indexes: Sequence[int],
        requests: Sequence[flows.Request],
        outcomes: Sequence[items.Outcome],
        results: list[Any],
    ) -> list[Running]:
        """Make the receipts of what was applied; returns the flows of the rest, in order."""
        left = []
        for index, request, outcome in zip(indexes, requests, outcomes, strict=True):
            if outcome.code == "OK" and outcome.confirmed:
                results[index] = flows.receipt(request, outcome)
            else:
                one = Running(index, request.address, flows.transition(request, outcome))
                self._resume(one, None, results)
                if one.wish is not None:
                    left.append(one)
        return left

    def read_many(
        self, machine: str, ids: Sequence[str], snapshot_of: flows.SnapshotOf, results: list[Any], deadline: float
    ) -> None:
        """Read instances; snapshots or errors are put into ``results`` by index. What has a result already is not read."""
        indexes = [index for index, result in enumerate(results) if result is None]
        for start in range(0, len(indexes), _UNFINISHED_MAX):
            some = indexes[start : start + _UNFINISHED_MAX]
            try:
                wanted = [ids[index] for index in some]
                found = self.patiently(partial(self.hot.hashes_of, machine, wanted, deadline), deadline)
            except errors.StateCacheError as error:
                is_over = isinstance(error, errors.UnavailableError) and time.monotonic() >= deadline
                for index in indexes[start:] if is_over else some:
                    results[index] = error
                if is_over:
                    return
                continue
            left = []
            for index, fields in zip(some, found, strict=True):
                id = ids[index]
                try:
                    if fields:
                        results[index] = snapshot_of(id, fields, "hot")
                        continue
                except errors.StateCacheError as error:
                    results[index] = error
                    continue
                partition = self.hot.keyspace.partition_of(machine, id)
                one = Running(index, id, flows.snapshot(partition, machine, id, snapshot_of, missed=True))
                self._resume(one, None, results)
                if one.wish is not None:
                    left.append([one])
            self._finish(left, results, deadline, None)

    def _finish(
        self, lanes: list[list[Running]], results: list[Any], deadline: float, patience_seconds: float | None
    ) -> None:
        """Run lanes to their end, round by round: first what is no item, then the items of the lanes that want no more."""
        left = sum(map(len, lanes)) + 1
        while lanes:
            if patience_seconds is not None and (now_left := sum(map(len, lanes))) < left:
                left, deadline = now_left, time.monotonic() + patience_seconds
            self._answer_others(lanes, results, deadline)
            sendable = [_sendable(lane, self._lane_items_max) for lane in lanes]
            stop_at = deadline if patience_seconds is None else None
            self._apply_lanes([ones for ones in sendable if ones], results, stop_at)
            for lane, ones in zip(lanes, sendable, strict=True):
                _raise_asked(lane, [results[one.index] for one in ones if one.wish is None])
                lane[:] = [one for one in lane if one.wish is not None]
            lanes = [lane for lane in lanes if lane]

    def _apply_lanes(self, lanes: list[list[Running]], results: list[Any], deadline: float | None) -> None:
        """Send the items of lanes, about ``CHUNK_ITEMS`` a script call, and resume their flows."""
        sent: deque[list[Running]] = deque()

        def packed() -> Iterator[list[items.Item]]:
            for ones in _joined(lanes, self._batch_items_max, _length_of):
                sent.append(ones)
                if deadline is not None:
                    for one in ones:
                        shorten_confirmation(one.wish, deadline)
                yield [one.wish for one in ones]

        for _, outcomes in self.hot.apply_stream(packed(), deadline):
            for one, outcome in zip(sent.popleft(), outcomes, strict=True):
                self._resume(one, outcome, results)

    def _resume(self, one: Running, answer: Any, results: list[Any]) -> None:
        try:
            one.wish = one.flow.throw(answer) if isinstance(answer, errors.StateCacheError) else one.flow.send(answer)
        except StopIteration as end:
            one.wish = None
            results[one.index] = end.value
        except errors.StateCacheError as error:
            one.wish = None
            results[one.index] = error

    def _answer_others(self, lanes: list[list[Running]], results: list[Any], deadline: float) -> None:
        """Answer everything that is no item, wishes of one kind together."""
        kinds: dict[type, list[Running]] = {}
        for lane in lanes:
            for place, one in enumerate(lane):
                if type(one.wish) is flows.Hot and place:
                    break  # a guard looks at what those before it leave, and they have not left yet
                if type(one.wish) is not items.Item:
                    kinds.setdefault(type(one.wish), []).append(one)
        for ones in kinds.values():
            try:
                answers = self.answers([one.wish for one in ones], deadline)
            except errors.StateCacheError as error:
                answers = [error] * len(ones)
            for one, answer in zip(ones, answers, strict=True):
                self._resume(one, answer, results)
        for lane in lanes:
            lane[:] = [one for one in lane if one.wish is not None]

    # --- what is asked for -------------------------------------------------------------------------------------------

    def _answers(self, wishes: Sequence[Any], deadline: float) -> Sequence[Any]:
        """Answer wishes of one kind, in as few exchanges as it takes."""
        kind = type(wishes[0])
        if kind is flows.Hot:
            return self.hot.hashes([(wish.partition, wish.machine, wish.id) for wish in wishes], deadline)
        if kind is flows.Where:
            partitions = list({wish.partition for wish in wishes})
            told = dict(zip(partitions, self._where(partitions, deadline), strict=True))
            return [told[wish.partition] for wish in wishes]
        if kind is flows.Lookup:
            stamp = self.hot.stamp
            found = self.durable.lookup([(wish.machine, wish.id, wish.partition) for wish in wishes])
            failpoints.hit("hydrate.looked_up")
            return [msgspec.structs.replace(one, asked_under=(stamp.epoch, stamp.owner)) for one in found]
        if kind is flows.Hydrate:
            asked_under = {wish.found.asked_under for wish in wishes}
            if len(asked_under) > 1:  # admitted to another epoch between their look-ups
                return [self._hydrated(wish, deadline) for wish in wishes]
            try:
                return [(code, None) for code in self._hydrate([wish.found for wish in wishes], deadline)]
            except errors.IntegrityError:  # of one of them: a checkpoint that is no JSON
                return [self._hydrated(wish, deadline) for wish in wishes]
        if kind is flows.Find:
            return self._find(wishes, deadline)
        if kind is flows.Admit:
            self.admission.ensure(wishes[0].code, deadline)
            return [None] * len(wishes)
        if kind is flows.Pause:
            if any(wish.why in UNREACHABLE for wish in wishes):
                self.revive()
            return [self._pause(max(wish.attempt for wish in wishes), deadline)] * len(wishes)
        return [self._alone(wish, deadline) for wish in wishes]

    def _alone(self, wish: Any, deadline: float) -> Any:
        match wish:
            case flows.Version(partition, machine, id):
                own = self.hot.own_field(partition, machine, id, deadline)
                return None if own is None else version_of(own, f"{machine}:{id}")
            case flows.Unflushed(partition, machine, id, whole):
                code, entries = self.hot.find(partition, machine, id, whole=whole, deadline=deadline)
                return code, self.not_discarded(entries) if whole else entries
            case flows.Recorded(machine, id):
                return self._recorded(machine, id)
            case claims.Ask():
                return hot_claims.ask(self.hot, wish, deadline)
            case flows.Unpark(partition, machine, id, found):
                version = found.checkpoint.version if found.checkpoint else 0
                row = (partition, f"{machine}:{id}", version, str(found.watermark), 1)
                return self.hot.evict([row], _stamp_of(found), deadline=deadline)[0]
        raise AssertionError(wish)

    def _where(self, partitions: Sequence[int], deadline: float) -> list[tuple[str, bool, entry.EntryId]]:
        positions, stamp = self.hot.positions(partitions, deadline), self.hot.stamp
        return [_whereabouts(position, stamp) for position in positions]

    def _find(self, wishes: Sequence[flows.Find], deadline: float) -> list[model.Transition | None]:
        """The logs first, then SQL: what leaves a log between the two reads is in SQL by then.

        Last the logs below their watermarks: SQL may have gone back since. A log that could not be read says nothing: taken
        for "not there", a repetition would be applied again.
        """
        found: list[model.Transition | None] = [None] * len(wishes)
        for look in (
            lambda left: self._find_in_logs(left, deadline, whole=False),
            self._find_in_sql,
            lambda left: self._find_in_logs(left, deadline, whole=True),
        ):
            places = [place for place, one in enumerate(found) if one is None]
            if places:
                for place, one in zip(places, look([wishes[place] for place in places]), strict=True):
                    found[place] = one
        return found

    def _find_in_logs(
        self, wishes: Sequence[flows.Find], deadline: float, *, whole: bool
    ) -> list[model.Transition | None]:
        """Each partition's log is read once."""
        partitions: dict[int, dict[tuple[str, str], list[str]]] = {}
        for wish in wishes:
            part = str(wish.version) if wish.transition_id is None else wish.transition_id
            wanted = partitions.setdefault(wish.partition, {})
            wanted.setdefault((wish.machine, wish.id), []).append(part)
        entries = [
            record
            for partition, wanted in partitions.items()
            for record in self._log_entries(partition, wanted, deadline, whole=whole)
        ]
        records = fold.by_instance(self.not_discarded(entries) if whole else entries)
        return [_meant(wish, records.get((wish.machine, wish.id), ())) for wish in wishes]

    def not_discarded(self, entries: list[entry.Entry]) -> list[entry.Entry]:
        """What counts of a log's entries below its watermark: not those that an operator discarded."""
        if not entries:
            return entries
        gone = {(one.machine, one.id, one.entry_id) for one in self.durable.discards()}
        return [one for one in entries if (one.machine, one.id, one.entry_id) not in gone]

    def _log_entries(
        self, partition: int, wanted: Mapping[tuple[str, str], Sequence[str]], deadline: float, *, whole: bool
    ) -> list[entry.Entry]:
        while True:
            code, entries = self.hot.find_many(partition, wanted, whole=whole, deadline=deadline)
            if code == "OK":
                return entries
            self.admission.ensure(code, deadline)

    def _find_in_sql(self, wishes: Sequence[flows.Find]) -> list[model.Transition | None]:
        """In history or, where SQL refused it, among the letters."""
        found = self.durable.committed([(wish.machine, wish.id, wish.version, wish.transition_id) for wish in wishes])
        return [flows.transition_of(one) if isinstance(one, entry.Entry) else one for one in found]

    def _recorded(self, machine: str, id: str) -> list[model.Transition]:
        """History, and the dead letters that go on from it: as many rows as there are, so SQL may take its time."""
        with self.durable.until(time.monotonic() + HISTORY_SECONDS_MAX):
            rows, waiting = self.durable.recorded(machine, id)
        for record in (letter.entry for letter in waiting):
            following = (rows[-1].version if rows else 0) + 1
            if record.event == entry.EVENT_RECONCILED and record.version >= following:
                waits = flows.transition_of(record)  # as it will stand there if it is retried
                rows.append(msgspec.structs.replace(waits, covers_from=following, complete=False))
            elif record.version == following:
                rows.append(flows.transition_of(record))
        return rows

    def _hydrate(self, found: Sequence[model.Lookup], deadline: float) -> list[str]:
        codes = self.hot.hydrate([_cold(one) for one in found], _stamp_of(found[0]), deadline)
        self._on_hydrated(codes.count("OK"))
        failpoints.hit("hydrate.done")
        return codes

    def _hydrated(self, wish: flows.Hydrate, deadline: float) -> tuple[str, None] | errors.IntegrityError:
        """The answer of one by itself; the error of its checkpoint is that of no other."""
        try:
            return self._hydrate([wish.found], deadline)[0], None
        except errors.IntegrityError as error:
            return error

    def _hydrate_and_apply(self, found: model.Lookup, item: items.Item, deadline: float) -> tuple[str, items.Outcome]:
        code, outcome = self.hot.hydrate_and_apply(_cold(found), item, _stamp_of(found), deadline)
        self._on_hydrated(int(code == "OK"))
        failpoints.hit("hydrate.done")
        return code, outcome

    def _pause(self, attempt: int, deadline: float) -> bool:
        """Sleep, twice as long at each attempt, with jitter; False when the deadline has passed."""
        left = deadline - time.monotonic()
        if left <= 0 or self.closing.is_set():
            return False
        self.closing.wait(min(left, pause_seconds(attempt) * random.uniform(0.5, 1.0)))
        return True


def shorten_confirmation(item: items.Item, deadline: float) -> None:
    """Before an item is sent again: what it wants confirmed may take what is left of its call's time, not as long once more."""
    if item.confirm is not None:
        left_ms = max(1, int((deadline - time.monotonic()) * 1000))
        if left_ms < item.confirm.timeout_ms:
            item.confirm = msgspec.structs.replace(item.confirm, timeout_ms=left_ms)


def _meant(wish: flows.Find, records: Sequence[entry.Entry]) -> model.Transition | None:
    for record in records:
        if wish.transition_id in (None, record.transition_id) and wish.version in (None, record.version):
            return flows.transition_of(record)
    return None


def _cold(found: model.Lookup) -> Cold:
    kept = found.checkpoint
    assert kept is not None
    own, ring, texts = flows.hash_texts(found)
    return kept.partition, f"{kept.machine}:{kept.id}", own, ring, str(found.watermark), texts


def _stamp_of(found: model.Lookup) -> scripts.Stamp | None:
    return None if found.asked_under is None else scripts.Stamp(*found.asked_under)


def _whereabouts(position: Position | None, stamp: scripts.Stamp) -> tuple[str, bool, entry.EntryId]:
    if position is None or (position.epoch, position.owner) != (stamp.epoch, stamp.owner):
        return "EPOCH", True, entry.ZERO
    if position.status != "ready":
        return "RECOVERING", True, entry.ZERO
    return "OK", position.cold, position.evicted_to


def pause_seconds(attempt: int) -> float:
    """How long to wait before the next attempt, before jitter."""
    return min(_PAUSE_SECONDS_MAX, _PAUSE_SECONDS_MIN * 2.0 ** min(attempt, 10))


def _sendable(lane: Sequence[Running], items_max: int) -> list[Running]:
    """The flows of a lane whose items may leave now: up to the first that wants something else, may be sent again, or could
    be applied though one before it is not.

    A repetition is answered OLD where the instance's ring no longer reaches the version up to which it is known not to have
    been applied. In the same call would be applied what is no repetition, or is known up to a higher version. So that those
    behind need no other look at history, no more of them leave than a ring holds: see ``_raise_asked``.
    """
    ones: list[Running] = []
    asked: int | None = None  # of the repetitions, the lowest
    length = 0
    for one in lane:
        item = one.wish
        if type(item) is not items.Item or (asked is not None and (item.asked > asked or not item.retry)):
            break
        length += len(item.tail)
        if length > CHUNK_LENGTH_MAX and ones:
            break
        ones.append(one)
        if item.pinned or len(ones) >= items_max or (asked and len(ones) >= _RING_TOKENS):
            break
        if item.retry:
            asked = item.asked if asked is None else min(asked, item.asked)
    return ones


def _raise_asked(lane: Sequence[Running], made: Sequence[Any]) -> None:
    """What a lane's items have just become, in order, tells what is behind them that these versions are not theirs: without
    that the ninth would have to look history up again, and each ninth behind it."""
    receipts = [one for one in made if isinstance(one, model.Receipt) and not one.duplicate]
    if not receipts or receipts[-1].version - receipts[0].version != len(receipts) - 1:
        return
    before, ids = receipts[0].version - 1, {one.transition_id for one in receipts}
    for one in lane:
        item = one.wish
        if type(item) is items.Item and item.retry and item.asked == before and item.transition_id not in ids:
            item.asked = receipts[-1].version


def _chunks(ids: Sequence[Any], items_max: int) -> Iterator[Sequence[int]]:
    """Groups of about ``CHUNK_ITEMS`` indexes; those of one instance stand in one group, in their order.

    The first groups of several are smaller, growing, so that the server soon has something to do and has it until the next
    one is made; the last one too, so that little is left to do when its answer comes.
    """
    texts = {id for id in ids if isinstance(id, str)}
    if len(texts) == len(ids):
        yield from _tapered(len(ids), min(CHUNK_ITEMS, items_max))
        return
    lanes: dict[Any, list[int]] = {}
    for index, id in enumerate(ids):
        lanes.setdefault(id if isinstance(id, str) else index, []).append(index)
    yield from _joined(lanes.values(), items_max)


def _tapered(count: int, size: int) -> Iterator[range]:
    """The numbers below ``count`` in ranges of ``size`` at most: of a quarter of it, a half, three quarters, and then whole
    ones, the last two being halves of what is left. Less than a quarter is not worth two."""
    start, quarters = 0, 1 if count > size else 4
    while count - start > (length := -(-size * quarters // 4)):
        yield range(start, start + length)
        start += length
        quarters = min(quarters + 1, 4)
    left = count - start
    middle = start + (left + 1) // 2 if left > size // 4 else count
    yield from filter(None, (range(start, middle), range(middle, count)))


def _length_of(lane: Sequence[Running]) -> int:
    return sum(len(one.wish.tail) for one in lane)


def _joined(
    lanes: Iterable[list[Any]], items_max: int, length_of: Callable[[list[Any]], int] = lambda lane: 0
) -> Iterator[list[Any]]:
    """Lanes put together to lists of about ``CHUNK_ITEMS``, of no more than ``items_max`` and ``CHUNK_LENGTH_MAX`` unless one
    lane is longer."""
    joined: list[Any] = []
    length = 0
    for lane in lanes:
        length += (added := length_of(lane))
        if joined and (len(joined) + len(lane) > items_max or length > CHUNK_LENGTH_MAX):
            yield joined
            joined, length = [], added
        joined += lane
        if len(joined) >= CHUNK_ITEMS:
            yield joined
            joined, length = [], 0
    if joined:
        yield joined


def _lanes(ones: Sequence[Running]) -> list[list[Running]]:
    """Flows by instance, in their order."""
    lanes: dict[str, list[Running]] = {}
    for one in ones:
        lanes.setdefault(one.address, []).append(one)
    return list(lanes.values())
