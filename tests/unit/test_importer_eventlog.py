"""Reading event logs: timestamps, CSV, JSONL, and what is said of lines that cannot be used."""

from __future__ import annotations

import csv
import io
import json
from datetime import UTC, datetime
from typing import Any

import pytest

from statecache.core import errors, eventlog, spreadsheet
from statecache.core.eventlog import Columns, Refused, Row

COLUMNS = Columns("case", "event", "at", "who", {"note": "note"})
NOON = datetime(2024, 5, 31, 12, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    "value",
    [
        "2024-05-31T12:00:00Z",
        "2024-05-31T14:00:00+02:00",
        "2024-05-31 14:00:00.000000+0200",
        "2024-05-31 14:00:00 +02:00",
        "2024-05-31 12:00",
        "2024/5/31 12:00:00",
        "20240531T120000Z",
        " 2024-05-31T12:00:00,000 UTC ",
        "1717156800",
        "1717156800.0",
        "1717156800000",
        1717156800,
        1717156800.0,
        1717156800000,
        "1717156800000000",
        1717156800000000000,
    ],
)
def test_a_moment_in_every_usual_form(value: object) -> None:
    assert eventlog.moment(value) == NOON


@pytest.mark.parametrize(
    "value", ["", "yesterday", "31/05/2024 12:00", "2024-13-01", "0001-01-01T00:00:00+02:00", True, 1e30, []]
)
def test_a_time_that_would_have_to_be_guessed_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="ISO 8601"):
        eventlog.moment(value)


@pytest.mark.parametrize("value", ["20240531", 20240531])
def test_a_date_is_a_date_and_no_number_of_seconds(value: object) -> None:
    assert eventlog.moment(value) == datetime(2024, 5, 31, tzinfo=UTC)


@pytest.mark.parametrize("value", ["20241331", 20241331])
def test_eight_digits_that_are_no_date_are_refused(value: object) -> None:
    """As a number of seconds it would be a day of 1970, which nobody meant."""
    with pytest.raises(ValueError, match="ISO 8601"):
        eventlog.moment(value)


def read_csv(*lines: str, columns: Columns = COLUMNS, delimiter: str = ",") -> list[Row | Refused]:
    return list(eventlog.from_csv([line + "\n" for line in lines], columns, delimiter))


def test_csv_rows() -> None:
    rows = read_csv("case,event,at,who,note", "1,pay,2024-05-31T12:00Z,ann,", "", '2,"a\nb",2024-05-31,,"x, y"')
    assert isinstance(rows[0], Row)
    assert isinstance(rows[1], Row)
    assert (rows[0].line, rows[0].id, rows[0].event, rows[0].at, rows[0].actor, rows[0].data) == (
        2,
        "1",
        "pay",
        NOON,
        "ann",
        {},
    )
    assert (rows[1].line, rows[1].event, rows[1].actor, rows[1].data) == (4, "a\nb", None, {"note": "x, y"})


ODD = ("@x", "'@x", "''@x", "=x", "'=x", "-1", "+1", "-", "'", " =x", "x'y", "x,y", 'x"y', "\ufeffx", "\t=x")


def test_a_text_and_its_cell_belong_to_each_other() -> None:
    cells = [spreadsheet.guarded(text) for text in ODD]
    assert [spreadsheet.plain(cell) for cell in cells] == list(ODD)
    assert not [cell for cell in cells if cell[0] in "=+-@\t\r"]


@pytest.mark.parametrize("ours", [True, False])
def test_apostrophes_of_our_own_export_are_taken_off(ours: bool) -> None:
    """A file of others means them."""
    header = spreadsheet.COLUMNS if ours else spreadsheet.COLUMNS[:-1]
    text = io.StringIO()
    writer = csv.DictWriter(text, header, extrasaction="ignore")
    writer.writeheader()
    for id in ODD:
        guarded = spreadsheet.guarded(id)
        writer.writerow({"id": guarded, "event": "pay", "at": "2024-05-31", "actor": guarded})
    rows = eventlog.from_csv(io.StringIO(text.getvalue(), newline=""), Columns("id", "event", "at", "actor"))
    wanted = ODD if ours else [spreadsheet.guarded(id) for id in ODD]
    assert [(row.id, row.actor) for row in rows if isinstance(row, Row)] == [(id, id) for id in wanted]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (",pay,2024-05-31,,", "column 'case' is empty"),
        ("1,  ,2024-05-31,,", "column 'event' is empty"),
        ("1,pay,,,", "column 'at' is empty"),
        ("1,pay,soon,,", "timestamp 'soon' is refused"),
        ("1,pay,2024-05-31", "it has 3 fields, the first line names 5 columns"),
        ("1,pay,2024-05-31,,,,", "it has 7 fields"),
        ("1,p\udce4y,2024-05-31,,", "no UTF-8 text"),
        ("1,pay,2024-05-31,,\udcff", "no UTF-8 text"),
    ],
)
def test_a_csv_row_that_cannot_be_used_is_refused_with_its_line(line: str, reason: str) -> None:
    good = "2,pay,2024-05-31,,"
    refused, kept = read_csv("case,event,at,who,note", line, good)
    assert isinstance(refused, Refused)
    assert refused.line == 2
    assert reason in refused.reason
    assert isinstance(kept, Row)


def test_a_missing_column_is_named_with_those_that_are_there() -> None:
    with pytest.raises(errors.InvalidDataError, match=r"no column 'who'; it has 'case', 'event', 'at', 'note'"):
        read_csv("case,event,at,note", "1,pay,2024-05-31,")


def test_a_wrong_delimiter_is_guessed_aloud() -> None:
    with pytest.raises(errors.InvalidDataError, match="do its fields end with ';'"):
        read_csv("case;event;at;who;note", "1;pay;2024-05-31;;")
    assert isinstance(read_csv("case;event;at;who;note", "1;pay;2024-05-31;;", delimiter=";")[0], Row)


def test_a_column_that_stands_twice_is_refused() -> None:
    with pytest.raises(errors.InvalidDataError, match="column 'case' is refused: the file has 2"):
        read_csv("case,case,event,at,who,note", "1,1,pay,2024-05-31,,")


def test_an_empty_file_is_refused() -> None:
    with pytest.raises(errors.InvalidDataError, match="empty"):
        read_csv()


def test_an_open_quote_is_told_with_its_line() -> None:
    huge = "x" * eventlog.FIELD_BYTES_MAX
    with pytest.raises(errors.InvalidDataError, match=r"from line 2 on.*is a quote left open"):
        read_csv("case,event,at,who,note", f'1,"pay,{huge}', "2,pay,2024-05-31,,")


def read_jsonl(*values: Any, columns: Columns = COLUMNS) -> list[Row | Refused]:
    lines = [value if isinstance(value, str) else json.dumps(value) for value in values]
    return list(eventlog.from_jsonl([line + "\n" for line in lines], columns))


def test_jsonl_rows_keep_their_values() -> None:
    row = {"case": 7, "event": "pay", "at": 1717156800, "who": "ann", "note": {"deep": [1, None]}}
    found = read_jsonl(row, "", {**row, "note": None, "who": None})
    assert isinstance(found[0], Row)
    assert isinstance(found[1], Row)
    assert (found[0].id, found[0].at, found[0].data) == ("7", NOON, {"note": {"deep": [1, None]}})
    assert (found[1].line, found[1].actor, found[1].data) == (3, None, {})


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "it is no JSON"),
        ("[1]", "it is no JSON object"),
        ('{"case": "1", "event": "pay", "at": NaN}', "JSON knows no NaN"),
        ('{"case": true, "event": "pay", "at": 0}', "column 'case': True is no text"),
        ('{"event": "pay", "at": 0}', "column 'case' is empty"),
        ('{"case": "\\ud800", "event": "pay", "at": 0}', "no UTF-8 text"),
    ],
)
def test_a_jsonl_line_that_cannot_be_used_is_refused(line: str, reason: str) -> None:
    good = {"case": 1, "event": "pay", "at": 0, "who": "x", "note": 1}
    refused, _ = read_jsonl(line, good)
    assert isinstance(refused, Refused)
    assert reason in refused.reason


def test_a_column_that_stands_in_no_jsonl_line_is_named() -> None:
    with pytest.raises(errors.InvalidDataError, match="no column 'note'; it has 'case', 'event', 'at', 'who'"):
        read_jsonl({"case": 1, "event": "pay", "at": 0, "who": "x"})


def test_columns_become_field_names() -> None:
    assert eventlog.fields_of(["case:channel", "1st", "ok"]) == {
        "case:channel": "case_channel",
        "1st": "_1st",
        "ok": "ok",
    }
    with pytest.raises(errors.InvalidDataError, match="another one becomes the field 'a_b' too"):
        eventlog.fields_of(["a b", "a:b"])


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "number"}, "12.5", 12.5),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "12", 12),
        ({"type": "boolean"}, "True", True),
        ({"type": ["number", "string"]}, "12", "12"),
        ({"type": "number"}, "twelve", "twelve"),
        ({"type": "string"}, "12", "12"),
        ({}, "12", "12"),
        (None, "12", "12"),
    ],
)
def test_csv_text_becomes_what_the_schema_asks_for(schema: dict[str, Any] | None, text: str, value: object) -> None:
    assert eventlog.typed(schema, text) == value
