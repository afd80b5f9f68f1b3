"""Reads batches into frames, ahead of the sender, on threads.

Owns the order (frames come out as planned) and the bound on read-ahead. Never sends.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from agent.ahead import run_ahead
from agent.device import io_error
from agent.planner import Batch
from native.bitmap import DirtyBitmap
from native.blockio import BlockDevice
from native.buffer import BufferPool
from native.frame import gather, zeros
from native.scan import digest

if TYPE_CHECKING:
    from typing_extensions import Buffer


DIGEST_STEP_BYTES = 16 << 20
"""Bytes of a volume whose digests are read at once (16 MiB: 4 KiB of digests)."""

_DIGESTS_AHEAD = 4


@dataclass(frozen=True, slots=True)
class ReadVolume:
    """A source device; the table of digests that each read fills, and its marks, if there are any.

    See native.frame.gather.
    """

    device: BlockDevice
    digests: Buffer | None
    stale: DirtyBitmap | None = None


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
    ) -> AsyncGenerator[tuple[Batch, bytes], None]:
        """Iterate (batch, its frame) in the order of the batches. DataLoss if a read fails."""
        reads = run_ahead(self._reads(batches, generation), self._threads, self._depth)
        try:
            async for frame in reads:
                yield frame
        except OSError as error:
            raise io_error("source", error) from error
        finally:
            await reads.aclose()

    def _reads(
        self, batches: Iterator[Batch], generation: int
    ) -> Iterator[Callable[[], tuple[Batch, bytes]]]:
        for batch in batches:
            self._sequence += 1
            yield partial(self._read, batch, generation, self._sequence)

    def _read(self, batch: Batch, generation: int, sequence: int) -> tuple[Batch, bytes]:
        if batch.hole:
            return batch, zeros(
                batch.extents, volume=batch.volume, generation=generation, sequence=sequence
            )
        volume = self._volumes[batch.volume]
        with self._pool.lease() as scratch:
            return batch, gather(
                volume.device,
                batch.extents,
                scratch,
                volume=batch.volume,
                generation=generation,
                sequence=sequence,
                digests=volume.digests,
                stale=volume.stale,
            )


async def read_digests(
    device: BlockDevice, size_bytes: int, pool: BufferPool, threads: Executor
) -> AsyncGenerator[tuple[int, bytes], None]:
    """Iterate (offset, digests of the chunks from there on), read past all caches. OSError."""

    def read(offset: int) -> tuple[int, bytes]:
        with pool.lease() as scratch:
            length = min(DIGEST_STEP_BYTES, size_bytes - offset)
            return offset, digest(device, offset, length, scratch)

    offsets = range(0, size_bytes, DIGEST_STEP_BYTES)
    steps = run_ahead((partial(read, offset) for offset in offsets), threads, _DIGESTS_AHEAD)
    try:
        async for step in steps:
            yield step
    finally:
        await steps.aclose()
