"""Which blocks are hot: written so steadily that sending them now would be in vain.

Owns the history of one volume's takes. Pure: the caller passes the time in. Decides nothing of
what is pending: a hot block is held back, never forgotten.

Time is cut into periods, not into takes: these come now quickly, now slowly, and a round that holds
much back is short. Judged take by take, what was hot in a long round would be cold in the short one
after it, and hot again after the next.
"""

from __future__ import annotations

from itertools import pairwise

from native.bitmap import DirtyBitmap

PERIOD_SECONDS = 0.25
"""A period ends with the first take this long after the one that ended the last."""
PERIODS = 2
"""A block is hot that was written in each of so many periods running, up to the last."""


class Heat:
    """The hot blocks of a volume of `size_bytes`. Memory: where blocks were written lately."""

    def __init__(self, size_bytes: int, block_size_bytes: int) -> None:
        self._geometry = size_bytes, block_size_bytes
        self._began_seconds: float | None = None
        self.forget()

    def forget(self) -> None:
        """Start anew: nothing is hot."""
        self._now = DirtyBitmap(*self._geometry)
        # Item n: written in each of the last n + 1 periods that ended.
        self._streaks = [DirtyBitmap(*self._geometry) for _ in range(PERIODS)]
        self._hot_count = 0

    @property
    def is_any(self) -> bool:
        """Whether any block is hot."""
        return self._hot_count > 0

    def note(self, marks: DirtyBitmap, at_seconds: float) -> None:
        """Learn what a take found."""
        self._now.merge(marks)
        if self._began_seconds is None:
            self._began_seconds = at_seconds
        if at_seconds - self._began_seconds >= PERIOD_SECONDS:
            self._began_seconds = at_seconds
            self._end_period()

    def subtract_hot(self, marks: DirtyBitmap, max_bytes: int) -> None:
        """Clear in `marks` what is hot; of more than `max_bytes` only the lowest offsets are."""
        hot, most = self._streaks[-1], max_bytes // marks.block_size_bytes
        if self._hot_count > most:
            end = 0
            if most:
                within = most * marks.block_size_bytes
                _, end = hot.batch(0, max_bytes=within, max_extents=most)
            hot.clear_range(end, hot.size_bytes - end)
            self._hot_count = most
        marks.subtract(hot)

    def _end_period(self) -> None:
        for longer, shorter in pairwise(reversed(self._streaks)):
            longer.clear()
            longer.merge_common(shorter, self._now)
        self._streaks[0].clear()
        self._streaks[0], self._now = self._now, self._streaks[0]
        self._hot_count = self._streaks[-1].count()
