cdef class AlignedBuffer:
    cdef unsigned char *data
    cdef readonly Py_ssize_t size_bytes
    cdef Py_ssize_t exports


cdef class BufferPool:
    cdef object condition
    cdef list free
    cdef readonly Py_ssize_t outstanding
    cdef readonly Py_ssize_t size_bytes
    cdef readonly Py_ssize_t count
    cdef bint closed
    cdef int give_back(self, AlignedBuffer buffer) except -1


cdef class Lease:
    cdef BufferPool pool
    cdef AlignedBuffer buffer
    cdef int release(self) except -1
