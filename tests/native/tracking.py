"""What the tests of the eBPF tracker share: pins, ranges, direct writes, blocks that differ."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from native.bitmap import DirtyBitmap
from native.ebpf import KernelTracker, TrackedRange
from tests import devices, host

BLOCK = 4096
MIB = 1 << 20


@contextmanager
def bpffs() -> Iterator[Path]:
    """A bpffs of our own, unmounted at the end: its pins go with it."""
    devices.require("bpf")
    path = tempfile.mkdtemp(prefix="warmsync-test-", dir=host.SCRATCH)
    try:
        devices.run("mount", "-t", "bpf", "bpf", path)
        try:
            # The kernel keeps files of its own at the top.
            directory = Path(path) / "pins"
            directory.mkdir()
            yield directory
        finally:
            devices.run("umount", path)
    finally:
        os.rmdir(path)


def range_of(path: str, block_size_bytes: int = BLOCK) -> TrackedRange:
    """What to watch for a disk or a partition, as sysfs tells it."""
    number = os.stat(path).st_rdev
    node = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    is_part = (node / "partition").exists()
    disk = node.parent if is_part else node
    major, minor = map(int, (disk / "dev").read_text().split(":"))
    queues = [one for one in disk.glob("mq/*") if one.is_dir()]
    return TrackedRange(
        major=major,
        minor=minor,
        disk_sequence=int((disk / "diskseq").read_text()),
        start_sector=int((node / "start").read_text()) if is_part else 0,
        sector_count=int((node / "size").read_text()),
        block_size_bytes=block_size_bytes,
        bio_based=not queues,
        queue_count=len(queues),
        queue_depth=max((int((one / "nr_tags").read_text()) for one in queues), default=0),
    )


class Tracked:
    """A device under a tracker, with a copy of what it held before."""

    def __init__(self, path: str, pin_dir: Path, block: int = BLOCK) -> None:
        self.path = path
        self.block = block
        self.size = size_of(path)
        self.kernel = KernelTracker.attach(range_of(path, block), str(pin_dir))
        self.bitmap = DirtyBitmap(self.size, block, words=self.kernel.words)

    def take(self) -> DirtyBitmap:
        taken = DirtyBitmap(self.size, self.block)
        self.bitmap.take(taken)
        # What is in flight may land after the caller has read it.
        start = self.kernel.watch.start_sector
        for write in self.kernel.in_flight():
            self.bitmap.set_range((write.sector - start) * 512, write.sector_count * 512)
        return taken

    def marked(self) -> set[int]:
        """Flush what is buffered, then take: the blocks marked since the last take."""
        flush(self.path)
        return blocks_of(self.take())


def blocks_of(bitmap: DirtyBitmap) -> set[int]:
    block = bitmap.block_size_bytes
    return {
        number
        for offset, length in bitmap.extents()
        for number in range(offset // block, -(-(offset + length) // block))
    }


def touched(offset: int, length: int, block: int = BLOCK) -> set[int]:
    return set(range(offset // block, -(-(offset + length) // block)))


def size_of(path: str) -> int:
    with open(path, "rb") as file:
        return file.seek(0, os.SEEK_END)


def flush(path: str) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_direct(path: str, offset: int, length: int, fill: int = 0xA5) -> None:
    """Write past the page cache; raises OSError as the device does."""
    descriptor = os.open(path, os.O_RDWR | os.O_DIRECT)
    try:
        with mmap.mmap(-1, length) as buffer:
            buffer.write(bytes([fill]) * length)
            assert os.pwrite(descriptor, buffer, offset) == length
    finally:
        os.close(descriptor)


def read_direct(path: str, offset: int, length: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, length) as buffer:
            assert os.preadv(descriptor, [buffer], offset) == length
            return buffer[:]
    finally:
        os.close(descriptor)


def content(path: str) -> bytes:
    """All of it, from the device and not from the page cache."""
    size = size_of(path)
    return b"".join(
        read_direct(path, offset, min(MIB, size - offset)) for offset in range(0, size, MIB)
    )


def differing(before: bytes, after: bytes, block: int = BLOCK) -> set[int]:
    assert len(before) == len(after)
    return {
        offset // block
        for offset in range(0, len(after), block)
        if before[offset : offset + block] != after[offset : offset + block]
    }
