"""Our own storage daemon on an image at rest."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agent.errors import FailedPrecondition
from agent.qemu import keeper as keeper_module
from agent.qemu.image import Image
from agent.qemu.keeper import Keeper, list_bitmaps, remove_bitmaps
from tests import devices, qemus
from tests.devices import run
from tests.qemus import Qemu

LATE = """
import os, socket, sys, time
socket.socket(socket.AF_UNIX).bind(sys.argv[1])
time.sleep(0.5)
os.execvp(sys.argv[2], sys.argv[2:])
"""
"""Binds the socket, and listens only later, as a daemon does on a busy host."""


@pytest.fixture
def begin(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`begin(program)`: daemons are started by way of this one, with their socket named."""
    popen = subprocess.Popen

    def by_way_of(program: str) -> None:
        def start(command: list[str], **how: Any) -> Any:
            path = next(word for word in command if "path=" in word)
            path = path.partition("path=")[2].partition(",")[0]
            return popen([sys.executable, "-c", program, path, *command], **how)

        monkeypatch.setattr("agent.qemu.keeper.subprocess.Popen", start)

    return by_way_of


def test_a_daemon_that_listens_late_is_waited_for(
    make_disk: Callable[..., Qemu], begin: Callable[..., None]
) -> None:
    qemu = make_disk()
    begin(LATE)
    image = Image(str(qemu.image))
    keeper = Keeper(qemu.seat(), image, qemu.driver)
    assert keeper.is_current
    assert keeper.node().size_bytes > 0
    keeper.stop()
    image.close()


def test_a_daemon_that_ends_at_once_is_told(
    make_disk: Callable[..., Qemu], begin: Callable[..., None]
) -> None:
    qemu = make_disk()
    begin("import sys; sys.exit('no such driver')")
    image = Image(str(qemu.image))
    with pytest.raises(FailedPrecondition, match="no such driver") as caught:
        Keeper(qemu.seat(), image, qemu.driver)
    assert caught.value.reason == "IMAGE_UNUSABLE"
    image.close()


def test_a_host_without_qemu_utils_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(FailedPrecondition, match=r"qemu-img: .*install it") as listing:
        list_bitmaps("/vm.qcow2", "warmsync-")
    with pytest.raises(FailedPrecondition, match=r"qemu-img: .*install it") as removing:
        remove_bitmaps("/vm.qcow2", ["warmsync-1"])
    assert listing.value.reason == removing.value.reason == "IMAGE_UNUSABLE"


def test_a_tool_that_never_ends_is_told(
    monkeypatch: pytest.MonkeyPatch, make_disk: Callable[..., Qemu]
) -> None:
    """On an image whose storage does not answer."""
    devices.require("nbdkit")
    qemu = make_disk()
    monkeypatch.setattr(keeper_module, "_TOOL_SECONDS", 0.5)
    with qemus.dead_storage(qemu):
        calls: list[Callable[[], list[str]]] = [
            lambda: list_bitmaps(str(qemu.image), "warmsync-"),
            lambda: remove_bitmaps(str(qemu.image), ["warmsync-1"]),
        ]
        for call in calls:
            with pytest.raises(FailedPrecondition, match=r"0\.5 s; see to its storage") as caught:
                call()
            assert caught.value.reason == "IMAGE_UNUSABLE"
    assert list_bitmaps(str(qemu.image), "warmsync-") == []


def test_an_image_that_is_open_elsewhere_cannot_be_looked_into(
    make_disk: Callable[..., Qemu],
) -> None:
    """Which is not to say that there is nothing in it."""
    qemu = make_disk()
    path = str(qemu.image)
    run("qemu-img", "bitmap", "--add", path, "warmsync-1")
    qemu.start_daemon()
    with pytest.raises(FailedPrecondition, match=r"lock.*; end what has it open") as caught:
        list_bitmaps(path, "warmsync-")
    assert caught.value.reason == "IMAGE_UNUSABLE"
    assert "\n" not in str(caught.value)
    qemu.kill()
    assert list_bitmaps(path, "warmsync-") == ["warmsync-1"]


def test_nothing_is_in_what_is_no_image_any_more(tmp_path: Path) -> None:
    devices.require("qemu")
    path = tmp_path / "image"
    assert list_bitmaps(str(path), "") == []
    path.write_bytes(bytes(1 << 20))
    assert list_bitmaps(str(path), "") == []
