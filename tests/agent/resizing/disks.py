"""Targets that were copied to, and are larger than what was copied."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from agent import resize
from agent.layout.superblock import Kind
from agent.resize import GrowReport, Limits
from native.blockio import BlockDevice
from tests import filesystems
from tests.devices import run
from tests.filesystems import LEAST_BYTES, MIB

KINDS = {"ext4": Kind.EXT, "xfs": Kind.XFS, "btrfs": Kind.BTRFS}
GROWTH_BYTES = 100 * MIB + 1543 * 4096
"""No round number, as volumes are not."""


@dataclass
class Disk:
    """A target of a migration: `data_bytes` came from the source, behind it is old garbage."""

    path: str
    data_bytes: int
    sector_size: int
    kind: str
    scheme: str
    start_bytes: int = 0
    files: dict[str, str] = field(default_factory=dict)
    garbage: bool = True

    def prepare(self) -> None:
        size = Path(self.path).stat().st_size or int(run("blockdev", "--getsize64", self.path))
        if self.scheme != "none":
            self.start_bytes = 9 * MIB
            script = filesystems.table(self.scheme, self.sector_size, self.data_bytes)
            with filesystems.part(self.path, 0, self.data_bytes, self.sector_size) as whole:
                run("sfdisk", "--quiet", "--no-reread", whole, feed=script)
        with self.file_system(self.old_end_bytes) as part:
            self.files = filesystems.make(part, self.kind)
        if self.garbage and size > self.data_bytes + 4 * MIB:
            with Path(self.path).open("rb+") as file:
                file.seek(self.data_bytes)
                file.write(os.urandom(MIB))
                # As a member of a RAID that this device, or a partition of it, once was.
                file.seek(size - 2 * MIB)
                file.write(b"\xfc\x4e\x2b\xa9" * (2 * MIB // 4))

    @property
    def old_end_bytes(self) -> int:
        return self.data_bytes - (34 * self.sector_size if self.scheme == "gpt" else 0)

    def file_system(self, end_bytes: int) -> AbstractContextManager[str]:
        length = end_bytes - self.start_bytes
        return filesystems.part(self.path, self.start_bytes, length, self.sector_size)

    def check(self, end_bytes: int) -> int:
        """Check the file system and its files; return its size as mounted."""
        with self.file_system(end_bytes) as part:
            filesystems.check(part, self.kind)
            with filesystems.opened(part, self.kind, "ro") as directory:
                assert filesystems.digests(directory) == self.files
                found = os.statvfs(directory)
            return found.f_blocks * found.f_frsize


def source_bytes(kind: str, scheme: str) -> int:
    """Return how large the source was."""
    return LEAST_BYTES[kind] + (16 * MIB if scheme != "none" else 0)


def grow(disk: Disk, place: Path, limits: Limits | None = None) -> GrowReport:
    """Grow what is on a disk that is claimed, as a session's is."""
    with BlockDevice(disk.path, writable=True, exclusive=True) as device:
        return resize.grow(device, disk.data_bytes, place, limits or Limits())
