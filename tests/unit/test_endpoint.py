"""Where a Redis is, as text: never a user or a password in it."""

from __future__ import annotations

import pytest

from statecache.core import keys
from statecache.hot import endpoint
from statecache.hot.store import HotStore


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("redis://redis.example", "redis.example:6379/0"),
        ("redis://me:s3cret@Redis.Example:7001/3", "redis.example:7001/3"),
        ("rediss://:s3cret@10.0.0.5:7001/3?db=4", "10.0.0.5:7001/4"),
        ("redis://", "localhost:6379/0"),
        ("redis://[::1]:7001/2", "[::1]:7001/2"),
        ("unix:///run/redis.sock", "/run/redis.sock?db=0"),
        ("unix://me:s3cret@/run/a%20b.sock?db=5", "/run/a b.sock?db=5"),
    ],
)
def test_endpoint_of_a_url(url: str, text: str) -> None:
    store = HotStore(keys.Keyspace("x", 1), url=url)
    assert store.endpoint == text
    store.close()


@pytest.mark.parametrize(
    ("text", "local"),
    [
        ("/run/redis.sock?db=0", True),
        ("localhost:6379/0", True),
        ("redis.localhost:6379/0", True),
        ("127.0.0.1:6379/0", True),
        ("127.1.2.3:6379/0", True),
        ("[::1]:6379/0", True),
        ("[fd00::1]:6379/0", False),
        ("10.0.0.5:6379/0", False),
        ("redis.example:6379/0", False),
        ("localhost.example:6379/0", False),
    ],
)
def test_what_means_another_server_elsewhere(text: str, local: bool) -> None:
    assert endpoint.is_local(text) is local
