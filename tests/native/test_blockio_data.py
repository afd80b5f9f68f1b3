"""Where data may be: nothing outside the answer may be anything but zero."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from native.blockio import BlockDevice
from tests import content, devices
from tests.devices import LoopDevice

MIB = 1 << 20


def extents(path: str | Path, start: int = 0) -> list[tuple[int, int]] | None:
    with BlockDevice(str(path)) as device:
        found = device.data_extents(start)
        return None if found is None else list(found)


def known(path: str | Path) -> list[tuple[int, int]]:
    found = extents(path)
    assert found is not None
    return found


def check(path: str | Path) -> int:
    """All outside the extents is zero; they ascend, aligned, within the device. Returns bytes."""
    disk, end, total = bytearray(content.read_all(path)), 0, 0
    with BlockDevice(str(path)) as device:
        unit = device.logical_block_size_bytes
    for offset, length in known(path):
        assert offset >= end
        assert offset % unit == 0
        assert length > 0
        end, total = offset + length, total + length
        assert end <= len(disk)
        assert end % unit == 0 or end == len(disk)
        disk[offset:end] = bytes(length)
    assert not any(disk)
    return total


def scatter_data(path: str | Path, size: int, seed: int) -> None:
    rng = random.Random(seed)
    with Path(path).open("r+b") as file:
        for _ in range(rng.randrange(1, 30)):
            offset = rng.randrange(size)
            file.seek(offset)
            file.write(rng.randbytes(min(size - offset, rng.choice((1, 512, 4096, 70_000)))))
        file.flush()
        # A partition has a page cache of its own, which a question to the disk does not flush.
        os.fsync(file)


class TestFiles:
    @given(size=st.integers(1, 3 * MIB), seed=st.integers(0, 2**32))
    def test_random_files(self, size: int, seed: int) -> None:
        with devices.image_file(size) as path:
            scatter_data(path, size, seed)
            assert check(path) <= size

    def test_holes_of_a_huge_file_are_not_walked(self, image_file: Callable[..., Path]) -> None:
        path = image_file(1 << 40)
        with path.open("r+b") as file:
            file.seek(1 << 39)
            file.write(b"x")
        assert known(path) == [(1 << 39, 4096)]

    def test_start(self, image_file: Callable[..., Path]) -> None:
        path = image_file(MIB)
        for offset in (0, 65536, MIB - 4096):
            with path.open("r+b") as file:
                file.seek(offset)
                file.write(b"x")
        assert extents(path, 4096) == [(65536, 4096), (MIB - 4096, 4096)]
        assert extents(path, 65536 + 600) == [(66048, 3584), (MIB - 4096, 4096)]
        assert extents(path, MIB) == []
        assert extents(path, 2 * MIB) == []

    def test_empty_and_full(self, image_file: Callable[..., Path]) -> None:
        assert known(image_file(70_001)) == []
        assert known(image_file(70_001, b"x" * 70_001)) == [(0, 70_001)]

    def test_a_file_system_that_knows_no_holes(self, bare_directory: Path) -> None:
        path = bare_directory / "file"
        path.write_bytes(bytes(10_001))
        assert known(path) == [(0, 10_001)]

    def test_the_walk_ends_with_its_device(self, image_file: Callable[..., Path]) -> None:
        with BlockDevice(str(image_file(4096, b"x"))) as device:
            walk = device.data_extents()
            assert walk is not None
        with pytest.raises(ValueError, match="is closed"):
            next(walk)

    def test_a_file_that_shrinks_during_the_walk(self, image_file: Callable[..., Path]) -> None:
        path = image_file(MIB)
        for offset in (0, 512 * 1024):
            with path.open("r+b") as file:
                file.seek(offset)
                file.write(b"x")
        with BlockDevice(str(path)) as device:
            walk = device.data_extents()
            assert walk is not None
            assert next(walk) == (0, 4096)
            os.truncate(path, 8192)
            assert list(walk) == []


class TestLoopDevices:
    @pytest.mark.parametrize("sector_size", [512, 4096])
    @pytest.mark.parametrize("seed", range(4))
    def test_disk_and_partitions(
        self, loop_device: Callable[..., LoopDevice], sector_size: int, seed: int
    ) -> None:
        loop = loop_device(8 * MIB, sector_size, partitions=True)
        for path, size in zip(loop.partitions, (3 * MIB, 4 * MIB - 63 * sector_size), strict=True):
            scatter_data(path, size, seed)
        for path in (loop.path, *loop.partitions):
            assert 0 < check(path) < 8 * MIB

    @pytest.mark.parametrize("sector_size", [512, 4096])
    @pytest.mark.parametrize("offset", [512, 4096, 512 * 1001])
    def test_offset_and_size_limit(
        self, image_file: Callable[..., Path], offset: int, sector_size: int
    ) -> None:
        backing = image_file(4 * MIB)
        scatter_data(backing, 4 * MIB, seed=offset)
        options = (f"--offset={offset}", f"--sizelimit={MIB}")
        with devices.attached(backing, sector_size, *options) as path:
            with BlockDevice(path) as device:
                assert device.size_bytes() == MIB
            check(path)

    def test_what_is_only_in_the_page_cache_counts(
        self, loop_device: Callable[..., LoopDevice]
    ) -> None:
        loop = loop_device(MIB)
        with Path(loop.path).open("r+b", buffering=0) as buffered:
            buffered.seek(65536)
            buffered.write(b"x" * 4096)
            assert loop.backing.stat().st_blocks == 0
            assert known(loop.path) == [(65536, 4096)]

    def test_another_file_under_the_name_is_not_believed(
        self, loop_device: Callable[..., LoopDevice]
    ) -> None:
        loop = loop_device(MIB)
        content.fill(loop.path, seed=1)
        away = loop.backing.with_name("away")
        loop.backing.rename(away)
        # The kernel follows the rename; a file put over it leaves the loop's without a name.
        assert known(loop.path) != []
        impostor = loop.backing.with_name("impostor")
        impostor.write_bytes(bytes(MIB))
        os.truncate(impostor, MIB)
        impostor.rename(away)
        assert extents(loop.path) is None

    def test_a_deleted_file_is_not_guessed(self, loop_device: Callable[..., LoopDevice]) -> None:
        loop = loop_device(MIB)
        loop.backing.unlink()
        loop.backing.with_name(loop.backing.name + " (deleted)").write_bytes(bytes(MIB))
        assert extents(loop.path) is None

    def test_a_loop_device_on_a_loop_device(self, loop_device: Callable[..., LoopDevice]) -> None:
        lower = loop_device(MIB)
        with devices.attached(Path(lower.path)) as upper:
            assert extents(upper) is None


def test_other_devices_say_nothing(zram_device: Callable[[int], str]) -> None:
    assert extents(zram_device(MIB)) is None
