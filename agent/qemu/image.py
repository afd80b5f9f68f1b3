"""The file or device that holds an image: who has it open, and its fence.

Owns the lock that keeps QEMUs from opening it. The bytes of an image are never read through this.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from contextlib import suppress

from native.blockio import BlockDevice

_OFD_GETLK, _OFD_SETLK = 36, 37
"""fcntl(2), open file description locks; Python 3.11 has no names for them."""
_WRITES_BYTE, _NOT_SHARED_BYTE = 101, 201
"""What a QEMU locks that writes to an image, and one that lets nobody else write:
RAW_LOCK_PERM_BASE and RAW_LOCK_SHARED_BASE (block/file-posix.c), each plus 1 for BLK_PERM_WRITE."""


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
        """Return what is another once somebody has written to the file."""
        status = os.fstat(self.fileno())
        return status.st_ino, status.st_size, status.st_mtime_ns

    def has_writer(self) -> bool:
        """Return whether a QEMU has it open for writing (none that runs with locking=off)."""
        asked = _lock(fcntl.F_WRLCK, _WRITES_BYTE)
        told = fcntl.fcntl(self.fileno(), _OFD_GETLK, asked)
        return bool(struct.unpack_from("h", told)[0] != fcntl.F_UNLCK)

    def is_read_only(self) -> bool:
        """Return whether the fence is up, or nobody had write permission before."""
        return self._device.is_read_only()

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


def _lock(kind: int, byte: int) -> bytes:
    """Return a struct flock of one byte."""
    return struct.pack("hhqqi4x", kind, os.SEEK_SET, byte, 1, 0)
