"""The hot store: every exchange with Redis that the protocol knows, each one script call on one lean connection.

What can fail, and what happens then. A server that cannot be reached, or a reply that does not come, is an outcome
(``UNSENT``, ``LOST``), not an exception: the flow decides, and repeats with the same transition id. ``NOSCRIPT`` is an
outcome too: nothing here loads a script but ``admit``, which compares the server's identity and loads on the same connection.
As the server may change between those two steps, calls on a new connection compare the identity again, inside the script, until
one was answered (protocol hole H13).
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import msgspec
import redis

from statecache.core import entry, failpoints, items, keys
from statecache.hot import answers, confirmation, endpoint, failures, packing, resp, scripts, wire
from statecache.hot.answers import Admission, Fenced, Fill, PartitionReply, Position, Probed
from statecache.hot.packing import Cold

_encode = msgspec.json.encode
READ_BYTES_MAX = 2**20
"""So many bytes of a log one script call reads: Redis takes 9 ms for it, and does nothing else meanwhile."""
_FIND_ENTRIES = 2000
_FIND_BYTES = 4 * 2**20
"""Looked at by one call of ``find.lua``: one or two milliseconds of the server's time; some tens where entries are large."""
_NUMBERS = [resp.bulk(number) for number in range(4096)]
_HGETALL = b"*2\r\n$7\r\nHGETALL\r\n$%d\r\n%b\r\n"
_HEADERS = [b"*%d\r\n" % number for number in range(4096)]
CHUNKS_IN_FLIGHT = 2
HYDRATIONS_IN_FLIGHT = 4
HYDRATE_ROWS_MAX = 500
BATCH_ITEMS_MAX = 250
BATCH_BYTES_MAX = 1_000_000
"""What calls that are batched by themselves (threads, tasks) put into one script call at most."""
Answered = tuple[Sequence[items.Item], list[items.Outcome]]


class HotStore:
    """One Redis or Valkey server. Thread-safe, and safe in a child process forked from its user.

    A ``deadline`` (``time.monotonic``) of a method bounds each of its exchanges, connecting included, though not below
    ``wire.EXCHANGE_SECONDS_MIN``; without one it is the connection's own timeouts that do.

    ``client`` may be a ``fakeredis`` client with ``emulated=True`` for unit tests.
    """

    def __init__(
        self,
        keyspace: keys.Keyspace,
        *,
        url: str | None = None,
        client: Any = None,
        emulated: bool = False,
        socket_timeout_seconds: float = 5.0,
        identity_interval_seconds: float = 0.5,
        instance_fields_max: int = 256,
    ) -> None:
        self.keyspace = keyspace
        pool = client.connection_pool if client is not None else wire.pool_of(url or "", socket_timeout_seconds)
        self.wires = wire.Wires(pool, wire.EmulatedWire if emulated else wire.Wire)
        self.emulated = emulated
        self.endpoint = None if emulated else endpoint.of(pool)
        """Where the server is, without user and password."""
        self.identity_interval_seconds = identity_interval_seconds
        self._pack = msgspec.json.encode if emulated else resp.stream
        self._fields_max = resp.bulk(instance_fields_max)
        self.stamp = scripts.NEVER
        count = keyspace.partition_count
        self._meta_keys = [resp.bulk(keyspace.meta(p)) for p in range(count)]
        self._pair_keys = [resp.bulk(keyspace.meta(p)) + resp.bulk(keyspace.log(p)) for p in range(count)]

    def close(self) -> None:
        self.wires.close()

    def after_fork(self) -> None:
        """Begin anew in a forked child: no connection of the parent's is used."""
        self.wires = wire.Wires(self.wires.pool, self.wires.wire_class)

    def adopt(self, epoch: int, owner: str) -> None:
        """Speak for this epoch from now on."""
        self.stamp = scripts.Stamp(epoch, owner)

    # --- transitions -------------------------------------------------------------------------------------------------

    def apply(self, batch: Sequence[items.Item], timeout_seconds: float | None = None) -> list[items.Outcome]:
        """Apply items in one script call; an outcome for each, in order. Never raises for a server that fails.

        ``timeout_seconds`` shortens the wait for a connection and for the reply: then the outcomes are ``UNSENT`` or ``LOST``.
        """
        # Without an ``Exchange``, whose four calls are a twentieth of what a single transition costs its client.
        try:
            if timeout_seconds is None or timeout_seconds >= self.wires.near_seconds:
                line = self.wires.take()
            else:
                line = self.wires.take(time.monotonic() + timeout_seconds)
        except (redis.RedisError, OSError) as error:
            return self._lost(batch, error, None)
        try:
            line.send(self.packed_apply(batch, line))
            outcomes = self._answer(line, batch)
        except BaseException as error:
            self.wires.lose(line, error)
            if isinstance(error, (redis.RedisError, OSError)):
                return self._lost(batch, error, line)
            raise
        self.wires.give_back(line)
        return outcomes

    def apply_stream(self, chunks: Iterable[Sequence[items.Item]], deadline: float | None = None) -> Iterator[Answered]:
        """Apply chunk after chunk, the next one sent before the reply of the last is read.

        Two moves of one instance must stand in one chunk: a chunk that was refused is repeated after its successor ran.
        Past the deadline it goes on as long as the server answers: when a chunk does not get through then, no other is sent.
        """
        late: redis.RedisError | OSError | None = None
        in_flight: deque[Sequence[items.Item]] = deque()
        line: wire.Wire | None = None
        try:
            for chunk in chunks:
                if late is not None:
                    yield chunk, self._lost(chunk, late, None)
                    continue
                try:
                    if line is None:
                        line = self.wires.take(deadline)
                    elif deadline is not None:
                        line.until = self.wires.until(deadline)
                    packed = self.packed_apply(chunk, line)
                    in_flight.append(chunk)  # first: a wire that was interrupted while sending must not be used again
                    line.send(packed)
                except (redis.RedisError, OSError) as error:
                    lost, line = line, None
                    late = _is_over(deadline, error)
                    if lost is None:
                        yield chunk, self._lost(chunk, error, None)
                    else:
                        yield from self._all_lost(in_flight, error, lost)
                    continue
                if len(in_flight) >= CHUNKS_IN_FLIGHT:
                    line, late = yield from self._receive(line, in_flight, deadline)
            while in_flight and line is not None:
                line, late = yield from self._receive(line, in_flight, deadline)
        finally:
            if line is not None:
                if in_flight:
                    line.close()
                else:
                    self.wires.give_back(line)

    def _receive(
        self, line: wire.Wire, in_flight: deque[Sequence[items.Item]], deadline: float | None
    ) -> Generator[Answered, None, tuple[wire.Wire | None, redis.RedisError | OSError | None]]:
        """Read one reply; returns the wire, or None when it was lost, and why nothing more is to be sent, if so."""
        chunk = in_flight[0]
        try:
            line.until = self.wires.until(deadline)
            outcomes = self._answer(line, chunk)
        except (redis.RedisError, OSError) as error:
            late = _is_over(deadline, error)
            yield from self._all_lost(in_flight, error, line)
            return None, late
        in_flight.popleft()
        yield chunk, outcomes
        return line, None

    def _answer(self, line: wire.Wire, chunk: Sequence[items.Item]) -> list[items.Outcome]:
        """Read the reply to a chunk. Raises redis-py's errors when it does not come."""
        outcomes: list[items.Outcome]
        try:
            outcomes = self.told(line, line.read())
        except redis.ResponseError as error:
            self.wires.distrust(line)
            outcomes = [failures.outcome_of(error, sent=True)] * len(chunk)
        confirm = confirmation.strictest(chunk)
        if confirm is not None and not confirmation.is_confirmed_by(line, confirm):
            return confirmation.unconfirmed(outcomes)
        return outcomes

    def _lost(
        self, chunk: Sequence[items.Item], error: redis.RedisError | OSError, line: wire.Wire | None
    ) -> list[items.Outcome]:
        """The outcomes of a chunk whose reply did not come; without a wire it was not sent."""
        if line is not None:
            self.wires.checked_at = 0.0  # whether it compared the identity is not known
        return [failures.outcome_of(error, sent=line is not None)] * len(chunk)

    def _all_lost(
        self, in_flight: deque[Sequence[items.Item]], error: redis.RedisError | OSError, line: wire.Wire
    ) -> Iterator[Answered]:
        self.wires.lose(line, error)
        while in_flight:
            chunk = in_flight.popleft()
            yield chunk, self._lost(chunk, error, line)

    def told(self, line: wire.Checked, reply: bytes) -> list[items.Outcome]:
        """The outcomes of the oldest script call in flight. Notes what they say of the server, if it was asked or refused."""
        sent_at = line.checks.popleft()  # first: the next reply is the next call's, whatever this one holds
        outcomes = answers.outcomes_of(reply)
        if sent_at or outcomes[0].code in items.ADMISSION_CODES:
            admitted = not any(outcome.code in items.ADMISSION_CODES for outcome in outcomes)
            self.wires.checked(line, sent_at if admitted else 0.0)
        return outcomes

    def packed_apply(self, chunk: Sequence[items.Item], line: wire.Checked) -> bytes:
        """The bytes of one script call, to be sent on this wire at once: it notes whether the call compares the identity."""
        stamp = self.stamp
        for item in chunk:
            if item.asked_under is not None and item.asked_under != (stamp.epoch, stamp.owner):
                item.absent = ""  # SQL was asked in another epoch
        partitions, values = packing.values_of_one(chunk[0]) if len(chunk) == 1 else packing.values_of_many(chunk)
        key_count = 2 * len(partitions)
        due = self.wires.identity_due(line, self.identity_interval_seconds)
        confirm = confirmation.strictest(chunk)
        packed = b"".join(
            [
                _HEADERS[6 + key_count],
                scripts.stamped("apply", stamp, self.emulated).call,
                _NUMBERS[key_count],
                *[self._pair_keys[partition] for partition in partitions],
                resp.bulk(self._pack(values)),
                b"$1\r\n1\r\n" if due else b"$1\r\n0\r\n",
                self._fields_max,
                confirmation.command(confirm) if confirm is not None else b"",
            ]
        )
        line.checks.append(due)  # last: what cannot be packed is not sent, and gets no reply
        return packed

    # --- reads -------------------------------------------------------------------------------------------------------

    def hashes(
        self, addresses: Iterable[tuple[int, str, str]], deadline: float | None = None
    ) -> list[dict[bytes, bytes]]:
        """HGETALL of each (partition, machine, id), pipelined; empty for what is not hot.

        Plain reads, not admitted: a Redis that has just become untrue may be seen until the first checked call.
        """
        return self._hashes([self.keyspace.instance(*address).encode() for address in addresses], deadline)

    def hashes_of(self, machine: str, ids: Iterable[str], deadline: float | None = None) -> list[dict[bytes, bytes]]:
        """``hashes`` of one machine's instances."""
        return self._hashes(self.keyspace.instances(machine, ids), deadline)

    def _hashes(self, keys: Sequence[bytes], deadline: float | None) -> list[dict[bytes, bytes]]:
        with self._exchange("HGETALL", deadline) as line:
            replies: list[Any] = []
            for start in range(0, len(keys), 125):
                line.send(b"".join([_HGETALL % (len(key), key) for key in keys[start : start + 125]]))
                if start:
                    replies += line.read_many(125)
            replies += line.read_many(len(keys) - len(replies))
            return [answers.hash_of(reply) for reply in replies]

    def hash(self, partition: int, machine: str, id: str, deadline: float | None = None) -> dict[bytes, bytes]:
        """``hashes`` of one."""
        with self._exchange("HGETALL", deadline) as line:
            line.send(resp.command("HGETALL", self.keyspace.instance(partition, machine, id)))
            return answers.hash_of(line.read_many(1)[0])

    def own_field(self, partition: int, machine: str, id: str, deadline: float | None = None) -> bytes | None:
        """The field ``@`` of an instance's hash, None if it is not hot."""
        with self._exchange("HGET", deadline) as line:
            found: bytes | None = line.call(resp.command("HGET", self.keyspace.instance(partition, machine, id), "@"))
            return found

    def position(self, partition: int) -> Position | None:
        """What ``meta`` says about cold instances; None where there is no ``meta`` (a wiped Redis)."""
        return self.positions([partition])[0]

    def positions(self, partitions: Sequence[int], deadline: float | None = None) -> list[Position | None]:
        """``position`` of each, in one exchange."""
        fields = ("epoch", "owner", "status", "cold", "evicted_to")
        with self._exchange("HMGET", deadline) as line:
            line.send(b"".join(resp.command("HMGET", self.keyspace.meta(each), *fields) for each in partitions))
            return [answers.position_of(found) for found in line.read_all(len(partitions))]

    def instances(self, machine: str | None = None, page: int = 500) -> Iterator[list[tuple[str, str]]]:
        """Every hot instance as pages of (machine, id), by SCAN: some may come twice, or go before they are looked at."""
        cursor = "0"
        found: list[tuple[str, str]] = []
        while True:
            cursor, more = self.scan(cursor, machine)
            found += more
            if len(found) >= page or (cursor == "0" and found):
                yield found
                found = []
            if cursor == "0":
                return

    def scan(self, cursor: str, machine: str | None = None) -> tuple[str, list[tuple[str, str]]]:
        """One step of a SCAN that began at "0" and ends when it returns "0": the next cursor, hot (machine, id)s."""
        escaped = re.sub(r"([*?\[\]\\^-])", r"\\\1", self.keyspace.namespace)
        pattern = f"{{{escaped}:*}}:i:{machine or ''}{':' if machine else ''}*"
        with self._exchange("SCAN") as line:
            reply = line.call(resp.command("SCAN", cursor, "MATCH", pattern, "COUNT", 1000))
        found = []
        for key in reply[1]:
            with suppress(UnicodeDecodeError):  # a stranger's: no instance has such a name
                owner, _, id = key.decode().partition("}:i:")[2].partition(":")
                found.append((owner, id))
        return reply[0].decode() if isinstance(reply[0], bytes) else str(reply[0]), found

    def find(
        self, partition: int, machine: str, id: str, *, whole: bool = False, deadline: float | None = None
    ) -> tuple[str, list[entry.Entry]]:
        """One instance's entries behind the watermark as (code, entries); the code is ``OK`` or one of admission.

        The watermark is that of ``meta``, which only grows: where SQL went back, ``whole`` finds what it has not any more.
        """
        code, lines = self._found(partition, {(machine, id): [""]}, whole, deadline)
        return code, [entry.parse_line(line) for line in lines]

    def find_many(
        self,
        partition: int,
        wanted: Mapping[tuple[str, str], Sequence[str]],
        *,
        whole: bool = False,
        deadline: float | None = None,
    ) -> tuple[str, list[entry.Entry]]:
        """The same of many instances in one reading of the log: of each (machine, id), entries with one of these parts.

        A superset: whoever asks for a version, or for a transition id, compares it. A stranger's record is nobody's.
        """
        code, lines = self._found(partition, wanted, whole, deadline)
        return code, [
            record
            for record in (answers.parse_any(partition, line) for line in lines)
            if record.machine != entry.FOREIGN
        ]

    def _found(
        self, partition: int, wanted: Mapping[tuple[str, str], Sequence[str]], whole: bool, deadline: float | None
    ) -> tuple[str, list[str]]:
        mark = entry.SEPARATOR
        asked = _encode(
            [
                (f"{machine}{mark}{id}{mark}", [part and f"{mark}{part}{mark}" for part in parts])
                for (machine, id), parts in wanted.items()
            ]
        )
        found: list[str] = []
        cursor = str(entry.ZERO) if whole else ""
        while cursor != "-":
            reply = self._call(
                "find", [self._pair_keys[partition]], 2, asked, cursor, _FIND_ENTRIES, _FIND_BYTES, deadline=deadline
            )
            head, *lines = reply.split("\n")
            code, *words = head.split(" ")
            if code != "OK":
                return code, []
            found += lines
            cursor = words[0]
        return "OK", found

    # --- cold tier ---------------------------------------------------------------------------------------------------

    def hydrate(
        self, rows: Sequence[Cold], under: scripts.Stamp | None = None, deadline: float | None = None
    ) -> list[str]:
        """Bring instances back, some hundred a script call; a code for each. ``OOM`` for all of a call when Redis has no memory
        for them."""
        calls = [rows[begin : begin + HYDRATE_ROWS_MAX] for begin in range(0, len(rows), HYDRATE_ROWS_MAX)]
        return [code for codes in self.hydrate_stream(calls, under, deadline) for code in codes]

    def hydrate_stream(
        self, batches: Iterable[Sequence[Cold]], under: scripts.Stamp | None = None, deadline: float | None = None
    ) -> Iterator[list[str]]:
        """``hydrate`` batch after batch; while the server takes some, the next one is made. Codes come in their order.

        A batch is one script call, or several where its data takes more than ``HYDRATE_BYTES_MAX``.
        """
        in_flight: deque[tuple[int, bool]] = deque()  # of each call how many instances, and whether it ends a batch
        codes: list[str] = []

        def answered(left: int) -> Iterator[list[str]]:
            """Read replies until so many are left in flight; the codes of each batch that ends."""
            nonlocal codes
            while len(in_flight) > left:
                count, is_last = in_flight.popleft()
                codes += answers.hydrated(line.read_many(1)[0], count)
                if is_last:
                    yield codes
                    codes = []

        with self._exchange("hydrate", deadline) as line:
            for rows in batches:
                parts = packing.cut(rows)
                for number, part in enumerate(parts, 1):
                    line.send(self._packed_hydrate(part, under or self.stamp))
                    in_flight.append((len(part), number == len(parts)))
                    yield from answered(HYDRATIONS_IN_FLIGHT - 1)
            yield from answered(0)

    def hydrate_and_apply(
        self, row: Cold, item: items.Item, under: scripts.Stamp | None, deadline: float | None = None
    ) -> tuple[str, items.Outcome]:
        """Bring an instance back and apply an item behind it, in one exchange: the code of the one, the outcome of the other.

        Never raises for a server that fails once the item may have been applied: its outcome tells.
        """
        batch, line = (item,), None
        try:
            with self.wires.wire(deadline) as line:
                line.send(self._packed_hydrate([row], under or self.stamp) + self.packed_apply(batch, line))
                reply = line.read_many(1)[0]
                outcome = self._answer(line, batch)[0]
        except (redis.RedisError, OSError) as error:
            return "", self._lost(batch, error, line)[0]
        if outcome.code != "MISS" and isinstance(reply, redis.ResponseError):
            return "", outcome
        return answers.hydrated(reply, 1)[0], outcome

    def _packed_hydrate(self, rows: Sequence[Cold], under: scripts.Stamp) -> bytes:
        partitions, values = packing.cold_values(rows)
        metas = [self._meta_keys[partition] for partition in partitions]
        script = scripts.stamped("hydrate", under, self.emulated)
        return packing.script_call(script.call, metas, len(metas), self._pack(values))

    def evict(
        self,
        rows: Sequence[tuple[int, str, int, str, int]],
        under: scripts.Stamp | None = None,
        *,
        dry_run: bool = False,
        deadline: float | None = None,
    ) -> list[str]:
        """Drop flushed hot copies: (partition, "machine:id", version, SQL's watermark, parked); the reply's line for each."""
        return self._by_partition("evict", rows, "1" if dry_run else "", under=under, deadline=deadline)

    def park(self, rows: Sequence[tuple[int, str]], under: scripts.Stamp | None = None) -> list[str]:
        """Flag instances as parked: (partition, "machine:id"); the reply's line for each."""
        return self._by_partition("park", rows, under=under)

    def _by_partition(
        self,
        name: str,
        rows: Sequence[tuple[Any, ...]],
        *arguments: str,
        under: scripts.Stamp | None,
        deadline: float | None = None,
    ) -> list[str]:
        partitions: dict[int, int] = {}
        packed = []
        for partition, *rest in rows:
            packed.append([partitions.setdefault(partition, len(partitions) + 1), *rest])
        metas = [self._meta_keys[p] for p in partitions]
        reply = self._call(name, metas, len(metas), _encode(packed), *arguments, under=under, deadline=deadline)
        lines = reply.split("\n")
        return lines if len(lines) == len(rows) else lines * len(rows)

    def ask(self, name: str, partitions: Sequence[int], *arguments: Any, deadline: float | None = None) -> str:
        """Call a script whose keys are the partitions' ``meta``; its reply, or ``NOSCRIPT``."""
        metas = [self._meta_keys[p] for p in partitions]
        return self._call(name, metas, len(partitions), *arguments, deadline=deadline)

    def commands(self, *commands: Sequence[Any]) -> list[Any]:
        """Plain reads in one round trip, not admitted."""
        with self._exchange(str(commands[0][0])) as line:
            line.send(b"".join([resp.command(*command) for command in commands]))
            replies = line.read_many(len(commands))
        for reply in replies:
            if isinstance(reply, redis.ResponseError):
                raise failures.translated(reply, str(commands[0][0])) from reply
        return replies

    # --- flush -------------------------------------------------------------------------------------------------------

    def read(
        self,
        cursors: Sequence[tuple[int, entry.EntryId]],
        *,
        entries: int,
        bytes_max: int,
        fenced_identity: str = "",
        stamp: scripts.Stamp | None = None,
        under: scripts.Stamp | None = None,
        deadline: float | None = None,
    ) -> list[PartitionReply]:
        """Entries behind each (partition, cursor), if the partition has this store's stamp, is ready and is true.

        With ``fenced_identity`` the partitions must be fenced by the recovery of that stamp, on that server.
        """
        reply = self._call(
            "read",
            [self._pair_keys[partition] for partition, _ in cursors],
            2 * len(cursors),
            entries,
            bytes_max,
            fenced_identity,
            *[str(cursor) for _, cursor in cursors],
            stamp=stamp,
            under=under,
            deadline=deadline,
        )
        replies = []
        lines = iter(reply.split("\n"))
        for head in lines:
            code, *words = head.split(" ")
            if code == "OK":
                found = [next(lines) for _ in range(int(words[0]))]
                replies.append(PartitionReply(code, entry.EntryId.parse(words[1]), found))
            else:
                replies.append(PartitionReply(code, entry.ZERO, []))
        if len(replies) == 1 and len(cursors) > 1:
            return replies * len(cursors)
        return replies

    def flushed(
        self,
        rows: Sequence[tuple[int, entry.EntryId, entry.EntryId, int]],
        under: scripts.Stamp | None = None,
    ) -> list[str]:
        """Raise watermarks and trim: (partition, watermark, trim to, limit); a code for each."""
        arguments = [str(part) for _, *parts in rows for part in parts]
        pairs = [self._pair_keys[p] for p, *_ in rows]
        reply = self._call("flushed", pairs, 2 * len(rows), *arguments, under=under)
        lines = [line.split(" ")[0] for line in reply.split("\n")]
        return lines if len(lines) == len(rows) else lines * len(rows)

    # --- admission and recovery --------------------------------------------------------------------------------------

    def admit(
        self, stamp: scripts.Stamp, *, load: bool = True, reads: bool = True, deadline: float | None = None
    ) -> Admission:
        """Compare epoch, owner and identity of every partition and, if all match, load the scripts: on ONE connection.

        Without ``reads`` a server that takes no writes at this moment refuses, though nothing is written."""
        count = self.keyspace.partition_count
        script = scripts.stamped("admit", stamp, self.emulated, reads)
        with self._exchange("admission", deadline) as line:
            line.fresh = True
            reply = line.call(resp.command("EVAL", script.text, count, *[self.keyspace.meta(p) for p in range(count)]))
            identity, *codes, whose = reply.decode().split("\n")
            deployment, protocol, partitions = whose.split(" ")
            is_empty = deployment == "-" and all(code == "EPOCH 0 -" for code in codes)
            heads = [code.split(" ")[0] for code in codes]
            admission = Admission(identity, heads, deployment, protocol, partitions, is_empty)
            if load and all(code == "OK" for code in admission.codes):
                failpoints.hit("admission.compared")
                self._load(line, stamp)
                failpoints.hit("admission.loaded")
            return admission

    def _load(self, line: wire.Wire, stamp: scripts.Stamp) -> None:
        """In one write: loaded one after the other, in ten exchanges, the first could be gone again before the last is there
        (a SCRIPT FLUSH every few milliseconds, and no call would ever get through)."""
        texts = [scripts.stamped(name, stamp, self.emulated).text for name in scripts.CLIENT_NAMES]
        line.send(b"".join(resp.command("SCRIPT", "LOAD", text) for text in texts))
        line.read_all(len(texts))

    def fence(
        self, partition: int, stamp: scripts.Stamp, deployment: str, protocol: int, *, dry_run: bool = False
    ) -> tuple[str, Fenced | None]:
        """Fence a partition for the recovery of this stamp; (reply, what was met) with None unless the reply is ``OK``."""
        arguments = (deployment, protocol, self.keyspace.partition_count, "1" if dry_run else "")
        reply = self._call("fence", [self._meta_keys[partition]], 1, *arguments, stamp=stamp, reads=dry_run)
        head, *identities = reply.split("\n")
        code, *words = head.split(" ")
        if code != "OK":
            return head, None
        existed, epoch, owner, watermark, cold, evicted_to = words
        return code, Fenced(
            existed == "1", int(epoch), "" if owner == "-" else owner, answers.optional_id(watermark), cold,
            answers.optional_id(evicted_to), "" if identities[0] == "-" else identities[0], identities[1],
        )  # fmt: skip

    def probe(
        self, partition: int, stamp: scripts.Stamp, identity: str, watermark: entry.EntryId
    ) -> tuple[str, Probed | None]:
        """Look at the log around SQL's watermark, under the fence of this stamp (``identity`` "": without one)."""
        reply = self._call("probe", [self._pair_keys[partition]], 2, identity, str(watermark), stamp=stamp)
        head, *lines = reply.split("\n")
        code, *words = head.split(" ")
        if code != "OK":
            return code, None
        at_watermark, behind = (None if line == "-" else answers.parse_any(partition, line) for line in lines)
        return code, Probed(
            answers.optional_id(words[0]), entry.EntryId.parse(words[1]), int(words[2]), at_watermark, behind
        )

    def drop(
        self, partition: int, stamp: scripts.Stamp, identity: str, evicted_to: entry.EntryId, names: list[str]
    ) -> str:
        """Drop hashes under a fence and mark the partition cold up to an id; the reply's code."""
        return self._call(
            "drop", [self._meta_keys[partition]], 1, identity, str(evicted_to), _encode(names), stamp=stamp
        )  # fmt: skip

    def ready(
        self,
        partition: int,
        stamp: scripts.Stamp,
        *,
        identity: str,
        watermark: entry.EntryId,
        limit: int,
        new: bool,
        report: str,
    ) -> str:
        """End a recovery's work on a partition: it serves again; the reply's code and the mark's id.

        ``TAKEN`` and the log's last id when somebody else's record is where the mark would be, or above it.
        """
        arguments = (identity, str(watermark), limit, "0" if new else "", report)
        return self._call("ready", [self._pair_keys[partition]], 2, *arguments, stamp=stamp)

    def configuration(self, *names: str, deadline: float | None = None) -> dict[str, str] | None:
        """CONFIG GET of some settings; None where the server does not allow it."""
        if self.emulated:
            return {}
        try:
            with self.wires.wire(deadline) as line:
                found = line.call(resp.command("CONFIG", "GET", *names))
        except redis.ResponseError:
            return None
        except (redis.RedisError, OSError) as error:
            raise failures.translated(error, "CONFIG GET") from error
        texts = [part.decode() for part in found]
        return dict(zip(texts[::2], texts[1::2], strict=True))

    def time_ms(self) -> int:
        """The server's clock, in ms."""
        with self._exchange("TIME") as line:
            seconds, microseconds = line.call(resp.command("TIME"))
        return int(seconds) * 1000 + int(microseconds) // 1000

    def fill(self) -> Fill:
        """DBSIZE and INFO memory, in one exchange. Keys and memory of others on the same server count too."""
        with self._exchange("INFO memory") as line:
            line.send(resp.command("DBSIZE") + (b"" if self.emulated else resp.command("INFO", "memory")))
            count, *texts = line.read_all(1 if self.emulated else 2)
        text = "".join(each.decode() for each in texts)
        facts = dict(part.split(":", 1) for part in text.split("\r\n") if ":" in part)
        # What the server does not count against its limit (buffers of replicas and of the append-only file).
        used = int(facts.get("used_memory", 0)) - int(facts.get("mem_not_counted_for_evict", 0))
        return Fill(int(count), used, int(facts.get("maxmemory", 0)))

    def server_facts(self, deadline: float | None = None) -> dict[str, str]:
        """INFO server, memory, persistence, replication and stats as texts."""
        with self._exchange("INFO", deadline) as line:
            if self.emulated:
                return {}
            text = line.call(resp.command("INFO", "server", "memory", "persistence", "replication", "stats")).decode()
        return dict(part.split(":", 1) for part in text.split("\r\n") if ":" in part)

    # --- plumbing ----------------------------------------------------------------------------------------------------

    def _exchange(self, what: str, deadline: float | None = None) -> wire.Exchange:
        """A wire for one exchange, with the driver's errors translated for callers that are not flows."""
        return wire.Exchange(self.wires, what, deadline)

    def _call(
        self,
        name: str,
        key_parts: Sequence[bytes],
        key_count: int,
        *arguments: Any,
        stamp: scripts.Stamp | None = None,
        under: scripts.Stamp | None = None,
        reads: bool | None = None,
        deadline: float | None = None,
    ) -> str:
        """Call a script. A recovery's scripts (given a ``stamp``) go by EVAL: its fence admits the server, nobody else does.

        What was decided from a look at SQL must go ``under`` the stamp of before that look: another thread may have been
        admitted to a newer epoch meanwhile, for which SQL may say something else.
        """
        script = scripts.stamped(name, stamp or under or self.stamp, self.emulated, reads)
        start = resp.bulk("EVAL") + resp.bulk(script.text) if stamp else script.call
        packed = packing.script_call(start, key_parts, key_count, *arguments)
        with self._exchange(name, deadline) as line:
            try:
                reply: bytes = line.call(packed)
            except redis.exceptions.NoScriptError:
                return "NOSCRIPT"
            return reply.decode(errors="backslashreplace")  # a stranger's record may be anything


def _is_over(deadline: float | None, error: redis.RedisError | OSError) -> redis.RedisError | OSError | None:
    """The error of a chunk that did not get through, if that was past the deadline."""
    return None if deadline is None or time.monotonic() < deadline else error
