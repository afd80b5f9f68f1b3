"""The disks of a schedule: made, filled, and what there is to break them with."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from tests import content, devices
from tests.content import STEP_BYTES, Disk
from tests.e2e import disks
from tests.e2e.disks import MIB
from tests.gauntlet.fragile import FragileDisk, fragile_disk
from tests.gauntlet.machine import Machine, machine
from tests.gauntlet.schedule import IMAGES, Schedule

_TABLE_BYTES = 34 * 512
"""What the copy of a GPT needs, and a sector so that the disk is not one of 4096 byte sectors."""


@dataclass(frozen=True, slots=True)
class Volume:
    """A source, its target, and their insides where they can be broken."""

    source: str
    target: str
    fragile_source: FragileDisk | None = None
    fragile_target: FragileDisk | None = None
    small: Path | None = None
    machine: Machine | None = None

    @property
    def guest(self) -> str:
        """Return what the guest writes to: the source, or what its machine makes of it."""
        return self.source if self.machine is None else self.machine.guest

    @contextmanager
    def content(self, directory: Path) -> Iterator[str]:
        """Give what is on the source, as its guest sees it; nobody writes meanwhile."""
        if self.machine is None:
            yield self.source
            return
        copy = directory / "content"
        try:
            self.machine.read_into(copy)
            yield str(copy)
        finally:
            copy.unlink(missing_ok=True)


def make_volume(stack: ExitStack, plan: Schedule, index: int, directory: Path) -> Volume:
    """Make a volume of a schedule; its source is filled, its target soiled or an older copy."""
    wanted, seed = plan.volumes[index], plan.seed + index
    if wanted.source in IMAGES:
        place = directory / f"vm{index}"
        vm = stack.enter_context(machine(place, wanted.size_bytes, wanted.source))
        made = Volume(vm.image, "", machine=vm)
    else:
        source, fragile = _make(stack, wanted.source, wanted.size_bytes, seed, volatile=False)
        made = Volume(source, "", fragile)
    content.fill(made.guest, seed)
    if wanted.source == "file":
        _dig_holes(made.source)
    if plan.smaller:
        _use_half(made.source)
    return _make_target(stack, plan, index, made)


def _make_target(stack: ExitStack, plan: Schedule, index: int, made: Volume) -> Volume:
    wanted, seed = plan.volumes[index], plan.seed + index
    needed_bytes = -(-disks.size_of(made.guest) // 4096) * 4096
    room_bytes = needed_bytes if wanted.exact else 2 * needed_bytes + MIB
    if plan.smaller:
        room_bytes = _half(made.source) + _TABLE_BYTES
    if wanted.target in ("small", "roomy"):
        small = stack.enter_context(small_directory())
        if wanted.target == "roomy":
            enlarge(small)
        target = str(small / "disk.img")
        Path(target).touch()
        os.truncate(target, room_bytes)
        return replace(made, target=target, small=small)
    target, fragile_target = _make(stack, wanted.target, room_bytes, seed, volatile=True)
    disks.soil(target, seed + 100)
    if plan.reuse_target:
        _copy_some(made.guest, target)
    if fragile_target is not None:
        fragile_target.lose()  # nothing of this was in the way of a flush
    return replace(made, target=target, fragile_target=fragile_target)


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


def _half(path: str) -> int:
    return disks.size_of(path) // 2 // MIB * MIB


def _use_half(path: str) -> None:
    """Let a disk have a partition that ends in the middle; behind it is what was there before."""
    sectors = (_half(path) - MIB) // 512
    script = f"label: gpt\nstart={MIB // 512}, size={sectors}\n"
    devices.run("sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", path, feed=script)


def content_of(path: str, plan: Schedule) -> tuple[int, int]:
    """Return the range of a source that its target has to hold, in bytes."""
    return (MIB, _half(path)) if plan.smaller else (0, disks.size_of(path))


def guest_disk(volume: Volume, plan: Schedule) -> tuple[str, int, int]:
    """Return what the guest writes to, and which range of it, in bytes."""
    begin, end = content_of(volume.guest, plan)
    start = Path("/sys/class/block") / Path(volume.source).name / "start"
    if not (plan.whole_disk and start.exists()):
        return volume.guest, begin, end - begin
    return volume.source.rpartition("p")[0], int(start.read_text()) * 512, end


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


def fill_up(directory: Path) -> None:
    """Leave a small directory no more room than is used now."""
    is_, page = os.statvfs(directory), os.sysconf("SC_PAGESIZE")
    used_bytes = max((is_.f_blocks - is_.f_bfree) * is_.f_frsize, page)  # 0 is no limit
    devices.run("mount", "-o", f"remount,size={used_bytes}", directory)
