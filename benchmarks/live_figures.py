"""The figures of `live`: what each contender needed, and ours against QEMU's. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.contender import OURS
from benchmarks.measure import Figure, Goal, Spread, at_least, at_most

BACKGROUND = "background"
SENT_GOALS = {5: at_most(1.1), 20: at_most(1.3)}
"""By the rate of the writes in MiB/s."""


@dataclass(frozen=True, slots=True)
class Lived:
    """One move of a disk in use. `iops` and `p99_seconds` of the guest: before, during.

    `ready_seconds` is None if it was not there in time; `left_seconds` is what the bytes sent in
    the downtime take at the speed of round 0.
    """

    ready_seconds: float | None
    sent_bytes: int
    downtime_seconds: float
    iops: tuple[float, float]
    p99_seconds: tuple[float, float]
    left_seconds: float = 0.0
    parts: tuple[tuple[str, float], ...] = ()

    @property
    def iops_kept(self) -> float:
        """Requests a second during the move, to before."""
        return self.iops[1] / self.iops[0]


Runs = Mapping[str, Sequence[Lived]]


def parts(message: Any) -> list[tuple[str, float]]:
    """Return the parts of a downtime (a DowntimeParts) by name."""
    suffix = "_seconds"
    return [
        (one.name.removesuffix(suffix).replace("_", " "), float(getattr(message, one.name)))
        for one in message.DESCRIPTOR.fields
        if one.name.endswith(suffix)
    ]


def figures(rate_mib: int, size_bytes: int, runs: Runs) -> Iterator[Figure]:
    """Yield the figures of one rate."""
    for figure in (*_against(runs), *_ours(runs[OURS])):
        yield _prefixed(f"{rate_mib} MiB/s", figure)
    for name, lived in runs.items():
        goal = SENT_GOALS.get(rate_mib) if name == OURS else None
        for figure in _each(name, lived, size_bytes, goal):
            yield _prefixed(f"{rate_mib} MiB/s", figure)


def _against(runs: Runs) -> Iterator[Figure]:
    """Ours to the better of background mode's two in each turn."""
    wanted: dict[str, tuple[Callable[[Lived], float], Goal]] = {
        "bytes sent": (lambda one: float(one.sent_bytes), at_most(1)),
        "guest's p99 during": (lambda one: one.p99_seconds[1], at_most(0.25)),
    }
    rivals = [lived for name, lived in runs.items() if name.startswith(BACKGROUND)]
    for name, (value, goal) in wanted.items():
        best = [min(map(value, turn)) for turn in zip(*rivals, strict=True)]
        ratios = [value(own) / low for own, low in zip(runs[OURS], best, strict=True)]
        yield Figure(f"{name}, to background's", "ratio", Spread.of(ratios), goal)


def _ours(runs: Sequence[Lived]) -> Iterator[Figure]:
    beyond = Spread.of(1e3 * (one.downtime_seconds - one.left_seconds) for one in runs)
    name = "downtime beyond dirty bytes / throughput"
    yield Figure(name, "ms", beyond, at_most(50))
    for index, (part, _) in enumerate(runs[0].parts):
        spread = Spread.of(1e3 * one.parts[index][1] for one in runs)
        yield Figure(f"{OURS}: downtime, {part}", "ms", spread)


def _each(name: str, runs: Sequence[Lived], size: int, sent: Goal | None) -> Iterator[Figure]:
    is_ours = name == OURS
    ready = [one.ready_seconds for one in runs if one.ready_seconds is not None]
    share = Spread.of([len(ready) / len(runs)])
    yield Figure(f"{name}: ready in time", "of 1", share, at_least(1) if is_ours else None)
    if ready:
        yield Figure(f"{name}: time to ready", "s", Spread.of(ready))
    share = Spread.of(one.sent_bytes / size for one in runs)
    yield Figure(f"{name}: bytes sent / device", "ratio", share, sent)
    yield Figure(f"{name}: downtime", "ms", Spread.of(1e3 * one.downtime_seconds for one in runs))
    kept = Spread.of(one.iops_kept for one in runs)
    yield Figure(f"{name}: guest's IOPS kept", "ratio", kept, at_least(0.95) if is_ours else None)
    for index, when in enumerate(("before", "during")):
        spread = Spread.of(1e3 * one.p99_seconds[index] for one in runs)
        yield Figure(f"{name}: guest's p99 {when}", "ms", spread)


def _prefixed(prefix: str, figure: Figure) -> Figure:
    name = f"{prefix}: {figure.name}"
    return Figure(name, figure.unit, figure.spread, figure.goal, figure.note)
