"""Loop devices over an open file, or a part of it: made, and sure to be taken away.

Owns their numbers. The kernel takes them away by itself once nobody has them open (autoclear), also
when the agent is killed. Interface: loop(4), LOOP_CONFIGURE of Linux 5.8.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_CONTROL = "/dev/loop-control"
_GET_FREE = 0x4C82
_CONFIGURE = 0x4C0A
_AUTOCLEAR = 4
_TRIES = 64

# struct loop_info64: device, inode, rdev, offset, sizelimit, number, encryption, key size, flags,
# name, crypt name, key, init.
_INFO = struct.Struct("<QQQQQIIII64s64s32s2Q")


@contextmanager
def attached(
    file: int, sector_bytes: int, offset_bytes: int, length_bytes: int, seconds: float
) -> Iterator[str]:
    """Yield the path of a loop device over [offset, offset + length) of an open file. OSError."""
    device, path = _attach(file, sector_bytes, offset_bytes, length_bytes)
    try:
        yield path
    finally:
        os.close(device)
        _await_end(path, seconds)


def _attach(file: int, sector_bytes: int, offset: int, length: int) -> tuple[int, str]:
    info = _INFO.pack(0, 0, 0, offset, length, 0, 0, 0, _AUTOCLEAR, b"warmsync", b"", b"", 0, 0)
    wanted = struct.pack("<II", file, sector_bytes) + info + bytes(64)
    for _ in range(_TRIES):
        path = _free()
        device = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.ioctl(device, _CONFIGURE, wanted)
        except OSError as error:
            os.close(device)
            if error.errno != errno.EBUSY:  # another was faster
                raise
        else:
            return device, path
    raise OSError(errno.EBUSY, "no loop device is free")


def _free() -> str:
    control = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        return f"/dev/loop{fcntl.ioctl(control, _GET_FREE)}"
    finally:
        os.close(control)


def _await_end(path: str, seconds: float) -> None:
    """Wait until it is taken away: a process or a namespace may be about to end."""
    system = Path("/sys/block", Path(path).name, "loop")
    deadline = time.monotonic() + seconds
    while (system / "autoclear").exists():
        if time.monotonic() > deadline:
            raise OSError(errno.EBUSY, "a loop device is still in use", path)
        time.sleep(0.01)
