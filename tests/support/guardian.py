"""A process that outlives the test process by a moment, to end what that started and could not end.

Fixtures end their servers when a test fails; nothing in Python runs when pytest itself is killed. The test process
writes ``+PID SIGNAL`` when it starts a server and ``-PID`` when that has ended; at the end of the input what is left
gets its signal (a PostgreSQL postmaster must be asked to end its children), and a moment later SIGKILL.

Run as a script by ``processes``; it imports nothing of the project.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time


def main() -> None:
    guarded: dict[int, int] = {}
    for line in sys.stdin:
        words = line.split()
        if line.startswith("+"):
            guarded[int(words[0][1:])] = int(words[1])
        else:
            guarded.pop(int(words[0][1:]), None)
    for kind in ("its own signal", "SIGKILL"):
        for pid, number in guarded.items():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number if kind != "SIGKILL" else 9)
        if guarded:
            time.sleep(1.0)


if __name__ == "__main__":
    main()
