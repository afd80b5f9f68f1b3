"""The target's part in the proof: only what is on its devices, read after it was durable."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from agent import prover as prover_module
from agent import reader as reader_module
from agent.certificate.roots import level_above, root_of
from agent.migration import Depth, Volume
from agent.store import Store
from agent.target.witness import Witness
from agent.tree import DigestTree
from native.blockio import BlockDevice
from native.buffer import AlignedBuffer, BufferPool
from native.chunk import CHUNK_BYTES, digests
from tests.agent.rpc_helpers import run
from tests.content import content

SIZE = 40 * CHUNK_BYTES + 512


class Stand:
    """A witness of one image file."""

    def __init__(self, directory: Path, depth: Depth, threads: ThreadPoolExecutor) -> None:
        self.path = directory / "target.img"
        self.path.write_bytes(content(SIZE, 1))
        self.store = Store(directory / "state", "v")
        self.pool = BufferPool(1 << 20, 4)
        self.threads, self.depth = threads, depth
        self.device = BlockDevice(str(self.path))
        self.witness = self.make()
        self.witness.start()
        self.witness.attach([self.device])

    def make(self) -> Witness:
        volumes = [Volume("a", str(self.path), SIZE)]
        return Witness(self.depth, volumes, [self.store], self.threads, self.pool)

    def restart(self) -> None:
        self.witness = self.make()
        self.witness.resume()
        self.witness.attach([self.device])

    def write(self, chunk: int, data: bytes, *, marked: bool = True) -> None:
        if marked and self.witness.written:
            self.witness.written[0].set_range(chunk * CHUNK_BYTES, len(data))
        with self.path.open("r+b") as file:
            file.seek(chunk * CHUNK_BYTES)
            file.write(data)

    def root(self) -> bytes:
        return root_of(level_above(digests(self.path.read_bytes())), SIZE)

    async def proved(self) -> bytes:
        (proof,) = await self.witness.prove()
        return proof.root


def trial(
    directory: Path, depth: Depth, steps: Callable[[Stand], Coroutine[Any, Any, None]]
) -> None:
    async def main() -> None:
        with ThreadPoolExecutor(4) as threads:
            stand = Stand(directory, depth, threads)
            with closing(stand.pool), stand.device:
                try:
                    await steps(stand)
                finally:
                    await stand.witness.stop()
                    stand.witness.close()
        assert list((directory / "state").glob("*")) == []

    run(main)


def test_what_was_written_is_read_back_once_it_is_durable(tmp_path: Path) -> None:
    async def steps(stand: Stand) -> None:
        assert await stand.proved() == stand.root()
        before = stand.root()
        stand.write(3, b"new")
        assert not stand.witness.is_settled
        assert await stand.proved() == before
        stand.witness.note_durable()
        assert stand.witness.is_settled
        assert await stand.proved() == stand.root() != before

    trial(tmp_path, Depth.FULL, steps)


def test_what_nobody_was_told_of_is_not_read_again(tmp_path: Path) -> None:
    """So a disk that loses what was read back from it already is not noticed: docs say so."""

    async def steps(stand: Stand) -> None:
        before = await stand.proved()
        stand.write(3, b"rot", marked=False)
        assert await stand.proved() == before != stand.root()

    trial(tmp_path, Depth.FULL, steps)


def test_in_the_background(tmp_path: Path) -> None:
    async def steps(stand: Stand) -> None:
        assert stand.witness.unread[0] == SIZE
        stand.witness.note_durable()
        while stand.witness.unread[0]:  # noqa: ASYNC110
            await asyncio.sleep(0)
        assert await stand.proved() == stand.root()

    trial(tmp_path, Depth.FULL, steps)


def test_the_next_agent_knows_what_was_written(tmp_path: Path) -> None:
    async def steps(stand: Stand) -> None:
        await stand.proved()
        stand.write(3, b"new")  # killed here
        stand.restart()
        assert stand.witness.unread[0] == 0
        assert not stand.witness.is_settled
        stand.witness.note_durable()
        assert await stand.proved() == stand.root()

    trial(tmp_path, Depth.FULL, steps)


def test_other_devices_are_read_anew(tmp_path: Path) -> None:
    async def steps(stand: Stand) -> None:
        await stand.proved()
        stand.write(7, b"another disk", marked=False)
        stand.witness.forget()
        assert stand.witness.unread[0] == SIZE
        assert await stand.proved() == stand.root()

    trial(tmp_path, Depth.FULL, steps)


@pytest.mark.parametrize("depth", [Depth.FULL, Depth.FINAL])
def test_a_comparison_reads_all_anew(tmp_path: Path, depth: Depth) -> None:
    async def steps(stand: Stand) -> None:
        await stand.proved()
        stand.write(3, b"rot", marked=False)
        stand.write(5, b"of a round that came to nothing")
        found = [item async for item in stand.witness.digests(0, stand.device)]
        assert b"".join(part for _, part in found) == digests(stand.path.read_bytes())
        # With FINAL the source may find chunk 5 equal and never send it again.
        assert stand.witness.is_settled is (depth is Depth.FINAL)
        if depth is Depth.FULL:
            assert await stand.proved() == stand.root()

    trial(tmp_path, depth, steps)


def test_what_changes_during_a_comparison_is_not_entered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "DIGEST_STEP_BYTES", 4 * CHUNK_BYTES)

    async def steps(stand: Stand) -> None:
        async for offset, _ in stand.witness.digests(0, stand.device):
            if offset == 0:
                stand.witness.forget()
        assert stand.witness.unread[0] == SIZE

    trial(tmp_path, Depth.FULL, steps)


def test_the_last_round_only(tmp_path: Path) -> None:
    async def steps(stand: Stand) -> None:
        stand.write(1, b"x")
        stand.witness.note_durable()
        stand.write(3, b"new" * CHUNK_BYTES)  # chunks 3 to 5
        stand.witness.note_durable()
        (proof,) = await stand.witness.prove()
        assert proof.compared_bytes == 3 * CHUNK_BYTES
        stand.write(4, b"else")
        stand.write(4, b"", marked=False)
        stand.witness.note_durable()
        (other,) = await stand.witness.prove()
        assert (other.compared_bytes, other.root == proof.root) == (CHUNK_BYTES, False)
        stand.witness.note_durable()
        assert (await stand.witness.prove())[0].compared_bytes == 0

    trial(tmp_path, Depth.FINAL, steps)


def test_one_pass_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks for a proof and goes leaves no thread that enters what was there before."""
    reading, most, gate = [0], [0], threading.Event()
    read = DigestTree.read
    lock = threading.Lock()

    def slow(tree: DigestTree, device: BlockDevice, at: int, n: int, mem: AlignedBuffer) -> int:
        with lock:
            reading[0] += 1
            most[0] = max(most[0], reading[0])
        gate.wait(10)
        try:
            return read(tree, device, at, n, mem)
        finally:
            with lock:
                reading[0] -= 1

    monkeypatch.setattr(DigestTree, "read", slow)

    async def steps(stand: Stand) -> None:
        gone = asyncio.create_task(stand.proved())
        while not reading[0]:  # noqa: ASYNC110
            await asyncio.sleep(0)
        gone.cancel()
        again = asyncio.create_task(stand.proved())
        for _ in range(100):
            await asyncio.sleep(0)
        assert not gone.done()
        gone.cancel()  # twice: it still waits for its threads
        for _ in range(100):
            await asyncio.sleep(0)
        assert not gone.done()
        gate.set()
        await asyncio.wait([gone])
        assert await again == stand.root()
        assert most[0] == 1  # SIZE is one step

    trial(tmp_path, Depth.FULL, steps)


def test_a_pass_that_is_stopped_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prover_module, "_DEPTH", 1)

    async def steps(stand: Stand) -> None:
        asked = asyncio.create_task(stand.proved())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await stand.witness.stop()
        with pytest.raises(ValueError):  # noqa: PT011
            await asked

    trial(tmp_path, Depth.FULL, steps)


def test_closed_devices_end_the_background(tmp_path: Path) -> None:
    async def steps(stand: Stand) -> None:
        stand.device.close()
        stand.witness.note_durable()
        await stand.witness.stop()
        with pytest.raises(ValueError):  # noqa: PT011
            await stand.witness.prove()

    trial(tmp_path, Depth.FULL, steps)
