"""NBD exports, read as devices, and the dirty bitmaps that QEMU shows with them."""

import errno
import os

from libc.stdint cimport uint64_t
from libc.stdlib cimport free

from native.bitmap cimport DirtyBitmap, ws_bitmap
from native.blockio cimport BlockDevice, ws_remote

cdef extern from "nbd_impl.h" nogil:
    enum:
        WS_NBD_CONNECTIONS_MAX
    struct ws_nbd:
        pass
    struct ws_nbd_place:
        const char *socket
        const char *export_name "export"
        unsigned patience_ms
    const char *ws_nbd_version()
    int ws_nbd_open(const ws_nbd_place *place, size_t connections, ws_nbd **nbd)
    ws_remote *ws_nbd_remote(ws_nbd *nbd)
    int ws_nbd_redirect(ws_nbd *nbd, const ws_nbd_place *place)
    int ws_nbd_data(ws_nbd *nbd, uint64_t start, uint64_t least, uint64_t **pairs, size_t *count)
    int ws_nbd_marks(const ws_nbd_place *place, const char *const *contexts, size_t count,
                     const ws_bitmap *into)


def version():
    """Return the version of libnbd."""
    return ws_nbd_version().decode()


MAX_CONNECTIONS = WS_NBD_CONNECTIONS_MAX
MAX_CONTEXTS = 16


cdef object failure(int rc, str what, str path):
    return OSError(-rc, f"{os.strerror(-rc)} ({what})", path)


cdef class NbdDevice(BlockDevice):
    """An NBD export on a Unix socket, read through a few connections."""

    cdef ws_nbd *nbd
    cdef unsigned patience_ms

    def __init__(self, path, *, socket_path, export, size_t connections=4,
                 double patience_seconds=30.0):
        if self.path is not None:
            raise TypeError(f"{self.path} is open already")
        if not 1 <= connections <= WS_NBD_CONNECTIONS_MAX:
            raise ValueError(f"{connections} connections, not 1 to {WS_NBD_CONNECTIONS_MAX}")
        self.path = os.fspath(path)
        self.patience_ms = <unsigned>(patience_seconds * 1000)
        cdef bytes socket_name = os.fsencode(socket_path)
        cdef bytes name = export.encode()
        cdef ws_nbd_place place = ws_nbd_place(socket_name, name, self.patience_ms)
        cdef int rc
        with nogil:
            rc = ws_nbd_open(&place, connections, &self.nbd)
        if rc != 0:
            raise failure(rc, f"connect to {os.fspath(socket_path)}", self.path)
        # From here on it is closed with the device.
        self.device.remote = ws_nbd_remote(self.nbd)
        self.device.physical = 4096

    def redirect(self, *, socket_path, export):
        """Read from another place from now on."""
        cdef bytes socket_name = os.fsencode(socket_path)
        cdef bytes name = export.encode()
        cdef ws_nbd_place place = ws_nbd_place(socket_name, name, self.patience_ms)
        cdef int rc
        self.acquire()
        try:
            with nogil:
                rc = ws_nbd_redirect(self.nbd, &place)
        finally:
            self.release()
        if rc != 0:
            raise failure(rc, "redirect", self.path)

    def data_extents(self, uint64_t start_bytes=0, *, uint64_t least_bytes=0):
        """Iterate ranges that may not be zero, or return None where the server does not tell."""
        cdef uint64_t *pairs = NULL
        cdef size_t count = 0, i
        cdef int rc
        start_bytes -= start_bytes % self.device.logical
        self.acquire()
        try:
            with nogil:
                rc = ws_nbd_data(self.nbd, start_bytes, least_bytes, &pairs, &count)
        finally:
            self.release()
        if rc == -errno.ENOTSUP:
            return None
        if rc != 0:
            raise failure(rc, "ask where data is", self.path)
        try:
            return iter([(pairs[2 * i], pairs[2 * i + 1]) for i in range(count)])
        finally:
            free(pairs)


def read_marks(socket_path, export, bitmaps, DirtyBitmap into not None, *,
               double patience_seconds=30.0):
    """Mark in `into` what any of an export's dirty bitmaps has."""
    cdef const char *contexts[16]
    cdef list names = [f"qemu:dirty-bitmap:{bitmap}".encode() for bitmap in bitmaps]
    if not 1 <= len(names) <= MAX_CONTEXTS:
        raise ValueError(f"{len(names)} bitmaps, not 1 to {MAX_CONTEXTS}")
    cdef size_t count = len(names), i
    for i in range(count):
        contexts[i] = names[i]
    cdef bytes socket_name = os.fsencode(socket_path)
    cdef bytes name = export.encode()
    cdef ws_nbd_place place = ws_nbd_place(socket_name, name, <unsigned>(patience_seconds * 1000))
    cdef int rc
    with nogil:
        rc = ws_nbd_marks(&place, contexts, count, &into.map)
    if rc != 0:
        raise failure(rc, f"read bitmaps of {export}", os.fspath(socket_path))
