"""Redis keys: the many at once are the single ones."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from statecache.core import keys

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


@given(NAMES, st.lists(NAMES, max_size=20), st.sampled_from([1, 16, 100]))
def test_the_keys_of_many_are_those_of_each(machine: str, ids: list[str], partition_count: int) -> None:
    keyspace = keys.Keyspace("lab", partition_count)
    alone = [keyspace.instance(keyspace.partition_of(machine, id), machine, id).encode() for id in ids]
    assert keyspace.instances(machine, ids) == alone
