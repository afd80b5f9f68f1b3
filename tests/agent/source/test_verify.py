"""Both ends compared: what differs, what is pending, and what the source cannot read."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from agent import reader as reader_module
from agent.errors import DataLoss
from agent.migration import Comparison, Mismatch, UnreadRange
from agent.source import verify as verify_module
from agent.source.verify import compare_ends
from native.blockio import BlockDevice
from native.buffer import AlignedBuffer
from native.chunk import CHUNK_BYTES, digests
from native.scan import digest
from tests.agent.ends import SIZE, Source, source
from tests.agent.rpc_helpers import run

STEP = 4 * CHUNK_BYTES
CHUNKS = -(-SIZE // CHUNK_BYTES)
LAST = CHUNKS - 1  # 4 KiB long


@pytest.fixture
def end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Source]:
    """Two volumes that are equal, digests of which come in small steps."""
    monkeypatch.setattr(reader_module, "DIGEST_STEP_BYTES", STEP)
    with source(tmp_path, monkeypatch, volumes=2) as made:
        for image, target in zip(made.images, made.targets, strict=True):
            target.write_bytes(image.read_bytes())

        async def theirs(token: str, volume: int) -> AsyncIterator[tuple[int, bytes]]:
            held = made.targets[volume].read_bytes()
            for offset in range(0, SIZE, STEP):
                yield offset, digests(held[offset : offset + STEP])

        monkeypatch.setattr(made.peer, "digests", theirs)
        yield made


def scratch(monkeypatch: pytest.MonkeyPatch, end: Source, volume: int, *chunks: int) -> None:
    """Let reads of some chunks fail."""

    def read(device: BlockDevice, offset: int, length: int, scratch: AlignedBuffer) -> bytes:
        if device.path == str(end.images[volume]):
            for chunk in chunks:
                if offset <= chunk * CHUNK_BYTES < offset + length:
                    raise OSError(errno.EIO, "a scratch", device.path)
        return digest(device, offset, length, scratch)

    monkeypatch.setattr(reader_module, "digest", read)


def damage(end: Source, volume: int, chunk: int) -> None:
    with end.targets[volume].open("r+b") as file:
        file.seek(chunk * CHUNK_BYTES)
        file.write(b"other")


def compare(end: Source) -> list[Comparison]:
    found: list[Comparison] = []

    async def main() -> None:
        ends = compare_ends(end.sender(), end.workshop, end.peer, "token", settled=True)
        found.extend([each async for each in ends])

    run(main)
    return found


def test_equal_ends(end: Source) -> None:
    *before, last = compare(end)
    assert last == Comparison(2 * SIZE, 2 * SIZE, 0, 0, 0, (), (), done=True)
    assert not any(each.done for each in before)


def test_what_cannot_be_read_is_left_out(end: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch(monkeypatch, end, 1, 2, 9, LAST)
    damage(end, 1, 2)  # nobody can know of this one
    damage(end, 1, 3)
    damage(end, 0, 9)
    last = compare(end)[-1]
    first, second = map(str, end.images)
    assert last.done
    assert last.unread == tuple(
        UnreadRange(second, chunk * CHUNK_BYTES, length)
        for chunk, length in ((2, CHUNK_BYTES), (9, CHUNK_BYTES), (LAST, 4096))
    )
    assert last.unread_bytes == 2 * CHUNK_BYTES + 4096
    assert last.compared_bytes == 2 * SIZE - last.unread_bytes
    assert last.mismatches == (
        Mismatch(first, 9 * CHUNK_BYTES, CHUNK_BYTES),
        Mismatch(second, 3 * CHUNK_BYTES, CHUNK_BYTES),
    )
    assert last.mismatched_bytes == 2 * CHUNK_BYTES


def test_only_the_first_are_named(end: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_module, "MAX_MISMATCHES", 2)
    scratch(monkeypatch, end, 0, 1, 2, 3)
    last = compare(end)[-1]
    assert [one.offset_bytes for one in last.unread] == [CHUNK_BYTES, 2 * CHUNK_BYTES]
    assert last.unread_bytes == 3 * CHUNK_BYTES


def test_too_much_that_cannot_be_read_is_an_error(
    end: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "_MAX_UNREAD_CHUNKS", 2)
    scratch(monkeypatch, end, 0, 1, 2, 3)
    with pytest.raises(DataLoss) as caught:
        compare(end)
    assert caught.value.reason == "SOURCE_IO_ERROR"
