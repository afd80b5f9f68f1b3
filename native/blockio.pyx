"""Direct I/O on block devices and regular files."""

import errno
import os
import stat
from collections import namedtuple

from cpython.buffer cimport (
    PyBUF_SIMPLE,
    PyBUF_WRITABLE,
    PyBuffer_Release,
    PyObject_GetBuffer,
)
from libc.stdint cimport uint64_t

from native.blockio cimport (
    WS_UNREAD_MAX,
    WS_ZERO_PUNCH,
    WS_ZERO_ZEROOUT,
    ws_attempt,
    ws_dev_close,
    ws_dev_discard,
    ws_dev_flush,
    ws_dev_is_read_only,
    ws_dev_open,
    ws_dev_read,
    ws_dev_read_batch,
    ws_dev_set_read_only,
    ws_dev_size,
    ws_dev_write,
    ws_dev_write_batch,
    ws_dev_zero,
    ws_device,
    ws_loop,
    ws_loop_status,
    ws_next_data,
)

SECTOR_BYTES = 512
MAX_UNREAD = WS_UNREAD_MAX

Unread = namedtuple("Unread", ("volume", "offset_bytes", "length_bytes", "errno"))


cdef class BlockDevice:
    """An open block device or regular file, read and written with O_DIRECT."""

    def __cinit__(self, *_args, **_flags):
        # What __dealloc__ closes if nothing is opened.
        self.device.fd = self.device.tail_fd = -1
        self.device.logical = SECTOR_BYTES

    def __init__(self, path, *, bint writable=False, bint exclusive=False):
        if self.path is not None:
            raise TypeError(f"{self.path} is open already")
        self.path = os.fspath(path)
        self.writable = writable
        cdef bytes name = os.fsencode(self.path)
        if b"\0" in name:
            raise ValueError(f"{self.path!r} contains a null character")
        cdef const char *raw = name
        cdef const char *step = NULL
        cdef int rc
        with nogil:
            rc = ws_dev_open(&self.device, raw, writable, exclusive, &step)
        if rc != 0:
            raise OSError(-rc, f"{os.strerror(-rc)} ({step.decode()})", self.path)

    def __dealloc__(self):
        with nogil:
            ws_dev_close(&self.device)

    cdef ws_device *acquire(self) except NULL:
        if self.closing:
            raise ValueError(f"{self.path} is closed")
        self.users += 1
        return &self.device

    cdef int release(self) except -1:
        self.users -= 1
        if self.closing and self.users == 0:
            # The last close of a block device writes back its page cache.
            with nogil:
                ws_dev_close(&self.device)
        return 0

    cdef object failure(self, int rc, const ws_attempt *why):
        cdef str text = f"{os.strerror(-rc)} ({why.verb.decode()}"
        if why.length > 0:
            text += f" of {why.length} bytes at offset {why.offset}"
        if why.failed_at != why.offset:
            text += f", failed at {why.failed_at}"
        if -rc == errno.EINVAL:
            text += f"; logical block size {self.device.logical}"
        return OSError(-rc, text + ")", self.path)

    @property
    def is_block_device(self):
        """Whether this is a block device, not a file."""
        return self.device.is_block

    @property
    def direct(self):
        """Whether transfers go past the page cache."""
        return self.device.is_direct

    @property
    def logical_block_size_bytes(self):
        """The unit of offsets and lengths."""
        return self.device.logical

    @property
    def physical_block_size_bytes(self):
        """The unit that the device writes without reading first."""
        return self.device.physical

    @property
    def zero_methods(self):
        """What `zero` still tries, best first."""
        cdef unsigned refused = self.device.refused
        flags = (("punch", WS_ZERO_PUNCH), ("zeroout", WS_ZERO_ZEROOUT), ("write", 0))
        return tuple(name for name, flag in flags if not refused & flag)

    def size_bytes(self):
        """Ask the kernel now: devices and files can change size."""
        cdef uint64_t size = 0
        cdef int rc
        cdef ws_device *device = self.acquire()
        try:
            rc = ws_dev_size(device, &size)
        finally:
            self.release()
        if rc != 0:
            raise OSError(-rc, f"{os.strerror(-rc)} (ask the size)", self.path)
        return size

    def fileno(self):
        """Return the file descriptor, which stays this object's."""
        self.acquire()
        self.release()
        return self.device.fd

    def read(self, uint64_t offset_bytes, buffer):
        """Fill the whole buffer from `offset_bytes`."""
        self._transfer(offset_bytes, buffer, False)

    def write(self, uint64_t offset_bytes, buffer):
        """Write the whole buffer at `offset_bytes`."""
        self._transfer(offset_bytes, buffer, True)

    cdef object _transfer(self, uint64_t offset, object buffer, bint write):
        cdef Py_buffer view
        cdef ws_attempt why
        cdef int rc
        cdef ws_device *device = self.acquire()
        try:
            PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE if write else PyBUF_WRITABLE)
            with nogil:
                if write:
                    rc = ws_dev_write(device, view.buf, offset, <uint64_t>view.len, &why)
                else:
                    rc = ws_dev_read(device, view.buf, offset, <uint64_t>view.len, &why)
            PyBuffer_Release(&view)
        finally:
            self.release()
        if rc != 0:
            raise self.failure(rc, &why)

    def read_batch(self, const uint64_t[::1] extents, buffer):
        """Read offset, length pairs one after the other into `buffer`; return the bytes read."""
        return self._batch(extents, buffer, False)

    def write_batch(self, const uint64_t[::1] extents, buffer):
        """Write offset, length pairs one after the other from `buffer`; return the bytes."""
        return self._batch(extents, buffer, True)

    cdef object _batch(self, const uint64_t[::1] extents, object buffer, bint write):
        cdef uint64_t total = batch_bytes(extents)
        cdef Py_buffer view
        cdef ws_attempt why
        cdef int rc = 0
        cdef const uint64_t *pairs = &extents[0] if total else NULL
        cdef size_t count = <size_t>extents.shape[0] // 2 if total else 0
        cdef ws_device *device = self.acquire()
        try:
            PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE if write else PyBUF_WRITABLE)
            try:
                if total > <uint64_t>view.len:
                    raise ValueError(f"{total} bytes of extents, but a buffer of {view.len}")
                with nogil:
                    if write:
                        rc = ws_dev_write_batch(device, pairs, count, view.buf, &why)
                    else:
                        rc = ws_dev_read_batch(device, pairs, count, view.buf, &why)
            finally:
                PyBuffer_Release(&view)
        finally:
            self.release()
        if rc != 0:
            raise self.failure(rc, &why)
        return total

    def zero(self, uint64_t offset_bytes, uint64_t length_bytes):
        """Make the range read as zeros by the cheapest method that works here."""
        cdef ws_attempt why
        cdef int rc
        cdef ws_device *device = self.acquire()
        try:
            with nogil:
                rc = ws_dev_zero(device, offset_bytes, length_bytes, &why)
        finally:
            self.release()
        if rc != 0:
            raise self.failure(rc, &why)

    def discard(self, uint64_t offset_bytes, uint64_t length_bytes):
        """Give the range back to the device; OSError(EOPNOTSUPP) where that cannot be done."""
        cdef ws_attempt why
        cdef int rc
        cdef ws_device *device = self.acquire()
        try:
            with nogil:
                rc = ws_dev_discard(device, offset_bytes, length_bytes, &why)
        finally:
            self.release()
        if rc != 0:
            raise self.failure(rc, &why)

    def flush(self):
        """Make durable all that was written, here or through the page cache.

        After one that failed every other fails too, until the device is opened anew; of one that
        was opened to be read, the next is another try.
        """
        cdef ws_attempt why
        cdef int rc
        cdef ws_device *device = self.acquire()
        try:
            with nogil:
                rc = ws_dev_flush(device, &why)
        finally:
            self.release()
        if rc != 0:
            raise self.failure(rc, &why)

    def data_extents(self, uint64_t start_bytes=0, *, uint64_t least_bytes=0):
        """Iterate ranges (offset, length) that may hold data, or return None if nobody knows."""
        # What lies dirty in the page cache of a loop device is still a hole in its file.
        self.flush()
        cdef DataExtents walk = DataExtents.__new__(DataExtents)
        walk.device = self
        walk.least = least_bytes
        walk.limit = self.size_bytes()
        walk.position = start_bytes - start_bytes % self.device.logical
        if self.device.is_block:
            backing = _open_loop_backing(self.fileno())
            if backing is None:
                return None
            walk.fd, walk.base = backing
        return walk if walk.is_known() else None

    def is_read_only(self):
        """Return the read-only flag; for a file, whether nobody has write permission."""
        cdef int rc
        cdef ws_device *device = self.acquire()
        try:
            rc = ws_dev_is_read_only(device)
        finally:
            self.release()
        if rc < 0:
            raise OSError(-rc, f"{os.strerror(-rc)} (ask the read-only flag)", self.path)
        return bool(rc)

    def set_read_only(self, bint read_only):
        """Raise or lift the fence."""
        if not self.device.is_block:
            self._set_permission(read_only)
            return
        cdef int rc
        cdef ws_device *device = self.acquire()
        try:
            with nogil:
                rc = ws_dev_set_read_only(device, read_only)
        finally:
            self.release()
        if rc != 0:
            raise OSError(-rc, f"{os.strerror(-rc)} (set the read-only flag)", self.path)

    cdef object _set_permission(self, bint read_only):
        cdef ws_device *device = self.acquire()
        try:
            mode = stat.S_IMODE(os.fstat(device.fd).st_mode)
            if read_only:
                self.removed_mode |= mode & 0o222
                mode &= ~0o222
            else:
                # Another process may have raised the fence: the owner's permission at least.
                mode |= self.removed_mode or stat.S_IWUSR
                self.removed_mode = 0
            os.fchmod(device.fd, mode)
            os.fsync(device.fd)
        except OSError as error:
            error.filename = self.path
            raise
        finally:
            self.release()

    def close(self):
        """Close, or let the last call that is still running in another thread do it."""
        if not self.closing:
            self.users += 1
            self.closing = True
            self.release()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.close()


cdef uint64_t batch_bytes(const uint64_t[::1] extents) except? 0xffffffffffffffff:
    """Return the bytes of offset, length pairs together. ValueError for what is no such array."""
    cdef uint64_t total = 0
    cdef Py_ssize_t i
    if extents.shape[0] % 2:
        raise ValueError(f"{extents.shape[0]} numbers are not offset, length pairs")
    for i in range(1, extents.shape[0], 2):
        if extents[i] > <uint64_t>(1) << 48:
            raise ValueError(f"a length of {extents[i]} bytes is no length of an extent")
        total += extents[i]
    return total


cdef class DataExtents:
    """Walks the data of a file, its own or the one under a loop device, range by range."""

    cdef BlockDevice device
    cdef int fd
    cdef uint64_t base
    cdef uint64_t position
    cdef uint64_t limit
    cdef uint64_t least

    def __cinit__(self):
        self.fd = -1

    def __dealloc__(self):
        if self.fd >= 0:
            os.close(self.fd)

    def __iter__(self):
        return self

    cdef int find(self, uint64_t *start, uint64_t *end) except 1:
        """Find the next range, relative to the file. Returns 0 or -errno."""
        cdef int rc
        cdef ws_device *device = self.device.acquire()
        cdef int fd = self.fd if self.fd >= 0 else device.fd
        try:
            with nogil:
                rc = ws_next_data(
                    fd, self.base + self.position, self.base + self.limit, self.least, start, end
                )
        finally:
            self.device.release()
        return rc

    cdef bint is_known(self) except -1:
        cdef uint64_t start, end
        return self.find(&start, &end) == 0

    def __next__(self):
        cdef uint64_t start = 0, end = 0, unit = self.device.device.logical
        if self.find(&start, &end) != 0:
            # Whatever the file system cannot say any more counts as data.
            start, end = self.base + self.position, self.base + self.limit
        if start == end or self.position >= self.limit:
            raise StopIteration
        start, end = start - self.base, end - self.base
        start -= start % unit
        end = min(end + (unit - end % unit) % unit, self.limit)
        start = max(start, self.position)
        self.position = end
        return start, end - start


def _open_loop_backing(int fd):
    """Return (descriptor, offset) of the file that a loop device or partition stands on, or None.

    Anything unclear is None: no loop device, a file that is not found by its name here, is
    another one by now, or is no regular file.
    """
    cdef ws_loop loop
    try:
        number = os.fstat(fd).st_rdev
        node = f"/sys/dev/block/{os.major(number)}:{os.minor(number)}"
        is_partition = os.path.exists(f"{node}/partition")
        disk = os.path.realpath(f"{node}/.." if is_partition else node)
        start = int(_read(f"{node}/start")) * SECTOR_BYTES if is_partition else 0
        name = _read(f"{disk}/loop/backing_file").removesuffix(b"\n")
    except FileNotFoundError:
        return None
    if ws_loop_status(fd, &loop) != 0:
        return None
    try:
        backing = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return None
    status = os.fstat(backing)
    proven = status.st_dev == loop.device and status.st_ino == loop.inode
    if not proven or not stat.S_ISREG(status.st_mode):
        os.close(backing)
        return None
    return backing, loop.offset + start


def _read(path):
    with open(path, "rb") as file:
        return file.read()
