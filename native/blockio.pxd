from libc.stddef cimport size_t
from libc.stdint cimport uint32_t, uint64_t

cdef extern from "blockio_impl.h" nogil:
    enum:
        WS_ZERO_PUNCH
        WS_ZERO_ZEROOUT
    struct ws_remote:
        uint64_t size
    struct ws_device:
        ws_remote *remote
        int fd
        int tail_fd
        bint is_block
        bint is_direct
        uint32_t logical
        uint32_t physical
        uint32_t memory_align
        uint32_t refused
    struct ws_attempt:
        const char *verb
        uint64_t offset
        uint64_t length
        uint64_t failed_at
    enum:
        WS_UNREAD_MAX
    struct ws_unread:
        uint64_t offset
        uint64_t length
        int error
    struct ws_salvage:
        uint32_t unit
        uint32_t may_lose
        uint64_t *pairs
        size_t room
        size_t count
        ws_unread *unread
        size_t unread_count
        uint32_t lost
        uint64_t read_bytes
    struct ws_loop:
        uint64_t device
        uint64_t inode
        uint64_t offset
        uint64_t size_limit
    int ws_dev_open(ws_device *dev, const char *path, bint writable, bint exclusive,
                    const char **step)
    void ws_dev_close(ws_device *dev)
    int ws_dev_size(const ws_device *dev, uint64_t *size)
    int ws_dev_read(const ws_device *dev, void *data, uint64_t offset, uint64_t length,
                    ws_attempt *why)
    int ws_dev_write(const ws_device *dev, const void *data, uint64_t offset, uint64_t length,
                     ws_attempt *why)
    int ws_dev_read_batch(const ws_device *dev, const uint64_t *pairs, size_t count, void *data,
                          ws_attempt *why)
    int ws_dev_write_batch(const ws_device *dev, const uint64_t *pairs, size_t count,
                           const void *data, ws_attempt *why)
    int ws_dev_salvage(const ws_device *dev, const uint64_t *pairs, size_t count, void *data,
                       ws_salvage *salvage, ws_attempt *why)
    int ws_dev_zero(ws_device *dev, uint64_t offset, uint64_t length, ws_attempt *why)
    int ws_dev_discard(const ws_device *dev, uint64_t offset, uint64_t length, ws_attempt *why)
    int ws_dev_flush(ws_device *dev, ws_attempt *why)
    int ws_dev_is_read_only(const ws_device *dev)
    int ws_dev_set_read_only(const ws_device *dev, bint read_only)
    int ws_loop_status(int fd, ws_loop *loop)
    int ws_next_data(int fd, uint64_t start_from, uint64_t limit, uint64_t least,
                     uint64_t *start, uint64_t *end)


cdef class BlockDevice:
    """Between acquire() and release() the device stays open: use it without the GIL."""

    cdef ws_device device
    cdef readonly str path
    cdef readonly bint writable
    cdef bint closing
    cdef Py_ssize_t users
    cdef unsigned removed_mode
    cdef ws_device *acquire(self) except NULL
    cdef int release(self) except -1
    cdef object failure(self, int rc, const ws_attempt *why)
    cdef object _transfer(self, uint64_t offset, object buffer, bint write)
    cdef object _batch(self, const uint64_t[::1] extents, object buffer, bint write)
    cdef object _set_permission(self, bint read_only)


cdef uint64_t batch_bytes(const uint64_t[::1] extents) except? 0xffffffffffffffff
