"""Frames: many extents of one volume in one message."""

from collections import namedtuple

from cpython.buffer cimport (
    PyBUF_SIMPLE,
    PyBUF_WRITABLE,
    PyBuffer_Release,
    PyObject_GetBuffer,
)
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from libc.errno cimport EIO
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

from native.bitmap cimport DirtyBitmap, ws_bitmap, ws_bitmap_set_range
from native.blockio cimport (
    WS_UNREAD_MAX,
    BlockDevice,
    batch_bytes,
    ws_attempt,
    ws_dev_read_batch,
    ws_dev_salvage,
    ws_device,
    ws_salvage,
)
from native.buffer cimport AlignedBuffer
from native.chunk cimport WS_CHUNK_BYTES, WS_DIGEST_BYTES, init_chunk

cdef extern from "scan_impl.h" nogil:
    void ws_scan_note(const uint8_t *data, uint64_t offset, uint64_t length, uint64_t size_bytes,
                      uint8_t *table, const ws_bitmap *stale)

cdef extern from "frame_impl.h" nogil:
    enum:
        WS_FRAME_MAX_PAYLOAD
        WS_FRAME_MAX_EXTENTS
        WS_FRAME_MAX_BYTES
        WS_EXTENT_DATA
        WS_EXTENT_ZERO
        WS_EXTENT_DISCARD
    struct ws_frame_header:
        uint32_t volume
        uint32_t extent_count
        uint64_t generation
        uint64_t sequence
        uint32_t payload_bytes
    struct ws_frame_extent:
        uint64_t offset
        uint64_t length
        uint32_t kind
    struct ws_fault:
        const char *field
        const char *rule
        uint64_t found
        uint64_t wanted
        int64_t index
    struct ws_frame_plan:
        ws_frame_extent *table
        uint32_t count
        uint32_t payload_bytes
    struct ws_applied:
        uint64_t data_bytes
        uint64_t zero_bytes
        uint64_t discard_bytes
    int ws_pairs_check(const uint64_t *pairs, size_t count, ws_fault *fault)
    void ws_frame_plan_zeros(ws_frame_plan *plan, const uint64_t *pairs, size_t count)
    void ws_frame_plan_data(ws_frame_plan *plan, const uint64_t *pairs, size_t count,
                            const uint8_t *data, uint64_t min_zero)
    size_t ws_frame_size(const ws_frame_plan *plan)
    void ws_frame_build(const ws_frame_plan *plan, const ws_frame_header *header,
                        const uint8_t *data, uint8_t *out)
    int ws_frame_verify(const uint8_t *frame, size_t size, ws_frame_header *header,
                        ws_fault *fault)
    int ws_frame_fits(const uint8_t *frame, uint64_t size_bytes, uint32_t unit, ws_fault *fault)
    ws_frame_extent ws_frame_entry(const uint8_t *frame, size_t i)
    int ws_frame_apply(ws_device *dev, const uint8_t *frame, void *scratch, ws_applied *applied,
                       ws_attempt *why)

from native.blockio import Unread

init_chunk()

MAX_PAYLOAD_BYTES = WS_FRAME_MAX_PAYLOAD
MAX_EXTENTS = WS_FRAME_MAX_EXTENTS
MAX_FRAME_BYTES = WS_FRAME_MAX_BYTES
DATA = WS_EXTENT_DATA
ZERO = WS_EXTENT_ZERO
DISCARD = WS_EXTENT_DISCARD

FrameHeader = namedtuple(
    "FrameHeader", ("volume", "generation", "sequence", "extent_count", "payload_bytes")
)
Applied = namedtuple("Applied", ("data_bytes", "zero_bytes", "discard_bytes"))


class FrameError(ValueError):
    """A frame that is corrupt, truncated, too large, out of range or not the one expected."""


cdef str describe(const ws_fault *fault):
    place = "" if fault.index < 0 else f"extent {fault.index}: "
    found, wanted = str(fault.found), str(fault.wanted)
    if fault.field in (b"magic", b"checksum"):
        found, wanted = hex(fault.found), hex(fault.wanted)
    return f"{place}{fault.field.decode()} is {found}, {fault.rule.decode()} {wanted}"


cdef class Plan:
    """The table of a frame to be, and the pairs of offset and length that it is made of."""

    cdef ws_frame_plan plan
    cdef uint64_t *pairs
    cdef size_t count
    cdef uint64_t total_bytes

    def __cinit__(self, const uint64_t[::1] extents):
        cdef ws_fault fault
        cdef size_t i
        batch_bytes(extents)
        self.count = <size_t>extents.shape[0] // 2
        if self.count > WS_FRAME_MAX_EXTENTS:
            raise ValueError(f"{self.count} extents, more than {WS_FRAME_MAX_EXTENTS}")
        self.plan.table = <ws_frame_extent *>PyMem_Malloc(
            WS_FRAME_MAX_EXTENTS * sizeof(ws_frame_extent)
        )
        self.pairs = <uint64_t *>PyMem_Malloc(self.count * 16)
        if self.plan.table == NULL or self.pairs == NULL:
            raise MemoryError
        # A copy: what was checked must be what is used, whatever happens to the array meanwhile.
        if self.count:
            memcpy(self.pairs, &extents[0], self.count * 16)
        if ws_pairs_check(self.pairs, self.count, &fault) != 0:
            raise ValueError(describe(&fault))
        self.total_bytes = 0
        for i in range(self.count):
            self.total_bytes += self.pairs[2 * i + 1]

    def __dealloc__(self):
        PyMem_Free(self.plan.table)
        PyMem_Free(self.pairs)

    cdef bytes build(self, const ws_frame_header *header, const uint8_t *data):
        cdef size_t size = ws_frame_size(&self.plan)
        # ws_frame_build fills all of it.
        frame = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>size)
        cdef uint8_t *out = <uint8_t *>PyBytes_AS_STRING(frame)
        with nogil:
            ws_frame_build(&self.plan, header, data, out)
        return frame


def gather(
    BlockDevice device not None,
    const uint64_t[::1] extents,
    AlignedBuffer scratch not None,
    *,
    uint32_t volume,
    uint64_t generation,
    uint64_t sequence,
    digests=None,
    DirtyBitmap stale=None,
    size_bytes=None,
    uint64_t min_zero_bytes=65536,
    list unread=None,
):
    """Read `extents` and return one frame."""
    cdef Plan plan = Plan(extents)
    cdef ws_frame_header header
    cdef uint64_t room = <uint64_t>scratch.size_bytes
    header.volume, header.generation, header.sequence = volume, generation, sequence
    if plan.total_bytes > min(room, <uint64_t>WS_FRAME_MAX_PAYLOAD):
        raise ValueError(
            f"{plan.total_bytes} bytes of extents: a frame holds {WS_FRAME_MAX_PAYLOAD}, "
            f"the scratch {room}"
        )
    if digests is None:
        _read(device, plan, scratch, 4096, volume, unread)
    else:
        size = device.size_bytes() if size_bytes is None else size_bytes
        _read_and_digest(device, plan, scratch, digests, stale, size, volume, unread)
    with nogil:
        ws_frame_plan_data(&plan.plan, plan.pairs, plan.count, scratch.data, min_zero_bytes)
    return plan.build(&header, scratch.data)


cdef int _read(
    BlockDevice device, Plan plan, AlignedBuffer scratch, uint32_t unit, uint32_t volume,
    list unread,
) except -1:
    cdef ws_attempt why
    cdef int rc
    cdef ws_device *raw = device.acquire()
    try:
        with nogil:
            rc = ws_dev_read_batch(raw, plan.pairs, plan.count, scratch.data, &why)
        if rc != 0 and unread is not None:
            rc = _salvage(raw, plan, scratch, unit, volume, unread, &why)
    finally:
        device.release()
    if rc != 0:
        raise device.failure(rc, &why)
    return 0


cdef int _salvage(
    ws_device *raw, Plan plan, AlignedBuffer scratch, uint32_t unit, uint32_t volume, list unread,
    ws_attempt *why,
) except 1:
    """Read what can be read: the plan and the scratch are of that then. 0 or -errno."""
    cdef ws_salvage salvage
    cdef int rc
    cdef size_t i
    cdef size_t room = min(2 * plan.count + 256, <size_t>WS_FRAME_MAX_EXTENTS)
    cdef uint64_t *pairs = <uint64_t *>PyMem_Malloc(room * 16)
    if pairs == NULL:
        raise MemoryError
    salvage.unit, salvage.may_lose = unit, WS_UNREAD_MAX
    salvage.pairs, salvage.room = pairs, room
    with nogil:
        rc = ws_dev_salvage(raw, plan.pairs, plan.count, scratch.data, &salvage, why)
    if rc != 0:
        PyMem_Free(pairs)
        return rc
    PyMem_Free(plan.pairs)
    plan.pairs, plan.count, plan.total_bytes = pairs, salvage.count, salvage.read_bytes
    for i in range(salvage.unread_count):
        one = salvage.unread[i]
        unread.append(Unread(volume, one.offset, one.length, one.error))
    return 0


cdef int _read_and_digest(
    BlockDevice device, Plan plan, AlignedBuffer scratch, object digests, DirtyBitmap stale,
    uint64_t size, uint32_t volume, list unread,
) except -1:
    cdef Py_buffer table
    if stale is not None:
        size = stale.map.size_bytes
    PyObject_GetBuffer(digests, &table, PyBUF_WRITABLE)
    try:
        _check_chunks(plan, size, <uint64_t>table.len, stale is not None)
        _read(device, plan, scratch, WS_CHUNK_BYTES if stale is None else 4096, volume, unread)
        with nogil:
            _digest(plan, scratch.data, size, <uint8_t *>table.buf,
                    NULL if stale is None else &stale.map)
    finally:
        PyBuffer_Release(&table)
    return 0


cdef int _check_chunks(
    Plan plan, uint64_t size_bytes, uint64_t table_bytes, bint parts
) except -1:
    """The table must have an entry for each chunk of the extents, and these be whole or `parts`."""
    cdef size_t i
    cdef uint64_t offset, end
    for i in range(plan.count):
        offset, end = plan.pairs[2 * i], plan.pairs[2 * i] + plan.pairs[2 * i + 1]
        if not parts and (offset % WS_CHUNK_BYTES or (end % WS_CHUNK_BYTES and end != size_bytes)):
            raise ValueError(f"extent {i}: {offset} to {end} are not borders of chunks")
        if parts and end > size_bytes:
            raise ValueError(f"extent {i}: {end} is beyond a volume of {size_bytes} bytes")
        if (end + WS_CHUNK_BYTES - 1) // WS_CHUNK_BYTES * WS_DIGEST_BYTES > table_bytes:
            raise ValueError(f"extent {i}: {end} is beyond a digest table of {table_bytes} bytes")
    return 0


cdef void _digest(
    Plan plan, const uint8_t *data, uint64_t size_bytes, uint8_t *table, const ws_bitmap *stale
) noexcept nogil:
    cdef size_t i
    for i in range(plan.count):
        ws_scan_note(data, plan.pairs[2 * i], plan.pairs[2 * i + 1], size_bytes, table, stale)
        data += plan.pairs[2 * i + 1]


def zeros(
    const uint64_t[::1] extents, *, uint32_t volume, uint64_t generation, uint64_t sequence
):
    """Return a frame of ZERO extents: for holes, which need no reading."""
    cdef Plan plan = Plan(extents)
    cdef ws_frame_header header
    header.volume, header.generation, header.sequence = volume, generation, sequence
    ws_frame_plan_zeros(&plan.plan, plan.pairs, plan.count)
    return plan.build(&header, NULL)


cdef class Verified:
    """A frame of which everything is right that can be known without a device."""

    cdef Py_buffer view
    cdef const uint8_t *data
    cdef ws_frame_header header

    def __cinit__(self, frame):
        cdef ws_fault fault
        cdef int rc
        PyObject_GetBuffer(frame, &self.view, PyBUF_SIMPLE)
        self.data = <const uint8_t *>self.view.buf
        with nogil:
            rc = ws_frame_verify(self.data, <size_t>self.view.len, &self.header, &fault)
        if rc != 0:
            raise FrameError(describe(&fault))

    def __dealloc__(self):
        PyBuffer_Release(&self.view)


def route(frame):
    """Return (volume, sequence) as the header says, unverified: scatter verifies the same bytes."""
    cdef const uint8_t[::1] data = frame
    cdef ws_frame_header header
    if data.shape[0] < <Py_ssize_t>sizeof(header):
        raise FrameError(f"frame is {data.shape[0]} bytes, at least {sizeof(header)} wanted")
    memcpy(&header, &data[0], sizeof(header))
    return header.volume, header.sequence


def inspect(frame):
    """Verify everything that can be without a device, checksum included."""
    cdef Verified verified = Verified(frame)
    cdef ws_frame_header *head = &verified.header
    return FrameHeader(
        head.volume, head.generation, head.sequence, head.extent_count, head.payload_bytes
    )


def extents(frame):
    """Return (offset, length, kind) of each extent of a verified frame."""
    cdef Verified verified = Verified(frame)
    cdef ws_frame_extent entry
    found = []
    for i in range(verified.header.extent_count):
        entry = ws_frame_entry(verified.data, <size_t>i)
        found.append((entry.offset, entry.length, entry.kind))
    return found


def scatter(
    BlockDevice device not None,
    frame,
    AlignedBuffer scratch not None,
    *,
    uint64_t size_bytes,
    uint32_t volume,
    uint64_t generation,
    DirtyBitmap written=None,
):
    """Verify the frame, then write it. Nothing is written unless all of it is valid."""
    cdef Verified verified = Verified(frame)
    cdef ws_device *raw = device.acquire()
    try:
        _expect("volume", verified.header.volume, volume)
        _expect("generation", verified.header.generation, generation)
        _check_room(device, raw, verified, scratch, size_bytes)
        if written is not None:
            _mark(verified, size_bytes, written)
        return _apply(device, raw, verified, scratch)
    finally:
        device.release()


cdef int _expect(str field, uint64_t found, uint64_t wanted) except -1:
    if found != wanted:
        raise FrameError(f"{field} is {found}, not {wanted}")
    return 0


cdef int _check_room(
    BlockDevice device, ws_device *raw, Verified frame, AlignedBuffer scratch, uint64_t size_bytes
) except -1:
    cdef ws_fault fault
    cdef ws_attempt why
    cdef uint64_t room
    if frame.header.payload_bytes > <uint64_t>scratch.size_bytes:
        raise ValueError(
            f"{frame.header.payload_bytes} bytes of payload, but a scratch of {scratch.size_bytes}"
        )
    if ws_frame_fits(frame.data, size_bytes, raw.logical, &fault) != 0:
        raise FrameError(describe(&fault))
    room = device.size_bytes()
    if size_bytes > room:
        why.verb, why.offset, why.length, why.failed_at = "write", 0, size_bytes, room
        raise device.failure(-EIO, &why)
    return 0


cdef int _mark(Verified frame, uint64_t size_bytes, DirtyBitmap written) except -1:
    """Before the first byte: who is killed in the middle has said that something changed."""
    cdef ws_frame_extent entry
    cdef uint32_t i
    if written.map.size_bytes != size_bytes:
        raise ValueError(f"marks of {written.size_bytes} bytes for a volume of {size_bytes}")
    with nogil:
        for i in range(frame.header.extent_count):
            entry = ws_frame_entry(frame.data, i)
            ws_bitmap_set_range(&written.map, entry.offset, entry.length)
    return 0


cdef object _apply(BlockDevice device, ws_device *raw, Verified frame, AlignedBuffer scratch):
    cdef ws_applied applied
    cdef ws_attempt why
    cdef int rc
    applied.data_bytes = applied.zero_bytes = applied.discard_bytes = 0
    with nogil:
        rc = ws_frame_apply(raw, frame.data, scratch.data, &applied, &why)
    if rc != 0:
        raise device.failure(rc, &why)
    return Applied(applied.data_bytes, applied.zero_bytes, applied.discard_bytes)
