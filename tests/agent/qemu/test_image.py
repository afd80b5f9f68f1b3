"""What tells that an image was written to behind our back."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from agent.qemu.image import Image
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
