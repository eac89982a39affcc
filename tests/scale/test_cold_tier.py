"""The short form of ``make cold``: 3,000 instances, room for 300."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.scale import coldtier


@pytest.mark.parametrize("sql", ["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def test_more_instances_than_room(tmp_path: Path, sql: str, pytestconfig: pytest.Config) -> None:
    """P11: a mixed load on ten times as many instances as Redis may hold. Every answer is what the ledger says, many come
    from SQL, and Redis is within its bound when the load ends."""
    server = pytestconfig.getoption("--server")
    options = coldtier.Options(instances=3000, room=300, operations=400, sql=sql, server=server, bytes_each=2000)
    figures = coldtier.run(options, tmp_path)
    assert figures.wrong == []
    assert figures.instances >= 3000
    assert figures.cold > 500
    assert figures.hot > 0
    assert figures.keys_after <= 300 + 2 * coldtier.PARTITIONS
    assert figures.used_max_bytes <= figures.max_bytes
