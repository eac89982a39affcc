"""Is a process known to be gone? What tells so sooner than waiting for a sign of life that does not come.

Only ever a short cut: no answer means "unknown", and a process id that was given to another process looks alive.
"""

from __future__ import annotations

import contextlib
import functools
import os
from pathlib import Path
from typing import NoReturn


@functools.cache
def place() -> str:
    """What two processes have in common that see each other's process ids: the boot of the machine, and the namespace of
    ids. Empty where that cannot be told."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return ""


def own() -> str:
    """This process as text, for ``is_gone`` of others; empty where that cannot be told."""
    return f"{os.getpid()} {place()}" if place() else ""


def has_ended(pid: int, where: str) -> bool:
    """Whether there is no such process, if it ran where we run."""
    if not where or where != place():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def same_machine(where: str) -> bool:
    """Whether a process of that place may run on this machine, as far as the boot tells."""
    return not where or not place() or where.split(" ")[0] == place().split(" ")[0]


def is_gone(text: str | None) -> bool:
    """Whether the process that called itself so (``own``) has ended."""
    pid, _, where = (text or "").partition(" ")
    return pid.isdigit() and has_ended(int(pid), where)


class OfOneProcess:
    """What has connections, locks or threads, and so cannot go to another process."""

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} cannot be pickled: it belongs to its process; open one in each process"
        )
