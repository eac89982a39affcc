"""The catalogue of mutants fits the code: each patch applies, each test that it names exists."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutants import catalogue

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mutant", catalogue.MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_mutant_fits(mutant: catalogue.Mutant) -> None:
    for patch in mutant.patches:
        assert (ROOT / patch.file).read_text().count(patch.old) == 1, (
            f"{patch.file}: {patch.old!r} must stand there once"
        )
        assert patch.old != patch.new
    assert mutant.tests


def test_the_tests_that_are_named_exist() -> None:
    """With their parameters: a test that pytest does not find would catch nothing."""
    nodes = sorted({node for mutant in catalogue.MUTANTS for node in mutant.tests})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *nodes]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert found.returncode == 0, [line for line in (found.stdout + found.stderr).splitlines() if "ERROR" in line]


def test_names_are_different() -> None:
    names = [mutant.name for mutant in catalogue.MUTANTS]
    assert len(set(names)) == len(names)
