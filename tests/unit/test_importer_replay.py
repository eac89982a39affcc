"""Order within cases, the ids of rows, and the dry run: everything of an import that needs no store."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from statecache import State, StateMachine
from statecache.core import codec, errors, eventlog
from statecache.core.eventlog import Row
from statecache.engine import replay
from statecache.engine.logfile import LogFile

COLUMNS = eventlog.Columns("case", "event", "at")


class Order(StateMachine):
    placed = State(initial=True)
    paid = State()
    shipped = State(final=True)

    pay = placed.to(paid) | paid.to(paid)
    ship = paid.to(shipped)


def log_of(path: Path, rows: Sequence[Sequence[str]], columns: eventlog.Columns = COLUMNS) -> LogFile:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns.named(), *rows])
    return LogFile(path, columns)


def replay_of(log: LogFile, refused: Path | None = None) -> replay.Replay:
    return replay.Replay(log, log.survey(), Order, replay.RefusedFile(refused), codec.Limits())


def ids(log: LogFile) -> list[str]:
    return [step.transition_id for chunk in replay_of(log).chunks(lambda rows: None) for step in chunk]


def test_rows_of_a_case_keep_the_files_order(tmp_path: Path) -> None:
    log = log_of(
        tmp_path / "a.csv", [("1", "pay", "2024-01-01"), ("2", "pay", "2023-01-01"), ("1", "ship", "2024-01-01")]
    )
    survey = log.survey()
    assert (survey.rows, survey.cases, survey.disordered) == (3, 2, {})
    assert [(row.id, row.event) for row in log.ordered(survey) if isinstance(row, Row)] == [
        ("1", "pay"), ("2", "pay"), ("1", "ship"),
    ]  # fmt: skip


def test_only_a_case_out_of_order_is_sorted_by_time_and_equal_times_keep_their_order(tmp_path: Path) -> None:
    rows = [("1", "b", "2024-01-02"), ("2", "x", "2024-01-05"), ("1", "a", "2024-01-01"), ("1", "c", "2024-01-02"),
            ("2", "y", "2024-01-05")]  # fmt: skip
    log = log_of(tmp_path / "a.csv", rows)
    survey = log.survey()
    assert survey.disordered == {"1": 3}
    assert [row.event for row in log.ordered(survey) if isinstance(row, Row)] == ["x", "a", "b", "c", "y"]


def test_the_id_of_a_row_depends_on_what_it_says_alone(tmp_path: Path) -> None:
    first = ids(log_of(tmp_path / "a.csv", [("1", "pay", "2024-01-01T00:00Z"), ("1", "ship", "2024-01-02")]))
    second = ids(log_of(tmp_path / "b.csv", [("9", "pay", "2024-01-01"), ("1", "ship", "2024-01-02T01:00+01:00")]))
    assert first[1] == second[1]
    assert len({*first, *second}) == 3


def test_equal_rows_of_a_case_have_ids_of_their_own(tmp_path: Path) -> None:
    found = ids(
        log_of(
            tmp_path / "a.csv", [("1", "pay", "2024-01-01"), ("1", "ship", "2024-01-01"), ("1", "pay", "2024-01-01")]
        )
    )
    assert len(set(found)) == 3


def test_the_dry_run_tells_what_the_machine_refuses(tmp_path: Path) -> None:
    rows = [
        ("1", "pay", "2024-01-01"),
        ("1", "fly", "2024-01-02"),
        ("1", "ship", "2024-01-03"),
        ("1", "pay", "2024-01-04"),
        ("2", "ship", "2024-01-01"),
        ("x\ty", "pay", "2024-01-01"),
        ("3", "pay", "never"),
    ]
    side_file = tmp_path / "refused.jsonl"
    counts = replay.check(replay_of(log_of(tmp_path / "a.csv", rows), side_file))
    assert (counts.rows, counts.starts, counts.transitions, counts.refused) == (7, 1, 2, 5)
    noted = {one["line"]: one for one in map(json.loads, side_file.read_text().splitlines())}
    assert set(noted) == {3, 5, 6, 7, 8}
    assert "no event of the name or title 'fly'" in noted[3]["reason"]
    assert "'pay' is no move of machine 'order' from state 'shipped'; allowed: none, it is final" in noted[5]["reason"]
    assert "from state 'placed'; allowed: pay" in noted[6]["reason"]
    assert "control character" in noted[7]["reason"]
    assert noted[8]["row"] == {"case": "3", "event": "pay", "at": "never"}


def test_a_run_without_refusals_removes_the_side_file_of_another(tmp_path: Path) -> None:
    side_file = tmp_path / "refused.jsonl"
    side_file.write_text('{"line":2,"reason":"refused","row":{}}\n')
    replay.check(replay_of(log_of(tmp_path / "a.csv", [("1", "pay", "2024-01-01")]), side_file))
    assert not side_file.exists()


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidDataError, match="No such file"):
        LogFile(tmp_path / "missing.csv", COLUMNS).survey()
    with pytest.raises(errors.InvalidDataError, match=r"should end with \.csv or \.jsonl"):
        LogFile(tmp_path / "log.xes", COLUMNS)
    with pytest.raises(errors.InvalidDataError, match="delimiter 'ab' is refused"):
        LogFile(tmp_path / "log.csv", COLUMNS, delimiter="ab")
    with pytest.raises(errors.InvalidDataError, match="encoding 'klingon' is refused"):
        LogFile(tmp_path / "log.csv", COLUMNS, encoding="klingon")
    utf16 = tmp_path / "utf16.csv"
    utf16.write_bytes("case,event,at\n1,pay,2024-01-01\n".encode("utf-16"))
    with pytest.raises(errors.InvalidDataError, match="looks like UTF-16"):
        LogFile(utf16, COLUMNS).survey()
    assert LogFile(utf16, COLUMNS, encoding="utf-16").survey().rows == 1


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    path = tmp_path / "bom.csv"
    path.write_text("case,event,at\n1,pay,2024-01-01\n", encoding="utf-8-sig")
    assert LogFile(path, COLUMNS).survey().cases == 1
