"""Every reply code of every script's header: reached, and what it says of writing is so.

A scenario prepares, and returns the call that shall be answered with the code. The table is complete by a test: a code
that a header declares and no scenario reaches fails, as does one that no header declares.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from statecache.core import claims, codec, entry, items
from statecache.hot import claims as hot_claims
from statecache.hot import deadlines, scripts

NEXT = scripts.Stamp(2, "owner-2")
WRITING = {
    ("apply", "OK"), ("claim", "OK"), ("drop", "OK"), ("evict", "OK"), ("fence", "OK"), ("flushed", "OK"), ("hydrate", "OK"),
    ("park", "OK"), ("ready", "OK"), ("remind", "OK"),
}  # fmt: skip
Act = Callable[[], str]
Scenario = Callable[[Any], Act]
SCENARIOS: dict[tuple[str, str], Scenario] = {}


def reaches(script: str, code: str) -> Callable[[Scenario], Scenario]:
    def note(scenario: Scenario) -> Scenario:
        assert (script, code) not in SCENARIOS
        SCENARIOS[script, code] = scenario
        return scenario

    return note


# --- what each script is called with ------------------------------------------------------------------------------------


def hydrate_row(lab: Any, id: str = "cold", watermark: str = "1-0", partition: int = 0) -> tuple[Any, ...]:
    return (
        partition,
        f"order:{id}",
        "paid 2 1-0 1 1 2",
        codec.token_of("a") + codec.token_of("b"),
        watermark,
        {"a": b"1"},
    )


def claim(
    lab: Any, id: str = "1", *, state: str = "", token: str = "", ttl_ms: int = 60_000, nonce: str = "nonce1"
) -> str:
    """The last line of a claim's reply."""
    wish = claims.Ask([claims.Row(0, "order", id, state, token)], nonce, "worker-1", ttl_ms)
    return str(hot_claims.ask(lab.store, wish).lines[-1])


READY_CALLS: dict[str, Callable[[Any], str]] = {
    "apply": lambda lab: lab.apply(lab.item(lab.NOTE))[0],
    "claim": claim,
    "due": lambda lab: deadlines.due(lab.store, [0], 10)[0],
    "evict": lambda lab: lab.store.evict([(0, "order:1", 1, "1-1", 0)])[0],
    "find": lambda lab: lab.store.find(0, "order", "1")[0],
    "flushed": lambda lab: lab.store.flushed([(0, entry.EntryId(1, 1), entry.EntryId(1, 1), 10)])[0],
    "hydrate": lambda lab: lab.store.hydrate([hydrate_row(lab)])[0],
    "park": lambda lab: lab.store.park([(0, "order:1")])[0],
    "read": lambda lab: lab.store.read([(0, entry.ZERO)], entries=10, bytes_max=10_000)[0].code,
    "remind": lambda lab: deadlines.remind(lab.store, [(0, "order:1", None, 5)])[0],
}
"""Calls of a partition that serves; the instance ``order:1`` is there."""

FENCED_CALLS: dict[str, Callable[[Any], str]] = {
    "drop": lambda lab: lab.store.drop(0, NEXT, lab.identity, entry.EntryId(1, 1), ["order:1"]),
    "probe": lambda lab: lab.store.probe(0, NEXT, lab.identity, entry.ZERO)[0],
    "ready": lambda lab: lab.store.ready(
        0, NEXT, identity=lab.identity, watermark=entry.ZERO, limit=10, new=False, report="{}"
    ),
}
"""Calls of the recovery ``NEXT``."""


def refused(name: str, code: str, act: Callable[[Any], str], *, fenced: bool) -> None:
    @reaches(name, code)
    def scenario(lab: Any) -> Act:
        lab.start()
        lab.store.identity_interval_seconds = -1.0  # apply compares it in every call
        if fenced:
            lab.fence(0, NEXT)
        spoiled = {
            "EPOCH": {"owner": "somebody"},
            "RECOVERING": {"status": "ready" if fenced else "recovering"},
            "IDENTITY": {"identity": "another server"},
        }
        if fenced and code == "IDENTITY":
            lab.identity = "another server"
        else:
            lab.set_meta(**spoiled[code])
        return lambda: act(lab)


for _name, _act in READY_CALLS.items():
    for _code in ("EPOCH", "RECOVERING", "IDENTITY"):
        refused(_name, _code, _act, fenced=False)
for _name, _act in FENCED_CALLS.items():
    for _code in ("EPOCH", "RECOVERING", "IDENTITY"):
        refused(_name, _code, _act, fenced=True)


# --- admit, fence ---------------------------------------------------------------------------------------------------------


@reaches("admit", "OK")
def _admit_ok(lab: Any) -> Act:
    return lambda: lab.store.admit(scripts.Stamp(1, "owner-1"), load=False).codes[0]


@reaches("admit", "EPOCH")
def _admit_epoch(lab: Any) -> Act:
    return lambda: lab.store.admit(NEXT, load=False).codes[0]


@reaches("admit", "RECOVERING")
def _admit_recovering(lab: Any) -> Act:
    lab.set_meta(1, status="recovering")
    return lambda: lab.store.admit(scripts.Stamp(1, "owner-1")).codes[1]


@reaches("admit", "IDENTITY")
def _admit_identity(lab: Any) -> Act:
    lab.set_meta(identity="another server")
    return lambda: lab.store.admit(scripts.Stamp(1, "owner-1")).codes[0]


@reaches("fence", "OK")
def _fence_ok(lab: Any) -> Act:
    return lambda: lab.store.fence(0, NEXT, "deployment", 1)[0]


@reaches("fence", "NEWER")
def _fence_newer(lab: Any) -> Act:
    return lambda: lab.store.fence(0, scripts.Stamp(1, "somebody"), "deployment", 1)[0]


@reaches("fence", "FOREIGN")
def _fence_foreign(lab: Any) -> Act:
    return lambda: lab.store.fence(0, NEXT, "another deployment", 1)[0]


# --- apply ----------------------------------------------------------------------------------------------------------------


@reaches("apply", "OK")
def _apply_ok(lab: Any) -> Act:
    return lambda: lab.apply(lab.item(lab.START))[0]


@reaches("apply", "DUP")
def _apply_dup(lab: Any) -> Act:
    lab.start()
    (id,) = lab.note()
    return lambda: lab.apply(lab.item(lab.NOTE, "1", id))[0]


@reaches("apply", "OLD")
def _apply_old(lab: Any) -> Act:
    lab.start()
    lab.note(times=8)
    return lambda: lab.apply(lab.item(lab.NOTE, retry=True))[0]


@reaches("apply", "MISS")
def _apply_miss(lab: Any) -> Act:
    return lambda: lab.apply(lab.item(lab.NOTE, "nobody"))[0]


@reaches("apply", "EXISTS")
def _apply_exists(lab: Any) -> Act:
    lab.start()
    return lambda: lab.apply(lab.item(lab.START))[0]


@reaches("apply", "STATE")
def _apply_state(lab: Any) -> Act:
    lab.start()
    lab.apply(lab.item(lab.PAY))
    return lambda: lab.apply(lab.item(lab.PAY))[0]


@reaches("apply", "VERSION")
def _apply_version(lab: Any) -> Act:
    lab.start()
    return lambda: lab.apply(lab.item(lab.NOTE, expected=2))[0]


@reaches("apply", "FULL")
def _apply_full(lab: Any) -> Act:
    lab.start()
    lab.set_meta(limit="1")
    return lambda: lab.apply(lab.item(lab.NOTE))[0]


@reaches("apply", "PARKED")
def _apply_parked(lab: Any) -> Act:
    lab.start()
    lab.store.park([(0, "order:1")])
    return lambda: lab.apply(lab.item(lab.NOTE))[0]


@reaches("apply", "DATA")
def _apply_data(lab: Any) -> Act:
    lab.start(pairs=["word", '"x"'])
    return lambda: lab.apply(lab.item(lab.NOTE, increments=[["word", "1", "i"]]))[0]


@reaches("apply", "FENCED")
def _apply_fenced(lab: Any) -> Act:
    lab.start()
    claim(lab)
    return lambda: lab.apply(lab.item(lab.NOTE))[0]


@reaches("apply", "TYPE")
def _apply_type(lab: Any) -> Act:
    lab.client.set(lab.key("1"), "a stranger's")
    return lambda: lab.apply(lab.item(lab.NOTE))[0]


# --- claims and deadlines -------------------------------------------------------------------------------------------------


@reaches("claim", "OK")
def _claim_ok(lab: Any) -> Act:
    lab.start()
    return lambda: claim(lab)


@reaches("claim", "HELD")
def _claim_held(lab: Any) -> Act:
    lab.start()
    claim(lab)
    return lambda: claim(lab, nonce="other")


@reaches("claim", "FENCED")
def _claim_fenced(lab: Any) -> Act:
    lab.start()
    claim(lab)
    return lambda: claim(lab, token="1-7")


@reaches("claim", "STATE")
def _claim_state(lab: Any) -> Act:
    lab.start()
    return lambda: claim(lab, state="paid")


@reaches("claim", "PARKED")
def _claim_parked(lab: Any) -> Act:
    lab.start()
    lab.store.park([(0, "order:1")])
    return lambda: claim(lab)


@reaches("claim", "MISS")
def _claim_miss(lab: Any) -> Act:
    return lambda: claim(lab, "nobody")


@reaches("claim", "TYPE")
def _claim_type(lab: Any) -> Act:
    lab.client.set(lab.key("1"), "a stranger's")
    return lambda: claim(lab)


@reaches("due", "OK")
def _due_ok(lab: Any) -> Act:
    lab.client.zadd(lab.store.keyspace.due(0), {"order:1": 1})
    return lambda: deadlines.due(lab.store, [0], 10)[0]


@reaches("remind", "OK")
def _remind_ok(lab: Any) -> Act:
    lab.start()
    return lambda: READY_CALLS["remind"](lab)


@reaches("remind", "KEPT")
def _remind_kept(lab: Any) -> Act:
    lab.client.zadd(lab.store.keyspace.due(0), {"order:1": 1})
    return lambda: READY_CALLS["remind"](lab)


# --- the others -----------------------------------------------------------------------------------------------------------


@reaches("evict", "OK")
def _evict_ok(lab: Any) -> Act:
    lab.start()
    return lambda: READY_CALLS["evict"](lab)


@reaches("evict", "GONE")
def _evict_gone(lab: Any) -> Act:
    return lambda: READY_CALLS["evict"](lab)


@reaches("evict", "KEPT")
def _evict_kept(lab: Any) -> Act:
    lab.start()
    lab.note()
    return lambda: READY_CALLS["evict"](lab)


@reaches("evict", "TYPE")
def _evict_type(lab: Any) -> Act:
    lab.client.set(lab.key("1"), "a stranger's")
    return lambda: READY_CALLS["evict"](lab)


@reaches("hydrate", "OK")
def _hydrate_ok(lab: Any) -> Act:
    return lambda: READY_CALLS["hydrate"](lab)


@reaches("hydrate", "EXISTS")
def _hydrate_exists(lab: Any) -> Act:
    lab.start("cold")
    return lambda: READY_CALLS["hydrate"](lab)


@reaches("hydrate", "STALE")
def _hydrate_stale(lab: Any) -> Act:
    lab.set_meta(cold="1", evicted_to="1-5")
    return lambda: lab.store.hydrate([hydrate_row(lab, watermark="1-4")])[0]


@reaches("park", "OK")
def _park_ok(lab: Any) -> Act:
    lab.start()
    return lambda: READY_CALLS["park"](lab)


@reaches("park", "GONE")
def _park_gone(lab: Any) -> Act:
    return lambda: READY_CALLS["park"](lab)


@reaches("park", "TYPE")
def _park_type(lab: Any) -> Act:
    lab.client.set(lab.key("1"), "a stranger's")
    return lambda: READY_CALLS["park"](lab)


@reaches("find", "OK")
def _find_ok(lab: Any) -> Act:
    lab.start()
    return lambda: READY_CALLS["find"](lab)


@reaches("read", "OK")
def _read_ok(lab: Any) -> Act:
    lab.start()
    return lambda: READY_CALLS["read"](lab)


@reaches("flushed", "OK")
def _flushed_ok(lab: Any) -> Act:
    lab.start()
    return lambda: READY_CALLS["flushed"](lab)


@reaches("drop", "OK")
def _drop_ok(lab: Any) -> Act:
    lab.start()
    lab.fence(0, NEXT)
    return lambda: FENCED_CALLS["drop"](lab)


@reaches("probe", "OK")
def _probe_ok(lab: Any) -> Act:
    lab.start()
    lab.fence(0, NEXT)
    return lambda: FENCED_CALLS["probe"](lab)


@reaches("ready", "TAKEN")
def _ready_taken(lab: Any) -> Act:
    lab.start()
    lab.fence(0, NEXT)
    lab.client.xadd(lab.log(), {"e": "a stranger's"}, id="2-*")
    return lambda: FENCED_CALLS["ready"](lab)


@reaches("ready", "OK")
def _ready_ok(lab: Any) -> Act:
    lab.start()
    lab.fence(0, NEXT)
    return lambda: FENCED_CALLS["ready"](lab)


@pytest.mark.parametrize(("script", "code"), sorted(SCENARIOS))
def test_code_is_reached_and_writes_what_the_header_says(lab: Any, script: str, code: str) -> None:
    """Refusals and duplicates leave every key of the namespace as it was, byte for byte."""
    act = SCENARIOS[script, code](lab)
    before = lab.dump()
    reply = act()
    assert reply.split(" ")[0] == code
    if (script, code) in WRITING:
        assert lab.dump() != before
    else:
        assert lab.dump() == before


def test_every_declared_code_has_a_scenario() -> None:
    assert set(SCENARIOS) == {(name, code) for name in scripts.NAMES for code in scripts.reply_codes(name)}


@pytest.mark.parametrize("name", scripts.NAMES)
def test_no_script_answers_a_code_that_its_header_hides(name: str) -> None:
    """The quoted upper-case words of the Lua text, but for commands, their options and errors, are codes of the header."""
    text = scripts.stamped(name, scripts.Stamp(1, "o"), False).text
    body = "\n".join(re.sub(r"(?<![':])--.*", "", line) for line in text.splitlines())
    body = re.sub(r"\b(call|pcall_?)\(\s*'[A-Z]+'(, '(STREAM|MINID|COUNT)')?", "(", body)
    body = body.replace("err = 'READONLY ", "")
    words = set(re.findall(r"'([A-Z]{2,})\b", body)) - {"COUNT", "LIMIT", "MINID", "STREAM", "WITHSCORES"}
    assert words == scripts.reply_codes(name)


@pytest.mark.parametrize("script", sorted(READY_CALLS))
@pytest.mark.parametrize("spoil", ["older epoch", "other owner", "no meta"])
def test_wrong_stamp_is_refused(lab: Any, script: str, spoil: str) -> None:
    """Epoch AND owner decide: an epoch's number can be taken twice (H14). A wiped partition admits nobody (P8)."""
    lab.start()
    if spoil == "no meta":
        lab.client.delete(lab.meta(), lab.key("1"), lab.log())
    else:
        lab.set_meta(**({"epoch": "2"} if spoil == "older epoch" else {"owner": "owner-9"}))
    before = lab.dump()
    assert READY_CALLS[script](lab) == "EPOCH"
    assert lab.dump() == before


@pytest.mark.parametrize("script", sorted(READY_CALLS))
def test_scripts_are_unknown_to_a_server_that_lost_its_script_cache(lab: Any, script: str) -> None:
    """Nothing loads a script by itself: NOSCRIPT is the signal that the server may be another one (P8)."""
    lab.start()
    lab.client.script_flush("SYNC")
    before = lab.dump()
    assert READY_CALLS[script](lab) == "NOSCRIPT"
    assert lab.dump() == before


# --- strangers' keys ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stranger", ["meta", "log"])
@pytest.mark.parametrize("script", ["apply", "flushed", "read", "find"])
def test_stranger_at_a_partitions_own_keys_changes_nothing(lab: Any, script: str, stranger: str) -> None:
    """A string where ``meta`` or the log should be: the script fails before its first write, and says which key is wrong."""
    lab.start()
    key = lab.meta() if stranger == "meta" else lab.log()
    lab.client.delete(key)
    lab.client.set(key, "a stranger's")
    before = lab.dump()
    with pytest.raises(Exception, match=r"WRONGTYPE|holds"):
        _raise_error(READY_CALLS[script](lab) if script != "apply" else lab.store.apply([lab.item(lab.NOTE)])[0])
    assert lab.dump() == before


def _raise_error(answer: str | items.Outcome) -> None:
    if isinstance(answer, items.Outcome):
        assert answer.code == "ERROR"
        assert answer.cause is not None
        raise answer.cause


def test_stranger_in_one_partition_stops_the_whole_call_before_any_write(lab: Any) -> None:
    """Items of two partitions in one call; the second one's log is a string. Nothing is written in the first either."""
    lab.start("1", partition=0)
    lab.client.delete(lab.log(1))
    lab.client.set(lab.log(1), "a stranger's")
    before = lab.dump()
    outcomes = lab.store.apply([lab.item(lab.NOTE, "1"), lab.item(lab.START, "2", partition=1)])
    assert [outcome.code for outcome in outcomes] == ["ERROR", "ERROR"]
    assert lab.dump() == before


@pytest.mark.parametrize("kind", ["string", "list", "hash without @", "hash with a wrong @", "hash without @r"])
def test_stranger_at_an_instances_key_is_refused_and_others_go_on(lab: Any, kind: str) -> None:
    """One item meets a key that is no instance: it alone is refused, and the key stays as it is."""
    lab.start("2")
    key = lab.key("1")
    match kind:
        case "string":
            lab.client.set(key, "x")
        case "list":
            lab.client.rpush(key, "x")
        case "hash without @":
            lab.client.hset(key, "a", "1")
        case "hash with a wrong @":
            lab.client.hset(key, mapping={"@": "placed", "@r": "12345678"})
        case "hash without @r":
            lab.client.hset(key, mapping={"@": "placed 1 1-1 1 1 1"})
    before = lab.dump()[key.encode()]
    replies = lab.apply(lab.item(lab.NOTE, "1"), lab.item(lab.NOTE, "2"))
    assert replies[0] == ("MISS 0 0-0" if kind == "hash without @" else "TYPE")
    assert replies[1].startswith("OK 2 ")
    assert lab.dump()[key.encode()] == before


@pytest.mark.parametrize("script", ["evict", "hydrate", "park"])
def test_stranger_at_an_instances_key_survives_the_cold_tier(lab: Any, script: str) -> None:
    """Eviction, hydration and parking of an id whose key holds a string: nothing of the partition changes."""
    lab.client.set(lab.key("1"), "x")
    before = lab.dump()
    calls: dict[str, Callable[[], str]] = {
        "evict": lambda: lab.store.evict([(0, "order:1", 1, "1-1", 0)])[0],
        "hydrate": lambda: lab.store.hydrate([hydrate_row(lab, "1")])[0],
        "park": lambda: lab.store.park([(0, "order:1")])[0],
    }
    assert calls[script]() == ("EXISTS" if script == "hydrate" else "TYPE")
    assert lab.dump() == before


def test_hash_with_a_strange_own_field_is_not_evicted(lab: Any) -> None:
    """A stranger's hash at an instance's key."""
    lab.client.hset(lab.key("1"), "@", "nonsense")
    before = lab.dump()
    assert lab.store.evict([(0, "order:1", 1, "1-1", 0)]) == ["TYPE"]
    assert lab.dump() == before
