"""The demo's disks: where they lie, what is in them, and whether two are equal.

A disk is a loop device over a file, as root, or else the file itself.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

MEMORY = Path("/dev/shm")
SPARE_BYTES = 512 << 20
STEP_BYTES = 1 << 20
# What the parts of the source hold, in sixteenths of it. Nothing is written for zeros.
REGIONS = (("random", 0, 5), ("compressible", 5, 9), ("zero", 9, 13), ("random", 13, 16))


class DemoFailed(Exception):  # noqa: N818 - the demo's one error
    """Why the demo cannot go on, for people."""


@dataclass(frozen=True, slots=True)
class Disk:
    """A block device, or an image file."""

    path: str
    size_bytes: int
    is_device: bool


@contextmanager
def scratch(needed_bytes: int) -> Iterator[Path]:
    """Make a directory, in memory if there is room, and remove it with all it holds."""
    places = [MEMORY, Path(tempfile.gettempdir())]
    for place in places:
        if place.is_dir() and os.access(place, os.W_OK) and _room(place) >= needed_bytes:
            break
    else:
        text = " nor ".join(map(str, places))
        raise DemoFailed(
            f"neither {text} has {needed_bytes >> 20} MiB free; free some, or set TMPDIR"
        )
    path = Path(tempfile.mkdtemp(prefix="warmsync-demo-", dir=place))
    try:
        yield path
    finally:
        shutil.rmtree(path)


@contextmanager
def open_disk(file: Path, size_bytes: int, *, device: bool) -> Iterator[Disk]:
    """Make a disk of zeros, destroyed afterwards."""
    file.touch(mode=0o600)
    os.truncate(file, size_bytes)
    if not device:
        yield Disk(str(file), size_bytes, is_device=False)
        return
    try:
        yield Disk(_attach(file), size_bytes, is_device=True)
    finally:
        _detach(file)


def loop_obstacle(directory: Path) -> str:
    """Return why no loop device can be made here; empty if one can."""
    try:
        with open_disk(directory / "try", STEP_BYTES, device=True):
            return ""
    except (DemoFailed, OSError) as error:
        return f"no loop devices ({error})"


def fill(disk: Disk) -> None:
    """Write the regions: random bytes, a text that compresses well, and zeros."""
    text = b"All work and no play makes a disk compressible. " * (STEP_BYTES // 48 + 1)
    unit = disk.size_bytes // 16
    with open(disk.path, "r+b", buffering=0) as file:
        for kind, first, last in REGIONS:
            for offset in range(first * unit, last * unit, STEP_BYTES):
                step = min(STEP_BYTES, last * unit - offset)
                if kind != "zero":
                    data = os.urandom(step) if kind == "random" else text[:step]
                    file.seek(offset)
                    file.write(data)
        os.fsync(file.fileno())


def differ(source: Disk, target: Disk) -> str:
    """Compare two disks byte by byte; return where they differ, empty if they are equal."""
    for disk in (source, target):
        if disk.is_device:  # so that the devices are read and not what a cache remembers
            run("blockdev", "--flushbufs", disk.path)
    command = ["cmp", f"--bytes={source.size_bytes}", source.path, target.path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else (done.stdout + done.stderr).strip()


def run(*command: str) -> str:
    """Run a command of the system to its end and return what it printed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise DemoFailed(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout.strip()


def _attach(file: Path) -> str:
    command = ["losetup", "--find", "--show", str(file)]
    try:
        return run(*command, "--direct-io=on")
    except DemoFailed:  # a file system without direct I/O
        return run(*command)


def _detach(file: Path) -> None:
    # Asked for by file: Ctrl-C may have come before the name of the device was known.
    for path in run("losetup", "--noheadings", "--output=NAME", f"--associated={file}").split():
        # The fence belongs to the device's number: the next user of it would inherit it.
        run("blockdev", "--setrw", path)
        run("losetup", "--detach", path)


def _room(place: Path) -> int:
    free = shutil.disk_usage(place).free
    if place != MEMORY:
        return free
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    # A tmpfs may be larger than the memory that is left.
    return min(free, (available << 10) - SPARE_BYTES)
