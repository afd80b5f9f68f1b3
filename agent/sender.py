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
from agent.unread import SOURCE_TRIES
from native.bitmap import DirtyBitmap
from native.blockio import Unread
from native.buffer import BufferPool

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")
_Part: TypeAlias = tuple[list[tuple[int, DirtyBitmap]], Iterator[Batch]]
"""What is marked in some volumes, and holes."""

_OPENING_BYTES = 128 << 20
"""The first of a volume is sent while the file system is asked for the holes in the rest; that
takes 20 ms for each GiB on tmpfs. Nearly every disk has data there."""

_MAX_WINDOWS = 64


@dataclass(frozen=True, slots=True)
class Workshop:
    """What all migrations of an agent share: threads, buffers, how far to read ahead, how much of
    the first round is lost at most if an agent ends in it.
    """

    threads: Executor
    pool: BufferPool
    read_ahead_frames: int
    connections: int = 4
    checkpoint_bytes: int = 8 << 30


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
    suspect: bool = False


class Sender:
    """Sends the rounds of one migration. `progress` is what the doors show."""

    def __init__(
        self, disks: list[SourceDisk], workshop: Workshop, limit_bytes_per_second: int
    ) -> None:
        self.disks = disks
        self.bell = Bell()
        self.throttle = Throttle(limit_bytes_per_second)
        self.generation = 0
        """The last that is durable on the target."""
        self._sending = 0
        total = sum(disk.volume.size_bytes for disk in disks)
        self.progress = Progress(total_bytes=total, round_bytes=total, dirty_bytes=total)
        self._workshop = workshop
        self._reader = Reader(
            [
                ReadVolume(disk.device, disk.digests, disk.stale, disk.volume.size_bytes)
                for disk in disks
            ],
            workshop.threads,
            workshop.pool,
            workshop.read_ahead_frames,
        )
        self._carrier: Carrier | None = None
        self._running = asyncio.Event()
        self._running.set()
        self._paused_seconds = self._paused_at = 0.0
        self._taken_at = time.monotonic()
        self._held_bytes = self._left_bytes = 0
        self._left_out: list[Unread] = []
        self._telling = False
        self._writes = sum(disk.count_writes() for disk in disks)

    def use(self, carrier: Carrier) -> None:
        """Send over this carrier from now on."""
        self._carrier = carrier
        if isinstance(carrier, BulkCarrier):
            carrier.limit(self.throttle.limit_bytes_per_second)
            carrier.pause(not self._running.is_set())

    def agree(self, generation: int) -> None:
        """The target's last durable generation is this one."""
        self.generation = generation

    async def counts_on_target(self) -> bool:
        """Return whether anything is taken to be on the target already: it is not pending."""
        return any(
            await self.on_disks(lambda disk: disk.pending.count_bytes() < disk.volume.size_bytes)
        )

    def carrier_request(self, plan: Plan) -> CarrierRequest:
        """Return what carrier these disks ask for."""
        return CarrierRequest(
            devices=[disk.device for disk in self.disks],
            digests=[disk.digests for disk in self.disks],
            stale=[disk.stale for disk in self.disks],
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

    @property
    def unread_tries(self) -> int:
        """How often what cannot be read was tried, at most; 0 if all can be."""
        return max((bad.tries for disk in self.disks for bad in disk.bad_blocks()), default=0)

    def check_read(self) -> None:
        """Raise FailedPrecondition if the last rounds could not read all: SOURCE_UNREADABLE."""
        for disk in self.disks:
            for bad in disk.bad_blocks():
                raise disk.unread.refusal(bad)

    def check(self) -> None:
        """Raise Unavailable if the connection to the target is known to be lost."""
        self._open_carrier.check()

    async def take(self, *, flush: bool) -> Taken:
        """Take the marks of all volumes. `flush`: first what the host's page cache holds.

        Unavailable if the target is lost, even where there is nothing to send.
        """
        self.check()
        started = time.monotonic()
        takes = await self.on_disks(lambda disk: disk.take(flush=flush, at_seconds=started))
        for disk, take in zip(self.disks, takes, strict=True):
            if take.suspect:
                _log.warning(
                    'volume suspect path=%s reason="%s"',
                    disk.volume.source,
                    take.suspect,
                )
                self.note(suspect_volumes=self.progress.suspect_volumes + 1)
        dirty = sum(await self.on_disks(lambda disk: disk.pending.count_bytes()))
        since, self._taken_at = started - self._taken_at, started
        now = time.monotonic()
        self.note(dirty_bytes=dirty)
        marked = min(sum(take.marked_bytes for take in takes), dirty)
        suspect = any(take.suspect for take in takes)
        return Taken(dirty, marked, now - started, since, now, suspect)

    async def send_seed(self, taken: Taken) -> RoundReport:
        """Send all that is pending, holes among it without being read, in windows.

        Each window is durable before the next begins, and is not sent again if an agent ends then.
        """
        if not taken.dirty_bytes:
            taken = replace(taken, dirty_bytes=self._send_a_little())
        self._begin_round(taken.dirty_bytes)
        mapping = asyncio.ensure_future(self.on_disks(SourceDisk.map_data))
        report = _NOTHING
        left = taken.dirty_bytes
        try:
            for start, end in self._windows():
                chosen = await self.on_disks(lambda disk: disk.choose_within(start, end))  # noqa: B023
                size = sum(await self.on_disks(lambda disk: disk.count_chosen()))
                if size:
                    left -= size
                    parts = self._seed(chosen, mapping, opens=start == 0)
                    report = _sum(report, await self._send(parts, taken, size, left))
        finally:
            mapping.cancel()
            await asyncio.wait([mapping])
            _ = mapping.cancelled() or mapping.exception()  # seen
        self._end_round()
        return report

    async def send_dirty(self, taken: Taken, hold_bytes: int = 0) -> RoundReport:
        """Send what is pending, but up to `hold_bytes` that are hot. Nothing travels if nothing is.

        The last round holds nothing back.
        """
        share = hold_bytes // len(self.disks)
        chosen = await self.on_disks(lambda disk: disk.choose(share))
        size = sum(await self.on_disks(lambda disk: disk.count_chosen()))
        self._begin_round(size)
        parts = _whole(list(enumerate(chosen)))
        report = await self._send(parts, taken, size, taken.dirty_bytes - size)
        self._end_round()
        return report

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

    def _send_a_little(self) -> int:
        """Mark the first MiB: without a round nothing is known of the link."""
        pending = self.disks[0].pending
        pending.set_range(0, min(1 << 20, pending.size_bytes))
        return pending.count_bytes()

    def _windows(self) -> Iterator[tuple[int, int]]:
        largest = max(disk.volume.size_bytes for disk in self.disks)
        size = max(self._workshop.checkpoint_bytes, largest // _MAX_WINDOWS)
        for start in range(0, largest, size):
            yield start, start + size

    async def _seed(
        self,
        chosen: list[DirtyBitmap],
        mapping: asyncio.Future[list[DirtyBitmap]],
        *,
        opens: bool,
    ) -> AsyncGenerator[_Part, None]:
        """Yield the opening, and when it is known where there are holes, the rest."""
        rest = chosen
        if opens:
            yield [(i, _cut(marks, 0, _OPENING_BYTES)) for i, marks in enumerate(chosen)], iter(())
            rest = [_cut(marks, _OPENING_BYTES, marks.size_bytes) for marks in chosen]
        data, holes = [], []
        for i, (marks, known) in enumerate(zip(rest, await mapping, strict=True)):
            full, empty = DirtyBitmap(*_geometry(marks)), DirtyBitmap(*_geometry(marks))
            full.merge_common(marks, known)
            empty.merge(marks)
            empty.subtract(known)
            data.append((i, full))
            holes.append(plan_holes(i, empty))
        yield data, chain.from_iterable(holes)

    def _begin_round(self, size_bytes: int) -> None:
        self.note(round_bytes=size_bytes, round_done_bytes=0)

    def _end_round(self) -> None:
        self.note(rounds=self.progress.rounds + 1)

    async def _send(
        self, parts: AsyncGenerator[_Part, None], taken: Taken, size_bytes: int, held_bytes: int
    ) -> RoundReport:
        """Send the parts as one generation and make it durable; `held_bytes` stay for later."""
        self._sending = self.generation + 1
        self._held_bytes, self._left_bytes = held_bytes, size_bytes
        started, paused = time.monotonic(), self._paused_seconds
        before = self.progress.sent_bytes
        self._left_out = []
        async with aclosing(parts):
            async for jobs, holes in parts:
                await self._send_marked(jobs)
                await self._send_frames(holes)
        sent = self.progress.sent_bytes - before
        flush_seconds, kept_bytes = await self._flush()
        finished = time.monotonic()
        elapsed = finished - started - (self._paused_seconds - paused)
        self._tell_unread()
        return RoundReport(
            generation=self.generation,
            dirty_bytes=size_bytes - kept_bytes,
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
            self._left_out += await carrier.send_marked(jobs, self._sending, self._tick)
        else:
            await self._send_frames(chain.from_iterable(plan_dirty(*job) for job in jobs))

    async def _send_frames(self, batches: Iterator[Batch]) -> None:
        frames = self._reader.frames(batches, self._sending)
        try:
            async for batch, frame, unread in frames:
                size = batch.size_bytes - sum(one.length_bytes for one in unread)
                self._left_out += unread
                if not size:
                    continue
                await self.wait_until_running()
                await self.throttle.spend(len(frame))
                await self._open_carrier.send(frame)
                self._count(size, len(frame))
        finally:
            await frames.aclose()

    async def _flush(self) -> tuple[float, int]:
        """Only now is what was sent known to be equal: clear it (rule 4).

        Returns the seconds of the target's flush, and the bytes that could not be read.
        """
        seconds = await self._open_carrier.flush(self._sending)
        kept = 0
        for i, disk in enumerate(self.disks):
            kept += disk.settle([one for one in self._left_out if one.volume == i])
        self.generation = self._sending
        self.note(dirty_bytes=self._held_bytes + kept)
        return seconds, kept

    def _tell_unread(self) -> None:
        """Say what cannot be read. SOURCE_IO_ERROR (DataLoss) once it was tried often enough."""
        found = [(disk, bad) for disk in self.disks for bad in disk.bad_blocks()]
        if found or self._telling:
            first = found[0][1].describe(found[0][0].volume.source) if found else ""
            more = f", and {len(found) - 1} blocks more" if len(found) > 1 else ""
            self.note(trouble=first and f"{first}{more}; tried again with the next round")
            _log.warning('blocks not read count=%s first="%s"', len(found), first)
        self._telling = bool(found)
        for disk, bad in found:
            if bad.tries >= SOURCE_TRIES:
                raise disk.unread.error(bad)

    def _tick(self, done_bytes: int, sent_bytes: int) -> None:
        self._watch_guest()
        self._count(done_bytes, sent_bytes)

    def _count(self, done_bytes: int, sent_bytes: int) -> None:
        progress = self.progress
        self._left_bytes = max(self._left_bytes - done_bytes, 0)
        self.note(
            sent_bytes=progress.sent_bytes + sent_bytes,
            round_done_bytes=progress.round_done_bytes + done_bytes,
            dirty_bytes=self._held_bytes + self._left_bytes,
        )

    @property
    def _open_carrier(self) -> Carrier:
        if self._carrier is None:
            raise RuntimeError("nothing can be sent before a carrier is there")
        return self._carrier


async def _whole(jobs: list[tuple[int, DirtyBitmap]]) -> AsyncGenerator[_Part, None]:
    yield jobs, iter(())


def _geometry(marks: DirtyBitmap) -> tuple[int, int]:
    return marks.size_bytes, marks.block_size_bytes


def _cut(marks: DirtyBitmap, start_bytes: int, end_bytes: int) -> DirtyBitmap:
    """Return what is marked within a part."""
    part, size = DirtyBitmap(*_geometry(marks)), marks.size_bytes
    part.merge(marks)
    part.clear_range(0, min(start_bytes, size))
    if end_bytes < size:
        part.clear_range(end_bytes, size - end_bytes)
    return part


_NOTHING = RoundReport(
    generation=0,
    dirty_bytes=0,
    sent_bytes=0,
    take_seconds=0.0,
    send_seconds=0.0,
    flush_seconds=0.0,
    started_seconds=0.0,
    finished_seconds=0.0,
)


def _sum(one: RoundReport, other: RoundReport) -> RoundReport:
    """Return two windows of one round as one; the flush that counts is the last."""
    return replace(
        other,
        dirty_bytes=one.dirty_bytes + other.dirty_bytes,
        sent_bytes=one.sent_bytes + other.sent_bytes,
        send_seconds=one.send_seconds + other.send_seconds,
        started_seconds=one.started_seconds or other.started_seconds,
    )
