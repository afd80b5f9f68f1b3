"""Reproducible content for disks, and byte compares that say where two differ."""

from __future__ import annotations

import mmap
import os
import random
import stat
from collections.abc import Iterator
from pathlib import Path

STEP_BYTES = 1 << 20


def pieces(size_bytes: int, seed: int) -> Iterator[bytes]:
    """Yield regions that are random, zero or compressible, together `size_bytes` long."""
    rng = random.Random(seed)
    left = size_bytes
    while left:
        length = min(left, rng.choice((512, 4096, 65536, 200_704, STEP_BYTES)))
        yield _region(rng, rng.choice(("random", "random", "zero", "compressible")), length)
        left -= length


def content(size_bytes: int, seed: int) -> bytes:
    """Return all of `pieces`."""
    return b"".join(pieces(size_bytes, seed))


def fill(path: str | Path, seed: int) -> None:
    """Write `pieces` over a whole device or file, and make it durable."""
    offset, held = 0, b""
    with Disk(path, writable=True) as disk:
        for piece in pieces(disk.size_bytes, seed):
            held += piece
            while len(held) >= STEP_BYTES:
                disk.write(offset, held[:STEP_BYTES])
                held, offset = held[STEP_BYTES:], offset + STEP_BYTES
        disk.write(offset, held)
        os.fsync(disk.fd)


def read_all(path: str | Path) -> bytes:
    """Return every byte of a device (past its page cache) or file."""
    with Disk(path) as disk:
        return b"".join(disk.steps())


def first_difference(
    left: str | Path, right: str | Path, start_bytes: int = 0, end_bytes: int | None = None
) -> int | None:
    """Return the first byte offset where two devices or files differ, None if they are equal.

    Only `[start_bytes, end_bytes)` of them counts. A shorter one differs where it ends.
    """
    with Disk(left) as one, Disk(right) as other:
        ends = [min(disk.size_bytes, end_bytes or disk.size_bytes) for disk in (one, other)]
        offset = start_bytes
        for a, b in zip(one.steps(start_bytes), other.steps(start_bytes), strict=False):
            left_bytes = max(0, min(ends) - offset)
            if a[:left_bytes] != b[:left_bytes]:
                return offset + _mismatch(a, b)
            offset += STEP_BYTES
        return None if ends[0] == ends[1] else min(ends)


def files_equal(left: str | Path, right: str | Path) -> bool:
    """Return whether two devices or files hold the same bytes and are of the same size."""
    return first_difference(left, right) is None


class Disk:
    """A device opened with O_DIRECT or a file opened as usual: the independent view of tests.

    Block devices are read past the page cache, because partitions and whole disks have one each.
    """

    def __init__(self, path: str | Path, writable: bool = False) -> None:
        access = os.O_RDWR if writable else os.O_RDONLY
        is_block = stat.S_ISBLK(Path(path).stat().st_mode)
        self.fd = os.open(path, access | os.O_CLOEXEC | (os.O_DIRECT if is_block else 0))
        self.size_bytes = os.lseek(self.fd, 0, os.SEEK_END)
        self._buffer = mmap.mmap(-1, STEP_BYTES)

    def __enter__(self) -> Disk:
        return self

    def __exit__(self, *_: object) -> None:
        self._buffer.close()
        os.close(self.fd)

    def read(self, offset_bytes: int, length_bytes: int) -> bytes:
        """Return bytes; sector aligned for block devices, at most STEP_BYTES."""
        with memoryview(self._buffer) as whole, whole[:length_bytes] as view:
            count = os.preadv(self.fd, [view], offset_bytes)
            assert count == length_bytes, f"short read of {count} at {offset_bytes}"
            return bytes(view)

    def write(self, offset_bytes: int, data: bytes) -> None:
        """Write bytes; sector aligned for block devices, at most STEP_BYTES."""
        with memoryview(self._buffer) as whole, whole[: len(data)] as view:
            view[:] = data
            count = os.pwritev(self.fd, [view], offset_bytes)
            assert count == len(data), f"short write of {count} at {offset_bytes}"

    def steps(self, start_bytes: int = 0) -> Iterator[bytes]:
        """Yield everything from an offset on in pieces of STEP_BYTES."""
        for offset in range(start_bytes, self.size_bytes, STEP_BYTES):
            yield self.read(offset, min(STEP_BYTES, self.size_bytes - offset))


def _region(rng: random.Random, kind: str, length: int) -> bytes:
    if kind == "zero":
        return bytes(length)
    if kind == "random":
        return rng.randbytes(length)
    return (rng.randbytes(16) * (length // 16 + 1))[:length]


def _mismatch(a: bytes, b: bytes) -> int:
    for position, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return position
    return min(len(a), len(b))
