"""The target's part in the proof: what it has read back from its own devices.

Owns the trees of a session's volumes and the marks of what was written and not yet flushed. Reads
back only what is durable, from the device itself; believes nothing that the source says.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import Executor

from agent.migration import Depth, Volume
from agent.peer import Proof
from agent.prover import Prover
from agent.reader import read_digests
from agent.store import Store
from agent.tree import DigestTree
from native.bitmap import DirtyBitmap
from native.blockio import BlockDevice
from native.buffer import BufferPool
from native.chunk import CHUNK_BYTES

_WRITTEN = "written"


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
        self._era = 0
        """Another after each change of what the trees are over."""

    @property
    def written(self) -> list[DirtyBitmap] | None:
        """Where whoever writes marks before it does; None if nothing is compared."""
        return None if self.depth is Depth.NONE else self._written

    @property
    def unread(self) -> tuple[int, float]:
        """The bytes that are to be read back before a proof, and how many a second can be."""
        unread = 0 if self.depth is Depth.NONE else self._prover.unread_bytes
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
        self._era += 1
        for tree in self._trees:
            tree.doubt_all()

    def note_durable(self) -> None:
        """A generation was flushed: what it wrote can be read back."""
        self._era += 1
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
            found = await self._prover.ask(DigestTree.prove_last)
        else:
            found = await self._prover.ask(DigestTree.prove_all)
        return tuple(Proof(*one) for one in found)

    async def digests(
        self, volume: int, device: BlockDevice
    ) -> AsyncGenerator[tuple[int, bytes], None]:
        """Iterate (offset, digests of the chunks from there on), all read anew. OSError.

        Nothing is written meanwhile, and what was is durable. What is read need not be read back.
        """
        await self._prover.stop()
        tree, era = self._trees[volume], self._era
        if self.depth is Depth.FINAL:
            # What a round that came to nothing wrote: found equal now, or it is sent again.
            self._written[volume].clear()
        steps = read_digests(device, tree.size_bytes, self._pool, self._threads)
        try:
            async for offset, digests in steps:
                if era == self._era:
                    tree.enter(offset, digests)
                yield offset, digests
        finally:
            await steps.aclose()

    async def stop(self) -> None:
        """End what is being read in the background."""
        await self._prover.stop()

    def close(self) -> None:
        """Nothing will be proved any more; the files go."""
        self._era += 1  # a comparison may go on
        for tree, store in zip(self._trees, self._stores, strict=True):
            tree.close()
            store.remove()
        # Mapped files keep descriptors, and ended sessions are remembered.
        self._written = [DirtyBitmap(tree.size_bytes, CHUNK_BYTES) for tree in self._trees]
