"""Who may open what: kinds of files, exclusive claims and the fence."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from native.blockio import BlockDevice
from native.buffer import AlignedBuffer
from tests import devices
from tests.devices import LoopDevice

MIB = 1 << 20


def refused(path: str | Path, number: int, message: str = "", **options: bool) -> None:
    with pytest.raises(OSError, match=message or str(number)) as caught:
        BlockDevice(str(path), **options)
    assert (caught.value.errno, caught.value.filename) == (number, str(path))


class TestKinds:
    def test_neither_device_nor_file(self) -> None:
        with devices.scratch_directory() as directory:
            os.mkfifo(directory / "pipe")
            for path in (directory, directory / "pipe", Path("/dev/null")):
                refused(path, errno.ENOTBLK)
                refused(path, errno.ENOTBLK, writable=True)

    def test_missing(self) -> None:
        with devices.scratch_directory() as directory:
            refused(directory / "none", errno.ENOENT, r"\(open\)", writable=True)
            assert list(directory.iterdir()) == []

    def test_permission(self, image_file: Callable[..., Path]) -> None:
        devices.require("root")
        path = image_file(4096)
        path.parent.chmod(0o711)
        path.chmod(0o600)
        # The import comes before giving up root: the sources may be readable by root only.
        code = f"""
import os
from native.blockio import BlockDevice
os.setgid(65534), os.setuid(65534)
try:
    BlockDevice({str(path)!r})
except PermissionError as error:
    print(error.filename)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert (done.stdout.strip(), done.stderr) == (str(path), "")


class TestClaims:
    def test_device_twice(self, loop_device: Callable[..., LoopDevice]) -> None:
        path = loop_device(MIB).path
        with BlockDevice(path, writable=True, exclusive=True):
            refused(path, errno.EBUSY, exclusive=True)
            BlockDevice(path).close()
        BlockDevice(path, exclusive=True).close()

    def test_mounted_device(
        self, loop_device: Callable[..., LoopDevice], mounted: Callable[..., Path]
    ) -> None:
        path = loop_device(8 * MIB).path
        mounted(path)
        refused(path, errno.EBUSY, writable=True, exclusive=True)

    def test_disk_with_a_mounted_partition(
        self, loop_device: Callable[..., LoopDevice], mounted: Callable[..., Path]
    ) -> None:
        loop = loop_device(32 * MIB, partitions=True)
        mounted(loop.partitions[0])
        refused(loop.path, errno.EBUSY, writable=True, exclusive=True)
        BlockDevice(loop.partitions[1], writable=True, exclusive=True).close()

    @pytest.mark.parametrize("mode", [os.O_RDONLY, os.O_RDWR])
    def test_file_that_is_open_elsewhere(self, image_file: Callable[..., Path], mode: int) -> None:
        path = image_file(4096)
        other = os.open(path, mode)
        refused(path, errno.EBUSY, "open elsewhere", writable=True, exclusive=True)
        os.close(other)
        BlockDevice(str(path), writable=True, exclusive=True).close()

    def test_file_under_a_loop_device(self, loop_device: Callable[..., LoopDevice]) -> None:
        backing = loop_device(MIB).backing
        refused(backing, errno.EBUSY, "open elsewhere", writable=True, exclusive=True)

    def test_file_twice(self, image_file: Callable[..., Path]) -> None:
        path = str(image_file(4096))
        with BlockDevice(path, writable=True, exclusive=True):
            refused(path, errno.EBUSY, writable=True, exclusive=True)
        BlockDevice(path, exclusive=True).close()

    def test_claimed_file_is_locked(self, image_file: Callable[..., Path]) -> None:
        path = image_file(4096)
        with (
            BlockDevice(str(path), exclusive=True),
            path.open("rb") as other,
            pytest.raises(BlockingIOError),
        ):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with path.open("rb") as other:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def test_claims_survive_those_who_open_the_file_meanwhile(
        self, image_file: Callable[..., Path]
    ) -> None:
        """The lease makes the kernel signal its holder: that must not end the process."""
        path = image_file(4096)
        code = """
import sys
from native.blockio import BlockDevice
refused = 0
while refused < 3000:
    try:
        BlockDevice(sys.argv[1], exclusive=True).close()
    except OSError as error:
        refused += 1
        assert error.errno == 16, error
"""
        claimer = subprocess.Popen([sys.executable, "-c", code, path])
        try:
            while claimer.poll() is None:
                os.close(os.open(path, os.O_RDONLY))
        finally:
            claimer.kill()
            claimer.wait()
        assert claimer.returncode == 0


class TestFence:
    def test_device(self, loop_device: Callable[..., LoopDevice]) -> None:
        loop, buffer = loop_device(MIB), AlignedBuffer(4096)
        with BlockDevice(loop.path, writable=True) as writer, BlockDevice(loop.path) as fence:
            assert not fence.is_read_only()
            fence.set_read_only(True)
            assert fence.is_read_only()
            with pytest.raises(PermissionError):
                writer.write(0, buffer)
            refused(loop.path, errno.EROFS, "the device is read-only", writable=True)
            BlockDevice(loop.path).close()
            fence.set_read_only(False)
            assert not fence.is_read_only()
            writer.write(0, buffer)

    def test_partition(self, loop_device: Callable[..., LoopDevice]) -> None:
        loop = loop_device(8 * MIB, partitions=True)
        with BlockDevice(loop.partitions[0]) as fence:
            fence.set_read_only(True)
            refused(loop.partitions[0], errno.EROFS, writable=True)
            BlockDevice(loop.partitions[1], writable=True).close()

    @pytest.mark.parametrize("mode", [0o600, 0o664, 0o620])
    def test_file_gets_back_what_was_removed(
        self, image_file: Callable[..., Path], mode: int
    ) -> None:
        path = image_file(4096)
        path.chmod(mode)
        with BlockDevice(str(path)) as device:
            assert not device.is_read_only()
            device.set_read_only(True)
            device.set_read_only(True)
            assert device.is_read_only()
            assert path.stat().st_mode & 0o777 == mode & ~0o222
            refused(path, errno.EROFS, "no write permission for anybody", writable=True)
            device.set_read_only(False)
            assert path.stat().st_mode & 0o777 == mode

    def test_file_fenced_by_another_process(self, image_file: Callable[..., Path]) -> None:
        path = image_file(4096)
        path.chmod(0o444)
        with BlockDevice(str(path)) as device:
            device.set_read_only(False)
            assert not device.is_read_only()
        BlockDevice(str(path), writable=True).close()
