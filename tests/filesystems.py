"""Disks with file systems on them, as a guest leaves them: bare or in a partition, with files."""

from __future__ import annotations

import hashlib
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests import devices
from tests.devices import run, scratch_directory

MIB = 1 << 20
MAKE = {
    "ext4": ("mkfs.ext4", "-q", "-F"),
    "xfs": ("mkfs.xfs", "-q", "-f"),
    "btrfs": ("mkfs.btrfs", "-q", "-f"),
}
LEAST_BYTES = {"ext4": 64 * MIB, "xfs": 320 * MIB, "btrfs": 200 * MIB}
CHECK = {
    "ext4": ("e2fsck", "-f", "-n"),
    "xfs": ("xfs_repair", "-n"),
    "btrfs": ("btrfs", "check", "--readonly"),
}


def write_files(directory: Path, seed: int = 1, count: int = 20) -> dict[str, str]:
    """Write files of many sizes; return their names and digests."""
    rng = random.Random(seed)
    for number in range(count):
        path = directory / f"d{number % 4}" / f"f{number}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(rng.randbytes(rng.choice((0, 10, 5000, 200_000, MIB))))
    return digests(directory)


def digests(directory: Path) -> dict[str, str]:
    """Return the names and digests of all files in a directory."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@contextmanager
def opened(device: str, kind: str, *options: str) -> Iterator[Path]:
    """Mount a file system; yields where."""
    with scratch_directory() as directory:
        if kind == "xfs":
            options = ("nouuid", *options)
        run("mount", "-t", kind, *(("-o", ",".join(options)) if options else ()), device, directory)
        try:
            yield directory
        finally:
            run("umount", directory)
            if kind == "btrfs":
                # EBUSY while another of the same id is mounted, which is for its test to know.
                subprocess.run(("btrfs", "device", "scan", "--forget", device), capture_output=True)


@contextmanager
def part(
    backing: str | Path, offset_bytes: int, length_bytes: int, sector_size: int
) -> Iterator[str]:
    """A loop device over a part of a disk: what the kernel would call a partition."""
    limits = (f"--offset={offset_bytes}", f"--sizelimit={length_bytes}")
    with devices.attached(Path(backing), sector_size, *limits) as path:
        yield path


def make(device: str, kind: str, seed: int = 1) -> dict[str, str]:
    """Make a file system with files on a device; return their digests."""
    devices.require(kind)
    run(*MAKE[kind], device)
    with opened(device, kind) as directory:
        return write_files(directory, seed)


def check(device: str, kind: str) -> None:
    """Raise RuntimeError unless the file system is clean."""
    run(*CHECK[kind], device)


def table(scheme: str, sector_size: int, disk_bytes: int) -> str:
    """Return sfdisk's script: two partitions, the second, at the end, with the lower number."""
    label = "gpt" if scheme == "gpt" else "dos"
    first = MIB // sector_size
    middle = 9 * MIB // sector_size
    reserved = 34 if scheme == "gpt" else 0
    last = disk_bytes // sector_size - reserved - middle
    return (
        f"label: {label}\n1 : start={middle}, size={last}, type=L\n"
        f"2 : start={first}, size={8 * MIB // sector_size}, type=L\n"
    )
