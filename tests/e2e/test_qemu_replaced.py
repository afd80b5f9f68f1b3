"""A guest gets another disk, or its QEMU cannot be asked, in the middle of a migration."""

from __future__ import annotations

import os
import signal
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests import devices, qemus
from tests.devices import require, run
from tests.e2e import disks
from tests.e2e.agents import eventually
from tests.e2e.disks import MIB
from tests.e2e.test_qemu import SIZE, Site
from tests.qemus import Qemu


@pytest.fixture
def site(resources: ExitStack) -> Site:
    require("qemu", "qemu-system")
    pytest.importorskip("native.nbd", reason="built without libnbd")
    directory = resources.enter_context(devices.scratch_directory())
    return Site(directory, resources)


@pytest.fixture
def machine(site: Site) -> Qemu:
    """A QEMU whose processor runs (the firmware finds nothing to boot)."""
    site.qemu.start_machine()
    for i in range(8):
        site.qemu.write(i + 1, i * 3 * MIB, MIB)
    return site.qemu


def mirror(qemu: Qemu) -> None:
    """Copy what the guest has to another image, and let it go on there."""
    other = qemu.directory / "other.qcow2"
    qemus.create(other, SIZE, "qcow2")
    file = {"driver": "file", "filename": str(other)}
    qemu.ask("blockdev-add", driver="qcow2", node_name="new", file=file)
    qemu.ask("blockdev-mirror", job_id="job", device=qemu.top, target="new", sync="full")
    jobs = lambda: qemu.ask("query-block-jobs")  # noqa: E731
    eventually(jobs, lambda found: found[0]["ready"])
    qemu.ask("block-job-complete", device="job")
    eventually(jobs, lambda found: not found)


def await_failed(site: Site, name: str) -> None:
    failed = eventually(
        lambda: site.source.show(name), lambda now: bool(now["state"] == "FAILED"), lambda _: False
    )
    assert failed["error"]["reason"] == "QEMU_DISK_REPLACED", failed
    assert not disks.is_fenced(site.qemu.image)
    run_dir = site.directory / "run"  # emptied last
    eventually(lambda: list(run_dir.glob("*")), lambda found: not found)


@pytest.mark.parametrize("deleted", [False, True])
def test_a_mirror_ends_the_migration(deleted: bool, site: Site, machine: Qemu) -> None:
    name = site.move()
    site.source.wait(name, "CONVERGED")
    mirror(machine)
    if deleted:  # as libvirt does
        machine.ask("blockdev-del", node_name="disk")
    machine.write(0x99, 20 * MIB, MIB, "new")
    machine.ask("stop")
    refused = site.source.run("cutover", name, "--force")
    assert refused.code == 1, refused
    await_failed(site, name)
    site.assert_nothing_of_ours()
    again = site.move(source=machine.directory / "other.qcow2")
    site.source.wait(again, "CONVERGED")
    site.cut_over(again)
    machine.image = machine.directory / "other.qcow2"
    qemus.assert_same(machine, site.target)


@pytest.mark.parametrize("filters", ["copy-on-read", "throttle", "throttle copy-on-read"])
def test_a_mirror_of_a_filter_ends_the_migration(filters: str, site: Site) -> None:
    """The guest is on a filter over the disk; our export, on the disk itself, is not moved.

    Nor is a backup's.
    """
    machine = site.qemu
    machine.filters = tuple(filters.split())
    machine.start_machine()
    machine.write(0x11, 0, MIB, machine.top)
    name = site.move()
    site.source.wait(name, "CONVERGED")
    backup = {"type": "nbd", "id": "backup", "node_name": "disk", "name": "backup"}
    machine.ask("block-export-add", **backup)
    mirror(machine)
    machine.write(0x99, 20 * MIB, MIB, "new")
    machine.ask("stop")
    refused = site.source.run("cutover", name, "--force")
    assert refused.code == 1, refused
    machine.ask("block-export-del", id="backup", mode="hard")
    await_failed(site, name)
    again = site.move(source=machine.directory / "other.qcow2")
    site.source.wait(again, "CONVERGED")
    site.cut_over(again)
    machine.image = machine.directory / "other.qcow2"
    qemus.assert_same(machine, site.target)


@pytest.mark.parametrize("named", ["", "filter1", "filter2"])
def test_a_disk_under_filters_is_moved(named: str, site: Site) -> None:
    """By the name of its image, or of a filter."""
    machine = site.qemu
    machine.filters = ("throttle", "copy-on-read")
    machine.start_machine()
    machine.write(0x11, 0, MIB, machine.top)
    name = site.move(source=f"{machine.socket}/{named}" if named else None)
    site.source.wait(name, "CONVERGED")
    machine.write(0x22, 8 * MIB, MIB, machine.top)
    machine.ask("stop")
    assert site.cut_over(name)["suspect_volumes"] == 0
    qemus.assert_same(machine, site.target)


def test_the_base_of_a_commit_is_moved_after_its_end(site: Site, machine: Qemu) -> None:
    """Until then it can be written, as a disk can, and lacks what the job has yet to copy."""
    over = machine.directory / "over.qcow2"
    names = {"snapshot_file": str(over), "snapshot_node_name": "over"}
    machine.ask("blockdev-snapshot-sync", node_name="disk", **names)
    machine.write(0x99, 20 * MIB, 8 * MIB, "over")
    machine.ask("block-commit", job_id="job", device="over", speed=MIB)
    site.refuse("QEMU_DISK_UNUSED")
    site.assert_nothing_of_ours()
    machine.ask("block-job-set-speed", device="job", speed=0)
    jobs = lambda: machine.ask("query-block-jobs")  # noqa: E731
    eventually(jobs, lambda found: found[0]["ready"])
    machine.ask("block-job-complete", device="job")
    eventually(jobs, lambda found: not found)
    name = site.move()
    site.source.wait(name, "CONVERGED")
    machine.ask("stop")
    site.cut_over(name)
    qemus.assert_same(machine, site.target)


def test_a_disk_of_a_vm_that_is_off_is_moved_from_beside_others(site: Site) -> None:
    """One storage daemon for many VMs."""
    site.qemu.start_daemon()
    second = site.directory / "vm" / "second.qcow2"
    qemus.create(second, SIZE, "qcow2")
    run("qemu-io", "-f", "qcow2", "-c", f"write -P 0x5a {MIB} {MIB}", second)
    file = {"driver": "file", "filename": str(second)}
    site.qemu.ask("blockdev-add", driver="qcow2", node_name="second", file=file)
    name = site.move("--cold", source=second)
    site.source.wait(name, "CUT_OVER")
    qemus.assert_same(Qemu(second.parent, second, "qcow2"), site.target)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_mirror_while_no_agent_runs(site: Site, machine: Qemu, number: signal.Signals) -> None:
    name = site.move()
    site.source.wait(name, "CONVERGED")
    site.kill_source(number)
    mirror(machine)
    machine.write(0x99, 20 * MIB, MIB, "new")
    machine.ask("stop")
    site.start_source()
    await_failed(site, name)
    eventually(machine.bitmaps, lambda found: not found)
    site.assert_nothing_of_ours()


def test_the_daemon_of_an_agent_that_was_killed_ends(site: Site, machine: Qemu) -> None:
    name = site.move()
    site.source.wait(name, "CONVERGED")
    machine.quit()
    eventually(lambda: keepers_on(machine.image), lambda found: len(found) == 1)
    site.kill_source()
    machine.start_machine()
    site.start_source()
    site.source.wait(name, "CONVERGED")
    site.source.ask("cancel", name)
    eventually(lambda: keepers_on(machine.image), lambda found: not found)
    site.assert_nothing_of_ours()


def test_a_qemu_that_is_busy_at_the_end_is_tidied_up_later(site: Site, machine: Qemu) -> None:
    name = site.move()
    site.source.wait(name, "CONVERGED")
    with socket.socket(socket.AF_UNIX) as somebody:
        somebody.connect(machine.socket)
        assert somebody.recv(1)
        site.source.ask("cancel", name)
        note = site.directory / "source" / "volumes" / f"{name}-0.qemu"
        assert note.exists()
    assert len(machine.bitmaps()) == 1
    for agent in (site.source, site.peer):
        agent.ask("delete", name)
    again = site.move("--id", name)  # which takes the place of what was left
    site.source.wait(again, "CONVERGED")
    site.source.ask("cancel", again)
    assert not note.exists()
    site.assert_nothing_of_ours()


def keepers_on(image: Path) -> list[int]:
    """Return the storage daemons that have an image."""
    found = []
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = Path("/proc", process, "cmdline").read_bytes()
        except OSError:  # it has ended meanwhile
            continue
        if words.startswith(b"qemu-storage-daemon\0") and os.fsencode(image) in words:
            found.append(int(process))
    return found
