"""Frames: many extents of one volume in one message.

Layout, little endian (the struct stands in frame_impl.h and is the reference):
header 64 bytes: magic "WSF1", version u16, kind u16, volume u32, extent count u32, generation u64,
sequence u64, payload length u32, flags u32, reserved u64, checksum 16 bytes (XXH3-128 over the
header with this field zero, the extent table and the payload); then the extent table, 24 bytes an
entry: offset u64, length u64, kind u32 (DATA, ZERO, DISCARD), reserved u32; then the payload of all
DATA extents, one after the other. Extents ascend and do not overlap. Flags and reserved fields
are 0.
A frame must not be changed by another thread while it is in use here.
"""

from array import array
from typing import NamedTuple

from typing_extensions import Buffer

from native.bitmap import DirtyBitmap
from native.blockio import BlockDevice, Unread
from native.buffer import AlignedBuffer

MAX_PAYLOAD_BYTES: int
MAX_EXTENTS: int
MAX_FRAME_BYTES: int
DATA: int
ZERO: int
DISCARD: int

class FrameError(ValueError):
    """A frame that is corrupt, truncated, too large, out of range or not the one expected."""

class FrameHeader(NamedTuple):
    """What a frame says of itself (verified)."""

    volume: int
    generation: int
    sequence: int
    extent_count: int
    payload_bytes: int

class Applied(NamedTuple):
    """What scatter did to the device."""

    data_bytes: int
    zero_bytes: int
    discard_bytes: int

def gather(
    device: BlockDevice,
    extents: array[int],
    scratch: AlignedBuffer,
    *,
    volume: int,
    generation: int,
    sequence: int,
    digests: Buffer | None = None,
    stale: DirtyBitmap | None = None,
    size_bytes: int | None = None,
    min_zero_bytes: int = 65536,
    unread: list[Unread] | None = None,
) -> bytes:
    """Read `extents` (array("Q") of offset, length) and return one frame.

    Zero runs of at least `min_zero_bytes` (and extents that are zero altogether) become ZERO
    extents. `scratch` must hold all of the extents. With `digests`, a writable table of
    chunk.DIGEST_BYTES for each chunk.CHUNK_BYTES of the volume, the digest of each chunk is stored
    as it was read, zero chunks as ZERO_DIGEST; extents must then start and end on chunk borders
    (or at the end of the volume, `size_bytes` or all of the device), else ValueError. With `stale`
    as well (blocks of chunks), extents may be anything: whole chunks are entered and their marks
    cleared, others left alone. The table then says what was read, not what arrived: a frame that is
    not delivered must be sent again, whatever a scan says.
    ValueError for extents that do not ascend, overlap, are empty or together longer than
    MAX_PAYLOAD_BYTES. OSError from the device; with `unread`, what cannot be read is left out of
    the frame and appended to the list instead, in whole 4096 bytes (or whole chunks, with
    `digests`: their entries stay as they were), unless the device fails as a whole or more than
    blockio.MAX_UNREAD of them do.
    """

def zeros(extents: array[int], *, volume: int, generation: int, sequence: int) -> bytes:
    """Return a frame of ZERO extents: for holes, which need no reading."""

def route(frame: Buffer) -> tuple[int, int]:
    """Return (volume, sequence) as the header says: where to scatter to, which then verifies it.

    FrameError if the frame is shorter than a header.
    """

def inspect(frame: Buffer) -> FrameHeader:
    """Verify everything that can be without a device, checksum included. FrameError."""

def extents(frame: Buffer) -> list[tuple[int, int, int]]:
    """Return (offset, length, kind) of each extent of a verified frame. FrameError."""

def scatter(
    device: BlockDevice,
    frame: Buffer,
    scratch: AlignedBuffer,
    *,
    size_bytes: int,
    volume: int,
    generation: int,
    written: DirtyBitmap | None = None,
) -> Applied:
    """Verify the frame, then mark its extents in `written`, then write it.

    Nothing is written unless all of it is valid.

    FrameError if it is damaged, of another volume or generation, or reaches beyond `size_bytes`
    (the volume's size, which may be less than the device's), or has extents that are not on borders
    of the device's logical blocks; only the end of the volume may fall within one, and what is
    behind it stays. DISCARD extents are discarded, or zeroed where the device cannot. ValueError if
    `scratch` is smaller than the payload. OSError from the device; EIO if it is smaller than
    `size_bytes`.
    """
