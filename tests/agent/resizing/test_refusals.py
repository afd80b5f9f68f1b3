"""What is not grown, and every way to fail: afterwards each byte is as it was."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from agent import resize
from agent.errors import DataLoss, FailedPrecondition
from agent.layout.partitions import Patch, Table
from agent.resize import Limits, tool
from native.blockio import BlockDevice
from tests import devices, filesystems
from tests.agent.resizing.disks import KINDS, Disk, grow
from tests.content import read_all
from tests.devices import FaultyDevice, LoopDevice, run
from tests.filesystems import MIB

Make = Callable[..., Disk]
REAL = "/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin"


@contextmanager
def untouched(path: str) -> Iterator[None]:
    """Whatever is done within, the disk is the same afterwards, and nobody holds it."""
    before = read_all(path)
    yield
    assert read_all(path) == before
    with BlockDevice(path, writable=True, exclusive=True):
        pass


def refusal(disk: Disk, place: Path, limits: Limits | None = None) -> FailedPrecondition:
    with untouched(disk.path), pytest.raises(FailedPrecondition) as caught:
        grow(disk, place, limits)
    return caught.value


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory in which a test puts other programs; those of the host come after it."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    return directory


def put(programs: Path, name: str, script: str) -> None:
    path = programs / name
    path.write_text(f"#!/bin/sh\nPATH={REAL}\n{script}\n")
    path.chmod(0o755)


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_system_is_not_touched(make_disk: Make, place: Path, kind: str) -> None:
    disk = make_disk(kind)
    damage(disk)
    error = refusal(disk, place)
    assert error.reason == "FILE_SYSTEM_DAMAGED"
    assert "guest" in str(error)


def damage(disk: Disk) -> None:
    """Damage what the superblock does not tell."""
    if disk.kind == "ext4":
        run("debugfs", "-w", "-R", "clri d0", disk.path)
        return
    if disk.kind == "xfs":
        run("xfs_db", "-x", "-c", "agf 0", "-c", "write -d freeblks 7", disk.path)
        return
    with Path(disk.path).open("rb+") as file:
        file.seek(MIB)
        for _ in range(disk.data_bytes // MIB - 1):  # all trees, both copies
            file.seek(64, os.SEEK_CUR)
            file.write(b"\xff" * 64)
            file.seek(MIB - 128, os.SEEK_CUR)
        file.seek(20 * MIB)
        file.write(os.urandom(40 * MIB))


@pytest.mark.parametrize("offset", [520, 1024 + 40, -512 + 24, -1024])
def test_a_damaged_table_is_not_touched(make_disk: Make, place: Path, offset: int) -> None:
    disk = make_disk("ext4", "gpt")
    with Path(disk.path).open("rb+") as file:
        file.seek(offset if offset > 0 else disk.data_bytes + offset)
        old = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([old[0] ^ 0xFF]))
    assert refusal(disk, place).reason == "TABLE_DAMAGED"


@pytest.mark.parametrize("what", ["swap", "lvm", "luks", "empty", "two", "raid", "extended"])
def test_what_nobody_can_grow_is_left_alone(make_disk: Make, place: Path, what: str) -> None:
    disk = make_disk("ext4", "mbr" if what == "extended" else "none")
    with Path(disk.path).open("rb+") as file:
        if what in ("swap", "lvm", "luks", "empty"):
            file.write(bytes(disk.data_bytes))
        places = {
            "swap": (4086, b"SWAPSPACE2"),
            "lvm": (512, b"LABELONE"),
            "luks": (0, b"LUKS\xba\xbe"),
            "empty": (0, b""),
            "two": (0, b"XFSB"),
            "raid": (disk.data_bytes - 8192, b"\xfc\x4e\x2b\xa9"),
            "extended": (446 + 4, b"\x05"),
        }
        at, mark = places[what]
        file.seek(at)
        file.write(mark)
    assert refusal(disk, place).reason == "GROW_UNSUPPORTED"


@pytest.mark.parametrize("what", ["untyped", "logical"])
def test_what_lies_behind_an_mbrs_last_partition_is_not_grown_over(
    make_disk: Make, place: Path, what: str
) -> None:
    """Linux uses an entry of type 0, and holds no logical partition to its extended one."""
    disk = make_disk("ext4", "mbr")
    start, size = disk.data_bytes, 8 * MIB
    with Path(disk.path).open("rb+") as file:
        entry = (446 + 2 * 16, 0, start // 512)
        if what == "logical":
            file.seek(446 + 16 + 4)
            file.write(b"\x05")
            file.seek(MIB + 510)
            file.write(b"\x55\xaa")
            entry = (MIB + 446, 0x83, (start - MIB) // 512)
        file.seek(entry[0])
        file.write(struct.pack("<4xB3xII", entry[1], entry[2], size // 512))
        file.seek(start)
        file.write(os.urandom(size))
    error = refusal(replace(disk, data_bytes=start + size), place)
    assert error.reason == "GROW_UNSUPPORTED"
    assert "logical partitions or entries without a type" in str(error)


@pytest.mark.parametrize("name", ["e2fsck", "resize2fs", "setpriv", "mount"])
def test_a_program_that_is_not_there(
    make_disk: Make, place: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = make_disk()
    there = tmp_path / "others"
    there.mkdir()
    for other in {"e2fsck", "resize2fs", "setpriv", "mount", "umount"} - {name}:
        (there / other).symlink_to(str(shutil.which(other, path=REAL)))
    monkeypatch.setattr(tool, "_SYSTEM_PATH", "/nowhere")
    with monkeypatch.context() as patch, untouched(disk.path):
        patch.setenv("PATH", str(there))
        with pytest.raises(FailedPrecondition) as caught:
            grow(disk, place)
    assert caught.value.reason == "GROW_FAILED"
    assert f"{name} not installed" in str(caught.value)


@pytest.mark.parametrize("name", ["e2fsck", "resize2fs"])
def test_a_program_that_writes_rubbish_and_dies(
    make_disk: Make, place: Path, programs: Path, name: str
) -> None:
    disk = make_disk("ext4", "gpt")
    rubbish = f'for last; do :; done\n{name} "$@"\ndd if=/dev/urandom of=$last bs=1M count=9'
    put(programs, name, f"{rubbish} conv=notrunc,fsync\nkill -9 $$")
    error = refusal(disk, place)
    assert error.reason == ("GROW_FAILED" if name == "resize2fs" else "FILE_SYSTEM_DAMAGED")


def test_a_program_that_says_done_but_has_done_harm(
    make_disk: Make, place: Path, programs: Path
) -> None:
    disk = make_disk()
    put(
        programs,
        "resize2fs",
        'resize2fs "$@"\ndebugfs -w -R "clri d1" $2\nexit 0',
    )
    error = refusal(disk, place)
    assert error.reason == "GROW_FAILED"
    assert "not clean once it was grown" in str(error)


@pytest.mark.parametrize("kind", KINDS)
def test_a_program_that_hangs(make_disk: Make, place: Path, programs: Path, kind: str) -> None:
    disk = make_disk(kind)
    name = {"ext4": "resize2fs", "xfs": "xfs_growfs", "btrfs": "btrfs"}[kind]
    check = '[ "$1" = check ] && exec btrfs "$@"\n' if kind == "btrfs" else ""
    put(programs, name, f'{check}{name} "$@"; sleep 1000')
    error = refusal(disk, place, Limits(program_seconds=3))
    assert error.reason == "GROW_FAILED"
    assert "took more than 3 s" in str(error)


def test_a_btrfs_whose_id_is_mounted_here(make_disk: Make, place: Path, tmp_path: Path) -> None:
    disk = make_disk("btrfs")
    copy = tmp_path / "copy"
    run("dd", f"if={disk.path}", f"of={copy}", "bs=1M", "conv=sparse")
    with devices.attached(copy) as other, filesystems.opened(other, "btrfs"):
        assert "same id is mounted" in str(refusal(disk, place))


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_directory_that_is_full(make_disk: Make, tmp_path: Path, kind: str) -> None:
    disk = make_disk(kind)
    full = tmp_path / "full"
    full.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", full)
    try:
        error = refusal(disk, full / "move-1.0")
        assert list(full.iterdir()) == []
    finally:
        run("umount", full)
    assert error.reason == "GROW_FAILED"
    assert "No space left" in str(error)


@pytest.fixture
def failing_disk(faulty_device: Callable[..., FaultyDevice]) -> tuple[Disk, FaultyDevice]:
    devices.require("ext4")
    device = faulty_device(220 * MIB)
    disk = Disk(device.path, 64 * MIB, 512, "ext4", "none")
    disk.prepare()
    return disk, device


def test_a_disk_that_cannot_be_read(
    failing_disk: tuple[Disk, FaultyDevice], place: Path, programs: Path
) -> None:
    disk, device = failing_disk
    put(programs, "e2fsck", f'touch {device.directory / "pread"}\nexec e2fsck "$@"')
    before = read_all(disk.path)
    with pytest.raises(FailedPrecondition) as caught:
        grow(disk, place)
    (device.directory / "pread").unlink()
    assert caught.value.reason == "GROW_FAILED"
    assert "Input/output error" in str(caught.value) or "EIO" in str(caught.value)
    assert read_all(disk.path) == before


def test_a_disk_that_cannot_be_written(
    failing_disk: tuple[Disk, FaultyDevice], place: Path
) -> None:
    """Nor can it be brought back then: that is said, and done once the disk is well."""
    disk, device = failing_disk
    before = read_all(disk.path)
    with device.failing("pwrite", "zero", "trim"), pytest.raises(DataLoss) as caught:
        grow(disk, place)
    assert caught.value.reason == "GROW_NOT_UNDONE"
    with BlockDevice(disk.path, writable=True, exclusive=True) as again:
        assert resize.undo_left_behind(again, place)
    assert read_all(disk.path)[: disk.data_bytes] == before[: disk.data_bytes]
    assert grow(disk, place).after_bytes > 200 * MIB


def test_a_write_that_fails_halfway_is_undone(
    make_disk: Make, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = make_disk("ext4", "gpt")
    calls = fail_halfway(monkeypatch, lambda: OSError(5, "no more"))
    error = refusal_of_data(disk, place)
    assert error.reason == "GROW_FAILED"
    assert calls


def refusal_of_data(disk: Disk, place: Path) -> FailedPrecondition:
    """As `refusal`; what lies beyond the data is nobody's."""
    before = read_all(disk.path)[: disk.data_bytes]
    with pytest.raises(FailedPrecondition) as caught:
        grow(disk, place)
    assert read_all(disk.path)[: disk.data_bytes] == before
    return caught.value


def fail_halfway(
    monkeypatch: pytest.MonkeyPatch, make_error: Callable[[], BaseException]
) -> list[int]:
    """Let the fifth piece that goes to the device fail, after it was written."""
    from agent.resize.overlay import Overlay

    original, calls = Overlay._apply, []

    def apply(self: Overlay, offset: int, length: int) -> None:
        original(self, offset, length)
        calls.append(offset)
        if len(calls) == 5:
            raise make_error()

    monkeypatch.setattr(Overlay, "_apply", apply)
    return calls


def test_a_smaller_disk_than_its_table(
    loop_device: Callable[..., LoopDevice], make_disk: Make, place: Path
) -> None:
    disk = make_disk("ext4", "gpt", growth=0)
    target = loop_device(disk.data_bytes - 2 * MIB)
    run("dd", f"if={disk.path}", f"of={target.path}", "bs=1M", f"count={target.size_bytes // MIB}")
    with (
        untouched(target.path),
        BlockDevice(target.path, writable=True, exclusive=True) as device,
        pytest.raises(FailedPrecondition) as caught,
    ):
        resize.move_table(device, target.size_bytes, disk.data_bytes, place)
    assert caught.value.reason == "TABLE_NOT_MOVED"


def test_a_moved_table_is_read_before_it_is_believed(
    make_disk: Make, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patches = Table.patches

    def wrong(table: Table, disk_bytes: int) -> list[Patch]:
        first = replace(table.partitions[0], end_bytes=table.partitions[0].end_bytes - MIB)
        return patches(replace(table, partitions=(first, *table.partitions[1:])), disk_bytes)

    monkeypatch.setattr(Table, "patches", wrong)
    disk = make_disk("ext4", "gpt", growth=0)
    with (
        untouched(disk.path),
        BlockDevice(disk.path, writable=True, exclusive=True) as device,
        pytest.raises(FailedPrecondition, match="another table") as caught,
    ):
        resize.move_table(device, disk.data_bytes, disk.data_bytes, place)
    assert caught.value.reason == "TABLE_NOT_MOVED"
