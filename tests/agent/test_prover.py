"""Digests are kept true: in the background as far as a device can be read, at once wholly."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from agent import prover as prover_module
from agent import tree as tree_module
from agent.device import map_data
from agent.prover import Prover
from agent.store import Store
from agent.tree import DigestTree
from native.bitmap import DirtyBitmap
from native.blockio import BlockDevice
from native.buffer import AlignedBuffer, BufferPool
from native.chunk import CHUNK_BYTES, digests
from tests.agent.rpc_helpers import run
from tests.content import content

SIZE = 400 * CHUNK_BYTES + 512
STEP = 256  # chunks that are read at once


class Stand:
    """A prover of one image file, some chunks of which cannot be read."""

    def __init__(self, directory: Path, threads: ThreadPoolExecutor) -> None:
        self.path = directory / "disk.img"
        self.path.write_bytes(content(SIZE, 1))
        self.device = BlockDevice(str(self.path))
        self.tree = DigestTree(SIZE, Store(directory / "state", "v"))
        self.tree.start()
        self.pool = BufferPool(1 << 20, 4)
        self.prover = Prover([self.tree], [self.device], threads, self.pool)
        self.bad: set[int] = set()
        self.errno = errno.EIO
        self.reads: list[tuple[int, int]] = []

    def check(self, offset: int, length: int) -> None:
        """Fail as a device does that cannot be read there."""
        self.reads.append((offset // CHUNK_BYTES, -(-length // CHUNK_BYTES)))
        for chunk in self.bad:
            if offset <= chunk * CHUNK_BYTES < offset + length:
                raise OSError(self.errno, "a scratch", str(self.path))

    def stale(self) -> list[int]:
        return [
            chunk
            for offset, length in self.tree.stale.extents()
            for chunk in range(offset // CHUNK_BYTES, -(-(offset + length) // CHUNK_BYTES))
        ]

    async def idle(self) -> None:
        """Wait for what is read in the background."""
        task = self.prover._task
        assert task is not None
        await asyncio.wait([task])
        assert task.exception() is None


Steps = Callable[[Stand], Coroutine[Any, Any, None]]


@pytest.fixture
def trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Steps], None]:
    """Run steps with a stand."""
    read = DigestTree.read

    async def main(steps: Steps) -> None:
        with ThreadPoolExecutor(4) as threads:
            stand = Stand(tmp_path, threads)

            def checked(
                tree: DigestTree, device: BlockDevice, at: int, n: int, mem: AlignedBuffer
            ) -> int:
                stand.check(at, n)
                return read(tree, device, at, n, mem)

            monkeypatch.setattr(DigestTree, "read", checked)
            with closing(stand.pool), stand.device:
                try:
                    await steps(stand)
                finally:
                    await stand.prover.stop()

    return lambda steps: run(lambda: main(steps))


def test_all_that_is_stale_is_read_in_the_background(trial: Callable[[Steps], None]) -> None:
    async def steps(stand: Stand) -> None:
        assert stand.prover.unread_bytes == SIZE
        stand.prover.wake()
        await stand.idle()
        assert stand.prover.unread_bytes == 0
        assert bytes(stand.tree.table) == digests(stand.path.read_bytes())
        assert await stand.prover.settle() == 0

    trial(steps)


def test_what_became_stale_meanwhile_is_read_once_it_is_woken(
    trial: Callable[[Steps], None],
) -> None:
    async def steps(stand: Stand) -> None:
        stand.prover.wake()
        await asyncio.sleep(0)
        stand.tree.doubt_all()
        stand.prover.wake()
        await stand.idle()
        assert stand.prover.unread_bytes == 0

    trial(steps)


def test_the_search_for_holes_is_waited_for_and_hides_nothing(
    trial: Callable[[Steps], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the file system is asked, nothing is marked as stale; it is not known all the same."""
    asked, answer = threading.Event(), threading.Event()

    def ask_slowly(device: BlockDevice, size_bytes: int, block_bytes: int) -> DirtyBitmap:
        asked.set()
        assert answer.wait(20)
        return map_data(device, size_bytes, block_bytes)

    monkeypatch.setattr(tree_module, "_SPARSE_BYTES", 1)
    monkeypatch.setattr(tree_module, "map_data", ask_slowly)

    async def steps(stand: Stand) -> None:
        stand.prover.wake()
        await asyncio.to_thread(asked.wait, 20)
        assert stand.prover.unread_bytes == SIZE
        settled = asyncio.create_task(stand.prover.settle())
        done, _ = await asyncio.wait([settled], timeout=0.2)
        answer.set()  # before anything may fail: a thread waits for it
        assert not done
        assert await settled == SIZE
        assert bytes(stand.tree.table) == digests(stand.path.read_bytes())

    trial(steps)


def test_the_background_reads_around_a_bad_chunk(
    trial: Callable[[Steps], None], caplog: pytest.LogCaptureFixture
) -> None:
    async def steps(stand: Stand) -> None:
        stand.bad = {3, STEP - 1, 400}
        stand.prover.wake()
        await stand.idle()
        assert stand.stale() == [3, STEP - 1, 400]
        assert caplog.text.count("not read back") == 3
        with pytest.raises(OSError, match="a scratch"):  # at the cutover it counts
            await stand.prover.settle()
        assert stand.stale() == [3, STEP - 1, 400]
        stand.bad.clear()
        assert await stand.prover.settle() == 2 * CHUNK_BYTES + 512
        assert bytes(stand.tree.table) == digests(stand.path.read_bytes())

    trial(steps)


def test_the_background_gives_up_where_much_is_bad(
    trial: Callable[[Steps], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prover_module, "_MOST_BAD", 4)

    async def steps(stand: Stand) -> None:
        stand.bad = set(range(10, 20))
        stand.prover.wake()
        await stand.idle()
        assert stand.stale() == list(range(10, 401))
        stand.bad.clear()
        stand.prover.wake()
        await stand.idle()
        assert stand.stale() == []

    trial(steps)


def test_a_device_that_is_gone_is_not_read_around(trial: Callable[[Steps], None]) -> None:
    async def steps(stand: Stand) -> None:
        stand.bad, stand.errno = {3}, errno.ENXIO
        stand.prover.wake()
        await stand.idle()
        assert stand.reads == [(0, STEP)]
        assert stand.prover.unread_bytes == SIZE

    trial(steps)


def test_devices_that_are_closed_end_the_background(trial: Callable[[Steps], None]) -> None:
    async def steps(stand: Stand) -> None:
        stand.device.close()
        stand.prover.wake()
        await stand.idle()
        with pytest.raises(ValueError, match="closed"):
            await stand.prover.settle()
        assert stand.prover.unread_bytes == SIZE

    trial(steps)


def test_the_rate_is_measured_where_enough_is_read(trial: Callable[[Steps], None]) -> None:
    async def steps(stand: Stand) -> None:
        guessed = stand.prover.rate_bytes_per_second
        await stand.prover.settle()
        measured = stand.prover.rate_bytes_per_second
        assert measured != guessed
        stand.tree.stale.set_range(0, CHUNK_BYTES)
        await stand.prover.settle()
        assert stand.prover.rate_bytes_per_second == measured

    trial(steps)


def test_each_tree_is_asked(trial: Callable[[Steps], None]) -> None:
    async def steps(stand: Stand) -> None:
        assert await stand.prover.ask(lambda tree: tree.size_bytes) == (SIZE,)

    trial(steps)
