"""The log: JSON lines that a collector can read, lines for people that cannot steer a terminal, and no secret in either."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

import pytest

from statecache import logs

URL = "redis://user:s3cret@host:6379/0"


def record(message: str, *arguments: object, **fields: Any) -> logging.LogRecord:
    made = logging.getLogger("statecache.test").makeRecord(
        "statecache.test", logging.WARNING, "file.py", 1, message, arguments, fields.pop("exc_info", None), extra=fields
    )
    made.created = 1767225600.25
    return made


def as_json(made: logging.LogRecord) -> dict[str, Any]:
    line = logs.JsonFormatter().format(made)
    assert "\n" not in line
    found: dict[str, Any] = json.loads(line, parse_constant=pytest.fail)
    return found


def test_json_lines_have_time_level_logger_message_and_fields() -> None:
    fields = {"instance": "order:1", "entry": "3-7", "epoch": 3, "partition": 5, "seconds": 0.5}
    assert as_json(record("dead letter: %s", "order:1", **fields)) == {
        "time": "2026-01-01T00:00:00.250+00:00", "level": "warning", "logger": "statecache.test",
        "message": "dead letter: order:1", **fields,
    }  # fmt: skip


def test_fields_may_be_anything() -> None:
    found = as_json(
        record("x", time="own", level="own", odd=object, deep={"a": [1, URL]}, endless=float("inf"), none=None)
    )
    assert (found["time_"], found["level_"], found["level"]) == ("own", "own", "warning")
    assert (found["endless"], found["none"]) == ("inf", None)
    assert found["deep"] == {"a": [1, "redis://user:***@host:6379/0"]}
    assert "object" in found["odd"]


def test_exceptions_are_fields() -> None:
    try:
        raise ValueError(f"refused: {URL}")
    except ValueError:
        made = record("broken", exc_info=sys.exc_info())
    found = as_json(made)["exception"]
    assert (found["type"], found["message"]) == ("ValueError", "refused: redis://user:***@host:6379/0")
    assert found["traceback"].startswith("Traceback")
    text = logs.TextFormatter().format(made)
    assert "ValueError: refused" in text
    assert "s3cret" not in text + json.dumps(found)


@pytest.mark.parametrize(
    "message",
    [
        f"cannot reach {URL}",
        f"'{URL}'",
        "postgresql+psycopg://me:s3cret@[::1]:5432/db?sslmode=require failed",
        "postgresql://me:pa:s3cret@h/db",
        "unix:///run/redis.sock?password=s3cret",
        "rediss://:s3cret@h",
        'connection to "host=h user=me password=s3cret dbname=x" failed',
        f"two: {URL} {URL}",
    ],
)
def test_no_password_of_a_url(message: str) -> None:
    for made in (record(message), record("%s", message), record("x", field=message)):
        assert "s3cret" not in logs.JsonFormatter().format(made)
        assert "s3cret" not in logs.TextFormatter().format(made)


def test_text_lines_cannot_steer_a_terminal() -> None:
    line = logs.TextFormatter().format(record("id \x1b[2J\u202e and\nanother line"))
    assert "\x1b" not in line
    assert "\n" not in line
    assert "\u202e" not in line
    assert " warning: id " in line
