"""A guest, a link and the loop of rounds between them, without clocks or threads.

The truth that `agent.rounds` has to guess: how long the guest really would be off, if it stopped
at any moment of a round. Expected values stand for random writes; the link's jitter is seeded.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from agent.rounds import Convergence, RoundReport, Verdict

BLOCK = 4096
MIB = 1 << 20
STEP_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class Guest:
    """Writes `hot_rate` bytes a second all over a hot set, `cold_rate` where nobody wrote yet.

    `speed(t)` scales both.
    """

    hot_set: float
    hot_rate: float
    cold_rate: float = 0.0
    speed: Callable[[float], float] = lambda _: 1.0

    def write(self, dirty: Dirty, start: float, end: float) -> Dirty:
        at = start
        while at < end - 1e-12:
            step = min(STEP_SECONDS, end - at)
            dirty = self._step(dirty, self.speed(at) * step)
            at += step
        return dirty

    def _step(self, dirty: Dirty, seconds: float) -> Dirty:
        blocks = max(self.hot_set / BLOCK, 1.0)
        clean = (1 - 1 / blocks) ** (self.hot_rate * seconds / BLOCK) if blocks > 1 else 0.0
        hot = self.hot_set - (self.hot_set - dirty.hot) * clean if self.hot_rate else dirty.hot
        return Dirty(hot, dirty.cold + self.cold_rate * seconds)


@dataclass(frozen=True, slots=True)
class Dirty:
    hot: float = 0.0
    cold: float = 0.0

    @property
    def size(self) -> int:
        """Whole blocks, as a bitmap counts them."""
        return round((self.hot + self.cold) / BLOCK) * BLOCK


@dataclass(frozen=True, slots=True)
class Link:
    """What moves a round: `throughput` for scattered blocks, `sequential` for the opening."""

    throughput: float
    latency: float = 0.001
    sequential: float = 0.0
    flush: float = 0.002
    flush_throughput: float = 10_000 * MIB
    take: float = 0.001
    jitter: float = 0.0
    wire: float = 1.0
    """Bytes on the wire for each dirty byte."""
    speed: Callable[[float], float] = lambda _: 1.0

    def send(
        self, size: float, at: float, chance: random.Random, *, opening: bool = False
    ) -> float:
        throughput = (self.sequential or self.throughput) if opening else self.throughput
        exact = self.latency + size / (throughput * self.speed(at))
        return exact * (1 + self.jitter * chance.random())

    def make_durable(self, size: float) -> float:
        return self.flush + size / self.flush_throughput


@dataclass(frozen=True, slots=True)
class Look:
    """A verdict, when it was given, and the downtimes it really would have been."""

    at: float
    verdict: Verdict
    downtimes: tuple[float, ...]
    """Guest off: right after the look, in the middle of the round, at its end, before the take."""
    wait: float
    steady: bool
    """True if guest and link kept their pace up to the next take."""

    @property
    def worst(self) -> float:
        return max(self.downtimes)


@dataclass(slots=True)
class World:
    """One migration, simulated."""

    guest: Guest
    link: Link
    size: float
    convergence: Convergence
    seed: int = 1
    now: float = 0.0
    dirty: Dirty = field(default_factory=Dirty)
    generation: int = 0
    chance: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)

    def pass_time(self, seconds: float) -> None:
        self.dirty = self.guest.write(self.dirty, self.now, self.now + seconds)
        self.now += seconds

    def open(self, sent_share: float = 1.0) -> None:
        """The first round: everything."""
        self.convergence.look(int(self.size), self.now, 0.0, self.link.take)
        sent = int(self.size * sent_share)
        self._round(int(self.size), sent, self._send_time(sent, opening=True))

    def looks(self, seconds: float) -> Iterator[Look]:
        """Go on for about `seconds`, one look a round."""
        end, taken_at = self.now + seconds, self.now
        while self.now < end:
            self.pass_time(self.link.take)
            found, self.dirty = self.dirty, Dirty()
            verdict = self.convergence.look(
                found.size, self.now, self.now - taken_at, self.link.take
            )
            taken_at = self.now
            send = self._send_time(found.size)
            state = replace_state(self)
            self._round(found.size, int(found.size * self.link.wire), send)
            wait = self.convergence.wait_seconds(self.now)
            downtimes = tuple(state.downtimes(found.size, send, wait))
            self.pass_time(wait)
            steady = self._is_steady(taken_at, self.now)
            yield Look(taken_at, verdict, downtimes, wait, steady)

    def _send_time(self, size: float, *, opening: bool = False) -> float:
        return self.link.send(size, self.now, self.chance, opening=opening)

    def _round(self, size: int, sent: int, send: float) -> None:
        started, flush = self.now, self.link.make_durable(size)
        self.pass_time(send + flush)
        self.convergence.record(
            RoundReport(self.generation, size, sent, self.link.take, send, flush, started, self.now)
        )
        self.generation += 1

    def _is_steady(self, start: float, end: float) -> bool:
        moments = [start + (end - start) * part / 8 for part in range(9)]
        return len({(self.guest.speed(at), self.link.speed(at)) for at in moments}) == 1


@dataclass(frozen=True, slots=True)
class Moment:
    """The world right after a take."""

    guest: Guest
    link: Link
    now: float

    def downtimes(self, size: int, send: float, wait: float) -> Iterator[float]:
        round_ends = send + self.link.make_durable(size)
        for off in (0.0, send / 2, round_ends, round_ends + wait):
            gathered = self.guest.write(Dirty(), self.now, self.now + off).size
            last = self.link.send(gathered, self.now, random.Random(0))
            last += self.link.make_durable(gathered) if gathered else 0.0
            yield max(round_ends - off, 0.0) + last + 2 * self.link.take


def replace_state(world: World) -> Moment:
    return Moment(world.guest, replace(world.link), world.now)
