"""Page-aligned memory for direct I/O, pooled."""

import threading

from cpython.buffer cimport PyBuffer_FillInfo

cdef extern from "buffer_impl.h" nogil:
    void *ws_buffer_new(size_t size)
    void ws_buffer_free(void *data)


cdef class AlignedBuffer:
    """`size_bytes` of zeroed, writable memory at an address that is a multiple of 4096."""

    def __cinit__(self, object size_bytes):
        if size_bytes < 1:
            raise ValueError(f"size_bytes is {size_bytes}: it must be at least 1")
        if size_bytes > <Py_ssize_t>((<size_t>-1) >> 1):
            raise MemoryError
        self.size_bytes = size_bytes
        with nogil:
            self.data = <unsigned char *>ws_buffer_new(<size_t>self.size_bytes)
        if self.data == NULL:
            raise MemoryError

    def __dealloc__(self):
        ws_buffer_free(self.data)

    @property
    def address(self):
        """Where the memory starts."""
        return <size_t>self.data

    def __len__(self):
        return self.size_bytes

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, self.data, self.size_bytes, False, flags)
        self.exports += 1

    def __releasebuffer__(self, Py_buffer *view):
        self.exports -= 1


cdef class Lease:
    """A buffer on loan, given back at the end of the `with` block."""

    def __init__(self):
        raise TypeError("a Lease comes from BufferPool.lease()")

    def __enter__(self):
        if self.buffer is None:
            raise RuntimeError("this lease has ended: take another with BufferPool.lease()")
        return self.buffer

    def __exit__(self, kind, error, trace):
        self.release()

    def __del__(self):
        # A lease that never got to its `with`: its taker was cancelled while it waited in a thread.
        self.release()

    cdef int release(self) except -1:
        buffer, self.buffer = self.buffer, None
        if buffer is not None:
            self.pool.give_back(buffer)
        return 0


cdef class BufferPool:
    """At most `count` buffers of `size_bytes`, made when first needed and used again."""

    def __cinit__(self, object size_bytes, object count):
        if size_bytes < 1 or count < 1:
            raise ValueError(f"{count} buffers of {size_bytes} bytes: both must be at least 1")
        self.size_bytes = size_bytes
        self.count = count
        self.free = []
        # Its lock is reentrant: the garbage collector may end a Lease while this thread holds it.
        self.condition = threading.Condition()

    def lease(self):
        """Wait for a free buffer (without the GIL) and lend it; RuntimeError once closed."""
        cdef Lease lease
        with self.condition:
            self.condition.wait_for(self.is_ready)
            if self.closed:
                raise RuntimeError("the buffer pool is closed")
            buffer = self.free.pop() if self.free else AlignedBuffer(self.size_bytes)
            lease = Lease.__new__(Lease)
            lease.pool, lease.buffer = self, buffer
            self.outstanding += 1
        return lease

    def is_ready(self):
        """Return whether `lease` needs to wait no longer."""
        return self.closed or self.outstanding < self.count

    cdef int give_back(self, AlignedBuffer buffer) except -1:
        with self.condition:
            self.outstanding -= 1
            # Somebody who kept a view would see (or spoil) what the next one puts there.
            if not self.closed and buffer.exports == 0:
                self.free.append(buffer)
            self.condition.notify()
        return 0

    def close(self):
        """Free the buffers and wake all who wait. What is out is freed when it comes back."""
        with self.condition:
            self.closed = True
            self.free.clear()
            self.condition.notify_all()
