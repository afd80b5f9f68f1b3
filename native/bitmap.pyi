"""Dirty bitmaps: one bit a block, set and taken atomically."""

from array import array
from collections.abc import Iterator

from typing_extensions import Buffer

MAX_BITMAP_BYTES: int
"""A volume's bitmap is kept within this (32 MiB)."""

def fit_block_size(size_bytes: int, block_size_bytes: int) -> int:
    """Return `block_size_bytes`, doubled until a bitmap of `size_bytes` fits MAX_BITMAP_BYTES."""

class DirtyBitmap:
    """One bit a block of a volume of `size_bytes`; bit i is bit `i % 64` of 64-bit word `i // 64`.

    Memory is anonymous (untouched pages cost nothing), or `words`: a writable, 8-byte aligned
    buffer of at least ceil(blocks / 64) words, such as the kernel's map, which is then shared.
    Exports its words as a writable buffer of unsigned 64-bit items (format "Q"). Bits past the
    last block are never set here and, if another sets them, never believed.

    Thread-safe: each word is read and changed atomically, but an operation on many words is not
    atomic as a whole. All of them release the GIL.

    Raises ValueError for a size below 1, a block size that is not a power of two of at least 512,
    or a buffer that is too small, read-only or misaligned; MemoryError.
    """

    def __init__(
        self, size_bytes: int, block_size_bytes: int = 4096, words: Buffer | None = None
    ) -> None: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def block_size_bytes(self) -> int: ...
    @property
    def block_count(self) -> int: ...
    def set_range(self, offset_bytes: int, length_bytes: int) -> None:
        """Mark each block that the range touches (atomic OR). ValueError if out of bounds."""
    def clear_range(self, offset_bytes: int, length_bytes: int) -> None:
        """Clear each block that lies wholly in the range (a last short block counts as whole)."""
    def set_all(self) -> None: ...
    def clear(self) -> None:
        """Clear every block. A mark set meanwhile may be lost: to keep it, take.

        Memory of its own goes back to the system.
        """
    def take(self, into: DirtyBitmap) -> int:
        """OR each word into `into` (same geometry), then clear here what was found, atomically.

        A process that is killed meanwhile leaves each mark in one of the two, or in both.

        Returns the number of blocks taken (marked here, whether or not already in `into`).
        A concurrent set_range, or the kernel's, lands either in this take or in the next.
        """
    def merge(self, other: DirtyBitmap) -> None:
        """Mark here what is marked in `other` (same geometry, else ValueError; as for take)."""
    def subtract(self, other: DirtyBitmap) -> None:
        """Clear here what is marked in `other`."""
    def merge_common(self, one: DirtyBitmap, other: DirtyBitmap) -> None:
        """Mark here what is marked in both (same geometry). Touches memory only for such blocks."""
    def touch(self, other: DirtyBitmap) -> None:
        """Mark here each block that a marked block of `other` touches, whatever its block size.

        ValueError unless both are of volumes of the same size.
        """
    def count(self) -> int:
        """Return the number of marked blocks."""
    def count_bytes(self) -> int:
        """Return the marked bytes: a last short block counts with its true length."""
    def is_marked(self, offset_bytes: int) -> bool: ...
    def batch(
        self,
        start_bytes: int,
        *,
        gap_bytes: int = 0,
        max_bytes: int = 1048576,
        max_extents: int = 1024,
    ) -> tuple[array[int], int]:
        """Collect marked runs from `start_bytes` on, for one frame.

        Returns a flat array("Q") of offset, length pairs (ascending, not overlapping, together at
        most `max_bytes` and `max_extents` long) and the byte to go on from: `size_bytes` at the
        end. Clean gaps of at most `gap_bytes` between two runs are included, where a block behind
        the gap still fits; no extent starts or ends in a gap. A run is cut where `max_bytes` is
        full; cuts fall on multiples of the block size. ValueError if `start_bytes` is not a
        multiple of the block size, `max_bytes` less than a block or `max_extents` less than 1.
        """
    def extents(
        self, *, gap_bytes: int = 0, max_length_bytes: int = 0
    ) -> Iterator[tuple[int, int]]:
        """Iterate all runs as (offset, length), longest `max_length_bytes` (0: no limit).

        Gaps as in `batch`.
        """
    def dumps(self) -> bytes:
        """Serialise with geometry, version and an XXH3-128 checksum."""
    @classmethod
    def loads(cls, data: Buffer) -> DirtyBitmap:
        """Inverse of dumps. ValueError for anything damaged, truncated or too long."""
    def __buffer__(self, flags: int, /) -> memoryview: ...
