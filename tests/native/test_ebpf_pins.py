"""The tracker outlives its process; what is pinned tells what it is; errors say what went wrong."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from native import ebpf
from native.bitmap import DirtyBitmap
from native.ebpf import KernelTracker
from tests import devices
from tests.devices import LoopDevice
from tests.native.tracking import (
    BLOCK,
    MIB,
    Tracked,
    blocks_of,
    range_of,
    touched,
    write_direct,
)

SIZE = 16 * MIB
CHILD = """
import os, signal, sys
from native.ebpf import KernelTracker
from tests.native.tracking import range_of
tracker = KernelTracker.attach(range_of(sys.argv[1]), sys.argv[2])
os.kill(os.getpid(), signal.SIGKILL)
"""
NOBODY = """
import os, sys
from native import ebpf
from tests.native.tracking import range_of
watch = range_of(sys.argv[1])
os.setuid(65534)
print(ebpf.check())
try:
    ebpf.KernelTracker.attach(watch, sys.argv[2])
except OSError as error:
    print(error.errno, ascii(error.__notes__), sep="\\n")
"""
Track = Callable[..., Tracked]


@pytest.fixture(params=["loop", "zram"])
def path(request: pytest.FixtureRequest) -> str:
    if request.param == "zram":
        return str(request.getfixturevalue("zram_device")(SIZE))
    device: LoopDevice = request.getfixturevalue("loop_device")(SIZE)
    return device.path


def test_check_finds_nothing_missing_here(pins: Path) -> None:
    assert ebpf.check() is None


def test_a_killed_process_leaves_a_tracker_that_marks(path: str, pins: Path) -> None:
    pin_dir = str(pins / "volume")
    child = subprocess.run([sys.executable, "-c", CHILD, path, pin_dir], capture_output=True)
    assert child.returncode == -signal.SIGKILL, child.stderr
    write_direct(path, MIB, 3 * BLOCK)
    again = KernelTracker.open(pin_dir)
    assert again.watch == range_of(path)
    marks = DirtyBitmap(SIZE, BLOCK, words=again.words)
    assert blocks_of(marks) == touched(MIB, 3 * BLOCK)
    assert again.counters() == (1, 0)
    again.destroy()
    assert list(pins.iterdir()) == []


def test_closing_goes_on_marking_and_destroying_ends_it(path: str, track: Track) -> None:
    tracked = track(path)
    kernel, pin_dir = tracked.kernel, tracked.kernel.pin_dir
    kernel.close()
    write_direct(path, 0, BLOCK)
    again = KernelTracker.open(pin_dir)
    # A view keeps the memory: it shows what was marked after the close.
    assert blocks_of(tracked.bitmap) == {0}
    again.destroy()
    again.destroy()
    kernel.destroy()
    assert not Path(pin_dir).exists()
    with pytest.raises(FileNotFoundError):
        KernelTracker.open(pin_dir)


def test_a_closed_tracker_refuses_use_but_not_its_views(path: str, track: Track) -> None:
    kernel = track(path).kernel
    words = kernel.words
    kernel.close()
    kernel.close()
    words[0] = 1 << 63
    assert words.format == "Q"
    assert (words.itemsize, len(words), words[0]) == (8, SIZE // BLOCK // 64, 1 << 63)
    for use in (lambda: kernel.words, lambda: kernel.watch, kernel.counters):
        with pytest.raises(ValueError, match="closed"):
            use()


def test_several_trackers_may_watch_one_disk(path: str, track: Track) -> None:
    one, two = track(path), track(path, 65536)
    write_direct(path, 9 * MIB, BLOCK)
    assert one.marked() == {9 * MIB // BLOCK}
    assert two.marked() == {9 * MIB // 65536}


def test_an_existing_directory_is_left_alone(path: str, track: Track) -> None:
    tracked = track(path)
    with pytest.raises(FileExistsError):
        KernelTracker.attach(range_of(path), tracked.kernel.pin_dir)
    write_direct(path, 0, BLOCK)
    assert tracked.marked() == {0}


@pytest.mark.parametrize("pin", ["dirty", "range", "inflight", "sums", "link_0", "link_1"])
def test_incomplete_pins_are_refused_and_can_be_removed(path: str, track: Track, pin: str) -> None:
    pin_dir = track(path).kernel.pin_dir
    (Path(pin_dir) / pin).unlink()
    with pytest.raises(FileNotFoundError, match=pin):
        KernelTracker.open(pin_dir)
    ebpf.remove(pin_dir)
    assert not Path(pin_dir).exists()
    ebpf.remove(pin_dir)


def test_pins_of_another_tracker_are_refused(path: str, track: Track) -> None:
    mine, other = Path(track(path).kernel.pin_dir), Path(track(path).kernel.pin_dir)
    (mine / "link_1").unlink()
    os.rename(other / "link_1", mine / "link_1")
    with pytest.raises(OSError, match="link_1") as caught:
        KernelTracker.open(str(mine))
    assert caught.value.errno == errno.EINVAL


def test_a_version_that_is_not_ours_is_refused(path: str, track: Track) -> None:
    pin_dir = track(path).kernel.pin_dir
    pin = f"{pin_dir}/range"
    if shutil.which("bpftool") is None:
        pytest.skip("no bpftool installed")
    value = bytearray(256)
    value[:8] = b"notours!"
    command = ["bpftool", "map", "update", "pinned", pin, "key", "0", "0", "0", "0", "value"]
    devices.run(*command, *map(str, value))
    with pytest.raises(OSError, match="another version") as caught:
        KernelTracker.open(pin_dir)
    assert caught.value.errno == errno.EINVAL


def test_what_is_no_bpffs_is_refused_and_left_as_it_was(path: str, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="bpffs") as caught:
        KernelTracker.attach(range_of(path), str(tmp_path / "pins"))
    assert caught.value.errno == errno.EINVAL
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "dirty").touch()
    with pytest.raises(OSError, match="bpffs"):
        ebpf.remove(str(tmp_path))
    assert (tmp_path / "dirty").exists()


def test_without_the_right_it_says_so_and_pins_nothing(path: str, pins: Path) -> None:
    pins.chmod(0o777)
    command = [sys.executable, "-c", NOBODY, path, str(pins / "volume")]
    child = subprocess.run(command, capture_output=True, text=True, check=True)
    reason, code, note = child.stdout.splitlines()
    assert "CAP_BPF" in reason
    assert int(code) == errno.EPERM
    assert "libbpf" in note
    # libbpf's words are in the exception, not on the agent's standard error.
    assert child.stderr == ""
    assert list(pins.iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [
        {"block_size_bytes": 0},
        {"block_size_bytes": 256},
        {"block_size_bytes": 5000},
        {"block_size_bytes": 1 << 40},
        {"sector_count": 0},
        {"sector_count": -1},
        {"start_sector": -1},
        {"sector_count": 1 << 50, "block_size_bytes": 512},
    ],
)
def test_a_range_that_cannot_be_is_a_value_error(
    loop_device: Callable[..., LoopDevice], pins: Path, change: dict[str, Any]
) -> None:
    watch = range_of(loop_device(SIZE).path)
    with pytest.raises(ValueError, match=r"block|range"):
        KernelTracker.attach(watch._replace(**change), str(pins / "volume"))
    assert list(pins.iterdir()) == []
