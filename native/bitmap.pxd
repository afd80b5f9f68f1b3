from libc.stdint cimport uint8_t, uint64_t

cdef extern from "bitmap_impl.h" nogil:
    struct ws_bitmap:
        uint64_t *words
        uint64_t word_count
        uint64_t size_bytes
        uint64_t block_count
        unsigned block_shift
    struct ws_run_limits:
        uint64_t gap
        uint64_t max_length
        uint64_t max_total
        uint64_t max_extents
    void ws_bitmap_init(ws_bitmap *map, uint64_t size_bytes, uint64_t block_size)
    int ws_bitmap_map(ws_bitmap *map)
    void ws_bitmap_unmap(ws_bitmap *map)
    void ws_bitmap_set_range(const ws_bitmap *map, uint64_t offset, uint64_t length)
    void ws_bitmap_clear_range(const ws_bitmap *map, uint64_t offset, uint64_t length)
    void ws_bitmap_set_all(const ws_bitmap *map)
    void ws_bitmap_clear(const ws_bitmap *map)
    void ws_bitmap_drop(const ws_bitmap *map)
    bint ws_bitmap_is_marked(const ws_bitmap *map, uint64_t offset)
    uint64_t ws_bitmap_take(const ws_bitmap *map, const ws_bitmap *into)
    void ws_bitmap_merge(const ws_bitmap *map, const ws_bitmap *other)
    void ws_bitmap_subtract(const ws_bitmap *map, const ws_bitmap *other)
    void ws_bitmap_merge_common(const ws_bitmap *map, const ws_bitmap *one,
                                const ws_bitmap *other)
    uint64_t ws_bitmap_count(const ws_bitmap *map)
    uint64_t ws_bitmap_count_bytes(const ws_bitmap *map)
    void ws_bitmap_touch(const ws_bitmap *map, const ws_bitmap *other)
    void ws_bitmap_copy_out(const ws_bitmap *map, uint8_t *out)
    bint ws_bitmap_copy_in(const ws_bitmap *map, const uint8_t *data)
    uint64_t ws_bitmap_runs(const ws_bitmap *map, uint64_t start, const ws_run_limits *limits,
                            uint64_t *out, uint64_t *next)


cdef class DirtyBitmap:
    """`map.words` stay where they are for the life of the object: use them without the GIL."""

    cdef ws_bitmap map
    cdef Py_buffer shared
    cdef bint is_shared
    cdef Py_ssize_t[1] shape
    cdef Py_ssize_t[1] strides
    cdef int share(self, object words) except -1
    cdef int check_range(self, object offset, object length) except -1
    cdef int check_same(self, DirtyBitmap other) except -1
    cdef uint64_t to_blocks(self, str name, object value, object least) except? 0
    cdef tuple collect(self, object start_bytes, const ws_run_limits *limits)
