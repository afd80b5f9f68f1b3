"""What a path really is, and whether it may be touched: on real devices."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from agent import device as device_module
from agent.device import (
    identities,
    io_error,
    is_claimed,
    known_users,
    map_data,
    open_device,
    open_error,
    users_of,
)
from agent.errors import (
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotAllowed,
    NotFound,
    ResourceExhausted,
)
from native.blockio import BlockDevice
from tests import devices
from tests.devices import LoopDevice

MIB = 1 << 20
SIZE = 8 * MIB
Loop = Callable[..., LoopDevice]
Image = Callable[..., Path]


def overlap(one: str | Path, other: str | Path) -> bool:
    return any(a.overlaps(b) for a in identities(str(one)) for b in identities(str(other)))


def test_a_disk_and_its_partitions(loop_device: Loop) -> None:
    disk = loop_device(SIZE, partitions=True)
    first, second = disk.partitions
    own = identities(disk.path)[0]
    assert (own.start_bytes, own.length_bytes) == (0, SIZE)
    assert identities(second)[0].device == own.device
    assert identities(second)[0].start_bytes == SIZE // 2 + 63 * 512
    assert overlap(disk.path, first)
    assert overlap(disk.path, second)
    assert not overlap(first, second)


def test_a_loop_device_is_its_file(loop_device: Loop) -> None:
    disk = loop_device(SIZE, partitions=True)
    assert overlap(disk.path, disk.backing)
    assert overlap(disk.partitions[0], disk.backing)
    assert not overlap(disk.path, loop_device(SIZE).path)


def test_two_loop_devices_of_one_file(image_file: Image) -> None:
    """Two windows of one file share bytes only where the windows do."""
    path = image_file(SIZE)
    window = [f"--sizelimit={4 * MIB}"]
    with (
        devices.attached(path, 512, *window) as low,
        devices.attached(path, 512, f"--offset={4 * MIB}") as high,
        devices.attached(path, 512) as whole,
    ):
        assert not overlap(low, high)
        assert overlap(low, whole)
        assert overlap(high, whole)


def test_other_names_are_the_same(loop_device: Loop, image_file: Image, tmp_path: Path) -> None:
    disk, file = loop_device(SIZE), image_file(SIZE)
    (tmp_path / "disk").symlink_to(disk.path)
    (tmp_path / "file").symlink_to(file)
    hard = file.with_name("hard")
    hard.hardlink_to(file)
    assert identities(str(tmp_path / "disk")) == identities(disk.path)
    assert identities(str(tmp_path / "file")) == identities(str(hard)) == identities(str(file))
    assert not overlap(file, image_file(SIZE))
    hard.unlink()


def test_opening_is_for_what_is_allowed(image_file: Image, tmp_path: Path) -> None:
    path = image_file(MIB)
    open_device(str(path), (f"{path.parent}/*.img",)).close()
    for allowed in ((), (f"{tmp_path}/*",), (str(path) + "x",)):
        with pytest.raises(NotAllowed) as caught:
            open_device(str(path), allowed)
        assert caught.value.reason == "DEVICE_NOT_ALLOWED"


def test_what_is_not_allowed_is_not_even_opened(
    image_file: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To open can be to touch: a tape rewinds, a watchdog begins to count."""
    opened: list[str] = []
    monkeypatch.setattr(device_module, "BlockDevice", lambda path, **_: opened.append(path))
    with pytest.raises(NotAllowed):
        open_device(str(image_file(MIB)), ("/dev/other",))
    assert opened == []


def test_a_link_out_of_an_allowed_directory_opens_nothing(
    image_file: Image, tmp_path: Path
) -> None:
    secret = image_file(MIB)
    link = tmp_path / "disk.img"
    link.symlink_to(secret)
    with pytest.raises(NotAllowed):
        open_device(str(link), (f"{tmp_path}/*",))


def test_a_link_swapped_between_check_and_open_opens_nothing(
    image_file: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What counts is what was opened."""
    secret, good, link = image_file(MIB), tmp_path / "good.img", tmp_path / "disk.img"
    good.write_bytes(bytes(MIB))
    link.symlink_to(good)
    opened: list[BlockDevice] = []

    def swap_and_open(path: str, **flags: bool) -> BlockDevice:
        link.unlink()
        link.symlink_to(secret)
        opened.append(BlockDevice(path, **flags))
        return opened[-1]

    monkeypatch.setattr(device_module, "BlockDevice", swap_and_open)
    with pytest.raises(NotAllowed):
        open_device(str(link), (f"{tmp_path}/*",))
    with pytest.raises(ValueError, match="closed"):
        opened[0].fileno()


@pytest.mark.parametrize(
    ("number", "kind", "reason"),
    [
        (errno.ENOENT, NotFound, "DEVICE_NOT_FOUND"),
        (errno.ENXIO, NotFound, "DEVICE_NOT_FOUND"),
        (errno.EACCES, NotAllowed, "PERMISSION_DENIED"),
        (errno.EPERM, NotAllowed, "PERMISSION_DENIED"),
        (errno.ENOTBLK, InvalidArgument, "NOT_A_DEVICE"),
        (errno.EISDIR, InvalidArgument, "NOT_A_DEVICE"),
        (errno.EBUSY, FailedPrecondition, "DEVICE_IN_USE"),
        (errno.EROFS, FailedPrecondition, "DEVICE_READ_ONLY"),
        (errno.EMFILE, FailedPrecondition, "DEVICE_UNUSABLE"),
    ],
)
def test_errors_of_open(number: int, kind: type[Exception], reason: str) -> None:
    error = open_error("/dev/x", OSError(number, os.strerror(number), "/dev/x"))
    assert type(error) is kind
    assert error.reason == reason
    assert error.values["path"] == "/dev/x"
    assert error.values["errno"] == errno.errorcode[number]


def test_real_errors_of_open(loop_device: Loop, tmp_path: Path) -> None:
    (tmp_path / "pipe").touch()
    anything = ("/dev/*", f"{tmp_path}/*", str(tmp_path))
    disk = loop_device(SIZE)
    for path, reason in (
        (tmp_path / "none", "DEVICE_NOT_FOUND"),
        (tmp_path, "NOT_A_DEVICE"),
        (Path("/dev/null"), "NOT_A_DEVICE"),
    ):
        with pytest.raises(Exception, match=str(path)) as caught:
            open_device(str(path), anything)
        assert getattr(caught.value, "reason", "") == reason
    devices.run("blockdev", "--setro", disk.path)
    with pytest.raises(FailedPrecondition, match="read-only") as caught:
        open_device(disk.path, anything, writable=True)
    open_device(disk.path, anything).close()


@pytest.mark.parametrize(
    ("number", "kind", "reason"),
    [
        (errno.EIO, DataLoss, "TARGET_IO_ERROR"),
        (errno.ENOSPC, ResourceExhausted, "DISK_FULL"),
        (errno.EDQUOT, ResourceExhausted, "DISK_FULL"),
    ],
)
def test_errors_of_reads_and_writes(number: int, kind: type[Exception], reason: str) -> None:
    error = io_error("target", OSError(number, "write of 5 bytes", "/dev/x"))
    assert type(error) is kind
    assert (error.reason, error.values["path"]) == (reason, "/dev/x")
    assert error.values["side"] == "target"


def test_who_uses_a_device(loop_device: Loop, mounted: Callable[..., Path]) -> None:
    disk = loop_device(16 * MIB, partitions=True)
    assert known_users(disk.path) == []
    assert users_of(disk.path) == "held by another process"
    assert not is_claimed(disk.path)
    point = mounted(disk.partitions[0])
    assert known_users(disk.partitions[0]) == [f"mounted at {point}"]
    name = Path(disk.partitions[0]).name
    assert known_users(disk.path) == [f"partition {name} is mounted"]
    assert is_claimed(disk.partitions[0])
    assert is_claimed(disk.path)
    with pytest.raises(FailedPrecondition, match=f"mounted at {point}") as caught:
        open_device(disk.partitions[0], ("/dev/*",), writable=True, exclusive=True)
    assert caught.value.reason == "DEVICE_IN_USE"
    # A source may be in use: that is the point of it.
    open_device(disk.partitions[0], ("/dev/*",)).close()


def test_files_are_never_known_to_be_claimed(image_file: Image) -> None:
    path = image_file(MIB)
    assert not is_claimed(str(path))
    assert known_users(str(path)) == []
    assert known_users("/does/not/exist") == []


def test_a_map_of_the_data(image_file: Image) -> None:
    path = image_file(SIZE)
    with path.open("r+b") as file:
        file.seek(4 * MIB + 5000)
        file.write(b"x")
    with BlockDevice(str(path)) as device:
        data = map_data(device, SIZE, 4096)
    assert data.is_marked(4 * MIB + 5000)
    assert data.count_bytes() <= 2 * MIB


def test_where_nothing_is_known_everything_is_data(
    image_file: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Silent:
        def data_extents(self, *args: object, **named: object) -> None:
            return None

    data = map_data(Silent(), SIZE, 4096)  # type: ignore[arg-type]
    assert data.count_bytes() == SIZE


def test_a_qemu_that_hung_up_is_no_disk_to_check() -> None:
    error = io_error("source", OSError(errno.ENOTCONN, "Transport endpoint is not connected", "a"))
    assert error.reason == "SOURCE_IO_ERROR"
    assert str(error).endswith("see that its QEMU runs")
