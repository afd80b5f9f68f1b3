"""The root of what a device holds now, read whole past all caches.

Owns the pass over the device for those who have no agent. Decides nothing, writes nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

from agent.certificate.roots import NODE_BYTES, level_above, root_of
from agent.device import io_error, open_error
from agent.errors import FailedPrecondition
from agent.reader import read_digests
from native.blockio import BlockDevice
from native.buffer import BufferPool
from native.chunk import CHUNK_BYTES, DIGEST_BYTES

_THREADS = 4
_BUFFER_BYTES = 1 << 20


def read_root(path: str, size_bytes: int, progress: Callable[[int, int], None]) -> bytes:
    """Return the root of the first `size_bytes`; `progress` gets (done, total) in bytes.

    As `agent.device.open_device`, without a configuration that forbids; FailedPrecondition
    DEVICE_TOO_SMALL, DataLoss DEVICE_IO_ERROR. Blocking; runs an event loop of its own.
    """
    try:
        device = BlockDevice(path)
    except OSError as error:
        raise open_error(path, error) from error
    with device:
        found = device.size_bytes()
        if found < size_bytes:
            raise FailedPrecondition(
                "DEVICE_TOO_SMALL",
                f"{path} has {found} bytes, the volume {size_bytes}: name the device that the "
                "volume was copied to or from",
                path=path,
                size_bytes=found,
                volume_bytes=size_bytes,
            )
        return asyncio.run(_read(device, size_bytes, progress))


async def _read(
    device: BlockDevice, size_bytes: int, progress: Callable[[int, int], None]
) -> bytes:
    leaves, nodes = bytearray(), bytearray()
    with closing(BufferPool(_BUFFER_BYTES, _THREADS)) as pool, ThreadPoolExecutor(_THREADS) as own:
        try:
            async for offset, digests in read_digests(device, size_bytes, pool, own):
                # In order, so that whole nodes can be made while more is read: bounded memory.
                leaves += digests
                nodes += _whole_nodes(leaves)
                done = offset + len(digests) // DIGEST_BYTES * CHUNK_BYTES
                progress(min(done, size_bytes), size_bytes)
        except OSError as error:
            raise io_error("device", error) from error
    return root_of(bytes(nodes) + level_above(bytes(leaves)), size_bytes)


def _whole_nodes(leaves: bytearray) -> bytes:
    """Return the nodes above the leaves that fill nodes, and take those leaves out."""
    whole = len(leaves) // NODE_BYTES * NODE_BYTES
    nodes = level_above(bytes(leaves[:whole]))
    del leaves[:whole]
    return nodes
