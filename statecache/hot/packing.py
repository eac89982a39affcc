"""What the scripts are asked, as the flat lists that they unpack: items to apply, instances to bring back."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from statecache.core import items
from statecache.hot import resp

HYDRATE_BYTES_MAX = 4 * 2**20
"""What one script call brings back at most, but for a single instance: Redis refuses an argument of 512 MB."""
Cold = tuple[int, str, str, str, str, Mapping[str, Any]]
"""An instance to bring back: (partition, "machine:id", text of ``@``, ring, SQL's watermark, the fields' JSON texts by name, as
bytes or what is read like them)."""


def script_call(start: bytes, key_parts: Sequence[bytes], key_count: int, *arguments: Any) -> bytes:
    return b"".join(
        [
            b"*%d\r\n" % (3 + key_count + len(arguments)),
            start,
            resp.bulk(key_count),
            *key_parts,
            *[resp.bulk(argument) for argument in arguments],
        ]
    )


def cut(rows: Sequence[Cold]) -> list[Sequence[Cold]]:
    """Rows in parts of up to ``HYDRATE_BYTES_MAX``; a single one may take more."""
    sizes = [sum(map(len, texts.values())) for *_, texts in rows]
    if sum(sizes) <= HYDRATE_BYTES_MAX:
        return [rows]
    parts, begin, left = [], 0, HYDRATE_BYTES_MAX
    for place, size in enumerate(sizes):
        if size > left and place > begin:
            parts.append(rows[begin:place])
            begin, left = place, HYDRATE_BYTES_MAX
        left -= size
    return [*parts, rows[begin:]]


def values_of_many(chunk: Sequence[items.Item]) -> tuple[Collection[int], list[object]]:
    """The partitions that a chunk touches, and what ``apply.lua`` reads of it."""
    partitions: dict[int, int] = {}
    moves: dict[items.MoveSpec, int] = {}
    shapes: dict[tuple[str, ...], int] = {}
    flat: list[object] = []
    for item in chunk:
        partition = partitions.get(item.partition)
        if partition is None:
            partition = partitions[item.partition] = len(partitions) + 1
        move = moves.get(item.move)
        if move is None:
            move = moves[item.move] = len(moves) + 1
        shape = shapes.get(item.names)
        if shape is None:
            shape = shapes[item.names] = len(shapes) + 1
        item.pack_into(flat, partition, move, shape)
    values: list[object] = [len(moves)]
    for spec in moves:
        values += spec.values
    values += _shapes_packed(shapes)
    values += flat
    return partitions, values


def values_of_one(item: items.Item) -> tuple[Collection[int], list[object]]:
    """The same for one item, which needs no numbering: two thirds of the time."""
    values = [1, *item.move.values, *_shapes_packed((item.names,))]
    item.pack_into(values, 1, 1, 1)
    return (item.partition,), values


def _shapes_packed(shapes: Collection[Sequence[str]]) -> list[object]:
    """What ``include/shapes.lua`` reads."""
    values: list[object] = [len(shapes)]
    for names in shapes:
        values.append(len(names))
        values += names
    return values


def cold_values(rows: Sequence[Cold]) -> tuple[list[int], list[object]]:
    """The partitions that are looked at, one for each watermark that stands in the rows, and what ``hydrate.lua`` reads."""
    looks: dict[tuple[int, str], int] = {}
    shapes: dict[tuple[str, ...], int] = {}
    flat: list[object] = []
    for partition, name, own, ring, watermark, texts in rows:
        place = looks.setdefault((partition, watermark), len(looks) + 1)
        flat += (place, name, own, ring, shapes.setdefault(tuple(texts), len(shapes) + 1))
        flat += [str(text, "utf-8") for text in texts.values()]
    values = [*[watermark for _, watermark in looks], *_shapes_packed(shapes), *flat]
    return [partition for partition, _ in looks], values
