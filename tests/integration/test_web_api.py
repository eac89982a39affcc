"""The JSON API on a real socket, over real servers: what it answers, and how it refuses."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from typing import Any

import pytest

from statecache import State, StateMachine
from statecache.core import errors, model
from statecache.durable import faults
from statecache.web import problems, wording
from tests.support import refusing, webs, worlds
from tests.support.waiting import wait_until

HOSTILE = (
    "..", ".", "a/b", "a/../b", "%2e%2e", "50%", "a?b=c&d", "#top", "{curly}", '"quoted"', "<script>alert(1)</script>",
    "order:1", "history", "a b", "a+b", "\\", "é", "日本", "'; DROP TABLE statecache_store; --", "{{7*7}}", "-1", "null",
)  # fmt: skip


@pytest.fixture
def world(redis_url: str, database_url: str, namespace: str) -> Iterator[worlds.World]:
    with worlds.World(redis_url, database_url, namespace) as made:
        yield made


@pytest.fixture
def web(world: worlds.World) -> Iterator[webs.Served]:
    with webs.serving(world, webs.ACTING) as served:
        yield served


def start(web: webs.Served, id: str, **more: Any) -> Any:
    return web.post("/api/v1/instances/order", json={"id": id, **more}, headers=web.bearer)


def move(web: webs.Served, id: str, event: str, **more: Any) -> Any:
    return web.post("/api/v1/transitions/order", json={"id": id, "event": event, **more}, headers=web.bearer)


def test_from_start_to_history(world: worlds.World, web: webs.Served) -> None:
    began = start(web, "1", data={"amount": 5}, actor="shop")
    assert (began.status_code, began.json()["version"], began.json()["state"]) == (201, 1, "placed")
    paid = move(web, "1", "pay", reason="card", transition_id="t1", expect_version=1)
    assert (paid.status_code, paid.json()["from_state"], paid.json()["state"]) == (200, "placed", "paid")
    assert move(web, "1", "pay", transition_id="t1").json() == paid.json() | {"duplicate": True}

    now = web.get("/api/v1/instances/order", params={"id": "1"}).json()
    assert (now["state"], now["version"], now["data"], now["source"]) == ("paid", 2, {"amount": 5}, "hot")
    assert "ship" in now["available_events"]
    then = web.get("/api/v1/instances/order", params={"id": "1", "version": 1}).json()
    assert (then["state"], then["version"]) == ("placed", 1)
    assert web.get("/api/v1/instances/order", params={"id": "1", "when": began.json()["at"]}).json()["version"] == 1

    rows = web.get("/api/v1/history/order", params={"id": "1"}).json()["transitions"]
    assert [(row["version"], row["event"], row["actor"], row["reason"]) for row in rows] == [
        (1, "@start", "shop", None),
        (2, "pay", None, "card"),
    ]
    world.flush()
    assert all(row["durable"] for row in web.get("/api/v1/history/order?id=1").json()["transitions"])


def test_history_in_pages(world: worlds.World, web: webs.Served) -> None:
    world.start("1", ["note"] * 6)
    seen: list[int] = []
    after: int | None = 0
    while after is not None:
        page = web.get("/api/v1/history/order", params={"id": "1", "after": after, "limit": 3}).json()
        seen += [row["version"] for row in page["transitions"]]
        after = page["next_after"]
    assert seen == [1, 2, 3, 4, 5, 6, 7]


class Invoice(StateMachine):
    drafted = State(initial=True)
    sent = State(final=True)
    send = drafted.to(sent)


def test_where_across_machines(world: worlds.World, web: webs.Served) -> None:
    world.start("77")
    world.start("778", ["pay"])
    world.cache.machine(Invoice).start("77")
    found = web.get("/api/v1/where", params={"id": "77"}).json()
    assert [one["address"] for one in found["exact"]] == ["invoice:77", "order:77"]
    assert found["similar"] == []
    assert [one["address"] for one in web.get("/api/v1/where?id=order:77").json()["exact"]] == ["order:77"]
    world.flush()
    found = web.get("/api/v1/where", params={"id": "77", "prefix": True, "limit": 2}).json()
    assert [(one["address"], one["state"]) for one in found["similar"]] == [
        ("invoice:77", "drafted"),
        ("order:77", "placed"),
    ]
    assert web.get("/api/v1/where", params={"id": "x"}).json() == {"exact": [], "similar": []}


def test_find_counts_and_machines(world: worlds.World, web: webs.Served) -> None:
    for number in range(5):
        world.start(f"{number}", ["pay"] if number % 2 else [])
    world.flush()
    assert web.get("/api/v1/counts/order").json() == {"paid": 2, "placed": 3}
    found = web.get("/api/v1/find/order", params={"state": "placed", "limit": 2}).json()
    assert ([one["id"] for one in found["instances"]], found["more"]) == (["0", "2"], True)
    assert web.get("/api/v1/find/order", params={"older_than_seconds": 3600}).json()["instances"] == []
    assert web.get("/api/v1/find/order", params={"state": "nowhere"}).status_code == 422
    assert web.get("/api/v1/find/order", params={"limit": 1001}).status_code == 422
    machine = web.get("/api/v1/machines/order").json()
    assert (machine["initial"], machine["final"]) == ("placed", ["delivered", "cancelled"])
    assert machine["events"]["cancel"] == {"placed": "cancelled", "paid": "cancelled"}
    assert machine["counts"] == {"paid": 2, "placed": 3}
    assert web.get("/api/v1/machines").json() == [machine]


def test_health(world: worlds.World, web: webs.Served) -> None:
    world.start("1")
    found = web.get("/api/v1/health").json()
    assert (found["redis"], found["epoch"], found["backlog"]) == ("ready", 1, 1)
    assert [one["partition"] for one in found["partitions"]] == [0, 1]
    assert found["recoveries"][0]["classes"] == "new"


def test_hostile_ids(web: webs.Served) -> None:
    """Any id without control characters can be started, moved, found and read: it travels in queries and bodies."""
    for id in HOSTILE:
        assert start(web, id, data={"note": id}, actor=id, reason=id).status_code == 201
        assert move(web, id, "pay", reason=id).status_code == 200
        now = web.get("/api/v1/instances/order", params={"id": id}).json()
        assert (now["id"], now["state"], now["data"]) == (id, "paid", {"note": id})
        assert id in [one["id"] for one in web.get("/api/v1/where", params={"id": id}).json()["exact"]]
        assert len(web.get("/api/v1/history/order", params={"id": id}).json()["transitions"]) == 2


def test_ids_that_are_none(web: webs.Served) -> None:
    for id in ("", "a\nb", "\0", "x" * 201, "\u2028"):
        for answer in (start(web, id), web.get("/api/v1/instances/order", params={"id": id})):
            assert answer.status_code == 422
            assert answer.json()["type"] == "urn:statecache:InvalidDataError"


def test_refusals_are_problems(world: worlds.World, web: webs.Served) -> None:
    world.start("1", ["pay"])
    cases: list[tuple[Any, int, str, dict[str, Any]]] = [
        (start(web, "1"), 409, "AlreadyExistsError", {}),
        (move(web, "1", "pay"), 409, "InvalidTransitionError", {"state": "paid", "event": "pay"}),
        (move(web, "1", "ship", expect_version=1), 412, "StaleVersionError", {"expected": 1, "actual": 2}),
        (move(web, "2", "pay"), 404, "NotFoundError", {}),
        (move(web, "1", "no_such_event"), 409, "InvalidTransitionError", {}),
        (move(web, "1", "ship", durability="replica"), 501, "ConfigurationError", {}),
        (start(web, "3", data={"bad name": 1}), 422, "InvalidDataError", {}),
        (start(web, "3", surprise=1), 422, "InvalidRequest", {}),
        (start(web, "3", timeout_seconds=1e9), 422, "InvalidRequest", {}),
        (web.get("/api/v1/instances/order"), 422, "InvalidRequest", {}),
        (web.get("/api/v1/instances/order?id=1&version=9"), 404, "NotFoundError", {}),
        (web.get("/api/v1/instances/order?id=1&version=1&when=2020-01-01T00:00:00Z"), 422, "InvalidDataError", {}),
        (web.get("/api/v1/machines/nobody"), 404, "NotFoundError", {}),
        (web.get("/api/v1/machines/%00"), 404, "NotFoundError", {}),
        (web.get("/api/v1/where?id=%00&prefix=1"), 422, "InvalidDataError", {}),
        (web.get("/api/v1/nothing"), 404, "HTTP", {}),
        (web.delete("/api/v1/machines", headers={"Content-Length": "0", **web.bearer}), 405, "HTTP", {}),
    ]
    for answer, status, kind, more in cases:
        told = answer.json()
        assert answer.headers["content-type"] == problems.MEDIA_TYPE, told
        assert (answer.status_code, told["status"], told["type"]) == (status, status, f"urn:statecache:{kind}")
        assert told["detail"]
        assert told | more == told


NOT_AS_DOCUMENTED: tuple[dict[str, Any], ...] = (
    {"increment": {"n": True}}, {"increment": {"n": "5"}}, {"increment": {"n": " 1 "}}, {"increment": {"n": "1_000"}},
    {"increment": {"n": "NaN"}}, {"increment": {"n": None}}, {"expect_version": True}, {"expect_version": "1"},
    {"expect_version": 1.5}, {"occurred_at": 1_700_000_000}, {"occurred_at": 1.5}, {"occurred_at": "1700000000"},
    {"occurred_at": True}, {"occurred_at": "2024-01-01"}, {"timeout_seconds": "5"}, {"timeout_seconds": True},
    {"unset": "abc"}, {"unset": [1]}, {"actor": 5}, {"id": 1}, {"event": 5}, {"data": [["a", 1]]}, {"durability": "HOT"},
)  # fmt: skip


def test_a_body_is_converted_by_nobody(world: worlds.World, web: webs.Served) -> None:
    world.start("1", n=1)
    for body in NOT_AS_DOCUMENTED:
        for answer in (
            web.post("/api/v1/transitions/order", json={"id": "1", "event": "pay", **body}, headers=web.bearer),
            web.post("/api/v1/instances/order", json={"id": "2", **body}, headers=web.bearer),
        ):
            found = (answer.status_code, answer.json().get("type"))
            assert found == (422, "urn:statecache:InvalidRequest"), (body, answer.text)
    assert world.orders.get("1").version == 1


def test_a_body_as_documented(world: worlds.World, web: webs.Served) -> None:
    world.start("1", n=1)
    more = {
        "increment": {"n": 2, "f": 0.5},
        "expect_version": 1,
        "unset": [],
        "timeout_seconds": 5,
        "durability": "hot",
    }
    assert move(web, "1", "pay", occurred_at="2024-01-01T12:00:00+02:00", **more).status_code == 200
    assert world.orders.get("1").data == {"n": 3, "f": 0.5}
    row = web.get("/api/v1/history/order?id=1&after=1&limit=1").json()["transitions"][0]
    assert datetime.datetime.fromisoformat(row["occurred_at"]) == datetime.datetime(2024, 1, 1, 10, tzinfo=datetime.UTC)


ODD_QUERIES = (
    "instances/order?id=1&version=1_0", "instances/order?id=1&version=%201", "instances/order?id=1&version=%2B1",
    "instances/order?id=1&when=1700000000", "instances/order?id=1&when=2024-01-01", "history/order?id=1&after=0_1",
    "history/order?id=1&limit=1_0", "find/order?older_than_seconds=1_0", "find/order?limit=%201", "where?id=1&limit=1_0",
)  # fmt: skip


def test_a_query_as_only_python_reads_it_is_refused(world: worlds.World, web: webs.Served) -> None:
    world.start("1")
    for query in ODD_QUERIES:
        answer = web.get(f"/api/v1/{query}")
        found = (answer.status_code, answer.json().get("type"))
        assert found == (422, "urn:statecache:InvalidRequest"), (query, answer.text)
    for query in (
        "instances/order?id=1&version=1",
        "find/order?older_than_seconds=1.5e2&limit=10",
        "history/order?id=1&after=0",
    ):
        assert web.get(f"/api/v1/{query}").status_code == 200, query


def test_a_parked_instance_is_locked(world: worlds.World, web: webs.Served) -> None:
    world.start("1", ["pay"])
    world.flush()
    refusing.refuse(world.durable)
    world.orders.transition("1", "note", reason=refusing.REASON)
    world.flush()
    answer = move(web, "1", "ship")
    assert (answer.status_code, answer.json()["type"]) == (423, "urn:statecache:ParkedError")
    assert "receipt" not in answer.json()


def test_every_error_has_its_status() -> None:
    kinds = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)}
    assert kinds <= set(problems.STATUSES)
    assert problems.of(faults.KeyHit("a fork"))[0] == 500
    assert problems.of(faults.Transient("a deadlock"))[0] == 503
    receipt = model.Receipt("order", "1", "pay", "placed", "paid", 2, "1-1", 5, "t")
    for kind in kinds:
        stands = kind in (errors.DurabilityTimeout, errors.ParkedError)
        error = kind("what happened", receipt) if stands else kind("what happened")
        status, told, _ = problems.of(error)
        assert (told.status, told.detail) == (status, "what happened")
        assert 400 <= status < 600
        if stands:
            assert told.model_dump()["receipt"]["address"] == "order:1", "it stands: the caller must know what"


def test_times_are_utc(world: worlds.World, web: webs.Served) -> None:
    world.start("1")
    at = datetime.datetime.fromisoformat(web.get("/api/v1/instances/order?id=1").json()["created_at"])
    assert at == world.orders.get("1").created_at
    assert at.utcoffset() == datetime.timedelta(0)


def test_holder_of_a_claim_is_told(world: worlds.World, web: webs.Served) -> None:
    """By the API and on the page, as long as the claim is in force; not for a version of before."""
    world.start("1", ["pay"])
    assert web.get("/api/v1/instances/order?id=1").json()["claim"] is None
    claim = world.orders.claim("1", ttl=600, worker="packer-3")
    told = web.get("/api/v1/instances/order?id=1").json()["claim"]
    assert (told["worker"], told["token"]) == ("packer-3", claim.token)
    assert datetime.datetime.fromisoformat(told["expires_at"]) == claim.expires_at
    assert web.get("/api/v1/instances/order?id=1&version=1").json()["claim"] is None
    assert "packer-3" in web.get(wording.instance_link("order", "1")).text
    claim.release()
    assert web.get("/api/v1/instances/order?id=1").json()["claim"] is None


class Parcel(StateMachine):
    stored = State(initial=True, timeout=datetime.timedelta(milliseconds=1))
    taken = State(final=True)

    take = stored.to(taken)


def test_find_what_is_stuck(world: worlds.World, web: webs.Served) -> None:
    parcels = world.cache.machine(Parcel)
    parcels.start_many(["1", "2"])
    parcels.transition("2", "take")
    world.flush()

    def found() -> list[str]:
        return [one["id"] for one in web.get("/api/v1/find/parcel?stuck=true").json()["instances"]]

    wait_until(lambda: found() == ["1"], "the parcel that is stuck")
    assert web.get("/api/v1/find/parcel?stuck=true&state=taken").json()["instances"] == []
