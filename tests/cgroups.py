"""Cgroups of the v1 blkio hierarchy for tests: made on demand, emptied and removed."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests import devices, host

V1_FILE = "blkio.throttle.write_bps_device"


@dataclass(frozen=True, slots=True)
class BlkioCgroup:
    """A cgroup; `adopt` puts a process into it, with all its threads."""

    path: Path

    def adopt(self, pid: int) -> None:
        (self.path / "cgroup.procs").write_text(str(pid))

    def limits(self) -> dict[str, int]:
        """Return the limits of writes, by disk ("MAJ:MIN")."""
        lines = (self.path / V1_FILE).read_text().splitlines()
        return {disk: int(rate) for disk, rate in (line.split() for line in lines)}

    def set(self, disk: str, rate: int) -> None:
        """Set a limit as an operator does; 0 is none."""
        (self.path / V1_FILE).write_text(f"{disk} {rate}")


@contextmanager
def blkio_cgroup() -> Iterator[BlkioCgroup]:
    """A cgroup of the test's own. Whoever is in there at the end goes to the one above."""
    devices.require("blkio")
    cgroup = BlkioCgroup(Path(tempfile.mkdtemp(prefix="warmsync-test-", dir=host.BLKIO)))
    try:
        yield cgroup
    finally:
        for disk in cgroup.limits():  # they stay with the number of the disk
            cgroup.set(disk, 0)
        _remove(cgroup)


@contextmanager
def resident(cgroup: BlkioCgroup) -> Iterator[None]:
    """Something that runs in a cgroup until the end of the block."""
    with subprocess.Popen(["sleep", "600"]) as process:
        try:
            cgroup.adopt(process.pid)
            yield
        finally:
            process.kill()


def number_of(device: str) -> str:
    """Return a block device's "MAJ:MIN"."""
    status = os.stat(device)
    return f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"


def _remove(cgroup: BlkioCgroup) -> None:
    deadline = time.monotonic() + devices.START_SECONDS
    while True:
        for pid in (cgroup.path / "cgroup.procs").read_text().split():
            try:
                (host.BLKIO / "cgroup.procs").write_text(pid)
            except ProcessLookupError:
                continue
        try:
            cgroup.path.rmdir()
        except OSError:  # a process that has just ended is counted for a moment
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return
