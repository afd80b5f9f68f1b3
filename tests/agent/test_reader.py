"""Frames come out as planned, a bounded number ahead, and nothing runs once it is closed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from agent.ahead import run_ahead
from agent.errors import DataLoss
from agent.planner import Batch, plan_dirty, plan_holes
from agent.reader import Reader, ReadVolume
from native.bitmap import DirtyBitmap
from native.blockio import MAX_UNREAD, BlockDevice, Unread
from native.buffer import BufferPool
from native.chunk import CHUNK_BYTES, DIGEST_BYTES, digests
from native.frame import DATA, MAX_PAYLOAD_BYTES, ZERO, extents, inspect
from tests import devices
from tests.agent.rpc_helpers import run

SIZE = 4 << 20
THREADS = 4


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(THREADS) as executor:
        yield executor


@pytest.fixture
def pool() -> Iterator[BufferPool]:
    with closing(BufferPool(MAX_PAYLOAD_BYTES, THREADS)) as made:
        yield made
        assert made.outstanding == 0


def marked(size: int = SIZE) -> DirtyBitmap:
    bitmap = DirtyBitmap(size)
    bitmap.set_all()
    return bitmap


def batches() -> list[Batch]:
    return list(plan_dirty(0, marked()))


def reader(device: BlockDevice, threads: ThreadPoolExecutor, pool: BufferPool) -> Reader:
    return Reader([ReadVolume(device, None)], threads, pool, depth=3)


def test_frames_in_order(tmp_path: Path, threads: ThreadPoolExecutor, pool: BufferPool) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"data" * (SIZE // 8) + bytes(SIZE // 2))

    async def main() -> None:
        made = reader(BlockDevice(str(path)), threads, pool)
        planned = batches()
        found = [(batch, inspect(frame)) async for batch, frame, _ in made.frames(iter(planned), 7)]
        assert [batch for batch, _ in found] == planned
        assert [header.sequence for _, header in found] == [1, 2, 3, 4]
        assert {header.generation for _, header in found} == {7}
        assert [header.payload_bytes for _, header in found] == [1 << 20, 1 << 20, 0, 0]
        # The sequence goes on: it names a frame for all of a session.
        again = [inspect(frame).sequence async for _, frame, _ in made.frames(iter(planned), 8)]
        assert again == [5, 6, 7, 8]

    run(main)


def test_holes_are_not_read(tmp_path: Path, threads: ThreadPoolExecutor, pool: BufferPool) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"data that only looks like a hole to the plan".ljust(SIZE, b"."))

    async def main() -> None:
        holes = DirtyBitmap(SIZE)
        holes.set_all()
        seed = plan_holes(0, holes)
        async for _, frame, _ in reader(BlockDevice(str(path)), threads, pool).frames(seed, 1):
            assert [kind for _, _, kind in extents(frame)] == [ZERO]

    run(main)


def test_digests_are_those_of_what_was_read(
    tmp_path: Path, threads: ThreadPoolExecutor, pool: BufferPool
) -> None:
    path = tmp_path / "disk"
    content = b"0123456789abcdef" * (SIZE // 32) + bytes(SIZE // 2)
    path.write_bytes(content)
    table = bytearray(b"?" * (SIZE // CHUNK_BYTES * DIGEST_BYTES))

    async def main() -> None:
        volume = ReadVolume(BlockDevice(str(path)), table)
        plan = plan_dirty(0, marked())
        async for _, frame, _ in Reader([volume], threads, pool, 3).frames(plan, 1):
            assert {kind for _, _, kind in extents(frame)} <= {DATA, ZERO}
        assert bytes(table) == digests(content)

    run(main)


def test_a_device_that_fails_as_a_whole(threads: ThreadPoolExecutor, pool: BufferPool) -> None:
    async def main() -> None:
        frames = reader(device, threads, pool).frames(iter(planned), 1)
        with faulty.failing("pread"):
            for _ in range(MAX_UNREAD // 256):  # a MiB each, while they are not too many
                batch, frame, (one,) = await anext(frames)
                assert (one.length_bytes, inspect(frame).extent_count) == (batch.size_bytes, 0)
            with pytest.raises(DataLoss) as caught:
                await anext(frames)
        assert caught.value.reason == "SOURCE_IO_ERROR"
        assert caught.value.values["errno"] == "EIO"
        assert caught.value.values["path"] == faulty.path

    size = (MAX_UNREAD + 256) * 4096
    with devices.faulty_device(size) as faulty, BlockDevice(faulty.path) as device:
        planned = list(plan_dirty(0, marked(size)))
        run(main)


def test_bad_places_are_left_out(threads: ThreadPoolExecutor, pool: BufferPool) -> None:
    async def main() -> None:
        left_out = []
        async for _, frame, unread in reader(device, threads, pool).frames(iter(batches()), 1):
            left_out += unread
            assert bool(inspect(frame).extent_count)
        assert left_out == [Unread(0, (1 << 20) + 8192, 4096, 5)]

    with devices.scratched_device(SIZE) as disk, BlockDevice(disk.path) as device:
        disk.scratch(((1 << 20) + 9000, 1))
        run(main)


class Steps:
    """Calls that note when they run, and wait for a gate."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.began: list[int] = []
        self.ended: list[int] = []
        self.gate = threading.Event()

    def __iter__(self) -> Iterator[Callable[[], int]]:
        return (partial(self.run, number) for number in range(self.count))

    def run(self, number: int) -> int:
        self.began.append(number)
        assert self.gate.wait(20)
        self.ended.append(number)
        return number


def test_read_ahead_is_bounded(threads: ThreadPoolExecutor) -> None:
    async def main() -> None:
        steps = Steps(20)
        steps.gate.set()
        ahead = run_ahead(iter(steps), threads, 3)
        async for number in ahead:
            # This one, and at most three that nobody has asked for yet.
            assert max(steps.began) <= number + 3
        assert sorted(steps.ended) == list(range(20))

    run(main)


def test_a_cancelled_consumer_waits_for_what_runs(threads: ThreadPoolExecutor) -> None:
    """The device, its buffers and its digest table may be closed only afterwards."""

    async def main() -> None:
        steps = Steps(20)
        ahead = run_ahead(iter(steps), threads, 8)
        consumer = asyncio.ensure_future(anext(ahead))
        while len(steps.began) < THREADS:  # noqa: ASYNC110 - the other side is threads
            await asyncio.sleep(0.001)
        consumer.cancel()
        for _ in range(20):
            await asyncio.sleep(0)
        assert not consumer.done()
        steps.gate.set()
        await asyncio.wait([consumer])
        assert consumer.cancelled()
        await ahead.aclose()
        # Those that ran have ended; those that waited for a thread never will.
        assert sorted(steps.ended) == sorted(steps.began)
        assert len(steps.began) < 8

    run(main)
