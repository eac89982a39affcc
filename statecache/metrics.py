"""What is counted and measured, by Prometheus' conventions.

Two kinds, because several processes work on one store:

- **A process' own**: counters and histograms of what this process did (``Metrics``). Prometheus adds processes up.
- **The store's**: gauges that are the same whoever is scraped (lag, backlog, dead letters ...). They are read from Redis and
  SQL when somebody scrapes (``engine/watching.py`` looks, ``StoreCollector`` exports), so they stay true when a process dies:
  there is no last value that nobody takes back. What cannot be read is left out, and ``statecache_store_reachable`` says why.

No label takes a value from outside: machines are registered, events declared, outcomes, sources and classes fixed words. An
event that a machine does not declare is counted as ``@undeclared``.

Cost: a single call pays one lock and three additions (measured: 1 us with its clock reads), a bulk call 0.1 us an item.
Its numbers are kept here and handed to ``prometheus_client`` when it collects. Its own ``Counter`` and ``Histogram`` are not
used: each has a lock that another thread may hold at a fork, so that the child would hang at its first count; and their
import would cost every short command 0.1 s.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import operator
import os
import threading
import weakref
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from statecache.core import entry, errors, model

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

COUNTER, HISTOGRAM, GAUGE = "counter", "histogram", "gauge"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Of ``Metrics.text``: Prometheus' text format, as every version reads it."""
UNDECLARED = "@undeclared"
"""The label of events that a machine does not declare."""
_FAST = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_SLOW = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_LONG = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
_COUNTS = (1.0, 10.0, 50.0, 100.0, 500.0, 1000.0, 2500.0, 5000.0, 10000.0, 50000.0, 100000.0)


class Family(NamedTuple):
    """One metric: its kind, what it means, its labels, and the upper bounds of a histogram's buckets."""

    kind: str
    help: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()


PROCESS: Mapping[str, Family] = {
    "statecache_transitions_total": Family(
        COUNTER,
        "Starts and transitions asked for, by how they ended: ok, duplicate, or the error.",
        ("machine", "event", "outcome"),
    ),
    "statecache_transition_seconds": Family(
        HISTOGRAM,
        "Time from a call to its acknowledgement, of calls that succeeded; bulk calls (call=many) as a whole.",
        ("call", "durability"),
        _FAST,
    ),
    "statecache_reads_total": Family(
        COUNTER, "Instances read, by where they were found: hot, durable, or missing.", ("machine", "source")
    ),
    "statecache_hydrations_total": Family(COUNTER, "Instances brought back from SQL into Redis."),
    "statecache_evictions_total": Family(COUNTER, "Flushed instances dropped from Redis."),
    "statecache_flush_steps_total": Family(
        COUNTER, "Steps of this process' flusher: moved, idle, stopped (a log has a hole) or failed.", ("result",)
    ),
    "statecache_flushed_transitions_total": Family(COUNTER, "Log entries that this process moved into SQL."),
    "statecache_flush_batch_size": Family(HISTOGRAM, "Log entries of one flush transaction.", (), _COUNTS),
    "statecache_flush_commit_seconds": Family(HISTOGRAM, "Time of one flush transaction, COMMIT included.", (), _SLOW),
    "statecache_jobs_total": Family(
        COUNTER,
        "Parts of background jobs that this worker ran: finished, continued, retried, failed, stopped.",
        ("job", "outcome"),
    ),
    "statecache_job_seconds": Family(HISTOGRAM, "Time of one part of a background job.", ("job",), _LONG),
}
"""What a process counts of its own doing."""

STORE: Mapping[str, Family] = {
    "statecache_store_reachable": Family(
        GAUGE, "Whether the store (redis or sql) answered this scrape; if not, what comes from it is left out.", ("store",)
    ),
    "statecache_ready": Family(GAUGE, "Whether Redis is admitted: transitions are accepted in every partition."),
    "statecache_flush_lag_seconds": Family(
        GAUGE,
        "Age of the oldest acknowledged transition not yet in SQL: what a loss of Redis could cost right now.",
        ("partition",),
    ),
    "statecache_backlog_entries": Family(GAUGE, "Acknowledged transitions not yet in SQL.", ("partition",)),
    "statecache_backlog_brake_entries": Family(
        GAUGE, "Backlog at which writers are slowed down now, set by the flusher from its speed.", ("partition",)
    ),
    "statecache_backlog_limit_entries": Family(GAUGE, "Backlog of a partition at which writers are refused, SQL being away."),
    "statecache_lag_target_seconds": Family(GAUGE, "Wanted upper bound of the flush lag while SQL is healthy."),
    "statecache_flushed_timestamp_seconds": Family(
        GAUGE,
        "When a flush that moved the partition's watermark, or a recovery, last looked at its log (Unix time; 0: never).",
        ("partition",),
    ),
    "statecache_flushers": Family(GAUGE, "Flushers whose heartbeat in SQL is fresh, wherever they run."),
    "statecache_epoch": Family(GAUGE, "Incarnation of the hot data set: one more at every recovery."),
    "statecache_instances": Family(GAUGE, "Instances by state, as of the watermark.", ("machine", "state")),
    "statecache_dead_letters": Family(GAUGE, "Log entries that SQL refused or that wait behind one (counted to 100000)."),
    "statecache_parked_instances": Family(GAUGE, "Instances with open dead letters (counted to 100000 letters)."),
    "statecache_stuck_instances": Family(
        GAUGE, "Instances that have stayed in a state longer than its timeout, as of the watermark.", ("machine", "state")
    ),
    "statecache_recoveries_total": Family(
        COUNTER, "Recoveries of the store by the worst class of their partitions.", ("class",)
    ),
    "statecache_recovery_seconds": Family(HISTOGRAM, "Time from a recovery's start to its report.", (), _LONG),
    "statecache_recovery_running_seconds": Family(
        GAUGE, "How long the recovery of the present epoch has been running without a report (0: none is)."
    ),
    "statecache_recovery_heartbeat_age_seconds": Family(
        GAUGE, "Time since the running recovery's last sign of life (0: none is running; +Inf: it failed and said so)."
    ),
    "statecache_lost_transitions_total": Family(
        COUNTER,
        "Acknowledged transitions known to be lost: at least so many by recoveries, and those that were discarded.",
        ("cause",),
    ),
    "statecache_possible_losses_total": Family(
        COUNTER, "Recoveries after which more may be lost than was counted: Redis was not the one it was."
    ),
    "statecache_server_setting_ok": Family(
        GAUGE, "Whether a setting of the Redis server is as the promises need it.", ("setting",)
    ),
}  # fmt: skip
"""What is read from the two stores at a scrape."""

FAMILIES: Mapping[str, Family] = {**PROCESS, **STORE}


class Spread:
    """A histogram's numbers: observations by bucket (not cumulated, one more than there are bounds), and their sum."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.clear()

    def clear(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def copy(self) -> Spread:
        copied = Spread(self.bounds)
        copied.counts, copied.total = list(self.counts), self.total
        return copied

    def cumulated(self) -> list[tuple[str, float]]:
        """The buckets as Prometheus has them: (upper bound, observations up to it)."""
        found, count = [], 0
        for bound, here in zip((*self.bounds, float("inf")), self.counts, strict=True):
            count += here
            found.append(("+Inf" if bound == float("inf") else str(bound), float(count)))
        return found


class Reading(NamedTuple):
    """One value of a store's metric, as a look at the store found it."""

    name: str
    labels: tuple[str, ...]
    value: float | Spread


Labels = tuple[str, ...]
Look = Callable[[], Iterable[Reading]]


class Metrics:
    """The counters and histograms of one process, in one registry. Thread-safe; a forked child begins at zero.

    ``registry`` may be any ``CollectorRegistry``, also ``prometheus_client.REGISTRY``; without one it is one of its own,
    made when it is first asked for.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.lock = threading.RLock()
        """Held, for nanoseconds, by whoever changes or reads a number. A signal's handler may come in while its own thread
        holds it, and finds each number as it was, or as it will be."""
        self._cells: dict[str, dict[Labels, list[float]]] = {}
        self._spreads: dict[str, dict[Labels, Spread]] = {}
        self._registry = registry
        self._looks: list[tuple[str, Look]] = []
        self._is_watching = False
        self._telling: set[int] = set()
        """The threads that are in ``text``."""
        for name, family in PROCESS.items():
            if not family.labels:
                self.cell(name) if family.kind == COUNTER else self.spread(name)
        if registry is not None:
            registry.register(self)
        _all.add(self)

    # --- counting ----------------------------------------------------------------------------------------------------

    def add(self, name: str, value: float = 1, *labels: str) -> None:
        """Count: for what is not on the hot path. The name and the number of labels are those of ``PROCESS``."""
        cell = self.cell(name, *labels)
        with self.lock:
            cell[0] += value

    def observe(self, name: str, value: float, *labels: str) -> None:
        """Put a value into a histogram."""
        spread = self.spread(name, *labels)
        with self.lock:
            spread.add(value)

    def cell(self, name: str, *labels: str) -> list[float]:
        """The one number of a counter, in a list; to be changed under ``lock``."""
        assert len(labels) == len(PROCESS[name].labels), (name, labels)
        with self.lock:
            return self._cells.setdefault(name, {}).setdefault(labels, [0.0])

    def spread(self, name: str, *labels: str) -> Spread:
        """The numbers of a histogram; to be changed under ``lock``."""
        family = PROCESS[name]
        assert len(labels) == len(family.labels), (name, labels)
        with self.lock:
            return self._spreads.setdefault(name, {}).setdefault(labels, Spread(family.bounds))

    def after_fork(self) -> None:
        """Begin at zero in a forked child: what the parent counted is the parent's, and its lock may be held by nobody."""
        self.lock = threading.RLock()
        self._telling = set()
        for cells in self._cells.values():
            for cell in cells.values():
                cell[0] = 0.0
        for spreads in self._spreads.values():
            for spread in spreads.values():
                spread.clear()

    # --- exporting ---------------------------------------------------------------------------------------------------

    @property
    def registry(self) -> CollectorRegistry:
        """The registry that all of this is in."""
        if self._registry is None:
            from prometheus_client import CollectorRegistry

            registry = CollectorRegistry()
            registry.register(self)
            self._registry = registry
        return self._registry

    def describe(self) -> Iterator[Metric]:
        """Names and kinds without numbers, for the registry's check of duplicates."""
        yield from _families(PROCESS, {})

    def collect(self) -> Iterator[Metric]:
        """Everything counted so far, for the registry."""
        found: dict[str, list[Reading]] = collections.defaultdict(list)
        with self.lock:
            # Lists, because a handler's call may add a label meanwhile.
            for name, cells in self._cells.items():
                found[name] += [Reading(name, labels, cell[0]) for labels, cell in list(cells.items())]
            for name, spreads in self._spreads.items():
                found[name] += [Reading(name, labels, spread.copy()) for labels, spread in list(spreads.items())]
        yield from _families(PROCESS, found)

    def watch(self, store: str, look: Look) -> Callable[[], None]:
        """Export the gauges of a store too, by looking at it at each scrape; returns what ends that.

        If several look at one store, one of them is asked. Raises ``ConfigurationError`` for a second store: its gauges
        would have the same names.
        """
        other = next((name for name, _ in self._looks if name != store), None)
        if other is not None:
            raise errors.ConfigurationError(
                f"this registry shows the store {other} already, not also {store}: give each store its own "
                "(StateCache.connect(..., metrics=CollectorRegistry()))"
            )
        pair = store, look
        self._looks.append(pair)
        if not self._is_watching:
            self._is_watching = True
            self.registry.register(StoreCollector(self._look))

        def end() -> None:
            if pair in self._looks:
                self._looks.remove(pair)

        return end

    def _look(self) -> Iterable[Reading]:
        looks = self._looks[-1:]
        return looks[0][1]() if looks else ()

    def text(self) -> bytes:
        """All metrics as Prometheus' text format. Raises ``UnavailableError`` in a signal's handler whose thread is just here:
        the registry has a lock of its own."""
        from prometheus_client import generate_latest

        me = threading.get_ident()
        if me in self._telling:
            raise errors.UnavailableError(
                "this is a signal's handler, and its thread was reading the metrics when the signal came: set a flag in the "
                "handler, and read them outside"
            )
        try:
            self._telling.add(me)
            text = generate_latest(self.registry)
            self._telling.discard(me)
            return text
        except BaseException:
            self._telling.discard(me)  # not in a ``finally``, which a handler may interrupt at its first step
            raise


class StoreCollector:
    """Exports what a look at a store finds, for a registry."""

    def __init__(self, look: Look) -> None:
        self._look = look

    def describe(self) -> Iterator[Metric]:
        yield from _families(STORE, {})

    def collect(self) -> Iterator[Metric]:
        found: dict[str, list[Reading]] = collections.defaultdict(list)
        for reading in self._look():
            found[reading.name].append(reading)
        yield from _families(STORE, found)


def _families(families: Mapping[str, Family], found: Mapping[str, Sequence[Reading]]) -> Iterator[Metric]:
    from prometheus_client import core

    for name, family in families.items():
        if family.kind == HISTOGRAM:
            histogram = core.HistogramMetricFamily(name, family.help, labels=family.labels)
            for _, labels, value in found.get(name, ()):
                assert isinstance(value, Spread)
                histogram.add_metric(labels, value.cumulated(), value.total)
            yield histogram
            continue
        kind = core.CounterMetricFamily if family.kind == COUNTER else core.GaugeMetricFamily
        made = kind(name, family.help, labels=family.labels)
        for _, labels, value in found.get(name, ()):
            assert not isinstance(value, Spread)
            made.add_metric(labels, value)
        yield made


@contextlib.contextmanager
def serve(metrics: Metrics, port: int, address: str = "127.0.0.1") -> Iterator[int]:
    """Serve the registry over HTTP, from threads, within the block. Yields the port, which ``port=0`` leaves to the system.

    Raises ``ConfigurationError`` if the port cannot be had.
    """
    import prometheus_client

    try:
        server, thread = prometheus_client.start_http_server(port, address, metrics.registry)
    except (OSError, OverflowError) as error:
        raise errors.ConfigurationError(
            f"metrics cannot be served at {address}, port {port}: {error}; choose another metrics_port or metrics_address"
        ) from error
    owner = os.getpid()
    try:
        yield int(server.server_address[1])
    finally:
        if os.getpid() == owner:  # a forked child has no thread that would answer; it only lets go of the port
            server.shutdown()
            thread.join()
        server.server_close()


# --- one for the process ---------------------------------------------------------------------------------------------------

_all: weakref.WeakSet[Metrics] = weakref.WeakSet()
_by_registry: weakref.WeakKeyDictionary[Any, weakref.ref[Metrics]] = weakref.WeakKeyDictionary()
_making = threading.RLock()


@functools.cache
def default() -> Metrics:
    """The process' metrics, where no registry was given: all stores that it opens count there."""
    return Metrics()


def of(given: Metrics | CollectorRegistry | None) -> Metrics:
    """The metrics in a registry, made if there are none yet; the default ones for None."""
    if given is None:
        return default()
    if isinstance(given, Metrics):
        return given
    if not callable(getattr(given, "register", None)):
        raise errors.ConfigurationError(
            f"metrics = {type(given).__name__} is refused: give a prometheus_client.CollectorRegistry, or nothing"
        )
    with _making:
        reference = _by_registry.get(given)
        known = reference() if reference is not None else None  # the registry itself keeps it alive
        if known is None:
            known = Metrics(given)
            _by_registry[given] = weakref.ref(known)
        return known


def _after_fork_in_child() -> None:
    global _making
    _making = threading.RLock()
    for metrics in list(_all):
        metrics.after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)


# --- the calls of one machine ------------------------------------------------------------------------------------------------

_OUTCOMES: Mapping[type[BaseException], str] = {
    errors.ConfigurationError: "configuration",
    errors.DefinitionError: "definition",
    errors.InvalidDataError: "invalid_data",
    errors.NotFoundError: "not_found",
    errors.AlreadyExistsError: "already_exists",
    errors.InvalidTransitionError: "invalid_transition",
    errors.StaleVersionError: "stale_version",
    errors.FencedError: "fenced",
    errors.ParkedError: "parked",
    errors.BackpressureError: "backpressure",
    errors.RecoveringError: "recovering",
    errors.UnavailableError: "unavailable",
    errors.DurabilityTimeout: "durability_timeout",
    errors.IntegrityError: "integrity",
}
OUTCOMES = ("ok", "duplicate", *_OUTCOMES.values(), "error")
"""Every value of the label ``outcome``."""


def outcome_of(error: BaseException) -> str:
    """The word for an error: that of the public class that it is."""
    return next((_OUTCOMES[kind] for kind in type(error).__mro__ if kind in _OUTCOMES), "error")


_EVENT_AND_DUPLICATE = operator.attrgetter("event", "duplicate")


class MachineMeter:
    """Counts the calls of one machine. Its cells are looked up once, so that a call pays for the addition only."""

    def __init__(self, metrics: Metrics, machine: str, events: Sequence[str], default_durability: str) -> None:
        self.metrics = metrics
        self.machine = machine
        self._declared = frozenset((entry.EVENT_START, *events))
        self._cells = {(event, "ok"): self._cell(event, "ok") for event in sorted(self._declared)}
        levels: dict[str | None, str] = {None: default_durability, **{level: level for level in model.Durability}}
        self._one, self._many = (
            {key: metrics.spread("statecache_transition_seconds", call, str(level)) for key, level in levels.items()}
            for call in ("one", "many")
        )
        self._reads = {
            source: metrics.cell("statecache_reads_total", machine, source) for source in ("hot", "durable", "missing")
        }

    def _cell(self, event: str, outcome: str) -> list[float]:
        return self.metrics.cell("statecache_transitions_total", self.machine, event, outcome)

    def _known(self, event: object, outcome: str) -> list[float]:
        """The cell of an event, which may be anything that a caller gave."""
        label = event if isinstance(event, str) and event in self._declared else UNDECLARED
        cell = self._cells.get((label, outcome))
        if cell is None:
            cell = self._cells[label, outcome] = self._cell(label, outcome)
        return cell

    def done(self, receipt: model.Receipt, durability: str | None, seconds: float) -> None:
        """Count one call that succeeded. ``durability`` is what the caller asked for (None: the default)."""
        event = receipt.event
        cell = self._cells.get((event, "duplicate" if receipt.duplicate else "ok"))
        if cell is None:
            cell = self._known(event, "duplicate" if receipt.duplicate else "ok")
        spread = self._one[durability]
        with self.metrics.lock:
            cell[0] += 1
            spread.counts[bisect_left(spread.bounds, seconds)] += 1
            spread.total += seconds

    def refused(self, event: object, error: BaseException) -> None:
        """Count one call that ended with an error."""
        cell = self._known(event, outcome_of(error))
        with self.metrics.lock:
            cell[0] += 1

    def many(
        self, results: Sequence[Any], event_of: Callable[[int], object], durability: str | None, seconds: float
    ) -> None:
        """Count the items of a bulk call, and its time. ``event_of`` tells the event of an item by its place."""
        receipts = [result for result in results if type(result) is model.Receipt]
        counted = collections.Counter(map(_EVENT_AND_DUPLICATE, receipts))
        cells = [
            (self._known(event, "duplicate" if duplicate else "ok"), count)
            for (event, duplicate), count in counted.items()
        ]
        if len(receipts) < len(results):
            cells += [
                (self._known(event_of(index), outcome_of(result)), 1)
                for index, result in enumerate(results)
                if type(result) is not model.Receipt
            ]
        with self.metrics.lock:
            for cell, count in cells:
                cell[0] += count
            self._many[durability].add(seconds)

    def read(self, source: str, count: int = 1) -> None:
        """Count instances read from ``hot`` or ``durable``, or found ``missing``."""
        cell = self._reads[source]
        with self.metrics.lock:
            cell[0] += count

    def read_many(self, results: Sequence[Any]) -> None:
        """Count the reads of a bulk call."""
        for source, count in collections.Counter(map(_source_of, results)).items():
            if source:
                self.read(source, count)


def _source_of(result: Any) -> str:
    if type(result) is model.Snapshot:
        return result.source
    return "missing" if isinstance(result, errors.NotFoundError) else ""
