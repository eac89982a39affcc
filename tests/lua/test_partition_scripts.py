"""The scripts of flusher, cold tier and recovery in detail; what the store sends with them; full memory."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import pytest
import redis

from statecache.core import claims, codec, entry, keys
from statecache.hot import claims as hot_claims
from statecache.hot import deadlines, scripts, wire
from statecache.hot import store as store_module
from statecache.hot.store import HotStore
from tests.support import servers, worlds

NEXT = scripts.Stamp(2, "owner-2")
ID = entry.EntryId


# --- what the wrapper sends -----------------------------------------------------------------------------------------------


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Every command that goes over a wire to an emulated server."""
    commands: list[bytes] = []
    original = wire.EmulatedWire.send

    def send(self: wire.EmulatedWire, packed: bytes) -> None:
        commands.append(packed)
        original(self, packed)

    monkeypatch.setattr(wire.EmulatedWire, "send", send)
    return commands


def _keys_of(packed: bytes) -> list[str]:
    """The keys of an EVAL or EVALSHA in RESP."""
    parts = re.findall(rb"\$\d+\r\n(.*?)\r\n(?=\$|\Z)", packed, re.DOTALL)
    count = int(parts[2])
    return [part.decode() for part in parts[3 : 3 + count]]


KEYS = {
    "admit": ["meta 0", "meta 1"],
    "apply": ["meta 1", "log 1", "meta 0", "log 0"],
    "claim": ["meta 1", "meta 0"],
    "drop": ["meta 0"],
    "due": ["meta 1", "meta 0"],
    "evict": ["meta 1", "meta 0"],
    "fence": ["meta 0"],
    "find": ["meta 0", "log 0"],
    "flushed": ["meta 1", "log 1", "meta 0", "log 0"],
    "hydrate": ["meta 1", "meta 0"],
    "park": ["meta 1", "meta 0"],
    "probe": ["meta 0", "log 0"],
    "read": ["meta 1", "log 1", "meta 0", "log 0"],
    "ready": ["meta 0", "log 0"],
    "remind": ["meta 1", "meta 0"],
}
"""The keys of a call that touches partition 1 first, then 0, where a script takes several partitions."""


@pytest.mark.parametrize("name", scripts.NAMES)
def test_keys_are_those_of_the_header(fake_lab: Any, sent: list[bytes], name: str) -> None:
    """All of a partition's keys that a script names are declared, in the header's order; the header says how many."""
    lab = fake_lab
    store = lab.store
    pairs = "pairs" in scripts.header(name)
    row = ("order:1", "paid 2 1-0 1 1 2", "", "1-0", {})
    sent.clear()
    match name:
        case "admit":
            store.admit(scripts.Stamp(1, "owner-1"), load=False)
        case "apply":
            lab.apply(lab.item(lab.START, partition=1), lab.item(lab.START, "2"), lab.item(lab.START, "3", partition=1))
        case "claim":
            rows = [claims.Row(partition, "order", "1") for partition in (1, 0, 1)]
            hot_claims.ask(store, claims.Ask(rows, "nonce1", "worker-1", 1000))
        case "due":
            deadlines.due(store, [1, 0], 10)
        case "remind":
            deadlines.remind(store, [(1, "order:1", None, 5), (0, "order:1", None, 5)])
        case "drop":
            store.drop(0, NEXT, "", ID(1, 1), ["order:1"])
        case "evict":
            store.evict([(1, "order:1", 1, "1-1", 0), (0, "order:1", 1, "1-1", 0), (1, "order:2", 1, "1-1", 0)])
        case "fence":
            store.fence(0, NEXT, "deployment", 1)
        case "find":
            store.find(0, "order", "1")
        case "flushed":
            store.flushed([(1, ID(1, 1), ID(1, 1), 9), (0, ID(1, 1), ID(1, 1), 9)])
        case "hydrate":
            store.hydrate([(1, *row), (0, *row), (1, *row)])
        case "park":
            store.park([(1, "order:1"), (0, "order:1")])
        case "probe":
            store.probe(0, NEXT, "", entry.ZERO)
        case "read":
            store.read([(1, entry.ZERO), (0, entry.ZERO)], entries=1, bytes_max=1)
        case "ready":
            store.ready(0, NEXT, identity="", watermark=ID(1, 1), limit=1, new=False, report="")
    wanted = [getattr(lab, kind)(int(number)) for kind, number in (one.split(" ") for one in KEYS[name])]
    assert _keys_of(sent[0]) == wanted
    assert pairs == (name in ("apply", "flushed", "read"))


@pytest.mark.parametrize("name", scripts.NAMES)
def test_header_tells_keys_arguments_reply_and_cost(name: str) -> None:
    header = scripts.header(name)
    assert "KEYS" in header
    assert "Reply" in header
    assert "Cost" in header
    used = {int(number) for number in re.findall(r"ARGV\[(\d+)\]", scripts.stamped(name, NEXT, False).text)}
    assert not used or "ARGV" in header


def test_every_lua_file_is_loaded_or_included() -> None:
    folder = Path(scripts.__file__).parent / "lua"
    assert sorted(path.stem for path in folder.glob("*.lua")) == sorted(scripts.NAMES)
    included = set(re.findall(r"@include (\w+)", "".join(path.read_text() for path in folder.rglob("*.lua"))))
    assert {path.stem for path in (folder / "include").glob("*.lua")} == included | {
        f"{name}_emulated" for name in scripts.EMULATED
    }


@pytest.mark.slow
def test_scripts_are_in_the_wheel(tmp_path: Path) -> None:
    """The wheel that is built from this source holds every Lua file, and its package reads them from a zip."""
    root = Path(scripts.__file__).parents[2]
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(root)]
    subprocess.run(command, cwd=root, capture_output=True, check=True, timeout=100)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.endswith(".lua")}
    assert packed == {str(path.relative_to(root)) for path in (root / "statecache/hot/lua").rglob("*.lua")}
    size = "sum(len(scripts.stamped(name, scripts.NEVER, False).text) for name in scripts.NAMES)"
    look = f"from statecache.hot import scripts; print({size}, scripts.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", look],
        cwd=tmp_path,
        env={"PYTHONPATH": str(wheel)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    size, place = found.split()
    assert place.startswith(str(wheel))
    assert int(size) == sum(len(scripts.stamped(name, scripts.NEVER, False).text) for name in scripts.NAMES)


@pytest.mark.parametrize("name", scripts.NAMES)
def test_real_servers_get_the_shebang_and_emulated_ones_not(name: str) -> None:
    """With ``#!lua`` a server refuses keys of other slots, and refuses before the first write when memory is full."""
    flags = "" if name in ("apply", "claim", "hydrate") else " flags=allow-oom"
    if name in ("admit", "due", "find", "probe", "read"):
        flags = " flags=no-writes"
    assert scripts.stamped(name, NEXT, False).text.startswith(f"#!lua{flags}\n")
    assert "#!" not in scripts.stamped(name, NEXT, True).text


@pytest.mark.parametrize("refused", ["memory", "writes"])
def test_what_only_reads_is_answered_by_a_server_that_takes_nothing(
    start_redis: Any, namespace: str, refused: str
) -> None:
    """Its memory is full, or too few replicas follow it (its disk is full: tests/integration/test_refused_writes.py)."""
    server = start_redis(appendonly="no")
    with server.client() as client:
        store = HotStore(keys.Keyspace(namespace, 1), url=server.url)
        _, fenced = store.fence(0, NEXT, "deployment", 1)
        assert fenced is not None
        identity = fenced.identity
        store.ready(0, NEXT, identity=identity, watermark=entry.ZERO, limit=9, new=True, report="")
        store.adopt(*msgspec.structs.astuple(NEXT))
        assert store.admit(NEXT).codes == ["OK"]
        setting, value, error = {
            "memory": ("maxmemory", 1, redis.OutOfMemoryError), "writes": ("min-replicas-to-write", 1, redis.ResponseError),
        }[refused]  # fmt: skip
        client.config_set(setting, value)
        with pytest.raises(error):
            client.set("a", "b")
        assert store.admit(NEXT).codes == ["OK"]
        assert [reply.code for reply in store.read([(0, entry.ZERO)], entries=1, bytes_max=1)] == ["OK"]
        assert store.find(0, "order", "1") == ("OK", [])
        assert deadlines.due(store, [0], 1)[0] == "OK"
        assert store.probe(0, NEXT, "*", entry.ZERO)[0] == "OK"
        assert store.fence(0, scripts.Stamp(3, "owner-3"), "deployment", 1, dry_run=True)[0] == "OK"
        store.close()


def test_a_dry_run_of_a_fence_cannot_write(real_lab: Any) -> None:
    """The server itself sees to it, whatever the script is told."""
    script = scripts.stamped("fence", NEXT, False, reads=True)
    with pytest.raises(redis.ResponseError, match="Write commands are not allowed"):
        real_lab.client.eval(script.text, 1, real_lab.meta(), "deployment", "1", "2", "")


def test_owner_that_could_end_the_stamp_is_refused() -> None:
    with pytest.raises(ValueError, match="owner token"):
        scripts.stamped("apply", scripts.Stamp(1, "' .. os.exit() --"), False)


# --- full memory ----------------------------------------------------------------------------------------------------------


def test_full_memory_refuses_before_the_first_write_and_trimming_relieves(small_server: servers.ValkeyServer) -> None:
    """``maxmemory`` is passed in the middle of a load: a script is refused whole (hash and log stay equal), reads go on,
    and a flush, which only trims, still works; then writes are accepted again."""
    client = redis.Redis.from_url(small_server.url)
    store = HotStore(keys.Keyspace("full", 2), url=small_server.url)
    lab = _lab(store, client)
    blob = ["blob", '"' + "x" * 10_000 + '"']
    number = 0
    while lab.apply(lab.item(lab.START, str(number), pairs=blob))[0].startswith("OK"):
        number += 1
    before = worlds.hot_dump(client, "full")
    batch = [lab.item(lab.START, f"more{index}") for index in range(3)]
    assert [outcome.code for outcome in store.apply(batch)] == ["OOM"] * 3
    assert worlds.hot_dump(client, "full") == before
    assert len([key for key in before if b":i:" in key]) == number == len(lab.entries())
    read = store.read([(0, ID(1, 0))], entries=1000, bytes_max=2**24)[0]
    assert len(read.lines) == number
    assert store.flushed([(0, read.last, read.last, 1000)]) == ["OK"]
    assert lab.apply(lab.item(lab.START, "again"))[0].startswith("OK")
    store.close()
    client.close()


def _lab(store: HotStore, client: redis.Redis) -> Any:
    from tests.lua import conftest

    return conftest.Lab(store, client)


# --- read, find -----------------------------------------------------------------------------------------------------------


def test_read_shares_its_count_between_partitions_in_order(lab: Any) -> None:
    for number in range(4):
        lab.start(str(number), partition=0)
        lab.start(str(number), partition=1)
    replies = lab.store.read([(1, ID(1, 0)), (0, ID(1, 0))], entries=6, bytes_max=2**20)
    assert [len(reply.lines) for reply in replies] == [4, 2]
    assert [reply.last for reply in replies] == [ID(1, 4), ID(1, 4)]


def test_read_gives_one_entry_whatever_its_size(lab: Any) -> None:
    lab.start("1", pairs=["v", '"' + "x" * 5000 + '"'])
    lab.start("2")
    replies = lab.store.read([(0, ID(1, 0)), (1, entry.ZERO)], entries=100, bytes_max=10)
    assert [len(reply.lines) for reply in replies] == [1, 0]
    assert replies[1].last == ID(1, 0)


@pytest.mark.parametrize("script", ["read", "find"])
def test_little_more_is_fetched_than_the_bytes_allow(real_lab: Any, script: str) -> None:
    """A page is copied whole before its bytes can be counted: with 500 large entries in it Redis stood still for a second."""
    lab = real_lab
    for number in range(4):
        lab.start(str(number), number % 2)
    blob = ["v", '"' + "x" * 20_000 + '"']
    for _ in range(100):
        lab.note("0", pairs=blob)
    with lab.client.monitor() as monitor:
        if script == "read":
            replies = lab.store.read([(1, ID(1, 0)), (0, ID(1, 0))], entries=1000, bytes_max=400_000)
            assert [len(reply.lines) for reply in replies] == [2, 22]
        else:
            with mock.patch.object(store_module, "_FIND_BYTES", 400_000):
                assert len(lab.store.find(0, "order", "0")[1]) == 101
        lab.client.echo("done")
        asked = []
        while "done" not in (command := monitor.next_command()["command"]):
            if command.startswith(f"XRANGE {lab.log()} "):
                asked.append(int(command.split(" ")[-1]))
    assert sum(asked) <= (40 if script == "read" else 180), asked


def test_read_goes_on_beyond_its_page(lab: Any) -> None:
    """The script reads in pages of up to 250; the count of the call may be more."""
    lab.set_meta(limit="2000")
    for start in range(0, 1100, 100):
        lab.apply(*[lab.item(lab.START, str(start + index)) for index in range(100)])
    reply = lab.store.read([(0, ID(1, 0))], entries=1050, bytes_max=2**20)[0]
    assert [int(line.split("\x1f")[0].split("-")[1]) for line in reply.lines] == list(range(1, 1051))


def test_read_gives_a_strangers_record_a_text_of_its_own(lab: Any) -> None:
    """More fields, another field, a line break: told as ``?`` and not as entries, in one line each."""
    lab.client.xadd(lab.log(), {"e": "x", "f": "y"}, id="1-1")
    lab.client.xadd(lab.log(), {"g": "x"}, id="1-2")
    lab.client.xadd(lab.log(), {"e": "a\nb"}, id="1-3")
    reply = lab.store.read([(0, ID(1, 0))], entries=10, bytes_max=1000)[0]
    assert reply.lines == ["1-1\x1f?", "1-2\x1f?", "1-3\x1f?"]


def test_find_reads_behind_the_watermark_only_and_of_one_instance(lab: Any) -> None:
    lab.start("1")
    lab.start("11")
    lab.note("1", times=3)
    lab.store.flushed([(0, ID(1, 3), entry.ZERO, 1000)])
    code, found = lab.store.find(0, "order", "1")
    assert (code, [one.version for one in found]) == ("OK", [3, 4])


@pytest.mark.parametrize(("entries_max", "bytes_max"), [(5, 2**20), (2000, 300)])
def test_find_reads_for_many_at_once(lab: Any, entries_max: int, bytes_max: int) -> None:
    """Of each instance only what one of its parts names: a version, a transition id; over the parts of a long log."""
    for id in ("1", "2", "11"):
        lab.start(id)
        lab.note(id, times=3)
    everything = lab.entries()
    mine = {one.version: one.transition_id for one in everything if one.id == "2"}
    wanted = {("order", "1"): ["2", "4"], ("order", "2"): [mine[3]], ("order", "3"): ["1"]}
    with mock.patch.multiple(store_module, _FIND_ENTRIES=entries_max, _FIND_BYTES=bytes_max):
        code, found = lab.store.find_many(0, wanted)
    assert (code, [(one.id, one.version) for one in found]) == ("OK", [("1", 2), ("1", 4), ("2", 3)])
    lab.client.xadd(lab.log(), {"e": "order\x1f1\x1f2\x1f"}, id="1-*")
    lab.client.xadd(lab.log(), {"g": "x"}, id="1-*")
    assert len(lab.store.find_many(0, wanted)[1]) == 3
    lab.store.flushed([(0, everything[-1].entry_id, entry.ZERO, 1000)])
    assert lab.store.find_many(0, wanted) == ("OK", [])
    assert len(lab.store.find_many(0, wanted, whole=True)[1]) == 3


# --- flushed --------------------------------------------------------------------------------------------------------------


def test_watermark_only_grows_and_the_witness_stays(lab: Any) -> None:
    lab.start()
    lab.note(times=4)
    assert lab.store.flushed([(0, ID(1, 4), ID(1, 4), 77)]) == ["OK"]
    assert [str(one.entry_id) for one in lab.entries()] == ["1-4", "1-5"]
    assert lab.store.flushed([(0, ID(1, 2), ID(1, 2), 78)]) == ["OK"]
    meta: Any = lab.client.hgetall(lab.meta())
    assert (meta[b"watermark"], meta[b"limit"], meta[b"kept"]) == (b"1-4", b"78", b"1")
    assert [str(one.entry_id) for one in lab.entries()] == ["1-4", "1-5"]


def test_nothing_above_the_watermark_given_is_trimmed(lab: Any) -> None:
    """P11. A flusher whose memory is of a time before SQL was restored asks to trim to an id above SQL's watermark;
    ``meta`` still has the higher watermark of that time. What SQL has not stays."""
    lab.start()
    lab.note(times=8)
    assert lab.store.flushed([(0, ID(1, 8), ID(1, 2), 1000)]) == ["OK"]
    assert lab.store.flushed([(0, ID(1, 4), ID(1, 8), 1000)]) == ["OK"]
    assert [one.entry_id.seq for one in lab.entries()] == [4, 5, 6, 7, 8, 9]


# --- evict, hydrate, park, drop ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "watermark", "code"),
    [
        (2, "1-2", "OK"),
        (1, "1-2", "KEPT moved"),
        (3, "1-2", "KEPT moved"),
        (2, "1-1", "KEPT unflushed"),
        (2, "2-0", "OK"),
    ],
)
def test_evict_wants_the_checkpoints_version_and_a_watermark(lab: Any, version: int, watermark: str, code: str) -> None:
    """H8: by SQL's own version and watermark, whatever ``meta.watermark`` says."""
    lab.start()
    lab.note()
    lab.set_meta(watermark="9-9")
    assert lab.store.evict([(0, "order:1", version, watermark, 0)]) == [code]
    assert bool(lab.client.exists(lab.key("1"))) == (code != "OK")
    meta: Any = lab.client.hgetall(lab.meta())
    assert (meta[b"cold"], meta[b"evicted_to"]) == ((b"1", b"1-2") if code == "OK" else (b"0", b"0-0"))


def test_dry_run_of_evict_tells_and_writes_nothing(lab: Any) -> None:
    lab.start("1")
    lab.start("2")
    lab.note("2")
    rows = [(0, f"order:{id}", 1, "1-2", 0) for id in "123"]
    before = lab.dump()
    told = lab.store.evict(rows, dry_run=True)
    assert told == ["OK", "KEPT moved", "GONE"]
    assert lab.dump() == before
    assert lab.store.evict(rows) == told


@pytest.mark.parametrize("script", ["evict", "park"])
def test_one_bad_key_fails_one_item(lab: Any, script: str) -> None:
    """A stranger's string, list and hash stand at instances' keys: the items beside them are done all the same."""
    for id in "15":
        lab.start(id)
    lab.client.set(lab.key("2"), "x")
    lab.client.rpush(lab.key("3"), "x")
    lab.client.hset(lab.key("4"), "@", "nonsense")
    before = {key: text for key, text in lab.dump().items() if key.decode()[-1] in "234"}
    if script == "evict":
        assert lab.store.evict([(0, f"order:{n}", 1, "1-2", 0) for n in range(1, 6)]) == ["OK", *["TYPE"] * 3, "OK"]
    else:
        codes = lab.store.park([(0, f"order:{n}") for n in range(1, 6)])
        assert codes == ["OK 1-1", *["TYPE"] * 3, "OK 1-2"]
    assert before.items() <= lab.dump().items()


def test_evicted_to_is_the_highest_of_several(lab: Any) -> None:
    lab.start("1")
    lab.start("2")
    rows = [(0, "order:2", 1, "1-2", 0), (0, "order:1", 1, "1-2", 0)]
    assert lab.store.evict(rows) == ["OK", "OK"]
    assert lab.client.hget(lab.meta(), "evicted_to") == b"1-2"


def test_parked_hash_is_evicted_only_to_unpark_it(lab: Any) -> None:
    """H8: a parked instance's entries are below the watermark and not in history; its hash stays until SQL has no letter."""
    lab.start()
    lab.note()
    assert lab.store.park([(0, "order:1"), (0, "order:2")]) == ["OK 1-2", "GONE"]
    assert lab.store.evict([(0, "order:1", 2, "1-2", 0)]) == ["KEPT parked"]
    assert lab.store.evict([(0, "order:1", 1, "1-1", 1)]) == ["KEPT unflushed"]
    assert lab.store.evict([(0, "order:1", 1, "1-2", 1)]) == ["OK"]


def test_parking_twice_is_parking_once(lab: Any) -> None:
    lab.start()
    lab.store.park([(0, "order:1")])
    before = lab.dump()
    assert lab.store.park([(0, "order:1")]) == ["OK 1-1"]
    assert lab.dump() == before


def test_parking_keeps_the_other_flags(lab: Any) -> None:
    lab.start(pairs=[part for number in range(65) for part in (f"f{number}", "1")])
    for _ in range(2):
        assert lab.store.park([(0, "order:1")]) == ["OK 1-1"]
        assert sorted(lab.hash("1")["@"].split(" ")[6]) == ["p", "w"]


def test_unparking_leaves_a_hash_that_is_not_parked(lab: Any) -> None:
    lab.start()
    assert lab.store.evict([(0, "order:1", 7, "1-1", 1)]) == ["KEPT moved"]


def test_hydrated_hash_is_the_one_that_was_evicted(lab: Any) -> None:
    lab.start(pairs=["a", "1", "b", '"x"'])
    lab.note()
    before = lab.hash("1")
    row = (0, "order:1", before["@"], before["@r"], "1-2", {"a": b"1", "b": b'"x"'})
    lab.store.evict([(0, "order:1", 2, "1-2", 0)])
    assert lab.store.hydrate([row]) == ["OK"]
    assert lab.hash("1") == before
    assert lab.store.hydrate([row]) == ["EXISTS"]


@pytest.mark.parametrize("count", [1, 3, 40, 500])
def test_hydration_of_many_is_that_of_each(lab: Any, count: int) -> None:
    """Fields of several shapes, in several partitions; some are hot already, which one look tells of none but of all."""
    rows: list[Any] = [
        (
            number % 2, f"order:{number}", f"placed {number + 1} 1-0 1 1 1", codec.token_of(str(number)), "1-0",
            {f"field_{place}": b"%d" % (number + place) for place in range(number % 9)},
        )
        for number in range(count)
    ]  # fmt: skip
    assert lab.store.hydrate(rows[: count // 2]) == ["OK"] * (count // 2) or count == 1
    assert lab.store.hydrate(rows) == ["EXISTS"] * (count // 2) + ["OK"] * (count - count // 2)
    for partition, _, own, ring, _, texts in rows:
        number = int(own.split(" ")[1]) - 1
        found = lab.hash(str(number), partition)
        wanted = {"@": own, "@r": ring} | {name: text.decode() for name, text in texts.items()}
        assert list(found.items()) == list(wanted.items())


def test_an_instance_that_stands_twice_is_hydrated_once(lab: Any) -> None:
    """Two looks may differ without the watermark having moved: letters were retried between them. No hash is mixed of both."""
    early = (0, "order:1", "placed 1 1-0 1 1 1 p", codec.token_of("a"), "1-0", {"a": b"1", "b": b"2"})
    late = (0, "order:1", "paid 2 1-1 1 1 2", codec.token_of("b"), "1-0", {"a": b"9"})
    other = (0, "order:2", "paid 2 1-1 1 1 2", codec.token_of("b"), "1-0", {"a": b"9"})
    assert lab.store.hydrate([early, other, late]) == ["OK", "OK", "EXISTS"]
    assert lab.hash("1") == {"@": early[2], "@r": early[3], "a": "1", "b": "2"}


def test_more_are_hydrated_than_lua_can_unpack(lab: Any) -> None:
    rows = [(0, f"order:{number}", "placed 1 1-0 1 1 1", "", "1-0", {"a": b"1"}) for number in range(9000)]
    (codes,) = lab.store.hydrate_stream([rows])
    assert codes == ["OK"] * 9000
    assert lab.store.hydrate(rows[7900:]) == ["EXISTS"] * 1100


def test_hydration_of_nothing(lab: Any) -> None:
    assert lab.store.hydrate([]) == []
    assert list(lab.store.hydrate_stream([[]])) == [[""]]


@pytest.mark.parametrize("count", [1997, 1998, 1999, 2000, 9000])
def test_hydration_of_an_instance_with_more_fields_than_are_allowed_now(lab: Any, count: int) -> None:
    """It was made under a larger setting: it comes back whole, and so do its neighbours."""
    texts = {f"f{number}": b"%d" % number for number in range(count)}
    rows = [(0, f"order:{id}", "placed 1 1-0 1 1 1 w", codec.token_of("a"), "1-0", texts) for id in "12"]
    assert lab.store.hydrate([(0, "order:3", *rows[0][2:5], {"a": b"1"}), *rows]) == ["OK"] * 3
    wanted = {"@": rows[0][2], "@r": rows[0][3]} | {name: text.decode() for name, text in texts.items()}
    assert lab.hash("1") == lab.hash("2") == wanted


def test_hydration_takes_as_many_fields_as_an_instance_may_have(lab: Any) -> None:
    texts = {f"field_{number}": b"%d" % number for number in range(256)}
    assert lab.store.hydrate([(0, "order:1", "placed 1 1-0 1 1 1", codec.token_of("a"), "1-0", texts)]) == ["OK"]
    assert len(lab.hash("1")) == 258


def test_drop_marks_cold_even_without_a_name(lab: Any) -> None:
    """H3: the start itself may have been in the lost tail: there is nothing to drop, and the partition is cold all the same."""
    lab.fence(0, NEXT)
    assert lab.store.drop(0, NEXT, lab.identity, ID(1, 7), []) == "OK 0"
    meta: Any = lab.client.hgetall(lab.meta())
    assert (meta[b"cold"], meta[b"evicted_to"]) == (b"1", b"1-7")
    assert lab.store.drop(0, NEXT, lab.identity, ID(1, 3), []) == "OK 0"
    assert lab.client.hget(lab.meta(), "evicted_to") == b"1-7"


# --- fence, ready ---------------------------------------------------------------------------------------------------------


def test_fence_leaves_what_ready_must_judge(lab: Any) -> None:
    """H15: recorded identity, watermark, ``cold`` and ``evicted_to`` stay as the last true Redis left them."""
    lab.set_meta(identity="recorded", watermark="1-7", cold="1", evicted_to="1-5")
    before: Any = lab.client.hgetall(lab.meta())
    code, fenced = lab.store.fence(0, NEXT, "deployment", 1)
    assert code == "OK"
    assert (fenced.existed, fenced.epoch, fenced.owner) == (True, 1, "owner-1")
    assert (fenced.recorded_identity, fenced.watermark, fenced.cold, fenced.evicted_to) == (
        "recorded",
        ID(1, 7),
        "1",
        ID(1, 5),
    )
    after: Any = lab.client.hgetall(lab.meta())
    changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
    assert changed == {b"epoch", b"owner", b"status"}


@pytest.mark.parametrize("stamp", [scripts.Stamp(1, "other"), scripts.Stamp(2, "owner-2"), scripts.Stamp(2, "other")])
def test_fence_never_goes_back_nor_twice(lab: Any, stamp: scripts.Stamp) -> None:
    """H4d, H14: refused unless the epoch in ``meta`` is lower."""
    lab.fence(0, NEXT)
    before = lab.dump()
    code, fenced = lab.store.fence(0, stamp, "deployment", 1)
    assert (code, fenced) == ("NEWER 2 owner-2", None)
    assert lab.dump() == before


@pytest.mark.parametrize(
    ("arguments", "what"),
    [(("deployment", 2), "protocol 1"), (("other", 1), "deployment deployment")],
)
def test_fence_refuses_a_partition_of_others(lab: Any, arguments: tuple[str, int], what: str) -> None:
    assert lab.store.fence(0, NEXT, *arguments)[0] == f"FOREIGN {what}"


def test_fence_refuses_another_partition_count(lab: Any) -> None:
    lab.set_meta(partitions="16")
    assert lab.store.fence(0, NEXT, "deployment", 1)[0] == "FOREIGN partitions 16"


def test_dry_fence_writes_nothing(lab: Any) -> None:
    before = lab.dump()
    code, fenced = lab.store.fence(0, NEXT, "deployment", 1, dry_run=True)
    assert (code, fenced.epoch) == ("OK", 1)
    assert lab.dump() == before


def test_ready_writes_the_mark_as_the_epochs_first_entry(lab: Any) -> None:
    """H5: ``e-0`` with the id before it and the owner. From then on the stream itself refuses an entry of epoch 1."""
    lab.start()
    lab.open(0, NEXT, new=False)
    last = lab.client.xrevrange(lab.log(), count=1)[0]
    mark = entry.parse(ID.parse(last[0].decode()), last[1][b"e"].decode())
    assert (mark.entry_id, mark.is_mark, mark.prev, mark.transition_id) == (ID(2, 0), True, ID(1, 1), "owner-2")
    with pytest.raises(redis.ResponseError, match="equal or smaller"):
        lab.client.xadd(lab.log(), {"e": "stale"}, id="1-*")


def test_ready_never_lowers_the_watermark_nor_warms_a_cold_partition(lab: Any) -> None:
    lab.start()
    lab.set_meta(watermark="1-1", cold="1", evicted_to="1-1")
    lab.open(0, NEXT, new=False)
    meta: Any = lab.client.hgetall(lab.meta())
    assert (meta[b"watermark"], meta[b"cold"], meta[b"evicted_to"], meta[b"status"]) == (b"1-1", b"1", b"1-1", b"ready")


@pytest.mark.parametrize("recoveries", [1, 2, 3, 4])
def test_backlog_is_counted_right_over_any_number_of_epochs(lab: Any, recoveries: int) -> None:
    """P11. Nothing is flushed while Redis is recovered again and again, and every epoch adds entries: the limit counts
    all of them, those of epochs before the last one too."""
    total = 1  # the first epoch's mark
    for epoch in range(2, recoveries + 2):
        for number in range(3):
            lab.start(f"{epoch}-{number}")
        total += 3
        stamp = scripts.Stamp(epoch, "owner-n")
        lab.fence(0, stamp)
        lab.store.ready(0, stamp, identity=lab.identity, watermark=entry.ZERO, limit=1000, new=False, report="")
        total += 1
        lab.fence(1, stamp)
        lab.store.ready(1, stamp, identity=lab.identity, watermark=entry.ZERO, limit=1000, new=False, report="")
        lab.store.adopt(epoch, "owner-n")
        lab.store.admit(stamp)
    lab.set_meta(limit=str(total + 2))
    replies = [lab.apply(lab.item(lab.START, f"z{number}"))[0].split(" ")[0] for number in range(3)]
    assert replies == ["OK", "OK", "FULL"]
