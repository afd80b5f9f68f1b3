"""Who uses a disk: through filters, not yet, or past QEMU's bitmaps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest

from agent.disk import SourceDisk
from agent.qemu.monitor import Monitor, converse
from agent.qemu.node import find_node
from agent.qemu.users import Users, find_users
from tests import devices, qemus
from tests.agent.qemu.conftest import (
    MIB,
    SIZE,
    Open,
    await_ready,
    begin_mirror,
    open_again,
    pivot,
    reason,
    stand_on_an_overlay,
    start,
    take,
)
from tests.qemus import Qemu

Make = Callable[..., Qemu]
DEVICE = "device /machine/peripheral/drive/virtio-backend"


def users(qemu: Qemu, node: str = "disk") -> Users:
    async def ask(monitor: Monitor) -> Users:
        return await find_users(monitor, node)

    return converse(qemu.socket, ask, qemus.PATIENCE_SECONDS)


@pytest.fixture(params=["compress", "copy-on-read", "throttle", "throttle copy-on-read"])
def filtered(request: pytest.FixtureRequest, make_disk: Make) -> Qemu:
    """A machine with filters of its own over its disk, as libvirt's copy_on_read='on' makes."""
    devices.require("qemu-system")
    qemu = make_disk()
    qemu.filters = tuple(request.param.split())
    qemu.start_machine("-S")
    return qemu


def test_a_guest_over_filters_that_gets_another_disk_is_noticed(
    filtered: Qemu, resources: ExitStack
) -> None:
    disk = start(filtered, resources)
    assert disk.device._users == {DEVICE}  # type: ignore[attr-defined]
    filtered.write(1, MIB, MIB, filtered.top)
    assert take(disk) == [1]
    begin_mirror(filtered, filtered.top)
    filtered.write(2, 2 * MIB, MIB, filtered.top)
    assert take(disk) == [2]
    pivot(filtered)
    filtered.write(3, 3 * MIB, MIB, "new")
    assert [reason(look) for look in (disk.look, lambda: take(disk))] == ["QEMU_DISK_REPLACED"] * 2
    disk.close()
    assert (filtered.bitmaps(), filtered.exports()) == ([], [])


@pytest.mark.parametrize("other", ["move-0-marks", "old-0-data", "backup"])
def test_an_export_that_stays_hides_no_guest_that_is_gone(
    make_disk: Make, resources: ExitStack, other: str
) -> None:
    """A job of a filter moves who stands over that; ours, or a backup's, stand on the disk."""
    devices.require("qemu-system")
    qemu = make_disk()
    qemu.filters = ("throttle",)
    qemu.start_machine("-S")
    disk = start(qemu, resources)
    name = other if other == "backup" else f"{qemu.access.prefix}{other}"
    qemu.ask("block-export-add", type="nbd", id=name, node_name="disk", name=name)
    assert disk.look() == 0
    begin_mirror(qemu, qemu.top)
    pivot(qemu)
    qemu.write(3, 3 * MIB, MIB, "new")
    assert [reason(disk.look) for _ in range(2)] == ["QEMU_DISK_REPLACED"] * 2
    disk.detach()
    again = open_again(qemu, resources)
    assert reason(lambda: again.resume(believed=True)) == "QEMU_DISK_REPLACED"


def test_users_that_are_gone_are_told_from_those_elsewhere() -> None:
    """An export may come again under its name, on another disk; a device is the guest."""
    ours, device, backup = "export warmsync-a-move-0-data", "device vda", "export backup"
    before = frozenset({device, backup})
    here = Users(frozenset({ours, device}), {backup: "other"})
    assert here.moved("warmsync-a-move-0-data", before) == ""
    assert here.kept(before) == before
    unplugged = Users(frozenset({ours}), {})
    assert unplugged.moved("warmsync-a-move-0-data", before) == ""
    assert unplugged.kept(before) == frozenset()
    two = Users(frozenset({ours, "device vdb"}), {device: "other"})
    assert two.moved("warmsync-a-move-0-data", before) == "other"


def test_a_job_that_ends_between_two_questions_moves_nobody(
    machine: Qemu, disk: SourceDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who stood on its filter is on a node that the graph knows no more."""
    begin_mirror(machine)
    assert disk.look() == 0
    execute, ended = Monitor.execute, list[str]()

    async def answer(monitor: Monitor, command: str, **arguments: object) -> Any:
        if command == "query-named-block-nodes" and asked[-1:] == ["query-block"] and not ended:
            ended.append(command)
            await execute(monitor, "block-job-cancel", device="job", force=True)
            while await execute(monitor, "query-block-jobs"):
                pass
        asked.append(command)
        return await execute(monitor, command, **arguments)

    asked = list[str]()
    monkeypatch.setattr(Monitor, "execute", answer)
    assert disk.look() == 0
    assert ended
    machine.write(1, MIB, MIB)
    assert take(disk) == [1]


def test_a_filter_is_a_source_if_it_is_named(filtered: Qemu, resources: ExitStack) -> None:
    disk = start(filtered, resources, source=f"{filtered.socket}/{filtered.top}")
    assert disk.device._users == {DEVICE}  # type: ignore[attr-defined]
    filtered.write(1, MIB, MIB, filtered.top)
    assert take(disk) == [1]
    begin_mirror(filtered, filtered.top)
    pivot(filtered)
    assert reason(disk.look) == "QEMU_DISK_REPLACED"


def test_what_is_under_a_raw_format_is_the_disk_that_this_shows(
    make_disk: Make, resources: ExitStack
) -> None:
    """Named as libvirt names it; a bitmap there sees what is written by way of the format."""
    devices.require("qemu-system")
    qemu = make_disk("vm", "raw")
    file = {"driver": "file", "filename": str(qemu.image), "node-name": "storage"}
    qemu.options = {"file": file}
    qemu.start_machine("-S")
    disk = start(qemu, resources, source=f"{qemu.socket}/storage")
    assert disk.device._users == {DEVICE}  # type: ignore[attr-defined]
    qemu.write(1, MIB, MIB)
    assert take(disk) == [1]
    begin_mirror(qemu)
    pivot(qemu)
    assert reason(disk.look) == "QEMU_DISK_REPLACED"


def test_a_guest_over_a_filter_of_another_disk_is_elsewhere(make_disk: Make) -> None:
    """Even if both lie in one file, which is all that their names tell."""
    devices.require("qemu-system")
    qemu = make_disk("parts", "raw")
    qemu.filters, qemu.options = ("copy-on-read",), {"size": 4 * MIB}
    file = {"driver": "file", "filename": str(qemu.image), "locking": "off"}
    qemu.start_machine("-S")
    other = {"driver": "raw", "node_name": "other", "offset": 4 * MIB, "size": 4 * MIB}
    qemu.ask("blockdev-add", **other, file=file, read_only=True)
    assert users(qemu).here == {DEVICE}
    assert users(qemu, "other") == Users(frozenset(), {DEVICE: "filter1"})


def test_a_disk_without_a_file_has_users_over_filters_too(machine: Qemu) -> None:
    machine.ask("blockdev-add", driver="null-co", node_name="net", size=SIZE)
    machine.ask("blockdev-add", driver="copy-on-read", node_name="over", file="net")
    machine.ask("nbd-server-start", addr={"type": "unix", "data": {"path": machine.nbd_socket}})
    machine.ask("block-export-add", type="nbd", id="guest", node_name="over", name="guest")
    assert users(machine, "net").here == {"export guest"}
    assert users(machine).here == {DEVICE}


def test_what_a_filters_job_writes_to_is_not_under_it(machine: Qemu) -> None:
    machine.ask("blockdev-add", driver="null-co", node_name="copy", size=SIZE)
    machine.ask("blockdev-backup", job_id="job", device="disk", target="copy", sync="none")
    assert users(machine).here == {DEVICE}
    told = users(machine, "copy")
    assert (told.here, told.filled_by) == (frozenset(), "job job")


def test_the_base_of_a_commit_that_runs_is_no_source(machine: Qemu, open_disk: Open) -> None:
    stand_on_an_overlay(machine)
    machine.ask("block-commit", job_id="job", device="over")
    await_ready(machine)
    assert find_node(str(machine.image), machine.access).name == "disk"  # it can be written
    early = open_disk()
    assert reason(early.start) == "QEMU_DISK_UNUSED"
    early.close()
    assert (machine.bitmaps(), machine.exports()) == ([], [])
    pivot(machine)
    disk = open_disk()
    disk.start()
    machine.write(1, 2 * MIB, MIB)
    assert take(disk) == [2]


def test_the_target_of_a_mirror_that_runs_is_no_source(machine: Qemu, open_disk: Open) -> None:
    begin_mirror(machine)
    other = str(machine.directory / "other.qcow2")
    assert reason(lambda: open_disk(other)) == "QMP_REFUSED"  # the job lets nobody read it
    pivot(machine)
    disk = open_disk(other)
    disk.start()
    machine.write(1, 2 * MIB, MIB, "new")
    assert take(disk) == [2]


def test_a_storage_daemon_may_have_a_disk_that_nobody_uses(
    make_disk: Make, resources: ExitStack
) -> None:
    """As one that was opened for a VM that is off, beside those of VMs that run."""
    qemu = make_disk()
    qemu.start_daemon()
    other = add_second(qemu)
    assert start(other, resources, "move-1").look() == 0
    assert start(qemu, resources).look() == 0
    qemu.ask("block-export-del", id="guest", mode="hard")
    assert start(other, resources, "move-2").look() == 0


def test_a_disk_may_get_its_device_later(machine: Qemu, resources: ExitStack) -> None:
    """As while it is plugged in. From then on that is its user."""
    other = add_second(machine)
    disk = start(other, resources, "move-1")
    assert disk.look() == 0
    add = {"type": "nbd", "id": "late", "node_name": "second", "name": "late"}
    machine.ask("block-export-add", **add, writable=True)
    machine.write(1, 3 * MIB, MIB, "second")
    assert take(disk) == [3]
    assert disk.device._users == {"export late"}  # type: ignore[attr-defined]


def add_second(qemu: Qemu) -> Qemu:
    """Open a disk `second` in it that nobody uses yet."""
    second = qemu.directory / "second.qcow2"
    qemus.create(second, SIZE, "qcow2")
    file = {"driver": "file", "filename": str(second)}
    qemu.ask("blockdev-add", driver="qcow2", node_name="second", file=file)
    return Qemu(qemu.directory, second, "qcow2")


def test_a_scsi_disk_is_a_source(make_disk: Make, resources: ExitStack) -> None:
    devices.require("qemu-system")
    qemu = make_disk()
    qemu.start_machine("-S", "-device", "virtio-scsi-pci", device="scsi-hd")
    disk = start(qemu, resources)
    assert disk.device._users == {"device drive"}  # type: ignore[attr-defined]
    assert users(qemu).passed_through == frozenset()


@pytest.mark.parametrize("kind", ["scsi-block", "scsi-generic"])
@pytest.mark.parametrize("device", ["virtio-blk-pci", "scsi-hd"])
def test_a_scsi_device_that_is_passed_through_is_no_source(
    make_disk: Make, resources: ExitStack, monkeypatch: pytest.MonkeyPatch, kind: str, device: str
) -> None:
    """Which takes an SG device: QEMU says so of another, by its QOM path or its id."""
    devices.require("qemu-system")
    qemu = make_disk()
    qemu.start_machine("-S", "-device", "virtio-scsi-pci", device=device)
    execute, asked = Monitor.execute, list[object]()

    async def answer(monitor: Monitor, command: str, **arguments: object) -> Any:
        told = await execute(monitor, command, **arguments)
        if command == "qom-get":
            asked.append((arguments["path"], told))
            return kind
        return told

    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "execute", answer)
        assert reason(lambda: start(qemu, resources)) == "TRACKER_UNSUITABLE"
    scsi = ("/machine/peripheral/drive", "scsi-hd")
    virtio = ("/machine/peripheral/drive/virtio-backend", "virtio-blk-device")
    assert asked == [scsi if device == "scsi-hd" else virtio]
    assert start(qemu, resources).look() == 0


def test_a_device_that_is_gone_is_none(machine: Qemu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unplugged between two questions."""
    execute = Monitor.execute

    async def answer(monitor: Monitor, command: str, **arguments: object) -> Any:
        if command == "qom-get":
            arguments["path"] = "/machine/peripheral/gone"
        return await execute(monitor, command, **arguments)

    monkeypatch.setattr(Monitor, "execute", answer)
    assert users(machine).passed_through == frozenset()
