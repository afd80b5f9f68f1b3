"""Takes and sends rounds: what is marked is read, sent and made durable on the target.

Owns the correctness of one round (design, section 6, rules 1 to 4): a bit is cleared before its
block is read, blocks count as equal only once their generation is durable. Decides nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import Executor
from contextlib import aclosing
from dataclasses import dataclass, replace
from itertools import chain
from typing import TypeAlias, TypeVar

from agent.bell import Bell
from agent.carrier import BulkCarrier, Carrier, CarrierRequest
from agent.disk import SourceDisk
from agent.migration import Plan, Progress
from agent.planner import Batch, plan_dirty, plan_holes
from agent.reader import Reader, ReadVolume
from agent.rounds import RoundReport
from agent.throttle import Throttle
from native.bitmap import DirtyBitmap
from native.buffer import BufferPool

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")
_Part: TypeAlias = tuple[list[tuple[int, DirtyBitmap]], Iterator[Batch]]
"""What is marked in some volumes, and holes."""

_OPENING_BYTES = 128 << 20
"""The first of a volume is sent while the file system is asked for the holes in the rest; that
takes 20 ms for each GiB on tmpfs. Nearly every disk has data there."""


@dataclass(frozen=True, slots=True)
class Workshop:
    """What all migrations of an agent share: threads, buffers, and how far to read ahead."""

    threads: Executor
    pool: BufferPool
    read_ahead_frames: int
    connections: int = 4


@dataclass(frozen=True, slots=True)
class Taken:
    """A take of all volumes: what is dirty now, how long it took, how long marks had gathered.

    `marked_bytes` of `dirty_bytes` are of this take, the others were held back.
    """

    dirty_bytes: int
    marked_bytes: int
    seconds: float
    since_seconds: float
    at_seconds: float


class Sender:
    """Sends the rounds of one migration. `progress` is what the doors show."""

    def __init__(
        self, disks: list[SourceDisk], workshop: Workshop, limit_bytes_per_second: int
    ) -> None:
        self.disks = disks
        self.bell = Bell()
        self.throttle = Throttle(limit_bytes_per_second)
        self.generation = 0
        total = sum(disk.volume.size_bytes for disk in disks)
        self.progress = Progress(total_bytes=total, round_bytes=total, dirty_bytes=total)
        self._workshop = workshop
        self._reader = Reader(
            [ReadVolume(disk.device, disk.tracker.digests) for disk in disks],
            workshop.threads,
            workshop.pool,
            workshop.read_ahead_frames,
        )
        self._carrier: Carrier | None = None
        self._running = asyncio.Event()
        self._running.set()
        self._paused_seconds = self._paused_at = 0.0
        self._taken_at = time.monotonic()
        self._held_bytes = 0
        self._writes = sum(disk.count_writes() for disk in disks)

    def use(self, carrier: Carrier) -> None:
        """Send over this carrier from now on."""
        self._carrier = carrier
        if isinstance(carrier, BulkCarrier):
            carrier.limit(self.throttle.limit_bytes_per_second)
            carrier.pause(not self._running.is_set())

    def carrier_request(self, plan: Plan) -> CarrierRequest:
        """Return what carrier these disks ask for."""
        return CarrierRequest(
            devices=[disk.device for disk in self.disks],
            digests=[disk.tracker.digests for disk in self.disks],
            kind=plan.carrier,
            connections=self._workshop.connections,
            compress=plan.compress,
        )

    def limit(self, limit_bytes_per_second: int) -> None:
        """Change the bandwidth limit; 0 is none."""
        self.throttle.change(limit_bytes_per_second)
        if isinstance(self._carrier, BulkCarrier):
            self._carrier.limit(limit_bytes_per_second)

    @property
    def carrier_name(self) -> str:
        """The carrier in use; empty before there is one."""
        return self._carrier.name if self._carrier else ""

    @property
    def carrier_detail(self) -> str:
        """How it travels, or why it was chosen."""
        return self._carrier.detail if self._carrier else ""

    def hurry(self) -> None:
        """Send as fast as can be: the guest is off."""
        if isinstance(self._carrier, BulkCarrier):
            self._carrier.yield_to_guest(False)

    def _watch_guest(self) -> None:
        """Yield to a guest that has written since the last look."""
        writes = sum(disk.count_writes() for disk in self.disks)
        if isinstance(self._carrier, BulkCarrier):
            self._carrier.yield_to_guest(writes > self._writes)
        self._writes = writes

    def pause(self) -> None:
        """Stop reading and sending before the next frame; what is under way is finished."""
        self._running.clear()
        self._paused_at = time.monotonic()
        if isinstance(self._carrier, BulkCarrier):
            self._carrier.pause(True)

    def resume(self) -> None:
        """Go on."""
        if not self._running.is_set():
            self._paused_seconds += time.monotonic() - self._paused_at
        self._running.set()
        if isinstance(self._carrier, BulkCarrier):
            self._carrier.pause(False)

    async def wait_until_running(self) -> None:
        """Wait while paused."""
        while not self._running.is_set():  # again: it may be paused before we get to run
            await self._running.wait()

    def note(self, **changes: object) -> None:
        """Change the progress that is shown."""
        self.progress = replace(self.progress, **changes)  # type: ignore[arg-type]
        self.bell.ring()

    async def take(self, *, flush: bool) -> Taken:
        """Take the marks of all volumes. `flush`: first what the host's page cache holds.

        Unavailable if the target is lost, even where there is nothing to send.
        """
        self._open_carrier.check()
        started = time.monotonic()
        takes = await self.on_disks(lambda disk: disk.take(flush=flush, at_seconds=started))
        for disk, take in zip(self.disks, takes, strict=True):
            if take.suspect:
                _log.warning(
                    'volume suspect, all of it is sent again path=%s reason="%s"',
                    disk.volume.source,
                    take.suspect,
                )
                self.note(suspect_volumes=self.progress.suspect_volumes + 1)
        dirty = sum(await self.on_disks(lambda disk: disk.pending.count_bytes()))
        since, self._taken_at = started - self._taken_at, started
        now = time.monotonic()
        self.note(dirty_bytes=dirty)
        marked = min(sum(take.marked_bytes for take in takes), dirty)
        return Taken(dirty, marked, now - started, since, now)

    async def send_seed(self, taken: Taken) -> RoundReport:
        """Send everything: data first, then holes, which are found and not read."""
        await self._choose(0)
        return await self._send(self._seed(), taken, taken.dirty_bytes)

    async def send_dirty(self, taken: Taken, hold_bytes: int = 0) -> RoundReport:
        """Send what is pending, but up to `hold_bytes` that are hot. Nothing travels if nothing is.

        The last round holds nothing back.
        """
        chosen = await self._choose(hold_bytes // len(self.disks))
        jobs = [(i, marks) for i, (marks, _) in enumerate(chosen)]
        return await self._send(_whole(jobs), taken, sum(size for _, size in chosen))

    async def on_disks(self, work: Callable[[SourceDisk], _Result]) -> list[_Result]:
        """Run blocking work on all disks at once; the first error is raised when all are done."""
        loop = asyncio.get_running_loop()
        jobs = [loop.run_in_executor(self._workshop.threads, work, disk) for disk in self.disks]
        done = asyncio.gather(*jobs, return_exceptions=True)
        try:
            results = await asyncio.shield(done)
        except asyncio.CancelledError:
            # Threads cannot be stopped: a fence that still goes up must not outrun its unfence.
            await done
            raise
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return [result for result in results if not isinstance(result, BaseException)]

    async def close(self) -> None:
        """End the stream. Safe to call twice."""
        if self._carrier is not None:
            await self._carrier.close()

    async def _seed(self) -> AsyncGenerator[_Part, None]:
        """Yield the opening, and when it is known where there are holes, the rest."""
        mapping = asyncio.ensure_future(self.on_disks(SourceDisk.map_data))
        try:
            yield list(enumerate(_opening(disk) for disk in self.disks)), iter(())
            maps = await mapping
            for disk, data in zip(self.disks, maps, strict=True):
                data.set_range(0, _opening_bytes(disk))  # sent: not a hole
            holes = [plan_holes(i, data) for i, data in enumerate(maps)]
            # The holes first, while their map is whole.
            yield [], chain.from_iterable(holes)
            for disk, data in zip(self.disks, maps, strict=True):
                data.clear_range(0, _opening_bytes(disk))
            yield list(enumerate(maps)), iter(())
        finally:
            mapping.cancel()
            await asyncio.wait([mapping])
            _ = mapping.cancelled() or mapping.exception()  # seen

    async def _choose(self, hold_bytes: int) -> list[tuple[DirtyBitmap, int]]:
        """Return what each volume sends and its size."""

        def choose(disk: SourceDisk) -> tuple[DirtyBitmap, int]:
            chosen = disk.choose(hold_bytes)
            return chosen, chosen.count_bytes()

        return await self.on_disks(choose)

    async def _send(
        self, parts: AsyncGenerator[_Part, None], taken: Taken, size_bytes: int
    ) -> RoundReport:
        self.generation += 1
        self._held_bytes = taken.dirty_bytes - size_bytes
        self.note(round_bytes=size_bytes, round_done_bytes=0)
        started, paused = time.monotonic(), self._paused_seconds
        before = self.progress.sent_bytes
        async with aclosing(parts):
            async for jobs, holes in parts:
                await self._send_marked(jobs)
                await self._send_frames(holes)
        sent = self.progress.sent_bytes - before
        flush_seconds = await self._flush()
        finished = time.monotonic()
        elapsed = finished - started - (self._paused_seconds - paused)
        return RoundReport(
            generation=self.generation,
            dirty_bytes=size_bytes,
            sent_bytes=sent,
            take_seconds=taken.seconds,
            send_seconds=max(elapsed - flush_seconds, 0.0),
            flush_seconds=flush_seconds,
            started_seconds=started,
            finished_seconds=finished,
        )

    async def _send_marked(self, jobs: list[tuple[int, DirtyBitmap]]) -> None:
        carrier = self._open_carrier
        if isinstance(carrier, BulkCarrier):
            await carrier.send_marked(jobs, self.generation, self._tick)
        else:
            await self._send_frames(chain.from_iterable(plan_dirty(*job) for job in jobs))

    async def _send_frames(self, batches: Iterator[Batch]) -> None:
        frames = self._reader.frames(batches, self.generation)
        try:
            async for batch, frame in frames:
                await self.wait_until_running()
                await self.throttle.spend(len(frame))
                await self._open_carrier.send(frame)
                self._count(batch.size_bytes, len(frame))
        finally:
            await frames.aclose()

    async def _flush(self) -> float:
        """Only now is what was sent known to be equal: clear it (rule 4)."""
        seconds = await self._open_carrier.flush(self.generation)
        for disk in self.disks:
            disk.settle()
        self.note(rounds=self.progress.rounds + 1, dirty_bytes=self._held_bytes)
        return seconds

    def _tick(self, done_bytes: int, sent_bytes: int) -> None:
        self._watch_guest()
        self._count(done_bytes, sent_bytes)

    def _count(self, done_bytes: int, sent_bytes: int) -> None:
        progress = self.progress
        left = max(progress.round_bytes - progress.round_done_bytes - done_bytes, 0)
        self.note(
            sent_bytes=progress.sent_bytes + sent_bytes,
            round_done_bytes=progress.round_done_bytes + done_bytes,
            dirty_bytes=self._held_bytes + left,
        )

    @property
    def _open_carrier(self) -> Carrier:
        if self._carrier is None:
            raise RuntimeError("nothing can be sent before a carrier is there")
        return self._carrier


async def _whole(jobs: list[tuple[int, DirtyBitmap]]) -> AsyncGenerator[_Part, None]:
    yield jobs, iter(())


def _opening_bytes(disk: SourceDisk) -> int:
    return min(_OPENING_BYTES, disk.volume.size_bytes)


def _opening(disk: SourceDisk) -> DirtyBitmap:
    marks = DirtyBitmap(disk.volume.size_bytes, disk.volume.block_size_bytes)
    marks.set_range(0, _opening_bytes(disk))
    return marks
