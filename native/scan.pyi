"""Whole-range passes: digest a device's chunks, and compare them with a table."""

from typing_extensions import Buffer

from native.bitmap import DirtyBitmap
from native.blockio import BlockDevice
from native.buffer import AlignedBuffer

def digest(
    device: BlockDevice, offset_bytes: int, length_bytes: int, scratch: AlignedBuffer
) -> bytes:
    """Return chunk.DIGEST_BYTES a chunk of the range (ZERO_DIGEST for zeros; last may be short).

    The offset is a multiple of chunk.CHUNK_BYTES. Reads as much at a time as `scratch` holds.
    """

def compare(
    device: BlockDevice,
    offset_bytes: int,
    length_bytes: int,
    scratch: AlignedBuffer,
    table: Buffer,
    marks: DirtyBitmap,
) -> int:
    """Mark each chunk of the range whose digest is not the one in `table`; return bytes marked.

    A chunk that cannot be read may differ: it is marked. OSError if MAX_UNREAD // 4 (blockio) are.

    `table`: chunk.DIGEST_BYTES for each chunk of the whole device, read only here.
    """

def refresh(
    device: BlockDevice,
    offset_bytes: int,
    length_bytes: int,
    scratch: AlignedBuffer,
    table: Buffer,
    stale: DirtyBitmap,
    reading: DirtyBitmap,
) -> int:
    """Read the chunks of the range that are marked in `stale` again, and enter their digests.

    The mark is cleared before its chunk is read; set again where the read fails (OSError). Chunks
    in work are marked in `reading`, so that a process that is killed leaves no wrong entry
    unmarked. Blocks of both bitmaps are chunks. Threads may share them, and the (writable) table,
    for different ranges. Returns the bytes read.
    """

def compare_hole(
    offset_bytes: int, length_bytes: int, size_bytes: int, table: Buffer, marks: DirtyBitmap
) -> int:
    """The same for a range known to read as zeros: mark chunks whose entry is not ZERO_DIGEST.

    Chunks only partly in the range are marked if their entry is not ZERO_DIGEST.
    """
