"""The tree of digests over a volume, whose root stands for all of its bytes. Pure.

Owns the tree's shape, which docs/certificate.md describes for third parties. Leaves are the
digests of the volume's chunks as `native.chunk` and `native.scan` return them: XXH3-128, and
ZERO_DIGEST for a chunk of zeros. Never reads a device.
"""

from __future__ import annotations

import struct

from native.chunk import CHUNK_BYTES, DIGEST_BYTES, xxh3_128

ALGORITHM = "xxh3-128-tree"
FANOUT = 4096
"""Digests below one node: 64 KiB of them, for leaves 256 MiB of the volume."""

NODE_BYTES = FANOUT * DIGEST_BYTES


def leaf_count(size_bytes: int) -> int:
    """Return how many chunks a volume has; the last may be short. ValueError below one byte."""
    if size_bytes < 1:
        raise ValueError(f"a volume of {size_bytes} bytes has no root")
    return -(-size_bytes // CHUNK_BYTES)


def node_count(size_bytes: int) -> int:
    """Return how many nodes the level above the leaves has. ValueError."""
    return -(-leaf_count(size_bytes) // FANOUT)


def node_of(leaves: bytes) -> bytes:
    """Return the node above 1 to FANOUT digests, of leaves or of nodes. ValueError."""
    if not 0 < len(leaves) <= NODE_BYTES or len(leaves) % DIGEST_BYTES:
        raise ValueError(f"a node stands above 1 to {FANOUT} digests, not {len(leaves)} bytes")
    return xxh3_128(leaves)


def level_above(digests: bytes) -> bytes:
    """Return the nodes above any number of digests, one after the other. ValueError."""
    view = memoryview(digests)
    return b"".join(
        node_of(bytes(view[at : at + NODE_BYTES])) for at in range(0, len(view), NODE_BYTES)
    )


def root_of(nodes: bytes, size_bytes: int) -> bytes:
    """Return the root above the first level of nodes (`node_count` of them). ValueError.

    The size is part of it: the same tree over another number of bytes has another root.
    """
    expected = node_count(size_bytes) * DIGEST_BYTES
    if len(nodes) != expected:
        raise ValueError(f"{size_bytes} bytes have {expected} bytes of nodes, not {len(nodes)}")
    while len(nodes) > DIGEST_BYTES:
        nodes = level_above(nodes)
    return xxh3_128(struct.pack("<Q", size_bytes) + nodes)
