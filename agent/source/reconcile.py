"""Finds out what differs where nobody knows, so that only that is sent.

Owns the comparison of a doubtful volume with what the target holds. What is not found equal stays
pending. Both sides read at once, near the speed of the slower disk; memory is bounded.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Container, Iterator

from agent.peer import Peer
from agent.reader import read_digests
from agent.sender import Sender, Workshop
from agent.source.verify import next_digests
from native.chunk import CHUNK_BYTES, DIGEST_BYTES


async def reconcile(
    sender: Sender, workshop: Workshop, peer: Peer, token: str
) -> AsyncIterator[tuple[int, int]]:
    """Compare all volumes chunk by chunk; iterate (bytes compared, bytes found equal) so far.

    The tracker has to be on, and nothing may be sent meanwhile: a write after a chunk was read is
    marked, and taken with the next take.
    """
    compared = equal = 0
    await sender.on_disks(lambda disk: disk.follow())
    for volume, disk in enumerate(sender.disks):
        size = disk.volume.size_bytes
        unread: set[int] = set()
        own = read_digests(disk.device, size, workshop.pool, workshop.threads, unread)
        try:
            async for offset, theirs in peer.digests(token, volume):
                ours = await next_digests(own, offset)
                # What cannot be read may differ: it stays pending, and is tried again in a round.
                bad = {(at - offset) // CHUNK_BYTES for at in unread if at >= offset}
                for first, count in equal_runs(ours, theirs, bad):
                    start = offset + first * CHUNK_BYTES
                    length = min(count * CHUNK_BYTES, size - start)
                    found = ours[first * DIGEST_BYTES : (first + count) * DIGEST_BYTES]
                    disk.believe(start, length, found)
                    equal += length
                compared += min(len(ours) // DIGEST_BYTES * CHUNK_BYTES, size - offset)
                await sender.wait_until_running()
                yield compared, equal
        finally:
            await own.aclose()


def equal_runs(
    ours: bytes, theirs: bytes, unread: Container[int] = ()
) -> Iterator[tuple[int, int]]:
    """Iterate (first chunk, count) of runs of equal digests; no chunk of `unread` is in one."""
    count = min(len(ours), len(theirs)) // DIGEST_BYTES
    begun = None
    for i in range(count + 1):
        at = i * DIGEST_BYTES
        same = (
            i < count
            and i not in unread
            and ours[at : at + DIGEST_BYTES] == theirs[at : at + DIGEST_BYTES]
        )
        if same and begun is None:
            begun = i
        elif not same and begun is not None:
            yield begun, i - begun
            begun = None
