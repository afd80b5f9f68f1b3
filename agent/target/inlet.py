"""The target's end of the data connections of one session.

Owns the native receiver: frames are verified and written by its threads, a round that has ended is
made durable here and then acknowledged (rule 4). The session decides what may be written and when.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from agent.device import io_error
from agent.errors import DataLoss, Unavailable, WarmsyncError
from native.bitmap import DirtyBitmap
from native.blockio import BlockDevice
from native.frame import FrameError
from native.stream import (
    Connection,
    ConnectionLost,
    FramesMissing,
    Receiver,
    Stopped,
    WrongGeneration,
)

Flush = Callable[[int], Awaitable[float]]
"""Makes a generation durable; returns seconds. Raises the domain's errors."""


class Inlet:
    """Receives on `connections` connections until it is stopped or fails.

    `generation` is the first that it takes.
    """

    def __init__(
        self,
        devices: Sequence[BlockDevice],
        sizes_bytes: Sequence[int],
        connections: int,
        generation: int = 1,
        written: Sequence[DirtyBitmap] | None = None,
    ) -> None:
        self._receiver = Receiver(
            devices,
            sizes_bytes,
            connections=connections,
            generation=generation,
            written=written,
        )
        self._missing = connections
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="inlet")
        self._task: asyncio.Task[None] | None = None

    @property
    def is_complete(self) -> bool:
        """Whether all connections have arrived."""
        return self._missing == 0

    @property
    def received_bytes(self) -> int:
        """Bytes of frames so far."""
        return self._receiver.received_bytes

    def add(self, connection: Connection, index: int) -> None:
        """Start to receive on a connection; that of index 0 gets the acknowledgements."""
        self._receiver.add(connection, first=index == 0)
        self._missing -= 1

    def run(self, flush: Flush, end: Callable[[WarmsyncError | None], None]) -> None:
        """Serve rounds from now on; `end` is told why that is over, None if it was stopped."""
        self._task = asyncio.create_task(self._serve(flush, end), name="inlet")

    def stop(self) -> None:
        """Cut the connections: the source notices at once. Does not wait for what is written."""
        self._receiver.stop()
        if self._task is None:
            # Nothing was received, so this takes no time. Who else would give the devices back?
            self._receiver.join()
            self._thread.shutdown(wait=False)

    def join(self) -> None:
        """Stop, and wait until nothing is being written and the devices are given back."""
        self._receiver.join()

    async def ended(self) -> None:
        """Stop, and wait for the same without holding up the event loop. Safe to call twice."""
        self.stop()
        if self._task is None:
            await asyncio.to_thread(self._receiver.join)
        else:
            await asyncio.wait([self._task])

    async def _serve(self, flush: Flush, end: Callable[[WarmsyncError | None], None]) -> None:
        failure: WarmsyncError | None = None
        try:
            while True:
                await self._on_thread(self._receiver.wait)
                self._receiver.acknowledge(await flush(self._receiver.generation))
        except Stopped:
            failure = None
        except WarmsyncError as error:
            failure = error
        except Exception as error:
            failure = _domain_error(error)
        finally:
            # The session fails first: a source whose connection is cut asks it why.
            end(failure)
            self._receiver.stop()
            await self._on_thread(self._receiver.join)
            self._thread.shutdown(wait=False)

    async def _on_thread(self, call: Callable[[], None]) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, call)


def _domain_error(error: Exception) -> WarmsyncError:
    if isinstance(error, WrongGeneration):
        return DataLoss("WRONG_GENERATION", f"{error}; start a new migration")
    if isinstance(error, FramesMissing):
        return DataLoss("FRAMES_MISSING", f"{error}; check the network and start a new migration")
    if isinstance(error, FrameError):
        return DataLoss(
            "BAD_FRAME",
            f"a frame was refused, nothing of it written: {error}; "
            "check the network and run the same version on both hosts",
        )
    if isinstance(error, ConnectionLost):
        return Unavailable(
            "SOURCE_LOST",
            f"the stream from the source ended before the cutover ({error.strerror}); the source "
            "comes back by itself, or cancel the migration there",
        )
    if isinstance(error, OSError):
        return io_error("target", error)
    name = type(error).__name__
    return WarmsyncError("INTERNAL", f"internal error ({name}: {error}); see the agent's log")
