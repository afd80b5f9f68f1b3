"""The tree's root against a twin that is written down as docs/certificate.md says it."""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from agent.certificate.roots import FANOUT, level_above, node_count, node_of, root_of
from native.chunk import CHUNK_BYTES, DIGEST_BYTES, digests

GIB = 1 << 30


def twin_level(digests: Sequence[bytes]) -> list[bytes]:
    groups = [digests[at : at + 4096] for at in range(0, len(digests), 4096)]
    return [xxhash.xxh3_128_digest(b"".join(group)) for group in groups]


def twin_root(leaves: Sequence[bytes], size_bytes: int) -> bytes:
    level = twin_level(leaves)
    while len(level) > 1:
        level = twin_level(level)
    return xxhash.xxh3_128_digest(size_bytes.to_bytes(8, "little") + level[0])


def twin_leaf(chunk: bytes) -> bytes:
    return xxhash.xxh3_128_digest(chunk) if any(chunk) else bytes(16)


def root_of_leaves(leaves: bytes, size_bytes: int) -> bytes:
    return root_of(level_above(leaves), size_bytes)


def some_leaves(count: int, seed: int = 0) -> list[bytes]:
    return [struct.pack("<QQ", seed, at) for at in range(count)]


@given(
    chunks=st.lists(st.sampled_from([bytes(CHUNK_BYTES), b"a" * CHUNK_BYTES]), max_size=3),
    last=st.binary(min_size=1, max_size=200),
)
def test_bytes_to_root(chunks: list[bytes], last: bytes) -> None:
    content = b"".join(chunks) + last
    leaves = [twin_leaf(chunk) for chunk in [*chunks, last]]
    assert root_of_leaves(digests(content), len(content)) == twin_root(leaves, len(content))


@pytest.mark.parametrize("count", [1, 2, 4095, 4096, 4097, 8192, 8193])
def test_leaves_to_root(count: int) -> None:
    leaves, size = some_leaves(count), count * CHUNK_BYTES - 1
    assert root_of_leaves(b"".join(leaves), size) == twin_root(leaves, size)


@pytest.mark.parametrize("nodes", [2, 4096, 4097, 9000])
def test_nodes_to_root(nodes: int) -> None:
    """Volumes so large that there are levels between: 4097 nodes are above 1 TiB."""
    size = nodes * FANOUT * CHUNK_BYTES
    level = some_leaves(nodes)
    above = level
    while len(above) > 1:
        above = twin_level(above)
    expected = xxhash.xxh3_128_digest(size.to_bytes(8, "little") + above[0])
    assert root_of(b"".join(level), size) == expected


@pytest.mark.parametrize("size", [1, 65536, 65537, 300_000])
def test_the_documents_code_is_right(size: int) -> None:
    page = (Path(__file__).parents[3] / "docs/certificate.md").read_text()
    (code,) = re.findall(r"```python\n(def root.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {"xxhash": xxhash}
    exec(code, names)
    content = (bytes(100_000) + b"x" * 200_000)[:size]
    assert names["root"](io.BytesIO(content), size) == root_of_leaves(digests(content), size)


def test_the_root_is_what_it_was() -> None:
    """The golden ones: whoever changes them breaks all certificates that were ever given."""
    assert root_of_leaves(bytes(16), 1).hex() == GOLDEN["one zero"]
    content = bytes(range(256)) * 256 + bytes(CHUNK_BYTES) + b"end"
    assert root_of_leaves(digests(content), len(content)).hex() == GOLDEN["three chunks"]
    assert root_of(bytes(range(256)) * 16, 256 * FANOUT * CHUNK_BYTES).hex() == GOLDEN["nodes"]


GOLDEN = {
    "one zero": "0affaae98c53fa7297ce9e776e7c8107",
    "three chunks": "b5bde8905771c37128b3c946b87cfbaa",
    "nodes": "d26b23d288fcb1498098672599fc5faa",
}


@given(
    count=st.integers(1, 5000), at=st.integers(0, 1 << 20), bit=st.integers(0, 127), data=st.data()
)
def test_every_leaf_counts(count: int, at: int, bit: int, data: st.DataObject) -> None:
    leaves = bytearray(b"".join(some_leaves(count)))
    before = root_of_leaves(bytes(leaves), count * CHUNK_BYTES)
    place = at % count * DIGEST_BYTES + bit // 8
    leaves[place] ^= 1 << bit % 8
    assert root_of_leaves(bytes(leaves), count * CHUNK_BYTES) != before


def test_the_size_counts() -> None:
    leaves = b"".join(some_leaves(3))
    roots = {root_of_leaves(leaves, 2 * CHUNK_BYTES + size) for size in (1, 2, CHUNK_BYTES)}
    assert len(roots) == 3


@pytest.mark.parametrize(
    ("size_bytes", "count"),
    [
        (1, 1),
        (CHUNK_BYTES, 1),
        (GIB // 4, 1),
        (GIB // 4 + 1, 2),
        (GIB, 4),
        (1024 * GIB, 4096),
        ((1 << 63) - 1, 1 << 35),
    ],
)
def test_node_counts(size_bytes: int, count: int) -> None:
    assert node_count(size_bytes) == count


@pytest.mark.parametrize("size_bytes", [0, -1])
def test_an_empty_volume_has_no_tree(size_bytes: int) -> None:
    with pytest.raises(ValueError, match="has no root"):
        node_count(size_bytes)
    with pytest.raises(ValueError, match="has no root"):
        root_of(bytes(16), size_bytes)


@pytest.mark.parametrize("length", [0, 1, 15, 17, 65536 + 16])
def test_what_is_no_node(length: int) -> None:
    with pytest.raises(ValueError, match="1 to 4096 digests"):
        node_of(bytes(length))


@pytest.mark.parametrize("length", [0, 16, 31, 48])
def test_what_is_no_level(length: int) -> None:
    with pytest.raises(ValueError, match="32 bytes of nodes"):
        root_of(bytes(length), GIB // 4 + 1)
