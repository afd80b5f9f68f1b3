"""An agent that is killed in the middle: nothing is left of it, and the disk is as it was."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from agent import resize
from native.blockio import BlockDevice
from tests.agent.resizing.disks import Disk, grow
from tests.agent.resizing.test_refusals import programs, put
from tests.content import read_all
from tests.filesystems import MIB

Make = Callable[..., Disk]
PATIENCE_SECONDS = 60.0

__all__ = ["programs"]


def start(disk: Disk, place: Path, piece: str = "0") -> subprocess.Popen[bytes]:
    module = "tests.agent.resizing.doomed"
    arguments = [disk.path, str(disk.data_bytes), str(place), piece]
    return subprocess.Popen([sys.executable, "-m", module, *arguments])


def await_file(path: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not path.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def restart(disk: Disk, place: Path) -> bool:
    """What the next agent does first; what was the former's holds the claim until it has ended."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            with BlockDevice(disk.path, writable=True, exclusive=True) as device:
                return resize.undo_left_behind(device, place)
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_killed_while_a_program_runs(
    make_disk: Make, place: Path, programs: Path, tmp_path: Path, kind: str
) -> None:
    disk = make_disk(kind, "gpt")
    before = read_all(disk.path)
    name = {"ext4": "resize2fs", "xfs": "xfs_growfs"}[kind]
    ready, device = tmp_path / "ready", tmp_path / "device"
    script = f'{name} "$@"\necho $$ > {device}; mv {device} {ready}; exec sleep 1000'
    put(programs, name, script)
    process = start(disk, place)
    try:
        await_file(ready, process)
    finally:
        process.kill()
        assert process.wait(PATIENCE_SECONDS) == -signal.SIGKILL
    if kind == "ext4":
        program = int(ready.read_text())
        assert not psutil.pid_exists(program) or await_end(program)
    assert not restart(disk, place)
    assert read_all(disk.path) == before
    assert mounts_and_loops(place.with_suffix(".window")) == []
    (programs / name).unlink()
    assert grow(disk, place).changed_bytes > 0


def await_end(program: int) -> bool:
    try:
        psutil.Process(program).wait(PATIENCE_SECONDS)
    except psutil.NoSuchProcess:
        return True
    return True


def mounts_and_loops(window: Path) -> list[str]:
    """Return what of a window is still seen on this host; other workers have theirs."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
        found = [line for line in mounts if f" {window}" in line]
        for path in Path("/sys/block").glob("loop*/loop/backing_file"):
            try:
                found += [str(path)] if str(window) in path.read_text() else []
            except OSError:
                continue
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


@pytest.mark.parametrize("piece", ["keep", "1", "2", "7", "13"])
def test_killed_while_the_disk_is_written(make_disk: Make, place: Path, piece: str) -> None:
    disk = make_disk("ext4", "gpt")
    before = read_all(disk.path)
    process = start(disk, place, piece)
    assert process.wait(PATIENCE_SECONDS) == -signal.SIGKILL
    if piece != "keep":
        assert read_all(disk.path) != before
    assert restart(disk, place) is (piece != "keep")
    assert read_all(disk.path)[: disk.data_bytes] == before[: disk.data_bytes]
    assert list(place.parent.iterdir()) == []
    assert grow(disk, place).changed_bytes > 0
    with BlockDevice(disk.path) as device:
        disk.check(device.size_bytes() // MIB * MIB)


def test_an_undo_that_is_repeated(make_disk: Make, place: Path) -> None:
    """Killed while it undoes: the record stays until the last byte is durable."""
    disk = make_disk()
    before = read_all(disk.path)
    process = start(disk, place, "9")
    process.wait(PATIENCE_SECONDS)
    kept = {path.name: path.read_bytes() for path in place.parent.iterdir()}
    for _ in range(2):
        for name, data in kept.items():
            (place.parent / name).write_bytes(data)
        assert restart(disk, place)
        assert read_all(disk.path)[: disk.data_bytes] == before[: disk.data_bytes]


def test_what_was_left_behind_is_undone_before_it_grows_again(make_disk: Make, place: Path) -> None:
    disk = make_disk()
    start(disk, place, "9").wait(PATIENCE_SECONDS)
    report = grow(disk, place)
    assert report.before_bytes == 64 * MIB
    with BlockDevice(disk.path) as device:
        disk.check(device.size_bytes())
