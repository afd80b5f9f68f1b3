"""What is special about `scan`: the digest table, and content that comes back."""

from __future__ import annotations

import ctypes
import mmap
from array import array
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.tracker.scan import ScanTracker
from native.bitmap import DirtyBitmap
from native.blockio import BlockDevice
from native.chunk import CHUNK_BYTES, DIGEST_BYTES
from tests import devices
from tests.agent.trackers.subject import FILE_BYTES, Subject

MIB, TIB = 1 << 20, 1 << 40
PAGE_BYTES = mmap.PAGESIZE

Make = Callable[[str], Subject]


@pytest.fixture
def subject(make_subject: Make) -> Subject:
    return make_subject("scan-file")


def resident(table: mmap.mmap) -> int:
    """Return the bytes of memory that `table` has of its own (proc_pid_pagemap(5)).

    A page that was only read is the kernel's one page of zeros, which is not "exclusively mapped".
    """
    pointer = ctypes.c_char.from_buffer(table)
    first = ctypes.addressof(pointer) // PAGE_BYTES
    del pointer  # a table with a view of it cannot be closed
    entries = array("Q")
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        pagemap.seek(first * entries.itemsize)
        entries.frombytes(pagemap.read(-(-len(table) // PAGE_BYTES) * entries.itemsize))
    own = 1 << 63 | 1 << 56  # present, exclusively mapped
    return sum(entry & own == own for entry in entries) * PAGE_BYTES


def bytes_read() -> int:
    """Return what this process has read so far, by any system call and in any thread."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_content_that_comes_back_is_found(subject: Subject) -> None:
    """A sent; B taken, C read and sent; then A again: the target holds C."""
    a, b, c = (bytes([value]) * CHUNK_BYTES for value in b"abc")
    with devices.image_file(FILE_BYTES) as shadow:
        subject.direct(MIB, a)
        subject.settle(shadow)
        subject.direct(MIB, b)
        marks, _ = subject.take()
        subject.direct(MIB, c)
        subject.send(marks, shadow)
        subject.direct(MIB, a)
        assert subject.tracker.look() == CHUNK_BYTES
        marks, _ = subject.take()
        assert marks.is_marked(MIB)


def test_what_was_never_sent_is_found(subject: Subject) -> None:
    """The table begins as zeros: all data is dirty, zeros and holes are not."""
    marks, take = subject.take()
    content = Path(subject.path).read_bytes()
    chunks = range(0, FILE_BYTES, CHUNK_BYTES)
    data = [at for at in chunks if any(content[at : at + CHUNK_BYTES])]
    assert [at for at in chunks if marks.is_marked(at)] == data
    assert take.marked_bytes >= len(data) * CHUNK_BYTES - CHUNK_BYTES


def test_a_short_last_chunk(subject: Subject) -> None:
    subject.settle()
    subject.buffered(FILE_BYTES - 1, b"\x55")
    assert subject.tracker.look() == FILE_BYTES % CHUNK_BYTES
    assert subject.tracker.is_marked(FILE_BYTES - 1, 1)
    assert not subject.tracker.is_marked(FILE_BYTES - FILE_BYTES % CHUNK_BYTES - 1, 1)


def test_a_hole_that_was_data_is_found(subject: Subject) -> None:
    subject.direct(MIB, b"x" * 4 * CHUNK_BYTES)
    subject.settle()
    subject.discard(MIB + 100 * 4096 % CHUNK_BYTES, 2 * CHUNK_BYTES)
    assert subject.tracker.look() >= 2 * CHUNK_BYTES


def test_a_larger_block_than_a_chunk(subject: Subject) -> None:
    subject.settle()
    subject.direct(MIB + 3 * CHUNK_BYTES, b"new!" * 1024)
    marks = DirtyBitmap(FILE_BYTES, 4 * CHUNK_BYTES)
    subject.tracker.take(marks)
    assert list(marks.extents()) == [(MIB, 4 * CHUNK_BYTES)]


def test_reading_may_fail_and_says_so(resources: object) -> None:
    """A few chunks that cannot be read are marked; a disk that fails everywhere is an error."""
    with devices.faulty_device(32 * MIB) as faulty, BlockDevice(faulty.path) as device:
        tracker = ScanTracker(device)
        tracker.start()
        marks = DirtyBitmap(32 * MIB, CHUNK_BYTES)
        with faulty.failing("pread"), pytest.raises(OSError, match="read"):
            tracker.take(marks)
        tracker.take(marks)
        tracker.stop()


def test_holes_are_neither_read_nor_remembered(image_file: Callable[..., Path]) -> None:
    path = image_file(TIB)
    with path.open("r+b") as file:
        file.seek(TIB // 2)
        file.write(b"d" * MIB)
    with BlockDevice(str(path)) as device:
        tracker = ScanTracker(device)
        tracker.start()
        table = tracker.digests
        assert table is not None
        before_bytes, before_memory = bytes_read(), resident(table)
        assert tracker.look() == MIB
        assert bytes_read() - before_bytes < 16 * MIB
        # A page that is only read is the kernel's one page of zeros: 16 M chunks cost nothing.
        assert resident(table) - before_memory < TIB // CHUNK_BYTES * DIGEST_BYTES // 64
        tracker.stop()


def test_the_table_costs_16_bytes_a_chunk_of_data(image_file: Callable[..., Path]) -> None:
    data = 64 * MIB
    path = image_file(64 << 30)
    with path.open("r+b") as file:
        for _ in range(data // MIB):
            file.write(b"\x01" * MIB)
    with BlockDevice(str(path)) as device:
        subject = Subject(str(path), 512, CHUNK_BYTES, device, ScanTracker(device))
        subject.tracker.start()
        table = subject.tracker.digests
        assert isinstance(table, mmap.mmap)
        before = resident(table)
        marks = DirtyBitmap(subject.size, CHUNK_BYTES)
        subject.tracker.take(marks)
        subject.send(marks)
        assert marks.count_bytes() == data
        # Whole pages, and not all of the table's begin with the data.
        assert 0 < resident(table) - before <= data // CHUNK_BYTES * DIGEST_BYTES + PAGE_BYTES
        assert subject.tracker.look() == 0
        subject.tracker.stop()
