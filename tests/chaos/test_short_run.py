"""A short seeded chaos run: the promises hold, and the instrument works. ``make chaos`` is the long one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos import __main__ as chaos
from tests.chaos import nemesis, rounds

SEED = "make test"


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("sql", ["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def test_short_run(sql: str, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """Two rounds of every kind of fault. When it fails: the seed is in the output, the evidence in the test's folder."""
    options = rounds.Options(SEED, 6.0, sql, pytestconfig.getoption("--server"))
    results = chaos.run(options, tmp_path, 0.0, 2 if sql == "sqlite" else 1)
    assert chaos.report(results, options) == 0, [str(one) for result in results for one in result.violations][:20]
    assert sum(result.told["ok"] for result in results) > 100
    assert sum(sum(result.faults.values()) for result in results) >= 5


def test_a_plan_is_made_by_its_seed() -> None:
    """The same seed gives the same faults at the same times, another seed others; no victim has two faults at once."""
    plans = [nemesis.plan(seed, 60.0, sql="postgres", aof="everysec") for seed in ("a/1", "a/1", "a/2")]
    assert plans[0] == plans[1] != plans[2]
    busy: dict[str, float] = {}
    for one in plans[0]:
        assert one.at_seconds >= busy.get(one.fault.victim, 0.0)
        busy[one.fault.victim] = one.at_seconds + one.for_seconds
    assert {one.fault.name for one in plans[0] + plans[2]} > {"server killed", "FLUSHALL", "SQL restored"}
