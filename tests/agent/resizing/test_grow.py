"""Real file systems on real devices: larger afterwards, clean, and every file as it was."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from agent import resize
from agent.layout.partitions import Scheme
from agent.layout.reach import find_reach
from native.blockio import BlockDevice
from tests import devices, filesystems
from tests.agent.resizing.disks import KINDS, Disk, grow
from tests.content import read_all
from tests.devices import LoopDevice, run
from tests.filesystems import MIB

Make = Callable[..., Disk]

LOST_BYTES = {"ext4": 2 * MIB, "xfs": 64 * MIB, "btrfs": MIB}
"""A last group that would be too small for its own overhead is left out."""


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
    copy_bytes = sector_size + -(-16384 // sector_size) * sector_size
    if scheme == "gpt" and size - end < copy_bytes:
        end -= MIB
    assert (report.kind, report.scheme) == (KINDS[kind], Scheme(scheme))
    assert report.before_bytes <= disk.old_end_bytes - disk.start_bytes
    assert report.after_bytes > report.before_bytes
    assert end - disk.start_bytes - report.after_bytes < LOST_BYTES[kind]
    assert report.changed_bytes > 0
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


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_a_disk_that_lost_its_power_grows_too(
    make_disk: Make, place: Path, tmp_path: Path, kind: str
) -> None:
    """Its journal is replayed first, on the overlay as well."""
    disk = make_disk(kind)
    image = tmp_path / "cut"
    with disk.file_system(disk.data_bytes) as part, filesystems.opened(part, kind) as directory:
        filesystems.write_files(directory, seed=2)
        run("sync", "--file-system", directory)
        with (directory / "later").open("wb") as file:
            file.write(b"later")
            file.flush()
            os.fsync(file.fileno())
        disk.files = filesystems.digests(directory)
        run("dd", f"if={disk.path}", f"of={image}", "bs=1M", "iflag=direct", "conv=sparse")
    with devices.attached(image) as path:
        cut = Disk(path, disk.data_bytes, 512, kind, "none", files=disk.files)
        if kind == "ext4":
            assert "needs_recovery" in run("dumpe2fs", "-h", path)
        report = grow(cut, place)
        assert report.after_bytes > report.before_bytes
        cut.check(image.stat().st_size)


def test_an_image_file_grows(place: Path, image_file: Callable[..., Path]) -> None:
    path = image_file(300 * MIB)
    disk = Disk(str(path), 64 * MIB, 512, "ext4", "none")
    disk.prepare()
    assert grow(disk, place).after_bytes > 290 * MIB
    disk.check(300 * MIB)


def test_without_room_nothing_is_written(make_disk: Make, place: Path) -> None:
    disk = make_disk(growth=4096)
    before = read_all(disk.path)
    report = grow(disk, place)
    assert (report.after_bytes, report.changed_bytes) == (report.before_bytes, 0)
    assert read_all(disk.path) == before


def test_to_grow_again_changes_nothing(make_disk: Make, place: Path) -> None:
    disk = make_disk("ext4", "gpt")
    grow(disk, place)
    before = read_all(disk.path)
    with BlockDevice(disk.path) as device:
        disk.data_bytes = device.size_bytes()
    assert grow(disk, place).changed_bytes == 0
    assert read_all(disk.path) == before


@pytest.mark.parametrize("grown_mib", [0, 3, 6, 9], ids="grown-by-{}".format)
@pytest.mark.parametrize("sector_size", [512, 4096])
def test_a_table_moves_to_a_smaller_disk(
    make_disk: Make,
    place: Path,
    loop_device: Callable[..., LoopDevice],
    sector_size: int,
    grown_mib: int,
) -> None:
    """Which may have grown since the migration began: almost, just and more than to its source."""
    disk = make_disk("ext4", "gpt", sector_size, growth=8 * MIB)
    size, smaller = disk.data_bytes + 8 * MIB, disk.data_bytes + 2 * MIB
    run("sfdisk", "--no-reread", "--no-tell-kernel", "--relocate", "gpt-bak-std", disk.path)
    grown = smaller + grown_mib * MIB
    target = loop_device(grown, sector_size)
    run("dd", f"if={disk.path}", f"of={target.path}", f"count={smaller}", "iflag=count_bytes")
    with BlockDevice(target.path, writable=True, exclusive=True) as device:
        assert resize.move_table(device, smaller, size, place)
        moved = read_all(target.path)
        assert resize.move_table(device, smaller, size, place)
        assert read_all(target.path) == moved
        reach = find_reach(resize.reads(device), grown, sector_size, settled=True)
        assert reach.end_bytes is not None
        assert reach.end_bytes <= grown
    assert "No errors" in run("sfdisk", "--verify", "--no-tell-kernel", target.path)
    copied = slice(MIB, disk.data_bytes)
    assert read_all(target.path)[copied] == read_all(disk.path)[copied]
