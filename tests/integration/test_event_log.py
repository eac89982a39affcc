"""A real event log: learn, register, import, flush, verify, lose Redis, recover; and imports that meet trouble.

The log is ``receipt.csv`` beside the repository; where it is not there, one of the same shape is made.
"""

from __future__ import annotations

import csv
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from statecache import StateCache, StateMachine
from statecache.core import errors, eventlog, learn
from statecache.core.eventlog import Row
from statecache.engine import importer, replay, verify
from statecache.engine.logfile import LogFile
from tests.support import servers

REAL = Path(__file__).parents[3] / "shared" / "data" / "receipt.csv"
COLUMNS = eventlog.Columns(
    "case:concept:name",
    "concept:name",
    "time:timestamp",
    "org:resource",
    eventlog.fields_of(["org:group", "case:channel"]),
)
CASES, EVENTS, ACTIVITIES = 1434, 8577, 27


@pytest.fixture(scope="session")
def receipt_log(tmp_path_factory: pytest.TempPathFactory) -> LogFile:
    if REAL.exists():
        return LogFile(REAL, COLUMNS)
    path = tmp_path_factory.mktemp("log") / "receipt.csv"
    _make_log(path)
    return LogFile(path, COLUMNS)


def _make_log(path: Path) -> None:
    """A log with as many cases, events and activities, up to 25 events in a case, in order of time within each."""
    chance = random.Random(1434)
    lengths = [chance.randint(1, 11) for _ in range(CASES)]
    lengths[0] = 25
    while (missing := EVENTS - sum(lengths)) != 0:
        place = chance.randrange(1, CASES)
        lengths[place] = min(24, max(1, lengths[place] + (1 if missing > 0 else -1)))
    names = [f"T{number:02d} Step: {number}, of the “receipt” phase" for number in range(ACTIVITIES)]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS.named())
        for case, length in enumerate(lengths):
            at = datetime(2011, 10, 11, tzinfo=UTC) + timedelta(hours=case)
            steps = [
                names[(case + step) % ACTIVITIES] if case < 100 else chance.choice(names[:9]) for step in range(length)
            ]
            for step in steps:
                at += timedelta(milliseconds=chance.randint(0, 10_000_000))
                writer.writerow(
                    [f"case-{case}", step, at.isoformat(), f"Resource{case % 40}", f"Group {case % 7}", "Internet"]
                )


@pytest.fixture
def cache(private_redis: servers.ValkeyServer, database_url: str) -> Iterator[StateCache]:
    with StateCache.connect(private_redis.url, database_url) as made:
        yield made


def learned(log: LogFile, name: str) -> type[StateMachine]:
    rows = (row for row in log.ordered(log.survey()) if isinstance(row, Row))
    return StateMachine.from_spec(learn.learn(((row.id, row.event) for row in rows), name).spec)


def import_log(
    cache: StateCache, log: LogFile, machine: type[StateMachine], *, refused: Path | None = None, **options: float
) -> replay.Counts:
    steps = replay.Replay(log, log.survey(), machine, replay.RefusedFile(refused), cache.settings.limits)
    return importer.Import(cache, steps, **options).run()


def test_the_receipt_log_goes_through_and_comes_back(
    cache: StateCache, private_redis: servers.ValkeyServer, database_url: str, receipt_log: LogFile
) -> None:
    machine = learned(receipt_log, "receipt")
    assert len(machine.spec.events) == ACTIVITIES
    counts = import_log(cache, receipt_log, machine)
    assert (counts.rows, counts.starts, counts.transitions, counts.refused) == (EVENTS, CASES, EVENTS, 0)
    _check_store(cache, database_url, receipt_log, machine, "hot")

    private_redis.kill()
    shutil.rmtree(private_redis.data)
    private_redis.start()
    with StateCache.connect(private_redis.url, database_url, auto_recover=False, call_timeout_seconds=0.2) as other:
        report = other.recover()
    assert report.kinds == {"wiped": 16}
    assert report.lost_at_least == 0
    _check_store(cache, database_url, receipt_log, machine, "durable")
    again = import_log(cache, receipt_log, machine)
    assert (again.starts, again.transitions, again.duplicates, again.starts_found) == (0, 0, EVENTS, CASES)
    _check_store(cache, database_url, receipt_log, machine, "hot")


def _check_store(cache: StateCache, database_url: str, log: LogFile, machine: type[StateMachine], source: str) -> None:
    """Exactly the rows of the file: in SQL, in the counts, and in where and history of every case."""
    rows: dict[str, list[Row]] = {}
    for row in log:
        assert isinstance(row, Row)
        rows.setdefault(row.id, []).append(row)
    assert _count(database_url, "statecache_transitions") == CASES + EVENTS
    assert _count(database_url, "statecache_checkpoints") == CASES
    assert _count(database_url, "statecache_transitions WHERE event = '@start'") == CASES
    events = learn.event_of(machine.spec)
    handle = cache.machine("receipt")
    assert handle.counts() == Counter(events[of_case[-1].event] for of_case in rows.values())
    for snapshot, (case, of_case) in zip(handle.get_many(rows), rows.items(), strict=True):
        assert not isinstance(snapshot, errors.StateCacheError)
        state, version = events[of_case[-1].event], len(of_case) + 1
        assert (snapshot.id, snapshot.state, snapshot.version, snapshot.source) == (case, state, version, source)
        assert snapshot.data == of_case[-1].data | snapshot.data
        _check_history(handle.history(case), of_case, events)
    assert verify.verify(cache) == verify.Findings(CASES, CASES + EVENTS, CASES if source == "hot" else 0, ())


def _check_history(history: Sequence[object], of_case: Sequence[Row], events: dict[str, str]) -> None:
    start, *moves = history
    told = [(one.event, one.to_state, one.occurred_at, one.actor, one.patch) for one in moves]  # type: ignore[attr-defined]
    assert told == [(events[row.event], events[row.event], row.at, row.actor, row.data) for row in of_case]
    assert (start.event, start.to_state, start.occurred_at) == ("@start", "new", of_case[0].at)  # type: ignore[attr-defined]


def _count(database_url: str, table: str) -> int:
    engine = sa.create_engine(database_url)
    try:
        with engine.connect() as connection:
            return int(connection.exec_driver_sql(f"SELECT count(*) FROM {table}").scalar() or 0)
    finally:
        engine.dispose()


# --- imports that meet something ---------------------------------------------------------------------------------------

PLAIN = eventlog.Columns("case", "event", "at")
STEPS = """
name: steps
states: {new: {initial: true}, a: {}, b: {}, c: {}, d: {final: true}}
events:
  a: {from: [new, b], to: a}
  b: {from: a, to: b}
  c: {from: b, to: c}
  d: {from: [b, c], to: d}
"""


@pytest.fixture
def machine(tmp_path: Path) -> type[StateMachine]:
    path = tmp_path / "steps.yaml"
    path.write_text(STEPS)
    return StateMachine.load(path)


@pytest.fixture
def shared_cache(redis_url: str, sqlite_url: str, namespace: str) -> Iterator[StateCache]:
    with StateCache.connect(redis_url, sqlite_url, namespace) as made:
        yield made


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., LogFile]:
    """Writes a log: ``write("a.csv", "1 a 01", "1 b 02")``, case, event and day."""

    def make(name: str, *rows: str) -> LogFile:
        path = tmp_path / name
        lines = [f"{case},{event},2024-01-{day}" for case, event, day in (row.split(" ") for row in rows)]
        path.write_text("\n".join(["case,event,at", *lines]) + "\n")
        return LogFile(path, PLAIN)

    return make


def events_of(cache: StateCache, id: str) -> str:
    return "".join(row.event for row in cache.machine("steps").history(id)[1:])


def figures(counts: replay.Counts) -> tuple[int, int, int, int]:
    return counts.starts, counts.transitions, counts.duplicates, counts.refused


def test_a_row_refused_once_is_refused_again_although_it_would_fit_by_now(
    shared_cache: StateCache, machine: type[StateMachine], write: Callable[..., LogFile], tmp_path: Path
) -> None:
    """After 'a b', 'b' does not fit; after 'a b (b) a' it would: the second run must not apply it behind the 'a'."""
    log = write("log.csv", "1 a 01", "1 b 02", "1 b 03", "1 a 04", "1 d 05")
    side_file = tmp_path / "refused.jsonl"
    assert figures(import_log(shared_cache, log, machine, refused=side_file)) == (1, 3, 0, 2)
    first = side_file.read_text()
    assert figures(import_log(shared_cache, log, machine, refused=side_file)) == (0, 0, 3, 2)
    assert side_file.read_text() == first
    assert events_of(shared_cache, "1") == "aba"


def test_equal_times_and_equal_rows_are_recognised_too(
    shared_cache: StateCache, machine: type[StateMachine], write: Callable[..., LogFile]
) -> None:
    log = write("log.csv", "1 a 01", "1 b 01", "1 b 01", "1 a 01", "1 b 01", "1 d 01")
    assert figures(import_log(shared_cache, log, machine)) == (1, 5, 0, 1)
    assert figures(import_log(shared_cache, log, machine)) == (0, 0, 5, 1)
    assert events_of(shared_cache, "1") == "ababd"


def test_a_longer_file_and_one_that_continues_add_what_is_new(
    shared_cache: StateCache, machine: type[StateMachine], write: Callable[..., LogFile]
) -> None:
    assert figures(import_log(shared_cache, write("january.csv", "1 a 01", "1 b 02"), machine)) == (1, 2, 0, 0)
    longer = write("longer.csv", "1 a 01", "1 b 02", "1 a 03", "2 a 01")
    assert figures(import_log(shared_cache, longer, machine)) == (1, 2, 2, 0)
    assert figures(import_log(shared_cache, write("more.csv", "1 b 03", "1 c 04", "2 b 02"), machine)) == (0, 3, 0, 0)
    late = write("late.csv", "1 a 02", "1 d 05")
    assert figures(import_log(shared_cache, late, machine)) == (0, 1, 0, 1)
    assert (events_of(shared_cache, "1"), events_of(shared_cache, "2")) == ("ababcd", "ab")


def test_a_case_whose_rows_all_fail_makes_no_instance(
    shared_cache: StateCache, machine: type[StateMachine], write: Callable[..., LogFile]
) -> None:
    assert figures(import_log(shared_cache, write("log.csv", "1 c 01", "1 d 02", "2 d 01", "2 a 02"), machine)) == (
        1,
        1,
        0,
        3,
    )
    with pytest.raises(errors.NotFoundError):
        shared_cache.machine("steps").get("1")
    assert events_of(shared_cache, "2") == "a"


def test_an_instance_of_somebody_else_is_left_alone(
    shared_cache: StateCache, machine: type[StateMachine], write: Callable[..., LogFile]
) -> None:
    steps = shared_cache.machine(machine)
    steps.start("1")
    counts = import_log(shared_cache, write("log.csv", "1 a 01", "2 a 01"), machine)
    assert figures(counts) == (1, 1, 0, 1)
    (reason,) = counts.reasons
    assert reason.startswith("steps:1 exists already, and was not started by an import")
    assert steps.get("1").version == 1


def test_an_instance_that_others_moved_on_is_continued_if_the_machine_allows(
    shared_cache: StateCache, machine: type[StateMachine], write: Callable[..., LogFile]
) -> None:
    import_log(shared_cache, write("log.csv", "1 a 01"), machine)
    shared_cache.machine("steps").transition("1", "b")
    assert figures(import_log(shared_cache, write("log.csv", "1 a 01", "1 c 02"), machine)) == (0, 1, 1, 0)
    assert events_of(shared_cache, "1") == "abc"


def test_a_full_backlog_holds_an_import_until_it_is_flushed(
    redis_url: str, sqlite_url: str, namespace: str, machine: type[StateMachine], write: Callable[..., LogFile]
) -> None:
    """The limit is far below what a chunk adds: most items are answered FULL, and go again in order as room comes."""
    log = write("log.csv", *(f"{case} {event} 0{day}" for day, event in enumerate("ab", 1) for case in range(400)))
    limits = {"backlog_limit_entries": 30, "flush_batch_entries": 16, "partition_count": 1}
    with StateCache.connect(redis_url, sqlite_url, namespace, flusher=True, **limits) as cache:
        assert figures(import_log(cache, log, machine)) == (400, 800, 0, 0)
        assert verify.verify(cache).findings == ()


def test_an_import_that_nobody_flushes_gives_up_and_says_how_to_go_on(
    redis_url: str, sqlite_url: str, namespace: str, machine: type[StateMachine], write: Callable[..., LogFile]
) -> None:
    log = write("log.csv", *(f"{case} a 01" for case in range(100)))
    with StateCache.connect(redis_url, sqlite_url, namespace, backlog_limit_entries=20, partition_count=1) as cache:
        with pytest.raises(errors.BackpressureError, match="run the same command again to go on"):
            import_log(cache, log, machine, patience_seconds=0.5)
        cache.start_flusher()
        assert import_log(cache, log, machine).rows == 100
        assert cache.machine("steps").counts() == {"a": 100}


def test_an_import_whose_redis_lost_its_tail_begins_anew_and_ends_whole(
    private_redis: servers.ValkeyServer, sqlite_url: str, machine: type[StateMachine], write: Callable[..., LogFile]
) -> None:
    """Everything of the first chunk is acknowledged and not flushed when Redis is wiped; nothing of it may be missing."""
    rows = [f"{case} {event} 0{day}" for day, event in enumerate("ab", 1) for case in range(replay.CHUNK_ROWS * 3 // 4)]
    log = write("log.csv", *rows)
    wiped: list[int] = []

    def wipe(done: int) -> None:
        if not wiped:
            wiped.append(done)
            with private_redis.client() as client:
                client.flushall()

    with StateCache.connect(private_redis.url, sqlite_url) as cache:
        steps = replay.Replay(log, log.survey(), machine, replay.RefusedFile(None), cache.settings.limits)
        counts = importer.Import(cache, steps).run(wipe)
        assert counts.started_over >= 1
        assert counts.rows == counts.transitions + counts.duplicates
        assert cache.machine("steps").counts() == {"b": replay.CHUNK_ROWS * 3 // 4}
        assert verify.verify(cache).findings == ()


def test_csv_text_becomes_numbers_where_the_machines_data_asks_for_them(
    shared_cache: StateCache, tmp_path: Path
) -> None:
    path = tmp_path / "orders.csv"
    path.write_text("case,event,at,amount\n1,pay,2024-01-01,12.5\n2,pay,2024-01-01,lots\n")
    columns = eventlog.Columns("case", "event", "at", None, eventlog.fields_of(["amount"]))
    order = StateMachine.load(Path(__file__).parents[2] / "config" / "machines" / "order.yaml")
    counts = import_log(shared_cache, LogFile(path, columns), order)
    assert figures(counts) == (1, 1, 0, 1)
    assert any("field 'amount': 'lots' is refused" in reason for reason in counts.reasons)
    assert shared_cache.machine("order").get("1").data == {"amount": 12.5}
