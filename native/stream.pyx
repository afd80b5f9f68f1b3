"""Frames over TCP, in the clear or under TLS 1.3, on native threads."""

import os
import time

from cpython.buffer cimport (
    PyBUF_SIMPLE,
    PyBUF_WRITABLE,
    PyBuffer_Release,
    PyObject_GetBuffer,
)
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from native.bitmap cimport DirtyBitmap, ws_bitmap
from native.blockio cimport BlockDevice, ws_attempt, ws_device, ws_unread
from native.chunk cimport WS_CHUNK_BYTES, WS_DIGEST_BYTES, init_chunk

from native.blockio import Unread
from native.frame import MAX_PAYLOAD_BYTES, FrameError

cdef extern from "stream_impl.h" nogil:
    enum:
        WS_TOKEN_ID_BYTES
        WS_TOKEN_BYTES
        WS_CONNECTIONS_MAX
    enum ws_failure:
        WS_DONE
        WS_READ_FAILED
        WS_WRITE_FAILED
        WS_BAD_FRAME
        WS_BAD_TURN
        WS_MISSING
        WS_LOST
        WS_STOPPED
        WS_NO_MEMORY
    struct ws_loss:
        int error
        char *text
    struct ws_fault:
        const char *field
        const char *rule
        uint64_t found
        uint64_t wanted
        int64_t index
    struct ws_outcome:
        ws_failure failure
        int rc
        uint32_t volume
        ws_attempt why
        ws_fault fault
        ws_loss loss
    struct ws_volume:
        ws_device *device
        uint8_t *digests
        uint64_t digests_bytes
        uint64_t size_bytes
        const ws_bitmap *stale
    struct ws_job:
        uint32_t volume
        const ws_bitmap *marks
    struct ws_left_out:
        size_t count
        uint32_t *volumes
        ws_unread *ranges
    struct ws_sink:
        ws_device *device
        uint64_t size_bytes
        const ws_bitmap *written
    struct ws_manner:
        bint compress
        bint ring
        unsigned patience_seconds
        unsigned ack_seconds
    struct ws_ring:
        pass
    struct ws_tokens:
        pass
    struct ws_conn:
        pass
    struct ws_pace:
        pass
    struct ws_sender:
        pass
    struct ws_receiver:
        pass
    ws_ring *ws_ring_new()
    void ws_ring_free(ws_ring *ring)
    ws_tokens *ws_tokens_new()
    void ws_tokens_free(ws_tokens *tokens)
    int ws_tokens_add(ws_tokens *tokens, const uint8_t *token, uint64_t deadline_ns)
    void ws_tokens_revoke(ws_tokens *tokens, const uint8_t *id)
    size_t ws_tokens_count(ws_tokens *tokens)
    ws_conn *ws_conn_new(int fd)
    void ws_conn_free(ws_conn *conn)
    int ws_conn_open(ws_conn *conn, const uint8_t *token, bint tls, bint ktls, unsigned timeout_ms,
                     ws_loss *loss)
    int ws_conn_accept(ws_conn *conn, ws_tokens *tokens, bint tls, bint ktls, unsigned timeout_ms,
                       uint8_t *id, ws_loss *loss)
    void ws_conn_cut(ws_conn *conn)
    void ws_conn_describe(const ws_conn *conn, char *out, size_t size)
    void ws_pace_limit(ws_pace *pace, uint64_t bytes_per_second)
    void ws_pace_pause(ws_pace *pace, bint paused)
    ws_sender *ws_sender_new(ws_conn **conns, size_t count, const ws_manner *manner)
    void ws_sender_free(ws_sender *sender)
    ws_pace *ws_sender_pace(ws_sender *sender)
    void ws_sender_tune(ws_sender *sender, uint32_t frame_bytes, uint32_t gap_bytes, int nice)
    void ws_sender_send(ws_sender *sender, const ws_volume *volumes, const ws_job *jobs,
                        size_t count, uint64_t generation, ws_left_out *left_out,
                        ws_outcome *outcome)
    void ws_sender_send_frame(ws_sender *sender, const void *frame, size_t size,
                              ws_outcome *outcome)
    void ws_sender_end(ws_sender *sender, uint64_t generation, uint64_t *flush_ns,
                       ws_outcome *outcome)
    int ws_sender_check(ws_sender *sender, ws_loss *loss)
    void ws_sender_stop(ws_sender *sender)
    void ws_sender_cut(ws_sender *sender)
    void ws_sender_count(ws_sender *sender, uint64_t *done_bytes, uint64_t *wire_bytes,
                         uint64_t *packed_frames)
    ws_receiver *ws_receiver_new(const ws_sink *sinks, size_t sink_count, size_t conns,
                                 uint64_t generation, bint ring)
    int ws_receiver_add(ws_receiver *receiver, ws_conn *conn, bint first)
    void ws_receiver_wait(ws_receiver *receiver, ws_outcome *outcome)
    void ws_receiver_acknowledge(ws_receiver *receiver, uint64_t flush_ns)
    void ws_receiver_stop(ws_receiver *receiver)
    void ws_receiver_join(ws_receiver *receiver)
    void ws_receiver_free(ws_receiver *receiver)
    void ws_receiver_count(ws_receiver *receiver, uint64_t *wire_bytes, uint64_t *generation)

init_chunk()

TOKEN_BYTES = WS_TOKEN_BYTES
TOKEN_ID_BYTES = WS_TOKEN_ID_BYTES
MAX_CONNECTIONS = WS_CONNECTIONS_MAX
MAX_VOLUMES = 64


def ring_works():
    """Return whether this kernel, and what confines us, lets us have an io_uring."""
    cdef ws_ring *ring = ws_ring_new()
    cdef bint works = ring != NULL
    ws_ring_free(ring)
    return works


class ConnectionLost(ConnectionError):  # noqa: N818
    """A connection that could not be made, or has ended."""


class WrongGeneration(FrameError):
    """A round of another generation than the open one has ended."""


class FramesMissing(FrameError):
    """A round has ended of which fewer frames have arrived than were sent."""


class Stopped(Exception):  # noqa: N818
    """The call was ended by `stop`."""


cdef object lost(const ws_loss *loss):
    return ConnectionLost(loss.error, (<bytes>loss.text).decode("utf-8", "replace"))


cdef str fault_text(const ws_fault *fault):
    place = "" if fault.index < 0 else f"extent {fault.index}: "
    return f"{place}{fault.field.decode()} is {fault.found}, {fault.rule.decode()} {fault.wanted}"


cdef object error_of(const ws_outcome *outcome, tuple devices):
    """Return what an outcome is raised as; `devices` are those of its volumes."""
    if outcome.failure in (WS_READ_FAILED, WS_WRITE_FAILED):
        return (<BlockDevice>devices[outcome.volume]).failure(outcome.rc, &outcome.why)
    if outcome.failure == WS_BAD_FRAME:
        return FrameError(fault_text(&outcome.fault))
    if outcome.failure == WS_BAD_TURN:
        return WrongGeneration(fault_text(&outcome.fault))
    if outcome.failure == WS_MISSING:
        return FramesMissing(fault_text(&outcome.fault))
    if outcome.failure == WS_LOST:
        return lost(&outcome.loss)
    if outcome.failure == WS_NO_MEMORY:
        return MemoryError()
    return Stopped()


cdef list unread_of(const ws_left_out *left_out):
    cdef size_t i
    found = []
    for i in range(left_out.count):
        one = left_out.ranges[i]
        found.append(Unread(left_out.volumes[i], one.offset, one.length, one.error))
    return found


cdef class Tokens:
    """One-time tokens of an agent. Thread-safe."""

    cdef ws_tokens *tokens

    def __cinit__(self):
        self.tokens = ws_tokens_new()
        if self.tokens == NULL:
            raise MemoryError

    def __dealloc__(self):
        ws_tokens_free(self.tokens)

    def issue(self, double good_for_seconds):
        """Return a new token of TOKEN_BYTES; its first TOKEN_ID_BYTES name it."""
        cdef bytes token = os.urandom(WS_TOKEN_BYTES)
        deadline = time.clock_gettime_ns(time.CLOCK_MONOTONIC) + int(good_for_seconds * 1e9)
        if ws_tokens_add(self.tokens, <const uint8_t *>PyBytes_AS_STRING(token), deadline) != 0:
            raise MemoryError
        return token

    def revoke(self, bytes token_id not None):
        """Forget a token, spent or not; none of that name is no error."""
        if len(token_id) != WS_TOKEN_ID_BYTES:
            raise ValueError(f"a name of {len(token_id)} bytes, not {WS_TOKEN_ID_BYTES}")
        ws_tokens_revoke(self.tokens, <const uint8_t *>PyBytes_AS_STRING(token_id))

    def __len__(self):
        return ws_tokens_count(self.tokens)


cdef class Connection:
    """A connected socket on which a token was shown and taken. Takes the descriptor over."""

    cdef ws_conn *conn
    cdef readonly str description
    cdef readonly bytes token_id

    def __init__(self):
        raise TypeError("a Connection comes from Connection.open or Connection.accept")

    def __dealloc__(self):
        ws_conn_free(self.conn)

    @staticmethod
    def open(int descriptor, bytes token not None, *, bint tls, bint ktls=False,
             double timeout_seconds=5.0):
        """Greet the target."""
        cdef Connection self = Connection._take(descriptor)
        if len(token) != WS_TOKEN_BYTES:
            raise ValueError(f"a token of {len(token)} bytes, not {WS_TOKEN_BYTES}")
        cdef const uint8_t *raw = <const uint8_t *>PyBytes_AS_STRING(token)
        cdef unsigned timeout_ms = <unsigned>(timeout_seconds * 1000)
        cdef ws_loss loss
        cdef int rc
        with nogil:
            rc = ws_conn_open(self.conn, raw, tls, ktls, timeout_ms, &loss)
        return self._opened(rc, &loss, token[:WS_TOKEN_ID_BYTES])

    @staticmethod
    def accept(int descriptor, Tokens tokens not None, *, bint tls, bint ktls=False,
               double timeout_seconds=5.0):
        """Let a source in that has a token."""
        cdef Connection self = Connection._take(descriptor)
        cdef unsigned timeout_ms = <unsigned>(timeout_seconds * 1000)
        cdef uint8_t[16] name
        cdef ws_loss loss
        cdef int rc
        with nogil:
            rc = ws_conn_accept(
                self.conn, tokens.tokens, tls, ktls, timeout_ms, &name[0], &loss
            )
        return self._opened(
            rc, &loss, PyBytes_FromStringAndSize(<char *>&name[0], WS_TOKEN_ID_BYTES)
        )

    @staticmethod
    cdef Connection _take(int descriptor):
        cdef Connection self = Connection.__new__(Connection)
        self.conn = ws_conn_new(descriptor)
        if self.conn == NULL:
            raise MemoryError
        return self

    cdef Connection _opened(self, int rc, const ws_loss *loss, bytes token_id):
        cdef char[128] text
        if rc != 0:
            ws_conn_free(self.conn)
            self.conn = NULL
            raise lost(loss)
        ws_conn_describe(self.conn, &text[0], sizeof(text))
        self.description = (<bytes>(&text[0])).decode()
        self.token_id = token_id
        return self

    cdef ws_conn *give(self) except NULL:
        """Hand the connection to somebody who will free it."""
        if self.conn == NULL:
            raise ValueError("the connection has been given away or closed")
        cdef ws_conn *conn = self.conn
        self.conn = NULL
        return conn

    def close(self):
        """Close it. Safe to call twice."""
        ws_conn_free(self.conn)
        self.conn = NULL


cdef class Sender:
    """The source's end of the connections of one session."""

    cdef ws_sender *sender
    cdef tuple devices
    cdef tuple digests
    cdef tuple stale
    cdef bint busy

    def __cinit__(self, connections, devices, digests, *, stale=None, bint compress=False,
                  bint ring=True, unsigned patience_seconds=60, unsigned ack_seconds=300):
        cdef ws_manner manner = ws_manner(compress, ring, patience_seconds, ack_seconds)
        cdef ws_conn *conns[64]
        cdef size_t count = 0
        if not 1 <= len(connections) <= WS_CONNECTIONS_MAX:
            raise ValueError(f"{len(connections)} connections, not 1 to {WS_CONNECTIONS_MAX}")
        if not 1 <= len(devices) <= MAX_VOLUMES or len(digests) != len(devices):
            raise ValueError(f"{len(devices)} devices with {len(digests)} tables of digests")
        self.devices, self.digests = tuple(devices), tuple(digests)
        self.stale = (None,) * len(devices) if stale is None else tuple(stale)
        if len(self.stale) != len(devices):
            raise ValueError(f"{len(devices)} devices with {len(self.stale)} bitmaps")
        for connection in connections:
            conns[count] = (<Connection?>connection).conn
            if conns[count] == NULL:
                raise ValueError("the connection has been given away or closed")
            count += 1
        self.sender = ws_sender_new(&conns[0], count, &manner)
        if self.sender == NULL:
            raise MemoryError
        for connection in connections:
            (<Connection>connection).give()

    def __dealloc__(self):
        ws_sender_free(self.sender)

    cdef int begin(self) except -1:
        if self.sender == NULL:
            raise ValueError("the sender is closed")
        if self.busy:
            raise RuntimeError("the sender is at work in another thread")
        self.busy = True
        return 0

    def tune(self, *, uint32_t frame_bytes, uint32_t gap_bytes, int nice):
        """Set the size of frames, of gaps that are sent too, and the niceness of the threads."""
        if not 65536 <= frame_bytes <= MAX_PAYLOAD_BYTES or frame_bytes % 65536:
            raise ValueError(f"frames of {frame_bytes} bytes: use a multiple of 65536 up to 1 MiB")
        self._open()
        ws_sender_tune(self.sender, frame_bytes, gap_bytes, nice)

    def send(self, jobs, uint64_t generation):
        """Read and send all that is marked; return what could not be read."""
        cdef ws_volume volumes[64]
        cdef ws_job raw[64]
        cdef ws_outcome outcome
        cdef ws_left_out left_out
        cdef size_t count = 0
        cdef list views = []
        jobs = tuple(jobs)
        if len(jobs) > MAX_VOLUMES:
            raise ValueError(f"{len(jobs)} jobs, more than {MAX_VOLUMES}")
        for volume, marks in jobs:
            check_job(self.devices, self.digests, self.stale, volume, marks)
            raw[count].volume = volume
            raw[count].marks = &(<DirtyBitmap>marks).map
            count += 1
        self.begin()
        cdef int held = 0
        try:
            for device in self.devices:
                volumes[held].device = (<BlockDevice>device).acquire()
                volumes[held].digests = NULL
                volumes[held].digests_bytes = 0
                volumes[held].size_bytes = 0
                volumes[held].stale = NULL
                if self.stale[held] is not None:
                    volumes[held].stale = &(<DirtyBitmap>self.stale[held]).map
                held += 1
                table = self.digests[held - 1]
                if table is not None:
                    views.append(View(table))
                    volumes[held - 1].digests = (<View>views[-1]).data
                    volumes[held - 1].digests_bytes = (<View>views[-1]).size
            for volume, marks in jobs:
                volumes[<size_t>volume].size_bytes = marks.size_bytes
            with nogil:
                ws_sender_send(
                    self.sender, volumes, raw, count, generation, &left_out, &outcome
                )
        finally:
            for device in self.devices[:held]:
                (<BlockDevice>device).release()
            self.busy = False
        if outcome.failure != WS_DONE:
            raise error_of(&outcome, self.devices)
        return unread_of(&left_out)

    def send_frame(self, const uint8_t[::1] frame not None):
        """Send one frame that is ready."""
        cdef ws_outcome outcome
        self.begin()
        try:
            with nogil:
                ws_sender_send_frame(
                    self.sender, &frame[0], <size_t>frame.shape[0], &outcome
                )
        finally:
            self.busy = False
        if outcome.failure != WS_DONE:
            raise error_of(&outcome, self.devices)

    def end(self, uint64_t generation):
        """End the round; return the seconds of the target's flush once it is durable there."""
        cdef ws_outcome outcome
        cdef uint64_t flush_ns = 0
        self.begin()
        try:
            with nogil:
                ws_sender_end(self.sender, generation, &flush_ns, &outcome)
        finally:
            self.busy = False
        if outcome.failure != WS_DONE:
            raise error_of(&outcome, self.devices)
        return flush_ns / 1e9

    def check(self):
        """Raise ConnectionLost if a connection is known to be lost."""
        cdef ws_loss loss
        self._open()
        if not self.busy and ws_sender_check(self.sender, &loss) != 0:
            raise lost(&loss)

    def limit(self, uint64_t bytes_per_second):
        """Send at most so much; 0 is no limit."""
        self._open()
        ws_pace_limit(ws_sender_pace(self.sender), bytes_per_second)

    def pause(self, bint paused):
        """Stop reading and sending, or go on."""
        self._open()
        ws_pace_pause(ws_sender_pace(self.sender), paused)

    def stop(self):
        """End a call that runs before its next frame, and all to come."""
        if self.sender != NULL:
            ws_sender_stop(self.sender)

    def cut(self):
        """End the connections at once: a call that runs fails."""
        if self.sender != NULL:
            ws_sender_cut(self.sender)

    def counters(self):
        """Return (bytes of the volumes that were sent, bytes on the wire, compressed frames)."""
        cdef uint64_t done = 0, wire = 0, packed = 0
        if self.sender != NULL:
            ws_sender_count(self.sender, &done, &wire, &packed)
        return done, wire, packed

    def close(self):
        """Close the connections; RuntimeError while a call runs. Safe to call twice."""
        if self.busy:
            raise RuntimeError("the sender is at work in another thread")
        ws_sender_free(self.sender)
        self.sender = NULL

    cdef int _open(self) except -1:
        if self.sender == NULL:
            raise ValueError("the sender is closed")
        return 0


cdef class View:
    """A writable buffer, held while native code writes to it."""

    cdef Py_buffer view
    cdef uint8_t *data
    cdef uint64_t size

    def __cinit__(self, table):
        PyObject_GetBuffer(table, &self.view, PyBUF_WRITABLE | PyBUF_SIMPLE)
        self.data, self.size = <uint8_t *>self.view.buf, <uint64_t>self.view.len

    def __dealloc__(self):
        PyBuffer_Release(&self.view)


cdef object check_table(table, uint64_t size):
    cdef uint64_t chunks = (size + WS_CHUNK_BYTES - 1) // WS_CHUNK_BYTES
    cdef View view = View(table)
    if view.size < chunks * WS_DIGEST_BYTES:
        raise ValueError(f"a digest table of {view.size} bytes for {chunks} chunks")


cdef object check_job(tuple devices, tuple digests, tuple stale, volume, marks):
    if not 0 <= volume < len(devices):
        raise ValueError(f"volume {volume} of {len(devices)}")
    cdef DirtyBitmap bitmap = <DirtyBitmap?>marks
    if bitmap.size_bytes > devices[volume].size_bytes():
        raise ValueError(
            f"marks of {bitmap.size_bytes} bytes for {devices[volume].path}, which is smaller"
        )
    if digests[volume] is not None:
        check_table(digests[volume], bitmap.size_bytes)
    if stale[volume] is not None:
        if (<DirtyBitmap?>stale[volume]).size_bytes != bitmap.size_bytes:
            raise ValueError(f"marks of {bitmap.size_bytes}, stale of {stale[volume].size_bytes}")
    elif digests[volume] is not None and bitmap.block_size_bytes % WS_CHUNK_BYTES:
        raise ValueError(f"blocks of {bitmap.block_size_bytes} bytes are not whole chunks")


cdef class Receiver:
    """The target's end of the connections of one session."""

    cdef ws_receiver *receiver
    cdef tuple devices
    cdef tuple written
    cdef int held
    cdef int users

    def __cinit__(self, devices, sizes_bytes, *, size_t connections, uint64_t generation,
                  written=None, bint ring=True):
        cdef ws_sink sinks[64]
        self.devices = tuple(devices)
        if not 1 <= len(self.devices) <= MAX_VOLUMES or len(sizes_bytes) != len(self.devices):
            raise ValueError(f"{len(self.devices)} devices with {len(sizes_bytes)} sizes")
        if not 1 <= connections <= WS_CONNECTIONS_MAX:
            raise ValueError(f"{connections} connections, not 1 to {WS_CONNECTIONS_MAX}")
        self.written = (None,) * len(self.devices) if written is None else tuple(written)
        for marks, size in zip(self.written, sizes_bytes, strict=True):
            if marks is not None and (<DirtyBitmap?>marks).size_bytes != size:
                raise ValueError(f"marks of {marks.size_bytes} bytes for a volume of {size}")
        try:
            for device, size in zip(self.devices, sizes_bytes):
                sinks[self.held].device = (<BlockDevice?>device).acquire()
                sinks[self.held].size_bytes = size
                sinks[self.held].written = NULL
                if self.written[self.held] is not None:
                    sinks[self.held].written = &(<DirtyBitmap>self.written[self.held]).map
                self.held += 1
            self.receiver = ws_receiver_new(
                sinks, <size_t>len(self.devices), connections, generation, ring
            )
            if self.receiver == NULL:
                raise MemoryError
        except BaseException:
            self._release()
            raise

    def __dealloc__(self):
        if self.receiver != NULL:
            with nogil:
                ws_receiver_stop(self.receiver)
                ws_receiver_join(self.receiver)
            ws_receiver_free(self.receiver)
        self._release()

    cdef int _release(self) except -1:
        while self.held:
            self.held -= 1
            (<BlockDevice>self.devices[self.held]).release()
        self.written = ()  # mapped files keep descriptors
        return 0

    def add(self, Connection connection not None, *, bint first):
        """Start to receive on a connection."""
        if self.receiver == NULL:
            raise ValueError("the receiver is closed")
        cdef int rc = ws_receiver_add(self.receiver, connection.give(), first)
        if rc != 0:
            raise OSError(-rc, os.strerror(-rc))

    def wait(self):
        """Return once a round has ended on all connections; raise what ended the session."""
        cdef ws_outcome outcome
        if self.receiver == NULL:
            raise Stopped
        self.users += 1
        try:
            with nogil:
                ws_receiver_wait(self.receiver, &outcome)
        finally:
            self.users -= 1
        if outcome.failure != WS_DONE:
            raise error_of(&outcome, self.devices)

    def acknowledge(self, double flush_seconds):
        """Tell the source that the round is durable; the next generation is open."""
        if self.receiver != NULL:
            ws_receiver_acknowledge(self.receiver, <uint64_t>(flush_seconds * 1e9))

    @property
    def generation(self):
        """The generation that is open."""
        cdef uint64_t wire = 0, generation = 0
        if self.receiver != NULL:
            ws_receiver_count(self.receiver, &wire, &generation)
        return generation

    @property
    def received_bytes(self):
        """Bytes of frames so far."""
        cdef uint64_t wire = 0, generation = 0
        if self.receiver != NULL:
            ws_receiver_count(self.receiver, &wire, &generation)
        return wire

    def stop(self):
        """Cut all connections, and end `wait`. Does not wait."""
        if self.receiver != NULL:
            ws_receiver_stop(self.receiver)

    def join(self):
        """Wait, without the GIL, for what is being written; then give the devices back."""
        if self.receiver != NULL:
            self.users += 1
            try:
                with nogil:
                    ws_receiver_stop(self.receiver)
                    ws_receiver_join(self.receiver)
            finally:
                self.users -= 1
            self._release()
