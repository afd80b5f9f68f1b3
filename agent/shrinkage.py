"""A target that is smaller than its source: measured, and proved to hold all that is there.

Owns how much of a source is copied then, and the question, asked at the start and again at the
cutover, whether anything lies behind that. Writes nothing; what is written at the target's end is
for `agent.target.growth`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace

from agent.device import io_error, open_device
from agent.disk import OpenSource, SourceDisk
from agent.errors import FailedPrecondition
from agent.layout.partitions import Scheme
from agent.layout.reach import Reach, find_reach
from agent.layout.superblock import Kind, find_kinds
from agent.migration import Volume
from agent.peer import DiskSize, Peer
from agent.resize import reads
from native.blockio import BlockDevice

_log = logging.getLogger(__name__)


def measure(paths: Sequence[str], allowed: tuple[str, ...]) -> list[DiskSize]:
    """Return how large disks of this host are. The domain's errors; blocking. Claims nothing."""
    found = []
    for path in paths:
        with open_device(path, allowed) as device:
            found.append(DiskSize(device.size_bytes(), device.logical_block_size_bytes))
    return found


async def fit(sources: list[OpenSource], peer: Peer) -> list[OpenSource]:
    """Return the sources, each with no more of it to be copied than its target can hold.

    FailedPrecondition SOURCE_DOES_NOT_FIT, DataLoss SOURCE_IO_ERROR, and the peer's errors.
    """
    targets = await peer.measure([source.volume.target for source in sources])
    pairs = zip(sources, targets, strict=True)
    return [await asyncio.to_thread(_cut, *pair) for pair in pairs]


def _cut(source: OpenSource, target: DiskSize) -> OpenSource:
    volume = source.volume
    if target.size_bytes >= volume.size_bytes:
        return source
    # What is left over at the end of one with smaller sectors could not be read at the source.
    room = target.size_bytes - target.size_bytes % source.device.logical_block_size_bytes
    reach = _check(source.device, replace(volume, size_bytes=room), settled=False)
    is_bare = reach.scheme is Scheme.NONE
    if not is_bare and target.sector_bytes != source.device.logical_block_size_bytes:
        raise _does_not_fit(
            volume,
            room,
            f"a partition table in sectors of {source.device.logical_block_size_bytes} bytes, that "
            f"a target with sectors of {target.sector_bytes} cannot have",
            None,
        )
    _log.info(
        "cut source=%s size_bytes=%s target_bytes=%s end_bytes=%s",
        volume.source,
        volume.size_bytes,
        room,
        reach.end_bytes,
    )
    shorter = replace(volume, size_bytes=room, cut_bytes=volume.size_bytes - room)
    return replace(source, volume=shorter)


def check_fits(disk: SourceDisk) -> None:
    """Look again, once nothing writes any more: FailedPrecondition SOURCE_DOES_NOT_FIT. Blocking.

    Of a source that is copied whole nothing is asked.
    """
    if disk.volume.cut_bytes:
        _check(disk.device, disk.volume, settled=True)


def _check(device: BlockDevice, volume: Volume, *, settled: bool) -> Reach:
    """Return how far the source reaches, which is within the size of the volume."""
    sector_bytes = device.logical_block_size_bytes
    read, room = reads(device), volume.size_bytes
    try:
        reach = find_reach(read, device.size_bytes(), sector_bytes, settled=settled)
        if Kind.RAID in find_kinds(read, 0, room):  # what is in the middle here would be the end
            reach = Reach("what would make its end look like that of a RAID's member", None)
    except OSError as error:
        raise io_error("source", error) from error
    if reach.end_bytes is None or reach.end_bytes > volume.size_bytes:
        raise _does_not_fit(volume, volume.size_bytes, reach.what, reach.end_bytes)
    return reach


def _does_not_fit(
    volume: Volume, room_bytes: int, what: str, end_bytes: int | None
) -> FailedPrecondition:
    ends = "" if end_bytes is None else f", which ends at {end_bytes}"
    return FailedPrecondition(
        "SOURCE_DOES_NOT_FIT",
        f"target {volume.target} has room for {room_bytes} bytes, and on source {volume.source} "
        f"is {what}{ends}; name a larger target, or shrink it in the guest first",
        source=volume.source,
        target=volume.target,
        size_bytes=room_bytes,
        needed_bytes=end_bytes or 0,
        what=what,
    )
