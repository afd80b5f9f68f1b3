"""Holds what the `ebpf` tracker saw against the block layer's own counters of the disk.

Owns the comparison and the base it starts from. Never decides what becomes of a hole. The kernel's
counters may stay behind the tracker's sums, never the other way round (docs/trackers.md says why):
whatever they have more, the tracker has missed.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

from native.ebpf import KernelTracker, Sectors

_log = logging.getLogger(__name__)

_SECTOR_BYTES = 512
_STAT_BYTES = 512
_WRITTEN, _DISCARDED = 6, 13
"""Fields of a disk's stat (Documentation/block/stat.rst of the kernel); discards since 4.19."""
_TRIES = 3
_BASE_TRIES = 16
_BASE_KEPT = 4
_PAUSE_SECONDS = 0.001


def parse_stat(text: bytes) -> Sectors:
    """Return the sectors that a disk's `stat` says were written and discarded."""
    fields = text.split()
    return Sectors(int(fields[_WRITTEN]), int(fields[_DISCARDED]))


def find_missing(counted: Sectors, base: Sectors, seen: Sectors) -> Sectors:
    """Return the sectors that the kernel counted and the tracker has not seen.

    `base` is what was seen less what was counted when the two agreed.
    """
    return Sectors(
        max(counted.written + base.written - seen.written, 0),
        max(counted.discarded + base.discarded - seen.discarded, 0),
    )


def choose_base(timed: list[tuple[float, Sectors]]) -> Sectors:
    """Return the base to use of those measured, each with the seconds that it took.

    Of the quickest, because what ended between the two readings makes a base too low, and a hole of
    that size would not be noticed. Of these the least, because a completion that was held up
    between our program and the kernel's counter makes one too high: a false alarm.
    """
    quickest = sorted(timed)[:_BASE_KEPT]
    return Sectors(
        min(base.written for _, base in quickest), min(base.discarded for _, base in quickest)
    )


class Audit:
    """The comparison for one disk: `directory` is the whole disk's in sysfs."""

    def __init__(self, directory: Path, kernel: KernelTracker, path: str) -> None:
        self._kernel = kernel
        self._path = path
        self._bio_based = kernel.watch.bio_based
        self._stat = os.open(directory / "stat", os.O_RDONLY | os.O_CLOEXEC)
        self._switch = directory / "queue/iostats"
        self._told = False

    def close(self) -> None:
        """Close the counters. Safe to call twice."""
        if self._stat >= 0:
            os.close(self._stat)
            self._stat = -1

    def begin(self) -> None:
        """Take both to agree now: what was missed before does not matter (all will be sent).

        Without a base (the kernel does not count) nothing is compared.
        """
        self._kernel.base = None
        if not self._counts():
            self._tell_once()
            return
        timed = []
        for _ in range(_BASE_TRIES):
            started = time.monotonic()
            base = self._measure()
            timed.append((time.monotonic() - started, base))
            time.sleep(_PAUSE_SECONDS)
        self._kernel.base = choose_base(timed)

    def check(self) -> str:
        """Return what the tracker has missed since the base, with both figures; empty if nothing.

        Begins where there is no base.
        """
        if self._kernel.base is None or not self._counts():
            self.begin()
            return ""
        return self.look()

    def look(self) -> str:
        """As `check`, but begins nothing."""
        reason = ""
        for turn in range(_TRIES):
            base = self._kernel.base
            if base is None:
                return ""
            reason = self._compare(base)
            if not reason:
                return ""
            if turn + 1 < _TRIES:
                time.sleep(_PAUSE_SECONDS)
        return reason

    def _compare(self, base: Sectors) -> str:
        # In this order: a write that the kernel counted is in a note or in the sums by then, and a
        # note goes only after it was added.
        counted = self._count()
        open_sectors = 0 if self._bio_based else self._noted()
        seen = self._kernel.sums()
        seen = Sectors(seen.written + open_sectors, seen.discarded + open_sectors)
        missing = find_missing(counted, base, seen)
        if not any(missing):
            return ""
        parts = [
            f"{total * _SECTOR_BYTES} bytes {name} on the disk, "
            f"{(total - gap) * _SECTOR_BYTES} of them seen"
            for name, total, gap in (
                ("written", counted.written + base.written, missing.written),
                ("discarded", counted.discarded + base.discarded, missing.discarded),
            )
            if gap
        ]
        return f"the tracker missed writes on {self._path}: {', '.join(parts)}"

    def _measure(self) -> Sectors:
        """Return a base that is never too high: the sums first, so that they are behind."""
        seen = self._kernel.sums()
        # Bios are added when queued, and counted at the latest before their note goes.
        noted = self._noted() if self._bio_based else 0
        counted = self._count()
        return Sectors(
            seen.written - noted - counted.written, seen.discarded - noted - counted.discarded
        )

    def _count(self) -> Sectors:
        return parse_stat(os.pread(self._stat, _STAT_BYTES, 0))

    def _noted(self) -> int:
        return sum(write.sector_count for write in self._kernel.in_flight())

    def _counts(self) -> bool:
        return not self._switch.exists() or self._switch.read_text().strip() != "0"

    def _tell_once(self) -> None:
        if not self._told:
            _log.warning(
                'tracking is not audited path=%s reason="the kernel does not count: %s is 0"',
                self._path,
                self._switch,
            )
            self._told = True
