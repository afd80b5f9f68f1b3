"""Answers the kernel's requests for the file of a window: a process of its own.

Owns one FUSE connection. A process of its own because of its end: a killed process that serves a
file which it has open itself waits for its own answers for ever (seen on 6.18, in fuse_flush). This
one has nothing open but the connection, and is killed after the agent (PR_SET_PDEATHSIG), whose
files are closed by then.

Protocol: include/uapi/linux/fuse.h of the kernel, version 7.31.
"""

from __future__ import annotations

import errno
import os
import struct
import sys
from enum import IntEnum

from agent.resize.overlay import Overlay, Shared
from native.blockio import BlockDevice

_IN = struct.Struct("<IIQQIIIHH")
_OUT = struct.Struct("<IiQ")
_TRANSFER = struct.Struct("<QQIIQII")
_FALLOCATE = struct.Struct("<QQQII")
_MOST_BYTES = 1 << 20
_MAX_PAGES = 1 << 22
_DIRECT = 1
_ZEROING = 0x02 | 0x10
"""FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE."""


class _Operation(IntEnum):
    """enum fuse_opcode."""

    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    FLUSH = 25
    INIT = 26
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42
    FALLOCATE = 43


_UNANSWERED = frozenset({_Operation.FORGET, _Operation.INTERRUPT, _Operation.BATCH_FORGET})
_PLAIN = frozenset({_Operation.RELEASE, _Operation.FSYNC, _Operation.FLUSH, _Operation.DESTROY})


class Server:
    """Answers requests until the last user of the file is gone."""

    def __init__(self, overlay: Overlay, connection: int) -> None:
        self._overlay = overlay
        self._connection = connection
        self.failure = ""

    def run(self) -> None:
        """Answer; returns when the file system is unmounted and nobody has the file open."""
        buffer = bytearray(_MOST_BYTES + 65536)
        while True:
            try:
                length = os.readv(self._connection, [buffer])
            except OSError as error:
                if error.errno == errno.ENOENT:  # a request that was taken back
                    continue
                return  # ENODEV
            _, operation, unique, *_ = _IN.unpack_from(buffer)
            if operation not in _UNANSWERED:
                self._reply(unique, operation, memoryview(buffer)[_IN.size : length])

    def _reply(self, unique: int, operation: int, request: memoryview) -> None:
        code, answer = 0, b""
        try:
            answer = self._answer(operation, request)
        except OSError as error:
            code = -(error.errno or errno.EIO)
            if operation in (_Operation.READ, _Operation.WRITE):
                self.failure = self.failure or str(error)
        except Exception as error:  # unanswered, it would hang its process for ever
            code = -errno.EIO
            self.failure = self.failure or repr(error)
        try:
            os.writev(self._connection, [_OUT.pack(_OUT.size + len(answer), code, unique), answer])
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                raise

    def _answer(self, operation: int, request: memoryview) -> bytes:
        if operation == _Operation.INIT:
            return _init()
        match operation:
            case _Operation.READ:
                _, offset, length, *_ = _TRANSFER.unpack_from(request)
                return self._overlay.read(offset, length)
            case _Operation.WRITE:
                _, offset, length, *_ = _TRANSFER.unpack_from(request)
                data = bytes(request[_TRANSFER.size : _TRANSFER.size + length])
                self._overlay.write(offset, data)
                return struct.pack("<II", length, 0)
            case _Operation.FALLOCATE:
                _, offset, length, mode, _ = _FALLOCATE.unpack_from(request)
                if not mode & _ZEROING:
                    raise OSError(errno.EOPNOTSUPP, "fallocate")
                self._overlay.zero(offset, length)
                return b""
        return self._describe(operation)

    def _describe(self, operation: int) -> bytes:
        if operation in (_Operation.GETATTR, _Operation.SETATTR):
            size = self._overlay.size_bytes
            times = struct.pack("<QQQIII", 0, 0, 0, 0, 0, 0)
            rest = struct.pack("<IIIIIII", 0o100600, 1, 0, 0, 0, 4096, 0)
            return struct.pack("<QII", 3600, 0, 0) + struct.pack("<QQQ", 1, size, 0) + times + rest
        if operation == _Operation.OPEN:
            # Past the page cache: what a loop device has written is in the overlay.
            return struct.pack("<QII", 0, _DIRECT, 0)
        if operation == _Operation.STATFS:
            return bytes(80)
        if operation in _PLAIN:
            return b""
        raise OSError(errno.ENOSYS, f"operation {operation}")


def _init() -> bytes:
    # struct fuse_init_out: version, read-ahead, flags, background, transfers, time, pages.
    head = struct.pack("<IIII", 7, 31, _MOST_BYTES, _MAX_PAGES)
    limits = struct.pack("<HHIIHH", 16, 12, _MOST_BYTES, 1, _MOST_BYTES // 4096, 0)
    return head + limits + bytes(32)


def main(connection: str, device: str, *shared: str) -> None:
    """Serve; what went wrong with the data is said on standard output at the end."""
    with BlockDevice(f"/proc/self/fd/{device}") as opened:
        server = Server(Overlay.join(opened, Shared(*map(int, shared))), int(connection))
        server.run()
    sys.stdout.write(server.failure)


if __name__ == "__main__":
    main(*sys.argv[1:])
