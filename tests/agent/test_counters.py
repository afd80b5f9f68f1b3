"""What the kernel counts of a disk, and what is made of what it does not."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from agent import device as device_module
from agent.counters import Requests, busy, count_writes, number_of, read_requests
from native.blockio import BlockDevice
from native.buffer import AlignedBuffer
from tests.devices import LoopDevice

SIZE = 8 << 20
Loop = Callable[..., LoopDevice]
STAT = "10 1 80 3 20 2 160 4 {in_flight} 9 9"


def says(directory: Path, monkeypatch: pytest.MonkeyPatch, number: int, stat: str) -> None:
    system = directory / f"{os.major(number)}:{os.minor(number)}"
    system.mkdir()
    (system / "stat").write_text(stat + "\n")
    monkeypatch.setattr(device_module, "_SYS_BLOCK", directory)


def test_what_is_read_and_written_is_counted(loop_device: Loop) -> None:
    with BlockDevice(loop_device(SIZE).path, writable=True) as device:
        before, writes = read_requests(number_of(device)), count_writes(device)
        device.write(0, AlignedBuffer(4096))
        device.read(0, AlignedBuffer(4096))
        after = read_requests(number_of(device))
        assert before is not None
        assert after is not None
        assert after.ended >= before.ended + 2
        assert (after.in_flight, count_writes(device)) == (0, writes + 1)


@pytest.mark.parametrize(
    ("later", "expected"),
    [
        ("", Requests(30, 2, 20)),
        (" 5 0 40 1", Requests(35, 2, 25)),
        (" 5 0 40 1 7 1", Requests(42, 2, 25)),
    ],
    ids=["before 4.19", "before 5.5", "today"],
)
def test_older_kernels_count_less(
    loop_device: Loop,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    later: str,
    expected: Requests,
) -> None:
    path = loop_device(SIZE).path
    says(tmp_path, monkeypatch, os.stat(path).st_rdev, STAT.format(in_flight=2) + later)
    with BlockDevice(path) as device:
        assert read_requests(number_of(device)) == expected


def test_a_file_has_the_requests_of_its_disk_and_no_writes_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(4096))
    system = tmp_path / "sys"
    system.mkdir()
    says(system, monkeypatch, path.stat().st_dev, STAT.format(in_flight=0))
    with BlockDevice(str(path)) as device:
        assert read_requests(number_of(device)) == Requests(30, 0, 20)
        assert count_writes(device) == 0


def test_where_nothing_is_counted_all_may_be_busy(
    loop_device: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = loop_device(SIZE).path, loop_device(SIZE).path
    monkeypatch.setattr(device_module, "_SYS_BLOCK", tmp_path)
    with BlockDevice(one) as first, BlockDevice(other) as second:
        assert read_requests(number_of(first)) is None
        assert busy([first, second]) == [one, other]
        says(tmp_path, monkeypatch, os.stat(other).st_rdev, STAT.format(in_flight=1))
        assert busy([first, second]) == [other]
    assert read_requests(number_of(second)) is None, "closed"
