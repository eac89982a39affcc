"""``--real-servers``: the stateful tests on a real Valkey and PostgreSQL (fakeredis and SQLite otherwise);
``--hypothesis-profile=long``: many more examples, and other ones each time."""

from __future__ import annotations

import pytest
from hypothesis import settings

settings.register_profile("long", max_examples=500, stateful_step_count=60)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--real-servers",
        action="store_true",
        help="run the stateful tests on real servers (name tests/property for it)",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of the two forms of the same test only the one asked for is in the run."""
    unwanted = "test_emulated_store" if config.getoption("real_servers", default=False) else "test_real_store"
    dropped = [item for item in items if item.name.startswith(unwanted)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in dropped]
