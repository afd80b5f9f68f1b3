"""Real devices for tests: made on demand, always destroyed, with faults under them.

Each is a context manager, so that property tests can use them too; `conftest` wraps them in
fixtures. Whoever asks for one that the host cannot give is skipped, and told why.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import host

START_SECONDS = 60.0
"""How long a helper process may take to get ready before the test fails."""


@dataclass(frozen=True, slots=True)
class LoopDevice:
    """A loop device over a sparse file; `partitions` are the paths of its two partitions."""

    path: str
    backing: Path
    size_bytes: int
    sector_size: int
    partitions: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FaultyDevice:
    """A loop device that answers EIO while told to."""

    path: str
    size_bytes: int
    directory: Path

    @contextmanager
    def failing(self, *operations: str) -> Iterator[None]:
        """Fail "pread", "pwrite", "zero" or "trim" (all if none is named) within the block."""
        names = operations or ("pread", "pwrite", "zero", "trim")
        triggers = [self.directory / name for name in names]
        for trigger in triggers:
            trigger.touch()
        try:
            yield
        finally:
            for trigger in triggers:
                trigger.unlink()


@dataclass(frozen=True, slots=True)
class ScratchedDevice:
    """A loop device that cannot be read in some places while told to."""

    path: str
    size_bytes: int
    directory: Path

    def scratch(self, *ranges: tuple[int, int], once: bool = False) -> None:
        """From now on reads that touch a range (offset, length) fail; no range heals all.

        `once`: the first read that fails heals all.
        """
        (self.directory / "once").write_text("1" if once else "")
        text = "".join(f"{start} {start + length}\n" for start, length in ranges)
        new = self.directory / "bad.new"
        new.write_text(text)
        new.rename(self.directory / "bad")

    @contextmanager
    def held(self) -> Iterator[Path]:
        """Let reads wait within the block; the file that is yielded is there once one does."""
        hold, waiting = self.directory / "hold", self.directory / "waiting"
        hold.touch()
        try:
            yield waiting
        finally:
            hold.unlink()

    def count_failures(self) -> int:
        """Return how many reads have failed so far."""
        return (self.directory / "failed").stat().st_size

    def content(self) -> bytes:
        """Return what is on it, whatever can be read through the device."""
        return (self.directory / "content").read_bytes()


def require(*capabilities: str) -> None:
    """Skip the test, saying why, if the host lacks one of `host.report`'s capabilities."""
    for capability in capabilities:
        reason = host.lacks(capability)
        if reason is not None:
            pytest.skip(f"needs {capability}: {reason}")


def run(*command: str | Path, feed: str = "") -> str:
    """Run a command to its end, return its output; what it said is in the error if it failed."""
    done = subprocess.run([*map(str, command)], input=feed, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{command} exited with {done.returncode}: {done.stderr}")
    return done.stdout.strip()


@contextmanager
def scratch_directory() -> Iterator[Path]:
    """A directory in memory, removed with all it holds."""
    path = Path(tempfile.mkdtemp(prefix="warmsync-test-", dir=host.SCRATCH))
    try:
        yield path
    finally:
        shutil.rmtree(path)


@contextmanager
def image_file(size_bytes: int, data: bytes | None = None) -> Iterator[Path]:
    """A sparse file of any size, empty or beginning with `data`."""
    with scratch_directory() as directory:
        path = directory / "disk.img"
        path.write_bytes(data or b"")
        os.truncate(path, size_bytes)
        yield path


@contextmanager
def loop_device(
    size_bytes: int, sector_size: int = 512, partitions: bool = False
) -> Iterator[LoopDevice]:
    """A loop device over a sparse file in memory, direct where the host can."""
    require("partitions" if partitions else "loop")
    with image_file(size_bytes) as backing, ExitStack() as stack:
        path = stack.enter_context(attached(backing, sector_size))
        names: tuple[str, ...] = ()
        if partitions:
            names = stack.enter_context(_partitioned(path, size_bytes, sector_size))
        yield LoopDevice(path, backing, size_bytes, sector_size, names)


@contextmanager
def attached(backing: Path, sector_size: int = 512, *options: str) -> Iterator[str]:
    """Attach an existing file to a free loop device; yields the device's path."""
    require("loop")
    command = ["losetup", "--find", "--show", f"--sector-size={sector_size}", *options]
    try:
        path = run(*command, "--direct-io=on", backing)
    except RuntimeError:
        path = run(*command, backing)
    # The read-only flag belongs to the device number: a run that was killed may have left it, and
    # the next user would inherit ours.
    with ExitStack() as undo:
        undo.callback(run, "losetup", "--detach", path)
        undo.callback(run, "blockdev", "--setrw", path)
        run("blockdev", "--setrw", path)
        yield path


@contextmanager
def zram_device(size_bytes: int) -> Iterator[str]:
    """A compressed RAM disk: a bio-based device with 4096-byte sectors. Yields its path."""
    require("zram")
    control = Path("/sys/class/zram-control")
    number = (control / "hot_add").read_text().strip()
    try:
        Path(f"/sys/block/zram{number}/disksize").write_text(str(size_bytes))
        yield f"/dev/zram{number}"
    finally:
        with ExitStack() as undo:
            undo.callback((control / "hot_remove").write_text, number)
            undo.callback(run, "blockdev", "--setrw", f"/dev/zram{number}")


@contextmanager
def faulty_device(size_bytes: int, sector_size: int = 512) -> Iterator[FaultyDevice]:
    """A loop device over memory that fails on demand (nbdkit's error filter, through FUSE)."""
    require("nbdkit")
    with (
        scratch_directory() as directory,
        _nbdfuse(directory, size_bytes) as file,
        attached(file, sector_size) as path,
    ):
        yield FaultyDevice(path, size_bytes, directory)


@contextmanager
def scratched_device(size_bytes: int, sector_size: int = 512) -> Iterator[ScratchedDevice]:
    """A loop device over a file, with bad places on demand (nbdkit's eval plugin, through FUSE)."""
    require("nbdkit")
    with scratch_directory() as directory:
        content = directory / "content"
        content.touch()
        os.truncate(content, size_bytes)
        for name in ("bad", "once", "failed"):
            (directory / name).touch()
        # $3 and $4 are the count and the offset of a request (nbdkit-sh-plugin(3)).
        read = (
            f"while [ -e {directory}/hold ]; do : > {directory}/waiting; sleep 0.05; done; "
            f"while read -r start end; do if [ $4 -lt $end ] && [ $(($4 + $3)) -gt $start ]; then "
            f"printf x >> {directory}/failed; "
            f"if [ -s {directory}/once ]; then : > {directory}/bad; fi; "
            "echo EIO a scratch >&2; exit 1; fi; "
            f"done < {directory}/bad; "
            f"dd if={content} iflag=skip_bytes,count_bytes skip=$4 count=$3 bs=1M status=none"
        )
        write = f"dd of={content} oflag=seek_bytes seek=$4 bs=1M conv=notrunc status=none"
        command = ["nbdkit", "-s", "eval", f"get_size=echo {size_bytes}", f"pread={read}"]
        command += [f"pwrite={write}", "can_write=exit 0", "can_flush=exit 0", "flush=exit 0"]
        with _shown(directory, command) as file, attached(file, sector_size) as path:
            yield ScratchedDevice(path, size_bytes, directory)


@contextmanager
def mounted(device: str, kind: str = "ext4", *options: str) -> Iterator[Path]:
    """Make a file system on `device` and mount it; unmounted at the end."""
    require("root")
    for tool in (f"mkfs.{kind}", "mount"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} installed")
    run(f"mkfs.{kind}", "-q", device)
    with scratch_directory() as directory:
        run("mount", "-t", kind, *options, device, directory)
        try:
            yield directory
        finally:
            run("umount", directory)


@contextmanager
def bare_directory() -> Iterator[Path]:
    """A file system (ramfs) that knows neither direct I/O nor holes nor zeroing."""
    require("root")
    with scratch_directory() as directory:
        run("mount", "-t", "ramfs", "ramfs", directory)
        try:
            yield directory
        finally:
            run("umount", directory)


@contextmanager
def _partitioned(path: str, size_bytes: int, sector_size: int) -> Iterator[tuple[str, ...]]:
    """Two partitions: the second begins at an odd sector, as old tools laid them out."""
    sectors = size_bytes // sector_size
    half, first = sectors // 2, (1 << 20) // sector_size
    _write_table(path, sector_size, (first, half - first), (half + 63, sectors - half - 63))
    # partx tells the kernel: not every kernel can read the table itself.
    run("partx", "--update", path)
    try:
        yield f"{path}p1", f"{path}p2"
    finally:
        with ExitStack() as undo:
            undo.callback(run, "partx", "--delete", path)
            undo.callback(run, "blockdev", "--setrw", f"{path}p1")
            undo.callback(run, "blockdev", "--setrw", f"{path}p2")


def _write_table(path: str, sector_size: int, *partitions: tuple[int, int]) -> None:
    """Write an MBR of (first sector, sectors). sfdisk would sync(2) all disks of this machine.

    That takes long beside other tests, and does not end while one of their disks hangs.
    """
    linux, no_cylinders = 0x83, bytes(3)
    entries = [
        struct.pack("<B3sB3sII", 0, no_cylinders, linux, no_cylinders, first, count)
        for first, count in partitions
    ]
    table = bytes(446) + b"".join(entries).ljust(64, b"\0") + b"\x55\xaa"
    with open(path, "r+b") as disk:
        disk.write(table.ljust(sector_size, b"\0"))
        disk.flush()
        os.fsync(disk.fileno())


@contextmanager
def _nbdfuse(directory: Path, size_bytes: int) -> Iterator[Path]:
    """Yield a file whose content nbdkit keeps in memory; nbdkit ends when nbdfuse does."""
    command = ["nbdkit", "-s", "--filter=error", "memory", str(size_bytes)]
    for name in ("pread", "pwrite", "zero", "trim"):
        command += [f"error-{name}-rate=100%", f"error-{name}-file={directory / name}"]
    with _shown(directory, command) as file:
        yield file


@contextmanager
def _shown(directory: Path, served_by: list[str]) -> Iterator[Path]:
    """Yield a file that is what a server of NBD on its standard input says."""
    file, ready = directory / "disk", directory / "ready"
    file.touch()
    command = ["nbdfuse", "--pidfile", str(ready), str(file), "--command", *served_by]
    with (directory / "log").open("wb") as log, subprocess.Popen(command, stderr=log) as server:
        try:
            _await(ready, server)
            yield file
        finally:
            _stop(file, server)


def _await(file: Path, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not file.exists():
        if server.poll() is not None:
            raise RuntimeError(f"{server.args!r} exited with {server.returncode}")
        if time.monotonic() > deadline:
            server.kill()
            raise RuntimeError(f"{server.args!r} was not ready in {START_SECONDS} s")
        time.sleep(0.01)


def _unmount(file: Path) -> None:
    """Take the file away. A loop device that another looks at for a moment is detached later."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            run("fusermount3", "-u", file)
            return
        except RuntimeError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.05)


def _stop(file: Path, server: subprocess.Popen[bytes]) -> None:
    try:
        if server.poll() is None:
            _unmount(file)
        server.wait(START_SECONDS)
    finally:
        server.kill()
