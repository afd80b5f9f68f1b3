"""The target's part in the proof: what it has read back from its own devices.

Owns the trees of a session's volumes and the marks of what was written and not yet flushed. Reads
back only what is durable, from the device itself; believes nothing that the source says.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import Executor
from functools import partial

from agent.ahead import run_ahead
from agent.migration import Depth, Volume
from agent.peer import Proof
from agent.prover import Prover
from agent.store import Store
from agent.tree import STEP_BYTES, DigestTree
from native.bitmap import DirtyBitmap
from native.blockio import BlockDevice
from native.buffer import BufferPool
from native.chunk import CHUNK_BYTES

_WRITTEN = "written"
_AHEAD = 4


class Witness:
    """The digests of the volumes that one session receives."""

    def __init__(
        self,
        depth: Depth,
        volumes: Sequence[Volume],
        stores: Sequence[Store],
        threads: Executor,
        pool: BufferPool,
    ) -> None:
        self.depth = depth
        self._stores = list(stores)
        self._threads, self._pool = threads, pool
        self._trees = [
            DigestTree(volume.size_bytes, store)
            for volume, store in zip(volumes, stores, strict=True)
        ]
        self._written = [DirtyBitmap(tree.size_bytes, CHUNK_BYTES) for tree in self._trees]
        self._prover = Prover(self._trees, (), threads, pool)

    @property
    def written(self) -> list[DirtyBitmap] | None:
        """Where whoever writes marks before it does; None if nothing is compared."""
        return None if self.depth is Depth.NONE else self._written

    @property
    def unread(self) -> tuple[int, float]:
        """The bytes that are to be read back before a proof, and how many a second can be."""
        unread = self._prover.unread_bytes if self.depth is Depth.FULL else 0
        return unread, self._prover.rate_bytes_per_second

    @property
    def is_settled(self) -> bool:
        """Whether nothing was written since the last generation that is durable."""
        return not any(written.count() for written in self._written)

    def start(self) -> None:
        """Begin with nothing known. Blocking. ResourceExhausted STATE_DIR_FULL."""
        if self.depth is Depth.NONE:
            return
        for tree in self._trees:
            tree.start()
        self._written = [
            store.make_bitmap(_WRITTEN, tree.size_bytes, CHUNK_BYTES)
            for tree, store in zip(self._trees, self._stores, strict=True)
        ]

    def resume(self) -> None:
        """Take up what the agent before this one knew of the same devices; else begin anew."""
        if self.depth is Depth.NONE:
            return
        try:
            for tree in self._trees:
                tree.resume()
            self._written = [
                store.open_bitmap(_WRITTEN, tree.size_bytes, CHUNK_BYTES)
                for tree, store in zip(self._trees, self._stores, strict=True)
            ]
        except OSError:
            self.start()

    def attach(self, devices: Sequence[BlockDevice]) -> None:
        """Read from these devices from now on. Not while anything is being read."""
        self._prover.devices = tuple(devices)

    def forget(self) -> None:
        """The devices may be others than before: nothing is known of them."""
        for tree in self._trees:
            tree.doubt_all()

    def note_durable(self) -> None:
        """A generation was flushed: what it wrote can be read back."""
        for tree, written in zip(self._trees, self._written, strict=True):
            if self.depth is Depth.FINAL:
                tree.doubt_only(written)
                written.clear()
            elif self.depth is Depth.FULL:
                tree.doubt_taken(written)
        if self.depth is Depth.FULL:
            self._prover.wake()

    async def prove(self) -> tuple[Proof, ...]:
        """Read back what was not, and say what is there. OSError."""
        if self.depth is Depth.NONE:
            return tuple(Proof(0, b"") for _ in self._trees)
        await self._prover.settle()
        if self.depth is Depth.FINAL:
            return tuple(Proof(t.last.count_bytes(), t.digest_of_last()) for t in self._trees)
        return tuple(Proof(tree.size_bytes, tree.root()) for tree in self._trees)

    async def digests(
        self, volume: int, device: BlockDevice
    ) -> AsyncGenerator[tuple[int, bytes], None]:
        """Iterate (offset, digests of the chunks from there on), all read anew. OSError."""
        tree = self._trees[volume]
        calls = (
            partial(self._digest, tree, device, offset)
            for offset in range(0, tree.size_bytes, STEP_BYTES)
        )
        steps = run_ahead(calls, self._threads, _AHEAD)
        try:
            async for step in steps:
                yield step
        finally:
            await steps.aclose()

    async def stop(self) -> None:
        """End what is being read in the background."""
        await self._prover.stop()

    def close(self) -> None:
        """Nothing will be proved any more; the files go."""
        for tree, store in zip(self._trees, self._stores, strict=True):
            tree.close()
            store.remove()

    def _digest(self, tree: DigestTree, device: BlockDevice, offset: int) -> tuple[int, bytes]:
        with self._pool.lease() as scratch:
            length = min(STEP_BYTES, tree.size_bytes - offset)
            return offset, tree.read_all(device, offset, length, scratch)
