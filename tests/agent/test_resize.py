"""Resize: real file systems on real devices, grown, or left to the byte as they were."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from agent import resize
from agent.errors import DataLoss, FailedPrecondition
from agent.partitions import Scheme
from agent.resize import GrowReport, Limits
from agent.superblock import Kind
from native.blockio import BlockDevice
from tests import devices, filesystems
from tests.content import read_all
from tests.devices import FaultyDevice, LoopDevice, run
from tests.filesystems import LEAST_BYTES, MIB

KINDS = {"ext4": Kind.EXT, "xfs": Kind.XFS, "btrfs": Kind.BTRFS}
GROWTH_BYTES = 200 * MIB + 12345 * 4096
"""No round number, as volumes are not."""
LOST_BYTES = {"ext4": 2 * MIB, "xfs": 64 * MIB, "btrfs": MIB}
"""A last group that would be too small for its own overhead is left out."""


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
        if self.garbage:
            with Path(self.path).open("rb+") as file:
                file.seek(self.data_bytes)
                file.write(os.urandom(MIB))
                # As a member of a RAID that this device once was.
                file.seek(size - size % 65536 - 65536)
                file.write(b"\xfc\x4e\x2b\xa9" * 1024)

    @property
    def old_end_bytes(self) -> int:
        return self.data_bytes - (34 * self.sector_size if self.scheme == "gpt" else 0)

    def file_system(self, end_bytes: int) -> devices.AbstractContextManager[str]:
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


Make = Callable[..., Disk]


@pytest.fixture
def make_disk(loop_device: Callable[..., LoopDevice]) -> Make:
    def build(
        kind: str = "ext4", scheme: str = "none", sector_size: int = 512, growth: int = GROWTH_BYTES
    ) -> Disk:
        devices.require(kind)
        data_bytes = LEAST_BYTES[kind] + (16 * MIB if scheme != "none" else 0)
        loop = loop_device(data_bytes + growth, sector_size)
        disk = Disk(loop.path, data_bytes, sector_size, kind, scheme)
        disk.prepare()
        return disk

    return build


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """Where the state directory's files of one volume are; whatever happens, none stays."""
    path = tmp_path / "resize" / "move-1.0"
    yield path
    assert not path.parent.exists() or sorted(path.parent.iterdir()) == []


def grow(disk: Disk, place: Path, limits: Limits = Limits()) -> GrowReport:
    with BlockDevice(disk.path, writable=True, exclusive=True) as device:
        return resize.grow(device, disk.data_bytes, place, limits)


@pytest.mark.parametrize("sector_size", [512, 4096])
@pytest.mark.parametrize("scheme", ["none", "mbr", "gpt"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_grows_and_the_files_stay(
    make_disk: Make, place: Path, kind: str, scheme: str, sector_size: int
) -> None:
    disk = make_disk(kind, scheme, sector_size)
    with BlockDevice(disk.path) as device:
        size = device.size_bytes()
    report = grow(disk, place)
    end = size if scheme == "none" else size - size % MIB
    if scheme == "gpt" and size - end < 34 * sector_size:
        end -= MIB
    assert (report.kind, report.scheme) == (KINDS[kind], Scheme(scheme))
    assert report.before_bytes <= disk.old_end_bytes - disk.start_bytes
    assert report.after_bytes > report.before_bytes
    assert end - disk.start_bytes - report.after_bytes < LOST_BYTES[kind]
    assert 0 < report.changed_bytes
    assert 0 < report.apply_seconds < report.seconds
    assert disk.check(end) > report.before_bytes
    if scheme != "none":
        assert "No errors" in run("sfdisk", "--verify", "--no-tell-kernel", disk.path)
        table = json.loads(run("sfdisk", "--json", disk.path))["partitiontable"]
        one, two = table["partitions"]
        assert one["start"] * sector_size == disk.start_bytes
        assert (one["start"] + one["size"]) * sector_size == end
        assert two["size"] * sector_size == 8 * MIB
    if kind != "btrfs":  # nothing that could pass for another content is left
        with disk.file_system(end) as part:
            assert f'TYPE="{kind}"' in run("blkid", "--probe", part)
