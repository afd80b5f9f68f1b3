"""Virtual machines that are measured: one boot each, from the start of QEMU to its end.

The guest is that of the tests (docs/guests.md): its program acknowledges each record on the serial
line once it is durable, and says at each boot what it found. Owns the moments of a run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.devices import require_tools
from benchmarks.measure import ImpossibleError
from benchmarks.mirror import Monitor
from benchmarks.processes import wait_exit
from benchmarks.serial import Acknowledged, listening
from tests import host
from tests.vm import guest as vm
from tests.vm.guest import Drive, Guest, Records, Setup
from tests.vm.initramfs import Boot

SECONDS = 120.0
"""How long a guest may take for anything."""


def require_guests() -> None:
    """Raise ImpossibleError unless virtual machines can run here."""
    if reason := host.lacks("guests"):
        raise ImpossibleError(f"no guests: {reason}")
    require_tools("mkfs.ext4", "dd")


@dataclass(eq=False)
class Run:
    """A machine that runs, and since when (monotonic)."""

    guest: Guest
    heard: Acknowledged
    started: float

    def wait_more(self, count: int) -> None:
        """Wait for so many more acknowledged writes."""
        self.heard.wait_more(count, SECONDS)

    @property
    def boot_seconds(self) -> float:
        """From the start of QEMU to the first acknowledged write."""
        return self.heard.moments[0] - self.started

    def monitor(self) -> Monitor:
        """Return a connection to QEMU's monitor, which takes one at a time."""
        return Monitor(self.guest.monitor)

    def await_end(self) -> None:
        """Wait until QEMU has ended."""
        if not wait_exit(self.guest.process.pid, SECONDS):
            raise TimeoutError(f"the guest is not off after {SECONDS} s: {self.guest.logs()}")
        if self.guest.process.wait() != 0:
            raise RuntimeError(f"QEMU failed: {self.guest.logs()}")


@contextmanager
def boot(files: Boot, path: str, pause_ms: int, seed: int, directory: Path) -> Iterator[Run]:
    """Boot from a device; yields after the first acknowledged write. Ends with a power cut."""
    started = time.monotonic()
    setup = Setup(pause_ms=pause_ms, seed=seed)
    with vm.running(directory.name, files, setup, [Drive(path)], directory) as guest:
        vm.LIVE.remove(guest)  # that list is of the tests
        with listening(directory / "guest.log") as heard:
            run = Run(guest, heard, started)
            run.wait_more(1)
            yield run


def check_kept(promised: Records, found: Records) -> None:
    """Raise RuntimeError unless all that was acknowledged before is there after."""
    lost = [number for number, checksum in promised.items() if found.get(number) != checksum]
    if lost:
        raise RuntimeError(f"{len(lost)} of {len(promised)} acknowledged writes are lost: {lost}")
