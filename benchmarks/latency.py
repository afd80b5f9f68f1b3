"""fio's logs of latency histograms: parsed, cut to a stretch of time, and summed up. Pure.

Layout: fio, `tools/hist` and `stat.h` (FIO_IO_U_PLAT_BITS 6): 64 buckets to each power of two,
nanoseconds; a log with a coarseness of N holds the sums of 2^N neighbouring buckets. Each line is
the end of its window in milliseconds, direction, block size, and the counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_BITS = 6
_HEAD = 3


@dataclass(frozen=True, slots=True)
class Window:
    """What completed in a stretch of time that ended at `end_seconds` (since the epoch)."""

    end_seconds: float
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Latencies:
    """All that completed in a stretch of time."""

    seconds: float
    counts: tuple[int, ...]
    coarseness: int

    @property
    def iops(self) -> float:
        """Requests a second."""
        return sum(self.counts) / self.seconds

    def percentile_seconds(self, share: float) -> float:
        """Return the latency that `share` (0 to 1) of the requests did not exceed."""
        wanted, seen = share * sum(self.counts), 0
        for index, count in enumerate(self.counts):
            seen += count
            if count and seen >= wanted:
                return _middle_nanoseconds(index, self.coarseness) / 1e9
        raise ValueError("nothing completed")


def parse(text: str) -> list[Window]:
    """Return the windows of a log."""
    rows = [[int(word) for word in line.split(",")] for line in text.splitlines()]
    return [Window(row[0] / 1e3, tuple(row[_HEAD:])) for row in rows]


def cut(
    windows: Sequence[Window], begin_seconds: float, end_seconds: float, coarseness: int
) -> Latencies:
    """Sum up the windows that lie between two moments; the first also if none does so wholly."""
    starts = [0.0, *(one.end_seconds for one in windows)]
    whole = [
        (start, one)
        for start, one in zip(starts, windows, strict=False)
        if start >= begin_seconds and one.end_seconds <= end_seconds
    ] or [pair for pair in zip(starts, windows, strict=False) if pair[0] >= begin_seconds][:1]
    if not whole:
        raise ValueError("the log ends too early")
    counts = tuple(map(sum, zip(*(one.counts for _, one in whole), strict=True)))
    return Latencies(whole[-1][1].end_seconds - whole[0][0], counts, coarseness)


def _middle_nanoseconds(index: int, coarseness: int) -> float:
    """Return the middle of a bucket of a log."""
    low, high = (_edge(edge << coarseness) for edge in (index, index + 1))
    return (low + high) / 2


def _edge(bucket: int) -> int:
    """Return the lower edge of one of fio's buckets, in nanoseconds."""
    if bucket < 2 << _BITS:
        return bucket
    shift = (bucket >> _BITS) - 1
    return (1 << (shift + _BITS)) + ((bucket & ((1 << _BITS) - 1)) << shift)
