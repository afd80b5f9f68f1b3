"""What is measured: spreads of repeated measurements, goals and figures. Pure."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from statistics import median


class ImpossibleError(Exception):
    """This host cannot run a benchmark; says what is missing."""


@dataclass(frozen=True, slots=True)
class Options:
    """How hard to try. `rounds`: repetitions, None for each benchmark's own default."""

    rounds: int | None = None
    quick: bool = False

    def pick(self, full: int, quick: int) -> int:
        """Return a size or count: the second where only the machinery is tried."""
        return quick if self.quick else full

    def repeat(self, full: int) -> int:
        """Return how often to measure."""
        return self.rounds or self.pick(full, 1)


@dataclass(frozen=True, slots=True)
class Spread:
    """Repeated measurements of one thing."""

    median: float
    least: float
    most: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Sum up measurements. ValueError if there are none."""
        known = list(values)
        if not known:
            raise ValueError("no measurements")
        return cls(median(known), min(known), max(known), len(known))


@dataclass(frozen=True, slots=True)
class Goal:
    """A bound on a median."""

    bound: float
    at_least: bool

    def is_met(self, value: float) -> bool:
        """Return whether a value is within the bound; the bound itself is."""
        compare: Callable[[float, float], bool] = operator.ge if self.at_least else operator.le
        return compare(value, self.bound)


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the report."""

    name: str
    unit: str
    spread: Spread
    goal: Goal | None = None
    note: str = ""

    @property
    def is_met(self) -> bool | None:
        """Whether the median meets the goal; None without one."""
        return None if self.goal is None else self.goal.is_met(self.spread.median)


def at_least(bound: float) -> Goal:
    """A goal that is met by `bound` and all above."""
    return Goal(bound, at_least=True)


def at_most(bound: float) -> Goal:
    """A goal that is met by `bound` and all below."""
    return Goal(bound, at_least=False)


def between_neighbours(outer: list[float], inner: list[float]) -> list[float]:
    """Ratios of interleaved measurements: each of `inner` to the mean of its two neighbours.

    With measurements A B A B A, `outer` are the As, one more than `inner`, the Bs. A drift of the
    machine that is even over three measurements cancels out.
    """
    if len(outer) != len(inner) + 1:
        raise ValueError(f"{len(inner)} measurements do not lie between {len(outer)}")
    return [2 * b / (outer[i] + outer[i + 1]) for i, b in enumerate(inner)]


def steps(values: list[float]) -> list[float]:
    """Ratio of each measurement to the one before: how far equals differ, the noise floor."""
    return [second / first for first, second in pairwise(values)]
