"""The judge: pure code, from what clients wrote down, what SQL holds and what recoveries reported, to broken promises.

It knows nothing of statecache but its promises. What it may assume about a lost acknowledgement it takes from the reports:

- an entry accepted at or after the moment the log's tail was last seen may be lost if the report says ``loss_possible``;
- any other lost entry must be counted in ``lost_at_least``, and that bound must not be above what can have been lost;
- a ``durable`` acknowledgement may be missing only if SQL itself was restored from a copy made before it was given, and
  then a ``@reconciled`` row or a dead letter stands in its place, or a report counts it.

``tests/chaos/test_checker.py`` forges evidence with each violation: every rule here has been seen to fail.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import msgspec

from tests.chaos import ledger

CLOCK_SLACK_MS = 5.0
"""Receipts hold whole milliseconds, and two processes read the clock one after the other."""

STALE_READ_MS = 30_000.0
"""A read of an untrue Redis (P8 speaks of transitions only) must be followed by a recovery within this time."""


class Row(msgspec.Struct, frozen=True):
    """One row of history, or an open letter."""

    id: str
    version: int
    event: str
    from_state: str | None
    to_state: str
    transition_id: str
    entry_id: str
    reason: str = ""
    data: dict[str, Any] = {}
    increments: dict[str, Any] = {}
    covers_from: int | None = None
    complete: bool = True


class Report(msgspec.Struct, frozen=True):
    """What one recovery reported of one partition."""

    epoch: int
    owner: str
    partition: int
    kind: str
    started_ms: float
    ended_ms: float
    tail_seen_ms: float
    lost_at_least: int = 0
    loss_possible: bool = False
    reconciled: int = 0
    parked: int = 0


class Restore(msgspec.Struct, frozen=True):
    """SQL went back: to a copy whose making began at ``copied_ms``."""

    copied_ms: float
    restored_ms: float


class Attempt(msgspec.Struct, frozen=True):
    """One transition of one call: what was wanted, when it was sent, and what was told when (None: nothing)."""

    client: str
    sent_ms: float
    wanted: ledger.Wanted
    answered_ms: float = 0.0
    told: ledger.Told | None = None

    @property
    def is_acknowledged(self) -> bool:
        return self.told is not None and self.told.word == "ok"

    @property
    def is_open(self) -> bool:
        """It may have been applied without the client's knowing."""
        return self.told is None or self.told.word == "unknown"


class Evidence(msgspec.Struct):
    """Everything the judge looks at."""

    attempts: list[Attempt]
    history: list[Row]
    partition_of: Callable[[str], int]
    moves: frozenset[tuple[str, str | None, str]]
    reads: dict[str, list[ledger.Read]] = {}
    notes: list[tuple[str, ledger.Note]] = []
    letters: list[Row] = []
    reports: list[Report] = []
    restores: list[Restore] = []
    foreign: int = 0
    """Records that the nemesis wrote into the logs by itself: lost, they count as entries too."""


class Violation(msgspec.Struct, frozen=True):
    promise: str
    address: str
    detail: str

    def __str__(self) -> str:
        return f"{self.promise} {self.address}: {self.detail}"


def attempts_of(client: str, lines: Iterable[ledger.Line]) -> list[Attempt]:
    """Join what a client sent with what it was told."""
    sent: dict[int, ledger.Sent] = {}
    answered: dict[int, ledger.Answered] = {}
    for line in lines:
        if isinstance(line, ledger.Sent):
            sent[line.call] = line
        elif isinstance(line, ledger.Answered):
            answered[line.call] = line
    found = []
    for call, one in sent.items():
        answer = answered.get(call)
        for place, wanted in enumerate(one.moves):
            if answer is None:
                found.append(Attempt(client, one.at_ms, wanted))
            else:
                found.append(Attempt(client, one.at_ms, wanted, answer.at_ms, answer.told[place]))
    return found


def judge(evidence: Evidence) -> list[Violation]:
    """Every broken promise that the evidence shows."""
    case = _Case(evidence)
    found: list[Violation] = []
    for rule in (
        _gap_free, _declared_moves, _no_phantoms, _applied_once, _refused_means_not_applied, _acknowledged_is_there,
        _bounds_are_sound, _real_time_order, _receipts_agree, _fenced, _reads_are_monotone, _parked_with_reason, _noted,
    ):  # fmt: skip
        found += rule(case)
    return found


class _Case:
    """The evidence, indexed."""

    def __init__(self, evidence: Evidence) -> None:
        self.evidence = evidence
        self.attempts = evidence.attempts
        self.by_instance: dict[str, list[Row]] = defaultdict(list)
        for row in evidence.history:
            self.by_instance[row.id].append(row)
        for rows in self.by_instance.values():
            rows.sort(key=lambda row: row.version)
        self.letters: dict[str, list[Row]] = defaultdict(list)
        for row in evidence.letters:
            self.letters[row.id].append(row)
        self.by_key: dict[str, list[Attempt]] = defaultdict(list)
        for attempt in self.attempts:
            self.by_key[attempt.wanted.key].append(attempt)
        self.reports: dict[int, list[Report]] = defaultdict(list)
        for report in evidence.reports:
            self.reports[report.partition].append(report)

    def row(self, id: str, version: int) -> Row | None:
        """The row in which a version stands: its own, or one that covers it."""
        for row in self.by_instance.get(id, ()):
            if (row.covers_from or row.version) <= version <= row.version:
                return row
        return None

    def holds(self, id: str, told: ledger.Told) -> bool:
        """Is what was acknowledged in SQL, as it was acknowledged?"""
        row = self.row(id, told.version)
        if row is not None and _is_it(row, told):
            return True
        return any(_is_it(letter, told) for letter in self.letters.get(id, ()))

    def stands(self, id: str, told: ledger.Told) -> bool:
        """Is it in history, not only kept aside?"""
        row = self.row(id, told.version)
        return row is not None and _is_it(row, told)

    def waiting(self) -> Iterator[Row]:
        """The letters that go on where their instance's history ends. Others were kept aside because SQL has gone another
        way (a lost tail that an older snapshot brought back): they can only be discarded, and apply nothing."""
        for id, letters in self.letters.items():
            rows = self.by_instance.get(id)
            if min(letter.version for letter in letters) == (rows[-1].version if rows else 0) + 1:
                yield from letters

    def may_have_been_restored_away(self, attempt: Attempt) -> bool:
        """Was SQL restored from a copy that need not hold what this attempt was told?"""
        return any(
            restore.copied_ms <= attempt.answered_ms and attempt.sent_ms <= restore.restored_ms
            for restore in self.evidence.restores
        )

    def later_reports(self, id: str, at_ms: float) -> list[Report]:
        partition = self.evidence.partition_of(id)
        return [report for report in self.reports.get(partition, ()) if report.ended_ms + CLOCK_SLACK_MS >= at_ms]


def _is_it(row: Row, told: ledger.Told) -> bool:
    return (row.version, row.transition_id, row.entry_id) == (told.version, told.transition_id, told.entry_id)


Rule = Iterator[Violation]


# --- history alone -----------------------------------------------------------------------------------------------------


def _gap_free(case: _Case) -> Rule:
    """P3: versions 1..n, each once; a row that stands for a range only after SQL was restored."""
    for id, rows in case.by_instance.items():
        expected = 1
        for row in rows:
            first = row.covers_from or row.version
            if first != expected:
                yield Violation("P3", id, f"version {first} follows {expected - 1}")
            expected = row.version + 1
            if row.event == "@reconciled" and not case.evidence.restores:
                yield Violation("P3", id, f"version {row.version} is @reconciled, but SQL was never restored")
    entries: Counter[tuple[int, str]] = Counter(
        (case.evidence.partition_of(row.id), row.entry_id)
        for row in case.evidence.history
        if row.event != "@reconciled"
    )
    for (partition, entry_id), count in entries.items():
        if count > 1:
            yield Violation("P5", f"partition {partition}", f"the entry {entry_id} is in SQL {count} times")


def _declared_moves(case: _Case) -> Rule:
    """P2, and a fork shows as a row that does not begin where the one before it ended (P3)."""
    for id, rows in case.by_instance.items():
        state: str | None = None
        count: int | None = 0
        for row in rows:
            if row.event == "@reconciled":
                count = row.data.get("count")  # known if no later entry touches it
            else:
                if (row.event, row.from_state, row.to_state) not in case.evidence.moves:
                    yield Violation("P2", id, f"version {row.version}: {row.event} {row.from_state} -> {row.to_state}")
                if row.from_state != state:
                    yield Violation(
                        "P3", id, f"version {row.version} leaves {row.from_state}, the one before led to {state}"
                    )
                counted = row.increments.get("count", count)
                if count is not None and counted not in (count, count + ("count" in row.increments)):
                    yield Violation("P1", id, f"version {row.version} counts {counted} after {count}")
                if "count" in row.increments and counted == count:
                    yield Violation("P1", id, f"version {row.version} was to count, and did not")
                count = counted
            state = row.to_state


# --- history against what was sent -------------------------------------------------------------------------------------


def _no_phantoms(case: _Case) -> Rule:
    """Every row was sent by somebody, as it stands there."""
    for row in itertools.chain(case.evidence.history, case.evidence.letters):
        if row.event == "@reconciled":
            continue
        attempts = case.by_key.get(row.reason)
        if not attempts:
            yield Violation("phantom", row.id, f"version {row.version} ({row.transition_id}) was sent by nobody")
            continue
        wanted = attempts[0].wanted
        if (wanted.id, wanted.event, wanted.data) != (row.id, row.event, row.data):
            yield Violation("phantom", row.id, f"version {row.version} is {row.event} {row.data}, sent was {wanted}")
        if wanted.transition_id not in (None, row.transition_id):
            yield Violation(
                "phantom", row.id, f"version {row.version} has the id {row.transition_id}, sent was {wanted}"
            )
        if wanted.expect_version not in (None, row.version - 1):
            yield Violation("P1", row.id, f"version {row.version} was to follow {wanted.expect_version} only")


def _applied_once(case: _Case) -> Rule:
    """P4, P5: a wish stands for at most one version."""
    places: dict[str, set[tuple[str, int]]] = defaultdict(set)
    for row in itertools.chain(case.evidence.history, case.waiting()):
        if row.event != "@reconciled":
            places[row.reason].add((row.id, row.version))
    for key, found in places.items():
        if len(found) > 1:
            yield Violation("P4", sorted(found)[0][0], f"{key} was applied {len(found)} times: {sorted(found)}")


def _refused_means_not_applied(case: _Case) -> Rule:
    """ "On any other error it was not applied" - unless an attempt at the same wish was answered otherwise."""
    for row in case.evidence.history:
        attempts = case.by_key.get(row.reason, ())
        if attempts and all(one.told is not None and one.told.word in ("refused", "lost") for one in attempts):
            said = [one.told.error for one in attempts if one.told]
            yield Violation(
                "P4", row.id, f"version {row.version} ({row.reason}) is there, but the client was told {said}"
            )


def _acknowledged_is_there(case: _Case) -> Rule:
    """P7, P9: an acknowledged transition is in SQL, or its loss is inside what was reported."""
    counted: dict[int, list[Attempt]] = defaultdict(list)
    seen: set[tuple[str, int, str]] = set()
    for attempt in case.attempts:
        told = attempt.told
        if told is None or not attempt.is_acknowledged:
            continue
        id = attempt.wanted.id
        if case.holds(id, told):
            continue
        restored = case.may_have_been_restored_away(attempt)
        row = case.row(id, told.version)
        if restored and row is not None and row.event == "@reconciled":
            continue
        if told.durable and not restored:
            yield Violation("P7", id, f"version {told.version} ({told.transition_id}) was durable and is not in SQL")
            continue
        place = (id, told.version, told.entry_id)
        if place in seen:
            continue
        seen.add(place)
        if not _possibly_lost(case, attempt, told, restored):
            counted[case.evidence.partition_of(id)].append(attempt)
    for partition, missing in counted.items():
        missing.sort(key=_accepted_ms, reverse=True)
        for number, one in enumerate(missing, 1):
            reported = sum(report.lost_at_least for report in case.later_reports(one.wanted.id, _accepted_ms(one)))
            if number > reported:
                yield Violation(
                    "P9", one.wanted.id,
                    f"{len(missing)} acknowledged transitions of partition {partition} are gone; {reported} are reported from "
                    f"{_accepted_ms(one)} on, when {one.told} was told to {one.client} ({one.wanted.key})",
                )  # fmt: skip
                break


def _accepted_ms(attempt: Attempt) -> float:
    assert attempt.told is not None
    return attempt.told.at_ms


def _possibly_lost(case: _Case, attempt: Attempt, told: ledger.Told, restored: bool) -> bool:
    """Does a report say that what was accepted at that moment may be lost?"""
    return any(
        report.loss_possible and (restored or told.at_ms + CLOCK_SLACK_MS >= report.tail_seen_ms)
        for report in case.later_reports(attempt.wanted.id, told.at_ms)
    )


def _bounds_are_sound(case: _Case) -> Rule:
    """P9: ``lost_at_least`` counts nothing that was not lost."""
    if case.evidence.restores:
        return  # a copy of SQL may count a loss again that was counted after the copy was made
    gone: Counter[int] = Counter()
    entries: set[tuple[str, str]] = set()
    for attempt in case.attempts:
        id, told = attempt.wanted.id, attempt.told
        partition = case.evidence.partition_of(id)
        if told is None or not attempt.is_acknowledged:
            gone[partition] += attempt.is_open or (told is not None and told.word == "lost")
            continue
        if (id, told.entry_id) not in entries and not case.holds(id, told):
            entries.add((id, told.entry_id))
            gone[partition] += 1
        elif _spans_a_recovery(case, attempt, partition):
            gone[partition] += 1  # it may have been applied, lost, and applied again within this one call
    for partition, reports in case.reports.items():
        reported = sum(report.lost_at_least for report in reports)
        if reported > gone[partition] + case.evidence.foreign:
            yield Violation(
                "P9", f"partition {partition}", f"{reported} are reported as lost, at most {gone[partition]} can be"
            )


def _spans_a_recovery(case: _Case, attempt: Attempt, partition: int) -> bool:
    return any(
        attempt.sent_ms <= report.ended_ms and report.started_ms <= attempt.answered_ms
        for report in case.reports.get(partition, ())
    )


def _real_time_order(case: _Case) -> Rule:
    """What was answered before another call began has the lower version, if both stand."""
    first_sent = {key: min(one.sent_ms for one in attempts) for key, attempts in case.by_key.items()}
    events: dict[str, list[tuple[float, int, int, str]]] = defaultdict(list)
    for attempt in case.attempts:
        told = attempt.told
        if told is None or not attempt.is_acknowledged or not case.stands(attempt.wanted.id, told):
            continue
        events[attempt.wanted.id].append((attempt.answered_ms, 1, told.version, attempt.wanted.key))
        events[attempt.wanted.id].append((first_sent[attempt.wanted.key], 0, told.version, attempt.wanted.key))
    for id, found in events.items():
        highest, whose = 0, ""
        for _, is_answer, version, key in sorted(found):
            if is_answer:
                highest, whose = max((highest, whose), (version, key))
            elif version <= highest and key != whose:
                yield Violation("order", id, f"{key} has version {version}, sent after {whose} had got {highest}")


def _receipts_agree(case: _Case) -> Rule:
    """P4: a repetition is answered with the same receipt, as long as that one is not lost."""
    for key, attempts in case.by_key.items():
        receipts = {
            (one.told.version, one.told.entry_id, one.told.transition_id)
            for one in attempts
            if one.told is not None and one.is_acknowledged and case.stands(one.wanted.id, one.told)
        }
        if len(receipts) > 1:
            yield Violation("P4", attempts[0].wanted.id, f"{key} has got the receipts {sorted(receipts)}")


def _fenced(case: _Case) -> Rule:
    """P6: nothing of an older epoch is accepted once a recovery of a higher one has ended."""
    if case.evidence.restores:
        return  # a copy of SQL may bring an older epoch back
    for attempt in case.attempts:
        told = attempt.told
        if told is None or not attempt.is_acknowledged:
            continue
        epoch = int(told.entry_id.partition("-")[0])
        for report in case.reports.get(case.evidence.partition_of(attempt.wanted.id), ()):
            if report.epoch > epoch and told.at_ms > report.ended_ms + CLOCK_SLACK_MS:
                yield Violation(
                    "P6",
                    attempt.wanted.id,
                    f"entry {told.entry_id} was accepted after the recovery of epoch {report.epoch}",
                )
                break


# --- reads, letters, notes ---------------------------------------------------------------------------------------------


def _reads_are_monotone(case: _Case) -> Rule:
    """A client never sees an instance go back, unless Redis or SQL did."""
    for client, reads in case.evidence.reads.items():
        highest: dict[str, ledger.Read] = {}
        for read in reads:
            before = highest.get(read.id)
            if before is not None and read.version < before.version and not _went_back(case, before, read):
                yield Violation(
                    "reads", read.id,
                    f"{client} saw version {before.version} ({before.source}, {before.at_ms}), then {read.version} "
                    f"({read.source}, {read.at_ms}), and no recovery in between",
                )  # fmt: skip
            if before is None or read.version >= before.version or _went_back(case, before, read):
                highest[read.id] = read


def _went_back(case: _Case, before: ledger.Read, read: ledger.Read) -> bool:
    if any(before.asked_ms <= restore.restored_ms <= read.at_ms + STALE_READ_MS for restore in case.evidence.restores):
        return True
    return any(
        report.kind != "new" and (report.loss_possible or report.lost_at_least or report.kind != "intact")
        for report in case.later_reports(read.id, before.asked_ms)
        if report.started_ms <= read.at_ms + STALE_READ_MS
    )


def _parked_with_reason(case: _Case) -> Rule:
    """P10: an instance is parked because a report says so (no client sends what SQL refuses)."""
    for id, letters in case.letters.items():
        reports = case.reports.get(case.evidence.partition_of(id), ())
        if not any(report.parked for report in reports):
            versions = [letter.version for letter in letters]
            yield Violation("P10", id, f"is parked with versions {versions}, and no recovery has reported it")


def _noted(case: _Case) -> Rule:
    """What a client saw by itself, that can never be."""
    seen: set[tuple[str, str]] = set()
    for client, note in case.evidence.notes:
        if note.kind.startswith("!") and (client, note.text) not in seen:
            seen.add((client, note.text))
            yield Violation(note.kind[1:], client, note.text)


_ORDINARY = ("InvalidTransitionError", "StaleVersionError", "AlreadyExistsError", "NotFoundError")


def _kind_of_error(text: str) -> str:
    """An error's class, and its text without what differs from case to case."""
    name, _, rest = text.partition(":")
    if name in _ORDINARY:
        return name
    return f"{name}: {re.sub(r'[rf]?[0-9]+(-[0-9a-z]+)*', '#', rest).strip()}"[:100]


def summary(evidence: Evidence) -> Mapping[str, int]:
    """What the evidence amounts to, for the table: calls by what was told, errors by name."""
    found: Counter[str] = Counter()
    case = _Case(evidence)
    for attempt in evidence.attempts:
        told = attempt.told
        if told is not None and attempt.is_acknowledged and not case.holds(attempt.wanted.id, told):
            found["acknowledged, and lost as reported"] += 1
        found["unanswered" if told is None else told.word] += 1
        if told is not None and told.error:
            found[_kind_of_error(told.error)] += 1
        if told is not None and told.durable:
            found["durable"] += 1
    for _, note in evidence.notes:
        found[f"{note.kind}: {_kind_of_error(note.text)}"] += 1
    found["reads"] += sum(map(len, evidence.reads.values()))
    return found
