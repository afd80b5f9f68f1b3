"""The devices that other tests stand on do what they say, and leave nothing behind."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import content, devices
from tests.devices import FaultyDevice, LoopDevice

MIB = 1 << 20


@pytest.mark.parametrize("sector_size", [512, 4096])
def test_loop_device_has_sectors_and_partitions(
    loop_device: Callable[..., LoopDevice], sector_size: int
) -> None:
    loop = loop_device(16 * MIB, sector_size, partitions=True)
    assert devices.run("blockdev", "--getss", loop.path) == str(sector_size)
    sizes = [int(devices.run("blockdev", "--getsize64", name)) for name in loop.partitions]
    assert sizes == [7 * MIB, 8 * MIB - 63 * sector_size]


def test_loop_device_is_gone_afterwards_and_writable_for_the_next() -> None:
    with devices.loop_device(MIB) as loop:
        devices.run("blockdev", "--setro", loop.path)
    assert not loop.backing.exists()
    assert str(loop.backing) not in devices.run("losetup", "--list", "--output", "BACK-FILE")


def test_zram_device(zram_device: Callable[[int], str]) -> None:
    path = zram_device(8 * MIB)
    content.fill(path, seed=1)
    assert content.read_all(path) == content.content(8 * MIB, seed=1)


def test_faulty_device_fails_only_what_and_while_told(
    faulty_device: Callable[..., FaultyDevice],
) -> None:
    device = faulty_device(4 * MIB)
    with content.Disk(device.path, writable=True) as disk:
        with device.failing("pread"):
            disk.write(0, b"x" * 4096)
            with pytest.raises(OSError, match=f"Errno {errno.EIO}"):
                disk.read(0, 4096)
        assert disk.read(0, 4096) == b"x" * 4096


def test_first_difference_names_the_byte(image_file: Callable[..., Path]) -> None:
    data = content.content(3 * MIB + 100, seed=3)
    left = image_file(len(data), data)
    for position in (0, MIB, len(data) - 1):
        other = bytearray(data)
        other[position] ^= 1
        assert content.first_difference(left, image_file(len(data), bytes(other))) == position
    assert content.first_difference(left, image_file(len(data) - 1, data[:-1])) == len(data) - 1


def test_first_difference_within_a_range(image_file: Callable[..., Path]) -> None:
    data = content.content(3 * content.STEP_BYTES, 1)
    other = bytearray(data)
    for position in (7, len(data) - 5):
        other[position] ^= 1
    left, right = image_file(len(data), data), image_file(len(data) + 9, bytes(other) + bytes(9))
    start, end = content.STEP_BYTES, len(data) - 5
    assert content.first_difference(left, right, start, end) is None
    assert content.first_difference(left, right, start, end + 1) == end
    assert content.first_difference(left, right, 0, end) == 7
    assert content.files_equal(left, image_file(len(data), data))


def test_fill_writes_the_seeded_content(image_file: Callable[..., Path]) -> None:
    path = image_file(2 * MIB + 77)
    content.fill(path, seed=9)
    assert path.read_bytes() == content.content(2 * MIB + 77, seed=9)


def test_what_is_unmounted_goes_from_the_namespaces_of_others(bare_directory: Path) -> None:
    """Else a disk that one worker has unmounted stays in use while another's machine runs."""
    place = bare_directory / "place"
    place.mkdir()
    devices.run("mount", "-t", "tmpfs", "tmpfs", place)
    command = ["unshare", "--mount", "--propagation", "slave", "sh", "-c", "echo; exec sleep 60"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout is not None
            other.stdout.readline()
            mounts = Path(f"/proc/{other.pid}/mountinfo")
            assert str(place) in mounts.read_text()
            devices.run("umount", place)
            assert str(place) not in mounts.read_text()
        finally:
            other.kill()
            if place.is_mount():
                devices.run("umount", place)
