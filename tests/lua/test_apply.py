"""What one call of ``apply.lua`` does: ring, increments, unset, limits, order, several partitions."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from statecache.core import codec, entry, items


def ring(lab: Any, id: str = "1") -> str:
    found: str = lab.hash(id)["@r"]
    return found


# --- what is written ------------------------------------------------------------------------------------------------------


def test_start_writes_hash_and_entry_together(lab: Any) -> None:
    """P1: one script wrote the hash with its ring and the log's entry, under the epoch's next number."""
    item = lab.item(lab.START, "1", "t1", pairs=["amount", "12.5"])
    assert lab.apply(item) == ["OK 1 1-1 - placed"]
    (written,) = lab.entries()
    assert (written.version, written.event, written.from_state, written.to_state) == (1, "@start", "", "placed")
    assert (written.transition_id, written.patch, written.machine_version) == ("t1", '{"amount":12.5}', 1)
    fields = lab.hash("1")
    assert fields["@"] == f"placed 1 1-1 {written.at_ms} 1 {written.at_ms}"
    assert fields["@r"] == codec.token_of("t1")
    assert fields["amount"] == "12.5"


def test_transition_keeps_the_time_of_creation(lab: Any) -> None:
    lab.start()
    created = lab.hash("1")["@"].split(" ")[3]
    assert lab.apply(lab.item(lab.PAY)) == ["OK 2 1-2 placed paid"]
    assert lab.hash("1")["@"].split(" ")[:5] == ["paid", "2", "1-2", created, "1"]


def test_own_fields_stand_first_in_the_hash(lab: Any) -> None:
    lab.start(pairs=["a", "1"])
    assert list(lab.hash("1"))[:2] == ["@", "@r"]


def test_hash_of_a_long_history_stays_a_listpack(real_lab: Any) -> None:
    """The ring is 64 bytes at most: one value above ``hash-max-listpack-value`` would triple the instance's memory."""
    real_lab.client.config_set("hash-max-listpack-value", 64)
    try:
        real_lab.start(pairs=["amount", "1"])
        real_lab.note(times=20)
        assert real_lab.client.object("encoding", real_lab.key("1")) in (b"listpack", "listpack")
    finally:
        real_lab.client.config_set("hash-max-listpack-value", 256)


def test_numbers_of_an_epoch_are_dense(lab: Any) -> None:
    lab.start("1")
    lab.apply(lab.item(lab.NOTE, "nobody"))
    lab.start("2")
    lab.apply(lab.item(lab.START, "2"))
    lab.note("1")
    assert [one.entry_id for one in lab.entries()] == [entry.EntryId(1, number) for number in (1, 2, 3)]


# --- ring -----------------------------------------------------------------------------------------------------------------


def test_ring_holds_the_last_eight_tokens_newest_last(lab: Any) -> None:
    lab.start()
    ids = lab.note(times=9)
    assert ring(lab) == "".join(codec.token_of(one) for one in ids[-8:])
    assert len(ring(lab)) == 64


@pytest.mark.parametrize("back", range(8))
def test_every_place_of_the_ring_tells_its_version(lab: Any, back: int) -> None:
    """Version 10: the last token is version 10, the first one version 3. Only the newest knows its entry id."""
    lab.start()
    ids = lab.note(times=9)
    before = lab.dump()
    newest = lab.entries()[-1].entry_id
    expected = f"DUP {10 - back} {newest if back == 0 else '-'}"
    assert lab.apply(lab.item(lab.NOTE, "1", ids[-1 - back])) == [expected]
    assert lab.dump() == before


def test_ninth_newest_id_is_not_in_the_ring(lab: Any) -> None:
    lab.start()
    ids = lab.note(times=9)
    assert lab.apply(lab.item(lab.NOTE, "1", ids[0], retry=True)) == ["OLD 10"]


def test_ring_that_dropped_nothing_answers_no_old(lab: Any) -> None:
    """A repetition of an id that an instance of eight versions never saw is new: its ring is complete."""
    lab.start()
    lab.note(times=7)
    assert lab.apply(lab.item(lab.NOTE, retry=True))[0].startswith("OK 9 ")


@pytest.mark.parametrize("expected", [0, 10])
def test_old_is_not_asked_again_of_what_history_was_asked_for(lab: Any, expected: int) -> None:
    """Of ten versions the ring holds eight: what history was asked for up to the second is new; that an item names the version
    that it wants to find, as a guarded one does, says nothing of that."""
    lab.start()
    lab.note(times=9)
    for asked in (0, 1):
        assert lab.apply(lab.item(lab.NOTE, retry=True, asked=asked, expected=expected)) == ["OLD 10"]
    assert lab.apply(lab.item(lab.NOTE, retry=True, asked=2, expected=expected))[0].startswith("OK 11 ")


def test_token_across_two_others_is_no_hit(lab: Any) -> None:
    """The ring is searched at multiples of eight only: a token made of the end of one and the start of the next is new."""
    lab.start()
    lab.apply(lab.item(lab.NOTE, token="aaaaBBBB"), lab.item(lab.NOTE, token="CCCCdddd"))
    assert lab.apply(lab.item(lab.NOTE, token="BBBBCCCC"))[0].startswith("OK 4 ")


def test_token_is_found_behind_a_misaligned_hit(lab: Any) -> None:
    """The same eight characters stand across two tokens first, and as a token of their own behind that."""
    lab.start()
    for token in ("aaaaBBBB", "CCCCdddd", "BBBBCCCC"):
        lab.apply(lab.item(lab.NOTE, token=token))
    assert lab.apply(lab.item(lab.NOTE, token="BBBBCCCC"))[0].startswith("DUP 4 ")


def test_token_with_pattern_characters_is_searched_plainly(lab: Any) -> None:
    lab.start()
    lab.apply(lab.item(lab.NOTE, token="%w+-.*[]"))
    assert lab.apply(lab.item(lab.NOTE, token="%w+-.*[]"))[0].startswith("DUP 2 ")
    assert lab.apply(lab.item(lab.NOTE, token="........"))[0].startswith("OK 3 ")


def test_duplicate_is_answered_before_version_state_and_parking(lab: Any) -> None:
    """P4: a repetition gets its receipt whatever became of the instance."""
    lab.start()
    (id,) = lab.note()
    lab.apply(lab.item(lab.PAY))
    lab.store.park([(0, "order:1")])
    lab.set_meta(limit="0")
    assert lab.apply(lab.item(lab.PAY, "1", id, expected=7)) == ["DUP 2 -"]


def test_duplicate_is_a_replicated_write(real_lab: Any) -> None:
    """A WAIT behind a DUP must speak of this call: it rewrites the ring, so the replication offset moves."""
    real_lab.start()
    (id,) = real_lab.note()
    real_lab.client.config_set("repl-backlog-size", "1mb")

    def dirty() -> int:
        return int(real_lab.client.info("persistence")["rdb_changes_since_last_save"])

    before = dirty()
    assert real_lab.apply(real_lab.item(real_lab.NOTE, "1", id))[0].startswith("DUP")
    assert dirty() > before


# --- increments, unset, limits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "delta", "kind", "new"),
    [
        (None, "1", "i", 1),
        (None, "0.5", "f", 0.5),
        ("41", "1", "i", 42),
        ("41", "-42", "i", -1),
        ("9007199254740990", "1", "i", 9007199254740991),
        ("-9007199254740990", "-1", "i", -9007199254740991),
        ("1.5", "1", "i", 2.5),
        ("1", "1.5", "f", 2.5),
        ("0.1", "0.2", "f", 0.1 + 0.2),
        ("1e300", "-1e299", "f", 9e299),
        ("1e5", "1", "i", 100001),
        ("-0.0", "0", "i", 0),
        ("123456789.125", "0.0625", "f", 123456789.1875),
        ("1e-7", "0.00000010000000000000", "f", 2e-7),
    ],
)
def test_increment_adds(lab: Any, old: str | None, delta: str, kind: str, new: float) -> None:
    """The result, not the delta, is in the entry and in the hash, as JSON that reads back to the very number."""
    lab.start(pairs=["n", old] if old is not None else [])
    assert lab.apply(lab.item(lab.NOTE, increments=[["n", delta, kind]]))[0].startswith("OK 2 ")
    assert json.loads(lab.hash("1")["n"]) == new
    assert json.loads(lab.entries()[-1].increments) == {"n": new}


@pytest.mark.parametrize(
    ("old", "delta", "kind", "rule"),
    [
        ('"5"', "1", "i", "number"),
        ("null", "1", "i", "number"),
        ("true", "1", "i", "number"),
        ("[1]", "1", "i", "number"),
        ('{"a":1}', "1", "i", "number"),
        ("9007199254740991", "1", "i", "range"),
        ("9007199254740993", "-5", "i", "range"),
        ("-9007199254740991", "-1", "i", "range"),
        ("9.9e299", "9.9e299", "f", "range"),
    ],
)
def test_increment_is_refused_with_its_rule(lab: Any, old: str, delta: str, kind: str, rule: str) -> None:
    lab.start(pairs=["n", old])
    before = lab.dump()
    assert lab.apply(lab.item(lab.NOTE, pairs=["m", "1"], increments=[["m2", "1", "i"], ["n", delta, kind]])) == [
        f"DATA {rule} n"
    ]
    assert lab.dump() == before


def test_increment_never_rounds_silently(lab: Any) -> None:
    """Whole numbers stay exact: adding 1 a few times at the edge of 53 bit, then a refusal instead of a wrong number."""
    lab.start(pairs=["n", str(2**53 - 4)])
    for expected in (2**53 - 3, 2**53 - 2, 2**53 - 1):
        lab.apply(lab.item(lab.NOTE, increments=[["n", "1", "i"]]))
        assert lab.hash("1")["n"] == str(expected)
    assert lab.apply(lab.item(lab.NOTE, increments=[["n", "1", "i"]])) == ["DATA range n"]


@pytest.mark.parametrize(
    ("old", "delta", "texts"),
    [
        ("12345678901234568.0", "2.0", ["12345678901234570.0", "12345678901234572.0", "12345678901234574.0"]),
        ("9000000000000006", "7199254740991.5", ["9007199254740998.0"]),
        ("-9007199254740993.0", "-1.5", ["-9007199254740994.0", "-9007199254740996.0"]),
    ],
)
def test_a_float_beyond_the_exact_whole_numbers_stays_one(lab: Any, old: str, delta: str, texts: list[str]) -> None:
    """Its text has a point: without one the next increment would take it for a whole number that is not exact."""
    lab.start(pairs=["n", old])
    for text in texts:
        assert lab.apply(lab.item(lab.NOTE, increments=[["n", delta, "f"]]))[0].startswith("OK ")
        assert lab.hash("1")["n"] == text


def test_two_increments_of_one_instance_in_one_call_add_up(lab: Any) -> None:
    lab.start()
    lab.apply(*[lab.item(lab.NOTE, increments=[["n", "2", "i"], ["x", "0.25", "f"]]) for _ in range(4)])
    assert (lab.hash("1")["n"], lab.hash("1")["x"]) == ("8", "1")


def test_floats_survive_to_the_last_bit(lab: Any) -> None:
    lab.start(pairs=["x", repr(math.pi)])
    lab.apply(lab.item(lab.NOTE, increments=[["x", f"{math.e:.17g}", "f"]]))
    assert json.loads(lab.hash("1")["x"]) == math.pi + math.e


def test_unset_removes_and_a_missing_field_is_no_error(lab: Any) -> None:
    lab.start(pairs=["a", "1", "b", "2"])
    assert lab.apply(lab.item(lab.NOTE, pairs=["c", "3"], unset=["a", "never"]))[0].startswith("OK 2 ")
    assert {name for name in lab.hash("1") if not name.startswith("@")} == {"b", "c"}
    assert lab.entries()[-1].unset == "a never"


def _limited(lab: Any, fields_max: int) -> None:
    lab.store._fields_max = b"$%d\r\n%d\r\n" % (len(str(fields_max)), fields_max)


def test_field_limit_counts_new_names_only(lab: Any) -> None:
    _limited(lab, 3)
    lab.start(pairs=["a", "1", "b", "1", "c", "1"])
    assert lab.apply(lab.item(lab.NOTE, pairs=["a", "2", "b", "2"]))[0].startswith("OK 2 ")
    before = lab.dump()
    assert lab.apply(lab.item(lab.NOTE, pairs=["a", "3", "d", "1"])) == ["DATA fields 4"]
    assert lab.apply(lab.item(lab.NOTE, increments=[["d", "1", "i"]])) == ["DATA fields 4"]
    assert lab.apply(lab.item(lab.START, "2", pairs=["a", "1", "b", "1", "c", "1", "d", "1"])) == ["DATA fields 4"]
    assert lab.dump() == before


def test_field_limit_counts_what_is_unset_in_the_same_transition(lab: Any) -> None:
    """A field goes and another comes: the instance has as many as before."""
    _limited(lab, 3)
    lab.start(pairs=["a", "1", "b", "1", "c", "1"])
    assert lab.apply(lab.item(lab.NOTE, pairs=["d", "1"], unset=["a"]))[0].startswith("OK 2 ")
    assert lab.apply(lab.item(lab.NOTE, pairs=["e", "1"], unset=["never"])) == ["DATA fields 4"]


def test_transition_without_data_passes_where_the_limit_was_lowered(lab: Any) -> None:
    lab.start(pairs=["a", "1", "b", "1"])
    _limited(lab, 1)
    assert lab.apply(lab.item(lab.NOTE, unset=["a"]))[0].startswith("OK 2 ")


def _fields(begin: int, end: int) -> list[str]:
    return [part for number in range(begin, end) for part in (f"f{number}", "1")]


def test_the_limit_holds_to_the_field_however_it_is_come_to(lab: Any) -> None:
    """Fields are counted only where an instance may have too many: it is marked (flag ``w``) when it has more than 64."""
    lab.start(pairs=_fields(0, 60))
    for first in range(60, 252, 32):
        assert lab.apply(lab.item(lab.NOTE, pairs=_fields(first, first + 32)))[0].startswith("OK ")
        assert lab.hash("1")["@"].split(" ")[6:] == ["w"]
    assert lab.apply(lab.item(lab.NOTE, pairs=_fields(250, 257))) == ["DATA fields 257"]
    assert lab.apply(lab.item(lab.NOTE, pairs=_fields(250, 256)))[0].startswith("OK ")
    assert lab.apply(lab.item(lab.NOTE, increments=[["one_more", "1", "i"]])) == ["DATA fields 257"]
    assert lab.apply(lab.item(lab.NOTE, pairs=_fields(0, 64)))[0].startswith("OK ")


def test_as_many_fields_as_settings_allow(lab: Any) -> None:
    """Their names and texts go to one HSET behind the XADD, by way of Lua's stack: the settings' bound keeps them below it."""
    _limited(lab, 3000)
    lab.start(pairs=_fields(0, 3000))
    increments = [[f"f{number}", "1", "i"] for number in range(1500, 3000)]
    assert lab.apply(lab.item(lab.NOTE, pairs=_fields(0, 1500), increments=increments))[0].startswith("OK 2 ")
    assert lab.hash("1")["f2999"] == "2"
    assert lab.apply(lab.item(lab.NOTE, unset=[f"f{number}" for number in range(3000)]))[0].startswith("OK 3 ")
    assert set(lab.hash("1")) == {"@", "@r"}


def test_a_call_of_nothing_is_answered_with_nothing(lab: Any) -> None:
    assert lab.apply() == []


@pytest.mark.parametrize("count", [1, 2, 5, 10, 350, 450])
def test_calls_of_any_length_are_read_alike(lab: Any, count: int) -> None:
    """What few items have in common is not remembered; beyond 4,000 values the items travel as one array."""
    pairs = ["a", "1", "b", "2", "c", "3", "d", "4", "e", "5"]
    starts = [lab.item(lab.START, f"{number}", f"s{number}", pairs=pairs) for number in range(count)]
    moves = [lab.item(lab.PAY, f"{number}", f"p{number}", pairs=pairs) for number in range(count)]
    assert lab.apply(*starts) == [f"OK 1 1-{number + 1} - placed" for number in range(count)]
    assert lab.apply(*moves) == [f"OK 2 1-{count + number + 1} placed paid" for number in range(count)]
    texts = [(one.id, one.version, one.transition_id) for one in lab.entries()]
    assert texts == [(f"{number}", 1, f"s{number}") for number in range(count)] + [
        (f"{number}", 2, f"p{number}") for number in range(count)
    ]
    fields = lab.hash(f"{count - 1}")
    assert (fields["a"], fields["e"], len(fields)) == ("1", "5", 7)


def test_an_instance_becomes_wide_with_its_65th_field(lab: Any) -> None:
    lab.start("1", pairs=_fields(0, 63))
    for first, flags in ((63, []), (63, []), (64, ["w"]), (0, ["w"])):
        assert lab.apply(lab.item(lab.NOTE, pairs=_fields(first, first + 1)))[0].startswith("OK ")
        assert lab.hash("1")["@"].split(" ")[6:] == flags
    lab.start("2", pairs=_fields(0, 65))
    assert lab.hash("2")["@"].split(" ")[6:] == ["w"]
    lab.start("3", pairs=_fields(0, 64))
    assert lab.apply(lab.item(lab.NOTE, "3", increments=[["n", "1", "i"]], unset=["f0"]))[0].startswith("OK ")
    assert lab.hash("3")["@"].split(" ")[6:] == []
    assert lab.apply(lab.item(lab.NOTE, "3", increments=[["m", "1", "i"]]))[0].startswith("OK ")
    assert lab.hash("3")["@"].split(" ")[6:] == ["w"]


def test_what_the_log_refuses_writes_nothing(real_lab: Any) -> None:
    """A stranger's record has an id above the epoch's next one, so that XADD fails, in a script that is not rolled back: it is
    the first write, and neither data nor deadline nor claim changes."""
    start = items.MoveSpec("order", "@start", {"": "placed"}, 1, {"placed": 1000})
    timed = items.MoveSpec("order", "note", {"placed": "placed"}, 1, {"placed": 1000})
    real_lab.start("1")
    real_lab.client.hset(real_lab.key("1"), "@", real_lab.hash("1")["@"] + " c")
    real_lab.client.hset(real_lab.key("1"), "@c", "1-1 1 n worker")
    real_lab.client.xadd(real_lab.store.keyspace.log(0), {"e": "x"}, id="7-0")
    before = real_lab.dump()
    for item in (real_lab.item(timed, pairs=["a", "1"]), real_lab.item(start, "2")):
        assert not real_lab.apply(item)[0].startswith("OK")
    assert real_lab.dump() == before


# --- order, several items, several partitions -----------------------------------------------------------------------------


def test_items_of_one_instance_are_applied_in_order(lab: Any) -> None:
    """Start, two moves and a duplicate of the first, all in one call; each sees what the one before it wrote."""
    first = lab.item(lab.NOTE, "1", "once", expected=1)
    replies = lab.apply(
        lab.item(lab.START), first, lab.item(lab.PAY), lab.item(lab.NOTE, "1", "once"), lab.item(lab.PAY)
    )
    assert replies == ["OK 1 1-1 - placed", "OK 2 1-2 placed placed", "OK 3 1-3 placed paid", "DUP 2 -", "STATE paid 3"]


def test_refused_item_does_not_touch_the_others(lab: Any) -> None:
    lab.start("1")
    lab.client.set(lab.key("bad"), "x")
    replies = lab.apply(
        lab.item(lab.NOTE, "1", expected=9),
        lab.item(lab.NOTE, "bad"),
        lab.item(lab.NOTE, "cold"),
        lab.item(lab.NOTE, "1"),
    )
    assert [reply.split(" ")[0] for reply in replies] == ["VERSION", "TYPE", "MISS", "OK"]


def test_partitions_of_one_call_have_logs_and_numbers_of_their_own(lab: Any) -> None:
    replies = lab.apply(
        lab.item(lab.START, "1", partition=1),
        lab.item(lab.START, "2", partition=0),
        lab.item(lab.NOTE, "1", partition=1),
    )
    assert replies == ["OK 1 1-1 - placed", "OK 1 1-1 - placed", "OK 2 1-2 placed placed"]
    assert [one.id for one in lab.entries(1)] == ["1", "1"]
    assert [one.id for one in lab.entries(0)] == ["2"]


def test_partition_that_is_refused_leaves_the_other_alone(lab: Any) -> None:
    lab.set_meta(1, status="recovering")
    replies = lab.apply(lab.item(lab.START, "1", partition=1), lab.item(lab.START, "2", partition=0))
    assert replies[0] == "RECOVERING"
    assert replies[1].startswith("OK ")


def test_backlog_limit_counts_within_one_call(lab: Any) -> None:
    """Room for three: the fourth and fifth item of the same call find none; the other partition has room of its own."""
    lab.set_meta(limit="4")  # the mark is unflushed too
    batch = [lab.item(lab.START, str(number)) for number in range(5)]
    replies = lab.apply(*batch, lab.item(lab.START, "x", partition=1))
    assert [reply.split(" ")[0] for reply in replies] == ["OK", "OK", "OK", "FULL", "FULL", "OK"]


def test_flushed_entries_do_not_count_as_backlog(lab: Any) -> None:
    """Entries kept in the log behind their flush (the witness, a tail for backups) take no room."""
    lab.set_meta(limit="4")
    for number in range(3):
        lab.start(str(number))
    assert lab.apply(lab.item(lab.START, "x")) == ["FULL"]
    assert lab.store.flushed([(0, entry.EntryId(1, 2), entry.ZERO, 4)]) == ["OK"]
    replies = [lab.apply(lab.item(lab.START, f"y{number}"))[0].split(" ")[0] for number in range(4)]
    assert replies == ["OK", "OK", "OK", "FULL"]


def test_start_of_a_cold_partition_needs_a_look_at_sql(lab: Any) -> None:
    """``cold`` set: a start is answered MISS until it names a watermark, read from SQL, at or above what was dropped."""
    lab.set_meta(cold="1", evicted_to="1-5")
    assert lab.apply(lab.item(lab.START)) == ["MISS 1 1-5"]
    assert lab.apply(lab.item(lab.START, absent="1-4")) == ["MISS 1 1-5"]
    assert lab.apply(lab.item(lab.START, absent="1-5"))[0].startswith("OK 1 ")


def test_ids_are_compared_as_numbers(lab: Any) -> None:
    lab.set_meta(cold="1", evicted_to="9-10")
    assert lab.apply(lab.item(lab.START, absent="10-0"))[0].startswith("OK 1 ")
    lab.set_meta(evicted_to="10-9")
    assert lab.apply(lab.item(lab.START, "2", absent="10-10"))[0].startswith("OK 1 ")
    assert lab.apply(lab.item(lab.START, "3", absent="9-99")) == ["MISS 1 10-9"]


@pytest.mark.parametrize("id", ["}", "{}", "{x}", "a:b", "*", "[a-z]", "ü", "日本", "a b", '"quoted"', "\\", "%s"])
def test_odd_ids_are_instances_like_others(lab: Any, id: str) -> None:
    lab.start(id)
    lab.note(id)
    assert lab.hash(id)["@"].startswith("placed 2 ")
    assert [one.id for one in lab.entries()] == [id, id]
    assert [id_ for page in lab.store.instances() for _, id_ in page] == [id]


@pytest.mark.parametrize(
    "text", ['"\\u0000"', '"\\u001f"', '"\\n"', '"\u2028"', '"%d"', '"\\ud83d\\ude00"', '{"a":[1,{"b":null}]}', "1e400"]
)
def test_texts_of_values_pass_unread(lab: Any, text: str) -> None:
    """Lua never decodes a value: it stands in hash and log as it was sent."""
    lab.start(pairs=["v", text])
    assert lab.hash("1")["v"] == text
    assert lab.entries()[-1].patch == '{"v":' + text + "}"
