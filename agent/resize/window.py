"""A window: an overlay as a file of the kernel, under loop devices, so that tools can work on it.

Owns the mount of that one file, and the process that answers for it (`agent.resize.server`). The
mount is taken out of sight as soon as the file is open, so that a killed agent leaves none; the
process ends with the agent, its requests fail then, and nothing has reached the device.

See fuse(4) and mount.fuse(8) for the options.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from agent.resize.overlay import Overlay
from agent.resize.tool import find


class Window:
    """The process that serves the file; its words at the end are what went wrong."""

    def __init__(self, overlay: Overlay, connection: int) -> None:
        passed = [connection, overlay.device_descriptor, *overlay.shared]
        server = [sys.executable, "-m", "agent.resize.server", *map(str, passed)]
        self._process = subprocess.Popen(
            [str(find("setpriv")), "--pdeathsig", "KILL", "--", *server],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=passed,
            start_new_session=True,
        )
        self._failure = ""

    def fail(self) -> None:
        """Let everything fail from now on: who waits for the device gets on."""
        self._process.kill()

    def join(self, seconds: float) -> None:
        """Wait for the process, which ends when nobody uses the file any more."""
        try:
            said, wrong = self._process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            said, wrong = self._process.communicate()
        if self._process.returncode > 0:
            said = said or wrong[-300:].strip() or "the process that serves it has failed"
        self._failure = said

    def check(self) -> None:
        """Raise OSError for the first thing that went wrong with the data, once joined.

        Not every program notices: what it wrote may have failed later, out of the page cache.
        """
        if self._failure:
            raise OSError(errno.EIO, self._failure)


@contextmanager
def opened(overlay: Overlay, point: Path, seconds: float) -> Iterator[tuple[Window, int]]:
    """Yield the window and a descriptor of its file. OSError if the kernel has no FUSE.

    At the end OSError for what went wrong with the data, also instead of another error.
    `point` is an empty file to mount on, made and removed here.
    """
    window, file = _mount(overlay, point, seconds)
    try:
        yield window, file
    finally:
        with suppress(OSError):  # of a window that was let fail
            os.close(file)
        window.join(seconds)
        window.check()


def _mount(overlay: Overlay, point: Path, seconds: float) -> tuple[Window, int]:
    connection = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    window = None
    try:
        point.touch(mode=0o600)
        options = f"fd={connection},rootmode=100000,user_id=0,group_id=0"
        command = ["mount", "-i", "-n", "-t", "fuse", "-o", options, "warmsync", str(point)]
        _run(command, connection, seconds)
        try:
            window = Window(overlay, connection)
            # Its own copy is the last one: if it ends, what waits for an answer gets an error.
            os.close(connection)
            connection = -1
            return window, os.open(point, os.O_RDWR | os.O_CLOEXEC)
        finally:
            _run(["umount", "-i", "-n", "-l", str(point)], -1, seconds)
    except BaseException:
        if window is not None:
            window.fail()
            window.join(seconds)
        raise
    finally:
        if connection >= 0:
            os.close(connection)
        point.unlink(missing_ok=True)


def _run(command: list[str], connection: int, seconds: float) -> None:
    passed = [connection] if connection >= 0 else []
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, pass_fds=passed
        )
    except subprocess.TimeoutExpired as error:
        raise OSError(errno.ETIMEDOUT, f"{command[0]} took more than {seconds:.0f} s") from error
    if done.returncode != 0:
        raise OSError(errno.EIO, f"{command[0]}: {done.stderr.strip()}")
