"""``make mutants``: switch in one mistake at a time, in a copy of the tree, and run the tests that must catch it.

First all those tests run on the copy as it is: a test that fails anyway catches nothing. Then a canary (a package that
cannot be imported) shows that the copy is what is tested. Exit code 1 if a mutant survives.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests.mutants import catalogue

ROOT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 300
_CANARY = catalogue.Mutant(
    "(canary: the copy is what is tested)",
    (catalogue.Patch("statecache/core/errors.py", "from __future__ import annotations\n", "raise ImportError\n"),),
    ("tests/unit/test_settings.py",),
)


class Verdict(NamedTuple):
    mutant: str
    caught: bool
    by: str
    seconds: float


def copy_of_the_tree(folder: Path) -> None:
    for name in ("statecache", "workers", "tests"):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)


def pytest_in(folder: Path, tests: Sequence[str], *options: str) -> tuple[int, str]:
    """Run tests in a copy; pytest's exit code and what it said."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--tb=line",
        "-p",
        "no:cacheprovider",
        "--timeout=60",
        *options,
        *tests,
    ]
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return 1, "FAILED (the tests hang)"
    return done.returncode, done.stdout + done.stderr


def tried(mutant: catalogue.Mutant) -> Verdict:
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="statecache-mutant-") as name:
        folder = Path(name)
        copy_of_the_tree(folder)
        for patch in mutant.patches:
            text = (folder / patch.file).read_text()
            assert text.count(patch.old) == 1, (
                f"{mutant.name}: {patch.file} has changed; bring the catalogue up to date"
            )
            (folder / patch.file).write_text(text.replace(patch.old, patch.new))
        code, output = pytest_in(folder, mutant.tests, "-x")
    failed = re.search(r"^(?:FAILED|ERROR) ((?:tests/|\().+?)(?: - .*)?$", output, re.MULTILINE)
    broken = mutant is not _CANARY and (code > 1 or (failed is not None and "rror during collection" in output))
    by = failed.group(1).rpartition("::")[2] if failed else ""
    if broken:
        by = "the tests did not run:\n" + output[-2000:]
    return Verdict(mutant.name, code != 0 and not broken, by, time.monotonic() - started)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants")
    parser.add_argument("names", nargs="*", help="words that the names of the mutants to try hold; all of them without")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--no-baseline", action="store_true", help="do not run the tests on the unchanged tree first")
    arguments = parser.parse_args()
    chosen = [
        one for one in catalogue.MUTANTS if not arguments.names or any(word in one.name for word in arguments.names)
    ]
    if not arguments.no_baseline:
        tests = sorted({test for one in chosen for test in one.tests})
        print(f"{len(tests)} tests on the unchanged tree ...", flush=True)
        with tempfile.TemporaryDirectory(prefix="statecache-mutant-") as name:
            copy_of_the_tree(Path(name))
            code, output = pytest_in(Path(name), tests, "-n", str(arguments.workers))
        if code:
            print(output)
            return 1
    survivors = 0
    with concurrent.futures.ThreadPoolExecutor(arguments.workers) as pool:
        for verdict in pool.map(tried, [_CANARY, *chosen]):
            survivors += not verdict.caught
            word = "caught by" if verdict.caught else "SURVIVED"
            print(f"{verdict.mutant:58} {word} {verdict.by} ({verdict.seconds:.0f} s)", flush=True)
    print(f"{len(chosen)} mutants, {survivors} survived")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
