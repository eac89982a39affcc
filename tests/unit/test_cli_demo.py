"""The demo's judge: a claim that does not hold is found, and ends the demo with code 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from statecache.cli import demo, demo_ledger
from statecache.core import entry, keys, model

PARTITIONS = 4
Rows = dict[tuple[str, int], model.Transition]


@pytest.fixture
def played() -> tuple[demo_ledger.Ledger, Rows, dict[int, entry.EntryId]]:
    """Ten orders as they would be if nothing was lost, and everything flushed."""
    ledger = demo_ledger.Ledger()
    rows: Rows = {}
    seqs = dict.fromkeys(range(PARTITIONS), 0)
    for number in range(1, 11):
        state = None
        for version, call in enumerate(demo_ledger.calls_of(number), 1):
            partition = keys.partition_of("order", call.id, PARTITIONS)
            seqs[partition] += 1
            definition = demo_ledger.Order.definition
            to = definition.initial if state is None else definition.targets[call.event][state]
            entry_id = f"1-{seqs[partition]}"
            receipt = model.Receipt(
                "order", call.id, call.event, state, to, version, entry_id, 1000, call.transition_id
            )
            ledger.note([call], [receipt])
            rows[call.id, version] = model.Transition(
                "order", call.id, version, call.event, state, to, 1000, call.transition_id, "demo", None, None,
                call.data, (), {}, 1, entry_id, True,
            )  # fmt: skip
            state = to
    return ledger, rows, {partition: entry.EntryId(1, seq) for partition, seq in seqs.items()}


def test_what_is_whole_is_found_whole(played: Any) -> None:
    verdict = demo_ledger.judge(*played)
    assert verdict.survived == verdict.flushed == verdict.acknowledged == 40
    found = [verdict.different, verdict.missing_but_flushed, verdict.lost, verdict.foreign, verdict.gaps]
    assert found == [[]] * len(found)


def _forget(rows: Rows) -> None:
    del rows["000003", 4]


def _change(rows: Rows) -> None:
    rows["000003", 2] = msgspec.structs.replace(rows["000003", 2], patch={"method": "cash"})


def _skip(rows: Rows) -> None:
    del rows["000003", 2]


def _add(rows: Rows) -> None:
    rows["000099", 1] = msgspec.structs.replace(rows["000003", 1], id="000099", transition_id="foreign")


@pytest.mark.parametrize(
    ("harm", "what"),
    [
        (_forget, "missing_but_flushed"),
        (_change, "different"),
        (_skip, "gaps"),
        (_add, "foreign"),
    ],
)
def test_every_kind_of_harm_is_found(played: Any, harm: Callable[[Rows], None], what: str) -> None:
    harm(played[1])
    assert getattr(demo_ledger.judge(*played), what)


def test_a_loss_beyond_the_watermark_is_a_loss_and_no_broken_promise(played: Any) -> None:
    ledger, rows, watermarks = played
    _, receipt = ledger.acknowledged["demo-000003-deliver"]
    partition = keys.partition_of("order", "000003", PARTITIONS)
    behind = entry.EntryId.parse(receipt.entry_id)
    later = [
        (row.id, row.version)
        for row in rows.values()
        if keys.partition_of("order", row.id, PARTITIONS) == partition and entry.EntryId.parse(row.entry_id) >= behind
    ]
    for key in later:
        del rows[key]
    verdict = demo_ledger.judge(ledger, rows, {**watermarks, partition: entry.EntryId(behind.epoch, behind.seq - 1)})
    assert len(verdict.lost) == len(later)
    assert not verdict.missing_but_flushed
    assert verdict.flushed == verdict.survived == 40 - len(later)


def test_a_broken_claim_is_told_with_what_differs() -> None:
    claims = demo.Claims()
    claims.check("the sky is blue", True, "grey")
    claims.check("water is dry", False, "wet")
    assert claims.held == [("the sky is blue", True), ("water is dry", False)]
    assert claims.failures == ["water is dry: wet"]
