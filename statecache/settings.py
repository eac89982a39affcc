"""What an operator may set, from where, and what is said when it is wrong.

A value is looked for in the explicit arguments, then in the environment (``STATECACHE_`` and the upper-case name), then
in the TOML file that ``config_file`` names, then here. Whatever is refused - a value, an unknown name in the file, an
unknown ``STATECACHE_`` variable - is a ``ConfigurationError`` that tells the name, the place, the value (with the
passwords of URLs hidden) and the rule: a misspelt setting that is silently not in force is found at the worst moment.

This is the only module that reads the environment.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
import urllib.parse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import pydantic_settings
from pydantic import Field
from pydantic.fields import FieldInfo
from pydantic_settings import PydanticBaseSettingsSource

from statecache.core import codec, errors, keys, model

ENV_PREFIX = "STATECACHE_"
_FOREIGN_VARIABLES = re.compile(r"STATECACHE_(FAILPOINT.*|TEST_.*)")
"""Variables with our prefix that other parts read: failpoints, the test suite."""

Positive = Annotated[int, Field(gt=0)]
PositiveSeconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fields = Annotated[int, Field(gt=0, le=3000)]
"""A script hands names and values to one HSET on Lua's stack, which holds 8,000, and it does so behind its XADD."""


class Settings(pydantic_settings.BaseSettings):
    """All settings of one store. Immutable; raises ``ConfigurationError``, whatever is wrong.

    An explicit argument that is None counts as not given.
    """

    model_config = pydantic_settings.SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
        use_attribute_docstrings=True,
    )

    config_file: Path | None = None
    """TOML file with what neither the arguments nor the environment give. Read only if named: none is searched for."""

    redis_url: str | None = None
    """``redis://``, ``rediss://`` or ``unix://`` URL of Redis >= 7.0 or Valkey >= 7.2. Without one, the embedded server
    of ``data_dir`` is used."""

    database_url: str | None = None
    """SQLAlchemy URL of the database, such as ``postgresql+psycopg://user@host/name``. Without one, a SQLite file in
    ``data_dir`` is used."""

    data_dir: Path = Path("statecache-data")
    """Folder of the embedded server and of the SQLite file. Not used when both URLs are given."""

    namespace: str = "statecache"
    """First part of every Redis key: several stores may share a Redis under different namespaces. Each has a database."""

    partition_count: int = 16
    """Number of shards of a store. Fixed when the store is created; later it must be the same everywhere."""

    durability: model.Durability = model.Durability.HOT
    """What must be true before a call returns that does not say it itself: hot, fsync, replica or durable."""

    replicas: Positive = 1
    """How many replicas must have received a transition of durability ``replica``."""

    auto_recover: bool = True
    """Whether whoever first meets a Redis that restarted or lost data recovers it. If not, calls raise
    ``RecoveringError`` until ``statecache recover`` is run."""

    identity_check: Literal["interval", "always"] = "interval"
    """How often a script compares the server's identity: ``interval`` (see ``identity_check_interval_ms``), or
    ``always``, which costs 5 microseconds a script and assumes nothing about how long a failover takes."""

    identity_check_interval_ms: Positive = 500
    """With ``identity_check = "interval"``: a call later than this after its connection's last check checks again."""

    call_timeout_seconds: PositiveSeconds = 5.0
    """Deadline of a call that gives none, its retries and waits included. Kept by what Redis is asked; what bounds SQL is in
    docs/operations.md, *Timeouts*."""

    socket_timeout_seconds: PositiveSeconds = 5.0
    """Wait for one answer of Redis before the connection is closed and the call repeated on another."""

    flush_interval_ms: Positive = 50
    """Pause of the flusher when it has caught up."""

    flush_batch_entries: Positive | None = None
    """Most entries of one flush transaction. If unset, 5,000, with SQLite 10,000."""

    flush_batch_bytes: Positive = 8 * 1024 * 1024
    """Most bytes of log entries that the flusher reads at once from a partition."""

    lease_seconds: Annotated[float, Field(ge=0.2, allow_inf_nan=False)] = 4.0
    """How long after its last heartbeat (four in this time) a flusher keeps its partitions: others take over after that.
    By the database's clock; a flusher that stops says so and needs no such wait."""

    drain_timeout_seconds: Seconds = 10.0
    """How long a flusher that is told to stop goes on with what was acknowledged, if no other one takes over."""

    lag_target_seconds: PositiveSeconds = 1.0
    """Age that the oldest unflushed transition stays below while SQL is healthy: writers are slowed down for it."""

    backlog_limit_entries: Positive = 1_000_000
    """Unflushed entries of a partition at which writers are refused, SQL being away."""

    log_keep_seconds: Seconds = 0.0
    """How long flushed entries stay in Redis: at least the age of the SQL backup that one may have to restore."""

    log_format: Literal["text", "json"] = "text"
    """Form of the log of commands that go on (standard error): lines for people, or a JSON object a line."""

    log_level: Annotated[
        Literal["debug", "info", "warning", "error", "critical"],
        pydantic.BeforeValidator(lambda level: level.lower() if isinstance(level, str) else level),
    ] = "info"
    """What is logged there: this and what is graver."""

    metrics_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """Port of the ``/metrics`` endpoint of long-running commands (flusher, worker, up). None: there is none; 0: any free
    port, which is logged."""

    metrics_address: str = "127.0.0.1"
    """Address that the metrics endpoint listens on: this machine only, unless it says otherwise."""

    hot_ttl_seconds: Seconds = 0.0
    """Idle time after which a flushed instance leaves Redis, for machines that name none (``hot_ttl``). 0: never by age.
    It comes back from SQL with its next transition."""

    hot_ttl_final_seconds: Seconds = 0.0
    """The same for instances in a final state, where it is shorter. 0: as for the others."""

    hot_instances_max: Annotated[int, Field(ge=0)] = 0
    """Keys in the Redis database above which the flushed instances that are idle for longest leave, whatever their age.
    0: no bound."""

    hot_memory_share: Annotated[float, Field(ge=0, le=1)] = 0.8
    """Share of the server's ``maxmemory``, if it has one, above which they leave: room is kept for the backlog and for
    what comes. 0: no bound, writers are refused when memory is full."""

    eviction_interval_seconds: PositiveSeconds = 1.0
    """How often who flushes looks whether instances are to be evicted."""
    timeout_interval_seconds: PositiveSeconds = 1.0
    """How often whoever flushes looks for instances whose state's timeout has passed."""

    timeout_sweep_seconds: PositiveSeconds = 30.0
    """How often it asks SQL for those whose deadline Redis has lost (after a recovery it does so at once)."""

    id_length_max: Annotated[int, Field(ge=1, le=600)] = 200
    """Most characters of an instance's id."""

    patch_fields_max: Fields = 64
    """Most fields that one transition sets or unsets; up to 3,000."""

    instance_fields_max: Fields = 256
    """Most data fields of an instance; up to 3,000. One that has more, from other settings, is kept as it is."""

    patch_bytes_max: Annotated[int, Field(gt=0, le=16 * 1024 * 1024)] = 64 * 1024
    """Most bytes of one transition's patch as JSON."""

    batch_items_max: Annotated[int, Field(ge=1, le=5_000)] = 1_000
    """Most transitions of one script call; longer lists are split."""

    rq_redis_url: str | None = None
    """Redis for the background jobs (RQ), a plain server. Without one, that of the hot store. Whoever can write to it can
    enqueue these jobs: give it to nobody else."""

    job_part_seconds: PositiveSeconds = 10.0
    """How long a background job works at a stretch before it makes room for others."""

    evict_interval_seconds: Seconds = 0.0
    """How often the workers' scheduler enqueues the job that evicts cold instances; 0: never (flushers evict too)."""

    warm_after_recovery: bool = True
    """Whether the workers' scheduler enqueues the job that warms what a recovery found wiped."""

    verify_interval_seconds: Seconds = 86_400.0
    """How often the scheduler enqueues a verification of everything, done in slices; 0: never."""

    letters_interval_seconds: Seconds = 600.0
    """How often the scheduler enqueues a retry of the dead letters; 0: never."""

    retention_interval_seconds: Seconds = 0.0
    """How often the scheduler enqueues retention (see ``retention_age_days``); 0: never."""

    retention_age_days: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 365.0
    """Retention: how long ago an instance must have ended for its history to leave the database."""

    export_dir: Path | None = None
    """Folder of the files that the export job writes. Without one the job fails; ``statecache export`` needs none."""

    retention_archive_dir: Path | None = None
    """Retention: folder of the archives. Without one the periodic job deletes nothing and fails, saying so."""

    web_host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Address that ``statecache serve`` listens on. Any but a loopback one needs ``web_token``."""

    web_port: Annotated[int, Field(ge=0, le=65_535)] = 8080
    """Port of ``statecache serve``; 0 takes a free one."""

    web_token: Annotated[str, Field(min_length=16)] | None = None
    """Secret of at least 16 characters that readers (but on a loopback address) and all who act must give."""

    web_actions: bool = False
    """Whether the web pages and the JSON API may change anything. Needs ``web_token``."""

    web_ready_lag_seconds: PositiveSeconds = 60.0
    """Age of the oldest unflushed transition above which ``/readyz`` answers 503."""

    def __init__(self, **values: Any) -> None:
        refuse_unknown_variables(os.environ)
        given = {name: value for name, value in values.items() if value is not None}
        try:
            super().__init__(**given)
        except pydantic.ValidationError as error:
            # Not "from error": its text would show the values, passwords included.
            raise errors.ConfigurationError(_explained(error, given)) from None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[pydantic_settings.BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, _FileSource(settings_cls)

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _refuse_truth_values_for_numbers(cls, value: object, info: pydantic.ValidationInfo) -> object:
        """Where a number is wanted Python takes true for 1."""
        if isinstance(value, bool) and cls.model_fields[info.field_name or ""].annotation is not bool:
            raise ValueError("it is no truth value")
        return value

    @pydantic.field_validator("redis_url", "rq_redis_url")
    @classmethod
    def _check_redis_url(cls, url: str | None) -> str | None:
        if url is not None and not re.match(r"(rediss?://\S|unix://([^/?#@\s]*@)?/\S)", url):
            raise ValueError("it must begin with redis://, rediss:// or unix:///")
        if url is not None and re.match(r"rediss?://[^/?#@]*(@[^/?#@]*)?/(?!\d*([?#]|$))", url):
            raise ValueError("behind the host stands the number of a database, or nothing: redis://host:6379/0")
        if url is not None and not _may_be_host(url):
            raise ValueError("its host can be no name of a server")
        return url

    @pydantic.field_validator("data_dir", "export_dir", "retention_archive_dir")
    @classmethod
    def _check_home(cls, folder: Path | None) -> Path | None:
        try:
            return folder and folder.expanduser()
        except RuntimeError:
            raise ValueError("there is no home folder of that user") from None

    @pydantic.field_validator("database_url")
    @classmethod
    def _check_database_url(cls, url: str | None) -> str | None:
        if url is not None and not re.match(r"[a-z][a-z0-9_]*(\+[a-z0-9_]+)?://", url):
            raise ValueError(
                "it must be an SQLAlchemy URL, such as postgresql+psycopg://user@host/name or sqlite:///file"
            )
        return url

    @pydantic.model_validator(mode="after")
    def _check_keys(self) -> Settings:
        keys.Keyspace(self.namespace, self.partition_count)
        return self

    @property
    def is_embedded(self) -> bool:
        """Whether the store is wholly that of the data folder: its server is the embedded one, its database a file there."""
        return self.redis_url is None and self.database_url is None

    @property
    def limits(self) -> codec.Limits:
        """The sizes above which input is refused, as ``core`` wants them."""
        return codec.Limits(
            id_length_max=self.id_length_max,
            patch_fields_max=self.patch_fields_max,
            instance_fields_max=self.instance_fields_max,
            patch_bytes_max=self.patch_bytes_max,
            batch_items_max=self.batch_items_max,
        )

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        for name, value in super().__repr_args__():
            yield name, _shown(value, name or "")


def _may_be_host(url: str) -> bool:
    """Whether the resolver can be asked for a URL's host: it raises an error of its own for what is no name at all."""
    try:
        urllib.parse.unquote(urllib.parse.urlsplit(url).hostname or "").encode("idna")
    except UnicodeError:
        return False
    except ValueError:  # no URL: told by whoever opens it
        return True
    return True


def failpoint_variable() -> str | None:
    """What ``STATECACHE_FAILPOINT`` says: the failpoints that a test arms in this process."""
    return os.environ.get(f"{ENV_PREFIX}FAILPOINT")


def systemd_variables() -> tuple[str | None, float | None]:
    """What systemd wants to be told: its socket, and within how many seconds a sign of life (None: it wants none)."""
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    for_us = os.environ.get("WATCHDOG_PID") in (None, "", str(os.getpid()))
    wanted = microseconds.isascii() and microseconds.isdigit() and int(microseconds) > 0 and for_us
    return os.environ.get("NOTIFY_SOCKET") or None, int(microseconds) / 1e6 if wanted else None


def child_environment(**defaults: str) -> dict[str, str]:
    """This process' environment, for a child, with defaults for what it does not hold."""
    return defaults | os.environ


def refuse_unknown_variables(environment: Mapping[str, str]) -> None:
    """Raise ``ConfigurationError`` if a variable begins with ``STATECACHE_`` but is none that anything here reads."""
    known = {ENV_PREFIX + name.upper() for name in Settings.model_fields}
    for name in environment:
        upper = name.upper()
        if upper.startswith(ENV_PREFIX) and upper not in known and not _FOREIGN_VARIABLES.fullmatch(upper):
            raise errors.ConfigurationError(f"unknown environment variable {name}{_did_you_mean(upper, known)}")


class _FileSource(PydanticBaseSettingsSource):
    """The TOML file that the sources before it named."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        return None, field_name, False  # abstract in the base; a value is never asked for one by one

    def __call__(self) -> dict[str, Any]:
        path = self.current_state.get("config_file")
        return {} if path is None else read_file(Path(path))


def read_file(path: Path) -> dict[str, Any]:
    """Read a TOML file of settings, unchecked but for its being TOML."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise errors.ConfigurationError(f"config file {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise errors.ConfigurationError(f"config file {path} is not valid TOML: {error}") from None
    if "config_file" in values:
        raise errors.ConfigurationError(f"config_file in {path} is refused: a config file cannot name another one")
    return values


def _explained(error: pydantic.ValidationError, given: Mapping[str, Any]) -> str:
    return "; ".join(_explained_one(dict(detail), given) for detail in error.errors(include_url=False))


def _explained_one(detail: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    name = str(detail["loc"][0])
    origin = _origin(name, given)
    if detail["type"] == "extra_forbidden":
        return f"unknown setting {name!r} in {origin}{_did_you_mean(name, Settings.model_fields)}"
    rule = detail["msg"].removeprefix("Value error, ")
    return f"{name} = {_shown(detail['input'], name)!r} in {origin} is refused: {rule[:1].lower()}{rule[1:]}"


def _origin(name: str, given: Mapping[str, Any]) -> str:
    if name in given:
        return "the arguments"
    variable = ENV_PREFIX + name.upper()
    if any(known.upper() == variable and value for known, value in os.environ.items()):
        return f"the environment ({variable})"
    return "the config file"


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f": did you mean {close[0]}?" if close else ""


def _shown(value: object, name: str) -> object:
    if name.endswith("_token") and value is not None:
        return "***"
    return redact(value) if isinstance(value, str) else value


_SECRET_PARAMETER = re.compile(
    r"(?P<name>(?:^|[?&;\s])[^=&;\s?]*(?:pass|pwd|secret|token|key|credential|auth)[^=&;\s?]*=)[^&;\s]*", re.IGNORECASE
)


def redact(url: str) -> str:
    """Return ``url`` fit for logs and messages: its password and the secrets among its query parameters as ``***``.

    Made for malformed URLs too, as those are what error messages show: where it is unclear what belongs to a password,
    more is hidden rather than less.
    """
    scheme, separator, rest = url.partition("://")
    if separator:
        head, mark, query = rest.partition("?")
        if "@" in head:
            user, _, host = head.rpartition("@")
            rest = f"{_without_password(user)}@{host}{mark}{query}"
        elif "@" in query and "=" not in query.partition("@")[0]:  # an unquoted "?" within the password
            user, _, host = rest.rpartition("@")
            rest = f"{_without_password(user)}@{host}"
    elif "@" in url:  # "://" is misspelt
        user, _, host = url.rpartition("@")
        scheme = f"{_without_password(user)}@{host}"
    return _SECRET_PARAMETER.sub(r"\g<name>***", f"{scheme}{separator}{rest}")


def _without_password(user_info: str) -> str:
    user, colon, _ = user_info.partition(":")
    return f"{user}:***" if colon else user
