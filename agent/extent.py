"""Extents: runs of bytes, as the kernels take them.

Owns the one representation that crosses into native code: a flat array("Q") of offset, length
pairs, ascending and not overlapping. Does no I/O.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from typing import TypeAlias

Extents: TypeAlias = "array[int]"
"""Flat array("Q"): offset 0, length 0, offset 1, length 1, ... in bytes."""


def pack(pairs: Iterable[tuple[int, int]]) -> Extents:
    """Return (offset, length) pairs as one flat array."""
    return array("Q", [number for pair in pairs for number in pair])


def pairs(extents: Extents) -> Iterator[tuple[int, int]]:
    """Iterate a flat array as (offset, length)."""
    return zip(extents[::2], extents[1::2], strict=True)


def total_bytes(extents: Extents) -> int:
    """Return the sum of the lengths."""
    return sum(extents[1::2])


def complement(ranges: Iterable[tuple[int, int]], size_bytes: int) -> Iterator[tuple[int, int]]:
    """Iterate what ascending (offset, length) `ranges` leave out of [0, size_bytes)."""
    position = 0
    for offset, length in ranges:
        if offset > position:
            yield position, offset - position
        position = max(position, offset + length)
    if position < size_bytes:
        yield position, size_bytes - position


def cut(ranges: Iterable[tuple[int, int]], max_bytes: int) -> Iterator[tuple[int, int]]:
    """Iterate the ranges in pieces of at most `max_bytes`."""
    for offset, length in ranges:
        for start in range(offset, offset + length, max_bytes):
            yield start, min(max_bytes, offset + length - start)


def align(
    ranges: Iterable[tuple[int, int]], unit_bytes: int, size_bytes: int
) -> Iterator[tuple[int, int]]:
    """Iterate ascending ranges grown to multiples of `unit_bytes`, merged, within the size."""
    begin = end = 0
    for offset, length in ranges:
        first = offset - offset % unit_bytes
        last = min(-(-(offset + length) // unit_bytes) * unit_bytes, size_bytes)
        if first > end:
            if end > begin:
                yield begin, end - begin
            begin = first
        end = max(end, last)
    if end > begin:
        yield begin, end - begin
