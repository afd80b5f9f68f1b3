"""Zero test and XXH3-128 digests of a buffer's chunks, with run-time CPU dispatch."""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t

from native.chunk cimport (
    WS_CHUNK_BYTES,
    WS_DIGEST_BYTES,
    init_chunk,
    ws_chunk_name,
    ws_digest_chunks,
    ws_is_zero,
    ws_xxh3_128,
)

init_chunk()

CHUNK_BYTES = WS_CHUNK_BYTES
DIGEST_BYTES = WS_DIGEST_BYTES
ZERO_DIGEST = bytes(WS_DIGEST_BYTES)


def is_zero(object data):
    """Return whether every byte is 0 (True for an empty buffer)."""
    cdef Py_buffer view
    cdef bint zero
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        with nogil:
            zero = ws_is_zero(view.buf, <size_t>view.len)
    finally:
        PyBuffer_Release(&view)
    return zero


def digests(object data, object chunk_bytes=WS_CHUNK_BYTES):
    """Return 16 bytes a chunk: XXH3-128 (canonical, big endian), or ZERO_DIGEST for zeros."""
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes is {chunk_bytes}: it must be at least 1")
    cdef Py_buffer view
    cdef size_t chunk = chunk_bytes
    cdef size_t count
    cdef uint8_t *out
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        count = <size_t>view.len // chunk + (<size_t>view.len % chunk != 0)
        # ws_digest_chunks fills all of it.
        result = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>(count * WS_DIGEST_BYTES))
        out = <uint8_t *>PyBytes_AS_STRING(result)
        with nogil:
            ws_digest_chunks(<const uint8_t *>view.buf, <size_t>view.len, chunk, out)
    finally:
        PyBuffer_Release(&view)
    return result


def xxh3_128(object data):
    """Return the canonical XXH3-128 of the whole buffer, zero or not."""
    cdef Py_buffer view
    cdef uint8_t[WS_DIGEST_BYTES] out
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        with nogil:
            ws_xxh3_128(view.buf, <size_t>view.len, out)
    finally:
        PyBuffer_Release(&view)
    return (<char *>out)[:WS_DIGEST_BYTES]


def implementation():
    """Return the kernel in use: "avx512", "avx2" or "portable"."""
    return ws_chunk_name().decode()
