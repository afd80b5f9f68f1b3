"""One run of a virtual machine: QEMU, the lines its guest says, and its power button.

A guest says on its second serial line what it found on its disks and what it has made durable since
(see program.c). Both serial lines are files: what was said before a power cut is there.
"""

from __future__ import annotations

import asyncio
import re
import stat
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeAlias

from qemu.qmp import QMPClient

from tests.e2e.agents import eventually
from tests.vm.initramfs import Boot

SECONDS = 120.0
"""How long a guest may take for anything, slow as it is; nothing is measured with it."""
FAILED = re.compile(r"^(?:bad|failed) .*", re.MULTILINE)

Records: TypeAlias = dict[int, str]
"""The checksums of records by their numbers."""


# Three boots of some 230 on a busy host hung, two with no agent near: the guest waits for
# its drive, QEMU 7.2 is idle. Why is not known. The driver aborts and resets after timeouts,
# of 30 s by default. Such warnings of the kernel are in its log.
KERNEL = "console=ttyS0 loglevel=5 panic=-1 nvme_core.io_timeout=10"


@dataclass(frozen=True, slots=True)
class Drive:
    """A disk as QEMU opens it: an image on a device or in a file, and the ways through the host."""

    path: str
    cache: str = "none"
    aio: str = "io_uring"
    image: str = "raw"

    def words(self, number: int) -> list[str]:
        """Return the words of QEMU's command line: namespace `number` of the NVMe drive."""
        is_block = stat.S_ISBLK(Path(self.path).stat().st_mode)
        direct = "on" if self.cache == "none" else "off"
        file = (
            f"driver={'host_device' if is_block else 'file'},node-name=file{number},"
            f"filename={self.path},cache.direct={direct},aio={self.aio},discard=unmap"
        )
        image = f"driver={self.image},node-name=disk{number},file=file{number},discard=unmap"
        device = f"nvme-ns,bus=nvme,drive=disk{number},nsid={number}"
        return ["-blockdev", file, "-blockdev", image, "-device", device]


@dataclass(frozen=True, slots=True)
class Setup:
    """What a guest does: a file system's kind, the partitions of data and log, the pace.

    Each run has a seed of its own, and so writes what no other run has written.
    """

    kind: str = "ext4"
    data: str = "nvme0n1"
    log: str = ""
    pause_ms: int = 10
    seed: int = 1

    def words(self) -> str:
        """Return the kernel's command line; init finds what the kernel does not know there."""
        ours = {field.name: getattr(self, field.name) for field in fields(self)}
        return " ".join([KERNEL, *(f"{name}={value}" for name, value in ours.items())])


@dataclass(eq=False)
class Guest:
    """A virtual machine that runs, or has run."""

    name: str
    process: subprocess.Popen[bytes]
    directory: Path

    @property
    def monitor(self) -> Path:
        """The socket of QEMU's monitor (QMP)."""
        return self.directory / "qmp"

    def said(self) -> str:
        """Return all whole lines that the guest has said."""
        text = (self.directory / "guest.log").read_bytes().decode(errors="replace")
        return text.replace("\r", "").rpartition("\n")[0] + "\n"

    def logs(self) -> str:
        """Return all that a reader of a failure wants."""
        said = self.said().splitlines()[-20:]
        files = [(self.directory / name).read_text() for name in ("kernel.log", "qemu.log")]
        return "\n".join([*said, *files])

    def found(self) -> Records:
        """Return the records that were on the disk."""
        return records_of("found", self.said())

    def size_bytes(self) -> int:
        """Return the size of the data's file system, as the guest sees it."""
        size = re.search(r"^size (\d+)$", self.said(), re.MULTILINE)
        assert size is not None, self.logs()
        return int(size[1])

    def acknowledged(self) -> Records:
        """Return the records that were made durable in this run."""
        return records_of("ack", self.said())

    def wait_checked(self) -> None:
        """Wait until the guest has booted and has found its disks well."""
        self._wait("checked ")

    def wait_failed(self) -> str:
        """Wait until the guest says what is wrong; returns that line."""
        found = eventually(lambda: FAILED.findall(self.said()), bool, seconds=SECONDS)
        return str(found[0])

    def wait_written(self, count: int) -> None:
        """Wait until the guest has acknowledged so many records more."""
        wanted = len(self.acknowledged()) + count
        eventually(
            lambda: len(self.acknowledged()),
            lambda now: now >= wanted,
            stop=lambda _: self._has_ended(),
            seconds=SECONDS,
        )

    def power_down(self) -> None:
        """Press the power button: the guest stops writing, unmounts and ends by itself."""
        asyncio.run(self.execute("system_powerdown"))
        assert self.process.wait(SECONDS) == 0, self.logs()
        assert self.said().endswith("stopped\noff\n"), self.logs()

    def cut_power(self) -> None:
        """End it in the middle of whatever it does; safe for one that has ended."""
        self.process.kill()
        self.process.wait()

    async def execute(self, command: str, arguments: dict[str, object] | None = None) -> object:
        """Run a command of the monitor; returns what it returns."""
        client = QMPClient(self.name)
        await client.connect(str(self.monitor))
        try:
            return await client.execute(command, arguments)
        finally:
            await client.disconnect()

    def _wait(self, line: str) -> None:
        def is_there(said: str) -> bool:
            assert not FAILED.search(said), said
            return f"\n{line}" in said

        eventually(self.said, is_there, stop=lambda _: self._has_ended(), seconds=SECONDS)

    def _has_ended(self) -> bool:
        return self.process.poll() is not None


LIVE: list[Guest] = []
"""Guests of the test that runs: what they said goes into its report if it fails."""


@contextmanager
def running(
    name: str, boot: Boot, setup: Setup, drives: Sequence[Drive], directory: Path
) -> Iterator[Guest]:
    """Start a virtual machine; its power is cut at the end of the block if it still runs."""
    directory.mkdir()
    for log in ("kernel.log", "guest.log", "qemu.log"):
        (directory / log).touch()
    with (directory / "qemu.log").open("wb") as errors:
        process = subprocess.Popen(
            _command(boot, setup, drives, directory),
            stdin=subprocess.DEVNULL,
            stdout=errors,
            stderr=errors,
        )
    guest = Guest(name, process, directory)
    LIVE.append(guest)
    try:
        yield guest
    finally:
        guest.cut_power()


def _command(boot: Boot, setup: Setup, drives: Sequence[Drive], directory: Path) -> list[str]:
    machine = "-accel tcg -cpu max -smp 1 -m 192 -nodefaults -no-user-config -no-reboot"
    words = ["qemu-system-x86_64", *machine.split(), "-display", "none"]
    words += ["-kernel", str(boot.kernel), "-initrd", str(boot.initramfs)]
    words += ["-append", setup.words()]
    words += ["-serial", f"file:{directory / 'kernel.log'}"]
    words += ["-serial", f"file:{directory / 'guest.log'}"]
    words += ["-qmp", f"unix:{directory / 'qmp'},server=on,wait=off"]
    words += ["-device", "nvme,id=nvme,serial=warmsync"]
    return words + [word for number, drive in enumerate(drives, 1) for word in drive.words(number)]


def records_of(word: str, said: str) -> Records:
    lines = re.findall(rf"^{word} (\d+) (\S+)$", said, re.MULTILINE)
    return {int(number): checksum for number, checksum in lines}
