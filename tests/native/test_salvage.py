"""Bad sectors: what can be read around them is, and nothing that could not be is taken for read.

Both ways of reading are held to one twin: `gather` (the grpc carrier) and `Sender` (tcp).
"""

from __future__ import annotations

import errno
import os
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from native.bitmap import DirtyBitmap
from native.blockio import BlockDevice, Unread
from native.buffer import AlignedBuffer
from native.chunk import CHUNK_BYTES, DIGEST_BYTES, digests
from native.frame import gather, scatter
from native.scan import compare
from native.stream import Receiver, Sender, Tokens
from tests import devices
from tests.devices import ScratchedDevice
from tests.native.test_stream import SECONDS, greeted

UNIT = 4096
MIB = 1 << 20
SIZE = 2 * MIB

Copy = Callable[[ScratchedDevice, Path, DirtyBitmap, bytearray | None], list[Unread]]
"""Copies what is marked of a device to a file; returns what could not be read."""


def copy_by_frames(
    disk: ScratchedDevice, target: Path, marks: DirtyBitmap, table: bytearray | None
) -> list[Unread]:
    unread: list[Unread] = []
    scratch = AlignedBuffer(MIB)
    with BlockDevice(disk.path) as source, BlockDevice(str(target), writable=True) as there:
        position = 0
        while position < marks.size_bytes:
            extents, position = marks.batch(position)
            if not extents:
                continue
            frame = gather(
                source,
                extents,
                scratch,
                volume=0,
                generation=1,
                sequence=1,
                digests=table,
                unread=unread,
            )
            size = marks.size_bytes
            scatter(there, frame, AlignedBuffer(MIB), size_bytes=size, volume=0, generation=1)
    return unread


def copy_by_stream(
    disk: ScratchedDevice, target: Path, marks: DirtyBitmap, table: bytearray | None
) -> list[Unread]:
    with (
        BlockDevice(disk.path) as source,
        BlockDevice(str(target), writable=True) as there,
        session(source, there, marks.size_bytes, table) as (sender, receiver),
    ):
        unread = sender.send([(0, marks)], 1)
        ends = sender.counters()[0]
        receiver_done(sender, receiver)
        assert ends == marks.count_bytes() - sum(one.length_bytes for one in unread)
        return sorted(unread)


def receiver_done(sender: Sender, receiver: Receiver) -> None:
    with ThreadPoolExecutor(1) as threads:
        ended = threads.submit(sender.end, 1)
        receiver.wait()
        receiver.acknowledge(0.0)
        ended.result(SECONDS)


@contextmanager
def session(
    source: BlockDevice, target: BlockDevice, size: int, table: bytearray | None
) -> Iterator[tuple[Sender, Receiver]]:
    tokens = Tokens()
    pairs = [greeted(tokens, tokens.issue(SECONDS), tls=False) for _ in range(3)]
    receiver = Receiver([target], [size], connections=3, generation=1)
    for index, (_, accepted) in enumerate(pairs):
        receiver.add(accepted, first=index == 0)
    sender = Sender([opened for opened, _ in pairs], [source], [table])
    try:
        yield sender, receiver
    finally:
        sender.stop()
        sender.cut()
        receiver.stop()
        receiver.join()
        sender.close()


WAYS = pytest.mark.parametrize("copy", [copy_by_frames, copy_by_stream], ids=["gather", "stream"])


@pytest.fixture(scope="module")
def disk() -> Iterator[ScratchedDevice]:
    with devices.scratched_device(SIZE) as made:
        data = AlignedBuffer(MIB)
        with BlockDevice(made.path, writable=True) as device:
            for offset in range(0, SIZE, MIB):
                memoryview(data)[:] = os.urandom(MIB)
                device.write(offset, data)
        yield made


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "target.img"
    path.write_bytes(b"?" * SIZE)
    return path


def all_of(size: int = SIZE, block: int = UNIT) -> DirtyBitmap:
    marks = DirtyBitmap(size, block)
    marks.set_all()
    return marks


def units(unread: list[Unread], unit: int = UNIT) -> set[int]:
    """Return the numbers of what could not be read; each range must be of whole units."""
    for one in unread:
        assert one.offset_bytes % unit == one.length_bytes % unit == 0
        assert one.errno == errno.EIO
    return {
        number
        for one in unread
        for number in range(one.offset_bytes // unit, (one.offset_bytes + one.length_bytes) // unit)
    }


def expected(disk: ScratchedDevice, left_out: set[int], marked: set[int], unit: int) -> bytes:
    content, twin = disk.content(), bytearray(b"?" * SIZE)
    for number in marked - left_out:
        at = number * unit
        twin[at : at + unit] = content[at : at + unit]
    return bytes(twin)


@WAYS
@given(
    bad=st.lists(
        st.tuples(st.integers(0, SIZE - 1), st.integers(1, 40_000)), min_size=1, max_size=4
    ),
    marked=st.sets(st.integers(0, SIZE // UNIT - 1), max_size=60) | st.none(),
)
@settings(max_examples=12)
def test_what_can_be_read_arrives(
    disk: ScratchedDevice, copy: Copy, bad: list[tuple[int, int]], marked: set[int] | None
) -> None:
    """Exactly the bad units are left out, whatever else is in their frame."""
    marks = all_of() if marked is None else DirtyBitmap(SIZE, UNIT)
    for number in marked or ():
        marks.set_range(number * UNIT, 1)
    chosen = set(range(SIZE // UNIT)) if marked is None else marked
    hit = {n for at, size in bad for n in range(at // UNIT, (at + size - 1) // UNIT + 1)}
    with devices.scratch_directory() as directory:
        target = directory / "target.img"
        target.write_bytes(b"?" * SIZE)
        disk.scratch(*bad)
        try:
            left_out = units(copy(disk, target, marks, None))
        finally:
            disk.scratch()
        assert left_out == hit & chosen
        assert target.read_bytes() == expected(disk, left_out, chosen, UNIT)


@WAYS
def test_an_error_that_heals_costs_nothing(disk: ScratchedDevice, target: Path, copy: Copy) -> None:
    before = disk.count_failures()
    disk.scratch((MIB + 5000, 1), once=True)
    assert copy(disk, target, all_of(), None) == []
    assert disk.count_failures() > before
    assert target.read_bytes() == disk.content()


@WAYS
def test_no_digest_of_a_chunk_that_was_not_read_whole(
    disk: ScratchedDevice, target: Path, copy: Copy
) -> None:
    table = bytearray(b"#" * (SIZE // CHUNK_BYTES * DIGEST_BYTES))
    bad = {3, 4, 31}
    disk.scratch((3 * CHUNK_BYTES + 9, CHUNK_BYTES), (SIZE - 1, 1))
    try:
        unread = copy(disk, target, all_of(block=CHUNK_BYTES), table)
    finally:
        disk.scratch()
    assert units(unread, CHUNK_BYTES) == bad
    chunks = set(range(SIZE // CHUNK_BYTES))
    assert target.read_bytes() == expected(disk, bad, chunks, CHUNK_BYTES)
    right = digests(disk.content())
    for number in chunks:
        at = slice(number * DIGEST_BYTES, (number + 1) * DIGEST_BYTES)
        assert table[at] == (b"#" * DIGEST_BYTES if number in bad else right[at])


def test_a_scan_marks_what_it_cannot_read(disk: ScratchedDevice) -> None:
    table = digests(disk.content())
    with BlockDevice(disk.path) as device:
        marks = DirtyBitmap(SIZE, CHUNK_BYTES)
        scratch = AlignedBuffer(MIB)
        assert compare(device, 0, SIZE, scratch, table, marks) == 0
        disk.scratch((70_000, 1), (SIZE - 1, 1))
        try:
            assert compare(device, 0, SIZE, scratch, table, marks) == 2 * CHUNK_BYTES
        finally:
            disk.scratch()
        assert list(marks.extents()) == [
            (CHUNK_BYTES, CHUNK_BYTES),
            (SIZE - CHUNK_BYTES, CHUNK_BYTES),
        ]


def test_a_bad_disk_is_not_read_block_by_block(target: Path) -> None:
    """One that fails everywhere is given up after MAX_UNREAD places, and says where it was."""
    size = 64 * MIB
    target.write_bytes(b"")
    os.truncate(target, size)
    with devices.faulty_device(size) as faulty:
        with (
            BlockDevice(faulty.path) as source,
            BlockDevice(str(target), writable=True) as there,
            session(source, there, size, None) as (sender, _),
            faulty.failing("pread"),
            pytest.raises(OSError, match="at offset") as caught,
        ):
            sender.send([(0, all_of(size))], 1)
        assert (caught.value.errno, caught.value.filename) == (errno.EIO, faulty.path)


def test_a_device_that_has_shrunk_has_no_bad_sectors(tmp_path: Path) -> None:
    path = tmp_path / "short.img"
    path.write_bytes(b"x" * MIB)
    unread: list[Unread] = []
    with BlockDevice(str(path)) as device, pytest.raises(OSError, match="at offset 1048576"):
        gather(
            device,
            array("Q", [0, MIB // 2, MIB, UNIT]),
            AlignedBuffer(MIB),
            volume=0,
            generation=1,
            sequence=1,
            unread=unread,
        )
    assert unread == []


def test_without_a_list_a_bad_place_is_an_error(disk: ScratchedDevice) -> None:
    disk.scratch((0, 1))
    try:
        with BlockDevice(disk.path) as device, pytest.raises(OSError, match="read of"):
            gather(
                device,
                array("Q", [0, MIB]),
                AlignedBuffer(MIB),
                volume=0,
                generation=1,
                sequence=1,
            )
    finally:
        disk.scratch()
