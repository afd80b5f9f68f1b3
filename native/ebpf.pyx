"""The in-kernel dirty bitmap: loads dirty.bpf.c, attaches it, pins it, maps its memory."""

import os
from collections import namedtuple
from pathlib import Path

from cpython.buffer cimport PyBUF_FORMAT, PyBUF_ND, PyBUF_STRIDES
from libc.errno cimport EPERM
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc

cdef extern from "ebpf_impl.h" nogil:
    struct dirty_range:
        uint32_t major
        uint32_t minor
        uint64_t disk_sequence
        uint64_t start_sector
        uint64_t sector_count
        uint64_t block_size_bytes
        uint32_t bio_based
        uint32_t word_count
        uint32_t queue_count
        uint32_t queue_depth
        uint64_t seen
        uint64_t lost
        uint64_t has_base
        int64_t base_written
        int64_t base_discarded
    struct dirty_sum:
        pass
    ctypedef struct ws_failure:
        char *attempt
        size_t log_bytes
        char *log
    ctypedef struct ws_tracker:
        dirty_range *range
        uint64_t *words
        size_t words_bytes
        void *slots
        int bios
        dirty_sum *sums
        unsigned int cpus
    ctypedef struct ws_in_flight:
        uint64_t key
        uint64_t sector
        uint64_t state
    int64_t ws_tracker_in_flight(const ws_tracker *tracker, ws_in_flight *out, size_t room)
    int ws_tracker_forget(const ws_tracker *tracker, const ws_in_flight *write)
    void ws_tracker_unmap(ws_tracker *tracker)
    int ws_tracker_check(const char *object, ws_failure *failure)
    int ws_tracker_attach(const char *object, const dirty_range *range, const char *pin_dir,
                          ws_tracker *tracker, ws_failure *failure)
    int ws_tracker_open(const char *pin_dir, ws_tracker *tracker, ws_failure *failure)
    int ws_tracker_remove(const char *pin_dir, ws_failure *failure)
    void ws_tracker_sum(const ws_tracker *tracker, uint64_t *written, uint64_t *discarded)
    uint64_t ws_tracker_load(const uint64_t *counter)
    void ws_tracker_unmap_words(uint64_t *words, size_t bytes)

SECTOR_BYTES = 512
BITS_PER_WORD = 64
MAX_WORDS = (1 << 32) - 1
MAX_SECTORS = 1 << 55
MAX_BLOCK_BYTES = 1 << 30
MAX_SLOTS = 1 << 20

TrackedRange = namedtuple(
    "TrackedRange",
    "major minor disk_sequence start_sector sector_count block_size_bytes bio_based "
    "queue_count queue_depth",
)
InFlight = namedtuple("InFlight", "key sector sector_count state")
Counters = namedtuple("Counters", "seen lost")
Sectors = namedtuple("Sectors", "written discarded")

cdef char *WORD_FORMAT = b"Q"
cdef bytes OBJECT = bytes(Path(__file__).with_name("dirty.bpf.o"))


cdef object explain(int code, ws_failure *failure):
    """An OSError that says what was attempted, with libbpf's words in a note."""
    attempt, log = (<bytes>failure.attempt).decode(), (<bytes>failure.log).decode(errors="replace")
    error = OSError(code, f"{os.strerror(code)}: could not {attempt}")
    if log.strip():
        error.add_note(log.strip())
    return error


cdef void forget_mapping(ws_tracker *mapped) noexcept:
    mapped.range, mapped.words, mapped.words_bytes = NULL, NULL, 0
    mapped.slots, mapped.bios = NULL, -1
    mapped.sums, mapped.cpus = NULL, 0


cdef void clear(ws_failure *failure) noexcept:
    failure.attempt[0] = 0
    failure.log[0] = 0
    failure.log_bytes = 0


cdef object check_watch(object watch):
    """Return how many words the bitmap needs; ValueError says what is out of range."""
    block = watch.block_size_bytes
    if block < SECTOR_BYTES or block > MAX_BLOCK_BYTES or block & (block - 1):
        raise ValueError(f"block_size_bytes is {block}: it must be a power of two, 512 to 1 GiB")
    if not 0 < watch.sector_count <= MAX_SECTORS or not 0 <= watch.start_sector <= MAX_SECTORS:
        raise ValueError(
            f"start_sector {watch.start_sector}, sector_count {watch.sector_count}: no such range"
        )
    if not watch.bio_based and not 0 < watch.queue_count * watch.queue_depth <= MAX_SLOTS:
        raise ValueError(f"{watch.queue_count} queues of {watch.queue_depth} tags: no such disk")
    blocks = -(-watch.sector_count * SECTOR_BYTES // block)
    words = -(-blocks // BITS_PER_WORD)
    if words > MAX_WORDS:
        raise ValueError(f"{blocks} blocks are too many for one map: use larger blocks")
    return words


cdef dirty_range describe(object watch) except *:
    cdef dirty_range described
    words = check_watch(watch)
    described.word_count = words
    described.major = watch.major
    described.minor = watch.minor
    described.disk_sequence = watch.disk_sequence
    described.start_sector = watch.start_sector
    described.sector_count = watch.sector_count
    described.block_size_bytes = watch.block_size_bytes
    described.bio_based = bool(watch.bio_based)
    described.queue_count = watch.queue_count
    described.queue_depth = watch.queue_depth
    described.seen = 0
    described.lost = 0
    described.has_base = 0
    described.base_written = 0
    described.base_discarded = 0
    return described


def check():
    """Try to load (not attach) the programs. Returns None, or why this kernel cannot."""
    cdef ws_failure failure
    cdef int code
    cdef const char *path = OBJECT
    clear(&failure)
    with nogil:
        code = ws_tracker_check(path, &failure)
    if code == 0:
        return None
    hint = " (root, or CAP_BPF, CAP_PERFMON and CAP_SYS_ADMIN, is needed)" if code == EPERM else ""
    return f"{explain(code, &failure).strerror}{hint}"


def remove(object pin_dir):
    """Remove the pins in `pin_dir` and the directory: nothing marks there any more."""
    cdef ws_failure failure
    cdef int code
    cdef bytes directory = os.fsencode(pin_dir)
    cdef const char *path = directory
    clear(&failure)
    with nogil:
        code = ws_tracker_remove(path, &failure)
    if code:
        raise explain(code, &failure)


cdef class Words:
    """The mapped bitmap. Lives as long as a view of it: the tracker may be closed before."""

    cdef uint64_t *words
    cdef size_t mapped_bytes
    cdef Py_ssize_t count
    cdef Py_ssize_t stride

    def __dealloc__(self):
        ws_tracker_unmap_words(self.words, self.mapped_bytes)

    def __getbuffer__(self, Py_buffer *view, int flags):
        view.buf = self.words
        view.obj = self
        view.len = self.count * self.stride
        view.itemsize = self.stride
        view.readonly = False
        view.ndim = 1
        view.format = WORD_FORMAT if flags & PyBUF_FORMAT else NULL
        view.shape = &self.count if flags & PyBUF_ND else NULL
        view.strides = &self.stride if (flags & PyBUF_STRIDES) == PyBUF_STRIDES else NULL
        view.suboffsets = NULL
        view.internal = NULL


cdef class KernelTracker:
    """Programs attached to the block layer for one range of one disk."""

    cdef ws_tracker mapped
    cdef Words memory
    cdef readonly object pin_dir

    def __cinit__(self):
        forget_mapping(&self.mapped)

    def __init__(self):
        raise TypeError("use KernelTracker.attach or KernelTracker.open")

    def __dealloc__(self):
        ws_tracker_unmap(&self.mapped)

    @staticmethod
    cdef KernelTracker adopt(object pin_dir, ws_tracker *mapped):
        cdef Words memory = Words.__new__(Words)
        cdef KernelTracker tracker = KernelTracker.__new__(KernelTracker)
        memory.words, memory.mapped_bytes = mapped.words, mapped.words_bytes
        memory.count, memory.stride = mapped.range.word_count, sizeof(uint64_t)
        tracker.mapped, tracker.memory, tracker.pin_dir = mapped[0], memory, pin_dir
        return tracker

    @classmethod
    def attach(cls, object watch, object pin_dir):
        """Load, attach and pin; all of it is undone if a step fails."""
        cdef ws_failure failure
        cdef ws_tracker mapped
        cdef int code
        cdef dirty_range described = describe(watch)
        cdef bytes directory = os.fsencode(pin_dir)
        cdef const char *path = directory
        cdef const char *program = OBJECT
        forget_mapping(&mapped)
        clear(&failure)
        with nogil:
            code = ws_tracker_attach(program, &described, path, &mapped, &failure)
        if code:
            raise explain(code, &failure)
        return KernelTracker.adopt(pin_dir, &mapped)

    @classmethod
    def open(cls, object pin_dir):
        """Take up pinned programs again. OSError(ENOENT) if incomplete."""
        cdef ws_failure failure
        cdef ws_tracker mapped
        cdef int code
        cdef bytes directory = os.fsencode(pin_dir)
        cdef const char *path = directory
        forget_mapping(&mapped)
        clear(&failure)
        with nogil:
            code = ws_tracker_open(path, &mapped, &failure)
        if code:
            raise explain(code, &failure)
        return KernelTracker.adopt(pin_dir, &mapped)

    cdef dirty_range *described(self) except NULL:
        if self.mapped.range == NULL:
            raise ValueError(f"the tracker of {self.pin_dir} is closed")
        return self.mapped.range

    @property
    def watch(self):
        """What is watched, as it is recorded beside the bitmap."""
        cdef dirty_range *of = self.described()
        return TrackedRange(
            of.major,
            of.minor,
            of.disk_sequence,
            of.start_sector,
            of.sector_count,
            of.block_size_bytes,
            bool(of.bio_based),
            of.queue_count,
            of.queue_depth,
        )

    @property
    def words(self):
        """The bitmap's words (writable, format "Q"), shared with the kernel."""
        self.described()
        return memoryview(self.memory)

    def counters(self):
        """What the programs counted since they were attached."""
        cdef dirty_range *of = self.described()
        return Counters(ws_tracker_load(&of.seen), ws_tracker_load(&of.lost))

    def sums(self):
        """The sectors that the programs saw written and discarded, on the whole disk."""
        cdef uint64_t written = 0, discarded = 0
        self.described()
        ws_tracker_sum(&self.mapped, &written, &discarded)
        return Sectors(written, discarded)

    @property
    def base(self):
        """What was kept with the pins; None if nothing."""
        cdef dirty_range *of = self.described()
        return Sectors(of.base_written, of.base_discarded) if of.has_base else None

    @base.setter
    def base(self, object base):
        cdef dirty_range *of = self.described()
        of.has_base = 0
        if base is not None:
            of.base_written, of.base_discarded = base
            of.has_base = 1

    def in_flight(self):
        """Return the writes that were issued and not seen to complete."""
        self.described()
        cdef int64_t count, room = 1024
        cdef ws_in_flight *found
        while True:
            found = <ws_in_flight *>malloc(room * sizeof(ws_in_flight))
            if found == NULL:
                raise MemoryError()
            try:
                with nogil:
                    count = ws_tracker_in_flight(&self.mapped, found, <size_t>room)
                if count < 0:
                    raise OSError(-count, f"{os.strerror(-count)}: could not list writes in flight")
                if count <= room:
                    return [
                        InFlight(one.key, one.sector, one.state & 0xffffffff, one.state)
                        for one in found[:count]
                    ]
                room = 2 * count
            finally:
                free(found)

    def forget(self, object write):
        """Drop a note of `in_flight`, unless it has changed."""
        cdef ws_in_flight one
        cdef int code
        self.described()
        one.key, one.sector, one.state = write.key, write.sector, write.state
        code = ws_tracker_forget(&self.mapped, &one)
        if code:
            raise OSError(-code, f"{os.strerror(-code)}: could not forget a write in flight")

    def close(self):
        """Unmap; the kernel goes on marking while the pins exist. Views of `words` stay valid."""
        ws_tracker_unmap(&self.mapped)
        self.memory = None

    def destroy(self):
        """Detach and remove the pins, then close. Safe to call twice."""
        remove(self.pin_dir)
        self.close()
