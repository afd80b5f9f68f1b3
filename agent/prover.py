"""Keeps the digests of one end's volumes true: reads what is stale, in the background or at once.

Owns the pace: one step at a time while the guest runs, all threads when it is off. Knows nothing
of the other end.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from functools import partial
from typing import TypeAlias, TypeVar

from agent.ahead import run_ahead
from agent.tree import DigestTree
from agent.unread import PLACE_ERRORS
from native.blockio import BlockDevice
from native.buffer import BufferPool
from native.chunk import CHUNK_BYTES

_log = logging.getLogger(__name__)

_Answer = TypeVar("_Answer")
_Step: TypeAlias = Callable[[DigestTree, BlockDevice, int, int], int]

_DEPTH = 4
_GUESSED_RATE = 1e9
"""Bytes a second, before the first is measured."""
_LEAST_MEASURED_BYTES = 8 << 20
_MOST_BAD = 16
"""Chunks of a step that are read around in the background: a dying disk takes seconds for each."""


class Prover:
    """Reads for the trees of some volumes. `devices` may be changed while nothing runs."""

    def __init__(
        self,
        trees: Sequence[DigestTree],
        devices: Sequence[BlockDevice],
        threads: Executor,
        pool: BufferPool,
    ) -> None:
        self.trees = tuple(trees)
        self.devices = tuple(devices)
        self.rate_bytes_per_second = _GUESSED_RATE
        self._threads = threads
        self._pool = pool
        self._task: asyncio.Task[int | None] | None = None
        self._again = False

    @property
    def unread_bytes(self) -> int:
        """What is stale now, in all volumes."""
        return sum(tree.count_unread() for tree in self.trees)

    def wake(self) -> None:
        """Read what is stale in the background; once more, if that is being done already."""
        self._again = True
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._read_quietly(), name="prover")

    async def stop(self) -> None:
        """End what is being read, in the background or for `settle`, and wait for it."""
        while self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait([self._task])

    async def settle(self) -> int:
        """Read all that is stale, with all threads; returns the bytes read.

        OSError; ValueError if it was stopped, or the devices were closed.
        """
        await self.stop()
        # One pass at a time, also where who asked for one has gone: a read that comes late would
        # enter what was there before.
        task = asyncio.create_task(self._read(_DEPTH), name="prover")
        self._task = task
        try:
            return await task
        except asyncio.CancelledError:
            asking = asyncio.current_task()
            if asking is not None and asking.cancelling():
                raise
            raise ValueError("what was being read back was stopped") from None

    async def ask(self, question: Callable[[DigestTree], _Answer]) -> tuple[_Answer, ...]:
        """Return what each tree answers, which may take a while for a large one. On a thread."""
        answers = run_ahead((partial(question, tree) for tree in self.trees), self._threads, 1)
        try:
            return tuple([answer async for answer in answers])
        finally:
            await answers.aclose()

    async def _read_quietly(self) -> None:
        try:
            while self._again:
                self._again = False
                await self._read(1, self._step_around)
                # So that little is left of it for the cutover; waited for, as a pass is.
                await self.ask(DigestTree.root)
        except (ValueError, BufferError):
            return  # the devices were closed: the end, or another beginning
        except OSError as error:
            _log.warning('not read back reason="%s"', error)

    async def _read(self, depth: int, step: _Step | None = None) -> int:
        started = time.monotonic()
        each = zip(self.trees, self.devices, strict=True)
        await self._run((partial(tree.skip_holes, device) for tree, device in each), 1)
        total = await self._run(self._steps(step or self._step), depth)
        if total >= _LEAST_MEASURED_BYTES:
            self.rate_bytes_per_second = total / max(time.monotonic() - started, 1e-6)
        return total

    async def _run(self, calls: Iterator[Callable[[], int]], depth: int) -> int:
        """Return the sum of what calls return. Cancelled, it ends when what runs has ended."""
        total, ahead = 0, run_ahead(calls, self._threads, depth)
        try:
            async for done in ahead:
                total += done
        finally:
            with suppress(ValueError, BufferError):
                await ahead.aclose()
        return total

    def _steps(self, step: _Step) -> Iterator[partial[int]]:
        for tree, device in zip(self.trees, self.devices, strict=True):
            for offset, length in tree.steps():
                yield partial(step, tree, device, offset, length)

    def _step(self, tree: DigestTree, device: BlockDevice, offset: int, length: int) -> int:
        with self._pool.lease() as scratch:
            return tree.read(device, offset, length, scratch)

    def _step_around(self, tree: DigestTree, device: BlockDevice, offset: int, length: int) -> int:
        """The same, but what cannot be read stays stale. OSError if that is much.

        At the cutover it is read again, and then the error counts.
        """
        try:
            return self._step(tree, device, offset, length)
        except OSError as error:
            if error.errno not in PLACE_ERRORS:
                raise
        done = bad = 0
        for at in range(offset, offset + length, CHUNK_BYTES):
            try:
                done += self._step(tree, device, at, min(CHUNK_BYTES, offset + length - at))
            except OSError as error:
                bad += 1
                if error.errno not in PLACE_ERRORS or bad > _MOST_BAD:
                    raise
                _log.warning('not read back reason="%s"', error)
        return done
