"""History of what ended long ago leaves the database: archived before it is deleted, whatever dies in between."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import msgspec
import pytest
import sqlalchemy as sa

from statecache.core import errors, failpoints
from statecache.durable import schema
from statecache.engine import archive, retention
from tests.acceptance import command
from tests.support import refusing, worlds

NOW = timedelta(0)
DELIVERED = ("pay", "note", "ship", "deliver")


@pytest.fixture
def world(redis_url: str, database_url: str, namespace: str) -> Iterator[worlds.World]:
    with worlds.World(redis_url, database_url, namespace) as made:
        yield made
        made.verify()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "archive"


def _fill(world: worlds.World, count: int = 12) -> list[str]:
    """Orders that ended, with a history of five each; their ids."""
    ids = [f"o{number}" for number in range(count)]
    for number, id in enumerate(ids):
        world.start(id, DELIVERED, amount=number)
    world.flush()
    return ids


def _archived(folder: Path) -> dict[str, archive.Archived]:
    return {one.id: one for path in folder.glob("*.jsonl.gz") for one in archive.read(path)}


def test_archived_history_and_what_stays(world: worlds.World, folder: Path) -> None:
    ids = _fill(world)
    world.evict(ids[0])
    before = {id: (world.orders.get(id), world.orders.history(id)) for id in ids}
    counts = world.orders.counts()
    steps = list(retention.run(world.cache, NOW, folder))
    assert [(step.instances, step.transitions) for step in steps] == [(12, 48)]
    found = _archived(folder)
    for id in ids:
        snapshot, rows = before[id]
        assert found[id].transitions == rows
        assert (found[id].state, found[id].version, found[id].data) == ("delivered", 5, snapshot.data)
        kept = world.orders.history(id)
        assert [(row.version, row.event, row.covers_from) for row in kept] == [
            (4, "@archived", 1),
            (5, "deliver", None),
        ]
        assert kept[0].reason is not None
        assert kept[0].reason.endswith(f"archived in {Path(steps[0].file or '').name}")
        assert kept[1] == rows[-1]
        assert world.orders.at(id, version=5) == snapshot, "the time of its start too"
        assert world.orders.at(id, when=rows[-1].at).created_at == rows[0].at
        now = world.orders.get(id)
        assert (now.state, now.version, now.data) == (snapshot.state, snapshot.version, snapshot.data)
    assert world.orders.counts() == counts
    assert list(retention.run(world.cache, NOW, folder)) == []


def test_what_ended_while_nobody_knew_its_definition(world: worlds.World, folder: Path) -> None:
    """A flusher that does not find the machine registered (SQL was restored to before) cannot tell that its states are final:
    the flag in SQL stays false. It is the definition that counts."""
    with world.durable.database.transaction() as connection:
        connection.execute(sa.delete(schema.machines))
    world.start("1", DELIVERED)
    world.more().flush_alone()
    kept = world.durable.checkpoint("order", "1")
    assert kept is not None
    assert not kept.final
    world.more().machine(worlds.Order)
    assert [step.instances for step in retention.run(world.cache, NOW, folder)] == [1]


def test_what_is_left_alone(world: worlds.World, folder: Path) -> None:
    """What has not ended, ended too recently, is short, or waits behind a dead letter."""
    world.start("running", ["pay", "note", "note"])
    world.start("short", ["cancel"])
    world.start("parked", ["pay", "note"])
    _fill(world, 1)
    refusing.refuse(world.durable)
    world.orders.transition("parked", "note", reason=refusing.REASON)
    world.orders.transition("parked", "cancel")
    world.flush()
    before = world.sql_dump()
    assert list(retention.run(world.cache, timedelta(days=1), folder)) == []
    assert world.sql_dump() == before
    assert [step.instances for step in retention.run(world.cache, NOW, folder)] == [1]
    assert set(_archived(folder)) == {"o0"}
    refusing.accept(world.durable)


def test_dry_run_changes_nothing(world: worlds.World, folder: Path) -> None:
    _fill(world)
    before = world.sql_dump()
    assert [(step.instances, step.transitions) for step in retention.run(world.cache, NOW, folder, dry_run=True)] == [
        (12, 48)
    ]
    assert world.sql_dump() == before
    assert not folder.exists()


def test_the_clock_of_this_host_decides_nothing(world: worlds.World, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a year ahead; what ended a moment ago has ended a moment ago."""
    _fill(world, 2)
    before = world.sql_dump()
    year_ahead = time.time() + 366 * 86400
    with monkeypatch.context() as patched:
        patched.setattr(time, "time", lambda: year_ahead)
        assert list(retention.run(world.cache, timedelta(days=365), None)) == []
    assert world.sql_dump() == before


@pytest.mark.parametrize(("hours", "where"), [(-2, "ahead of"), (2, "behind")])
def test_clocks_of_the_servers_that_differ(
    world: worlds.World, monkeypatch: pytest.MonkeyPatch, hours: int, where: str
) -> None:
    """Redis wrote the times, the database tells how old they are: one of the two is wrong, so nothing is deleted."""
    _fill(world, 2)
    before = world.sql_dump()
    redis_ms = world.cache.hot.time_ms() + hours * 3_600_000
    with monkeypatch.context() as patched:
        patched.setattr(world.cache.hot, "time_ms", lambda: redis_ms)
        with pytest.raises(errors.ConfigurationError, match=rf"clock is \d+ s {where} Redis'.*set the clocks right"):
            list(retention.run(world.cache, NOW, None))
    assert world.sql_dump() == before
    assert [step.instances for step in retention.run(world.cache, NOW, None)] == [2]


def test_deleted_for_good(world: worlds.World) -> None:
    _fill(world, 2)
    assert [step.file for step in retention.run(world.cache, NOW, None)] == [None]
    assert world.orders.history("o0")[0].reason == "versions 1 to 4 deleted by retention"


def test_goes_on_from_any_step(world: worlds.World, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "CHUNK_INSTANCES", 5)
    ids = _fill(world)
    first = next(iter(retention.run(world.cache, NOW, folder)))
    rest = list(retention.run(world.cache, NOW, folder, cursor=first.cursor))
    assert [step.instances for step in (first, *rest)] == [5, 5, 2]
    assert set(_archived(folder)) == set(ids)


def test_a_chunk_ends_where_its_bytes_are_enough(
    world: worlds.World, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long histories: a chunk takes instances until it has so many bytes, at least one, and goes on behind the last."""
    world.start("long", ["pay", *["note"] * 50, "ship", "deliver"])
    world.flush()
    ids = _fill(world, 4)
    sizes = [len(msgspec.json.encode(world.orders.history(id))) for id in ("long", ids[0])]
    monkeypatch.setattr(retention, "CHUNK_BYTES_MAX", sizes[0] - 1)
    monkeypatch.setattr(retention, "CHUNK_INSTANCES", 3)
    first = next(iter(retention.run(world.cache, NOW, folder)))
    assert (first.instances, first.cursor[3]) == (1, "long")
    monkeypatch.setattr(retention, "CHUNK_BYTES_MAX", sizes[1] * 3 // 2)
    rest = list(retention.run(world.cache, NOW, folder, cursor=first.cursor))
    assert [step.instances for step in rest] == [2, 2]
    assert set(_archived(folder)) == {"long", *ids}
    assert list(retention.run(world.cache, NOW, folder)) == []


def test_folder_that_is_none(world: worlds.World, folder: Path) -> None:
    _fill(world)
    folder.write_text("a file")
    before = world.sql_dump()
    with pytest.raises(OSError, match="archive"):
        list(retention.run(world.cache, NOW, folder))
    assert world.sql_dump() == before


def test_archive_that_does_not_read_back(world: worlds.World, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk gave back something else: nothing is deleted."""
    _fill(world)
    before = world.sql_dump()
    sound = archive.read
    monkeypatch.setattr(archive, "read", lambda path: list(sound(path))[:-1])
    with pytest.raises(errors.IntegrityError, match="nothing is deleted"):
        list(retention.run(world.cache, NOW, folder))
    assert world.sql_dump() == before
    assert list(folder.iterdir()) == []


def test_damaged_archive_is_noticed(world: worlds.World, folder: Path) -> None:
    _fill(world)
    step = next(iter(retention.run(world.cache, NOW, folder)))
    path = Path(step.file or "")
    whole = path.read_bytes()
    for damaged in (whole[:-20], whole[: len(whole) // 2], b"nonsense", whole[:-9] + b"x" * 9):
        path.write_bytes(damaged)
        with pytest.raises(errors.IntegrityError):
            list(archive.read(path))


def test_a_damaged_byte_of_an_archive_is_noticed(world: worlds.World, folder: Path) -> None:
    """Whichever it is: only some of the header's (its time, the system) say nothing about what is in it."""
    _fill(world)
    path = Path(next(iter(retention.run(world.cache, NOW, folder))).file or "")
    whole = path.read_bytes()
    told = list(archive.read(path))
    noticed = 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            assert list(archive.read(path)) == told
        except errors.IntegrityError:
            noticed += 1
    assert noticed > len(whole) * 0.9


def test_two_at_once(world: worlds.World, folder: Path) -> None:
    """Both read the same instances; the rows are held by one, and the other finds them gone and begins that chunk anew."""
    ids = _fill(world, 40)
    other = world.more()
    both = worlds.together(
        lambda: list(retention.run(world.cache, NOW, folder)), lambda: list(retention.run(other, NOW, folder))
    )
    assert sum(step.instances for steps in both for step in steps) == 40
    assert set(_archived(folder)) == set(ids)


def test_recovery_of_every_class_after_it(world: worlds.World, folder: Path) -> None:
    """The last transition stays as it was, so the watermark's witness does; what was wiped comes back from SQL."""
    ids = _fill(world)
    saved = world.redis_copy()
    backup = world.sql_copy()
    list(retention.run(world.cache, NOW, folder))
    world.disown()
    assert set(world.cache.recover().kinds) == {"intact"}
    world.verify()
    world.wipe()
    world.cache.recover()
    assert world.orders.get(ids[0]).data == {"amount": 0}
    world.verify()
    world.redis_back(saved)
    world.cache.recover()
    world.verify()
    world.sql_back(backup)
    world.cache.recover()
    world.flush_through()
    world.verify()
    list(retention.run(world.cache, NOW, folder))
    assert set(_archived(folder)) == set(ids)


def test_repeated_calls_after_it(world: worlds.World, folder: Path) -> None:
    """The last call may still be repeated; an older one is answered with an error, and never applied again (P4)."""
    world.start("a", ["pay", "ship"])
    receipt = world.orders.transition("a", "deliver", transition_id="last")
    world.flush()
    list(retention.run(world.cache, NOW, folder))
    again = world.orders.transition("a", "deliver", transition_id="last")
    assert (again.version, again.entry_id, again.duplicate) == (receipt.version, receipt.entry_id, True)
    with pytest.raises(errors.StateCacheError):
        world.orders.transition("a", "pay")
    with pytest.raises(errors.AlreadyExistsError):
        world.orders.start("a")


def test_receipts_that_are_waited_for_after_it(
    redis_url: str, database_and_client: tuple[str, str], namespace: str
) -> None:
    """What stayed is durable. What one row stands for is not called lost: that nobody can tell is said; and what another
    transition took the place of is lost as ever."""
    database_url, client = database_and_client
    with worlds.World(redis_url, database_url, namespace, client=client) as world:
        receipts = world.start("a", DELIVERED)
        world.flush()
        list(retention.run(getattr(world.cache, "sync", world.cache), NOW, None))
        world.cache.wait_durable(receipts[3:])
        for receipt in receipts[:3]:
            with pytest.raises(
                errors.IntegrityError, match=r"of versions 1 to 4 one row is all that SQL has \(@archived\)"
            ):
                world.cache.wait_durable(receipt)
        for receipt in receipts[3:]:
            with pytest.raises(errors.IntegrityError, match="and is lost"):
                world.cache.wait_durable(msgspec.structs.replace(receipt, transition_id="another"))


_PLACES = [f"{name}=die" for name in failpoints.NAMES if name.startswith("retention.")]


@pytest.mark.parametrize("place", _PLACES)
def test_kill_9_at_every_step(world: worlds.World, folder: Path, place: str) -> None:
    """The process dies between two steps. Whatever left the database is in an archive, and the next run ends the work."""
    ids = _fill(world)
    rows = {id: world.orders.history(id) for id in ids}
    arguments = [
        "retention", "--older-than", "0s", "--archive", folder, "--json", "--redis-url", world.redis_url,
        "--database-url", world.database_url, "--namespace", world.namespace,
    ]  # fmt: skip
    died = subprocess.run(
        command.words(*arguments), cwd=command.REPOSITORY, env=command.environment(STATECACHE_FAILPOINT=place),
        capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert died.returncode == -signal.SIGKILL, died.stderr
    found = _archived(folder)
    for id in ids:
        assert world.orders.history(id) == rows[id] or found[id].transitions == rows[id]
    world.verify()
    told = command.run(*arguments)
    assert told.code == 0, told.err
    assert told.document["instances"] == (0 if place.startswith("retention.deleted") else 12)
    found = _archived(folder)
    assert {id: found[id].transitions for id in ids} == rows
    assert len(list(folder.iterdir())) == 1, "nothing half-written is left, and the same content has the same name"
