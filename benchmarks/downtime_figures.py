"""The figures of `downtime`: what each way cost the guest; what that means elsewhere. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from benchmarks.contender import OURS
from benchmarks.measure import Figure, Spread
from benchmarks.scaling import (
    Warm,
    Whole,
    filled,
    fit,
    follow_seconds,
    link_bytes_per_second,
    warm_seconds,
    whole_seconds,
)
from benchmarks.ways import Handed

REBOOT, COLD, MIRROR = "reboot", "cold", "mirror"
DISK_GB = 200
LINKS_GIGABITS = (10, 25, 100)


@dataclass(frozen=True, slots=True)
class Moved:
    """One way that a guest went: moments apart, in seconds.

    `off`: from its last acknowledged write until it was off; `switch`: from then until its disk
    was the other host's; `boot`: from the start of QEMU there to its first acknowledged write;
    `move`: from the start of the move until the disk was the other host's.
    """

    off_seconds: float
    switch_seconds: float
    boot_seconds: float
    move_seconds: float
    write_bytes_per_second: float
    handed: Handed

    @property
    def downtime_seconds(self) -> float:
        """From the last acknowledged write to the first after the boot, less the boot."""
        return self.off_seconds + self.switch_seconds


Runs = Mapping[str, Sequence[Moved]]


@dataclass(frozen=True, slots=True)
class Host:
    """What was measured of this host alone: reading for the proof, and tables of a large disk."""

    read_bytes_per_second: float
    table_seconds: float


def figures(writer: str, size_bytes: int, runs: Runs) -> Iterator[Figure]:
    """Yield what was measured with one writer."""
    yield _figure(writer, "guest writes", "MB/s", runs[OURS], _writes)
    for other in (COLD, MIRROR):
        for what, value in (("downtime", _downtime), ("hand-over", _switch)):
            pairs = zip(map(value, runs[other]), map(value, runs[OURS]), strict=True)
            ratios = Spread.of(theirs / ours for theirs, ours in pairs)
            yield Figure(f"{writer}: {what} of {other} to {OURS}'s", "ratio", ratios)
    for name, moved in runs.items():
        yield from _each(f"{writer}: {name}", size_bytes, moved)
    foretold = Spread.of(1e3 * one.handed.foretold_seconds for one in runs[OURS])
    yield Figure(f"{writer}: {OURS}: hand-over foretold by the agent", "ms", foretold)
    for index, (part, _) in enumerate(runs[OURS][0].handed.parts):
        spread = Spread.of(1e3 * one.handed.parts[index][1] for one in runs[OURS])
        yield Figure(f"{writer}: {OURS}: hand-over, {part}", "ms", spread)


def _each(prefix: str, size_bytes: int, moved: Sequence[Moved]) -> Iterator[Figure]:
    yield _figure(prefix, "downtime", "s", moved, _downtime)
    yield _figure(prefix, "of it power-down", "s", moved, lambda one: one.off_seconds)
    yield _figure(prefix, "of it hand-over", "s", moved, lambda one: one.switch_seconds)
    yield _figure(prefix, "boot (taken out)", "s", moved, lambda one: one.boot_seconds)
    if any(one.handed.sent_bytes for one in moved):
        yield _figure(prefix, "time, start to hand-over", "s", moved, lambda one: one.move_seconds)
        sent = Spread.of(one.handed.sent_bytes / size_bytes for one in moved)
        yield Figure(f"{prefix}: bytes sent / device", "ratio", sent)
        left = Spread.of(one.handed.left_bytes / 1e6 for one in moved)
        yield Figure(f"{prefix}: sent with the guest off", "MB", left)


def predictions(writer: str, runs: Runs, host: Host) -> Iterator[Figure]:
    """Yield the downtimes of a disk of 200 GB with this guest: predicted, not measured."""
    off = median(one.off_seconds for moved in runs.values() for one in moved)
    ours, mirror = warm_of(runs[OURS], host), mirror_of(runs[MIRROR])
    ours = replace(ours, table_seconds=host.table_seconds)
    whole, size = whole_of(runs[COLD]), DISK_GB * 1e9
    for gigabits in LINKS_GIGABITS:
        link = link_bytes_per_second(gigabits)
        found = {
            f"{OURS}: downtime": off + warm_seconds(ours, link),
            f"{MIRROR}: downtime": off + warm_seconds(mirror, link),
            f"{COLD}: downtime": off + whole_seconds(whole, size, link),
            # Of hosts with more than these processors: nothing but the link is in the way.
            f"{COLD}, link filled: downtime": off + whole_seconds(filled(whole), size, link),
            f"{OURS}: time beside the guest": follow_seconds(ours, size, link),
        }
        for name, seconds in found.items():
            if math.isfinite(seconds):
                where = f"predicted, {DISK_GB} GB at {gigabits} Gbit/s: {writer}"
                yield Figure(f"{where}: {name}", "s", Spread.of([seconds]))


def check(fitted: Runs, other: Runs, host: Host) -> Iterator[Figure]:
    """Yield what the model, fitted to one disk, predicts for another, to what was measured."""
    ours = warm_of(fitted[OURS], host)
    whole = whole_of(fitted[COLD])
    size = _median(other[COLD], lambda one: one.handed.sent_bytes)
    for name, seconds in ((OURS, warm_seconds(ours)), (COLD, whole_seconds(whole, size))):
        ratios = Spread.of(seconds / one.switch_seconds for one in other[name])
        yield Figure(f"{name}: hand-over of a smaller disk, predicted to measured", "ratio", ratios)


def warm_of(moved: Sequence[Moved], host: Host) -> Warm:
    """Return the model's inputs from runs of ours: medians, and fixed is what data leaves over."""
    return fit(_inputs(moved, host.read_bytes_per_second), _median(moved, _switch))


def mirror_of(moved: Sequence[Moved]) -> Warm:
    """Return the same of QEMU's mirror, which proves nothing."""
    return fit(_inputs(moved, math.inf), _median(moved, _switch))


def whole_of(moved: Sequence[Moved]) -> Whole:
    """Return the inputs of a cold copy: what is read back for the proof goes with the copy."""
    copied = _median(moved, lambda one: one.handed.copy_seconds + one.handed.part("verify"))
    sent = _median(moved, lambda one: one.handed.sent_bytes)
    return Whole(max(_median(moved, _switch) - copied, 0.0), sent / copied)


def _inputs(moved: Sequence[Moved], read_bytes_per_second: float) -> Warm:
    return Warm(
        fixed_seconds=0.0,
        last_bytes=_median(moved, lambda one: one.handed.left_bytes),
        unread_bytes=_median(moved, lambda one: one.handed.unread_bytes),
        read_bytes_per_second=read_bytes_per_second,
        copy_bytes_per_second=_median(moved, _copy_rate),
        write_bytes_per_second=_median(moved, lambda one: one.write_bytes_per_second),
    )


def _median(moved: Sequence[Moved], value: Callable[[Moved], float]) -> float:
    return median(map(value, moved))


def _downtime(one: Moved) -> float:
    return one.downtime_seconds


def _switch(one: Moved) -> float:
    return one.switch_seconds


def _writes(one: Moved) -> float:
    return one.write_bytes_per_second / 1e6


def _copy_rate(one: Moved) -> float:
    return (one.handed.sent_bytes - one.handed.left_bytes) / one.handed.copy_seconds


def _figure(
    prefix: str, what: str, unit: str, moved: Sequence[Moved], value: Callable[[Moved], float]
) -> Figure:
    return Figure(f"{prefix}: {what}", unit, Spread.of(map(value, moved)))
