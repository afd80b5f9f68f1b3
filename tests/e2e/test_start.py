"""Agents that start while QEMUs do not answer: fences go up, and no migration ends for it."""

from __future__ import annotations

import socket
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from agent.errors import FailedPrecondition
from tests import qemus
from tests.e2e.agents import eventually
from tests.e2e.disks import MIB
from tests.e2e.test_qemu import Site, machine, site
from tests.qemus import Qemu

__all__ = ["machine", "site"]


@pytest.fixture
def asking_all(site: Site) -> Site:
    """The source's agent asks all sockets beside the VM's."""
    site.source.stop()
    site.settings["qemu"]["sockets"] = [str(site.qemu.directory / "*.sock")]
    site.source = site.agent("source")
    return site


@pytest.fixture
def silent(asking_all: Site, resources: ExitStack) -> Path:
    """Where a QEMU that does not answer will be."""
    return asking_all.qemu.directory / "another.sock"


def listen_in_silence(path: Path, resources: ExitStack) -> None:
    listener = resources.enter_context(socket.socket(socket.AF_UNIX))
    listener.bind(str(path))
    listener.listen()


def test_a_fence_needs_no_qemu(
    asking_all: Site, machine: Qemu, silent: Path, resources: ExitStack
) -> None:
    site = asking_all
    name = site.move()
    site.source.wait(name, "CONVERGED")
    machine.quit()
    site.cut_over(name)
    site.kill_source()
    listen_in_silence(silent, resources)
    site.start_source()
    assert site.source.show(name)["owner"] == "target"
    with suppress(AssertionError, FailedPrecondition):
        machine.start_machine()  # it listens before it opens its disks
    assert machine.process is not None
    assert machine.process.wait(qemus.PATIENCE_SECONDS) != 0
    log = (machine.directory / "qemu.log").read_text()
    assert "lock" in log, log
    # Its own QEMU has ended, so that no other's silence matters.
    eventually(lambda: site.source.run("rollback", name).code, lambda code: code == 0)
    machine.start_machine()
    machine.write(0x5A, 0, MIB)


def test_a_vm_whose_socket_is_in_use_goes_on_later(
    site: Site, machine: Qemu, resources: ExitStack
) -> None:
    """An operator's client holds it while the agent starts."""
    name = site.move()
    site.source.wait(name, "CONVERGED")
    site.kill_source()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(machine.socket)
        site.start_source()
        shown = site.source.wait(name, until=lambda now: "QMP at" in now.get("trouble", ""))
        assert shown["error"] is None
        assert shown["state"] == "CONVERGED"
        site.source.refuse("cutover", name, reason="NOT_TAKEN_UP", code=1)
    shown = site.source.wait(name, until=lambda now: now.get("resumes") == 1)
    machine.write(0x7C, 17 * MIB, 2 * MIB)
    site.source.wait(name, "CONVERGED")
    machine.quit()
    site.cut_over(name)
    qemus.assert_same(machine, site.target)
    site.source.ask("finish", name)


def test_a_vm_whose_socket_is_in_use_can_be_given_up(site: Site, machine: Qemu) -> None:
    name = site.move()
    site.source.wait(name, "CONVERGED")
    site.kill_source()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(machine.socket)
        site.start_source()
        site.source.ask("cancel", name)
        assert site.source.show(name)["state"] == "CANCELLED"
    eventually(lambda: site.peer.show(name)["state"], lambda state: state == "CANCELLED")
    site.source.stop()
    site.start_source()
    site.assert_nothing_of_ours()
