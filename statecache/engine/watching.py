"""Looks at both stores, for the gauges that must be the same whoever is scraped, and true when a process has died.

What may fail, and what is shown then (never an older value):

- SQL does not answer: ``store_reachable{store="sql"}`` is 0 and what only SQL knows is left out. Lag and backlog go on, as
  they matter most just then: from the watermarks that Redis was told. These only lag behind SQL's: too much is shown, not
  too little.
- Redis does not answer, or is not the one that was found true (``ready`` is 0): lag and backlog are left out. After a wipe
  nobody can tell what they would have been; the recovery's report does, as far as it can be known. One that refuses to be
  judged (a replica) is not ready, and what it says of itself is shown.
- Something hangs: a look has a thread of its own, and the scrape goes on without it after its timeout. While that thread
  hangs its store counts as unreachable, and no other is begun for a while: a hanging one holds a connection.

A scrape costs one round trip to Redis, an admission check, one more round trip, and half a dozen small queries. Several
scrapers share one look a second.

Rejected: gauges that the flusher sets (the last value stands for ever when it dies, and that is when it matters); asking
``status`` (it recovers a Redis that it finds untrue, which a look must not).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Generic, TypeVar

import msgspec

from statecache import metrics
from statecache.core import entry, errors
from statecache.durable import recoveries, watching
from statecache.durable.rows import PartitionRow, RecoveryRow, StoreRow
from statecache.engine import servers, status
from statecache.hot import scripts
from statecache.hot import watching as hot_watching

if TYPE_CHECKING:
    from statecache.engine.cache import StateCache

_log = logging.getLogger(__name__)
_SHARED_SECONDS = 1.0
_TIMEOUT_SECONDS = 2.0
_HANGING_SECONDS, _HANGING_MAX = 30.0, 3
Result = TypeVar("Result")
Reading = metrics.Reading


class InSql(msgspec.Struct, frozen=True):
    """What SQL knows."""

    store: StoreRow
    partitions: Sequence[PartitionRow]
    letters: int
    parked: int
    discarded: int
    instances: Sequence[tuple[str, str, int]]
    stuck: Mapping[tuple[str, str], int]
    running: RecoveryRow | None
    flushers: int


class InRedis(msgspec.Struct, frozen=True):
    """What Redis knows. ``unflushed`` holds the partitions that are admitted; ``ready`` tells that all are."""

    overview: hot_watching.Overview
    ready: bool
    unflushed: Mapping[int, hot_watching.Unflushed]


class StoreWatch:
    """Looks at one store. Called at each scrape, by any thread."""

    def __init__(
        self, cache: StateCache, timeout_seconds: float = _TIMEOUT_SECONDS, shared_seconds: float = _SHARED_SECONDS
    ) -> None:
        self._cache = cache
        self._shared_seconds = shared_seconds
        self._lock = threading.RLock()  # a signal's handler may ask while its thread does
        self._past = Recoveries()
        self._sql: _Asked[InSql] = _Asked("sql", timeout_seconds)
        self._redis: _Asked[InRedis] = _Asked("redis", timeout_seconds)
        self._stamp = scripts.NEVER
        """What SQL said last. A process that only looks is not admitted again after a recovery."""
        self._refused = ""
        self._sign: tuple[int, str, int] | None = None
        self._sign_since = 0.0
        self._seen: list[Reading] = []
        self._seen_at = float("-inf")

    def __call__(self) -> list[Reading]:
        with self._lock:
            if time.monotonic() - self._seen_at >= self._shared_seconds:
                self._seen = list(self._look())
                self._seen_at = time.monotonic()
            return self._seen

    def _look(self) -> Iterator[Reading]:
        sql = self._sql.ask(self._look_at_sql)
        redis = self._redis.ask(lambda: self._look_at_redis(sql))
        settings = self._cache.settings
        yield Reading("statecache_backlog_limit_entries", (), settings.backlog_limit_entries)
        yield Reading("statecache_lag_target_seconds", (), settings.lag_target_seconds)
        for store, found in (("redis", redis), ("sql", sql)):
            yield Reading("statecache_store_reachable", (store,), found is not None)
        if sql is not None:
            yield from _of_sql(sql)
            yield from self._of_running(sql.running)
            yield from self._past.readings(sql.discarded)
        if redis is not None:
            yield from _of_redis(redis)

    def _look_at_sql(self) -> InSql:
        durable = self._cache.durable
        store = durable.identity()
        letters, parked = watching.letters(durable)
        running = recoveries.recovery(durable, store.epoch, store.owner) if store.epoch else None
        if running is not None and running.finished_ms is not None:
            running = None
        self._past.go_on(lambda epoch: watching.recoveries_from(durable, epoch), store)
        return InSql(
            store,
            durable.partitions(),
            letters,
            parked,
            watching.discarded(durable),
            watching.instances(durable),
            self._cache.timeouts.stuck_counts(),
            running,
            sum(one.alive for one in status.flushers(self._cache)),
        )

    def _look_at_redis(self, sql: InSql | None) -> InRedis:
        hot = self._cache.hot
        found = hot_watching.overview(hot)
        if sql is not None:
            stamp = self._stamp = scripts.Stamp(sql.store.epoch, sql.store.owner)
        else:
            stamp = max(self._stamp, hot.stamp, key=lambda one: one.epoch)
        codes = self._admitted(stamp) if stamp.epoch else []
        known = (
            dict(enumerate(found.watermarks))
            if sql is None
            else {row.partition: row.watermark for row in sql.partitions}
        )
        cursors: dict[int, entry.EntryId] = {}
        for partition, code in enumerate(codes):
            cursor = known[partition]
            if code == "OK" and cursor is not None:
                cursors[partition] = cursor
        return InRedis(found, len(cursors) == len(known), hot_watching.unflushed(hot, cursors) if cursors else {})

    def _of_running(self, running: RecoveryRow | None) -> Iterator[Reading]:
        """How long the recovery has run, by its own clock up to its last sign of life; and how long ago that was, by ours from
        the moment on when it was seen. Only the first sign that is seen is as far off as the two clocks are apart."""
        age = silence = 0.0
        if running is not None:
            sign = running.epoch, running.owner, running.heartbeat_ms
            if sign != self._sign:
                is_first = self._sign is None or self._sign[:2] != sign[:2]
                ago = max(0.0, time.time() - running.heartbeat_ms / 1000) if is_first else 0.0
                self._sign, self._sign_since = sign, time.monotonic() - ago
            silence = time.monotonic() - self._sign_since
            age = max(0.0, running.heartbeat_ms - running.started_ms) / 1000 + silence
            if running.heartbeat_ms == recoveries.ABANDONED:
                silence, age = float("inf"), max(0.0, time.time() - running.started_ms / 1000)
        yield Reading("statecache_recovery_running_seconds", (), age)
        yield Reading("statecache_recovery_heartbeat_age_seconds", (), silence)

    def _admitted(self, stamp: scripts.Stamp) -> Sequence[str]:
        """What the partitions say to this stamp; nothing where the server refuses the question, which is logged once."""
        codes: Sequence[str] = []
        refused = ""
        try:
            codes = self._cache.hot.admit(stamp, load=False).codes
        except errors.StateCacheError as error:
            refused = str(error)
        if refused and not self._refused:
            _log.warning("metrics: redis is not ready: %s", refused, extra={"store": "redis"})
        self._refused = refused
        return codes


def _of_sql(found: InSql) -> Iterator[Reading]:
    yield Reading("statecache_epoch", (), found.store.epoch)
    yield Reading("statecache_flushers", (), found.flushers)
    yield Reading("statecache_dead_letters", (), found.letters)
    yield Reading("statecache_parked_instances", (), found.parked)
    for row in found.partitions:
        yield Reading("statecache_flushed_timestamp_seconds", (str(row.partition),), row.tail_seen_ms / 1000)
    for machine, state, count in found.instances:
        yield Reading("statecache_instances", (machine, state), count)
    for (machine, state), count in found.stuck.items():
        yield Reading("statecache_stuck_instances", (machine, state), count)


def _of_redis(found: InRedis) -> Iterator[Reading]:
    yield Reading("statecache_ready", (), found.ready)
    for partition, limit in enumerate(found.overview.limits):
        if limit is not None:
            yield Reading("statecache_backlog_brake_entries", (str(partition),), limit)
    for partition, unflushed in found.unflushed.items():
        oldest_ms = unflushed.oldest_ms
        lag = 0.0 if oldest_ms is None else max(0.0, (found.overview.now_ms - oldest_ms) / 1000)
        yield Reading("statecache_flush_lag_seconds", (str(partition),), lag)
        yield Reading("statecache_backlog_entries", (str(partition),), unflushed.entries)
    facts = found.overview.facts
    for setting, good in (
        ("maxmemory_policy", "maxmemory_policy" in facts and not servers.evicts(facts)),
        ("appendonly", facts.get("aof_enabled") == "1"),
        (
            "aof_writes",
            facts.get("aof_last_write_status", "ok") == facts.get("aof_last_bgrewrite_status", "ok") == "ok",
        ),
    ):
        yield Reading("statecache_server_setting_ok", (setting,), good)


# --- what recoveries found ---------------------------------------------------------------------------------------------------

_CLASSES = ("new", "intact", "tail_lost", "wiped", "sql_behind", "diverged")
"""From the best to the worst."""
_ABANDONED = "abandoned"


class Recoveries:
    """Adds up the recoveries of a store, each once, from their rows in SQL: so it counts those too that a process ran which
    nobody scrapes, such as ``statecache recover``. Begins again when SQL went back to an older copy. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begin()

    def _begin(self) -> None:
        self._last: tuple[int, str] | None = None
        self._classes = dict.fromkeys((*_CLASSES, _ABANDONED), 0)
        self._seconds = metrics.Spread(metrics.STORE["statecache_recovery_seconds"].bounds)
        self._lost = self._possible = 0

    def go_on(self, fetch: Callable[[int], Iterator[RecoveryRow]], store: StoreRow) -> None:
        """Add up what follows the last one. ``fetch`` yields the recoveries of an epoch and of later ones, oldest first."""
        last = self._last
        rows = list(fetch(last[0] if last else 0))
        is_new = last is None or last not in [(row.epoch, row.owner) for row in rows]
        if is_new and last is not None:  # SQL does not know it any more
            rows = list(fetch(0))
        with self._lock:
            if self._last != last:
                return  # a look that hung has come back, and another one was faster
            if is_new:
                self._begin()
            for row in rows:
                if (row.epoch, row.owner) == (store.epoch, store.owner) and row.finished_ms is None:
                    break  # it is under way
                if self._last is None or (row.epoch, row.owner) > self._last:
                    self._add(row)

    def _add(self, row: RecoveryRow) -> None:
        self._last = row.epoch, row.owner
        parts = msgspec.json.decode(row.report)["partitions"] if row.report else []
        self._lost += sum(part["lost_at_least"] for part in parts)
        self._possible += any(part["loss_possible"] for part in parts)
        if row.finished_ms is None:
            self._classes[_ABANDONED] += 1
            return
        found = [word.strip().lower().replace(" ", "_") for word in row.classes.split(",")]
        self._classes[max(found, key=lambda word: _CLASSES.index(word) if word in _CLASSES else -1)] += 1
        self._seconds.add(max(0.0, row.finished_ms - row.started_ms) / 1000)

    def readings(self, discarded: int) -> list[Reading]:
        """What was added up, and the ``discarded`` entries among the losses."""
        with self._lock:
            return [
                *[Reading("statecache_recoveries_total", (name,), count) for name, count in self._classes.items()],
                Reading("statecache_recovery_seconds", (), self._seconds.copy()),
                Reading("statecache_lost_transitions_total", ("recovery",), self._lost),
                Reading("statecache_lost_transitions_total", ("discarded",), discarded),
                Reading("statecache_possible_losses_total", (), self._possible),
            ]


# --- a look that may hang ----------------------------------------------------------------------------------------------------


class _Asked(Generic[Result]):
    """Runs looks at one store, one at a time, and waits for each no longer than the timeout."""

    def __init__(self, store: str, timeout_seconds: float) -> None:
        self._store = store
        self._timeout_seconds = timeout_seconds
        self._hanging: list[threading.Thread] = []
        self._asked_at = 0.0
        self._problem = ""

    def ask(self, look: Callable[[], Result]) -> Result | None:
        """What the look found, None if it failed or hangs."""
        self._hanging = [thread for thread in self._hanging if thread.is_alive()]
        if self._hanging and (
            len(self._hanging) >= _HANGING_MAX or time.monotonic() - self._asked_at < _HANGING_SECONDS
        ):
            return None
        answers: list[Result | errors.StateCacheError] = []
        thread = threading.Thread(
            target=self._run, args=(look, answers), name=f"statecache-watch-{self._store}", daemon=True
        )
        self._asked_at = time.monotonic()
        thread.start()
        thread.join(self._timeout_seconds)
        if thread.is_alive():
            self._hanging.append(thread)
            answers = [errors.UnavailableError(f"no answer within {self._timeout_seconds} s")]
        answer = answers[0]
        self._tell(str(answer) if isinstance(answer, errors.StateCacheError) else "")
        return None if isinstance(answer, errors.StateCacheError) else answer

    def _run(self, look: Callable[[], Result], answers: list[Result | errors.StateCacheError]) -> None:
        try:
            answers.append(look())
        except errors.StateCacheError as error:
            answers.append(error)
        except Exception as error:  # the edge of a thread
            _log.exception("metrics: looking at %s failed", self._store, extra={"store": self._store})
            answers.append(errors.StateCacheError(f"{type(error).__name__}: {error}"))

    def _tell(self, problem: str) -> None:
        """Log the change, not every scrape."""
        if problem and not self._problem:
            _log.warning("metrics: %s cannot be read: %s", self._store, problem, extra={"store": self._store})
        elif self._problem and not problem:
            _log.info("metrics: %s can be read again", self._store, extra={"store": self._store})
        self._problem = problem


# --- the endpoint ------------------------------------------------------------------------------------------------------------


def watch(cache: StateCache) -> metrics.Metrics:
    """Show the store's gauges in the registry of ``cache.metrics``, until the cache is closed; not in forked children.

    Raises ``ConfigurationError`` if that registry shows another store.
    """
    settings = cache.settings
    store = f"{settings.namespace} of {cache.durable.identity().deployment}"
    cache.on_close(cache.metrics.watch(store, StoreWatch(cache)))
    return cache.metrics


@contextmanager
def endpoint(cache: StateCache, port: int | None, address: str | None = None) -> Iterator[int | None]:
    """Serve ``/metrics`` on ``port`` (0: any free one) within the block; yields the port. None: what the settings say, and
    nothing if they say nothing.

    Raises ``ConfigurationError`` if the port is taken.
    """
    wanted = cache.settings.metrics_port if port is None else port
    if wanted is None:
        yield None
        return
    host = address or cache.settings.metrics_address
    with metrics.serve(watch(cache), wanted, host) as real:
        url = f"http://{f'[{host}]' if ':' in host else host}:{real}/metrics"
        _log.info("metrics at %s", url, extra={"url": url})
        yield real
