"""Compares the two ends digest by digest, while nothing is being sent.

Owns what a difference means: pending if it was held back or marked since, a mismatch otherwise. A
chunk that the source cannot read is neither, and never counts as compared.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Container
from dataclasses import replace

from agent.device import io_error
from agent.disk import SourceDisk
from agent.errors import DataLoss
from agent.migration import Comparison, Mismatch, UnreadRange
from agent.peer import Peer
from agent.reader import read_digests
from agent.sender import Sender, Workshop
from native.chunk import CHUNK_BYTES, DIGEST_BYTES

MAX_MISMATCHES = 100
"""How many ranges are named, of those that differ and of those that cannot be read."""
_MARK_SECONDS = 2.0
"""A write is visible a moment before its completion is marked; nothing takes longer than this."""


async def compare_ends(
    sender: Sender, workshop: Workshop, peer: Peer, token: str, *, settled: bool
) -> AsyncIterator[Comparison]:
    """Iterate the progress of comparing all volumes; the last item is `done`.

    `settled`: after the cutover, when every difference is a mismatch. SOURCE_IO_ERROR if more than
    256 chunks of a source cannot be read, TARGET_IO_ERROR, DIGESTS_MISSING.
    """
    total = sum(disk.volume.size_bytes for disk in sender.disks)
    found = Comparison(0, total, 0, 0, 0, (), (), done=False)
    await sender.on_disks(SourceDisk.follow)
    for volume, disk in enumerate(sender.disks):
        size = disk.volume.size_bytes
        unread: set[int] = set()
        own = read_digests(disk.device, size, workshop.pool, workshop.threads, unread)
        try:
            async for offset, theirs in peer.digests(token, volume):
                ours = await next_digests(own, offset)
                before = found.unread_bytes
                for at in _differing(ours, theirs, offset, unread):
                    found = await _judge(found, workshop, disk, at, settled=settled)
                length = min(len(ours) // DIGEST_BYTES * CHUNK_BYTES, size - offset)
                # Reading ahead may have met more of them: those come with their own digests.
                for at in sorted(at for at in unread if offset <= at < offset + length):
                    found = _leave_out(found, disk, at)
                compared = length - (found.unread_bytes - before)
                found = replace(found, compared_bytes=found.compared_bytes + compared)
                yield found
        finally:
            await own.aclose()
    if (seen := found.compared_bytes + found.unread_bytes) != total:
        raise DataLoss(
            "DIGESTS_MISSING",
            f"the target sent digests of {seen} bytes, not {total}; "
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


def _differing(ours: bytes, theirs: bytes, offset: int, unread: Container[int]) -> list[int]:
    if ours == theirs:
        return []
    return [
        at
        for i in range(0, max(len(ours), len(theirs)), DIGEST_BYTES)
        if (at := offset + i // DIGEST_BYTES * CHUNK_BYTES) not in unread
        and ours[i : i + DIGEST_BYTES] != theirs[i : i + DIGEST_BYTES]
    ]


def _leave_out(found: Comparison, disk: SourceDisk, offset: int) -> Comparison:
    length = min(CHUNK_BYTES, disk.volume.size_bytes - offset)
    unread = found.unread
    if len(unread) < MAX_MISMATCHES:
        unread += (UnreadRange(disk.volume.source, offset, length),)
    return replace(found, unread_bytes=found.unread_bytes + length, unread=unread)


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
