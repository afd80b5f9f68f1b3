"""What is known of a resize before anything is copied: what would be grown, what the host lacks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from agent.config import ResizeConfig
from agent.errors import FailedPrecondition
from agent.layout.superblock import Kind
from agent.migration import Plan, Volume
from agent.resize import foresee, means
from agent.target.growth import Growth
from native.blockio import BlockDevice
from tests import devices
from tests.agent.resizing.disks import KINDS, Disk
from tests.devices import FaultyDevice

MIB = 1 << 20
ALL = {Kind.EXT: list[str](), Kind.XFS: [], Kind.BTRFS: []}


@pytest.mark.parametrize("scheme", ["none", "gpt"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_would_be_grown_is_foreseen(
    make_disk: Callable[..., Disk], kind: str, scheme: str
) -> None:
    disk = make_disk(kind, scheme, growth=0)
    with BlockDevice(disk.path) as device:
        assert foresee(device) == KINDS[kind]


@pytest.mark.parametrize("damaged", [False, True])
def test_what_cannot_be_told_is_left_to_the_cutover(
    make_disk: Callable[..., Disk], damaged: bool
) -> None:
    disk = make_disk("ext4", "gpt", growth=0)
    with Path(disk.path).open("rb+") as file:
        if damaged:  # as far as anybody can see while a guest writes it anew
            file.seek(520)
            file.write(b"\xff")
        else:
            file.write(bytes(16 * MIB))
    with BlockDevice(disk.path) as device:
        assert foresee(device) == ""


def test_a_disk_that_cannot_be_read_is_left_to_the_rounds(
    faulty_device: Callable[..., FaultyDevice],
) -> None:
    device = faulty_device(16 * MIB)
    with device.failing("pread"), BlockDevice(device.path) as disk:
        assert foresee(disk) == ""


@pytest.fixture
def growth(tmp_path: Path) -> Callable[..., Growth]:
    def build(*allowed: str) -> Growth:
        plan = Plan("move-1", "", (Volume("/dev/a", "/dev/b", 4 * MIB, 4096),))
        return Growth(tmp_path, plan, ResizeConfig(file_systems=allowed))

    return build


def check(growth: Growth, tmp_path: Path, said: str, size_bytes: int = 5 * MIB) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(size_bytes))
    with BlockDevice(str(path)) as device:
        growth.check([device], [said])


def test_a_program_that_is_missing_is_named(
    growth: Callable[..., Growth], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(means, "programs_missing", lambda: ALL | {Kind.XFS: ["xfs_growfs"]})
    every = growth("ext4", "xfs", "btrfs")
    check(every, tmp_path, "ext")
    with pytest.raises(FailedPrecondition) as caught:
        check(every, tmp_path, "xfs")
    assert caught.value.reason == "GROW_UNAVAILABLE"
    assert caught.value.values == {
        "target": "/dev/b",
        "file_system": "xfs",
        "lacks": "xfs_growfs not installed",
    }
    assert "doctor" in str(caught.value)
    # Nothing to grow, nothing known, or of a source that knows more: nothing is asked for.
    check(every, tmp_path, "xfs", 4 * MIB + 4096)
    check(every, tmp_path, "")
    check(every, tmp_path, "bcachefs")


def test_what_may_not_be_grown(growth: Callable[..., Growth], tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition) as caught:
        check(growth("xfs", "btrfs"), tmp_path, "ext")
    assert caught.value.reason == "GROW_NOT_ALLOWED"
    assert "ext4" in str(caught.value)


def test_a_kernel_without_fuse(
    growth: Callable[..., Growth], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices.require("ext4")
    monkeypatch.setattr(means, "FUSE", tmp_path / "fuse")
    with pytest.raises(FailedPrecondition) as caught:
        check(growth("ext4"), tmp_path, "ext")
    assert caught.value.reason == "GROW_UNAVAILABLE"
    assert "modprobe fuse" in str(caught.value)
