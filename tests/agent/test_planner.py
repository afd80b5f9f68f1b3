"""Batches against a set of blocks: all that is marked is sent, once, and holes are the rest."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from unittest.mock import patch

from hypothesis import given
from hypothesis import strategies as st

from agent import planner
from agent.extent import pairs
from agent.planner import MAX_EXTENTS, Batch, plan_dirty, plan_holes
from native.bitmap import DirtyBitmap
from native.frame import MAX_PAYLOAD_BYTES, zeros

BLOCK = 4096
BLOCKS = 600
SIZE = BLOCKS * BLOCK - 1000
"""More than one frame's payload; the last block is short."""

blocks = st.one_of(
    st.sets(st.integers(0, BLOCKS - 1)),
    st.builds(
        lambda a, n: set(range(a, min(a + n, BLOCKS))), st.integers(0, BLOCKS - 1), st.just(400)
    ),
)


def bitmap_of(marked: set[int]) -> DirtyBitmap:
    bitmap = DirtyBitmap(SIZE, BLOCK)
    for block in marked:
        bitmap.set_range(block * BLOCK, 1)
    return bitmap


def blocks_of(batches: Iterable[Batch]) -> list[int]:
    """Every block of the batches, in order; one that is sent twice is there twice."""
    return [
        number
        for batch in batches
        for offset, length in pairs(batch.extents)
        for number in range(offset // BLOCK, -(-(offset + length) // BLOCK))
    ]


def bridged(marked: set[int], gap: int) -> list[int]:
    """What is marked, and the gaps between of at most `gap` blocks."""
    found = sorted(marked)
    filled = set(found)
    for a, b in itertools.pairwise(found):
        if b - a - 1 <= gap:
            filled.update(range(a, b))
    return sorted(filled)


def bytes_in(numbers: list[int]) -> int:
    return sum(min(BLOCK, SIZE - number * BLOCK) for number in numbers)


@given(blocks, st.integers(0, 8))
def test_what_is_marked_is_sent_once(marked: set[int], gap: int) -> None:
    batches = list(plan_dirty(3, bitmap_of(marked), gap * BLOCK))
    sent = blocks_of(batches)
    assert sent == sorted(set(sent))
    assert marked <= set(sent) <= set(bridged(marked, gap))
    for batch in batches:
        assert (batch.volume, batch.hole) == (3, False)
        assert batch.size_bytes == bytes_in(blocks_of([batch])) <= MAX_PAYLOAD_BYTES
        assert len(batch.extents) // 2 <= MAX_EXTENTS


@given(st.sets(st.integers(0, 255)), st.integers(0, 8))
def test_short_gaps_are_bridged(marked: set[int], gap: int) -> None:
    """Exactly, where all fits one frame."""
    assert blocks_of(plan_dirty(0, bitmap_of(marked), gap * BLOCK)) == bridged(marked, gap)


@given(blocks)
def test_holes_are_planned_whole(marked: set[int]) -> None:
    with (
        patch.object(planner, "_HOLE_BYTES", 16 * BLOCK),
        patch.object(planner, "_HOLES_A_FRAME", 3),
    ):
        holes = list(plan_holes(1, bitmap_of(marked)))
    assert all(batch.hole for batch in holes)
    assert set(blocks_of(holes)) == marked
    assert all(len(batch.extents) // 2 <= 3 for batch in holes)
    assert sum(batch.size_bytes for batch in holes) == bytes_in(sorted(marked))
    for batch in holes:
        zeros(batch.extents, volume=1, generation=1, sequence=1)  # fits a frame


def test_nothing_and_everything() -> None:
    assert list(plan_dirty(0, bitmap_of(set()))) == []
    assert list(plan_holes(0, bitmap_of(set()))) == []
    (empty,) = plan_holes(0, bitmap_of(set(range(BLOCKS))))
    assert empty.hole
    assert empty.size_bytes == SIZE
