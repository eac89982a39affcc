"""``claims`` and ``ls --stuck``: who holds what, and what stays too long."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from statecache import State, StateCache, StateMachine
from tests.acceptance.command import Result, run_here
from tests.support.waiting import wait_until


class Parcel(StateMachine):
    stored = State(initial=True, timeout=timedelta(milliseconds=1))
    taken = State(final=True)

    take = stored.to(taken)


@pytest.fixture
def cache(data_folder: Path) -> Iterator[StateCache]:
    with StateCache.embedded(data_folder) as made:
        yield made


@pytest.fixture
def store(cache: StateCache, data_folder: Path) -> Any:
    def on_store(*arguments: object) -> Result:
        return run_here(*arguments, "--data-dir", data_folder)

    return on_store


def test_who_holds_what(store: Any, cache: StateCache) -> None:
    parcels = cache.machine(Parcel)
    parcels.start_many(["1", "2"])
    assert store("claims", "--json").document == []
    claim = parcels.claim("1", ttl=600, worker="packer-3")
    (told,) = store("claims", "parcel", "--json").document
    assert (told["address"], told["worker"], told["token"]) == ("parcel:1", "packer-3", claim.token)
    where = store("where", "parcel:1", "--json").document
    assert where["claim"] == {name: told[name] for name in ("machine", "id", "worker", "token", "expires_at")}
    assert "packer-3, until" in store("where", "parcel:1").out
    assert store("where", "parcel:2", "--json").document["claim"] is None
    shown = store("claims").out
    assert "packer-3" in shown
    assert "1 claim\n" in shown
    refused = store("transition", "parcel:1", "take", "--json")
    assert (refused.code, refused.error["type"]) == (1, "FencedError")
    assert "packer-3 holds it until" in refused.error["message"]
    assert store("claims", "nobody").code == 1
    claim.release()
    assert "0 claims\n" in store("claims").out


def test_what_is_stuck(store: Any, cache: StateCache) -> None:
    cache.machine(Parcel).start_many(["1", "2"])
    wait_until(lambda: len(store("ls", "--stuck", "--json").document) == 2, "both are in SQL, past their timeout")
    assert [one["id"] for one in store("ls", "parcel", "--stuck", "--limit", 1, "--json").document] == ["1"]
    assert "parcel:1" in store("ls", "--stuck").out
    assert store("ls", "parcel", "--stuck", "--older-than", "1h", "--json").document == []
    for wrong in (["ls"], ["ls", "--stuck", "--state", "stored"]):
        refused = store(*wrong, "--json")
        assert (refused.code, refused.error["type"]) == (2, "InvalidDataError")
