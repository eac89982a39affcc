"""The command line: ``statecache ...``. ``app`` lists the commands, ``exits`` the exit codes, ``output`` what is printed."""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (``sys.argv`` if none is given); returns the exit code."""
    try:
        from statecache.cli import app
    except KeyboardInterrupt:  # the commands take a while to load
        return 130

    return app.run(arguments)
