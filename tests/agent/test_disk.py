"""A source volume gives everything back when it is closed."""

from __future__ import annotations

import os
from pathlib import Path

from agent.disk import SourceDisk, open_source
from agent.migration import Depth, Scheme, Volume
from agent.store import Store

SIZE = 4 << 20


def mapped(directory: Path) -> list[str]:
    """Return the files of a directory that this process has open, if only by a mapping."""
    found = (os.readlink(f"/proc/self/fd/{one}") for one in os.listdir("/proc/self/fd") if _is(one))
    return [path for path in found if path.startswith(str(directory))]


def _is(number: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{number}")


def test_a_closed_volume_keeps_no_descriptor(tmp_path: Path) -> None:
    """Ended migrations are remembered, a thousand of them."""
    image, files = tmp_path / "source.img", tmp_path / "volumes"
    image.write_bytes(bytes(SIZE))
    opened = open_source(Volume(str(image), "/target"), (str(image),))
    store = Store(files, "web1-0")
    disk = SourceDisk(opened, Scheme.SCAN, 65536, tmp_path, store, verify=Depth.FINAL)
    disk.start()
    assert len(mapped(files)) >= 5  # pending, taken, the tracker's digests, the tree's three
    disk.close()
    assert mapped(files) == []
    assert list(files.iterdir()) == []
