"""Disks of QEMUs that lie on block devices and on other hosts: moved, and what ends with a QEMU."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests import content, devices, guest, qemus
from tests.content import files_equal
from tests.devices import LoopDevice, require
from tests.e2e import disks
from tests.e2e.agents import Pair, eventually
from tests.e2e.disks import MIB
from tests.e2e.test_qemu import SIZE, WRITER, Site, bitmaps_in

DEVICES = ("raw-device", "qcow2-device")
NETWORK = ("raw-nbdkit", "qcow2-qemu-nbd")
Place = Callable[[str], Site]


@pytest.fixture
def place(resources: ExitStack, loop_device: Callable[..., LoopDevice]) -> Place:
    """A site whose image lies on a loop device, or behind an NBD server."""
    require("qemu", "loop")
    pytest.importorskip("native.nbd", reason="built without libnbd")

    def build(where: str) -> Site:
        driver, _, server = where.partition("-")
        directory: Path = resources.enter_context(devices.scratch_directory())
        if server == "device":
            size = SIZE if driver == "raw" else 2 * SIZE
            path = loop_device(size).path
            disk = qemus.disk_on(directory / "vm", path, SIZE, driver)
        else:
            disk = qemus.network_disk(directory / "vm", SIZE, driver, server)
        return Site(directory, resources, resources.enter_context(disk))

    return build


def start_machine(site: Site) -> None:
    """A guest that runs, and whose QEMU stays when it goes off."""
    require("qemu-system")
    site.qemu.start_machine("-no-reboot", "-no-shutdown")
    for i in range(8):
        site.qemu.write(i + 1, i * 3 * MIB, MIB)


def power_down(site: Site) -> None:
    """What is left of a guest that has switched itself off under -no-shutdown."""
    site.qemu.ask("system_reset")
    qemus.await_status(site.qemu, "shutdown")


@pytest.mark.parametrize("where", [*DEVICES, *NETWORK])
def test_a_storage_daemon_has_it(where: str, place: Place, resources: ExitStack) -> None:
    site = place(where)
    site.qemu.start_daemon()
    served = str(resources.enter_context(qemus.guest_file(site.qemu)))
    content.fill(served, 1)
    writer = guest.fio(served, *WRITER)
    resources.callback(guest.destroy, writer)
    name = site.move()
    site.source.wait(name, "CONVERGED")
    seen = site.source.show(name)["rounds"]
    site.source.wait(name, until=lambda now: now["rounds"] > seen + 2)
    guest.power_off(writer)
    assert site.cut_over(name)["suspect_volumes"] == 0
    assert files_equal(served, site.target), "what the guest saw"
    qemus.assert_same(site.qemu, site.target)
    assert site.source.ask("verify", name)["mismatched_bytes"] == 0
    site.source.ask("finish", name)
    site.assert_nothing_of_ours()


@pytest.mark.parametrize("where", [*DEVICES, *NETWORK])
def test_a_qemu_has_it_that_stays(where: str, place: Place) -> None:
    site = place(where)
    start_machine(site)
    name = site.move()
    site.source.wait(name, "CONVERGED")
    site.source.refuse("cutover", name, reason="NOT_QUIESCED")
    for i in range(8):
        site.qemu.write(i + 0x50, (i * 4 + 1) * MIB, MIB)
    power_down(site)
    assert site.cut_over(name)["suspect_volumes"] == 0
    qemus.assert_same(site.qemu, site.target)
    assert site.target.read_bytes()[29 * MIB :][:MIB] == bytes([0x57]) * MIB
    site.source.ask("rollback", name)
    site.qemu.write(0x77, 0, MIB)
    site.assert_nothing_of_ours()


@pytest.mark.parametrize("end", ["finish", "rollback"])
def test_the_last_writes_are_found_after_qemu_has_ended(end: str, place: Place) -> None:
    site = place("qcow2-device")
    start_machine(site)
    name = site.move()
    site.source.wait(name, "CONVERGED")
    site.qemu.write(0x77, 17 * MIB, 2 * MIB)
    site.qemu.quit()
    assert site.cut_over(name)["suspect_volumes"] == 0
    qemus.assert_same(site.qemu, site.target)
    assert disks.is_fenced(site.qemu.image)
    site.source.ask(end, name)
    assert list((site.directory / "run").glob("*")) == []
    # What is fenced is not written, by us neither.
    assert len(bitmaps_in(site.qemu)) == (1 if end == "finish" else 0)


def test_a_raw_device_whose_qemu_has_ended_is_compared(place: Place) -> None:
    site = place("raw-device")
    start_machine(site)
    name = site.move()
    site.source.wait(name, "CONVERGED")
    site.qemu.write(0x77, 17 * MIB, 2 * MIB)
    site.qemu.quit()
    site.source.wait(name, until=lambda now: now["suspect_volumes"] > 0)
    assert site.cut_over(name)["reconciled_bytes"] > 0
    qemus.assert_same(site.qemu, site.target)
    site.source.ask("rollback", name)
    assert not disks.is_fenced(site.qemu.image)


@pytest.mark.parametrize("own_node", [False, True])
@pytest.mark.parametrize("where", ["qcow2-device", "raw-device"])
def test_a_vm_that_ran_again_meanwhile_is_noticed(where: str, own_node: bool, place: Place) -> None:
    """Locks and the time of the last change belong to a node of a device, not to the device."""
    site = place(where)
    site.qemu.own_node = own_node
    start_machine(site)
    name = site.move("--max-downtime", "2s")
    site.source.wait(name, "CONVERGED")
    site.qemu.quit()
    eventually(site.source.log.read_text, lambda text: "its QEMU has ended" in text)
    site.source.wait(name, until=lambda now: now["state"] == "CONVERGED" and not now["dirty_bytes"])
    site.source.process.send_signal(signal.SIGSTOP)  # nobody looks
    start_machine(site)
    site.qemu.write(0x7A, 19 * MIB, 2 * MIB)
    site.qemu.quit()
    site.source.process.send_signal(signal.SIGCONT)
    site.cut_over(name)
    qemus.assert_same(site.qemu, site.target)
    site.source.ask("finish", name)


@pytest.mark.parametrize("where", NETWORK)
def test_a_network_disk_whose_qemu_has_ended_cannot_be_moved(where: str, place: Place) -> None:
    site = place(where)
    start_machine(site)
    name = site.move()
    site.source.wait(name, "CONVERGED")
    site.qemu.quit()
    failed = eventually(lambda: site.source.show(name), lambda now: now["state"] == "FAILED")
    assert failed["error"]["reason"] == "QEMU_GONE"
    start_machine(site)  # nothing of ours keeps it from that
    site.qemu.quit()


@pytest.mark.parametrize("where", ["qcow2-device", "qcow2-qemu-nbd"])
def test_the_content_of_an_image_whose_vm_is_off(where: str, place: Place) -> None:
    """A storage daemon opens it for the time of the migration."""
    site = place(where)
    start_machine(site)
    site.qemu.quit()
    site.refuse("QEMU_DISK_NOT_FOUND")
    site.qemu.start_daemon()
    pair = Pair(site.source, site.peer)
    volumes = [(site.qemu.source, site.target)]
    words = pair.migrate("--tracker", "qemu", "--cold", "--wait", "end", volumes=volumes)
    shown = site.source.ask(*words)
    assert (shown["state"], shown["cold"], shown["suspect_volumes"]) == ("CUT_OVER", True, 0)
    qemus.assert_same(site.qemu, site.target)
    site.source.ask("finish", shown["id"])
    site.assert_nothing_of_ours()
