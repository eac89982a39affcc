"""The facade: one store, its two servers, and what can be asked of them."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import msgspec

from statecache import metrics as metering
from statecache.core import codec, errors, failpoints, items, keys, model, wording
from statecache.core.machine import StateMachine
from statecache.core.spec import readable
from statecache.durable.rows import StoreRow
from statecache.durable.store import DurableStore
from statecache.engine import commits, duties, recovery, servers, threads, watching
from statecache.engine import durability as durability_levels
from statecache.engine.admission import Admission
from statecache.engine.calls import as_receipts, idle_bound
from statecache.engine.driver import Driver
from statecache.engine.elsewhere import Elsewhere
from statecache.engine.embedded import EmbeddedServer
from statecache.engine.finals import Finals
from statecache.engine.flusher import Flusher
from statecache.engine.flushing import Flushing
from statecache.engine.handle import CONFIRMED, MachineHandle
from statecache.engine.leases import Leases, leave_quietly, someone_flushes
from statecache.engine.processes import OfOneProcess
from statecache.engine.timeouts import Timeouts
from statecache.hot import scripts
from statecache.hot.store import HotStore
from statecache.settings import Settings, failpoint_variable, redact

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

_log = logging.getLogger(__name__)
_CLOSE_SECONDS = 10.0
_AWAY_SECONDS = 1.0
"""So long ``close`` asks for a server that cannot be reached before it gives up to flush."""
_HELP_AFTER_SECONDS = 0.5
"""Where others flush, this long without a sign of it is left to them before ``flush`` does the work itself."""


class StateCache(OfOneProcess):
    """A store of state machines: hot in Redis, durable in SQL.

    Make one per process with ``connect`` or ``embedded``, share it between threads, close it at the end (it is a context
    manager). A process may fork after connecting: the child opens connections of its own; it does not inherit the
    flusher's thread.

    In a signal's handler set a flag, and call outside of it. A call made in the handler ends, and spoils nothing of the one
    that it interrupts; but where that one is at just what it needs (a flush), it waits to its timeout in vain.
    """

    def __init__(
        self,
        settings: Settings,
        hot: HotStore,
        durable: DurableStore,
        *,
        server: EmbeddedServer | None = None,
        metrics: metering.Metrics | CollectorRegistry | None = None,
        on_recovering: Callable[[], None] = lambda: None,
    ) -> None:
        self.settings = settings
        self.on_recovering = on_recovering
        """Called about once a second while this process recovers, by the thread that does."""
        self.metrics = metering.of(metrics)
        """What this process counts; ``metrics.registry`` is the Prometheus registry, ``metrics.text()`` its text."""
        self.hot = hot
        self.durable = durable
        self.ids = codec.TransitionIds()
        self._server = server
        self.finals = Finals(durable)
        self._thread: threading.Thread | None = None
        self._confirmations: dict[Any, items.Confirm | None] = {}
        self._registered: weakref.WeakKeyDictionary[type[StateMachine], scripts.Stamp] = weakref.WeakKeyDictionary()
        """Under which epoch each class was registered in SQL."""
        self._at_close: list[Callable[[], None]] = []
        self._make_parts()
        _open_caches.add(self)

    def _make_parts(self) -> None:
        """What holds locks or threads; made anew in a forked child, where the parent's locks may be held by nobody."""
        settings = self.settings
        self._stop = threads.Event()
        self.leases = Leases(
            self.durable, settings.partition_count, lease_seconds=settings.lease_seconds, redis=self.hot.endpoint
        )
        self.admission = Admission(
            self.hot,
            self.durable,
            self._recover_untrue,
            self._elsewhere(),
            auto_recover=settings.auto_recover,
            revive=self._revive,
        )
        self.driver = Driver(
            self.hot,
            self.durable,
            self.admission,
            self._revive,
            lambda count: self.metrics.add("statecache_hydrations_total", count),
            batch_items_max=settings.batch_items_max,
        )
        self._flushing = Flushing(self, here=self._flusher_about, revive=self._revive)
        self.commits = commits.GroupCommit(
            self.durable,
            settings.partition_count,
            self._flushing.push,
            self._flushing.is_someone_at_it,
            lambda partition: self._flusher_about() and self.leases.holds(partition),
            lambda: self.flusher.wake.set(),
        )
        self.flusher = self.make_flusher(range(settings.partition_count))
        self.timeouts = Timeouts(self)
        self.duties = duties.of(self)

    # --- opening and closing -----------------------------------------------------------------------------------------

    @classmethod
    def connect(
        cls,
        redis_url: str | None = None,
        database_url: str | None = None,
        namespace: str | None = None,
        *,
        flusher: bool | None = None,
        metrics: metering.Metrics | CollectorRegistry | None = None,
        **settings: Any,
    ) -> Self:
        """Connect to a Redis or Valkey server and a database; ``settings`` are those of ``statecache.settings``.

        An empty database gets its tables; an empty Redis is made ready. What is not given comes from the environment
        (``STATECACHE_REDIS_URL`` ...) or the config file; without any URL the embedded server of ``data_dir`` is used.
        With ``flusher`` a thread of this process flushes; otherwise flusher processes do (``statecache flusher``). What is not
        said is True where both servers are the embedded ones, as in ``embedded``, and False elsewhere.
        ``metrics`` is the Prometheus registry to count in; without one it is one of statecache's own, for all stores.

        Raises ``ConfigurationError`` when the servers are too old, do not belong together, or refuse the user, and
        ``UnavailableError`` when they cannot be reached.
        """
        wanted = Settings(redis_url=redis_url, database_url=database_url, namespace=namespace, **settings)
        if flusher is None:
            flusher = wanted.is_embedded
        return cls.open(wanted, flusher=flusher, metrics=metrics)

    @classmethod
    def embedded(
        cls,
        folder: str | os.PathLike[str],
        *,
        flusher: bool = True,
        metrics: metering.Metrics | CollectorRegistry | None = None,
        **settings: Any,
    ) -> Self:
        """Start the server of a data folder, or join it, and flush from a thread of this process into its SQLite file.

        The last process to close stops the server. For one machine: development, tests, small deployments.
        """
        if "data_dir" in settings:
            raise errors.ConfigurationError("data_dir is refused: the folder is the first argument of embedded()")
        given: object = folder
        if not isinstance(given, (str, os.PathLike)) or not isinstance(os.fspath(given), str) or not os.fspath(given):
            raise errors.ConfigurationError(
                f"folder {wording.shown(given)} is refused: it must be a path (str or Path)"
            )
        urls = {"redis_url": None, "database_url": None, **settings}
        wanted = Settings(data_dir=Path(folder), **urls)
        return cls.open(wanted.model_copy(update=urls), flusher=flusher, metrics=metrics)

    @classmethod
    def open(
        cls,
        settings: Settings,
        *,
        flusher: bool = False,
        create: bool = True,
        admit_seconds: float | None = None,
        metrics: metering.Metrics | CollectorRegistry | None = None,
        on_recovering: Callable[[], None] = lambda: None,
    ) -> Self:
        """Open what the settings name: see ``connect``. Without ``create`` there must be a store in the database already.

        ``admit_seconds`` is for who only looks: Redis is waited for so long, and SQL can be read where it is not true, or away.
        Without it one that is not true is waited for as long as for a call, and one that is away refused.
        """
        failpoints.arm(failpoint_variable())
        server = None
        if settings.redis_url is None or settings.database_url is None:
            server = EmbeddedServer(settings.data_dir)
            if settings.redis_url is not None and not server.folder.is_dir():
                raise errors.ConfigurationError(
                    "redis_url is set and database_url is not, so the database would be a SQLite file in the folder "
                    f"{server.folder}, which does not exist: set database_url (STATECACHE_DATABASE_URL), or make the folder"
                )
        durable = None
        try:
            if server is not None and settings.is_embedded:
                server.start()
            database_url = settings.database_url or (server.database_url if server else "")
            explicit = "partition_count" in settings.model_fields_set
            durable = DurableStore.connect(
                database_url,
                partition_count=settings.partition_count if explicit else None,
                namespace=settings.namespace,
                create=create,
                now_ms=int(time.time() * 1000),
            )
            row = durable.identity()
            if server is not None and settings.redis_url is None and settings.database_url is not None:
                _require_folder(server, row)
                server.start()
            redis_url = settings.redis_url or (server.redis_url if server else "")
            settings = settings.model_copy(
                update={"redis_url": redis_url, "database_url": database_url, "partition_count": row.partition_count}
            )
            always = settings.identity_check == "always"
            hot = HotStore(
                keys.Keyspace(settings.namespace, row.partition_count),
                url=redis_url,
                socket_timeout_seconds=settings.socket_timeout_seconds,
                identity_interval_seconds=-1.0 if always else settings.identity_check_interval_ms / 1000,
                instance_fields_max=settings.instance_fields_max,
            )
            cache = cls(settings, hot, durable, server=server, metrics=metrics, on_recovering=on_recovering)
            try:
                facts = hot.server_facts()
                servers.check(facts)
                cache._admit_at_connect(row.namespace, admit_seconds, servers.has_evicted(facts))
                if settings.durability in CONFIRMED:
                    cache.confirmation(settings.durability, cache.deadline(None))
            except errors.UnavailableError as error:
                if admit_seconds is None:
                    raise
                _log.warning("opened without Redis: %s", error)
        except BaseException:
            if durable is not None:
                durable.close()
            if server is not None:
                server.close()
            raise
        if flusher:
            cache.start_flusher()
        return cache

    def _admit_at_connect(self, noted_namespace: str, seconds: float | None = None, has_evicted: bool = False) -> None:
        try:
            self.admission.ensure("EPOCH", self.deadline(seconds))
            if has_evicted and self._recover_evicted():
                self.admission.ensure("EPOCH", self.deadline(seconds))
            if not noted_namespace:
                self.durable.adopt(self.settings.namespace)
        except errors.RecoveringError as error:
            _log.warning("connected, but not admitted: %s", error)

    def start_flusher(self) -> None:
        """Flush from a thread of this process until ``close``, and do what a flusher's process does beside (``duties``)."""
        if self._thread is not None:
            return
        self._thread = threading.Thread(
            target=self.flusher.run,
            args=(self._stop,),
            kwargs={"leases": self.leases},
            name="statecache-flusher",
            daemon=True,
        )
        self._thread.start()
        self.duties.start()

    def close(self) -> None:
        """Flush what is pending (if this process flushes), then close every connection. Safe to call twice."""
        thread, self._thread = self._thread, None
        self.duties.close()
        self._stop.set()
        self.flusher.wake.set()
        if thread is not None:
            threads.join(thread, _CLOSE_SECONDS)
            self._drain()
            leave_quietly(self.leases)
        self.commits.close()
        self.driver.closing.set()
        self._end_all()
        self.flusher.rest()
        self.hot.close()
        self.durable.close()
        self._registered.clear()  # who opens a machine from now on is told that nothing is open
        if self._server is not None:
            self._server.close()
        _open_caches.discard(self)

    def _drain(self) -> None:
        try:
            self._flushing.wait(self.deadline(_CLOSE_SECONDS), 0.0, time.monotonic() + _AWAY_SECONDS)
        except errors.StateCacheError as error:
            _log.warning("closed before everything was flushed: %s", error)

    def serve_metrics(self, port: int = 9464, address: str | None = None) -> int:
        """Serve ``/metrics`` until ``close``, from a thread: what this process counts, and the gauges of the store.

        Returns the port (``port=0``: any free one). On the loopback interface, unless ``address`` or the setting
        ``metrics_address`` says otherwise. A forked child serves nothing and begins to count at zero.

        Raises ``ConfigurationError`` if the port is taken, or the registry shows another store.
        """
        stack = contextlib.ExitStack()
        real = stack.enter_context(watching.endpoint(self, port, address))
        self.on_close(stack.close)
        assert real is not None
        return real

    def on_close(self, end: Callable[[], None]) -> None:
        """Have something ended when this is closed, before its connections are, and in every forked child."""
        self._at_close.append(end)

    def _end_all(self) -> None:
        while self._at_close:
            self._at_close.pop()()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def redis_url(self) -> str:
        """Where the hot store works."""
        return self.settings.redis_url or ""

    @property
    def database_url(self) -> str:
        """Where the durable store works."""
        return self.settings.database_url or ""

    @property
    def server(self) -> EmbeddedServer | None:
        """The embedded server, if this store has one."""
        return self._server

    def __repr__(self) -> str:
        return f"<StateCache {self.settings.namespace} at {redact(self.redis_url)} and {redact(self.database_url)}>"

    # --- machines ----------------------------------------------------------------------------------------------------

    def machine(self, machine: type[StateMachine] | str) -> MachineHandle:
        """The handle of a machine: of a class (or ``StateMachine.load(path)``), which is registered in SQL, or of a
        registered name, in its latest version. By name, data is checked against the stored JSON Schema, which converts nothing
        (see ``StateMachine``).

        Raises ``DefinitionError`` if another definition is registered under the same name and version,
        ``NotFoundError`` for a name that nobody registered, and ``ConfigurationError`` if the server cannot give the
        machine's durability.
        """
        if isinstance(machine, str):
            found = self.durable.machine(machine) if codec.NAME.fullmatch(machine) else None
            if found is None:
                known = sorted({row.name for row in self.durable.machines()})
                raise errors.NotFoundError(
                    f"no machine {wording.shown(machine)} is registered here; known: {', '.join(known) or 'none'}; register it "
                    "with cache.machine(ItsClass) or 'statecache machine register'"
                )
            spec = readable(found[2])
            if spec is None:
                raise errors.DefinitionError(
                    f"the registered definition of machine {machine!r}, version {found[0]}, cannot be read by this version of "
                    "statecache: upgrade it, or open the machine by its class"
                )
            machine = StateMachine.from_spec(spec)
        else:
            given: object = machine
            if not (isinstance(given, type) and issubclass(given, StateMachine) and hasattr(given, "definition")):
                raise errors.DefinitionError(
                    f"{wording.shown(machine)} is no machine: give a class that declares one, or the name of a registered one"
                )
            self._register(machine)
        self.finals.note(machine.definition)
        if (
            machine.definition.durability in CONFIRMED
        ):  # a server that cannot give it is refused now, not at the first call
            self.confirmation(model.Durability(machine.definition.durability), self.deadline(None))
        return MachineHandle(self, machine)

    def _register(self, machine: type[StateMachine]) -> None:
        """Once in each epoch: a class that was opened opens again while SQL is away, and for nothing."""
        stamp = self.hot.stamp
        if self._registered.get(machine) == stamp:
            return
        self.durable.register_machine(
            machine.definition.name,
            machine.definition.version,
            machine.fingerprint,
            machine.spec.model_dump_json(),
            int(time.time() * 1000),
        )
        self._registered[machine] = stamp

    def stuck(self, *, older_than: timedelta | None = None, limit: int = 100) -> list[model.Snapshot]:
        """Instances of any machine that are past their state's timeout and that no event moves on, those first that are
        longest: from SQL, as of the watermark. See ``MachineHandle.find(stuck=True)`` for one machine's."""
        until_ms = idle_bound(older_than, limit)
        late = self.timeouts.stuck(limit=limit, until_ms=until_ms)
        handles = {name: self.machine(name) for name in {one.row.machine for one in late}}
        return [handles[one.row.machine].calls.found([one.row])[0] for one in late]

    # --- durability --------------------------------------------------------------------------------------------------

    def deadline(self, timeout: float | None) -> float:
        """When a call that begins now must end (``time.monotonic``)."""
        if timeout is None:
            return time.monotonic() + self.settings.call_timeout_seconds
        seconds: object = timeout
        with contextlib.suppress(OverflowError):  # of an int that no float holds
            if isinstance(seconds, (int, float)) and not math.isnan(seconds):  # NaN would never come
                return time.monotonic() + seconds
        raise errors.InvalidDataError(f"timeout {wording.shown(timeout)} is refused: it must be a number of seconds")

    def level(self, wanted: str | None, declared: str | None) -> model.Durability:
        """The durability of a call: what it asks for, or what its machine declares, or that of the settings. Raises
        ``InvalidDataError`` for a word that is none."""
        if wanted is None:
            wanted = declared
        if wanted is None:
            return self.settings.durability
        try:
            level = model.Durability(wanted)
        except ValueError:
            raise errors.InvalidDataError(
                f"durability {wording.shown(wanted)} is refused: it is one of {', '.join(model.Durability)}"
            ) from None
        return level

    def confirmation(self, level: model.Durability, deadline: float) -> items.Confirm | None:
        """What to ask behind each script for ``fsync`` or ``replica``; the server is judged once per epoch.

        Raises ``ConfigurationError`` when the server cannot give the level.
        """
        key = self.hot.stamp, level
        known = self._confirmations  # another thread may put its own there meanwhile: this one's is looked at
        if key not in known:
            ask = functools.partial(
                durability_levels.confirmation, self.hot, level, self.settings.replicas, 1.0, deadline
            )
            known = {key: self.driver.patiently(ask, deadline)}
            self._confirmations = known
        confirm = known[key]
        if confirm is None:
            return None
        # The connection must outlive the wait, and the script before it.
        seconds = min(deadline - time.monotonic(), self.settings.socket_timeout_seconds * 0.8)
        return msgspec.structs.replace(confirm, timeout_ms=max(1, int(seconds * 1000)))

    def confirm(self, receipts: Sequence[model.Receipt], deadline: float) -> None:
        """Wait until the receipts are in SQL. Raises the first one's error."""
        for error in self._wait(receipts, deadline):
            if error is not None:
                raise error

    def confirm_many(self, results: list[Any], deadline: float) -> None:
        """Wait until the receipts among the results are in SQL; an error takes the place of its receipt."""
        places = [index for index, result in enumerate(results) if isinstance(result, model.Receipt)]
        for index, error in zip(places, self._wait([results[index] for index in places], deadline), strict=True):
            if error is not None:
                results[index] = error

    def _wait(self, receipts: Sequence[model.Receipt], deadline: float) -> list[errors.StateCacheError | None]:
        if not receipts:
            return []
        found = self.commits.wait(receipts, deadline)
        return [
            error and durability_levels.explained(self.durable, one, error)
            for one, error in zip(receipts, found, strict=True)
        ]

    def wait_durable(self, receipt: model.Receipt | Sequence[model.Receipt], timeout: float | None = None) -> None:
        """Return when the transition is in SQL: from then on it survives the loss of Redis, disk and all.

        Raises ``DurabilityTimeout`` (it stands, its durability is unknown: wait again), ``ParkedError`` with its ``receipt``
        (it stands in Redis and waits as a dead letter: SQL refused it, or an entry before it) or ``IntegrityError``: it was
        lost with Redis, and a recovery has reported it; or SQL has one row for its version and others (retention has archived
        them), so that nobody can tell any more.
        """
        self.confirm(as_receipts(receipt), self.deadline(timeout))

    def flush(self, timeout: float | None = 10.0) -> None:
        """Return when everything acknowledged before the call is in SQL. Does the work itself when no flusher does.

        Servers that cannot be reached are asked again until the timeout. Raises ``DurabilityTimeout``, ``RecoveringError``
        (Redis was recovered meanwhile: what was acknowledged may be lost, the report tells), ``IntegrityError`` (a hole in a
        log: recover) or ``UnavailableError``.
        """
        deadline = self.deadline(timeout)
        with self.durable.until(deadline):
            others = self._flusher_about() or self.driver.patiently(lambda: someone_flushes(self.durable), deadline)
            self._flushing.wait(deadline, _HELP_AFTER_SECONDS if others else 0.0)

    def flush_alone(self, timeout: float | None = 10.0) -> None:
        """As ``flush``, but do the work here and at once, whoever else flushes."""
        deadline = self.deadline(timeout)
        with self.durable.until(deadline):
            self._flushing.wait(deadline, 0.0)

    def _flusher_about(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def make_flusher(self, partitions: Sequence[int]) -> Flusher:
        """A flusher for some partitions, by this store's settings."""
        settings = self.settings
        return Flusher(
            self.hot,
            self.durable,
            self.finals,
            lambda code, deadline: self.admission.ensure(code, deadline),
            partitions=partitions,
            batch_entries=settings.flush_batch_entries or self.durable.forms.batch_entries,
            batch_bytes=settings.flush_batch_bytes,
            interval_seconds=settings.flush_interval_ms / 1000,
            lag_target_seconds=settings.lag_target_seconds,
            backlog_limit=settings.backlog_limit_entries,
            log_keep_seconds=settings.log_keep_seconds,
            revive=self._revive,
            on_hole=self._recover_hole,
            on_commit=self.commits.signal.give,
            metrics=self.metrics,
        )

    # --- recovery ----------------------------------------------------------------------------------------------------

    def recover(self, *, dry_run: bool = False, progress: Any = lambda text: None) -> recovery.Report:
        """Reconcile Redis with SQL: see ``engine/recovery.py``. It takes its time, also within a call that has a deadline.

        From then on SQL is asked about every instance that is not hot, starts included: who asks for this has a reason to
        doubt that Redis has all it should have. Where Redis is empty, and flushers live that noted another one, it waits until
        they fall silent (a lease at most), and raises ``ConfigurationError`` if they go on.
        """
        watch = self._elsewhere()

        def look() -> None:
            if dry_run:
                watch.tell(progress)
            else:
                watch.wait(self.on_recovering)

        return self._recover(dry_run, progress, look, doubt=True)

    def _recover_untrue(self) -> None:
        """For the admission, which has looked at the flushers itself."""
        self._recover(False, lambda text: None, lambda: None, doubt=False)

    def _elsewhere(self) -> Elsewhere:
        return Elsewhere(self.hot, self.durable, self.leases.name)

    def _recover(self, dry_run: bool, progress: Any, before: Callable[[], None], *, doubt: bool) -> recovery.Report:
        with self.durable.until(None):
            return recovery.recover(
                self.hot,
                self.durable,
                self.finals,
                backlog_limit=self.settings.backlog_limit_entries,
                dry_run=dry_run,
                doubt=doubt,
                progress=progress,
                on_beat=self.on_recovering,
                before=before,
            )

    def _recover_hole(self, hole: str) -> bool:
        """A log does not go on where SQL stands, though Redis is the one that was admitted: SQL went back, or somebody
        deleted entries. True if that was recovered, by us or by another process."""
        if not self.settings.auto_recover:
            return False
        _log.warning("recovering: %s", hole)
        try:
            self._recover_untrue()
        except errors.RecoveringError as error:
            _log.info("another process recovers: %s", error)
        return True

    def _recover_evicted(self) -> bool:
        """The server may have deleted hashes by itself: what is not hot would not exist where nothing counts as cold. True if
        that was recovered."""
        positions = self.hot.positions(range(self.settings.partition_count))
        if all(position is None or position.cold for position in positions):
            return False
        return self._recover_hole(
            "the server has deleted keys to make room (evicted_keys), or may have: instances perhaps"
        )

    def _revive(self) -> None:
        """Start the embedded server again if it died; any other server is its operator's."""
        if self._server is None or self._stop.is_set():
            return
        try:
            self._server.ensure_running()
        except errors.UnavailableError as error:  # whoever asked tries again until its deadline
            _log.warning("the embedded server does not start: %s", error)

    def _after_fork(self) -> None:
        self._thread = None
        self._end_all()
        self.hot.after_fork()
        self._make_parts()


def _require_folder(server: EmbeddedServer, row: StoreRow) -> None:
    """A server that is made now has nothing: a store that has been in use would be recovered as wiped, for a forgotten URL."""
    if row.epoch and not server.folder.is_dir():
        raise errors.ConfigurationError(
            "database_url is set and redis_url is not, so Redis would be a new server in the folder "
            f"{server.folder}, which does not exist, and the store of this database has been in use: set redis_url "
            "(STATECACHE_REDIS_URL), or make the folder if its server's data is lost"
        )


_open_caches: weakref.WeakSet[StateCache] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for cache in list(_open_caches):
        cache._after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
