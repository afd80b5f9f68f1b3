"""Reads batches into frames, ahead of the sender, on threads.

Owns the order (frames come out as planned) and the bound on read-ahead. Never sends.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from agent.ahead import run_ahead
from agent.device import io_error
from agent.planner import Batch
from agent.unread import PLACE_ERRORS
from native.bitmap import DirtyBitmap
from native.blockio import MAX_UNREAD, BlockDevice, Unread
from native.buffer import AlignedBuffer, BufferPool
from native.chunk import CHUNK_BYTES, ZERO_DIGEST
from native.frame import gather, zeros
from native.scan import digest

if TYPE_CHECKING:
    from typing_extensions import Buffer


DIGEST_STEP_BYTES = 16 << 20
"""Bytes of a volume whose digests are read at once (16 MiB: 4 KiB of digests)."""

_DIGESTS_AHEAD = 4
_UNIT_BYTES = 4096
"""What is lost with a bad sector, where no digests are kept."""
_MAX_UNREAD_CHUNKS = MAX_UNREAD // 4


@dataclass(frozen=True, slots=True)
class ReadVolume:
    """A source device; the table of digests that each read fills, and its marks, if there are any.

    See native.frame.gather.
    """

    device: BlockDevice
    digests: Buffer | None
    stale: DirtyBitmap | None = None
    size_bytes: int | None = None
    """What of the device is copied; None: all of it."""


class Reader:
    """Makes frames of batches; at most `depth` are read ahead."""

    def __init__(
        self, volumes: list[ReadVolume], threads: Executor, pool: BufferPool, depth: int
    ) -> None:
        self._volumes = volumes
        self._threads = threads
        self._pool = pool
        self._depth = depth
        self._sequence = 0

    async def frames(
        self, batches: Iterator[Batch], generation: int
    ) -> AsyncGenerator[tuple[Batch, bytes, list[Unread]], None]:
        """Iterate (batch, its frame, what is not in it) in the order of the batches.

        What cannot be read is left out of its frame; DataLoss if that is too much.
        """
        reads = run_ahead(self._reads(batches, generation), self._threads, self._depth)
        lost = 0
        try:
            async for batch, frame, unread in reads:
                if unread:
                    lost += self._count(unread)
                    self._check_lost(lost, batch.volume)
                yield batch, frame, unread
        except OSError as error:
            raise io_error("source", error) from error
        finally:
            await reads.aclose()

    def _count(self, unread: list[Unread]) -> int:
        """Return the units of reading that were lost, as native.stream counts them."""
        volume = self._volumes[unread[0].volume]
        whole_chunks = volume.digests is not None and volume.stale is None
        unit = CHUNK_BYTES if whole_chunks else _UNIT_BYTES
        return sum(-(-one.length_bytes // unit) for one in unread)

    def _check_lost(self, lost: int, volume: int) -> None:
        if lost > MAX_UNREAD:
            text = f"more than {MAX_UNREAD} places cannot be read"
            raise OSError(errno.EIO, text, self._volumes[volume].device.path)

    def _reads(
        self, batches: Iterator[Batch], generation: int
    ) -> Iterator[Callable[[], tuple[Batch, bytes, list[Unread]]]]:
        for batch in batches:
            self._sequence += 1
            yield partial(self._read, batch, generation, self._sequence)

    def _read(
        self, batch: Batch, generation: int, sequence: int
    ) -> tuple[Batch, bytes, list[Unread]]:
        unread: list[Unread] = []
        if batch.hole:
            hole = zeros(
                batch.extents, volume=batch.volume, generation=generation, sequence=sequence
            )
            return batch, hole, unread
        volume = self._volumes[batch.volume]
        with self._pool.lease() as scratch:
            frame = gather(
                volume.device,
                batch.extents,
                scratch,
                volume=batch.volume,
                generation=generation,
                sequence=sequence,
                digests=volume.digests,
                stale=volume.stale,
                size_bytes=volume.size_bytes,
                unread=unread,
            )
        return batch, frame, unread


async def read_digests(
    device: BlockDevice,
    size_bytes: int,
    pool: BufferPool,
    threads: Executor,
    unread: set[int] | None = None,
) -> AsyncGenerator[tuple[int, bytes], None]:
    """Iterate (offset, digests of the chunks from there on), read past all caches. OSError.

    With `unread`, the offsets of chunks that cannot be read are added to it before their digests,
    which mean nothing, come out; OSError if they are too many.
    """

    def read(offset: int) -> tuple[int, bytes]:
        length = min(DIGEST_STEP_BYTES, size_bytes - offset)
        with pool.lease() as scratch:
            try:
                return offset, digest(device, offset, length, scratch)
            except OSError as error:
                if unread is None or error.errno not in PLACE_ERRORS:
                    raise
                chunks = range(offset, offset + length, CHUNK_BYTES)
                return offset, b"".join(read_chunk(at, scratch, unread) for at in chunks)

    def read_chunk(offset: int, scratch: AlignedBuffer, unread: set[int]) -> bytes:
        try:
            return digest(device, offset, min(CHUNK_BYTES, size_bytes - offset), scratch)
        except OSError:
            if len(unread) == _MAX_UNREAD_CHUNKS:
                raise
            unread.add(offset)
            return ZERO_DIGEST

    offsets = range(0, size_bytes, DIGEST_STEP_BYTES)
    steps = run_ahead((partial(read, offset) for offset in offsets), threads, _DIGESTS_AHEAD)
    try:
        async for step in steps:
            yield step
    finally:
        await steps.aclose()
