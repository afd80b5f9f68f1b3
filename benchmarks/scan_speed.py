"""A pass of the scan tracker against dd: how far from reading at the device's speed."""

from __future__ import annotations

import time
from collections.abc import Iterator

from agent.tracker.scan import ScanTracker
from benchmarks.devices import GIB, MIB, fill_random, loop_device, read_seconds, require_devices
from benchmarks.measure import Figure, Options, Spread
from native.bitmap import DirtyBitmap
from native.blockio import BlockDevice
from native.buffer import AlignedBuffer
from native.chunk import CHUNK_BYTES
from native.scan import digest

NAME = "scan"
TITLE = "a pass of the scan tracker over a loop device full of data"


def measure(options: Options) -> Iterator[Figure]:
    """Yield the speed against `dd iflag=direct bs=1M`, in turns."""
    size = options.pick(2 * GIB, 32 * MIB)
    require_devices(size + GIB // 4)
    dd, scan = [], []
    with loop_device(size, fill_random) as path, BlockDevice(path) as device:
        tracker = ScanTracker(device)
        tracker.start()
        try:
            _know(tracker, device, size)
            for _ in range(options.repeat(7)):
                dd.append(read_seconds(path))
                scan.append(_pass(tracker, size))
        finally:
            tracker.stop()
    ratios = [theirs / ours for theirs, ours in zip(dd, scan, strict=True)]
    yield Figure("speed against dd", "ratio", Spread.of(ratios))
    yield Figure("scan", "GB/s", Spread.of(size / one / 1e9 for one in scan))
    yield Figure("dd", "GB/s", Spread.of(size / one / 1e9 for one in dd))


def _know(tracker: ScanTracker, device: BlockDevice, size: int) -> None:
    """Fill the tracker's table as if all had been sent: a pass then finds nothing."""
    table = digest(device, 0, size, AlignedBuffer(2 * MIB))
    kept = tracker.digests
    assert kept is not None
    kept[: len(table)] = table


def _pass(tracker: ScanTracker, size: int) -> float:
    started = time.monotonic()
    taken = tracker.take(DirtyBitmap(size, CHUNK_BYTES))
    seconds = time.monotonic() - started
    if taken.marked_bytes:
        raise RuntimeError(f"{taken.marked_bytes} bytes differ though nothing was written")
    return seconds
