/* Steps that reads, writes and zeroing share. Private to blockio_*.c. */
#ifndef WARMSYNC_BLOCKIO_STEPS_H
#define WARMSYNC_BLOCKIO_STEPS_H

#include "blockio_impl.h"

#define PAGE_BYTES 4096u
/* One system call moves at most 0x7ffff000 bytes (read(2)); this keeps steps aligned. */
#define STEP_BYTES (UINT64_C(1) << 30)

static inline uint64_t ws_least(uint64_t a, uint64_t b) {
    return a < b ? a : b;
}

static inline int ws_fail(struct ws_attempt *why, uint64_t at, int error) {
    why->failed_at = at;
    return -error;
}

/* Note what is attempted and refuse what the kernel would misunderstand. The size is asked each
 * time (some 0.1 us): a file must not grow, and a write past the end of a device is ENOSPC from the
 * kernel, which would be taken for a full disk. */
int ws_dev_begin(const struct ws_device *dev, const char *verb, uint64_t offset, uint64_t length,
                 struct ws_attempt *why);

/* Direct I/O moves whole pages of a file; the short page at the end goes through the page cache,
 * so that no page is ever accessed both ways. The kernel keeps the two views of a file coherent. */
int ws_dev_move(const struct ws_device *dev, bool write, char *data, uint64_t offset,
                uint64_t length, struct ws_attempt *why);

#endif
