"""The file or device that holds an image: who has it open, and its fence.

Owns the lock that keeps QEMUs from opening it, and the one that keeps it from being a target. The
bytes of an image are never read through this.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from native.blockio import BlockDevice

_OFD_GETLK, _OFD_SETLK = 36, 37
"""fcntl(2), open file description locks; Python 3.11 has no names for them."""
_WRITES_BYTE, _NOT_SHARED_BYTE = 101, 201
"""What a QEMU locks that writes to an image, and one that lets nobody else write:
RAW_LOCK_PERM_BASE and RAW_LOCK_SHARED_BASE (block/file-posix.c), each plus 1 for BLK_PERM_WRITE."""
_END_SECONDS = 5.0
"""What a QEMU may take from closing its monitor to closing its disks."""


class Image:
    """An image that is open for reading; closed by `close`."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._device = BlockDevice(path)
        self._fenced = False

    def fileno(self) -> int:
        """Return the descriptor, which stays this object's."""
        return self._device.fileno()

    def stamp(self) -> tuple[int, ...]:
        """Return what is another once somebody has written to the file or device."""
        status = os.fstat(self.fileno())
        counted: tuple[int, ...] = ()
        if stat.S_ISBLK(status.st_mode):
            os.fsync(self.fileno())  # what is in its page cache is not counted yet
            counted = _count_writes(status.st_rdev)
        return status.st_ino, status.st_size, status.st_mtime_ns, *counted

    def has_writer(self) -> bool:
        """Return whether a QEMU has it open for writing (none that runs with locking=off)."""
        asked = _lock(fcntl.F_WRLCK, _WRITES_BYTE)
        told = fcntl.fcntl(self.fileno(), _OFD_GETLK, asked)
        return bool(struct.unpack_from("h", told)[0] != fcntl.F_UNLCK)

    def await_no_writer(self) -> bool:
        """Wait for a QEMU that is on its way out; return whether none has it for writing."""
        deadline = time.monotonic() + _END_SECONDS
        while self.has_writer():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def is_at(self, path: str) -> bool:
        """Return whether this is what a path leads to; by its name alone if nothing is there."""
        mine = os.fstat(self.fileno())
        try:
            there = os.stat(path)
        except OSError:
            return path == self.path
        if stat.S_ISBLK(mine.st_mode):  # there are several /dev
            return stat.S_ISBLK(there.st_mode) and mine.st_rdev == there.st_rdev
        return os.path.samestat(mine, there)

    def is_read_only(self) -> bool:
        """Return whether the fence is up, or nobody had write permission before."""
        return self._device.is_read_only()

    @property
    def is_fenced(self) -> bool:
        """Whether the fence was put up through this."""
        return self._fenced

    def set_read_only(self, read_only: bool) -> None:
        """Raise or lift the fence: the permission, and the lock, which root's QEMUs obey too."""
        self._device.set_read_only(read_only)
        self._fenced = read_only
        kind = fcntl.F_RDLCK if read_only else fcntl.F_UNLCK
        try:
            fcntl.fcntl(self.fileno(), _OFD_SETLK, _lock(kind, _NOT_SHARED_BYTE))
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise

    def close(self) -> None:
        """Close it: the lock goes, the permission stays."""
        with suppress(OSError):
            self._device.close()


@contextmanager
def claim(path: str) -> Iterator[None]:
    """Keep an image from being claimed as a target; OSError EBUSY if it is one.

    As `native.blockio` claims them, but for the lease: a QEMU or qemu-img may open it meanwhile.
    """
    is_device = stat.S_ISBLK(os.stat(path).st_mode)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | (os.O_EXCL if is_device else 0))
    try:
        if not is_device:
            _lock_file(descriptor, path)
        yield
    finally:
        os.close(descriptor)


def _lock_file(descriptor: int, path: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OSError(errno.EBUSY, "it is a target now", path) from error
    except OSError as error:
        # NFS takes it for a lock of all bytes, which would keep out qemu-img, and asks for a
        # descriptor that may write (flock(2)).
        if error.errno not in (errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise


def await_no_writer(path: str) -> None:
    """Wait for a QEMU that may be on its way out, if a file is there."""
    with suppress(OSError):
        image = Image(path)
        try:
            image.await_no_writer()
        finally:
            image.close()


def is_read_only(path: str) -> bool:
    """Return whether the fence of an image is up. OSError."""
    device = BlockDevice(path)
    try:
        return device.is_read_only()
    finally:
        device.close()


def _count_writes(number: int) -> tuple[int, ...]:
    """Return how many sectors of a block device were written and discarded: no flush is either.

    By the kernel's count (Documentation/block/stat.rst): the time of the last change belongs to a
    node in some /dev, and libvirt gives each QEMU a /dev of its own. Nor do discards change it.
    """
    path = f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/stat"
    fields = Path(path).read_text().split()
    return tuple(int(fields[at]) for at in (6, 13) if at < len(fields))


def _lock(kind: int, byte: int) -> bytes:
    """Return a struct flock of one byte."""
    return struct.pack("hhqqi4x", kind, os.SEEK_SET, byte, 1, 0)
