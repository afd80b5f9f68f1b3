"""A disk with a volatile cache: it fails, stalls, and loses what was not flushed.

A loop device on a file that nbdfuse shows of nbdkit, whose cache filter keeps writes until a
flush; killed with SIGKILL, the cache is gone. `path` is a link: a new loop device takes the old
one's place.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests import devices

OPERATIONS = ("pread", "pwrite", "zero")


class FragileDisk:
    """`path` names the device; see `fragile_disk`."""

    def __repr__(self) -> str:
        """Return which it is."""
        return f"fragile disk {self.path}, lost {self._losses} times"

    def __init__(
        self, directory: Path, size_bytes: int, sector_size: int, *, volatile: bool
    ) -> None:
        self._directory, self._sector_size = directory, sector_size
        self._size_bytes, self._volatile = size_bytes, volatile
        self._raw = directory / "raw"
        with self._raw.open("wb") as raw:
            raw.truncate(size_bytes)
        self.path = str(directory / "disk")
        self._losses = 0
        self._start()

    @contextmanager
    def failing(self, *operations: str) -> Iterator[None]:
        """Answer EIO to some of OPERATIONS within the block."""
        triggers = [self._directory / f"fail-{name}" for name in operations]
        for trigger in triggers:
            trigger.touch()
        try:
            yield
        finally:
            for trigger in triggers:
                trigger.unlink()

    @contextmanager
    def stalled(self) -> Iterator[None]:
        """Answer nothing within the block."""
        self._server.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._server.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """Be dead at once, until `lose` has it come again."""
        self._server.kill()
        self._fuse.kill()

    def lose(self) -> None:
        """Lose what was not flushed; whoever has the device open has a dead one."""
        self._end()
        self._losses += 1
        self._start()

    def replace(self, content: bytes) -> None:
        """Another disk of the same size comes under the same name, full of `content`."""
        self._end()
        with self._raw.open("r+b") as raw:
            for offset in range(0, self._size_bytes, len(content)):
                raw.write(content[: self._size_bytes - offset])
        self._losses += 1
        self._start()

    def close(self) -> None:
        """End it. Safe to call twice."""
        self._end()

    def _start(self) -> None:
        """Run the server, show its disk as a file, attach that, and let the link point to it."""
        shown = self._directory / f"shown-{self._losses}"
        socket = self._directory / f"socket-{self._losses}"
        shown.touch()
        with ExitStack() as stack:
            self._server = _run(stack, self._directory, *self._serve(socket))
            _await(socket, self._server)
            fuse = ("nbdfuse", "--pidfile", f"{shown}.ready", str(shown), "--unix", str(socket))
            self._fuse = _run(stack, self._directory, *fuse)
            stack.callback(devices.run, "fusermount3", "-u", "-z", shown)
            _await(Path(f"{shown}.ready"), self._fuse)
            loop = stack.enter_context(devices.attached(shown, self._sector_size))
            self._undo = stack.pop_all()
        link = self._directory / "link"
        link.symlink_to(loop)
        link.rename(self.path)

    def _serve(self, socket: Path) -> list[str]:
        command = ["nbdkit", "--foreground", "--unix", str(socket), "--filter=error"]
        if self._volatile:
            # Without discards: the cache would go on to show what was trimmed, while nbdfuse takes
            # a trim for a punched hole, which must read as zeros. Such a disk would lie. Of the
            # plugins that flush only `partitioning` knows no trim.
            command += ["--filter=cache", "--filter=partition", "partitioning", str(self._raw)]
            command += ["cache=writeback", "partition-type=mbr", "partition=1"]
        else:
            command += ["file", str(self._raw)]
        for name in OPERATIONS:
            trigger = self._directory / f"fail-{name}"
            command += [f"error-{name}-rate=100%", f"error-{name}-file={trigger}"]
        return command

    def _end(self) -> None:
        self.kill()
        self._undo.close()
        self._undo = ExitStack()


@contextmanager
def fragile_disk(
    size_bytes: int, sector_size: int = 512, *, volatile: bool = True
) -> Iterator[FragileDisk]:
    """A disk to break; it is gone at the end of the block.

    `volatile`: with a cache to lose, and no discards; else with discards and nothing to lose.
    """
    devices.require("nbdkit")
    with devices.scratch_directory() as directory:
        disk = FragileDisk(directory, size_bytes, sector_size, volatile=volatile)
        try:
            yield disk
        finally:
            disk.close()


def _run(stack: ExitStack, directory: Path, *command: str) -> subprocess.Popen[bytes]:
    with (directory / "log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    stack.callback(process.wait)
    stack.callback(process.kill)
    return process


def _await(file: Path, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + devices.START_SECONDS
    while not file.exists():
        if server.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{server.args!r} is not ready: {server.returncode}")
        time.sleep(0.01)
