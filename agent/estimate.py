"""How long a round of so many dirty bytes will take, learned from the rounds before it.

Owns the fit of `send = latency + bytes / throughput` and its error bars. Pure; knows nothing of
budgets. It leans to the slow side: what it says decides when machines are powered off.

Three facts shape it. The opening round reads in sequence, while the last one sends scattered
blocks, which is several times slower: the opening counts little, and with a penalty. Tiny rounds
are all latency: they say nothing of the throughput, so rounds of each size are remembered apart.
And what went wrong lately may do so again: the worst recent miss is added to what the fit says.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

OPENING_PENALTY = 4.0
"""Scattered blocks are taken to go this much slower than the opening round, until measured."""
OPENING_WEIGHT = 0.01
KEPT_A_SIZE = 4
"""Rounds remembered of each size class; a class spans a factor of four."""
RECENT = 4
"""Rounds whose misses and flushes count."""
RESEMBLES = 8
"""A round says something of another if it is at most this many times larger ..."""
RESEMBLES_FLOOR_BYTES = 1 << 20
"""... or below this times RESEMBLES, where size hardly matters."""
FADING = 0.85
"""Weight of a round against the one after it."""
LEAST_WEIGHT = 0.1
"""An old round weighs at least this: more than the opening, whose pattern is another."""
STALE_WEIGHT = 0.01
"""Rounds from before a bandwidth limit was lifted."""
UNMEASURED_BYTES_PER_SECOND = 64 << 20
"""Assumed (and then penalised) where the opening moved next to nothing, as on an empty device."""
MIN_SECONDS = 1e-4
"""Times below this are noise of the clock; they would get too much weight in a relative fit."""
MOSTLY_HOLES = 8
"""A round that sent less than its dirty bytes by this factor was holes or zeros: no measurement."""
MAX_MISS_GROWTH = 4.0
FIT_PASSES = 6
FASTEST_BYTES_PER_SECOND = 1e12
SLOWEST_BYTES_PER_SECOND = 1024.0


@dataclass(frozen=True, slots=True)
class Sample:
    """One round: how much it set out to send, how much went over the wire, and the times."""

    dirty_bytes: int
    sent_bytes: int
    send_seconds: float
    flush_seconds: float

    @property
    def is_measurement(self) -> bool:
        """True if it tells how fast data goes: not empty, not mostly holes."""
        return 0 < self.dirty_bytes <= self.sent_bytes * MOSTLY_HOLES


@dataclass(frozen=True, slots=True)
class Line:
    """`latency_seconds + bytes * seconds_per_byte`."""

    latency_seconds: float
    seconds_per_byte: float

    def at(self, size_bytes: float) -> float:
        """Return the seconds for `size_bytes`."""
        return self.latency_seconds + size_bytes * self.seconds_per_byte


@dataclass(frozen=True, slots=True)
class Weighted:
    """One point of the fit."""

    size_bytes: float
    seconds: float
    weight: float


class Estimate:
    """What the rounds so far say of the next one."""

    __slots__ = ("_by_size", "_limit", "_line", "_opening", "_recent", "_rounds", "_stale_rounds")

    def __init__(self, limit_bytes_per_second: float | None = None) -> None:
        self._opening: Sample | None = None
        self._by_size: dict[int, deque[tuple[int, Sample]]] = {}
        self._recent: deque[Sample] = deque(maxlen=RECENT)
        self._limit = limit_bytes_per_second
        self._line: Line | None = None
        self._rounds = 0
        self._stale_rounds = 0

    @property
    def is_empty(self) -> bool:
        """True before the first round."""
        return self._opening is None

    def record(self, sample: Sample) -> None:
        """Learn from a finished round. The first one counts as the opening."""
        self._line = None
        if self._opening is None:
            self._opening = sample
            return
        self._rounds += 1
        self._recent.append(sample)
        if sample.is_measurement:
            size_class = sample.dirty_bytes.bit_length() // 2
            self._by_size.setdefault(size_class, deque(maxlen=KEPT_A_SIZE)).append(
                (self._rounds, sample)
            )

    def change_limit(self, limit_bytes_per_second: float | None) -> None:
        """Cap the throughput from now on. Where the cap was lifted, older rounds count little."""
        old, new = self._limit or float("inf"), limit_bytes_per_second or float("inf")
        if new > old:
            self._stale_rounds = self._rounds
            self._recent.clear()
        self._limit = limit_bytes_per_second
        self._line = None

    def line(self) -> Line:
        """Return the fit, within the limit."""
        if self._line is None:
            self._line = self._cap(_fit(self._weighted()))
        return self._line

    def _cap(self, line: Line) -> Line:
        slowest = 1 / SLOWEST_BYTES_PER_SECOND
        per_byte = min(max(line.seconds_per_byte, 1 / FASTEST_BYTES_PER_SECOND), slowest)
        if self._limit:
            per_byte = max(per_byte, self._wire_bytes_a_byte() / self._limit)
        return Line(line.latency_seconds, per_byte)

    def send_seconds(self, size_bytes: float) -> float:
        """Return how long sending will take: the fit, and the worst recent miss on top."""
        line = self.line()
        expected = line.at(size_bytes)
        misses = (
            (sample.send_seconds - line.at(sample.dirty_bytes))
            * _within(expected / max(line.at(sample.dirty_bytes), MIN_SECONDS), 1, MAX_MISS_GROWTH)
            for sample in self._resembling(size_bytes)
        )
        return expected + max(max(misses, default=0.0), 0.0)

    def flush_seconds(self, size_bytes: float) -> float:
        """Return how long making it durable will take: the longest of the rounds like it."""
        if alike := self._resembling(size_bytes):
            return max(sample.flush_seconds for sample in alike)
        if self._recent:
            return min(self._recent, key=lambda sample: sample.dirty_bytes).flush_seconds
        if self._opening is None:
            return 0.0
        # Nothing but the opening, which may have left a device's whole cache to be written out.
        share = size_bytes / max(self._opening.dirty_bytes, 1)
        return self._opening.flush_seconds * min(share, 1.0)

    def _resembling(self, size_bytes: float) -> list[Sample]:
        largest = RESEMBLES * max(size_bytes, RESEMBLES_FLOOR_BYTES)
        return [sample for sample in self._recent if sample.dirty_bytes <= largest]

    def _weighted(self) -> list[Weighted]:
        return [self._prior()] + [
            Weighted(sample.dirty_bytes, sample.send_seconds, self._weight(number))
            for kept in self._by_size.values()
            for number, sample in kept
        ]

    def _weight(self, number: int) -> float:
        if number <= self._stale_rounds:
            return STALE_WEIGHT
        return max(FADING ** (self._rounds - number), LEAST_WEIGHT)

    def _prior(self) -> Weighted:
        """Return what is believed before anything like the last round was seen."""
        opening = self._opening
        if opening is None or min(opening.sent_bytes, opening.dirty_bytes) < RESEMBLES_FLOOR_BYTES:
            size = UNMEASURED_BYTES_PER_SECOND
            return Weighted(size, OPENING_PENALTY, OPENING_WEIGHT)
        # What was sent, since the opening of a thin device skips its holes.
        size = min(opening.sent_bytes, opening.dirty_bytes)
        return Weighted(size, opening.send_seconds * OPENING_PENALTY, OPENING_WEIGHT)

    def _wire_bytes_a_byte(self) -> float:
        """Return what bridged gaps and headers add; never less than 1."""
        ratios = sorted(s.sent_bytes / s.dirty_bytes for s in self._recent if s.is_measurement)
        return max(1.0, ratios[len(ratios) // 2]) if ratios else 1.0


def _within(value: float, lowest: float, highest: float) -> float:
    return min(max(value, lowest), highest)


def _fit(samples: list[Weighted]) -> Line:
    """Fit a line by the errors relative to it, so that rounds of each size have their say.

    Least squares, weighted anew by the fit of the pass before: relative to what is *predicted*
    (gamma regression). Relative to what was measured, a round that took 50 times as long as
    predicted would count for no more than one that took twice as long.
    """
    line = _solve(samples, [sample.seconds for sample in samples])
    for _ in range(FIT_PASSES):
        line = _solve(samples, [line.at(sample.size_bytes) for sample in samples])
    return line


def _solve(samples: list[Weighted], scales: list[float]) -> Line:
    """Return the least squares line, each error divided by its scale; neither part below 0."""
    n = x = y = xx = xy = 0.0
    for sample, scale in zip(samples, scales, strict=True):
        weight = sample.weight / max(scale, MIN_SECONDS) ** 2
        n += weight
        x += weight * sample.size_bytes
        y += weight * sample.seconds
        xx += weight * sample.size_bytes**2
        xy += weight * sample.size_bytes * sample.seconds
    determinant = n * xx - x * x
    if determinant > n * xx * 1e-9:
        per_byte = (n * xy - x * y) / determinant
        latency = (y - per_byte * x) / n
        if per_byte > 0 and latency >= 0:
            return Line(latency, per_byte)
    return Line(0.0, xy / xx)
