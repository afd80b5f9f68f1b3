from libc.stddef cimport size_t
from libc.stdint cimport uint8_t

cdef extern from "chunk_impl.h" nogil:
    enum:
        WS_CHUNK_BYTES
        WS_DIGEST_BYTES
    struct ws_part:
        const void *data
        size_t len
    const char *ws_chunk_init()
    const char *ws_chunk_name()
    bint ws_is_zero(const void *data, size_t len)
    void ws_xxh3_128(const void *data, size_t len, uint8_t *out)
    void ws_xxh3_128_parts(const ws_part *parts, size_t count, uint8_t *out)
    void ws_digest_chunks(const uint8_t *data, size_t len, size_t chunk, uint8_t *out)


cdef inline int init_chunk() except -1:
    """Choose the CPU kernel of the cimporting module's own copy; call it at module level."""
    cdef const char *problem = ws_chunk_init()
    if problem != NULL:
        raise RuntimeError(problem.decode())
    return 0
