"""What a cutover costs by the size of the disk alone: measured at that size, in memory."""

from __future__ import annotations

import random
import time
from pathlib import Path

from agent.certificate.roots import NODE_BYTES, node_count, node_of, root_of
from native.bitmap import DirtyBitmap
from native.blockio import BlockDevice
from native.buffer import AlignedBuffer
from native.scan import digest

_BLOCK_BYTES = 4096
_TAKES = 3
"""The last one, and the looks before and after the fence."""
_MARKS = 100_000
_SEED = 20


def table_seconds(size_bytes: int) -> float:
    """Return how long the takes of a volume's bitmap and the root over all of its digests take."""
    marks, into = DirtyBitmap(size_bytes, _BLOCK_BYTES), DirtyBitmap(size_bytes, _BLOCK_BYTES)
    into.set_all()  # its memory is there, as after a round
    into.clear()
    places = random.Random(_SEED)
    for _ in range(_MARKS):
        marks.set_range(places.randrange(marks.block_count) * _BLOCK_BYTES, _BLOCK_BYTES)
    nodes = node_count(size_bytes)
    table = memoryview(bytes(range(256)) * (nodes * NODE_BYTES // 256))
    started = time.perf_counter()
    for _ in range(_TAKES):
        marks.take(into)
    found = [node_of(bytes(table[at : at + NODE_BYTES])) for at in range(0, len(table), NODE_BYTES)]
    root_of(b"".join(found), size_bytes)
    return time.perf_counter() - started


def read_rate(image: Path) -> float:
    """Return how many bytes a second one thread reads and digests, past the page cache."""
    with BlockDevice(str(image)) as device:
        size = device.size_bytes()
        started = time.perf_counter()
        digest(device, 0, size, AlignedBuffer(2 << 20))
        return size / (time.perf_counter() - started)
