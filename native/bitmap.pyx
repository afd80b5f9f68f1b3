"""Dirty bitmaps: one bit a block, set and taken atomically."""

import struct
from array import array

from cpython cimport array as c_array
from cpython.buffer cimport (
    PyBUF_FORMAT,
    PyBUF_ND,
    PyBUF_SIMPLE,
    PyBUF_STRIDES,
    PyBUF_WRITABLE,
    PyBuffer_Release,
    PyObject_GetBuffer,
)
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport UINT64_MAX, uint8_t, uint64_t
from libc.string cimport memcmp, memcpy

from native.bitmap cimport (
    ws_bitmap_clear,
    ws_bitmap_clear_range,
    ws_bitmap_copy_in,
    ws_bitmap_copy_out,
    ws_bitmap_count,
    ws_bitmap_count_bytes,
    ws_bitmap_drop,
    ws_bitmap_init,
    ws_bitmap_is_marked,
    ws_bitmap_map,
    ws_bitmap_merge,
    ws_bitmap_merge_common,
    ws_bitmap_runs,
    ws_bitmap_set_all,
    ws_bitmap_set_range,
    ws_bitmap_subtract,
    ws_bitmap_take,
    ws_bitmap_touch,
    ws_bitmap_unmap,
    ws_run_limits,
)
from native.chunk cimport WS_DIGEST_BYTES, init_chunk, ws_xxh3_128

init_chunk()

MAX_BITMAP_BYTES = 32 << 20
MIN_BLOCK_BYTES = 512
MAX_BLOCK_BYTES = 1 << 62
MAX_SIZE_BYTES = (1 << 63) - 1

# A saved bitmap: this header (magic, version, flags (0), size, block size), the words, and the
# XXH3-128 of all before it. Little endian.
HEADER = struct.Struct("<8sIIQQ")
MAGIC = b"WSBITMAP"
VERSION = 1

cdef c_array.array QUADS = array("Q")
cdef char *WORD_FORMAT = b"Q"


def fit_block_size(object size_bytes, object block_size_bytes):
    """Return `block_size_bytes`, doubled until a bitmap of `size_bytes` fits MAX_BITMAP_BYTES."""
    check_geometry(size_bytes, block_size_bytes)
    while count_words(size_bytes, block_size_bytes) * 8 > MAX_BITMAP_BYTES:
        block_size_bytes *= 2
    return block_size_bytes


cdef int check_geometry(object size_bytes, object block_size_bytes) except -1:
    if not 1 <= size_bytes <= MAX_SIZE_BYTES:
        raise ValueError(f"size_bytes is {size_bytes}: it must be from 1 to {MAX_SIZE_BYTES}")
    if (not MIN_BLOCK_BYTES <= block_size_bytes <= MAX_BLOCK_BYTES
            or block_size_bytes & (block_size_bytes - 1)):
        raise ValueError(
            f"block_size_bytes is {block_size_bytes}: it must be a power of two from "
            f"{MIN_BLOCK_BYTES} to {MAX_BLOCK_BYTES}"
        )
    return 0


cdef object count_words(object size_bytes, object block_size_bytes):
    return -(-size_bytes // (block_size_bytes * 64))


cdef class DirtyBitmap:
    """One bit a block of a volume of `size_bytes`; bit i is bit `i % 64` of word `i // 64`."""

    def __cinit__(self, object size_bytes, object block_size_bytes=4096, object words=None):
        check_geometry(size_bytes, block_size_bytes)
        ws_bitmap_init(&self.map, size_bytes, block_size_bytes)
        self.shape[0] = <Py_ssize_t>self.map.word_count
        self.strides[0] = 8
        if words is not None:
            self.share(words)
        elif ws_bitmap_map(&self.map) != 0:
            raise MemoryError(f"no address space for a bitmap of {self.map.word_count * 8} bytes")

    def __dealloc__(self):
        if self.is_shared:
            PyBuffer_Release(&self.shared)
        else:
            ws_bitmap_unmap(&self.map)

    cdef int share(self, object words) except -1:
        try:
            PyObject_GetBuffer(words, &self.shared, PyBUF_SIMPLE | PyBUF_WRITABLE)
        except BufferError as error:
            raise ValueError(f"words must be a writable, contiguous buffer: {error}") from error
        # From here on __dealloc__ releases it, errors included.
        self.is_shared = True
        if <size_t>self.shared.buf % 8:
            raise ValueError("words must be aligned to 8 bytes")
        if <uint64_t>self.shared.len // 8 < self.map.word_count:
            raise ValueError(
                f"words has {self.shared.len} bytes: {self.map.word_count * 8} are needed"
            )
        self.map.words = <uint64_t *>self.shared.buf
        return 0

    def __getbuffer__(self, Py_buffer *view, int flags):
        view.obj = self
        view.buf = self.map.words
        view.len = self.shape[0] * 8
        view.readonly = False
        view.itemsize = 8
        view.ndim = 1
        view.format = WORD_FORMAT if flags & PyBUF_FORMAT else <char *>NULL
        view.shape = self.shape if flags & PyBUF_ND else NULL
        view.strides = self.strides if (flags & PyBUF_STRIDES) == PyBUF_STRIDES else NULL
        view.suboffsets = NULL
        view.internal = NULL

    @property
    def size_bytes(self):
        """The volume's size."""
        return self.map.size_bytes

    @property
    def block_size_bytes(self):
        """What one bit stands for."""
        return (<uint64_t>1) << self.map.block_shift

    @property
    def block_count(self):
        """Number of blocks; the last may be short."""
        return self.map.block_count

    cdef int check_range(self, object offset, object length) except -1:
        if offset < 0 or length < 0 or offset + length > self.map.size_bytes:
            raise ValueError(
                f"{length} bytes at {offset} are not within {self.map.size_bytes} bytes"
            )
        return 0

    cdef int check_same(self, DirtyBitmap other) except -1:
        if (self.map.size_bytes != other.map.size_bytes
                or self.map.block_shift != other.map.block_shift):
            raise ValueError(
                f"bitmaps differ: {self.size_bytes} bytes in blocks of {self.block_size_bytes}, "
                f"{other.size_bytes} in blocks of {other.block_size_bytes}"
            )
        return 0

    def set_range(self, object offset_bytes, object length_bytes):
        """Mark each block that the range touches (atomic OR)."""
        self.check_range(offset_bytes, length_bytes)
        cdef uint64_t offset = offset_bytes, length = length_bytes
        with nogil:
            ws_bitmap_set_range(&self.map, offset, length)

    def clear_range(self, object offset_bytes, object length_bytes):
        """Clear each block that lies wholly in the range (a last short block counts as whole)."""
        self.check_range(offset_bytes, length_bytes)
        cdef uint64_t offset = offset_bytes, length = length_bytes
        with nogil:
            ws_bitmap_clear_range(&self.map, offset, length)

    def set_all(self):
        """Mark every block."""
        with nogil:
            ws_bitmap_set_all(&self.map)

    def clear(self):
        """Clear every block. A mark set meanwhile may be lost: to keep it, take."""
        cdef bint is_shared = self.is_shared
        with nogil:
            if is_shared:
                ws_bitmap_clear(&self.map)
            else:
                ws_bitmap_drop(&self.map)

    def take(self, DirtyBitmap into not None):
        """OR each word into `into`, then clear what was found; return the blocks taken."""
        cdef uint64_t taken
        self.check_same(into)
        if into.map.words == self.map.words:
            raise ValueError("a bitmap cannot be taken into itself")
        with nogil:
            taken = ws_bitmap_take(&self.map, &into.map)
        return taken

    def merge(self, DirtyBitmap other not None):
        """Mark here what is marked in `other`. Each word is merged atomically."""
        self.check_same(other)
        with nogil:
            ws_bitmap_merge(&self.map, &other.map)

    def subtract(self, DirtyBitmap other not None):
        """Clear here what is marked in `other`. Each word is changed atomically."""
        self.check_same(other)
        with nogil:
            ws_bitmap_subtract(&self.map, &other.map)

    def merge_common(self, DirtyBitmap one not None, DirtyBitmap other not None):
        """Mark here what is marked in both `one` and `other`."""
        self.check_same(one)
        self.check_same(other)
        with nogil:
            ws_bitmap_merge_common(&self.map, &one.map, &other.map)

    def touch(self, DirtyBitmap other not None):
        """Mark here each block that a marked block of `other` touches, whatever its block size."""
        if self.map.size_bytes != other.map.size_bytes:
            raise ValueError(
                f"bitmaps differ: of {self.size_bytes} and of {other.size_bytes} bytes"
            )
        with nogil:
            ws_bitmap_touch(&self.map, &other.map)

    def count(self):
        """Return the number of marked blocks."""
        cdef uint64_t marked
        with nogil:
            marked = ws_bitmap_count(&self.map)
        return marked

    def count_bytes(self):
        """Return the marked bytes: a last short block counts with its true length."""
        cdef uint64_t marked
        with nogil:
            marked = ws_bitmap_count_bytes(&self.map)
        return marked

    def is_marked(self, object offset_bytes):
        """Return whether the block at `offset_bytes` is marked."""
        self.check_range(offset_bytes, 1)
        return ws_bitmap_is_marked(&self.map, offset_bytes)

    def batch(
        self,
        object start_bytes,
        *,
        object gap_bytes=0,
        object max_bytes=1048576,
        object max_extents=1024,
    ):
        """Collect marked runs from `start_bytes` on, for one frame; see bitmap.pyi."""
        cdef ws_run_limits limits
        limits.gap = self.to_blocks("gap_bytes", gap_bytes, 0)
        limits.max_total = self.to_blocks("max_bytes", max_bytes, 1)
        limits.max_length = UINT64_MAX
        if max_extents < 1:
            raise ValueError(f"max_extents is {max_extents}: it must be at least 1")
        limits.max_extents = min(max_extents, limits.max_total, self.map.block_count)
        return self.collect(start_bytes, &limits)

    def extents(self, *, object gap_bytes=0, object max_length_bytes=0):
        """Iterate all runs as (offset, length), longest `max_length_bytes` (0: no limit)."""
        cdef uint64_t gap = self.to_blocks("gap_bytes", gap_bytes, 0), most = UINT64_MAX
        if max_length_bytes != 0:
            most = self.to_blocks("max_length_bytes", max_length_bytes, 1)
        return self._iterate(gap, most)

    def _iterate(self, uint64_t gap, uint64_t max_length):
        cdef ws_run_limits limits
        limits.gap = gap
        limits.max_length = max_length
        limits.max_total = UINT64_MAX
        limits.max_extents = min(<uint64_t>1024, self.map.block_count)
        start = 0
        while start < self.map.size_bytes:
            pairs, start = self.collect(start, &limits)
            yield from zip(pairs[::2], pairs[1::2], strict=True)

    cdef uint64_t to_blocks(self, str name, object value, object least) except? 0:
        if value < least << self.map.block_shift:
            raise ValueError(
                f"{name} is {value}: it must be at least {least << self.map.block_shift}"
            )
        return min(value >> self.map.block_shift, self.map.block_count)

    cdef tuple collect(self, object start_bytes, const ws_run_limits *limits):
        if not 0 <= start_bytes <= self.map.size_bytes:
            raise ValueError(f"start_bytes is {start_bytes}: the size is {self.map.size_bytes}")
        if start_bytes != self.map.size_bytes and start_bytes % self.block_size_bytes:
            raise ValueError(
                f"start_bytes is {start_bytes}: not a multiple of {self.block_size_bytes}"
            )
        cdef uint64_t start = -(-start_bytes // self.block_size_bytes)
        cdef uint64_t found, goes_on
        cdef c_array.array pairs = c_array.clone(QUADS, <Py_ssize_t>(limits.max_extents * 2), False)
        cdef uint64_t *out = <uint64_t *>pairs.data.as_ulonglongs
        with nogil:
            found = ws_bitmap_runs(&self.map, start, limits, out, &goes_on)
        c_array.resize(pairs, <Py_ssize_t>(found * 2))
        return pairs, goes_on

    def dumps(self):
        """Serialise with geometry, version and an XXH3-128 checksum."""
        header = HEADER.pack(MAGIC, VERSION, 0, self.size_bytes, self.block_size_bytes)
        cdef Py_ssize_t before = len(header), total = before + self.shape[0] * 8
        result = PyBytes_FromStringAndSize(NULL, total + WS_DIGEST_BYTES)
        cdef uint8_t *out = <uint8_t *>PyBytes_AS_STRING(result)
        memcpy(out, PyBytes_AS_STRING(header), before)
        with nogil:
            ws_bitmap_copy_out(&self.map, out + before)
            ws_xxh3_128(out, <size_t>total, out + total)
        return result

    @classmethod
    def loads(cls, object data):
        """Inverse of dumps. ValueError for anything damaged, truncated or too long."""
        cdef Py_buffer view
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            return load(cls, &view)
        finally:
            PyBuffer_Release(&view)


cdef DirtyBitmap load(object cls, const Py_buffer *view):
    cdef const uint8_t *data = <const uint8_t *>view.buf
    cdef Py_ssize_t before = HEADER.size, total = view.len - WS_DIGEST_BYTES
    cdef uint8_t[WS_DIGEST_BYTES] digest
    if total < before:
        raise ValueError(f"a saved bitmap of {view.len} bytes is truncated")
    magic, version, flags, size_bytes, block_size_bytes = HEADER.unpack(data[:before])
    if magic != MAGIC or version != VERSION or flags != 0:
        raise ValueError("not a saved bitmap, or of another version of the agent")
    with nogil:
        ws_xxh3_128(data, <size_t>total, digest)
    if memcmp(digest, data + total, WS_DIGEST_BYTES) != 0:
        raise ValueError("a saved bitmap is damaged: its checksum does not match")
    check_geometry(size_bytes, block_size_bytes)
    if total - before != count_words(size_bytes, block_size_bytes) * 8:
        raise ValueError(f"a saved bitmap of {view.len} bytes does not fit its geometry")
    cdef DirtyBitmap result = cls(size_bytes, block_size_bytes)
    cdef bint clean
    with nogil:
        clean = ws_bitmap_copy_in(&result.map, data + before)
    if not clean:
        raise ValueError("a saved bitmap has marks past its end")
    return result
