"""Which tracker is chosen, and what is said about it."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from agent.errors import FailedPrecondition
from agent.migration import Scheme
from agent.store import Store
from agent.tracker import choice
from agent.tracker.choice import (
    choose_scheme,
    fit_block,
    make_tracker,
    remove_stale,
    settle_scheme,
)
from native.bitmap import MAX_BITMAP_BYTES
from native.blockio import BlockDevice
from tests.devices import LoopDevice

SIZE = 1 << 20
TIB = 1 << 40


@pytest.fixture
def file(image_file: Callable[..., Path]) -> BlockDevice:
    return BlockDevice(str(image_file(SIZE)))


@pytest.fixture
def disk(loop_device: Callable[..., LoopDevice]) -> BlockDevice:
    return BlockDevice(loop_device(SIZE).path)


@pytest.fixture
def obstacle(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`obstacle(text)`: what keeps this host from running the eBPF programs, if anything."""
    return lambda text: monkeypatch.setattr(choice, "ebpf_obstacle", lambda: text)


def test_auto_picks_ebpf_for_block_devices(
    disk: BlockDevice, obstacle: Callable[[str], None]
) -> None:
    obstacle("")
    scheme, reason = choose_scheme(Scheme.AUTO, [disk, disk])
    assert scheme is Scheme.EBPF
    assert "block devices" in reason


def test_auto_says_why_not(
    disk: BlockDevice, file: BlockDevice, obstacle: Callable[[str], None]
) -> None:
    obstacle("no BTF")
    assert choose_scheme(Scheme.AUTO, [disk]) == (Scheme.SCAN, "ebpf cannot be used here: no BTF")
    obstacle("")
    scheme, reason = choose_scheme(Scheme.AUTO, [disk, file])
    assert scheme is Scheme.SCAN
    assert reason.startswith(f"{file.path} is a file")


@pytest.fixture
def listening(tmp_path: Path, resources: ExitStack) -> Path:
    path = tmp_path / "web.qmp"
    resources.enter_context(socket.socket(socket.AF_UNIX)).bind(str(path))
    return path


def test_auto_is_qemu_where_a_source_lies_in_a_socket(listening: Path) -> None:
    sources = ["/dev/null", f"{listening}/disk"]
    scheme, reason = settle_scheme(Scheme.AUTO, sources)
    assert scheme is Scheme.QEMU
    assert reason == f"{listening}/disk names a disk of the QEMU at {listening}"
    assert settle_scheme(Scheme.SCAN, sources) == (Scheme.SCAN, "")


def test_auto_is_not_qemu_elsewhere(listening: Path, file: BlockDevice) -> None:
    sources = [str(listening), f"{listening}.gone/disk", file.path, f"{file.path}/disk"]
    assert settle_scheme(Scheme.AUTO, sources) == (Scheme.AUTO, "")


def test_that_an_image_is_moved_as_it_is_is_said(
    disk: BlockDevice, file: BlockDevice, tmp_path: Path, obstacle: Callable[[str], None]
) -> None:
    obstacle("")
    for device, scheme in ((disk, Scheme.EBPF), (file, Scheme.SCAN)):
        assert "qcow2" not in choose_scheme(Scheme.AUTO, [device])[1]
        with Path(device.path).open("rb+") as raw:
            raw.write(b"QFI\xfb" + bytes(4092))
        chosen, reason = choose_scheme(Scheme.AUTO, [device])
        assert chosen is scheme
        assert f"{device.path} is moved as the qcow2 image that it is" in reason
        assert "--tracker qemu" in reason
    assert choose_scheme(Scheme.SCAN, [file]) == (Scheme.SCAN, "")
    short = tmp_path / "short"
    short.write_bytes(b"QFI\xfb")
    assert "qcow2" not in choose_scheme(Scheme.AUTO, [BlockDevice(str(short))])[1]


def test_what_is_named_is_used(file: BlockDevice, obstacle: Callable[[str], None]) -> None:
    obstacle("")
    assert choose_scheme(Scheme.SCAN, [file]) == (Scheme.SCAN, "")
    assert choose_scheme(Scheme.EBPF, [file]) == (Scheme.EBPF, "")
    assert choose_scheme(Scheme.QEMU, [file]) == (Scheme.QEMU, "")


@pytest.mark.parametrize(
    ("scheme", "kind", "text"),
    [
        (Scheme.EBPF, FailedPrecondition, "no BTF; run `warmsync doctor`"),
    ],
)
def test_what_cannot_be_is_refused(
    file: BlockDevice,
    obstacle: Callable[[str], None],
    scheme: Scheme,
    kind: type[Exception],
    text: str,
) -> None:
    obstacle("no BTF")
    with pytest.raises(kind, match=text) as caught:
        choose_scheme(scheme, [file])
    assert getattr(caught.value, "reason", "") == "TRACKER_UNAVAILABLE"


def test_obstacles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert "root" in choice.ebpf_obstacle()
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setitem(__import__("sys").modules, "native.ebpf", None)
    assert "no eBPF support" in choice.ebpf_obstacle()


def test_blocks_fit_the_tracker_and_the_bitmap() -> None:
    assert fit_block(Scheme.EBPF, TIB, 4096) == 4096
    assert fit_block(Scheme.SCAN, TIB, 4096) == 65536
    assert fit_block(Scheme.SCAN, TIB, 1 << 20) == 1 << 20
    assert fit_block(Scheme.EBPF, 16 * TIB, 4096) == 16 * TIB // (MAX_BITMAP_BYTES * 8)


def test_trackers_are_made_by_scheme(disk: BlockDevice, file: BlockDevice, tmp_path: Path) -> None:
    for scheme, device, block in ((Scheme.SCAN, file, 65536), (Scheme.EBPF, disk, 4096)):
        made = make_tracker(scheme, device, block, tmp_path, Store(None), size_bytes=65536)
        assert made.scheme == scheme


def test_stale_pins_are_removed_and_named(pins: Path) -> None:
    assert remove_stale(pins / "none") == []
    for name in ("b-0", "a-1"):
        (pins / name).mkdir()
    assert remove_stale(pins) == ["a-1", "b-0"]
    assert list(pins.iterdir()) == []
