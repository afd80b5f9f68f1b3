"""The disks of migrations: filled, compared, looked at by others than the agents."""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TypeAlias

from tests import content, devices
from tests.content import Disk

MIB = 1 << 20
Maker: TypeAlias = Callable[[ExitStack, int], str]


def _loop(sector_size: int) -> Maker:
    def make(stack: ExitStack, size_bytes: int) -> str:
        return stack.enter_context(devices.loop_device(size_bytes, sector_size)).path

    return make


def _partition(stack: ExitStack, size_bytes: int) -> str:
    # The second begins at an odd sector, so it is 63 sectors short of a half.
    disk = stack.enter_context(devices.loop_device(2 * size_bytes + MIB, partitions=True))
    return disk.partitions[1]


def _zram(stack: ExitStack, size_bytes: int) -> str:
    return stack.enter_context(devices.zram_device(size_bytes))


def _file(stack: ExitStack, size_bytes: int) -> str:
    # Not a whole number of sectors: the last bytes count as well.
    return str(stack.enter_context(devices.image_file(size_bytes + 1000)))


KINDS: dict[str, Maker] = {
    "loop": _loop(512),
    "loop4k": _loop(4096),
    "partition": _partition,
    "zram": _zram,
    "file": _file,
}
SECTOR_BYTES = {"loop": 512, "loop4k": 4096, "partition": 512, "zram": 4096, "file": 512}


def scatter(path: str, seed: int) -> None:
    """Fill regions here and there; the rest stays as it was (holes, on what is new)."""
    rng = random.Random(seed)
    with Disk(path, writable=True) as disk:
        for offset in range(0, disk.size_bytes - MIB, MIB):
            if rng.random() < 0.3:
                disk.write(offset, content.content(MIB, seed + offset))
        os.fsync(disk.fd)


def soil(path: str, seed: int) -> None:
    """Fill a target with what must not be there afterwards."""
    garbage = random.Random(seed).randbytes(MIB)
    with Disk(path, writable=True) as disk:
        for offset in range(0, disk.size_bytes, MIB):
            disk.write(offset, garbage[: min(MIB, disk.size_bytes - offset)])
        os.fsync(disk.fd)


def size_of(path: str | Path) -> int:
    with Disk(path) as disk:
        return disk.size_bytes


def assert_equal(source: str | Path, target: str | Path) -> None:
    """Every byte of the source is on the target, which may be larger."""
    size_bytes, room_bytes = size_of(source), size_of(target)
    difference = content.first_difference(source, target)
    assert difference == (None if room_bytes == size_bytes else size_bytes), (source, target)


def is_fenced(path: str | Path) -> bool:
    """Whether nobody can open the disk for writing any more."""
    status = os.stat(path)
    if stat.S_ISBLK(status.st_mode):
        return devices.run("blockdev", "--getro", path) == "1"
    return status.st_mode & 0o222 == 0


def unfence(path: str) -> None:
    """Lift a block device's fence, as a reboot of its host does."""
    devices.run("blockdev", "--setrw", path)


def is_free(path: str | Path) -> bool:
    """Whether an exclusive claim can be had."""
    from native.blockio import BlockDevice

    try:
        BlockDevice(str(path), exclusive=True).close()
    except OSError:
        return False
    return True


def assert_writable(path: str | Path) -> None:
    """The disk takes a write: its last 4 KiB again."""
    with Disk(path, writable=True) as disk:
        offset = (disk.size_bytes - 4096) // 4096 * 4096
        disk.write(offset, disk.read(offset, 4096))
        os.fsync(disk.fd)
