"""The `scan` tracker: compares the digest of every chunk with that of what was last sent.

Works on any device or file, at the price of a pass over it for each take. Owns the digest table:
16 bytes a chunk in lazily backed memory; chunks of zeros cost nothing.
"""

from __future__ import annotations

import errno
import mmap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing

from agent.device import LEAST_DATA_BYTES
from agent.extent import align, complement, cut
from agent.store import Store
from agent.tracker import Take
from native.bitmap import DirtyBitmap
from native.blockio import BlockDevice
from native.buffer import BufferPool
from native.chunk import CHUNK_BYTES, DIGEST_BYTES
from native.scan import compare, compare_hole

_THREADS = 2
_SCRATCH_BYTES = 2 << 20
_SLICE_BYTES = 64 << 20
_TABLE = "digests"


class ScanTracker:
    """Marks whole chunks whose content is not what was last sent."""

    scheme = "scan"
    looks_cheaply = False

    def __init__(
        self, device: BlockDevice, store: Store | None = None, size_bytes: int | None = None
    ) -> None:
        self._device = device
        self._size_bytes = size_bytes or device.size_bytes()
        self._interrupted = False
        self._store = store or Store(None)
        self._table_bytes = -(-self._size_bytes // CHUNK_BYTES) * DIGEST_BYTES
        self._kept: mmap.mmap | None = None

    @property
    def digests(self) -> mmap.mmap | None:
        """The table; entries are set as chunks are read for sending.

        None before the start: what was handed over is not tracked any more.
        """
        return self._kept

    @property
    def _table(self) -> mmap.mmap:
        if self._kept is None:
            raise RuntimeError("the tracker is not started")
        return self._kept

    def start(self) -> None:
        """Nothing to attach: what is sent later than this is compared with the table."""
        if self._kept is not None:
            self._kept.close()
        self._kept = self._store.make(_TABLE, self._table_bytes)

    def resume(self) -> None:
        """See `agent.tracker.Tracker`: the table says what was last read for sending."""
        self._kept = self._store.open(_TABLE, self._table_bytes)

    def take(self, into: DirtyBitmap) -> Take:
        """See `agent.tracker.Tracker`. One pass over the device."""
        return Take(self._pass(into))

    def look(self) -> int:
        """See `agent.tracker.Tracker`. One pass over the device."""
        return self._pass(DirtyBitmap(self._size_bytes, CHUNK_BYTES))

    def is_marked(self, offset_bytes: int, length_bytes: int) -> bool:
        """See `agent.tracker.Tracker`. Reads the chunk again."""
        first = offset_bytes - offset_bytes % CHUNK_BYTES
        last = min(-(-(offset_bytes + length_bytes) // CHUNK_BYTES) * CHUNK_BYTES, self._size_bytes)
        marks = DirtyBitmap(self._size_bytes, CHUNK_BYTES)
        with self._pool() as pool:
            return self._compare(pool, first, last - first, marks) > 0

    def interrupt(self) -> None:
        """See `agent.tracker.Tracker`: a pass over a large disk may take minutes."""
        self._interrupted = True

    def detach(self) -> None:
        """Keep the table's file."""
        self.stop()

    def stop(self) -> None:
        """Drop the table's memory."""
        if self._kept is not None and not self._kept.closed:
            self._kept.close()

    def _pool(self) -> AbstractContextManager[BufferPool]:
        return closing(BufferPool(_SCRATCH_BYTES, _THREADS))

    def _pass(self, into: DirtyBitmap) -> int:
        ranges = list(align(self._find_data(), CHUNK_BYTES, self._size_bytes))
        with self._pool() as pool, ThreadPoolExecutor(_THREADS) as threads:
            jobs = [
                threads.submit(self._compare, pool, offset, length, into)
                for offset, length in cut(ranges, _SLICE_BYTES)
            ]
            holes = self._compare_holes(complement(ranges, self._size_bytes), into)
            return holes + sum(job.result() for job in jobs)

    def _find_data(self) -> list[tuple[int, int]]:
        # On its own, as the iterator holds a descriptor: in a frame that an error's traceback
        # keeps, it would stay open as long as the error is remembered.
        data = self._device.data_extents(least_bytes=LEAST_DATA_BYTES)
        return [(0, self._size_bytes)] if data is None else list(data)

    def _compare(self, pool: BufferPool, offset: int, length: int, into: DirtyBitmap) -> int:
        if self._interrupted:
            raise OSError(errno.ECANCELED, "the scan was interrupted", self._device.path)
        with pool.lease() as scratch:
            return compare(self._device, offset, length, scratch, self._table, into)

    def _compare_holes(self, holes: Iterator[tuple[int, int]], into: DirtyBitmap) -> int:
        return sum(
            compare_hole(offset, length, self._size_bytes, self._table, into)
            for offset, length in holes
        )
