"""A window: an overlay as a file of the kernel, under loop devices, so that tools can work on it.

Owns the FUSE connection of that one file. The mount is taken out of sight as soon as the file is
open, so a killed agent leaves none; its requests fail then, and nothing has reached the device.

Protocol: include/uapi/linux/fuse.h of the kernel, version 7.31; mount.fuse(8) for the options.
"""

from __future__ import annotations

import errno
import logging
import os
import struct
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path

from agent.resize.overlay import Overlay

_log = logging.getLogger(__name__)

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


class Window:
    """Answers the kernel's requests for the file, on a thread of its own."""

    def __init__(self, overlay: Overlay, connection: int) -> None:
        self._overlay = overlay
        self._connection = connection
        self._failing = False
        self._failure: OSError | None = None
        self._thread = threading.Thread(target=self._serve, name="resize-window", daemon=True)
        self._thread.start()

    def fail(self) -> None:
        """Answer everything from now on with EIO: who waits for the device gets on."""
        self._failing = True

    def check(self) -> None:
        """Raise the first OSError that a request met.

        Not every program notices: what it wrote may have failed later, out of the page cache.
        """
        if self._failure is not None:
            raise self._failure

    def join(self, seconds: float) -> bool:
        """Wait for the end of the connection; returns whether it came."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _serve(self) -> None:
        buffer = bytearray(_MOST_BYTES + 65536)
        while True:
            try:
                length = os.readv(self._connection, [buffer])
            except InterruptedError:
                continue
            except OSError as error:
                if error.errno == errno.ENOENT:  # a request that was taken back
                    continue
                return  # ENODEV: the last user is gone
            _, operation, unique, *_ = _IN.unpack_from(buffer)
            if operation in _UNANSWERED:
                continue
            self._reply(unique, operation, memoryview(buffer)[_IN.size : length])

    def _reply(self, unique: int, operation: int, request: memoryview) -> None:
        code, answer = 0, b""
        try:
            answer = self._answer(operation, request)
        except OSError as error:
            code = -(error.errno or errno.EIO)
            if operation in (_Operation.READ, _Operation.WRITE):
                self._failure = self._failure or error
        except Exception as error:  # unanswered, it would hang its process for ever
            _log.exception("resize: request failed")
            code = -errno.EIO
            self._failure = self._failure or OSError(errno.EIO, repr(error))
        try:
            os.writev(self._connection, [_OUT.pack(_OUT.size + len(answer), code, unique), answer])
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                _log.warning('resize: answer refused reason="%s"', error)

    def _answer(self, operation: int, request: memoryview) -> bytes:
        if operation == _Operation.INIT:
            return _init()
        if self._failing:
            raise OSError(errno.EIO, "given up")
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


@contextmanager
def opened(overlay: Overlay, point: Path, seconds: float) -> Iterator[tuple[Window, int]]:
    """Yield the window and a descriptor of its file. OSError if the kernel has no FUSE.

    `point` is an empty file to mount on, made and removed here.
    """
    connection = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    window = None
    try:
        file, window = _mount(overlay, connection, point, seconds)
        try:
            yield window, file
        finally:
            os.close(file)
    finally:
        if window is not None and not window.join(seconds):
            window.fail()
            _log.error("resize: the kernel still holds the overlay")
        os.close(connection)


def _mount(overlay: Overlay, connection: int, point: Path, seconds: float) -> tuple[int, Window]:
    point.touch(mode=0o600)
    try:
        options = f"fd={connection},rootmode=100000,user_id=0,group_id=0"
        command = ["mount", "-i", "-n", "-t", "fuse", "-o", options, "warmsync", str(point)]
        _run(command, connection, seconds)
        window = Window(overlay, connection)
        try:
            file = os.open(point, os.O_RDWR | os.O_CLOEXEC)
        finally:
            _run(["umount", "-i", "-n", "-l", str(point)], connection, seconds)
    finally:
        point.unlink(missing_ok=True)
    return file, window


def _run(command: list[str], connection: int, seconds: float) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, pass_fds=[connection]
        )
    except subprocess.TimeoutExpired as error:
        raise OSError(errno.ETIMEDOUT, f"{command[0]} took more than {seconds:.0f} s") from error
    if done.returncode != 0:
        raise OSError(errno.EIO, f"{command[0]}: {done.stderr.strip()}")


def _init() -> bytes:
    # struct fuse_init_out: version, read-ahead, flags, background, transfers, time, pages.
    head = struct.pack("<IIII", 7, 31, _MOST_BYTES, _MAX_PAGES)
    limits = struct.pack("<HHIIHH", 16, 12, _MOST_BYTES, 1, _MOST_BYTES // 4096, 0)
    return head + limits + bytes(32)
