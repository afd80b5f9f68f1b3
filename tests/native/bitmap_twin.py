"""Plain Python twins of the bitmap: a set of blocks, and runs found block by block."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st

from native.bitmap import DirtyBitmap

ENDLESS = 1 << 60


@dataclass(frozen=True, slots=True)
class Geometry:
    size_bytes: int
    block_bytes: int

    @property
    def block_count(self) -> int:
        return -(-self.size_bytes // self.block_bytes)

    def bitmap(self, blocks: set[int] | None = None) -> DirtyBitmap:
        made = DirtyBitmap(self.size_bytes, self.block_bytes)
        for block in blocks or ():
            made.set_range(block * self.block_bytes, 1)
        return made

    def touched(self, offset: int, length: int) -> set[int]:
        """Blocks with at least one byte in the range."""
        return {
            block
            for block in range(self.block_count)
            if length and block * self.block_bytes < offset + length
            if offset < (block + 1) * self.block_bytes
        }

    def contained(self, offset: int, length: int) -> set[int]:
        """Blocks with all of their bytes (as far as the volume goes) in the range."""
        return {
            block
            for block in range(self.block_count)
            if offset <= block * self.block_bytes
            if min((block + 1) * self.block_bytes, self.size_bytes) <= offset + length
        }

    def size_of(self, blocks: set[int]) -> int:
        ends = (min((block + 1) * self.block_bytes, self.size_bytes) for block in blocks)
        return sum(ends) - sum(block * self.block_bytes for block in blocks)

    def to_bytes(self, start: int, end: int) -> tuple[int, int]:
        """Blocks [start, end) as (offset, length)."""
        stop = min(end * self.block_bytes, self.size_bytes)
        return start * self.block_bytes, stop - start * self.block_bytes


def marked(bitmap: DirtyBitmap) -> set[int]:
    """All bits that are set in the words, those past the last block too."""
    words = memoryview(bitmap).tolist()
    return {i * 64 + k for i, word in enumerate(words) if word for k in range(64) if word >> k & 1}


def runs(
    blocks: set[int],
    start: int,
    gap: int,
    *,
    max_length: int = ENDLESS,
    max_total: int = ENDLESS,
    max_extents: int = ENDLESS,
) -> tuple[list[tuple[int, int]], int | None]:
    """Extents as block ranges [start, end), and the block to go on from (None: the end)."""
    found: list[tuple[int, int]] = []
    limit = 0
    for block in sorted(block for block in blocks if block >= start):
        if found and block - found[-1][1] <= gap and block - found[-1][0] < limit:
            found[-1] = (found[-1][0], block + 1)
            continue
        room = max_total - sum(b - a for a, b in found)
        if room == 0 or len(found) == max_extents:
            return found, block
        found.append((block, block + 1))
        limit = min(room, max_length)
    return found, None


def geometries(max_blocks: int = 1500) -> st.SearchStrategy[Geometry]:
    """Volumes up to some dozens of words, mostly with a short last block and a part-used word."""
    return st.sampled_from([512, 1024, 4096]).flatmap(
        lambda block: st.builds(Geometry, st.integers(1, max_blocks * block), st.just(block))
    )


def ranges(geometry: Geometry) -> st.SearchStrategy[tuple[int, int]]:
    """(offset, length) within the volume; the offset may be its end, the length 0."""
    return st.integers(0, geometry.size_bytes).flatmap(
        lambda offset: st.tuples(
            st.just(offset),
            st.one_of(
                st.integers(0, geometry.size_bytes - offset),
                st.integers(0, min(4 * geometry.block_bytes, geometry.size_bytes - offset)),
                st.just(geometry.size_bytes - offset),
            ),
        )
    )


def block_sets(geometry: Geometry) -> st.SearchStrategy[set[int]]:
    """Marked blocks: runs and single ones, sparse and dense."""
    last = geometry.block_count - 1
    run = st.tuples(st.integers(0, last), st.integers(1, 130)).map(
        lambda pair: set(range(pair[0], min(pair[0] + pair[1], last + 1)))
    )
    return st.lists(st.one_of(run, st.integers(0, last).map(lambda block: {block}))).map(
        lambda parts: set().union(*parts)
    )
