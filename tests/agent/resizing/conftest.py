"""Fixtures: disks to grow, and a place in a state directory that must be empty afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import devices
from tests.agent.resizing.disks import GROWTH_BYTES, Disk, source_bytes
from tests.devices import LoopDevice


@pytest.fixture
def make_disk(loop_device: Callable[..., LoopDevice]) -> Callable[..., Disk]:
    def build(
        kind: str = "ext4", scheme: str = "none", sector_size: int = 512, growth: int = GROWTH_BYTES
    ) -> Disk:
        devices.require(kind)
        size = source_bytes(kind, scheme)
        loop = loop_device(size + growth, sector_size)
        disk = Disk(loop.path, size, sector_size, kind, scheme)
        disk.prepare()
        return disk

    return build


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """Where the state directory's files of one volume are; whatever happens, none stays."""
    path = tmp_path / "resize" / "move-1.0"
    yield path
    assert not path.parent.exists() or sorted(path.parent.iterdir()) == []
