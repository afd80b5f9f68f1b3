"""A tracker on a real device, with a guest that writes to it in every way there is."""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from agent.planner import plan_dirty
from agent.tracker import Take, Tracker
from agent.tracker.memory import MemoryTracker
from agent.tracker.scan import ScanTracker
from native.bitmap import DirtyBitmap
from native.blockio import BlockDevice
from native.buffer import AlignedBuffer
from native.chunk import CHUNK_BYTES
from native.frame import MAX_PAYLOAD_BYTES, gather, scatter
from tests import devices, qemus
from tests.content import fill, read_all

BLOCK = 4096
FILE_BYTES = (4 << 20) + 5000
"""Ends neither on a chunk nor on a block."""
DEVICE_BYTES = (4 << 20) + 12288
"""Ends on a block, within a chunk."""
CUT_BYTES = 3 * CHUNK_BYTES + 4096
SHORTER = ("scan-shorter", "ebpf-shorter", "qemu-shorter")
"""Volumes that end `CUT_BYTES` before their devices do."""
KINDS = (
    "memory",
    "scan-file",
    "scan-loop",
    "ebpf-loop512",
    "ebpf-loop4096",
    "ebpf-partition",
    "ebpf-zram",
    "qemu-qcow2",
    "qemu-raw",
    *SHORTER,
)
_BLKDISCARD, _BLKZEROOUT = 0x1277, 0x127F


@dataclass
class Subject:
    """The device, its tracker, and the guest's ways to write. `mark` is told of each write."""

    path: str
    sector_size: int
    block: int
    device: BlockDevice
    tracker: Tracker
    mark: Callable[[int, int], None] = field(default=lambda offset, length: None)
    cut_bytes: int = 0

    @property
    def size(self) -> int:
        return self.device.size_bytes() - self.cut_bytes

    def take(self) -> tuple[DirtyBitmap, Take]:
        """Flush what is buffered, as the agent does, then take."""
        self.device.flush()
        marks = DirtyBitmap(self.size, self.block)
        return marks, self.tracker.take(marks)

    def settle(self, shadow: Path | None = None) -> None:
        """Take and send until nothing is left: for `scan`, what was never sent is dirty."""
        marks, _ = self.take()
        marks.set_all()
        self.send(marks, shadow)

    def send(self, marks: DirtyBitmap, shadow: Path | None = None) -> None:
        """Read what is marked as the sender does; write it to `shadow` if there is one."""
        target = BlockDevice(str(shadow), writable=True) if shadow else None
        scratch = AlignedBuffer(MAX_PAYLOAD_BYTES)
        try:
            for number, batch in enumerate(plan_dirty(0, marks)):
                frame = gather(
                    self.device,
                    batch.extents,
                    scratch,
                    volume=0,
                    generation=1,
                    sequence=number,
                    digests=self.tracker.digests,
                    size_bytes=self.size,
                )
                if target:
                    size = self.size
                    scatter(target, frame, scratch, size_bytes=size, volume=0, generation=1)
        finally:
            if target:
                target.close()

    def direct(self, offset: int, data: bytes) -> None:
        """Write past the page cache; offset and length are whole sectors."""
        with mmap.mmap(-1, len(data)) as buffer:
            buffer.write(data)
            self._write(os.O_DIRECT, offset, buffer)
        self.mark(offset, len(data))

    def buffered(self, offset: int, data: bytes) -> None:
        """Write through the page cache, then fsync."""
        self._write(0, offset, data)
        self.mark(offset, len(data))

    def zero(self, offset: int, length: int) -> None:
        """BLKZEROOUT, or a hole punched into a file."""
        self._clear(_BLKZEROOUT, offset, length)

    def discard(self, offset: int, length: int) -> None:
        """BLKDISCARD, or a hole punched into a file."""
        self._clear(_BLKDISCARD, offset, length)

    def _write(self, flags: int, offset: int, data: bytes | mmap.mmap) -> None:
        fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC | flags)
        try:
            assert os.pwrite(fd, data, offset) == len(data)
            os.fsync(fd)
        finally:
            os.close(fd)

    def _clear(self, request: int, offset: int, length: int) -> None:
        if self.device.is_block_device:
            fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.ioctl(fd, request, struct.pack("QQ", offset, length))
            finally:
                os.close(fd)
        else:
            with BlockDevice(self.path, writable=True) as file:
                file.zero(offset, length)
        self.mark(offset, length)


def build(kind: str, stack: ExitStack, pins: Callable[[], Path]) -> Subject:
    """Make a subject, filled with content and with its tracker started."""
    scheme, _, where = kind.partition("-")
    if scheme == "qemu":
        return _of_qemu(where, stack)
    path, sector_size = _device(where, stack)
    fill(path, seed=len(kind))
    device = stack.enter_context(BlockDevice(path))
    if scheme == "memory":
        memory = MemoryTracker(device.size_bytes(), BLOCK)
        return _started(Subject(path, sector_size, BLOCK, device, memory, memory.mark), stack)
    cut = CUT_BYTES if where == "shorter" else 0
    size = device.size_bytes() - cut
    if scheme == "scan":
        scan = ScanTracker(device, size_bytes=size)
        subject = Subject(path, sector_size, CHUNK_BYTES, device, scan, cut_bytes=cut)
        return _started(subject, stack)
    pytest.importorskip("native.ebpf", reason="built without clang and libbpf")
    from agent.tracker.ebpf import EbpfTracker

    tracker = EbpfTracker(device, BLOCK, pins() / "volume", size)
    subject = Subject(path, sector_size, BLOCK, device, tracker, cut_bytes=cut)
    return _started(subject, stack)


def _of_qemu(where: str, stack: ExitStack) -> Subject:
    """A storage daemon's disk, to which the guest writes over NBD."""
    devices.require("qemu")
    from agent.qemu.device import open_qemu
    from agent.tracker.qemu import QemuTracker

    cut, driver = (CUT_BYTES, "qcow2") if where == "shorter" else (0, where)
    directory = Path(stack.enter_context(TemporaryDirectory(prefix="warmsync-", dir="/tmp")))
    qemu = stack.enter_context(qemus.disk(directory, DEVICE_BYTES + cut, driver))
    qemu.start_daemon()
    path = str(stack.enter_context(qemus.guest_file(qemu)))
    fill(path, seed=len(driver))
    device = open_qemu(str(qemu.image), (str(qemu.image),), qemu.seat())
    stack.callback(device.close)
    tracker = QemuTracker(device, BLOCK)
    return _started(Subject(path, 512, BLOCK, device, tracker, cut_bytes=cut), stack)


def equal(subject: Subject, shadow: Path) -> bool:
    """Return whether the shadow holds what the device holds, to the byte."""
    return read_all(subject.path)[: subject.size] == read_all(shadow)[: subject.size]


def _started(subject: Subject, stack: ExitStack) -> Subject:
    stack.callback(subject.tracker.stop)
    subject.tracker.start()
    return subject


def _device(where: str, stack: ExitStack) -> tuple[str, int]:
    if where in ("", "file"):
        return str(stack.enter_context(devices.image_file(FILE_BYTES))), 512
    if where == "zram":
        return stack.enter_context(devices.zram_device(DEVICE_BYTES)), 4096
    if where == "partition":
        loop = stack.enter_context(devices.loop_device(2 * DEVICE_BYTES, partitions=True))
        return loop.partitions[1], 512
    sector_size = 4096 if where == "loop4096" else 512
    size = DEVICE_BYTES + (CUT_BYTES if where == "shorter" else 0)
    return stack.enter_context(devices.loop_device(size, sector_size)).path, sector_size
