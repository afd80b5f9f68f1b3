"""What may be wrong with a VM that is to be moved: told in one line, and nothing is changed."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests import qemus
from tests.e2e import disks
from tests.e2e.agents import SECONDS, Agent, Shown, eventually
from tests.e2e.disks import MIB
from tests.e2e.test_qemu import EASY, SIZE, SLOW, Site, machine, site
from tests.qemus import Qemu

__all__ = ["machine", "site"]


def assert_untouched(site: Site) -> None:
    """Neither agent has kept anything of what it refused."""
    for agent in (site.source, site.peer):
        assert agent.ask("list")["migrations"] == []
        assert "Traceback" not in agent.log.read_text()
    assert site.target.read_bytes() == bytes(SIZE)
    assert list((site.directory / "run").glob("*")) == []


def settle(site: Site, **qemu: object) -> None:
    """Start the source's agent again with other settings of [qemu]."""
    site.source.stop()
    site.settings["qemu"] |= qemu
    site.start_source()


def test_a_socket_that_is_missing(site: Site, machine: Qemu) -> None:
    settle(site, sockets=[f"{site.directory}/vm/no-such.sock"])
    site.refuse("QEMU_DISK_NOT_FOUND")
    assert machine.bitmaps() == []
    assert_untouched(site)
    settle(site, sockets=[])
    site.refuse("QMP_NOT_ALLOWED")
    site.refuse("QMP_NOT_ALLOWED", f"{machine.socket}/disk")
    assert_untouched(site)


@contextmanager
def listener(path: Path, greeting: bytes) -> Iterator[None]:
    """Somebody who listens at a Unix socket, and is no QEMU."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()

        def serve() -> None:
            while True:
                try:
                    client, _ = server.accept()
                except OSError:
                    return
                with client:
                    client.sendall(greeting)
                    client.recv(4096)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize(
    "greeting",
    [b"HTTP/1.1 400 Bad Request\r\n\r\n", b'{"hello": "world"}\r\n', b"\x00" * 64 + b"\n"],
    ids=["http", "json", "binary"],
)
def test_a_socket_that_is_no_qmp(site: Site, machine: Qemu, greeting: bytes) -> None:
    wrong = site.directory / "vm" / "wrong.sock"
    with listener(wrong, greeting):
        settle(site, sockets=[str(wrong)])
        site.refuse("QMP_UNREACHABLE")
        assert_untouched(site)
        # Beside the right one it does no harm.
        settle(site, sockets=[str(wrong), machine.socket])
        name = site.move()
        site.source.wait(name, "CONVERGED")
        site.source.ask("cancel", name)
    site.assert_nothing_of_ours()


def test_the_socket_of_another_vm(site: Site, machine: Qemu, resources: ExitStack) -> None:
    other = resources.enter_context(qemus.disk(site.directory / "other", SIZE))
    other.start_machine()
    settle(site, sockets=[other.socket])
    site.refuse("QEMU_DISK_NOT_FOUND")
    assert other.bitmaps() == machine.bitmaps() == []
    assert_untouched(site)


def test_a_disk_that_this_vm_has_not(site: Site, machine: Qemu) -> None:
    other = site.directory / "vm" / "other.qcow2"
    qemus.create(other, SIZE, "qcow2")
    site.refuse("QEMU_DISK_NOT_FOUND", other)
    site.refuse("QEMU_DISK_NOT_FOUND", f"{machine.socket}/nodisk")
    assert machine.bitmaps() == []
    assert_untouched(site)


def test_a_bitmap_of_that_name_that_is_in_use(site: Site, machine: Qemu) -> None:
    name = site.move("--id", "web1")
    site.source.wait(name, "CONVERGED")
    [ours] = machine.bitmaps()
    site.source.ask("cancel", name)
    for agent in (site.source, site.peer):
        agent.wait(name, "CANCELLED")
        agent.ask("delete", name)
    site.target.write_bytes(bytes(SIZE))

    first = ours.rpartition("-b")[0] + "-b1"
    machine.ask("block-dirty-bitmap-add", node="disk", name=first, disabled=True)
    path = str(site.directory / "vm" / "backup.nbd")
    machine.ask("nbd-server-start", addr={"type": "unix", "data": {"path": path}})
    backup = {"id": "backup", "name": "backup", "bitmaps": [first], "type": "nbd"}
    machine.ask("block-export-add", node_name="disk", **backup)
    settle(site, nbd_sockets=[path])
    words = ("--id", "web1")
    refused = site.source.refuse(*_migrate(site, *words), reason="QEMU_BITMAP_IN_USE")
    assert "end that job" in refused.error["message"]
    assert (machine.bitmaps(), machine.exports()) == ([first], ["backup"])
    assert_untouched(site)

    # Used by nobody it is one that an agent of ours has left, and is not believed.
    machine.ask("block-export-del", id="backup", mode="hard")
    eventually(machine.exports, lambda exports: exports == [])
    site.source.wait(site.move(*words), "CONVERGED")
    machine.ask("stop")
    site.cut_over("web1")
    qemus.assert_same(machine, site.target)
    site.source.ask("finish", "web1")
    assert machine.bitmaps() == []


def _migrate(site: Site, *words: str) -> list[str]:
    volume = f"{site.qemu.source}:{site.target}"
    return ["migrate", "--peer", site.peer.address, "--volume", volume, *EASY, *words]


@pytest.mark.parametrize("how", ["quit", "kill"])
def test_a_qemu_that_ends_while_its_disk_is_first_copied(
    site: Site, machine: Qemu, how: str
) -> None:
    """Asked to, its bitmaps are in the image; killed, all is sent again."""
    name = site.move(*SLOW)
    site.source.wait(name, until=lambda now: now["bytes_sent"] > MIB)
    machine.write(0x77, 0, MIB)
    machine.quit() if how == "quit" else machine.kill()
    site.source.ask("update", name, "--bandwidth-limit", "0")
    shown = site.source.wait(name, "CONVERGED")
    assert (shown["suspect_volumes"] > 0) == (how == "kill")
    assert site.source.ask("cutover", name)["state"] == "CUT_OVER"
    qemus.assert_same(machine, site.target)
    site.source.ask("finish", name)


@pytest.mark.parametrize("how", ["quit", "kill"])
def test_a_qemu_that_ends_in_the_middle_of_the_cutover(site: Site, machine: Qemu, how: str) -> None:
    """Nothing is handed over that was not read; asked for again, it goes well."""
    name = site.move()
    site.source.wait(name, "CONVERGED")
    site.source.ask("update", name, "--bandwidth-limit", "4M")
    for i in range(12):
        machine.write(i + 0x60, 2 * i * MIB, MIB)
    machine.ask("stop")
    with site.source.start("cutover", name, "--force") as cutover:
        site.source.wait(name, "CUTTING_OVER")
        machine.quit() if how == "quit" else machine.kill()
        code = cutover.wait(SECONDS)
    if code != 0:
        assert site.source.show(name)["owner"] == "source"
        assert not disks.is_fenced(machine.image)
        site.source.ask("update", name, "--bandwidth-limit", "0")
        site.source.wait(name, "CONVERGED")
        assert site.source.ask("cutover", name)["state"] == "CUT_OVER"
    qemus.assert_same(machine, site.target)
    site.source.ask("finish", name)


def test_a_target_smaller_than_what_the_guest_sees(site: Site, machine: Qemu) -> None:
    """However small the image's file is."""
    site.target.write_bytes(bytes(SIZE // 2))
    assert machine.image.stat().st_size < SIZE // 2
    words = _migrate(site)
    refused = site.source.refuse(*words, reason="TARGET_TOO_SMALL")
    assert refused.error["values"]["size_bytes"] == str(SIZE // 2)
    site.assert_nothing_of_ours()
    site.target.write_bytes(bytes(SIZE))
    assert_untouched(site)


@pytest.fixture
def automatic(site: Site, machine: Qemu) -> Callable[..., Agent]:
    """`automatic(words...)`: agents that cut over by themselves, the source's by `power-down`."""

    def start(*words: str) -> Agent:
        powering = [sys.executable, "-m", "agent", "power-down", "--socket", machine.socket]
        script = site.directory / "quiesce"
        script.write_text(
            f"#!/bin/sh\ncd {Path.cwd()} && exec {' '.join(powering)} {' '.join(words)}\n"
        )
        script.chmod(0o755)
        site.source.stop()
        site.peer.stop()
        site.settings["hooks"] = {"quiesce": [str(script)], "boot": ["/bin/true"]}
        site.peer = site.agent("target", site.peer.address)
        site.start_source()
        return site.source

    return start


def test_a_guest_that_refuses_to_power_down(
    site: Site, machine: Qemu, automatic: Callable[..., Agent]
) -> None:
    """The VM is as it was, on its own disk, and the migration waits for a person."""
    source = automatic("--seconds", "1s")
    words = _migrate(site, "--id", "web1", "--cutover", "auto", "--wait", "end")
    refused = source.refuse(*words, reason="HOOK_FAILED")
    assert "is still on 1 s after its power button" in refused.error["message"]
    assert "the source owns the disks" in refused.error["message"]
    shown = source.show("web1")
    assert (shown["owner"], shown["cutover_step"]) == ("source", "stopped")
    assert machine.ask("query-status")["status"] == "running"
    machine.write(0x78, 0, MIB)
    assert not disks.is_fenced(machine.image)
    # With leave to end it, it is ended, and moved with its last write.
    automatic("--seconds", "1s", "--kill")
    source = site.source
    eventually(site.peer.log.read_text, lambda text: "session resumed" in text)
    source.wait("web1", "CONVERGED")
    source.ask("update", "web1", "--cutover", "auto")
    moved: Shown = source.wait("web1", until=lambda now: now["cutover_step"] == "done")
    assert (moved["owner"], moved["suspect_volumes"]) == ("target", 0)
    qemus.assert_same(machine, site.target)
    source.ask("finish", "web1")
