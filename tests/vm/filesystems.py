"""The file systems of guests: made before the first boot, checked from outside after the last."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tests import devices
from tests.devices import LoopDevice
from tests.e2e.disks import MIB

SIZES = {"ext4": 128 * MIB, "xfs": 320 * MIB}
"""What each kind needs at least: mkfs.xfs makes nothing below 300 MiB."""
CHECKS = {"ext4": ("e2fsck", "-fn"), "xfs": ("xfs_repair", "-n")}
MAKERS = {"ext4": ("mkfs.ext4", "-qF"), "xfs": ("mkfs.xfs", "-qf")}
DIRTY = {
    "ext4": (("dumpe2fs", "-h"), "needs_recovery"),
    "xfs": (("xfs_logprint", "-t"), "state: <DIRTY>"),
}
"""What tells whether a journal is to be replayed, and the word for it."""
START = MIB
"""Where the partition of a partitioned disk begins."""


def make(disk: LoopDevice, kind: str, partitioned: bool) -> None:
    """Put a new file system on a disk, on a GPT partition if it is to have one."""
    if partitioned:
        devices.run("sfdisk", "--quiet", "--no-reread", disk.path, feed="label: gpt\nstart=2048\n")
    with _part(disk, partitioned) as path:
        devices.run(*MAKERS[kind], path)


def check(disk: LoopDevice, kind: str, partitioned: bool) -> None:
    """Raise RuntimeError, with what the checker said, unless the file system is clean."""
    with _part(disk, partitioned) as path:
        devices.run(*CHECKS[kind], path)


def is_dirty(disk: LoopDevice, kind: str, partitioned: bool) -> bool:
    """Whether the file system was not unmounted: its journal is to be replayed."""
    command, word = DIRTY[kind]
    with _part(disk, partitioned) as path:
        return word in devices.run(*command, path)


@contextmanager
def _part(disk: LoopDevice, partitioned: bool) -> Iterator[str]:
    """A device of a disk's file system, from the host.

    Not a partition of the disk's own device: the agents would find that in use.
    """
    if not partitioned:
        yield disk.path
        return
    devices.run("blockdev", "--flushbufs", disk.path)
    # The backup of the table takes the last 33 sectors; the partition ends at a whole MiB.
    size = disk.size_bytes - 2 * START
    options = (f"--offset={START}", f"--sizelimit={size}")
    with devices.attached(disk.backing, disk.sector_size, *options) as path:
        yield path
