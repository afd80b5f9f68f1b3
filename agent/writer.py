"""Writes frames to the target devices, on threads.

Owns the bound on frames being written and the flush. Never acknowledges: who calls it does.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Executor

from agent.device import io_error
from agent.errors import DataLoss
from native.bitmap import DirtyBitmap
from native.blockio import BlockDevice
from native.buffer import BufferPool
from native.frame import FrameError, route, scatter


class Writer:
    """Applies frames to devices; thread-safe through the executor's bound."""

    def __init__(
        self,
        devices: list[BlockDevice],
        sizes_bytes: list[int],
        threads: Executor,
        pool: BufferPool,
        written: list[DirtyBitmap] | None = None,
    ) -> None:
        self._written = written
        self._devices = devices
        self._sizes_bytes = sizes_bytes
        self._threads = threads
        self._pool = pool

    async def write(self, frame: bytes | memoryview, generation: int) -> int:
        """Verify and write one frame; returns its sequence number. DataLoss, ResourceExhausted."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._threads, self._write, frame, generation)
        except FrameError as error:
            raise DataLoss(
                "BAD_FRAME",
                f"a frame was refused, nothing of it written: {error}; "
                "check the network and run the same version on both hosts",
            ) from error
        except OSError as error:
            raise io_error("target", error) from error

    async def flush(self) -> float:
        """Make all that was written durable; returns the seconds it took."""
        loop = asyncio.get_running_loop()
        started = time.monotonic()
        flushes = [loop.run_in_executor(self._threads, device.flush) for device in self._devices]
        results = await asyncio.gather(*flushes, return_exceptions=True)
        for result in results:
            if isinstance(result, OSError):
                raise io_error("target", result) from result
            if isinstance(result, BaseException):
                raise result
        return time.monotonic() - started

    def _write(self, frame: bytes | memoryview, generation: int) -> int:
        volume, sequence = route(frame)
        if volume >= len(self._devices):
            raise FrameError(f"volume {volume} of {len(self._devices)}")
        with self._pool.lease() as scratch:
            scatter(
                self._devices[volume],
                frame,
                scratch,
                size_bytes=self._sizes_bytes[volume],
                volume=volume,
                generation=generation,
                written=None if self._written is None else self._written[volume],
            )
        return sequence
