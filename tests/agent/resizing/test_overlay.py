"""The overlay against a plain `bytearray`: reads, writes, zeros, and what `apply` leaves."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.resize.overlay import Overlay
from native.blockio import BlockDevice
from tests import devices

SIZE = 5 * (1 << 20) + 3 * 512
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["write", "write", "zero"]),
        st.integers(0, SIZE // 512),
        st.sampled_from([1, 2, 7, 8, 9, 16, 300, 2048, 4096]),
    ),
    max_size=12,
)


@given(STEPS, st.integers(0, SIZE))
@settings(max_examples=60)
def test_it_reads_as_if_it_were_written(steps: list[tuple[str, int, int]], kept: int) -> None:
    before = os.urandom(SIZE)
    with devices.image_file(SIZE, before) as path, BlockDevice(str(path), writable=True) as device:
        twin = bytearray(before)
        place = path.parent / "state" / "one.0"
        overlay = Overlay(device, kept, place)
        for kind, sector, count in steps:
            offset = sector * 512
            length = min(count * 512, SIZE - offset)
            if kind == "write":
                data = os.urandom(length)
                overlay.write(offset, data)
                twin[offset : offset + length] = data
            else:
                overlay.zero(offset, length)
                twin[offset : offset + length] = bytes(length)
        assert overlay.read(0, SIZE) == twin
        assert path.read_bytes() == before
        overlay.apply()
        assert path.read_bytes() == twin
        overlay.undo()
        assert path.read_bytes()[:kept] == before[:kept]
        overlay.close()
        assert list(place.parent.iterdir()) == []


def test_zeros_take_no_room(tmp_path: Path) -> None:
    with devices.image_file(64 << 20) as path, BlockDevice(str(path), writable=True) as device:
        overlay = Overlay(device, 1 << 20, tmp_path / "one.0")
        overlay.zero(5, (64 << 20) - 9)
        assert (tmp_path / "one.changes").stat().st_blocks * 512 <= 4 * 4096
        assert overlay.changed_bytes() == 64 << 20
        overlay.close()


def test_nothing_lies_beyond_the_end(tmp_path: Path) -> None:
    with devices.image_file(SIZE) as path, BlockDevice(str(path), writable=True) as device:
        overlay = Overlay(device, 0, tmp_path / "one.0")
        for call in (lambda: overlay.read(SIZE, 1), lambda: overlay.write(SIZE - 1, b"ab")):
            with pytest.raises(OSError, match="bytes at"):
                call()
        overlay.close()
