"""Whole-range passes against a table made with the xxhash package."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from native import scan
from native.bitmap import DirtyBitmap
from native.blockio import MAX_UNREAD, BlockDevice
from native.buffer import AlignedBuffer
from native.chunk import DIGEST_BYTES
from tests import content, devices
from tests.devices import FaultyDevice, LoopDevice

CHUNK = 65536
MIB = 1 << 20


def table_of(disk: bytes) -> bytearray:
    """The twin: a digest a chunk, zero bytes for zeros."""
    table = bytearray()
    for offset in range(0, len(disk), CHUNK):
        piece = disk[offset : offset + CHUNK]
        table += xxhash.xxh3_128_digest(piece) if any(piece) else bytes(16)
    return table


def chunky(rng: random.Random, size: int) -> bytes:
    """Chunks that are zero, zero but for their last byte, or random."""
    kinds = (bytes(CHUNK), bytes(CHUNK - 1) + b"\1", rng.randbytes(CHUNK))
    return b"".join(rng.choice(kinds) for _ in range(-(-size // CHUNK)))[:size]


def marked(bitmap: DirtyBitmap) -> set[int]:
    """The chunks that are marked; each must be marked whole."""
    return {
        index
        for offset, length in bitmap.extents()
        for index in range(offset // CHUNK, -(-(offset + length) // CHUNK))
    }


@pytest.fixture
def scratch() -> AlignedBuffer:
    return AlignedBuffer(3 * CHUNK + 100)


class TestDigest:
    @given(seed=st.integers(0, 2**32), size=st.integers(1, 12 * CHUNK), first=st.integers(0, 11))
    def test_files_of_any_size_from_any_chunk(self, seed: int, size: int, first: int) -> None:
        offset = min(first, (size - 1) // CHUNK) * CHUNK
        disk = chunky(random.Random(seed), size)
        with devices.image_file(size, disk) as path, BlockDevice(str(path)) as device:
            found = scan.digest(device, offset, size - offset, AlignedBuffer(3 * CHUNK))
        assert found == table_of(disk[offset:])

    @pytest.mark.parametrize("sector_size", [512, 4096])
    def test_devices_and_partitions(
        self, loop_device: Callable[..., LoopDevice], scratch: AlignedBuffer, sector_size: int
    ) -> None:
        loop = loop_device(8 * MIB, sector_size, partitions=True)
        content.fill(loop.partitions[1], seed=4)
        for path in (loop.path, *loop.partitions):
            disk = content.read_all(path)
            with BlockDevice(path) as device:
                assert scan.digest(device, 0, len(disk), scratch) == table_of(disk)

    def test_a_volume_that_ends_within_a_block_of_its_device(
        self, loop_device: Callable[..., LoopDevice], scratch: AlignedBuffer
    ) -> None:
        loop = loop_device(MIB, 4096)
        content.fill(loop.path, seed=5)
        size = 3 * CHUNK + 4096 + 512
        with BlockDevice(loop.path) as device:
            found = scan.digest(device, 0, size, scratch)
        assert found == table_of(content.read_all(loop.path)[:size])

    def test_beyond_the_end_is_an_error(
        self, image_file: Callable[..., Path], scratch: AlignedBuffer
    ) -> None:
        path = image_file(4 * CHUNK)
        with BlockDevice(str(path)) as device:
            with pytest.raises(OSError, match="failed at 262144") as caught:
                scan.digest(device, 0, 4 * CHUNK + 1, scratch)
            assert caught.value.errno == errno.EIO
            with path.open("r+b") as file:
                file.truncate(3 * CHUNK + 7)
            with pytest.raises(OSError, match="failed at 196615"):
                scan.digest(device, 0, 4 * CHUNK, scratch)

    def test_a_fault_names_the_place(
        self, faulty_device: Callable[..., FaultyDevice], scratch: AlignedBuffer
    ) -> None:
        faulty = faulty_device(4 * MIB)
        with (
            BlockDevice(faulty.path) as device,
            faulty.failing("pread"),
            pytest.raises(OSError, match="at offset 65536") as caught,
        ):
            scan.digest(device, CHUNK, CHUNK, scratch)
        assert (caught.value.errno, caught.value.filename) == (errno.EIO, faulty.path)

    def test_a_disk_that_fails_everywhere_is_an_error(
        self, faulty_device: Callable[..., FaultyDevice], scratch: AlignedBuffer
    ) -> None:
        """MAX_UNREAD // 4 chunks are marked, as they may differ; the next one is too many."""
        most = MAX_UNREAD // 4
        faulty = faulty_device((most + 1) * CHUNK)
        marks = DirtyBitmap((most + 1) * CHUNK, CHUNK)
        table = bytes((most + 1) * DIGEST_BYTES)
        with BlockDevice(faulty.path) as device, faulty.failing("pread"):
            assert scan.compare(device, 0, most * CHUNK, scratch, table, marks) == most * CHUNK
            with pytest.raises(OSError, match=f"at offset {most * CHUNK}") as caught:
                scan.compare(device, 0, (most + 1) * CHUNK, scratch, table, marks)
        assert (caught.value.errno, caught.value.filename) == (errno.EIO, faulty.path)
        assert marks.count() == most


class TestCompare:
    @given(seed=st.integers(0, 2**32), size=st.integers(1, 12 * CHUNK))
    def test_exactly_the_chunks_that_differ_are_marked(self, seed: int, size: int) -> None:
        rng = random.Random(seed)
        old = chunky(rng, size)
        new = bytearray(old)
        for position in (rng.randrange(size) for _ in range(rng.randrange(4))):
            new[position] ^= 1
        changed = {i // CHUNK for i in range(size) if new[i] != old[i]}
        marks = DirtyBitmap(size, rng.choice((4096, CHUNK, 4 * CHUNK)))
        with devices.image_file(size, bytes(new)) as path, BlockDevice(str(path)) as device:
            count = scan.compare(device, 0, size, AlignedBuffer(2 * CHUNK), table_of(old), marks)
        assert count == sum(min(CHUNK, size - i * CHUNK) for i in changed)
        if marks.block_size_bytes <= CHUNK:
            assert marked(marks) == changed
            assert marks.count_bytes() == count
        else:
            assert marked(marks) >= changed

    def test_a_part_of_the_device(
        self, image_file: Callable[..., Path], scratch: AlignedBuffer
    ) -> None:
        disk = b"x" * (10 * CHUNK)
        marks = DirtyBitmap(len(disk), 4096)
        with BlockDevice(str(image_file(len(disk), disk))) as device:
            table = bytes(160)
            assert scan.compare(device, 2 * CHUNK, 5 * CHUNK, scratch, table, marks) == 5 * CHUNK
        assert marked(marks) == {2, 3, 4, 5, 6}

    @pytest.mark.parametrize(
        ("offset", "length", "entries", "message"),
        [
            (4096, CHUNK, 4, "no borders"),
            (0, 4096, 4, "no borders"),
            (0, 5 * CHUNK, 4, "beyond the end"),
            (2**63 - CHUNK, 2**63, 4, "beyond the end"),
            (0, 4 * CHUNK, 3, "a table of 48 bytes; 262144 bytes need 64"),
        ],
    )
    def test_arguments(
        self,
        image_file: Callable[..., Path],
        *,
        offset: int,
        length: int,
        entries: int,
        message: str,
    ) -> None:
        marks = DirtyBitmap(4 * CHUNK, CHUNK)
        device = BlockDevice(str(image_file(4 * CHUNK, b"x" * 4 * CHUNK)))
        with device, pytest.raises(ValueError, match=message):
            scan.compare(device, offset, length, AlignedBuffer(CHUNK), bytes(16 * entries), marks)
        assert marks.count() == 0

    def test_scratch_that_holds_no_chunk(self, image_file: Callable[..., Path]) -> None:
        device = BlockDevice(str(image_file(CHUNK)))
        with device, pytest.raises(ValueError, match="holds no chunk"):
            scan.digest(device, 0, CHUNK, AlignedBuffer(CHUNK - 1))


class TestCompareHole:
    @given(data=st.data(), seed=st.integers(0, 2**32))
    def test_chunks_that_were_not_zero_are_marked(self, data: st.DataObject, seed: int) -> None:
        rng = random.Random(seed)
        size = data.draw(st.integers(1, 2000 * CHUNK))
        count = -(-size // CHUNK)
        used = set(rng.sample(range(count), min(count, rng.choice((0, 1, 3, 200)))))
        table = bytearray(16 * count)
        for index in used:
            table[16 * index + rng.randrange(16)] = 1
        offset = data.draw(st.integers(0, size))
        length = data.draw(st.integers(0, size - offset))
        marks = DirtyBitmap(size, CHUNK)
        found = scan.compare_hole(offset, length, size, table, marks)
        touched = range(offset // CHUNK, -(-(offset + length) // CHUNK)) if length else range(0)
        assert marked(marks) == used & set(touched)
        assert found == marks.count_bytes()

    def test_arguments(self) -> None:
        marks = DirtyBitmap(4 * CHUNK, CHUNK)
        with pytest.raises(ValueError, match="marks for 262144"):
            scan.compare_hole(0, CHUNK, 5 * CHUNK, bytes(80), marks)
        with pytest.raises(ValueError, match="beyond the end"):
            scan.compare_hole(CHUNK, 4 * CHUNK, 4 * CHUNK, bytes(64), marks)
        with pytest.raises(ValueError, match="a table of 63 bytes"):
            scan.compare_hole(0, CHUNK, 4 * CHUNK, bytes(63), marks)
