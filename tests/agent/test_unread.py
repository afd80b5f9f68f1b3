"""What could not be read stays pending, is counted, and is never taken for sent."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.disk import SourceDisk, open_source
from agent.migration import Scheme, Volume
from agent.source.reconcile import equal_runs
from agent.store import Store
from agent.unread import UnreadBlocks
from native.bitmap import DirtyBitmap
from native.blockio import Unread
from native.chunk import DIGEST_BYTES

BLOCK = 65536
SIZE = 10 * BLOCK + 512


def unread(offset: int, length: int = 4096, volume: int = 0) -> Unread:
    return Unread(volume, offset, length, errno.EIO)


def marks(*numbers: int) -> DirtyBitmap:
    bitmap = DirtyBitmap(SIZE, BLOCK)
    for number in numbers:
        bitmap.set_range(number * BLOCK, 1)
    return bitmap


def numbers(bitmap: DirtyBitmap) -> list[int]:
    return [n for n in range(bitmap.block_count) if bitmap.is_marked(n * BLOCK)]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SourceDisk]:
    image = tmp_path / "disk.img"
    image.write_bytes(b"x" * SIZE)
    opened = open_source(Volume(str(image), "/target"), (str(image),))
    made = SourceDisk(opened, Scheme.SCAN, BLOCK, tmp_path, Store(tmp_path / "kept"))
    try:
        made.start()
        yield made
    finally:
        made.close()


def test_only_what_was_read_is_settled(disk: SourceDisk) -> None:
    """A block is kept whole if any of it could not be read; the last one may be short."""
    disk.choose()
    kept = disk.settle([unread(BLOCK + 4096), unread(3 * BLOCK - 1, 2), unread(10 * BLOCK, 512)])
    assert numbers(disk.pending) == [1, 2, 3, 10]
    assert kept == 3 * BLOCK + 512
    assert [(bad.offset_bytes, bad.length_bytes) for bad in disk.bad_blocks()] == [
        (BLOCK, BLOCK),
        (2 * BLOCK, BLOCK),
        (3 * BLOCK, BLOCK),
        (10 * BLOCK, 512),
    ]


def test_a_part_of_what_is_pending_is_settled_likewise(disk: SourceDisk) -> None:
    disk.choose_within(0, 5 * BLOCK)
    assert disk.settle([unread(BLOCK)]) == BLOCK
    assert numbers(disk.pending) == [1, *range(5, 11)]


class Watched:
    """A bitmap that notes its marks after each change."""

    def __init__(self, bitmap: DirtyBitmap) -> None:
        self._bitmap = bitmap
        self.seen: list[list[int]] = []

    def __getattr__(self, name: str) -> object:
        def call(*words: object) -> object:
            answer = getattr(self._bitmap, name)(*words)
            self.seen.append(numbers(self._bitmap))
            return answer

        return call


def test_what_was_not_read_is_pending_at_every_moment(
    disk: SourceDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent may be killed between any two steps, and the next one finds the bitmap's file."""
    watched = Watched(disk.pending)
    disk.choose_within(0, SIZE)
    monkeypatch.setattr(disk, "pending", watched)
    disk.settle([unread(4 * BLOCK)])
    assert watched.seen
    assert all(4 in marked for marked in watched.seen)
    assert watched.seen[-1] == [4]


def test_tries_are_counted_by_rounds_that_asked(disk: SourceDisk) -> None:
    blocks = UnreadBlocks("/dev/x", SIZE, BLOCK)
    every = marks(*range(11))

    def tries(pending: DirtyBitmap) -> list[tuple[int, int]]:
        return [(bad.offset_bytes // BLOCK, bad.tries) for bad in blocks.find(pending)]

    blocks.note(every, [unread(BLOCK), unread(5 * BLOCK)])
    assert tries(every) == [(1, 1), (5, 1)]
    blocks.note(marks(1), [unread(BLOCK)])  # 5 was held back
    assert tries(every) == [(1, 2), (5, 1)]
    blocks.note(marks(1, 5), [unread(5 * BLOCK)])  # 1 has healed
    assert tries(every) == [(5, 2)]
    blocks.note(marks(1), [unread(BLOCK)])
    assert tries(every) == [(1, 1), (5, 2)]
    assert tries(marks(1)) == [(1, 1)]  # 5 was found equal by a comparison
    assert tries(every) == [(1, 1)]


def test_a_bad_gap_that_was_read_along_is_of_no_interest(disk: SourceDisk) -> None:
    disk.choose()
    disk.settle()
    disk.pending.set_range(0, 1)
    disk.pending.set_range(2 * BLOCK, 1)
    disk.choose()
    assert disk.settle([unread(BLOCK)]) == 0
    assert disk.bad_blocks() == []
    assert numbers(disk.pending) == []


def test_errors_name_the_place_and_the_tries() -> None:
    blocks = UnreadBlocks("/dev/x", SIZE, BLOCK)
    for _ in range(3):
        blocks.note(marks(2), [unread(2 * BLOCK + 8192)])
    (bad,) = blocks.find(marks(2))
    error = blocks.error(bad)
    assert error.values == {
        "path": "/dev/x",
        "errno": "EIO",
        "side": "source",
        "offset_bytes": str(2 * BLOCK),
        "length_bytes": str(BLOCK),
        "tries": "3",
    }
    assert "65536 bytes at offset 131072" in str(error)
    refusal = blocks.refusal(bad)
    assert (refusal.reason, refusal.values["offset_bytes"]) == ("SOURCE_UNREADABLE", "131072")


def test_a_chunk_that_was_not_read_is_not_equal() -> None:
    same = bytes(4 * DIGEST_BYTES)  # also what is put in place of what was not read
    assert list(equal_runs(same, same)) == [(0, 4)]
    assert list(equal_runs(same, same, {1})) == [(0, 1), (2, 2)]
    assert list(equal_runs(same, same, {0, 3})) == [(1, 2)]
