"""Contenders that copy a device: run in turns, compared with each other.

Owns the order of the runs and the figures made of them. A contender's copy ends when the target
is durable; a copy that is not equal is no copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.devices import GIB, check_equal, discard
from benchmarks.measure import Figure, Goal, Spread, at_most

OURS = "warmsync"


@dataclass(frozen=True, slots=True)
class Copied:
    """One copy: its time, the processor time of both ends, and what a reader should know."""

    seconds: float
    sender_cpu_seconds: float
    receiver_cpu_seconds: float
    note: str = ""

    @property
    def cpu_seconds(self) -> float:
        """The processor time of both ends together."""
        return self.sender_cpu_seconds + self.receiver_cpu_seconds


@dataclass(frozen=True, slots=True)
class Contender:
    """One who copies: `copy(source, target)` returns when the target is durable.

    A yardstick shows what the machine can do; it does too little to be an alternative, so it is
    not among the others of whom the best counts.
    """

    name: str
    copy: Callable[[str, str], Copied]
    is_yardstick: bool = False


def in_turns(
    contenders: Sequence[Contender], source: str, target: str, rounds: int
) -> dict[str, list[Copied]]:
    """Let each copy once a round, each round begun by another; targets are empty before.

    RuntimeError if somebody's first copy is not equal to the source, or our last one.
    """
    runs: dict[str, list[Copied]] = {one.name: [] for one in contenders}
    for index in range(rounds):
        start = index % len(contenders)
        for one in (*contenders[start:], *contenders[:start]):
            discard(target)
            runs[one.name].append(one.copy(source, target))
            if index == 0 or (index == rounds - 1 and one.name == OURS):
                _check(one.name, source, target)
    return runs


def _check(name: str, source: str, target: str) -> None:
    try:
        check_equal(source, target)
    except RuntimeError as error:
        raise RuntimeError(f"the copy of {name} is not equal: {error}") from error


def compare(
    contenders: Sequence[Contender],
    runs: dict[str, list[Copied]],
    size_bytes: int,
    *,
    speed: Goal,
    yardstick: Goal | None = None,
) -> Iterator[Figure]:
    """Yield ours against the best other (goal `speed`), the yardsticks, and then each one's."""
    ours = runs[OURS]
    others = [runs[one.name] for one in contenders if one.name != OURS and not one.is_yardstick]
    quickest = [min(one.seconds for one in turn) for turn in zip(*others, strict=True)]
    yield Figure("speed against the best other", "ratio", _ratios(quickest, ours), speed)
    for one in contenders:
        if one.is_yardstick:
            times = [run.seconds for run in runs[one.name]]
            yield Figure(f"speed against the {one.name}", "ratio", _ratios(times, ours), yardstick)
    lowest = [min(one.cpu_seconds for one in turn) for turn in zip(*others, strict=True)]
    costs = Spread.of(own.cpu_seconds / low for own, low in zip(ours, lowest, strict=True))
    yield Figure("cpu, both ends, to the lowest other's", "ratio", costs, at_most(1))
    for one in contenders:
        if one.name != OURS and not one.is_yardstick:
            times = [run.seconds for run in runs[one.name]]
            yield Figure(f"speed against {one.name}", "ratio", _ratios(times, ours))
    for one in contenders:
        yield from _costs(one.name, size_bytes, runs[one.name])


def _ratios(theirs: Sequence[float], ours: Sequence[Copied]) -> Spread:
    return Spread.of(time / own.seconds for time, own in zip(theirs, ours, strict=True))


def _costs(name: str, size: int, runs: list[Copied]) -> Iterator[Figure]:
    speed = Spread.of(size / one.seconds / 1e9 for one in runs)
    yield Figure(f"{name}: speed", "GB/s", speed, note=runs[-1].note)
    for end, used in (
        ("source", [one.sender_cpu_seconds for one in runs]),
        ("target", [one.receiver_cpu_seconds for one in runs]),
        ("both ends", [one.cpu_seconds for one in runs]),
    ):
        costs = Spread.of(seconds / size * GIB for seconds in used)
        yield Figure(f"{name}: cpu, {end}", "s/GiB", costs)
