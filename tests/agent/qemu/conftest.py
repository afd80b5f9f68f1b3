"""Fixtures: QEMUs and storage daemons of a test's own."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from agent.disk import SourceDisk, open_source
from agent.errors import WarmsyncError
from agent.migration import Scheme, Volume
from agent.qemu.access import Seat
from agent.store import Store
from native.bitmap import DirtyBitmap
from tests import devices, qemus
from tests.qemus import Qemu

MIB = 1 << 20
SIZE = 8 * MIB
Open = Callable[..., SourceDisk]


@pytest.fixture
def directory(resources: ExitStack) -> Path:
    """Where paths are short enough for sockets."""
    devices.require("qemu")
    pytest.importorskip("native.nbd", reason="built without libnbd")
    return resources.enter_context(devices.scratch_directory())


@pytest.fixture
def make_disk(resources: ExitStack, directory: Path) -> Callable[..., Qemu]:
    """`make_disk(name="vm", driver="qcow2") -> Qemu`, not yet started."""

    def make(name: str = "vm", driver: str = "qcow2") -> Qemu:
        return resources.enter_context(qemus.disk(directory / name, SIZE, driver))

    return make


@pytest.fixture
def machine(make_disk: Callable[..., Qemu]) -> Qemu:
    """A QEMU with nothing but its disk, stopped."""
    devices.require("qemu-system")
    qemu = make_disk()
    qemu.start_machine("-S")
    return qemu


@pytest.fixture
def open_disk(machine: Qemu, resources: ExitStack) -> Open:
    """`open_disk(source=None, seat=None)`: the machine's disk as an agent has it, not tracked."""

    def make(source: str | None = None, seat: Seat | None = None) -> SourceDisk:
        path, seat = source or str(machine.image), seat or machine.seat()
        opened = open_source(Volume(path, path), (path, f"{machine.directory}/*"), seat)
        store = Store(seat.note.parent, seat.name)
        disk = SourceDisk(opened, Scheme.QEMU, 4096, Path("/nowhere"), store)
        resources.callback(disk.close)
        return disk

    return make


@pytest.fixture
def disk(open_disk: Open) -> SourceDisk:
    disk = open_disk()
    disk.start()
    return disk


def start(
    qemu: Qemu, resources: ExitStack, name: str = "move-0", source: str | None = None
) -> SourceDisk:
    """Track a disk that is not the machine's."""
    disk = open_again(qemu, resources, name, source)
    disk.start()
    return disk


def open_again(
    qemu: Qemu, resources: ExitStack, name: str = "move-0", source: str | None = None
) -> SourceDisk:
    """Open it as the next agent does."""
    path = source or str(qemu.image)
    opened = open_source(Volume(path, path), (path,), qemu.seat(name))
    disk = SourceDisk(opened, Scheme.QEMU, 4096, Path("/nowhere"))
    resources.callback(disk.close)
    return disk


def take(disk: SourceDisk) -> list[int]:
    """Return which MiB of the disk are marked."""
    marks = DirtyBitmap(SIZE, 4096)
    assert not disk.tracker.take(marks).suspect
    return [at // MIB for at in range(0, SIZE, MIB) if marks.is_marked(at)]


def reason(work: Callable[[], object]) -> str:
    with pytest.raises(WarmsyncError) as caught:
        work()
    assert "\n" not in str(caught.value)
    return caught.value.reason


def stand_on_an_overlay(machine: Qemu) -> str:
    """Give the guest a new image `over` its disk, with one MiB at the start below; its path."""
    machine.write(9, 0, MIB)
    over = str(machine.directory / "over.qcow2")
    kind = ["-f", "qcow2", "-u", "-b", str(machine.image), "-F", "qcow2"]
    subprocess.run(["qemu-img", "create", "-q", *kind, over, str(SIZE)], check=True)
    file = {"driver": "file", "filename": over}
    machine.ask("blockdev-add", driver="qcow2", node_name="over", file=file, backing=None)
    machine.ask("blockdev-snapshot", node="disk", overlay="over")
    return over


def begin_mirror(qemu: Qemu, node: str = "disk") -> None:
    """Copy the disk to the node `new`, and what is written from now on."""
    other = qemu.directory / "other.qcow2"
    qemus.create(other, SIZE, "qcow2")
    file = {"driver": "file", "filename": str(other)}
    qemu.ask("blockdev-add", driver="qcow2", node_name="new", file=file)
    qemu.ask("blockdev-mirror", job_id="job", device=node, target="new", sync="full")
    await_ready(qemu)


def await_ready(qemu: Qemu) -> None:
    """Wait for a job that can be completed."""
    deadline = time.monotonic() + qemus.PATIENCE_SECONDS
    while not qemu.ask("query-block-jobs")[0]["ready"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def pivot(qemu: Qemu) -> None:
    """Give the guest `new` in place of its disk."""
    qemu.ask("block-job-complete", device="job")
    deadline = time.monotonic() + qemus.PATIENCE_SECONDS
    while qemu.ask("query-block-jobs"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
