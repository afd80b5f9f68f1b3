"""What tells that an image was written to behind our back, and who may claim it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.device import open_device
from agent.errors import FailedPrecondition
from agent.qemu.image import Image, claim
from tests import content
from tests.devices import LoopDevice, run

MIB = 1 << 20


def put_back(path: str, times: os.stat_result) -> None:
    """As seen through a node that the writer did not use."""
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_a_write_to_a_device_shows_in_its_stamp(loop_device: Callable[..., LoopDevice]) -> None:
    path = loop_device(4 * MIB).path
    image, before = Image(path), os.stat(path)
    stamp = image.stamp()
    content.read_all(path)
    assert image.stamp() == stamp
    with content.Disk(path, writable=True) as disk:
        disk.write(MIB, b"\x01" * 4096)
    put_back(path, before)
    assert image.stamp() != stamp
    image.close()


def test_so_does_what_is_in_its_page_cache(loop_device: Callable[..., LoopDevice]) -> None:
    """Of a QEMU with cache=writeback, by another node of the device."""
    path = loop_device(4 * MIB).path
    image, before = Image(path), os.stat(path)
    stamp = image.stamp()
    with open(path, "rb+", buffering=0) as file:
        file.write(b"\x01" * 4096)
        put_back(path, before)
        assert image.stamp() != stamp
    image.close()


def test_so_does_a_discard(loop_device: Callable[..., LoopDevice]) -> None:
    path = loop_device(4 * MIB).path
    image = Image(path)
    stamp = image.stamp()
    run("blkdiscard", path)
    assert image.stamp() != stamp
    image.close()


def test_so_does_a_write_to_a_file(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(MIB))
    image = Image(str(path))
    stamp = image.stamp()
    path.write_bytes(b"\x01" * MIB)
    assert image.stamp() != stamp
    image.close()


@pytest.mark.parametrize("kind", ["file", "device"])
def test_it_is_claimed_by_us_or_as_a_target(
    tmp_path: Path, loop_device: Callable[..., LoopDevice], kind: str
) -> None:
    path = str(tmp_path / "image") if kind == "file" else loop_device(4 * MIB).path
    if kind == "file":
        Path(path).write_bytes(bytes(MIB))
    with claim(path), pytest.raises(FailedPrecondition) as caught:
        open_device(path, (path,), writable=True, exclusive=True)
    assert caught.value.reason == "DEVICE_IN_USE"
    target = open_device(path, (path,), writable=True, exclusive=True)
    with pytest.raises(OSError, match=path) as refused, claim(path):
        pass
    assert refused.value.errno == errno.EBUSY
    target.close()
    with claim(path):
        pass
