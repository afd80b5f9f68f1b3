"""Devices and image files of this host: opened, checked, identified.

Owns what a path really is and whether it may be touched. Never decides what to do with the bytes.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from agent.config import is_allowed
from agent.errors import (
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotAllowed,
    NotFound,
    ResourceExhausted,
    WarmsyncError,
)
from agent.migration import Identity
from native.bitmap import DirtyBitmap
from native.blockio import BlockDevice

LEAST_DATA_BYTES = 256 * 1024
"""Holes right behind less data than this are read: that takes about as long as to find them."""

SECTOR_BYTES = 512
_SYS_BLOCK = Path("/sys/dev/block")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@runtime_checkable
class Described(Protocol):
    """A device that is no file of the kernel's and knows itself what it is."""

    def identities(self) -> tuple[Identity, ...]:
        """Return what it really is, so that two names of one thing are noticed."""

    def key(self) -> tuple[int, int, int]:
        """Return what it is on this boot."""

    def obstacle(self) -> str:
        """Return why it is still in use; empty if nothing says so."""

    def follow(self) -> None:
        """Go on with whoever shows it now, who may be another than before."""


@dataclass(frozen=True, slots=True)
class DiskRange:
    """Where a block device lies on its whole disk, in sectors of 512 bytes."""

    major: int
    minor: int
    name: str
    disk_sequence: int
    start_sector: int
    sector_count: int
    bio_based: bool
    queue_count: int
    queue_depth: int


def boot_id() -> str:
    """Return the id of this boot of this host."""
    return _BOOT_ID.read_text().strip()


def open_device(
    path: str, allowed: tuple[str, ...], *, writable: bool = False, exclusive: bool = False
) -> BlockDevice:
    """Open a device or file that the configuration allows, with typed errors."""
    check_allowed(path, os.path.realpath(path), allowed)
    try:
        device = BlockDevice(path, writable=writable, exclusive=exclusive)
    except OSError as error:
        raise open_error(path, error) from error
    try:
        # What was opened, in case a link on the way was changed meanwhile.
        check_allowed(path, os.readlink(f"/proc/self/fd/{device.fileno()}"), allowed)
    except BaseException:
        device.close()
        raise
    return device


def check_allowed(path: str, resolved: str, allowed: tuple[str, ...]) -> None:
    """Raise NotAllowed unless a pattern of the configuration matches the path and what it is."""
    if not is_allowed(path, resolved, allowed):
        raise NotAllowed(
            "DEVICE_NOT_ALLOWED",
            f"{path} is not among the devices that this agent may touch; "
            "start the agent with --allow-device or add it to allow_devices in its configuration",
            path=path,
        )


def open_error(path: str, error: OSError) -> WarmsyncError:
    """Return the domain's error for an open that failed."""
    values = {"path": path, "errno": errno.errorcode.get(error.errno or 0, str(error.errno))}
    match error.errno:
        case errno.ENOENT | errno.ENXIO | errno.ENOTDIR | errno.ENODEV:
            message = f"{path} does not exist; check the name, or create it with the right size"
            return NotFound("DEVICE_NOT_FOUND", message, **values)
        case errno.EACCES | errno.EPERM:
            message = f"no permission for {path}; run the agent as root or grant it access"
            return NotAllowed("PERMISSION_DENIED", message, **values)
        case errno.ENOTBLK | errno.EISDIR:
            message = f"{path} is neither a block device nor a regular file; name one of these"
            return InvalidArgument("NOT_A_DEVICE", message, **values)
        case errno.EBUSY:
            message = f"{path} is in use ({users_of(path)}); unmount or release it first"
            return FailedPrecondition("DEVICE_IN_USE", message, **values)
        case errno.EROFS:
            message = f"{path} is read-only; make it writable (blockdev --setrw) if that is right"
            return FailedPrecondition("DEVICE_READ_ONLY", message, **values)
    message = f"{path} cannot be opened: {error.strerror}; see the kernel log"
    return FailedPrecondition("DEVICE_UNUSABLE", message, **values)


_HUNG_UP = frozenset(
    {errno.ENOTCONN, errno.ECONNREFUSED, errno.ECONNRESET, errno.EPIPE, errno.ESHUTDOWN}
)
"""What no disk says, but whoever reads through a QEMU that has ended."""


def io_error(side: str, error: OSError) -> WarmsyncError:
    """Return the domain's error for a read or write that failed; `side` is source or target."""
    name = errno.errorcode.get(error.errno or 0, str(error.errno))
    path = str(error.filename or "")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        message = (
            f"the disk under {side} {path} is full ({error.strerror}); free space and start again"
        )
        return ResourceExhausted("DISK_FULL", message, path=path, errno=name, side=side)
    mend = (
        "see that its QEMU runs" if error.errno in _HUNG_UP else "check the disk and the kernel log"
    )
    message = f"{side} {path}: {error.strerror} ({name}); {mend}"
    return DataLoss(f"{side.upper()}_IO_ERROR", message, path=path, errno=name, side=side)


def users_of(path: str) -> str:
    """Return who holds a path, as far as the kernel tells."""
    return ", ".join(known_users(path)) or "held by another process"


def known_users(path: str) -> list[str]:
    """Return the mounts, holders and busy partitions of a path; opens nothing."""
    real = os.path.realpath(path)
    try:
        status = os.stat(real)
    except OSError:
        return []
    users = [f"mounted at {point}" for point in _mount_points(status)]
    if stat.S_ISBLK(status.st_mode):
        system = _SYS_BLOCK / f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
        users += [f"held by {holder.name}" for holder in system.glob("holders/*")]
        users += [f"partition {name}" for name in _busy_partitions(system)]
    return users


def identities(path: str) -> tuple[Identity, ...]:
    """Return what a device or file really is, from itself down to the file that backs a loop."""
    status = os.stat(path)
    if not stat.S_ISBLK(status.st_mode):
        return (_file_identity(status, 0, status.st_size),)
    disk = disk_range(status.st_rdev)
    start, length = disk.start_sector * SECTOR_BYTES, disk.sector_count * SECTOR_BYTES
    own = Identity(f"block:{disk.major}:{disk.minor}", start, length)
    loop = _SYS_BLOCK / f"{disk.major}:{disk.minor}" / "loop"
    try:
        backing = os.stat((loop / "backing_file").read_text().rstrip("\n"))
        offset = int((loop / "offset").read_text())
    except OSError:  # not a loop device, or its file has no name any more: known by itself only
        return (own,)
    return (own, _file_identity(backing, offset + start, length))


def system_path(device_number: int) -> Path:
    """Return a block device's directory in sysfs; a partition's lies in that of its disk."""
    return (_SYS_BLOCK / f"{os.major(device_number)}:{os.minor(device_number)}").resolve()


def disk_range(device_number: int) -> DiskRange:
    """Return where a block device (st_rdev) lies on its whole disk; OSError without sysfs."""
    system = system_path(device_number)
    sectors = int((system / "size").read_text())
    is_partition = (system / "partition").exists()
    disk = system.parent if is_partition else system
    major, minor = map(int, (disk / "dev").read_text().split(":"))
    sequence = disk / "diskseq"
    queues = [path for path in disk.glob("mq/*") if path.is_dir()]
    return DiskRange(
        major=major,
        minor=minor,
        name=disk.name,
        disk_sequence=int(sequence.read_text()) if sequence.exists() else 0,
        start_sector=int((system / "start").read_text()) if is_partition else 0,
        sector_count=sectors,
        bio_based=not queues,
        queue_count=len(queues),
        queue_depth=max((int((one / "nr_tags").read_text()) for one in queues), default=0),
    )


def map_data(device: BlockDevice, size_bytes: int, block_size_bytes: int) -> DirtyBitmap:
    """Return a bitmap of what may hold data; everything where the device cannot tell.

    Blocking: asks the file system for holes, which takes time on a fragmented file.
    """
    data = DirtyBitmap(size_bytes, block_size_bytes)
    ranges = device.data_extents(least_bytes=LEAST_DATA_BYTES)
    if ranges is None:
        data.set_all()
        return data
    for offset, length in ranges:
        if offset < size_bytes:
            data.set_range(offset, min(length, size_bytes - offset))
    return data


def device_key(device: BlockDevice) -> tuple[int, int, int]:
    """Return what a device is on this boot: major, minor and disk sequence; or which file it is."""
    if isinstance(device, Described):
        return device.key()
    status = os.fstat(device.fileno())
    if not device.is_block_device:
        return status.st_dev, status.st_ino, 0
    disk = disk_range(status.st_rdev)
    return os.major(status.st_rdev), os.minor(status.st_rdev), disk.disk_sequence


def is_claimed(path: str) -> bool:
    """Return whether a block device is mounted or held; for a file, never known (False).

    Not proof that nobody writes: a VM's disk is opened without a claim.
    """
    if not stat.S_ISBLK(os.stat(path).st_mode):
        return False
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        if error.errno == errno.EBUSY:
            return True
        raise
    return False


def _file_identity(status: os.stat_result, start_bytes: int, length_bytes: int) -> Identity:
    name = f"file:{os.major(status.st_dev)}:{os.minor(status.st_dev)}:{status.st_ino}"
    return Identity(name, start_bytes, length_bytes)


def _mount_points(status: os.stat_result) -> list[str]:
    if not stat.S_ISBLK(status.st_mode):
        return []
    number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    fields = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [field[4] for field in fields if field[2] == number]


def _busy_partitions(system: Path) -> list[str]:
    names = []
    for part in system.glob("*/partition"):
        device = part.parent
        major, minor = map(int, (device / "dev").read_text().split(":"))
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
        if any(line.split()[2] == f"{major}:{minor}" for line in mounts):
            names.append(f"{device.name} is mounted")
        names += [f"{device.name} is held by {holder.name}" for holder in device.glob("holders/*")]
    return names
