"""Trackers learn of writes to a source device, each in its own way, behind one protocol.

All calls block (run them on a thread). The rules (design, section 6): `start` returns before the
first read of the device; what `take` returned is read after it; a tracker that cannot vouch for
its marks marks everything and says why.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from native.bitmap import DirtyBitmap

if TYPE_CHECKING:
    from typing_extensions import Buffer


@dataclass(frozen=True, slots=True)
class Take:
    """What a take found: `marked_bytes`, and why everything was marked, if it was."""

    marked_bytes: int
    suspect: str = ""


def has_mark(marks: DirtyBitmap, offset_bytes: int, length_bytes: int) -> bool:
    """Return whether a block that the range touches is marked; the range may lie within one."""
    block = marks.block_size_bytes
    first = offset_bytes - offset_bytes % block
    return any(marks.is_marked(at) for at in range(first, offset_bytes + length_bytes, block))


class Tracker(Protocol):
    """What learns of writes to one device."""

    @property
    def scheme(self) -> str:
        """The name it is chosen by."""

    @property
    def digests(self) -> Buffer | None:
        """Table that every read for sending must fill (native.frame.gather), if there is one."""

    @property
    def looks_cheaply(self) -> bool:
        """Whether `look` costs next to nothing (no pass over the device)."""

    def start(self) -> None:
        """Begin to track. Typed errors; nothing is left behind if it fails."""

    def resume(self) -> None:
        """Go on with what an agent before this one on the same boot has started.

        OSError or a typed error if that cannot vouch for every write since: `start` anew then.
        """

    def take(self, into: DirtyBitmap) -> Take:
        """Move the marks into `into`; a concurrent write is in this take or in the next."""

    def look(self) -> int:
        """Return the bytes that are marked now, without taking them."""

    def is_marked(self, offset_bytes: int, length_bytes: int) -> bool:
        """Return whether a byte of the range (within one chunk) is marked now."""

    def interrupt(self) -> None:
        """Let a pass that is running, and those to come, end early with an OSError. For stop."""

    def detach(self) -> None:
        """Let go, and let the tracking go on for the next agent, where it can."""

    def stop(self) -> None:
        """End tracking and leave nothing in the kernel. Safe to call twice."""
