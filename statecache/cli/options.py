"""The options that every command has, and the store that they name.

They may stand before the command or after it; behind it wins. What they do not say comes from the environment
(``STATECACHE_REDIS_URL`` ...) or the config file. ``--data-dir`` on the command line means that folder's embedded server and
SQLite file, whatever URLs the environment has; a URL given beside it takes the place of that half.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from statecache import logs
from statecache.core import errors

if TYPE_CHECKING:
    from statecache.engine.cache import StateCache
    from statecache.settings import Settings

Function = TypeVar("Function", bound=Callable[..., int | None])


def _folder(text: str) -> Path:
    """A folder's path. Python takes an empty one for the current folder, which nobody has named."""
    if not text:
        raise typer.BadParameter("it is empty")
    return Path(text)


_COMMON: dict[str, Any] = {
    "redis_url": Annotated[str | None, typer.Option("--redis-url", metavar="URL", help="Redis or Valkey server.")],
    "database_url": Annotated[str | None, typer.Option("--database-url", metavar="URL", help="SQL database.")],
    "data_dir": Annotated[
        Path | None,
        typer.Option(
            "--data-dir", metavar="FOLDER", parser=_folder, help="Folder of the embedded server and its database."
        ),
    ],
    "namespace": Annotated[
        str | None, typer.Option("--namespace", metavar="NAME", help="First part of the Redis keys.")
    ],
    "config": Annotated[Path | None, typer.Option("--config", metavar="FILE", help="TOML file with settings.")],
    "as_json": Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")],
    "log_format": Annotated[
        str | None, typer.Option("--log-format", metavar="text|json", help="Form of the log on standard error.")
    ],
    "log_level": Annotated[
        str | None, typer.Option("--log-level", metavar="LEVEL", help="debug, info, warning, error or critical.")
    ],
}


COUNT_MAX = 2**31 - 1
"""Most that an option which counts may say: neither SQL nor Redis takes a number of any length."""

LOOK_SECONDS = 0.5
"""How long a command that only looks waits for a Redis that is not ready."""

MetricsPort = Annotated[
    int | None,
    typer.Option(
        "--metrics-port", metavar="PORT", min=0, max=65535, help="Serve /metrics there, on loopback (0: any free port)."
    ),
]


@dataclass(frozen=True)
class Store:
    """The common options of one command."""

    redis_url: str | None = None
    database_url: str | None = None
    data_dir: Path | None = None
    namespace: str | None = None
    config: Path | None = None
    as_json: bool = False
    log_format: str | None = None
    log_level: str | None = None

    def over(self, outer: Store) -> Store:
        """These options, and those given before the command where these are silent."""
        silent = (None, False)  # but not "": what a shell makes of an unset variable is refused, as any wrong value
        return Store(
            **{
                one.name: getattr(outer if getattr(self, one.name) in silent else self, one.name)
                for one in fields(Store)
            }
        )

    def settings(self, **more: Any) -> Settings:
        """The settings. Raises ``ConfigurationError``."""
        from statecache.settings import Settings

        given = {
            "redis_url": self.redis_url, "database_url": self.database_url, "data_dir": self.data_dir,
            "namespace": self.namespace, "config_file": self.config, "log_format": self.log_format,
            "log_level": self.log_level, **more,
        }  # fmt: skip
        settings = Settings(**given)
        if self.data_dir is not None:
            urls = {"redis_url": self.redis_url, "database_url": self.database_url}
            settings = settings.model_copy(update=urls)
        return settings

    def log(self) -> None:
        """Send the log to standard error, as the settings say. Raises ``ConfigurationError``."""
        settings = self.settings()
        logs.to_stderr(logging.getLevelNamesMapping()[settings.log_level.upper()], settings.log_format)

    def open(
        self,
        *,
        create: bool = False,
        flusher: bool = False,
        admit_seconds: float | None = None,
        on_recovering: Callable[[], None] = lambda: None,
        **more: Any,
    ) -> StateCache:
        """Open the store; without ``create`` it must be there already: a look at the wrong folder or database makes nothing.

        ``more`` are settings that win over all others.
        """
        from statecache.engine.cache import StateCache

        settings = self.settings().model_copy(update=more)
        if settings.is_embedded:  # every start of its server is a recovery: no news
            logging.getLogger("statecache.engine.admission").setLevel(logging.ERROR)
        if not create:
            _check_there(settings)
        return StateCache.open(
            settings, flusher=flusher, create=create, admit_seconds=admit_seconds, on_recovering=on_recovering
        )

    def look(self, *, redis: bool = False) -> StateCache:
        """Open the store for a command that only looks: a Redis that is not the one that SQL knows is left as it is.

        SQL is there to be read all the same, also where Redis is away. With ``redis`` the answer needs Redis too: raises
        ``RecoveringError``, which says what to do, or ``UnavailableError``. A data folder's own server is recovered by every
        start, whoever starts it: nobody else may have been running it, and nobody can have named a wrong one.
        """
        if self.settings().is_embedded:
            return self.open()
        quiet_about_admission()
        cache = self.open(auto_recover=False, admit_seconds=LOOK_SECONDS)
        try:
            if redis:
                cache.admission.ensure("EPOCH", time.monotonic() + LOOK_SECONDS)
        except BaseException:
            cache.close()
            raise
        return cache

    def open_for_writing(self, *, create: bool = False) -> StateCache:
        """Open the store for a command that writes: an embedded one is flushed by the command itself, before it ends."""
        return self.open(create=create, flusher=self.settings().is_embedded)


def _check_there(settings: Settings) -> None:
    """Refuse a data folder that lacks what it is to give: the whole store, or the half for which no URL is set."""
    folder = settings.data_dir
    halves = (
        ("redis_url", "database_url", "statecache.db", "database"),
        ("database_url", "redis_url", "redis", "server's data"),
    )
    for given, missing, file, what in halves:
        if getattr(settings, missing) is not None or (folder / file).exists():
            continue
        if getattr(settings, given) is not None:
            raise errors.ConfigurationError(
                f"{given} is set and {missing} is not, so that half of the store would be in the folder {folder}, which has no "
                f"{what} ({folder / file}): name it with --{missing.replace('_', '-')} or STATECACHE_{missing.upper()}, or "
                "another folder with --data-dir"
            )
        if missing == "database_url":
            raise errors.ConfigurationError(
                f"there is no store in the folder {folder}: name another one (--data-dir), a server "
                "(--redis-url and --database-url), or begin one with 'statecache up', 'machine register' or 'import'"
            )


def quiet_about_admission() -> None:
    """A Redis that is not ready is part of what is told, or does not matter for it: no log line beside that."""
    logging.getLogger("statecache.engine.cache").setLevel(logging.ERROR)


def command(app: typer.Typer, name: str, **options: Any) -> Callable[[Function], Function]:
    """Make a function a command: its first parameter receives the ``Store``, the others are the command's own.

    It returns an exit code, or None for 0.
    """

    def decorate(function: Function) -> Function:
        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]

        def run(context: typer.Context, **values: Any) -> int | None:
            store = Store(**{key: values.pop(key) for key in _COMMON}).over(context.obj or Store())
            if store.log_format is not None or store.log_level is not None:
                store.log()
            return function(store, **values)

        _set_signature(run, own)
        run.__name__, run.__doc__ = function.__name__, function.__doc__
        app.command(name, **options)(run)
        return function

    return decorate


def root(app: typer.Typer) -> None:
    """Let the common options stand before the command, and add ``--version``."""

    def run(context: typer.Context, version: bool, **values: Any) -> None:
        if version:
            from importlib.metadata import version as version_of

            typer.echo(f"statecache {version_of('statecache')}")
            raise typer.Exit
        context.obj = Store(**values)
        if context.invoked_subcommand is None:
            typer.echo(context.get_help())

    version = Annotated[bool, typer.Option("--version", help="Print the version.")]
    parameter = inspect.Parameter("version", inspect.Parameter.KEYWORD_ONLY, annotation=version, default=False)
    _set_signature(run, [parameter])
    app.callback(invoke_without_command=True)(run)


def _set_signature(run: Callable[..., Any], own: list[inspect.Parameter]) -> None:
    """Typer reads a command's parameters from its signature: the context, the command's own, the common ones."""
    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter("context", kind, annotation=typer.Context)]
    parameters += [parameter.replace(kind=kind) for parameter in own]
    parameters += [
        inspect.Parameter(name, kind, annotation=annotation, default=False if name == "as_json" else None)
        for name, annotation in _COMMON.items()
    ]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
