"""A hot store without SQL behind it, on a real server and on fakeredis: the scripts and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import fakeredis
import pytest
import redis

from statecache.core import codec, entry, items, keys
from statecache.hot import scripts
from statecache.hot.store import HotStore
from tests.support import servers, worlds

STAMP = scripts.Stamp(1, "owner-1")
PARTITIONS = 2
LIMIT = 1000


class Lab:
    """Partitions fenced and made ready for ``STAMP``, with a store that speaks for it and a client that looks on."""

    def __init__(self, store: HotStore, client: redis.Redis) -> None:
        self.store = store
        self.client = client
        self.identity = ""
        for partition in range(PARTITIONS):
            self.open(partition, STAMP)
        store.adopt(STAMP.epoch, STAMP.owner)
        assert store.admit(STAMP).codes == ["OK"] * PARTITIONS

    def open(self, partition: int, stamp: scripts.Stamp, *, limit: int = LIMIT, new: bool = True) -> None:
        """Fence a partition and make it ready, as a recovery does."""
        self.fence(partition, stamp)
        code = self.store.ready(
            partition, stamp, identity=self.identity, watermark=entry.ZERO, limit=limit, new=new, report="{}"
        )
        assert code.startswith("OK"), code

    def fence(self, partition: int, stamp: scripts.Stamp) -> None:
        code, fenced = self.store.fence(partition, stamp, "deployment", 1)
        assert fenced is not None, code
        self.identity = fenced.identity

    # --- keys --------------------------------------------------------------------------------------------------------

    def meta(self, partition: int = 0) -> str:
        return self.store.keyspace.meta(partition)

    def log(self, partition: int = 0) -> str:
        return self.store.keyspace.log(partition)

    def key(self, id: str, partition: int = 0) -> str:
        return self.store.keyspace.instance(partition, "order", id)

    def set_meta(self, partition: int = 0, **fields: Any) -> None:
        self.client.hset(self.meta(partition), mapping=fields)

    def hash(self, id: str, partition: int = 0) -> dict[str, str]:
        found: Any = self.client.hgetall(self.key(id, partition))
        return {name.decode(): text.decode() for name, text in found.items()}

    def entries(self, partition: int = 0) -> list[entry.Entry]:
        """The log's entries but for the marks."""
        found: Any = self.client.xrange(self.log(partition))
        parsed = [entry.parse(entry.EntryId.parse(id.decode()), fields[b"e"].decode()) for id, fields in found]
        return [one for one in parsed if not one.is_mark]

    def dump(self) -> worlds.Dump:
        return worlds.hot_dump(self.client, self.store.keyspace.namespace)

    # --- items -------------------------------------------------------------------------------------------------------

    START = items.MoveSpec("order", "@start", {"": "placed"}, 1)
    PAY = items.MoveSpec("order", "pay", {"placed": "paid"}, 1)
    NOTE = items.MoveSpec("order", "note", {"placed": "placed", "paid": "paid"}, 1)

    def item(
        self,
        move: items.MoveSpec,
        id: str = "1",
        transition_id: str = "",
        *,
        partition: int = 0,
        expected: int = 0,
        pairs: Sequence[str] = (),
        unset: Sequence[str] = (),
        increments: Sequence[Sequence[str]] = (),
        retry: bool = False,
        asked: int = 0,
        absent: str = "",
        token: str = "",
    ) -> items.Item:
        transition_id = transition_id or f"{move.event}-{id}-{next(_numbers)}"
        tail = "\x1f".join([transition_id, "", "", "", codec.patch_text(pairs[::2], pairs[1::2]), " ".join(unset)])
        return items.Item(
            partition, id, move, expected, token or codec.token_of(transition_id), tail, tuple(pairs[::2]), list(pairs[1::2]),
            transition_id, retry=retry, asked=asked, absent=absent, unset=list(unset),
            increments=[list(one) for one in increments],
        )  # fmt: skip

    def apply(self, *batch: items.Item) -> list[str]:
        """The reply's lines."""
        return [" ".join([outcome.code, *outcome.words]) for outcome in self.store.apply(batch)]

    def start(self, id: str = "1", partition: int = 0, pairs: Sequence[str] = ()) -> None:
        assert self.apply(self.item(self.START, id, partition=partition, pairs=pairs))[0].startswith("OK 1 ")

    def note(self, id: str = "1", times: int = 1, **options: Any) -> list[str]:
        """Fire ``note`` so often; the transition ids."""
        ids = [f"n{next(_numbers)}" for _ in range(times)]
        for one in ids:
            assert self.apply(self.item(self.NOTE, id, one, **options))[0].startswith("OK ")
        return ids


_numbers = iter(range(10**9))


@pytest.fixture
def fake_lab(namespace: str) -> Iterator[Lab]:
    client = fakeredis.FakeRedis()
    yield Lab(HotStore(keys.Keyspace(namespace, PARTITIONS), client=client, emulated=True), client)
    client.close()


@pytest.fixture
def real_lab(redis_url: str, namespace: str) -> Iterator[Lab]:
    client = redis.Redis.from_url(redis_url)
    store = HotStore(keys.Keyspace(namespace, PARTITIONS), url=redis_url)
    yield Lab(store, client)
    store.close()
    client.close()


@pytest.fixture(params=["real", "fake"])
def lab(request: pytest.FixtureRequest) -> Lab:
    """The test runs on a real server and on fakeredis."""
    found: Lab = request.getfixturevalue(f"{request.param}_lab")
    return found


@pytest.fixture
def small_server(start_redis: Any) -> servers.ValkeyServer:
    """A server with little memory that may be filled."""
    server: servers.ValkeyServer = start_redis(maxmemory="4mb", appendonly="no")
    return server
