"""Marking, taking and the geometry of dirty bitmaps, against a set of blocks."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from native.bitmap import MAX_BITMAP_BYTES, DirtyBitmap, fit_block_size
from tests.native.bitmap_twin import Geometry, block_sets, geometries, marked, ranges


@given(st.data())
def test_every_operation_does_what_a_set_does(data: st.DataObject) -> None:
    geometry = data.draw(geometries())
    bitmaps, twins = (geometry.bitmap(), geometry.bitmap()), (set[int](), set[int]())
    every = set(range(geometry.block_count))
    names = ["set", "set", "set", "clear_range", "set_all", "clear", "take", "merge", "subtract"]
    for name in data.draw(st.lists(st.sampled_from(names), max_size=12)):
        which = data.draw(st.integers(0, 1))
        bitmap, other = bitmaps[which], bitmaps[1 - which]
        twin, other_twin = twins[which], twins[1 - which]
        offset, length = data.draw(ranges(geometry))
        if name == "set":
            bitmap.set_range(offset, length)
            twin |= geometry.touched(offset, length)
        elif name == "clear_range":
            bitmap.clear_range(offset, length)
            twin -= geometry.contained(offset, length)
        elif name == "set_all":
            bitmap.set_all()
            twin |= every
        elif name == "clear":
            bitmap.clear()
            twin.clear()
        elif name == "take":
            assert bitmap.take(other) == len(twin)
            other_twin |= twin
            twin.clear()
        elif name == "merge":
            bitmap.merge(other)
            twin |= other_twin
        else:
            bitmap.subtract(other)
            twin -= other_twin
        assert [marked(each) for each in bitmaps] == list(twins)
        assert [each.count() for each in bitmaps] == [len(each) for each in twins]
        assert [each.count_bytes() for each in bitmaps] == [geometry.size_of(t) for t in twins]


@given(st.data())
def test_what_is_common_is_added_to_what_was_there(data: st.DataObject) -> None:
    geometry = data.draw(geometries())
    into, one, other = (data.draw(block_sets(geometry)) for _ in range(3))
    bitmaps = [geometry.bitmap(blocks) for blocks in (into, one, other)]
    bitmaps[0].merge_common(*bitmaps[1:])
    assert [marked(each) for each in bitmaps] == [into | one & other, one, other]
    # A bitmap may be one of them: it stays as it is.
    bitmaps[1].merge_common(bitmaps[1], bitmaps[2])
    assert marked(bitmaps[1]) == one


@given(st.data())
def test_is_marked_looks_at_the_block_of_a_byte(data: st.DataObject) -> None:
    geometry = data.draw(geometries())
    blocks = data.draw(block_sets(geometry))
    offset = data.draw(st.integers(0, geometry.size_bytes - 1))
    assert geometry.bitmap(blocks).is_marked(offset) == (offset // geometry.block_bytes in blocks)


@pytest.mark.parametrize(
    ("offset", "length"), [(-1, 1), (0, -1), (0, 8193), (8193, 0), (8192, 1), (1 << 70, 1)]
)
def test_a_range_out_of_bounds_is_refused_and_changes_nothing(offset: int, length: int) -> None:
    bitmap = DirtyBitmap(8192)
    with pytest.raises(ValueError, match="not within 8192 bytes"):
        bitmap.set_range(offset, length)
    assert bitmap.count() == 0
    bitmap.set_all()
    with pytest.raises(ValueError, match="not within 8192 bytes"):
        bitmap.clear_range(offset, length)
    assert bitmap.count() == 2


@pytest.mark.parametrize("offset", [-1, 8192, 1 << 64])
def test_is_marked_out_of_bounds_is_refused(offset: int) -> None:
    with pytest.raises(ValueError, match="not within"):
        DirtyBitmap(8192).is_marked(offset)


@pytest.mark.parametrize(
    ("size", "block"),
    [(0, 4096), (-1, 4096), (1 << 63, 4096), (1, 0), (1, 256), (1, 4097), (1, -4096), (1, 1 << 63)],
)
def test_an_impossible_geometry_is_refused(size: int, block: int) -> None:
    with pytest.raises(ValueError, match=r"size_bytes is -?\d+: it must be"):
        DirtyBitmap(size, block)
    with pytest.raises(ValueError, match=r"size_bytes is -?\d+: it must be"):
        fit_block_size(size, block)


def test_bitmaps_of_different_geometry_do_not_mix() -> None:
    bitmap = DirtyBitmap(8192)
    for other in (DirtyBitmap(8191), DirtyBitmap(8192, 512)):
        for operation in (bitmap.take, bitmap.merge, bitmap.subtract):
            with pytest.raises(ValueError, match="bitmaps differ"):
                operation(other)
        for pair in ((bitmap, other), (other, bitmap)):
            with pytest.raises(ValueError, match="bitmaps differ"):
                bitmap.merge_common(*pair)
    with pytest.raises(ValueError, match="into itself"):
        bitmap.take(bitmap)
    with pytest.raises(TypeError):
        bitmap.take(None)  # type: ignore[arg-type]


def test_a_volumes_bitmap_is_kept_small_by_larger_blocks() -> None:
    tib = 1 << 40
    assert fit_block_size(tib, 4096) == 4096
    assert fit_block_size(tib + 1, 4096) == 8192
    assert fit_block_size(16 * tib, 4096) == 65536
    assert fit_block_size(1, 512) == 512
    size = (1 << 63) - 1
    assert memoryview(DirtyBitmap(size, fit_block_size(size, 512))).nbytes <= MAX_BITMAP_BYTES


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_sixteen_tebibytes_cost_only_what_is_touched() -> None:
    before, size = resident_bytes(), 16 << 40
    bitmap = DirtyBitmap(size)
    bitmap.set_range(size - 1, 1)
    bitmap.set_range(4096, 1)
    assert bitmap.count() == 2
    assert list(bitmap.extents()) == [(4096, 4096), (size - 4096, 4096)]
    assert resident_bytes() - before < 64 << 20  # of 512 MiB


def test_what_is_cleared_or_not_common_costs_no_memory() -> None:
    before, size = resident_bytes(), 1 << 40
    full, kept, common = (DirtyBitmap(size) for _ in range(3))
    for each in (full, kept):
        each.set_all()
    assert resident_bytes() - before > 60 << 20
    view = memoryview(full)
    full.clear()
    full.set_range(size // 2, 1)
    common.merge_common(kept, full)
    kept.clear()
    assert resident_bytes() - before < 16 << 20
    assert list(common.extents()) == list(full.extents()) == [(size // 2, 4096)]
    assert view[size // 2 // 4096 // 64] == 1  # the view is still of the same words


def test_the_words_are_a_writable_buffer() -> None:
    bitmap = DirtyBitmap(70 * 4096)
    view = memoryview(bitmap)
    assert (view.format, view.itemsize, view.shape, view.strides) == ("Q", 8, (2,), (8,))
    view[1] = 1
    assert bitmap.is_marked(64 * 4096)
    del bitmap
    assert view[1] == 1  # the view keeps the memory


def test_marks_in_a_shared_buffer_are_seen_on_both_sides() -> None:
    words = array("Q", bytes(8 * 8))
    bitmap = DirtyBitmap(65 * 4096, 4096, words)
    bitmap.set_range(0, 4096)
    assert words[0] == 1
    words[1] = 1
    assert marked(bitmap) == {0, 64}
    bitmap.set_all()
    assert list(words) == [2**64 - 1, 1, 0, 0, 0, 0, 0, 0]
    del words
    assert bitmap.count() == 65  # the bitmap keeps the buffer


def test_bits_past_the_last_block_are_never_believed() -> None:
    words = array("Q", [0, 2**64 - 1, 2**64 - 1])
    bitmap, into = DirtyBitmap(65 * 4096, 4096, words), DirtyBitmap(65 * 4096)
    assert (bitmap.count(), bitmap.count_bytes()) == (1, 4096)
    assert list(bitmap.extents(gap_bytes=1 << 20)) == [(64 * 4096, 4096)]
    assert marked(DirtyBitmap.loads(bitmap.dumps())) == {64}
    into.merge(bitmap)
    assert marked(into) == {64}
    into.clear()
    into.merge_common(bitmap, bitmap)
    assert marked(into) == {64}
    into.clear()
    assert bitmap.take(into) == 1
    assert marked(into) == {64}
    assert words[2] == 2**64 - 1  # not ours to touch


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (bytes(16), "writable"),
        (bytearray(15), "15 bytes: 16 are needed"),
        (memoryview(bytearray(40))[1:], "aligned"),
        (memoryview(array("Q", bytes(64)))[::2], "contiguous"),
    ],
)
def test_a_buffer_that_cannot_hold_the_words_is_refused(
    words: bytes | bytearray | memoryview, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        DirtyBitmap(65 * 4096, 4096, words)


def test_a_refused_buffer_is_let_go() -> None:
    words = bytearray(15)
    with pytest.raises(ValueError, match="needed"):
        DirtyBitmap(65 * 4096, 4096, words)
    words.append(0)  # BufferError if it were still exported


# Large enough that a pass takes longer than it takes to wake the other threads.
CONTENDED = Geometry((1 << 21) * 4096, 4096)
SHARED = CONTENDED.bitmap()
ROUNDS = 30


def take_while(*setters: Callable[[], None]) -> tuple[int, DirtyBitmap]:
    """Take from SHARED again and again while the setters run, once more when they are done.

    Returns what the takes counted, and what they collected.
    """
    shared, into = SHARED, CONTENDED.bitmap()
    barrier, left = threading.Barrier(len(setters) + 1), threading.Semaphore(0)

    def run(job: Callable[[], None]) -> None:
        barrier.wait()
        job()
        left.release()

    def take() -> int:
        barrier.wait()
        taken, running = 0, len(setters)
        while running:
            taken += shared.take(into)
            running -= left.acquire(blocking=False)
        return taken + shared.take(into)

    with ThreadPoolExecutor(len(setters) + 1) as pool:
        taken = pool.submit(take)
        for job in [pool.submit(run, setter) for setter in setters]:
            job.result()
        return taken.result(), into


def test_no_mark_is_lost_when_threads_merge_while_another_takes() -> None:
    """Each thread sets its own bits of the same words, so that each word is fought over."""
    parts = CONTENDED.bitmap(), CONTENDED.bitmap()
    for part, pattern in zip(parts, (0x5555555555555555, 0xAAAAAAAAAAAAAAAA), strict=True):
        memoryview(part)[:] = array("Q", [pattern]) * (CONTENDED.block_count // 64)
    for _ in range(ROUNDS):
        taken, into = take_while(*(partial(SHARED.merge, part) for part in parts))
        # Each bit was set once: a lost one would lack here, one taken twice would be too many.
        assert taken == CONTENDED.block_count
        assert into.count() == CONTENDED.block_count


def test_no_mark_is_lost_when_threads_set_ranges_while_another_takes() -> None:
    step = 1001 * 4096  # borders fall inside words

    def set_every_other(first: int) -> None:
        for offset in range(first * step, CONTENDED.size_bytes, 2 * step):
            SHARED.set_range(offset, min(step, CONTENDED.size_bytes - offset))

    for _ in range(ROUNDS):
        taken, into = take_while(partial(set_every_other, 0), partial(set_every_other, 1))
        assert taken == CONTENDED.block_count
        assert into.count() == CONTENDED.block_count
