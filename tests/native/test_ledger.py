"""What is known of chunks: marks of other sizes, reading what is stale, entering what was read."""

from __future__ import annotations

import errno
import random
from array import array
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from native import scan
from native.bitmap import DirtyBitmap
from native.blockio import BlockDevice
from native.buffer import AlignedBuffer
from native.chunk import digests
from native.frame import FrameError, gather, scatter
from native.stream import Receiver
from tests import devices
from tests.devices import FaultyDevice
from tests.native.bitmap_twin import Geometry, marked

CHUNK = 65536
BLOCK = 4096
SIZE = 9 * CHUNK + 512


@given(
    sizes=st.tuples(st.sampled_from([512, 4096, 65536, 1 << 20]), st.sampled_from([512, 65536])),
    size=st.integers(1, 40 * CHUNK),
    ranges=st.lists(st.tuples(st.integers(0, 40 * CHUNK), st.integers(0, 3 * CHUNK)), max_size=6),
)
def test_touch(sizes: tuple[int, int], size: int, ranges: list[tuple[int, int]]) -> None:
    fine, coarse = Geometry(size, sizes[0]), Geometry(size, sizes[1])
    marks, touched = fine.bitmap(), coarse.bitmap()
    expected: set[int] = set()
    for at, length in ranges:
        offset = at % size
        marks.set_range(offset, min(length, size - offset))
    for offset, length in marks.extents():
        first, last = offset // sizes[1], (offset + length - 1) // sizes[1]
        expected |= set(range(first, last + 1))
    touched.touch(marks)
    assert marked(touched) == expected


def test_touch_of_another_volume() -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        DirtyBitmap(SIZE, CHUNK).touch(DirtyBitmap(SIZE + 1, BLOCK))


class Ledger:
    def __init__(self, size: int = SIZE) -> None:
        self.table = bytearray(b"\xaa" * (-(-size // CHUNK) * 16))
        self.stale, self.reading = DirtyBitmap(size, CHUNK), DirtyBitmap(size, CHUNK)
        self.scratch = AlignedBuffer(1 << 20)

    def refresh(self, device: BlockDevice, offset: int, length: int) -> int:
        return scan.refresh(
            device, offset, length, self.scratch, self.table, self.stale, self.reading
        )

    def entry(self, index: int) -> bytes:
        return bytes(self.table[index * 16 : index * 16 + 16])


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return path


@given(stale=st.sets(st.integers(0, 9)), first=st.integers(0, 9), count=st.integers(1, 10))
def test_only_what_is_stale_in_the_range_is_read(stale: set[int], first: int, count: int) -> None:
    ledger, data = Ledger(), random.Random(2).randbytes(SIZE)
    for index in stale:
        ledger.stale.set_range(index * CHUNK, 1)
    wanted = {index for index in stale if first <= index < first + count}
    with devices.image_file(SIZE, data) as path, BlockDevice(str(path)) as device:
        length = min(count * CHUNK, SIZE - first * CHUNK)
        done = ledger.refresh(device, first * CHUNK, length)
    assert done == sum(min(CHUNK, SIZE - index * CHUNK) for index in wanted)
    for index in range(10):
        own = digests(data[index * CHUNK : (index + 1) * CHUNK])
        assert ledger.entry(index) == (own if index in wanted else b"\xaa" * 16)
    assert marked(ledger.stale) == stale - wanted
    assert marked(ledger.reading) == set()


def test_what_cannot_be_read_stays_stale(
    faulty_device: Callable[..., FaultyDevice],
) -> None:
    faulty = faulty_device(4 << 20)
    ledger = Ledger(faulty.size_bytes)
    ledger.stale.set_range(0, 3 * CHUNK)
    with BlockDevice(faulty.path) as device:
        with faulty.failing("pread"), pytest.raises(OSError) as caught:  # noqa: PT011
            ledger.refresh(device, 0, 4 * CHUNK)
        assert caught.value.errno == errno.EIO
        assert (marked(ledger.stale), marked(ledger.reading)) == ({0, 1, 2}, set())
        assert ledger.refresh(device, 0, 4 * CHUNK) == 3 * CHUNK
    assert marked(ledger.stale) == set()


def test_refresh_wants_whole_chunks(disk: Path) -> None:
    ledger = Ledger()
    with BlockDevice(str(disk)) as device:
        for offset, length in ((512, CHUNK), (0, CHUNK + 512), (0, SIZE + 512)):
            with pytest.raises(ValueError):  # noqa: PT011
                ledger.refresh(device, offset, length)
        ledger.table = ledger.table[:-16]
        with pytest.raises(ValueError):  # noqa: PT011
            ledger.refresh(device, 0, CHUNK)


EXTENTS = st.lists(
    st.tuples(st.integers(0, 145), st.integers(1, 40)), min_size=1, max_size=4
)  # in sectors of 4 KiB


@given(extents=EXTENTS)
def test_reading_for_sending_enters_whole_chunks_only(extents: list[tuple[int, int]]) -> None:
    ledger, data = Ledger(), random.Random(3).randbytes(SIZE)
    ledger.stale.set_all()
    pairs, at, whole = array("Q"), 0, set()
    for first, count in sorted(extents):
        offset = max(first * BLOCK, at)
        end = min((first + count) * BLOCK, SIZE)
        end = SIZE if SIZE - end < BLOCK else end
        if offset >= end:
            continue
        pairs.extend((offset, end - offset))
        whole |= {
            index
            for index in range(10)
            if offset <= index * CHUNK and min((index + 1) * CHUNK, SIZE) <= end
        }
        at = end + BLOCK
    if not pairs:
        return
    with devices.image_file(SIZE, data) as path, BlockDevice(str(path)) as device:
        gather(
            device,
            pairs,
            ledger.scratch,
            volume=0,
            generation=1,
            sequence=1,
            digests=ledger.table,
            stale=ledger.stale,
        )
    assert marked(ledger.stale) == set(range(10)) - whole
    for index in range(10):
        own = digests(data[index * CHUNK : (index + 1) * CHUNK])
        assert ledger.entry(index) == (own if index in whole else b"\xaa" * 16)


def frame_of(path: Path, *extents: int, generation: int = 1) -> bytes:
    with BlockDevice(str(path)) as device:
        scratch = AlignedBuffer(1 << 20)
        return gather(
            device, array("Q", extents), scratch, volume=0, generation=generation, sequence=1
        )


def test_who_writes_marks_first(disk: Path, tmp_path: Path) -> None:
    target = tmp_path / "target.img"
    target.write_bytes(bytes(SIZE))
    written = DirtyBitmap(SIZE, CHUNK)
    frame = frame_of(disk, CHUNK + 512, 512, 4 * CHUNK - 512, 1024, SIZE - 512, 512)
    scratch = AlignedBuffer(1 << 20)
    with BlockDevice(str(target), writable=True) as device:

        def write(generation: int) -> None:
            scatter(
                device,
                frame,
                scratch,
                size_bytes=SIZE,
                volume=0,
                generation=generation,
                written=written,
            )

        with pytest.raises(FrameError):
            write(2)  # a frame of another generation is not written
        assert marked(written) == set()
        write(1)
    assert marked(written) == {1, 3, 4, 9}


def test_a_write_that_fails_has_been_marked(faulty_device: Callable[..., FaultyDevice]) -> None:
    faulty = faulty_device(1 << 20)
    written = DirtyBitmap(faulty.size_bytes, CHUNK)
    with devices.image_file(1 << 20, b"x" * (1 << 20)) as source:
        frame = frame_of(source, 0, CHUNK)
    with (
        BlockDevice(faulty.path, writable=True) as device,
        faulty.failing("pwrite"),
        pytest.raises(OSError),  # noqa: PT011
    ):
        scatter(
            device,
            frame,
            AlignedBuffer(1 << 20),
            size_bytes=faulty.size_bytes,
            volume=0,
            generation=1,
            written=written,
        )
    assert marked(written) == {0}


def test_marks_of_another_size_are_refused(disk: Path) -> None:
    with BlockDevice(str(disk)) as device, pytest.raises(ValueError):  # noqa: PT011
        Receiver([device], [SIZE], connections=1, generation=1, written=[DirtyBitmap(512, CHUNK)])
