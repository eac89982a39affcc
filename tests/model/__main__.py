"""``python -m tests.model [--large] [--hole NAME] [--seconds N]``: explore, print a table, exit 1 on a finding."""

from __future__ import annotations

import argparse
import sys
import time

from tests.model import configurations, holes
from tests.model.explore import Result, explore
from tests.model.world import World

_HEAD = f"{'configuration':58} {'states':>10} {'depth':>5}  {'extent':9} {'seconds':>7}  result"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.model", description="Explore the model of the protocol.")
    parser.add_argument(
        "--large", action="store_true", help="the large worlds too, and the scope of every hole with all rules on"
    )
    parser.add_argument(
        "--hole", metavar="NAME", help="print the traces of the holes whose name contains NAME, nothing else"
    )
    parser.add_argument("--world", metavar="NAME", default="", help="only the worlds whose name contains NAME")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="stop a large world after so many (default %(default)s)"
    )
    parser.add_argument(
        "--states", type=int, default=8_000_000, help="... or after so many states (default %(default)s)"
    )
    options = parser.parse_args()
    if options.hole is not None:
        return _tell(options.hole)
    print(_HEAD)
    found = 0
    for one in holes.holes():
        if options.world in one.name:
            found += _row(explore(one.world, states_max=400_000), one.promise)
            if options.large:
                found += _row(explore(holes.mended(one), states_max=400_000))
    worlds = configurations.small() + (configurations.large() if options.large else [])
    for world in worlds:
        if options.world in world.name:
            found += _row(_explore(world, options.seconds, options.states))
    print(f"{found} not as expected" if found else "all as expected")
    return 1 if found else 0


def _explore(world: World, seconds_max: float, states_max: int) -> Result:
    """Explore compactly; on a terminal, with a line that tells how far it is."""
    shown = time.monotonic()

    def progress(result: Result) -> None:
        nonlocal shown
        if sys.stderr.isatty() and time.monotonic() - shown > 1.0:
            shown = time.monotonic()
            print(
                f"\r  {world.name}: {result.states} states, depth {result.depth} ", end="", file=sys.stderr, flush=True
            )

    result = explore(world, seconds_max=seconds_max, states_max=states_max, compact=True, progress=progress)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    return result


def _row(result: Result, expected: str = "") -> int:
    """Print one row; returns 1 if the result is not the expected one."""
    violation = result.violation
    got = violation.promise if violation else ""
    extent = "complete" if result.complete else ("" if violation else "bound")
    text = f"{got} broken, as it must be" if got and got == expected else (f"{got} BROKEN" if got else "no violation")
    wrong = got != expected
    if not violation and result.complete and result.unreached:
        wrong, text = True, f"never reached: {', '.join(sorted(result.unreached))}"
    print(
        f"{result.world.name:58} {result.states:>10} {result.depth:>5}  {extent:9} {result.seconds:>7.1f}  {text}",
        flush=True,
    )
    if wrong and violation:
        print(result.story())
    return int(wrong)


def _tell(name: str) -> int:
    wanted = [one for one in holes.holes() if name in one.name]
    for one in wanted:
        print(one.name)
        print(explore(one.world, states_max=400_000).story(), end="\n\n")
    return 0 if wanted else 2


if __name__ == "__main__":
    sys.exit(main())
