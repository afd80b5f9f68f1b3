"""Blocks of a source that cannot be read: how often each was tried, and when that is enough.

Owns the count of tries of one volume. Never reads anything, and never says that a block was sent.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass

from agent.errors import DataLoss, FailedPrecondition
from native.bitmap import DirtyBitmap
from native.blockio import Unread

SOURCE_TRIES = 3
"""How often a source that cannot be read is tried before the migration ends: a block in so many
rounds, a device that fails as a whole without a round in between."""

PLACE_ERRORS = frozenset({errno.EIO, errno.ENODATA, errno.EREMOTEIO, errno.EILSEQ})
"""What a read of a bad place fails with (ws_is_of_a_place); all else concerns the whole device."""


@dataclass(frozen=True, slots=True)
class BadBlock:
    """A block that could not be read in the last `tries` rounds that asked for it."""

    offset_bytes: int
    length_bytes: int
    tries: int
    errno: int

    def describe(self, path: str) -> str:
        """Return what is wrong, as one clause."""
        name = errno.errorcode.get(self.errno, str(self.errno))
        tried = "once" if self.tries == 1 else f"{self.tries} times"
        return (
            f"source {path}: {self.length_bytes} bytes at offset {self.offset_bytes} cannot be "
            f"read ({name}; tried {tried})"
        )


class UnreadBlocks:
    """The bad blocks of one volume; at most blockio.MAX_UNREAD a round."""

    def __init__(self, path: str, size_bytes: int, block_size_bytes: int) -> None:
        self._path = path
        self._size_bytes = size_bytes
        self._block = block_size_bytes
        self._found: dict[int, BadBlock] = {}

    def blocks_of(self, unread: Sequence[Unread]) -> list[tuple[int, int]]:
        """Return (offset, length) of the whole blocks that what could not be read touches."""
        ranges = []
        for one in unread:
            start = one.offset_bytes - one.offset_bytes % self._block
            end = -(-(one.offset_bytes + one.length_bytes) // self._block) * self._block
            ranges.append((start, min(end, self._size_bytes) - start))
        return ranges

    def note(self, chosen: DirtyBitmap, unread: Sequence[Unread]) -> None:
        """A round has asked for `chosen` and got all of it but this. What it did not ask for stays.

        A gap between two marked blocks that was read along and is bad is of no interest.
        """
        if not unread and not self._found:
            return
        before, failed = self._found, {}
        self._found = {at: bad for at, bad in before.items() if not chosen.is_marked(at)}
        for one, (start, length) in zip(unread, self.blocks_of(unread), strict=True):
            for at in range(start, start + length, self._block):
                if chosen.is_marked(at):
                    tries = before[at].tries + 1 if at in before else 1
                    size = min(self._block, self._size_bytes - at)
                    failed[at] = BadBlock(at, size, tries, one.errno)
        self._found |= failed

    def find(self, pending: DirtyBitmap) -> list[BadBlock]:
        """Return those that still are to be sent; what was found equal meanwhile is forgotten."""
        self._found = {at: bad for at, bad in self._found.items() if pending.is_marked(at)}
        return [self._found[at] for at in sorted(self._found)]

    def error(self, bad: BadBlock) -> DataLoss:
        """Return what the migration ends with."""
        return DataLoss(
            "SOURCE_IO_ERROR",
            f"{bad.describe(self._path)}; check the disk and the kernel log",
            path=self._path,
            errno=errno.errorcode.get(bad.errno, str(bad.errno)),
            side="source",
            offset_bytes=bad.offset_bytes,
            length_bytes=bad.length_bytes,
            tries=bad.tries,
        )

    def refusal(self, bad: BadBlock) -> FailedPrecondition:
        """Return what a cutover is refused with: the target may not be handed over with a hole."""
        return FailedPrecondition(
            "SOURCE_UNREADABLE",
            f"{bad.describe(self._path)}, and a disk is not handed over without it; syncing goes "
            "on, boot the VM here again and check the disk and the kernel log",
            path=self._path,
            offset_bytes=bad.offset_bytes,
            length_bytes=bad.length_bytes,
            tries=bad.tries,
        )
