"""A tracker whose marks the caller sets: for tests of everything above it."""

from __future__ import annotations

from agent.tracker import Take, has_mark
from native.bitmap import DirtyBitmap


class MemoryTracker:
    """Marks what `mark` is told of."""

    scheme = "memory"
    digests = None
    looks_cheaply = True

    def __init__(self, size_bytes: int, block_size_bytes: int) -> None:
        self._marks = DirtyBitmap(size_bytes, block_size_bytes)

    def start(self) -> None:
        """Nothing to do."""

    def mark(self, offset_bytes: int, length_bytes: int) -> None:
        """Note a write that has just completed."""
        self._marks.set_range(offset_bytes, length_bytes)

    def resume(self) -> None:
        """Nothing of it outlives the process."""
        raise OSError(2, "the memory tracker keeps nothing")

    def take(self, into: DirtyBitmap) -> Take:
        """See `agent.tracker.Tracker`."""
        return Take(self._marks.take(into) * self._marks.block_size_bytes)

    def look(self) -> int:
        """See `agent.tracker.Tracker`."""
        return self._marks.count_bytes()

    def is_marked(self, offset_bytes: int, length_bytes: int) -> bool:
        """See `agent.tracker.Tracker`."""
        return has_mark(self._marks, offset_bytes, length_bytes)

    def interrupt(self) -> None:
        """Nothing takes long."""

    def detach(self) -> None:
        """Nothing to let go."""

    def stop(self) -> None:
        """Nothing to do."""
