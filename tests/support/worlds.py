"""A store with both its servers in reach, for tests that do to them what a caller never does.

``World`` opens a ``StateCache`` without a flusher (``client="async"``: an ``AsyncStateCache`` in the
same clothes), so that a test decides when anything is flushed. Faults: Redis loses
its tail (``redis_copy``, then ``redis_back``: every key as it was, the scripts gone), is wiped, or is taken for another
server (``disown``); SQL is restored from an older copy (``sql_copy``, then ``sql_back``). ``hot_dump`` and ``sql_dump``
tell whether anything changed at all.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Self
from unittest import mock

import fakeredis
import redis
import sqlalchemy as sa

from statecache import State, StateCache, StateMachine
from statecache.core import entry, errors, keys, model
from statecache.durable import schema
from statecache.durable.store import DurableStore
from statecache.engine import verify as verification
from statecache.engine.flusher import Flusher
from statecache.hot.store import HotStore
from statecache.settings import Settings
from tests.support import blocking


def _has_amount(order: model.Snapshot) -> bool:
    return order.data.get("amount", 0) > 0


class Waiting(StateMachine):
    """A machine whose instances can be stuck."""

    open = State(initial=True, timeout=timedelta(hours=1))
    shut = State(final=True)
    close = open.to(shut)


class Order(StateMachine):
    """The machine of most tests: ``note`` leaves the state as it is, ``approve`` has a guard."""

    placed = State(initial=True)
    paid = State()
    shipped = State()
    delivered = State(final=True)
    cancelled = State(final=True)

    pay = placed.to(paid)
    ship = paid.to(shipped)
    deliver = shipped.to(delivered)
    cancel = placed.to(cancelled) | paid.to(cancelled)
    note = placed.to(placed) | paid.to(paid) | shipped.to(shipped)
    approve = placed.to(paid, guard=_has_amount)


Dump = dict[bytes, Any]


def hot_dump(client: redis.Redis, namespace: str) -> Dump:
    """Every key of a namespace with its content: by DUMP, which tells the encoding too; by reads on fakeredis."""
    found: Dump = {}
    for key in client.scan_iter(match=f"{{{namespace}:*", count=1000):
        dumped = client.dump(key) if _is_real(client) else _content(client, key)
        if dumped is not None:
            found[key] = dumped
    return found


def _is_real(client: redis.Redis) -> bool:
    return type(client).__module__.startswith("redis")


def _content(client: redis.Redis, key: bytes) -> object:
    kind = client.type(key)
    if kind == b"hash":
        return client.hgetall(key)
    if kind == b"stream":
        return client.xrange(key), client.xinfo_stream(key)["last-generated-id"]
    if kind == b"list":
        return client.lrange(key, 0, -1)
    if kind == b"zset":
        return client.zrange(key, 0, -1, withscores=True)
    return client.get(key)


def sql_copy(durable: DurableStore) -> dict[str, list[Any]]:
    """Every row of every table: a backup."""
    with durable.database.engine.connect() as connection:
        return {
            table.name: sorted(map(tuple, connection.execute(sa.select(table))), key=repr)
            for table in schema.metadata.sorted_tables
        }


def sql_back(durable: DurableStore, saved: dict[str, list[Any]]) -> None:
    """Restore a backup, in one transaction: as far as a client can see, SQL has gone back in time."""
    with durable.database.writer.begin() as connection:
        for table in schema.metadata.sorted_tables:
            connection.execute(sa.delete(table))
            rows = [dict(zip(table.columns.keys(), row, strict=True)) for row in saved[table.name]]
            if rows:
                connection.execute(sa.insert(table), rows)


def forged(id: str, **parts: str) -> str:
    """The text of a stranger's record that looks like the start of an order."""
    values = dict.fromkeys(entry.PARTS, "") | {
        "machine": "order", "id": id, "version": "1", "event": entry.EVENT_START, "to_state": "placed",
        "at_ms": "1700000000000", "transition_id": f"theirs-{id}", "machine_version": "1",
    }  # fmt: skip
    return entry.SEPARATOR.join((values | parts).values())


class World:
    """One store under test. ``cache`` is a client of it; ``orders`` its handle of ``Order``; ``more()`` are others."""

    def __init__(
        self, redis_url: str, database_url: str, namespace: str, *, client: str = "sync", **settings: Any
    ) -> None:
        self.kind = client
        self.redis_url = redis_url
        self.database_url = database_url
        self.namespace = namespace
        self.settings = {"partition_count": 2, "call_timeout_seconds": 5.0, **settings}
        self.client = self._client()
        self._caches: list[StateCache] = []
        try:
            self.cache = self.more()
            self.orders = self.cache.machine(Order)
        except BaseException:
            self.close()
            raise

    def _client(self) -> Any:
        return redis.Redis.from_url(self.redis_url)

    def more(self, **settings: Any) -> StateCache:
        """Another client of the same store, of the same kind, closed with the world."""
        kind: Any = blocking.BlockingCache if self.kind == "async" else StateCache
        cache: StateCache = kind.connect(
            redis_url=self.redis_url,
            database_url=self.database_url,
            namespace=self.namespace,
            **{**self.settings, **settings},
        )
        self._caches.append(cache)
        return cache

    def close(self) -> None:
        for cache in self._caches:
            cache.close()
        self.client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- looking -----------------------------------------------------------------------------------------------------

    @property
    def hot(self) -> HotStore:
        return self.cache.hot

    @property
    def durable(self) -> DurableStore:
        return self.cache.durable

    @property
    def keyspace(self) -> keys.Keyspace:
        return self.cache.hot.keyspace

    def partition_of(self, id: str) -> int:
        return self.keyspace.partition_of("order", id)

    def ids(self, partition: int = 0, prefix: str = "o") -> Iterator[str]:
        """Ids that lie in a partition."""
        number = 0
        while True:
            number += 1
            if self.partition_of(f"{prefix}{number}") == partition:
                yield f"{prefix}{number}"

    def id(self, partition: int = 0, prefix: str = "o") -> str:
        return next(self.ids(partition, prefix))

    def meta(self, partition: int = 0) -> dict[str, str]:
        found: Any = self.client.hgetall(self.keyspace.meta(partition))
        return {name.decode(): text.decode() for name, text in found.items()}

    def log(self, partition: int = 0) -> list[str]:
        """The ids of a log's entries."""
        found: Any = self.client.xrange(self.keyspace.log(partition))
        return [id.decode() for id, _ in found]

    def watermark(self, partition: int = 0) -> entry.EntryId:
        return self.durable.partitions([partition])[0].watermark

    def is_hot(self, id: str) -> bool:
        return bool(self.client.exists(self.keyspace.instance(self.partition_of(id), "order", id)))

    def versions(self, id: str) -> list[int]:
        """The versions of an instance's rows in SQL."""
        return [row.version for row in self.durable.history("order", id)]

    def hot_dump(self) -> Dump:
        return hot_dump(self.client, self.namespace)

    def sql_dump(self) -> dict[str, list[Any]]:
        return sql_copy(self.durable)

    def verify(self) -> None:
        """Fail with the findings if anything is not as it must be, counts of states included."""
        found = verification.verify(self.cache)
        assert not found.findings, found.findings
        counted: dict[str, int] = {}
        for kept in self.durable.iterate_checkpoints(machine="order"):
            counted[kept.state] = counted.get(kept.state, 0) + 1
        assert self.orders.counts() == counted

    # --- doing -------------------------------------------------------------------------------------------------------

    def start(self, id: str, moves: Sequence[str] = (), **data: Any) -> list[model.Receipt]:
        """Start an order and fire events."""
        receipts = [self.orders.start(id, data or None)]
        return receipts + [self.orders.transition(id, event) for event in moves]

    def flusher(self, cache: StateCache | None = None, **options: Any) -> Flusher:
        """A flusher of all partitions, with a memory of its own."""
        cache = cache or self.cache
        flusher = cache.make_flusher(range(self.keyspace.partition_count))
        for name, value in options.items():
            setattr(flusher, name, value)
        return flusher

    def flush(self) -> None:
        self.cache.flush()

    def flush_through(self) -> None:
        """Flush, beginning again where Redis was recovered meanwhile."""
        for _ in range(5):
            try:
                self.cache.flush()
            except errors.RecoveringError:
                continue
            return
        raise AssertionError("recovered again and again")

    def evict(self, id: str) -> str:
        """Drop an instance's hash by what SQL says of it; the script's code."""
        partition = self.partition_of(id)
        found = self.durable.lookup([("order", id, partition)])[0]
        version = found.checkpoint.version if found.checkpoint else 0
        return self.hot.evict([(partition, f"order:{id}", version, str(found.watermark), 0)])[0].split(" ")[0]

    # --- faults ------------------------------------------------------------------------------------------------------

    def redis_copy(self) -> Dump:
        """What a snapshot file or an append-only file would bring back."""
        return self.hot_dump()

    def redis_back(self, saved: Dump, *, detour: bool = False) -> None:
        """Redis restarts from older data: every key as it was then, no script known, and another identity.

        ``detour``: the scripts stay, and so do connections (demoted, synced without its tail, promoted again).
        """
        self.wipe(scripts_stay=detour)
        for key, dumped in saved.items():
            self.client.restore(key, 0, dumped)
        self.disown()

    def wipe(self, *, scripts_stay: bool = False) -> None:
        for key in self.client.scan_iter(match=f"{{{self.namespace}:*", count=1000):
            self.client.delete(key)
        if not scripts_stay:
            self.client.script_flush("SYNC")

    def forge(self, text: str, partition: int = 0) -> str:
        """Put a stranger's record behind a log's last entry; returns its entry id."""
        last = entry.EntryId.parse(self.log(partition)[-1])
        place = f"{last.epoch}-{last.seq + 1}"
        self.client.xadd(self.keyspace.log(partition), {"e": text}, id=place)
        return place

    def disown(self) -> None:
        """Let this server be another one than the one that was found true, as after a restart or a failover."""
        for partition in range(self.keyspace.partition_count):
            meta = self.keyspace.meta(partition)
            if self.client.exists(meta):
                self.client.hset(meta, "identity", "of another server")

    def sql_copy(self) -> dict[str, list[Any]]:
        return sql_copy(self.durable)

    def sql_back(self, saved: dict[str, list[Any]]) -> None:
        sql_back(self.durable, saved)


class EmulatedWorld(World):
    """The same on fakeredis and a SQLite file: no process, some hundred times as many stores a minute."""

    def __init__(self, database_url: str, namespace: str = "emulated", **settings: Any) -> None:
        self._server = fakeredis.FakeServer()
        super().__init__("redis://emulated:1/0", database_url, namespace, **settings)

    def _client(self) -> Any:
        return fakeredis.FakeRedis(server=self._server)

    def more(self, **settings: Any) -> StateCache:
        wanted = Settings(
            redis_url=self.redis_url,
            database_url=self.database_url,
            namespace=self.namespace,
            **{**self.settings, **settings},
        )
        durable = DurableStore.connect(self.database_url, partition_count=wanted.partition_count)
        hot = HotStore(keys.Keyspace(self.namespace, wanted.partition_count), client=self._client(), emulated=True)
        cache = StateCache(wanted, hot, durable)
        self._caches.append(cache)
        cache._admit_at_connect("")
        return cache

    def redis_copy(self) -> Dump:
        return {key: self.client.dump(key) for key in self.client.scan_iter(match=f"{{{self.namespace}:*", count=1000)}

    def disown(self) -> None:
        self.client.set("emulated:run_id", secrets.token_hex(4))


@contextmanager
def before_call(target: object, name: str, action: Callable[[], object], *, call: int = 1) -> Iterator[None]:
    """Do something right before the ``call``-th call of a method: the place between two steps that a test wants."""
    original = getattr(target, name)
    count = 0

    def wrapped(*arguments: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        if count == call:
            action()
        return original(*arguments, **named)

    with mock.patch.object(target, name, wrapped):
        yield
    assert count >= call, f"{name} was called {count} times: the interleaving was not reached"


@contextmanager
def after_call(target: object, name: str, action: Callable[[], object], *, call: int = 1) -> Iterator[None]:
    """Do something right after the ``call``-th call of a method has returned."""
    original = getattr(target, name)
    count = 0

    def wrapped(*arguments: Any, **named: Any) -> Any:
        nonlocal count
        result = original(*arguments, **named)
        count += 1
        if count == call:
            action()
        return result

    with mock.patch.object(target, name, wrapped):
        yield
    assert count >= call, f"{name} returned {count} times: the interleaving was not reached"


def together(*works: Callable[[], Any]) -> list[Any]:
    """Run functions in threads that begin at one barrier; their results, or the exceptions they raised."""
    barrier = threading.Barrier(len(works))
    results: list[Any] = [None] * len(works)

    def run(place: int) -> None:
        barrier.wait()
        try:
            results[place] = works[place]()
        except Exception as error:
            results[place] = error

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
