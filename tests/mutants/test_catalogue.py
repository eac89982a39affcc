"""The catalogue of mutants fits the code: each patch applies, each test that it names exists."""

from __future__ import annotations

import re
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
    for node in mutant.tests:
        file, _, name = node.partition("::")
        bare = re.escape(name.partition("[")[0])
        assert re.search(rf"^(?:async )?def {bare}\(", (ROOT / file).read_text(), re.MULTILINE), (
            f"{node} does not exist"
        )


def test_names_are_different() -> None:
    names = [mutant.name for mutant in catalogue.MUTANTS]
    assert len(set(names)) == len(names)
