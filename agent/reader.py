"""Reads batches into frames, ahead of the sender, on threads.

Owns the order (frames come out as planned) and the bound on read-ahead. Never sends.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from agent.device import io_error
from agent.planner import Batch
from native.blockio import BlockDevice
from native.buffer import BufferPool
from native.frame import gather, zeros

if TYPE_CHECKING:
    from typing_extensions import Buffer


@dataclass(frozen=True, slots=True)
class ReadVolume:
    """A source device, and its tracker's digest table if it has one."""

    device: BlockDevice
    digests: Buffer | None


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
        loop = asyncio.get_running_loop()
        ahead: deque[tuple[Batch, asyncio.Future[bytes]]] = deque()
        try:
            while True:
                while len(ahead) < self._depth and (batch := next(batches, None)) is not None:
                    self._sequence += 1
                    read = loop.run_in_executor(
                        self._threads, self._read, batch, generation, self._sequence
                    )
                    ahead.append((batch, read))
                if not ahead:
                    return
                first, read = ahead.popleft()
                yield first, await self._finish(read)
        finally:
            await _drain([read for _, read in ahead])

    async def _finish(self, read: asyncio.Future[bytes]) -> bytes:
        try:
            return await asyncio.shield(read)
        except OSError as error:
            raise io_error("source", error) from error
        except asyncio.CancelledError:
            await _drain([read])
            raise

    def _read(self, batch: Batch, generation: int, sequence: int) -> bytes:
        if batch.hole:
            return zeros(
                batch.extents, volume=batch.volume, generation=generation, sequence=sequence
            )
        volume = self._volumes[batch.volume]
        with self._pool.lease() as scratch:
            return gather(
                volume.device,
                batch.extents,
                scratch,
                volume=batch.volume,
                generation=generation,
                sequence=sequence,
                digests=volume.digests,
            )


async def _drain(reads: list[asyncio.Future[bytes]]) -> None:
    """Wait for reads whose result nobody wants: their device may be closed only afterwards."""
    for read in reads:
        read.cancel()
    for read in reads:
        with suppress(OSError, asyncio.CancelledError):
            await read
