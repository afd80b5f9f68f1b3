"""Guests that write single blocks, and the rounds that follow them, without clocks or threads.

Where `tests.agent.simulation` has expected values, this has the blocks themselves: the real volume,
its bitmaps, heat and planner, and a link that is a formula.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from agent.disk import SourceDisk
from agent.planner import plan_dirty
from agent.rounds import Convergence, RoundReport, Verdict
from agent.tracker import Take
from agent.tracker.memory import MemoryTracker
from native.bitmap import DirtyBitmap
from tests.agent.simulation import BLOCK, MIB, Link

SECOND_TICKS = 100

Writer = Callable[[int], Iterator[int]]
"""Blocks that are written in a tick (a hundredth of a second, counted from 0)."""


def random_writes(rate: float, first: int, end: int, seed: int = 1) -> Writer:
    """Write `rate` bytes a second, 4 KiB each, at random in the blocks [first, end)."""
    chance = random.Random(seed)

    def write(tick: int) -> Iterator[int]:
        a_tick = rate / BLOCK / SECOND_TICKS
        for _ in range(int((tick + 1) * a_tick) - int(tick * a_tick)):
            yield chance.randrange(first, end)

    return write


def sequential_writes(rate: float, first: int, end: int) -> Writer:
    """Write `rate` bytes a second in order, again and again from the start."""

    def write(tick: int) -> Iterator[int]:
        a_tick = rate / BLOCK / SECOND_TICKS
        for at in range(int(tick * a_tick), int((tick + 1) * a_tick)):
            yield first + at % (end - first)

    return write


def every(ticks: int, first: int, end: int) -> Writer:
    """Write each block once in so many ticks, not all of them in the same one."""
    return lambda tick: iter(range(first + (tick - first) % ticks, end, ticks))


def all_of(*writers: Writer) -> Writer:
    return lambda tick: (block for writer in writers for block in writer(tick))


def while_(condition: Callable[[int], bool], writer: Writer) -> Writer:
    return lambda tick: writer(tick) if condition(tick) else iter(())


@dataclass(frozen=True, slots=True)
class Cycle:
    """One round, and what a cutover right before the next take would have found."""

    at: float
    verdict: Verdict
    sent_bytes: int
    held_bytes: int
    left_bytes: int
    downtime_seconds: float


@dataclass(slots=True)
class BlockWorld:
    """One volume on its way. `holds`: whether the rounds may hold anything back."""

    disk: SourceDisk
    guest: Writer
    link: Link
    budget: float
    holds: bool = True
    now: float = 0.0
    sent_bytes: int = 0
    convergence: Convergence = field(init=False)
    tick: int = 0
    untaken: set[int] = field(default_factory=set)
    chance: random.Random = field(default_factory=lambda: random.Random(1))

    def __post_init__(self) -> None:
        self.convergence = Convergence(self.budget)

    @property
    def tracker(self) -> MemoryTracker:
        assert isinstance(self.disk.tracker, MemoryTracker)
        return self.disk.tracker

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        while (self.tick + 1) / SECOND_TICKS <= self.now:
            for block in self.guest(self.tick):
                self.tracker.mark(block * BLOCK, BLOCK)
                self.untaken.add(block)
            self.tick += 1

    def open(self) -> None:
        size = self.disk.volume.size_bytes
        self._take()
        self.convergence.look(size, self.now, 0.0, self.link.take)
        self._send(0, opening=True)

    def cycles(self, seconds: float) -> Iterator[Cycle]:
        end, taken_at = self.now + seconds, 0.0
        while self.now < end:
            self.pass_time(self.link.take)
            take = self._take()
            dirty = self.disk.pending.count_bytes()
            verdict = self.convergence.look(
                dirty,
                self.now,
                self.now - taken_at,
                self.link.take,
                marked_bytes=min(take.marked_bytes, dirty),
            )
            taken_at = self.now
            sent = self._send(self.convergence.hold_bytes() if self.holds else 0) if dirty else 0
            held = self.disk.pending.count_bytes()
            self.pass_time(self.convergence.wait_seconds(self.now))
            left = self._left_bytes()
            yield Cycle(taken_at, verdict, sent, held, left, self._downtime(left))

    def _take(self) -> Take:
        self.untaken.clear()
        return self.disk.take(flush=False, at_seconds=self.now)

    def _send(self, hold_bytes: int, *, opening: bool = False) -> int:
        chosen = self.disk.choose(hold_bytes)
        size = chosen.count_bytes()
        sent = sum(batch.size_bytes for batch in plan_dirty(0, chosen))
        send = self.link.send(sent, self.now, self.chance, opening=opening)
        flush, started = self.link.make_durable(sent), self.now
        self.pass_time(send + flush)
        self.disk.settle()
        self.sent_bytes += sent
        self.convergence.record(
            RoundReport(0, size, sent, self.link.take, send, flush, started, self.now)
        )
        return sent

    def _left_bytes(self) -> int:
        volume = self.disk.volume
        left = DirtyBitmap(volume.size_bytes, volume.block_size_bytes)
        left.merge(self.disk.pending)
        for block in self.untaken:
            left.set_range(block * BLOCK, BLOCK)
        return left.count_bytes()

    def _downtime(self, left_bytes: int) -> float:
        last = self.link.send(left_bytes, self.now, random.Random(0))
        return last + self.link.make_durable(left_bytes) + 2 * self.link.take


HOT = 256 * MIB // BLOCK


def hot_and_cold(rate: float, size_bytes: int) -> Writer:
    """The live benchmark's guest: 9 of 10 writes in a hot region, the others anywhere."""
    return all_of(
        random_writes(0.9 * rate, 0, HOT, seed=1),
        random_writes(0.1 * rate, 0, size_bytes // BLOCK, seed=2),
    )
