"""What the kernel counts of the disk under a device: requests that ended, and that are under way.

Owns the reading of a disk's `stat`, for this and for whoever asks whether a disk answers. Decides
nothing, and takes what cannot be read for nothing: not every disk counts (`queue/iostats`).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass

from agent.device import system_path
from native.blockio import BlockDevice

_READS, _WRITES, _IN_FLIGHT, _DISCARDS, _FLUSHES = 0, 4, 8, 11, 15
"""Fields of Documentation/block/stat.rst of the kernel; discards since 4.19, flushes since 5.5."""


@dataclass(frozen=True, slots=True)
class Requests:
    """Of a disk since it is there, whoever made them."""

    ended: int
    in_flight: int
    writes: int
    """Those of `ended` that wrote or discarded."""


def number_of(device: BlockDevice) -> int:
    """Return the number of a device, for a file that of the file system's; 0 if it has none.

    May wait for a file system that does not answer.
    """
    try:
        status = os.fstat(device.fileno())
    except (OSError, ValueError):  # a disk of QEMU's without a file, or it is closed
        return 0
    return status.st_rdev if stat.S_ISBLK(status.st_mode) else status.st_dev


def read_requests(number: int) -> Requests | None:
    """Return a device's requests, for a file those of the disk that its file system is on.

    None where that is not known: memory, user space, the network, btrfs. Never waits for the disk.
    """
    try:
        text = (system_path(number) / "stat").read_text()
    except OSError:
        return None
    fields = [int(field) for field in text.split()]
    fields += [0] * (_FLUSHES + 1 - len(fields))
    writes = fields[_WRITES] + fields[_DISCARDS]
    return Requests(fields[_READS] + writes + fields[_FLUSHES], fields[_IN_FLIGHT], writes)


def count_writes(device: BlockDevice) -> int:
    """Return how many writes and discards a block device has completed; 0 for a file."""
    found = read_requests(number_of(device)) if device.is_block_device else None
    return 0 if found is None else found.writes


def busy(devices: Sequence[BlockDevice]) -> list[str]:
    """Return the paths of devices with requests under way; of all, if the kernel tells of none."""
    asked = [(one.path, read_requests(number_of(one))) for one in devices]
    found = [path for path, got in asked if got is not None and got.in_flight]
    return found or [one.path for one in devices]
