"""Compares the two ends digest by digest, while nothing is being sent.

Owns what a difference means: pending if it was held back or marked since, a mismatch otherwise.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace

from agent.device import io_error
from agent.disk import SourceDisk
from agent.errors import DataLoss
from agent.migration import Comparison, Mismatch
from agent.peer import Peer
from agent.reader import read_digests
from agent.sender import Sender, Workshop
from native.chunk import CHUNK_BYTES, DIGEST_BYTES

MAX_MISMATCHES = 100
_MARK_SECONDS = 2.0
"""A write is visible a moment before its completion is marked; nothing takes longer than this."""


async def compare_ends(
    sender: Sender, workshop: Workshop, peer: Peer, token: str, *, settled: bool
) -> AsyncIterator[Comparison]:
    """Iterate the progress of comparing all volumes; the last item is `done`.

    `settled`: after the cutover, when every difference is a mismatch.
    """
    total = sum(disk.volume.size_bytes for disk in sender.disks)
    found = Comparison(0, total, 0, 0, (), done=False)
    for volume, disk in enumerate(sender.disks):
        size = disk.volume.size_bytes
        own = read_digests(disk.device, size, workshop.pool, workshop.threads)
        try:
            async for offset, theirs in peer.digests(token, volume):
                ours = await next_digests(own, offset)
                for chunk in _differing(ours, theirs):
                    found = await _judge(found, workshop, disk, offset + chunk, settled=settled)
                compared = min(len(ours) // DIGEST_BYTES * CHUNK_BYTES, size - offset)
                found = replace(found, compared_bytes=found.compared_bytes + compared)
                yield found
        finally:
            await own.aclose()
    if found.compared_bytes != total:
        raise DataLoss(
            "DIGESTS_MISSING",
            f"the target sent digests of {found.compared_bytes} bytes, not {total}; "
            "run the same version on both hosts",
        )
    yield replace(found, done=True)


async def next_digests(own: AsyncGenerator[tuple[int, bytes], None], expected: int) -> bytes:
    """Return our digests of where the target's are from. DIGESTS_MISSING, SOURCE_IO_ERROR."""
    try:
        offset, digests = await anext(own)
    except OSError as error:
        raise io_error("source", error) from error
    if offset != expected:
        raise DataLoss(
            "DIGESTS_MISSING",
            f"the target sent digests of offset {expected}, not {offset}; "
            "run the same version on both hosts",
        )
    return digests


def _differing(ours: bytes, theirs: bytes) -> list[int]:
    if ours == theirs:
        return []
    return [
        i // DIGEST_BYTES * CHUNK_BYTES
        for i in range(0, max(len(ours), len(theirs)), DIGEST_BYTES)
        if ours[i : i + DIGEST_BYTES] != theirs[i : i + DIGEST_BYTES]
    ]


async def _judge(
    found: Comparison, workshop: Workshop, disk: SourceDisk, offset: int, *, settled: bool
) -> Comparison:
    length = min(CHUNK_BYTES, disk.volume.size_bytes - offset)
    if not settled and await _is_marked_soon(workshop, disk, offset, length):
        return replace(found, pending_bytes=found.pending_bytes + length)
    mismatches = found.mismatches
    if len(mismatches) < MAX_MISMATCHES:
        mismatches += (Mismatch(disk.volume.source, offset, length),)
    return replace(found, mismatched_bytes=found.mismatched_bytes + length, mismatches=mismatches)


async def _is_marked_soon(workshop: Workshop, disk: SourceDisk, offset: int, length: int) -> bool:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _MARK_SECONDS
    while not await loop.run_in_executor(workshop.threads, disk.is_pending, offset, length):
        if loop.time() > deadline:
            return False
        await asyncio.sleep(0.02)
    return True
