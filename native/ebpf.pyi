"""The in-kernel dirty bitmap: loads dirty.bpf.c, attaches it, pins it, maps its memory."""

from typing import NamedTuple

class TrackedRange(NamedTuple):
    """What a pinned tracker watches; kept beside the bitmap, so that a later process can tell."""

    major: int
    minor: int
    disk_sequence: int
    start_sector: int
    sector_count: int
    block_size_bytes: int
    bio_based: bool

class Counters(NamedTuple):
    """What the programs saw since they were attached."""

    seen: int
    """1 once any completion of the disk, reads included, was seen: proof that tracking works."""
    lost: int
    """Writes whose range could not be known. Any change makes the whole volume suspect."""

def check() -> str | None:
    """Try to load (not attach) the programs. Returns None, or why this kernel cannot."""

class KernelTracker:
    """Programs attached to the block layer for one range of one disk.

    `pin_dir`: a directory on a bpffs, made here (the parent must exist; EEXIST if it does);
    link and maps are pinned in it and go on marking when the process ends.
    Raises OSError with errno and what was attempted; the verifier's log in a note.
    """

    @classmethod
    def attach(cls, watch: TrackedRange, pin_dir: str) -> KernelTracker: ...
    @classmethod
    def open(cls, pin_dir: str) -> KernelTracker:
        """Take up pinned programs again. OSError(ENOENT) if incomplete."""
    @property
    def watch(self) -> TrackedRange: ...
    @property
    def words(self) -> memoryview:
        """The bitmap's words (writable, format "Q"), shared with the kernel: for DirtyBitmap."""
    def counters(self) -> Counters: ...
    def close(self) -> None:
        """Unmap and close; the kernel goes on marking while the pins exist."""
    def destroy(self) -> None:
        """Detach and remove the pins. Safe to call twice."""
