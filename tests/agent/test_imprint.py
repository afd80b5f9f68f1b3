"""The root of a real device is the root of its bytes, wherever they lie and however many."""

from __future__ import annotations

from pathlib import Path

import pytest
import xxhash

from agent.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound
from agent.imprint import read_root
from native.chunk import CHUNK_BYTES
from tests import devices
from tests.agent.certificate.test_roots import twin_leaf, twin_root
from tests.content import content

MIB = 1 << 20


def silent(done_bytes: int, total_bytes: int) -> None:
    """Nobody looks."""


def twin(data: bytes) -> bytes:
    leaves = [twin_leaf(data[at : at + CHUNK_BYTES]) for at in range(0, len(data), CHUNK_BYTES)]
    return twin_root(leaves, len(data))


@pytest.mark.parametrize("size", [1, 512, CHUNK_BYTES, CHUNK_BYTES + 1, 17 * MIB + 4095])
def test_files(tmp_path: Path, size: int) -> None:
    data = content(size, seed=size)
    path = tmp_path / "disk"
    path.write_bytes(data)
    assert read_root(str(path), size, silent) == twin(data)


@pytest.mark.parametrize("sector_size", [512, 4096])
@pytest.mark.parametrize("less", [0, 4096, CHUNK_BYTES, 7])
def test_only_the_volumes_bytes_of_a_larger_device(sector_size: int, less: int) -> None:
    """Whatever lies behind them; 7: the copy of a file of an odd size."""
    data = content(MIB, seed=1)
    with devices.loop_device(MIB, sector_size) as device:
        Path(device.path).write_bytes(data)
        size = MIB - less
        assert read_root(device.path, size, silent) == twin(data[:size])


def test_more_than_a_node(tmp_path: Path) -> None:
    """Above 256 MiB there are several nodes; all but a few leaves are holes here."""
    size = (256 + 17) * MIB + 1
    path = tmp_path / "disk"
    marks = {0: b"first", 256 * MIB: b"first of the next node", size - 1: b"!"}
    with path.open("wb") as file:
        for at, data in marks.items():
            file.seek(at)
            file.write(data)
    leaves = [bytes(16)] * -(-size // CHUNK_BYTES)
    for at, data in marks.items():
        chunk = data.ljust(min(CHUNK_BYTES, size - at // CHUNK_BYTES * CHUNK_BYTES), b"\0")
        leaves[at // CHUNK_BYTES] = xxhash.xxh3_128_digest(chunk)
    said: list[tuple[int, int]] = []
    root = read_root(str(path), size, lambda done, total: said.append((done, total)))
    assert root == twin_root(leaves, size)
    assert said == sorted(said)
    assert said[-1] == (size, size)
    assert {total for _, total in said} == {size}


def test_what_is_too_small(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))
    with pytest.raises(FailedPrecondition) as caught:
        read_root(str(path), 4097, silent)
    assert caught.value.reason == "DEVICE_TOO_SMALL"
    assert caught.value.values["size_bytes"] == "4096"


def test_what_is_no_device(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        read_root(str(tmp_path / "gone"), 1, silent)
    with pytest.raises(InvalidArgument):
        read_root("/dev/null", 1, silent)


def test_a_device_that_cannot_be_read() -> None:
    with devices.faulty_device(MIB) as faulty:
        with faulty.failing("pread"), pytest.raises(DataLoss) as caught:
            read_root(faulty.path, MIB, silent)
        assert caught.value.reason == "DEVICE_IO_ERROR"
        assert caught.value.values["errno"] == "EIO"
        # Nothing is held, and what is mended is read.
        assert read_root(faulty.path, MIB, silent) == twin(bytes(MIB))
