"""The log of an XFS: whether a mount would find changes in it that are not in their place yet.

Owns its format as far as that needs it. Never writes; what it is given may be anything. Pure.

Format: XFS Algorithms and Data Structures, chapter 14 (journaling log); the question is asked as
xlog_check_unmount_rec of the kernel does: is the last record the one that an unmount writes?
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from agent.layout.superblock import Read

_BLOCK_BYTES = 512
_STEP_BYTES = 1 << 20
_MAGIC = b"\xfe\xed\xba\xbe"
_HEADED_BYTES = 32768
"""What one header block can tell of; a larger record has more of them."""
_UNMOUNT = 0x20
_MOST_BYTES = 2 << 30
"""No XFS has a larger log; what a guest writes there is not read for hours."""


def is_log_clean(read: Read, start_bytes: int) -> bool:
    """Return whether the log holds nothing to be replayed; False if it is not on this disk.

    `start_bytes` is where a file system begins whose superblock was found whole. Reads all of it.
    """
    head = read(start_bytes, _BLOCK_BYTES)
    name = head[32:48]
    block_bytes, total = struct.unpack_from(">IQ", head, 4)
    (first,) = struct.unpack_from(">Q", head, 48)
    (group_blocks,) = struct.unpack_from(">I", head, 84)
    (blocks,) = struct.unpack_from(">I", head, 96)
    group, block = first >> head[124], first & ((1 << head[124]) - 1)
    place, size = group * group_blocks + block, blocks * block_bytes // _BLOCK_BYTES
    if first == 0 or place + blocks > total or size * _BLOCK_BYTES > _MOST_BYTES:
        return False
    log_bytes = start_bytes + place * block_bytes
    last = max(_records(read, log_bytes, size, name), default=None)
    if last is None:
        return False
    _, at, record = last
    return _is_unmount(read, log_bytes, size, at, record)


def _records(
    read: Read, log_bytes: int, size: int, name: bytes
) -> Iterator[tuple[int, int, bytes]]:
    """Iterate (sequence number, block, header) of the log's records; `size` is in blocks.

    The first word of each block is its cycle, whatever is logged there: this magic is a header's.
    """
    step = _STEP_BYTES // _BLOCK_BYTES
    for first in range(0, size, step):
        count = min(step, size - first)
        data = read(log_bytes + first * _BLOCK_BYTES, count * _BLOCK_BYTES)
        for at in range(0, len(data), _BLOCK_BYTES):
            if data[at : at + 4] != _MAGIC or data[at + 304 : at + 320] != name:
                continue
            block = first + at // _BLOCK_BYTES
            (number,) = struct.unpack_from(">Q", data, at + 16)
            if number & 0xFFFFFFFF == block:
                yield number, block, data[at : at + _BLOCK_BYTES]


def _is_unmount(read: Read, log_bytes: int, size: int, at: int, record: bytes) -> bool:
    version, operations = record[11] & 0xF, struct.unpack_from(">I", record, 40)[0]
    (most_bytes,) = struct.unpack_from(">I", record, 320)
    headers = max(-(-most_bytes // _HEADED_BYTES), 1) if version & 2 else 1
    if operations != 1 or headers >= size:
        return False
    data = read(log_bytes + (at + headers) % size * _BLOCK_BYTES, 16)
    return bool(data[9] & _UNMOUNT)
