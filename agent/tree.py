"""What one end knows of a volume's bytes: the digest of each chunk, and which of them are stale.

Owns the table (16 bytes a chunk, in a mapped file), the marks of what changed since a chunk was
read, and the root over all. Never decides when to read; never talks to the other end.

An entry that is not stale is the digest of the chunk as it was read after the last change that
`doubt` was told of. Marks are set after a change and cleared before the read.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import TYPE_CHECKING

from agent.certificate.roots import FANOUT, NODE_BYTES, level_above, node_count, node_of, root_of
from agent.device import map_data
from agent.store import Store
from native.bitmap import DirtyBitmap
from native.blockio import BlockDevice
from native.buffer import AlignedBuffer
from native.chunk import CHUNK_BYTES, DIGEST_BYTES, is_zero
from native.scan import refresh

if TYPE_CHECKING:
    from typing_extensions import Buffer

STEP_BYTES = 16 << 20
"""What one step of reading reads at most."""

NODE_SPAN_BYTES = FANOUT * CHUNK_BYTES
_SPARSE_BYTES = 1 << 30
"""Where more than this is to be read, the file system is asked for holes first."""

_TABLE, _STALE, _READING = "tree", "stale", "reading"


class DigestTree:
    """The digests of one volume. Thread-safe as its bitmaps are."""

    def __init__(self, size_bytes: int, store: Store) -> None:
        self.size_bytes = size_bytes
        self._store = store
        self._table: Buffer = b""
        self.stale = DirtyBitmap(size_bytes, CHUNK_BYTES)
        self._reading = DirtyBitmap(size_bytes, CHUNK_BYTES)
        self.last = DirtyBitmap(size_bytes, CHUNK_BYTES)
        self._changed = DirtyBitmap(size_bytes, NODE_SPAN_BYTES)
        self._nodes = bytearray(node_count(size_bytes) * DIGEST_BYTES)
        # What was being read when it was doubted: that read may be entered late, over a newer one.
        self._overtaken = DirtyBitmap(size_bytes, CHUNK_BYTES)
        self._blank = False

    @property
    def table(self) -> Buffer:
        """The digests, writable; chunk i's are at 16 i."""
        return self._table

    @property
    def _table_bytes(self) -> int:
        return -(-self.size_bytes // CHUNK_BYTES) * DIGEST_BYTES

    def start(self) -> None:
        """Begin with nothing known. ResourceExhausted STATE_DIR_FULL."""
        geometry = self.size_bytes, CHUNK_BYTES
        self._table = self._store.make(_TABLE, self._table_bytes)
        self.stale = self._store.make_bitmap(_STALE, *geometry)
        self._reading = self._store.make_bitmap(_READING, *geometry)
        self._blank = True
        self.doubt_all()

    def resume(self) -> None:
        """Take up what a process before this one knew, on the same boot. OSError."""
        geometry = self.size_bytes, CHUNK_BYTES
        self._table = self._store.open(_TABLE, self._table_bytes)
        self.stale = self._store.open_bitmap(_STALE, *geometry)
        self._reading = self._store.open_bitmap(_READING, *geometry)
        self._blank = False
        self._reading.take(self.stale)
        self._changed.set_all()

    def doubt(self, marks: DirtyBitmap) -> None:
        """What is marked (in blocks of any size) may have changed."""
        self._blank = False  # whoever sends it enters digests past us
        self.stale.touch(marks)
        self._changed.touch(marks)
        touched = DirtyBitmap(self.size_bytes, CHUNK_BYTES)
        touched.touch(marks)
        self._overtaken.merge_common(touched, self._reading)

    def doubt_overtaken(self) -> None:
        """What was sent was entered, perhaps under a read that had begun before: not believed."""
        self._overtaken.take(self.stale)

    def doubt_taken(self, marks: DirtyBitmap) -> None:
        """The same for marks of chunks, which are moved here."""
        self._changed.touch(marks)
        marks.take(self.stale)

    def doubt_only(self, marks: DirtyBitmap) -> None:
        """The same, and all else is of no interest; `last` is what it was."""
        self.stale.clear()
        self.doubt(marks)
        self.last.clear()
        self.last.touch(marks)

    def doubt_all(self) -> None:
        """Nothing is known."""
        self.stale.set_all()
        self._changed.set_all()

    def enter(self, offset_bytes: int, digests: bytes) -> None:
        """Enter digests of chunks that were read just now, with all changes since marked."""
        at = offset_bytes // CHUNK_BYTES * DIGEST_BYTES
        memoryview(self._table)[at : at + len(digests)] = digests
        length = min(len(digests) // DIGEST_BYTES * CHUNK_BYTES, self.size_bytes - offset_bytes)
        self._changed.set_range(offset_bytes, length)
        self.stale.clear_range(offset_bytes, length)
        self._blank = False

    def count_unread(self, marks: DirtyBitmap | None = None) -> int:
        """Return the bytes of all chunks that are stale, or being read, or touched by `marks`."""
        if marks is None and not self._reading.count():  # nearly always, and ten times as fast
            size_bytes = self.stale.count_bytes()
            if not self._reading.count():
                return size_bytes
        unread = DirtyBitmap(self.size_bytes, CHUNK_BYTES)
        for marks_of in (self.stale, self._reading, self.stale):  # what a read gives up goes back
            unread.merge(marks_of)
        if marks is not None:
            unread.touch(marks)
        return unread.count_bytes()

    def steps(self) -> Iterator[tuple[int, int]]:
        """Iterate ranges (offset, length) with all that is stale now, STEP_BYTES of it in each."""
        now = DirtyBitmap(self.size_bytes, CHUNK_BYTES)
        now.merge(self.stale)
        at = 0
        while at < self.size_bytes:
            pairs, at = now.batch(at, max_bytes=STEP_BYTES)
            if pairs:
                yield pairs[0], pairs[-2] + pairs[-1] - pairs[0]

    def read(
        self, device: BlockDevice, offset_bytes: int, length_bytes: int, scratch: AlignedBuffer
    ) -> int:
        """Read what is stale in a range of whole chunks; returns the bytes read. OSError."""
        self._blank = False
        try:
            return refresh(
                device, offset_bytes, length_bytes, scratch, self._table, self.stale, self._reading
            )
        finally:
            self._changed.set_range(offset_bytes, length_bytes)

    def skip_holes(self, device: BlockDevice) -> int:
        """Enter what the file system says are holes; asked only where much is stale. OSError.

        Returns their bytes.
        """
        if self.count_unread() < _SPARSE_BYTES:
            return 0
        asked, data = (
            DirtyBitmap(self.size_bytes, CHUNK_BYTES),
            DirtyBitmap(self.size_bytes, CHUNK_BYTES),
        )
        asked.merge(self.stale)
        # As for a read: first the marks are cleared, so that what changes meanwhile is marked anew.
        self._reading.merge(asked)
        self.stale.subtract(asked)
        try:
            data.merge_common(asked, map_data(device, self.size_bytes, CHUNK_BYTES))
        except BaseException:
            data.merge(asked)
            raise
        finally:
            self.stale.merge(data)
            self._reading.subtract(data)
        asked.subtract(data)
        for offset, length in asked.extents():
            self._clear(offset, length)
        self._changed.touch(asked)
        self._reading.subtract(asked)
        return asked.count_bytes()

    def _clear(self, offset_bytes: int, length_bytes: int) -> None:
        if self._blank:
            return
        first = offset_bytes // CHUNK_BYTES * DIGEST_BYTES
        end = -(-(offset_bytes + length_bytes) // CHUNK_BYTES) * DIGEST_BYTES
        entries = memoryview(self._table)[first:end]
        for at in range(0, len(entries), NODE_BYTES):
            part = entries[at : at + NODE_BYTES]
            if not is_zero(part):  # a page that is only looked at need not be written back
                part[:] = bytes(len(part))
            part.release()
            self._let_go(first + at)

    def _let_go(self, at: int) -> None:
        """Leave a node's part of a mapped file to the page cache; it is looked at rarely."""
        if self._store.keeps and isinstance(self._table, mmap.mmap):
            self._table.madvise(mmap.MADV_DONTNEED, at // NODE_BYTES * NODE_BYTES, NODE_BYTES)

    def note_sent(self, marks: DirtyBitmap) -> None:
        """What is marked was read for sending: its entries are new."""
        self._changed.touch(marks)

    def root(self) -> bytes:
        """Return the root over the whole table; right once nothing is stale or being read."""
        changed = DirtyBitmap(self.size_bytes, NODE_SPAN_BYTES)
        self._changed.take(changed)
        table = memoryview(self._table)
        for offset, _ in changed.extents(max_length_bytes=NODE_SPAN_BYTES):
            index = offset // NODE_SPAN_BYTES
            leaves = bytes(table[index * NODE_BYTES : (index + 1) * NODE_BYTES])
            self._nodes[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES] = node_of(leaves)
            self._let_go(index * NODE_BYTES)
        return root_of(bytes(self._nodes), self.size_bytes)

    def digest_of_last(self) -> bytes:
        """Return one digest of where the chunks of `last` are and what is in them."""
        table, found = memoryview(self._table), bytearray()
        for offset, length in self.last.extents():
            first, end = offset // CHUNK_BYTES, -(-(offset + length) // CHUNK_BYTES)
            found += first.to_bytes(DIGEST_BYTES, "little")
            found += end.to_bytes(DIGEST_BYTES, "little")
            found += table[first * DIGEST_BYTES : end * DIGEST_BYTES]
        while len(found) > DIGEST_BYTES:
            found = bytearray(level_above(bytes(found)))
        return bytes(found) or bytes(DIGEST_BYTES)

    def prove_all(self) -> tuple[int, bytes]:
        """Return what is compared of a whole volume: its bytes, the root."""
        return self.size_bytes, self.root()

    def prove_last(self) -> tuple[int, bytes]:
        """Return what is compared of what was last doubted: its bytes, one digest."""
        return self.last.count_bytes(), self.digest_of_last()

    def close(self) -> None:
        """Let the memory go, and leave the files to who comes next."""
        self._table = b""  # who is still at work in it holds it a little longer
        geometry = self.size_bytes, CHUNK_BYTES
        self.stale, self._reading = DirtyBitmap(*geometry), DirtyBitmap(*geometry)


class KeptTree(DigestTree):
    """Over the table of a tracker that compares with it: its entries say what was last sent.

    Never stale, and never written here: an entry that is made new without being sent would hide a
    change from the tracker. Its last pass before the fence proves that the source is still so.
    """

    def __init__(self, size_bytes: int, store: Store, table: Buffer) -> None:
        super().__init__(size_bytes, store)
        self._table = table
        self._changed.set_all()

    def start(self) -> None:
        """Nothing is to be made."""

    def resume(self) -> None:
        """Nothing was kept beside the tracker's table."""

    def doubt(self, marks: DirtyBitmap) -> None:
        """What is marked is sent, and its entries are made new by that."""
        self._changed.touch(marks)

    def count_unread(self, marks: DirtyBitmap | None = None) -> int:  # noqa: ARG002
        """What is sent is read with it."""
        return 0

    def doubt_all(self) -> None:
        """All is sent again."""
        self._changed.set_all()

    def enter(self, offset_bytes: int, digests: bytes) -> None:  # noqa: ARG002
        """The tracker's table is filled by who knows that nothing has to be sent."""
        self._changed.set_all()

    def close(self) -> None:
        """The table is the tracker's."""
