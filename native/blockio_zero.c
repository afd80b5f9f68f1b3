/* Zeroing and discarding: the cheapest method that the device has not refused. */
#define _GNU_SOURCE
#include "blockio_steps.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>

#define ZEROS_BYTES (256u << 10)

/* Never written. Not const, so that it costs no space in the file. */
static _Alignas(PAGE_BYTES) unsigned char zeros[ZEROS_BYTES];

/* On a block device this is blkdev_fallocate(): write-zeroes that may unmap, and fails where the
 * device cannot, so the range reads as zeros if it succeeds. */
static int punch(const struct ws_device *dev, uint64_t offset, uint64_t length) {
    int mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
    return fallocate(dev->fd, mode, (off_t)offset, (off_t)length);
}

static int zero_out(const struct ws_device *dev, uint64_t offset, uint64_t length) {
    uint64_t range[2] = {offset, length};
    if (dev->is_block)
        return ioctl(dev->fd, BLKZEROOUT, range);
    int mode = FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE;
    return fallocate(dev->fd, mode, (off_t)offset, (off_t)length);
}

static int discard(const struct ws_device *dev, uint64_t offset, uint64_t length) {
    uint64_t range[2] = {offset, length};
    return dev->is_block ? ioctl(dev->fd, BLKDISCARD, range) : punch(dev, offset, length);
}

/* Call `method` over the range in steps, so that a failure is known to within one. */
static int in_steps(int (*method)(const struct ws_device *, uint64_t, uint64_t),
                    const struct ws_device *dev, uint64_t offset, uint64_t length,
                    struct ws_attempt *why) {
    while (length > 0) {
        uint64_t step = ws_least(length, STEP_BYTES);
        if (method(dev, offset, step) == 0) {
            offset += step;
            length -= step;
        } else if (errno != EINTR)
            return ws_fail(why, offset, errno);
    }
    return 0;
}

/* "I cannot do that" as opposed to "I tried and it went wrong". Ranges are checked before, so
 * EINVAL speaks of the method. */
static bool is_refusal(int rc) {
    return rc == -EOPNOTSUPP || rc == -ENOSYS || rc == -ENOTTY || rc == -EINVAL || rc == -ENODEV;
}

static int write_zeros(const struct ws_device *dev, uint64_t offset, uint64_t length,
                       struct ws_attempt *why) {
    int rc = 0;
    while (rc == 0 && length > 0) {
        uint64_t step = ws_least(length, ZEROS_BYTES);
        rc = ws_dev_move(dev, true, (char *)zeros, offset, step, why);
        offset += step;
        length -= step;
    }
    return rc;
}

int ws_dev_zero(struct ws_device *dev, uint64_t offset, uint64_t length, struct ws_attempt *why) {
    int rc = ws_dev_begin(dev, "zero", offset, length, why);
    if (rc != 0)
        return rc;
    if ((dev->refused & WS_ZERO_PUNCH) == 0) {
        rc = in_steps(punch, dev, offset, length, why);
        if (!is_refusal(rc))
            return rc;
        dev->refused |= WS_ZERO_PUNCH;
    }
    if ((dev->refused & WS_ZERO_ZEROOUT) == 0) {
        rc = in_steps(zero_out, dev, offset, length, why);
        if (!is_refusal(rc))
            return rc;
        dev->refused |= WS_ZERO_ZEROOUT;
    }
    return write_zeros(dev, offset, length, why);
}

int ws_dev_discard(const struct ws_device *dev, uint64_t offset, uint64_t length,
                   struct ws_attempt *why) {
    int rc = ws_dev_begin(dev, "discard", offset, length, why);
    if (rc != 0)
        return rc;
    rc = in_steps(discard, dev, offset, length, why);
    return is_refusal(rc) ? -EOPNOTSUPP : rc;
}

/* Replace the first `length` bytes of the logical block at `offset`. */
static int patch_block(struct ws_device *dev, const void *data, uint64_t offset, uint64_t length,
                       struct ws_attempt *why) {
    void *block;
    *why = (struct ws_attempt){"write", offset, length, offset};
    if (posix_memalign(&block, PAGE_BYTES, dev->logical) != 0)
        return -ENOMEM;
    int rc = ws_dev_read(dev, block, offset, dev->logical, why);
    if (rc == 0) {
        memcpy(block, data == NULL ? zeros : data, length);
        rc = ws_dev_write(dev, block, offset, dev->logical, why);
    }
    free(block);
    return rc;
}

int ws_dev_write_end(struct ws_device *dev, const void *data, uint64_t offset, uint64_t length,
                     struct ws_attempt *why) {
    uint64_t rest = dev->is_block ? length % dev->logical : 0, whole = length - rest;
    int rc = data == NULL ? ws_dev_zero(dev, offset, whole, why)
                          : ws_dev_write(dev, data, offset, whole, why);
    if (rc != 0 || rest == 0)
        return rc;
    const char *last = data == NULL ? NULL : (const char *)data + whole;
    return patch_block(dev, last, offset + whole, rest, why);
}
