"""Cuts a round into batches, each the content of one frame. Pure.

Owns the order and size of what is sent; reads nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from agent.extent import Extents, cut, pack, total_bytes
from native.bitmap import DirtyBitmap
from native.frame import MAX_PAYLOAD_BYTES

GAP_BYTES = 16 * 1024
"""Clean gaps up to this are sent too: one longer read and write costs less than two short ones."""

MAX_EXTENTS = 1024
_HOLE_BYTES = 256 << 20
_HOLES_A_FRAME = 16


@dataclass(frozen=True, slots=True)
class Batch:
    """Extents of one volume for one frame; `hole` if they are known to read as zeros."""

    volume: int
    extents: Extents
    size_bytes: int
    hole: bool


def plan_dirty(volume: int, dirty: DirtyBitmap, gap_bytes: int = GAP_BYTES) -> Iterator[Batch]:
    """Iterate all that is marked, in ascending order."""
    position = 0
    while position < dirty.size_bytes:
        extents, position = dirty.batch(
            position, gap_bytes=gap_bytes, max_bytes=MAX_PAYLOAD_BYTES, max_extents=MAX_EXTENTS
        )
        if extents:
            yield Batch(volume, extents, total_bytes(extents), hole=False)


def plan_holes(volume: int, holes: DirtyBitmap) -> Iterator[Batch]:
    """Iterate what is marked, and known to hold no data: the target zeroes it."""
    return _plan_holes(volume, holes.extents())


def _plan_holes(volume: int, holes: Iterable[tuple[int, int]]) -> Iterator[Batch]:
    waiting: list[tuple[int, int]] = []
    for piece in cut(holes, _HOLE_BYTES):
        waiting.append(piece)
        if len(waiting) == _HOLES_A_FRAME:
            yield _hole_batch(volume, waiting)
            waiting = []
    if waiting:
        yield _hole_batch(volume, waiting)


def _hole_batch(volume: int, holes: list[tuple[int, int]]) -> Batch:
    extents = pack(holes)
    return Batch(volume, extents, total_bytes(extents), hole=True)
