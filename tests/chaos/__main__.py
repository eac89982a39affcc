"""``make chaos``: rounds of chaos until the time is over, and a table of what was done and found.

The seed is printed first, and again on failure. Exit code 1 if a promise was broken.
"""

from __future__ import annotations

import argparse
import logging
import secrets
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.chaos import nemesis, rounds
from tests.chaos.stage import Stage
from tests.support import servers


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", default="", help="any text; a random one if not given")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=0, help="so many rounds, however long they take")
    parser.add_argument("--round-seconds", type=float, default=10.0)
    parser.add_argument("--first", type=int, default=1, help="number of the first round: repeats one of a longer run")
    parser.add_argument("--sql", choices=["sqlite", "postgres"], default="sqlite")
    parser.add_argument("--server", choices=sorted(servers.FLAVOURS), default="valkey9")
    parser.add_argument("--aof", choices=["everysec", "always", "no"], default="everysec")
    parser.add_argument(
        "--only", default="", help="faults, joined by commas: " + ", ".join(one.name for one in nemesis.FAULTS)
    )
    parser.add_argument(
        "--client",
        choices=["sync", "async", "mixed"],
        default="mixed",
        help="of writers and readers; mixed: by the seed",
    )
    parser.add_argument("--folder", type=Path, default=None, help="where everything is written")
    parser.add_argument("--quiet", action="store_true", help="do not tell each fault")
    asked = parser.parse_args()
    seed = asked.seed or secrets.token_hex(4)
    options = rounds.Options(seed, asked.round_seconds, asked.sql, asked.server, asked.aof, asked.only, asked.client)
    folder = asked.folder or Path(tempfile.mkdtemp(prefix="statecache-chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(
        filename=folder / "judge.log", level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s"
    )
    _say(f"chaos: SEED={seed} SQL={asked.sql} SERVER={asked.server} AOF={asked.aof}; everything is in {folder}")
    results = run(options, folder, asked.minutes, asked.rounds, asked.first, quiet=asked.quiet)
    return report(results, options)


def _say(text: str) -> None:
    print(text, flush=True)


def run(
    options: rounds.Options, folder: Path, minutes: float, count: int = 0, first: int = 1, *, quiet: bool = False
) -> list[rounds.Result]:
    """Play rounds; the evidence of a failed one is kept in the folder, and its place told."""
    results: list[rounds.Result] = []
    deadline = time.monotonic() + 60 * minutes
    stage = Stage(folder, sql=options.sql, server=options.server, aof=options.aof)
    stage.client = options.client
    try:
        while len(results) < count if count else time.monotonic() < deadline:
            number = first + len(results)
            result = rounds.play(stage, options, number, (lambda text: None) if quiet else _say)
            results.append(result)
            _say(
                f"round {number}: {sum(result.faults.values())} faults, {result.transitions} transitions, "
                f"{sum(result.kinds.values())} partition reports, {len(result.violations)} violations, "
                f"{result.seconds:.0f} s"
            )
            if result.violations:
                kept = rounds.keep(stage, result, options)
                for one in result.violations[:20]:
                    _say(f"  {one}")
                _say(f"  SEED={options.seed} --first {number} --rounds 1: the evidence is in {kept}")
    finally:
        stage.close()
    return results


def report(results: list[rounds.Result], options: rounds.Options) -> int:
    """Print the table; returns the exit code."""
    faults: Counter[str] = sum((one.faults for one in results), Counter())
    told: Counter[str] = sum((one.told for one in results), Counter())
    kinds: Counter[str] = sum((one.kinds for one in results), Counter())
    bad = [violation for one in results for violation in one.violations]
    for title, found in (
        ("faults injected", faults),
        ("what clients were told", told),
        ("found by recoveries, per partition", kinds),
    ):
        _say(f"\n{title}")
        for name, times in sorted(found.items(), key=lambda one: -one[1]):
            _say(f"  {times:7d}  {name}")
    transitions = sum(one.transitions for one in results)
    operator = sum(one.recovered_by_operator for one in results)
    _say(
        f"\n{len(results)} rounds, {sum(faults.values())} faults, {transitions} transitions in SQL, {operator} recoveries by "
        f"the operator, {len(bad)} violations"
    )
    for promise, times in Counter(one.promise for one in bad).most_common():
        _say(f"  {times:7d}  {promise}")
    if bad:
        _say(f"chaos: FAILED, SEED={options.seed}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
