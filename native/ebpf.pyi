"""The in-kernel dirty bitmap: loads dirty.bpf.c, attaches it, pins it, maps its memory.

Needs kernel 5.17 or later with BTF (not PREEMPT_RT) and root. libbpf's and the verifier's words are
in a note of the OSError.
"""

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
    queue_count: int
    """Hardware queues of a request-based disk, and the tags of each; 0 if bio-based."""
    queue_depth: int

class InFlight(NamedTuple):
    """A write that was issued and not yet seen to complete, in sectors of the whole disk."""

    key: int
    sector: int
    sector_count: int
    state: int

class Counters(NamedTuple):
    """What the programs saw since they were attached."""

    seen: int
    """1 once any completion of the disk, reads included, was seen: proof that tracking works."""
    lost: int
    """Counts writes whose range could not be known (perhaps at issue and again at completion).

    Any change makes the whole volume suspect: commands passed through (SG_IO, NVMe), zone resets,
    and on a bio-based disk a write that was in flight at attach. The last are harmless if they end
    before the first read: compare with the value at that time.
    """

class Sectors(NamedTuple):
    """Sectors of 512 bytes written (zeros and secure erase among them), and discarded."""

    written: int
    discarded: int

def check() -> str | None:
    """Try to load (not attach) the programs. Returns None, or why this kernel cannot."""

def remove(pin_dir: str) -> None:
    """Remove a tracker's pins and directory, complete or not: marking ends.

    No error if there is none. OSError(ENOTEMPTY) if the directory holds anything else, EINVAL if it
    is not on a bpffs.
    """

class KernelTracker:
    """Programs attached to the block layer for one range of one disk.

    `pin_dir`: a directory on a bpffs, made here (the parent must exist; EEXIST if it does);
    link and maps are pinned in it and go on marking when the process ends.
    Raises OSError with errno and what was attempted (EINVAL: not a bpffs; EPERM), the verifier's
    log in a note; ValueError for a range that cannot be or a block size that is not a power of two
    from 512 bytes to 1 GiB, and when used after close. If attach fails, nothing stays pinned.
    """

    @classmethod
    def attach(cls, watch: TrackedRange, pin_dir: str) -> KernelTracker: ...
    @classmethod
    def open(cls, pin_dir: str) -> KernelTracker:
        """Take up pinned programs again.

        OSError(ENOENT) if a pin is missing (`remove` the rest), EINVAL if they are not a tracker's
        or are another layout version's.
        """
    @property
    def pin_dir(self) -> str: ...
    @property
    def watch(self) -> TrackedRange: ...
    @property
    def words(self) -> memoryview:
        """The bitmap's words (writable, format "Q"), shared with the kernel: for DirtyBitmap.

        Stays valid while referenced: the memory is unmapped once closed and no view is left.
        """
    def counters(self) -> Counters: ...
    def sums(self) -> Sectors:
        """What was seen of the whole disk since the attach, as its own counters have it.

        These never have more than the sums and, on a request-based disk, `in_flight`, read in this
        order: the disk's counters, the notes, the sums. The sums may have more.
        """
    @property
    def base(self) -> Sectors | None:
        """Numbers of the caller's that are kept with the pins, for a later process; may be set."""
    @base.setter
    def base(self, base: Sectors | None) -> None: ...
    def in_flight(self) -> list[InFlight]:
        """Return the writes that were issued and not seen to complete.

        Who takes the marks must afterwards mark these: a completion may never be seen.
        """
    def forget(self, write: InFlight) -> None:
        """Drop the note of a write that is known to have ended, unless the note has changed.

        Its completion was missed by the programs. Mark its range before.
        """
    def close(self) -> None:
        """Unmap and close; the kernel goes on marking while the pins exist."""
    def destroy(self) -> None:
        """Detach and remove the pins, then close. Safe to call twice and after close.

        The kernel may run the programs a moment longer, on its way out.
        """
