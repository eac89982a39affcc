"""What processes say of themselves on standard error: lines for people, or one JSON object a line for a log collector.

The library itself only logs (standard ``logging``, loggers ``statecache...`` and ``workers...``); who runs it decides where
that goes. Commands that go on call ``to_stderr``.

No line holds a secret: whatever looks like a URL is shown without its password, in messages, fields and tracebacks alike,
because errors of drivers quote what they were given.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal

LOGGERS = ("statecache", "workers")
LogFormat = Literal["text", "json"]

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s\"'<>]+")
_PASSWORD = re.compile(r"(?P<name>\b(?:password|passwd|pwd)\s*=\s*)\S+", re.IGNORECASE)
"""As connection strings of database drivers have it."""
_STEERING = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_STANDARD = frozenset([*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"])
_OWN = frozenset({"time", "level", "logger", "message", "exception"})


def scrubbed(text: str) -> str:
    """The text with the passwords of all URLs in it hidden."""
    if "://" in text:
        from statecache.settings import redact  # costs a short command 0.2 s, and most texts hold no URL

        text = _URL.sub(lambda found: redact(found.group()), text)
    return _PASSWORD.sub(r"\g<name>***", text)


def escaped(text: str) -> str:
    """The text with every character that could steer a terminal as an escape."""
    return _STEERING.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """What was logged with ``extra=``: ``instance``, ``entry``, ``epoch``, ``partition`` and so on."""
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}


class TextFormatter(logging.Formatter):
    """``12:00:00 warning: what happened``; a traceback, if there is one, in lines behind it."""

    def format(self, record: logging.LogRecord) -> str:
        line = f"{self.formatTime(record, '%H:%M:%S')} {record.levelname.lower()}: {escaped(scrubbed(record.getMessage()))}"
        if record.exc_info and record.exc_info[0] is not None:
            trace = scrubbed(self.formatException(record.exc_info))
            line += "".join(f"\n  {escaped(part)}" for part in trace.splitlines())
        return line


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, the fields of the record, and ``exception`` with its type,
    message and traceback. A field that has the name of one of these gets an underscore behind it."""

    def format(self, record: logging.LogRecord) -> str:
        document: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": scrubbed(record.getMessage()),
        }
        for name, value in fields_of(record).items():
            document[f"{name}_" if name in _OWN else name] = _plain(value)
        if record.exc_info and record.exc_info[0] is not None:
            kind, error, _ = record.exc_info
            document["exception"] = {
                "type": kind.__name__,
                "message": scrubbed(str(error)),
                "traceback": scrubbed(self.formatException(record.exc_info)),
            }
        return json.dumps(document, ensure_ascii=True, default=str)


def _plain(value: Any) -> Any:
    """A field's value as JSON has it, without secrets, whatever it is."""
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if value - value == 0 else str(value)  # JSON has no infinity
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(one) for one in value]
    return scrubbed(str(value))


def to_stderr(level: int, format: LogFormat = "text") -> None:
    """Send the package's log, from ``level`` on, to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(level)
        logger.propagate = False


def speaks_json() -> bool:
    """Whether the log on standard error is JSON: then nothing else should be written there."""
    return any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger(LOGGERS[0]).handlers)
