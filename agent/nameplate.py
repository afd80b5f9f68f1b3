"""What a device is for good: the same after a reboot, whatever its name and its number are then.

Owns which of the kernel's answers say so. Never takes a name or a number of one boot for it: what
has no lasting mark is unknown, and unknown is like nothing. Reads no data, and needs no udev.
"""

from __future__ import annotations

import fcntl
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from agent.device import SECTOR_BYTES, disk_range, system_path
from agent.errors import FailedPrecondition

_MARKS = ("wwid", "device/wwid", "dm/uuid", "md/uuid", "serial", "device/serial")
"""The first that a disk has counts (Documentation/ABI of the kernel: sysfs-block, stable and
testing): NVMe's is made of uuid, nguid, eui64 or serial and namespace, SCSI's of VPD page 0x83;
then device mapper, md, virtio, MMC.
"""

_FS_IOC_GETVERSION = 0x80087601  # _IOR('v', 1, long), linux/fs.h; four bytes are written
_FS_IOC_GETFSUUID = 0x80111500  # _IOR(0x15, 0, struct fsuuid2), linux/fs.h of 6.9


class HasFileno(Protocol):
    """What is open."""

    def fileno(self) -> int:
        """Return its descriptor."""


def nameplate(device: HasFileno) -> str:
    """Return what a device or file is on every boot of this host; empty if nothing says so."""
    try:
        return _of(device.fileno())
    except OSError:  # not on this kernel, or gone meanwhile
        return ""


def _of(descriptor: int) -> str:
    status = os.fstat(descriptor)
    if stat.S_ISBLK(status.st_mode):
        return _of_block(status.st_rdev)
    where = _of_file_system(descriptor, status.st_dev)
    # Numbers of inodes are given again; their generation tells them apart. Who has none, as tmpfs
    # or a file system of the network, is not known.
    number = fcntl.ioctl(descriptor, _FS_IOC_GETVERSION, bytes(8))[:4]
    return where and f"{where} inode={status.st_ino}/{int.from_bytes(number, 'little')}"


def _of_file_system(descriptor: int, device_number: int) -> str:
    with suppress(OSError):  # btrfs and all that is not on a disk has a number of no device
        if found := _of_block(device_number):
            return found
    uuid = fcntl.ioctl(descriptor, _FS_IOC_GETFSUUID, bytes(17))[1:]
    return f"file-system={uuid.hex()}" if any(uuid) else ""


def _of_block(device_number: int) -> str:
    """A partition is where it begins: its own uuid goes with a copy of the table."""
    system = system_path(device_number)
    part = disk_range(device_number)
    is_partition = (system / "partition").exists()
    disk = system.parent if is_partition else system
    whole = _of_loop(disk / "loop") if (disk / "loop").exists() else _mark_of(disk)
    return f"{whole} start={part.start_sector * SECTOR_BYTES}" if whole and is_partition else whole


def _of_loop(loop: Path) -> str:
    """A loop device is the part of the file that it shows."""
    descriptor = os.open((loop / "backing_file").read_text().rstrip("\n"), os.O_RDONLY)
    try:
        file = _of(descriptor)
    finally:
        os.close(descriptor)
    return file and f"{file} offset={int((loop / 'offset').read_text())}"


def _mark_of(disk: Path) -> str:
    for name in _MARKS:
        try:
            text = "_".join((disk / name).read_text().split())
        except (OSError, UnicodeDecodeError):
            continue
        if text.rpartition(".")[2].strip("0-_"):  # zeros stand for nothing
            return f"{name}={text}"
    return ""


def another_disk(source: str, known: str, found: str) -> FailedPrecondition:
    """Return the error of a source whose name another disk has now."""
    return FailedPrecondition(
        "SOURCE_REPLACED",
        f"{source} is another disk than the one that is migrated ({known}, now "
        f"{found or 'unknown'}); give that its name again and restart the agent, or start a "
        "new migration",
        path=source,
        expected=known,
        found=found,
    )
