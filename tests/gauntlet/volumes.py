"""The disks of a schedule: made, filled, and what there is to break them with."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests import content, devices
from tests.content import STEP_BYTES, Disk
from tests.e2e import disks
from tests.e2e.disks import MIB
from tests.gauntlet.fragile import FragileDisk, fragile_disk
from tests.gauntlet.schedule import Schedule


@dataclass(frozen=True, slots=True)
class Volume:
    """A source, its target, and their insides where they can be broken."""

    source: str
    target: str
    fragile_source: FragileDisk | None = None
    fragile_target: FragileDisk | None = None
    small: Path | None = None


def make_volume(stack: ExitStack, plan: Schedule, index: int) -> Volume:
    """Make a volume of a schedule; its source is filled, its target soiled or an older copy."""
    wanted, seed = plan.volumes[index], plan.seed + index
    source, fragile_source = _make(stack, wanted.source, wanted.size_bytes, seed, volatile=False)
    content.fill(source, seed)
    if wanted.source == "file":
        _dig_holes(source)
    needed_bytes = -(-disks.size_of(source) // 4096) * 4096
    room_bytes = needed_bytes if wanted.exact else 2 * needed_bytes + MIB
    small = stack.enter_context(small_directory()) if wanted.target == "small" else None
    if small is not None:
        target = str(small / "disk.img")
        Path(target).touch()
        os.truncate(target, room_bytes)
        return Volume(source, target, fragile_source, small=small)
    target, fragile_target = _make(stack, wanted.target, room_bytes, seed, volatile=True)
    disks.soil(target, seed + 100)
    if plan.reuse_target:
        _copy_some(source, target)
    if fragile_target is not None:
        fragile_target.lose()  # nothing of this was in the way of a flush
    return Volume(source, target, fragile_source, fragile_target)


def _make(
    stack: ExitStack, kind: str, size_bytes: int, seed: int, *, volatile: bool
) -> tuple[str, FragileDisk | None]:
    if kind == "loop4k":  # the kernel would make one of half a sector more
        size_bytes = -(-size_bytes // 4096) * 4096
    if kind != "fragile":
        return disks.KINDS[kind](stack, size_bytes), None
    sector_size = 4096 if seed % 2 and size_bytes % 4096 == 0 else 512
    disk = stack.enter_context(fragile_disk(size_bytes, sector_size, volatile=volatile))
    return disk.path, disk


def _dig_holes(path: str) -> None:
    """Let a quarter of a file be holes, which nobody has to read; the target has other things."""
    for offset in range(MIB, disks.size_of(path) - MIB, 4 * MIB):
        devices.run("fallocate", "--punch-hole", f"--offset={offset}", f"--length={MIB}", path)


def guest_disk(volume: Volume, plan: Schedule) -> tuple[str, int]:
    """Return what the guest writes to, and where on it the volume begins, in bytes."""
    start = Path("/sys/class/block") / Path(volume.source).name / "start"
    if not (plan.whole_disk and start.exists()):
        return volume.source, 0
    return volume.source.rpartition("p")[0], int(start.read_text()) * 512


def _copy_some(source: str, target: str) -> None:
    """Let the target hold what a migration of long ago left there: here and there the same."""
    with Disk(source) as old, Disk(target, writable=True) as new:
        for offset in range(0, old.size_bytes - STEP_BYTES, 2 * STEP_BYTES):
            new.write(offset, old.read(offset, STEP_BYTES))
        os.fsync(new.fd)


@contextmanager
def small_directory() -> Iterator[Path]:
    """A file system of 3 MiB in memory: too small for what is to come, until it is `enlarged`."""
    with devices.scratch_directory() as directory:
        devices.run("mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", directory)
        try:
            yield directory
        finally:
            devices.run("umount", "--lazy", directory)


def enlarge(directory: Path) -> None:
    """Give a small directory all the room it may want."""
    devices.run("mount", "-o", "remount,size=1g", directory)
