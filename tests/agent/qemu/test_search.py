"""Which QEMU has a disk: found, not found, doubtful, silent."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from agent.errors import WarmsyncError
from agent.qemu.access import Access
from agent.qemu.device import open_qemu
from agent.qemu.node import Node, find_node
from tests import devices
from tests.qemus import Qemu

Make = Callable[..., Qemu]


def access(*qemus: Qemu, patience_seconds: float = 10.0) -> Access:
    sockets = tuple(qemu.socket for qemu in qemus)
    return Access(sockets, (), qemus[0].directory / "run", "0123456789ab", patience_seconds)


def reason(source: str | Path, allowed: Access) -> str:
    with pytest.raises(WarmsyncError) as caught:
        find_node(str(source), allowed)
    assert "\n" not in str(caught.value)
    return caught.value.reason


def test_the_format_is_found_not_the_file_under_it(machine: Qemu) -> None:
    found = find_node(str(machine.image), access(machine))
    assert (found.name, found.driver, found.size_bytes) == ("disk", "qcow2", 8 << 20)
    assert find_node(f"{machine.socket}/disk", access(machine)) == found


def test_a_link_to_an_image_is_the_image(machine: Qemu) -> None:
    link = machine.directory / "link"
    link.symlink_to(machine.image)
    assert find_node(str(link), access(machine)).path == str(machine.image)


def test_a_job_on_a_disk_is_not_a_second_disk(machine: Qemu) -> None:
    """A mirror puts a node of the same name over it."""
    machine.ask("blockdev-add", driver="null-co", node_name="copy", size=8 << 20)
    machine.ask(
        "blockdev-mirror",
        job_id="job",
        device="disk",
        target="copy",
        sync="none",
        filter_node_name="over",
    )
    assert find_node(str(machine.image), access(machine)).name == "disk"


def test_a_disk_of_no_vm_is_not_found(machine: Qemu, make_disk: Make) -> None:
    other = make_disk("other")
    assert reason(other.image, access(machine)) == "QEMU_DISK_NOT_FOUND"
    assert reason(f"{machine.socket}/other", access(machine)) == "QEMU_DISK_NOT_FOUND"


def test_nothing_is_asked_that_is_not_configured(machine: Qemu) -> None:
    nobody = replace(access(machine), sockets=())
    assert reason(machine.image, nobody) == "QMP_NOT_ALLOWED"
    missing = replace(access(machine), sockets=(f"{machine.directory}/none*",))
    assert reason(machine.image, missing) == "QEMU_DISK_NOT_FOUND"


def test_two_vms_with_one_image_are_too_many(make_disk: Make) -> None:
    one, two = make_disk("one", "raw"), make_disk("two", "raw")
    file = {"driver": "file", "filename": str(one.image), "locking": "off"}
    one.start_machine("-S")
    block = json.dumps({"driver": "raw", "node-name": "x", "file": file})
    two.start_machine("-S", "-blockdev", block)
    assert reason(one.image, access(two, one)) == "QEMU_DISK_AMBIGUOUS"


def test_options_do_not_hide_a_disk(make_disk: Make) -> None:
    """What it shows is moved, not the file under it; nobody else can show that."""
    devices.require("qemu-system")
    qemu = make_disk("part", "raw")
    qemu.options = {"offset": 1 << 20, "size": 4 << 20}
    qemu.start_machine("-S")
    found = find_node(str(qemu.image), access(qemu))
    assert (found.name, found.size_bytes, found.path) == ("disk", 4 << 20, str(qemu.image))
    device = open_qemu(str(qemu.image), (str(qemu.image),), qemu.seat())
    device.refresh()
    qemu.quit()
    with pytest.raises(WarmsyncError) as caught:
        device.refresh()
    assert caught.value.reason == "QEMU_GONE"
    device.close()


def test_an_image_under_a_snapshot_is_refused(machine: Qemu) -> None:
    machine.ask(
        "blockdev-snapshot-sync",
        node_name="disk",
        snapshot_file=str(machine.directory / "over.qcow2"),
        snapshot_node_name="over",
    )
    assert reason(machine.image, access(machine)) == "QEMU_DISK_READ_ONLY"
    over = find_node(str(machine.directory / "over.qcow2"), access(machine))
    assert over.name == "over"


def test_a_socket_that_is_no_qmp(make_disk: Make) -> None:
    qemu = make_disk()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(qemu.socket)
        server.listen()
        silent = access(qemu, patience_seconds=0.3)
        assert reason(qemu.image, silent) == "QMP_UNREACHABLE"


def test_a_socket_that_its_qemu_left_behind(machine: Qemu) -> None:
    machine.kill()
    assert reason(machine.image, access(machine)) == "QEMU_DISK_NOT_FOUND"


def test_what_is_not_allowed_is_not_opened(machine: Qemu) -> None:
    with pytest.raises(WarmsyncError) as caught:
        open_qemu(str(machine.image), ("/srv/*",), machine.seat())
    assert caught.value.reason == "DEVICE_NOT_ALLOWED"
    assert machine.exports() == []


def test_another_nbd_server_is_used_only_if_its_socket_is_named(machine: Qemu) -> None:
    theirs = str(machine.directory / "theirs.nbd")
    machine.ask("nbd-server-start", addr={"type": "unix", "data": {"path": theirs}})
    allowed = (str(machine.image),)
    with pytest.raises(WarmsyncError) as caught:
        open_qemu(str(machine.image), allowed, machine.seat())
    assert caught.value.reason == "QEMU_NBD_BUSY"
    assert machine.exports() == []
    seat = replace(machine.seat(), access=replace(machine.access, nbd_sockets=(theirs,)))
    open_qemu(str(machine.image), allowed, seat).close()
    assert machine.exports() == []
    with pytest.raises(WarmsyncError, match="already running"):  # it was not stopped
        machine.ask("nbd-server-start", addr={"type": "unix", "data": {"path": theirs}})


def test_a_node_without_a_file_has_no_path(machine: Qemu) -> None:
    machine.ask("blockdev-add", driver="null-co", node_name="net", size=1 << 20)
    found = find_node(f"{machine.socket}/net", access(machine))
    without = Node(machine.socket, "net", "null-co", "", 1 << 20, read_only=False, is_plain=False)
    assert found == without
