"""Which servers are taken, and what is said of those that are not."""

from __future__ import annotations

import logging

import pytest

from statecache.core import errors
from statecache.engine import servers


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"redis_version": "6.2.14"}, "this server is Redis 6.2.14: Redis 7.0 or newer is needed"),
        ({"redis_version": "5.0"}, "this server is Redis 5.0: Redis 7.0 or newer is needed"),
        (
            {"redis_version": "7.2.4", "server_name": "valkey", "valkey_version": "7.1.0"},
            "this server is Valkey 7.1.0: Valkey 7.2 or newer is needed",
        ),
    ],
)
def test_a_server_that_is_too_old_is_refused(facts: dict[str, str], message: str) -> None:
    with pytest.raises(errors.ConfigurationError) as refused:
        servers.check(facts)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    "facts",
    [
        {"redis_version": "7.0.15"},
        {"redis_version": "8.2.3"},
        {"redis_version": "7.2.4", "server_name": "valkey", "valkey_version": "9.1.2"},
        {"redis_version": "7.4.1", "maxmemory_policy": "volatile-lru", "maxmemory": "1000000", "evicted_keys": "3"},
        {},
    ],
)
def test_a_server_that_will_do_is_taken_without_a_word(facts: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    servers.check(facts)
    assert not caplog.records


def test_an_eviction_policy_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        servers.check({"redis_version": "7.4.1", "maxmemory_policy": "allkeys-lru", "maxmemory": "0"})
    assert "maxmemory-policy is allkeys-lru" in caplog.text


def test_a_server_that_deletes_keys_when_memory_is_short_is_refused() -> None:
    facts = {"redis_version": "7.4.1", "maxmemory_policy": "allkeys-lfu", "maxmemory": "1000000"}
    with pytest.raises(errors.ConfigurationError, match="set it to noeviction"):
        servers.check(facts)
    servers.check(facts, warn=False)


@pytest.mark.parametrize(
    ("policy", "evicted", "expected"),
    [
        ("noeviction", "0", False),
        ("noeviction", "3", True),
        ("allkeys-random", "0", True),
        ("volatile-ttl", "3", False),
    ],
)
def test_when_keys_of_ours_may_be_gone(policy: str, evicted: str, expected: bool) -> None:
    assert servers.has_evicted({"maxmemory_policy": policy, "evicted_keys": evicted}) is expected
    assert not servers.has_evicted({})
