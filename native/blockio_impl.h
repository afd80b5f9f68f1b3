/* Direct I/O on block devices and regular files: one open device and what can be done with it.
 *
 * Compiled into each extension that moves bytes (blockio, frame, scan): all state is in the struct.
 * Every function is thread-safe on an open device and needs no GIL. Results are 0 or -errno; what
 * was attempted, and where it failed, is then in `struct ws_attempt`. */
#ifndef WARMSYNC_BLOCKIO_IMPL_H
#define WARMSYNC_BLOCKIO_IMPL_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Ways to zero that a device can refuse. Writing zeros is what remains, so it has no flag. */
#define WS_ZERO_PUNCH 1u
#define WS_ZERO_ZEROOUT 2u

struct ws_attempt;

/* A range of the device and its bytes in memory. */
struct ws_piece {
    uint64_t offset;
    uint64_t length;
    char *data;
};

/* Bytes that no descriptor of ours shows, such as an NBD export: read-only. */
struct ws_remote {
    /* Read all pieces, at once if that can be. 0, or -errno with `failed_at`. Thread-safe. */
    int (*read)(struct ws_remote *remote, const struct ws_piece *pieces, size_t count,
                struct ws_attempt *why);
    /* Free it. */
    void (*close)(struct ws_remote *remote);
    _Atomic uint64_t size;
};

struct ws_device {
    struct ws_remote *remote; /* NULL: all goes through `fd` */
    int fd;                   /* O_DIRECT where is_direct */
    int tail_fd; /* the same file, buffered, for its last, short page; -1 where fd serves for all */
    bool is_block;
    bool is_direct;
    bool is_writable;
    uint32_t logical;         /* logical block size: unit of offsets and lengths */
    uint32_t physical;        /* what the device can write without reading first */
    uint32_t memory_align;    /* what direct I/O asks of addresses */
    _Atomic uint32_t refused; /* WS_ZERO_* */
    pthread_mutex_t flushing;
    int flush_error; /* -errno of the first flush that failed; see ws_dev_flush() */
};

struct ws_attempt {
    const char *verb;
    uint64_t offset;
    uint64_t length;
    uint64_t failed_at; /* everything before this byte was done */
};

/* Open `path`, claiming it if `exclusive`. -errno, and `step` names what was refused. */
int ws_dev_open(struct ws_device *dev, const char *path, bool writable, bool exclusive,
                const char **step);
void ws_dev_close(struct ws_device *dev);

/* Ask the kernel now: devices and files change size. */
int ws_dev_size(const struct ws_device *dev, uint64_t *size);

/* Offsets are multiples of the logical block size, and lengths too, but that a transfer to or from
 * a file may end anywhere. Nothing is moved beyond the end of the device: that is EIO, and so a
 * file never grows. A transfer that ends early is EIO; EINTR is retried. */
int ws_dev_read(const struct ws_device *dev, void *data, uint64_t offset, uint64_t length,
                struct ws_attempt *why);
int ws_dev_write(const struct ws_device *dev, const void *data, uint64_t offset, uint64_t length,
                 struct ws_attempt *why);

/* The same for `count` offset, length pairs, whose bytes stand one after the other in `data`. */
int ws_dev_read_batch(const struct ws_device *dev, const uint64_t *pairs, size_t count, void *data,
                      struct ws_attempt *why);
int ws_dev_write_batch(const struct ws_device *dev, const uint64_t *pairs, size_t count,
                       const void *data, struct ws_attempt *why);

/* Is this what block/blk-core.c (blk_errors) makes of one bad place: I/O, medium, target,
 * protection? All else (no such device, no memory, a request that makes no sense) concerns the
 * whole device. */
bool ws_is_of_a_place(int rc);

/* A range that could not be read, and why (errno). */
struct ws_unread {
    uint64_t offset;
    uint64_t length;
    int error;
};

/* Places of `unit` bytes that one call may lose: more is not a bad sector, it is a bad disk. */
#define WS_UNREAD_MAX 1024u

/* What can be had of a batch that could not be read. */
struct ws_salvage {
    uint32_t unit;     /* what is lost with a sector in it; a multiple of 4096 */
    uint32_t may_lose; /* so many units; the next one is an error */
    uint64_t *pairs;   /* what was read, as for ws_dev_read_batch() */
    size_t room;       /* in `pairs`; twice what was asked for, and 256, is always enough */
    size_t count;      /* of pairs */
    struct ws_unread unread[WS_UNREAD_MAX];
    size_t unread_count;
    uint32_t lost; /* units */
    uint64_t read_bytes;
    size_t joint; /* private: pairs up to here are not added to */
};

/* Read a batch again, around what cannot be read: that is listed, and what could be is moved
 * together in `data`. -errno if the device as a whole fails, or loses more than it may. */
int ws_dev_salvage(const struct ws_device *dev, const uint64_t *pairs, size_t count, void *data,
                   struct ws_salvage *salvage, struct ws_attempt *why);

/* Make the range read as zeros by the cheapest method that the device has not refused. */
int ws_dev_zero(struct ws_device *dev, uint64_t offset, uint64_t length, struct ws_attempt *why);

/* Give the range back to the device; what it reads as then is up to the device. -EOPNOTSUPP. */
int ws_dev_discard(const struct ws_device *dev, uint64_t offset, uint64_t length,
                   struct ws_attempt *why);

/* Write, or zero (data is NULL), a range whose end may fall within a logical block: the end of a
 * volume on a device of larger blocks. The rest of that block is read and put back, so nobody
 * else may be writing it. */
int ws_dev_write_end(struct ws_device *dev, const void *data, uint64_t offset, uint64_t length,
                     struct ws_attempt *why);

/* Make durable what was written, here or through the page cache of this device. The kernel tells a
 * failure once, to whoever asks first, and forgets it: of a device that we write to every later
 * flush fails too, until it is opened anew. */
int ws_dev_flush(struct ws_device *dev, struct ws_attempt *why);

/* 1 or 0: BLKROGET; for a file, that nobody has write permission. Or -errno. */
int ws_dev_is_read_only(const struct ws_device *dev);
/* The fence of a block device. */
int ws_dev_set_read_only(const struct ws_device *dev, bool read_only);

/* What a loop device, or a partition of one, stands on. */
struct ws_loop {
    uint64_t device; /* st_dev of the backing file in user space's encoding */
    uint64_t inode;
    uint64_t offset;
    uint64_t size_limit; /* 0: none */
};

/* -errno for anything but a loop device whose bytes are those of its file. */
int ws_loop_status(int fd, struct ws_loop *loop);

/* Find the next range at or after `from` and below `limit` that may hold data; one of fewer than
 * `least` bytes is reported as that long. Sets start == end == limit if there is none. -errno where
 * the file cannot say. */
int ws_next_data(int fd, uint64_t from, uint64_t limit, uint64_t least, uint64_t *start,
                 uint64_t *end);

#endif
