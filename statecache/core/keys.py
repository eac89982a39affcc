"""The only place that spells a Redis key.

``{<namespace>:<pp>}`` is the hash tag: a partition lies in one Redis Cluster slot, and as ours is the first brace pair of
the key, ids may hold braces of their own.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

from statecache.core import errors

_NAMESPACE = re.compile(r"[A-Za-z0-9_.-]{1,64}")
PARTITION_COUNT_MAX = 1024


def partition_of(machine: str, id: str, partition_count: int) -> int:
    """Return the partition of an instance: CRC32 of ``machine:id`` modulo the store's fixed partition count."""
    return partition_of_address(f"{machine}:{id}", partition_count)


def partition_of_address(address: str, partition_count: int) -> int:
    """The same for an address, ``machine:id``."""
    return zlib.crc32(address.encode()) % partition_count


def partitions_of(machine: str, encoded_ids: Iterable[bytes], partition_count: int) -> list[int]:
    """``partition_of`` each of many instances of one machine."""
    begun = zlib.crc32(f"{machine}:".encode())  # the rest of an address goes on from it
    return [zlib.crc32(id, begun) % partition_count for id in encoded_ids]


@dataclass(frozen=True, slots=True)
class Keyspace:
    """The keys of one namespace."""

    namespace: str
    partition_count: int

    def __post_init__(self) -> None:
        if not _NAMESPACE.fullmatch(self.namespace):
            raise errors.ConfigurationError(
                f"namespace {self.namespace!r} is refused: 1 to 64 letters, digits, '_', '.' or '-' are allowed"
            )
        if not 1 <= self.partition_count <= PARTITION_COUNT_MAX:
            raise errors.ConfigurationError(
                f"partition count {self.partition_count} is refused: 1 to {PARTITION_COUNT_MAX} are allowed"
            )

    def tag(self, partition: int) -> str:
        return f"{{{self.namespace}:{partition:02d}}}"

    def meta(self, partition: int) -> str:
        return f"{self.tag(partition)}:meta"

    def log(self, partition: int) -> str:
        return f"{self.tag(partition)}:log"

    def due(self, partition: int) -> str:
        """The deadlines of a partition: a sorted set of "machine:id" by ms."""
        return f"{self.tag(partition)}:due"

    def claims(self, partition: int) -> str:
        """The claims of a partition, for those who look: a sorted set of "machine:id" by the ms of their end."""
        return f"{self.tag(partition)}:claims"

    def instance(self, partition: int, machine: str, id: str) -> str:
        return f"{self.tag(partition)}:i:{machine}:{id}"

    def partition_of(self, machine: str, id: str) -> int:
        return partition_of(machine, id, self.partition_count)

    def instances(self, machine: str, ids: Iterable[str]) -> list[bytes]:
        """``instance`` of many of one machine, each in its partition, encoded."""
        begins = [self.instance(partition, machine, "").encode() for partition in range(self.partition_count)]
        encoded = list(map(str.encode, ids))
        partitions = partitions_of(machine, encoded, self.partition_count)
        return [begins[partition] + id for partition, id in zip(partitions, encoded, strict=True)]
