"""Disks of QEMUs moved by agents: while they run, after they have ended, and what can go wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests import content, devices, guest, qemus
from tests.devices import require
from tests.e2e import agents, disks
from tests.e2e.agents import Agent, Pair, Shown, eventually
from tests.e2e.disks import MIB
from tests.qemus import Qemu

SIZE = 32 * MIB
EASY = ("--tracker", "qemu", "--max-downtime", "20s")
SLOW = ("--bandwidth-limit", "4M")
WRITER = ("--rw=randwrite", "--bs=4096", "--rate=2m", "--time_based", "--runtime=600")


class Site:
    """One VM's disk, an empty target, and an agent at each end."""

    def __init__(self, directory: Path, stack: ExitStack, qemu: Qemu | None = None) -> None:
        self.directory = directory
        self.stack = stack
        self.qemu = qemu or stack.enter_context(qemus.disk(directory / "vm", SIZE))
        self.target = directory / "target-disk"
        self.target.touch()
        self.target.write_bytes(bytes(SIZE))
        self.settings: dict[str, dict[str, Any]] = {
            "qemu": {
                "sockets": [self.qemu.socket],
                "nbd_sockets": [self.qemu.nbd_socket],
                "run_dir": str(directory / "run"),
            }
        }
        self.source = self.agent("source")
        self.peer = self.agent("target")

    def agent(self, name: str, listen: str = "") -> Agent:
        return self.stack.enter_context(
            agents.agent(
                name,
                self.directory,
                self.directory / "pins" / name,
                listen=listen,
                allowed=(
                    f"{self.directory}/*",
                    f"{self.directory}/vm/*",
                    f"{self.qemu.socket}/*",
                    "/dev/loop*",
                ),
                settings=self.settings,
            )
        )

    def kill_source(self, number: signal.Signals = signal.SIGKILL) -> None:
        self.source.ends_well = False
        self.source.stop(number)

    def start_source(self) -> None:
        self.source = self.agent("source", self.source.address)

    def move(self, *words: str, source: str | Path | None = None) -> str:
        pair = Pair(self.source, self.peer)
        volumes = [(source or self.qemu.source, self.target)]
        return pair.start(*EASY, *words, volumes=volumes)

    def refuse(self, reason: str, source: str | Path | None = None, code: int = 1) -> None:
        pair = Pair(self.source, self.peer)
        words = pair.migrate(*EASY, volumes=[(source or self.qemu.source, self.target)])
        self.source.refuse(*words, reason=reason, code=code)

    def cut_over(self, name: str) -> Shown:
        shown = self.source.ask("cutover", name)
        assert shown["state"] == "CUT_OVER"
        assert shown["suspect_volumes"] == 0 or shown["reconciled_bytes"] > 0, shown
        return shown

    def assert_nothing_of_ours(self) -> None:
        """The QEMU is as if no agent had been there."""
        assert self.qemu.bitmaps() == []
        assert self.qemu.exports() in ([], ["guest"])
        assert list((self.directory / "run").glob("*")) == []


@pytest.fixture
def site(resources: ExitStack) -> Site:
    require("qemu")
    pytest.importorskip("native.nbd", reason="built without libnbd")
    directory = resources.enter_context(devices.scratch_directory())
    return Site(directory, resources)


@pytest.fixture
def served(site: Site, resources: ExitStack) -> str:
    """The guest's view of a storage daemon's disk, filled."""
    site.qemu.start_daemon()
    path = str(resources.enter_context(qemus.guest_file(site.qemu)))
    content.fill(path, 1)
    return path


@pytest.fixture
def machine(site: Site) -> Qemu:
    """A QEMU whose processor runs (the firmware finds nothing to boot)."""
    require("qemu-system")
    site.qemu.start_machine()
    for i in range(8):
        site.qemu.write(i + 1, i * 3 * MIB, MIB)
    return site.qemu


def test_a_qcow2_is_moved_while_its_guest_writes(
    site: Site, served: str, resources: ExitStack
) -> None:
    writer = guest.fio(served, *WRITER)
    resources.callback(guest.destroy, writer)
    name = site.move()
    site.source.wait(name, "CONVERGED")
    seen = site.source.show(name)["rounds"]
    site.source.wait(name, until=lambda now: now["rounds"] > seen + 2)
    guest.power_off(writer)
    assert site.cut_over(name)["suspect_volumes"] == 0
    qemus.assert_same(site.qemu, site.target)
    assert disks.is_fenced(site.qemu.image)
    verified = site.source.ask("verify", name)
    assert verified["mismatched_bytes"] == 0
    site.source.ask("finish", name)
    site.assert_nothing_of_ours()


def test_a_smaller_target_of_a_qcow2(site: Site, served: str) -> None:
    """What is behind the file system that the guest has is not copied, nor are marks there."""
    require("ext4")
    size = 24 * MIB
    with devices.image_file(size) as image:
        devices.run("mkfs.ext4", "-q", "-F", image)
        data = image.read_bytes()
    os.truncate(site.target, size)
    with content.Disk(served, writable=True) as disk:
        for at in range(0, size, MIB):
            disk.write(at, data[at : at + MIB])
    name = site.move("--resize")
    site.source.wait(name, "CONVERGED")
    with content.Disk(served, writable=True) as disk:
        disk.write(size - 8192, bytes([7]) * 16384)  # the last blocks, and what lies behind
    site.source.wait(name, until=lambda now: now["rounds"] > 1)
    site.qemu.quit()
    shown = site.cut_over(name)
    assert (shown["volumes"][0]["size_bytes"], shown["volumes"][0]["cut_bytes"]) == (size, 8 * MIB)
    whole = site.directory / "whole"
    qemus.convert(site.qemu, whole)
    assert content.read_all(whole)[:size] == content.read_all(site.target)
    devices.run("e2fsck", "-f", "-n", site.target)


@pytest.mark.parametrize("carrier", ["tcp", "grpc"])
def test_both_carriers_read_the_export(site: Site, served: str, carrier: str) -> None:
    name = site.move("--carrier", carrier)
    site.source.wait(name, "CONVERGED")
    assert site.source.show(name)["carrier"] == carrier
    with content.Disk(served, writable=True) as disk:
        disk.write(5 * MIB, content.content(MIB, 7))
    site.cut_over(name)
    qemus.assert_same(site.qemu, site.target)
    site.source.ask("rollback", name)
    assert not disks.is_fenced(site.qemu.image)
    site.assert_nothing_of_ours()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_agent_that_ended_goes_on_where_it_was(
    site: Site, served: str, resources: ExitStack, number: signal.Signals
) -> None:
    writer = guest.fio(served, *WRITER)
    resources.callback(guest.destroy, writer)
    name = site.move(*SLOW)
    site.source.wait(name, until=lambda now: now.get("bytes_sent", 0) > MIB)
    site.kill_source(number)
    assert site.qemu.bitmaps(), "QEMU goes on recording"
    if number is signal.SIGTERM:
        assert site.qemu.exports() == ["guest"]
    with content.Disk(served, writable=True) as disk:
        disk.write(9 * MIB, content.content(MIB, 8))
    site.start_source()
    shown = site.source.wait(name, "CONVERGED")
    assert (shown["resumes"], shown["suspect_volumes"]) == (1, 0)
    guest.power_off(writer)
    site.cut_over(name)
    qemus.assert_same(site.qemu, site.target)
    site.source.ask("finish", name)
    site.assert_nothing_of_ours()


def test_an_agent_without_its_state_leaves_nothing_behind(site: Site, served: str) -> None:
    name = site.move("--max-downtime", "1ms")
    site.source.wait(name, "SYNCING", "CONVERGED")
    site.kill_source()
    others = "somebody-elses"
    site.qemu.ask("block-dirty-bitmap-add", node="disk", name=others)
    # One of ours, or two if it was killed in the middle of a take.
    assert len(site.qemu.bitmaps()) >= 2
    shutil.rmtree(site.directory / "source")
    site.start_source()
    assert site.qemu.bitmaps() == [others]
    assert site.qemu.exports() == ["guest"]


def test_a_guest_that_runs_is_not_cut_over(site: Site, machine: Qemu) -> None:
    name = site.move()
    site.source.wait(name, "CONVERGED")
    site.source.refuse("cutover", name, reason="NOT_QUIESCED")
    assert not disks.is_fenced(machine.image)
    site.source.wait(name, "CONVERGED")
    machine.ask("stop")
    assert site.cut_over(name)["suspect_volumes"] == 0
    qemus.assert_same(machine, site.target)
    site.source.ask("finish", name)
    site.assert_nothing_of_ours()


def test_the_last_writes_are_found_after_qemu_has_ended(site: Site, machine: Qemu) -> None:
    name = site.move()
    site.source.wait(name, "CONVERGED")
    machine.write(0x77, 17 * MIB, 2 * MIB)
    machine.quit()
    assert site.cut_over(name)["suspect_volumes"] == 0
    qemus.assert_same(machine, site.target)
    site.source.ask("finish", name)
    assert list((site.directory / "run").glob("*")) == []
    assert bitmaps_in(machine) == []


@pytest.mark.parametrize("delay_seconds", [0.0, 0.013, 0.041])
def test_a_qemu_that_ends_in_the_middle_of_takes(
    site: Site, machine: Qemu, delay_seconds: float
) -> None:
    name = site.move("--max-downtime", "1ms")  # never: one take follows the other
    site.source.wait(name, "SYNCING")
    for i in range(20):
        machine.write(i + 1, i * MIB, MIB)
    time.sleep(delay_seconds)
    machine.quit()
    shown = site.source.ask("cutover", name, "--force")
    assert (shown["state"], shown["suspect_volumes"]) == ("CUT_OVER", 0)
    qemus.assert_same(machine, site.target)
    site.source.ask("finish", name)
    assert bitmaps_in(machine) == []


def test_a_qemu_that_was_killed_makes_the_disk_suspect(site: Site, machine: Qemu) -> None:
    name = site.move()
    site.source.wait(name, "CONVERGED")
    machine.write(0x78, 17 * MIB, 2 * MIB)
    machine.kill()
    site.source.wait(name, until=lambda now: now["suspect_volumes"] > 0)
    shown = site.cut_over(name)
    assert shown["reconciled_bytes"] > 0
    qemus.assert_same(machine, site.target)
    site.source.ask("finish", name)
    assert bitmaps_in(machine) == []


def test_a_vm_that_is_started_again_is_followed(site: Site, machine: Qemu) -> None:
    name = site.move("--max-downtime", "2s")  # rounds follow each other sooner
    site.source.wait(name, "CONVERGED")
    machine.write(0x79, 17 * MIB, 2 * MIB)
    machine.quit()
    machine.start_machine()  # not kept out by who reads its image
    machine.write(0x7A, 19 * MIB, 2 * MIB)
    rounds = site.source.show(name)["rounds"]
    site.source.wait(name, until=lambda now: now["rounds"] > rounds)
    machine.write(0x7B, 21 * MIB, MIB)
    machine.ask("stop")
    assert site.cut_over(name)["suspect_volumes"] == 0
    qemus.assert_same(machine, site.target)
    site.source.ask("rollback", name)
    machine.ask("cont")
    site.assert_nothing_of_ours()


def test_an_agent_that_was_away_when_qemu_ended(site: Site, machine: Qemu) -> None:
    name = site.move()
    site.source.wait(name, "CONVERGED")
    site.kill_source()
    machine.write(0x7C, 17 * MIB, 2 * MIB)
    machine.quit()
    site.start_source()
    shown = site.source.wait(name, "CONVERGED")
    assert shown["suspect_volumes"] == 0
    site.cut_over(name)
    qemus.assert_same(machine, site.target)
    site.source.ask("finish", name)
    assert bitmaps_in(machine) == []


def test_a_vm_is_started_again_before_a_comparison(site: Site, machine: Qemu) -> None:
    name = site.move()
    site.source.wait(name, "CONVERGED")
    site.peer.ends_well = False
    site.peer.stop(signal.SIGKILL)
    machine.quit()
    machine.start_machine()  # knows nothing of the export that was read
    machine.write(0x7E, 17 * MIB, 2 * MIB)
    shutil.rmtree(site.directory / "target")
    site.peer = site.agent("target", site.peer.address)
    shown = site.source.wait(name, "CONVERGED", until=lambda now: now["reconciled_bytes"] > 0)
    assert shown["error"] is None
    machine.ask("stop")
    site.cut_over(name)
    qemus.assert_same(machine, site.target)
    site.source.ask("finish", name)
    site.assert_nothing_of_ours()


def test_two_disks_of_a_vm_are_cut_over_together(site: Site) -> None:
    require("qemu-system")
    second = site.directory / "vm" / "second.raw"
    qemus.create(second, SIZE, "raw")
    file = {"driver": "file", "filename": str(second)}
    block = json.dumps({"driver": "raw", "node-name": "second", "file": file})
    drive = "virtio-blk-pci,drive=second,share-rw=on"
    site.qemu.start_machine("-blockdev", block, "-device", drive)
    other = site.directory / "other-disk"
    other.write_bytes(bytes(SIZE))
    volumes = [(site.qemu.image, site.target), (second, other)]
    name = Pair(site.source, site.peer).start(*EASY, volumes=volumes)
    site.source.wait(name, "CONVERGED")
    for i in range(10):
        site.qemu.write(i + 1, i * MIB, MIB)
        site.qemu.write(i + 100, i * MIB, MIB, "second")
    site.qemu.ask("stop")
    assert site.cut_over(name)["suspect_volumes"] == 0
    qemus.assert_same(site.qemu, site.target)
    assert second.read_bytes() == other.read_bytes()
    assert second.read_bytes()[:1] == b"\x64"
    site.source.ask("finish", name)
    site.assert_nothing_of_ours()


def test_a_disk_is_named_by_its_socket_and_node(site: Site, machine: Qemu) -> None:
    machine.ask("stop")
    name = site.move(source=f"{machine.socket}/disk")
    site.source.wait(name, "CONVERGED")
    site.cut_over(name)
    qemus.assert_same(machine, site.target)
    site.source.ask("finish", name)
    site.assert_nothing_of_ours()


def test_auto_is_qemu_for_a_disk_named_so(site: Site, machine: Qemu) -> None:
    machine.ask("stop")
    name = site.move("--tracker", "auto", source=f"{machine.socket}/disk")
    shown = site.source.wait(name, "CONVERGED")
    assert shown["tracker"] == "qemu"
    assert f"the QEMU at {machine.socket}" in shown["tracker_reason"]
    site.kill_source()
    site.start_source()
    shown = site.source.wait(name, "CONVERGED")
    assert (shown["tracker"], shown["suspect_volumes"]) == ("qemu", 0)
    site.cut_over(name)
    qemus.assert_same(machine, site.target)
    site.source.ask("finish", name)
    site.assert_nothing_of_ours()


def test_auto_moves_an_image_as_the_file_it_is_and_says_so(site: Site) -> None:
    site.target.write_bytes(bytes(2 * SIZE))
    name = site.move("--tracker", "auto")
    shown = site.source.wait(name, "CONVERGED")
    assert shown["tracker"] == "scan"
    assert f"{site.qemu.image} is moved as the qcow2 image that it is" in shown["tracker_reason"]
    site.cut_over(name)
    image = site.qemu.image.read_bytes()
    assert site.target.read_bytes()[: len(image)] == image


def test_a_cancelled_migration_leaves_the_guest_alone(site: Site, machine: Qemu) -> None:
    name = site.move("--max-downtime", "1ms")
    site.source.wait(name, "SYNCING", "CONVERGED")
    site.source.ask("cancel", name)
    site.assert_nothing_of_ours()
    machine.write(0x7D, 0, MIB)
    assert not disks.is_fenced(machine.image)


def test_what_cannot_be_found_is_refused(site: Site, served: str, tmp_path: Path) -> None:
    other = site.directory / "vm" / "other.qcow2"
    qemus.create(other, SIZE, "qcow2")
    site.refuse("QEMU_DISK_NOT_FOUND", other)
    site.refuse("QEMU_DISK_NOT_FOUND", f"{site.qemu.socket}/nodisk")
    site.refuse("DEVICE_NOT_ALLOWED", tmp_path / "elsewhere.qcow2")
    site.assert_nothing_of_ours()
    site.qemu.kill()
    site.refuse("QEMU_DISK_NOT_FOUND")


def test_a_snapshot_in_the_middle_ends_it(site: Site, served: str) -> None:
    name = site.move("--max-downtime", "1ms")
    site.source.wait(name, "SYNCING", "CONVERGED")
    site.qemu.ask("block-export-del", id="guest", mode="hard")
    site.qemu.ask("blockdev-reopen", options=[reopened(site.qemu)])
    failed = eventually(
        lambda: site.source.show(name), lambda now: bool(now["state"] == "FAILED"), lambda _: False
    )
    assert failed["error"]["reason"] == "QEMU_DISK_READ_ONLY", failed


def reopened(qemu: Qemu) -> dict[str, object]:
    """The disk, read-only, as under a snapshot."""
    file = {"driver": "file", "filename": str(qemu.image), "discard": "unmap"}
    return {"driver": "qcow2", "node-name": "disk", "read-only": True, "file": file}


def bitmaps_in(qemu: Qemu) -> list[str]:
    """Return the bitmaps that an image at rest holds."""
    from agent.qemu.keeper import list_bitmaps

    return list_bitmaps(str(qemu.image), "")
