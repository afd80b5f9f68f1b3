"""The `ebpf` tracker: the kernel marks completed writes in a bitmap that is shared with us.

Owns the pins under bpffs and the proof that the programs see this device. Design, section 5.
"""

from __future__ import annotations

import errno
import os
import subprocess
import time
from pathlib import Path

from agent.device import SECTOR_BYTES, DiskRange, disk_range, system_path
from agent.errors import FailedPrecondition, InvalidArgument
from agent.tracker import Take, has_mark
from agent.tracker.audit import Audit
from native.bitmap import DirtyBitmap
from native.blockio import BlockDevice
from native.buffer import AlignedBuffer
from native.ebpf import InFlight, KernelTracker, TrackedRange, remove

_PROBE_BYTES = 4096
_PROBE_SECONDS = 5.0
_SETTLE_SECONDS = 1.0
_BIO_END_SECONDS = 0.02


class EbpfTracker:
    """Marks kept by programs on the completion of requests and bios."""

    scheme = "ebpf"
    digests = None
    looks_cheaply = True

    def __init__(
        self,
        device: BlockDevice,
        block_size_bytes: int,
        pin_dir: Path,
        size_bytes: int | None = None,
    ) -> None:
        if not device.is_block_device:
            raise InvalidArgument(
                "TRACKER_UNSUITABLE",
                f"{device.path} is a file, which the ebpf tracker cannot follow; "
                "use --tracker scan or auto",
                path=device.path,
            )
        self._device = device
        self._size_bytes = size_bytes or device.size_bytes()
        self._block_size_bytes = block_size_bytes
        self._pin_dir = pin_dir
        self._kernel: KernelTracker | None = None
        self._marks: DirtyBitmap | None = None
        self._audit: Audit | None = None
        self._lost = 0
        self._system = system_path(os.fstat(device.fileno()).st_rdev)

    def start(self) -> None:
        """Attach, pin, and prove with a read of our own that completions are seen."""
        disk = disk_range(os.fstat(self._device.fileno()).st_rdev)
        try:
            mount_bpffs(self._pin_dir)
            self._pin_dir.parent.mkdir(parents=True, exist_ok=True)
            remove(str(self._pin_dir))  # what an agent before us left, if that is not taken up
            self._kernel = KernelTracker.attach(self._watch(disk), str(self._pin_dir))
        except OSError as error:
            raise FailedPrecondition(
                "TRACKER_FAILED",
                f"eBPF tracking of {self._device.path} failed: {error.strerror}; "
                "run `warmsync doctor`, or use --tracker scan",
                path=self._device.path,
            ) from error
        self._marks = DirtyBitmap(
            self._size_bytes, self._block_size_bytes, words=self._kernel.words
        )
        try:
            self._prove(disk)
            self._audit = Audit(_directory(disk), self._kernel, self._device.path)
        except BaseException:
            self.stop()
            raise
        self._lost = self._kernel.counters().lost

    def resume(self) -> None:
        """See `agent.tracker.Tracker`. Takes up the pinned programs of the same disk."""
        disk = disk_range(os.fstat(self._device.fileno()).st_rdev)
        kernel = KernelTracker.open(str(self._pin_dir))
        if kernel.watch != self._watch(disk):
            kernel.close()
            raise OSError(errno.ESTALE, f"{self._pin_dir} watches another disk")
        self._kernel = kernel
        self._marks = DirtyBitmap(self._size_bytes, self._block_size_bytes, words=kernel.words)
        self._audit = Audit(_directory(disk), kernel, self._device.path)
        # Since the attach: what was lost before the last take of the agent before us is not known.
        self._lost = 0

    def take(self, into: DirtyBitmap) -> Take:
        """See `agent.tracker.Tracker`."""
        kernel, marks, audit = self._attached()
        self._forget_ended()
        # Counters first: what is lost or missed after this is noticed by the next take.
        missed = audit.check()
        lost = kernel.counters().lost
        blocks = marks.take(into)
        # After the exchange: what is in flight now may land after it is read, so it stays dirty.
        for write in kernel.in_flight():
            self._mark(write)
        if not missed and lost == self._lost:
            return Take(blocks * marks.block_size_bytes)
        into.set_all()
        if missed:
            self._start_again()
        else:
            missed = f"{lost - self._lost} writes of unknown range on {self._device.path}"
            self._lost = lost
            audit.begin()
        return Take(into.size_bytes, missed)

    def look(self) -> int:
        """See `agent.tracker.Tracker`."""
        kernel, marks, audit = self._attached()
        if kernel.counters().lost != self._lost or audit.look():
            return marks.size_bytes
        # What is in flight marks only when it completes.
        in_flight = sum(write.sector_count for write in kernel.in_flight())
        return marks.count_bytes() + in_flight * SECTOR_BYTES

    def is_marked(self, offset_bytes: int, length_bytes: int) -> bool:
        """See `agent.tracker.Tracker`."""
        kernel, marks, _ = self._attached()
        if kernel.counters().lost != self._lost:
            return True
        if has_mark(marks, offset_bytes, length_bytes):
            return True
        first = kernel.watch.start_sector + offset_bytes // SECTOR_BYTES
        end = first + -(-length_bytes // SECTOR_BYTES)
        return any(
            write.sector < end and first < write.sector + write.sector_count
            for write in kernel.in_flight()
        )

    def interrupt(self) -> None:
        """Nothing takes long."""

    def detach(self) -> None:
        """See `agent.tracker.Tracker`: the pins stay."""
        self._marks = None
        self._end_audit()
        if self._kernel is not None:
            self._kernel.close()
            self._kernel = None

    def stop(self) -> None:
        """See `agent.tracker.Tracker`."""
        self._marks = None
        self._end_audit()
        if self._kernel is not None:
            self._kernel.destroy()
            self._kernel = None

    def _start_again(self) -> None:
        """Attach new programs: those that missed writes may be gone. All is marked already."""
        self.stop()
        self.start()
        _, _, audit = self._attached()
        audit.begin()

    def _end_audit(self) -> None:
        if self._audit is not None:
            self._audit.close()
            self._audit = None

    def _forget_ended(self) -> None:
        """Drop notes of writes whose completion no program saw, where the disk is idle.

        Marked once more, for the take that follows. Where the kernel keeps no count of what is in
        flight, the notes stay, and their blocks dirty.
        """
        kernel, _, _ = self._attached()
        noted = kernel.in_flight()
        if not noted or not self._is_idle():
            return
        if kernel.watch.bio_based:
            # Drivers count the end of a bio before they complete it: without its note it would be
            # taken for one of unknown range.
            time.sleep(_BIO_END_SECONDS)
            noted = list(set(noted).intersection(kernel.in_flight()))
            if not self._is_idle():
                return
        for write in noted:
            self._mark(write)
            kernel.forget(write)

    def _is_idle(self) -> bool:
        system = self._system
        counted = (system / "queue/iostats", system / "../queue/iostats")
        if not any(path.exists() and path.read_text().strip() == "1" for path in counted):
            return False
        return int((system / "inflight").read_text().split()[1]) == 0

    def _mark(self, write: InFlight) -> None:
        kernel, marks, _ = self._attached()
        watch = kernel.watch
        first = max(write.sector, watch.start_sector) - watch.start_sector
        end = min(write.sector + write.sector_count - watch.start_sector, watch.sector_count)
        if first < end:
            marks.set_range(first * SECTOR_BYTES, (end - first) * SECTOR_BYTES)

    def _attached(self) -> tuple[KernelTracker, DirtyBitmap, Audit]:
        if self._kernel is None or self._marks is None or self._audit is None:
            raise RuntimeError("the tracker is not started")
        return self._kernel, self._marks, self._audit

    def _watch(self, disk: DiskRange) -> TrackedRange:
        return TrackedRange(
            major=disk.major,
            minor=disk.minor,
            disk_sequence=disk.disk_sequence,
            start_sector=disk.start_sector,
            # What lies behind is not copied, as on another partition.
            sector_count=min(disk.sector_count, -(-self._size_bytes // SECTOR_BYTES)),
            block_size_bytes=self._block_size_bytes,
            bio_based=disk.bio_based,
            queue_count=disk.queue_count,
            queue_depth=disk.queue_depth,
        )

    def _prove(self, disk: DiskRange) -> None:
        kernel = self._kernel
        if kernel is None:
            raise RuntimeError("the tracker is not started")
        probe = AlignedBuffer(_PROBE_BYTES)
        deadline = time.monotonic() + _PROBE_SECONDS
        while not kernel.counters().seen:
            if time.monotonic() > deadline:
                raise FailedPrecondition(
                    "TRACKER_BLIND",
                    f"the block layer shows no completions of {self._device.path} "
                    f"(disk {disk.name}); use --tracker scan",
                    path=self._device.path,
                )
            self._device.read(0, probe)
        if disk.bio_based:
            _settle(disk)


def mount_bpffs(pin_dir: Path) -> None:
    """Mount bpffs at /sys/fs/bpf if the pins go there and nothing is mounted yet; OSError."""
    root = Path("/sys/fs/bpf")
    if not pin_dir.is_relative_to(root) or os.path.ismount(root):
        return
    done = subprocess.run(
        ["mount", "-t", "bpf", "bpf", str(root)], check=False, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise OSError(1, f"mounting bpffs at {root}: {done.stderr.strip()}")


def _directory(disk: DiskRange) -> Path:
    return Path("/sys/block") / disk.name


def _settle(disk: DiskRange) -> None:
    """Let bios end that were submitted before the attach: their ranges are not known.

    Only saves a whole round: one that ends later is counted as lost, and all is sent again.
    """
    inflight = _directory(disk) / "inflight"
    deadline = time.monotonic() + _SETTLE_SECONDS
    while time.monotonic() < deadline and any(map(int, inflight.read_text().split())):
        time.sleep(0.01)
