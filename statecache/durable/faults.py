"""The errors of this package, and the one place where drivers' errors become ours.

The flusher tells four answers of SQL apart: try the same again (``Transient``), come back when it is there
(``UnavailableError``), this data will never go in (``Refused``), and somebody else has been here (``Overtaken``,
``Superseded``, ``KeyHit``). A driver's message may hold values, so only constraint names and codes go into ours; the
driver's error stays as ``__cause__``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import sqlalchemy as sa

from statecache.core import errors


class Transient(errors.UnavailableError):
    """A deadlock, a lock or statement timeout, a busy file: the transaction was rolled back; run the same one again."""


class CommitUnknown(errors.UnavailableError):
    """The connection was lost while COMMIT was under way: read the watermark (or the owner) back, never just repeat."""


class Overtaken(errors.StateCacheError):
    """The partition's row is not what the caller read: another flusher or a recovery went ahead. Drop everything read."""


class Superseded(errors.StateCacheError):
    """The store belongs to a newer recovery: this one has ended."""


class Refused(errors.StateCacheError):
    """SQL refuses the transaction for its data: repeating it cannot help. Bisect to the entry."""


class KeyHit(errors.IntegrityError):
    """A key that must be new is there already: an entry flushed before (a replay) or another one in its place (a fork)."""


# PostgreSQL: the first match of the whole code, then of its class. Codes as in its manual, appendix A.
_SQLSTATES: dict[str, type[errors.StateCacheError]] = {
    "40001": Transient,  # serialization failure
    "40P01": Transient,  # deadlock
    "55P03": Transient,  # lock timeout
    "57014": Transient,  # statement timeout or cancelled
    "23505": KeyHit,
    "54000": Refused,  # a limit of the server, such as the size of an index entry
    "22": Refused,
    "23": Refused,
    "28": errors.ConfigurationError,  # role or password
    "3D": errors.ConfigurationError,  # no such database
    "3F": errors.ConfigurationError,  # no such schema
    "42": errors.ConfigurationError,  # no such table or column, no privilege
    "54": Refused,
    "P0": Refused,  # a trigger of the operator's raised it
}
_SQLITE_NAMES: dict[str, type[errors.StateCacheError]] = {
    "SQLITE_BUSY": Transient,
    "SQLITE_LOCKED": Transient,
    "SQLITE_CONSTRAINT_PRIMARYKEY": KeyHit,
    "SQLITE_CONSTRAINT_UNIQUE": KeyHit,
    "SQLITE_CONSTRAINT": Refused,
    "SQLITE_MISMATCH": Refused,
    "SQLITE_TOOBIG": Refused,
    "SQLITE_CORRUPT": errors.IntegrityError,
    "SQLITE_CANTOPEN": errors.ConfigurationError,
    "SQLITE_READONLY": errors.ConfigurationError,
    "SQLITE_NOTADB": errors.ConfigurationError,
    "SQLITE_PERM": errors.ConfigurationError,
    "SQLITE_ERROR": errors.ConfigurationError,  # no such table or column: statements are fixed
}
_REFUSED_LOGINS = (
    "authentication failed",
    "no password supplied",
    "no pg_hba.conf entry",
    "does not exist",
    "is not permitted to log in",
    "permission denied for database",
)
_REFUSED_OPTIONS = (
    "connection option",
    "bad value for",
    "invalid integer value",
    "invalid sslmode value",
    "invalid port number",
)
_UNUSABLE_CERTIFICATES = (
    "certificate file",
    "private key file",
    "requires a valid client certificate",
    "alert certificate",
    "alert unknown ca",
)
"""Libpq cannot use a file that ``database_url`` names, or one in the user's folder; or the server refuses what is in it."""
_UNTRUSTED_SERVERS = ("certificate verify failed", "does not match host name", "server does not support SSL")
_MESSAGES: dict[type[errors.StateCacheError], str] = {
    Transient: "SQL gave way to another transaction; run it again",
    KeyHit: "SQL already holds a row with this key",
    Refused: "SQL refuses this data",
    errors.IntegrityError: "the database is damaged",
    errors.UnavailableError: "SQL could not be reached or gave up",
}

_LOGIN = "SQL refuses the login: check the user, the password and the database's name in database_url"
_CONFIGURATIONS = (
    (("28", "3D"), _LOGIN),
    (("42501",), "SQL does not give this user a right that it needs: 'statecache db check' tells what to grant"),
    (
        ("SQLITE_CANTOPEN", "SQLITE_NOTADB", "SQLITE_PERM", "SQLITE_READONLY"),
        "SQLite cannot use this file: check its path (database_url, data_dir), and whether this user may write there",
    ),
    (
        ("",),
        "SQL refuses to work with this configuration (if tables or columns are missing, run 'statecache db upgrade')",
    ),
)
"""What to do about a ``ConfigurationError``, by how the driver's code begins."""

_OF_PREPARED_STATEMENTS = ("26000", "42P05")
_POOLER = (
    "; behind a transaction pooler that knows no prepared statements, put ?prepare_threshold=none at the end of the database's "
    "URL"
)
_UNTRUSTED = (
    "; the server does not prove who it is, as sslmode in database_url wants it: it has no TLS, or its certificate has "
    "expired, is for another host name, or was not signed by whom sslrootcert names"
)


def kind_of(error: BaseException) -> type[errors.StateCacheError] | None:
    """Return the class of ours that a driver's error means, or None for a mistake of the program."""
    original = getattr(error, "orig", None) or error
    if isinstance(original, (UnicodeEncodeError, OverflowError)):
        return Refused
    sqlstate = getattr(original, "sqlstate", None)
    if sqlstate:
        known = _SQLSTATES.get(sqlstate) or _SQLSTATES.get(sqlstate[:2])
        return known or errors.UnavailableError
    name = getattr(original, "sqlite_errorname", None)
    if name:
        return _SQLITE_NAMES.get(name) or _SQLITE_NAMES.get(name.rsplit("_", 1)[0]) or errors.UnavailableError
    if isinstance(error, sa.exc.TimeoutError):
        return errors.UnavailableError
    return _kind_by_class(original)


def _kind_by_class(original: BaseException) -> type[errors.StateCacheError] | None:
    """By the class names of PEP 249, for errors that carry no code and for other drivers."""
    names = {ancestor.__name__ for ancestor in type(original).__mro__}
    if names & {"OperationalError", "InterfaceError"}:
        refusals = (*_REFUSED_LOGINS, *_REFUSED_OPTIONS, *_UNUSABLE_CERTIFICATES)
        return errors.ConfigurationError if _says(original, refusals) else errors.UnavailableError
    # Psycopg's own, of what stands in the URL.
    if "ProgrammingError" in names and _says(original, _REFUSED_OPTIONS):
        return errors.ConfigurationError
    if "IntegrityError" in names:
        return KeyHit
    return Refused if "DataError" in names else None


def _says(error: BaseException, texts: Iterable[str]) -> bool:
    return any(text in str(error) for text in texts)


def _message(kind: type[errors.StateCacheError], error: BaseException) -> str:
    """What is wrong, and for a wrong configuration what to look at."""
    if kind is not errors.ConfigurationError:
        return _MESSAGES.get(kind, _MESSAGES[errors.UnavailableError])
    original = getattr(error, "orig", None) or error
    code = getattr(original, "sqlstate", None) or getattr(original, "sqlite_errorname", None)
    if code:
        return next(advice for begins, advice in _CONFIGURATIONS if code.startswith(begins))
    if _says(original, _REFUSED_OPTIONS):
        return "SQL's driver refuses database_url: check its host, its port and the options at its end"
    if _says(original, _UNUSABLE_CERTIFICATES):
        return "SQL cannot be reached with these certificates: check sslrootcert, sslcert and sslkey in database_url"
    return _LOGIN


def _detail(kind: type[errors.StateCacheError], error: BaseException) -> str:
    """Driver's class and code, and its message unless that may quote the data."""
    original = getattr(error, "orig", None) or error
    code = getattr(original, "sqlstate", None) or getattr(original, "sqlite_errorname", None)
    constraint = getattr(getattr(original, "diag", None), "constraint_name", None)
    parts = [type(original).__name__, code, constraint]
    if kind not in (Refused, KeyHit):
        parts.append(": " + (str(original).splitlines() or [""])[0])
    hint = _POOLER if code in _OF_PREPARED_STATEMENTS else ""
    if kind is errors.UnavailableError and _says(original, _UNTRUSTED_SERVERS):
        hint = _UNTRUSTED
    return " ".join(part for part in parts if part).replace(" : ", ": ") + hint


@contextlib.contextmanager
def translated(dialect: sa.Dialect) -> Iterator[None]:
    """Raise ours instead of the driver's errors; ``__cause__`` is the driver's."""
    try:
        yield
    except (sa.exc.SQLAlchemyError, dialect.loaded_dbapi.Error, UnicodeEncodeError, OverflowError) as error:
        kind = kind_of(error)
        if kind is None:
            original = getattr(error, "orig", None)
            if original is None:
                raise
            raise original from error  # a signal's handler raised it while SQLAlchemy prepared the statement
        raise kind(f"{_message(kind, error)} ({_detail(kind, error)})") from (getattr(error, "orig", None) or error)
