"""Whole-range passes: digest a device's chunks, and compare them with a table."""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint64_t

from native.bitmap cimport DirtyBitmap, ws_bitmap
from native.blockio cimport BlockDevice, ws_attempt, ws_device
from native.buffer cimport AlignedBuffer
from native.chunk cimport WS_CHUNK_BYTES, WS_DIGEST_BYTES, init_chunk

cdef extern from "scan_impl.h" nogil:
    struct ws_scratch:
        uint8_t *data
        uint64_t size
    int ws_scan_digest(const ws_device *dev, uint64_t offset, uint64_t length,
                       const ws_scratch *scratch, uint8_t *out, ws_attempt *why)
    int ws_scan_compare(const ws_device *dev, uint64_t offset, uint64_t length,
                        const ws_scratch *scratch, const uint8_t *table, const ws_bitmap *marks,
                        uint64_t *marked, ws_attempt *why)
    struct ws_ledger:
        uint8_t *table
        const ws_bitmap *stale
        const ws_bitmap *reading
    int ws_scan_refresh(const ws_device *dev, uint64_t offset, uint64_t length,
                        const ws_scratch *scratch, const ws_ledger *ledger, uint64_t *done,
                        ws_attempt *why)
    uint64_t ws_scan_hole(uint64_t offset, uint64_t length, const uint8_t *table,
                          const ws_bitmap *marks)

init_chunk()

# Larger than any device (off_t), and small enough that an end rounded up does not overflow.
cdef uint64_t LIMIT = (<uint64_t>1 << 63) - WS_CHUNK_BYTES


def digest(
    BlockDevice device not None,
    uint64_t offset_bytes,
    uint64_t length_bytes,
    AlignedBuffer scratch not None,
):
    """Return WS_DIGEST_BYTES a chunk of the range, ZERO_DIGEST for chunks of zeros."""
    cdef ws_scratch memory = _scratch(scratch)
    cdef ws_attempt why
    cdef int rc
    cdef uint64_t end = _end(offset_bytes, length_bytes, LIMIT)
    if offset_bytes % WS_CHUNK_BYTES:
        raise ValueError(f"offset {offset_bytes} is no border of chunks of {WS_CHUNK_BYTES}")
    # All of it is filled, or dropped.
    table = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>(_entries(end - offset_bytes)))
    cdef uint8_t *out = <uint8_t *>PyBytes_AS_STRING(table)
    cdef ws_device *raw = device.acquire()
    try:
        with nogil:
            rc = ws_scan_digest(raw, offset_bytes, length_bytes, &memory, out, &why)
    finally:
        device.release()
    if rc != 0:
        raise device.failure(rc, &why)
    return table


def compare(
    BlockDevice device not None,
    uint64_t offset_bytes,
    uint64_t length_bytes,
    AlignedBuffer scratch not None,
    table,
    DirtyBitmap marks not None,
):
    """Mark each chunk of the range whose digest is not the one in `table`; return bytes marked."""
    cdef ws_scratch memory = _scratch(scratch)
    cdef ws_attempt why
    cdef int rc
    cdef uint64_t marked = 0
    cdef uint64_t end = _end(offset_bytes, length_bytes, marks.map.size_bytes)
    if offset_bytes % WS_CHUNK_BYTES or (end % WS_CHUNK_BYTES and end != marks.map.size_bytes):
        raise ValueError(f"{offset_bytes} to {end} are no borders of chunks of {WS_CHUNK_BYTES}")
    cdef Table entries = Table(table, marks.map.size_bytes)
    cdef ws_device *raw = device.acquire()
    try:
        with nogil:
            rc = ws_scan_compare(
                raw, offset_bytes, length_bytes, &memory, entries.data, &marks.map, &marked, &why
            )
    finally:
        device.release()
    if rc != 0:
        raise device.failure(rc, &why)
    return marked


def compare_hole(
    uint64_t offset_bytes,
    uint64_t length_bytes,
    uint64_t size_bytes,
    table,
    DirtyBitmap marks not None,
):
    """The same for a range known to read as zeros: mark chunks whose entry is not ZERO_DIGEST."""
    cdef uint64_t marked
    if size_bytes != marks.map.size_bytes:
        raise ValueError(f"a volume of {size_bytes} bytes, but marks for {marks.map.size_bytes}")
    _end(offset_bytes, length_bytes, size_bytes)
    cdef Table entries = Table(table, size_bytes)
    with nogil:
        marked = ws_scan_hole(offset_bytes, length_bytes, entries.data, &marks.map)
    return marked


def refresh(
    BlockDevice device not None,
    uint64_t offset_bytes,
    uint64_t length_bytes,
    AlignedBuffer scratch not None,
    table,
    DirtyBitmap stale not None,
    DirtyBitmap reading not None,
):
    """Read the stale chunks of the range again, enter their digests; return the bytes read."""
    cdef ws_scratch memory = _scratch(scratch)
    cdef ws_attempt why
    cdef int rc
    cdef uint64_t done = 0, size = stale.map.size_bytes
    cdef uint64_t end = _end(offset_bytes, length_bytes, size)
    stale.check_same(reading)
    if stale.block_size_bytes != WS_CHUNK_BYTES:
        raise ValueError(f"blocks of {stale.block_size_bytes} bytes are no chunks")
    if offset_bytes % WS_CHUNK_BYTES or (end % WS_CHUNK_BYTES and end != size):
        raise ValueError(f"{offset_bytes} to {end} are no borders of chunks of {WS_CHUNK_BYTES}")
    cdef Table entries = Table(table, size, writable=True)
    cdef ws_ledger ledger = ws_ledger(entries.data, &stale.map, &reading.map)
    cdef ws_device *raw = device.acquire()
    try:
        with nogil:
            rc = ws_scan_refresh(raw, offset_bytes, length_bytes, &memory, &ledger, &done, &why)
    finally:
        device.release()
    if rc != 0:
        raise device.failure(rc, &why)
    return done


cdef class Table:
    """A digest table on loan from whoever owns it."""

    cdef Py_buffer view
    cdef uint8_t *data

    def __cinit__(self, table, uint64_t size_bytes, *, bint writable=False):
        PyObject_GetBuffer(table, &self.view, PyBUF_WRITABLE if writable else PyBUF_SIMPLE)
        self.data = <uint8_t *>self.view.buf
        if <uint64_t>self.view.len < _entries(size_bytes):
            raise ValueError(
                f"a table of {self.view.len} bytes; {size_bytes} bytes need {_entries(size_bytes)}"
            )

    def __dealloc__(self):
        PyBuffer_Release(&self.view)


cdef uint64_t _entries(uint64_t length) noexcept:
    return (length + WS_CHUNK_BYTES - 1) // WS_CHUNK_BYTES * WS_DIGEST_BYTES


cdef uint64_t _end(uint64_t offset, uint64_t length, uint64_t size) except? 0:
    if size > LIMIT or offset > size or length > size - offset:
        raise ValueError(f"{length} bytes at offset {offset} reach beyond the end, {size}")
    return offset + length


cdef ws_scratch _scratch(AlignedBuffer buffer) except *:
    cdef ws_scratch scratch
    scratch.data = buffer.data
    scratch.size = <uint64_t>buffer.size_bytes // WS_CHUNK_BYTES * WS_CHUNK_BYTES
    if scratch.size == 0:
        raise ValueError(f"a scratch of {buffer.size_bytes} bytes holds no chunk")
    return scratch
