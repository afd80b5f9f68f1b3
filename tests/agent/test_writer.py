"""Frames are written to their volume; a flush reaches every device."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from agent.errors import DataLoss, ResourceExhausted
from agent.writer import Writer
from native.blockio import BlockDevice
from native.buffer import BufferPool
from native.frame import MAX_PAYLOAD_BYTES
from tests.agent.carriers.rig import SIZE, frame_of, image
from tests.agent.rpc_helpers import run


class Flushing:
    """A device of which only the flush matters."""

    def __init__(self, *errors: OSError) -> None:
        self.flushed = 0
        self.errors = list(errors)

    def flush(self) -> None:
        self.flushed += 1
        if self.errors:
            raise self.errors.pop()


def writing(devices: list[Any], steps: Any) -> None:
    async def main() -> None:
        with ThreadPoolExecutor(2) as threads, closing(BufferPool(MAX_PAYLOAD_BYTES, 2)) as pool:
            await steps(Writer(devices, [SIZE] * len(devices), threads, pool))
            assert pool.outstanding == 0

    run(main)


def test_a_flush_reaches_every_device() -> None:
    """Rule 4."""
    devices = [Flushing(), Flushing(), Flushing()]

    async def steps(writer: Writer) -> None:
        assert await writer.flush() >= 0
        assert [device.flushed for device in devices] == [1, 1, 1]

    writing(devices, steps)


def test_one_flush_that_fails_fails_all() -> None:
    devices = [Flushing(OSError(5, "fsync", "/dev/x")), Flushing()]

    async def steps(writer: Writer) -> None:
        with pytest.raises(DataLoss) as caught:
            await writer.flush()
        assert caught.value.values["path"] == "/dev/x"
        assert devices[1].flushed == 1

    writing(devices, steps)


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    async def steps(writer: Writer) -> None:
        with pytest.raises(ResourceExhausted) as caught:
            await writer.flush()
        assert caught.value.reason == "DISK_FULL"

    writing([Flushing(OSError(28, "No space left on device", "/img"))], steps)


def test_frames_find_their_volume(tmp_path: Path) -> None:
    source = image(tmp_path, "source", seed=1)
    targets = [image(tmp_path, name) for name in "ab"]
    devices = [BlockDevice(str(path), writable=True) for path in targets]

    async def steps(writer: Writer) -> None:
        frames = [frame_of(source, 4096, 4096, volume=v, number=v + 5) for v in (0, 1)]
        written = await asyncio.gather(*(writer.write(frame, 1) for frame in frames))
        assert written == [5, 6]
        with pytest.raises(DataLoss, match="volume 2 of 2"):
            await writer.write(frame_of(source, 0, 4096, volume=2), 1)
        with pytest.raises(DataLoss) as caught:
            await writer.write(frame_of(source, 0, 4096, volume=1), 2)
        assert caught.value.reason == "BAD_FRAME"

    writing(devices, steps)
    content = source.read_bytes()[4096:8192]
    assert {path.read_bytes() for path in targets} == {bytes(4096) + content + bytes(SIZE - 8192)}


def test_a_frame_beyond_the_volume_is_refused(tmp_path: Path) -> None:
    """The device may be larger than the volume: what is behind it is not ours."""
    source = image(tmp_path, "source", seed=1)
    large = tmp_path / "large"
    large.write_bytes(bytes(SIZE + 4096))
    with source.open("ab") as file:
        file.write(b"x" * 4096)
    device = BlockDevice(str(large), writable=True)

    async def steps(writer: Writer) -> None:
        with pytest.raises(DataLoss):
            await writer.write(frame_of(source, SIZE, 4096), 1)
        assert large.read_bytes() == bytes(SIZE + 4096)

    writing([device], steps)
