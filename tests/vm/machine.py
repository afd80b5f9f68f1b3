"""A virtual machine through all its runs, here and on the other host, and what it was promised."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests import devices
from tests.devices import LoopDevice
from tests.e2e.disks import soil
from tests.vm import filesystems
from tests.vm.guest import Drive, Guest, Records, Setup, running
from tests.vm.initramfs import Boot


@dataclass(frozen=True, slots=True)
class Plan:
    """How a machine is made: its file systems, its disks, and how QEMU opens them."""

    kind: str = "ext4"
    disks: int = 1
    partitioned: bool = False
    cache: str = "none"
    aio: str = "io_uring"
    image: str = "raw"
    """The format of the source's disks: raw on block devices, or qcow2 in files."""
    more_bytes: int = 0
    """By how much the target's disks are larger."""

    @property
    def setup(self) -> Setup:
        """What the guest is told: of two disks the second is the log's."""
        part = "p1" if self.partitioned else ""
        log = f"nvme0n2{part}" if self.disks == 2 else ""
        return Setup(self.kind, f"nvme0n1{part}", log)


@dataclass(eq=False)
class Machine:
    """A machine with disks on both hosts; `promised` is what its guest has acknowledged."""

    name: str
    plan: Plan
    boot_files: Boot
    directory: Path
    source: list[LoopDevice]
    target: list[LoopDevice]
    stack: ExitStack
    images: list[str] = field(default_factory=list)
    """Files of another format that the source's disks were put into, if they were."""
    promised: Records = field(default_factory=dict)
    runs: int = 0
    size_bytes: int = 0
    """The size of its file system since its first boot."""

    @property
    def volumes(self) -> list[tuple[str, str]]:
        """The pairs of a migration."""
        sources = self.images or [disk.path for disk in self.source]
        return [(a, b.path) for a, b in zip(sources, self.target, strict=True)]

    def start(self, disks: Sequence[LoopDevice], setup: Setup | None = None) -> Guest:
        """Start a run on these disks, and wait for nothing."""
        self.runs += 1
        drives = [Drive(disk.path, self.plan.cache, self.plan.aio) for disk in disks]
        if self.images and disks is self.source:
            drives = [Drive(path, self.plan.cache, "threads", "qcow2") for path in self.images]
        name = f"{self.name}.{self.runs}"
        setup = replace(setup or self.plan.setup, seed=self.runs)
        run = running(name, self.boot_files, setup, drives, self.directory / name)
        return self.stack.enter_context(run)

    def boot(self, disks: Sequence[LoopDevice]) -> Guest:
        """Start a run, which must find all that was promised, and go on writing."""
        guest = self.start(disks)
        guest.wait_checked()
        self.assert_kept(guest.found())
        self.size_bytes = self.size_bytes or guest.size_bytes()
        assert guest.size_bytes() == self.size_bytes, guest.logs()
        guest.wait_written(1)
        return guest

    def assert_kept(self, found: Records) -> None:
        """Nothing that was acknowledged is missing or other, and nothing else has appeared.

        One record may be there that was not acknowledged: the machine ended before it was.
        """
        lost = {number for number in self.promised if found.get(number) != self.promised[number]}
        assert not lost, f"{self.name} lost {sorted(lost)} of {len(self.promised)} records"
        more = sorted(found.keys() - self.promised.keys())
        assert more in ([], [len(self.promised) + 1]), f"{self.name}: records of nobody: {more}"
        self.promised = found

    def end(self, guest: Guest, cut: bool = False) -> None:
        """End a run by its power button, or by a power cut; what it acknowledged is promised."""
        if cut:
            guest.cut_power()
        else:
            guest.power_down()
        self.promised |= guest.acknowledged()

    def check(self, disks: Sequence[LoopDevice]) -> None:
        """Look at the file systems from outside: nothing to repair, nothing to replay."""
        for disk in disks:
            filesystems.check(disk, self.plan.kind, self.plan.partitioned)
            assert not self.is_dirty(disk), disk

    def is_dirty(self, disk: LoopDevice) -> bool:
        """Whether a disk's file system waits for the replay of its journal."""
        return filesystems.is_dirty(disk, self.plan.kind, self.plan.partitioned)


def machine(name: str, plan: Plan, boot: Boot, directory: Path, stack: ExitStack) -> Machine:
    """Make a machine with new disks; those of the target hold something else."""
    size = filesystems.SIZES[plan.kind]
    source, target = (
        [stack.enter_context(devices.loop_device(size + more)) for _ in range(plan.disks)]
        for more in (0, plan.more_bytes)
    )
    for disk in source:
        filesystems.make(disk, plan.kind, plan.partitioned)
    for disk in target:
        soil(disk.path, seed=1)
    made = Machine(name, plan, boot, directory, source, target, stack)
    if plan.image != "raw":
        made.images = [str(directory / f"{name}-{i}.{plan.image}") for i in range(plan.disks)]
        for disk, path in zip(source, made.images, strict=True):
            devices.run("qemu-img", "convert", "-f", "raw", "-O", plan.image, disk.path, path)
    return made
