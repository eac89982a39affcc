"""All commands, and what happens to the errors that they end with."""

from __future__ import annotations

import _thread
import contextlib
import importlib.util
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import typer

from statecache import logs
from statecache.cli import (
    care,
    claims,
    cold,
    exits,
    imports,
    instances,
    machines,
    operations,
    options,
    output,
    processes,
    serving,
)
from statecache.core import errors

app = typer.Typer(
    name="statecache",
    help="Where is this right now, how did it get there, and can it go on after the crash?",
    rich_markup_mode=None,  # plain help and usage errors: quick, and the same in a pipe
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
options.root(app)
for commands in (processes, instances, claims, imports, machines, operations, care, cold, serving):
    commands.register(app)

# Errors of the command line itself; the base class lives in different places in different versions of typer.
_CommandLineError: Any = typer.BadParameter.__mro__[2]


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code. Every error becomes one message."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in words
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - for the whole process
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8 gets escapes, not an exception
    logs.to_stderr(logging.WARNING)
    sys.unraisablehook = _unraisable
    try:
        code = typer.main.get_command(app)(words, prog_name="statecache", standalone_mode=False)
    except _CommandLineError as error:
        output.error(errors.StateCacheError(_sentence(error)), as_json=as_json, kind="UsageError")
        return exits.USAGE
    except (KeyboardInterrupt, typer.Abort):
        return exits.INTERRUPTED
    except BrokenPipeError:
        _silence(sys.stdout)
        return exits.PIPE_CLOSED
    except SystemExit as end:  # what typer makes of a closed pipe
        if not isinstance(end.__context__, BrokenPipeError):
            raise
        _silence(sys.stdout)
        return exits.PIPE_CLOSED
    except Exception as error:
        if sys.flags.dev_mode:
            raise
        problem = _hidden_package(error) or error
        output.error(problem, as_json=as_json)
        return exits.code_of(problem)
    return code if isinstance(code, int) else exits.DONE


def _hidden_package(error: Exception) -> errors.ConfigurationError | None:
    """What is really wrong where an error comes of somebody's own package (or module) ``workers``, found before ours."""
    if exits.code_of(error) != exits.BUG:
        return None
    ours = Path(__file__).resolve().parents[2] / "workers" / "__init__.py"
    with contextlib.suppress(ImportError, ValueError):
        found = importlib.util.find_spec("workers")
        if found is not None and found.origin is not None and Path(found.origin).resolve() != ours:
            return errors.ConfigurationError(
                f"another package 'workers' hides that of statecache: {found.origin} is found before {ours}. Rename it, or "
                "start statecache where it is not found: from another folder, without its folder in PYTHONPATH"
            )
    return None


def _unraisable(raised: sys.UnraisableHookArgs) -> None:
    """Ctrl-C can hit a finalizer or a weak reference's callback, where Python drops every exception: then it comes again."""
    if issubclass(raised.exc_type, KeyboardInterrupt):
        _thread.start_new_thread(_interrupt_soon, ())  # not from here, from where nothing comes out either
    else:
        sys.__unraisablehook__(raised)


def _interrupt_soon() -> None:
    time.sleep(0.01)
    _thread.interrupt_main()


def _sentence(error: Any) -> str:
    """What is wrong with the command line, and where to look."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "statecache"
    return f"{str(error.format_message()).rstrip('.')} (see '{path} --help')"


def _silence(stream: TextIO) -> None:
    """The reader has gone (``| head``): what is still buffered has nowhere to go, at exit neither."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
