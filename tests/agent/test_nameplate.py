"""What a device is on every boot: what the kernel says, and what it does not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from agent import device as device_module
from agent.nameplate import nameplate
from native.blockio import BlockDevice
from tests import devices
from tests.devices import LoopDevice

SIZE = 8 << 20
Loop = Callable[..., LoopDevice]


def of(path: str | Path) -> str:
    with BlockDevice(str(path)) as device:
        return nameplate(device)


class Kernel:
    """A sysfs of a test's own: what it says of real devices, by their numbers."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._root = root
        monkeypatch.setattr(device_module, "_SYS_BLOCK", root)

    def says(self, path: str, **values: str) -> None:
        """Say this of a disk; `device__wwid` is the file device/wwid."""
        number = os.stat(path).st_rdev
        disk = self._root / f"{os.major(number)}:{os.minor(number)}"
        shutil.rmtree(disk, ignore_errors=True)
        self._write(disk, size="16384", dev=disk.name, **values)

    def has_partition(self, path: str, disk: str, start: int) -> None:
        part, whole = (
            f"{os.major(number)}:{os.minor(number)}"
            for number in (os.stat(path).st_rdev, os.stat(disk).st_rdev)
        )
        inner = self._root / whole / f"part{start}"
        self._write(inner, size="8192", dev=part, partition="1", start=str(start))
        (self._root / part).symlink_to(inner)

    def _write(self, directory: Path, **values: str) -> None:
        for name, value in values.items():
            file = directory / name.replace("__", "/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(value + "\n")


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(tmp_path / "sys", monkeypatch)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"wwid": "eui.0025385c71b0a3f1", "device__serial": "S5H9"}, "wwid=eui.0025385c71b0a3f1"),
        ({"device__wwid": "t10.ATA     DISK    77"}, "device/wwid=t10.ATA_DISK_77"),
        ({"dm__uuid": "LVM-abc", "serial": ""}, "dm/uuid=LVM-abc"),
        ({"serial": "vol-1"}, "serial=vol-1"),
        ({"wwid": "eui.0000000000000000", "serial": "", "dm__uuid": ""}, ""),
        ({"wwid": "00000000-0000-0000-0000-000000000000"}, ""),
        ({}, ""),
    ],
    ids=["nvme", "scsi", "lvm", "virtio", "nothing in it", "zeros", "nothing"],
)
def test_a_disk_is_what_its_maker_says(
    kernel: Kernel, loop_device: Loop, said: dict[str, str], expected: str
) -> None:
    path = loop_device(SIZE).path
    kernel.says(path, **said)
    assert of(path) == expected


def test_a_partition_is_where_it_begins(kernel: Kernel, loop_device: Loop) -> None:
    disk = loop_device(SIZE, partitions=True)
    first, second = disk.partitions
    kernel.says(disk.path, serial="one")
    kernel.has_partition(first, disk.path, 2048)
    kernel.has_partition(second, disk.path, 4096)
    assert of(first) == "serial=one start=1048576"
    assert of(second) == "serial=one start=2097152"


def test_a_file_made_again_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if it gets the number of the one before."""
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(4096))
    known(tmp_path, monkeypatch)
    before = of(path)
    if not before:
        pytest.skip("files of this file system have no generation")
    assert before.startswith("wwid=eui.1 inode=")
    assert of(path) == before
    path.unlink()
    path.write_bytes(bytes(4096))
    assert of(path) not in ("", before)


def known(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the disk of a directory's file system be one that says who it is."""
    system = directory / "sys" / "disk"
    system.mkdir(parents=True)
    number = os.stat(directory).st_dev
    for name, text in {"size": "8", "dev": "1:1", "wwid": "eui.1"}.items():
        (system / name).write_text(text)
    (directory / "sys" / f"{os.major(number)}:{os.minor(number)}").symlink_to(system)
    monkeypatch.setattr(device_module, "_SYS_BLOCK", directory / "sys")


def test_a_loop_device_is_the_part_of_its_file(tmp_path: Path) -> None:
    """Here the kernel's own words are read, if its file system has some."""
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    file = of(path)
    with devices.attached(path) as whole, devices.attached(path, 512, "--offset=4096") as high:
        assert of(whole) == (file and f"{file} offset=0")
        assert of(high) == (file and f"{file} offset=4096")


def test_what_is_in_memory_is_unknown(loop_device: Loop) -> None:
    disk = loop_device(SIZE)
    assert of(disk.path) == ""
    assert of(disk.backing) == ""
