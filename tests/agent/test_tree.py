"""A tree of digests against what the device holds: where it does not say *stale*, it is right."""

from __future__ import annotations

import random
from array import array
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import tree as tree_module
from agent.imprint import read_root
from agent.store import Store
from agent.tree import DigestTree, KeptTree
from native.bitmap import DirtyBitmap
from native.blockio import BlockDevice
from native.buffer import AlignedBuffer
from native.chunk import CHUNK_BYTES, DIGEST_BYTES, digests
from native.frame import gather
from tests import devices

BLOCK = 4096
SIZE = 20 * CHUNK_BYTES + 3 * BLOCK


class Model:
    """A volume, its tree, and who writes to it, sends it and reads it back."""

    def __init__(self, path: Path, seed: int) -> None:
        self.path, self.rng = path, random.Random(seed)
        self.store = Store(path.parent / "state", "v")
        self.tree = DigestTree(SIZE, self.store)
        self.tree.start()
        self.scratch = AlignedBuffer(1 << 20)
        self.device = BlockDevice(str(path))

    def blocks(self) -> tuple[int, int]:
        first = self.rng.randrange(SIZE // BLOCK)
        count = self.rng.choice((1, 3, 16, 40))
        return first * BLOCK, min(count * BLOCK, SIZE - first * BLOCK)

    def write(self) -> DirtyBitmap:
        """Change some blocks, and doubt them."""
        offset, length = self.blocks()
        with self.path.open("r+b") as file:
            file.seek(offset)
            file.write(self.rng.choice((bytes(length), self.rng.randbytes(length))))
        marks = DirtyBitmap(SIZE, BLOCK)
        marks.set_range(offset, length)
        self.tree.doubt(marks)
        return marks

    def send(self) -> None:
        """Change some, and read them for sending."""
        self.send_marked(self.write())

    def send_marked(self, marks: DirtyBitmap) -> None:
        """Read for sending."""
        self.tree.doubt(marks)
        for offset, length in marks.extents():
            pairs = array("Q", (offset, length))
            gather(
                self.device,
                pairs,
                self.scratch,
                volume=0,
                generation=1,
                sequence=1,
                digests=self.tree.table,
                stale=self.tree.stale,
            )

    def read(self) -> None:
        """Read the first step of what is stale."""
        for offset, length in self.tree.steps():
            self.tree.read(self.device, offset, length, self.scratch)
            break

    def enter(self) -> None:
        """What a comparison has read."""
        offset = self.rng.randrange(SIZE // CHUNK_BYTES) * CHUNK_BYTES
        data = self.path.read_bytes()[offset : offset + 3 * CHUNK_BYTES]
        self.tree.enter(offset, digests(data))

    def skip(self) -> None:
        self.tree.skip_holes(self.device)

    def ask(self) -> None:
        """A root in between, as of a cutover that was refused."""
        self.tree.root()

    def restart(self) -> None:
        """The agent ends and is started again."""
        self.tree = DigestTree(SIZE, self.store)
        self.tree.resume()

    def forget(self) -> None:
        self.tree.doubt_all()

    def settle(self) -> None:
        self.tree.skip_holes(self.device)
        for offset, length in self.tree.steps():
            self.tree.read(self.device, offset, length, self.scratch)


STEPS = st.lists(
    st.sampled_from(
        ["write", "send", "read", "enter", "skip", "ask", "restart", "forget", "settle"]
    ),
    max_size=25,
)


@given(seed=st.integers(0, 2**32), steps=STEPS)
def test_a_root_is_that_of_the_bytes(seed: int, steps: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch, devices.image_file(SIZE) as path:
        # So that holes are asked for.
        patch.setattr(tree_module, "_SPARSE_BYTES", CHUNK_BYTES)
        model = Model(path, seed)
        with model.device:
            for step in steps:
                getattr(model, step)()
                fresh = model.tree.stale
                table, data = bytes(model.tree.table), path.read_bytes()
                for index in range(-(-SIZE // CHUNK_BYTES)):
                    if not fresh.is_marked(index * CHUNK_BYTES):
                        piece = data[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
                        at = index * DIGEST_BYTES
                        assert table[at : at + DIGEST_BYTES] == digests(piece), (step, index)
            model.settle()
            assert model.tree.count_unread() == 0
            assert model.tree.root() == read_root(str(path), SIZE, lambda done, total: None)


@given(seed=st.integers(0, 2**32), rounds=st.integers(1, 5))
def test_nodes_are_made_anew_where_entries_were(seed: int, rounds: int) -> None:
    """Over 3 nodes of 256 MiB; the table is the device here."""
    rng = random.Random(seed)
    size = 2 * tree_module.NODE_SPAN_BYTES + 3 * CHUNK_BYTES + 512
    tree, twin = DigestTree(size, Store(None)), DigestTree(size, Store(None))
    tree.start()
    twin.start()
    entered: dict[int, bytes] = {}
    for _ in range(rounds):
        offset = rng.choice((0, 4095, 4096, 8191, 8192, 8195)) * CHUNK_BYTES
        entered[offset] = rng.randbytes(DIGEST_BYTES)
        tree.enter(offset, entered[offset])
        twin.start()
        for at, digest in entered.items():
            twin.enter(at, digest)
        assert tree.root() == twin.root()


@pytest.fixture
def model(tmp_path: Path) -> Model:
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return Model(path, 1)


def test_a_read_that_is_overtaken_is_not_believed(model: Model) -> None:
    """It began before a round, and is entered after what the round has read."""
    tree, chunk = model.tree, slice(0, DIGEST_BYTES)
    with model.device:
        model.settle()
        old = bytes(memoryview(tree.table)[chunk])
        tree._reading.set_range(0, CHUNK_BYTES)  # as refresh does, before it reads
        with model.path.open("r+b") as file:
            file.write(b"changed")
        marks = DirtyBitmap(SIZE, BLOCK)
        marks.set_range(0, 2 * CHUNK_BYTES)
        model.send_marked(marks)
        assert not tree.stale.is_marked(0)
        memoryview(tree.table)[chunk] = old  # entered only now
        tree._reading.clear_range(0, CHUNK_BYTES)
        tree.doubt_overtaken()  # the round is durable
        assert tree.stale.is_marked(0)
        assert not tree.stale.is_marked(CHUNK_BYTES)
        model.settle()
        assert tree.root() == read_root(str(model.path), SIZE, lambda done, total: None)


def test_what_is_sent_is_in_the_next_root(model: Model) -> None:
    """Entered past the tree, in whole chunks: nothing is left to be read."""
    with model.device:
        model.settle()
        model.tree.root()
        marks = DirtyBitmap(SIZE, BLOCK)
        marks.set_range(0, CHUNK_BYTES)
        with model.path.open("r+b") as file:
            file.write(b"changed")
        model.send_marked(marks)
        assert model.tree.count_unread() == 0
        assert model.tree.root() == read_root(str(model.path), SIZE, lambda done, total: None)


def test_what_was_being_read_at_the_end_is_stale(model: Model) -> None:
    with model.device:
        model.settle()
        model.tree._reading.set_range(5 * CHUNK_BYTES, CHUNK_BYTES)
        model.restart()
        assert list(model.tree.stale.extents()) == [(5 * CHUNK_BYTES, CHUNK_BYTES)]
        assert model.tree._reading.count() == 0


def test_a_table_of_another_size_is_not_taken_up(model: Model) -> None:
    model.device.close()
    with pytest.raises(OSError):  # noqa: PT011
        DigestTree(SIZE + CHUNK_BYTES, model.store).resume()


def test_the_last_says_where_and_what(model: Model) -> None:
    """The same bytes elsewhere are something else."""
    found = []
    with model.device:
        data = bytes(model.path.read_bytes()[:CHUNK_BYTES])
        model.path.write_bytes(data * (SIZE // CHUNK_BYTES) + data[: SIZE % CHUNK_BYTES])
        for chunk in (3, 4):
            marks = DirtyBitmap(SIZE, BLOCK)
            marks.set_range(chunk * CHUNK_BYTES + BLOCK, 1)
            model.tree.doubt_only(marks)
            assert model.tree.count_unread() == CHUNK_BYTES
            model.settle()
            found.append(model.tree.digest_of_last())
        assert found[0] != found[1]
        model.tree.doubt_only(DirtyBitmap(SIZE, BLOCK))
        assert model.tree.digest_of_last() == bytes(DIGEST_BYTES)


def test_a_kept_table_is_never_written(model: Model) -> None:
    table = bytearray(21 * DIGEST_BYTES)
    tree = KeptTree(SIZE, model.store, table)
    with model.device:
        before = tree.root()
        tree.doubt_all()
        tree.enter(0, b"x" * DIGEST_BYTES)
        assert list(tree.steps()) == []
        assert (bytes(table), tree.count_unread()) == (bytes(21 * DIGEST_BYTES), 0)
        table[:DIGEST_BYTES] = b"y" * DIGEST_BYTES
        marks = DirtyBitmap(SIZE, BLOCK)
        marks.set_range(0, 1)
        tree.doubt(marks)  # sent
        assert tree.root() != before
