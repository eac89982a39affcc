"""The short way of a call of one item (``include/apply_lone.lua``) does what the general way does with that item."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

import pytest

from statecache.core import codec, items

ALONE, BESIDE = 0, 1
"""The partitions: in one an item is sent by itself, in the other with one that finds nothing and writes nothing."""
MOVES = {
    "note": items.MoveSpec("order", "note", {"placed": "placed", "paid": "paid"}, 1),
    "pay": items.MoveSpec("order", "pay", {"placed": "paid"}, 2),
    "repay": items.MoveSpec("order", "repay", {"shipped": "placed", "paid": "placed"}, 1),
    "nowhere": items.MoveSpec("order", "nowhere", {}, 1),
    "timed": items.MoveSpec("order", "timed", {"placed": "placed", "paid": "placed"}, 1, {"placed": 10**9}),
    "untimed": items.MoveSpec("order", "untimed", {"paid": "paid", "placed": "paid"}, 1, {"shipped": 10**9}),
    "start": items.MoveSpec("order", "@start", {"": "placed"}, 1),
}
Options = dict[str, Any]


def both(lab: Any, move: str, id: str, **options: Any) -> str:
    """Apply an item to the twins; the reply, which must be the same."""
    alone = lab.apply(lab.item(MOVES[move], id, partition=ALONE, **options))
    beside = lab.apply(
        lab.item(MOVES[move], id, partition=BESIDE, **options), lab.item(MOVES["note"], "nobody", partition=BESIDE)
    )
    assert len(beside) == 2
    assert beside[1].split(" ")[0] in ("MISS", "EPOCH", "RECOVERING")
    assert timeless(alone) == timeless(beside[:1])
    assert twin(lab, id, ALONE) == twin(lab, id, BESIDE)
    return str(alone[0])


def twin(lab: Any, id: str, partition: int) -> object:
    """What stands of an instance, of its log and of the deadlines, in order, but for the times."""
    key = lab.key(id, partition)
    if lab.client.type(key) not in (b"hash", b"none"):
        return lab.client.type(key)
    due = lab.client.zrange(lab.store.keyspace.due(partition), 0, -1)
    return timeless(list(lab.hash(id, partition).items())), timeless(lab.client.xrange(lab.log(partition))), due


def timeless(what: object) -> str:
    return re.sub(r"(?<!\d)1\d{12}(?!\d)", "TIME", repr(what))


def test_the_short_way_is_taken(real_lab: Any) -> None:
    """By what it spares: the general way reads of meta what the short one has read (so a fallen back call reads it twice)."""
    real_lab.start("1", pairs=["a", "1"])

    def reads(*batch: items.Item) -> int:
        real_lab.client.config_resetstat()
        assert real_lab.apply(*batch)[0].startswith("OK ")
        return int(real_lab.client.info("commandstats")["cmdstat_xlen"]["calls"])

    plain = real_lab.item(MOVES["note"], pairs=["a", "2"])
    assert reads(plain) == 1
    real_lab.client.hset(real_lab.key("1"), "@r", "x" + real_lab.hash("1")["@r"][1:8])
    assert reads(real_lab.item(MOVES["note"], pairs=[f"f{n}" if n % 2 == 0 else "1" for n in range(40)])) == 1
    real_lab.client.hset(real_lab.key("1"), "@", real_lab.hash("1")["@"] + " w")
    assert reads(real_lab.item(MOVES["note"])) == 2


@pytest.mark.parametrize("count", [*range(9), 30, 66, 200, 257])
def test_fields_of_any_number(lab: Any, count: int) -> None:
    both(lab, "start", "1", transition_id="t0", pairs=["f0", "0", "g", "1"])
    for turn in range(3):  # new fields, then fields that are there
        pairs = [text for n in range(count) for text in (f"f{n}", f'"{n}-{turn}"')]
        reply = both(lab, "note", "1", transition_id=f"t{turn + 1}", pairs=pairs)
        assert reply.startswith("OK ") if count < 256 else reply == f"DATA fields {count + 1}"
    both(lab, "note", "1", transition_id="last")


def _spoiled(change: Callable[[Any, int], Any]) -> Callable[[Any], None]:
    def spoil(lab: Any) -> None:
        for partition in (ALONE, BESIDE):
            change(lab, partition)

    return spoil


def _append_flag(flag: str) -> Callable[[Any, int], Any]:
    return lambda lab, p: lab.client.hset(lab.key("1", p), "@", lab.hash("1", p)["@"] + flag)


def _now_ms(lab: Any) -> int:
    return int(lab.client.time()[0]) * 1000


SITUATIONS: dict[str, tuple[Callable[[Any, int], Any], str]] = {
    "nothing": (lambda lab, p: None, "OK"),
    "another epoch": (lambda lab, p: lab.set_meta(p, epoch="7"), "EPOCH"),
    "another owner": (lambda lab, p: lab.set_meta(p, owner="owner-7"), "EPOCH"),
    "recovering": (lambda lab, p: lab.set_meta(p, status="recovering"), "RECOVERING"),
    "no meta": (lambda lab, p: lab.client.delete(lab.meta(p)), "EPOCH"),
    "no room": (lambda lab, p: lab.set_meta(p, limit=0, limit_max=0, limit_at=0), "FULL"),
    "no room but for what SQL has": (lambda lab, p: lab.set_meta(p, limit=1, kept=3), "OK"),
    "a brake": (lambda lab, p: lab.set_meta(p, limit=0, limit_max=99, limit_at=_now_ms(lab)), "FULL"),
    "a brake that nobody set again": (lambda lab, p: lab.set_meta(p, limit=0, limit_max=99, limit_at=1), "OK"),
    "a brake of before the clock was put back": (
        lambda lab, p: lab.set_meta(p, limit=0, limit_max=99, limit_at=_now_ms(lab) + 3_600_000),
        "OK",
    ),
    "parked": (_append_flag(" p"), "PARKED"),
    "wide": (_append_flag(" w"), "OK"),
    "claimed by nobody any more": (_append_flag(" c"), "OK"),
    "claimed": (
        lambda lab, p: (
            _append_flag(" c")(lab, p),
            lab.client.hset(lab.key("1", p), "@c", "1-1 99999999999999 n worker"),
        ),
        "FENCED",
    ),
    "absent": (lambda lab, p: lab.client.delete(lab.key("1", p)), "MISS"),
    "a list": (lambda lab, p: (lab.client.delete(lab.key("1", p)), lab.client.rpush(lab.key("1", p), "x")), "TYPE"),
    "no ring": (lambda lab, p: lab.client.hdel(lab.key("1", p), "@r"), "TYPE"),
    "a hash of a stranger's": (lambda lab, p: lab.client.hset(lab.key("1", p), "@", "placed"), "TYPE"),
    "an empty ring": (lambda lab, p: lab.client.hset(lab.key("1", p), "@r", ""), "OK"),
    "the id in the ring": (
        lambda lab, p: lab.client.hset(lab.key("1", p), "@r", "abcdefgh" + codec.token_of("t-last") + "ijklmnop"),
        "DUP",
    ),
    "the id across two of the ring": (
        lambda lab, p: lab.client.hset(lab.key("1", p), "@r", f"abc{codec.token_of('t-last')}defgh"),
        "OK",
    ),
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_whatever_it_meets(lab: Any, situation: str) -> None:
    both(lab, "start", "1", transition_id="t1", pairs=["a", "1"])
    both(lab, "note", "1", transition_id="t2", pairs=["a", "2"])
    change, code = SITUATIONS[situation]
    _spoiled(change)(lab)
    assert both(lab, "note", "1", transition_id="t-last", pairs=["b", "1"]).split(" ")[0] == code


@pytest.mark.parametrize("seed", range(8))
def test_any_run(lab: Any, seed: int) -> None:
    """Two hundred items at random, sent alone and beside another: the same replies, hashes and logs."""
    rng = random.Random(seed)
    ids: dict[str, list[str]] = {"1": [], "2": []}
    for id in ids:
        both(lab, "start", id, transition_id=f"{id}-start", pairs=["amount", "1"])
    seen = set()
    for number in range(200):
        id = rng.choice(list(ids))
        repeated = rng.random() < 0.1 and bool(ids[id])
        transition_id = rng.choice(ids[id][-12:]) if repeated else f"{id}-{number}"
        options: Options = {
            "pairs": [t for n in range(rng.choice((0, 1, 2, 5, 6, 9))) for t in (f"f{rng.randrange(90)}-{n}", str(n))]
        }
        if rng.random() < 0.2:
            options |= rng.choice(
                [
                    {"expected": rng.randrange(1, 9)},
                    {"unset": ["f1-1"]},
                    {"increments": [["amount", "2", "i"]]},
                    {"retry": True},
                ]
            )
        reply = both(lab, rng.choice(list(MOVES)), id, transition_id=transition_id, **options)
        seen.add(reply.split(" ")[0])
        ids[id].append(transition_id)
    assert seen >= {"OK", "STATE", "DUP", "EXISTS"}
