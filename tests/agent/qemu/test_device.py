"""A disk of a QEMU as a source: whose disk it is now, and what is left when it is let go."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Timer

import pytest

from agent.disk import Fenceable, SourceDisk, open_fence, open_source
from agent.migration import Volume
from agent.qemu import device as device_module
from agent.qemu.image import Image
from agent.qemu.keeper import Keeper
from agent.qemu.note import read_note, write_note
from tests import devices, qemus
from tests.agent.qemu.conftest import (
    MIB,
    SIZE,
    Open,
    await_ready,
    begin_mirror,
    pivot,
    reason,
    stand_on_an_overlay,
    start,
    take,
)
from tests.qemus import Qemu


@contextmanager
def silent_socket(path: Path) -> Iterator[None]:
    """Where somebody listens who never says a word."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        try:
            yield
        finally:
            path.unlink()


def start_without_disks(machine: Qemu) -> None:
    qmp = f"unix:{machine.socket},server=on,wait=off"
    machine.start(["qemu-system-x86_64", "-nodefaults", "-display", "none", "-S", "-qmp", qmp])


def test_a_job_that_gives_the_guest_another_disk_is_noticed(
    machine: Qemu, disk: SourceDisk
) -> None:
    begin_mirror(machine)
    machine.write(1, MIB, MIB)
    assert take(disk) == [1]  # as long as it runs, all goes by way of the disk
    pivot(machine)
    machine.write(2, 3 * MIB, MIB, "new")
    looks = [disk.look, disk.check_unclaimed, lambda: take(disk)]
    assert [reason(look) for look in looks] == ["QEMU_DISK_REPLACED"] * 3
    disk.close()
    assert (machine.bitmaps(), machine.exports()) == ([], [])


def test_a_job_that_fills_the_disk_is_no_other_disk(machine: Qemu, open_disk: Open) -> None:
    over = stand_on_an_overlay(machine)
    machine.ask("block-stream", job_id="job", device="over", speed=1)
    disk = open_disk(over)
    disk.start()
    machine.write(1, MIB, MIB, "over")
    assert take(disk) == [1]


def test_a_commit_that_gives_the_guest_its_base_is_noticed(machine: Qemu, open_disk: Open) -> None:
    over = stand_on_an_overlay(machine)
    disk = open_disk(over)
    disk.start()
    machine.ask("block-commit", job_id="job", device="over")
    await_ready(machine)
    assert disk.look() == 0
    pivot(machine)
    assert reason(disk.look) == "QEMU_DISK_REPLACED"


def test_a_disk_that_was_replaced_without_an_agent_is_noticed(
    machine: Qemu, disk: SourceDisk, open_disk: Open
) -> None:
    take(disk)
    disk.detach()
    begin_mirror(machine)
    pivot(machine)
    again = open_disk()
    assert reason(lambda: again.resume(believed=True)) == "QEMU_DISK_REPLACED"


def test_a_guest_that_lets_go_of_its_disk_has_no_other(
    make_disk: Callable[..., Qemu], resources: ExitStack
) -> None:
    qemu = make_disk()
    qemu.start_daemon()
    disk = start(qemu, resources)
    qemu.ask("block-export-del", id="guest", mode="hard")
    other = qemu.directory / "other.qcow2"
    qemus.create(other, SIZE, "qcow2")
    file = {"driver": "file", "filename": str(other)}
    qemu.ask("blockdev-add", driver="qcow2", node_name="new", file=file)
    assert disk.look() == 0
    qemu.ask("block-export-add", type="nbd", id="guest", node_name="new", name="guest")
    assert disk.look() == 0


def test_a_qemu_that_has_the_disk_no_more_has_not_ended(machine: Qemu, disk: SourceDisk) -> None:
    begin_mirror(machine)
    pivot(machine)
    machine.ask("blockdev-del", node_name="disk")  # as libvirt does
    assert reason(disk.look) == "QEMU_DISK_REPLACED"
    assert disk.device.keeper is None  # type: ignore[attr-defined]


def test_a_vm_that_gets_its_disk_late_is_waited_for(machine: Qemu, disk: SourceDisk) -> None:
    machine.write(1, 2 * MIB, MIB)
    machine.quit()
    start_without_disks(machine)
    file = {"driver": "file", "filename": str(machine.image)}
    disk_of = {"driver": "qcow2", "node_name": "disk", "file": file}
    timer = Timer(0.5, lambda: machine.ask("blockdev-add", **disk_of))
    timer.start()
    assert take(disk) == [2]
    timer.join()


def test_an_image_can_be_fenced_whoever_has_its_socket(
    machine: Qemu, disk: SourceDisk, open_disk: Open
) -> None:
    """As after a cutover. Whether its guest writes elsewhere is another matter."""
    disk.detach()
    machine.quit()
    start_without_disks(machine)
    again = open_disk()
    again.fence()
    assert again.device.is_read_only()
    again.unfence()
    assert reason(lambda: again.resume(believed=True)) == "QEMU_DISK_REPLACED"


@pytest.mark.parametrize("here", [True, False])
def test_an_image_is_known_whatever_its_path_is_now(
    machine: Qemu, disk: SourceDisk, monkeypatch: pytest.MonkeyPatch, here: bool
) -> None:
    """As /dev/dm-3 of before a reboot is another volume, and ours has another number."""
    disk.detach()
    machine.quit()
    ours, seat = machine.directory / "ours.qcow2", machine.seat()
    machine.image.rename(ours)
    source = machine.directory / "by-name"
    source.symlink_to(ours)
    note = read_note(seat.note)
    assert note is not None
    qemus.create(machine.image, SIZE, "qcow2")  # in the place of it

    def plate(image: Image) -> str:
        is_ours = here and os.path.samestat(os.fstat(image.fileno()), ours.stat())
        return "serial=ours" if is_ours else "serial=other"

    monkeypatch.setattr(device_module, "nameplate", plate)
    write_note(seat.note, replace(note, plate="serial=ours"))
    allowed = (f"{machine.directory}/*",)
    opens: list[Callable[[], Fenceable | None]] = [
        lambda: open_fence(str(source), allowed, seat),
        lambda: open_source(Volume(str(source), "/dst"), allowed, seat).device,
    ]
    for open_it in opens:
        if here:
            found = open_it()
            assert found is not None
            found.set_read_only(True)
            assert not ours.stat().st_mode & 0o222
            found.set_read_only(False)
            found.close()
        else:
            assert reason(open_it) == "SOURCE_REPLACED"
        assert machine.image.stat().st_mode & 0o200


def test_another_image_under_the_same_name_is_another_disk(machine: Qemu, open_disk: Open) -> None:
    disk = open_disk(f"{machine.socket}/disk")
    disk.start()
    machine.quit()
    machine.image = machine.directory / "second.qcow2"
    qemus.create(machine.image, SIZE, "qcow2")
    machine.start_machine("-S")
    assert reason(disk.look) == "QEMU_DISK_REPLACED"


def test_another_file_in_the_place_of_the_image_is_another_disk(
    machine: Qemu, disk: SourceDisk
) -> None:
    machine.quit()
    machine.image.rename(machine.directory / "first.qcow2")
    qemus.create(machine.image, SIZE, "qcow2")
    machine.start_machine("-S")
    assert reason(disk.look) == "QEMU_DISK_REPLACED"


def test_a_guest_that_went_on_elsewhere_is_not_quiet(
    make_disk: Callable[..., Qemu], resources: ExitStack
) -> None:
    """Live migration to another QEMU on the same image."""
    devices.require("qemu-system")
    qemu = make_disk("vm", "raw")
    qemu.start_machine()
    disk = start(qemu, resources)
    (qemu.directory / "next").mkdir()
    following = Qemu(qemu.directory / "next", qemu.image, "raw")
    resources.callback(following.kill)
    way = f"unix:{qemu.directory}/migration"
    following.start_machine("-incoming", "defer")
    following.ask("migrate-incoming", uri=way)
    qemu.ask("migrate", uri=way)
    qemus.await_status(qemu, "postmigrate")
    assert reason(disk.look) == "NOT_QUIESCED"


def test_the_daemon_of_an_agent_that_was_killed_ends(
    machine: Qemu, disk: SourceDisk, open_disk: Open
) -> None:
    machine.quit()
    take(disk)
    keeper = disk.device.keeper  # type: ignore[attr-defined]
    assert isinstance(keeper, Keeper)
    machine.start_machine("-S")  # and nothing of the agent is called any more
    open_disk().close()
    assert keeper._process.wait(qemus.PATIENCE_SECONDS) == 0
    assert list(machine.access.run_dir.iterdir()) == []


def test_a_note_that_cannot_be_written_leaves_nothing_in_qemu(
    machine: Qemu, open_disk: Open
) -> None:
    seat = machine.seat()
    seat.note.with_name(f"{seat.note.name}.new").symlink_to("/dev/full")
    disk = open_disk(seat=seat)
    assert reason(disk.start) == "STATE_NOT_KEPT"
    disk.close()
    assert (machine.bitmaps(), machine.exports()) == ([], [])
    assert not seat.note.exists()


def test_what_was_never_tracked_leaves_no_note(machine: Qemu, open_disk: Open) -> None:
    open_disk().source.device.close()
    assert not machine.seat().note.exists()
    assert machine.exports() == []


def test_the_name_of_another_volume_may_begin_like_ours(machine: Qemu, disk: SourceDisk) -> None:
    others = f"{machine.access.prefix}{machine.seat().name}-1-b1"
    machine.ask("block-dirty-bitmap-add", node="disk", name=others)
    disk.close()
    assert machine.bitmaps() == [others]


@pytest.mark.parametrize("runs", [True, False])
def test_a_qemu_that_is_silent_does_not_matter_to_others(
    runs: bool, machine: Qemu, disk: SourceDisk, open_disk: Open
) -> None:
    with silent_socket(machine.directory / "a-silent.sock"):
        sockets = (f"{machine.directory}/*.sock",)
        access = replace(machine.access, sockets=sockets, patience_seconds=3.0)
        machine.write(1, 3 * MIB, MIB)
        disk.detach()
        if not runs:
            machine.quit()
        again = open_disk(seat=replace(machine.seat(), access=access))
        assert again.resume(believed=True) == ""
        assert take(again) == [3]


def test_a_silent_qemu_may_have_an_image_that_is_written(
    machine: Qemu, disk: SourceDisk, open_disk: Open
) -> None:
    access = replace(machine.access, sockets=(f"{machine.directory}/*.sock",))
    seat = replace(machine.seat(), access=replace(access, patience_seconds=1.0))
    disk.detach()
    with silent_socket(machine.directory / "a-silent.sock"):
        Path(machine.socket).rename(f"{machine.socket}.away")
        assert reason(lambda: open_disk(seat=seat)) == "QMP_UNREACHABLE"
        Path(f"{machine.socket}.away").rename(machine.socket)
