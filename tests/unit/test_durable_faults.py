"""Which of our errors a driver's error becomes, and what its message tells and hides."""

from __future__ import annotations

import sqlite3

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import pysqlite

from statecache.core import errors
from statecache.durable import engine, faults


def _wrapped(original: Exception) -> sa.exc.DBAPIError:
    return sa.exc.DBAPIError("SELECT secret", {"value": "secret"}, original, hide_parameters=True)


@pytest.mark.parametrize(
    ("sqlstate", "kind"),
    [
        ("40001", faults.Transient),
        ("40P01", faults.Transient),
        ("55P03", faults.Transient),
        ("57014", faults.Transient),
        ("23505", faults.KeyHit),
        ("23502", faults.Refused),
        ("22021", faults.Refused),
        ("54000", faults.Refused),
        ("42P01", errors.ConfigurationError),
        ("42501", errors.ConfigurationError),
        ("3D000", errors.ConfigurationError),
        ("28P01", errors.ConfigurationError),
        ("57P01", errors.UnavailableError),
        ("25P03", errors.UnavailableError),
        ("25006", errors.UnavailableError),
        ("53100", errors.UnavailableError),
        ("08006", errors.UnavailableError),
        ("XX000", errors.UnavailableError),
    ],
)
def test_postgresql_codes(sqlstate: str, kind: type[Exception]) -> None:
    # A code's class knows neither its class of errors nor ours: only the code decides.
    original = psycopg.errors.lookup(sqlstate)("quoted data")
    assert faults.kind_of(_wrapped(original)) is kind
    assert faults.kind_of(original) is kind


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("SQLITE_BUSY", faults.Transient),
        ("SQLITE_BUSY_SNAPSHOT", faults.Transient),
        ("SQLITE_CONSTRAINT_PRIMARYKEY", faults.KeyHit),
        ("SQLITE_CONSTRAINT_UNIQUE", faults.KeyHit),
        ("SQLITE_CONSTRAINT_NOTNULL", faults.Refused),
        ("SQLITE_TOOBIG", faults.Refused),
        ("SQLITE_READONLY_DIRECTORY", errors.ConfigurationError),
        ("SQLITE_CANTOPEN", errors.ConfigurationError),
        ("SQLITE_NOTADB", errors.ConfigurationError),
        ("SQLITE_FULL", errors.UnavailableError),
        ("SQLITE_IOERR_FSYNC", errors.UnavailableError),
        ("SQLITE_CORRUPT", errors.IntegrityError),
    ],
)
def test_sqlite_codes(name: str, kind: type[Exception]) -> None:
    original = sqlite3.OperationalError("quoted data")
    original.sqlite_errorname = name
    assert faults.kind_of(_wrapped(original)) is kind


def test_errors_without_a_code() -> None:
    assert faults.kind_of(_wrapped(psycopg.OperationalError("Connection refused"))) is errors.UnavailableError
    refused = psycopg.OperationalError('FATAL: password authentication failed for user "x"')
    assert faults.kind_of(_wrapped(refused)) is errors.ConfigurationError
    assert faults.kind_of(sa.exc.TimeoutError("QueuePool limit reached")) is errors.UnavailableError
    assert faults.kind_of(UnicodeEncodeError("utf-8", "\ud800", 0, 1, "half a pair")) is faults.Refused
    assert faults.kind_of(OverflowError()) is faults.Refused
    assert faults.kind_of(sa.exc.ArgumentError("a mistake of ours")) is None


def _sqlite(name: str) -> sqlite3.OperationalError:
    original = sqlite3.OperationalError("no")
    original.sqlite_errorname = name
    return original


@pytest.mark.parametrize(
    ("original", "advice"),
    [
        (
            psycopg.OperationalError('FATAL: password authentication failed for user "x"'),
            "check the user, the password",
        ),
        (psycopg.OperationalError('FATAL: database "x" does not exist'), "the database's name in database_url"),
        (psycopg.errors.lookup("28P01")("no"), "check the user, the password"),
        (psycopg.errors.lookup("3D000")("no"), "the database's name in database_url"),
        (psycopg.errors.lookup("42501")("no"), "db check"),
        (psycopg.OperationalError('invalid sslmode value: "sometimes"'), "the options at its end"),
        (psycopg.ProgrammingError("bad value for connect_timeout: 'x'"), "the options at its end"),
        (psycopg.ProgrammingError('invalid connection option "x"'), "the options at its end"),
        (psycopg.OperationalError('root certificate file "/ca.pem" does not exist'), "check sslrootcert"),
        (psycopg.OperationalError('could not read root certificate file "/ca.pem": no'), "check sslrootcert"),
        (psycopg.OperationalError('certificate present, but not private key file "/key"'), "sslcert and sslkey"),
        (psycopg.OperationalError('private key file "/key" has group or world access'), "sslcert and sslkey"),
        (psycopg.OperationalError("FATAL: connection requires a valid client certificate"), "sslcert and sslkey"),
        (psycopg.OperationalError("SSL error: tlsv1 alert unknown ca"), "sslcert and sslkey"),
        (psycopg.OperationalError("SSL error: ssl/tls alert certificate expired"), "sslcert and sslkey"),
        (psycopg.errors.lookup("42P01")("no"), "run 'statecache db upgrade'"),
        (psycopg.errors.lookup("42703")("no"), "run 'statecache db upgrade'"),
        (_sqlite("SQLITE_CANTOPEN"), "check its path"),
        (_sqlite("SQLITE_READONLY_DIRECTORY"), "may write there"),
        (_sqlite("SQLITE_ERROR"), "run 'statecache db upgrade'"),
    ],
)
def test_the_advice_is_for_what_is_wrong(original: Exception, advice: str) -> None:
    """Only missing tables are a matter of 'db upgrade': elsewhere it would make a second, empty store."""
    with (
        pytest.raises(errors.ConfigurationError) as told,
        faults.translated(pysqlite.dialect(dbapi=sqlite3)),
    ):
        raise _wrapped(original)
    assert advice in str(told.value)
    assert ("db upgrade" in str(told.value)) == ("db upgrade" in advice)


@pytest.mark.parametrize(
    "told",
    [
        "SSL error: certificate verify failed",
        'server certificate for "a" does not match host name "b"',
        "server does not support SSL, but SSL was required",
    ],
)
def test_a_server_that_does_not_prove_who_it_is(told: str) -> None:
    """As libpq says it. It may be mended over there, so whoever waits for SQL goes on waiting."""
    with (
        pytest.raises(errors.UnavailableError, match="sslrootcert"),
        faults.translated(pysqlite.dialect(dbapi=sqlite3)),
    ):
        raise _wrapped(psycopg.OperationalError(told))


@pytest.mark.parametrize("kind", [psycopg.errors.InvalidSqlStatementName, psycopg.errors.DuplicatePreparedStatement])
def test_a_pooler_without_prepared_statements_is_told_of(kind: type[psycopg.Error]) -> None:
    """What PgBouncer 1.18 answers in transaction mode."""
    with (
        pytest.raises(errors.StateCacheError, match="prepare_threshold=none"),
        faults.translated(pysqlite.dialect(dbapi=sqlite3)),
    ):
        raise _wrapped(kind('prepared statement "_pg3_0"'))


def test_data_stays_out_of_messages_and_the_driver_error_is_the_cause() -> None:
    dialect = pysqlite.dialect(dbapi=sqlite3)
    original = psycopg.errors.UniqueViolation("Key (id)=(secret) already exists.")
    with pytest.raises(faults.KeyHit) as hit, faults.translated(dialect):
        raise _wrapped(original)
    assert "secret" not in str(hit.value)
    assert "23505" in str(hit.value)
    assert hit.value.__cause__ is original


def test_mistakes_of_the_program_pass_through() -> None:
    with pytest.raises(sa.exc.ArgumentError), faults.translated(pysqlite.dialect(dbapi=sqlite3)):
        raise sa.exc.ArgumentError("no")


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("", "cannot be read"),
        ("not a url", "cannot be read"),
        ("postgresql://user:s3cret@host:port/db", "cannot be read"),
        ("postgresql://user:half@s3cret@host/db", "@ is %40"),
        ("postgresql://user:half@s3cret/more@host:5432/db?sslmode=require", "@ is %40"),
        ("postgresql://user:half@s3cret?more@host/db", "@ is %40"),
        ("nosuchdb://user:s3cret@host/db", "knows no database 'nosuchdb'"),
        ("mysql+pymysql://user:s3cret@host/db", r"driver for 'mysql\+pymysql' is not installed"),
        ("sqlite+aiosqlite:///x.db", "driver"),
        ("sqlite://", "name a file"),
        ("sqlite:///:memory:", "name a file"),
        ("sqlite:///file:x?mode=memory&uri=true", "name a file"),
        ("postgresql://user:s3cret@host/db?prepare_threshold=often", "prepare_threshold is refused"),
        ("postgresql://user:s3cret@host/db?prepare_threshold=0", "prepare_threshold is refused"),
    ],
)
def test_urls_that_cannot_work(url: str, told: str) -> None:
    with pytest.raises(errors.ConfigurationError, match=told) as refused:
        engine.open_database(url)
    assert "s3cret" not in str(refused.value)
    assert "s3cret" not in repr(refused.value.__cause__)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://user:half%40s3cret@host/db",
        "postgresql://user@server:s3cret@host/db",
        "postgresql://user:s3cret@/db?host=/run/a@b&host=other@c",
        "sqlite:///a:b@c@d.db",
    ],
)
def test_where_an_at_may_stand(url: str) -> None:
    assert "s3cret" not in engine.open_database(url).name


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_the_usual_spellings_of_postgresql(scheme: str) -> None:
    database = engine.open_database(f"{scheme}://user:s3cret@host/db")
    assert database.dialect.driver == "psycopg"
    assert "s3cret" not in database.name
